package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"

	"example.com/taskexec"
)

// crowd is many workers of one category beside few, all in this process, over
// pipes: what a task costs should not grow with the number of workers.
func crowd(o options) scenario {
	few, many := 10, 1000
	row := func(n int) string { return fmt.Sprintf("%d workers", n) }
	s := scenario{
		name:     "crowd",
		title:    "Workers of one category, in-process",
		unit:     nanoseconds,
		rounds:   min(o.rounds, 3),
		baseline: row(few),
		figures:  []figure{{fmt.Sprintf("time a task of %d workers, to that of %d", many, few), row(many), row(few), "≤ 1.5"}},
	}
	for _, n := range []int{few, many} {
		s.contestants = append(s.contestants, contestant{row(n), func() (measurement, error) {
			list := slices.Collect(tasks(o.tasks, instruction))
			for i := range list {
				list[i].Category = "a"
			}
			return processes(nil).timed(o.tasks, func() error { return runInProcess(n, list) })
		}})
	}
	return s
}

// runInProcess has tasks executed by n workers, each at the other end of a
// pipe.
func runInProcess(n int, list []taskexec.Task) error {
	ctx := context.Background()
	var serving sync.WaitGroup
	defer serving.Wait()
	workers := make(map[string]*taskexec.Worker)
	var addrs []string
	for i := range n {
		addr := fmt.Sprintf("worker:%d", i+1)
		addrs = append(addrs, addr)
		workers[addr] = taskexec.NewWorker(taskexec.HandlerFunc(func(context.Context, taskexec.Task) (string, error) { return "", nil }))
	}
	dial := func(_ context.Context, _, addr string) (net.Conn, error) {
		near, far := net.Pipe()
		serving.Go(func() { workers[addr].ServeConn(ctx, far) })
		return near, nil
	}
	c, err := newCoordinator(nil, taskexec.Concurrent, taskexec.WithWorkers("a", addrs...), taskexec.WithDialer(dial))
	if err != nil {
		return err
	}
	_, err = c.Run(ctx, list)
	return err
}
