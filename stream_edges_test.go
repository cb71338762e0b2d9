package taskexec

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var allOrders = []Order{ByCategory, ByInput, Concurrent}

// withoutEnd is a sequence of tasks of category a that ends only when it is left.
func withoutEnd(yield func(Task) bool) {
	for i := 0; yield(Task{Instruction: fmt.Sprintf("a%d", i)}); i++ {
	}
}

// awaitCancel is a handler that runs until it is canceled.
var awaitCancel = HandlerFunc(func(ctx context.Context, _ Task) (string, error) {
	<-ctx.Done()
	return "", context.Cause(ctx)
})

func TestLeavingAStreamWhoseSequenceWaitsForRoomEndsBoth(t *testing.T) {
	for _, order := range []Order{ByInput, Concurrent} {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a", WithSlots(2)), WithOrder(order), WithStreamBuffer(1))...)
			for _, err := range c.Stream(t.Context(), withoutEnd) {
				if err != nil {
					t.Error(err)
				}
				synctest.Wait() // the sequence has been read as far as there is room
				break
			}
		})
	}
}

func TestLeavingAStreamThatDialsEndsTheDial(t *testing.T) {
	for _, order := range []Order{ByInput, Concurrent} {
		synctest.Test(t, func(t *testing.T) {
			var network memNetwork
			ctx, stop := context.WithCancel(t.Context())
			served := make(chan struct{})
			ln := network.listen("a:1")
			go func() { defer close(served); NewWorker(echoHandler).Serve(ctx, ln) }()
			dialed := false
			c := newTestCoordinator(t, WithOrder(order), WithWorkers("a", "a:1"), WithWorkers("b", "b:1"),
				WithDialer(func(ctx context.Context, n, addr string) (net.Conn, error) {
					if addr == "a:1" {
						return network.dial(ctx, n, addr)
					}
					dialed = true
					<-ctx.Done()
					return nil, context.Cause(ctx)
				}))
			start := time.Now()
			for _, err := range c.Stream(ctx, slices.Values(mustParse(t, "a1 b1 a2"))) {
				if err != nil {
					t.Error(err)
				}
				synctest.Wait()
				break
			}
			if !dialed || time.Since(start) > time.Second {
				t.Errorf("%v: dialed %v, left after %v", order, dialed, time.Since(start))
			}
			stop()
			<-served
		})
	}
}

func TestLeavingAStreamWhileAGroupWaitsCancelsWhatRuns(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			var causes []string
			h := HandlerFunc(func(ctx context.Context, task Task) (string, error) {
				if task.Instruction == "a1" {
					return "", nil
				}
				<-ctx.Done()
				mu.Lock()
				defer mu.Unlock()
				causes = append(causes, context.Cause(ctx).Error())
				return "", context.Cause(ctx)
			})
			c := newTestCoordinator(t, append(serveMem(t, h, "ab", WithSlots(2)), WithOrder(order))...)
			start := time.Now()
			for range c.Stream(t.Context(), slices.Values(mustParse(t, "a1 a2 a3 b1"))) {
				synctest.Wait()
				break
			}
			if time.Since(start) != 0 {
				t.Errorf("%v: took %v", order, time.Since(start))
			}
			for _, cause := range causes {
				if !strings.Contains(cause, "left its loop") {
					t.Errorf("%v: a handler was canceled because of %q", order, cause)
				}
			}
			if len(causes) == 0 {
				t.Errorf("%v: no handler was canceled", order)
			}
		})
	}
}

func TestLeavingAStreamTellsNoWorkerToShutDown(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			cl := newCluster(t)
			cl.worker("a:1", func(ctx context.Context, task Task) (string, error) {
				if task.Instruction == "a0" {
					return "", nil
				}
				return until(ctx, task)
			})
			c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerShutdown(), WithOrder(order))
			for range c.Stream(t.Context(), slices.Values(tasksOf("a", 3))) {
				break
			}
			if trace := cl.traced(); len(trace) > 0 {
				t.Errorf("%v: got %q, want a worker that goes on, as after the end of a context", order, trace)
			}
		})
	}
}

