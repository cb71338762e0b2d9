package taskexec

import (
	"context"
	"errors"
	"iter"
	"runtime"
	"sync"
)

// errLeft is the cause with which a Stream whose consumer left its loop is
// canceled.
var errLeft = errors.New("taskexec: the consumer of the Stream left its loop")

// errBroken is why a Stream is over whose sequence did not return.
var errBroken = errors.New("taskexec: the sequence of the Stream panicked or called runtime.Goexit")

// Stream is Run for tasks and results that need not all be in memory: it takes
// tasks from seq and yields a Result for each. Everything said of Run holds,
// except for what follows.
//
// Results come in plan order; with the order Concurrent, as tasks settle. What
// has been read from seq, or must be held back to keep the order, is bounded by
// WithStreamBuffer: at the bound, seq is not asked for more until results are
// taken. ByCategory has to see its whole input before its first stage, so it
// collects all tasks, at about 200 bytes each plus the instruction; only its
// outputs are bounded. With ByInput and Concurrent a category's workers are
// connected when its first task comes, and with WithWorkerShutdown workers are
// told at the end. A task that is refused, for its category or because no worker
// is listed for it, ends the run there: what is running finishes, and what has
// not started is Skipped.
//
// An error is yielded at most once, and last, with a zero Result: a *RunError,
// if the run could not go on, or a goodbye did not come. A task that is not Done
// is no such error: its Result says so. If such a task ends the run, as
// WithOnFailure says, the loop ends without an error. Either way seq may not
// have been read to its end; each task that was read has its Result.
//
// seq is called in a goroutine of its own, and Stream's loop ends only after
// seq has returned. A run that is stopped can only refuse seq's next task, so a
// seq that waits for something must be told otherwise: let it stop waiting when
// ctx ends, and end ctx before you leave the loop. A panic in seq is raised again
// in the caller, and runtime.Goexit ends the caller too.
//
// Leaving the loop cancels the run, waits for it as for one whose ctx ended,
// and leaves nothing behind; what had not been yielded by then is not reported.
// The loop must not wait for Shutdown of the same Coordinator, which waits for
// it. The sequence that Stream returns may be gone through several times, each
// a run of its own that calls seq again.
func (c *Coordinator) Stream(ctx context.Context, seq iter.Seq[Task]) iter.Seq2[Result, error] {
	return func(yield func(Result, error) bool) {
		r := newRun(&c.config)
		if err := c.begin(r); err != nil {
			yield(Result{}, &RunError{Err: err})
			return
		}
		defer c.finish(r)
		ctx, cancel := context.WithCancelCause(ctx) // a loop that is left ends it
		defer cancel(nil)
		var counts Counts
		verdict := error(errLeft)
		defer func() { r.logEnded(counts, verdict) }()
		r.delivery = newDelivery(c.config.streamBuffer, c.config.order)

		var engine sync.WaitGroup
		var err error
		var panicked any
		returned := false
		engine.Go(func() {
			defer r.delivery.close()
			defer func() {
				if !returned {
					panicked = recover() // nil if seq called runtime.Goexit
				}
			}()
			err = r.stream(ctx, seq)
			returned = true
		})
		leave := func() {
			r.halt(haltCancel, errLeft)
			cancel(errLeft)
			r.delivery.leave()
			engine.Wait()
			r.end() // a run that never began has not yet made the halt void
		}
		raise := func() {
			if !returned {
				verdict = errBroken
			}
			switch {
			case returned:
			case panicked != nil:
				panic(panicked)
			default:
				runtime.Goexit()
			}
		}
		left := true // by a panic of the loop's body, or its Goexit
		defer func() {
			if left {
				leave()
			}
		}()
		for result, ok := r.delivery.next(); ok; result, ok = r.delivery.next() {
			counts.add(result.Outcome)
			if !yield(result, nil) {
				left = false
				leave()
				raise()
				return
			}
		}
		left = false
		engine.Wait()
		raise()
		if verdict = r.verdict(counts, err, nil); verdict != nil {
			yield(Result{}, verdict)
		}
	}
}

// stream is the engine's goroutine of a Stream.
func (r *run) stream(ctx context.Context, seq iter.Seq[Task]) error {
	if r.config.order != ByCategory {
		return r.execute(ctx, func(ctx context.Context) error { return r.runSeq(ctx, seq) })
	}
	r.tasks = gather(seq, func() bool { return ctx.Err() != nil || r.stopped.Load() })
	err := r.execute(ctx, r.runPlan)
	r.settleRest(err)
	r.deliverRest()
	return err
}

