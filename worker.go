package taskexec

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// A Handler executes tasks on a worker.
//
// Handle is called once for each attempt at a task, on several goroutines at a
// time if the worker has several slots or several workers share the handler.
// Its ctx ends when the task's timeout is over, when the coordinator cancels the
// run, when the session is lost and when the worker's own ctx ends;
// context.Cause(ctx) says which. A handler that goes on regardless keeps its
// slot until it returns. TaskInfoFrom(ctx) names the attempt.
//
// A handler that stops because its ctx has ended should return an error that
// wraps ctx.Err() or context.Cause(ctx). Only then is the task Canceled, or has
// it failed with KindTimeout; another error is the handler's own failure. Some
// functions have errors of their own for it, such as the "signal: killed" of
// exec.CommandContext: after them, look at ctx.Err() (see the Command example of
// HandlerFunc).
//
// The output travels to the coordinator's Result as it is, bytes of any kind.
// It is ignored if err is not nil. An error fails the task with err's text, of
// which the first 4 KiB travel; so does a panic or a call of runtime.Goexit, and
// the worker goes on serving. An output that does not fit in a line of the wire
// (1 MiB, escapes included) fails the task too.
//
// A task may be executed again after a session was lost, possibly while the
// attempt that was cut off still runs elsewhere: make effects idempotent, with
// the key and the attempt number of TaskInfo where the effect is outside.
type Handler interface {
	Handle(ctx context.Context, task Task) (output string, err error)
}

// A HandlerFunc is a function as a Handler.
type HandlerFunc func(ctx context.Context, task Task) (output string, err error)

// Handle calls f.
func (f HandlerFunc) Handle(ctx context.Context, task Task) (string, error) { return f(ctx, task) }

// TaskInfo names one attempt at one task.
type TaskInfo struct {
	Run     string // the run's id, unique among all runs of all coordinators; made up for the session if the coordinator names none
	Task    int    // the task's index in the run
	Attempt int    // from 1, greater with each sending of the task

	// Coordinator says who sent the task, by a URI or DNS name of its verified
	// certificate: the name that WithPeers lists or, without a list, the first;
	// "" without TLS.
	Coordinator string
}

// Key is the same for all attempts at a task and different for all other
// tasks: the idempotency key of the handler's own effects. Attempt is the
// fencing token that goes with it: a resource that remembers the greatest it
// has seen can refuse a late attempt.
//
// A list that is run once more is another run, with other keys: an effect that
// must not be repeated even then needs a key in the instruction itself.
func (i TaskInfo) Key() string { return i.Run + "/" + strconv.Itoa(i.Task) }

// TaskInfoFrom returns the TaskInfo of the attempt that ctx belongs to. It
// reports false for a ctx that does not come from a worker.
func TaskInfoFrom(ctx context.Context) (TaskInfo, bool) {
	c, ok := ctx.Value(taskInfoKey{}).(*jobContext)
	if !ok {
		return TaskInfo{}, false
	}
	return c.info(), true
}

type taskInfoKey struct{}

// ErrWorkerClosed is returned by Serve, ListenAndServe and ServeConn when they
// are called after Shutdown, or after a coordinator had the worker shut down.
var ErrWorkerClosed = errors.New("taskexec: worker closed")

// errSessionLost is the cause that a handler's ctx ends with when its
// coordinator is gone.
var errSessionLost = errors.New("taskexec: session with the coordinator lost")

// errLeaseOver is the cause that a handler's ctx ends with when the coordinator
// has been silent for so long that it may have given the tasks to others.
var errLeaseOver = errors.New("taskexec: the coordinator does not answer")

// canceledError is the cause that a handler's ctx ends with when the
// coordinator sent CANCEL.
type canceledError struct{ cause string }

func (e *canceledError) Error() string {
	return "taskexec: canceled by the coordinator: " + plainText(e.cause)
}

// Is makes the cause count as the context.Canceled that ctx.Err returns.
func (e *canceledError) Is(target error) bool { return target == context.Canceled }

