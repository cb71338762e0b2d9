package taskexec

import (
	"fmt"
	"testing"
	"time"
)

// A modelWorker is a worker and the way to it, as arithmetic: it has a session
// full of tasks, as many as the session's pace allows.
type modelWorker struct {
	slots int
	most  int           // that it grants
	trip  time.Duration // there and back
	takes time.Duration // for each task

	pace    pace
	now     time.Time
	flights []modelFlight // in the order in which they will be reported
	busy    []time.Time   // until when each slot is
	waited  time.Duration // the longest that a task has waited at the worker, since that was set to 0
	leapt   bool          // the window was more than four times what was in flight
}

type modelFlight struct{ sent, reported time.Time }

func newModelWorker(slots int, trip, takes time.Duration) *modelWorker {
	w := &modelWorker{slots: slots, most: windowTasks, trip: trip, takes: takes, now: time.Unix(0, 0), busy: make([]time.Time, slots)}
	w.pace.window = slots
	w.pace.tripTook(trip)
	return w
}

// fill sends what the window allows.
func (w *modelWorker) fill() {
	before := len(w.flights)
	for len(w.flights) < w.pace.window {
		arrives := w.now.Add(w.trip / 2)
		first := 0
		for slot := range w.busy {
			if w.busy[slot].Before(w.busy[first]) {
				first = slot
			}
		}
		starts := arrives
		if w.busy[first].After(starts) {
			starts = w.busy[first]
		}
		w.waited = max(w.waited, starts.Sub(arrives))
		w.busy[first] = starts.Add(w.takes)
		w.flights = append(w.flights, modelFlight{w.now, w.busy[first].Add(w.trip - w.trip/2)})
	}
	w.pace.sent(before, len(w.flights), w.now)
}

// step goes on to the next report, and takes with it what comes within 10 µs.
func (w *modelWorker) step() {
	held := len(w.flights)
	w.now = w.flights[0].reported
	n, spent := 0, time.Duration(0)
	for n < held && w.flights[n].reported.Sub(w.now) <= 10*time.Microsecond {
		spent += w.now.Sub(w.flights[n].sent)
		n++
	}
	w.flights = w.flights[n:]
	w.pace.reported(n, spent, len(w.flights), w.slots, w.most, w.now)
	if w.pace.window > 4*held && w.pace.window > w.slots {
		w.leapt = true
	}
}

// work keeps the worker busy for d, and returns the greatest window in that time.
func (w *modelWorker) work(d time.Duration) (widest int) {
	for end := w.now.Add(d); w.now.Before(end); {
		w.fill()
		widest = max(widest, w.pace.window)
		w.step()
	}
	return widest
}

func TestAWindowIsWhatAWorkerStartsWithinARoundTripAndALittle(t *testing.T) {
	const ms, µs = time.Millisecond, time.Microsecond
	for _, tt := range []struct {
		reason      string
		slots       int
		trip, takes time.Duration
		least, most int // of the window, once it has settled
	}{
		{"ten seconds a task", 1, 100 * µs, 10 * time.Second, 1, 1},
		{"and some slots", 4, 100 * µs, 10 * time.Second, 4, 4},
		{"and a world away", 4, 300 * ms, 10 * time.Second, 4, 4},
		{"a second a task", 1, 100 * µs, time.Second, 1, 1},
		{"two milliseconds, as far as the next room", 4, 100 * µs, 2 * ms, 8, 8},
		{"the next task is on its way when one ends", 1, 10 * ms, 10 * ms, 2, 3},
		{"many are, far away", 1, 100 * ms, 3 * ms, 45, 55},
		{"and with many slots", 100, 100 * ms, 3 * ms, 4096, 4096},
		{"hardly anything to do", 1, 100 * µs, 2 * µs, 900, 1300},
		{"hardly anything to do, far away", 1, 50 * ms, 100 * µs, 700, 850},
		{"nothing to do", 1, 100 * µs, 0, 4096, 4096},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			w := newModelWorker(tt.slots, tt.trip, tt.takes)
			w.work(50*tt.trip + 20*tt.takes)
			w.waited = 0
			widest := w.work(10*tt.trip + 20*tt.takes)
			if w.pace.window < tt.least || widest > tt.most {
				t.Errorf("the window is %d, and was up to %d; want %d to %d", w.pace.window, widest, tt.least, tt.most)
			}
			if w.leapt {
				t.Error("the window has become more than four times as wide at once")
			}
			// What is beyond the slots waits for 2 ms and part of a round trip, or
			// for what rounding makes of that.
			if most := headStart + tt.trip + tt.takes/2; w.waited > most && tt.most > tt.slots {
				t.Errorf("a task waited at the worker for %v, want at most %v", w.waited, most)
			}
		})
	}
}

