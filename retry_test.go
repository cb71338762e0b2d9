package taskexec

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// withJitter replaces the drawing of random delays.
func withJitter(f func(most time.Duration) time.Duration) CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) { c.jitter = f })
}

// longest is the jitter that always draws the longest delay there may be.
func longest(most time.Duration) time.Duration { return most }

// none is the jitter that always draws no delay at all.
func none(time.Duration) time.Duration { return 0 }

func TestBackoffGrowsByItsFactorUpToItsMost(t *testing.T) {
	const s = time.Second
	for _, tt := range []struct {
		reason string
		b      backoff
		n      int
		want   time.Duration
	}{
		{"the first is the first", backoff{s, 10 * s, 2}, 1, s},
		{"each is its factor longer", backoff{s, 10 * s, 2}, 2, 2 * s},
		{"and again", backoff{s, 10 * s, 2}, 4, 8 * s},
		{"until the most", backoff{s, 10 * s, 2}, 5, 10 * s},
		{"and stays there", backoff{s, 10 * s, 2}, 1000, 10 * s},
		{"a power beyond all floats is the most", backoff{s, 10 * s, 2}, math.MaxInt32, 10 * s},
		{"a factor of 1 does not grow", backoff{s, 10 * s, 1}, 1000, s},
		{"a factor need not be whole", backoff{2 * s, 10 * s, 1.5}, 2, 3 * s},
		{"a first above the most is the most", backoff{20 * s, 10 * s, 2}, 1, 10 * s},
		{"the longest duration is not rounded over its end", backoff{s, math.MaxInt64, 2}, 1000, math.MaxInt64},
		{"nor as the first", backoff{math.MaxInt64, math.MaxInt64, 2}, 1, math.MaxInt64},
	} {
		if got := tt.b.slot(tt.n); got != tt.want {
			t.Errorf("%s: %+v after failure %d is %v, want %v", tt.reason, tt.b, tt.n, got, tt.want)
		}
	}
}

func TestFullJitterDrawsFromTheWholeRangeAndNotBeyond(t *testing.T) {
	for _, most := range []time.Duration{-1, 0, 1, 10, time.Second, math.MaxInt64} {
		low, high := time.Duration(math.MaxInt64), time.Duration(-1)
		for range 1000 {
			d := fullJitter(most)
			low, high = min(low, d), max(high, d)
		}
		if low < 0 || high > max(most, 0) {
			t.Errorf("up to %v it draws from %v to %v", most, low, high)
		}
		// 1000 draws miss a tenth of the range once in 10^45.
		if most > 0 && (low > most/10 || high < most-most/10) {
			t.Errorf("of what goes up to %v it uses only %v to %v", most, low, high)
		}
	}
}

// A retryRun is what became of one task on a worker that fails it again and
// again.
type retryRun struct {
	report *Report
	err    error
	delays []time.Duration // between the end of one try and the start of the next
	told   []TaskRetriedInfo
}

// retried runs one task on a worker of two slots whose handler does as handle
// says at each try, from 1.
func retried(t *testing.T, handle func(ctx context.Context, try int) (string, error), opts ...CoordinatorOption) (run retryRun) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var mu sync.Mutex
		try := 0
		var ended time.Time
		cl.worker("a:1", func(ctx context.Context, task Task) (string, error) {
			mu.Lock()
			if try++; try > 1 {
				run.delays = append(run.delays, time.Since(ended))
			}
			n := try
			mu.Unlock()
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				ended = time.Now()
			}()
			return handle(ctx, n)
		}, WithSlots(2))
		tasks := tasksOf("a", 1)
		run.report, run.err = cl.coordinator(append([]CoordinatorOption{WithWorkers("a", "a:1"),
			WithObserver(Observer{TaskRetried: func(i TaskRetriedInfo) { run.told = append(run.told, i) }})}, opts...)...).Run(t.Context(), tasks)
		checkReport(t, tasks, run.report, run.err)
	})
	return run
}

var errTold = errors.New("told to fail")

