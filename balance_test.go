package taskexec

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// mostInFlight is told by its observer's events how many tasks each worker had
// in flight at most.
type mostInFlight struct {
	mu        sync.Mutex
	now, most map[string]int // by address
	at        map[int]string // by task
}

func (m *mostInFlight) observer() Observer {
	m.now, m.most, m.at = make(map[string]int), make(map[string]int), make(map[int]string)
	return Observer{
		TaskSent: func(i TaskSentInfo) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.at[i.Index] = i.Addr
			m.now[i.Addr]++
			m.most[i.Addr] = max(m.most[i.Addr], m.now[i.Addr])
		},
		TaskDone: func(i TaskDoneInfo) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.now[m.at[i.Result.Index]]--
		},
	}
}

func TestASlowWorkerHoldsNoMoreThanItsSlots(t *testing.T) {
	for _, takes := range []time.Duration{time.Second, 10 * time.Second} {
		t.Run(fmt.Sprint(takes), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				wait := func(d time.Duration) HandlerFunc {
					return func(context.Context, Task) (string, error) {
						time.Sleep(d)
						return "", nil
					}
				}
				cl.worker("slow:1", wait(takes), WithSlots(3))
				cl.worker("fast:1", wait(50*time.Microsecond))
				var m mostInFlight
				c := cl.coordinator(WithWorkers("a", "slow:1", "fast:1"), WithObserver(m.observer()))
				report, err := cl.run(t.Context(), c, tasksOf("a", 100_000))()
				if err != nil || report.Troubles != (Troubles{}) {
					t.Errorf("%v, %+v", err, report.Troubles)
				}
				if got := m.most["slow:1"]; got != 3 {
					t.Errorf("the slow worker had %d tasks in flight, want its 3 slots' worth", got)
				}
				// 2 ms of work, that is.
				if got := m.most["fast:1"]; got < 30 || got > 60 {
					t.Errorf("the fast worker had %d tasks in flight, want about 41", got)
				}
			})
		})
	}
}

func TestWhatWaitsBehindALongTaskGoesToAnIdleWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var e executions
		for _, addr := range []string{"a:1", "a:2"} {
			short, long := e.handler(addr, time.Second), e.handler(addr, time.Hour)
			cl.worker(addr, func(ctx context.Context, task Task) (string, error) {
				if task.Instruction == "a0" {
					return long(ctx, task)
				}
				return short(ctx, task)
			})
		}
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), withLeastWindow(8))
		wait := cl.run(t.Context(), c, tasksOf("a", 16))
		time.Sleep(15*time.Second + 500*time.Millisecond)
		if got := c.Snapshot()[0].Categories[0]; got.Counts.Done != 15 || got.InFlight != 1 {
			t.Errorf("after 15s: %+v, want all done but the long one", got)
		}
		report, err := wait()
		// The first worker has been sent eight.
		if err != nil || report.Elapsed != time.Hour || report.Troubles != (Troubles{Returns: 7}) {
			t.Errorf("took %v: %v, %+v", report.Elapsed, err, report.Troubles)
		}
		e.checkNoOverlap(t, nil)
		checkTroubles(t, report)
	})
}

