package taskexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
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

// scripts serves addr with a worker that play plays, once for each session, in
// turn, from 0. The connection is closed when play returns.
func (c *cluster) scripts(addr string, play func(n int, p *peer)) {
	c.accept(addr, func(n int, conn net.Conn) {
		play(n, newPeer(c.t, conn))
		conn.Close()
	})
}

// scriptsBeside is scripts with sessions beside one another, each of which the
// coordinator may end at any time.
func (c *cluster) scriptsBeside(addr string, play func(n int, p *peer)) {
	c.accept(addr, func(n int, conn net.Conn) {
		c.serving.Go(func() {
			play(n, newPeer(quiet{c.t}, conn))
			conn.Close()
		})
	})
}

// accept calls serve with each connection to addr, in turn, from 0.
func (c *cluster) accept(addr string, serve func(n int, conn net.Conn)) {
	ln := c.network.listen(addr)
	c.serving.Go(func() {
		for n := 0; ; n++ {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			serve(n, conn)
		}
	})
	c.stops = append(c.stops, func() { ln.Close() })
}

// task reads a RUN, and returns the task's number.
func (p *peer) task() string {
	p.t.Helper()
	line := p.next()
	f := strings.Fields(line + " ? ?")
	if f[0] != "RUN" {
		p.t.Errorf("got line %q, want a RUN", line)
	}
	return f[1]
}

// A process is a worker that can be killed and started again at its address,
// each time as another instance.
type process struct {
	cluster *cluster
	addr    string
	handler HandlerFunc
	opts    []WorkerOption

	mu     sync.Mutex // guards following
	dead   bool
	worker *Worker
	conns  []net.Conn
	ln     net.Listener
	cancel context.CancelFunc
}

// process starts one. It is killed at the test's end.
func (c *cluster) process(addr string, handler HandlerFunc, opts ...WorkerOption) *process {
	p := c.lateProcess(addr, handler, opts...)
	p.start()
	return p
}

// lateProcess returns one that is not started yet.
func (c *cluster) lateProcess(addr string, handler HandlerFunc, opts ...WorkerOption) *process {
	p := &process{cluster: c, addr: addr, handler: handler, opts: append([]WorkerOption{WithName(addr)}, opts...)}
	c.stops = append(c.stops, p.kill)
	return p
}

func (p *process) start() *Worker {
	p.mu.Lock()
	defer p.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	p.dead = false
	p.worker, p.cancel, p.conns = NewWorker(p.handler, p.opts...), cancel, nil
	p.ln = &processListener{p.cluster.network.listen(p.addr), p}
	w, ln := p.worker, p.ln
	p.cluster.serving.Go(func() { w.Serve(ctx, ln) })
	return w
}

// kill ends the process as SIGKILL does: without a word. Its handlers' contexts
// end, since there is no other way to end a goroutine.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ln == nil {
		return
	}
	p.dead = true
	p.ln.Close()
	for _, conn := range p.conns {
		conn.Close()
	}
	p.cancel()
}

// current is the worker that was started last.
func (p *process) current() *Worker {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.worker
}

type processListener struct {
	net.Listener
	process *process
}

func (l *processListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.process.mu.Lock()
		l.process.conns = append(l.process.conns, conn)
		l.process.mu.Unlock()
	}
	return conn, err
}

// A relay stands between coordinators and one address, and can lose what goes
// either way without either side being told.
type relay struct {
	cluster                 *cluster
	toWorker, toCoordinator hole

	mu    sync.Mutex // guards following
	conns []net.Conn
}

// A hole is one direction of a relay.
type hole struct {
	open  atomic.Bool                                // nothing comes through, not even the end
	delay func(p []byte, write func(p []byte) error) // nil: bytes go through as they come
}

// relay listens at front for what goes on to back.
func (c *cluster) relay(front, back string) *relay {
	r := &relay{cluster: c}
	ln := c.network.listen(front)
	c.serving.Go(func() {
		for {
			here, err := ln.Accept()
			if err != nil {
				return
			}
			there, err := c.network.dial(context.Background(), "tcp", back)
			if err != nil {
				here.Close()
				continue
			}
			r.mu.Lock()
			r.conns = append(r.conns, here, there)
			r.mu.Unlock()
			c.serving.Go(func() { r.toWorker.pass(there, here) })
			c.serving.Go(func() { r.toCoordinator.pass(here, there) })
		}
	})
	c.stops = append(c.stops, func() { ln.Close(); r.cut() })
	return r
}

// cut ends all connections.
func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, conn := range r.conns {
		conn.Close()
	}
	r.conns = nil
}

func (h *hole) pass(dst, src net.Conn) {
	buf := make([]byte, 16<<10)
	for {
		n, err := src.Read(buf)
		if err != nil {
			if !h.open.Load() {
				dst.Close()
			}
			return
		}
		switch {
		case h.open.Load():
		case h.delay != nil:
			h.delay(buf[:n], func(p []byte) error { _, err := dst.Write(p); return err })
		default:
			if _, err := dst.Write(buf[:n]); err != nil {
				io.Copy(io.Discard, src)
				return
			}
		}
	}
}

// after calls f in a while, unless the test is over by then.
func (c *cluster) after(d time.Duration, f func()) {
	timer := time.AfterFunc(d, f)
	c.stops = append(c.stops, func() { timer.Stop() })
}

func TestAPoisonedTaskIsGivenUpAndHarmsNoOther(t *testing.T) {
	for _, tt := range []struct {
		workers, slots, window, at int
	}{
		{1, 1, 64, 0}, {1, 1, 64, 3}, {1, 4, 64, 0}, {1, 4, 64, 7}, {3, 1, 1, 5}, {3, 4, 64, 0}, {2, 2, 8, 49},
	} {
		t.Run(fmt.Sprintf("%d workers of %d slots, window %d, task %d", tt.workers, tt.slots, tt.window, tt.at), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				options := []CoordinatorOption{WithWindow(tt.window), WithWorkerWait(time.Minute)}
				deaths := 0
				for i := range tt.workers {
					addr := fmt.Sprintf("a:%d", i+1)
					var p *process
					p = cl.lateProcess(addr, func(ctx context.Context, task Task) (string, error) {
						if task.Instruction == "poison" {
							time.Sleep(ms)
							cl.log("death on %s", addr)
							p.kill()
							return "", ctx.Err()
						}
						select {
						case <-time.After(10 * ms):
							return task.Instruction, nil
						case <-ctx.Done():
							return "", ctx.Err()
						}
					}, WithSlots(tt.slots))
					// A supervisor starts it again within a second.
					p.start()
					ctx, cancel := context.WithCancel(context.Background())
					cl.serving.Go(func() {
						for sleep(ctx, time.Second) {
							p.restartIfDead()
						}
					})
					cl.stops = append(cl.stops, cancel)
					options = append(options, WithWorkers("a", addr))
				}
				tasks := tasksOf("a", 50)
				tasks[tt.at].Instruction = "poison"
				report, err := cl.run(t.Context(), cl.coordinator(options...), tasks)()
				deaths = len(cl.traced())
				for i, r := range report.Results {
					if i != tt.at && r.Outcome != Done {
						t.Errorf("task %d is %v: %v", i, r.Outcome, r.Err)
					}
				}
				r := report.Results[tt.at]
				if r.Outcome != Unknown || !errors.Is(r.Err, ErrOutcomeUnknown) || !errors.Is(err, ErrOutcomeUnknown) {
					t.Fatalf("the poison is %v: %v", r.Outcome, r.Err)
				}
				// The first loss is among many and proves nothing.
				if deaths != 1+maxStrikes || r.Losses != deaths || r.Attempts != deaths {
					t.Errorf("%d deaths, %d losses and %d attempts, want %d", deaths, r.Losses, r.Attempts, 1+maxStrikes)
				}
				var named []string
				for _, line := range cl.traced()[1:] {
					named = append(named, strings.TrimPrefix(line, "death on "))
				}
				if want := ", on " + strings.Join(named, ", ") + ", so "; !strings.Contains(r.Err.Error(), want) {
					t.Errorf("%v\ndoes not name the workers %s", r.Err, want)
				}
				checkTroubles(t, report)
			})
		})
	}
}

// restartIfDead starts the process again if it was killed.
func (p *process) restartIfDead() {
	p.mu.Lock()
	dead := p.dead
	p.mu.Unlock()
	if dead {
		p.start()
	}
}

