package taskexec

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var soakFor = flag.Duration("soak", 0, "how long TestSoak runs; 0 skips it")

// A soak is runs and Streams, one after another and several at a time, over
// real TCP, while connections are reset, workers restarted and runs left.
type soak struct {
	t       *testing.T
	workers []*soakWorker

	runs, tasks, done, again, canceled, cuts, restarts atomic.Int64
}

// A soakWorker is a worker that is replaced by another at the same address.
type soakWorker struct {
	soak *soak
	addr string
	name string

	mu     sync.Mutex // guards following
	worker *Worker
	cancel context.CancelFunc
	served chan struct{} // closed when Serve has returned
	ln     *cutListener
}

// A cutListener knows its connections, so that they can be reset.
type cutListener struct {
	net.Listener

	mu    sync.Mutex // guards following
	dead  bool       // whoever comes is reset
	conns map[*cutConn]struct{}
}

type cutConn struct {
	*net.TCPConn
	ln *cutListener
}

func (c *cutConn) Close() error {
	c.ln.mu.Lock()
	delete(c.ln.conns, c)
	c.ln.mu.Unlock()
	return c.TCPConn.Close()
}

func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

func (l *cutListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &cutConn{TCPConn: conn.(*net.TCPConn), ln: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		reset(c.TCPConn)
	} else {
		l.conns[c] = struct{}{}
	}
	return c, nil
}

// cut resets up to n connections, those that a map gives first.
func (l *cutListener) cut(n int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	cuts := 0
	for c := range l.conns {
		if cuts == n {
			break
		}
		reset(c.TCPConn)
		delete(l.conns, c)
		cuts++
	}
	return cuts
}

func (l *cutListener) die() int {
	l.mu.Lock()
	l.dead = true
	l.mu.Unlock()
	return l.cut(1 << 20)
}

func (w *soakWorker) start() error {
	addr := w.addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	ln, err := listenSoon(addr, 10*time.Second)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.mu.Lock()
	defer w.mu.Unlock()
	w.addr = ln.Addr().String()
	w.worker = NewWorker(HandlerFunc(soakHandler), WithName(w.name), WithSlots(1+rand.IntN(4)))
	w.cancel = cancel
	w.ln = &cutListener{Listener: ln, conns: make(map[*cutConn]struct{})}
	w.served = make(chan struct{})
	go func(worker *Worker, ln net.Listener, served chan struct{}) {
		defer close(served)
		worker.Serve(ctx, ln)
	}(w.worker, w.ln, w.served)
	return nil
}

// stop ends the worker: by a drain, or all at once.
func (w *soakWorker) stop(drain bool) {
	w.mu.Lock()
	worker, cancel, served, ln := w.worker, w.cancel, w.served, w.ln
	w.mu.Unlock()
	defer cancel()
	if drain {
		worker.Shutdown(context.Background())
	} else {
		// As a process that dies: nothing more is heard of it.
		w.soak.cuts.Add(int64(ln.die()))
		cancel()
	}
	<-served
}

// soakHandler's instructions are KIND MICROSECONDS PADDING.
func soakHandler(ctx context.Context, task Task) (string, error) {
	kind, rest, _ := strings.Cut(task.Instruction, " ")
	var us int
	fmt.Sscan(rest, &us)
	if !sleep(ctx, time.Duration(us)*time.Microsecond) {
		return "", context.Cause(ctx)
	}
	switch info, _ := TaskInfoFrom(ctx); {
	case kind == "fail":
		return "", errors.New("told to fail")
	case kind == "panic":
		panic("told to panic")
	case kind == "once" && info.Attempt == 1:
		return "", errors.New("told to fail once")
	}
	return task.Instruction, nil
}

