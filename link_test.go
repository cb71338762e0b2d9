package taskexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// dialTimes is a dialer's memory: when each address was dialed, counted from
// when it was made.
type dialTimes struct {
	born time.Time

	mu sync.Mutex // guards following
	at map[string][]time.Duration
}

// dialTimes has c's dials noted.
func (c *cluster) dialTimes() (*dialTimes, CoordinatorOption) {
	d := &dialTimes{born: time.Now(), at: make(map[string][]time.Duration)}
	return d, WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		d.mu.Lock()
		d.at[addr] = append(d.at[addr], time.Since(d.born))
		d.mu.Unlock()
		return c.dial(ctx, network, addr)
	})
}

func (d *dialTimes) of(addr string) []time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]time.Duration(nil), d.at[addr]...)
}

// run runs tasks beside the test, and checks the report.
func (c *cluster) run(ctx context.Context, coordinator *Coordinator, tasks []Task) (wait func() (*Report, error)) {
	var report *Report
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		report, err = coordinator.Run(ctx, tasks)
	}()
	return func() (*Report, error) {
		c.t.Helper()
		<-done
		checkReport(c.t, tasks, report, err)
		return report, err
	}
}

const ms = time.Millisecond

func TestALostWorkerIsDialedOnceInEachSlotOfTheBackoff(t *testing.T) {
	slots := []time.Duration{100 * ms, 200 * ms, 400 * ms, 800 * ms, 1600 * ms, 3200 * ms, 6400 * ms, 10_000 * ms, 10_000 * ms}
	for _, tt := range []struct {
		reason string
		jitter func(time.Duration) time.Duration
	}{
		{"at the start of each", none},
		{"at the end of each", longest},
		{"somewhere in each", func(d time.Duration) time.Duration { return d / 3 }},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				p := cl.process("a:1", until)
				times, dialer := cl.dialTimes()
				cl.after(time.Second, p.kill)
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(32*time.Second), dialer, withJitter(tt.jitter))
				report, err := cl.run(t.Context(), c, tasksOf("a", 1))()
				if !errors.Is(err, ErrNoWorker) || report.Elapsed != 33*time.Second {
					t.Errorf("%v after %v, want ErrNoWorker after 33s", err, report.Elapsed)
				}
				want := []time.Duration{0}
				start := time.Second
				for _, slot := range slots {
					if at := start + tt.jitter(slot); at < 33*time.Second {
						want = append(want, at)
					}
					start += slot
				}
				if diff := cmp.Diff(want, times.of("a:1")); diff != "" {
					t.Errorf("dialed at (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestDialsOfTwoCoordinatorsAreNotInStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		p := cl.process("a:1", until)
		cl.after(time.Second, p.kill)
		var waits []func() (*Report, error)
		var all []*dialTimes
		for range 2 {
			times, dialer := cl.dialTimes()
			all = append(all, times)
			waits = append(waits, cl.run(t.Context(), cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute), dialer), tasksOf("a", 1)))
		}
		for _, wait := range waits {
			wait()
		}
		one, two := all[0].of("a:1")[1:], all[1].of("a:1")[1:]
		for i := range min(len(one), len(two)) {
			if one[i] == two[i] {
				t.Errorf("both dialed at %v", one[i])
			}
		}
		if len(one) < 6 || len(one) > 20 {
			t.Errorf("dialed at %v", one)
		}
	})
}

