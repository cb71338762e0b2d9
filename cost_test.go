package taskexec

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// What a task costs in allocations and memory is the same on any machine, so
// it can be held by a test; what it costs in time cannot. One side of each
// measurement is played by hand, without an allocation for a task, so that the
// other side's are counted alone.

const costTasks = 100_000

// costs is what a task costs.
type costs struct {
	allocations, bytes float64
}

// costOf counts what f allocates, for each of n tasks.
func costOf(n int, f func()) costs {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return costs{
		allocations: float64(after.Mallocs-before.Mallocs) / float64(n),
		bytes:       float64(after.TotalAlloc-before.TotalAlloc) / float64(n),
	}
}

// skipIfRaceEnabled is for tests that count allocations: the race detector
// makes some of its own.
func skipIfRaceEnabled(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes allocations of its own")
	}
}

func (c costs) holdToTwoAllocations(t *testing.T) {
	t.Helper()
	if t.Logf("%.3f allocations of %.0f bytes in all a task", c.allocations, c.bytes); c.allocations > 2 {
		t.Errorf("%.3f allocations a task, want at most 2", c.allocations)
	}
}

// doAll is a worker by hand: it greets, and reports each task Done. It calls
// onTask, unless that is nil, before it reports the task of that number.
func doAll(conn net.Conn, onTask func(count int)) error {
	defer conn.Close()
	in, out := bufio.NewReaderSize(conn, chunkBytes), bufio.NewWriterSize(conn, chunkBytes)
	if _, err := in.ReadSlice('\n'); err != nil {
		return err
	}
	fmt.Fprintf(out, "WELCOME %s {\"slots\":1,\"window\":%d}\n", protocolVersion, windowTasks)
	for count := 1; ; {
		if in.Buffered() == 0 {
			if err := out.Flush(); err != nil {
				return err
			}
		}
		line, err := in.ReadSlice('\n')
		if err != nil {
			return err
		}
		fields, ok := bytes.CutPrefix(line, []byte("RUN "))
		if !ok {
			continue
		}
		number, _, _ := bytes.Cut(fields, []byte(" "))
		if onTask != nil {
			onTask(count)
		}
		out.WriteString("DONE ")
		out.Write(number)
		out.WriteString(" 0\n")
		count++
	}
}

