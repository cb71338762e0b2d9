package taskexec

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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
	stops []func()
}

func newCluster(t testing.TB) *cluster {
	c := &cluster{t: t}
	t.Cleanup(func() {
		for _, stop := range c.stops {
			stop()
		}
		c.serving.Wait()
		for _, conn := range c.dialed() {
			if !conn.closed() {
				t.Errorf("the connection to %s was left open", conn.addr)
			}
		}
	})
	return c
}

// dialedConn remembers whether it was closed. When the coordinator reads a
// GOODBYE it is traced, which an observer's call, later, could not order.
type dialedConn struct {
	net.Conn
	cluster *cluster
	addr    string
	once    sync.Once
	over    chan struct{}
}

func (c *dialedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	for line := range strings.Lines(string(p[:n])) {
		if text, ok := strings.CutPrefix(line, "GOODBYE "); ok {
			c.cluster.log("%s", strings.TrimSuffix(text, "\n"))
		}
	}
	return n, err
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
	d := &dialedConn{Conn: conn, cluster: c, addr: addr, over: make(chan struct{})}
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
	c.stops = append(c.stops, cancel)
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
	c.stops = append(c.stops, func() { ln.Close() })
}

// coordinator returns one that dials over the cluster's network.
func (c *cluster) coordinator(opts ...CoordinatorOption) *Coordinator {
	c.t.Helper()
	coordinator, err := NewCoordinator(append([]CoordinatorOption{WithDialer(c.dial), WithWorkerWait(0)}, opts...)...)
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

// welcome greets as the smallest worker there can be.
func (p *peer) welcome() {
	p.t.Helper()
	p.expect("HELLO taskexec/1 …")
	p.send("WELCOME taskexec/1 {}")
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
		case r.Outcome != Done && strings.Contains(te.Error(), ": taskexec: "):
			t.Errorf("task %d has the error %q, which names the package inside", i, te)
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
					time.Sleep(time.Second / 2) // so that its session is asleep too
					// The coordinator's PONG finds no reader: its writer is busy
					// when a task comes up.
					p.send("PING 1")
					time.Sleep(3 * time.Second)
					leave.play(p)
					time.Sleep(time.Minute)
				})
				cl.worker("a:2", func(context.Context, Task) (string, error) {
					time.Sleep(time.Millisecond) // so that its session is asleep when the next task comes up
					return "", nil
				})
				// The tasks come, one at a time, when the first writer is busy.
				slow := func(ctx context.Context, network, addr string) (net.Conn, error) {
					if addr == "a:2" {
						time.Sleep(time.Second)
					}
					return cl.dial(ctx, network, addr)
				}
				cl.worker("b:1", func(context.Context, Task) (string, error) {
					time.Sleep(time.Second) // and so is the other
					return "", nil
				})
				tasks := mustParse(t, "b1 a1 a2 a3 a4")
				report, err := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithWorkers("b", "b:1"), WithOrder(ByInput), WithDialer(slow)).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				// A heartbeat would wake the other after 5s, by chance.
				if err != nil || report.Elapsed < 3*time.Second || report.Elapsed > 4*time.Second {
					t.Errorf("after %v: %v", report.Elapsed, err)
				}
			})
		})
	}
}

func TestNoTaskIsSentBeforeTheStageBeforeItIsSettled(t *testing.T) {
	for _, shutdown := range []bool{false, true} {
		t.Run(fmt.Sprintf("shutdown=%v", shutdown), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				handler := func(_ context.Context, task Task) (string, error) {
					cl.log("start %s", task.Instruction)
					time.Sleep(time.Second)
					cl.log("end %s", task.Instruction)
					return strings.ToUpper(task.Instruction), nil
				}
				for _, category := range []string{"a", "b", "c"} {
					cl.worker(category+":1", handler, WithCategories(category))
				}
				options := []CoordinatorOption{
					WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithWorkers("c", "c:1"),
				}
				if shutdown {
					options = append(options, WithWorkerShutdown())
				}
				tasks := mustParse(t, theNine)
				report, err := cl.coordinator(options...).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if err != nil {
					t.Fatal(err)
				}
				var want []string
				for _, g := range Partition(tasks) {
					for _, task := range g.Tasks {
						want = append(want, "start "+task.Instruction, "end "+task.Instruction)
					}
					if shutdown {
						want = append(want, "Goodbye from "+g.Category+":1")
					}
				}
				if diff := cmp.Diff(want, cl.traced()); diff != "" {
					t.Errorf("what happened (-want +got):\n%s", diff)
				}
				for i, r := range report.Results {
					want := Result{
						Index: i, Task: tasks[i], Outcome: Done, Output: strings.ToUpper(tasks[i].Instruction), Worker: tasks[i].Category + ":1",
						Attempts: 1, Queued: r.Queued, Executed: time.Second,
					}
					if diff := cmp.Diff(want, r); diff != "" {
						t.Errorf("result (-want +got):\n%s", diff)
					}
				}
				if report.Elapsed != 9*time.Second {
					t.Errorf("the run took %v, want 9s", report.Elapsed)
				}
			})
		})
	}
}

// The same over real connections, whose bytes come in pieces of their own.
func TestRunOverTCP(t *testing.T) {
	handler := HandlerFunc(func(ctx context.Context, task Task) (string, error) {
		if strings.HasSuffix(task.Instruction, "7") {
			return "", errors.New("seven")
		}
		return task.Instruction + "\r\n\\", nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	defer serving.Wait()
	defer cancel()
	var addrs []string
	for range 2 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, ln.Addr().String())
		serving.Go(func() { NewWorker(handler, WithSlots(2)).Serve(ctx, ln) })
	}
	c, err := NewCoordinator(WithWorkers("a", addrs...), WithWorkers("b", addrs[0]))
	if err != nil {
		t.Fatal(err)
	}
	tasks := append(tasksOf("b", 500), tasksOf("a", 1000)...)
	report, err := c.Run(ctx, tasks)
	checkReport(t, tasks, report, err)
	if want := (Counts{Done: 900, Failed: 100, Skipped: 500}); report.Counts != want {
		t.Errorf("got %+v, want %+v: %v", report.Counts, want, err)
	}
	for _, r := range report.Results[500:] {
		if want := r.Task.Instruction + "\r\n\\"; r.Outcome == Done && r.Output != want {
			t.Fatalf("got output %q, want %q", r.Output, want)
		}
	}
}

func TestAnEmptyRunSucceedsWithoutDialing(t *testing.T) {
	for _, tasks := range [][]Task{nil, {}, mustParse(t, " \n\t ")} {
		c, err := NewCoordinator(WithWorkers("a", "a:1"), WithWorkerShutdown(), WithDialer(func(context.Context, string, string) (net.Conn, error) {
			t.Error("dialed")
			return nil, errors.New("refused")
		}))
		if err != nil {
			t.Fatal(err)
		}
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err != nil {
			t.Error(err)
		}
		if err := c.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if report, err := c.Run(t.Context(), tasks); err != nil || report == nil {
			t.Errorf("after Shutdown: %v, %v", report, err)
		}
	}
}

func TestOneSlotStartsTasksInInputOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", func(_ context.Context, task Task) (string, error) {
			cl.log("%s", task.Instruction)
			return "", nil
		})
		tasks := tasksOf("a", 1000)
		report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		var want []string
		for _, task := range tasks {
			want = append(want, task.Instruction)
		}
		if diff := cmp.Diff(want, cl.traced()); diff != "" || err != nil {
			t.Errorf("%v; order (-want +got):\n%s", err, diff)
		}
	})
}

func TestByInputRunsEachTaskAsAStageInInputOrder(t *testing.T) {
	for _, shutdown := range []bool{false, true} {
		t.Run(fmt.Sprintf("shutdown=%v", shutdown), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				handler := func(_ context.Context, task Task) (string, error) {
					cl.log("start %s", task.Instruction)
					time.Sleep(time.Second)
					cl.log("end %s", task.Instruction)
					return "", nil
				}
				cl.worker("a:1", handler)
				cl.worker("b:1", handler, WithSlots(3))
				cl.worker("c:1", handler)
				options := []CoordinatorOption{
					WithOrder(ByInput), WithWorkers("c", "c:1"), WithWorkers("b", "b:1"), WithWorkers("a", "a:1"),
				}
				if shutdown {
					options = append(options, WithWorkerShutdown())
				}
				tasks := mustParse(t, theNine)
				report, err := cl.coordinator(options...).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				goodbyes := map[string]string{"a3": "a:1", "b4": "b:1", "c2": "c:1"}
				var want []string
				for _, task := range tasks {
					want = append(want, "start "+task.Instruction, "end "+task.Instruction)
					if worker := goodbyes[task.Instruction]; shutdown && worker != "" {
						want = append(want, "Goodbye from "+worker)
					}
				}
				if diff := cmp.Diff(want, cl.traced()); diff != "" || err != nil {
					t.Errorf("%v; what happened (-want +got):\n%s", err, diff)
				}
			})
		})
	}
}

func TestSequenceSaysWhichCategoriesComeFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("w:1", func(_ context.Context, task Task) (string, error) {
			cl.log("%s", task.Instruction)
			return "", nil
		})
		c := cl.coordinator(WithSequence("c", "z", "b"), WithWorkers("a", "w:1"), WithWorkers("b", "w:1"), WithWorkers("c", "w:1"), WithWorkers("d", "w:1"))
		tasks := mustParse(t, "d1 a1 b1 c1 a2 c2")
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if got, want := strings.Join(cl.traced(), " "), "c1 c2 b1 a1 a2 d1"; got != want || err != nil {
			t.Errorf("got %s and %v, want %s", got, err, want)
		}
	})
}

func TestWorkersOfACategoryShareItsTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		started := make(map[string]int)
		var mu sync.Mutex
		for _, w := range []struct {
			addr  string
			slots int
		}{{"a:1", 1}, {"a:2", 1}, {"a:3", 2}} {
			cl.worker(w.addr, func(context.Context, Task) (string, error) {
				mu.Lock()
				started[w.addr]++
				mu.Unlock()
				time.Sleep(time.Second)
				return "", nil
			}, WithSlots(w.slots))
		}
		// Fewer tasks than a window holds: the first worker that comes must not
		// take them all.
		tasks := tasksOf("a", 40)
		report, err := cl.coordinator(WithWorkers("a", "a:1", "a:2", "a:3")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if diff := cmp.Diff(map[string]int{"a:1": 10, "a:2": 10, "a:3": 20}, started); diff != "" || err != nil {
			t.Errorf("%v; tasks started (-want +got):\n%s", err, diff)
		}
		if report.Elapsed != 10*time.Second {
			t.Errorf("40 tasks of 1s took %v on 4 slots, want 10s", report.Elapsed)
		}
	})
}

func TestAWindowIsNeverExceeded(t *testing.T) {
	for _, tt := range []struct {
		name    string // also the reason
		welcome string
		option  int // of WithWindow; 0: none
		size    int // of each instruction
		want    int // in flight at most, and at first
	}{
		{"the default is what the worker grants", `{"window":4096}`, 0, 2, 200},
		{"a small window", `{"window":4096}`, 3, 2, 3},
		{"a larger window", `{"window":4096}`, 100, 2, 100},
		{"the worker grants less", `{"window":5}`, 100, 2, 5},
		{"no window in the greeting means as many as slots", `{"slots":7}`, 100, 2, 7},
		{"an empty greeting means one", `{}`, 100, 2, 1},
		{"never fewer than slots", `{"slots":8,"window":9}`, 2, 2, 8},
		{"slots beyond the window do not count", `{"slots":8,"window":4}`, 100, 2, 4},
		{"bytes in flight are bounded", `{"window":4096}`, 100, 100_000, 10},
		{"one task is always allowed", `{"window":4096}`, 100, 1<<20 - 100, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				n := 200
				if tt.size > 1000 {
					n = 20
				}
				cl.script("a:1", func(p *peer) {
					p.expect("HELLO …")
					p.send("WELCOME taskexec/1 " + tt.welcome)
					// Read whatever comes, and answer only when nothing does.
					runs := make(chan string)
					go func() {
						defer close(runs)
						for {
							line, err := p.in.ReadString('\n')
							if err != nil {
								return
							}
							runs <- strings.Fields(line)[1]
						}
					}()
					var held []string
					first := true
					for done := 0; done < n; {
						select {
						case task := <-runs:
							held = append(held, task)
							continue
						case <-time.After(time.Second):
						}
						if len(held) > tt.want || first && len(held) != tt.want {
							t.Errorf("%d in flight, want %d", len(held), tt.want)
						}
						first = false
						if len(held) == 0 {
							t.Error("nothing in flight")
							return
						}
						for _, task := range held {
							p.send("DONE " + task + " 0")
							done++
						}
						held = nil
					}
					for range runs {
					}
				})
				tasks := make([]Task, n)
				for i := range tasks {
					tasks[i] = Task{Category: "a", Instruction: strings.Repeat("x", tt.size)}
				}
				options := []CoordinatorOption{WithWorkers("a", "a:1"), withLeastWindow(windowTasks)}
				if tt.option > 0 {
					options = append(options, WithWindow(tt.option))
				}
				report, err := cl.coordinator(options...).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// The document counts the bytes of a line, its newline included.
func TestTheBytesOfAWindowAreUsedToTheLast(t *testing.T) {
	line := func(number, size int) Task {
		return Task{Category: "a", Instruction: strings.Repeat("x", size-len(fmt.Sprintf("RUN %d 1 0 \n", number)))}
	}
	for _, over := range []int{0, 1} {
		synctest.Test(t, func(t *testing.T) {
			cl := newCluster(t)
			var c *Coordinator
			cl.script("a:1", func(p *peer) {
				p.expect("HELLO …")
				p.send(`WELCOME taskexec/1 {"slots":2}`)
				p.expect("RUN 0 …")
				if over == 0 {
					p.expect("RUN 1 …")
				} else {
					synctest.Wait()
					if got := c.Snapshot()[0].Categories[0].InFlight; got != 1 {
						t.Errorf("%d tasks are in flight", got)
					}
				}
				p.send("DONE 0 0")
				if over > 0 {
					p.expect("RUN 1 …")
				}
				p.send("DONE 1 0")
				p.expectEnd()
			})
			tasks := []Task{line(0, 600<<10), line(1, 424<<10+over)}
			c = cl.coordinator(WithWorkers("a", "a:1"))
			report, err := c.Run(t.Context(), tasks)
			checkReport(t, tasks, report, err)
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestATaskThatFailsEndsItsStageAndSkipsTheLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		boom := errors.New("boom")
		cl.worker("w:1", func(_ context.Context, task Task) (string, error) {
			cl.log("%s", task.Instruction)
			if task.Instruction == "b1" {
				return "ignored", boom
			}
			return "", nil
		})
		tasks := mustParse(t, theNine)
		c := cl.coordinator(WithWorkers("a", "w:1"), WithWorkers("b", "w:1"), WithWorkers("c", "w:1"))
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if got, want := strings.Join(cl.traced(), " "), "a1 a2 a3 b1 b3 b2 b4"; got != want {
			t.Errorf("executed %s, want %s", got, want)
		}
		if got, want := outcomes(report), "Done Done Skipped Failed Skipped Done Done Done Done"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		var remote *RemoteError
		if r := report.Results[3]; !errors.As(r.Err, &remote) || *remote != (RemoteError{Kind: "error", Text: "boom"}) || r.Output != "" || r.Worker != "w:1" || r.Attempts != 1 {
			t.Errorf("got %+v with %v", r, r.Err)
		}
		// A task that was skipped says which one is to blame.
		if want := "task 2 (c1) Skipped: an earlier stage failed: task 3 (b1) Failed on worker w:1, attempt 1: boom"; report.Results[2].Err.Error() != want {
			t.Errorf("got  %v\nwant %s", report.Results[2].Err, want)
		}
		for _, i := range []int{2, 4} {
			if r := report.Results[i]; r.Attempts != 0 || r.Worker != "" || !errors.As(r.Err, &remote) {
				t.Errorf("got %+v with %v", r, r.Err)
			}
		}
		var te *TaskError
		if !errors.As(err, &te) || !errors.As(err, &remote) {
			t.Errorf("got %v, want it to wrap a *TaskError and a *RemoteError", err)
		} else if te.Index != 3 { // and not 2, which comes first, and was skipped for it
			t.Errorf("got the error of task %d, want that of task 3, which failed", te.Index)
		}
		if !strings.HasPrefix(err.Error(), "taskexec: 6 of 9 tasks Done: ") || !strings.HasSuffix(err.Error(), ": boom") {
			t.Errorf("got %v", err)
		}
	})
}

func TestWhatAWorkerReportsDecidesTheOutcome(t *testing.T) {
	for _, tt := range []struct {
		reason string
		report string
		want   Outcome
		err    string // of the RemoteError
	}{
		{"done", "DONE 0 5 out", Done, ""},
		{"done without output", "DONE 0 5", Done, ""},
		{"the handler's error", "FAIL 0 error 0 no such file", Failed, "no such file"},
		{"its final error", "FAIL 0 final 0 no", Failed, "no"},
		{"a panic", `FAIL 0 panic 0 x\nstack`, Failed, "panic: x"},
		{"a panic that begins with an empty line", `FAIL 0 panic 0 \nx\nstack`, Failed, "panic: x"},
		{"a timeout", "FAIL 0 timeout 0 late", Failed, "timeout: late"},
		{"stuck", "FAIL 0 stuck 0 still running", Failed, "stuck: still running"},
		{"an output too long to send", "FAIL 0 output 0 2000000 bytes", Failed, "output: 2000000 bytes"},
		{"canceled by the worker", "FAIL 0 canceled 0 bye", Canceled, "canceled: bye"},
		{"hostile text is escaped", "FAIL 0 error 0 \x1b[2J\u202e\x00", Failed, `\x1b[2J\u202e\x00`},
		{"a failure without words", "FAIL 0 error 0", Failed, ""},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", func(p *peer) {
					p.welcome()
					p.expect("RUN 0 1 0 a1")
					time.Sleep(5 * time.Microsecond) // as its report says
					p.send(tt.report)
					p.expectEnd()
				})
				tasks := mustParse(t, "a1")
				report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				r := report.Results[0]
				if r.Outcome != tt.want || r.Worker != "a:1" || r.Attempts != 1 || r.Losses != 0 {
					t.Errorf("got %+v, want %v", r, tt.want)
				}
				if tt.want == Done {
					if r.Executed != 5*time.Microsecond || err != nil {
						t.Errorf("got %+v and %v", r, err)
					}
					return
				}
				var remote *RemoteError
				if !errors.As(err, &remote) || remote.Error() != tt.err {
					t.Errorf("got %v, want %q", err, tt.err)
				}
			})
		})
	}
}