func TestRetryDelaysAreThoseOfThePolicy(t *testing.T) {
	const ms = time.Millisecond
	for _, tt := range []struct {
		reason string
		policy Retry
		want   []time.Duration
	}{
		{"one attempt is no retry", Retry{Attempts: 1}, nil},
		{"the defaults", Retry{Attempts: 10}, []time.Duration{
			100 * ms, 200 * ms, 400 * ms, 800 * ms, 1600 * ms, 3200 * ms, 6400 * ms, 10_000 * ms, 10_000 * ms}},
		{"the first delay", Retry{Attempts: 3, FirstDelay: time.Second}, []time.Duration{1000 * ms, 2000 * ms}},
		{"the factor", Retry{Attempts: 4, Factor: 1}, []time.Duration{100 * ms, 100 * ms, 100 * ms}},
		{"the cap", Retry{Attempts: 4, MaxDelay: 250 * ms}, []time.Duration{100 * ms, 200 * ms, 250 * ms}},
		{"the cap is below the first", Retry{Attempts: 3, FirstDelay: time.Hour, MaxDelay: 5 * ms}, []time.Duration{5 * ms, 5 * ms}},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			for _, jitter := range []struct {
				name string
				f    func(time.Duration) time.Duration
				want func(time.Duration) time.Duration
			}{
				{"longest", longest, longest},
				{"none", none, none},
				{"a third", func(d time.Duration) time.Duration { return d / 3 }, func(d time.Duration) time.Duration { return d / 3 }},
			} {
				run := retried(t, func(_ context.Context, try int) (string, error) {
					time.Sleep(7 * ms) // a delay counts from the report
					return "", fmt.Errorf("try %d: %w", try, errTold)
				}, WithRetry(tt.policy), withJitter(jitter.f))
				var want []time.Duration
				for _, d := range tt.want {
					want = append(want, jitter.want(d))
				}
				if diff := cmp.Diff(want, run.delays); diff != "" {
					t.Errorf("with jitter %s (-want +got):\n%s", jitter.name, diff)
				}
				r := run.report.Results[0]
				tries := tt.policy.Attempts
				if r.Outcome != Failed || r.Attempts != tries || r.Retries != tries-1 || r.Losses != 0 || run.report.Troubles != (Troubles{Retries: tries - 1}) {
					t.Errorf("got %+v with %+v", r, run.report.Troubles)
				}
				var told []TaskRetriedInfo
				for i, d := range want {
					told = append(told, TaskRetriedInfo{Run: run.report.Run, Task: r.Task, Attempt: i + 1, Worker: "a:1", Addr: "a:1",
						Err: &RemoteError{"error", fmt.Sprintf("try %d: told to fail", i+1)}, Delay: d})
				}
				if diff := cmp.Diff(told, run.told); diff != "" {
					t.Errorf("with jitter %s, what the observer was told (-want +got):\n%s", jitter.name, diff)
				}
				if want := fmt.Sprintf("try %d: told to fail", tries); !strings.HasSuffix(run.err.Error(), want) {
					t.Errorf("got %v, want the last try's words", run.err)
				}
			}
		})
	}
}

func TestRetryDelaysAreJitteredOverTheirWholeRange(t *testing.T) {
	// Drawn 300 times, the delay before the second try should come near both
	// ends: it misses a tenth of the range once in 10^13.
	var low, high time.Duration = math.MaxInt64, 0
	for range 300 {
		run := retried(t, func(context.Context, int) (string, error) { return "", errTold }, WithRetry(Retry{Attempts: 2, FirstDelay: time.Second}))
		low, high = min(low, run.delays[0]), max(high, run.delays[0])
	}
	if low > 100*time.Millisecond || high < 900*time.Millisecond || high > time.Second {
		t.Errorf("delays from %v to %v, want them from 0 to 1s", low, high)
	}
}

