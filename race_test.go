//go:build race

package taskexec

const raceEnabled = true