// doneByHand is a coordinator whose workers are doAll.
func doneByHand(tb testing.TB, workers int, onTask func(count int), opts ...CoordinatorOption) *Coordinator {
	tb.Helper()
	var addrs []string
	for i := range workers {
		addrs = append(addrs, fmt.Sprintf("worker:%d", i+1))
	}
	var working sync.WaitGroup
	tb.Cleanup(working.Wait)
	c, err := NewCoordinator(append(opts, WithWorkers("a", addrs...),
		WithDialer(func(context.Context, string, string) (net.Conn, error) {
			near, far := net.Pipe()
			working.Go(func() { doAll(far, onTask) }) // until the coordinator has closed its end
			return near, nil
		}))...)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// noOps makes n tasks.
func noOps(n int) []Task {
	tasks := make([]Task, n)
	for i := range tasks {
		tasks[i] = Task{Category: "a", Instruction: benchInstruction}
	}
	return tasks
}

// sendAll is a coordinator by hand: it has a worker execute n tasks, over
// conn, and keeps its window full.
func sendAll(conn net.Conn, n int) error {
	in := bufio.NewReaderSize(conn, chunkBytes)
	if _, err := fmt.Fprintf(conn, "HELLO %s {\"category\":\"a\"}\n", protocolVersion); err != nil {
		return err
	}
	if _, err := in.ReadSlice('\n'); err != nil {
		return err
	}
	const batch = 256 // tasks written at a time
	room := make(chan struct{}, windowTasks/batch)
	sent := make(chan error, 1)
	go func() {
		var lines []byte
		for first := 0; first < n; first += batch {
			lines = lines[:0]
			for task := first; task < min(first+batch, n); task++ {
				lines = append(lines, "RUN "...)
				lines = strconv.AppendInt(lines, int64(task), 10)
				lines = append(lines, " 1 0 "+benchInstruction+"\n"...)
			}
			room <- struct{}{}
			if _, err := conn.Write(lines); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	for task := range n {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return err
		}
		if !bytes.HasPrefix(line, []byte("DONE ")) {
			return fmt.Errorf("got %q, want DONE", line)
		}
		if task%batch == batch-1 || task == n-1 {
			<-room
		}
	}
	return <-sent
}

// TestRunAllocatesAtMostTwiceATaskAnd200Bytes counts all that is ever
// allocated beyond the tasks, whether it is kept or not.
func TestRunAllocatesAtMostTwiceATaskAnd200Bytes(t *testing.T) {
	skipIfRaceEnabled(t)
	logger := slog.New(slog.DiscardHandler)
	for name, opts := range map[string][]CoordinatorOption{
		"plain":    nil,
		"logged":   {WithLogger(logger)},
		"observed": {WithLogger(logger), WithObserver(Observer{SessionLost: func(SessionLostInfo) {}})},
	} {
		t.Run(name, func(t *testing.T) {
			c, tasks := doneByHand(t, 1, nil, opts...), noOps(costTasks)
			got := costOf(len(tasks), func() {
				if _, err := c.Run(t.Context(), tasks); err != nil {
					t.Fatal(err)
				}
			})
			got.holdToTwoAllocations(t)
			if got.bytes > 200 {
				t.Errorf("%.0f bytes a task, want at most 200", got.bytes)
			}
		})
	}
}

func TestStreamAllocatesAtMostTwiceATask(t *testing.T) {
	skipIfRaceEnabled(t)
	c, tasks := doneByHand(t, 1, nil, WithOrder(Concurrent)), noOps(costTasks)
	got := costOf(len(tasks), func() {
		for _, err := range c.Stream(t.Context(), slices.Values(tasks)) {
			if err != nil {
				t.Fatal(err)
			}
		}
	})
	got.holdToTwoAllocations(t)
}

func TestWorkerAllocatesAtMostTwiceATask(t *testing.T) {
	skipIfRaceEnabled(t)
	near, far := net.Pipe()
	served := make(chan error)
	go func() { served <- NewWorker(HandlerFunc(noOp)).ServeConn(t.Context(), far) }()
	got := costOf(costTasks, func() {
		if err := sendAll(near, costTasks); err != nil {
			t.Error(err)
		}
	})
	near.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	got.holdToTwoAllocations(t)
}

func noOp(context.Context, Task) (string, error) { return "", nil }

// TestRunHoldsAtMost200BytesATask counts what is in use beyond the tasks; the
// outputs are empty. Others would keep the lines that they came in.
func TestRunHoldsAtMost200BytesATask(t *testing.T) {
	inUse := func() float64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	var meanwhile float64
	c := doneByHand(t, 1, func(count int) {
		if count == costTasks/2 {
			meanwhile = inUse()
		}
	})
	tasks := noOps(costTasks)
	before := inUse()
	report, err := c.Run(t.Context(), tasks)
	if err != nil {
		t.Fatal(err)
	}
	for when, bytes := range map[string]float64{"half-way": meanwhile, "at the end": inUse()} {
		if got := (bytes - before) / costTasks; got > 200 {
			t.Errorf("%s: %.0f bytes a task, want at most 200", when, got)
		} else {
			t.Logf("%s: %.0f bytes a task", when, got)
		}
	}
	runtime.KeepAlive(report)
	runtime.KeepAlive(tasks)
}

// TestALongTaskHoldsOnToNoOtherInstruction has many tasks come and go that may
// share an allocation with one whose handler takes long.
func TestALongTaskHoldsOnToNoOtherInstruction(t *testing.T) {
	inUse := func() int {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	release := make(chan struct{})
	wt := startWorker(t, HandlerFunc(func(_ context.Context, task Task) (string, error) {
		if task.Instruction == "long" {
			<-release
		}
		return "", nil
	}), WithSlots(2))
	defer close(release)
	p := wt.session()
	const together = 64
	lines := make([]string, together)
	for i := range lines {
		lines[i] = fmt.Sprintf("RUN %d 1 0 short", i)
	}
	lines[together-1] = fmt.Sprintf("RUN %d 1 0 long", together-1)
	go p.send(lines...)
	for range together - 1 {
		p.expect("DONE …")
	}
	before := inUse()
	const more = 2 * together
	instruction := strings.Repeat("x", 1<<18)
	for i := range more {
		p.send(fmt.Sprintf("RUN %d 1 0 %s", together+i, instruction))
		p.expect("DONE …")
	}
	if got := inUse() - before; got > more*len(instruction)/8 {
		t.Errorf("%d bytes are held of %d instructions that were executed", got, more)
	}
}