func TestATaskThatSucceedsInTheEndIsDone(t *testing.T) {
	run := retried(t, func(_ context.Context, try int) (string, error) {
		if try < 3 {
			return "", errTold
		}
		return "at last", nil
	}, WithRetry(Retry{Attempts: 5}))
	r := run.report.Results[0]
	if r.Outcome != Done || r.Output != "at last" || r.Attempts != 3 || r.Retries != 2 || run.err != nil {
		t.Errorf("got %+v and %v", r, run.err)
	}
	want := []WorkerSnapshot{{Worker: "a:1", Addr: "a:1", Sent: 3, Counts: Counts{Done: 1, Failed: 2}}}
	got := run.report.Categories[0]
	got.Workers[0].Open = false // the session may not have been closed yet
	if diff := cmp.Diff(want, got.Workers); diff != "" || got.Troubles.Retries != 2 {
		t.Errorf("%+v; workers (-want +got):\n%s", got.Troubles, diff)
	}
}

func TestWhatIsTriedAgainIsWhatAnotherTryMayChange(t *testing.T) {
	until := func(ctx context.Context, try int) (string, error) {
		<-ctx.Done()
		return "", ctx.Err()
	}
	for _, tt := range []struct {
		reason  string
		handle  func(ctx context.Context, try int) (string, error)
		panics  bool // Retry.Panics
		tries   int
		kind    string
		outcome Outcome
	}{
		{"an error", func(context.Context, int) (string, error) { return "", errTold }, false, 3, "error", Failed},
		{"a final error", func(context.Context, int) (string, error) { return "", Final(errTold) }, false, 1, "final", Failed},
		{"a final error that is wrapped", func(context.Context, int) (string, error) { return "", fmt.Errorf("so: %w", Final(errTold)) }, false, 1, "final", Failed},
		{"a final error is stronger than its wish", func(context.Context, int) (string, error) { return "", RetryAfter(Final(errTold), time.Second) }, false, 1, "final", Failed},
		{"a final error after one that is not", func(_ context.Context, try int) (string, error) {
			if try == 2 {
				return "", Final(errTold)
			}
			return "", errTold
		}, false, 2, "final", Failed},
		{"a panic", func(context.Context, int) (string, error) { panic("told to") }, false, 1, "panic", Failed},
		{"a panic, if the policy says so", func(context.Context, int) (string, error) { panic("told to") }, true, 3, "panic", Failed},
		{"an output too long to send", func(context.Context, int) (string, error) { return strings.Repeat("x", 2<<20), nil }, true, 1, "output", Failed},
		{"a timeout", until, false, 3, "timeout", Failed},
		{"ctx's error though nobody canceled", func(context.Context, int) (string, error) { return "", context.Canceled }, false, 3, "error", Failed},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			run := retried(t, tt.handle, WithRetry(Retry{Attempts: 3, Panics: tt.panics}), WithTaskTimeout(time.Second))
			r := run.report.Results[0]
			if r.Outcome != tt.outcome || r.Attempts != tt.tries || r.Retries != tt.tries-1 || len(run.delays) != tt.tries-1 {
				t.Errorf("got %+v, want %d tries", r, tt.tries)
			}
			if remote, ok := errors.AsType[*RemoteError](run.err); !ok || remote.Kind != tt.kind {
				t.Errorf("got %v, want the kind %s", run.err, tt.kind)
			}
		})
	}
}

func TestACanceledTaskIsNotTriedAgain(t *testing.T) {
	// Only a worker says that nobody canceled anything and yet the task was.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.welcome()
			p.expect("RUN 0 1 0 a0")
			p.send("FAIL 0 canceled 0 because")
			p.expectEnd()
		})
		tasks := tasksOf("a", 1)
		report, err := cl.coordinator(WithWorkers("a", "a:1"), WithRetry(Retry{Attempts: 3, Panics: true})).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if r := report.Results[0]; r.Outcome != Canceled || r.Attempts != 1 || r.Retries != 0 {
			t.Errorf("got %+v", r)
		}
	})
}