func TestOutcomesAreNamedInMessages(t *testing.T) {
	for o, want := range map[Outcome]string{Done: "Done", Failed: "Failed", Canceled: "Canceled", Skipped: "Skipped", Unknown: "Unknown",
		-1: "Outcome(-1)", 0: "Outcome(0)", 6: "Outcome(6)"} {
		if got := o.String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestATextOfAWorkerIsCutAndEscaped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"worker":"a worker \u202e"}`)
			p.next()
			p.send("FAIL 0 error 0 " + strings.Repeat("\x1b", 500_000))
			p.expectEnd()
		})
		tasks := []Task{{Category: "a", Instruction: "line 1\nline 2\x1b"}}
		report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if text := err.Error(); strings.ContainsAny(text, "\x1b\n\u202e") || len(text) > 5*maxFailText {
			t.Errorf("got %d bytes: %.300q", len(text), text)
		}
		if want := `taskexec: 0 of 1 tasks Done: task 0 ("line 1\nline 2\x1b") Failed on worker "a worker \u202e", attempt 1: `; !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %.200s\nwant %s", err, want)
		}
		var remote *RemoteError
		if !errors.As(err, &remote) || len(remote.Text) > maxFailText {
			t.Errorf("a text of %d bytes is kept, want at most %d", len(remote.Text), maxFailText)
		}
	})
}

func TestABadRunIsRefusedBeforeAnythingIsSent(t *testing.T) {
	for _, tt := range []struct {
		reason   string
		tasks    []Task
		options  []CoordinatorOption
		outcomes string
		want     []string // in the error
		is       error
	}{
		{"no category, by its index", []Task{{Instruction: "a1"}, {Instruction: ""}, {Instruction: ""}}, nil, "Skipped Failed Skipped", []string{"task 1", "category"}, nil},
		{"a control character", []Task{{Category: "a\n", Instruction: "x"}}, nil, "Failed", []string{"task 0 (x) Failed", `"a\n"`}, nil},
		{"a category too long", []Task{{Category: strings.Repeat("a", 256), Instruction: "x"}}, nil, "Failed", []string{"task 0 (x) Failed", "255"}, nil},
		{"invalid UTF-8", []Task{{Category: "\xff", Instruction: "x"}}, nil, "Failed", []string{`"\xff"`}, nil},
		{"no worker is listed", []Task{{Instruction: "a1"}, {Instruction: "b1"}, {Instruction: "z1"}}, nil, "Skipped Skipped Skipped", []string{`category "z"`, "task 2 (z1)", "WithWorkers"}, ErrNoWorker},
		{"no worker is listed for two categories: the first task is named", []Task{{Instruction: "a1"}, {Instruction: "z1"}, {Instruction: "y1"}}, nil, "Skipped Skipped Skipped", []string{`category "z"`, "task 1 (z1)"}, ErrNoWorker},
		{"no worker is listed, by input", []Task{{Instruction: "z1"}}, []CoordinatorOption{WithOrder(ByInput)}, "Skipped", []string{`category "z"`}, ErrNoWorker},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			options := append([]CoordinatorOption{
				WithWorkers("a", "a:1"), WithWorkers("b", "b:1"),
				WithDialer(func(context.Context, string, string) (net.Conn, error) {
					t.Error("dialed")
					return nil, errors.New("refused")
				}),
			}, tt.options...)
			c, err := NewCoordinator(options...)
			if err != nil {
				t.Fatal(err)
			}
			given := slices.Clone(tt.tasks)
			report, err := c.Run(t.Context(), tt.tasks)
			checkReport(t, tt.tasks, report, err)
			if got := outcomes(report); got != tt.outcomes {
				t.Errorf("got %s, want %s", got, tt.outcomes)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v\ndoes not say %q", err, want)
				}
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%v is not %v", err, tt.is)
			}
			for i, r := range report.Results {
				if r.Outcome == Failed && r.Task != given[i] {
					t.Errorf("the result has the task %+v, want it as it was given: %+v", r.Task, given[i])
				}
			}
			if diff := cmp.Diff(given, tt.tasks); diff != "" {
				t.Errorf("Run changed the tasks (-given +now):\n%s", diff)
			}
		})
	}
}

func TestAWorkerThatGreetsWrongIsNamedBeforeATaskIsSent(t *testing.T) {
	greeting := func(lines ...string) func(p *peer) {
		return func(p *peer) {
			p.expect("HELLO …")
			p.send(lines...)
			io.Copy(io.Discard, p.in)
		}
	}
	for _, tt := range []struct {
		reason string
		play   func(p *peer)
		code   string // of the *ProtocolError, if there is one
		want   string
		after  time.Duration
	}{
		{"silence", func(p *peer) { p.expect("HELLO …"); p.expect("ERROR timeout …"); p.expectEnd() }, "timeout", "no WELCOME within 10s", 10 * time.Second},
		{"it does not even read", func(p *peer) { time.Sleep(time.Hour) }, "timeout", "no WELCOME within 10s", 11 * time.Second},
		{"garbage", greeting("\x00\x01\xfe"), "protocol", "does not speak taskexec/1", 0},
		{"HTTP", greeting("HTTP/1.1 400 Bad Request", ""), "protocol", "does not speak taskexec/1", 0},
		{"a request of HTTP", greeting("GET / HTTP/1.1", ""), "protocol", "does not speak taskexec/1", 0},
		{"version 2", greeting("WELCOME taskexec/2 {}"), "version", "taskexec/2", 0},
		{"another verb", greeting("DONE 0 0"), "protocol", "expects WELCOME first, not DONE", 0},
		{"a malformed object", greeting("WELCOME taskexec/1 {"), "greeting", "WELCOME", 0},
		{"a number out of range", greeting(`WELCOME taskexec/1 {"slots":-1}`), "greeting", "slots -1", 0},
		{"a number that overflows", greeting(`WELCOME taskexec/1 {"slots":99999999999999999999}`), "greeting", "slots", 0},
		{"a greeting too long", greeting("WELCOME taskexec/1 {" + strings.Repeat(" ", 5000) + "}"), "line", "4096", 0},
		{"another category", greeting(`WELCOME taskexec/1 {"worker":"w9","categories":["x","y"]}`), "category", `worker w9 of category a`, 0},
		{"ERROR", greeting("ERROR busy come again"), "busy", "peer reports (busy): come again", 0},
		{"it closes", func(p *peer) { p.expect("HELLO …") }, "", "it closed the connection instead of greeting", 0},
		{"it closes at once", func(p *peer) {}, "", "", 0},
		{"half a line", func(p *peer) { p.expect("HELLO …"); io.WriteString(p.conn, "WELC") }, "", "closed inside a line", 0},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("bad:1", tt.play)
				cl.worker("good:1", func(_ context.Context, task Task) (string, error) {
					t.Errorf("%s was sent", task.Instruction)
					return "", nil
				})
				tasks := mustParse(t, "a1 b1")
				c := cl.coordinator(WithWorkers("a", "good:1", "bad:1"), WithWorkers("b", "good:1"), WithWorkerShutdown())
				start := time.Now()
				report, err := c.Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if got := outcomes(report); got != "Skipped Skipped" {
					t.Errorf("got %s", got)
				}
				if took := time.Since(start); tt.after > 0 && took != tt.after || took > 12*time.Second {
					t.Errorf("it took %v, want %v", took, tt.after)
				}
				var we *WorkerError
				if !errors.As(err, &we) || we.Addr != "bad:1" || we.Category != "a" {
					t.Fatalf("got %v, want a *WorkerError", err)
				}
				if !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "bad:1") {
					t.Errorf("%v\ndoes not say %q", err, tt.want)
				}
				var pe *ProtocolError
				if errors.As(err, &pe) != (tt.code != "") || pe != nil && pe.Code != tt.code {
					t.Errorf("got %#v, want the code %q", pe, tt.code)
				}
			})
		})
	}
}

func TestAWorkerThatIsNotAwaitedAnyMoreIsNotNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("bad:1", func(p *peer) {
			p.expect("HELLO …")
			time.Sleep(time.Second)
			p.send(`WELCOME taskexec/1 {"categories":["x"]}`)
			io.Copy(io.Discard, p.in)
		})
		cl.script("slow:1", func(p *peer) { io.Copy(io.Discard, p.in) })
		tasks := mustParse(t, "a1")
		report, err := cl.coordinator(WithWorkers("a", "slow:1", "bad:1")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err == nil || !strings.Contains(err.Error(), "bad:1") || strings.Contains(err.Error(), "slow:1") || report.Elapsed != time.Second {
			t.Errorf("after %v: got %v, want it to name bad:1 only", report.Elapsed, err)
		}
	})
}

func TestADialThatHangsEndsWithTheHandshakeTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := NewCoordinator(WithWorkers("a", "a:1"), WithHandshakeTimeout(3*time.Second), WithWorkerWait(0),
			WithDialer(func(ctx context.Context, _, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}))
		if err != nil {
			t.Fatal(err)
		}
		tasks := mustParse(t, "a1")
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if report.Elapsed != 3*time.Second || !strings.Contains(err.Error(), "worker of category a at a:1: no connection within 3s") {
			t.Errorf("after %v: %v", report.Elapsed, err)
		}
	})
}

func TestTheDialerIsGivenNetworkAndAddress(t *testing.T) {
	var mu sync.Mutex
	var got []string
	c, err := NewCoordinator(WithWorkers("a", "unix:/run/a.sock", "[::1]:80", "host:name"), WithWorkerWait(0),
		WithDialer(func(_ context.Context, network, addr string) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, network+" "+addr)
			return nil, errors.New("refused")
		}))
	if err != nil {
		t.Fatal(err)
	}
	c.Run(t.Context(), mustParse(t, "a1"))
	slices.Sort(got)
	if diff := cmp.Diff([]string{"tcp [::1]:80", "tcp host:name", "unix /run/a.sock"}, got); diff != "" {
		t.Errorf("dialed (-want +got):\n%s", diff)
	}
}

func TestAnInstructionThatFitsInNoLineFailsUnsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"max_line":4096,"worker":"small"}`)
			p.expect("RUN 0 1 0 short")
			p.send("DONE 0 0")
			p.expect("RUN 2 1 0 xxx…")
			p.send("DONE 2 0")
			p.expectEnd()
		})
		tasks := []Task{
			{Category: "a", Instruction: "short"},
			{Category: "a", Instruction: strings.Repeat("x", 4097-len("RUN 1 1 0 \n"))},
			{Category: "a", Instruction: strings.Repeat("x", 4096-len("RUN 2 1 0 \n"))},
			{Category: "a", Instruction: strings.Repeat("\n", 2100)}, // it is the encoded line that counts
			{Category: "a", Instruction: strings.Repeat("y", 2<<20)},
		}
		report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if got := outcomes(report); got != "Done Failed Done Failed Failed" {
			t.Errorf("got %s", got)
		}
		for _, i := range []int{1, 3, 4} {
			if r := report.Results[i]; r.Attempts != 0 || !strings.Contains(r.Err.Error(), "worker small, which takes 4096 bytes") || len(r.Err.Error()) > 400 {
				t.Errorf("got %+v with %v", r.Attempts, r.Err)
			}
		}
	})
}

