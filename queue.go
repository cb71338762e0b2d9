package taskexec

import (
	"cmp"
	"container/heap"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// A queue holds the waiting tasks of one category in a run, and knows the
// sessions that take from it. A group lends it its tasks and waits until each has
// its outcome. A task is in one of three places: waiting here, held by one session,
// or settled; whoever moves it holds mu.
type queue struct {
	run      *run
	category string
	settled  chan struct{} // gets a token when the last lent task is settled
	low      chan struct{} // gets a token when few tasks wait, or none are sent any more
	lending  bool          // its group has begun and lends more; for the goroutine that lends

	mu       sync.Mutex    // guards following, and the fields of sessions that say so
	waiting  fifo[*Result] // not sent yet, in input order
	again    byIndex       // to be sent again; they come before those of waiting that are later in the input
	delayed  byDue         // to be sent again in a while, because they failed
	retry    *time.Timer   // for the first of delayed
	links    []*link       // one for each worker listed, in that order
	sessions []*session    // those that are not over
	live     []*session    // those that take tasks
	slots    int           // of live
	inFlight int           // held by sessions
	unlent   int           // of the group, as far as known
	open     int           // lent and not settled, and one more while the group may lend more
	counts   Counts        // of the group
	begun    time.Time     // when the group was
	planned  int           // tasks of the run, as far as known
	total    Counts        // of the run
	failure  error         // the first task that is not Done
	halted   halt
	why      error                // what settles the tasks that are not sent any more
	idle     fifo[*session]       // those of live that may have a free slot
	roomy    fifo[*session]       // those that may have room beyond their slots
	giving   fifo[*session]       // those that may have something to give back
	free     int                  // slots of live that are not in use
	ahead    int                  // tasks in flight beyond slots that could be asked back
	awaited  int                  // tasks asked back of which an answer is expected
	evener   *time.Timer          // for what was not asked back, or not returned
	evening  bool                 // evener runs
	patience *time.Timer          // for tasks that wait while no worker is left; nil while one is
	left     time.Time            // when the last worker left, while patience runs
	waited   time.Duration        // the time without a worker before that and since anything was executed or lost
	over     bool                 // no session may join any more
	news     []*Result            // settled, and not told to the delivery yet
	strikes  map[*Result][]string // the workers that were lost with a suspect alone in their windows
	cramped  bool                 // a session of live may be
	troubles Troubles
}

// A halt is how a run is stopped before its end. It only grows.
type halt uint8

const (
	notHalted  halt = iota
	haltSoft        // send no more, take back what has not started, let the rest finish
	haltCancel      // the same, and cancel what runs
)

// A flight is a task held by a session.
type flight struct {
	result  *Result
	sent    time.Duration // since the run started
	cost    int32
	suspect bool // it was on a session that was lost, and is now on one that holds no more than its slots
	asked   bool // it was asked back
}

// maxStrikes is how often a worker may be lost with the same suspect before the
// task is not sent any more: a task that takes down its worker would go on to
// take down all of them.
const maxStrikes = 3

// byIndex is a heap of tasks, the earliest in the input on top.
type byIndex []*Result

func (h byIndex) Len() int           { return len(h) }
func (h byIndex) Less(i, j int) bool { return h[i].Index < h[j].Index }
func (h byIndex) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *byIndex) Push(x any)        { *h = append(*h, x.(*Result)) }
func (h *byIndex) Pop() any {
	old := *h
	x := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return x
}

// byDue is a heap of tasks that wait for a time, the next on top.
type byDue []dueTask

type dueTask struct {
	result *Result
	due    time.Time
}

func (h byDue) Len() int           { return len(h) }
func (h byDue) Less(i, j int) bool { return h[i].due.Before(h[j].due) }
func (h byDue) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *byDue) Push(x any)        { *h = append(*h, x.(dueTask)) }
func (h *byDue) Pop() any {
	old := *h
	x := old[len(old)-1]
	old[len(old)-1] = dueTask{}
	*h = old[:len(old)-1]
	return x
}

