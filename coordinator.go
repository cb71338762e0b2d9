package taskexec

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// ErrNoWorker is wrapped by Run's error when tasks wait for a category without
// a worker: none is listed, or all that are listed were lost and none came back
// for as long as WithWorkerWait says.
var ErrNoWorker = errors.New("taskexec: no worker")

// ErrCoordinatorClosed is wrapped by the error of each Run that Shutdown
// stopped, or that was called after it with tasks to execute.
var ErrCoordinatorClosed = errors.New("taskexec: coordinator closed")

// A Coordinator runs lists of tasks on workers. Make one with NewCoordinator;
// any method may be called from any goroutine, and several Runs may go on at
// once, each with sessions of its own: one for each worker and category. A worker
// has at most 256 sessions, and 32 that have not greeted yet, so many Runs at once
// should not all start in the same instant.
type Coordinator struct {
	config coordinatorConfig

	mu     sync.Mutex // guards following
	closed bool
	runs   map[*run]struct{}
	idle   chan struct{} // closed when closed and no run is left
}

// NewCoordinator returns a coordinator. It checks its options and dials
// nothing. Its error names each option that cannot be used.
func NewCoordinator(opts ...CoordinatorOption) (*Coordinator, error) {
	config := defaultCoordinatorConfig()
	for _, o := range opts {
		o.applyCoordinator(&config)
	}
	if len(config.sequence) > 0 && config.order != ByCategory {
		config.addError("WithSequence orders categories, and the order %s has none; leave one of the two out", config.order)
	}
	config.checkSecurity()
	if config.err != nil {
		return nil, config.err
	}
	if config.dial == nil {
		config.dial = new(net.Dialer).DialContext
	}
	return &Coordinator{config: config, runs: make(map[*run]struct{}), idle: make(chan struct{})}, nil
}

// Run executes tasks, and returns when each has its outcome and every
// goroutine and connection of the run is gone.
//
// Run connects to the workers of every category that tasks names, then goes
// through the stages of its order: no task of a stage is sent before every
// task of the stage before it has its outcome. WithOnFailure says what happens
// when a task is not Done; by default its stage still runs to its end, and
// later stages are Skipped. An empty list succeeds without dialing.
//
// A worker that is lost is dialed again for as long as the run goes on. What
// was in flight to it is sent again, to it or to another worker of the
// category, unless WithAtMostOnce forbids it; a task that was lost is then sent
// with little else in flight, and when it was lost three times like that, it is
// not sent again, and is Unknown.
//
// ctx is the life of the run. When it ends, nothing more is sent, the running
// handlers are canceled with its cause, and Run waits for their answers, for at
// most 10 s or what WithCancelGrace says; what has not been answered by then is
// Unknown.
//
// The error is nil only if every task is Done; otherwise it is a *RunError. The
// Report is never nil, and has a Result for each task even if nothing was sent.
//
// A run is refused before anything is sent if a task has no usable category or
// a category has no worker; and if a worker cannot be reached, or does not greet
// in time, for as long as WithWorkerWait says (30 s by default). It is refused
// without that wait if a worker greets as something else or does not serve the
// category it is listed for, if either side refuses the other's certificate, or
// if plaintext would leave this machine (ErrInsecureTransport).
func (c *Coordinator) Run(ctx context.Context, tasks []Task) (*Report, error) {
	r := newRun(&c.config)
	r.tasks = tasks
	err := c.begin(r)
	if err == nil {
		defer c.finish(r)
		err = r.execute(ctx, r.runPlan)
	}
	report, err := r.report(err)
	r.logEnded(report.Counts, err)
	return report, err
}

func (c *Coordinator) begin(r *run) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrCoordinatorClosed
	}
	c.runs[r] = struct{}{}
	return nil
}

func (c *Coordinator) finish(r *run) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.runs, r)
	if c.closed && len(c.runs) == 0 {
		close(c.idle)
	}
}

