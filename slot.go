package taskexec

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"strings"
	"time"
)

// A job is one attempt at a task, as it was received. It is small, and kept by
// value, because there may be millions a second.
type job struct {
	number      int
	attempt     int
	timeout     time.Duration
	cost        int32
	returned    bool // given back; it stays in the list of waiting jobs until its turn
	instruction string
}

// name names the job for people.
func (j *job) name() string {
	return fmt.Sprintf("task %d (%s)", j.number, quoteUnlessPlain(j.instruction))
}

// jobs is a list of waiting jobs. Each has a place, which is how many came
// before it; so any job with a place before that of the list's first has started.
type jobs struct {
	fifo[job]
	taken    int // the place of the first
	returned int // of those in the list
}

// end is the place of the next that is pushed.
func (q *jobs) end() int { return q.taken + q.len() }

// next takes the first job that was not returned, and puts it into j. It reports
// false if there is none.
func (q *jobs) next(j *job) bool {
	for q.len() > 0 {
		*j = q.fifo.first()
		q.drop()
		q.taken++
		if !j.returned {
			return true
		}
		q.returned--
	}
	return false
}

// giveBack marks the job at place as returned, and returns it; nil if the job has
// started. The instruction goes at once: it no longer counts towards the window.
func (q *jobs) giveBack(place int) *job {
	if place < q.taken {
		return nil
	}
	j := &q.all()[place-q.taken]
	j.returned = true
	j.instruction = ""
	q.returned++
	return j
}

// clean takes out what is returned, if that is half of the list or more, so that
// neither many RECALLs nor a slot that is busy for long make the list grow. It
// calls moved with the new place of each job that stays.
func (q *jobs) clean(moved func(number, place int)) {
	if q.returned == 0 || 2*q.returned < q.len() {
		return
	}
	kept := q.list[:0]
	for _, j := range q.all() {
		if !j.returned {
			moved(j.number, q.taken+len(kept))
			kept = append(kept, j)
		}
	}
	clear(q.list[len(kept):])
	q.fifo = fifo[job]{list: kept}
	q.returned = 0
}

// A jobContext is the context of a job's handler: the session's, with the name
// of the attempt in it. It is an object of its own, and never used again, since a
// handler may keep it.
type jobContext struct {
	session *workerSession
	number  int
	attempt int
}

func (c *jobContext) info() TaskInfo {
	return TaskInfo{Run: c.session.hello.Run, Task: c.number, Attempt: c.attempt, Coordinator: c.session.coordinator}
}

// The context is the session's.
func (c *jobContext) Deadline() (time.Time, bool) { return c.session.ctx.Deadline() }
func (c *jobContext) Done() <-chan struct{}       { return c.session.ctx.Done() }
func (c *jobContext) Err() error                  { return c.session.ctx.Err() }

func (c *jobContext) Value(key any) any {
	if _, ok := key.(taskInfoKey); ok {
		return c
	}
	return c.session.ctx.Value(key)
}

// A slot executes jobs of a session, one after the other, in a goroutine that
// belongs to the session. It is used again when the session gets another.
type slot struct {
	session *workerSession
	fresh   []jobContext // see begin

	// Guarded by session.mu; the slot's own goroutine, which alone changes job
	// and ctx while it runs, reads them without it.
	job      job
	ctx      *jobContext // of job; nil if there is none
	returned bool        // its handler has returned, and its report waits for room
	stuck    bool        // job is reported as stuck
}

// newSlot returns a slot with nothing to execute. s.mu is held.
func (s *workerSession) newSlot() *slot {
	if n := len(s.spare); n > 0 {
		l := s.spare[n-1]
		s.spare = s.spare[:n-1]
		return l
	}
	l := &slot{session: s}
	s.slotList = append(s.slotList, l)
	return l
}

// begin makes the session's next job the one that the slot executes; it reports
// false if none waits. Contexts are allocated together, but not so many that a
// handler that keeps one holds on to much memory. session.mu is held.
func (l *slot) begin() bool {
	const most = 64
	s := l.session
	if !s.waiting.next(&l.job) {
		return false
	}
	if len(l.fresh) == 0 {
		l.fresh = make([]jobContext, min(s.waiting.len()+1, most))
	}
	l.ctx = &l.fresh[0]
	l.fresh = l.fresh[1:]
	*l.ctx = jobContext{s, l.job.number, l.job.attempt}
	return true
}