func TestNothingDependsOnTheAnswerToRECALL(t *testing.T) {
	// One worker takes no notice of RECALL before it has finished what it was
	// sent, another executes a long task and has others behind it, a third has
	// nothing to do.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var mu sync.Mutex
		var recalled []int
		cl.script("deaf:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"window":8}`)
			lines := make(chan string, 1000)
			go func() {
				defer close(lines)
				for {
					line, err := p.in.ReadString('\n')
					if err != nil {
						return
					}
					lines <- strings.TrimSuffix(line, "\n")
				}
			}()
			time.Sleep(time.Hour)
			for range 8 {
				line := <-lines
				p.send("DONE " + strings.Fields(line)[1] + " 0")
			}
			for line := range lines {
				var task int
				if _, err := fmt.Sscanf(line, "RECALL %d", &task); err != nil {
					t.Errorf("got %q: %v", line, err)
				}
				mu.Lock()
				recalled = append(recalled, task)
				mu.Unlock()
			}
		})
		var e executions
		cl.worker("busy:1", e.handler("busy:1", time.Hour))
		cl.worker("idle:1", e.handler("idle:1", time.Second))
		c := cl.coordinator(WithWorkers("a", "deaf:1", "busy:1", "idle:1"), withLeastWindow(8))
		wait := cl.run(t.Context(), c, tasksOf("a", 24))
		time.Sleep(time.Minute)
		if got := c.Snapshot()[0].Categories[0]; got.Counts.Done != 15 || got.InFlight != 9 {
			t.Errorf("after a minute: %+v, want what can be had executed by the idle worker", got)
		}
		report, err := wait()
		if err != nil || report.Elapsed != time.Hour || report.Troubles != (Troubles{Returns: 7}) {
			t.Errorf("took %v: %v, %+v", report.Elapsed, err, report.Troubles)
		}
		e.checkNoOverlap(t, nil)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		if len(recalled) != 7 || !slices.IsSortedFunc(recalled, func(a, b int) int { return b - a }) || len(slices.Compact(recalled)) != 7 {
			t.Errorf("the worker that did not answer was asked for %d, want each once that had not started, from the last on", recalled)
		}
	})
}

func TestNoAnswerToRECALLIsExpectedOfASessionThatIsLost(t *testing.T) {
	// One worker dies of its first RECALL. What waits behind the long task of
	// another still goes to the idle one.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("dies:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"window":8}`)
			for strings.HasPrefix(p.next(), "RUN ") {
			}
		})
		var e executions
		cl.worker("busy:1", e.handler("busy:1", time.Hour))
		cl.worker("idle:1", e.handler("idle:1", time.Second))
		c := cl.coordinator(WithWorkers("a", "dies:1", "busy:1", "idle:1"), withLeastWindow(8))
		wait := cl.run(t.Context(), c, tasksOf("a", 24))
		time.Sleep(time.Minute)
		if got := c.Snapshot()[0].Categories[0]; got.Counts.Done != 23 || got.InFlight != 1 || got.Troubles.Losses != 8 {
			t.Errorf("after a minute: %+v, want all but the long task done", got)
		}
		if _, err := wait(); err != nil {
			t.Error(err)
		}
	})
}

func TestATaskThatWandersIsLeftWhereItIs(t *testing.T) {
	// Workers that take a task over give it back as well, because they go away,
	// so that it comes to the one again that has more than it has slots for.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var recalled []string
		cl.script("busy:1", func(p *peer) {
			p.expect("HELLO …")
			p.send(`WELCOME taskexec/1 {"slots":4,"window":8}`)
			var held []string
			for {
				line, err := p.in.ReadString('\n')
				if err != nil {
					return
				}
				fields := strings.Fields(line)
				task := fields[1]
				if fields[0] == "RUN" {
					held = append(held, task)
					continue
				}
				recalled = append(recalled, task)
				held = slices.DeleteFunc(held, func(other string) bool { return other == task })
				p.send("RETURN " + task)
				if len(recalled) == 3 {
					time.Sleep(time.Second)
					for _, task := range held {
						p.send("DONE " + task + " 0")
					}
				}
			}
		})
		for i, addr := range []string{"leaves:1", "leaves:2", "stays:1"} {
			cl.script(addr, func(p *peer) {
				p.welcome()
				run := strings.Fields(p.next())
				time.Sleep(time.Duration(i+1) * time.Second)
				p.send("DONE " + run[1] + " 0")
				run = strings.Fields(p.next())
				if addr != "stays:1" {
					p.send("DRAIN", "RETURN "+run[1], "GOODBYE")
					return
				}
				time.Sleep(time.Minute)
				p.send("DONE " + run[1] + " 0")
				p.expectEnd()
			})
		}
		c := cl.coordinator(WithWorkers("a", "busy:1", "leaves:1", "leaves:2", "stays:1"), withLeastWindow(8))
		report, err := cl.run(t.Context(), c, tasksOf("a", 9))()
		if err != nil || report.Troubles.Losses != 0 {
			t.Errorf("%v, %+v", err, report.Troubles)
		}
		if len(recalled) != 3 || recalled[1] != recalled[0] || recalled[2] == recalled[0] {
			t.Errorf("asked back were %q, want one twice, which has then come back four times, and then another", recalled)
		}
	})
}

