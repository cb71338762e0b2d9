package taskexec

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A cluster is the workers of a test and the network between them and its
// coordinators. At the test's end it stops the workers and checks that no
// connection of a coordinator was left open.
type cluster struct {
	t       testing.TB
	network memNetwork
	serving sync.WaitGroup

	mu    sync.Mutex // guards following
	conns []*dialedConn
	trace []string
}

func newCluster(t testing.TB) *cluster {
	c := &cluster{t: t}
	t.Cleanup(func() {
		for _, conn := range c.dialed() {
			if !conn.closed() {
				t.Errorf("the connection to %s was left open", conn.addr)
			}
		}
	})
	return c
}

// dialedConn remembers whether it was closed.
type dialedConn struct {
	net.Conn
	addr string
	once sync.Once
	over chan struct{}
}

func (c *dialedConn) Close() error {
	c.once.Do(func() { close(c.over) })
	return c.Conn.Close()
}

func (c *dialedConn) closed() bool {
	select {
	case <-c.over:
		return true
	default:
		return false
	}
}

// dial fits WithDialer.
func (c *cluster) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := c.network.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	d := &dialedConn{Conn: conn, addr: addr, over: make(chan struct{})}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns = append(c.conns, d)
	return d, nil
}

// dialed is all connections there ever were.
func (c *cluster) dialed() []*dialedConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.conns)
}

// log adds a line to the trace that the test reads.
func (c *cluster) log(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trace = append(c.trace, fmt.Sprintf(format, args...))
}

// traced is the trace so far.
func (c *cluster) traced() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.trace)
}

// worker serves addr with a worker named after it, until the test ends.
func (c *cluster) worker(addr string, handler HandlerFunc, opts ...WorkerOption) *Worker {
	w := NewWorker(handler, append([]WorkerOption{WithName(addr)}, opts...)...)
	ctx, cancel := context.WithCancel(context.Background())
	ln := c.network.listen(addr)
	c.serving.Go(func() { w.Serve(ctx, ln) })
	c.t.Cleanup(func() {
		cancel()
		c.serving.Wait()
	})
	return w
}

// script serves addr with a worker that play plays, for one session. The
// connection is closed when play returns.
func (c *cluster) script(addr string, play func(p *peer)) {
	ln := c.network.listen(addr)
	c.serving.Go(func() {
		defer ln.Close()
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		play(newPeer(c.t, conn))
	})
	c.t.Cleanup(func() {
		ln.Close()
		c.serving.Wait()
	})
}

// coordinator returns one that dials over the cluster's network.
func (c *cluster) coordinator(opts ...CoordinatorOption) *Coordinator {
	c.t.Helper()
	coordinator, err := NewCoordinator(append([]CoordinatorOption{WithDialer(c.dial)}, opts...)...)
	if err != nil {
		c.t.Fatal(err)
	}
	return coordinator
}

// echo is a handler that has nothing to do.
func echo(_ context.Context, task Task) (string, error) { return task.Instruction, nil }

// until is a handler that waits for its context's end.
func until(ctx context.Context, _ Task) (string, error) {
	<-ctx.Done()
	return "", ctx.Err()
}

// theNine is the sample input.
const theNine = "a1 a2 c1 b1 c2 b3 b2 b4 a3"

func mustParse(t testing.TB, text string) []Task {
	t.Helper()
	tasks, err := ParseTasks(text)
	if err != nil {
		t.Fatal(err)
	}
	return tasks
}

// tasksOf makes n tasks of a category: a0 a1 a2 …
func tasksOf(category string, n int) []Task {
	tasks := make([]Task, n)
	for i := range tasks {
		tasks[i] = Task{Category: category, Instruction: fmt.Sprintf("%s%d", category, i)}
	}
	return tasks
}

// outcomes is a report in short: each task's outcome, in input order.
func outcomes(report *Report) string {
	names := make([]string, len(report.Results))
	for i, r := range report.Results {
		names[i] = r.Outcome.String()
	}
	return strings.Join(names, " ")
}