// Its outcome is that of the attempt before.
func TestATaskThatWasSentMayNotFitInALineOfTheNextWorker(t *testing.T) {
	for name, tt := range map[string]struct {
		says string // the first worker, of the task
		want string
	}{
		"lost":   {"", "Unknown on worker a:1, attempt 1: it may have been executed, and is not sent again: an instruction of 5000 bytes"},
		"failed": {"FAIL 0 error 0 no good", "Failed on worker a:1, attempt 1: no good (and not tried again: an instruction of 5000 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.scripts("a:1", func(n int, p *peer) {
					p.expect("HELLO …")
					if n == 0 {
						p.send("WELCOME taskexec/1 {}")
						p.expect("RUN 0 1 0 …")
						if tt.says != "" {
							p.send(tt.says)
						}
						return
					}
					p.send(`WELCOME taskexec/1 {"max_line":4096,"worker":"small"}`)
					p.expectEnd()
				})
				tasks := []Task{{Category: "a", Instruction: strings.Repeat("x", 5000)}}
				report, err := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute),
					WithRetry(Retry{Attempts: 2, FirstDelay: time.Hour})).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				r := report.Results[0]
				if !strings.Contains(r.Err.Error(), tt.want) {
					t.Errorf("got %v", r.Err)
				}
				if r.Attempts != 1 || r.Retries != 0 || report.Troubles.Retries != 0 {
					t.Errorf("got %d attempts, %d retries and %+v", r.Attempts, r.Retries, report.Troubles)
				}
			})
		})
	}
}

func TestStopSoonSendsNothingAfterAnInstructionThatFitsInNoLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", func(_ context.Context, task Task) (string, error) {
			t.Errorf("%.10s is executed", task.Instruction)
			return "", nil
		})
		tasks := []Task{{Category: "a", Instruction: strings.Repeat("x", 2<<20)}, {Category: "a", Instruction: "a2"}}
		report, err := cl.coordinator(WithWorkers("a", "a:1"), WithOnFailure(StopSoon)).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if got := outcomes(report); got != "Failed Skipped" {
			t.Errorf("got %s", got)
		}
	})
}

func TestAReportThatNobodyWaitsForEndsTheSession(t *testing.T) {
	for _, tt := range []struct {
		reason string
		report []string
		code   string
		text   string
		losses int // of the first task
	}{
		{"never sent", []string{"DONE 99 0"}, "task", "DONE for task 99", 1},
		{"twice", []string{"DONE 0 0 first", "DONE 0 0 second"}, "task", "DONE for task 0", 0},
		{"twice, in a different way", []string{"FAIL 1 error 0", "DONE 1 0 second"}, "task", "DONE for task 1", 1},
		{"returned unasked", []string{"RETURN 0"}, "state", "may not send RETURN", 1},
		{"an unknown verb", []string{"FINISHED 0"}, "syntax", "unknown verb", 1},
		{"an unknown kind", []string{"FAIL 0 tired 0 zzz"}, "syntax", "unknown kind", 1},
		{"a number that overflows", []string{"DONE 99999999999999999999 0"}, "syntax", "number", 1},
		{"a verb of the other side", []string{"RUN 0 1 0 x"}, "state", "RUN", 1},
		{"a second greeting", []string{"WELCOME taskexec/1 {}"}, "state", "WELCOME", 1},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", func(p *peer) {
					p.expect("HELLO …")
					p.send(`WELCOME taskexec/1 {"slots":2,"worker":"liar"}`)
					p.expect("RUN 0 1 …", "RUN 1 1 …")
					p.send(tt.report...)
					line := p.next()
					for strings.HasPrefix(line, "RECALL ") { // the writer may have been on its way
						line = p.next()
					}
					if !strings.HasPrefix(line, "ERROR "+tt.code+" ") {
						t.Errorf("got line %q, want ERROR %s", line, tt.code)
					}
					p.expectEnd()
				})
				tasks := mustParse(t, "a0 a1")
				c := cl.coordinator(WithWorkers("a", "a:1"))
				report, err := c.Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if !errors.Is(err, ErrNoWorker) || !strings.Contains(err.Error(), "liar") || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("got %v, want it to name the worker and say %q", err, tt.text)
				}
				if got := report.Results[0].Losses; got != tt.losses {
					t.Errorf("task 0 has %d losses, want %d", got, tt.losses)
				}
			})
		})
	}
}