// A loop that is left halts the run first, and ends its context a little later.
func TestACanceledRunTellsNoWorkerToShutDown(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			cl := newCluster(t)
			cl.worker("a:1", until)
			c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerShutdown(), WithOrder(order))
			r := newRun(&c.config)
			r.tasks = tasksOf("a", 3)
			var ended sync.WaitGroup
			ended.Go(func() { r.execute(t.Context(), r.runPlan) })
			synctest.Wait()
			r.halt(haltCancel, errLeft)
			ended.Wait()
			if trace := cl.traced(); len(trace) > 0 {
				t.Errorf("%v: got %q, want a worker that goes on", order, trace)
			}
		})
	}
}

// What a Result held, another task of the Stream begins without.
func TestLossesOfATaskDoNotCountAgainstAnother(t *testing.T) {
	for _, order := range allOrders {
		t.Run(order.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var conn net.Conn // the worker's end of the latest
				tries := make(map[string]int)
				w := NewWorker(HandlerFunc(func(ctx context.Context, task Task) (string, error) {
					mu.Lock()
					defer mu.Unlock()
					if tries[task.Instruction]++; tries[task.Instruction] <= maxStrikes { // the first is no strike
						conn.Close()
						<-ctx.Done()
						return "", ctx.Err()
					}
					return "", nil
				}))
				c := newTestCoordinator(t, WithWorkers("a", "a:1"), WithOrder(order), WithStreamBuffer(1), WithWorkerWait(time.Hour),
					WithDialer(func(context.Context, string, string) (net.Conn, error) {
						client, server := net.Pipe()
						mu.Lock()
						conn = server
						mu.Unlock()
						go w.ServeConn(context.Background(), server)
						return client, nil
					}))
				n := 0
				for r, err := range c.Stream(t.Context(), slices.Values(tasksOf("a", 3))) {
					if err != nil || r.Outcome != Done || r.Losses != maxStrikes || r.Attempts != maxStrikes+1 {
						t.Errorf("got %+v and %v", r, err)
					}
					n++
				}
				if n != 3 {
					t.Errorf("got %d results, want 3", n)
				}
			})
		})
	}
}

func TestARefusedRunTellsNoWorkerToShutDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", echo)
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "gone:1"), WithWorkerShutdown(), WithWorkerWait(time.Second))
		tasks := mustParse(t, "a1 b1")
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if _, ok := errors.AsType[*WorkerError](err); !ok || len(cl.traced()) > 0 {
			t.Errorf("got %v and %q, want a *WorkerError and a worker that goes on", err, cl.traced())
		}
	})
}

func TestAStreamRefusedAtItsFirstTaskTellsNoWorkerToShutDown(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			cl := newCluster(t)
			cl.worker("a:1", echo)
			c := cl.coordinator(WithOrder(order), WithWorkers("a", "a:1", "gone:1"), WithWorkerShutdown(), WithWorkerWait(time.Second))
			var last error
			for _, err := range c.Stream(t.Context(), slices.Values(tasksOf("a", 3))) {
				last = err
			}
			if _, ok := errors.AsType[*WorkerError](last); !ok || len(cl.traced()) > 0 {
				t.Errorf("%v: got %v and %q, want a *WorkerError and a worker that goes on", order, last, cl.traced())
			}
		})
	}
}

func TestLeavingAStreamAwaitsNoGoodbye(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			cl := newCluster(t)
			cl.script("a:1", func(p *peer) {
				p.welcome()
				p.next()
				p.send("DONE 0 0")
				p.expect("SHUTDOWN") // and another run's task keeps it from its goodbye
				p.expectEnd()
			})
			c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerShutdown(), WithOrder(order))
			start := time.Now()
			for range c.Stream(t.Context(), slices.Values(tasksOf("a", 1))) {
				synctest.Wait()
				break
			}
			if took := time.Since(start); took > 0 {
				t.Errorf("%v: took %v", order, took)
			}
		})
	}
}

