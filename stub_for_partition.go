package taskexec

// STUB, to be deleted with this whole file: coordinator.go defines these.

import "fmt"

type Outcome int

const (
	Done Outcome = iota + 1
	Failed
)

type TaskError struct {
	Index   int
	Task    Task
	Outcome Outcome
	Worker  string
	Attempt int
	Err     error
}

func (e *TaskError) Error() string { return fmt.Sprintf("taskexec: task %d: %v", e.Index, e.Err) }
func (e *TaskError) Unwrap() error { return e.Err }