// splitConn is a connection whose halves end apart, as those of TCP do: of one pipe
// it reads, of the other it writes.
type splitConn struct {
	net.Conn
	out net.Conn
}

func (c splitConn) Write(b []byte) (int, error)        { return c.out.Write(b) }
func (c splitConn) CloseWrite() error                  { return c.out.Close() }
func (c splitConn) Close() error                       { return errors.Join(c.out.Close(), c.Conn.Close()) }
func (c splitConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }
func (c splitConn) SetDeadline(t time.Time) error {
	return errors.Join(c.out.SetWriteDeadline(t), c.Conn.SetReadDeadline(t))
}

// A worker that has ended its half of the connection, as one does that writes all it
// has to say and then listens, is still told what was wrong with it.
func TestAWorkerThatHasEndedItsHalfIsToldItsFault(t *testing.T) {
	for _, tt := range []struct {
		reason string
		play   func(p *peer)
		want   string
	}{
		{"no greeting", func(p *peer) { p.send("DONE 0 0") }, "ERROR protocol …"},
		{"a bad greeting", func(p *peer) { p.send("WELCOME taskexec/1 []") }, "ERROR greeting …"},
		{"a bad report", func(p *peer) {
			p.send("WELCOME taskexec/1 {}")
			p.expect("RUN 0 1 0 a0")
			p.send("DONE 0")
		}, "ERROR syntax …"},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in, theirOut := net.Pipe()
				out, theirIn := net.Pipe()
				played := make(chan struct{})
				go func() {
					defer close(played)
					p := newPeer(t, splitConn{theirIn, theirOut})
					p.expect("HELLO …")
					tt.play(p)
					theirOut.Close()
					time.Sleep(lastWordsTimeout / 2) // a slow reader is not a dead one
					p.expect(tt.want)
					p.expectEnd()
				}()
				c := newTestCoordinator(t, WithWorkers("a", "a:1"), WithWorkerWait(0), WithAtMostOnce(),
					WithDialer(func(context.Context, string, string) (net.Conn, error) { return splitConn{in, out}, nil }))
				tasks := tasksOf("a", 1)
				report, err := c.Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				<-played
				if err == nil {
					t.Error("the run succeeded")
				}
			})
		})
	}
}

func TestATaskIsSentToAnotherWorkerWhenItsSessionEnds(t *testing.T) {
	ending := func(lines ...string) func(p *peer, held []string) {
		return func(p *peer, _ []string) {
			p.send(lines...)
			io.Copy(io.Discard, p.in)
		}
	}
	for _, tt := range []struct {
		reason string
		leave  func(p *peer, held []string)
		losses int
	}{
		{"cut", func(p *peer, _ []string) { p.conn.Close() }, 1},
		{"cut inside a line", func(p *peer, held []string) { io.WriteString(p.conn, "DONE "+held[0]+" 0"); p.conn.Close() }, 1},
		{"its own ERROR", ending("ERROR closing bye"), 1},
		{"a fault", ending("DONE 77 0"), 1},
		{"a goodbye while tasks were on their way", ending("GOODBYE"), 0},
		{"drained", func(p *peer, held []string) {
			p.send("DRAIN", "RETURN "+held[1], "RETURN "+held[0], "RETURN "+held[2], "GOODBYE")
			io.Copy(io.Discard, p.in)
		}, 0},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				next := func(p *peer) string {
					f := strings.Fields(p.next() + " ? ? ?")
					return f[1]
				}
				var held []string // by the worker that leaves
				cl.script("leaves:1", func(p *peer) {
					p.expect("HELLO …")
					p.send(`WELCOME taskexec/1 {"slots":3}`)
					held = []string{next(p), next(p), next(p)}
					p.send("DONE " + held[0] + " 0 early")
					held = append(held[1:], next(p))
					time.Sleep(time.Second)
					tt.leave(p, held)
				})
				var sent []string // to the other, after its first
				cl.script("stays:1", func(p *peer) {
					p.welcome()
					task := next(p)
					time.Sleep(2 * time.Second)
					p.send("DONE " + task + " 0 live")
					for range 4 {
						task := next(p)
						sent = append(sent, task)
						p.send("DONE " + task + " 0 live")
					}
					p.expectEnd()
				})
				tasks := tasksOf("a", 6)
				report, err := cl.coordinator(WithWorkers("a", "leaves:1", "stays:1")).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if err != nil {
					t.Fatal(err)
				}
				for i, r := range report.Results {
					attempts, losses := 1, 0
					if slices.Contains(held, strconv.Itoa(i)) {
						attempts, losses = 2, tt.losses
					}
					if r.Attempts != attempts || r.Losses != losses {
						t.Errorf("task %d has %d attempts and %d losses, want %d and %d", i, r.Attempts, r.Losses, attempts, losses)
					}
					if r.Output == "live" && r.Worker != "stays:1" || attempts == 2 && r.Output != "live" {
						t.Errorf("got %+v", r)
					}
				}
				// What came back is in its place again before what waits.
				if len(sent) != 4 || !slices.IsSorted(sent) {
					t.Errorf("the one that stays was then sent %v, want 4 in order", sent)
				}
			})
		})
	}
}