func TestTasksThatAreAboutToStartAreNotTakenBack(t *testing.T) {
	// One worker is slower, and has some left when the other has nothing to do;
	// but nothing of it would be there sooner.
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t, simPlan{
			Network: simNetworkPlan{Buffer: 64 << 10},
			Workers: []simWorkerPlan{
				{Name: "w0", Categories: []string{"a"}, Slots: 1},
				{Name: "w1", Categories: []string{"a"}, Slots: 1, Slower: 2},
			},
			Coordinators: []simCoordinatorPlan{{Window: 4096, Interval: 5 * time.Second, Silence: 15 * time.Second, WorkerWait: 30 * time.Second,
				Handshake: 10 * time.Second, CancelGrace: 10 * time.Second, StreamBuffer: 1, ShutdownAt: simNever,
				Runs: []simRunPlan{{CancelAt: simNever, LeaveAfter: -1, Tasks: slices.Repeat([]simTaskPlan{{Category: "a", Takes: 100 * time.Microsecond}}, 500)}}}},
		})
		s.network.override = func(_ simDial, _ int, p *simConnPlan) {
			p.Up.Latency, p.Down.Latency = 10*time.Millisecond, 10*time.Millisecond
		}
		s.simulate()
		if report := s.runs[0].report; len(s.failures) > 0 || report.Counts.Done != 500 {
			t.Errorf("%+v, %q", report.Counts, s.failures)
		}
		for _, c := range s.network.conns {
			for _, line := range c.log.sent {
				if line.verb == "RECALL" {
					t.Errorf("%s was sent RECALL %d at %v", c.name, line.task, line.at)
				}
			}
		}
	})
}

func TestSingleTasksGoRoundTheIdleWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var addrs []string
		for i := range 5 {
			addr := fmt.Sprintf("a:%d", i)
			addrs = append(addrs, addr)
			cl.worker(addr, func(context.Context, Task) (string, error) {
				time.Sleep(999 * time.Millisecond) // a writer that has a PING to write takes what waits, and that is each 5s
				return "", nil
			})
		}
		c := cl.coordinator(WithWorkers("a", addrs...), WithOrder(ByInput))
		report, err := cl.run(t.Context(), c, tasksOf("a", 50))()
		if err != nil {
			t.Error(err)
		}
		for _, w := range report.Categories[0].Workers {
			if w.Counts.Done < 9 || w.Counts.Done > 11 {
				t.Errorf("%s has executed %d of 50 tasks, want its fifth", w.Addr, w.Counts.Done)
			}
		}
	})
}

func TestAnInstructionMayFillALineToTheByte(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", func(_ context.Context, task Task) (string, error) { return strconv.Itoa(len(task.Instruction)), nil })
		fits := defaultMaxLine - len("RUN 0 1 0 \n")
		var tasks []Task
		for _, instruction := range []string{strings.Repeat("x", fits), strings.Repeat("x", fits+1), strings.Repeat("\n", fits/2), strings.Repeat("\n", fits/2+1), "x"} {
			tasks = append(tasks, Task{Category: "a", Instruction: instruction})
		}
		report, err := cl.run(t.Context(), cl.coordinator(WithWorkers("a", "a:1")), tasks)()
		if got, want := outcomes(report), "Done Failed Done Failed Done"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		want := fmt.Sprintf("an instruction of %d bytes does not fit in a line of worker a:1, which takes %d bytes, escapes included", fits+1, defaultMaxLine)
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v\ndoes not say %q", err, want)
		}
	})
}