// gather returns the tasks of seq, up to the one after which stop says so. It
// copies each once: a slice that grows would copy them four times over.
func gather(seq iter.Seq[Task], stop func() bool) []Task {
	const most = 4 << 10 // in a chunk
	n := 0
	var full [][]Task
	chunk := make([]Task, 0, 64)
	for task := range seq {
		if len(chunk) == cap(chunk) {
			full = append(full, chunk)
			chunk = make([]Task, 0, min(2*cap(chunk), most))
		}
		chunk = append(chunk, task)
		n++
		if stop() {
			break
		}
	}
	tasks := make([]Task, 0, n)
	for _, chunk := range append(full, chunk) {
		tasks = appendTasks(tasks, chunk)
	}
	return tasks
}

// appendTasks is a function call because it is there that a goroutine can be
// suspended. The collector, which so much new memory sets off, would otherwise try
// to suspend this one for as long as all of the copying takes, with signals that
// make it take many times as long.
//
//go:noinline
func appendTasks(tasks, more []Task) []Task { return append(tasks, more...) }

// deliverRest delivers the results of tasks that were never lent to a queue,
// in plan order if a plan was made.
func (r *run) deliverRest() {
	if r.order == nil {
		for i := range r.results {
			r.order = append(r.order, i)
		}
	}
	for _, i := range r.order[r.lent:] {
		if r.delivery.acquire(1) == 0 {
			return
		}
		r.delivery.expect(&r.results[i])
		r.delivery.settled(&r.results[i])
	}
}

// runSeq runs the tasks of a sequence as they come.
func (r *run) runSeq(ctx context.Context, seq iter.Seq[Task]) error {
	n := 0
	var open []*queue // those whose group has begun and lends more, in Concurrent
	for task := range seq {
		res := r.delivery.enter(n, task)
		if res == nil {
			break
		}
		q, err := r.queueFor(res)
		if err != nil {
			// The task is settled; the run cannot go on.
			if ctx.Err() != nil { // the halt that follows may not have come through yet
				r.halt(haltCancel, causeOf(ctx))
			}
			r.halt(haltSoft, err)
			if n == 0 { // nothing was sent: no worker is told to shut down
				return nil
			}
			break
		}
		if r.config.order == ByInput {
			if !r.goesOn(r.runTask(n, q, res)) {
				break
			}
		} else {
			if !q.lending {
				r.events.groupStarted(GroupStartedInfo{Run: r.id, Category: q.category})
				q.begin(0)
				q.lending = true
				open = append(open, q)
			}
			if taker := q.lendOne(res); taker != nil {
				taker.wire.wakeWriter()
			}
			if !r.goesOn(nil) {
				break
			}
		}
		n++
	}
	for _, q := range open {
		counts, elapsed := q.finish()
		r.events.groupDone(GroupDoneInfo{Run: r.id, Category: q.category, Counts: counts, Elapsed: elapsed})
	}
	clear(r.needed)
	r.dismiss(ctx)
	return nil
}

// runTask runs a stage of one task.
func (r *run) runTask(number int, q *queue, res *Result) (failed *Result) {
	var tasks []Task
	if r.events.ofGroups() {
		tasks = []Task{res.Task}
	}
	r.events.groupStarted(GroupStartedInfo{Run: r.id, Stage: number, Category: q.category, Tasks: tasks})
	q.begin(0)
	if taker := q.lendOne(res); taker != nil {
		taker.wire.flush() // there is nothing else to do before the task is settled
	}
	counts, elapsed := q.finish()
	r.events.groupDone(GroupDoneInfo{Run: r.id, Stage: number, Category: q.category, Tasks: tasks, Counts: counts, Elapsed: elapsed})
	if counts.Done == 0 {
		return res
	}
	return nil
}

// queueFor returns the queue of a task's category, with its sessions open. If it
// cannot, it settles the task, and its error is why the run cannot go on.
func (r *run) queueFor(res *Result) (*queue, error) {
	category := wantedCategory(res.Task)
	if q := r.queues[category]; q != nil && res.Task.Timeout >= 0 {
		res.Task.Category = category
		return q, nil
	}
	settle := func(o Outcome, err error) {
		res.Outcome = o
		res.Err = taskError(res, err)
		r.delivery.settled(res)
	}
	if fault := taskFault(res.Task); fault != nil {
		settle(Failed, fault)
		return nil, res.Err
	}
	res.Task.Category = category
	err := r.checkWorkers(category, res)
	if err == nil {
		r.needed[category] = true
		r.addQueue(category, 0)
		err = r.open([]string{category})
	}
	if err != nil {
		settle(Skipped, err)
		return nil, err
	}
	return r.queues[category], nil
}