// join adds a session that is ready. q.mu is held.
func (q *queue) join(s *session) {
	if q.patience != nil {
		// A worker that comes and goes and executes nothing does not make the
		// run wait on and on.
		q.patience.Stop()
		q.patience = nil
		q.waited += time.Since(q.left)
	}
	q.sessions = append(q.sessions, s)
	q.live = append(q.live, s)
	q.slots += s.slots
	s.live = true
	q.weigh(s)
	s.wire.wakeWriter()
}

// unlock releases q.mu, and then acts on what the section under the lock found
// out: that nobody takes the tasks that wait, or that a task failed. Every section
// that could find out either ends with unlock.
func (q *queue) unlock() {
	q.tell()
	orphaned, failure := q.orphaned(), q.failure
	if wait := q.run.config.workerWait; orphaned && wait > 0 {
		orphaned = false
		if q.patience == nil && !q.over {
			q.left = time.Now()
			q.patience = time.AfterFunc(wait-q.waited, q.giveUp)
		}
	}
	q.mu.Unlock()
	if orphaned {
		q.run.halt(haltSoft, q.noWorker())
	}
	if failure != nil && q.run.config.onFailure == StopSoon {
		q.run.stopSoon(failure)
	}
}

// tell tells the delivery of all that was settled, at once. Each section that
// settles anything ends with tell, if not with unlock. q.mu is held.
func (q *queue) tell() {
	if len(q.news) > 0 {
		q.run.delivery.settled(q.news...)
		clear(q.news)
		q.news = q.news[:0]
	}
}

// giveUp ends the run if its tasks have waited for a worker in vain.
func (q *queue) giveUp() {
	q.mu.Lock()
	orphaned := q.orphaned() && !q.over && q.patience != nil
	// A worker may have come, and left again, just before; or one that drains
	// has reported something since the timer was set.
	if rest := q.run.config.workerWait - q.waited - time.Since(q.left); orphaned && rest > 0 {
		q.patience.Reset(rest)
		orphaned = false
	}
	q.mu.Unlock()
	if orphaned {
		q.run.halt(haltSoft, q.noWorker())
	}
}

// progressed lets the wait for a worker begin anew. q.mu is held.
func (q *queue) progressed() { q.waited = 0 }

// shut lets no more sessions join, stops the timers, and returns the sessions
// that are left.
func (q *queue) shut() []*session {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.over = true
	q.stopTimers()
	return slices.Clone(q.sessions)
}

// stopTimers stops what would send or give up later. q.mu is held.
func (q *queue) stopTimers() {
	if q.patience != nil {
		q.patience.Stop()
	}
	if q.retry != nil {
		q.retry.Stop()
	}
	if q.evener != nil {
		q.evener.Stop()
	}
}

// lendAtOnce is how many tasks are lent in one go. More are lent when fewer
// than lendAhead wait, or aheadEach for each session: enough to send while they
// are made ready, and few enough to be in the processor's cache when they are
// sent.
const (
	lendAtOnce = 4096
	lendAhead  = 4 * lendAtOnce
	aheadEach  = 64
)

// isLow says whether more should be lent. q.mu is held.
func (q *queue) isLow() bool {
	return q.waiting.len() < max(lendAhead, aheadEach*len(q.live))
}

// begin starts a group, of which n tasks are known. What is lent from here on
// belongs to it, until finish.
func (q *queue) begin(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.begun = time.Now()
	q.unlent = n
	q.counts = Counts{}
	q.open = 1
}

// lend puts tasks of the group in the queue, and wakes sessions for them. It
// returns one more, which the caller is to wake or whose wire it is to flush; nil
// if there is none.
func (q *queue) lend(results []Result, indices []int) *session {
	q.mu.Lock()
	defer q.unlock()
	for _, i := range indices {
		q.waiting.push(&results[i])
	}
	q.unlent -= len(indices)
	return q.lent(len(indices))
}

// awaitLow waits until few tasks wait, so that more should be lent.
func (q *queue) awaitLow() {
	for {
		q.mu.Lock()
		low := q.isLow()
		q.mu.Unlock()
		if low {
			return
		}
		<-q.low
	}
}

