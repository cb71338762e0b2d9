package taskexec

import (
	"math"
	"time"
)

// How many tasks a session may have in flight.
//
// Too few, and the worker waits for the coordinator: a slot that has finished
// needs the next task at once, and asking for one takes a round trip. Too many,
// and they wait at a worker that turns out to be slow, while another is idle. So
// a session holds as many as the worker has slots, plus what the worker will
// start within the round trip and a little more:
//
//	slots + (round trip + half of it + 2 ms) / (time that the worker needs for a task)
//
// What was sent and has not started then waits at the worker for about 2 ms
// and half a round trip. The half is there because a window must be seen to be
// too small before it can grow: a worker that is given w tasks each round trip
// executes no more than that in it, however fast it is, and the formula without
// the half would go on giving it w. With it the window grows by half each time
// until the worker, and no longer the window, sets the pace.
//
// There are two upper bounds on the time that a worker needs for a task, and the
// lesser counts. It has reported n tasks in the time t since it was given the
// first of them, or since the reports before these, so it needs at most t/n: that
// is exact for a worker that never runs out of tasks. And a task comes back after
// a round trip and the time that it was at the worker, waiting included; so with
// all slots at work it needs at most that time divided by the number of slots:
// that is exact for a worker that is given no more tasks than it has slots. Times
// in which the worker held nothing do not count. A mean of times, rather than of
// rates, forgets within a few tasks that a worker that is slow now was fast. Each
// measure has the weight of its tasks in the mean: many that were fast outweigh
// the first that was not, when the worker and the connection were new.
//
// Whatever is measured, a window is at most four times what was in flight at
// once (mostGrowth). So a worker is never given thousands because of one task
// that took no time, and one that does nothing but such tasks still has
// thousands after half a dozen round trips.

// headStart is for how long a worker should have work, beyond what the round trip
// takes.
const headStart = 2 * time.Millisecond

// A pace is how fast a session's worker is, as far as reports have shown, and
// the window that follows from it. It does not look at the clock: its callers do.
type pace struct {
	window int           // how many tasks may be in flight
	trip   time.Duration // the round trip to the worker and back
	gap    time.Duration // the time that the worker needs for a task; 0 before anything is measured

	// What is being measured.
	began time.Time     // since then the worker has held something
	due   time.Time     // before this time no report is late
	n     int           // tasks reported since began
	spent time.Duration // from their sending to their reports, together
	peak  int           // most that was in flight since began
}

const (
	mostGrowth  = 4                      // windows grow to so many times what was in flight
	minMeasure  = 100 * time.Microsecond // what is shorter says little, unless the worker has reported all it held
	tripWeight  = 8                      // a new round trip has one part in so many of the mean
	gapMemory   = 3                      // what was measured before has the weight of so many tasks a slot
	shortestGap = 100 * time.Nanosecond
)

// tripTook takes note of how long a message and its answer took. The first is
// that of the greetings, the others are of heartbeats.
func (p *pace) tripTook(d time.Duration) {
	if p.trip == 0 {
		p.trip = d
		return
	}
	p.trip += (d - p.trip) / tripWeight
}

// sent takes note that tasks were sent at now. before is how many were in flight
// until then, and held how many are now.
func (p *pace) sent(before, held int, now time.Time) {
	if before == 0 {
		p.restart(now)
	}
	p.wantBy(now.Add(p.trip))
	p.peak = max(p.peak, held)
}

func (p *pace) wantBy(t time.Time) {
	if t.After(p.due) {
		p.due = t
	}
}

func (p *pace) restart(now time.Time) {
	p.began, p.n, p.spent, p.peak = now, 0, 0, 0
}

// reported takes note that n tasks were reported at now, and that held are left.
// spent is the time from their sending to their reports, added up. slots is how
// many the worker executes at a time, and most the most that the window may be.
func (p *pace) reported(n int, spent time.Duration, held, slots, most int, now time.Time) {
	if n == 0 {
		return
	}
	p.wantBy(now)
	p.n += n
	p.spent += spent
	elapsed := now.Sub(p.began)
	// With several slots reports come in clusters, and the time between two says
	// nothing before each slot has had its turn.
	if held > 0 && (p.n < slots || elapsed < max(p.trip, minMeasure)) {
		return
	}
	gap := elapsed / time.Duration(p.n)
	switch latency := p.spent / time.Duration(p.n); {
	case latency < p.trip:
		// The round trip is part of the latency, so it is no longer than that. If
		// the greetings took too long, the first tasks thus put it right; how long
		// the tasks themselves took is then not known yet.
		p.trip = latency
	default:
		gap = min(gap, (latency-p.trip)/time.Duration(max(slots, 1)))
	}
	gap = max(gap, shortestGap)
	if p.gap == 0 {
		p.gap = gap
	} else {
		n, earlier := time.Duration(max(p.n, slots)), gapMemory*time.Duration(max(slots, 1))
		p.gap += (gap - p.gap) * n / (n + earlier)
	}
	ahead := math.Round(float64(p.trip+p.trip/2+headStart) / float64(p.gap))
	target := slots + int(min(ahead, float64(windowTasks)))
	p.window = max(min(target, max(p.window, mostGrowth*p.peak), most), slots)
	p.restart(now)
	p.peak = held
}

// wait is for how long the last of so many tasks ahead of a worker's slots is
// expected to wait at now. A worker that reports less often than it used to is
// expected to go on like that.
func (p *pace) wait(ahead int, now time.Time) time.Duration {
	gap := max(p.gap, now.Sub(p.due))
	if gap > time.Hour {
		return time.Hour // for which multiples do not matter any more
	}
	return time.Duration(ahead) * gap
}