// Shutdown stops every run: no more is sent, what workers have not started is
// taken back, what runs finishes, and the rest is Skipped. Each Run returns an
// error that wraps ErrCoordinatorClosed, unless all of its tasks are Done by
// then, and so does every later Run that has tasks. Shutdown returns nil when all
// are about to return.
//
// ctx is the caller's patience: if it ends first, Shutdown returns an error
// that wraps its cause, and the runs go on ending. To stop handlers, end the
// ctx that Run was given. Shutdown may be called again.
func (c *Coordinator) Shutdown(ctx context.Context) error {
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	runs := make([]*run, 0, len(c.runs))
	for r := range c.runs {
		runs = append(runs, r)
	}
	if first && len(runs) == 0 {
		close(c.idle)
	}
	c.mu.Unlock()
	for _, r := range runs {
		r.halt(haltSoft, ErrCoordinatorClosed)
	}
	select {
	case <-c.idle:
		return nil
	default: // prefer the end of the runs to a ctx that is over too
	}
	select {
	case <-c.idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("taskexec: runs of the coordinator have not ended: %w", context.Cause(ctx))
	}
}

// A run is one call of Run or Stream: the plan, a queue for each category, and
// the sessions that take from it. Its stages are gone through by one goroutine,
// that of execute.
type run struct {
	config   *coordinatorConfig
	id       string
	started  time.Time
	tasks    []Task          // all of them, if they are planned; the caller's
	results  []Result        // of tasks; each is filled in when it is lent to a queue, or never will be
	needed   map[string]bool // categories that stages to come need
	rest     error           // why the tasks of stages that did not start are Skipped
	delivery *delivery       // to the consumer of a Stream; nil for Run
	order    []int           // the planned tasks in plan order
	lent     int             // of order, in a Stream
	// sessions owns the goroutines of all sessions. Losing one is data, so
	// none of them returns an error.
	sessions errgroup.Group
	events   *events
	log      *slog.Logger // nil: silent
	farewell []error      // goodbyes that were refused or did not come

	stopped atomic.Bool // halted says so too; a Stream asks for each task

	mu      sync.Mutex        // guards following
	queues  map[string]*queue // changed by execute's goroutine only, which may read it without mu
	over    bool              // nothing can be stopped any more
	halted  halt
	why     []error            // the run could not go on
	stop    error              // what settles tasks that are not sent any more
	grace   *time.Timer        // runs out when a canceled run gives up on its tasks
	dialing context.Context    // ends when no session is wanted any more: a halt, the end
	cancel  context.CancelFunc // ends dialing; nil before execute
}

func newRun(config *coordinatorConfig) *run {
	r := &run{
		config:  config,
		id:      rand.Text(),
		started: time.Now(),
		queues:  make(map[string]*queue),
		needed:  make(map[string]bool),
	}
	if config.logger != nil {
		r.log = config.logger.With(keyRun, r.id)
	}
	return r
}

func newResult(i int, t Task) Result {
	if category, ok := categoryOf(t); ok {
		t.Category = category
	}
	return Result{Index: i, Task: t}
}

// execute runs body with everything that a run needs around it, and leaves
// nothing of that behind. Its error is why the run did not go on to its end; a
// task that is not Done is no such error.
func (r *run) execute(ctx context.Context, body func(context.Context) error) error {
	if ctx.Err() != nil {
		return causeOf(ctx)
	}
	dialing, cancel := context.WithCancel(ctx)
	defer cancel()
	r.mu.Lock()
	r.dialing, r.cancel = dialing, cancel
	halted := r.halted != notHalted
	r.mu.Unlock()
	if halted {
		return r.haltedBy()
	}
	r.logStarted()
	r.events = newEvents(joined(r.config.observer, logObserver(r.log)))
	defer r.events.close()
	defer r.closeSessions()
	defer context.AfterFunc(ctx, func() { r.halt(haltCancel, causeOf(ctx)) })()
	defer r.end()
	if err := body(ctx); err != nil {
		return err
	}
	return r.haltedBy()
}

