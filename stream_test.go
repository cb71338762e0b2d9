package taskexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// serveMem starts a worker for each category, at category:1, and stops them
// when the test ends. It returns the options that reach them.
func serveMem(t *testing.T, h Handler, categories string, opts ...WorkerOption) []CoordinatorOption {
	t.Helper()
	var network memNetwork
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan struct{}, len(categories))
	options := []CoordinatorOption{WithDialer(network.dial)}
	for _, r := range categories {
		category := string(r)
		w := NewWorker(h, append([]WorkerOption{WithName(category), WithCategories(category)}, opts...)...)
		ln := network.listen(category + ":1")
		go func() { w.Serve(ctx, ln); served <- struct{}{} }()
		options = append(options, WithWorkers(category, category+":1"))
	}
	t.Cleanup(func() {
		stop()
		for range len(categories) {
			<-served
		}
	})
	return options
}

func newTestCoordinator(t *testing.T, opts ...CoordinatorOption) *Coordinator {
	t.Helper()
	c, err := NewCoordinator(opts...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// collect goes through a Stream to its end.
func collect(stream iter.Seq2[Result, error]) (results []Result, err error) {
	for r, e := range stream {
		if e != nil {
			return results, e
		}
		results = append(results, r)
	}
	return results, nil
}

// echoHandler sleeps for a random-looking time and returns the instruction.
var echoHandler = HandlerFunc(func(ctx context.Context, task Task) (string, error) {
	time.Sleep(time.Duration(len(task.Instruction)*7%5) * time.Millisecond)
	if strings.Contains(task.Instruction, "bad") {
		return "", errors.New("no good")
	}
	return task.Instruction, nil
})

func outcomesOf(results []Result) string {
	var words []string
	for _, r := range results {
		words = append(words, fmt.Sprintf("%s:%s", r.Task.Instruction, r.Outcome))
	}
	return strings.Join(words, " ")
}

func TestStreamYieldsInPlanOrder(t *testing.T) {
	for order, want := range map[Order]string{
		ByCategory: "a1:Done a2:Done a3:Done b1:Done b3:Done b2:Done b4:Done c1:Done c2:Done",
		ByInput:    "a1:Done a2:Done c1:Done b1:Done c2:Done b3:Done b2:Done b4:Done a3:Done",
	} {
		for _, buffer := range []int{1, 2, 100} {
			synctest.Test(t, func(t *testing.T) {
				c := newTestCoordinator(t, append(serveMem(t, echoHandler, "abc", WithSlots(3)), WithOrder(order), WithStreamBuffer(buffer))...)
				results, err := collect(c.Stream(t.Context(), slices.Values(mustParse(t, "a1 a2 c1 b1 c2 b3 b2 b4 a3"))))
				if err != nil || outcomesOf(results) != want {
					t.Errorf("%v, buffer %d: got %s and %v, want %s", order, buffer, outcomesOf(results), err, want)
				}
			})
		}
	}
}

func TestStreamConcurrentYieldsEachTaskOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCoordinator(t, append(serveMem(t, echoHandler, "abc", WithSlots(2)), WithOrder(Concurrent), WithStreamBuffer(5))...)
		var read atomic.Int64
		yielded := 0
		seen := make(map[int]bool)
		for r, err := range c.Stream(t.Context(), func(yield func(Task) bool) {
			for i := range 300 {
				read.Add(1)
				if !yield(Task{Instruction: fmt.Sprintf("%c%d", "abc"[i%3], i)}) {
					return
				}
			}
		}) {
			if err != nil {
				t.Fatal(err)
			}
			if held := int(read.Load()) - yielded; held > 5+1 {
				t.Errorf("%d tasks read and not consumed, want at most the buffer of 5 and the one offered", held)
			}
			yielded++
			if seen[r.Index] || r.Outcome != Done || r.Output != r.Task.Instruction {
				t.Errorf("got %+v", r)
			}
			seen[r.Index] = true
		}
		if len(seen) != 300 {
			t.Errorf("%d results, want 300", len(seen))
		}
	})
}

