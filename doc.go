// Package taskexec runs categorised work on other processes, in order, with
// nothing lost and no broker.
package taskexec