// runPlan goes through the stages of the planned tasks.
func (r *run) runPlan(ctx context.Context) error {
	r.results = make([]Result, len(r.tasks))
	for i := range r.results {
		// Written at once, before the collector, which so much new memory sets
		// off, reads them: the kernel maps a page twice if it is read before it is
		// written, and the second time interrupts every processor.
		r.results[i].Index = i
	}
	plan, err := newPlan(r.tasks, r.config.order, r.config.sequence)
	if err != nil {
		if refused := (*TaskError)(nil); errors.As(err, &refused) {
			res := &r.results[refused.Index]
			*res = newResult(refused.Index, refused.Task)
			res.Outcome, res.Err = refused.Outcome, refused
		}
		return err
	}
	r.order = plan.indices
	categories, extents := plan.categories(), plan.arrangement.extents
	missing := -1 // the first task without a worker
	for c, category := range categories {
		if first := extents[c].first; len(r.config.workers[category]) == 0 && (missing < 0 || first < missing) {
			missing = first
		}
	}
	if missing >= 0 {
		res := newResult(missing, r.tasks[missing])
		return r.checkWorkers(res.Task.Category, &res)
	}
	for c, category := range categories {
		r.needed[category] = true
		r.addQueue(category, extents[c].tasks)
	}
	if err := r.open(categories); err != nil {
		return err
	}
	for number, stage := range plan.stages() {
		failed := r.runStage(number, stage)
		for _, category := range stage.last {
			delete(r.needed, category)
		}
		if r.goesOn(failed) {
			r.dismiss(ctx)
			if ctx.Err() != nil {
				// The halt that follows may not have come through yet, and
				// nothing may be sent after what has been seen here.
				r.halt(haltCancel, causeOf(ctx))
			}
			if r.goesOn(nil) {
				continue
			}
		}
		// The rest of the plan does not run, so no worker is needed any more.
		clear(r.needed)
		r.dismiss(ctx)
		break
	}
	return nil
}

// goesOn says whether a further stage may run after the one that has just
// ended. failed is the first of that one's tasks that is not Done, if any.
func (r *run) goesOn(failed *Result) bool {
	if failed != nil && r.config.onFailure != KeepGoing {
		r.rest = fmt.Errorf("an earlier stage failed: %w", failed.Err)
		return false
	}
	return !r.stopped.Load()
}

// addQueue makes the queue of a category; planned is how many of its tasks are
// known. It has no sessions yet, and may be seen by Snapshot from here on.
func (r *run) addQueue(category string, planned int) {
	q := &queue{run: r, category: category, planned: planned, settled: make(chan struct{}, 1), low: make(chan struct{}, 1)}
	for _, addr := range r.config.workers[category] {
		q.links = append(q.links, &link{queue: q, addr: addr})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	q.halted, q.why = r.halted, r.stop
	r.queues[category] = q
}

// allQueues lists the queues there are now.
func (r *run) allQueues() []*queue {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Values(r.queues))
}

// causeOf says why ctx ended, so that both the cause and ctx.Err() are found
// by errors.Is.
func causeOf(ctx context.Context) error { return &contextError{ctx.Err(), context.Cause(ctx)} }

// A contextError is why a context ended. Its cause may come from anywhere, and is
// escaped, but not for the workers: their handlers are given it.
type contextError struct{ err, cause error }

func (e *contextError) Error() string   { return plainText(e.text()) }
func (e *contextError) Unwrap() []error { return []error{e.err, e.cause} }

func (e *contextError) text() string {
	if errors.Is(e.cause, e.err) {
		return "the run's context ended: " + e.cause.Error()
	}
	return fmt.Sprintf("the run's context ended: %v: %v", e.err, e.cause)
}

// checkWorkers returns an error if no worker is listed for category. first is the
// first task that needs one.
func (r *run) checkWorkers(category string, first *Result) error {
	if len(r.config.workers[category]) > 0 {
		return nil
	}
	return fmt.Errorf("%w for category %s: none is listed, and task %d (%s) needs one; name it by WithWorkers(%s, address)",
		ErrNoWorker, quote(category), first.Index, quoteUnlessPlain(first.Task.Instruction), quote(category))
}