func TestLeavingAStreamWaitsNoLongerThanTheGraceForADeafHandler(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			release := make(chan struct{})
			h := HandlerFunc(func(ctx context.Context, task Task) (string, error) {
				if task.Instruction != "a1" {
					<-release
				}
				return "", nil
			})
			c := newTestCoordinator(t, append(serveMem(t, h, "a"), WithOrder(order), WithCancelGrace(3*time.Second))...)
			start := time.Now()
			for range c.Stream(t.Context(), slices.Values(mustParse(t, "a1 a2 a3"))) {
				synctest.Wait()
				break
			}
			if d := time.Since(start); d < 3*time.Second || d > 5*time.Second {
				t.Errorf("%v: left after %v, want about the grace of 3s", order, d)
			}
			close(release)
		})
	}
}

func TestAStreamWhoseContextEndsUnderASlowConsumerYieldsEveryTaskItRead(t *testing.T) {
	for _, order := range allOrders {
		for _, buffer := range []int{1, 3, 100} {
			synctest.Test(t, func(t *testing.T) {
				c := newTestCoordinator(t, append(serveMem(t, echoHandler, "ab", WithSlots(2)), WithOrder(order), WithStreamBuffer(buffer))...)
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				read := 0
				seen := make(map[int]bool)
				var last error
				for r, err := range c.Stream(ctx, func(yield func(Task) bool) {
					for i := range 20 {
						read++
						if !yield(Task{Instruction: fmt.Sprintf("%c%d", "ab"[i%2], i)}) {
							return
						}
					}
				}) {
					if last != nil {
						t.Errorf("%v, buffer %d: something came after the error", order, buffer)
					}
					if last = err; err != nil {
						continue
					}
					if seen[r.Index] {
						t.Errorf("%v, buffer %d: task %d twice", order, buffer, r.Index)
					}
					seen[r.Index] = true
					time.Sleep(3 * time.Second) // slower than anything else
				}
				// With room for all, all were Done before ctx ended.
				if buffer < 20 && !errors.Is(last, context.DeadlineExceeded) {
					t.Errorf("%v, buffer %d: error %v, want that of the context", order, buffer, last)
				}
				if len(seen) != read {
					t.Errorf("%v, buffer %d: %d results of %d tasks read", order, buffer, len(seen), read)
				}
			})
		}
	}
}

func TestAStreamWhoseContextEndsAsItDialsSaysSoOnce(t *testing.T) {
	for range 300 { // the end is seen in two places, in either order
		synctest.Test(t, func(t *testing.T) {
			c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a"), WithOrder(Concurrent), WithWorkers("b", "b:1"))...)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := collect(c.Stream(ctx, slices.Values(mustParse(t, "a1 b1 a2"))))
			if !errors.Is(err, context.DeadlineExceeded) || strings.Count(err.Error(), "context ended") != 1 {
				t.Errorf("got %q", err)
			}
		})
	}
}

// A task that the sequence has handed over has a result, whatever ends the
// reading.
func TestAStreamThatStopsReadingAnswersForTheTaskItHasRead(t *testing.T) {
	for _, order := range allOrders {
		for name, stop := range map[string]func(*Coordinator, context.CancelFunc){
			"cancel":   func(_ *Coordinator, cancel context.CancelFunc) { cancel() },
			"shutdown": func(c *Coordinator, cancel context.CancelFunc) { go c.Shutdown(context.Background()) },
		} {
			synctest.Test(t, func(t *testing.T) {
				c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a"), WithOrder(order))...)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				read := 0
				results, err := collect(c.Stream(ctx, func(yield func(Task) bool) {
					for i := 0; ; i++ {
						if i == 3 {
							stop(c, cancel)
							synctest.Wait()
						}
						read++
						if !yield(Task{Instruction: fmt.Sprintf("a%d", i)}) {
							return
						}
					}
				}))
				if err == nil || len(results) != read {
					t.Errorf("%v, %s: %d results of %d tasks read, and error %v", order, name, len(results), read, err)
				}
			})
		}
	}
}

