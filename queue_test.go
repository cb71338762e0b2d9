package taskexec

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// check compares what a queue has counted with what its sessions hold, when
// nothing moves: whoever was to be woken has been. No session with a free slot
// is then beside tasks that it may have.
func (q *queue) check() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	type sums struct{ slots, inFlight, free, ahead, awaited int }
	var want sums
	for _, s := range q.sessions {
		want.inFlight += s.held.len()
		cost, suspects := 0, 0
		for _, f := range s.held.all {
			cost += int(f.cost)
			if f.suspect {
				suspects++
			}
		}
		switch {
		case cost != s.cost || suspects != s.suspects:
			return fmt.Errorf("%s: cost %d and %d suspects, want %d and %d", s.addr, s.cost, s.suspects, cost, suspects)
		case s.alone != nil && s.held.len() != 1:
			return fmt.Errorf("%s: a task that must be alone is among %d", s.addr, s.held.len())
		case !s.live && s.standing != standing{askedAt: s.askedAt, barren: s.barren}:
			return fmt.Errorf("%s takes no tasks any more: %+v", s.addr, s.standing)
		}
	}
	for _, s := range q.live {
		want.slots += s.slots
		want.awaited += s.awaited
		if s.alone == nil {
			want.free += max(s.slots-s.held.len(), 0)
		}
		if !s.barren {
			want.ahead += max(s.held.len()-s.slots-s.awaited, 0)
		}
	}
	if got := (sums{q.slots, q.inFlight, q.free, q.ahead, q.awaited}); got != want {
		return fmt.Errorf("%+v, want %+v", got, want)
	}
	first := q.first()
	if first == nil || q.halted != notHalted || q.over {
		return nil
	}
	for _, s := range q.live {
		held, cost := s.held.len(), taskCost(len(first.Task.Instruction)+40)
		if held < s.slots && held < q.limitWith(s, first) && (held == 0 || s.cost+cost <= windowBytes) {
			return fmt.Errorf("%d tasks wait, first %d, and %s holds %d with %d slots", q.waits(), first.Index, s.addr, held, s.slots)
		}
	}
	return nil
}

func TestNoSlotIsFreeBesideTasksThatWait(t *testing.T) {
	for seed := range uint64(*simSeeds / 10) {
		seed += *simSeed
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { checkQueuesOfARun(t, seed) })
		}) {
			return
		}
	}
}

