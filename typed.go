package taskexec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
)

// HandlerOf makes a Handler from a typed function: the instruction is decoded
// from JSON into an In, and the Out encoded to JSON as the output, both by
// encoding/json. TaskOf and OutputOf are the coordinator's side of it.
//
// An instruction that does not decode fails its task with the kind "final",
// since no other attempt would change it; where one field is at fault, the error
// names it. An Out that does not encode fails it in the same way. An error that
// f returns fails the task as that of any Handler does. A nil f panics.
func HandlerOf[In, Out any](f func(ctx context.Context, in In) (Out, error)) Handler {
	if f == nil {
		panic("taskexec: HandlerOf: nil function")
	}
	return HandlerFunc(func(ctx context.Context, task Task) (string, error) {
		var in In
		if err := json.Unmarshal([]byte(task.Instruction), &in); err != nil {
			return "", Final(fmt.Errorf("decoding the instruction into %v: %w", reflect.TypeFor[In](), fieldError(err)))
		}
		out, err := f(ctx, in)
		if err != nil {
			return "", err
		}
		output, err := jsonOf(out)
		if err != nil {
			return "", Final(fmt.Errorf("encoding the output from %T: %w", out, err))
		}
		return output, nil
	})
}

// fieldError puts the field of a type error first, in the words of the JSON.
func fieldError(err error) error {
	var mismatch *json.UnmarshalTypeError
	if errors.As(err, &mismatch) && mismatch.Field != "" {
		return fmt.Errorf("field %q: %w", mismatch.Field, err)
	}
	return err
}

// TaskOf makes a task of the category, with in as JSON for its instruction. Its
// error is that of encoding/json. A category should be given: by default it
// would be the first character of the JSON, such as a brace.
func TaskOf[In any](category string, in In) (Task, error) {
	instruction, err := jsonOf(in)
	if err != nil {
		return Task{}, fmt.Errorf("taskexec: encoding an instruction from %T: %w", in, err)
	}
	return Task{Category: category, Instruction: instruction}, nil
}

// jsonOf is v as json.Marshal has it, but for <, > and &, which stay as they are:
// what is shown in an error or a log should be readable, and none of it is HTML.
func jsonOf(v any) (string, error) {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return strings.TrimSuffix(b.String(), "\n"), err
}

// OutputOf decodes the output of a result that is Done from JSON. Its error is
// the result's *TaskError if the result is not Done, otherwise that of decoding,
// which names the field where one is at fault.
func OutputOf[Out any](r Result) (Out, error) {
	var out Out
	if r.Err != nil {
		return out, r.Err
	}
	if err := json.Unmarshal([]byte(r.Output), &out); err != nil {
		return out, fmt.Errorf("taskexec: decoding the output of task %d into %v: %w", r.Index, reflect.TypeFor[Out](), fieldError(err))
	}
	return out, nil
}
