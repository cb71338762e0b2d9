package taskexec

import (
	"sync"
	"time"
)

// An Observer is told what happens in a run. Any of its functions may be nil.
//
// All calls for one run come from one goroutine, in the order in which things
// happened, and the last returns before Run does; runs of one Coordinator that
// overlap call from a goroutine each. The run does not wait for a call, so what
// a function is told may no longer be so; but what has not been delivered is
// kept in memory, and Run waits for it at the end, so a function should not
// block for long. It must not call Shutdown of the same Coordinator and wait
// for it. A panic in one is not recovered, and ends the program.
type Observer struct {
	// GroupStarted is called when the tasks of a group may be sent.
	GroupStarted func(GroupStartedInfo)

	// TaskDone is called when a task has its outcome, whatever it is. A task
	// that was refused, or skipped because the run stopped before its group
	// started, is only in the Report, or among the results of the Stream.
	TaskDone func(TaskDoneInfo)

	// SessionOpened is called when a worker has greeted, and may be sent tasks.
	SessionOpened func(SessionOpenedInfo)

	// SessionLost is called when a session ended before the run closed it: it was
	// lost, or its worker took its leave.
	SessionLost func(SessionLostInfo)

	// TaskSent is called for each attempt at a task, when it is handed to the
	// session's connection.
	TaskSent func(TaskSentInfo)

	// TaskRetried is called when an attempt at a task failed, and WithRetry has
	// another made, unless the run stops before that.
	TaskRetried func(TaskRetriedInfo)

	// GroupDone is called when each task of a group has its outcome.
	GroupDone func(GroupDoneInfo)

	// Goodbye is called when a worker that was told to shut down has said its
	// goodbye. See WithWorkerShutdown.
	Goodbye func(GoodbyeInfo)
}

// GroupStartedInfo says which group may now be sent.
type GroupStartedInfo struct {
	Run      string // the run's id
	Stage    int    // from 0
	Category string
	Tasks    []Task // in input order; nil in a Stream that does not know them yet
}

// SessionOpenedInfo says which worker a session leads to.
type SessionOpenedInfo struct {
	Run      string
	Category string
	Addr     string // as given to WithWorkers
	Worker   string // the worker's name, or its address if it has none
	Slots    int    // tasks it executes at a time
	Window   int    // most tasks that may be in flight to it
}

// SessionLostInfo says which session is over. The session of a worker that drains
// may end after one with its successor at the same address was opened.
type SessionLostInfo struct {
	Run      string
	Category string
	Addr     string
	Worker   string
	Goodbye  bool  // the worker took its leave, and nothing is lost
	Lost     int   // tasks that were in flight, and may have run
	Err      error // a *WorkerError; nil if Goodbye
}

// TaskSentInfo says which attempt at a task was sent where.
type TaskSentInfo struct {
	Run     string
	Index   int
	Task    Task
	Attempt int // from 1
	Worker  string
	Addr    string
	Queued  time.Duration // since the start of the task's group
}

// TaskRetriedInfo says which attempt at a task failed, and why.
type TaskRetriedInfo struct {
	Run     string
	Index   int
	Task    Task
	Attempt int // the one that failed, from 1
	Worker  string
	Addr    string
	Err     error         // a *RemoteError
	Delay   time.Duration // before the task waits to be sent again
}

// TaskDoneInfo says how a task ended. Its three durations are
// Result.Queued, from the start of its group to its last sending; RoundTrip,
// from there to its report; and Result.Executed, the part of RoundTrip in which
// the handler ran.
type TaskDoneInfo struct {
	Run       string
	Result    Result
	RoundTrip time.Duration // 0 if no report came
}

// GroupDoneInfo says how a group ended.
type GroupDoneInfo struct {
	Run      string
	Stage    int
	Category string
	Tasks    []Task // in input order
	Counts   Counts
	Elapsed  time.Duration // since GroupStarted
}

// GoodbyeInfo says which worker has shut down.
type GoodbyeInfo struct {
	Run      string
	Worker   string // its name, or its address if it has none
	Addr     string
	Category string // of the session that it was told over
	Text     string // what it said, such as "Goodbye from a"
}

// events calls an Observer from a goroutine of its own. A nil *events takes
// and drops whatever it is given: there is no observer.
type events struct {
	observer *Observer
	wake     chan struct{} // holds a token when there is something to deliver, or nothing more comes
	done     chan struct{} // closed when all is delivered

	mu     sync.Mutex // guards following
	queue  []func()
	closed bool
}

func newEvents(o *Observer) *events {
	if o == nil {
		return nil
	}
	e := &events{observer: o, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go e.deliver()
	return e
}

// close waits until all is delivered.
func (e *events) close() {
	if e == nil {
		return
	}
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	e.wakeUp()
	<-e.done
}

func (e *events) deliver() {
	defer close(e.done)
	var batch []func()
	for {
		e.mu.Lock()
		batch, e.queue = e.queue, batch[:0]
		closed := e.closed
		e.mu.Unlock()
		if len(batch) == 0 {
			if closed {
				return
			}
			<-e.wake
			continue
		}
		for _, call := range batch {
			call()
		}
		clear(batch)
	}
}

func (e *events) wakeUp() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

func (e *events) add(call func()) {
	e.mu.Lock()
	e.queue = append(e.queue, call)
	e.mu.Unlock()
	e.wakeUp()
}

// ofGroups says whether the tasks of a group need be listed.
func (e *events) ofGroups() bool {
	return e != nil && (e.observer.GroupStarted != nil || e.observer.GroupDone != nil)
}

func (e *events) groupStarted(info GroupStartedInfo) {
	if e != nil && e.observer.GroupStarted != nil {
		e.add(func() { e.observer.GroupStarted(info) })
	}
}

func (e *events) sessionOpened(info SessionOpenedInfo) {
	if e != nil && e.observer.SessionOpened != nil {
		e.add(func() { e.observer.SessionOpened(info) })
	}
}

func (e *events) sessionLost(info SessionLostInfo) {
	if e != nil && e.observer.SessionLost != nil {
		e.add(func() { e.observer.SessionLost(info) })
	}
}

func (e *events) taskSent(run string, r *Result, addr string) {
	if e != nil && e.observer.TaskSent != nil {
		info := TaskSentInfo{Run: run, Index: r.Index, Task: r.Task, Attempt: r.Attempts, Worker: r.Worker, Addr: addr, Queued: r.Queued}
		e.add(func() { e.observer.TaskSent(info) })
	}
}

func (e *events) taskRetried(run string, r *Result, addr string, delay time.Duration) {
	if e != nil && e.observer.TaskRetried != nil {
		info := TaskRetriedInfo{Run: run, Index: r.Index, Task: r.Task, Attempt: r.Attempts, Worker: r.Worker, Addr: addr, Err: r.Err, Delay: delay}
		e.add(func() { e.observer.TaskRetried(info) })
	}
}

func (e *events) taskDone(run string, r *Result, roundTrip time.Duration) {
	if e != nil && e.observer.TaskDone != nil {
		info := TaskDoneInfo{Run: run, Result: *r, RoundTrip: roundTrip}
		e.add(func() { e.observer.TaskDone(info) })
	}
}

func (e *events) groupDone(info GroupDoneInfo) {
	if e != nil && e.observer.GroupDone != nil {
		e.add(func() { e.observer.GroupDone(info) })
	}
}

func (e *events) goodbye(info GoodbyeInfo) {
	if e != nil && e.observer.Goodbye != nil {
		e.add(func() { e.observer.Goodbye(info) })
	}
}