func TestTheLastWorkerLostEndsTheRunAndNamesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"worker":"wa","slots":2}`)
			p.expect("RUN 0 1 0 a0", "RUN 1 1 0 a1")
			p.send("DONE 0 0")
			p.expect("RUN 2 1 0 a2")
		})
		cl.worker("b:1", echo)
		tasks := mustParse(t, "a0 a1 a2 a3 a4 b1")
		report, err := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if got, want := outcomes(report), "Done Unknown Unknown Skipped Skipped Skipped"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		want := `taskexec: 1 of 6 tasks Done: no worker for category "a"; start one of them again, or list more (worker wa of category a at a:1: it closed the connection)`
		if !errors.Is(err, ErrNoWorker) || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
		if r := report.Results[1]; r.Losses != 1 || r.Attempts != 1 || r.Worker != "wa" {
			t.Errorf("got %+v", r)
		}
		for _, r := range report.Results[1:] {
			if !errors.Is(r.Err, ErrNoWorker) {
				t.Errorf("task %d: %v is not ErrNoWorker", r.Index, r.Err)
			}
		}
	})
}

func TestAnAddressIsHarmlessWhenItsWorkerIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		addr := "a\x1b\n:1"
		cl.script(addr, func(p *peer) {
			p.welcome()
			p.expect("RUN 0 1 0 a1")
		})
		_, err := cl.coordinator(WithWorkers("a", addr)).Run(t.Context(), mustParse(t, "a1"))
		if !errors.Is(err, ErrNoWorker) {
			t.Fatalf("got %v", err)
		}
		harmless(t, err.Error(), most)
	})
}

func TestWhyNoWorkerIsLeftIsInTheRunsError(t *testing.T) {
	// There is one worker, which is not waited for, and a task that it was not sent.
	for _, tt := range []struct {
		reason string
		play   func(p *peer)
		want   string
	}{
		{"it drains", func(p *peer) { p.send("DRAIN"); time.Sleep(time.Second); p.send("DONE 0 0", "GOODBYE") }, "(worker at a:1: it is shutting down)"},
		{"a fault", func(p *peer) { p.send("DONE 1 0"); io.Copy(io.Discard, p.in) }, "DONE for task 1, which is not in flight here)"},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", func(p *peer) {
					p.welcome()
					p.expect("RUN 0 1 0 a0")
					tt.play(p)
				})
				tasks := tasksOf("a", 2)
				report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if !errors.Is(err, ErrNoWorker) || !strings.HasSuffix(err.Error(), tt.want) {
					t.Errorf("got %v, want %s", err, tt.want)
				}
			})
		})
	}
}

func TestAWorkerLostBetweenStagesIsMissedWhenItsStageComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", func(context.Context, Task) (string, error) { time.Sleep(time.Minute); return "", nil })
		cl.script("b:1", func(p *peer) {
			p.welcome()
			time.Sleep(time.Second)
		})
		tasks := mustParse(t, "a1 b1")
		report, err := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if got := outcomes(report); got != "Done Skipped" || !errors.Is(err, ErrNoWorker) || !strings.Contains(err.Error(), "b:1") {
			t.Errorf("got %s and %v", got, err)
		}
	})
}

// cancelAt cancels a run of one a and one b, on a worker with one slot, at some
// moment.
func TestCancelReachesHandlersAndSettlesEveryTask(t *testing.T) {
	why := errors.New("the user\x1bwent home")
	for _, tt := range []struct {
		moment string
		// setUp starts the workers; cancel is to be called at the moment.
		setUp    func(cl *cluster, cancel func())
		outcomes string
		took     time.Duration
		options  []CoordinatorOption
	}{
		{"before", func(cl *cluster, cancel func()) { cancel() }, "Skipped Skipped Skipped", 0, nil},
		{"during dial", func(cl *cluster, cancel func()) {
			cl.network.listen("w:1") // and never accept
			time.AfterFunc(2*time.Second, cancel)
		}, "Skipped Skipped Skipped", 2 * time.Second, nil},
		{"during handshake", func(cl *cluster, cancel func()) {
			cl.script("w:1", func(p *peer) {
				p.expect("HELLO …")
				cancel()
				p.expectEnd()
			})
		}, "Skipped Skipped Skipped", 0, nil},
		{"while tasks run", func(cl *cluster, cancel func()) {
			time.AfterFunc(2*time.Second, cancel)
			cl.worker("w:1", func(ctx context.Context, task Task) (string, error) {
				<-ctx.Done()
				cause := context.Cause(ctx)
				if !strings.Contains(cause.Error(), `the user\x1bwent home`) || !errors.Is(cause, context.Canceled) {
					cl.t.Errorf("the handler's cause is %q", cause)
				}
				return "", cause
			})
		}, "Canceled Skipped Skipped", 2 * time.Second, nil},
		{"the handler says its context's error", func(cl *cluster, cancel func()) {
			time.AfterFunc(2*time.Second, cancel)
			cl.worker("w:1", until)
		}, "Canceled Skipped Skipped", 2 * time.Second, nil},
		{"the handler finishes nevertheless", func(cl *cluster, cancel func()) {
			cl.worker("w:1", func(ctx context.Context, task Task) (string, error) {
				cancel()
				<-ctx.Done()
				time.Sleep(3 * time.Second)
				return "", nil
			})
		}, "Done Skipped Skipped", 3 * time.Second, nil},
		{"the handler fails for a reason of its own", func(cl *cluster, cancel func()) {
			cl.worker("w:1", func(ctx context.Context, task Task) (string, error) {
				cancel()
				<-ctx.Done()
				return "", errors.New("disk full")
			})
		}, "Failed Skipped Skipped", 0, nil},
		{"the worker never answers", func(cl *cluster, cancel func()) {
			cl.script("w:1", func(p *peer) {
				p.expect("HELLO …")
				p.send(`WELCOME taskexec/1 {"window":2}`)
				p.expect("RUN 0 1 0 a1", "RUN 1 1 0 a2")
				cancel()
				p.expect(`CANCEL the run's context ended: context canceled: the user` + "\x1b" + `went home`)
				p.expect("ERROR timeout …")
				p.expectEnd()
			})
		}, "Unknown Unknown Skipped", 10 * time.Second, []CoordinatorOption{withLeastWindow(2)}},
		{"the worker answers by vanishing", func(cl *cluster, cancel func()) {
			cl.script("w:1", func(p *peer) {
				p.expect("HELLO …")
				p.send(`WELCOME taskexec/1 {"window":2}`)
				p.expect("RUN 0 1 0 a1", "RUN 1 1 0 a2")
				cancel()
				p.expect("CANCEL …")
			})
		}, "Unknown Unknown Skipped", 0, []CoordinatorOption{withLeastWindow(2)}},
		{"the worker gives one back", func(cl *cluster, cancel func()) {
			cl.script("w:1", func(p *peer) {
				p.expect("HELLO …")
				p.send(`WELCOME taskexec/1 {"window":2}`)
				p.expect("RUN 0 1 0 a1", "RUN 1 1 0 a2")
				cancel()
				p.expect("CANCEL …")
				p.send("RETURN 1", "FAIL 0 canceled 0")
				p.expectEnd()
			})
		}, "Canceled Skipped Skipped", 0, []CoordinatorOption{withLeastWindow(2)}},
		{"during the wait for a goodbye", func(cl *cluster, cancel func()) {
			cl.script("w:1", func(p *peer) {
				p.welcome()
				p.expect("RUN 0 1 0 a1")
				p.send("DONE 0 0")
				p.expect("RUN 1 1 0 a2")
				p.send("DONE 1 0")
				p.expect("SHUTDOWN")
				time.Sleep(5 * time.Second)
				cancel()
				p.expectEnd()
			})
		}, "Done Done Skipped", 5 * time.Second, []CoordinatorOption{WithWorkerShutdown()}},
	} {
		t.Run(tt.moment, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				tt.setUp(cl, func() { cancel(why) })
				cl.worker("z:1", func(context.Context, Task) (string, error) {
					t.Error("a later stage was started")
					return "", nil
				})
				tasks := mustParse(t, "a1 a2 z1")
				c := cl.coordinator(append(tt.options, WithWorkers("a", "w:1"), WithWorkers("z", "z:1"))...)
				report, err := c.Run(ctx, tasks)
				checkReport(t, tasks, report, err)
				if got := outcomes(report); got != tt.outcomes {
					t.Errorf("got %s, want %s", got, tt.outcomes)
				}
				if report.Elapsed != tt.took {
					t.Errorf("it took %v, want %v", report.Elapsed, tt.took)
				}
				if !errors.Is(err, context.Canceled) || !errors.Is(err, why) {
					t.Errorf("%v is not ctx's error and its cause", err)
				}
				texts := err.Error()
				for _, r := range report.Results {
					texts += fmt.Sprint(r.Err)
				}
				if strings.Contains(texts, "\x1b") {
					t.Errorf("not escaped: %q", texts)
				}
			})
		})
	}
}

func TestADeadlineIsTheReasonTheRunNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", until)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		tasks := mustParse(t, "a1")
		report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(ctx, tasks)
		checkReport(t, tasks, report, err)
		if !errors.Is(err, context.DeadlineExceeded) || report.Elapsed != time.Minute {
			t.Errorf("after %v: %v", report.Elapsed, err)
		}
	})
}

func TestACancelThatComesAfterTheLastTaskChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		cl.worker("a:1", func(context.Context, Task) (string, error) { cancel(); return "", nil })
		tasks := mustParse(t, "a1")
		report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(ctx, tasks)
		checkReport(t, tasks, report, err)
		if got := outcomes(report); got != "Done" || err != nil {
			t.Errorf("got %s and %v", got, err)
		}
	})
}

// A worker has a second to read why, though the run is over.
func TestAWorkerThatAnswersNoCancelIsToldThatItIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		ctx, cancel := context.WithCancel(t.Context())
		cl.script("a:1", func(p *peer) {
			p.welcome()
			p.expect("RUN 0 1 0 a0")
			cancel()
			p.expect("CANCEL …")
			time.Sleep(10*time.Second + time.Second/2)
			p.expect("ERROR timeout tasks were not reported within 10s after CANCEL")
			p.expectEnd()
		})
		tasks := tasksOf("a", 1)
		report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(ctx, tasks)
		checkReport(t, tasks, report, err)
		if got := outcomes(report); got != "Unknown" || report.Elapsed > 11*time.Second {
			t.Errorf("got %s after %v", got, report.Elapsed)
		}
	})
}