func TestAStuckTaskIsTriedAgainOnAnotherWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		release := make(chan struct{})
		for _, addr := range []string{"a:1", "a:2"} {
			cl.worker(addr, func(_ context.Context, task Task) (string, error) {
				cl.log("%s on %s", task.Instruction, addr)
				if len(cl.traced()) == 1 {
					<-release
				}
				return "", nil
			})
		}
		tasks := tasksOf("a", 1)
		report, err := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithTaskTimeout(time.Second), WithRetry(Retry{Attempts: 2})).Run(t.Context(), tasks)
		close(release)
		checkReport(t, tasks, report, err)
		if r := report.Results[0]; err != nil || r.Retries != 1 || r.Attempts != 2 {
			t.Errorf("got %+v and %v", r, err)
		}
		if traced := cl.traced(); len(traced) != 2 || traced[0] == traced[1] {
			t.Errorf("executed %v, want one try on each worker", traced)
		}
		if report.Troubles != (Troubles{Retries: 1, Stuck: 1}) {
			t.Errorf("got %+v", report.Troubles)
		}
	})
}

func TestRetryAfterSetsTheDelay(t *testing.T) {
	const d = 42*time.Minute + 5*time.Millisecond
	handle := func(_ context.Context, try int) (string, error) {
		if try == 1 {
			return "", fmt.Errorf("the disk is full: %w", RetryAfter(errTold, d-time.Millisecond/2))
		}
		return "", errTold
	}
	run := retried(t, handle, WithRetry(Retry{Attempts: 3, MaxDelay: time.Second}), withJitter(longest))
	// Rounded up to a millisecond, beyond the cap, and not jittered; and the
	// next delay is that of the second failure.
	if diff := cmp.Diff([]time.Duration{d, 200 * time.Millisecond}, run.delays); diff != "" {
		t.Errorf("delays (-want +got):\n%s", diff)
	}
	if r := run.report.Results[0]; r.Attempts != 3 || r.Outcome != Failed {
		t.Errorf("it counts as a failure like any other: got %+v", r)
	}
	// Without a policy it is one.
	run = retried(t, handle)
	r := run.report.Results[0]
	remote, ok := errors.AsType[*RemoteError](run.err)
	if r.Attempts != 1 || r.Outcome != Failed || !ok || *remote != (RemoteError{Kind: "error", Text: "the disk is full: told to fail"}) {
		t.Errorf("without WithRetry: got %+v and %v", r, run.err)
	}
}

func TestFinalAndRetryAfterKeepTheirError(t *testing.T) {
	if Final(nil) != nil || RetryAfter(nil, time.Second) != nil {
		t.Error("nil does not stay nil")
	}
	for _, err := range []error{Final(errTold), RetryAfter(errTold, time.Second)} {
		if !errors.Is(err, errTold) || err.Error() != errTold.Error() {
			t.Errorf("got %v", err)
		}
	}
	for _, d := range []time.Duration{0, -1} {
		func() {
			defer func() {
				if v, ok := recover().(string); !ok || !strings.HasPrefix(v, "taskexec: RetryAfter: ") {
					t.Errorf("RetryAfter with %v panics with %v", d, v)
				}
			}()
			RetryAfter(errTold, d)
		}()
	}
}

// inTurns has n tasks executed on one worker with one slot, of which a1 fails
// at its first try, and lists the executions.
func inTurns(t *testing.T, n int, opts ...CoordinatorOption) (executed string, report *Report) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		failed := false
		cl.worker("a:1", func(_ context.Context, task Task) (string, error) {
			cl.log("%s", task.Instruction)
			time.Sleep(1100 * time.Microsecond) // no task ends when the retry is due
			if task.Instruction == "a1" && !failed {
				failed = true
				return "", RetryAfter(errTold, 10*time.Millisecond)
			}
			return "", nil
		})
		tasks := tasksOf("a", n)
		var err error
		report, err = cl.coordinator(append([]CoordinatorOption{WithWorkers("a", "a:1"), WithRetry(Retry{Attempts: 2})}, opts...)...).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err != nil {
			t.Error(err)
		}
		executed = strings.Join(cl.traced(), " ")
	})
	return executed, report
}

func TestTheOthersOfAGroupNeedNotWaitForARetry(t *testing.T) {
	got, report := inTurns(t, 4)
	if want := "a0 a1 a2 a3 a1"; got != want || report.Elapsed != 13300*time.Microsecond {
		t.Errorf("executed %s in %v, want %s in 13.3ms", got, report.Elapsed, want)
	}
}

