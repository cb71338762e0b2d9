package taskexec

import (
	"context"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// The race detector is the judge here.
func TestSnapshotMayBePolledFromTheFirstMoment(t *testing.T) {
	h := HandlerFunc(func(context.Context, Task) (string, error) { return "", nil })
	c := newTestCoordinator(t, serveMem(t, h, "abc")...)
	var stop atomic.Bool
	var poll sync.WaitGroup
	poll.Go(func() {
		for !stop.Load() {
			for _, run := range c.Snapshot() {
				for _, category := range run.Categories {
					if category.Waiting < 0 {
						t.Errorf("%+v", category)
					}
				}
			}
			runtime.Gosched()
		}
	})
	for range 20 {
		if _, err := c.Run(t.Context(), mustParse(t, strings.Repeat("a1 b2 c3 ", 300))); err != nil {
			t.Error(err)
		}
	}
	stop.Store(true)
	poll.Wait()
}