func TestAResultIsNotUsedForAnotherTaskBeforeItIsConsumed(t *testing.T) {
	// Results settle together, and tasks come while the consumer is among them.
	for _, order := range []Order{ByInput, Concurrent} {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a", WithSlots(4)), WithOrder(order), WithStreamBuffer(100))...)
			var seen []int
			for r, err := range c.Stream(t.Context(), func(yield func(Task) bool) {
				for i := range 100 {
					if i%10 == 0 {
						time.Sleep(5 * time.Second)
					}
					if !yield(Task{Instruction: fmt.Sprintf("a%d", i)}) {
						return
					}
				}
			}) {
				if err != nil || r.Output != fmt.Sprintf("a%d", r.Index) {
					t.Errorf("%v: got %+v and %v", order, r, err)
				}
				seen = append(seen, r.Index)
				time.Sleep(time.Second)
			}
			slices.Sort(seen)
			if len(slices.Compact(seen)) != 100 || len(seen) != 100 {
				t.Errorf("%v: got the results of %d", order, seen)
			}
		})
	}
}

func TestLeavingAStreamAtAnyPointLeavesNothingBehind(t *testing.T) {
	for _, order := range []Order{ByCategory, ByInput, Concurrent} {
		for stop := range 10 {
			synctest.Test(t, func(t *testing.T) {
				c := newTestCoordinator(t, append(serveMem(t, echoHandler, "abc", WithSlots(2)), WithOrder(order), WithStreamBuffer(2))...)
				returned := false
				n := 0
				for _, err := range c.Stream(t.Context(), func(yield func(Task) bool) {
					defer func() { returned = true }()
					for _, task := range mustParse(t, "a1 a2 c1 b1 c2 b3 b2 b4 a3") {
						if !yield(task) {
							return
						}
					}
				}) {
					if err != nil {
						t.Error(err)
					}
					if n == stop {
						break
					}
					n++
				}
				if !returned {
					t.Errorf("%v, left after %d: the sequence is still running", order, stop)
				}
				if len(c.Snapshot()) != 0 {
					t.Errorf("%v, left after %d: a run goes on", order, stop)
				}
			})
		}
	}
}

func TestAPanicInTheSequenceIsRaisedInTheCaller(t *testing.T) {
	for _, order := range []Order{ByCategory, ByInput, Concurrent} {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a"), WithOrder(order))...)
			defer func() {
				if v := recover(); v != "from the sequence" {
					t.Errorf("%v: recovered %v", order, v)
				}
			}()
			for range c.Stream(t.Context(), func(yield func(Task) bool) {
				yield(Task{Instruction: "a1"})
				panic("from the sequence")
			}) {
			}
			t.Error("no panic")
		})
	}
}

func TestAPanicInTheLoopOfAStreamLeavesNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCoordinator(t, append(serveMem(t, echoHandler, "a"), WithOrder(Concurrent))...)
		defer func() {
			if v := recover(); v != "from the loop" || len(c.Snapshot()) != 0 {
				t.Errorf("recovered %v, %d runs left", v, len(c.Snapshot()))
			}
		}()
		for range c.Stream(t.Context(), slices.Values(mustParse(t, "a1 a2 a3"))) {
			panic("from the loop")
		}
	})
}

func TestStreamYieldsWhatItReadAndThenItsErrorOnce(t *testing.T) {
	for name, c := range map[string]struct {
		order Order
		text  string
		want  string
		is    error
	}{
		"no worker, by input":    {ByInput, "a1 z1 a2", "a1:Done z1:Skipped", ErrNoWorker},
		"no worker, concurrent":  {Concurrent, "z1 a1", "z1:Skipped", ErrNoWorker},
		"no worker, by category": {ByCategory, "z1 a2 a1", "a2:Skipped a1:Skipped z1:Skipped", ErrNoWorker},
		"failure is no error":    {ByInput, "a1 abad a2", "a1:Done abad:Failed", nil},
		"a stage later":          {ByCategory, "b1 a1 abad a2", "a1:Done abad:Failed a2:Done b1:Skipped", nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				co := newTestCoordinator(t, append(serveMem(t, echoHandler, "ab"), WithOrder(c.order))...)
				results, err := collect(co.Stream(t.Context(), slices.Values(mustParse(t, c.text))))
				if outcomesOf(results) != c.want || !errors.Is(err, c.is) || (c.is == nil) != (err == nil) {
					t.Errorf("got %s and %v, want %s and %v", outcomesOf(results), err, c.want, c.is)
				}
				for _, r := range results {
					if var_, ok := errors.AsType[*TaskError](r.Err); (r.Outcome != Done) != ok {
						t.Errorf("%v has error %v", r.Outcome, var_)
					}
				}
			})
		})
	}
}