func TestShutdownOfACoordinatorFinishesWhatRunsAndSkipsTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("w:1", func(_ context.Context, task Task) (string, error) {
			cl.log("%s", task.Instruction)
			time.Sleep(10 * time.Second)
			return "", nil
		}, WithSlots(2))
		c := cl.coordinator(WithWorkers("a", "w:1"), WithWorkers("b", "w:1"))
		tasks := append(tasksOf("a", 20), mustParse(t, "b1")...)
		var report *Report
		var err error
		var running sync.WaitGroup
		running.Go(func() { report, err = c.Run(t.Context(), tasks) })
		time.Sleep(time.Second)

		patience, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		start := time.Now()
		if err := c.Shutdown(patience); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 3*time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		if err := c.Shutdown(t.Context()); err != nil || time.Since(start) != 9*time.Second {
			t.Errorf("again, after %v: %v", time.Since(start), err)
		}
		if err := c.Shutdown(patience); err != nil {
			t.Errorf("once more, with a ctx that is over: %v", err)
		}
		running.Wait()
		checkReport(t, tasks, report, err)
		if !errors.Is(err, ErrCoordinatorClosed) || report.Counts != (Counts{Done: 2, Skipped: 19}) {
			t.Errorf("got %+v and %v", report.Counts, err)
		}
		executed := cl.traced()
		slices.Sort(executed) // there are two slots
		if diff := cmp.Diff([]string{"a0", "a1"}, executed); diff != "" {
			t.Errorf("executed (-want +got):\n%s", diff)
		}
		later, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, later, err)
		if !errors.Is(err, ErrCoordinatorClosed) || later.Counts.Skipped != 21 {
			t.Errorf("got %+v and %v", later.Counts, err)
		}
	})
}

func TestShutdownEndsTheOpeningOfSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) { p.expect("HELLO …"); p.expectEnd() })
		cl.worker("a:2", echo)
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"))
		var running sync.WaitGroup
		running.Go(func() {
			tasks := mustParse(t, "a1")
			report, err := c.Run(t.Context(), tasks)
			checkReport(t, tasks, report, err)
			if !errors.Is(err, ErrCoordinatorClosed) || report.Elapsed != time.Second {
				t.Errorf("after %v: %v", report.Elapsed, err)
			}
		})
		time.Sleep(time.Second)
		if err := c.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		running.Wait()
	})
}

func TestShutdownThenCancelStopsWhatRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", until)
		ctx, cancel := context.WithCancel(t.Context())
		c := cl.coordinator(WithWorkers("a", "a:1"))
		var running sync.WaitGroup
		running.Go(func() {
			tasks := mustParse(t, "a1 a2")
			report, err := c.Run(ctx, tasks)
			checkReport(t, tasks, report, err)
			if got := outcomes(report); got != "Canceled Skipped" || !errors.Is(err, ErrCoordinatorClosed) || !errors.Is(err, context.Canceled) {
				t.Errorf("got %s and %v", got, err)
			}
		})
		time.Sleep(time.Second)
		var closing sync.WaitGroup
		closing.Go(func() {
			if err := c.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(time.Second)
		cancel()
		closing.Wait()
		running.Wait()
	})
}

func TestRunsOfOneCoordinatorShareWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		handler := func(ctx context.Context, task Task) (string, error) {
			time.Sleep(time.Second)
			info, _ := TaskInfoFrom(ctx)
			return info.Key() + " " + task.Instruction, nil
		}
		cl.worker("w:1", handler, WithSlots(2))
		cl.worker("w:2", handler)
		c := cl.coordinator(WithWorkers("a", "w:1", "w:2"), WithWorkers("b", "w:1"))
		var running sync.WaitGroup
		for i := range 5 {
			running.Go(func() {
				tasks := append(tasksOf("b", i), tasksOf("a", 20)...)
				report, err := c.Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if err != nil {
					t.Error(err)
				}
				for j, r := range report.Results {
					if want := fmt.Sprintf("%s/%d %s", report.Run, j, tasks[j].Instruction); r.Output != want {
						t.Errorf("got %q, want %q", r.Output, want)
					}
				}
			})
		}
		running.Wait()
	})
}

func TestAMissingGoodbyeIsInTheErrorThoughAllIsDone(t *testing.T) {
	for _, tt := range []struct {
		reason string
		play   func(p *peer) // on SHUTDOWN
		want   string
		took   time.Duration
	}{
		{"none", func(p *peer) { p.expectEnd() }, "no goodbye within 30s", 30 * time.Second},
		{"late", func(p *peer) { time.Sleep(29 * time.Second); p.send("GOODBYE see you") }, "", 29 * time.Second},
		{"refused", func(p *peer) { p.send("ERROR refused not by you"); p.conn.Close() }, "peer reports (refused): not by you", 0},
		{"it closes instead", func(p *peer) {}, "it closed the connection", 0},
		{"a fault instead", func(p *peer) { p.send("WAIT"); io.Copy(io.Discard, p.in) }, "unknown verb", 0},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", func(p *peer) {
					p.expect("HELLO …")
					p.send(`WELCOME taskexec/1 {"worker":"wa"}`)
					p.expect("RUN 0 1 0 a1")
					p.send("DONE 0 0")
					p.expect("SHUTDOWN")
					tt.play(p)
				})
				cl.worker("b:1", func(context.Context, Task) (string, error) { cl.log("b"); return "", nil })
				tasks := mustParse(t, "a1 b1")
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithWorkerShutdown())
				report, err := c.Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if got := outcomes(report); got != "Done Done" || report.Elapsed != tt.took {
					t.Errorf("got %s after %v, want %v", got, report.Elapsed, tt.took)
				}
				if tt.want == "" {
					if err != nil {
						t.Error(err)
					}
					return
				}
				var we *WorkerError
				if !errors.As(err, &we) || we.Worker != "wa" || we.Addr != "a:1" {
					t.Errorf("got %v, want a *WorkerError", err)
				}
				text := err.Error()
				if !strings.Contains(text, tt.want) || !strings.HasPrefix(text, "taskexec: 2 of 2 tasks Done: ") || strings.Count(text, "taskexec: ") != 1 {
					t.Errorf("got %s\nwant %s", text, tt.want)
				}
			})
		})
	}
}

func TestAWorkerIsToldToShutDownOnceAndAfterItsLastTask(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		// One worker at two addresses, for three categories of which one is
		// the last of all.
		handler := HandlerFunc(func(_ context.Context, task Task) (string, error) {
			cl.log("%s", task.Instruction)
			return "", nil
		})
		shared := NewWorker(handler, WithName("shared"))
		for _, addr := range []string{"w:1", "w:2"} {
			ln := cl.network.listen(addr)
			cl.serving.Go(func() { shared.Serve(context.Background(), ln) })
		}
		cl.worker("b:1", handler)
		var goodbyes []string
		c := cl.coordinator(WithWorkers("a", "w:1", "w:2"), WithWorkers("b", "b:1", "w:1"), WithWorkers("c", "w:2"), WithWorkerShutdown(),
			WithObserver(Observer{Goodbye: func(i GoodbyeInfo) { goodbyes = append(goodbyes, i.Worker+": "+i.Text) }}))
		tasks := mustParse(t, "a1 b1 b2 c1")
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if diff := cmp.Diff([]string{"b:1: Goodbye from b:1", "shared: Goodbye from shared"}, goodbyes); diff != "" || err != nil {
			t.Errorf("%v; goodbyes (-want +got):\n%s", err, diff)
		}
		trace := cl.traced()
		if c1, goodbye := slices.Index(trace, "c1"), slices.Index(trace, "Goodbye from shared"); c1 < 0 || goodbye < c1 {
			t.Errorf("the shared worker's goodbye comes before c1: %v", trace)
		}
	})
}

func TestWorkersWithoutInstanceAreKnownByTheirSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		for _, category := range []string{"a", "b"} {
			cl.script(category+":1", func(p *peer) {
				p.welcome()
				p.next()
				p.send("DONE " + map[string]string{"a": "0", "b": "1"}[category] + " 0")
				p.expect("SHUTDOWN")
				cl.log("%s is told", category)
				p.send("GOODBYE")
			})
		}
		tasks := mustParse(t, "a1 b1")
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithWorkerShutdown())
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if diff := cmp.Diff([]string{"a is told", "b is told"}, cl.traced()); diff != "" || err != nil {
			t.Errorf("%v; (-want +got):\n%s", err, diff)
		}
	})
}