// checkQueuesOfARun has workers execute tasks of all kinds, loses some sessions
// and workers, and checks the queue all the while. There are no PINGs, after
// which a writer looks for tasks though nobody has woken it for them.
func checkQueuesOfARun(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 0))
	pick := func(ds ...time.Duration) time.Duration { return ds[rnd.IntN(len(ds))] }
	unit := pick(time.Microsecond, time.Millisecond, time.Second)
	long, timeouts, deaf := rnd.IntN(3) == 0, rnd.IntN(3) == 0, rnd.IntN(2) == 0
	tasks := make([]Task, 1+rnd.IntN(150))
	takes := make([]time.Duration, len(tasks))
	fails := make([]int, len(tasks)) // so often
	for i := range tasks {
		tasks[i].Category = "a"
		takes[i] = pick(0, unit, unit, 2*unit, 100*unit)
		if rnd.IntN(10) == 0 {
			fails[i] = 1 + rnd.IntN(3)
		}
		if long {
			tasks[i].Instruction = strings.Repeat("x", rnd.IntN(4)*windowBytes/4)
		}
		if timeouts && rnd.IntN(10) == 0 {
			tasks[i].Timeout = max(takes[i]/4, time.Millisecond)
		}
	}
	handler := func(ctx context.Context, _ Task) (string, error) {
		info, _ := TaskInfoFrom(ctx)
		done := ctx.Done()
		if deaf {
			done = nil
		}
		select {
		case <-time.After(takes[info.Task]):
		case <-done:
		}
		if info.Attempt <= fails[info.Task] {
			return "", RetryAfter(errors.New("not yet"), time.Duration(1+info.Task%7)*unit)
		}
		return "", ctx.Err()
	}
	cl := newCluster(t)
	var addrs []string
	var workers []*Worker
	for i := range 1 + rnd.IntN(4) {
		addrs = append(addrs, fmt.Sprintf("a:%d", i))
		workers = append(workers, cl.worker(addrs[i], handler, WithSlots(1+rnd.IntN(4))))
	}
	opts := []CoordinatorOption{WithWorkers("a", addrs...), WithRetry(Retry{Attempts: 3}), WithHeartbeat(1000*time.Hour, 2000*time.Hour),
		WithOnFailure([]OnFailure{FinishStage, StopSoon, KeepGoing}[rnd.IntN(3)]), withLeastWindow(rnd.IntN(9))}
	gap := pick(0, unit, 10*unit)
	stream := rnd.IntN(2) == 0
	if stream {
		opts = append(opts, WithStreamBuffer(1+rnd.IntN(100)), WithOrder([]Order{ByCategory, ByInput, Concurrent, Concurrent}[rnd.IntN(4)]))
	}
	c := cl.coordinator(opts...)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	over := make(chan struct{})
	go func() {
		defer close(over)
		if !stream {
			c.Run(ctx, tasks)
			return
		}
		for range c.Stream(ctx, func(yield func(Task) bool) {
			for i, task := range tasks {
				if i%3 == 0 {
					time.Sleep(gap)
				}
				if !yield(task) {
					return
				}
			}
		}) {
		}
	}()
	start := time.Now()
	for losses := rnd.IntN(4); ; time.Sleep(pick(unit/3, unit, 3*unit, 10*unit, time.Second/10) + 1) {
		synctest.Wait()
		select {
		case <-over:
			return
		default:
		}
		c.mu.Lock()
		runs := slices.Collect(maps.Keys(c.runs))
		c.mu.Unlock()
		for _, r := range runs {
			for _, q := range r.allQueues() {
				if err := q.check(); err != nil {
					t.Errorf("after %v: %v", time.Since(start), err)
					cancel()
				}
			}
		}
		if time.Since(start) > 24*time.Hour {
			t.Errorf("the run does not end: %+v", c.Snapshot())
			cancel()
		}
		if t.Failed() {
			<-over
			return
		}
		if conns := cl.dialed(); losses > 0 && len(conns) > 0 && rnd.IntN(20) == 0 {
			losses--
			conns[rnd.IntN(len(conns))].Conn.Close()
		}
		if rnd.IntN(400) == 0 {
			go workers[rnd.IntN(len(workers))].Shutdown(t.Context())
		}
	}
}

// What a Run has not lent yet comes as soon as little waits. So a session need
// not be content with its slots because, just then, no more waits than the free
// slots of others would start. A Stream's consumer may take its time.
func TestASessionTakesItsWindowWhileMoreIsAboutToBeLent(t *testing.T) {
	for _, tt := range []struct {
		reason   string
		waits    int
		unlent   int
		delivery *delivery
		want     int
	}{
		{"much waits", 1000, 0, nil, 50},
		{"others can start all that is left", 60, 0, nil, 1},
		{"others can start all but some of what is left", 120, 0, nil, 21},
		{"little waits, and much is about to", 60, 1000, nil, 50},
		{"others can start what is about to wait", 60, 30, nil, 1},
		{"little waits, and who knows when more will", 60, 1000, &delivery{}, 1},
	} {
		q := &queue{run: &run{config: &coordinatorConfig{}, delivery: tt.delivery}, slots: 2, free: 100, unlent: tt.unlent}
		for range tt.waits {
			q.waiting.push(&Result{})
		}
		s := &session{run: q.run, queue: q, slots: 1, window: windowTasks, pace: pace{window: 50}}
		if got := q.limit(s); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.reason, got, tt.want)
		}
	}
}