// A Worker executes the tasks that coordinators send it. Its slots are shared
// by all its sessions, in turns; within a session tasks start in the order
// they came. Make one with NewWorker; any method may be called from any
// goroutine.
type Worker struct {
	handler  Handler
	config   workerConfig
	instance string

	mu        sync.Mutex       // guards following, and the fields of sessions and jobs that say so
	free      int              // slots that execute nothing
	turns     []*workerSession // those in which jobs may wait, in turn
	sessions  map[*workerSession]struct{}
	listeners map[*net.Listener]struct{} // by pointer: a listener's type need not be comparable
	stuck     map[string]stuckJob        // by TaskInfo.Key
	serving   int                        // calls of Serve and ServeConn that have not returned
	draining  bool
	drains    chan struct{} // closed when draining
	drained   chan struct{} // closed when draining and serving is 0
	entrance  entrance

	done   int64 // handlers that returned, by what they returned; open sessions count theirs themselves
	failed int64

	sole atomic.Pointer[workerSession] // the session of turns if it is the only one; its slots need not ask whose turn it is

	greeted, repeated, returned, lost atomic.Int64 // as WorkerStats has them
}

// NewWorker returns a worker that executes tasks with handler. A nil handler
// panics, as do options that no program can mean, such as zero slots; an option
// that depends on data is checked by Serve, ListenAndServe and ServeConn.
//
// Defaults: 1 slot, any category, and a name made of the host's name and the
// process's id.
func NewWorker(handler Handler, opts ...WorkerOption) *Worker {
	if handler == nil {
		panic("taskexec: NewWorker: nil handler")
	}
	if f, ok := handler.(HandlerFunc); ok && f == nil {
		panic("taskexec: NewWorker: nil HandlerFunc")
	}
	config := defaultWorkerConfig()
	for _, o := range opts {
		o.applyWorker(&config)
	}
	w := &Worker{
		handler:   handler,
		config:    config,
		instance:  rand.Text(),
		free:      config.slots,
		sessions:  make(map[*workerSession]struct{}),
		listeners: make(map[*net.Listener]struct{}),
		stuck:     make(map[string]stuckJob),
		drains:    make(chan struct{}),
		drained:   make(chan struct{}),
	}
	w.config.checkSecurity()
	return w
}

// Name returns the worker's name: that of WithName, or the default.
func (w *Worker) Name() string { return w.config.name }

// ListenAndServe listens on addr, host:port or unix:/path, and calls Serve. It
// returns Serve's error, or why it cannot listen on addr. A unix socket that a
// process left behind when it was killed has to be removed before.
func (w *Worker) ListenAndServe(ctx context.Context, addr string) error {
	network, address, err := splitAddr(addr)
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, network, address)
	switch {
	case err == nil:
		return w.Serve(ctx, ln)
	case w.isDraining(): // then whoever follows may have the address
		return ErrWorkerClosed
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	if _, missing := os.Lstat(address); network == "unix" && missing == nil {
		err = fmt.Errorf("%w; if nobody listens there any more, remove the file", err)
	}
	return &servingError{w.config.name, aboutSocket(network, address, err)}
}

// A servingError is why a worker cannot listen, or serves no more. The system
// repeats the address in it, which may come from anywhere.
type servingError struct {
	worker string
	err    error
}

func (e *servingError) Error() string {
	return "taskexec: worker " + quoteUnlessPlain(e.worker) + ": " + plainText(unprefixed(e.err))
}

func (e *servingError) Unwrap() error { return e.err }

