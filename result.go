package taskexec

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// An Outcome is how a task ended. The zero value is none of them: no Result
// that a caller sees has it.
type Outcome int

const (
	Done     Outcome = 1 + iota // executed, and its output reported
	Failed                      // the handler or the worker said so, or the task itself cannot be sent
	Canceled                    // started, then stopped, because the run was canceled
	Skipped                     // never started
	Unknown                     // may have run: its session was lost, or it ignored a cancel
)

var outcomeNames = [...]string{Done: "Done", Failed: "Failed", Canceled: "Canceled", Skipped: "Skipped", Unknown: "Unknown"}

// String returns the name of the constant.
func (o Outcome) String() string {
	if o < Done || int(o) >= len(outcomeNames) {
		return fmt.Sprintf("Outcome(%d)", int(o))
	}
	return outcomeNames[o]
}

// A Result says how one task ended.
type Result struct {
	Index    int           // of the task in what Run was given
	Task     Task          // with its category, whether it was given or taken from the instruction
	Outcome  Outcome       // exactly one, never zero
	Output   string        // the handler's, if the outcome is Done
	Err      error         // a *TaskError exactly when the outcome is not Done
	Worker   string        // the worker of the last attempt, by name, or by address if it has none; "" if none
	Attempts int           // times the task was sent
	Retries  int           // times it was sent again because the attempt before had failed
	Losses   int           // attempts that ended with their session, so that nobody knows whether they ran
	Queued   time.Duration // from the start of the task's group to its last sending
	Executed time.Duration // how long the handler took, by the worker's clock, in whole microseconds, if the outcome is Done
}

// Counts says how many tasks ended in each way.
type Counts struct {
	Done, Failed, Canceled, Skipped, Unknown int
}

// Total is the number of tasks counted.
func (c Counts) Total() int { return c.Done + c.Failed + c.Canceled + c.Skipped + c.Unknown }

func (c *Counts) add(o Outcome) {
	switch o {
	case Done:
		c.Done++
	case Failed:
		c.Failed++
	case Canceled:
		c.Canceled++
	case Skipped:
		c.Skipped++
	case Unknown:
		c.Unknown++
	}
}

func (c *Counts) sum(o Counts) {
	c.Done += o.Done
	c.Failed += o.Failed
	c.Canceled += o.Canceled
	c.Skipped += o.Skipped
	c.Unknown += o.Unknown
}

// ErrOutcomeUnknown is wrapped by the error of each task whose outcome is
// Unknown: it was sent, and nobody can tell whether it was executed.
var ErrOutcomeUnknown = errors.New("taskexec: it may have been executed")

// Troubles counts what went wrong in a run, whether the run got over it or not.
type Troubles struct {
	Losses  int // attempts that ended with their session
	Retries int // attempts made because a handler had failed
	Returns int // tasks that a worker gave back unstarted
	Redials int // sessions opened after the first with a worker
	Stuck   int // handlers that went on after their timeout
}

func (t *Troubles) add(o Troubles) {
	t.Losses += o.Losses
	t.Retries += o.Retries
	t.Returns += o.Returns
	t.Redials += o.Redials
	t.Stuck += o.Stuck
}

// A Report says how a run ended, task by task.
type Report struct {
	Run     string        // the run's id, the same that handlers see in TaskInfo
	Results []Result      // Results[i] belongs to the task with index i
	Counts  Counts        // of Results by outcome
	Elapsed time.Duration // of the whole run, connecting included

	Troubles Troubles // what went wrong on the way, whatever the outcomes

	// Categories has the same for each category that was connected to and for
	// each of its workers, sorted by category.
	Categories []CategorySnapshot
}

// A TaskError says why a task is not Done. It unwraps to the reason: a
// *RemoteError if the handler or the worker gave one, otherwise what happened on
// this side.
type TaskError struct {
	Index   int // of the task in what Run was given
	Task    Task
	Outcome Outcome
	Worker  string // of the last attempt; "" if there was none
	Attempt int    // the last; 0 if there was none
	Err     error
}