func TestAFailureInAStreamStopsSoon(t *testing.T) {
	for _, order := range allOrders {
		for _, buffer := range []int{1, 4, 100} {
			synctest.Test(t, func(t *testing.T) {
				c := newTestCoordinator(t, append(serveMem(t, echoHandler, "ab"),
					WithOrder(order), WithStreamBuffer(buffer), WithOnFailure(StopSoon))...)
				read := 0
				seq := func(yield func(Task) bool) {
					for _, task := range mustParse(t, "a1 abad "+strings.Repeat("a2 b2 ", 500)) {
						read++
						if !yield(task) {
							return
						}
					}
				}
				results, err := collect(c.Stream(t.Context(), seq))
				if err != nil || len(results) != read {
					t.Errorf("%v, buffer %d: %d results of %d tasks read, and error %v", order, buffer, len(results), read, err)
				}
				var counts Counts
				for _, r := range results {
					counts.add(r.Outcome)
				}
				if counts.Failed != 1 || counts.Done > 110 || counts.Failed+counts.Done+counts.Skipped != read {
					t.Errorf("%v, buffer %d: %+v of %d", order, buffer, counts, read)
				}
			})
		}
	}
}

func TestAStreamWithRoomForOneUsesSeveralWorkersInOrder(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			var network memNetwork
			ctx, stop := context.WithCancel(t.Context())
			var served sync.WaitGroup
			addrs := []string{"w:1", "w:2", "w:3"}
			for _, addr := range addrs {
				ln := network.listen(addr)
				served.Go(func() { NewWorker(echoHandler, WithSlots(4)).Serve(ctx, ln) })
			}
			c := newTestCoordinator(t, WithDialer(network.dial), WithOrder(order), WithStreamBuffer(1),
				WithWorkers("a", addrs...), WithWorkers("b", addrs...))
			next := 0
			for r, err := range c.Stream(ctx, func(yield func(Task) bool) {
				for i := range 50 {
					if !yield(Task{Category: "ab"[i/25 : i/25+1], Instruction: strings.Repeat("x", i)}) {
						return
					}
				}
			}) {
				if err != nil || r.Outcome != Done || r.Index != next {
					t.Errorf("%v: got task %d %v, error %v, want task %d", order, r.Index, r.Outcome, err, next)
				}
				next++
			}
			if next != 50 {
				t.Errorf("%v: %d results, want 50", order, next)
			}
			stop()
			served.Wait()
		})
	}
}

func TestTheSameStreamCanBeGoneThroughTwiceEvenAtOnce(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCoordinator(t, append(serveMem(t, echoHandler, "ab", WithSlots(2)), WithOrder(order), WithStreamBuffer(2))...)
			const text = "a1 b1 a2 b2 a3"
			stream := c.Stream(t.Context(), slices.Values(mustParse(t, text)))
			check := func() {
				results, err := collect(stream)
				if err != nil || len(results) != 5 {
					t.Errorf("%v: %s and %v", order, outcomesOf(results), err)
				}
			}
			check()
			check()
			var both sync.WaitGroup
			both.Go(check)
			both.Go(check)
			both.Wait()
			for range stream { // one inside the other
				check()
				break
			}
		})
	}
}

func TestGoexitInTheSequenceEndsTheCallerToo(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a"), WithOrder(order))...)
			var deferred, after bool
			var caller sync.WaitGroup
			caller.Go(func() {
				defer func() { deferred = true }()
				for range c.Stream(t.Context(), func(yield func(Task) bool) {
					yield(Task{Instruction: "a1"})
					runtime.Goexit()
				}) {
				}
				after = true
			})
			caller.Wait()
			if !deferred || after || len(c.Snapshot()) != 0 {
				t.Errorf("%v: deferred %v, went on %v, %d runs left", order, deferred, after, len(c.Snapshot()))
			}
		})
	}
}

func TestGoexitInTheLoopOfAStreamLeavesNothingBehind(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a"), WithOrder(order))...)
			var caller sync.WaitGroup
			caller.Go(func() {
				for range c.Stream(t.Context(), slices.Values(mustParse(t, "a1 a2 a3"))) {
					runtime.Goexit()
				}
			})
			caller.Wait()
			if n := len(c.Snapshot()); n != 0 {
				t.Errorf("%v: %d runs left", order, n)
			}
		})
	}
}

func TestAPanicOfASequenceThatIsLeftIsRaisedInTheCaller(t *testing.T) {
	for _, order := range []Order{ByInput, Concurrent} {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a"), WithOrder(order), WithStreamBuffer(1))...)
			defer func() {
				if v := recover(); v != "while cleaning up" || len(c.Snapshot()) != 0 {
					t.Errorf("%v: recovered %v, %d runs left", order, v, len(c.Snapshot()))
				}
			}()
			for range c.Stream(t.Context(), func(yield func(Task) bool) {
				withoutEnd(yield)
				panic("while cleaning up")
			}) {
				break
			}
			t.Errorf("%v: no panic", order)
		})
	}
}

