package taskexec_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"time"

	"example.com/taskexec"
)

// Tasks come from a generator, and results are consumed as they come: neither
// need ever be in memory all at once.
func ExampleCoordinator_Stream() {
	ctx := context.Background()

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(_ context.Context, task taskexec.Task) (string, error) {
		return strings.ToUpper(task.Instruction), nil
	}))
	go worker.Serve(ctx, ln)
	defer worker.Shutdown(ctx)

	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("a", ln.Addr().String()),
		taskexec.WithOrder(taskexec.ByInput)) // ByCategory would collect all tasks first
	if err != nil {
		log.Fatal(err)
	}

	numbers := func(yield func(taskexec.Task) bool) {
		for i := 1; yield(taskexec.Task{Instruction: fmt.Sprintf("a%d", i)}); i++ {
		}
	}
	for result, err := range coordinator.Stream(ctx, numbers) {
		if err != nil {
			log.Fatal(err) // the run could not go on
		}
		if result.Err != nil {
			fmt.Println(result.Err) // this task is not Done
			continue
		}
		fmt.Println(result.Index, result.Output)
		if result.Index == 3 {
			break // cancels the run, and waits for it
		}
	}
	// Output:
	// 0 A1
	// 1 A2
	// 2 A3
	// 3 A4
}

// With StopSoon nothing new starts after the first failure, as with make. The
// default would run the stage to its end, so a9 too; KeepGoing everything.
func ExampleWithOnFailure() {
	ctx := context.Background()

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(_ context.Context, task taskexec.Task) (string, error) {
		if task.Instruction == "a2" {
			return "", errors.New("no such file")
		}
		return "", nil
	}), taskexec.WithName("w"))
	go worker.Serve(ctx, ln)
	defer worker.Shutdown(ctx)

	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("a", ln.Addr().String()),
		taskexec.WithWorkers("b", ln.Addr().String()),
		taskexec.WithOnFailure(taskexec.StopSoon),
		taskexec.WithWindow(1)) // little is on its way when a2 fails; what is may yet run
	if err != nil {
		log.Fatal(err)
	}
	tasks, err := taskexec.ParseTasks("a1 a2 a3 a4 a5 a6 a7 a8 a9 b1")
	if err != nil {
		log.Fatal(err)
	}
	report, err := coordinator.Run(ctx, tasks)
	for _, i := range []int{0, 1, 8, 9} {
		fmt.Println(report.Results[i].Task.Instruction, report.Results[i].Outcome)
	}
	if failed, ok := errors.AsType[*taskexec.TaskError](err); ok {
		fmt.Println("because of", failed)
	}
	// Output:
	// a1 Done
	// a2 Failed
	// a9 Skipped
	// b1 Skipped
	// because of task 1 (a2) Failed on worker w, attempt 1: no such file
}

// Instructions and outputs are values of the program's own types, and travel
// as JSON.
func ExampleHandlerOf() {
	type request struct {
		Words []string `json:"words"`
	}
	type reply struct {
		Longest string `json:"longest"`
		Letters int    `json:"letters"`
	}
	ctx := context.Background()

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	worker := taskexec.NewWorker(taskexec.HandlerOf(func(_ context.Context, in request) (reply, error) {
		var out reply
		for _, word := range in.Words {
			if len(word) > out.Letters {
				out = reply{Longest: word, Letters: len(word)}
			}
		}
		return out, nil
	}))
	go worker.Serve(ctx, ln)
	defer worker.Shutdown(ctx)

	coordinator, err := taskexec.NewCoordinator(taskexec.WithWorkers("count", ln.Addr().String()))
	if err != nil {
		log.Fatal(err)
	}
	good, err := taskexec.TaskOf("count", request{Words: []string{"every", "instruction", "once"}})
	if err != nil {
		log.Fatal(err)
	}
	bad := taskexec.Task{Category: "count", Instruction: `{"words": "one"}`} // not a list

	report, _ := coordinator.Run(ctx, []taskexec.Task{good, bad})
	for _, result := range report.Results {
		out, err := taskexec.OutputOf[reply](result)
		if err != nil {
			remote, ok := errors.AsType[*taskexec.RemoteError](err)
			fmt.Println(result.Outcome, ok && strings.Contains(remote.Text, `field "words"`))
			continue
		}
		fmt.Println(result.Outcome, out.Longest, out.Letters)
	}
	// Output:
	// Done instruction 11
	// Failed true
}

