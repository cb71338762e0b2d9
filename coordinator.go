package taskexec

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// ErrNoWorker is wrapped by Run's error when a category has no worker: none is
// listed, or all sessions with those that are were lost.
var ErrNoWorker = errors.New("taskexec: no worker")

// ErrCoordinatorClosed is wrapped by the error of each Run that Shutdown
// stopped, or that was called after it.
var ErrCoordinatorClosed = errors.New("taskexec: coordinator closed")

// A Coordinator runs lists of tasks on workers. Make one with NewCoordinator;
// any method may be called from any goroutine, and several Runs may go on at
// once, each with sessions of its own.
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
	if config.err != nil {
		return nil, config.err
	}
	return &Coordinator{config: config, runs: make(map[*run]struct{}), idle: make(chan struct{})}, nil
}

// Run executes tasks, and returns when each has its outcome and every
// goroutine and connection of the run is gone.
//
// Run connects to the workers of every category that tasks names, then goes
// through the stages of its order: no task of a stage is sent before every
// task of the stage before it has its outcome. If a task of a stage is not
// Done the stage still runs to its end, and later stages are Skipped. An empty
// list succeeds without dialling.
//
// ctx is the life of the run. When it ends, nothing more is sent, the handlers
// that execute are canceled with its cause, and Run waits for their answers,
// for at most 10 s; what has not answered by then is Unknown.
//
// The error is nil only if every task is Done; else it is a *RunError. The
// Report is never nil, and has a Result for each task even if nothing was
// sent: a run is refused before that if a task has no usable category, a
// category has no worker, or a worker cannot be reached, does not greet within
// 10 s, or does not serve the category that it is listed for.
func (c *Coordinator) Run(ctx context.Context, tasks []Task) (*Report, error) {
	r := newRun(&c.config, tasks)
	err := c.begin(r)
	if err == nil {
		err = r.execute(ctx)
		c.finish(r)
	}
	return r.report(err)
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
// then, and so does every later Run. Shutdown returns nil when all are about to
// return.
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

// A run is one call of Run: the plan, a queue for each category, and the
// sessions that take from it.
type run struct {
	config  *coordinatorConfig
	id      string
	started time.Time
	tasks   []Task
	results []Result
	queues  map[string]*queue
	workers []*runWorker
	needed  map[string]bool // categories that stages to come need
	rest    error           // why the tasks of stages that did not start are Skipped
	// sessions owns the goroutines of all sessions. Losing one is data, so
	// none of them returns an error.
	sessions errgroup.Group
	events   *events
	farewell []error // goodbyes that were refused or did not come

	mu     sync.Mutex // guards following
	over   bool       // nothing can be stopped any more
	halted halt
	why    []error
	grace  *time.Timer        // runs out when a canceled run gives up on its tasks
	cancel context.CancelFunc // ends the opening of sessions
}

// A runWorker is a worker as the run knows it: all the sessions that named the
// same instance.
type runWorker struct {
	sessions []*session
	told     bool
}

func newRun(config *coordinatorConfig, tasks []Task) *run {
	return &run{
		config:  config,
		id:      rand.Text(),
		started: time.Now(),
		tasks:   tasks,
		results: newResults(tasks),
		queues:  make(map[string]*queue),
		needed:  make(map[string]bool),
	}
}

// newResults fills in what is known of each task before anything happens.
func newResults(tasks []Task) []Result {
	results := make([]Result, len(tasks))
	for i, t := range tasks {
		t.Category, _ = categoryOf(t)
		results[i] = Result{Index: i, Task: t}
	}
	return results
}

// execute is the run from its plan to its last session. Its error is why the
// run did not go on to its end; a task that is not Done is none.
func (r *run) execute(ctx context.Context) error {
	if ctx.Err() != nil {
		return causeOf(ctx)
	}
	plan, err := newPlan(r.tasks, r.config.order, r.config.sequence)
	if err != nil {
		if refused := (*TaskError)(nil); errors.As(err, &refused) {
			r.results[refused.Index].Outcome = refused.Outcome
			r.results[refused.Index].Err = refused
		}
		return err
	}
	categories := plan.categories()
	if err := r.checkWorkers(categories); err != nil {
		return err
	}
	for _, category := range categories {
		r.queues[category] = &queue{run: r, category: category, settled: make(chan struct{}, 1)}
		r.needed[category] = true
	}

	r.events = newEvents(r.config.observer)
	defer r.events.close()
	defer r.closeSessions()
	if err := r.open(ctx, categories); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { r.halt(haltCancel, causeOf(ctx)) })()
	defer r.end()

	for number, stage := range plan.stages() {
		failed := r.runStage(number, stage)
		for _, category := range stage.last {
			delete(r.needed, category)
		}
		if r.haltedBy() == nil && failed == nil {
			r.dismiss(ctx)
			continue
		}
		// The rest of the plan does not run, so no worker is needed any more.
		clear(r.needed)
		r.dismiss(ctx)
		if failed != nil {
			r.rest = fmt.Errorf("an earlier stage failed: %w", failed.Err)
		}
		break
	}
	return r.haltedBy()
}