// tellLow wakes awaitLow if few tasks wait. q.mu is held.
func (q *queue) tellLow() {
	if q.isLow() {
		select {
		case q.low <- struct{}{}:
		default:
		}
	}
}

// lendOne is as lend, for one task of the group that no plan had foreseen.
func (q *queue) lendOne(r *Result) *session {
	q.mu.Lock()
	defer q.unlock()
	q.planned++
	q.waiting.push(r)
	return q.lent(1)
}

// lent finds takers for n tasks that now wait, and returns the first of them,
// which it does not wake. q.mu is held.
func (q *queue) lent(n int) *session {
	q.open += n
	if q.halted != notHalted {
		q.settleWaiting()
		return nil
	}
	first := q.taker()
	if first != nil {
		q.wakeTakers(n - 1)
	}
	return first
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
	return q.waits() > 0 && len(q.live) == 0 && q.halted == notHalted
}

// waits is how many tasks could be sent now. q.mu is held.
func (q *queue) waits() int { return q.waiting.len() + len(q.again) }

// coming is how many tasks wait or are about to: a Run's group lends what is left
// of it as soon as few wait, a Stream's when its consumer has room. q.mu is held.
func (q *queue) coming() int {
	if q.run.delivery != nil {
		return q.waits()
	}
	return q.waits() + q.unlent
}

// first is the task to be sent next; nil if none waits. q.mu is held.
func (q *queue) first() *Result {
	switch {
	case len(q.again) > 0 && (q.waiting.len() == 0 || q.again[0].Index < q.waiting.first().Index):
		return q.again[0]
	case q.waiting.len() > 0:
		return q.waiting.first()
	}
	return nil
}

// drop takes r away, which is first. q.mu is held.
func (q *queue) drop(r *Result) {
	if len(q.again) > 0 && q.again[0] == r {
		heap.Pop(&q.again)
		return
	}
	q.waiting.pop()
}

// limit is how many tasks s may hold now: as many as its window, but beyond its
// slots none that the free slots of others would start, and of what is left of the
// group no more than its share by slots; yet never fewer than it has slots. q.mu
// is held.
func (q *queue) limit(s *session) int {
	switch {
	case s.alone != nil:
		return 1
	case s.suspects > 0 || q.run.config.atMostOnce:
		return s.slots
	}
	left := int64(q.waits() + q.unlent + q.inFlight)
	all := int64(max(q.slots, 1))
	share := (left*int64(s.slots) + all - 1) / all
	window := min(s.mayHold(), max(s.slots, s.held.len())+max(q.coming()-q.free, 0))
	return max(s.slots, int(min(int64(window), share)))
}

// worthWaking says whether s may hold enough more tasks that its writer should
// send them: any for which it has a free slot, and otherwise a good part of what
// may wait at the worker, so that tasks go out together. q.mu is held.
func (q *queue) worthWaking(s *session) bool {
	held, limit := s.held.len(), q.limit(s)
	return held < s.slots && held < limit || limit-held >= max(1, (limit-s.slots)/4)
}

// limitWith is limit with r among what s holds; r may be nil. A task that was
// lost waits until s, with it, holds no more than its slots execute; and if one
// more loss would be the last, until it is alone, so that it is given up for what
// it does, and not for what another does beside it. A task that was too long to
// fit beside what s holds waits until s holds less. q.mu is held.
func (q *queue) limitWith(s *session, r *Result) int {
	limit := q.limit(s)
	switch {
	case r == nil:
		return limit
	case s.cramped && s.tooLong == r.Index:
		return min(limit, s.held.len())
	case r.Losses == 0:
		return limit
	case len(q.strikes[r]) == maxStrikes-1:
		return 1
	}
	return min(limit, s.slots)
}