// Snapshot is what a progress display polls, while Run goes on elsewhere.
func ExampleCoordinator_Snapshot() {
	ctx := context.Background()

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	reached, goOn := make(chan struct{}), make(chan struct{})
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(_ context.Context, task taskexec.Task) (string, error) {
		if task.Instruction == "a2" {
			close(reached)
			<-goOn
		}
		return "", nil
	}), taskexec.WithName("w"))
	go worker.Serve(ctx, ln)
	defer worker.Shutdown(ctx)

	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("a", ln.Addr().String()),
		taskexec.WithWindow(1)) // a2 is sent when a1 is done, and a3 when a2 is
	if err != nil {
		log.Fatal(err)
	}
	tasks, err := taskexec.ParseTasks("a1 a2 a3")
	if err != nil {
		log.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		_, err := coordinator.Run(ctx, tasks)
		ended <- err
	}()

	<-reached
	for _, run := range coordinator.Snapshot() {
		for _, c := range run.Categories {
			fmt.Printf("%s: %d done, %d in flight, %d waiting\n", c.Category, c.Counts.Done, c.InFlight, c.Waiting)
			for _, w := range c.Workers {
				fmt.Printf("  worker %s was sent %d\n", w.Worker, w.Sent)
			}
		}
	}
	close(goOn)
	fmt.Println(<-ended, len(coordinator.Snapshot()))
	// Output:
	// a: 1 done, 1 in flight, 1 waiting
	//   worker w was sent 2
	// <nil> 0
}

// Canceling the run's context cancels the context of each handler that
// executes, and tells it the cause. What was not started never is.
func ExampleCoordinator_Run_cancel() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	started := make(chan struct{})
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, _ taskexec.Task) (string, error) {
		close(started)
		<-ctx.Done() // the work would stand here
		fmt.Println("handler:", strings.Contains(context.Cause(ctx).Error(), "the tank is full"))
		return "", ctx.Err()
	}))
	go worker.Serve(context.Background(), ln)
	defer worker.Shutdown(context.Background())

	coordinator, err := taskexec.NewCoordinator(taskexec.WithWorkers("a", ln.Addr().String()))
	if err != nil {
		log.Fatal(err)
	}
	tasks, err := taskexec.ParseTasks("a1 a2")
	if err != nil {
		log.Fatal(err)
	}

	errFull := errors.New("the tank is full")
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		<-started
		cancel(errFull)
	}()
	report, err := coordinator.Run(ctx, tasks)
	for _, result := range report.Results {
		fmt.Println(result.Task.Instruction, result.Outcome)
	}
	fmt.Println(errors.Is(err, context.Canceled), errors.Is(err, errFull))
	// Output:
	// handler: true
	// a1 Canceled
	// a2 Skipped
	// true true
}

// Middleware is a function that wraps a Handler in another.
func ExampleHandler_middleware() {
	logged := func(next taskexec.Handler) taskexec.Handler {
		return taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
			info, _ := taskexec.TaskInfoFrom(ctx)
			output, err := next.Handle(ctx, task)
			fmt.Printf("task %d (%s), attempt %d: error %v\n", info.Task, task.Instruction, info.Attempt, err)
			return output, err
		})
	}
	timed := func(next taskexec.Handler) taskexec.Handler {
		return taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
			start := time.Now()
			defer func() { fmt.Println(task.Instruction, "took", time.Since(start).Truncate(time.Minute)) }()
			return next.Handle(ctx, task)
		})
	}
	work := taskexec.HandlerFunc(func(_ context.Context, task taskexec.Task) (string, error) {
		if task.Instruction == "a2" {
			return "", errors.New("no such file")
		}
		return "", nil
	})

	ctx := context.Background()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	worker := taskexec.NewWorker(logged(timed(work)))
	go worker.Serve(ctx, ln)
	defer worker.Shutdown(ctx)

	coordinator, err := taskexec.NewCoordinator(taskexec.WithWorkers("a", ln.Addr().String()))
	if err != nil {
		log.Fatal(err)
	}
	tasks, err := taskexec.ParseTasks("a1 a2")
	if err != nil {
		log.Fatal(err)
	}
	report, _ := coordinator.Run(ctx, tasks)
	fmt.Println(report.Counts.Done, "of", report.Counts.Total(), "done")
	// Output:
	// a1 took 0s
	// task 0 (a1), attempt 1: error <nil>
	// a2 took 0s
	// task 1 (a2), attempt 1: error no such file
	// 1 of 2 done
}