func TestBackoffGoesOnForAWorkerThatGreetsAndIsLost(t *testing.T) {
	for _, tt := range []struct {
		reason string
		play   func(p *peer)
	}{
		{"it greets and closes", func(p *peer) { p.welcome() }},
		{"it takes a task with it", func(p *peer) { p.welcome(); p.next() }},
		{"it drains at once", func(p *peer) {
			p.welcome()
			p.send("DRAIN")
			io.WriteString(p.conn, "GOODBYE\n")
		}},
		{"it takes its leave at once", func(p *peer) {
			p.welcome()
			p.send("GOODBYE")
		}},
		{"it gives back what it is sent", func(p *peer) {
			p.welcome()
			p.send("DRAIN", "RETURN "+p.task(), "GOODBYE")
		}},
		{"it gives back what it was never asked for", func(p *peer) {
			p.welcome()
			io.WriteString(p.conn, "RETURN "+p.task()+"\n")
			io.Copy(io.Discard, p.conn)
		}},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				times, dialer := cl.dialTimes()
				cl.scripts("a:1", func(_ int, p *peer) {
					p.t = quiet{p.t} // the coordinator may have gone
					tt.play(p)
				})
				var slots []time.Duration
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(30*time.Second), dialer, withJitter(func(slot time.Duration) time.Duration {
					slots = append(slots, slot)
					return 0
				}))
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				report, err := cl.run(ctx, c, tasksOf("a", 10))()
				// What is lost with it again and again is not sent any more.
				if !errors.Is(err, ErrNoWorker) && !errors.Is(err, ErrOutcomeUnknown) || report.Elapsed > 20*time.Minute {
					t.Errorf("after %v: got %v, want ErrNoWorker or ErrOutcomeUnknown", report.Elapsed, err)
				}
				at := times.of("a:1")
				for i, gap := range []time.Duration{100 * ms, 200 * ms, 400 * ms, 800 * ms, 1600 * ms} {
					// Within a second a connection that ends is closed.
					if got := at[i+2] - at[i+1]; got < gap {
						t.Errorf("dialed at %v: %v between dials %d and %d, want at least %v", at, got, i+1, i+2, gap)
					}
				}
				widest := 50 * ms
				for _, slot := range slots {
					if slot > 2*widest {
						t.Errorf("slots of %v: one was left out", slots)
					}
					widest = max(widest, slot)
				}
			})
		})
	}
}

func TestBackoffBeginsAnewForAWorkerThatHasExecutedATask(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.scripts("a:1", func(n int, p *peer) {
			p.welcome()
			p.expect(fmt.Sprintf("RUN %d …", n)) // which may have been on its way to the session before
			p.send(fmt.Sprintf("DONE %d 0", n))
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute), withJitter(longest))
		report, err := cl.run(t.Context(), c, tasksOf("a", 50))()
		if most := 49 * 2 * defaultBackoff.first; err != nil || report.Elapsed > most {
			t.Errorf("got %v after %v, want each session within two of the shortest slots", err, report.Elapsed)
		}
	})
}

// quiet is a test whose peer may be interrupted at any time.
type quiet struct{ testing.TB }

func (q quiet) Errorf(string, ...any) {}

func TestBackoffBeginsAgainAfterAWorkerThatReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		times, dialer := cl.dialTimes()
		cl.scripts("a:1", func(n int, p *peer) {
			p.welcome()
			task := p.task()
			time.Sleep(time.Minute)
			p.send("DONE " + task + " 0")
			if n == 5 {
				p.expectEnd()
			}
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(30*time.Second), dialer, withJitter(longest))
		_, err := cl.run(t.Context(), c, tasksOf("a", 6))()
		if err != nil {
			t.Error(err)
		}
		var want []time.Duration
		for i := range 6 {
			want = append(want, time.Duration(i)*(time.Minute+100*ms))
		}
		if diff := cmp.Diff(want, times.of("a:1")); diff != "" {
			t.Errorf("dialed at (-want +got):\n%s", diff)
		}
	})
}

func TestNoSlotOfTheBackoffHasTwoDialsEvenIfTheFirstSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		times, dialer := cl.dialTimes()
		cl.scripts("a:1", func(n int, p *peer) {
			p.welcome()
			p.send("DONE " + p.task() + " 0")
			if n == 9 {
				p.expectEnd()
			}
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(30*time.Second), dialer, withJitter(none))
		if _, err := cl.run(t.Context(), c, tasksOf("a", 10))(); err != nil {
			t.Error(err)
		}
		at := times.of("a:1")
		for i := range at[2:] {
			if gap := at[i+2] - at[i+1]; gap < 100*ms {
				t.Errorf("dialed at %v: %v apart, want a slot's 100ms", at, gap)
			}
		}
	})
}