func TestAStreamRefusesANegativeTimeout(t *testing.T) {
	for _, order := range []Order{ByCategory, ByInput, Concurrent} {
		for negative := range 2 { // the first of its category, and another
			synctest.Test(t, func(t *testing.T) {
				tasks := mustParse(t, "a1 a2")
				tasks[negative].Timeout = -time.Second
				c := newTestCoordinator(t, append(serveMem(t, parrot, "a"), WithOrder(order))...)
				results, err := collect(c.Stream(t.Context(), slices.Values(tasks)))
				refused, ok := errors.AsType[*TaskError](err)
				if !ok || refused.Index != negative || !strings.Contains(err.Error(), "its timeout -1s is negative") {
					t.Errorf("%v: got %v, want the error of task %d", order, err, negative)
				}
				for _, r := range results {
					if r.Index == negative && (r.Outcome != Failed || r.Attempts != 0) {
						t.Errorf("%v: task %d is %v after %d attempts", order, negative, r.Outcome, r.Attempts)
					}
				}
			})
		}
	}
}

func TestStreamIsCanceledByItsContext(t *testing.T) {
	for _, order := range []Order{ByCategory, ByInput, Concurrent} {
		synctest.Test(t, func(t *testing.T) {
			h := HandlerFunc(func(ctx context.Context, _ Task) (string, error) { <-ctx.Done(); return "", context.Cause(ctx) })
			c := newTestCoordinator(t, append(serveMem(t, h, "a"), WithOrder(order))...)
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("enough"))
			defer cancel()
			start := time.Now()
			results, err := collect(c.Stream(ctx, slices.Values(mustParse(t, "a1 a2"))))
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "enough") {
				t.Errorf("%v: error %v", order, err)
			}
			slices.SortFunc(results, func(a, b Result) int { return a.Index - b.Index })
			if len(results) == 0 || results[0].Outcome != Canceled || time.Since(start) != time.Second {
				t.Errorf("%v: got %s after %v", order, outcomesOf(results), time.Since(start))
			}
		})
	}
}

func TestStreamOfAMillionTasksHoldsFewOfThem(t *testing.T) {
	if testing.Short() {
		t.Skip("a million tasks")
	}
	h := HandlerFunc(func(_ context.Context, task Task) (string, error) { return task.Instruction, nil })
	c := newTestCoordinator(t, append(serveMem(t, h, "abc"), WithOrder(Concurrent), WithWindow(1000), WithStreamBuffer(3000))...)
	const total = 1_000_000
	n := 0
	var peak uint64
	var stats runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&stats)
	before := stats.HeapAlloc
	for r, err := range c.Stream(t.Context(), func(yield func(Task) bool) {
		for i := range total {
			if !yield(Task{Instruction: fmt.Sprintf("%c%d", "abc"[i%3], i)}) {
				return
			}
		}
	}) {
		if err != nil || r.Outcome != Done {
			t.Fatal(r, err)
		}
		if n++; n%100_000 == 0 {
			runtime.GC()
			runtime.ReadMemStats(&stats)
			peak = max(peak, stats.HeapAlloc)
		}
	}
	if n != total {
		t.Errorf("%d results of %d", n, total)
	}
	if grown := int64(peak) - int64(before); grown > 8<<20 {
		t.Errorf("the heap grew by %d bytes, want at most 8 MiB for 3,000 tasks held", grown)
	}
}

func TestStopSoonStartsNothingAfterTheFirstFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var started []string
		h := HandlerFunc(func(_ context.Context, task Task) (string, error) {
			started = append(started, task.Instruction)
			time.Sleep(time.Second)
			if task.Instruction == "a2" {
				return "", errors.New("no good")
			}
			return "", nil
		})
		c := newTestCoordinator(t, append(serveMem(t, h, "ab"), WithOnFailure(StopSoon))...)
		report, err := c.Run(t.Context(), mustParse(t, "a1 a2 a3 a4 b1"))
		if got, want := outcomesOf(report.Results), "a1:Done a2:Failed a3:Skipped a4:Skipped b1:Skipped"; got != want {
			// a3 may have been started before the RECALL came: one slot starts
			// the next task while the report of the last travels.
			if want := "a1:Done a2:Failed a3:Done a4:Skipped b1:Skipped"; got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		}
		failed, ok := errors.AsType[*TaskError](err)
		if !ok || failed.Index != 1 {
			t.Errorf("error %v, want that of task 1", err)
		}
		for _, r := range report.Results[3:] {
			if !strings.Contains(r.Err.Error(), "task 1 (a2) Failed") {
				t.Errorf("%s is skipped because of %v, want task 1 named", r.Task.Instruction, r.Err)
			}
		}
	})
}