// checkTroubles checks that a report's sums are those of its results.
func checkTroubles(t testing.TB, report *Report) {
	t.Helper()
	var sum Troubles
	for _, r := range report.Results {
		sum.Losses += r.Losses
		sum.Retries += r.Retries
	}
	got := report.Troubles
	if got.Losses != sum.Losses || got.Retries != sum.Retries {
		t.Errorf("the report has %+v, its results %+v", got, sum)
	}
	sum = Troubles{}
	sent, attempts := 0, 0
	for _, c := range report.Categories {
		sum.add(c.Troubles)
		redials := 0
		for _, w := range c.Workers {
			redials += w.Redials
			sent += w.Sent
		}
		if redials != c.Troubles.Redials {
			t.Errorf("category %s has %d redials, its workers %d", c.Category, c.Troubles.Redials, redials)
		}
	}
	for _, r := range report.Results {
		attempts += r.Attempts
	}
	if sum != got || sent != attempts {
		t.Errorf("the report has %+v, its categories %+v; sent %d in %d attempts", got, sum, sent, attempts)
	}
}

// hold reads RUNs, and when none has come for a second has each seen, and
// answers the first that is held. It ends with the connection.
func (p *peer) hold(seen func(held []string)) {
	runs := make(chan string)
	go func() {
		defer close(runs)
		for {
			line, err := p.in.ReadString('\n')
			if err != nil {
				return
			}
			if f := strings.Fields(line); f[0] == "RUN" {
				runs <- f[1]
			}
		}
	}()
	var held []string
	for {
		select {
		case task, ok := <-runs:
			if !ok {
				return
			}
			held = append(held, task)
		case <-time.After(time.Second):
			seen(held)
			if len(held) > 0 {
				io.WriteString(p.conn, "DONE "+held[0]+" 0\n")
				held = held[1:]
			}
		}
	}
}

func TestASuspectIsSentByASessionThatHoldsNoMoreThanItsSlots(t *testing.T) {
	for _, slots := range []int{1, 2, 5} {
		t.Run(fmt.Sprintf("%d slots", slots), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				suspects := make(map[string]bool)
				peak, peakSuspected := 0, 0
				cl.scripts("a:1", func(n int, p *peer) {
					p.expect("HELLO …")
					p.send(fmt.Sprintf(`WELCOME taskexec/1 {"slots":%d,"window":16}`, slots))
					if n == 0 {
						for range 16 {
							suspects[p.task()] = true
						}
						return
					}
					p.hold(func(held []string) {
						peak = max(peak, len(held))
						if slices.ContainsFunc(held, func(task string) bool { return suspects[task] }) {
							peakSuspected = max(peakSuspected, len(held))
						}
					})
				})
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute), withLeastWindow(16))
				report, err := cl.run(t.Context(), c, tasksOf("a", 60))()
				if err != nil || report.Troubles.Losses != 16 {
					t.Errorf("got %v and %+v", err, report.Troubles)
				}
				if peakSuspected != slots || peak != 16 {
					t.Errorf("%d tasks in flight beside a suspect, and %d otherwise; want %d and 16", peakSuspected, peak, slots)
				}
				checkTroubles(t, report)
			})
		})
	}
}

// The loss that gives a task up is one of it alone, whatever its worker's slots.
func TestATaskIsAloneBeforeItIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var c *Coordinator
		last := make(chan struct{})
		cl.scripts("a:1", func(n int, p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"slots":4}`)
			p.expect(fmt.Sprintf("RUN 0 %d 0 a0", n+1))
			if n < maxStrikes {
				return
			}
			close(last)
			time.Sleep(time.Second)
			if got := c.Snapshot()[0].Categories[0]; got.InFlight != 1 || got.Waiting != 3 {
				t.Errorf("%d tasks are in flight and %d wait, want the suspect alone", got.InFlight, got.Waiting)
			}
			p.send("DONE 0 0")
			p.expect("RUN 1 1 0 a1", "RUN 2 1 0 a2", "RUN 3 1 0 a3")
			p.send("DONE 1 0", "DONE 2 0", "DONE 3 0")
			p.expectEnd()
		})
		c = cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute), WithOrder(Concurrent))
		results, err := collect(c.Stream(t.Context(), func(yield func(Task) bool) {
			for i, task := range tasksOf("a", 4) {
				if i == 1 {
					<-last
				}
				if !yield(task) {
					return
				}
			}
		}))
		if err != nil || len(results) != 4 {
			t.Errorf("got %v and %v", results, err)
		}
	})
}

func TestASuspectGoesAtOnceToAWorkerThatHasASlotFree(t *testing.T) {
	// Of eight workers with one slot each, five hold one task for an hour and
	// could be given another by their window, one holds three, one is idle, and
	// one is lost with a task: that has to go to the idle one, whoever's turn
	// it is.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		options := []CoordinatorOption{WithWorkerWait(time.Minute), withLeastWindow(16)}
		for i, keeps := range []int{1, 1, 1, 0, 1, 1, 3} {
			addr := fmt.Sprintf("a:%d", i)
			options = append(options, WithWorkers("a", addr))
			cl.script(addr, func(p *peer) {
				p.expect("HELLO …")
				p.send(`WELCOME taskexec/1 {"slots":1,"window":16}`)
				held := []string{p.task(), p.task(), p.task()}
				time.Sleep(time.Second) // until all have theirs
				for _, task := range held[keeps:] {
					p.send("DONE " + task + " 0")
				}
				if keeps == 0 {
					p.hold(func([]string) {})
					return
				}
				go io.Copy(io.Discard, p.in) // RECALL is nothing to it
				time.Sleep(time.Hour)
				for _, task := range held[:keeps] {
					p.send("DONE " + task + " 0")
				}
			})
		}
		cl.script("lost:1", func(p *peer) {
			p.welcome()
			p.task()
			time.Sleep(time.Minute)
		})
		c := cl.coordinator(append(options, WithWorkers("a", "lost:1"))...)
		wait := cl.run(t.Context(), c, tasksOf("a", 22))
		time.Sleep(2 * time.Minute)
		if got := c.Snapshot()[0].Categories[0]; got.Waiting != 0 || got.InFlight != 8 || got.Troubles.Losses != 1 {
			t.Errorf("a minute after the loss: %+v, want the lost task done by the idle worker", got)
		}
		if _, err := wait(); err != nil {
			t.Error(err)
		}
	})
}

func TestWhatWaitsBehindASuspectGoesOnWhenAnotherHasTakenIt(t *testing.T) {
	// Task 0 was lost so often that it has to be alone. A worker with a long task
	// and a free slot has to leave it to another, and what follows it as well,
	// until the other is there.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		start := time.Now()
		at := func(d time.Duration) { time.Sleep(time.Until(start.Add(d))) }
		attempts := 0
		cl.scripts("one:1", func(_ int, p *peer) {
			if attempts == 3 && time.Since(start) < time.Minute {
				return
			}
			attempts++
			p.expect("HELLO …")
			if attempts == 1 {
				at(time.Second) // until the other has left
			}
			p.send("WELCOME taskexec/1 {}")
			p.expect(fmt.Sprintf("RUN 0 %d 0 a0", attempts))
			switch attempts {
			case 3:
				at(40 * time.Second)
			case 4:
				cl.log("after %v", time.Since(start))
				at(time.Hour)
				p.send("DONE 0 0")
				p.expectEnd()
			}
		})
		cl.scripts("two:1", func(n int, p *peer) {
			switch {
			case n == 0:
				p.welcome()
				p.send("GOODBYE")
			case time.Since(start) >= 10*time.Second:
				p.expect("HELLO …")
				p.send(`WELCOME taskexec/1 {"slots":2}`)
				p.expect("RUN 1 1 0 a1", "RUN 2 1 0 a2")
				at(50 * time.Second)
				p.send("DONE 2 0")
				p.expect("RUN 3 1 0 a3")
				cl.log("after %v", time.Since(start))
				p.send("DONE 3 0")
				at(time.Hour)
				p.send("DONE 1 0")
				p.expectEnd()
			}
		})
		c := cl.coordinator(WithWorkers("a", "one:1", "two:1"), WithWorkerWait(time.Minute))
		report, err := cl.run(t.Context(), c, tasksOf("a", 4))()
		if got := cl.traced(); err != nil || len(got) != 2 || got[0] != got[1] {
			t.Errorf("%v after %v; tasks 0 and 3 were taken %q, want both at once", err, report.Elapsed, got)
		}
	})
}

func TestAtMostOnceHoldsNoMoreThanSlotsAndSendsNothingLostAgain(t *testing.T) {
	for _, slots := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d slots", slots), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				peak := 0
				seen := make(map[string]int)
				cl.scripts("a:1", func(n int, p *peer) {
					p.expect("HELLO …")
					p.send(fmt.Sprintf(`WELCOME taskexec/1 {"slots":%d,"window":64,"worker":"number %d"}`, slots, n))
					if n < 3 {
						for range slots {
							seen[p.task()]++
						}
						return
					}
					p.hold(func(held []string) {
						peak = max(peak, len(held))
						if len(held) > 0 {
							seen[held[0]]++
						}
					})
				})
				tasks := tasksOf("a", 20)
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute), WithAtMostOnce(), WithWindow(64), WithOnFailure(KeepGoing))
				report, err := cl.run(t.Context(), c, tasks)()
				if peak != slots {
					t.Errorf("%d in flight, want %d", peak, slots)
				}
				for i, r := range report.Results {
					want := Done
					if i < 3*slots {
						want = Unknown
						if !errors.Is(r.Err, ErrOutcomeUnknown) || !strings.Contains(r.Err.Error(), "at most once") || !strings.Contains(r.Err.Error(), "number ") || r.Losses != 1 {
							t.Errorf("task %d: %v", i, r.Err)
						}
					}
					if r.Outcome != want || r.Attempts != 1 || seen[strconv.Itoa(i)] != 1 {
						t.Errorf("task %d is %v after %d attempts, sent %d times", i, r.Outcome, r.Attempts, seen[strconv.Itoa(i)])
					}
				}
				if !errors.Is(err, ErrOutcomeUnknown) {
					t.Errorf("got %v", err)
				}
				checkTroubles(t, report)
			})
		})
	}
}

func TestAtMostOnceKeepsItsWindowWhenASlotIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"slots":2,"window":64}`)
			p.expect("RUN 0 1 0 a0", "RUN 1 1 0 a1")
			p.send("FAIL 0 stuck 0 it goes on")
			p.hold(func(held []string) {
				if len(held) > 0 {
					t.Errorf("one slot is stuck, the other busy, and task %v is sent", held)
				}
			})
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := cl.coordinator(WithWorkers("a", "a:1"), WithAtMostOnce())
		report, _ := cl.run(ctx, c, tasksOf("a", 5))()
		if got, want := outcomes(report), "Failed Unknown Skipped Skipped Skipped"; got != want || report.Troubles.Stuck != 1 {
			t.Errorf("got %s, want %s", got, want)
		}
		for _, r := range report.Results {
			if r.Outcome == Unknown && !errors.Is(r.Err, ErrOutcomeUnknown) {
				t.Errorf("%v does not wrap ErrOutcomeUnknown", r.Err)
			}
		}
		checkTroubles(t, report)
	})
}