func TestARunGoesOnWhenItsWorkerIsBackInTime(t *testing.T) {
	for _, tt := range []struct {
		reason string
		again  func(cl *cluster, p *process)
	}{
		{"restarted on its address", func(_ *cluster, p *process) { p.start() }},
		{"the same, after a cut", nil},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				p := cl.process("back:1", func(ctx context.Context, task Task) (string, error) {
					cl.log("%s", task.Instruction)
					select {
					case <-time.After(time.Second):
						return "", nil
					case <-ctx.Done():
						return "", ctx.Err()
					}
				})
				r := cl.relay("a:1", "back:1")
				cl.after(2500*ms, func() {
					if tt.again == nil {
						r.cut()
						return
					}
					p.kill()
				})
				if tt.again != nil {
					cl.after(20*time.Second, func() { tt.again(cl, p) })
				}
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(30*time.Second), withJitter(longest))
				report, err := cl.run(t.Context(), c, tasksOf("a", 6))()
				if err != nil {
					t.Error(err)
				}
				if want := (Troubles{Losses: 1, Redials: 1}); report.Troubles != want {
					t.Errorf("got %+v, want %+v", report.Troubles, want)
				}
				if got, want := strings.Join(cl.traced(), " "), "a0 a1 a2 a2 a3 a4 a5"; got != want {
					t.Errorf("executed %s, want %s", got, want)
				}
				if w := report.Categories[0].Workers[0]; w.Redials != 1 || w.Sent != 7 || w.Counts.Done != 6 {
					t.Errorf("got %+v", w)
				}
			})
		})
	}
}

func TestARunWaitsForAWorkerAndThenNamesWhatItTried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		p := cl.process("a:1", until)
		cl.script("a:2", func(p *peer) {
			p.welcome()
			p.task()
			time.Sleep(time.Second)
			p.send("ERROR closing the disk is full")
			io.Copy(io.Discard, p.in)
		})
		cl.worker("b:1", echo)
		cl.after(time.Minute, p.kill)
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithWorkers("b", "b:1"), WithWorkerWait(45*time.Second), WithWindow(1))
		tasks := mustParse(t, "a1 a2 a3 b1")
		report, err := cl.run(t.Context(), c, tasks)()
		if !errors.Is(err, ErrNoWorker) || report.Elapsed != 105*time.Second {
			t.Errorf("%v after %v, want ErrNoWorker 45s after the last was lost", err, report.Elapsed)
		}
		for _, want := range []string{
			`no worker for category "a" for 45s`,
			"(worker of category a at a:1: ", "connection", ", and then dial a:1: connection refused; ",
			"worker of category a at a:2: ", "the disk is full, and then dial a:2: connection refused)",
		} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v\ndoes not say %q", err, want)
			}
		}
		if strings.Contains(err.Error(), "b:1") {
			t.Errorf("%v names a worker that is fine", err)
		}
		if got, want := outcomes(report), "Unknown Unknown Skipped Skipped"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
}

func TestPatienceIsForTheTimeWithoutAnyWorker(t *testing.T) {
	// The worker is away for 20 of every 40 seconds, and dialed again after
	// 22.7; in between it executes a task of 15 s, and loses one.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		p := cl.process("a:1", func(ctx context.Context, task Task) (string, error) {
			select {
			case <-time.After(15 * time.Second):
				return "", nil
			case <-ctx.Done():
				return "", ctx.Err()
			}
		})
		for i := range 10 {
			cl.after(time.Duration(40*i+20)*time.Second, p.kill)
			cl.after(time.Duration(40*i+40)*time.Second, func() { p.start() })
		}
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(30*time.Second), withJitter(longest))
		report, err := cl.run(t.Context(), c, tasksOf("a", 8))()
		if err != nil {
			t.Errorf("after %v: %v", report.Elapsed, err)
		}
	})
}

