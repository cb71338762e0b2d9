package taskexec

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// A RunSnapshot says how far a run has come.
type RunSnapshot struct {
	Run        string
	Elapsed    time.Duration
	Categories []CategorySnapshot // those that have been connected to, sorted
}

// Counts adds up the Counts of the categories.
func (s RunSnapshot) Counts() Counts {
	var sum Counts
	for _, c := range s.Categories {
		sum.sum(c.Counts)
	}
	return sum
}

// A CategorySnapshot counts the tasks of a category in a run. Each is Waiting,
// InFlight or one of Counts.
type CategorySnapshot struct {
	Category string
	Waiting  int // not sent, or to be sent again; in a Stream, of the tasks read so far
	InFlight int // sent, and not reported
	Counts   Counts
	Troubles Troubles
	Workers  []WorkerSnapshot // one for each address listed, in that order
}

// A WorkerSnapshot counts what the worker at an address has done for a
// category.
type WorkerSnapshot struct {
	Worker   string // the worker's name, or its address if it has none
	Addr     string
	Open     bool   // it may be sent tasks
	InFlight int    // tasks sent and not reported
	Sent     int    // sendings
	Redials  int    // sessions after the first
	Counts   Counts // of what it reported; a failure that is tried again is counted each time
}

// Snapshot says how far each run in progress has come, in no particular order. It
// takes a short lock for each category, and is cheap enough to poll.
func (c *Coordinator) Snapshot() []RunSnapshot {
	c.mu.Lock()
	runs := slices.Collect(maps.Keys(c.runs))
	c.mu.Unlock()
	snapshots := make([]RunSnapshot, len(runs))
	for i, r := range runs {
		snapshots[i] = RunSnapshot{Run: r.id, Elapsed: time.Since(r.started), Categories: r.snapshot()}
	}
	return snapshots
}

func (r *run) snapshot() []CategorySnapshot {
	var all []CategorySnapshot
	for _, q := range r.allQueues() {
		all = append(all, q.snapshot())
	}
	slices.SortFunc(all, func(a, b CategorySnapshot) int { return cmp.Compare(a.Category, b.Category) })
	return all
}

func (q *queue) snapshot() CategorySnapshot {
	q.mu.Lock()
	defer q.mu.Unlock()
	c := CategorySnapshot{
		Category: q.category,
		Waiting:  q.planned - q.inFlight - q.total.Total(),
		InFlight: q.inFlight,
		Counts:   q.total,
	}
	c.Troubles = q.troubles
	held := make(map[*link]int) // by a session that drains and those that follow it, together
	for _, s := range q.sessions {
		held[s.link] += s.held.len()
	}
	for _, l := range q.links {
		w := WorkerSnapshot{Worker: l.addr, Addr: l.addr, InFlight: held[l], Sent: l.sent, Redials: l.redials, Counts: l.counts}
		if s := l.session; s != nil {
			w.Worker, w.Open = s.name, s.live
		}
		c.Workers = append(c.Workers, w)
	}
	return c
}
