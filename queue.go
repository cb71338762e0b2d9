package taskexec

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// A queue holds what waits of one category in a run, and knows the sessions
// that take from it. A group lends it its tasks and waits until each has its
// outcome. A task is in one of three places: waiting here, held by one session,
// or settled; whoever moves it holds mu.
type queue struct {
	run      *run
	category string
	settled  chan struct{} // gets a token when the last lent task is settled

	mu       sync.Mutex // guards following, and the fields of sessions that say so
	waiting  []*Result  // in input order
	sessions []*session // all there ever were
	live     []*session // those that take tasks
	slots    int        // of live
	inFlight int        // held by sessions
	open     int        // lent and not settled, and one more while the group may lend more
	counts   Counts     // of the group
	begun    time.Time  // when the group was
	planned  int        // tasks of the run, as far as known
	total    Counts     // of the run
	failure  error      // the first task that is not Done
	halted   halt
	why      error // what settles the tasks that are not sent any more
	next     int   // where in live to look for a taker first
}

// A halt is how a run is stopped before its end. It only grows.
type halt uint8

const (
	notHalted  halt = iota
	haltSoft        // send no more, take back what has not started, let the rest finish
	haltCancel      // besides, cancel what runs
)

// A flight is a task held by a session.
type flight struct {
	result *Result
	cost   int
	sent   time.Time
}

// join adds a session that is ready.
func (q *queue) join(s *session) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.sessions = append(q.sessions, s)
	q.live = append(q.live, s)
	q.slots += s.slots
	s.live = true
}

// unlock releases q.mu, and then acts on what the section found out: that
// nobody takes the tasks that wait, or that a task failed. Every section that
// could find out either ends with it.
func (q *queue) unlock() {
	orphaned, failure := q.orphaned(), q.failure
	q.mu.Unlock()
	if orphaned {
		q.run.halt(haltSoft, q.noWorker())
	}
	if failure != nil && q.run.config.onFailure == StopSoon {
		q.run.stopSoon(failure)
	}
}

// begin starts a group. What is lent from here on belongs to it, until finish.
func (q *queue) begin() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.begun = time.Now()
	q.counts = Counts{}
	q.open = 1
}

// lend puts tasks of the group in the queue.
func (q *queue) lend(results []Result, indices []int) {
	q.mu.Lock()
	defer q.unlock()
	q.waiting = slices.Grow(q.waiting, len(indices))
	for _, i := range indices {
		q.waiting = append(q.waiting, &results[i])
	}
	q.lent(len(indices))
}

// lendOne puts a task of the group in the queue that no plan had foreseen.
func (q *queue) lendOne(r *Result) {
	q.mu.Lock()
	defer q.unlock()
	q.planned++
	q.waiting = append(q.waiting, r)
	q.lent(1)
}

// lent finds takers for n tasks that now wait. q.mu is held.
func (q *queue) lent(n int) {
	q.open += n
	if q.halted != notHalted {
		q.settleWaiting()
		return
	}
	q.wakeTakers(n)
}

// finish says that the group lends no more, waits until all of its tasks are
// settled, and counts their outcomes.
func (q *queue) finish() (Counts, time.Duration) {
	q.mu.Lock()
	q.close()
	q.mu.Unlock()
	<-q.settled
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.counts, time.Since(q.begun)
}

// close counts one task of the group out, or the group itself. q.mu is held.
func (q *queue) close() {
	q.open--
	if q.open == 0 {
		q.settled <- struct{}{}
	}
}

// orphaned says that tasks wait and nobody will take them. q.mu is held.
func (q *queue) orphaned() bool {
	return len(q.waiting) > 0 && len(q.live) == 0 && q.halted == notHalted
}

// wakeTakers wakes at most n of the sessions that have room. It goes round, so
// that single tasks are spread over the workers. q.mu is held.
func (q *queue) wakeTakers(n int) {
	for range q.live {
		if n == 0 {
			return
		}
		q.next = (q.next + 1) % len(q.live)
		if s := q.live[q.next]; len(s.held) < q.limit(s) {
			s.wire.wakeWriter()
			n--
		}
	}
}

// limit is how many tasks s may hold now: its window, but of what is left of
// the group no more than its share by slots, so that one worker does not hoard
// what others could execute; and never fewer than it has slots. q.mu is held.
func (q *queue) limit(s *session) int {
	left := int64(len(q.waiting) + q.inFlight)
	all := int64(max(q.slots, 1))
	share := (left*int64(s.slots) + all - 1) / all
	return int(min(int64(s.window), max(int64(s.slots), share)))
}

// take appends RUN lines to dst for the tasks that s may now have, up to about
// a chunk. Only the writer of s calls it, so a session sends its tasks in the
// order of the queue. q.mu is held.
func (q *queue) take(s *session, dst []byte) []byte {
	if !s.live || q.halted != notHalted || len(q.waiting) == 0 {
		return dst
	}
	now := time.Now()
	queued := now.Sub(q.begun)
	limit := q.limit(s) // taking moves tasks, and leaves as many as there were
	n := 0
	for _, r := range q.waiting {
		if len(s.held) >= limit || len(dst) >= chunkBytes {
			break
		}
		before := len(dst)
		if len(r.Task.Instruction) < s.maxLine { // else do not even try
			dst = appendMessage(dst, message{verb: verbRun, task: r.Index, attempt: r.Attempts + 1,
				time: cmp.Or(r.Task.Timeout, q.run.config.taskTimeout), text: r.Task.Instruction})
		}
		size := len(dst) - before
		if size == 0 || size > s.maxLine {
			dst = dst[:before]
			q.settle(r, Failed, fmt.Errorf("an instruction of %d bytes does not fit in a line of worker %s, which takes %d bytes, escapes included",
				len(r.Task.Instruction), quoteUnlessPlain(s.name), s.maxLine), 0)
			n++
			continue
		}
		cost := taskCost(size)
		if len(s.held) > 0 && s.cost+cost > windowBytes {
			dst = dst[:before]
			break
		}
		r.Attempts++
		r.Worker = s.name
		r.Queued = queued
		s.held[r.Index] = flight{r, cost, now}
		s.sent++
		s.cost += cost
		q.inFlight++
		n++
		q.run.events.taskSent(q.run.id, r, s.addr)
	}
	clear(q.waiting[:n])
	if n == len(q.waiting) {
		n, q.waiting = 0, q.waiting[:0] // keep the room for the next group
	}
	q.waiting = q.waiting[n:]
	return dst
}