// The patience runs from when the last worker drains, and what that reports
// after it does not end it.
func TestWhatADrainingWorkerReportsDoesNotMakeTheRunWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		p := cl.process("a:1", func(ctx context.Context, task Task) (string, error) {
			select {
			case <-time.After(15 * time.Second):
				return "", nil
			case <-ctx.Done():
				return "", ctx.Err()
			}
		})
		// Dialed again after 12.7 s of 30, it executes a task, and drains.
		cl.after(5*time.Second, p.kill)
		cl.after(15*time.Second, func() { p.start() })
		cl.after(20*time.Second, func() { p.current().Shutdown(context.Background()) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(30*time.Second), withJitter(longest))
		report, err := cl.run(ctx, c, tasksOf("a", 2))()
		if !errors.Is(err, ErrNoWorker) || report.Counts.Done != 1 || report.Elapsed != 50*time.Second {
			t.Errorf("after %v, with %+v: %v; want %v 30 s after the drain began", report.Elapsed, report.Counts, err, ErrNoWorker)
		}
	})
}

func TestTheEndOfARunThatWaitsForAWorkerIsItsReason(t *testing.T) {
	reason := errors.New("the lights go out")
	for _, tt := range []struct {
		name string
		b    string // the handler of b says so after a minute
		stop func(cancel context.CancelCauseFunc, c *Coordinator)
		want error
	}{
		{"ctx ends", "", func(cancel context.CancelCauseFunc, _ *Coordinator) { cancel(reason) }, reason},
		{"Shutdown", "", func(_ context.CancelCauseFunc, c *Coordinator) { c.Shutdown(context.Background()) }, ErrCoordinatorClosed},
		{"StopSoon", "no more", nil, nil},
	} {
		for _, start := range []bool{false, true} {
			if start && tt.stop == nil {
				continue
			}
			t.Run(fmt.Sprintf("%s, at the start %v", tt.name, start), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					cl := newCluster(t)
					if !start {
						p := cl.process("a:1", until)
						cl.after(time.Second, p.kill)
					}
					cl.worker("b:1", func(ctx context.Context, _ Task) (string, error) {
						select {
						case <-time.After(time.Minute):
						case <-ctx.Done():
							return "", ctx.Err()
						}
						if tt.b != "" {
							return "", errors.New(tt.b)
						}
						return "", nil
					})
					ctx, cancel := context.WithCancelCause(t.Context())
					defer cancel(nil)
					times, dialer := cl.dialTimes()
					c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithOrder(Concurrent),
						WithOnFailure(StopSoon), WithWorkerWait(time.Hour), dialer)
					tasks := mustParse(t, "a1 a2 b1")
					wait := cl.run(ctx, c, tasks)
					if tt.stop != nil {
						cl.after(time.Minute, func() { tt.stop(cancel, c) })
					}
					report, err := wait()
					if report.Elapsed != time.Minute {
						t.Errorf("the run took %v, want a minute", report.Elapsed)
					}
					if tt.want != nil && !errors.Is(err, tt.want) || errors.Is(err, ErrNoWorker) {
						t.Errorf("got %v, want %v", err, tt.want)
					}
					if tt.b != "" && !strings.Contains(err.Error(), tt.b) {
						t.Errorf("got %v, want %s", err, tt.b)
					}
					before := len(times.of("a:1"))
					time.Sleep(time.Hour)
					if after := len(times.of("a:1")); before < 5 || after != before {
						t.Errorf("dialed %d times during the run and %d afterwards", before, after-before)
					}
				})
			})
		}
	}
}

