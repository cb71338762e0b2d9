package taskexec

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"
)

// WithLogger makes l log what happens. At the level Info are workers that serve and
// drain, runs that begin and end, and sessions that open and close; at Warn,
// refusals, losses and what else somebody should look at; at Debug, each task,
// whose instruction is logged at no other level. By default nothing is logged.
// Whether l is enabled for Debug is asked once for each run and session.
//
// Text from other processes is logged escaped and shortened. If l's slog.Handler
// blocks, it holds up the end of the session or run that it logs, and, while
// tasks are logged, slots; it holds up neither heartbeats nor other sessions. A
// nil l panics.
func WithLogger(l *slog.Logger) Option {
	if l == nil {
		panic("taskexec: WithLogger: nil logger")
	}
	return option(func(c *commonConfig) { c.logger = l })
}

// The keys of all that is logged.
const (
	keyAddr        = "addr"        // of the other side, or where a worker listens
	keyAttempt     = "attempt"     // from 1
	keyByPeer      = "by_peer"     // whether the other side found the fault
	keyCategory    = "category"    // of a session or task
	keyCode        = "code"        // one of docs/protocol.md: the fault that ended a session
	keyCoordinator = "coordinator" // its name, from a verified certificate
	keyElapsed     = "elapsed"     // of a task: how long it was executed; of a run: how long it took
	keyError       = "error"       // a text for people
	keyInstruction = "instruction" // at Debug only
	keyKind        = "kind"        // of a task's failure
	keyLost        = "lost"        // tasks that were in flight in a session that was lost
	keyOutcome     = "outcome"     // of a task
	keyReported    = "reported"    // false if what a handler returned is not reported, since nobody waits for it any more
	keyRun         = "run"         // its id
	keySlots       = "slots"       // of a worker
	keyTask        = "task"        // its index in the run
	keyTasks       = "tasks"       // how many, by outcome
	keyText        = "text"        // of a goodbye
	keyWindow      = "window"      // of a session
	keyWorker      = "worker"      // its name
)

// maxLogged is how many bytes of a text are logged.
const maxLogged = 200

// logged is a text that may come from anywhere, fit for a log.
func logged(s string) string { return plainText(cut(s, maxLogged)) }

// debugs says whether l logs each task. It is asked early, before anything waits
// for the answer: a slog.Handler may take its time.
func debugs(l *slog.Logger) bool { return l.Enabled(context.Background(), slog.LevelDebug) }

// whyAttrs says why something ended, without the names that are logged beside it,
// and without any instruction: a syntax fault quotes the line that it is in, even if
// that is the first of a session, and what a peer says may quote anything.
func whyAttrs(err error) []any {
	var named *WorkerError
	var fault *ProtocolError
	var session *sessionError
	var serving *servingError
	switch {
	case errors.As(err, &fault) && (fault.Remote || fault.Code == codeSyntax):
		return []any{keyCode, logged(fault.Code), keyByPeer, fault.Remote}
	case errors.As(err, &fault) && fault.Code == codeProtocol:
		return []any{keyCode, fault.Code, keyByPeer, false, keyError, logged(unquoting(fault.Text))}
	case errors.As(err, &fault):
		return []any{keyCode, logged(fault.Code), keyByPeer, fault.Remote, keyError, logged(fault.Text)}
	case errors.As(err, &named):
		err = named.Err
	case errors.As(err, &session):
		err = session.err
	case errors.As(err, &serving):
		err = serving.err
	}
	return []any{keyError, logged(unprefixed(err))}
}

// unquoting is what this side says of a peer's greeting, up to where it quotes it.
func unquoting(text string) string {
	text, _, _ = strings.Cut(text, ": ")
	text, _, _ = strings.Cut(text, ", not ")
	return text
}

// logServing, logDraining and logServed log what becomes of a call of Serve.
func (w *Worker) logServing(ln net.Listener) {
	if l := w.log(); l != nil {
		withAddr(l, ln.Addr()).Info("worker serving", keySlots, w.config.slots)
	}
}

func (w *Worker) logDraining() {
	if l := w.log(); l != nil {
		l.Info("worker draining")
	}
}

func (w *Worker) logServed(err error) {
	switch l := w.log(); {
	case l == nil:
	case err != nil:
		l.Warn("worker stopped", whyAttrs(err)...)
	default:
		l.Info("worker stopped")
	}
}

// logListener logs that the listener has begun to fail.
func (w *Worker) logListener(err error) {
	if l := w.log(); l != nil {
		l.Warn("listener failed", whyAttrs(err)...)
	}
}

// log names the worker; it is nil if there is no logger.
func (w *Worker) log() *slog.Logger {
	if w.config.logger == nil {
		return nil
	}
	return w.config.logger.With(keyWorker, logged(w.config.name))
}

// A sessionLog logs one session of a worker. A nil one logs nothing.
type sessionLog struct {
	logger *slog.Logger
	debug  bool
	opened bool
	lost   int  // tasks in flight when it ended
	idle   bool // nothing was in flight then, nor a line half read or still to be written
}