// one is a run or a Stream with random tasks and options, which may be left in
// many ways.
func (s *soak) one(ctx context.Context) {
	chance := func(n int) bool { return rand.IntN(n) == 0 }
	order := []Order{ByCategory, ByInput, Concurrent}[rand.IntN(3)]
	options := []CoordinatorOption{WithOrder(order), WithWindow(1 + rand.IntN(64)), WithHeartbeat(time.Second, 10*time.Second),
		WithRetry(Retry{Attempts: 5, FirstDelay: time.Millisecond}), WithOnFailure(OnFailure(rand.IntN(3)))}
	for _, category := range []string{"a", "b", "c"} {
		for _, w := range s.workers {
			options = append(options, WithWorkers(category, w.addr))
		}
	}
	atMostOnce := chance(8)
	if atMostOnce {
		options = append(options, WithAtMostOnce())
	}
	c, err := NewCoordinator(options...)
	if err != nil {
		s.t.Error(err)
		return
	}
	kinds := []string{"do", "do", "do", "do", "once"}
	bad := chance(6)
	if bad {
		kinds = append(kinds, "fail", "panic")
	}
	tasks := make([]Task, rand.IntN(80))
	for i := range tasks {
		tasks[i] = Task{Category: string("abc"[rand.IntN(3)]), Instruction: fmt.Sprintf("%s %d", kinds[rand.IntN(len(kinds))], rand.IntN(1500))}
		if chance(30) {
			tasks[i].Instruction += " " + strings.Repeat("x", rand.IntN(100_000))
		}
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var timers []*time.Timer
	left := false
	soon := func(f func()) {
		left = true
		timers = append(timers, time.AfterFunc(rand.N(50*time.Millisecond), f))
	}
	if chance(6) {
		soon(cancel)
	}
	if chance(8) {
		soon(func() { c.Shutdown(context.Background()) })
	}
	var results []Result
	if chance(2) {
		var report *Report
		report, err = c.Run(ctx, tasks)
		if results = report.Results; len(results) != len(tasks) {
			s.t.Errorf("%d results for %d tasks", len(results), len(tasks))
		}
	} else {
		for result, e := range c.Stream(ctx, slices.Values(tasks)) {
			if err = e; err == nil {
				results = append(results, result)
			}
			if chance(400) {
				left = true
				break
			}
		}
		allDone := !slices.ContainsFunc(results, func(r Result) bool { return r.Outcome != Done })
		if !left && err == nil && allDone && len(results) != len(tasks) {
			s.t.Errorf("a Stream yielded %d results for %d tasks", len(results), len(tasks))
		}
	}
	for _, timer := range timers {
		timer.Stop()
	}
	if left {
		s.canceled.Add(1)
	}
	s.runs.Add(1)
	s.tasks.Add(int64(len(tasks)))
	for _, r := range results {
		switch {
		case r.Outcome < Done || r.Outcome > Unknown:
			s.t.Errorf("task %d has the outcome %v", r.Index, r.Outcome)
		case r.Task != tasks[r.Index]:
			s.t.Errorf("the result of task %d is that of another: %+v", r.Index, r)
		case r.Outcome == Done:
			s.done.Add(1)
			if r.Output != r.Task.Instruction {
				s.t.Errorf("task %d has the output of another: %q for %q", r.Index, r.Output, r.Task.Instruction)
			}
		case left || bad || atMostOnce:
		case r.Outcome == Skipped: // the one that is to blame is looked at
		case r.Outcome == Unknown && r.Losses >= maxStrikes:
		default:
			s.t.Errorf("task %d is %v, though nobody wanted that: %v (the run ended with %v)", r.Index, r.Outcome, r.Err, err)
		}
		if r.Attempts > 1 {
			s.again.Add(1)
		}
	}
}

// disturb does one thing to the workers. The first one is never restarted, so
// that it grows old.
func (s *soak) disturb() {
	w := s.workers[rand.IntN(len(s.workers))]
	if w == s.workers[0] || rand.IntN(3) > 0 {
		w.mu.Lock()
		ln := w.ln
		w.mu.Unlock()
		s.cuts.Add(int64(ln.cut(1 + rand.IntN(2))))
		return
	}
	w.stop(rand.IntN(2) == 0)
	s.restarts.Add(1)
	if err := w.start(); err != nil {
		s.t.Errorf("a worker does not come back: %v", err)
	}
}

// round goes on for d.
func (s *soak) round(d time.Duration) {
	end := time.Now().Add(d)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for time.Now().Before(end) && !s.t.Failed() {
				s.one(s.t.Context())
			}
		})
	}
	all.Go(func() {
		for time.Now().Before(end) && !s.t.Failed() {
			time.Sleep(rand.N(40 * time.Millisecond))
			s.disturb()
		}
	})
	all.Wait()
}

// quiet waits until no goroutines are left but most of them, and returns how
// many there are. Workers notice a moment later than coordinators that a
// session is over.
func (s *soak) quiet(most int) int {
	deadline := time.Now().Add(15 * time.Second)
	for runtime.NumGoroutine() > most && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond)
	}
	return runtime.NumGoroutine()
}

// After hours of runs, losses and restarts there is not more left of them than
// after minutes: no goroutine, and no memory.
func TestSoak(t *testing.T) {
	if *soakFor == 0 {
		t.Skip("this takes as long as it is told: go test -run Soak -soak=10m -timeout 15m")
	}
	s := &soak{t: t}
	for i := range 3 {
		w := &soakWorker{soak: s, name: fmt.Sprintf("w%d", i)}
		if err := w.start(); err != nil {
			t.Fatal(err)
		}
		s.workers = append(s.workers, w)
		defer w.stop(true)
	}
	goroutines := runtime.NumGoroutine()
	// Enough rounds to compare halves of them, and none so long that a leak
	// would be the end of the machine.
	length := max(500*time.Millisecond, min(*soakFor/30, 10*time.Second))
	var heap []uint64
	for end := time.Now().Add(*soakFor); time.Now().Before(end) && !t.Failed(); {
		s.round(length)
		if n := s.quiet(goroutines); n > goroutines {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines before, %d after %d runs:\n%s", goroutines, n, s.runs.Load(), buf[:runtime.Stack(buf, true)])
		}
		runtime.GC() // twice, for what only a first one sets free: pools, finalizers
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		heap = append(heap, m.HeapAlloc)
	}
	t.Logf("%d runs, %d of them left early, %d tasks, %d Done, %d sent more than once, %d connections reset, %d workers restarted",
		s.runs.Load(), s.canceled.Load(), s.tasks.Load(), s.done.Load(), s.again.Load(), s.cuts.Load(), s.restarts.Load())
	if len(heap) < 4 {
		t.Fatalf("%d rounds are too few to compare", len(heap))
	}
	first, second := median(heap[:len(heap)/2]), median(heap[len(heap)/2:])
	t.Logf("goroutines: %d before and after each of %d rounds; heap after each: median %d KiB in the first half, %d KiB in the second",
		goroutines, len(heap), first>>10, second>>10)
	if second > first+first/10+256<<10 {
		t.Errorf("the heap grows: after each round %d bytes", heap)
	}
}

func median(of []uint64) uint64 {
	sorted := slices.Sorted(slices.Values(of))
	return sorted[len(sorted)/2]
}