// Serve accepts sessions from ln until the worker is shut down, ctx ends or ln
// fails. It closes ln, and it always waits for its sessions and handlers.
//
// ctx is the life of the work: when it ends, handlers' contexts are canceled
// and sessions closed, and Serve returns context.Cause(ctx). After Shutdown,
// or after a coordinator had the worker shut down, Serve returns nil as soon
// as its sessions have drained. If Shutdown came first it returns
// ErrWorkerClosed at once.
//
// If ln fails, it is tried again after 5 ms, doubled with each failure up to
// 1 s: for as long as it takes if the system is at fault, such as for want of
// file descriptors; until it has failed ten times in a row if not; and not at
// all once ln is closed. Then the sessions are closed as when ctx ends, and
// Serve returns ln's error.
//
// A worker has at most 256 sessions, those that ServeConn serves included; a
// coordinator that greets when there are that many is told to come back later.
// At most 32 connections may be open that have not greeted; when another comes,
// the oldest of them is closed.
//
// Without WithTLS, a listener that can be reached from other machines is refused
// with an error that wraps ErrInsecureTransport: at once if it is a
// *net.TCPListener or embeds one; otherwise if its first connection is not a
// *tls.Conn.
func (w *Worker) Serve(ctx context.Context, ln net.Listener) (err error) {
	if err := w.enter(&ln); err != nil {
		ln.Close()
		return err
	}
	defer w.leave(&ln)
	w.logServing(ln)
	defer func() { w.logServed(err) }()
	defer ln.Close()
	var sessions sync.WaitGroup
	defer sessions.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil) // if Accept panics, nothing else ends the sessions
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	fail := func(err error) error {
		err = &servingError{w.config.name, err}
		cancel(err)
		return err
	}
	var log acceptLog
	for checked, failures := false, 0; ; {
		conn, err := ln.Accept()
		if err == nil && !checked {
			if err := w.config.checkAccepted(ln, conn); err != nil {
				conn.Close()
				return fail(err)
			}
			checked = true
		}
		if err == nil {
			failures = 0
			sessions.Go(func() { w.serveConn(ctx, conn) })
			continue
		}
		failures++
		switch {
		case w.isDraining():
			w.logDraining()
			sessions.Wait()
			return context.Cause(ctx) // nil unless ctx cut the drain short
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !w.acceptsAgain(ctx, err, failures, &log):
			return fail(err)
		}
	}
}

// ServeConn serves one session over conn, and closes it. It always waits for
// the session's handlers.
//
// ctx is the life of the work, as in Serve. ServeConn returns nil when the
// coordinator has closed the connection between two messages, or the worker
// was shut down and the session has drained; context.Cause(ctx) when ctx
// ended; a *ProtocolError when either side broke the rules; an error that
// wraps ErrInsecureTransport for a connection without TLS to another machine; one
// that says so for a connection that takes no deadlines; else the connection's
// error.
func (w *Worker) ServeConn(ctx context.Context, conn net.Conn) error {
	if err := w.enter(nil); err != nil {
		conn.Close()
		return err
	}
	defer w.leave(nil)
	return w.serveConn(ctx, conn)
}

// enter counts in a call of Serve or ServeConn, so that a drain waits for it.
func (w *Worker) enter(ln *net.Listener) error {
	if w.config.err != nil {
		return w.config.err
	}
	if _, err := w.welcomeLine(); err != nil {
		return fmt.Errorf("taskexec: worker %s: it has too many categories to name: %w", quoteUnlessPlain(w.config.name), err)
	}
	if ln != nil {
		if err := w.config.checkListener(*ln); err != nil {
			return err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.draining {
		return ErrWorkerClosed
	}
	w.serving++
	if ln != nil {
		w.listeners[ln] = struct{}{}
	}
	return nil
}

func (w *Worker) leave(ln *net.Listener) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.serving--
	delete(w.listeners, ln)
	if w.draining && w.serving == 0 {
		close(w.drained)
	}
}

func (w *Worker) isDraining() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.draining
}

// Shutdown drains the worker: it takes no new session and no new task, gives
// back what it has not started, lets running handlers finish, sends their
// reports and closes. It returns nil when that is done and every Serve and
// ServeConn is about to return.
//
// ctx is the caller's patience. If it ends first, Shutdown returns an error
// that wraps context.Cause(ctx) and names the tasks that still run, and the
// drain goes on; Shutdown may be called again to wait for it once more. To
// stop handlers, end the ctx that Serve was given.
func (w *Worker) Shutdown(ctx context.Context) error {
	w.drain()
	select {
	case <-w.drained:
		return nil
	default: // prefer a drain that is over to a ctx that is over too
	}
	select {
	case <-w.drained:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("taskexec: worker %s still runs %s: %w",
			quoteUnlessPlain(w.config.name), w.running(), context.Cause(ctx))
	}
}

// drain starts the drain, once.
func (w *Worker) drain() {
	w.mu.Lock()
	if w.draining {
		w.mu.Unlock()
		return
	}
	w.draining = true
	close(w.drains)
	if w.serving == 0 {
		close(w.drained)
	}
	var listeners []net.Listener
	for ln := range w.listeners {
		listeners = append(listeners, *ln)
	}
	var sessions []*workerSession
	for s := range w.sessions {
		sessions = append(sessions, s)
	}
	w.mu.Unlock()
	for _, ln := range listeners {
		ln.Close()
	}
	for _, s := range sessions {
		s.drain()
	}
}