// open connects to every worker of every category, all at once. Its error names
// each worker that is not there; one that cannot be used at all ends the wait for
// the others.
func (r *run) open(categories []string) error {
	ctx, cancel := context.WithCancel(r.dialing)
	defer cancel()
	var links []*link
	for _, category := range categories {
		links = append(links, r.queues[category].links...)
	}
	var dials errgroup.Group
	failures := make([]error, len(links)) // in the order of the options
	for i, l := range links {
		dials.Go(func() error {
			failures[i] = l.open(ctx)
			if failures[i] != nil && !mayPass(failures[i]) {
				cancel()
			}
			return nil
		})
	}
	dials.Wait()
	r.mu.Lock()
	halted := r.halted != notHalted
	r.mu.Unlock()
	switch {
	case halted:
		return r.haltedBy()
	case r.dialing.Err() != nil: // the halt that follows has not come through yet
		return causeOf(r.dialing)
	case ctx.Err() != nil: // those that were only interrupted are no news
		failures = slices.DeleteFunc(failures, func(err error) bool { return errors.Is(err, context.Canceled) && mayPass(err) })
	}
	return errors.Join(failures...)
}

// runStage runs the groups of a stage at the same time, and waits for all of
// them. It returns the first of its results that is not Done.
func (r *run) runStage(number int, stage stage) *Result {
	if len(stage.groups) == 1 {
		return r.runGroup(number, stage.groups[0])
	}
	var groups errgroup.Group
	failed := make([]*Result, len(stage.groups))
	for i, g := range stage.groups {
		groups.Go(func() error {
			failed[i] = r.runGroup(number, g)
			return nil
		})
	}
	groups.Wait()
	for _, f := range failed {
		if f != nil {
			return f
		}
	}
	return nil
}

// runGroup lends a group's tasks to the sessions of its category, and waits
// until each has its outcome.
func (r *run) runGroup(number int, g stageGroup) *Result {
	var tasks []Task
	if r.events.ofGroups() {
		tasks = make([]Task, 0, len(g.indices))
		for _, i := range g.indices {
			task := r.tasks[i]
			task.Category = g.category
			tasks = append(tasks, task)
		}
	}
	r.events.groupStarted(GroupStartedInfo{Run: r.id, Stage: number, Category: g.category, Tasks: tasks})
	q := r.queues[g.category]
	q.begin(len(g.indices))
	for rest := g.indices; len(rest) > 0; {
		// A Stream lends no more than its consumer has room for.
		n := r.delivery.acquire(min(len(rest), lendAtOnce))
		taken := n > 0
		if !taken { // the consumer has left, and the run is halted
			n = len(rest)
		}
		for _, i := range rest[:n] {
			res := &r.results[i]
			res.Task = r.tasks[i]
			res.Task.Category = g.category
			if taken {
				r.delivery.expect(res)
			}
		}
		taker := q.lend(r.results, rest[:n])
		if r.delivery != nil {
			r.lent += n
		}
		rest = rest[n:]
		if taker != nil && len(g.indices) == 1 {
			taker.wire.flush() // the group's goroutine has nothing else to do
		} else if taker != nil {
			taker.wire.wakeWriter()
		}
		if len(rest) > 0 {
			q.awaitLow()
		}
	}
	counts, elapsed := q.finish()
	r.events.groupDone(GroupDoneInfo{Run: r.id, Stage: number, Category: g.category, Tasks: tasks, Counts: counts, Elapsed: elapsed})
	if counts.Done == len(g.indices) {
		return nil
	}
	for _, i := range g.indices {
		if o := r.results[i].Outcome; o != Done && o != Skipped {
			return &r.results[i]
		}
	}
	return nil // the group was halted, and haltedBy or rest says why
}

// halt stops the run before its end, because it cannot go on. The first reason
// for each way counts.
func (r *run) halt(how halt, why error) { r.stopSending(how, why, why) }