func TestARetriedTaskComesBackToItsPlace(t *testing.T) {
	got, _ := inTurns(t, 20, WithWindow(1))
	if want := "a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11 a1 a12 a13 a14 a15 a16 a17 a18 a19"; got != want {
		t.Errorf("executed\n%s, want\n%s", got, want)
	}
}

func TestByInputLaterTasksWaitForARetry(t *testing.T) {
	got, report := inTurns(t, 4, WithOrder(ByInput))
	if want := "a0 a1 a1 a2 a3"; got != want || report.Elapsed != 15500*time.Microsecond {
		t.Errorf("executed %s in %v, want %s in 15.5ms", got, report.Elapsed, want)
	}
	// Nor does a later stage begin.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("w:1", func(ctx context.Context, task Task) (string, error) {
			cl.log("%s", task.Instruction)
			if info, _ := TaskInfoFrom(ctx); task.Instruction == "a1" && info.Attempt == 1 {
				return "", RetryAfter(errTold, time.Hour)
			}
			return "", nil
		})
		tasks := mustParse(t, "b1 a1 a2")
		report, err := cl.coordinator(WithWorkers("a", "w:1"), WithWorkers("b", "w:1"), WithRetry(Retry{Attempts: 2})).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if got, want := strings.Join(cl.traced(), " "), "a1 a2 a1 b1"; got != want || err != nil {
			t.Errorf("executed %s, want %s", got, want)
		}
	})
}

func TestARetryThatWaitsIsFailedWithItsLastErrorWhenTheRunIsStopped(t *testing.T) {
	for _, tt := range []struct {
		reason  string
		options []CoordinatorOption
		stop    func(cancel context.CancelCauseFunc, c *Coordinator)
		want    string // in the error of the task that waits
	}{
		{"ctx ends", nil, func(cancel context.CancelCauseFunc, _ *Coordinator) { cancel(errors.New("the lights go out")) }, "the lights go out"},
		{"Shutdown", nil, func(_ context.CancelCauseFunc, c *Coordinator) { c.Shutdown(context.Background()) }, "coordinator closed"},
		{"StopSoon, another task fails", []CoordinatorOption{WithOnFailure(StopSoon)}, nil, "task 1 (a1) Failed"},
		{"no worker is left", nil, nil, "no worker"},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", func(p *peer) {
					p.expect("HELLO …")
					p.send(`WELCOME taskexec/1 {"slots":3}`)
					p.expect("RUN 0 1 0 a0", "RUN 1 1 0 a1", "RUN 2 1 0 a2")
					p.send("FAIL 0 error 3600000 come back later", "FAIL 2 error 100 try again")
					p.expect("RUN 2 2 0 a2")
					p.send("FAIL 2 error 7200000 come back much later")
					time.Sleep(45 * time.Second)
					if tt.stop == nil {
						p.send("FAIL 1 final 0 no")
						time.Sleep(time.Minute)
						if tt.want == "no worker" {
							return
						}
					}
					for {
						line, err := p.in.ReadString('\n')
						if err != nil {
							return
						}
						if strings.HasPrefix(line, "CANCEL") || strings.HasPrefix(line, "RECALL") {
							p.send("FAIL 1 error 0 answered at the end")
						}
					}
				})
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				c := cl.coordinator(append([]CoordinatorOption{WithWorkers("a", "a:1"), WithRetry(Retry{Attempts: 9})}, tt.options...)...)
				var report *Report
				var err error
				done := make(chan struct{})
				tasks := tasksOf("a", 3)
				go func() { defer close(done); report, err = c.Run(ctx, tasks) }()
				time.Sleep(40 * time.Second)
				snap := c.Snapshot()[0].Categories[0]
				if want := (CategorySnapshot{Waiting: 2, InFlight: 1}); snap.Waiting != want.Waiting || snap.InFlight != want.InFlight || snap.Troubles.Retries != 3 {
					t.Errorf("while they wait: got %+v", snap)
				}
				if tt.stop != nil {
					tt.stop(cancel, c)
				}
				<-done
				checkReport(t, tasks, report, err)
				if report.Elapsed > 2*time.Hour {
					t.Errorf("the run took %v", report.Elapsed)
				}
				for i, words := range map[int]string{0: "come back later", 2: "come back much later"} {
					r := report.Results[i]
					if r.Outcome != Failed || !strings.Contains(r.Err.Error(), words) || !strings.Contains(r.Err.Error(), tt.want) {
						t.Errorf("task %d: got %v, want its last error and why it is not tried again: %s", i, r.Err, tt.want)
					}
					if remote, ok := errors.AsType[*RemoteError](r.Err); !ok || remote.Text != words {
						t.Errorf("task %d: %v does not wrap its *RemoteError", i, r.Err)
					}
					// A retry that was not made is none.
					if r.Retries != i/2 || r.Attempts != 1+i/2 {
						t.Errorf("task %d: %d retries in %d attempts, want %d", i, r.Retries, r.Attempts, i/2)
					}
				}
				if report.Troubles.Retries != 1 {
					t.Errorf("got %+v, want the one retry that was made", report.Troubles)
				}
			})
		})
	}
}