// A command that is killed because its context has ended says "signal: killed".
// Its handler says what that means: that the task was canceled, or took too long.
func ExampleHandlerFunc_command() {
	build := func(ctx context.Context, task taskexec.Task) (string, error) {
		output, err := exec.CommandContext(ctx, "make", task.Instruction).CombinedOutput()
		switch {
		case err == nil:
			return string(output), nil
		case ctx.Err() != nil:
			return "", context.Cause(ctx)
		}
		return "", fmt.Errorf("%w: %s", err, output)
	}
	worker := taskexec.NewWorker(taskexec.HandlerFunc(build), taskexec.WithSlots(runtime.NumCPU()))
	if err := worker.ListenAndServe(context.Background(), "127.0.0.1:8001"); err != nil {
		log.Fatal(err)
	}
}

// With Concurrent no category waits for another: each of these two tasks waits
// until the other has started.
func ExampleWithOrder_concurrent() {
	ctx := context.Background()

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	var both sync.WaitGroup
	both.Add(2)
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(_ context.Context, task taskexec.Task) (string, error) {
		both.Done()
		both.Wait()
		return "", nil
	}), taskexec.WithSlots(2))
	go worker.Serve(ctx, ln)
	defer worker.Shutdown(ctx)

	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("a", ln.Addr().String()),
		taskexec.WithWorkers("b", ln.Addr().String()),
		taskexec.WithOrder(taskexec.Concurrent))
	if err != nil {
		log.Fatal(err)
	}
	tasks, err := taskexec.ParseTasks("a1 b1")
	if err != nil {
		log.Fatal(err)
	}
	report, err := coordinator.Run(ctx, tasks)
	for _, result := range report.Results { // in input order, whatever ended first
		fmt.Println(result.Task.Instruction, result.Outcome)
	}
	fmt.Println(err)
	// Output:
	// a1 Done
	// b1 Done
	// <nil>
}

// A task's timeout is counted from when its handler starts, and ends the
// handler's context.
func ExampleTask_timeout() {
	ctx := context.Background()

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	worker := taskexec.NewWorker(taskexec.HandlerFunc(func(ctx context.Context, task taskexec.Task) (string, error) {
		if task.Instruction == "endless" {
			<-ctx.Done() // the work would stand here
			return "", ctx.Err()
		}
		return "", nil
	}))
	go worker.Serve(ctx, ln)
	defer worker.Shutdown(ctx)

	coordinator, err := taskexec.NewCoordinator(
		taskexec.WithWorkers("job", ln.Addr().String()),
		taskexec.WithTaskTimeout(time.Hour)) // for tasks that have none of their own
	if err != nil {
		log.Fatal(err)
	}
	report, _ := coordinator.Run(ctx, []taskexec.Task{
		{Category: "job", Instruction: "endless", Timeout: 10 * time.Millisecond},
		{Category: "job", Instruction: "quick"},
	})
	for _, result := range report.Results {
		fmt.Println(result.Task.Instruction, result.Outcome)
		if remote, ok := errors.AsType[*taskexec.RemoteError](result.Err); ok {
			fmt.Println("because of its", remote.Kind)
		}
	}
	// Output:
	// endless Failed
	// because of its timeout
	// quick Done
}