// A delivery brings the results of a Stream to its consumer. Each task goes
// through it in this order: acquire makes room for it, expect enters it (enter
// does both), settled completes it, and next hands out a copy of it. When later
// results are asked for, its room is free again, and its Result may be used for
// another task.
//
// A nil *delivery, which is that of Run, has room for everything, and drops what
// it is given.
type delivery struct {
	ordered bool
	reuse   bool // its Results are those that enter made, and not a plan's
	limit   int

	// For the consumer's goroutine: results that are taken and not handed out, and
	// those that are handed out and not given back. They are given back together,
	// but never keep more than a small part of the room.
	batch fifo[*Result]
	given []*Result
	most  int

	mu       sync.Mutex     // guards following
	room     sync.Cond      // waited on by hasRoom
	ready    sync.Cond      // waited on by next
	taken    int            // places taken
	order    fifo[*Result]  // ordered: expected and not taken by the consumer, in order
	complete table[*Result] // ordered: settled and not taken by the consumer, by index
	list     fifo[*Result]  // not ordered: settled and not taken by the consumer
	free     []*Result      // to be used again
	closed   bool           // nothing more is expected
	left     bool           // nobody takes any more
}

func newDelivery(limit int, order Order) *delivery {
	d := &delivery{limit: limit, ordered: order != Concurrent, reuse: order != ByCategory, most: max(1, min(64, limit/16))}
	d.room.L = &d.mu
	d.ready.L = &d.mu
	return d
}

// hasRoom waits for room, and reports false if the consumer has left. d.mu is
// held, except while it waits.
func (d *delivery) hasRoom() bool {
	for d.taken >= d.limit && !d.left {
		d.room.Wait()
	}
	return !d.left
}

// acquire waits for room for up to n tasks, and takes it. It returns how many
// there is room for; 0 only if the consumer has left.
func (d *delivery) acquire(n int) int {
	if d == nil {
		return n
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.hasRoom() {
		return 0
	}
	n = min(n, d.limit-d.taken)
	d.taken += n
	return n
}

// expect says that r comes next, if the order is kept.
func (d *delivery) expect(r *Result) {
	if d == nil || !d.ordered {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.order.push(r)
}

// enter is acquire and expect for one task, whose Result it makes. It is nil if
// the consumer has left.
func (d *delivery) enter(index int, task Task) *Result {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.hasRoom() {
		return nil
	}
	d.taken++
	var r *Result
	if n := len(d.free); n > 0 {
		r = d.free[n-1]
		d.free = d.free[:n-1]
	} else {
		r = new(Result)
	}
	*r = Result{Index: index, Task: task}
	if d.ordered {
		d.order.push(r)
	}
	return r
}

// settled says that each of results has its outcome.
func (d *delivery) settled(results ...*Result) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range results {
		if d.ordered {
			d.complete.put(r.Index, r)
		} else {
			d.list.push(r)
		}
	}
	d.ready.Signal() // if the first in order is not among them, the consumer waits again
}

// next waits for the next result. It reports false when no more come.
func (d *delivery) next() (Result, bool) {
	if d.batch.len() == 0 || len(d.given) >= d.most {
		d.exchange()
	}
	if d.batch.len() == 0 {
		return Result{}, false
	}
	r := d.batch.pop()
	d.given = append(d.given, r)
	result := *r
	r.Output = "" // a plan keeps its results to the end, and outputs may be large
	return result, true
}

// exchange gives back what was handed out and, if the consumer has nothing left,
// takes what is ready, and waits for that. It leaves the batch empty only if
// nothing more comes.
func (d *delivery) exchange() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.given) > 0 {
		d.taken -= len(d.given)
		if d.reuse {
			d.free = append(d.free, d.given...)
		}
		clear(d.given)
		d.given = d.given[:0]
		d.room.Signal()
	}
	for d.batch.len() == 0 {
		for d.ordered && d.order.len() > 0 {
			r, complete := d.complete.take(d.order.first().Index)
			if !complete {
				break
			}
			d.order.pop()
			d.batch.push(r)
		}
		if !d.ordered {
			d.batch, d.list = d.list, d.batch
		}
		if d.batch.len() > 0 || d.closed {
			return
		}
		d.ready.Wait()
	}
}

// close says that nothing more comes.
func (d *delivery) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	d.ready.Signal()
}

// leave says that nobody takes results any more.
func (d *delivery) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left = true
	d.room.Signal()
}