func TestAWorkerThatComesUpLateIsWaitedForAtTheStart(t *testing.T) {
	for _, tt := range []struct {
		reason string
		before func(cl *cluster) // what is there before the worker is
	}{
		{"nobody is there", func(*cluster) {}},
		{"the one before is shutting down", func(cl *cluster) {
			cl.script("a:1", func(p *peer) {
				p.expect("HELLO …")
				p.send("ERROR closing the worker is shutting down")
				io.Copy(io.Discard, p.in)
			})
		}},
		{"all of its slots are stuck", func(cl *cluster) {
			cl.script("a:1", func(p *peer) {
				p.expect("HELLO …")
				p.send("ERROR busy all slots are held")
				io.Copy(io.Discard, p.in)
			})
		}},
		{"it closes without a word", func(cl *cluster) { cl.script("a:1", func(*peer) {}) }},
		{"it hangs before its greeting", func(cl *cluster) {
			cl.script("a:1", func(p *peer) { p.expect("HELLO …"); io.Copy(io.Discard, p.in) })
		}},
		{"it found the greeting torn", func(cl *cluster) {
			cl.script("a:1", func(p *peer) {
				p.expect("HELLO …")
				p.send("ERROR syntax connection closed inside a line")
				io.Copy(io.Discard, p.in)
			})
		}},
		{"it waited too long for the greeting", func(cl *cluster) {
			cl.script("a:1", func(p *peer) {
				p.expect("HELLO …")
				p.send("ERROR timeout no HELLO within 10s")
				io.Copy(io.Discard, p.in)
			})
		}},
		{"it closes in the middle of its greeting", func(cl *cluster) {
			cl.script("a:1", func(p *peer) { p.expect("HELLO …"); io.WriteString(p.conn, "WELC") })
		}},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				tt.before(cl)
				p := cl.lateProcess("a:1", echo)
				cl.after(20*time.Second, func() { p.start() })
				c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(31*time.Second), withJitter(longest))
				report, err := cl.run(t.Context(), c, tasksOf("a", 3))()
				if err != nil || report.Elapsed < 20*time.Second || report.Elapsed > 31*time.Second {
					t.Errorf("%v after %v", err, report.Elapsed)
				}
				if report.Troubles != (Troubles{}) {
					t.Errorf("got %+v, but nothing was lost", report.Troubles)
				}
			})
		})
	}
}

func TestAWorkerThatDoesNotComeUpIsNamedAfterTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", echo)
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "gone:1", "gone:2"), WithWorkerWait(12*time.Second))
		report, err := cl.run(t.Context(), c, mustParse(t, "a1 b1"))()
		if report.Elapsed != 12*time.Second {
			t.Errorf("the run took %v, want 12s", report.Elapsed)
		}
		for _, addr := range []string{"gone:1", "gone:2"} {
			if want := addr + ": not reached within 12s: dial " + addr + ": connection refused"; !strings.Contains(err.Error(), want) {
				t.Errorf("%v\ndoes not say %q", err, want)
			}
		}
		if _, ok := errors.AsType[*WorkerError](err); !ok {
			t.Errorf("%v is no *WorkerError", err)
		}
		if got := outcomes(report); got != "Skipped Skipped" {
			t.Errorf("got %s, want nothing sent", got)
		}
	})
}

// The first dial may take longer than the wait.
func TestAWorkerWhoseGreetingDoesNotComeIsNamedAfterTheTimeThatItTook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) { p.expect("HELLO …"); io.Copy(io.Discard, p.in) })
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Second), WithHandshakeTimeout(4*time.Second))
		report, err := cl.run(t.Context(), c, mustParse(t, "a1"))()
		if want := "a:1: not reached within 4s: "; report.Elapsed != 4*time.Second || !strings.Contains(err.Error(), want) {
			t.Errorf("after %v: %v\ndoes not say %q", report.Elapsed, err, want)
		}
	})
}

func TestAWorkerThatCannotBeUsedIsAnErrorAtOnce(t *testing.T) {
	greets := func(line string) func(cl *cluster) {
		return func(cl *cluster) {
			cl.script("b:1", func(p *peer) {
				p.expect("HELLO …")
				p.send(line)
				io.Copy(io.Discard, p.in)
			})
		}
	}
	for _, tt := range []struct {
		reason string
		serve  func(cl *cluster)
		want   string
	}{
		{"it serves another category", func(cl *cluster) { cl.worker("b:1", echo, WithCategories("c")) }, "list it under what it serves"},
		{"another version", greets("WELCOME taskexec/2 {}"), "taskexec/1"},
		{"it says that it speaks another version", greets("ERROR version only taskexec/2 here"), "only taskexec/2 here"},
		{"it speaks something else", greets("220 mail.example.com ESMTP"), "does not speak taskexec/1"},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				tt.serve(cl)
				c := cl.coordinator(WithWorkers("a", "gone:1"), WithWorkers("b", "b:1"), WithWorkerWait(time.Hour))
				report, err := cl.run(t.Context(), c, mustParse(t, "a1 b1"))()
				if report.Elapsed > time.Second || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "b:1") {
					t.Errorf("after %v: got %v, want %s", report.Elapsed, err, tt.want)
				}
				if got := outcomes(report); got != "Skipped Skipped" {
					t.Errorf("got %s", got)
				}
			})
		})
	}
}