func TestKeepGoingTriesEveryTask(t *testing.T) {
	for _, order := range []Order{ByCategory, ByInput, Concurrent} {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCoordinator(t, append(serveMem(t, echoHandler, "ab"), WithOrder(order), WithOnFailure(KeepGoing))...)
			report, err := c.Run(t.Context(), mustParse(t, "abad a2 bbad b2"))
			if got, want := outcomesOf(report.Results), "abad:Failed a2:Done bbad:Failed b2:Done"; got != want {
				t.Errorf("%v: got %s, want %s", order, got, want)
			}
			if failed, ok := errors.AsType[*TaskError](err); !ok || failed.Index != 0 {
				t.Errorf("%v: error %v, want that of task 0", order, err)
			}
		})
	}
}

func TestOnFailureIsNamedInMessages(t *testing.T) {
	for p, want := range map[OnFailure]string{FinishStage: "FinishStage", StopSoon: "StopSoon", KeepGoing: "KeepGoing", 7: "OnFailure(7)"} {
		if got := p.String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestConcurrentRunsAllCategoriesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(context.Context, Task) (string, error) { time.Sleep(time.Second); return "", nil })
		c := newTestCoordinator(t, append(serveMem(t, h, "abc"), WithOrder(Concurrent))...)
		report, err := c.Run(t.Context(), mustParse(t, "a1 b1 c1"))
		if err != nil || report.Elapsed != time.Second {
			t.Errorf("took %v and %v, want a second for all three", report.Elapsed, err)
		}
	})
}

func TestTimeoutStartsWithTheHandlerAndReachesItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			if task.Instruction == "a1" {
				time.Sleep(time.Hour) // the others wait behind it, longer than their timeout
				return "", nil
			}
			start := time.Now()
			<-ctx.Done()
			return "", fmt.Errorf("after %v: %w", time.Since(start), ctx.Err())
		})
		c := newTestCoordinator(t, append(serveMem(t, h, "a"), WithTaskTimeout(3*time.Second), withLeastWindow(3))...)
		tasks := mustParse(t, "a1 a2 a3")
		tasks[0].Timeout = 2 * time.Hour
		tasks[2].Timeout = time.Second
		report, _ := c.Run(t.Context(), tasks)
		if got, want := outcomesOf(report.Results), "a1:Done a2:Failed a3:Failed"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		for i, want := range []string{1: "timeout: after 3s", 2: "timeout: after 1s"} {
			if want != "" && !strings.Contains(report.Results[i].Err.Error(), want) {
				t.Errorf("task %d: %v, want %s", i, report.Results[i].Err, want)
			}
		}
	})
}

func TestAHandlerThatIgnoresItsTimeoutIsStuckAndKeepsItsSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var running, peak atomic.Int64
		h := HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			if n := running.Add(1); n > peak.Load() {
				peak.Store(n)
			}
			defer running.Add(-1)
			if task.Instruction == "a1" {
				<-release
			}
			return "late", nil
		})
		w := NewWorker(h, WithSlots(2))
		var network memNetwork
		served := make(chan error, 1)
		ln := network.listen("w:1")
		go func() { served <- w.Serve(context.Background(), ln) }()
		c := newTestCoordinator(t, WithDialer(network.dial), WithWorkers("a", "w:1"), WithTaskTimeout(time.Minute))
		report, err := c.Run(t.Context(), mustParse(t, "a1 a2 a3 a4"))
		if got, want := outcomesOf(report.Results), "a1:Failed a2:Done a3:Done a4:Done"; got != want || report.Elapsed != time.Minute+stuckGrace {
			t.Errorf("got %s in %v, want %s", got, report.Elapsed, want)
		}
		if remote, ok := errors.AsType[*RemoteError](err); !ok || remote.Kind != "stuck" {
			t.Errorf("error %v, want the kind stuck", err)
		}
		if got := w.Stats(); got.Stuck != 1 || got.Running != 1 {
			t.Errorf("stats %+v, want one stuck and running", got)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := w.Shutdown(ctx); err == nil || !strings.Contains(err.Error(), "task 0 (a1), which is stuck") {
			t.Errorf("Shutdown: %v, want the stuck task named", err)
		}
		close(release)
		if err := w.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil || w.Stats().Stuck != 0 || peak.Load() > 2 {
			t.Errorf("Serve: %v; stats %+v; peak %d", err, w.Stats(), peak.Load())
		}
	})
}

