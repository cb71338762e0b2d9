//go:build !race

package taskexec

const raceEnabled = false