// A process that names no instance may well be one worker for all categories that
// its address is listed for.
func TestAWorkerWithoutInstanceIsToldToShutDownWhenNoStageNeedsItsAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.scriptsBeside("w:1", func(_ int, p *peer) {
			hello := p.next()
			p.send("WELCOME taskexec/1 {}")
			p.expect("RUN …")
			if strings.Contains(hello, `"category":"a"`) {
				p.send("DONE 0 0")
			} else {
				time.Sleep(time.Second)
				cl.log("b is done")
				p.send("DONE 1 0")
			}
			p.expect("SHUTDOWN")
			cl.log("told")
			p.send("GOODBYE")
		})
		tasks := mustParse(t, "a1 b1")
		c := cl.coordinator(WithWorkers("a", "w:1"), WithWorkers("b", "w:1"), WithWorkerShutdown())
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if diff := cmp.Diff([]string{"b is done", "told", "told"}, cl.traced()); diff != "" || err != nil {
			t.Errorf("%v; (-want +got):\n%s", err, diff)
		}
	})
}

func TestWorkersAreToldToShutDownAfterAFailedStageButNotAfterACancel(t *testing.T) {
	for _, canceled := range []bool{false, true} {
		t.Run(fmt.Sprintf("canceled=%v", canceled), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				cl.script("a:1", func(p *peer) {
					p.welcome()
					p.next()
					if canceled {
						cancel()
						p.expect("CANCEL …")
						p.send("FAIL 0 canceled 0 ok")
						p.expectEnd()
						return
					}
					p.send("FAIL 0 error 0 boom")
					p.expect("SHUTDOWN")
					p.send("GOODBYE")
				})
				cl.script("b:1", func(p *peer) {
					p.welcome()
					if canceled {
						p.expectEnd()
						return
					}
					p.expect("SHUTDOWN")
					p.send("GOODBYE")
				})
				tasks := mustParse(t, "a1 b1")
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithWorkerShutdown())
				report, err := c.Run(ctx, tasks)
				checkReport(t, tasks, report, err)
			})
		})
	}
}

func TestARunLeavesNoTimerBehind(t *testing.T) {
	for _, tt := range []struct {
		name    string
		handler func(cancel func()) HandlerFunc
		timer   func(r *run, q *queue) *time.Timer
		options []CoordinatorOption
	}{
		{"the cancel's grace", func(cancel func()) HandlerFunc {
			return func(ctx context.Context, task Task) (string, error) {
				cancel()
				return until(ctx, task)
			}
		}, func(r *run, q *queue) *time.Timer { return r.grace }, nil},
		{"the next try", func(cancel func()) HandlerFunc {
			return func(context.Context, Task) (string, error) {
				time.AfterFunc(time.Second, cancel)
				return "", RetryAfter(errors.New("not yet"), time.Hour)
			}
		}, func(r *run, q *queue) *time.Timer { return q.retry }, []CoordinatorOption{WithRetry(Retry{Attempts: 2})}},
		{"what was asked back", func(func()) HandlerFunc {
			var others sync.WaitGroup
			others.Add(7)
			return func(ctx context.Context, _ Task) (string, error) {
				if info, _ := TaskInfoFrom(ctx); info.Task == 0 {
					others.Wait() // some of which were sent to the same worker
				} else {
					others.Done()
				}
				return "", nil
			}
		}, func(r *run, q *queue) *time.Timer { return q.evener }, []CoordinatorOption{withLeastWindow(8)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				handler := tt.handler(cancel)
				cl.worker("a:1", handler)
				cl.worker("a:2", handler)
				c := cl.coordinator(append(tt.options, WithWorkers("a", "a:1", "a:2"))...)
				r := newRun(&c.config)
				r.tasks = tasksOf("a", 8)
				if err := r.execute(ctx, r.runPlan); !errors.Is(err, ctx.Err()) {
					t.Error(err)
				}
				if timer := tt.timer(r, r.queues["a"]); timer == nil || timer.Stop() {
					t.Errorf("the timer of %s still runs, or never did", tt.name)
				}
			})
		})
	}
}

func TestARunLeavesNoWaitForAWorkerBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		p := cl.process("a:1", until)
		cl.after(time.Second, p.kill)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Hour))
		r := newRun(&c.config)
		r.tasks = tasksOf("a", 1)
		if err := r.execute(ctx, r.runPlan); !errors.Is(err, ctx.Err()) {
			t.Error(err)
		}
		if timer := r.queues["a"].patience; timer == nil || timer.Stop() {
			t.Error("the timer still runs, or never did")
		}
	})
}

// Such as that of a ctx which ends as the run does.
func TestAHaltThatComesTooLateLeavesNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", echo)
		c := cl.coordinator(WithWorkers("a", "a:1"))
		r := newRun(&c.config)
		r.tasks = tasksOf("a", 1)
		if err := r.execute(t.Context(), r.runPlan); err != nil {
			t.Error(err)
		}
		r.halt(haltCancel, errors.New("too late"))
		if r.grace != nil || r.haltedBy() != nil {
			t.Errorf("the run was halted by %v, and the grace runs: %v", r.haltedBy(), r.grace != nil)
		}
	})
}

func TestAnErrorWithoutAReasonCanBePrinted(t *testing.T) {
	for _, err := range []error{&TaskError{Outcome: Failed}, &RunError{}, &WorkerError{Category: "a", Addr: "a:1"}} {
		if text := err.Error(); !strings.Contains(text, "no reason given") {
			t.Errorf("%T says %q", err, text)
		}
	}
}

// slowToClose is a connection such as TLS has to a peer that does not read.
type slowToClose struct{ net.Conn }

func (c slowToClose) Close() error {
	time.Sleep(time.Second)
	return c.Conn.Close()
}

func TestConnectionsThatAreSlowToCloseAreClosedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var addrs []string
		for i := range 20 {
			addrs = append(addrs, fmt.Sprintf("a:%d", i+1))
			cl.worker(addrs[i], echo)
		}
		dialer := WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := cl.dial(ctx, network, addr)
			return slowToClose{conn}, err
		})
		start := time.Now()
		if _, err := cl.coordinator(WithWorkers("a", addrs...), dialer).Run(t.Context(), tasksOf("a", 3)); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("the run took %v", took)
		}
	})
}

// closingConn is slow to close, as TLS is. Meanwhile nothing can be read, and who
// closes it once more does not wait.
type closingConn struct {
	net.Conn
	closing atomic.Bool
}

func (c *closingConn) Close() error {
	if c.closing.Swap(true) {
		return net.ErrClosed
	}
	c.SetReadDeadline(time.Now())
	return slowToClose{c.Conn}.Close()
}

func TestARunThatIsCanceledBeforeItsWorkerGreetsLeavesNoConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) { p.expect("HELLO …"); p.expectEnd() })
		dialer := WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := cl.dial(ctx, network, addr)
			return &closingConn{Conn: conn}, err
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := cl.coordinator(WithWorkers("a", "a:1"), dialer).Run(ctx, tasksOf("a", 1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if !cl.dialed()[0].closed() {
			t.Error("Run has returned, and its connection is still open")
		}
	})
}

// hastyConn has read what its peer says before anything is written.
type hastyConn struct {
	net.Conn
	said *strings.Reader
}

func (c hastyConn) Read(p []byte) (int, error) {
	if c.said.Len() > 0 {
		return c.said.Read(p)
	}
	return c.Conn.Read(p)
}

func TestHelloComesFirstEvenToAWorkerThatDoesNotWaitForIt(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // so that the reader of a session that follows another is ahead of its writer
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var heard []string
		dial := func(context.Context, string, string) (net.Conn, error) {
			near, far := net.Pipe()
			go func() {
				defer far.Close()
				line, _ := bufio.NewReader(far).ReadString('\n')
				if heard = append(heard, line); len(heard) == 3 {
					cancel()
				}
			}()
			return hastyConn{near, strings.NewReader("WELCOME taskexec/1 {}\nPING 1\nPING 2\n")}, nil
		}
		c, err := NewCoordinator(WithWorkers("a", "a:1"), WithDialer(dial))
		if err != nil {
			t.Fatal(err)
		}
		c.Run(ctx, mustParse(t, "a1"))
		for i, line := range heard {
			if !strings.HasPrefix(line, "HELLO ") {
				t.Errorf("the first line of session %d is %q", i, line)
			}
		}
	})
}