// run executes the slot's job and then whatever next gives it, until the slot goes
// to another session or nothing waits.
func (l *slot) run() {
	over := false
	defer func() {
		if over {
			return
		}
		// The handler called runtime.Goexit: this goroutine is ending, and
		// the slot needs another.
		if l.ctx != nil {
			l.conclude(&message{verb: verbFail, task: l.job.number, word: KindPanic, text: "the handler ended its goroutine (runtime.Goexit)"})
		}
		if l.next() {
			l.session.slots.Go(l.run)
		}
	}()
	start := l.session.wire.age()
	for more := true; more; more = l.next() {
		start = l.execute(start)
	}
	over = true
}

// next lets the slot go on when its report is added, and says whether it has
// another job. The report does not wait for what the slot does next: it is on its
// way, or a goroutine that sends it is awake.
func (l *slot) next() bool {
	s := l.session
	if l.ctx == nil && !s.worker.nextJob(l) {
		s.wire.flush() // this goroutine has nothing else to do
		return false
	}
	s.wire.wakeWriter()
	return true
}

// execute calls the handler and adds a report of what it returned. It is given
// the time since the session began, and returns it anew: looking at the clock is a
// good part of what a short task costs.
func (l *slot) execute(start time.Duration) (end time.Duration) {
	s := l.session
	if s.ctx.Err() != nil {
		// The session was canceled or lost before its list was emptied.
		l.report(&message{verb: verbReturn, task: l.job.number})
		return start
	}
	if s.log.debugs() {
		s.log.started(&l.job)
		start = s.wire.age()
	}
	var m message
	l.call(&m)
	end = s.wire.age()
	if m.verb == verbDone {
		m.time = end - start
	}
	if l.conclude(&m) {
		end = s.wire.age() // the wait does not count as the next task's time
	}
	return end
}

// conclude adds the report of the slot's job, and logs it. It says whether it had
// to wait for either.
func (l *slot) conclude(m *message) (waited bool) {
	s, attempt := l.session, l.job.attempt
	waited, reported := l.report(m)
	if !s.log.debugs() {
		return waited
	}
	s.wire.wakeWriter() // a report does not wait for a logger
	s.log.finished(attempt, m, reported)
	return true
}

// call calls the handler and makes m, which is empty, a report of what it
// returns or panics with.
func (l *slot) call(m *message) {
	s, j := l.session, &l.job
	m.task = j.number
	defer func() {
		if v := recover(); v != nil {
			m.verb, m.word = verbFail, KindPanic
			m.text = cut(fmt.Sprint(v), maxFailText/4) + "\n" + shortStack(debug.Stack())
		}
	}()
	var ctx context.Context = l.ctx
	if j.timeout > 0 {
		c, cancel := context.WithTimeout(ctx, j.timeout)
		defer cancel()
		own := l.ctx
		defer time.AfterFunc(j.timeout+stuckGrace, func() { l.foundStuck(own) }).Stop()
		ctx = c
	}
	output, err := s.worker.handler.Handle(ctx, Task{Category: s.hello.Category, Instruction: j.instruction, Timeout: j.timeout})
	if err == nil {
		m.verb, m.text = verbDone, output
		return
	}
	m.verb, m.word = verbFail, KindError
	final, after := wishOf(err)
	switch {
	case final:
		m.word = KindFinal
	case s.ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(s.ctx))):
		m.word = KindCanceled
	case j.timeout > 0 && ctx.Err() != nil && errors.Is(err, context.DeadlineExceeded):
		m.word = KindTimeout
	}
	m.time, m.text = after, err.Error()
	if m.text == "" {
		m.text = fmt.Sprintf("%T without a text", err)
	}
}

// stuckGrace is how long a handler has to return after its task's time is over,
// before it counts as stuck.
const stuckGrace = time.Second

// A stuckJob is one whose handler is reported as stuck, and has not returned.
type stuckJob struct {
	ctx  *jobContext
	name string
}