// causeOf says why ctx ended, so that both the cause and ctx.Err() are found
// by errors.Is.
func causeOf(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, err) {
		return fmt.Errorf("the run's context ended: %w", cause)
	}
	return fmt.Errorf("the run's context ended: %w: %w", err, cause)
}

// checkWorkers says which category has tasks and no worker.
func (r *run) checkWorkers(categories []string) error {
	for _, category := range categories {
		if len(r.config.workers[category]) > 0 {
			continue
		}
		i := slices.IndexFunc(r.results, func(res Result) bool { return res.Task.Category == category })
		return fmt.Errorf("%w for category %s: none is listed, and task %d (%s) needs one; name it by WithWorkers(%s, address)",
			ErrNoWorker, quote(category), i, quoteUnlessPlain(r.tasks[i].Instruction), quote(category))
	}
	return nil
}

// open connects to every worker of every category, all at once. It waits for
// all answers even if one is bad, so that the error names all that are.
func (r *run) open(ctx context.Context, categories []string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r.mu.Lock()
	r.cancel = cancel
	halted := r.halted != notHalted
	r.mu.Unlock()
	if halted {
		return r.haltedBy()
	}
	var dials errgroup.Group
	var failures []error // by position, so that their order is that of the options
	for _, category := range categories {
		for _, addr := range r.config.workers[category] {
			i := len(failures)
			failures = append(failures, nil)
			dials.Go(func() error {
				err := r.connect(ctx, r.queues[category], addr)
				r.mu.Lock()
				defer r.mu.Unlock()
				failures[i] = err
				return nil
			})
		}
	}
	dials.Wait()
	if err := r.haltedBy(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return causeOf(ctx)
	}
	if err := errors.Join(failures...); err != nil {
		return err
	}
	r.knowWorkers(categories)
	return nil
}

// knowWorkers finds out which sessions lead to the same worker.
func (r *run) knowWorkers(categories []string) {
	byInstance := make(map[string]*runWorker)
	for _, category := range categories {
		q := r.queues[category]
		q.mu.Lock()
		sessions := slices.Clone(q.sessions)
		q.mu.Unlock()
		for _, s := range sessions {
			w := byInstance[s.instance]
			if w == nil {
				w = new(runWorker)
				r.workers = append(r.workers, w)
				if s.instance != "" { // one that gives no instance is known by its session
					byInstance[s.instance] = w
				}
			}
			w.sessions = append(w.sessions, s)
		}
	}
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
	if r.events != nil {
		for _, i := range g.indices {
			tasks = append(tasks, r.results[i].Task)
		}
	}
	r.events.groupStarted(GroupStartedInfo{Run: r.id, Stage: number, Category: g.category, Tasks: tasks})
	q := r.queues[g.category]
	if orphaned := q.lend(r.results, g.indices); orphaned {
		r.halt(haltSoft, q.noWorker())
	}
	counts, elapsed := q.wait()
	r.events.groupDone(GroupDoneInfo{Run: r.id, Stage: number, Category: g.category, Tasks: tasks, Counts: counts, Elapsed: elapsed})
	if counts.Done == len(g.indices) {
		return nil
	}
	for _, i := range g.indices {
		if r.results[i].Outcome != Done {
			return &r.results[i]
		}
	}
	return nil
}