func TestAWorkerWhoseSlotsAreAllStuckCountsAsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		h := HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			if task.Instruction == "a1" {
				<-release
			}
			return "", nil
		})
		c := newTestCoordinator(t, append(serveMem(t, h, "a"), WithTaskTimeout(time.Minute))...)
		report, err := c.Run(t.Context(), mustParse(t, "a1 a2 a3"))
		close(release)
		if got, want := outcomesOf(report.Results), "a1:Failed a2:Skipped a3:Skipped"; got != want || !errors.Is(err, ErrNoWorker) || !strings.Contains(err.Error(), errAllStuck.Error()) {
			t.Errorf("got %s and %v, want %s and ErrNoWorker because %v", got, err, want, errAllStuck)
		}
	})
}

// However many of its tasks a worker calls stuck, it is dialed again when it has
// reported all.
func TestAWorkerThatHasMoreStuckTasksThanSlotsIsDialedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.scripts("a:1", func(n int, p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"window":2}`)
			if n == 0 {
				p.expect("RUN 0 1 0 a0", "RUN 1 1 0 a1")
				p.send("FAIL 0 stuck 0", "FAIL 1 stuck 0")
			} else {
				p.expect("RUN 2 1 0 a2")
				p.send("DONE 2 0")
			}
			io.Copy(io.Discard, p.in)
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), withLeastWindow(2), WithOnFailure(KeepGoing), WithWorkerWait(time.Minute))
		report, _ := cl.run(t.Context(), c, tasksOf("a", 3))()
		if got := outcomes(report); got != "Failed Failed Done" || report.Elapsed > time.Second {
			t.Errorf("got %s after %v", got, report.Elapsed)
		}
	})
}

func TestWhatWaitsBehindStuckHandlersIsAskedBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.scripts("a:1", func(n int, p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"window":3}`)
			if n == 0 {
				p.expect("RUN 0 1 0 a0", "RUN 1 1 0 a1", "RUN 2 1 0 a2")
				p.send("FAIL 0 stuck 0")
				p.expect("RECALL 1", "RECALL 2")
				p.send("RETURN 1", "RETURN 2")
			} else {
				p.expect("RUN 1 2 0 a1", "RUN 2 2 0 a2")
				p.send("DONE 1 0", "DONE 2 0")
			}
			io.Copy(io.Discard, p.in)
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), withLeastWindow(3), WithOnFailure(KeepGoing), WithWorkerWait(time.Minute))
		report, _ := cl.run(t.Context(), c, tasksOf("a", 3))()
		if got := outcomes(report); got != "Failed Done Done" || report.Elapsed > time.Second || report.Troubles.Losses != 0 {
			t.Errorf("got %s after %v and %+v", got, report.Elapsed, report.Troubles)
		}
	})
}

func TestAWorkerWhoseStuckHandlerReturnsIsUsedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			if task.Instruction == "a1" {
				time.Sleep(10 * time.Second)
			}
			return "", nil
		})
		c := newTestCoordinator(t, append(serveMem(t, h, "a"), WithTaskTimeout(time.Second), withJitter(longest))...)
		report, _ := c.Run(t.Context(), mustParse(t, "a1 a2 a3"))
		if got, want := outcomesOf(report.Results), "a1:Failed a2:Done a3:Done"; got != want || report.Elapsed < 10*time.Second || report.Elapsed > 20*time.Second {
			t.Errorf("got %s after %v, want %s within 10s of 10s", got, report.Elapsed, want)
		}
	})
}

