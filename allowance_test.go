package taskexec

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// flood says a line again and again, until an ERROR comes or it was said most
// times. It returns how often that was, and the last answer.
func (p *peer) flood(line string, most int) (said int, answer string) {
	p.t.Helper()
	for said < most {
		// What is not read would be a flood of another kind.
		if _, err := io.WriteString(p.conn, line+"\nPING 123\n"); err != nil {
			break
		}
		said++
		for answer != "PONG 123\n" {
			var err error
			if answer, err = p.in.ReadString('\n'); err != nil || strings.HasPrefix(answer, "ERROR ") {
				p.conn.Close()
				return said, answer
			}
		}
		answer = ""
	}
	return said, answer
}

func TestAFloodThatBringsNoWorkEndsTheSession(t *testing.T) {
	for _, line := range []string{"PING 1", "PONG 1", "RECALL 1", "RECALL 7", "CANCEL enough"} {
		t.Run("of a coordinator, "+line, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				wt := startWorker(t, g)
				p := wt.session()
				p.send("RUN 1 1 0 x")
				g.expectStarted(t, "x")
				if n, answer := p.flood(line, 2*allowanceMost); n != allowanceMost/2+1 || !strings.HasPrefix(answer, "ERROR flood ") {
					t.Errorf("after %d lines it got %q", n, answer)
				}
				g.release <- struct{}{}
				g.release <- struct{}{}
				wt.expectServing()
			})
		})
	}
	for _, line := range []string{"PING 1", "PONG 1", "DRAIN"} {
		t.Run("of a worker, "+line, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				cl.script("a:1", func(p *peer) {
					p.welcome()
					p.expect("RUN …")
					if n, answer := p.flood(line, 2*allowanceMost); n != allowanceMost/2+1 || !strings.HasPrefix(answer, "ERROR flood ") {
						t.Errorf("after %d lines it got %q", n, answer)
					}
				})
				tasks := tasksOf("a", 1)
				report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(t.Context(), tasks)
				checkReport(t, tasks, report, err)
				if err == nil || !strings.Contains(err.Error(), "(flood)") {
					t.Errorf("the run's error is %v", err)
				}
			})
		})
	}
}

// Whoever asks each of its tasks back twice, or takes its time, does not flood.
func TestAnAllowanceIsRenewedByWorkAndTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		p := startWorker(t, g).session()
		for range 3 {
			var lines []string
			for range 2 {
				for i := range windowTasks - 1 {
					lines = append(lines, fmt.Sprintf("RECALL %d", 2+i))
				}
			}
			go func() {
				p.send(runs(1, windowTasks)...)
				p.send(lines...)
				g.release <- struct{}{}
			}()
			for p.report() != "DONE 1 i1" {
				if t.Failed() {
					return
				}
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, parrot).session()
		for i := range 3 * allowanceMost {
			p.send(fmt.Sprintf("PING %d", i))
			p.expect(fmt.Sprintf("PONG %d", i))
			time.Sleep(allowanceUnit)
		}
	})
	synctest.Test(t, func(t *testing.T) { // as many lines in as much time, at uneven intervals
		var a allowance
		for i := range 2 * allowanceMost {
			if err := a.note(verbPing); err != nil {
				t.Fatalf("line %d: %v", i, err)
			}
			if i >= allowanceMost-1 {
				time.Sleep(allowanceUnit/2 + time.Duration(i%2)*allowanceUnit)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) { // time that brings more than there is room for is lost
		var a allowance
		for range 2 {
			for range allowanceMost {
				if err := a.note(verbPing); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Hour)
		}
		for i := 0; a.note(verbPing) == nil; i++ {
			if i == allowanceMost {
				t.Fatal("there is no end")
			}
		}
	})
}

// Two sides that ping as often as they may be told to do not flood each other.
func TestTheFastestHeartbeatIsNoFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", func(context.Context, Task) (string, error) {
			time.Sleep(2 * allowanceMost * heartbeatLeast)
			return "", nil
		})
		tasks := tasksOf("a", 1)
		c := cl.coordinator(WithWorkers("a", "a:1"), WithHeartbeat(heartbeatLeast, 2*heartbeatLeast))
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err != nil {
			t.Error(err)
		}
	})
}

// A peer that stops reading is cut at the write deadline, and holds up nobody
// else: not those whose tasks run in other slots, and those that need its slot
// not for longer.
func TestAPeerThatStopsReadingHoldsUpNobodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		big := strings.Repeat("x", 600<<10)
		w := cl.worker("a:1", func(_ context.Context, task Task) (string, error) {
			if task.Instruction == "big" {
				return big, nil
			}
			return task.Instruction, nil
		}, WithSlots(2))
		deaf := cl.network.greeted(t, "a:1")
		for i := range 10 {
			deaf.send(fmt.Sprintf("RUN %d 1 0 big", i))
		}
		synctest.Wait()
		stopped := time.Now()
		if n := w.Stats().Running; n != 2 {
			t.Fatalf("%d slots are taken by what the peer does not read, want both", n)
		}
		tasks := tasksOf("a", 100)
		report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err != nil || time.Since(stopped) > writeTimeout+lastWordsTimeout {
			t.Errorf("after %v: %v", time.Since(stopped), err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		w := cl.worker("a:1", echo)
		deaf := cl.network.greeted(t, "a:1")
		deaf.send(runs(1, 1000)...)
		tasks := tasksOf("a", 1000)
		start := time.Now()
		report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err != nil || time.Since(start) > 0 {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		time.Sleep(writeTimeout + lastWordsTimeout + time.Millisecond)
		if n := w.Stats().Sessions; n > 0 {
			t.Errorf("%d sessions are left", n)
		}
	})
}
