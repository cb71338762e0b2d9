package taskexec

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"
)

// Retry says how often and when a task that failed is tried again. The zero
// value of a field other than Attempts stands for its default.
//
// The delay before try n+1 is drawn evenly from between 0 and FirstDelay times
// Factor to the power of n-1, or MaxDelay if that is less: full jitter, so that
// tasks that failed together are not tried again together. (Brooker,
// "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.)
type Retry struct {
	Attempts   int           // how many failures end a task, at least 1; 1 is no retry. A loss or a return is no failure
	FirstDelay time.Duration // default 100 ms
	Factor     float64       // at least 1; default 2
	MaxDelay   time.Duration // default 10 s
	Panics     bool          // try again after a panic too; by default it is final
}

// WithRetry tries a task again when its handler returned an error, timed out,
// or is stuck. By default such a task has failed.
//
// An error marked by Final is not tried again, nor is an output too long to
// send, nor, unless the policy says otherwise, a panic; RetryAfter sets the
// delay. A canceled task is Canceled, and one that was given back unstarted or
// lost with its session has not failed: neither counts. Meanwhile the other
// tasks of the group go on; with ByInput all later tasks wait.
//
// A policy with Attempts below 1, or another field out of range, is an error of
// NewCoordinator.
func WithRetry(policy Retry) CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) {
		switch {
		case policy.Attempts < 1:
			c.addError("WithRetry: Attempts is %d; a task is tried at least once", policy.Attempts)
		case policy.FirstDelay < 0 || policy.MaxDelay < 0:
			c.addError("WithRetry: a delay of %v up to %v; delays are not negative", policy.FirstDelay, policy.MaxDelay)
		case policy.Factor != 0 && !(policy.Factor >= 1) || math.IsInf(policy.Factor, 0):
			c.addError("WithRetry: Factor is %v; delays grow by a finite factor of at least 1", policy.Factor)
		}
		if policy.FirstDelay == 0 {
			policy.FirstDelay = defaultBackoff.first
		}
		if policy.Factor == 0 {
			policy.Factor = defaultBackoff.factor
		}
		if policy.MaxDelay == 0 {
			policy.MaxDelay = defaultBackoff.most
		}
		c.retry = policy
	})
}

// delay says whether a task that has failed n times, the last time with kind,
// is tried again, and after how long. asked is the handler's wish, if not 0.
func (p Retry) delay(n int, kind string, asked time.Duration, jitter func(time.Duration) time.Duration) (time.Duration, bool) {
	switch kind {
	case KindFinal, KindOutput, KindCanceled:
		return 0, false
	case KindPanic:
		if !p.Panics {
			return 0, false
		}
	}
	if n >= p.Attempts {
		return 0, false
	}
	if asked > 0 {
		return asked, true
	}
	return jitter(backoff{p.FirstDelay, p.MaxDelay, p.Factor}.slot(n)), true
}

// A backoff is how waiting times grow.
type backoff struct {
	first, most time.Duration
	factor      float64
}

var defaultBackoff = backoff{first: 100 * time.Millisecond, most: 10 * time.Second, factor: 2}

// slot is the longest wait after the nth failure, from 1.
func (b backoff) slot(n int) time.Duration {
	d := float64(b.first) * math.Pow(b.factor, float64(n-1))
	if d >= float64(b.most) { // an overflow is +Inf; and the longest duration would become a negative one
		return b.most
	}
	return time.Duration(d)
}

// fullJitter draws evenly from 0 to most, both included.
func fullJitter(most time.Duration) time.Duration {
	if most <= 0 {
		return 0
	}
	return rand.N(min(most, math.MaxInt64-1) + 1)
}

// sleep waits for d, and reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Final marks a handler's error as one that another attempt would not change.
// The task fails with the kind "final". Final(nil) is nil.
func Final(err error) error {
	if err == nil {
		return nil
	}
	return &finalError{err}
}

type finalError struct{ err error }

func (e *finalError) Error() string { return e.err.Error() }
func (e *finalError) Unwrap() error { return e.err }

// RetryAfter marks a handler's error as one that another attempt after d may
// well change; d takes the place of the delay that WithRetry would choose, and
// is rounded up to a whole millisecond. The failure counts like any other, and
// without WithRetry it is no different from one. RetryAfter(nil, d) is nil. A d
// of 0 or less panics.
func RetryAfter(err error, d time.Duration) error {
	if d <= 0 {
		panic(fmt.Sprintf("taskexec: RetryAfter: %v is not positive", d))
	}
	if err == nil {
		return nil
	}
	return &retryAfterError{err, d}
}

type retryAfterError struct {
	err error
	d   time.Duration
}

func (e *retryAfterError) Error() string { return e.err.Error() }
func (e *retryAfterError) Unwrap() error { return e.err }

// wishOf says what a handler's error asks for.
func wishOf(err error) (final bool, after time.Duration) {
	var f *finalError
	var r *retryAfterError
	switch {
	case errors.As(err, &f):
		return true, 0
	case errors.As(err, &r):
		return false, r.d
	}
	return false, 0
}
