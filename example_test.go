package taskexec_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"example.com/taskexec"
)

// A coordinator and a worker in one program, over loopback. In a real one the
// worker is a process of its own, on this machine or another.
func ExampleCoordinator_Run() {
	ctx := context.Background()
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		return strings.ToUpper(task.Instruction), nil
	}))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	var serving sync.WaitGroup
	serving.Go(func() { worker.Serve(ctx, listener) })

	addr := listener.Addr().String()
	coordinator, err := taskexec.NewCoordinator(taskexec.WithWorkers("a", addr), taskexec.WithWorkers("b", addr))
	if err != nil {
		fmt.Println(err)
		return
	}
	tasks, err := taskexec.ParseTasks("b1 a1 a2")
	if err != nil {
		fmt.Println(err)
		return
	}
	report, err := coordinator.Run(ctx, tasks)
	if err != nil {
		fmt.Println(err)
	}
	for _, r := range report.Results { // in the order of tasks, whatever was executed first
		fmt.Println(r.Task.Instruction, r.Outcome, r.Output)
	}

	worker.Shutdown(ctx)
	serving.Wait()
	// Output:
	// b1 Done B1
	// a1 Done A1
	// a2 Done A2
}

// A worker with its options. It serves until ctx ends, a coordinator has it
// shut down, or Shutdown is called.
func ExampleNewWorker() {
	handler := taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		return "rendered " + task.Instruction, nil
	})
	worker := taskexec.NewWorker(handler,
		taskexec.WithName("renderer"),
		taskexec.WithCategories("frames", "stills"), // and refuse any other
		taskexec.WithSlots(4),                       // up to four at a time
	)

	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("the example is over"))
	fmt.Println(worker.Name())
	fmt.Println(worker.ListenAndServe(ctx, "127.0.0.1:0"))
	// Output:
	// renderer
	// the example is over
}

// A handler is a function of a task. It should stop when its context ends: the
// run was canceled, or its coordinator is gone.
func ExampleHandlerFunc() {
	handler := taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		seconds, err := time.ParseDuration(task.Instruction)
		if err != nil {
			return "", fmt.Errorf("not a duration: %q", task.Instruction)
		}
		select {
		case <-time.After(seconds):
			return "slept", nil
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	})

	fmt.Println(handler.Handle(context.Background(), taskexec.Task{Category: "sleep", Instruction: "1ms"}))
	fmt.Println(handler.Handle(context.Background(), taskexec.Task{Category: "sleep", Instruction: "soon"}))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	fmt.Println(handler.Handle(ctx, taskexec.Task{Category: "sleep", Instruction: "1h"}))
	// Output:
	// slept <nil>
	//  not a duration: "soon"
	//  context canceled
}

// An observer is told how a run goes on, while it does.
func ExampleWithObserver() {
	ctx := context.Background()
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		return "", nil
	}), taskexec.WithName("w"))
	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("a", "w:1"), taskexec.WithWorkers("b", "w:1"),
		taskexec.WithDialer(func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe()
			go worker.ServeConn(ctx, there)
			return here, nil
		}),
		taskexec.WithObserver(taskexec.Observer{
			GroupStarted: func(g taskexec.GroupStartedInfo) {
				fmt.Printf("stage %d: %d tasks of %s\n", g.Stage, len(g.Tasks), g.Category)
			},
			TaskDone: func(t taskexec.TaskDoneInfo) {
				fmt.Println(t.Result.Task.Instruction, t.Result.Outcome)
			},
			GroupDone: func(g taskexec.GroupDoneInfo) {
				fmt.Printf("%s: %d done, %d failed\n", g.Category, g.Counts.Done, g.Counts.Failed)
			},
		}))
	if err != nil {
		fmt.Println(err)
		return
	}
	tasks, _ := taskexec.ParseTasks("a1 b1 a2")
	if _, err := coordinator.Run(ctx, tasks); err != nil {
		fmt.Println(err)
	}
	// Output:
	// stage 0: 2 tasks of a
	// a1 Done
	// a2 Done
	// a: 2 done, 0 failed
	// stage 1: 1 tasks of b
	// b1 Done
	// b: 1 done, 0 failed
}

// With the order ByInput each task waits for the one before it, whatever their
// categories are.
func ExampleWithOrder() {
	ctx := context.Background()
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		fmt.Println(task.Instruction)
		return "", nil
	}))
	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithOrder(taskexec.ByInput),
		taskexec.WithWorkers("valve", "lab:1"), taskexec.WithWorkers("pump", "lab:1"),
		taskexec.WithDialer(func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe()
			go worker.ServeConn(ctx, there)
			return here, nil
		}))
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = coordinator.Run(ctx, []taskexec.Task{
		{Category: "valve", Instruction: "open the valve"},
		{Category: "pump", Instruction: "pump 20 ml"},
		{Category: "valve", Instruction: "close the valve"},
	})
	fmt.Println(err)
	// Output:
	// open the valve
	// pump 20 ml
	// close the valve
	// <nil>
}

