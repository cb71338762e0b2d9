package main

import (
	"context"
	"fmt"
	"iter"
	"math/rand/v2"
	"net"
	"strings"

	"example.com/taskexec"
)

// Taskexec is measured through its public API, and everything counts: a figure
// goes from the call of Run, with a list of tasks at hand, to its return, with
// a report. Workers listen already, as they do for the yardsticks.

func serveTaskexec(echo bool) role {
	return func([]string) (string, error) {
		return serveHandler(func(task taskexec.Task) string {
			if echo {
				return task.Instruction
			}
			return ""
		})
	}
}

// serveHandler has a worker serve until the process ends.
func serveHandler(output func(taskexec.Task) string) (addr string, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	handler := taskexec.HandlerFunc(func(_ context.Context, task taskexec.Task) (string, error) { return output(task), nil })
	go taskexec.NewWorker(handler).Serve(context.Background(), ln)
	return ln.Addr().String(), nil
}

// categories has one for each worker process.
var categories = [workers]string{"a", "b", "c"}

// newCoordinator gives each category the worker at its place in addrs, or the
// workers, separated by commas.
func newCoordinator(addrs []string, order taskexec.Order, options ...taskexec.CoordinatorOption) (*taskexec.Coordinator, error) {
	all := []taskexec.CoordinatorOption{taskexec.WithOrder(order)}
	if *window > 0 {
		all = append(all, taskexec.WithWindow(*window))
	}
	for i, addr := range addrs {
		all = append(all, taskexec.WithWorkers(categories[i], strings.Split(addr, ",")...))
	}
	return taskexec.NewCoordinator(append(all, options...)...)
}

// randomBytes is a text with everything in it that has to be escaped.
func randomBytes(n int) string {
	text := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(text)
	return string(text)
}

// tasks yields n tasks of alternating categories.
func tasks(n int, payload string) iter.Seq[taskexec.Task] { return tasksOf(categories[:], n, payload) }

// tasksOf yields n tasks of these categories in turn.
func tasksOf(categories []string, n int, payload string) iter.Seq[taskexec.Task] {
	return func(yield func(taskexec.Task) bool) {
		for i := range n {
			if !yield(taskexec.Task{Category: categories[i%len(categories)], Instruction: payload}) {
				return
			}
		}
	}
}

// stream has n tasks executed that are made as they are asked for, and looks at
// each result.
func stream(c *taskexec.Coordinator, n int, payload string) error {
	done := 0
	for result, err := range c.Stream(context.Background(), tasks(n, payload)) {
		if err != nil {
			return err
		}
		if result.Outcome != taskexec.Done {
			return result.Err
		}
		done++
	}
	if done != n {
		return fmt.Errorf("%d of %d tasks are done", done, n)
	}
	return nil
}