func (w *Worker) newSessionLog(conn net.Conn) *sessionLog {
	l := w.log()
	if l == nil {
		return nil
	}
	l = withAddr(l, conn.RemoteAddr())
	return &sessionLog{logger: l, debug: debugs(l)}
}

// withAddr adds an address to what l logs. A listener or a connection of the
// program's own may have none.
func withAddr(l *slog.Logger, addr net.Addr) *slog.Logger {
	if addr == nil {
		return l
	}
	return l.With(keyAddr, logged(addr.String()))
}

// open takes note of who has greeted, and returns a function that logs it.
func (l *sessionLog) open(h hello, coordinator string) func() {
	args := []any{keyRun, logged(h.Run), keyCategory, logged(h.Category)}
	if coordinator != "" {
		args = append(args, keyCoordinator, logged(coordinator))
	}
	l.logger = l.logger.With(args...)
	l.opened = true
	return func() { l.logger.Info("session opened") }
}

// errLeftTasks is why a session is lost whose coordinator closed it with tasks in
// flight, as happens when its process is killed.
var errLeftTasks = errors.New("the coordinator closed the connection")

// ended is called when all of the session is over. If it ended as it should, err
// is nil or planned is true. That a connection fails while it is idle is no loss: a
// coordinator that closes one has it reset if a PING or PONG is under way to it.
func (l *sessionLog) ended(err error, planned bool) {
	if l == nil {
		return
	}
	var args []any
	if l.lost > 0 {
		args = append(args, keyLost, l.lost)
	}
	switch {
	case planned:
		err = nil
	case err == nil && l.lost > 0:
		err = errLeftTasks
	}
	if err != nil {
		args = append(args, whyAttrs(err)...)
	}
	var fault *ProtocolError
	switch {
	case !l.opened && err != nil:
		l.logger.Warn("connection refused", args...)
	case !l.opened: // somebody looked whether the port is open
		l.logger.Debug("connection closed without a greeting")
	case err == nil || l.idle && !errors.As(err, &fault):
		l.logger.Info("session closed", args...)
	default:
		l.logger.Warn("session lost", args...)
	}
}

// debugs says whether started and finished log anything.
func (l *sessionLog) debugs() bool { return l != nil && l.debug }

// started and finished are called by the slot that executes a job, if debugs.
func (l *sessionLog) started(j *job) {
	l.logger.Debug("task started", keyTask, j.number, keyAttempt, j.attempt, keyInstruction, logged(j.instruction))
}

func (l *sessionLog) finished(attempt int, m *message, reported bool) {
	args := []any{keyTask, m.task, keyAttempt, attempt}
	text := "task done"
	if m.verb == verbDone {
		args = append(args, keyElapsed, m.time)
	} else {
		text = "task failed"
		args = append(args, keyKind, m.word, keyError, logged(m.text))
	}
	if !reported {
		args = append(args, keyReported, false)
	}
	l.logger.Debug(text, args...)
}

// stuck and unstuck tell of a handler that keeps its slot, and gives it back.
func (l *sessionLog) stuck(c *jobContext) {
	l.logger.Warn("handler stuck after its task's timeout", keyTask, c.number, keyAttempt, c.attempt)
}

func (l *sessionLog) unstuck(c *jobContext) {
	l.logger.Info("stuck handler returned", keyTask, c.number, keyAttempt, c.attempt)
}

// logStarted says that the run connects to its workers.
func (r *run) logStarted() {
	if r.log != nil {
		r.log.Info("run started")
	}
}

// logEnded says how the run ended.
func (r *run) logEnded(counts Counts, err error) {
	if r.log == nil {
		return
	}
	args := []any{slog.Group(keyTasks, "done", counts.Done, "failed", counts.Failed, "canceled", counts.Canceled,
		"skipped", counts.Skipped, "unknown", counts.Unknown), keyElapsed, time.Since(r.started)}
	if errors.Is(err, errLeft) {
		args, err = append(args, keyError, unprefixed(err)), nil // it may well have been meant
	}
	if err == nil {
		r.log.Info("run ended", args...)
		return
	}
	// The text of err may hold instructions.
	if why := r.reasonOf(err); why != "" {
		args = append(args, keyError, why)
	}
	r.log.Warn("run ended", append(args, failureAttrs(err)...)...)
	r.log.Debug("why the run ended", keyError, plainText(err.Error()))
}

// failureAttrs names the task that err is about, if there is one, without its
// instruction and what its worker says of it.
func failureAttrs(err error) []any {
	var failure *TaskError
	if !errors.As(err, &failure) {
		return nil
	}
	args := []any{keyTask, failure.Index, keyOutcome, failure.Outcome.String()}
	if category, ok := categoryOf(failure.Task); ok {
		args = append(args, keyCategory, logged(category))
	}
	if failure.Attempt > 0 {
		args = append(args, keyWorker, logged(failure.Worker), keyAttempt, failure.Attempt)
	}
	if remote := (*RemoteError)(nil); errors.As(failure, &remote) {
		args = append(args, keyKind, logged(remote.Kind))
	}
	return args
}