func TestAtMostOnceTriesAReportedFailureAgain(t *testing.T) {
	run := retried(t, func(_ context.Context, try int) (string, error) {
		if try < 3 {
			return "", errTold
		}
		return "", nil
	}, WithAtMostOnce(), WithRetry(Retry{Attempts: 3}))
	if r := run.report.Results[0]; r.Outcome != Done || r.Retries != 2 || r.Losses != 0 {
		t.Errorf("got %+v and %v", r, run.err)
	}
}

// A worker that is ended by its own context, as a program that gets SIGTERM
// ends it, says that it closes and no more: what its handlers then return is
// nobody's cancel.
func TestTasksOfAWorkerThatIsStoppedGoToAnother(t *testing.T) {
	for i := range 50 {
		synctest.Test(t, func(t *testing.T) {
			cl := newCluster(t)
			handler := func(ctx context.Context, task Task) (string, error) {
				select {
				case <-time.After(time.Second):
					return "", nil
				case <-ctx.Done():
					return "", context.Cause(ctx)
				}
			}
			stopped := NewWorker(HandlerFunc(handler), WithName("a:1"), WithSlots(4))
			ctx, cancel := context.WithCancelCause(context.Background())
			ln := cl.network.listen("a:1")
			cl.serving.Go(func() { stopped.Serve(ctx, ln) })
			cl.worker("a:2", handler, WithSlots(4))
			cl.after(time.Duration(500+i%2)*ms, func() { cancel(context.Canceled) })
			c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithWorkerWait(time.Minute))
			report, err := cl.run(t.Context(), c, tasksOf("a", 8))()
			if err != nil || report.Troubles.Losses != 4 {
				t.Errorf("got %v: %s with %+v", err, outcomes(report), report.Troubles)
			}
			cancel(nil)
		})
	}
}

// interval is one execution of a task.
type interval struct {
	worker     string
	start, end time.Time
}

// executions notes when tasks are executed.
type executions struct {
	mu sync.Mutex // guards following
	of map[string][]interval
}

// handler takes d for each task, unless it is canceled.
func (e *executions) handler(worker string, d time.Duration) HandlerFunc {
	return func(ctx context.Context, task Task) (string, error) {
		e.mu.Lock()
		if e.of == nil {
			e.of = make(map[string][]interval)
		}
		n := len(e.of[task.Instruction])
		e.of[task.Instruction] = append(e.of[task.Instruction], interval{worker: worker, start: time.Now()})
		e.mu.Unlock()
		defer func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.of[task.Instruction][n].end = time.Now()
		}()
		select {
		case <-time.After(d):
			return worker, nil
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// checkNoOverlap checks that no task was executed twice at a time, and how
// often each was.
func (e *executions) checkNoOverlap(t testing.TB, times map[string]int) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	for task, all := range e.of {
		want := 1
		if n, ok := times[task]; ok {
			want = n
		}
		if len(all) != want {
			t.Errorf("%s was executed %d times, want %d: %v", task, len(all), want, all)
		}
		for i := range all[1:] {
			if all[i].end.IsZero() || all[i].end.After(all[i+1].start) {
				t.Errorf("%s was started on %s at %v, before it had ended on %s at %v", task, all[i+1].worker, all[i+1].start, all[i].worker, all[i].end)
			}
		}
	}
}

func TestAHoleInTheNetworkLeavesNoTaskWithTwoOwners(t *testing.T) {
	for _, tt := range []struct {
		reason string
		dig    func(r *relay)
	}{
		{"nothing reaches the worker", func(r *relay) { r.toWorker.open.Store(true) }},
		{"nothing reaches the coordinator", func(r *relay) { r.toCoordinator.open.Store(true) }},
		{"nothing goes either way", func(r *relay) { r.toWorker.open.Store(true); r.toCoordinator.open.Store(true) }},
	} {
		// At any moment between two PINGs.
		for _, after := range []time.Duration{0, 1, 300 * ms, 999 * ms, time.Second, 1700 * ms, 4 * time.Second, 5 * time.Second, 5001 * ms} {
			t.Run(fmt.Sprintf("%s after %v", tt.reason, after), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					cl := newCluster(t)
					var e executions
					cl.worker("behind:1", e.handler("behind:1", time.Hour), WithSlots(2))
					r := cl.relay("a:1", "behind:1")
					cl.worker("a:2", e.handler("a:2", time.Minute), WithSlots(2))
					start := time.Now()
					var lost time.Duration
					held := 0
					c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithHeartbeat(time.Second, 10*time.Second), WithWorkerWait(time.Minute),
						WithObserver(Observer{SessionLost: func(i SessionLostInfo) {
							if i.Addr == "a:1" && lost == 0 {
								lost, held = time.Since(start), i.Lost
							}
						}}))
					cl.after(10*time.Second+after, func() { tt.dig(r) })
					report, err := cl.run(t.Context(), c, tasksOf("a", 4))()
					if err != nil {
						t.Error(err)
					}
					twice := make(map[string]int)
					for _, r := range report.Results {
						if r.Losses > 0 {
							twice[r.Task.Instruction] = 2
						}
					}
					if len(twice) != 2 || held != 2 || lost == 0 || lost > 10*time.Second+after+11*time.Second {
						t.Errorf("lost after %v, with %d tasks, said to be %d; want 2 within the timeout", lost, len(twice), held)
					}
					e.checkNoOverlap(t, twice)
				})
			})
		}
	}
}