// Each worker is told to shut down when no later stage needs it, and the run
// waits for its goodbye before it goes on.
func ExampleWithWorkerShutdown() {
	ctx := context.Background()
	handler := taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		fmt.Println("executing", task.Instruction)
		return "", nil
	})
	workers := map[string]*taskexec.Worker{
		"first:1":  taskexec.NewWorker(handler, taskexec.WithName("first")),
		"second:1": taskexec.NewWorker(handler, taskexec.WithName("second")),
	}
	var serving sync.WaitGroup
	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkerShutdown(),
		taskexec.WithWorkers("a", "first:1"), taskexec.WithWorkers("b", "second:1"),
		taskexec.WithDialer(func(_ context.Context, _, addr string) (net.Conn, error) {
			here, there := net.Pipe()
			serving.Go(func() { workers[addr].ServeConn(ctx, there) })
			return here, nil
		}))
	if err != nil {
		fmt.Println(err)
		return
	}
	tasks, _ := taskexec.ParseTasks("a1 b1")
	if _, err := coordinator.Run(ctx, tasks); err != nil {
		fmt.Println(err)
	}
	serving.Wait()
	// Nothing of the worker goes on, and nothing new is taken.
	here, _ := net.Pipe()
	fmt.Println(workers["first:1"].ServeConn(ctx, here))
	// Output:
	// executing a1
	// executing b1
	// taskexec: worker closed
}

// A task may be executed again if the session with its worker was lost. The
// key is the same for every attempt, and so keeps an effect from happening
// twice; a resource that remembers the greatest attempt can refuse a late one.
func ExampleTaskInfoFrom() {
	ctx := context.Background()
	paid := make(map[string]bool) // in real life, a table with a unique key
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		info, ok := taskexec.TaskInfoFrom(ctx)
		if !ok {
			return "", errors.New("not called by a worker")
		}
		if paid[info.Key()] {
			return "paid before", nil
		}
		paid[info.Key()] = true
		return fmt.Sprintf("paid by attempt %d at task %d", info.Attempt, info.Task), nil
	}))
	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("pay", "bank:1"),
		taskexec.WithDialer(func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe()
			go worker.ServeConn(ctx, there)
			return here, nil
		}))
	if err != nil {
		fmt.Println(err)
		return
	}
	report, err := coordinator.Run(ctx, []taskexec.Task{{Category: "pay", Instruction: "rent"}, {Category: "pay", Instruction: "gas"}})
	for _, r := range report.Results {
		fmt.Println(r.Task.Instruction, r.Output)
	}
	fmt.Println(err)
	// Output:
	// rent paid by attempt 1 at task 0
	// gas paid by attempt 1 at task 1
	// <nil>
}

// A run whose tasks are not all Done returns an error that says why, and a
// report that says what became of each.
func ExampleTaskError() {
	ctx := context.Background()
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		if task.Instruction == "a2" {
			return "", errors.New("no paper in tray 2")
		}
		return "", nil
	}), taskexec.WithName("printer"))
	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("a", "printer:1"), taskexec.WithWorkers("b", "printer:1"),
		taskexec.WithDialer(func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe()
			go worker.ServeConn(ctx, there)
			return here, nil
		}))
	if err != nil {
		fmt.Println(err)
		return
	}
	tasks, _ := taskexec.ParseTasks("a1 a2 a3 b1")
	report, err := coordinator.Run(ctx, tasks)
	fmt.Println(err)

	var failed *taskexec.TaskError
	if errors.As(err, &failed) {
		fmt.Printf("task %d, attempt %d on worker %s\n", failed.Index, failed.Attempt, failed.Worker)
	}
	var said *taskexec.RemoteError
	if errors.As(err, &said) {
		fmt.Printf("its %s: %s\n", said.Kind, said.Text)
	}
	for _, r := range report.Results {
		fmt.Println(r.Task.Instruction, r.Outcome)
	}
	// Output:
	// taskexec: 2 of 4 tasks Done: task 1 (a2) Failed on worker printer, attempt 1: no paper in tray 2
	// task 1, attempt 1 on worker printer
	// its error: no paper in tray 2
	// a1 Done
	// a2 Failed
	// a3 Done
	// b1 Skipped
}

// Shutdown drains a worker: what runs finishes and is reported, what has not
// started is given back, and goes to another worker if there is one.
func ExampleWorker_Shutdown() {
	ctx := context.Background()
	started := make(chan struct{}, 2)
	finish := make(chan struct{})
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		started <- struct{}{}
		<-finish
		return "", nil
	}))
	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("a", "w:1"), taskexec.WithWorkerWait(0), // for another worker, once this one is gone
		taskexec.WithDialer(func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe()
			go worker.ServeConn(ctx, there)
			return here, nil
		}))
	if err != nil {
		fmt.Println(err)
		return
	}
	var running sync.WaitGroup
	var report *taskexec.Report
	running.Go(func() {
		tasks, _ := taskexec.ParseTasks("a1 a2")
		report, err = coordinator.Run(ctx, tasks)
	})
	<-started

	patience, cancel := context.WithCancelCause(ctx)
	cancel(errors.New("no patience"))
	fmt.Println(worker.Shutdown(patience) != nil) // the task still runs, and the drain goes on
	close(finish)
	fmt.Println(worker.Shutdown(ctx))
	running.Wait()
	fmt.Println(report.Results[0].Outcome, report.Results[1].Outcome)
	fmt.Println(errors.Is(err, taskexec.ErrNoWorker))
	// Output:
	// true
	// <nil>
	// Done Skipped
	// true
}

// Any function that makes a connection will do, such as the DialContext of a
// net.Dialer or a tls.Dialer. In a test, a net.Pipe needs no network.
func ExampleWithDialer() {
	ctx := context.Background()
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		return "hello, " + task.Instruction, nil
	}))
	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("greet", "worker.test:8001"),
		taskexec.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			fmt.Println("dialing", network, addr)
			here, there := net.Pipe()
			go worker.ServeConn(context.Background(), there)
			return here, nil
		}))
	if err != nil {
		fmt.Println(err)
		return
	}
	report, err := coordinator.Run(ctx, []taskexec.Task{{Category: "greet", Instruction: "world"}})
	fmt.Println(report.Results[0].Output, err)
	// Output:
	// dialing tcp worker.test:8001
	// hello, world <nil>
}