// checkReport checks what holds for every report there is.
func checkReport(t testing.TB, tasks []Task, report *Report, err error) {
	t.Helper()
	if report == nil {
		t.Fatal("no report")
	}
	if len(report.Results) != len(tasks) {
		t.Fatalf("got %d results for %d tasks", len(report.Results), len(tasks))
	}
	var counts Counts
	for i, r := range report.Results {
		counts.add(r.Outcome)
		if r.Index != i || r.Task.Instruction != tasks[i].Instruction {
			t.Errorf("result %d is that of task %d (%q), want %q", i, r.Index, r.Task.Instruction, tasks[i].Instruction)
		}
		if r.Outcome < Done || r.Outcome > Unknown {
			t.Errorf("task %d has the outcome %v", i, r.Outcome)
		}
		var te *TaskError
		switch {
		case r.Outcome == Done && r.Err != nil:
			t.Errorf("task %d is Done with the error %v", i, r.Err)
		case r.Outcome != Done && !errors.As(r.Err, &te):
			t.Errorf("task %d is %v with %v, want a *TaskError", i, r.Outcome, r.Err)
		case r.Outcome != Done && (te.Index != i || te.Outcome != r.Outcome || te.Worker != r.Worker || te.Attempt != r.Attempts || te.Err == nil):
			t.Errorf("task %d has the result %+v with the error %+v", i, r, te)
		}
	}
	if diff := cmp.Diff(counts, report.Counts); diff != "" {
		t.Errorf("counts (-of the results +of the report):\n%s", diff)
	}
	if counts.Done < len(tasks) && err == nil {
		t.Errorf("no error, but %+v", counts)
	}
	var re *RunError
	if err != nil && (!errors.As(err, &re) || re.Counts != counts) {
		t.Errorf("got %#v, want a *RunError with the report's counts", err)
	}
}

func TestShutdownMayComeAtAnyMomentOfAStart(t *testing.T) {
	// Many categories make for a long start.
	var network memNetwork
	opts := []CoordinatorOption{WithDialer(network.dial)}
	var tasks []Task
	for i := range 500 {
		category := fmt.Sprintf("category %d", i)
		opts = append(opts, WithWorkers(category, "gone:1"))
		tasks = append(tasks, Task{Category: category})
	}
	for i := range 20 {
		c, err := NewCoordinator(opts...)
		if err != nil {
			t.Fatal(err)
		}
		var both sync.WaitGroup
		both.Go(func() {
			report, err := c.Run(t.Context(), tasks)
			checkReport(t, tasks, report, err)
		})
		both.Go(func() {
			for range i * 100 {
				runtime.Gosched()
			}
			c.Shutdown(t.Context())
		})
		both.Wait()
	}
}

func TestEveryUnusableWorkerIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:0", echo)
		var options []CoordinatorOption
		options = append(options, WithWorkers("a", "a:0"))
		for i := range 20 {
			options = append(options, WithWorkers("a", fmt.Sprintf("gone:%d", i)))
		}
		tasks := mustParse(t, "a1 a2")
		report, err := cl.coordinator(options...).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if got := outcomes(report); got != "Skipped Skipped" {
			t.Errorf("got %s", got)
		}
		for i := range 20 {
			if addr := fmt.Sprintf("gone:%d:", i); !strings.Contains(err.Error(), addr) {
				t.Errorf("the error does not name %s: %v", addr, err)
			}
		}
	})
}

// welcome greets as the smallest worker there can be.
func (p *peer) welcome() {
	p.t.Helper()
	p.expect("HELLO taskexec/1 …")
	p.send("WELCOME taskexec/1 {}")
}

func TestAWaitingTaskGoesToAnotherWorkerWhenTheOneWokenForItLeaves(t *testing.T) {
	for _, leave := range []struct {
		name string
		play func(p *peer)
	}{
		{"drain", func(p *peer) { p.send("DRAIN") }},
		{"cut", func(p *peer) { p.conn.Close() }},
	} {
		t.Run(leave.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", func(p *peer) {
					p.welcome()
					// The coordinator's PONG finds no reader: its writer is busy
					// when a task comes up.
					p.send("PING 1")
					time.Sleep(5 * time.Second)
					leave.play(p)
					time.Sleep(time.Minute)
				})
				cl.worker("a:2", echo)
				// One task at a time, first to one worker, then to the other.
				tasks := mustParse(t, "a1 a2 a3 a4")
				report, err := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithOrder(ByInput)).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// eventually fails the test if f does not return within a long time, by the
// bubble's clock.
func eventually(t testing.TB, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(time.Hour):
		t.Fatal("still waiting after an hour")
	}
}