// halt stops the run before its end. The first reason for each way counts.
func (r *run) halt(how halt, why error) {
	r.mu.Lock()
	if how <= r.halted || r.over {
		r.mu.Unlock()
		return
	}
	r.halted = how
	r.why = append(r.why, why)
	if r.cancel != nil {
		r.cancel()
	}
	if how == haltCancel {
		r.grace = time.AfterFunc(r.config.cancelGrace, func() {
			for _, q := range r.queues {
				q.abandon(fmt.Errorf("not reported within %v after it was canceled: %w", r.config.cancelGrace, why))
			}
		})
	}
	r.mu.Unlock()
	for _, q := range r.queues {
		q.halt(how, why)
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

// dismiss tells the workers that no later stage needs to shut down, and waits
// for their goodbyes.
func (r *run) dismiss(ctx context.Context) {
	if !r.config.shutdown || ctx.Err() != nil {
		return
	}
	var goodbyes errgroup.Group
	missing := make([]error, len(r.workers))
	for i, w := range r.workers {
		if w.told || slices.ContainsFunc(w.sessions, func(s *session) bool { return r.needed[s.queue.category] }) {
			continue
		}
		w.told = true
		goodbyes.Go(func() error {
			missing[i] = w.shutdown(ctx, r.config.goodbyeTimeout)
			return nil
		})
	}
	goodbyes.Wait()
	for _, err := range missing {
		if err != nil {
			r.farewell = append(r.farewell, err)
		}
	}
}

// shutdown tells a worker to shut down, over one of its sessions, and waits
// until that is over.
func (w *runWorker) shutdown(ctx context.Context, timeout time.Duration) error {
	var told *session
	for _, s := range w.sessions {
		if s.tellShutdown() {
			told = s
			break
		}
	}
	if told == nil {
		// It has left before it was told; with a goodbye if it was shut down
		// by somebody else.
		var lost error
		for _, s := range w.sessions {
			goodbye, err := s.end()
			if goodbye {
				return nil
			}
			lost = err
		}
		return fmt.Errorf("not told to shut down: %w", lost)
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
	if goodbye, err := told.end(); !goodbye {
		return fmt.Errorf("no goodbye: %w", err)
	}
	return nil
}

// closeSessions ends all sessions and waits for their goroutines.
func (r *run) closeSessions() {
	for _, q := range r.queues {
		q.mu.Lock()
		sessions := slices.Clone(q.sessions)
		q.mu.Unlock()
		for _, s := range sessions {
			s.close()
		}
	}
	r.sessions.Wait()
}

// report sums the run up. err is why it did not go on to its end, if so.
func (r *run) report(err error) (*Report, error) {
	rep := &Report{Run: r.id, Results: r.results}
	if err != nil {
		r.rest = err
	}
	var first error
	for i := range r.results {
		res := &r.results[i]
		if res.Outcome == 0 { // it never left the plan
			res.Outcome = Skipped
			res.Err = taskError(res, r.rest)
		}
		rep.Counts.add(res.Outcome)
		if first == nil && res.Err != nil {
			first = res.Err
		}
	}
	rep.Elapsed = time.Since(r.started)
	if rep.Counts.Done == len(r.results) {
		err = nil // whatever came after the last task changed nothing
	} else if err == nil {
		err = first
	}
	if len(r.farewell) > 0 {
		err = errors.Join(append([]error{err}, r.farewell...)...)
	}
	if err == nil {
		return rep, nil
	}
	return rep, &RunError{Counts: rep.Counts, Err: err}
}