// foundStuck reports the job of c if its handler still runs. The slot stays taken
// until the handler returns; what it returns is dropped.
func (l *slot) foundStuck(c *jobContext) {
	s, w := l.session, l.session.worker
	w.mu.Lock()
	s.mu.Lock()
	stuck := l.ctx == c && !l.returned && s.state < sessionFinished // else it has just returned, or there is nobody to report to
	if stuck {
		// Entered before it is reported, so that another attempt, which the
		// report may bring, does not start beside this one.
		w.stuck[c.info().Key()] = stuckJob{c, l.job.name()}
		l.stuck = true
		s.settle(l.job.number, l.job.cost)
		s.appendReport(message{verb: verbFail, task: c.number, word: KindStuck,
			text: fmt.Sprintf("the handler still runs %v after its timeout of %v, and keeps its slot", stuckGrace, l.job.timeout)})
		if s.log != nil {
			s.slots.Go(func() { s.log.stuck(c) }) // the handler's own goroutine cannot end before mu is free
		}
	}
	s.mu.Unlock()
	w.mu.Unlock()
	if stuck {
		s.sayGoodbyeIfDrained()
	}
}

// stuckNow lists the stuck jobs, by TaskInfo.Key.
func (w *Worker) stuckNow() map[string]stuckJob {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.stuck) == 0 {
		return nil
	}
	return maps.Clone(w.stuck)
}

// unstick forgets a stuck job whose handler has returned.
func (w *Worker) unstick(c *jobContext) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if key := c.info().Key(); w.stuck[key].ctx == c {
		delete(w.stuck, key)
	}
}

// report adds the report of the slot's job, as soon as there is room, and says
// whether it had to wait for that, and whether it has added one; m is then what was
// added. If no other session wants the slot, the slot takes the next job at once,
// under the same lock.
func (l *slot) report(m *message) (waited, reported bool) {
	s, w := l.session, l.session.worker
	if m.verb == verbFail {
		m.text = cutText(m.text)
	}
	s.mu.Lock()
	switch m.verb {
	case verbDone:
		s.done++
	case verbFail:
		s.failed++
	}
	stuck, c := l.stuck, l.ctx
	l.returned = true
	for !stuck && s.state < sessionFinished && len(s.out)+s.writing > reportBytes {
		waited = true
		s.room.Wait()
	}
	switch {
	case stuck:
	case m.verb != verbDone && s.givenUp():
		// A failure may well be a consequence, and the task deserves another
		// worker. It stays in flight, so that no GOODBYE disowns it.
	default:
		s.settle(l.job.number, l.job.cost)
		reported = s.reportSettled(m)
	}
	draining := s.state == sessionReturns && s.inFlight.len() == 0
	l.ctx, l.returned, l.stuck = nil, false, false
	l.job.instruction = ""
	if w.sole.Load() == s && !s.log.debugs() { // a job that waits for a logger has not started
		l.begin()
	}
	s.mu.Unlock()
	if stuck {
		w.unstick(c)
		if s.log != nil {
			s.slots.Go(func() { s.log.unstuck(c) }) // the slot does not wait for a logger
		}
	}
	if draining {
		s.sayGoodbyeIfDrained()
	}
	return waited, reported
}

// reportSettled adds the report of a job that ran, and says whether it has. s.mu is
// held.
func (s *workerSession) reportSettled(m *message) bool {
	if s.state == sessionFinished {
		return false
	}
	if int64(len(m.text)) < s.hello.MaxLine { // else do not even try
		before := len(s.out)
		s.addReport(m)
		if int64(len(s.out)-before) <= s.hello.MaxLine {
			return true
		}
		s.out = s.out[:before]
	}
	// An output is not cut: half of one would pass for a whole.
	*m = message{verb: verbFail, task: m.task, word: KindOutput,
		text: fmt.Sprintf("an output of %d bytes does not fit in a line of the coordinator, which takes %d bytes, escapes included", len(m.text), s.hello.MaxLine)}
	s.addReport(m)
	return true
}

// givenUp says whether the session is ending although the coordinator has not
// canceled it: the worker's own ctx has ended, or the lease is over, or the
// connection is lost.
func (s *workerSession) givenUp() bool {
	var canceled *canceledError
	return s.ctx.Err() != nil && !errors.As(context.Cause(s.ctx), &canceled)
}

// shortStack keeps the part of a panic's stack that names the handler: what
// follows the frame of panic itself.
func shortStack(stack []byte) string {
	s := string(stack)
	if i := strings.LastIndex(s, "\npanic("); i >= 0 {
		s = s[i+1:]
		for range 2 { // the frame is two lines
			_, s, _ = strings.Cut(s, "\n")
		}
	}
	return cut(s, maxFailText/2)
}