func TestAWorkerThatComesUpWrongEndsTheWaitForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		p := cl.lateProcess("a:1", echo, WithCategories("c"))
		cl.after(10*time.Second, func() { p.start() })
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Hour))
		report, err := cl.run(t.Context(), c, tasksOf("a", 1))()
		if report.Elapsed > 30*time.Second || !strings.Contains(err.Error(), "list it under what it serves") || strings.Contains(err.Error(), "not reached") {
			t.Errorf("after %v: %v", report.Elapsed, err)
		}
	})
}

func TestAWorkerThatComesBackWrongIsDialedOnUntilItIsRight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.scripts("a:1", func(n int, p *peer) {
			p.expect("HELLO …")
			switch n {
			case 0:
				p.send("WELCOME taskexec/1 {}")
				p.next()
			case 1:
				p.send(`WELCOME taskexec/1 {"categories":["b"]}`)
				io.Copy(io.Discard, p.in)
			default:
				p.send("WELCOME taskexec/1 {}")
				p.expect("RUN 0 2 0 a0")
				p.send("DONE 0 0")
				p.expectEnd()
			}
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute))
		if report, err := cl.run(t.Context(), c, tasksOf("a", 1))(); err != nil || report.Troubles.Redials != 1 {
			t.Errorf("got %v and %+v", err, report.Troubles)
		}
	})
}

func TestNoWaitMeansNoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		times, dialer := cl.dialTimes()
		c := cl.coordinator(WithWorkers("a", "gone:1"), WithWorkerWait(0), dialer)
		report, err := cl.run(t.Context(), c, tasksOf("a", 1))()
		if report.Elapsed != 0 || err == nil || len(times.of("gone:1")) != 1 {
			t.Errorf("got %v after %v and dials at %v", err, report.Elapsed, times.of("gone:1"))
		}
	})
}

func TestAWorkerWaitBelowZeroPanics(t *testing.T) {
	defer func() {
		if v, ok := recover().(string); !ok || !strings.HasPrefix(v, "taskexec: WithWorkerWait: -1s") {
			t.Errorf("got %v", v)
		}
	}()
	WithWorkerWait(-time.Second)
}

// A worker lost between two stages is back before it is needed again.
func TestALostWorkerIsDialedThoughNoTaskWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", func(context.Context, Task) (string, error) { time.Sleep(time.Hour); return "", nil })
		p := cl.process("b:1", echo)
		cl.after(time.Minute, p.kill)
		cl.after(30*time.Minute, func() { p.start() })
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithWorkerWait(time.Second))
		report, err := cl.run(t.Context(), c, mustParse(t, "a1 b1"))()
		if err != nil || report.Elapsed != time.Hour {
			t.Errorf("got %v after %v", err, report.Elapsed)
		}
		if want := (Troubles{Redials: 1}); report.Troubles != want {
			t.Errorf("got %+v, want %+v", report.Troubles, want)
		}
	})
}

// A task that is lost is progress too: it is lost a few times at most.
func TestTheWaitForAWorkerBeginsAnewWhenATaskIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		p := cl.process("a:1", func(ctx context.Context, task Task) (string, error) {
			if info, _ := TaskInfoFrom(ctx); info.Attempt < 3 {
				return until(ctx, task)
			}
			return "", nil
		})
		for _, at := range []time.Duration{15 * time.Second, 45 * time.Second} {
			cl.after(at, p.kill)
			cl.after(at+12*time.Second, func() { p.start() })
		}
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(20*time.Second), withJitter(none))
		report, err := cl.run(t.Context(), c, tasksOf("a", 1))()
		if err != nil || report.Troubles.Losses != 2 {
			t.Errorf("got %v and %+v after %v", err, report.Troubles, report.Elapsed)
		}
	})
}

func TestARunRemembersNoSessionsThatAreOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var c *Coordinator
		cl.scripts("a:1", func(n int, p *peer) {
			p.welcome()
			number := p.task()
			p.send("DONE " + number + " 0")
			if number != "49" {
				return
			}
			time.Sleep(time.Second)
			p.expectEnd()
		})
		cl.worker("b:1", func(context.Context, Task) (string, error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			for r := range c.runs {
				q := r.queues["a"]
				q.mu.Lock()
				if n := len(q.sessions); n > 1 {
					t.Errorf("%d sessions are kept", n)
				}
				q.mu.Unlock()
			}
			return "", nil
		})
		c = cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithWorkerWait(time.Minute))
		report, err := cl.run(t.Context(), c, append(tasksOf("a", 50), tasksOf("b", 1)...))()
		if err != nil || report.Troubles.Redials < 40 {
			t.Errorf("got %v and %+v", err, report.Troubles)
		}
	})
}

// mutedConn takes nothing. Who would wait for an answer for longer than last words
// take waits until that is known.
type mutedConn struct{ net.Conn }

var errMuted = errors.New("nothing gets through")

func (mutedConn) Write([]byte) (int, error) { return 0, errMuted }

func (c mutedConn) SetReadDeadline(t time.Time) error {
	if time.Until(t) > lastWordsTimeout {
		synctest.Wait()
	}
	return c.Conn.SetReadDeadline(t)
}

// Nobody waits for an answer to a greeting that could not be written, and what is
// said is why it could not.
func TestAGreetingThatCannotBeWrittenAwaitsNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer server.Close()
		c := newTestCoordinator(t, WithWorkers("a", "a:1"), WithWorkerWait(0),
			WithDialer(func(context.Context, string, string) (net.Conn, error) { return mutedConn{client}, nil }))
		report, err := c.Run(t.Context(), tasksOf("a", 1))
		if !errors.Is(err, errMuted) || report.Elapsed > lastWordsTimeout {
			t.Errorf("after %v: %v", report.Elapsed, err)
		}
	})
}

// lateConn greets as a worker that takes its time, and takes nothing.
type lateConn struct {
	mutedConn
	said *strings.Reader
}

func (c lateConn) Read(p []byte) (int, error) {
	if c.said.Len() == 0 {
		return c.Conn.Read(p)
	}
	time.Sleep(lastWordsTimeout / 2)
	return c.said.Read(p)
}

// Here the writer does not close the connection: it has failed already.
func TestASessionThatIsWantedNoMoreIsClosedThoughItsWriterFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) { p.welcome() })
		cl.worker("a:2", func(context.Context, Task) (string, error) { time.Sleep(lastWordsTimeout / 4); return "", nil })
		cl.worker("b:1", func(context.Context, Task) (string, error) { time.Sleep(time.Minute); return "", nil })
		dials := 0
		dialer := WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			if addr == "a:1" {
				dials++
			}
			if addr != "a:1" || dials == 1 {
				return cl.dial(ctx, network, addr)
			}
			client, server := net.Pipe()
			t.Cleanup(func() { server.Close() })
			conn := &dialedConn{Conn: client, cluster: cl, addr: addr, over: make(chan struct{})}
			cl.mu.Lock()
			defer cl.mu.Unlock()
			cl.conns = append(cl.conns, conn)
			return lateConn{mutedConn{conn}, strings.NewReader("WELCOME taskexec/1 {}\n")}, nil
		})
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithWorkers("b", "b:1"), WithWorkerShutdown(), dialer)
		report, _ := c.Run(t.Context(), mustParse(t, "a1 b1")) // a:1 says no goodbye
		if got := outcomes(report); got != "Done Done" || dials != 2 {
			t.Errorf("got %s and %d dials", got, dials)
		}
	})
}