func TestASilentWorkerIsDeadAfterTheTimeoutAndWhatItSaysThenDoesNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		for _, addr := range []string{"a:1"} {
			cl.scripts(addr, func(n int, p *peer) {
				p.expect("HELLO …")
				p.send(`WELCOME taskexec/1 {"heartbeat":true}`)
				if n > 0 {
					p.expect("RUN 0 2 0 a0")
					time.Sleep(3 * time.Second) // less than a heartbeat
					p.send("DONE 0 0 in time")
					p.expectEnd()
					return
				}
				p.expect("RUN 0 1 0 a0", "PING 1", "PING 2")
				// The coordinator's last words have a second to be read.
				time.Sleep(5500 * ms)
				io.WriteString(p.conn, "DONE 0 0 late\n")
				p.expect("ERROR timeout nothing heard for 15s")
			})
		}
		var lost []time.Duration
		start := time.Now()
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute), WithObserver(Observer{SessionLost: func(i SessionLostInfo) {
			lost = append(lost, time.Since(start))
			if !strings.Contains(i.Err.Error(), "nothing heard for 15s") {
				t.Errorf("lost because of %v", i.Err)
			}
		}}))
		report, err := cl.run(t.Context(), c, tasksOf("a", 1))()
		if r := report.Results[0]; err != nil || r.Output != "in time" || r.Losses != 1 {
			t.Errorf("got %+v and %v", r, err)
		}
		if len(lost) != 1 || lost[0] != 15*time.Second {
			t.Errorf("lost at %v, want once after 15s", lost)
		}
	})
}

func TestASilentWorkerIsDeadAfterTheTimeoutThoughNoHeartbeatIsDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"heartbeat":true}`)
			p.expect("RUN 0 1 0 a0", "PING 1", "PING 2", "ERROR timeout nothing heard for 10s")
			p.expectEnd()
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithAtMostOnce(), WithHeartbeat(4*time.Second, 10*time.Second))
		report, _ := cl.run(t.Context(), c, tasksOf("a", 1))()
		if got := outcomes(report); got != "Unknown" || report.Elapsed != 10*time.Second {
			t.Errorf("got %s after %v, want Unknown after 10s", got, report.Elapsed)
		}
	})
}

func TestALateReportIsNotTheReasonWhyAWorkerSaidNoGoodbye(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"heartbeat":true}`)
			p.expect("RUN …", "PING 1", "PING 2")
			time.Sleep(5500 * ms)
			io.WriteString(p.conn, "DONE 0 0 late\nDONE 1 0 late\n")
			p.expect("ERROR timeout nothing heard for 15s")
		})
		cl.worker("a:2", func(context.Context, Task) (string, error) { time.Sleep(time.Minute); return "", nil })
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithWorkerShutdown())
		_, err := cl.run(t.Context(), c, tasksOf("a", 2))()
		if err == nil || !strings.Contains(err.Error(), "not told to shut down: protocol error (timeout): nothing heard for 15s") {
			t.Errorf("got %v", err)
		}
	})
}

func TestAWorkerThatOffersNoHeartbeatMayBeSilentForAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.welcome()
			p.expect("RUN 0 1 0 a0")
			time.Sleep(time.Hour)
			p.send("DONE 0 0")
			p.expectEnd() // and no PING meanwhile
		})
		report, err := cl.run(t.Context(), cl.coordinator(WithWorkers("a", "a:1")), tasksOf("a", 1))()
		if err != nil || report.Elapsed != time.Hour {
			t.Errorf("%v after %v", err, report.Elapsed)
		}
	})
}

func TestAnySignOfLifeCounts(t *testing.T) {
	for _, tt := range []struct {
		reason string
		play   func(p *peer)
	}{
		{"it pings, and answers nothing", func(p *peer) {
			go io.Copy(io.Discard, p.in)
			for i := range 100 {
				time.Sleep(14 * time.Second)
				p.send(fmt.Sprintf("PING %d", i))
			}
			p.send("DONE 0 0 end")
		}},
		{"it sends one long line slowly", func(p *peer) {
			go io.Copy(io.Discard, p.in)
			io.WriteString(p.conn, "DONE 0 0 e")
			for range 100 {
				time.Sleep(14 * time.Second)
				io.WriteString(p.conn, "n")
			}
			io.WriteString(p.conn, "d\n")
		}},
		{"it answers PINGs only", func(p *peer) {
			p.t = quiet{p.t}
			for i := 0; ; i++ {
				line := p.next()
				if line == "" {
					return
				}
				if n, ok := strings.CutPrefix(line, "PING "); ok {
					p.send("PONG " + n)
				}
				if i == 100 {
					p.send("DONE 0 0 end")
				}
			}
		}},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", func(p *peer) {
					p.expect("HELLO …")
					p.send(`WELCOME taskexec/1 {"heartbeat":true}`)
					p.expect("RUN 0 1 0 a0")
					tt.play(p)
					io.Copy(io.Discard, p.conn)
				})
				report, err := cl.run(t.Context(), cl.coordinator(WithWorkers("a", "a:1")), tasksOf("a", 1))()
				if err != nil || report.Results[0].Attempts != 1 || report.Elapsed < 5*time.Minute {
					t.Errorf("%v after %v", err, report.Elapsed)
				}
			})
		})
	}
}

func TestALeaseIsRenewedByNothingButAnEcho(t *testing.T) {
	for _, tt := range []struct {
		reason string
		say    func(p *peer, ping string) // for each PING of the worker
		lives  bool
	}{
		{"its PINGs are answered", func(p *peer, n string) { p.send("PONG " + n) }, true},
		{"nothing is said", func(*peer, string) {}, false},
		{"PINGs of the coordinator", func(p *peer, n string) { p.send("PING 1") }, false},
		{"a PONG to a PING never sent", func(p *peer, n string) { p.send("PONG 1000000") }, false},
		{"the PONG to the first, again and again", func(p *peer, n string) { p.send("PONG 1") }, false},
		{"the PONG to the first, late: its time is that of the PING", func(p *peer, n string) {
			if n == "1" {
				time.Sleep(3 * time.Second)
				p.send("PONG 1")
			}
		}, false},
		{"RECALLs", func(p *peer, n string) { p.send("RECALL 77") }, false},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				canceled := make(chan error, 1)
				wt := startWorker(t, HandlerFunc(func(ctx context.Context, _ Task) (string, error) {
					select {
					case <-ctx.Done():
						canceled <- context.Cause(ctx)
						return "", ctx.Err()
					case <-time.After(time.Hour):
						return "", nil
					}
				}))
				p := wt.stranger()
				start := time.Now()
				p.send(`HELLO taskexec/1 {"run":"r","category":"a","timeout_ms":10000}`)
				p.expect("WELCOME …")
				p.send("RUN 0 1 0 x")
				for {
					line := p.next()
					if n, ok := strings.CutPrefix(line, "PING "); ok {
						tt.say(p, n)
						continue
					}
					want := "ERROR timeout no answer to a PING for 8s"
					if tt.lives {
						want = "DONE 0 3600000000"
					}
					if line == "PONG 1" {
						continue
					}
					if line != want {
						t.Errorf("got %q, want %q", line, want)
					}
					break
				}
				took := time.Since(start)
				if tt.lives {
					if took != time.Hour {
						t.Errorf("done after %v", took)
					}
					return
				}
				// Counted from WELCOME, or from when the first PING was sent.
				want := 8 * time.Second
				if strings.Contains(tt.reason, "first") {
					want += 10 * time.Second / 3
				}
				if took != want || <-canceled != errLeaseOver {
					t.Errorf("over after %v, want %v", took, want)
				}
			})
		})
	}
}

func TestPingsThatWereAnsweredAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, parrot)
		p := wt.stranger()
		p.send(`HELLO taskexec/1 {"category":"a","timeout_ms":10000}`)
		p.expect("WELCOME taskexec/1 …")
		for n := range 100 {
			p.expect(fmt.Sprint("PING ", n+1))
			if n%2 == 1 { // one PONG may be lost in a busy peer, and the next counts for both
				p.send(fmt.Sprint("PONG ", n+1))
			}
		}
		synctest.Wait()
		s := wt.only()
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.pings) != 0 {
			t.Errorf("%d PINGs are remembered", len(s.pings))
		}
	})
}

// A leaseEnd is when and why a handler's ctx ended.
type leaseEnd struct {
	at    time.Time
	cause error
}