// take appends RUN lines to dst for the tasks that s may now have, up to about
// a chunk. Only the writer of s calls it, so a session sends its tasks in the
// order of the queue. q.mu is held.
func (q *queue) take(s *session, dst []byte) []byte {
	switch {
	case !s.live || q.halted != notHalted || q.stopping():
		return dst
	case q.waits() == 0:
		q.offer(s)
		if q.uneven() {
			q.evenOut(time.Now())
		}
		return dst
	case !q.worthWaking(s):
		return dst
	}
	now := time.Now()
	before := s.held.len()
	queued, sent := now.Sub(q.begun), now.Sub(q.run.started)
	limit := q.limit(s) // taking moves tasks, and leaves as many as there were
	for r := q.first(); r != nil && s.held.len() < limit && len(dst) < chunkBytes; r = q.first() {
		suspect := r.Losses > 0
		if suspect {
			if limit = q.limitWith(s, r); s.held.len() >= limit {
				break
			}
		}
		start := len(dst)
		if len(r.Task.Instruction) < s.maxLine { // else do not even try
			dst = appendRun(dst, r.Index, r.Attempts+1, cmp.Or(r.Task.Timeout, q.run.config.taskTimeout), r.Task.Instruction)
		}
		size := len(dst) - start
		if size == 0 || size > s.maxLine {
			dst = dst[:start]
			q.drop(r)
			q.settleUnsent(r, Failed, fmt.Errorf("an instruction of %d bytes does not fit in a line of worker %s, which takes %d bytes, escapes included",
				len(r.Task.Instruction), quoteUnlessPlain(s.name), s.maxLine))
			if q.stopping() {
				break
			}
			continue
		}
		cost := taskCost(size)
		if s.held.len() > 0 && s.cost+cost > windowBytes {
			dst = dst[:start]
			s.cramped, s.tooLong = true, r.Index
			q.cramped = true
			break
		}
		q.drop(r)
		r.Attempts++
		r.Worker = s.name
		r.Queued = queued
		f, _ := s.held.add(r.Index)
		f.result, f.sent, f.cost, f.suspect = r, sent, int32(cost), suspect
		if suspect {
			s.suspects++
			if limit == 1 {
				s.alone = r
			}
			q.wakeTakers(q.waits()) // those that had to leave it to another session
		}
		s.link.sent++
		s.cost += cost
		q.inFlight++
		q.run.events.taskSent(q.run.id, r, s.addr)
	}
	if held := s.held.len(); held > before {
		s.pace.sent(before, held, now)
		s.barren = false
		q.weigh(s)
	}
	q.offer(s)
	if q.cramped {
		// Another session may have room for what s leaves; or for what follows a
		// task that it had to leave, and that s has taken.
		q.cramped = slices.ContainsFunc(q.live, func(l *session) bool { return l.cramped })
		q.wakeTakers(q.waits())
	}
	q.tellLow()
	return dst
}

// stopping says whether unlock is about to halt the run. q.mu is held.
func (q *queue) stopping() bool {
	return q.failure != nil && q.run.config.onFailure == StopSoon
}

// release takes a task out of what s holds, and says when it was sent. It returns
// nil if s does not hold it. q.mu is held.
func (q *queue) release(s *session, task int) (r *Result, sent time.Duration) {
	i, ok := s.held.find(task)
	if !ok {
		return nil, 0
	}
	f := s.held.at(i)
	r, sent = f.result, f.sent
	s.cost -= int(f.cost)
	s.cramped = false
	q.inFlight--
	if f.suspect {
		s.suspects--
	}
	if s.alone == r {
		s.alone = nil
	}
	if f.asked && s.awaited > 0 {
		s.setAwaited(s.awaited - 1)
	}
	s.held.remove(i)
	return r, sent
}

// failed takes note of a FAIL: the task is tried again, or settled. q.mu is
// held.
func (q *queue) failed(s *session, r *Result, m *message, roundTrip time.Duration, now time.Time) {
	why := &RemoteError{Kind: m.word, Text: cut(m.text, maxFailText)}
	outcome := Failed
	if m.word == KindCanceled {
		outcome = Canceled
	}
	s.link.counts.add(outcome)
	delay, retry := q.run.config.retry.delay(r.Retries+1, m.word, m.time, q.run.config.jitter)
	if !retry || q.halted != notHalted {
		q.settle(r, outcome, why, roundTrip)
		return
	}
	r.Retries++
	q.troubles.Retries++
	r.Err = why // in case there is no other attempt
	q.run.events.taskRetried(q.run.id, r, s.addr, delay)
	heap.Push(&q.delayed, dueTask{r, now.Add(delay)})
	q.setRetry(now)
}

