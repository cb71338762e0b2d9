package main

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"example.com/taskexec"
)

// What a program does with taskexec can be tested without a network and without
// waiting: a net.Pipe connects coordinator and worker, and in a synctest bubble
// an hour is over as soon as all that goes on is waiting for it.
func TestATaskIsTriedAgainAfterAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
			if tries++; tries == 1 {
				return "", taskexec.RetryAfter(errors.New("out of paper"), time.Hour)
			}
			return handle(ctx, task)
		}))
		coordinator, err := taskexec.NewCoordinator(
			taskexec.WithWorkers("a", "worker.test:8001"),
			taskexec.WithRetry(taskexec.Retry{Attempts: 2}),
			taskexec.WithDialer(func(context.Context, string, string) (net.Conn, error) {
				here, there := net.Pipe()
				go worker.ServeConn(context.Background(), there)
				return here, nil
			}))
		if err != nil {
			t.Fatal(err)
		}
		report, err := coordinator.Run(t.Context(), []taskexec.Task{{Instruction: "a1"}})
		if err != nil {
			t.Fatal(err)
		}
		if r := report.Results[0]; r.Output != "completed" || r.Attempts != 2 {
			t.Errorf("got %+v", r)
		}
		if want := time.Hour + 100*time.Millisecond; report.Elapsed != want {
			t.Errorf("the run took %v, want %v", report.Elapsed, want)
		}
	})
}
