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
	few, many := crowded(10, o.tasks), crowded(1000, o.tasks)
	return scenario{
		name:     "crowd",
		title:    "Workers of one category, in-process",
		unit:     nanoseconds,
		rounds:   min(o.rounds, 3),
		baseline: few.name,
		figures:  []figure{{"time a task of " + many.name + ", to that of " + few.name, many.name, few.name, "≤ 1.5"}},

		contestants: []contestant{few, many},
	}
}

// crowded has n tasks executed by so many workers of one category.
func crowded(workers, n int) contestant {
	return contestant{fmt.Sprintf("%d workers", workers), func() (measurement, error) {
		list := slices.Collect(tasksOf(categories[:1], n, instruction))
		return processes(nil).timed(n, func() error { return runInProcess(workers, list) })
	}}
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
	c, err := newCoordinator(nil, taskexec.Concurrent, taskexec.WithWorkers(categories[0], addrs...), taskexec.WithDialer(dial))
	if err != nil {
		return err
	}
	_, err = c.Run(ctx, list)
	return err
}
