package taskexec

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// A makespanWorld is eight workers of four slots, half a tenth of a millisecond
// away in each direction, and 2,000 tasks of one category whose lengths have a
// long tail: Pareto with α = 2.5, 2 ms on average.
type makespanWorld struct {
	seed    uint64
	lengths []time.Duration
	slower  []int         // by worker: how many times as long as the others it takes
	killed  time.Duration // when the last worker's process ends; 0 if it does not
}

const (
	makespanSlots   = 4
	makespanLatency = 50 * time.Microsecond
)

func newMakespanWorld(seed uint64) *makespanWorld {
	const alpha, mean = 2.5, float64(2 * time.Millisecond)
	random := rand.New(rand.NewPCG(seed, 0))
	w := &makespanWorld{seed: seed, slower: make([]int, 8)}
	for i := range w.slower {
		w.slower[i] = 1
	}
	for range 2000 {
		w.lengths = append(w.lengths, time.Duration(mean*(alpha-1)/alpha*math.Pow(1-random.Float64(), -1/alpha)))
	}
	return w
}

// greedy is the list schedule: whichever slot is free first takes the next task
// of the list, in no time.
func (w *makespanWorld) greedy() time.Duration {
	return listSchedule(w.lengths, len(w.slower), func(i, worker int) time.Duration {
		return w.lengths[i] * time.Duration(w.slower[worker])
	})
}

// greedyAsGiven is the list schedule of the tasks as long as they took in a run:
// those that came to a slow worker took longer, and those that were lost with a
// killed one could not be done sooner than in their length after that. Which
// tasks those are is luck, and it may be the longest of all; this leaves out
// what is luck.
func (w *makespanWorld) greedyAsGiven(report *Report) time.Duration {
	given := slices.Clone(w.lengths)
	var soonest time.Duration
	for i, r := range report.Results {
		worker := int(r.Worker[1] - '0')
		given[i] *= time.Duration(w.slower[worker])
		if r.Losses > 0 {
			soonest = max(soonest, w.killed+given[i])
		}
	}
	return max(soonest, listSchedule(given, len(w.slower), func(i, _ int) time.Duration { return given[i] }))
}

func listSchedule(tasks []time.Duration, workers int, takes func(task, worker int) time.Duration) (end time.Duration) {
	free := make([]time.Duration, workers*makespanSlots)
	for i := range tasks {
		first := 0
		for slot := range free {
			if free[slot] < free[first] {
				first = slot
			}
		}
		free[first] += takes(i, first/makespanSlots)
		end = max(end, free[first])
	}
	return end
}

// run is what Run takes, with whatever checks the simulation has.
func (w *makespanWorld) run(t *testing.T) (elapsed time.Duration, report *Report) {
	plan := simPlan{Seed: w.seed, Network: simNetworkPlan{Buffer: 64 << 10}}
	for i, slower := range w.slower {
		worker := simWorkerPlan{Name: fmt.Sprintf("w%d", i), Categories: []string{"a"}, Slots: makespanSlots, Slower: slower}
		if i == len(w.slower)-1 && w.killed > 0 {
			worker.Life = []simLifeEvent{{simKilled, w.killed, simNever, false}}
		}
		plan.Workers = append(plan.Workers, worker)
	}
	run := simRunPlan{CancelAt: simNever, LeaveAfter: -1}
	for _, length := range w.lengths {
		run.Tasks = append(run.Tasks, simTaskPlan{Category: "a", Takes: length})
	}
	plan.Coordinators = []simCoordinatorPlan{{Window: windowTasks, Interval: 5 * time.Second, Silence: 15 * time.Second, WorkerWait: 30 * time.Second,
		Handshake: 10 * time.Second, CancelGrace: 10 * time.Second, StreamBuffer: 1, ShutdownAt: simNever, Runs: []simRunPlan{run}}}
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t, plan)
		s.network.override = func(_ simDial, _ int, p *simConnPlan) {
			p.Up.Latency, p.Down.Latency = makespanLatency, makespanLatency
		}
		s.simulate()
		for _, failure := range s.failures {
			t.Errorf("seed %d: %s", w.seed, failure)
		}
		r := s.runs[0]
		if r.err != nil {
			t.Errorf("seed %d: %v", w.seed, r.err)
		}
		elapsed, report = r.ended-r.began, r.report
	})
	return elapsed, report
}

// A run takes hardly longer than the schedule of somebody who knows at once when
// a slot is free, and loses no time over telling it.
func TestMakespanIsCloseToGreedy(t *testing.T) {
	const seeds = 10
	for _, tt := range []struct {
		name  string
		world func(*makespanWorld)
		most  float64 // of the greedy schedule's
	}{
		{"eight equal workers", func(*makespanWorld) {}, 1.05},
		{"one is ten times slower", func(w *makespanWorld) { w.slower[7] = 10 }, 1.10},
		// The greedy schedule has the worker to its end.
		{"one is killed half-way", func(w *makespanWorld) { w.killed = w.greedy() / 2 }, 1.15},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var sum, all, allGreedy float64
			for seed := range uint64(seeds) {
				w := newMakespanWorld(seed)
				tt.world(w)
				elapsed, report := w.run(t)
				if t.Failed() {
					return
				}
				greedy, given := w.greedy(), w.greedyAsGiven(report)
				ratio := float64(elapsed) / float64(given)
				sum += ratio
				all += float64(elapsed)
				allGreedy += float64(greedy)
				t.Logf("seed %d: %v, greedy %v: %.3f times it (%v knowing nothing of the run: %.3f); %d tasks taken back", seed,
					elapsed.Round(time.Microsecond), given.Round(time.Microsecond), ratio, greedy.Round(time.Microsecond), float64(elapsed)/float64(greedy), report.Troubles.Returns)
				if ratio > tt.most {
					t.Errorf("seed %d: %.3f times the greedy schedule, want at most %.2f", seed, ratio, tt.most)
				}
			}
			t.Logf("on average %.3f times the greedy schedule (all seeds together, knowing nothing of the runs: %.3f)", sum/seeds, all/allGreedy)
		})
	}
}