func TestWhatAWorkerGivesBackOrLosesChargesNoTry(t *testing.T) {
	// Two tries: one fails, and in between the task is lost and given back.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		sessions := []func(p *peer){
			func(p *peer) { p.expect("RUN 0 1 0 a0") }, // lost
			func(p *peer) {
				p.expect("RUN 0 2 0 a0")
				p.send("FAIL 0 error 0 once")
				p.expect("RUN 0 3 0 a0")
				p.send("DRAIN", "RETURN 0", "GOODBYE")
			},
			func(p *peer) { p.expect("RUN 0 4 0 a0") }, // lost
			func(p *peer) {
				p.expect("RUN 0 5 0 a0")
				p.send("DONE 0 0 at last")
				p.expectEnd()
			},
		}
		cl.scripts("a:1", func(n int, p *peer) {
			p.welcome()
			sessions[n](p)
		})
		tasks := tasksOf("a", 1)
		c := cl.coordinator(WithWorkers("a", "a:1"), WithRetry(Retry{Attempts: 2}), WithWorkerWait(time.Minute))
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		want := Result{Task: tasks[0], Outcome: Done, Output: "at last", Worker: "a:1", Attempts: 5, Retries: 1, Losses: 2}
		got := report.Results[0]
		got.Queued = 0
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%v; result (-want +got):\n%s", err, diff)
		}
		if want := (Troubles{Losses: 2, Retries: 1, Returns: 1, Redials: 3}); report.Troubles != want {
			t.Errorf("got %+v, want %+v", report.Troubles, want)
		}
	})
}

func TestARetryThatIsLostIsUnknownAndNotFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.welcome()
			p.expect("RUN 0 1 0 a0")
			p.send("FAIL 0 error 0 the first try")
			p.expect("RUN 0 2 0 a0")
		})
		report, err := cl.run(t.Context(), cl.coordinator(WithWorkers("a", "a:1"), WithRetry(Retry{Attempts: 2})), tasksOf("a", 1))()
		r := report.Results[0]
		if r.Outcome != Unknown || !errors.Is(r.Err, ErrOutcomeUnknown) || strings.Contains(r.Err.Error(), "the first try") || r.Retries != 1 || r.Losses != 1 {
			t.Errorf("got %+v and %v", r, err)
		}
	})
}