func TestAPanicOfTheLoopOfAStreamComesBeforeThatOfItsSequence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a"), WithOrder(Concurrent), WithStreamBuffer(1))...)
		defer func() {
			if v := recover(); v != "from the loop" {
				t.Errorf("recovered %v", v)
			}
		}()
		for range c.Stream(t.Context(), func(yield func(Task) bool) {
			withoutEnd(yield)
			panic("while cleaning up")
		}) {
			panic("from the loop")
		}
	})
}

// Outputs are what may be large, and ByCategory keeps the rest of every result.
func TestAStreamByCategoryKeepsNoOutputThatWasConsumed(t *testing.T) {
	const size, total = 64 << 10, 300 // 19 MiB
	output := strings.Repeat("x", size)
	h := HandlerFunc(func(context.Context, Task) (string, error) { return output, nil })
	c := newTestCoordinator(t, append(serveMem(t, h, "a"), WithStreamBuffer(4))...)
	heap := func() int64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}
	before := heap()
	n := 0
	for r, err := range c.Stream(t.Context(), func(yield func(Task) bool) {
		for range total {
			if !yield(Task{Instruction: "a"}) {
				return
			}
		}
	}) {
		if err != nil || len(r.Output) != size {
			t.Fatal(r.Outcome, err)
		}
		if n++; n == total-10 {
			if grown := heap() - before; grown > 6<<20 {
				t.Errorf("the heap grew by %d bytes, want at most 6 MiB for 4 tasks held", grown)
			}
		}
	}
}

func TestAStreamExecutesNoMoreThanItHasRoomFor(t *testing.T) {
	const buffer = 5
	for _, order := range []Order{ByCategory, ByInput, Concurrent} {
		t.Run(order.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var executed atomic.Int32
				h := HandlerFunc(func(context.Context, Task) (string, error) { executed.Add(1); return "", nil })
				c := newTestCoordinator(t, append(serveMem(t, h, "ab"), WithOrder(order), WithStreamBuffer(buffer))...)
				consumed, most := 0, 0
				for _, err := range c.Stream(t.Context(), slices.Values(append(tasksOf("a", 50), tasksOf("b", 50)...))) {
					if err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					most = max(most, int(executed.Load())-consumed)
					consumed++
				}
				if consumed != 100 || most > buffer || order != ByInput && most < buffer {
					t.Errorf("of %d tasks up to %d were executed and not consumed, want %d", consumed, most, buffer)
				}
			})
		})
	}
}

func TestShutdownEndsAStreamWithItsReason(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			h := HandlerFunc(func(context.Context, Task) (string, error) { time.Sleep(time.Second); return "", nil })
			c := newTestCoordinator(t, append(serveMem(t, h, "a"), WithOrder(order))...)
			time.AfterFunc(2500*time.Millisecond, func() { go c.Shutdown(context.Background()) })
			results, err := collect(c.Stream(t.Context(), slices.Values(mustParse(t, "a1 a2 a3 a4 a5"))))
			ran := slices.IndexFunc(results, func(r Result) bool { return r.Index == 2 })
			if !errors.Is(err, ErrCoordinatorClosed) || ran < 0 || results[ran].Outcome != Done {
				t.Errorf("%v: %s and %v, want a3, which ran, Done", order, outcomesOf(results), err)
			}
			results, err = collect(c.Stream(t.Context(), slices.Values(mustParse(t, "a1"))))
			if !errors.Is(err, ErrCoordinatorClosed) || len(results) != 0 {
				t.Errorf("%v: after Shutdown: %s and %v", order, outcomesOf(results), err)
			}
		})
	}
}