func TestTypedHandlersDecodeAndEncode(t *testing.T) {
	type in struct{ Path string }
	type out struct{ Size int }
	synctest.Test(t, func(t *testing.T) {
		h := HandlerOf(func(_ context.Context, i in) (out, error) { return out{len(i.Path)}, nil })
		c := newTestCoordinator(t, append(serveMem(t, h, "f"), WithOnFailure(KeepGoing))...)
		good, err := TaskOf("f", in{"<&>"})
		if err != nil || good.Instruction != `{"Path":"<&>"}` {
			t.Fatal(good, err)
		}
		report, _ := c.Run(t.Context(), []Task{good, {Category: "f", Instruction: `{"Path": 7}`}})
		if o, err := OutputOf[out](report.Results[0]); err != nil || o.Size != 3 {
			t.Errorf("got %v and %v", o, err)
		}
		_, err = OutputOf[out](report.Results[1])
		remote, ok := errors.AsType[*RemoteError](err)
		if !ok || remote.Kind != "final" || !strings.Contains(remote.Text, `field "Path"`) {
			t.Errorf("got %v, want a final error that names the field", err)
		}
		if _, err := OutputOf[out](Result{Output: `{"Size":"x"}`}); err == nil || !strings.Contains(err.Error(), `field "Size"`) {
			t.Errorf("got %v, want the field named", err)
		}
	})
}

func TestSnapshotCountsEveryTaskOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(_ context.Context, task Task) (string, error) {
			time.Sleep(time.Second)
			if task.Instruction == "a2" {
				return "", errors.New("no good")
			}
			return "", nil
		})
		c := newTestCoordinator(t, append(serveMem(t, h, "ab"), WithOnFailure(KeepGoing))...)
		var report *Report
		done := make(chan struct{})
		go func() { defer close(done); report, _ = c.Run(t.Context(), mustParse(t, "a1 a2 a3 a4 b1")) }()
		time.Sleep(2500 * time.Millisecond)
		snapshots := c.Snapshot()
		if len(snapshots) != 1 {
			t.Fatalf("%d runs, want 1", len(snapshots))
		}
		got := snapshots[0]
		want := RunSnapshot{Run: got.Run, Elapsed: 2500 * time.Millisecond, Categories: []CategorySnapshot{
			{Category: "a", Waiting: 1, InFlight: 1, Counts: Counts{Done: 1, Failed: 1},
				Workers: []WorkerSnapshot{{Worker: "a", Addr: "a:1", Open: true, InFlight: 1, Sent: 3, Counts: Counts{Done: 1, Failed: 1}}}},
			{Category: "b", Waiting: 1, Workers: []WorkerSnapshot{{Worker: "b", Addr: "b:1", Open: true}}},
		}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if diff := cmp.Diff(Counts{Done: 1, Failed: 1}, got.Counts()); diff != "" {
			t.Errorf("all categories (-want +got):\n%s", diff)
		}
		<-done
		for _, cat := range report.Categories {
			if cat.Waiting+cat.InFlight != 0 {
				t.Errorf("after the run: %+v", cat)
			}
		}
	})
}

func TestCategoriesOfASnapshotAndAReportAreSorted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const sorted = "abcdefgh"
		var c *Coordinator
		var counted []CategorySnapshot
		c = newTestCoordinator(t, serveMem(t, HandlerFunc(func(_ context.Context, task Task) (string, error) {
			if task.Category == "a" {
				counted = c.Snapshot()[0].Categories
			}
			return "", nil
		}), sorted)...)
		report, err := c.Run(t.Context(), mustParse(t, "d1 h1 a1 g1 b1 f1 c1 e1"))
		if err != nil {
			t.Fatal(err)
		}
		for _, all := range [][]CategorySnapshot{counted, report.Categories} {
			got := ""
			for _, category := range all {
				got += category.Category
			}
			if got != sorted {
				t.Errorf("got %s, want %s", got, sorted)
			}
		}
	})
}