func TestATaskTooLongForWhatIsInFlightGoesToAnotherWorker(t *testing.T) {
	// Both have slots free, but what one of them holds leaves no bytes of its
	// window for more.
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		long := strings.Repeat("x", windowBytes*2/3)
		for _, addr := range []string{"a:1", "a:2"} {
			cl.worker(addr, func(ctx context.Context, task Task) (string, error) {
				switch info, _ := TaskInfoFrom(ctx); {
				case info.Task == 0:
					time.Sleep(time.Hour)
				case info.Attempt < 4:
					return "", RetryAfter(errors.New("not yet"), time.Second)
				}
				return "", nil
			}, WithSlots(2))
		}
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithRetry(Retry{Attempts: 4}))
		wait := cl.run(t.Context(), c, []Task{{Category: "a", Instruction: long}, {Category: "a", Instruction: long}})
		time.Sleep(3*time.Second + 500*time.Millisecond) // a writer that has a PING to write takes what waits, and that is each 5s
		if got := c.Snapshot()[0].Categories[0]; got.Counts.Done != 1 {
			t.Errorf("after 3.5s: %+v, want the task that failed executed by the idle worker", got)
		}
		if _, err := wait(); err != nil {
			t.Error(err)
		}
	})
}

func TestATaskTooLongForWhatIsInFlightHoldsUpNoSlotOnceItIsSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 8 { // which worker has the first task is a matter of chance
			cl := newCluster(t)
			long := strings.Repeat("x", windowBytes*2/3)
			handler := func(ctx context.Context, task Task) (string, error) {
				if info, _ := TaskInfoFrom(ctx); info.Task%2 == 0 {
					time.Sleep(time.Hour)
				}
				time.Sleep(time.Second)
				return "", nil
			}
			cl.worker("a:1", handler, WithSlots(2))
			cl.worker("a:2", handler)
			c := cl.coordinator(WithWorkers("a", "a:1", "a:2"))
			wait := cl.run(t.Context(), c, []Task{{Category: "a", Instruction: long}, {Category: "a", Instruction: long}, {Category: "a", Instruction: long}, {Category: "a"}})
			time.Sleep(2*time.Second + 500*time.Millisecond)
			if got := c.Snapshot()[0].Categories[0]; got.Counts.Done != 2 {
				t.Errorf("after 2.5s: %+v, want each task done that takes 1s", got)
			}
			if _, err := wait(); err != nil {
				t.Error(err)
			}
		}
	})
}

// A Stream lends no more than its consumer has room for, and that is as good as
// the end of a group while the room is taken by what waits at a slow worker.
func TestAStreamThatHasNoRoomLeavesNoWorkerIdle(t *testing.T) {
	for _, order := range []Order{ByCategory, Concurrent} {
		synctest.Test(t, func(t *testing.T) {
			cl := newCluster(t)
			for addr, takes := range map[string]time.Duration{"a:1": time.Hour, "a:2": time.Second} {
				cl.worker(addr, func(context.Context, Task) (string, error) {
					time.Sleep(takes)
					return "", nil
				})
			}
			c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithOrder(order), WithStreamBuffer(20), withLeastWindow(8))
			start := time.Now()
			if _, err := collect(c.Stream(t.Context(), slices.Values(tasksOf("a", 60)))); err != nil {
				t.Error(err)
			}
			// In order, each 20 tasks or so wait for one that the slow worker executes.
			if took := time.Since(start); took > 4*time.Hour {
				t.Errorf("%v: took %v, want the tasks behind a slow one to be executed by the other worker", order, took)
			}
		})
	}
}