// setRetry sets the timer for the first task that is delayed. q.mu is held.
func (q *queue) setRetry(now time.Time) {
	if len(q.delayed) == 0 || q.over {
		return
	}
	d := q.delayed[0].due.Sub(now)
	if q.retry == nil {
		q.retry = time.AfterFunc(d, q.retryNow)
		return
	}
	q.retry.Reset(d)
}

// retryNow puts back the tasks whose delay is over.
func (q *queue) retryNow() {
	q.mu.Lock()
	defer q.unlock()
	now := time.Now()
	var due []*Result
	for len(q.delayed) > 0 && !q.delayed[0].due.After(now) {
		due = append(due, heap.Pop(&q.delayed).(dueTask).result)
	}
	q.putBack(due)
	q.setRetry(now)
}

// settle gives a task its outcome. why is ignored if that is Done; roundTrip
// is 0 unless a report came. Afterwards r no longer belongs to the caller: a
// Stream uses it for another task. q.mu is held.
func (q *queue) settle(r *Result, o Outcome, why error, roundTrip time.Duration) {
	r.Outcome = o
	if q.strikes != nil {
		delete(q.strikes, r)
	}
	if o == Done {
		r.Err = nil
	} else {
		r.Err = taskError(r, why)
		if q.failure == nil {
			q.failure = r.Err
		}
	}
	q.counts.add(o)
	q.total.add(o)
	q.run.events.taskDone(q.run.id, r, roundTrip)
	if q.run.delivery != nil {
		q.news = append(q.news, r)
	}
	q.close()
}

func taskError(r *Result, why error) *TaskError {
	return &TaskError{Index: r.Index, Task: r.Task, Outcome: r.Outcome, Worker: r.Worker, Attempt: r.Attempts, Err: why}
}

// putBack makes tasks wait again, or settles them if nothing is sent any more.
// q.mu is held.
func (q *queue) putBack(back []*Result) {
	if len(back) == 0 {
		return
	}
	for _, r := range back {
		heap.Push(&q.again, r)
	}
	if q.halted != notHalted {
		q.settleWaiting()
		return
	}
	q.wakeTakers(len(back))
}

// settleWaiting settles what will not be sent any more. q.mu is held.
func (q *queue) settleWaiting() {
	rest := append(q.again, q.waiting.all()...)
	for _, d := range q.delayed {
		rest = append(rest, d.result)
	}
	q.again, q.waiting, q.delayed = nil, fifo[*Result]{}, nil
	q.tellLow()
	slices.SortFunc(rest, func(a, b *Result) int { return cmp.Compare(a.Index, b.Index) })
	for _, r := range rest {
		q.settleUnsent(r, Skipped, q.why)
	}
}

// settleUnsent settles a task that is not sent, or not again: as the last attempt
// ended, or with outcome o if there was none. q.mu is held.
func (q *queue) settleUnsent(r *Result, o Outcome, why error) {
	switch {
	case r.Err != nil:
		r.Retries-- // the retry that it waits for is not made
		q.troubles.Retries--
		q.settle(r, Failed, fmt.Errorf("%w (and not tried again: %w)", r.Err, inside{why}), 0)
	case r.Losses > 0:
		q.settle(r, Unknown, fmt.Errorf("%w, and is not sent again: %w", ErrOutcomeUnknown, inside{why}), 0)
	default:
		q.settle(r, o, why, 0)
	}
}

// loseSlot takes note that a handler of s is stuck in its slot for good. A
// session without slots takes no more, and is asked to give back what waits
// behind the stuck ones. q.mu is held.
func (q *queue) loseSlot(s *session) {
	if s.slots == 0 {
		return // the worker reports more stuck tasks than it said it has slots
	}
	q.troubles.Stuck++
	s.slots--
	if s.live {
		q.slots--
	}
	if s.slots == 0 {
		q.retire(s)
		s.recall()
	}
}