func TestAnEmptyStreamSucceedsWithoutDialing(t *testing.T) {
	for _, order := range allOrders {
		c := newTestCoordinator(t, WithOrder(order), WithWorkers("a", "a:1"),
			WithDialer(func(context.Context, string, string) (net.Conn, error) {
				t.Errorf("%v: dialed", order)
				return nil, errors.New("no")
			}))
		for r, err := range c.Stream(t.Context(), func(func(Task) bool) {}) {
			t.Errorf("%v: got %v and %v", order, r, err)
		}
	}
}

func TestANilSequencePanicsInTheCaller(t *testing.T) {
	c := newTestCoordinator(t)
	defer func() {
		if recover() == nil || len(c.Snapshot()) != 0 {
			t.Error("no panic, or a run left")
		}
	}()
	var seq iter.Seq[Task]
	for range c.Stream(t.Context(), seq) {
	}
}

func TestAStreamThatLosesItsOnlyWorkerEndsAndAnswersForEachTask(t *testing.T) {
	for _, order := range allOrders {
		synctest.Test(t, func(t *testing.T) {
			var network memNetwork
			ctx, stop := context.WithCancel(context.Background())
			served := make(chan struct{})
			ln := network.listen("a:1")
			go func() { defer close(served); NewWorker(awaitCancel, WithName("a")).Serve(ctx, ln) }()
			c := newTestCoordinator(t, WithDialer(network.dial), WithWorkers("a", "a:1"), WithOrder(order), WithStreamBuffer(2), WithOnFailure(KeepGoing))
			time.AfterFunc(time.Second, stop)
			read := 0
			results, err := collect(c.Stream(t.Context(), func(yield func(Task) bool) {
				for _, task := range mustParse(t, "a1 a2 a3 a4 a5 a6") {
					read++
					if !yield(task) {
						return
					}
				}
			}))
			if !errors.Is(err, ErrNoWorker) || len(results) != read {
				t.Errorf("%v: %s of %d read, and %v", order, outcomesOf(results), read, err)
			}
			<-served
		})
	}
}

func TestTypesThatDoNotDecodeAreNamedEvenIfInterfaces(t *testing.T) {
	h := HandlerOf(func(context.Context, any) (any, error) { return nil, nil })
	if _, err := h.Handle(t.Context(), Task{Instruction: "{"}); err == nil || !strings.Contains(err.Error(), "into interface {}") {
		t.Errorf("decoding an instruction: %v", err)
	}
	if _, err := OutputOf[fmt.Stringer](Result{Output: "{}"}); err == nil || !strings.Contains(err.Error(), "into fmt.Stringer") {
		t.Errorf("decoding an output: %v", err)
	}
}

func TestTypedHandlersFailAsTheirFunctionsDo(t *testing.T) {
	own := errors.New("no such file")
	h := HandlerOf(func(_ context.Context, n int) (any, error) {
		if n > 0 {
			return make(chan int), nil // does not encode
		}
		return nil, own
	})
	if _, err := h.Handle(t.Context(), Task{Instruction: "0"}); err != own {
		t.Errorf("got %v, want the function's own error", err)
	}
	for _, instruction := range []string{"1", "", "1 2", `"x"`} {
		var final *finalError
		if _, err := h.Handle(t.Context(), Task{Instruction: instruction}); !errors.As(err, &final) {
			t.Errorf("instruction %q: %v, want a final error", instruction, err)
		}
	}
	if _, err := TaskOf("a", make(chan int)); err == nil {
		t.Error("a channel was encoded")
	}
	failed := Result{Outcome: Failed, Err: &TaskError{Err: own}}
	if _, err := OutputOf[int](failed); err != failed.Err {
		t.Errorf("got %v, want the result's error", err)
	}
}

// The clock is real, since what is tested is a window of a few instructions
// between taking note of a failure and stopping the run.
func TestStopSoonSendsNothingOnceAFailureIsKnown(t *testing.T) {
	c := newTestCoordinator(t, append(serveMem(t, HandlerFunc(func(_ context.Context, task Task) (string, error) {
		return "", errors.New("no good")
	}), "a"), WithOnFailure(StopSoon), WithWindow(1))...)
	for range 1000 {
		report, _ := c.Run(t.Context(), mustParse(t, "a1 a2"))
		if got, want := outcomesOf(report.Results), "a1:Failed a2:Skipped"; got != want {
			t.Fatalf("got %s, want %s", got, want)
		}
	}
}