func TestObserverTracksSessionsSendingsAndDurationsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(context.Context, Task) (string, error) { time.Sleep(time.Second); return "", nil })
		var log []string
		add := func(format string, args ...any) { log = append(log, fmt.Sprintf(format, args...)) }
		c := newTestCoordinator(t, append(serveMem(t, h, "a"), WithObserver(Observer{
			SessionOpened: func(i SessionOpenedInfo) { add("opened %s slots %d window %d", i.Worker, i.Slots, i.Window) },
			SessionLost:   func(i SessionLostInfo) { add("lost %s %v %v", i.Worker, i.Goodbye, i.Err) },
			GroupStarted:  func(i GroupStartedInfo) { add("started %s %d", i.Category, len(i.Tasks)) },
			TaskSent:      func(i TaskSentInfo) { add("sent %s %d", i.Task.Instruction, i.Attempt) },
			TaskDone: func(i TaskDoneInfo) {
				add("done %s %v %v %v", i.Result.Task.Instruction, i.Result.Queued, i.RoundTrip, i.Result.Executed)
			},
			GroupDone: func(i GroupDoneInfo) { add("ended %s %v", i.Category, i.Elapsed) },
			Goodbye:   func(i GoodbyeInfo) { add("goodbye %s", i.Text) },
		}), WithWindow(1), WithWorkerShutdown())...)
		if _, err := c.Run(t.Context(), mustParse(t, "a1 a2")); err != nil {
			t.Fatal(err)
		}
		want := []string{
			"opened a slots 1 window 1", "started a 2", "sent a1 1", "done a1 0s 1s 1s", "sent a2 1", "done a2 1s 1s 1s",
			"ended a 2s", "goodbye Goodbye from a", "lost a true <nil>",
		}
		if diff := cmp.Diff(want, log); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

func TestAnObserverIsGivenTheTasksOfAGroupThatIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tasks := mustParse(t, "b1 a1 b2")
		names := func(tasks []Task) (all string) {
			for _, task := range tasks {
				all += " " + task.Category + "/" + task.Instruction
			}
			return all
		}
		for order, want := range map[Order][]string{
			ByCategory: {"started a/a1", "ended a/a1", "started b/b1 b/b2", "ended b/b1 b/b2"},
			ByInput:    {"started b/b1", "ended b/b1", "started a/a1", "ended a/a1", "started b/b2", "ended b/b2"},
		} {
			for _, stream := range []bool{false, true} {
				var got []string
				c := newTestCoordinator(t, append(serveMem(t, parrot, "ab"), WithOrder(order), WithObserver(Observer{
					GroupStarted: func(i GroupStartedInfo) { got = append(got, "started"+names(i.Tasks)) },
					GroupDone:    func(i GroupDoneInfo) { got = append(got, "ended"+names(i.Tasks)) },
				}))...)
				if stream {
					for _, err := range c.Stream(t.Context(), slices.Values(tasks)) {
						if err != nil {
							t.Error(err)
						}
					}
				} else if _, err := c.Run(t.Context(), tasks); err != nil {
					t.Error(err)
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%v, in a Stream: %v (-want +got):\n%s", order, stream, diff)
				}
			}
		}
	})
}

func TestCancelGraceBoundsTheWaitForAHandlerThatIgnoresIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		h := HandlerFunc(func(context.Context, Task) (string, error) { <-release; return "", nil })
		c := newTestCoordinator(t, append(serveMem(t, h, "a"), WithCancelGrace(3*time.Second))...)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		report, err := c.Run(ctx, mustParse(t, "a1 a2"))
		close(release)
		if got, want := outcomesOf(report.Results), "a1:Unknown a2:Skipped"; got != want || report.Elapsed > time.Minute+4*time.Second+time.Second {
			t.Errorf("got %s in %v and %v, want %s", got, report.Elapsed, err, want)
		}
	})
}

func TestWhatAStreamCollectsIsWholeAndInOrder(t *testing.T) {
	for _, n := range []int{1, 64, 65, 192, 193, 20_000} {
		var tasks []Task
		for i := range n {
			tasks = append(tasks, Task{Category: "a", Instruction: fmt.Sprint(i)})
		}
		never := func() bool { return false }
		got := gather(slices.Values(tasks), never)
		if !slices.Equal(got, tasks) {
			t.Errorf("%d of %d tasks, or others", len(got), n)
		}
		if cap(got) > n {
			t.Errorf("memory for %d tasks is kept for %d", cap(got), n)
		}
		seen := 0
		stop := func() bool { seen++; return seen == n }
		if got := gather(slices.Values(append(tasks, tasks...)), stop); !slices.Equal(got, tasks) {
			t.Errorf("%d tasks, or others, where it was to stop after %d", len(got), n)
		}
	}
	if got := gather(slices.Values([]Task(nil)), nil); len(got) != 0 {
		t.Errorf("%d tasks of none", len(got))
	}
}