// running names the tasks that execute now.
func (w *Worker) running() string {
	w.mu.Lock()
	var sessions []*workerSession
	for s := range w.sessions {
		sessions = append(sessions, s)
	}
	var names []string
	for _, j := range w.stuck {
		names = append(names, j.name+", which is stuck")
	}
	w.mu.Unlock()
	for _, s := range sessions {
		names = append(names, s.running()...)
	}
	const most = 10
	switch n := len(names); {
	case n == 0:
		return "no task, but sessions are still open"
	case n > most:
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), n-most)
	}
	return strings.Join(names, ", ")
}

// WorkerStats counts what a worker does.
type WorkerStats struct {
	Sessions int   // open now, or lost while their handlers still run
	Slots    int   // tasks it executes at a time
	Running  int   // slots that execute a handler now, stuck ones included
	Stuck    int   // handlers reported as stuck that have not returned
	Waiting  int   // tasks received and not started
	Done     int64 // handlers that have returned an output
	Failed   int64 // handlers that have returned an error or panicked
	Greeted  int64 // sessions so far, those of a run that dialed again included
	Repeated int64 // tasks received that some worker had been sent before
	Returned int64 // tasks given back unstarted
	Lost     int64 // tasks in flight when their session was lost
}

// Stats says what the worker does now. It is cheap enough to poll.
func (w *Worker) Stats() WorkerStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	stats := WorkerStats{
		Sessions: len(w.sessions),
		Slots:    w.config.slots,
		Running:  w.config.slots - w.free,
		Stuck:    len(w.stuck),
		Done:     w.done,
		Failed:   w.failed,
		Greeted:  w.greeted.Load(),
		Repeated: w.repeated.Load(),
		Returned: w.returned.Load(),
		Lost:     w.lost.Load(),
	}
	for s := range w.sessions {
		s.mu.Lock()
		stats.Waiting += s.waiting.len() - s.waiting.returned
		stats.Done += s.done
		stats.Failed += s.failed
		s.mu.Unlock()
	}
	return stats
}

// dispatch starts waiting jobs while slots are free. w.mu is held.
func (w *Worker) dispatch() {
	for w.free > 0 {
		l := w.nextTurn(nil)
		if l == nil {
			return
		}
		w.free--
		l.session.slots.Go(l.run)
	}
}

// nextJob is called by a slot that has nothing to execute. It reports true if the
// slot now has a job, because it is its session's turn again. Otherwise the slot
// goes to the session whose turn it is, or becomes free.
//
// The goroutines of slots belong to sessions, each of which waits for its own.
func (w *Worker) nextJob(l *slot) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	next := w.nextTurn(l)
	switch next {
	case l:
		return true
	case nil:
		w.free++
	default:
		next.session.slots.Go(next.run)
	}
	l.session.mu.Lock()
	defer l.session.mu.Unlock()
	l.session.spare = append(l.session.spare, l)
	return false
}

// nextTurn takes a job from the session whose turn it is: for l if l is a slot of
// that session, otherwise for another slot. It returns the slot that is to execute
// the job; nil if none waits. w.mu is held.
func (w *Worker) nextTurn(l *slot) *slot {
	for len(w.turns) > 0 {
		s := w.turns[0]
		s.mu.Lock()
		next := l
		if l == nil || l.session != s {
			next = s.newSlot()
		}
		began := next.begin()
		if !began && next != l {
			s.spare = append(s.spare, next)
		}
		s.inTurn = s.waiting.len() > 0
		s.mu.Unlock()
		if rest := w.turns[:copy(w.turns, w.turns[1:])]; s.inTurn {
			w.turns = append(rest, s)
		} else {
			w.turns[len(rest)] = nil
			w.turns = rest
			w.setSole()
		}
		if began {
			return next
		}
	}
	return nil
}

// endTurns takes a session that is over out of turns: it must not wait there
// while slots are busy for long.
func (w *Worker) endTurns(s *workerSession) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.inTurn {
		s.inTurn = false
		w.turns = slices.DeleteFunc(w.turns, func(other *workerSession) bool { return other == s })
		w.setSole()
	}
}

// setSole is called after each change of turns. w.mu is held.
func (w *Worker) setSole() {
	var sole *workerSession
	if len(w.turns) == 1 {
		sole = w.turns[0]
	}
	w.sole.Store(sole)
}