// retire ends s's part in the queue: it takes no more tasks. The other sessions
// may have been left asleep because s was woken for what waits, and their shares
// of it have grown. q.mu is held.
func (q *queue) retire(s *session) {
	if !s.live {
		return
	}
	s.live = false
	q.live = slices.DeleteFunc(q.live, func(l *session) bool { return l == s })
	q.slots -= s.slots
	q.weigh(s)
	q.forget(s)
	q.wakeTakers(q.waits())
}

// takeBack makes what s holds wait again. Tasks that are lost may have run; those
// that are not lost were never started. q.mu is held.
func (q *queue) takeBack(s *session, lost bool) {
	held := s.flights()
	s.held.clear()
	s.cost, s.suspects, s.alone = 0, 0, nil
	q.inFlight -= len(held)
	var back []*Result
	for _, f := range held {
		if !lost {
			q.troubles.Returns++
		} else if q.lost(s, f) {
			continue
		}
		back = append(back, f.result)
	}
	q.putBack(back)
}

// lost takes note that a task was lost with its session. It settles the task
// if it must not be sent again, and says so. q.mu is held.
func (q *queue) lost(s *session, f flight) (settled bool) {
	r := f.result
	r.Losses++
	r.Err = nil // what an earlier attempt said is not how this one ended
	q.troubles.Losses++
	q.progressed() // each task is lost a few times at most
	switch {
	case q.run.config.atMostOnce:
		q.settle(r, Unknown, fmt.Errorf("%w, and it may be executed at most once: %w", ErrOutcomeUnknown, inside{cmp.Or(s.err, errSessionOver)}), 0)
		return true
	case f.suspect:
		if q.strikes == nil {
			q.strikes = make(map[*Result][]string)
		}
		workers := append(q.strikes[r], quoteUnlessPlain(s.name))
		q.strikes[r] = workers
		if len(workers) == maxStrikes {
			q.settle(r, Unknown, fmt.Errorf("%w; it was lost %d times with little else in flight, on %s, so it may be what brings workers down: %w",
				ErrOutcomeUnknown, maxStrikes, strings.Join(workers, ", "), inside{cmp.Or(s.err, errSessionOver)}), 0)
			return true
		}
	}
	return false
}

// errSessionOver is the reason given for a session that has none of its own.
var errSessionOver = errors.New("the session is over")

// halt stops sending. The sessions are told what it means for what they hold.
func (q *queue) halt(how halt, why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	defer q.tell()
	if how <= q.halted {
		return
	}
	q.halted = how
	q.why = why
	q.stopTimers()
	q.settleWaiting()
	for _, s := range q.sessions {
		s.halt(how, why)
	}
}

// abandon gives up on what is still held: its outcome is Unknown. A session that
// holds nothing is left to the end of the run.
func (q *queue) abandon(why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	defer q.tell()
	for _, s := range slices.Clone(q.sessions) {
		q.retire(s)
		held := s.flights()
		if len(held) == 0 {
			continue
		}
		for _, f := range held {
			q.release(s, f.result.Index)
			f.result.Losses++
			q.troubles.Losses++
			q.settle(f.result, Unknown, fmt.Errorf("%w: %w", ErrOutcomeUnknown, why), 0)
		}
		fault := faultf(codeTimeout, "tasks were not reported within %v after CANCEL", q.run.config.cancelGrace)
		s.leaveLocked(fault, len(held)) // before the run ends, and the reader finds only that the connection is over
		s.wire.endWithError(fault)
	}
}

// noWorker says why nobody takes the category's tasks any more.
func (q *queue) noWorker() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	var tried []string
	for _, l := range q.links {
		why := "worker at " + quoteUnlessPlain(l.addr) + ": it is shutting down"
		if l.session != nil && l.session.err != nil {
			why = unprefixed(l.session.err)
		}
		if named := (*WorkerError)(nil); errors.As(l.err, &named) {
			why += ", and then " + plainText(unprefixed(named.Err)) // the worker is named already
		}
		tried = append(tried, why)
	}
	waited := ""
	if wait := q.run.config.workerWait; wait > 0 {
		waited = fmt.Sprintf(" for %v", wait)
	}
	return fmt.Errorf("%w for category %s%s; start one of them again, or list more (%s)",
		ErrNoWorker, quote(q.category), waited, strings.Join(tried, "; "))
}