// stopSoon stops the run because a task is not Done. That is no error of the run's
// own.
func (r *run) stopSoon(failure error) {
	r.stopSending(haltSoft, fmt.Errorf("stopped at the first failure: %w", failure), nil)
}

// stopSending stops the run. stop is the reason that the tasks which are not sent
// any more are given; why is what Run's error says, or nil if a task's says it.
func (r *run) stopSending(how halt, stop, why error) {
	r.mu.Lock()
	if how <= r.halted || r.over {
		r.mu.Unlock()
		return
	}
	r.halted = how
	r.stopped.Store(true)
	r.stop = stop
	if why != nil {
		r.why = append(r.why, why)
	}
	if r.cancel != nil {
		r.cancel()
	}
	if how == haltCancel {
		r.grace = time.AfterFunc(r.config.cancelGrace, func() {
			for _, q := range r.allQueues() {
				q.abandon(fmt.Errorf("not reported within %v after it was canceled: %w", r.config.cancelGrace, stop))
			}
		})
	}
	r.mu.Unlock()
	for _, q := range r.allQueues() {
		q.halt(how, stop)
	}
}

// haltedBy says why the run was stopped; nil if it was not.
func (r *run) haltedBy() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.why) == 1 {
		return r.why[0]
	}
	return errors.Join(r.why...)
}

// end makes later halts void, and leaves no timer behind.
func (r *run) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	if r.grace != nil {
		r.grace.Stop()
	}
}

// dismiss shuts down the workers that no later stage needs, and waits for their
// goodbyes.
func (r *run) dismiss(ctx context.Context) {
	r.mu.Lock()
	canceled := ctx.Err() != nil || r.halted == haltCancel // one follows the other
	r.mu.Unlock()
	if !r.config.shutdown || canceled {
		return
	}
	var goodbyes errgroup.Group
	workers := r.workers()
	missing := make([]error, len(workers))
	for i, sessions := range workers {
		if slices.ContainsFunc(sessions, func(s *session) bool { return r.needed[s.queue.category] || r.neededAt(s) }) {
			continue
		}
		for _, s := range sessions {
			s.dismiss()
		}
		goodbyes.Go(func() error {
			missing[i] = shutdown(ctx, sessions, r.config.goodbyeTimeout)
			return nil
		})
	}
	goodbyes.Wait()
	for _, err := range missing {
		if err != nil {
			r.farewell = append(r.farewell, err)
			r.logNoGoodbye(err)
		}
	}
}

// neededAt says whether a later stage has a session at the address of s that does
// not name the same instance. With another, the worker was restarted, and one of
// the two sessions is over, though this side may not have noticed yet. With none,
// both may lead to one worker, which SHUTDOWN would end for both.
func (r *run) neededAt(s *session) bool {
	for category := range r.needed {
		q := r.queues[category]
		q.mu.Lock()
		found := slices.ContainsFunc(q.links, func(l *link) bool {
			return l.addr == s.addr && l.session != nil && (s.instance == "" || l.session.instance != s.instance)
		})
		q.mu.Unlock()
		if found {
			return true
		}
	}
	return false
}

// workers lists the latest sessions of all links whose workers were not
// dismissed, grouped by the worker that they lead to. A worker is known by the
// instance it greeted with; one that gave none, by its session; and one that was
// lost, by its address, since after a restart a link may not yet have reached
// what others have already found there.
func (r *run) workers() [][]*session {
	var workers [][]*session
	lost := make(map[*session]bool)
	for _, category := range slices.Sorted(maps.Keys(r.queues)) {
		q := r.queues[category]
		q.mu.Lock()
		for _, l := range q.links {
			s := l.session
			if s == nil || l.dismissed {
				continue
			}
			over := s.ending
			i := slices.IndexFunc(workers, func(w []*session) bool {
				return slices.ContainsFunc(w, func(o *session) bool {
					return o.instance != "" && o.instance == s.instance || o.addr == s.addr && (over || lost[o])
				})
			})
			if over {
				lost[s] = true
			}
			if i < 0 {
				i = len(workers)
				workers = append(workers, nil)
			}
			workers[i] = append(workers[i], s)
		}
		q.mu.Unlock()
	}
	return workers
}