func TestTasksThatTakeNoTimeHaveThousandsInFlightWithinMilliseconds(t *testing.T) {
	w := newModelWorker(1, 100*time.Microsecond, time.Microsecond)
	start := w.now
	for w.pace.window < 2000 {
		w.fill()
		w.step()
		if w.now.Sub(start) > 10*time.Millisecond {
			t.Fatalf("the window is %d after %v", w.pace.window, w.now.Sub(start))
		}
	}
}

func TestAWindowFarAwayIsWideAfterTenRoundTrips(t *testing.T) {
	w := newModelWorker(1, 100*time.Millisecond, 100*time.Microsecond)
	w.work(10 * w.trip)
	if enough := int(w.trip / w.takes); w.pace.window < enough {
		t.Errorf("the window is %d, want %d, which the worker executes in a round trip", w.pace.window, enough)
	}
}

func TestAWorkerThatBecomesSlowHasASmallWindowAfterAFewTasks(t *testing.T) {
	w := newModelWorker(2, 100*time.Microsecond, time.Microsecond)
	if w.work(20 * time.Millisecond); w.pace.window < 1000 {
		t.Fatalf("the window is %d", w.pace.window)
	}
	// Whatever it holds now takes a second each.
	for range 6 {
		n := min(2, len(w.flights))
		w.now = w.now.Add(time.Second)
		spent := w.now.Sub(w.flights[0].sent) * time.Duration(n)
		w.flights = w.flights[n:]
		w.pace.reported(n, spent, len(w.flights), 2, windowTasks, w.now)
	}
	if w.pace.window != 2 {
		t.Errorf("after 12 tasks of a second the window is %d, want 2", w.pace.window)
	}
}

func TestAWindowKeepsItsSizeWhileThereIsNothingToDo(t *testing.T) {
	w := newModelWorker(1, 100*time.Microsecond, 10*time.Microsecond)
	w.work(50 * time.Millisecond)
	before := w.pace.window
	for range 10 {
		for len(w.flights) > 0 {
			w.step()
		}
		w.now = w.now.Add(time.Hour)
		w.fill()
		w.step()
		if w.pace.window < before*9/10 {
			t.Fatalf("the window is %d after an hour without a task, and was %d", w.pace.window, before)
		}
	}
}

func TestARoundTripThatWasTakenWrongIsPutRight(t *testing.T) {
	for _, first := range []time.Duration{0, time.Microsecond, 20 * time.Millisecond, 20 * time.Second} {
		t.Run(fmt.Sprint(first), func(t *testing.T) {
			w := newModelWorker(1, time.Millisecond, 10*time.Millisecond)
			w.pace.trip = first
			if widest := w.work(time.Second); widest > 3 {
				t.Errorf("tasks of 10ms, and %d in flight", widest)
			}
			for range 40 {
				w.pace.tripTook(time.Millisecond)
			}
			if w.pace.trip < 900*time.Microsecond || w.pace.trip > 1100*time.Microsecond {
				t.Errorf("the round trip is taken for %v, and is 1ms", w.pace.trip)
			}
		})
	}
}

func TestATaskIsExpectedToWaitForThoseBeforeIt(t *testing.T) {
	start := time.Unix(0, 0)
	p := pace{gap: time.Millisecond, due: start}
	for _, tt := range []struct {
		reason string
		ahead  int
		since  time.Duration // a report could have come
		want   time.Duration
	}{
		{"nothing is ahead", 0, 0, 0},
		{"as fast as before", 3, 0, 3 * time.Millisecond},
		{"they have not arrived yet", 3, -time.Hour, 3 * time.Millisecond},
		{"as slow as it is now", 3, time.Second, 3 * time.Second},
		{"without overflow", 4096, 1000 * time.Hour, time.Hour},
	} {
		if got := p.wait(tt.ahead, start.Add(tt.since)); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.reason, got, tt.want)
		}
	}
}
