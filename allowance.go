package taskexec

import "time"

// An allowance bounds the lines of a peer that bring no work with them: PING,
// PONG, RECALL, CANCEL, SHUTDOWN, DRAIN. Work and time renew it, so that a peer
// that uses these lines for what they are there for never runs out: a coordinator
// has reason to ask for each task in flight once, or twice. Only the reader uses
// it. The zero value is full.
type allowance struct {
	used  int
	since time.Time // from when time renews it
}

const (
	allowanceMost = 2 * windowTasks    // lines at once
	allowanceWork = 2                  // lines that a RUN is worth to the coordinator, and a report to the worker
	allowanceUnit = time.Second / 4000 // in which time brings one

	// heartbeatLeast is the shortest interval that WithHeartbeat may ask for, so
	// that time brings more than the PINGs of one side and the PONGs for the other
	// use up: a worker pings three times in a timeout, which is at least two of
	// these intervals.
	heartbeatLeast = time.Millisecond
)

// note takes note of a line, and says what is wrong with it if there are too
// many of its kind.
func (a *allowance) note(v verb) error {
	switch v {
	case verbRun, verbDone, verbFail, verbReturn:
		a.used = max(0, a.used-allowanceWork)
		return nil
	case verbGoodbye, verbError:
		return nil // nothing follows
	}
	switch a.used {
	case 0:
		a.since = time.Now()
	case allowanceMost:
		units := time.Since(a.since) / allowanceUnit
		a.used -= int(min(units, allowanceMost))
		a.since = a.since.Add(units * allowanceUnit) // what is left of a unit counts the next time
	}
	if a.used == allowanceMost {
		return faultf(codeFlood, "%s after %d lines that bring no work along", v, allowanceMost)
	}
	a.used++
	return nil
}