// startLeased starts a worker whose handler waits for its ctx to end, and greets
// it for a coordinator that is patient for ten seconds.
func startLeased(t *testing.T) (*peer, *leaseEnd) {
	var over leaseEnd
	wt := startWorker(t, HandlerFunc(func(ctx context.Context, _ Task) (string, error) {
		<-ctx.Done()
		over = leaseEnd{time.Now(), context.Cause(ctx)}
		return "", ctx.Err()
	}))
	p := wt.stranger()
	p.send(`HELLO taskexec/1 {"category":"a","timeout_ms":10000}`)
	p.expect("WELCOME taskexec/1 …")
	return p, &over
}

func TestALeaseEndsInTimeThoughALineHasBegun(t *testing.T) {
	// The link breaks in both directions when part of a line has come. All that
	// the coordinator can have heard by then it heard before.
	for _, tt := range []struct {
		reason string
		begun  int // bytes of the line, a second after WELCOME
		ends   time.Duration
	}{
		{"few bytes prove nothing", 1000, 8 * time.Second},
		{"nor does a chunk, since PINGs go between two", 64 << 10, 8 * time.Second},
		{"a long line has stopped arriving when nothing has come for as long as a lease", 100 << 10, 9 * time.Second},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, over := startLeased(t)
				start := time.Now()
				p.send("RUN 0 1 0 x")
				time.Sleep(time.Second)
				const run = "RUN 1 1 0 "
				io.WriteString(p.conn, run+strings.Repeat("y", tt.begun-len(run)))
				io.Copy(io.Discard, p.in)
				synctest.Wait()
				if took := over.at.Sub(start); took != tt.ends || over.cause != errLeaseOver {
					t.Errorf("the handler's ctx ended after %v with %v, want %v and %v", took, over.cause, tt.ends, errLeaseOver)
				}
			})
		})
	}
}

func TestALeaseGoesOnWithAnAnswerThatComesAfterTheNextPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, over := startLeased(t)
		p.send("RUN 0 1 0 x")
		end := time.Now().Add(time.Minute)
		for time.Now().Before(end) { // there is a PING every 10/3 s
			var n int
			if _, err := fmt.Sscanf(p.next(), "PING %d", &n); err != nil {
				t.Fatalf("after %v: %v", time.Minute-time.Until(end), err)
			}
			time.AfterFunc(4500*time.Millisecond, func() { fmt.Fprintln(p.conn, "PONG", n) })
		}
		if over.cause != nil {
			t.Errorf("the handler's ctx has ended with %v", over.cause)
		}
	})
}

func TestALeaseEndsInTimeAfterALongLineWasWritten(t *testing.T) {
	// No PING could be sent within the line, but the coordinator has heard nothing
	// since its end.
	synctest.Test(t, func(t *testing.T) {
		const size = 512 << 10
		var over leaseEnd
		wt := startWorker(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			if task.Instruction == "long" {
				return strings.Repeat("o", size), nil
			}
			<-ctx.Done()
			over = leaseEnd{time.Now(), context.Cause(ctx)}
			return "", ctx.Err()
		}), WithSlots(2))
		p := wt.stranger()
		p.send(`HELLO taskexec/1 {"category":"a","timeout_ms":10000}`)
		p.expect("WELCOME taskexec/1 …")
		p.send("RUN 0 1 0 x", "RUN 1 1 0 long")
		chunk := make([]byte, 32<<10)
		for n := 0; n < size; { // 20 s
			got, err := p.in.Read(chunk)
			if err != nil {
				t.Fatal(err)
			}
			n += got
			time.Sleep(time.Duration(got) * 20 * time.Second / size)
		}
		if over.cause != nil {
			t.Fatalf("the handler's ctx has ended within the line, with %v", over.cause)
		}
		heard := time.Now()
		time.AfterFunc(time.Minute, func() { p.conn.Close() })
		io.Copy(io.Discard, p.in)
		synctest.Wait()
		if took := over.at.Sub(heard); took > 8*time.Second || over.cause != errLeaseOver {
			t.Errorf("the handler's ctx ended %v after the line with %v, want at most 8s and %v", took, over.cause, errLeaseOver)
		}
	})
}

func TestPingsAreAnsweredWhileAllSlotsAreBusyAndWhileDraining(t *testing.T) {
	// The handlers take longer than the peer's patience by far.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var e executions
		w := cl.worker("a:1", e.handler("a:1", time.Hour), WithSlots(2))
		cl.worker("a:2", e.handler("a:2", time.Hour), WithSlots(2))
		cl.after(time.Minute, func() { go w.Shutdown(context.Background()) })
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithHeartbeat(time.Second, 3*time.Second), WithWorkerWait(time.Minute), withLeastWindow(64))
		report, err := cl.run(t.Context(), c, tasksOf("a", 8))()
		if err != nil || report.Troubles.Losses != 0 || report.Troubles.Returns == 0 {
			t.Errorf("got %v and %+v", err, report.Troubles)
		}
		e.checkNoOverlap(t, nil)
		checkTroubles(t, report)
	})
}

func TestABigLineOnASlowLinkEndsNeitherSide(t *testing.T) {
	// A line of some 300 KiB at 10 KiB/s takes longer than all timeouts, and
	// its end may come at any moment between two PINGs.
	slowly := func(p []byte, write func(p []byte) error) {
		for len(p) > 0 {
			n := min(len(p), 1<<10)
			time.Sleep(time.Second / 10)
			if write(p[:n]) != nil {
				return
			}
			p = p[n:]
		}
	}
	for _, tt := range []struct {
		reason              string
		instruction, output int // 1 if big
		dig                 func(r *relay)
	}{
		{"a big instruction", 1, 0, func(r *relay) { r.toWorker.delay = slowly }},
		{"a big output", 0, 1, func(r *relay) { r.toCoordinator.delay = slowly }},
		{"both", 1, 1, func(r *relay) { r.toWorker.delay, r.toCoordinator.delay = slowly, slowly }},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			for size := 300 << 10; size < 350<<10; size += 5 << 10 {
				synctest.Test(t, func(t *testing.T) {
					cl := newCluster(t)
					output := strings.Repeat("o", 1+tt.output*size)
					cl.worker("behind:1", func(_ context.Context, task Task) (string, error) {
						cl.log("executed")
						return output, nil
					})
					tt.dig(cl.relay("a:1", "behind:1"))
					tasks := []Task{{Category: "a", Instruction: strings.Repeat("i", 1+tt.instruction*size)}, {Category: "a", Instruction: "small"}}
					c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute))
					report, err := cl.run(t.Context(), c, tasks)()
					if err != nil || report.Troubles != (Troubles{}) || len(cl.traced()) != 2 || report.Results[0].Output != output {
						t.Errorf("%d bytes: got %v and %+v after %v", size, err, report.Troubles, report.Elapsed)
					}
					if report.Elapsed < 30*time.Second {
						t.Errorf("the link is not slow: it took %v", report.Elapsed)
					}
				})
			}
		})
	}
}

// pingedConn has read the answer to a PING before it returns from writing it.
type pingedConn struct{ net.Conn }

func (c pingedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if strings.HasPrefix(string(p), "PING ") {
		synctest.Wait()
	}
	return n, err
}

func TestAPingThatWasAnsweredAtOnceDoesNotMakeTheNextLate(t *testing.T) {
	// The next waits behind a line that takes longer than all timeouts.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"heartbeat":true}`)
			p.expect("RUN 0 1 0 short", "PING 1")
			p.send("PONG 1\nDONE 0 0")
			for range 5 {
				time.Sleep(4 * time.Second)
				io.CopyN(io.Discard, p.in, 64<<10)
			}
			p.expect("xxx…", "PING 2")
			p.send("PONG 2\nDONE 1 0")
			io.Copy(io.Discard, p.in)
		})
		dialer := WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := cl.dial(ctx, network, addr)
			return pingedConn{conn}, err
		})
		tasks := []Task{{Category: "a", Instruction: "short"}, {Category: "a", Instruction: strings.Repeat("x", 340<<10)}}
		if _, err := cl.coordinator(WithWorkers("a", "a:1"), dialer).Run(t.Context(), tasks); err != nil {
			t.Error(err)
		}
	})
}