// reasonOf is why a run did not go as it should, without the particulars.
func (r *run) reasonOf(err error) string {
	var failure *TaskError
	var worker *WorkerError
	failed, named := errors.As(err, &failure), errors.As(err, &worker)
	stayed := named && slices.Contains(r.farewell, error(worker))
	known := []error{ErrCoordinatorClosed, ErrNoWorker, ErrInsecureTransport, errBroken}
	if failed || stayed || !named { // else it may be a dial's context that ended
		known = append(known, context.DeadlineExceeded, context.Canceled)
	}
	for _, known := range known {
		if errors.Is(err, known) {
			return unprefixed(known)
		}
	}
	switch {
	case failed:
		return "not every task is Done"
	case stayed:
		return "a worker said no goodbye"
	case named:
		return "a worker cannot be used" // which one, and why, is logged with the dial
	}
	return ""
}

// logNotReached says that no session was opened. quietly is for when nobody need be
// there yet, or the same was said not long ago.
func (r *run) logNotReached(l *link, err error, quietly bool) {
	level := slog.LevelWarn
	if quietly {
		level = slog.LevelDebug
	}
	if r.log != nil {
		r.log.Log(context.Background(), level, "worker not reached", append([]any{keyCategory, logged(l.queue.category), keyAddr, logged(l.addr)}, whyAttrs(err)...)...)
	}
}

// logNoGoodbye says that a worker did not shut down as it was told to.
func (r *run) logNoGoodbye(err error) {
	var named *WorkerError
	if r.log != nil && errors.As(err, &named) {
		r.log.Warn("no goodbye", append([]any{keyWorker, logged(named.Worker), keyCategory, logged(named.Category), keyAddr, logged(named.Addr)}, whyAttrs(err)...)...)
	}
}

// logObserver logs what happens in a run while locks are held. It is called
// afterwards, as an observer is, because a logger may block. It is nil if there is
// no logger.
func logObserver(l *slog.Logger) *Observer {
	if l == nil {
		return nil
	}
	o := &Observer{
		SessionOpened: func(i SessionOpenedInfo) {
			l.Info("session opened", keyCategory, logged(i.Category), keyWorker, logged(i.Worker), keyAddr, logged(i.Addr), keySlots, i.Slots, keyWindow, i.Window)
		},
		SessionLost: func(i SessionLostInfo) {
			args := []any{keyCategory, logged(i.Category), keyWorker, logged(i.Worker), keyAddr, logged(i.Addr)}
			if i.Goodbye {
				l.Info("session closed", args...)
				return
			}
			l.Warn("session lost", append(append(args, keyLost, i.Lost), whyAttrs(i.Err)...)...)
		},
		Goodbye: func(i GoodbyeInfo) {
			l.Info("worker shut down", keyWorker, logged(i.Worker), keyAddr, logged(i.Addr), keyText, logged(i.Text))
		},
	}
	if debugs(l) {
		o.TaskSent = func(i TaskSentInfo) {
			l.Debug("task sent", keyTask, i.Index, keyAttempt, i.Attempt, keyCategory, logged(i.Task.Category), keyWorker, logged(i.Worker), keyAddr, logged(i.Addr),
				keyInstruction, logged(i.Task.Instruction))
		}
		o.TaskRetried = func(i TaskRetriedInfo) {
			l.Debug("task failed, and is tried again", keyTask, i.Index, keyAttempt, i.Attempt, keyWorker, logged(i.Worker), keyAddr, logged(i.Addr), keyError, logged(i.Err.Error()))
		}
		o.TaskDone = func(i TaskDoneInfo) {
			args := []any{keyTask, i.Result.Index, keyAttempt, i.Result.Attempts, keyOutcome, i.Result.Outcome.String()}
			if i.Result.Err != nil {
				args = append(args, keyError, logged(i.Result.Err.Error()))
			}
			l.Debug("task settled", args...)
		}
	}
	return o
}

// joined is an observer that calls both, either of which may be nil.
func joined(a, b *Observer) *Observer {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	return &Observer{
		GroupStarted:  both(a.GroupStarted, b.GroupStarted),
		TaskDone:      both(a.TaskDone, b.TaskDone),
		SessionOpened: both(a.SessionOpened, b.SessionOpened),
		SessionLost:   both(a.SessionLost, b.SessionLost),
		TaskSent:      both(a.TaskSent, b.TaskSent),
		TaskRetried:   both(a.TaskRetried, b.TaskRetried),
		GroupDone:     both(a.GroupDone, b.GroupDone),
		Goodbye:       both(a.Goodbye, b.Goodbye),
	}
}

func both[Info any](f, g func(Info)) func(Info) {
	switch {
	case f == nil:
		return g
	case g == nil:
		return f
	}
	return func(info Info) { f(info); g(info) }
}