func (e *TaskError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "task %d (%s) %s", e.Index, quoteUnlessPlain(e.Task.Instruction), e.Outcome)
	if e.Attempt > 0 {
		fmt.Fprintf(&b, " on worker %s, attempt %d", quoteUnlessPlain(e.Worker), e.Attempt)
	}
	fmt.Fprintf(&b, ": %s", unprefixed(e.Err))
	return b.String()
}

// Unwrap returns e.Err.
func (e *TaskError) Unwrap() error { return e.Err }

// A RemoteError is what a worker reported about a task that failed.
type RemoteError struct {
	Kind string // who or what failed the task: one of KindError and those that follow it
	// Text is the error's text, the panic's value and a shortened stack, or
	// the worker's own words, cut at 4 KiB, otherwise as it came.
	Text string
}

// The kinds of RemoteError, and of the wire's FAIL.
const (
	KindError    = "error"    // the handler returned an error
	KindFinal    = "final"    // the handler returned an error that another attempt would not change; see Final
	KindPanic    = "panic"    // the handler panicked, or ended its goroutine
	KindCanceled = "canceled" // the handler returned its context's error because the run was canceled
	KindTimeout  = "timeout"  // the handler returned its context's error because its time was over
	KindStuck    = "stuck"    // its time is over, and it still runs and holds its slot
	KindOutput   = "output"   // the output does not fit in a line
)

// Error is the text, with the kind in front of it if that is not "error" or
// "final", escaped so that it can go to a log or a terminal. Of a panic's text
// it is the first line that is not empty: the stack is left to whoever asks for
// Text.
func (e *RemoteError) Error() string {
	text := strings.TrimPrefix(e.Text, "taskexec: ") // of the cause that a handler's ctx ended with
	switch e.Kind {
	case KindError, KindFinal:
		return plainText(text)
	case KindPanic:
		text, _, _ = strings.Cut(strings.TrimSpace(text), "\n")
	}
	return quoteUnlessPlain(e.Kind) + ": " + plainText(text)
}

// A RunError is returned by Run when not every task is Done, or a worker that
// was told to shut down did not say goodbye. It is yielded by Stream when the run
// could not go on; its Counts are then those of the results yielded.
//
// If the run went on to its end, the error unwraps to the first *TaskError in
// input order, that of a Skipped task only if there is no other. If it could not
// go on, the error unwraps to the reason instead, and to no *TaskError unless a
// task was the reason: to an error that wraps ErrNoWorker, to one *WorkerError for
// each worker that could not be used, to ErrCoordinatorClosed, or to ctx's error
// and cause. The *TaskError of every task is in the Report either way.
type RunError struct {
	Counts Counts
	Err    error
}

func (e *RunError) Error() string {
	return fmt.Sprintf("taskexec: %d of %d tasks Done: %s", e.Counts.Done, e.Counts.Total(), unprefixed(e.Err))
}

// Unwrap returns e.Err.
func (e *RunError) Unwrap() error { return e.Err }

// A WorkerError says what went wrong with one worker: it could not be reached,
// did not greet as it should, or its session was lost. It unwraps to a
// *ProtocolError where either side found fault with the other.
type WorkerError struct {
	Category string // of the session
	Addr     string // as given to WithWorkers
	Worker   string // the name it gave; "" if it did not get that far
	Err      error
}

func (e *WorkerError) Error() string {
	if e.Worker == "" {
		return fmt.Sprintf("taskexec: worker of category %s at %s: %s", quoteUnlessPlain(e.Category), quoteUnlessPlain(e.Addr), plainText(unprefixed(e.Err)))
	}
	return fmt.Sprintf("taskexec: worker %s of category %s at %s: %s",
		quoteUnlessPlain(e.Worker), quoteUnlessPlain(e.Category), quoteUnlessPlain(e.Addr), plainText(unprefixed(e.Err)))
}

// Unwrap returns e.Err.
func (e *WorkerError) Unwrap() error { return e.Err }

// An inside is an error inside the message of another of this package.
type inside struct{ err error }

func (e inside) Error() string { return unprefixed(e.err) }
func (e inside) Unwrap() error { return e.err }

// unprefixed is err's text for the inside of another message of this package.
func unprefixed(err error) string {
	if err == nil {
		return "no reason given" // of an error that a program made itself
	}
	return strings.TrimPrefix(err.Error(), "taskexec: ")
}