func TestAWorkersShutdownDuringARunGivesBackWhatItHasNotStarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var e executions
		w := cl.worker("a:1", e.handler("a:1", 10*time.Second))
		cl.worker("a:2", e.handler("a:2", 10*time.Second))
		cl.after(15*time.Second, func() { go w.Shutdown(context.Background()) })
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithWorkerWait(time.Minute), WithRetry(Retry{Attempts: 2}), withLeastWindow(64))
		report, err := cl.run(t.Context(), c, tasksOf("a", 20))()
		if err != nil || report.Troubles.Losses != 0 || report.Troubles.Retries != 0 || report.Troubles.Returns != 8 {
			t.Errorf("got %v and %+v, want the 8 that a:1 had not started back", err, report.Troubles)
		}
		// Two by the one that left, and the others one after the other.
		if report.Elapsed != 180*time.Second {
			t.Errorf("took %v, want 180s", report.Elapsed)
		}
		e.checkNoOverlap(t, nil)
		checkTroubles(t, report)
	})
}

func TestARollingRestartLosesAndRepeatsNothing(t *testing.T) {
	for _, order := range []Order{ByCategory, ByInput} {
		for _, atMostOnce := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, at most once %v", order, atMostOnce), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					cl := newCluster(t)
					var e executions
					options := []CoordinatorOption{WithOrder(order), WithWorkerWait(time.Minute)}
					if atMostOnce {
						options = append(options, WithAtMostOnce())
					}
					var all []*process
					for i := range 3 {
						addr := fmt.Sprintf("a:%d", i)
						all = append(all, cl.process(addr, e.handler(addr, time.Second), WithSlots(2)))
						options = append(options, WithWorkers("a", addr))
					}
					cl.after(4500*ms, func() {
						go func() {
							for range 3 {
								for _, p := range all {
									if err := p.current().Shutdown(context.Background()); err != nil {
										t.Error(err)
									}
									p.start()
								}
							}
						}()
					})
					tasks := tasksOf("a", 200)
					if order == ByInput {
						tasks = tasks[:40]
					}
					report, err := cl.run(t.Context(), cl.coordinator(options...), tasks)()
					if err != nil || report.Troubles.Losses != 0 || report.Troubles.Redials < 3 {
						t.Errorf("got %v and %+v", err, report.Troubles)
					}
					if len(e.of) != len(tasks) {
						t.Errorf("%d tasks were executed, want %d", len(e.of), len(tasks))
					}
					e.checkNoOverlap(t, nil)
					checkTroubles(t, report)
				})
			})
		}
	}
}

// A rolling restart in which the new worker listens before the old one has
// finished its last task, which takes longer than a run waits for a worker.
func TestAWorkerThatDrainsIsFollowedBesideItsLastTask(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var e executions
		quick, slow := e.handler("a:1", time.Second), e.handler("a:1", time.Hour)
		p := cl.process("a:1", func(ctx context.Context, task Task) (string, error) {
			if info, _ := TaskInfoFrom(ctx); info.Task == 0 {
				return slow(ctx, task)
			}
			return quick(ctx, task)
		})
		var redialed WorkerSnapshot
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(30*time.Second))
		cl.after(10*time.Second, func() {
			go p.current().Shutdown(context.Background())
			synctest.Wait()
			p.start()
		})
		cl.after(30*time.Minute, func() { redialed = c.Snapshot()[0].Categories[0].Workers[0] })
		report, err := cl.run(t.Context(), c, tasksOf("a", 6))()
		if err != nil || report.Elapsed != time.Hour || report.Troubles.Losses != 0 || report.Troubles.Redials != 1 {
			t.Errorf("got %v after %v, with %+v", err, report.Elapsed, report.Troubles)
		}
		for i, r := range report.Results[1:] {
			if r.Queued > time.Minute {
				t.Errorf("task %d waited for %v", i+1, r.Queued)
			}
		}
		synctest.Wait()
		redialed.Worker, redialed.Sent = "", 0
		if want := (WorkerSnapshot{Addr: "a:1", Open: true, InFlight: 1, Redials: 1, Counts: Counts{Done: 5}}); redialed != want {
			t.Errorf("half an hour later the worker is %+v, want %+v", redialed, want)
		}
		e.checkNoOverlap(t, nil)
		checkTroubles(t, report)
	})
}

// A supervisor starts a worker again a second after it has ended, as most do. That
// nobody was there before is neither logged as a warning nor makes the run find
// it late.
func TestAWorkerThatIsRestartedWhenItsDrainIsOverIsFoundSoon(t *testing.T) {
	for _, tt := range []struct {
		reason string
		order  Order
		takes  time.Duration
		wait   time.Duration
		most   time.Duration
		jitter func(time.Duration) time.Duration
	}{
		{"a task waits while the worker drains", ByCategory, 26 * time.Second, 30 * time.Second, 54 * time.Second, longest},
		{"none does before that is over", ByInput, 54 * time.Second, 5 * time.Second, 110 * time.Second, longest},
		{"the last dial in vain was early in its slot", ByCategory, 26 * time.Second, 30 * time.Second, 54 * time.Second, none},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				var e executions
				p := cl.process("a:1", e.handler("a:1", tt.takes))
				log := newLogRecorder(slog.LevelWarn)
				warnings := -1
				cl.after(time.Second, func() {
					go func() {
						p.current().Shutdown(context.Background())
						warnings = len(log.all())
						time.Sleep(time.Second)
						p.start()
					}()
				})
				times, dialer := cl.dialTimes()
				c := cl.coordinator(WithWorkers("a", "a:1"), WithOrder(tt.order), WithWorkerWait(tt.wait), dialer,
					withJitter(tt.jitter), WithLogger(slog.New(log)))
				report, err := cl.run(t.Context(), c, tasksOf("a", 2))()
				if err != nil || report.Elapsed > tt.most || report.Troubles.Losses != 0 {
					t.Errorf("got %v after %v, with %+v; dialed at %v", err, report.Elapsed, report.Troubles, times.of("a:1"))
				}
				synctest.Wait()
				if dials := len(times.of("a:1")); warnings != 0 || dials < 5 {
					t.Errorf("%d warnings while the worker drained, and %d dials in all", warnings, dials)
				}
			})
		})
	}
}

// An address that leads to one of many workers, which are restarted one after
// another behind tasks that take long.
func TestWorkersThatDrainBehindLongTasksAreEachFollowedAtOnce(t *testing.T) {
	for _, tt := range []struct {
		takes  time.Duration
		drains int
	}{
		{time.Hour, mostDraining},            // all beside one another
		{30 * time.Second, 2 * mostDraining}, // two at most
	} {
		t.Run(tt.takes.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				var e executions
				p := cl.process("a:1", e.handler("a:1", tt.takes))
				want := []time.Duration{0}
				for i := range tt.drains {
					at := time.Duration(i+1) * 20 * time.Second
					cl.after(at, func() {
						go p.current().Shutdown(context.Background())
						synctest.Wait()
						p.start()
					})
					want = append(want, at+100*ms)
				}
				times, dialer := cl.dialTimes()
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(5*time.Second), dialer, withJitter(longest))
				report, err := cl.run(t.Context(), c, tasksOf("a", tt.drains+2))()
				if err != nil || report.Troubles.Losses != 0 {
					t.Errorf("got %v after %v, with %+v", err, report.Elapsed, report.Troubles)
				}
				if diff := cmp.Diff(want, times.of("a:1")); diff != "" {
					t.Errorf("dialed at (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestAFollowerThatHasNotDialedUsesNoSlotUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		times, dialer := cl.dialTimes()
		cl.scripts("a:1", func(n int, p *peer) {
			p.welcome()
			task := p.task()
			if n == 4 {
				p.send("DONE " + task + " 0")
				p.expectEnd()
				return
			}
			p.send("DRAIN")
			time.Sleep(ms)
			p.send("RETURN "+task, "GOODBYE")
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute), dialer, withJitter(longest))
		report, err := cl.run(t.Context(), c, tasksOf("a", 1))()
		if most := (100 + 200 + 400 + 800 + 10) * ms; err != nil || report.Elapsed > most {
			t.Errorf("got %v after %v, want at most %v; dialed at %v", err, report.Elapsed, most, times.of("a:1"))
		}
	})
}

// The dial beside a drain hangs, and is given up when the drain is over.
func TestThatAFollowerWasStoppedIsNoReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.scripts("a:1", func(_ int, p *peer) {
			p.welcome()
			task := p.task()
			p.send("DRAIN")
			time.Sleep(time.Second)
			p.send("DONE "+task+" 0", "GOODBYE")
		})
		var dials atomic.Int32
		dialer := WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dials.Add(1) == 1 {
				return cl.dial(ctx, network, addr)
			}
			<-ctx.Done()
			return nil, context.Cause(ctx)
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(5*time.Second), dialer)
		_, err := cl.run(t.Context(), c, tasksOf("a", 2))()
		if !errors.Is(err, ErrNoWorker) || strings.Contains(err.Error(), "canceled") || dials.Load() < 3 {
			t.Errorf("got %v after %d dials", err, dials.Load())
		}
	})
}