// shutdown tells a worker to shut down, over one of its sessions, and waits
// until that session is over.
func shutdown(ctx context.Context, sessions []*session, timeout time.Duration) error {
	var told *session
	for _, s := range sessions {
		if s.tellShutdown() {
			told = s
			break
		}
	}
	if told == nil {
		// It has left before it was told; with a goodbye if it was shut down
		// by somebody else.
		for _, s := range sessions {
			if goodbye, _ := s.end(); goodbye {
				return nil
			}
		}
		s := sessions[0]
		_, why := s.end()
		return s.fail(fmt.Errorf("not told to shut down: %w", why))
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-told.gone:
	case <-timer.C:
		return told.fail(fmt.Errorf("no goodbye within %v", timeout))
	case <-ctx.Done():
		return told.fail(fmt.Errorf("no goodbye yet: %w", causeOf(ctx)))
	}
	if goodbye, why := told.end(); !goodbye {
		return told.fail(fmt.Errorf("no goodbye: %w", why))
	}
	return nil
}

// closeSessions ends all sessions and waits for their goroutines.
func (r *run) closeSessions() {
	r.mu.Lock()
	r.cancel() // no link dials again
	r.mu.Unlock()
	for _, q := range r.allQueues() {
		for _, s := range q.shut() {
			r.sessions.Go(func() error { s.close(); return nil }) // TLS says goodbye, and a peer may not read
		}
	}
	r.sessions.Wait()
}

// settleRest gives the tasks that never left the plan their outcome. err says
// why the run did not go on to its end, and is nil if it did.
func (r *run) settleRest(err error) {
	r.mu.Lock()
	if r.rest == nil {
		r.rest = cmp.Or(err, r.stop)
	}
	r.mu.Unlock()
	if r.results == nil {
		r.results = make([]Result, len(r.tasks))
	}
	for i := range r.results {
		if res := &r.results[i]; res.Outcome == 0 {
			*res = newResult(i, r.tasks[i])
			res.Outcome = Skipped
			res.Err = taskError(res, r.rest)
			if q := r.queues[res.Task.Category]; q != nil {
				q.mu.Lock()
				q.total.add(Skipped)
				q.mu.Unlock()
			}
		}
	}
}

// report sums the run up.
func (r *run) report(err error) (*Report, error) {
	var settled Counts
	for _, q := range r.allQueues() {
		settled.sum(q.total)
	}
	if settled.Done == len(r.tasks) { // the usual case, and a long list takes time to go through
		rep := r.sumUp()
		rep.Counts = settled
		return rep, r.verdict(settled, err, nil)
	}
	r.settleRest(err)
	rep := r.sumUp()
	var first, skipped error
	for i := range r.results {
		res := &r.results[i]
		rep.Counts.add(res.Outcome)
		switch {
		case res.Outcome == Skipped && skipped == nil:
			skipped = res.Err
		case res.Outcome != Skipped && first == nil && res.Err != nil:
			first = res.Err
		}
	}
	return rep, r.verdict(rep.Counts, err, cmp.Or(first, skipped))
}

// sumUp makes the report, except for its Counts.
func (r *run) sumUp() *Report {
	rep := &Report{Run: r.id, Results: r.results, Categories: r.snapshot(), Elapsed: time.Since(r.started)}
	for _, c := range rep.Categories {
		rep.Troubles.add(c.Troubles)
	}
	return rep
}

// verdict is what Run and Stream return: why the run could not go on, or else
// failure, and goodbyes that did not come.
func (r *run) verdict(counts Counts, err, failure error) error {
	switch {
	case counts.Done == counts.Total() && r.delivery == nil:
		err = nil // whatever came after the last task changed nothing
	case err == nil:
		err = failure
	}
	if len(r.farewell) > 0 {
		err = errors.Join(append([]error{err}, r.farewell...)...)
	}
	if err == nil {
		return nil
	}
	return &RunError{Counts: counts, Err: err}
}