// release takes a task out of what s holds. It reports false if s does not
// hold it. q.mu is held.
func (q *queue) release(s *session, task int) (flight, bool) {
	f, ok := s.held[task]
	if ok {
		delete(s.held, task)
		s.cost -= f.cost
		q.inFlight--
	}
	return f, ok
}

// settle gives a task its outcome. why is ignored if that is Done; roundTrip
// is 0 unless a report came. q.mu is held.
func (q *queue) settle(r *Result, o Outcome, why error, roundTrip time.Duration) {
	r.Outcome = o
	if o != Done {
		r.Err = taskError(r, why)
		if q.failure == nil {
			q.failure = r.Err
		}
	}
	q.counts.add(o)
	q.total.add(o)
	q.run.events.taskDone(q.run.id, r, roundTrip)
	q.run.delivery.settled(r)
	q.close()
}

func taskError(r *Result, why error) *TaskError {
	return &TaskError{Index: r.Index, Task: r.Task, Outcome: r.Outcome, Worker: r.Worker, Attempt: r.Attempts, Err: why}
}

// putBack has tasks wait again, or settles them if nothing is sent any more.
// q.mu is held.
func (q *queue) putBack(back []*Result) {
	if len(back) == 0 {
		return
	}
	byIndex := func(a, b *Result) int { return cmp.Compare(a.Index, b.Index) }
	slices.SortFunc(back, byIndex)
	merged := make([]*Result, 0, len(back)+len(q.waiting))
	rest := q.waiting
	for _, r := range back {
		for len(rest) > 0 && rest[0].Index < r.Index {
			merged, rest = append(merged, rest[0]), rest[1:]
		}
		merged = append(merged, r)
	}
	q.waiting = append(merged, rest...)
	if q.halted != notHalted {
		q.settleWaiting()
		return
	}
	q.wakeTakers(len(back))
}

// settleWaiting settles what will not be sent any more: never started, unless
// an attempt was lost. q.mu is held.
func (q *queue) settleWaiting() {
	for _, r := range q.waiting {
		if r.Losses > 0 {
			q.settle(r, Unknown, fmt.Errorf("lost with its session, and not sent again: %w", q.why), 0)
		} else {
			q.settle(r, Skipped, q.why, 0)
		}
	}
	q.waiting = nil
}

// loseSlot takes note that a handler of s is stuck in its slot for good. A
// session without slots takes no more, and is asked to give back what waits
// behind the stuck ones. q.mu is held.
func (q *queue) loseSlot(s *session) {
	s.slots--
	if s.live {
		q.slots--
	}
	if s.slots == 0 {
		q.retire(s)
		s.recall()
	}
}

// retire ends s's part in the queue: it takes no more. The others may have
// been left asleep because s was woken for what waits, and their shares of it
// have grown. q.mu is held.
func (q *queue) retire(s *session) {
	if !s.live {
		return
	}
	s.live = false
	q.live = slices.DeleteFunc(q.live, func(l *session) bool { return l == s })
	q.slots -= s.slots
	q.wakeTakers(len(q.waiting))
}

// takeBack empties what s holds. Tasks that are lost may have run; those that
// are not were never started. q.mu is held.
func (q *queue) takeBack(s *session, lost bool) []*Result {
	var back []*Result
	for _, f := range s.held {
		if lost {
			f.result.Losses++
		}
		back = append(back, f.result)
	}
	clear(s.held)
	s.cost = 0
	q.inFlight -= len(back)
	return back
}

// halt stops sending. The sessions are told what it means for what they hold.
func (q *queue) halt(how halt, why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if how <= q.halted {
		return
	}
	q.halted = how
	q.why = why
	q.settleWaiting()
	for _, s := range q.sessions {
		s.halt(how, why)
	}
}

// abandon gives up on what is still held: its outcome is Unknown.
func (q *queue) abandon(why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, s := range q.sessions {
		back := q.takeBack(s, true)
		q.retire(s)
		for _, r := range back {
			q.settle(r, Unknown, why, 0)
		}
		s.wire.endWithError(faultf(codeTimeout, "tasks were not reported in time after CANCEL"))
	}
}

// noWorker says why nobody takes the category's tasks any more.
func (q *queue) noWorker() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	var tried []string
	for _, s := range q.sessions {
		why := "it is shutting down"
		if s.err != nil {
			why = unprefixed(s.err)
		}
		tried = append(tried, fmt.Sprintf("%s: %s", s.addr, why))
	}
	return fmt.Errorf("%w for category %s; start one of them again, or list more (%s)",
		ErrNoWorker, quote(q.category), strings.Join(tried, "; "))
}