// As a test's dialer does that calls FailNow.
func TestADialerThatEndsItsGoroutineHoldsUpNoRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.welcome()
			p.expect("RUN 0 1 0 a0")
			p.send("DRAIN")
			time.Sleep(time.Minute)
			p.send("DONE 0 0", "GOODBYE")
			p.expectEnd()
		})
		dials := 0
		dialer := WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dials++; dials > 1 {
				runtime.Goexit()
			}
			return cl.dial(ctx, network, addr)
		})
		report, err := cl.run(t.Context(), cl.coordinator(WithWorkers("a", "a:1"), dialer), tasksOf("a", 1))()
		if err != nil || report.Elapsed != time.Minute || dials != 2 {
			t.Errorf("got %v after %v and %d dials", err, report.Elapsed, dials)
		}
	})
}

func TestAWrongWorkerThatFollowsADrainIsWarnedOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.scriptsBeside("a:1", func(n int, p *peer) {
			if n > 0 {
				p.expect("HELLO …")
				p.send(`WELCOME taskexec/1 {"categories":["b"]}`)
				io.Copy(io.Discard, p.conn)
				return
			}
			p.welcome()
			task := p.task()
			p.send("DRAIN")
			time.Sleep(time.Hour)
			p.send("DONE "+task+" 0", "GOODBYE")
		})
		log := newLogRecorder(slog.LevelWarn)
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute), WithLogger(slog.New(log)))
		cl.run(t.Context(), c, tasksOf("a", 1))()
		if !slices.ContainsFunc(log.all(), func(r logRecord) bool { return r.text == "worker not reached" }) {
			t.Errorf("no warning in an hour: %v", log.all())
		}
	})
}

func TestAWorkerThatDrainsOverAndOverAndNeverLeavesIsNotFollowedForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		times, dialer := cl.dialTimes()
		cl.scriptsBeside("a:1", func(_ int, p *peer) {
			p.welcome()
			p.send("DRAIN", "DONE "+p.task()+" 0")
			io.Copy(io.Discard, p.conn)
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(30*time.Second), dialer, withJitter(longest))
		report, err := cl.run(t.Context(), c, tasksOf("a", 100))()
		if dials := len(times.of("a:1")); !errors.Is(err, ErrNoWorker) || dials != mostDraining+1 || report.Counts.Done != dials {
			t.Errorf("got %v and %+v after %d dials, want one more than %d, and a task done by each", err, report.Counts, dials, mostDraining)
		}
	})
}

