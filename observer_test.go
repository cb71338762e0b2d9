package taskexec

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestObserverIsCalledInTheOrderOfWhatHappened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		handler := func(_ context.Context, task Task) (string, error) {
			time.Sleep(time.Second)
			if task.Instruction == "b1" {
				return "", fmt.Errorf("boom")
			}
			return strings.ToUpper(task.Instruction), nil
		}
		cl.worker("a:1", handler, WithName("a"))
		cl.worker("b:1", handler, WithName("b"))
		var got []string
		var run string
		note := func(id, format string, args ...any) {
			if run == "" {
				run = id
			}
			if id != run {
				t.Errorf("called for run %s, not %s", id, run)
			}
			got = append(got, fmt.Sprintf(format, args...))
		}
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithWorkers("c", "b:1"), WithWorkerShutdown(),
			WithObserver(Observer{
				GroupStarted: func(i GroupStartedInfo) {
					note(i.Run, "started %d %s %d", i.Stage, i.Category, len(i.Tasks))
				},
				TaskDone: func(i TaskDoneInfo) {
					note(i.Run, "task %d %v %s", i.Result.Index, i.Result.Outcome, i.Result.Output)
				},
				GroupDone: func(i GroupDoneInfo) {
					note(i.Run, "done %d %s %d: %d done, %d failed in %v", i.Stage, i.Category, len(i.Tasks), i.Counts.Done, i.Counts.Failed, i.Elapsed)
				},
				Goodbye: func(i GoodbyeInfo) { note(i.Run, "%s at %s: %s", i.Worker, i.Addr, i.Text) },
			}))
		tasks := mustParse(t, "b1 a1 c1 a2")
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		// c1 was skipped before its group began, and is in the report only.
		want := []string{
			"started 0 a 2", "task 1 Done A1", "task 3 Done A2", "done 0 a 2: 2 done, 0 failed in 2s",
			"a at a:1: Goodbye from a",
			"started 1 b 1", "task 0 Failed ", "done 1 b 1: 0 done, 1 failed in 1s",
			"b at b:1: Goodbye from b",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
		if run != report.Run {
			t.Errorf("called for run %s, want %s", run, report.Run)
		}
	})
}

func TestNoGroupStartsAfterACancelThatComesBetweenStages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		ctx, cancel := context.WithCancel(t.Context())
		cl.script("a:1", func(p *peer) {
			p.welcome()
			p.expect("RUN 0 1 0 a1")
			p.send("DONE 0 0")
			p.expect("SHUTDOWN")
			cancel()
			p.expectEnd()
		})
		cl.worker("b:1", echo)
		var started []string
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithWorkerShutdown(), WithOnFailure(KeepGoing),
			WithObserver(Observer{GroupStarted: func(i GroupStartedInfo) { started = append(started, i.Category) }}))
		tasks := mustParse(t, "a1 b1")
		report, err := c.Run(ctx, tasks)
		checkReport(t, tasks, report, err)
		if diff := cmp.Diff([]string{"a"}, started); diff != "" || outcomes(report) != "Done Skipped" {
			t.Errorf("got %s; groups started (-want +got):\n%s", outcomes(report), diff)
		}
	})
}

func TestAGroupsTasksAreNamedWhicheverOfItsCallsIsObserved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var started, done []Task
		tasks := []Task{{Instruction: "a0"}, {Instruction: "a1"}}
		named := tasksOf("a", 2) // with the category that they are executed under
		for name, o := range map[string]Observer{
			"start": {GroupStarted: func(i GroupStartedInfo) { started = append(started, i.Tasks...) }},
			"end":   {GroupDone: func(i GroupDoneInfo) { done = append(done, i.Tasks...) }},
		} {
			c := newTestCoordinator(t, append(serveMem(t, parrot, "a"), WithOrder(ByInput), WithObserver(o))...)
			started, done = nil, nil
			report, err := c.Run(t.Context(), tasks)
			checkReport(t, tasks, report, err)
			for _, err := range c.Stream(t.Context(), slices.Values(tasks)) {
				if err != nil {
					t.Error(err)
				}
			}
			if diff := cmp.Diff(slices.Concat(named, named), slices.Concat(started, done)); diff != "" {
				t.Errorf("tasks of the groups whose %s is observed, of a Run and a Stream (-want +got):\n%s", name, diff)
			}
		}
	})
}

func TestABlockingObserverDelaysTheEndOfRunAndNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		var executed atomic.Int32
		cl.worker("a:1", func(context.Context, Task) (string, error) { executed.Add(1); return "", nil })
		var calls, at int // plain: all calls come from one goroutine, and the last before Run returns
		block := make(chan struct{})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithObserver(Observer{
			TaskDone: func(TaskDoneInfo) {
				at++
				defer func() { at-- }()
				if at != 1 {
					t.Error("called while a call goes on")
				}
				calls++
				<-block
			},
		}))
		tasks := tasksOf("a", 500)
		var running sync.WaitGroup
		returned := false
		running.Go(func() {
			report, err := c.Run(t.Context(), tasks)
			checkReport(t, tasks, report, err)
			returned = true
			if calls != len(tasks) {
				t.Errorf("Run returned after %d calls of %d", calls, len(tasks))
			}
		})
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := executed.Load(); n != 500 || returned {
			t.Errorf("while the observer blocks %d tasks of 500 were executed, and Run returned: %v", n, returned)
		}
		close(block)
		running.Wait()
	})
}

func TestAnObserverMayKnowNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", echo)
		tasks := tasksOf("a", 3)
		report, err := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerShutdown(), WithObserver(Observer{})).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err != nil {
			t.Error(err)
		}
	})
}

// A worker may count what its handler did not take, such as a wait for the
// processor between two tasks.
func TestExecutedIsPartOfTheRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) {
			p.welcome()
			p.expect("RUN 0 …")
			time.Sleep(time.Second)
			p.send("DONE 0 5000000 ")
			io.Copy(io.Discard, p.in)
		})
		var got TaskDoneInfo
		c := cl.coordinator(WithWorkers("a", "a:1"), WithObserver(Observer{TaskDone: func(i TaskDoneInfo) { got = i }}))
		if _, err := c.Run(t.Context(), tasksOf("a", 1)); err != nil {
			t.Error(err)
		}
		if got.RoundTrip != time.Second || got.Result.Executed != time.Second {
			t.Errorf("executed for %v in a round trip of %v, want 1s and 1s", got.Result.Executed, got.RoundTrip)
		}
	})
}