func TestInvalidFailurePoliciesAreRefusedAtConstruction(t *testing.T) {
	const s = time.Second
	for _, tt := range []struct {
		reason string
		option CoordinatorOption
		want   string // in the error; "" if it is fine
	}{
		{"no attempt", WithRetry(Retry{}), "WithRetry: Attempts is 0"},
		{"a negative number of attempts", WithRetry(Retry{Attempts: -1}), "WithRetry: Attempts is -1"},
		{"one attempt", WithRetry(Retry{Attempts: 1}), ""},
		{"a negative first delay", WithRetry(Retry{Attempts: 2, FirstDelay: -s}), "delays are not negative"},
		{"a negative cap", WithRetry(Retry{Attempts: 2, MaxDelay: -s}), "delays are not negative"},
		{"a factor that shrinks", WithRetry(Retry{Attempts: 2, Factor: 0.5}), "Factor is 0.5"},
		{"a negative factor", WithRetry(Retry{Attempts: 2, Factor: -2}), "Factor is -2"},
		{"a factor that is no number", WithRetry(Retry{Attempts: 2, Factor: math.NaN()}), "Factor is NaN"},
		{"an endless factor", WithRetry(Retry{Attempts: 2, Factor: math.Inf(1)}), "Factor is +Inf"},
		{"a factor of 1", WithRetry(Retry{Attempts: 2, Factor: 1}), ""},
		{"all at their ends", WithRetry(Retry{Attempts: math.MaxInt, FirstDelay: math.MaxInt64, Factor: math.MaxFloat64, MaxDelay: math.MaxInt64}), ""},
		{"a heartbeat longer than the timeout", WithHeartbeat(20*s, 15*s), "WithHeartbeat: 20s and 15s"},
		{"a heartbeat of more than half the timeout", WithHeartbeat(8*s, 15*s), "WithHeartbeat: 8s and 15s"},
		{"a heartbeat whose double is no duration", WithHeartbeat(math.MaxInt64, s), "WithHeartbeat: "},
		{"half the timeout", WithHeartbeat(5*s, 10*s), ""},
		{"a heartbeat too fast", WithHeartbeat(s/1001, 15*s), "intervals of 1ms or more"},
		{"the fastest heartbeat", WithHeartbeat(s/1000, s/500), ""},
		{"no heartbeat", WithHeartbeat(0, 15*s), "WithHeartbeat: 0s and 15s"},
		{"a negative heartbeat", WithHeartbeat(-s, 15*s), "WithHeartbeat: -1s and 15s"},
		{"no timeout", WithHeartbeat(s, 0), "WithHeartbeat: 1s and 0s"},
	} {
		c, err := NewCoordinator(WithWorkers("a", "a:1"), tt.option)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.reason, err)
		case tt.want != "" && (err == nil || c != nil || !strings.HasPrefix(err.Error(), "taskexec: ") || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: got %v, want %s", tt.reason, err, tt.want)
		}
	}
}

// Many tasks that fail at random are tried again in any order of their due
// times, and each ends as its last try did.
func TestManyRetriesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var mu sync.Mutex
		tries := make(map[string][]time.Time)
		cl.worker("a:1", func(_ context.Context, task Task) (string, error) {
			mu.Lock()
			defer mu.Unlock()
			tries[task.Instruction] = append(tries[task.Instruction], time.Now())
			var n int
			fmt.Sscanf(task.Instruction, "a%d", &n)
			if len(tries[task.Instruction]) <= n%4 {
				return "", RetryAfter(errTold, time.Duration(1+(n*7919)%1000)*time.Millisecond)
			}
			return "", nil
		}, WithSlots(3))
		tasks := tasksOf("a", 400)
		report, err := cl.coordinator(WithWorkers("a", "a:1"), WithRetry(Retry{Attempts: 4})).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err != nil {
			t.Fatal(err)
		}
		for n, task := range tasks {
			at := tries[task.Instruction]
			d := time.Duration(1+(n*7919)%1000) * time.Millisecond
			for i := range at[1:] {
				if got := at[i+1].Sub(at[i]); got != d {
					t.Errorf("%s waited %v for try %d, want %v", task.Instruction, got, i+2, d)
				}
			}
			if r := report.Results[n]; r.Retries != n%4 || len(at) != 1+n%4 {
				t.Errorf("%s was tried %d times with %d retries", task.Instruction, len(at), r.Retries)
			}
		}
		if !slices.IsSortedFunc(report.Results, func(a, b Result) int { return a.Index - b.Index }) {
			t.Error("results are out of order")
		}
	})
}