func TestAWorkerThatSaysTwiceThatItDrainsIsFollowedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		times, dialer := cl.dialTimes()
		ln := cl.network.listen("a:1")
		cl.stops = append(cl.stops, func() { ln.Close() })
		session := func() *peer {
			conn, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			p := newPeer(t, conn)
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"worker":"w"}`)
			return p
		}
		cl.serving.Go(func() {
			first := session()
			first.expect("RUN 0 1 …")
			first.send("DRAIN", "DRAIN")
			second := session()
			second.expect("RUN 1 1 …")
			second.send("DONE 1 0")
			time.Sleep(time.Minute)
			first.send("DONE 0 0", "GOODBYE")
			first.expectEnd()
			second.expectEnd()
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Second), dialer)
		report, err := cl.run(t.Context(), c, tasksOf("a", 2))()
		if err != nil || len(times.of("a:1")) != 2 {
			t.Errorf("got %v and %+v; dialed at %v", err, report.Troubles, times.of("a:1"))
		}
	})
}

// shutdowns counts how often workers that a test plays were told to shut down.
func TestAWorkerThatWasToldToShutDownIsNotDialedAgain(t *testing.T) {
	// It serves two categories of the run's three, and a supervisor starts it
	// again whenever it ends.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		times, dialer := cl.dialTimes()
		instances, told := 0, 0
		ended := make(chan struct{})
		p := cl.lateProcess("w:1", echo)
		p.start()
		cl.worker("c:1", func(context.Context, Task) (string, error) { time.Sleep(time.Hour); return "", nil })
		go func() {
			for {
				w := p.current()
				instances++
				select {
				case <-w.drained:
					told++
					time.Sleep(time.Second)
					p.start()
				case <-ended:
					return
				}
			}
		}()
		c := cl.coordinator(WithWorkers("a", "w:1"), WithWorkers("b", "w:1"), WithWorkers("c", "c:1"),
			WithWorkerShutdown(), WithWorkerWait(time.Minute), dialer)
		_, err := cl.run(t.Context(), c, mustParse(t, "a1 b1 c1 c2"))()
		if err != nil {
			t.Error(err)
		}
		close(ended)
		synctest.Wait()
		if told != 1 || len(times.of("w:1")) != 2 {
			t.Errorf("%d of %d instances were told to shut down; dialed at %v", told, instances, times.of("w:1"))
		}
	})
}

func TestARestartedWorkerIsToldToShutDownWhenNoStageNeedsIt(t *testing.T) {
	for _, first := range []string{"a", "b"} { // whose link finds it again first
		t.Run(first, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				var goodbyes []string
				var p *process
				p = cl.process("w:1", func(ctx context.Context, task Task) (string, error) {
					if info, _ := TaskInfoFrom(ctx); task.Instruction == "a1" && info.Attempt == 1 {
						time.Sleep(time.Second)
						p.kill()
						p.start()
						return "", ctx.Err()
					}
					return "", nil
				})
				// The links of both categories dial with delays of their own.
				var dials atomic.Int64
				jitter := func(most time.Duration) time.Duration {
					if dials.Add(1) == 1 {
						return 0
					}
					return most
				}
				c := cl.coordinator(WithWorkers("a", "w:1"), WithWorkers("b", "w:1"), WithWorkerShutdown(), WithWorkerWait(time.Minute),
					withJitter(jitter), WithObserver(Observer{Goodbye: func(i GoodbyeInfo) { goodbyes = append(goodbyes, i.Category) }}))
				report, err := cl.run(t.Context(), c, mustParse(t, "a1 b1"))()
				if err != nil {
					t.Error(err)
				}
				// One is lost, and another if b's session has not noticed yet.
				if len(goodbyes) != 1 || report.Troubles.Losses < 1 {
					t.Errorf("goodbyes of %v, and %+v; want one", goodbyes, report.Troubles)
				}
				time.Sleep(2 * time.Second) // what last words take at most
				if old := p.current(); old.Stats().Sessions != 0 {
					t.Errorf("the worker has sessions: %+v", old.Stats())
				}
			})
		})
	}
}

// The link of one category may find a worker that was restarted before that of
// another has noticed that the worker it knew is gone.
func TestARestartedWorkerIsNotToldToShutDownWhileALaterStageKnowsTheOldOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var sessionsOfB atomic.Int32
		cl.scriptsBeside("w:1", func(_ int, p *peer) {
			if strings.Contains(p.next(), `"category":"a"`) {
				p.send(`WELCOME taskexec/1 {"instance":"new"}`)
				p.send("DONE " + p.task() + " 0")
				p.expect("SHUTDOWN")
				cl.log("told")
				p.send("GOODBYE")
				return
			}
			if sessionsOfB.Add(1) == 1 {
				p.send(`WELCOME taskexec/1 {"instance":"old"}`)
				p.task()
				time.Sleep(time.Second)
				return
			}
			p.send(`WELCOME taskexec/1 {"instance":"new"}`)
			task := p.task()
			cl.log("b is done")
			p.send("DONE " + task + " 0")
			io.Copy(io.Discard, p.in)
		})
		c := cl.coordinator(WithWorkers("a", "w:1"), WithWorkers("b", "w:1"), WithWorkerShutdown(), WithWorkerWait(time.Minute))
		_, err := cl.run(t.Context(), c, mustParse(t, "a1 b1"))()
		if diff := cmp.Diff([]string{"b is done", "told"}, cl.traced()); diff != "" || err != nil {
			t.Errorf("%v; (-want +got):\n%s", err, diff)
		}
	})
}

// Both sessions with a worker are lost when it is restarted, and only one has
// been followed by another when the run ends: the worker has been told.
func TestARestartedWorkerThatOneOfItsCategoriesHasFoundIsToldToShutDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var sessions [2]atomic.Int32 // of each category
		restarted := make(chan struct{})
		cl.scriptsBeside("w:1", func(_ int, p *peer) {
			a := strings.Contains(p.next(), `"category":"a"`)
			var n int32
			if a {
				n = sessions[0].Add(1)
			} else {
				n = sessions[1].Add(1)
			}
			switch {
			case a && n == 1:
				p.send(`WELCOME taskexec/1 {"instance":"old"}`)
				p.send("DONE " + p.task() + " 0")
				<-restarted
			case a:
				io.Copy(io.Discard, p.in) // not greeted yet when the run ends
			case n == 1:
				p.send(`WELCOME taskexec/1 {"instance":"old"}`)
				p.task()
				close(restarted)
			default:
				p.send(`WELCOME taskexec/1 {"instance":"new"}`)
				p.send("DONE " + p.task() + " 0")
				p.expect("SHUTDOWN")
				cl.log("told")
				p.send("GOODBYE")
			}
		})
		c := cl.coordinator(WithWorkers("a", "w:1"), WithWorkers("b", "w:1"), WithWorkerShutdown(), WithWorkerWait(time.Minute))
		_, err := cl.run(t.Context(), c, mustParse(t, "a1 b1"))()
		if diff := cmp.Diff([]string{"told"}, cl.traced()); diff != "" || err != nil {
			t.Errorf("%v; (-want +got):\n%s", err, diff)
		}
	})
}

func TestBadWorkersAreNamedAndHarmNobody(t *testing.T) {
	run := func(p *peer, welcome string) {
		p.expect("HELLO …")
		p.send("WELCOME taskexec/1 " + welcome)
		p.expect("RUN 0 1 0 a0")
	}
	rest := func(p *peer) { io.Copy(io.Discard, p.in) }
	for _, tt := range []struct {
		reason string
		play   func(p *peer)
		at     time.Duration // when ctx ends, if it does
		want   string        // the outcomes
		is     error
		says   string
	}{
		{"it accepts and never greets", func(p *peer) { p.expect("HELLO …"); rest(p) }, 0,
			"Skipped Skipped", nil, "a:1: not reached within 30s"},
		{"it greets and is silent", func(p *peer) { run(p, `{"heartbeat":true}`); rest(p) }, 0,
			"Unknown Skipped", ErrNoWorker, "nothing heard for 15s"},
		{"it greets and never reports, and offers no heartbeat", func(p *peer) { run(p, `{}`); rest(p) }, time.Hour,
			"Unknown Skipped", ErrOutcomeUnknown, "not reported within 10s after it was canceled"},
		{"it reports twice", func(p *peer) { run(p, `{}`); p.send("DONE 0 0"); p.expect("RUN 1 1 0 a1"); p.send("DONE 0 0"); rest(p) }, 0,
			"Done Unknown", ErrNoWorker, "DONE for task 0, which is not in flight here"},
		{"it reports and fails the same", func(p *peer) {
			run(p, `{}`)
			p.send("DONE 0 0")
			p.expect("RUN 1 1 0 a1")
			p.send("FAIL 0 error 0 no")
			rest(p)
		}, 0, "Done Unknown", ErrNoWorker, "FAIL for task 0, which is not in flight here"},
		{"it reports what it was never sent", func(p *peer) { run(p, `{}`); p.send("DONE 1 0"); rest(p) }, 0,
			"Unknown Skipped", ErrNoWorker, "DONE for task 1, which is not in flight here"},
		{"it reports a number that no task has", func(p *peer) { run(p, `{}`); p.send("DONE 999999 0"); rest(p) }, 0,
			"Unknown Skipped", ErrNoWorker, "task 999999"},
		{"it reports a negative number", func(p *peer) { run(p, `{}`); p.send("DONE -1 0"); rest(p) }, 0,
			"Unknown Skipped", ErrNoWorker, "protocol error (syntax)"},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", tt.play)
				ctx := t.Context()
				if tt.at > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, tt.at)
					defer cancel()
				}
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(30*time.Second))
				report, err := cl.run(ctx, c, tasksOf("a", 2))()
				if got := outcomes(report); got != tt.want {
					t.Errorf("got %s, want %s", got, tt.want)
				}
				all := err.Error()
				for _, r := range report.Results {
					if r.Err != nil {
						all += "; " + r.Err.Error()
					}
					if r.Outcome == Unknown && !errors.Is(r.Err, ErrOutcomeUnknown) {
						t.Errorf("%v does not wrap ErrOutcomeUnknown", r.Err)
					}
				}
				if tt.is != nil && !errors.Is(errors.Join(err, report.Results[0].Err), tt.is) || !strings.Contains(all, tt.says) {
					t.Errorf("got %s\nwant %q", all, tt.says)
				}
				if limit := tt.at + time.Minute + 15*time.Second; report.Elapsed > limit {
					t.Errorf("it took %v", report.Elapsed)
				}
				checkTroubles(t, report)
			})
			// Beside a worker that is as it should be, all is Done.
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", func(p *peer) { p.t = quiet{p.t}; tt.play(p) })
				cl.worker("a:2", echo)
				c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithWorkerWait(30*time.Second))
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				report, err := cl.run(ctx, c, tasksOf("a", 2))()
				if err != nil && tt.at == 0 && !strings.Contains(tt.reason, "never greets") {
					t.Errorf("beside another: %v", err)
				}
				checkTroubles(t, report)
			})
		})
	}
}

func TestAllWorkersDeadFromTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		c := newTestCoordinator(t, WithDialer(cl.dial), WithWorkers("a", "dead:1", "dead:2"), WithWorkers("b", "dead:3")) // with the default wait
		report, err := cl.run(t.Context(), c, mustParse(t, theNine[:5]+" b1"))()
		if report.Elapsed != 30*time.Second || report.Counts.Skipped != 3 {
			t.Errorf("got %+v after %v", report.Counts, report.Elapsed)
		}
		for _, addr := range []string{"dead:1", "dead:2", "dead:3"} {
			if !strings.Contains(err.Error(), addr) {
				t.Errorf("%v does not name %s", err, addr)
			}
		}
	})
}

func TestAHandlerThatPanicsOnEveryTaskFailsEachOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		w := cl.worker("a:1", func(_ context.Context, task Task) (string, error) { panic(task.Instruction + " is too much") }, WithSlots(3))
		c := cl.coordinator(WithWorkers("a", "a:1"), WithRetry(Retry{Attempts: 5}), WithWorkerWait(time.Minute))
		report, _ := cl.run(t.Context(), c, tasksOf("a", 30))()
		for _, r := range report.Results {
			remote, ok := errors.AsType[*RemoteError](r.Err)
			if r.Outcome != Failed || r.Attempts != 1 || !ok || remote.Kind != "panic" || !strings.Contains(remote.Text, r.Task.Instruction+" is too much") {
				t.Errorf("got %+v: %v", r, r.Err)
			}
		}
		if report.Troubles != (Troubles{}) {
			t.Errorf("got %+v", report.Troubles)
		}
		synctest.Wait() // the last report may be there before its slot is free
		if got := w.Stats(); got.Failed != 30 || got.Done != 0 || got.Running != 0 || got.Stuck != 0 {
			t.Errorf("the worker counts %+v", got)
		}
	})
}

func TestAContextErrorThatNobodyCausedIsAFailure(t *testing.T) {
	for _, cause := range []error{context.Canceled, context.DeadlineExceeded, fmt.Errorf("so: %w", context.Canceled)} {
		run := retried(t, func(context.Context, int) (string, error) { return "", cause }, WithTaskTimeout(time.Hour))
		remote, ok := errors.AsType[*RemoteError](run.err)
		if r := run.report.Results[0]; r.Outcome != Failed || !ok || remote.Kind != "error" || remote.Text != cause.Error() {
			t.Errorf("%v: got %v with %v", cause, r.Outcome, r.Err)
		}
	}
}
