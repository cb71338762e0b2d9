// Quickstart runs the whole of taskexec in one process: three workers, each
// on a loopback TCP port that the system picks, and a coordinator that
// sends them nine instructions, category a before b before c.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"example.com/taskexec"
)

const sample = "a1 a2 c1 b1 c2 b3 b2 b4 a3"

func main() {
	log.SetFlags(0)
	log.SetPrefix("quickstart: ")
	if len(os.Args) > 1 {
		log.Print("usage: quickstart (it takes no arguments)")
		os.Exit(2)
	}
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	categories := []string{"a", "b", "c"}
	served := make(chan error, len(categories))
	opts := []taskexec.CoordinatorOption{
		taskexec.WithWorkerShutdown(),
		taskexec.WithObserver(narrate()),
	}
	for _, category := range categories {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		w := taskexec.NewWorker(taskexec.HandlerFunc(handle),
			taskexec.WithName(category), taskexec.WithCategories(category))
		go func() { served <- w.Serve(ctx, ln) }()
		opts = append(opts, taskexec.WithWorkers(category, ln.Addr().String()))
		fmt.Printf("[Worker %s] Listening on port %d...\n", category, ln.Addr().(*net.TCPAddr).Port)
	}

	tasks, err := taskexec.ParseTasks(sample)
	if err != nil {
		return err
	}
	coordinator, err := taskexec.NewCoordinator(opts...)
	if err != nil {
		return err
	}
	fmt.Println("[Coordinator] Starting task distribution")
	if _, err := coordinator.Run(ctx, tasks); err != nil {
		return err
	}
	for range categories {
		if err := <-served; err != nil { // nil, since the coordinator shut it down
			return err
		}
	}
	return nil
}

// handle stands for real work: a tenth of a second, or less if the run is
// canceled.
func handle(ctx context.Context, task taskexec.Task) (string, error) {
	select {
	case <-time.After(100 * time.Millisecond):
		return "completed", nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// narrate returns an observer that prints what the coordinator does. A group
// with a failure is left out: Run's error tells of it.
func narrate() taskexec.Observer {
	list := func(tasks []taskexec.Task) string {
		instructions := make([]string, len(tasks))
		for i, task := range tasks {
			instructions[i] = printable(task.Instruction)
		}
		return strings.Join(instructions, " ")
	}
	return taskexec.Observer{
		GroupStarted: func(g taskexec.GroupStartedInfo) {
			fmt.Printf("[Coordinator] Sent to %s: %s\n", printable(g.Category), list(g.Tasks))
		},
		GroupDone: func(g taskexec.GroupDoneInfo) {
			if g.Counts.Done == len(g.Tasks) {
				fmt.Printf("[Coordinator] %s says: %s completed\n", printable(g.Category), list(g.Tasks))
			}
		},
		Goodbye: func(g taskexec.GoodbyeInfo) {
			fmt.Printf("[Coordinator] %s shutdown: %s\n", printable(g.Worker), printable(g.Text))
		},
	}
}

// printable returns text fit for a terminal: a worker may say anything.
func printable(text string) string {
	if quoted := strconv.Quote(text); quoted != `"`+text+`"` {
		return quoted
	}
	return text
}
