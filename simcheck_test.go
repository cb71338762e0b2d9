package taskexec

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// This file says what must hold of a simulated world, whatever happened in it.
// The times that it compares are those of one clock, and random to the
// nanosecond: two things at the same time follow from each other.

// A simAttempt is one sending of a task.
type simAttempt struct {
	task, attempt int
	taken         time.Duration // when the session took it
	conn          *simConn      // nil if it was never written
	sent          time.Duration
	cost          int           // of the window
	report        *simLine      // that the coordinator heard
	got           time.Duration // when the worker read it
	execution     *simExecution
	said          *simLine // the report as the worker wrote it
}

// fate says how the attempt ended for the coordinator, and when: by "report",
// with a "goodbye", "lost" with its session, or "" if at the end of the run.
// Sure is whether nothing else came at the same time.
func (a *simAttempt) fate() (how string, at time.Duration, sure bool) {
	if a.conn == nil {
		return "unwritten", a.taken, false
	}
	log := &a.conn.log
	at, how = simNever, ""
	if a.report != nil {
		how, at = "report", a.report.at
	}
	if log.farewell < at {
		how, at = "goodbye", log.farewell
	}
	if log.lost < at {
		how, at = "lost", log.lost
	}
	sure = !(how == "report" && log.lost == at || how == "goodbye" && log.lost < at)
	return how, at, sure
}

// stages numbers the stages of a run's tasks.
func (r *simRun) stageOf(task int) int {
	switch r.coordinator.Order {
	case ByInput:
		return task
	case Concurrent:
		return 0
	}
	category := r.plan.Tasks[task].Category
	if i := slices.Index(r.coordinator.Sequence, category); i >= 0 {
		return i
	}
	return int(category[0])
}

// check compares what was seen with what must be. network.mu is held.
func (s *simulation) check() {
	harm := false
	for f, met := range s.met {
		harm = harm || met && simFault(f).harmful()
	}
	if !harm {
		s.met[simNothingWrong] = true
	}
	for _, r := range s.runs {
		r.check(harm)
	}
	if len(s.runs) > 1 {
		s.met[simTwoRuns] = true
	}
	s.checkTurns()
}

// checkTurns checks that a worker's slots go to its sessions in turns: none starts
// two tasks while one of another's waits all the time and that other starts none.
func (s *simulation) checkTurns() {
	for _, p := range s.processes {
		for _, mine := range p.started {
			for i := range len(mine) - 1 {
				from, until := mine[i].execution.from, mine[i+1].execution.from
				for other, theirs := range p.started {
					next := slices.IndexFunc(theirs, func(a *simAttempt) bool { return a.execution.from >= from })
					if next < 0 || other == mine[i].conn {
						continue
					}
					if a := theirs[next]; a.got < from && a.execution.from > until {
						s.fail("turns: worker %s started two tasks over %s, at %v and %v, while task %d waited over %s from %v until %v",
							p.name, mine[i].conn.name, from, until, a.task, other.name, a.got, a.execution.from)
					}
				}
			}
		}
	}
}

// checkSnapshots checks that what runs say of themselves adds up.
func (s *simulation) checkSnapshots(c *Coordinator) {
	snapshots := c.Snapshot()
	s.network.mu.Lock()
	defer s.network.mu.Unlock()
	for _, snapshot := range snapshots {
		r := s.runIDs[snapshot.Run]
		if r == nil {
			continue // it has not greeted anybody yet
		}
		for _, category := range snapshot.Categories {
			tasks, inFlight := 0, 0
			for _, task := range r.tasks {
				if task.Category == category.Category {
					tasks++
				}
			}
			for _, w := range category.Workers {
				inFlight += w.InFlight
			}
			sum := category.Waiting + category.InFlight + category.Counts.Total()
			if category.Waiting < 0 || category.InFlight != inFlight || sum > tasks || sum < tasks && !r.plan.Stream {
				r.fail("of %d tasks of a category a snapshot says %+v", tasks, category)
			}
		}
	}
}

func (r *simRun) fail(format string, args ...any) {
	r.sim.fail("run %d: %s", r.number, fmt.Sprintf(format, args...))
}

func (r *simRun) check(harm bool) {
	s, c := r.sim, r.coordinator
	meet := func(what simFault, met bool) { s.met[what] = s.met[what] || met }
	canceled := r.plan.CancelAt <= r.ended || r.left != simNever || s.hurried.Err() != nil
	closed := c.ShutdownAt <= r.ended
	var worker *WorkerError
	halted := canceled || closed || errors.Is(r.err, ErrNoWorker) || errors.As(r.err, &worker)
	meet(simCanceled, canceled && r.left == simNever)
	meet(simShutDown, closed)
	meet(simLeft, r.left != simNever)
	meet(simStreamed, r.plan.Stream)
	meet(simSlowConsumer, r.plan.Consume > 0)
	meet(simByInput, c.Order == ByInput)
	meet(simConcurrent, c.Order == Concurrent)
	meet(simStopSoon, c.OnFailure == StopSoon)
	meet(simKeepGoing, c.OnFailure == KeepGoing)
	meet(simAtMostOnce, c.AtMostOnce)
	meet(simRetrying, c.Retry != nil)
	meet(simDismissing, c.Shutdown)
	meet(simNoWorker, errors.Is(r.err, ErrNoWorker))
	meet(simAllDone, r.err == nil && r.left == simNever)

	results := r.allResults(halted)
	attempts := r.allAttempts()

	// A run that nothing stops ends by its tasks alone.
	var redials, losses, retries int
	failed := simNever    // when the first task was not Done
	blamed := math.MaxInt // the first stage with a task that is neither Done nor Skipped
	var counts Counts
	for i := range r.tasks {
		res, ok := results[i]
		if !ok {
			// A Stream that stops does not read on.
			if r.left == simNever && !(r.plan.Stream && (halted || c.OnFailure != KeepGoing && r.failed())) {
				r.fail("I1: task %d has no result", i)
			}
			continue
		}
		counts.add(res.Outcome)
		losses += res.Losses
		retries += res.Retries
		done := r.done[i]
		if len(done) > 1 {
			r.fail("I2: task %d had an outcome %d times: %+v", i, len(done), done)
		}
		if len(done) > 0 && res.Outcome != Done {
			failed = min(failed, done[0].at)
		}
		if res.Outcome != Done && res.Outcome != Skipped {
			blamed = min(blamed, r.stageOf(i))
		}
		if len(done) == 0 && res.Attempts > 0 {
			r.fail("I7: the observer has not heard of task %d, which is %v", i, res.Outcome)
		}
		r.checkTask(res, attempts[i], harm, halted, canceled)
	}
	if counts.Done < counts.Total() && r.err == nil && !r.plan.Stream {
		r.fail("no error, though %+v", counts)
	}
	if r.lostTasks != losses {
		r.fail("the observer was told of %d lost tasks, and results tell of %d losses", r.lostTasks, losses)
	}
	for _, n := range r.opened {
		redials += n - 1
	}
	meet(simLost, losses > 0)
	meet(simRedialed, redials > 0)
	meet(simRetried, retries > 0)
	for category, g := range r.groups {
		r.fail("a group of category %s is not done: %+v", category, g)
	}
	if rep := r.report; rep != nil {
		if rep.Counts != counts {
			r.fail("I1: counts %+v, results %+v", rep.Counts, counts)
		}
		if rep.Troubles.Losses != losses || rep.Troubles.Retries != retries || rep.Troubles.Redials != redials {
			r.fail("the report counts %+v, and its results and sessions %d losses, %d retries, %d redials", rep.Troubles, losses, retries, redials)
		}
		if returns, stuck := rep.Troubles.Returns-r.returns, rep.Troubles.Stuck-r.stuck; min(returns, stuck) < 0 || max(returns, stuck) > r.perhaps {
			r.fail("the report counts %+v, and its attempts %d returns and %d stuck, and %d that may have been", rep.Troubles, r.returns, r.stuck, r.perhaps)
		}
		for _, category := range rep.Categories {
			var counts Counts
			attempts, sent := 0, 0
			for _, res := range rep.Results {
				if res.Task.Category == category.Category {
					counts.add(res.Outcome)
					attempts += res.Attempts
				}
			}
			for _, w := range category.Workers {
				sent += w.Sent
			}
			if category.Counts != counts || category.Waiting != 0 || category.InFlight != 0 || sent != attempts {
				r.fail("the report says %+v of a category whose results are %+v after %d attempts", category, counts, attempts)
			}
		}
	}

	if !harm && losses > 0 && !canceled { // a canceled run gives up what takes too long
		r.fail("%d losses, though nothing went wrong", losses)
	}

	// I4 and the policies. What a session takes at the time of the last outcome
	// follows from it.
	for at, taken := range r.taken {
		task := at[0]
		stage := r.stageOf(task)
		for other := range r.tasks {
			if r.stageOf(other) >= stage {
				continue
			}
			done := r.done[other]
			if len(done) == 0 || done[0].at > taken {
				r.fail("I4: task %d of stage %d was sent at %v, before task %d of stage %d had its outcome", task, stage, taken, other, r.stageOf(other))
				break
			}
			if done[0].result.Outcome != Done && c.OnFailure != KeepGoing {
				r.fail("%v: task %d of stage %d was sent, though task %d of stage %d is %v", c.OnFailure, task, stage, other, r.stageOf(other), done[0].result.Outcome)
				break
			}
		}
		if c.OnFailure == StopSoon && taken > failed {
			r.fail("StopSoon: task %d was sent at %v, though a task was not Done at %v", task, taken, failed)
		}
		if taken > r.plan.CancelAt || closed && taken > c.ShutdownAt {
			r.fail("task %d was sent at %v, after the run was stopped", task, taken)
		}
	}
	stopped := min(r.plan.CancelAt, c.ShutdownAt, r.left, r.ended)
	if c.OnFailure == StopSoon {
		stopped = min(stopped, failed)
	}
	for _, done := range r.done {
		// For want of a worker, or of one that could be connected to in time.
		if res := done[0].result; errors.Is(res.Err, ErrNoWorker) || res.Outcome == Skipped && errors.As(res.Err, &worker) {
			stopped = min(stopped, done[0].at)
		}
	}
	r.checkSessions(attempts, stopped)
	r.checkStops(attempts, failed, closed)
	r.checkDismissals(halted)
	r.checkReturns(attempts, stopped)
	r.checkStarts(attempts, results)

	if errors.Is(r.err, ErrNoWorker) && !s.met[simGone] && !s.met[simDismissing] && !s.met[simStuck] {
		if late := s.plan.Calm + c.WorkerWait + c.Silence + 2*c.Handshake + 20*time.Second; r.ended > late {
			r.fail("I9: no worker at %v, though all were back by %v: %v", r.ended, s.plan.Calm, r.err)
		}
	}
	if !halted && c.OnFailure == KeepGoing && counts.Skipped+counts.Canceled > 0 {
		r.fail("KeepGoing: %+v, though nothing stopped the run: %v", counts, r.err)
	}
	for i, res := range results {
		stage := r.stageOf(i)
		if res.Outcome == Skipped && !halted && (stage < blamed || stage == blamed && c.OnFailure == FinishStage) {
			r.fail("%v: task %d of stage %d is Skipped (%v), though nothing stopped the run before that stage was over", c.OnFailure, i, stage, res.Err)
		}
	}
	if canceled && s.hurried.Err() == nil {
		// Whoever makes the tasks and takes the results may need a while, and so
		// do the last words to workers.
		at := max(min(r.plan.CancelAt, r.left), r.began)
		late := at + c.CancelGrace + 2*lastWordsTimeout + time.Duration(1+len(r.tasks))*(r.plan.Consume+r.plan.Produce)
		if r.ended > late {
			r.fail("the run was canceled at %v, and ended at %v, though the grace is %v", at, r.ended, c.CancelGrace)
		}
	}
}

// allResults returns the results by task: those of the report, those that were
// yielded, or what the observer was told of those that were not.
func (r *simRun) allResults(halted bool) map[int]Result {
	results := make(map[int]Result)
	list := r.results
	if r.report != nil {
		list = r.report.Results
		if len(list) != len(r.tasks) {
			r.fail("I1: %d results for %d tasks", len(list), len(r.tasks))
		}
	}
	for i, res := range list {
		if _, twice := results[res.Index]; twice {
			r.fail("I2: task %d has two results", res.Index)
		}
		if r.report != nil && res.Index != i {
			r.fail("I3: result %d is that of task %d", i, res.Index)
		}
		var te *TaskError
		if res.Outcome < Done || res.Outcome > Unknown || (res.Outcome != Done) != errors.As(res.Err, &te) || te != nil && te.Outcome != res.Outcome {
			r.fail("I1: task %d is %v with %v", res.Index, res.Outcome, res.Err)
		}
		results[res.Index] = res
	}
	// One that is stopped before it has seen all of its input has no plan.
	if r.plan.Stream && r.coordinator.Order != Concurrent && !(halted && len(r.taken) == 0) {
		order := slices.SortedStableFunc(slices.Values(r.indices()), func(a, b int) int { return cmp.Compare(r.stageOf(a), r.stageOf(b)) })
		for i, res := range r.results {
			if res.Index != order[i] {
				r.fail("I3: yield %d is the result of task %d, want that of %d", i, res.Index, order[i])
				break
			}
		}
	}
	if r.plan.Stream && r.coordinator.Order == Concurrent {
		before := time.Duration(0)
		for i, res := range r.results {
			if done := r.done[res.Index]; len(done) > 0 {
				if done[0].at < before {
					r.fail("I3: yield %d is the result of task %d, which had settled before one that was yielded already", i, res.Index)
				}
				before = max(before, done[0].at)
			}
		}
	}
	for i, done := range r.done {
		res, ok := results[i]
		if !ok {
			if r.left == simNever {
				r.fail("I7: task %d is %v, and was never yielded", i, done[0].result.Outcome)
			}
			results[i] = done[0].result
			continue
		}
		if d := done[0].result; d.Outcome != res.Outcome || d.Output != res.Output || d.Attempts != res.Attempts {
			r.fail("I2: the observer got %+v, the caller %+v", d, res)
		}
	}
	return results
}

// failed says whether any task was not Done.
func (r *simRun) failed() bool {
	for _, done := range r.done {
		if done[0].result.Outcome != Done {
			return true
		}
	}
	return false
}

func (r *simRun) indices() []int {
	indices := make([]int, len(r.tasks))
	for i := range indices {
		indices[i] = i
	}
	return indices
}

// allAttempts puts together what was seen of each attempt, by task.
func (r *simRun) allAttempts() [][]*simAttempt {
	attempts := make([][]*simAttempt, len(r.tasks))
	find := func(task, attempt int) *simAttempt {
		if task < len(attempts) && attempt >= 1 && attempt <= len(attempts[task]) {
			return attempts[task][attempt-1]
		}
		return nil
	}
	for task := range r.tasks {
		for attempt := 1; ; attempt++ {
			taken, ok := r.taken[[2]int{task, attempt}]
			if !ok {
				break
			}
			attempts[task] = append(attempts[task], &simAttempt{task: task, attempt: attempt, taken: taken})
		}
	}
	for _, c := range r.sim.network.conns {
		if c.run != r.number {
			continue
		}
		on := make(map[int][]*simAttempt) // by task
		for _, line := range c.log.sent {
			if line.verb != "RUN" {
				continue
			}
			a := find(line.task, line.attempt)
			if a == nil || a.conn != nil {
				r.fail("I6: attempt %d of task %d was sent over %s, and was sent before, or nobody took it", line.attempt, line.task, c.name)
				continue
			}
			a.conn, a.sent, a.cost = c, line.at, taskCost(line.size)
			on[line.task] = append(on[line.task], a)
		}
		for _, line := range c.log.got {
			if a := find(line.task, line.attempt); line.verb == "RUN" && a != nil && a.conn == c {
				a.got = line.at
			}
		}
		for i := range c.log.said {
			line := &c.log.said[i]
			if line.verb != "DONE" && line.verb != "FAIL" && line.verb != "RETURN" {
				continue
			}
			for _, a := range on[line.task] {
				if a.sent <= line.at && a.said == nil {
					a.said = line
					break
				}
			}
		}
		for i := range c.log.heard {
			line := &c.log.heard[i]
			if line.verb != "DONE" && line.verb != "FAIL" && line.verb != "RETURN" {
				continue
			}
			if line.at > c.log.lost {
				r.sim.met[simFenced] = true
			}
			var a *simAttempt // the last that was sent by then
			for _, b := range on[line.task] {
				if b.sent <= line.at && b.report == nil {
					a = b
					break
				}
			}
			if a == nil {
				r.fail("the worker reported %s for task %d over %s, which it did not have", line.verb, line.task, c.name)
				continue
			}
			a.report = line
			if line.verb == "RETURN" {
				r.sim.met[simReturned] = true
			}
			if line.kind == KindStuck {
				r.sim.met[simStuck] = true
			}
		}
	}
	for _, e := range r.executions {
		a := find(e.task, e.attempt)
		switch {
		case a == nil || a.conn == nil:
			r.fail("I6: task %d was executed with attempt %d, which was not sent", e.task, e.attempt)
		case a.execution != nil:
			r.fail("I6: attempt %d of task %d was executed twice", e.attempt, e.task)
		case a.conn.process != e.process:
			r.fail("task %d was sent to %s, and executed by %s", e.task, a.conn.process.name, e.process.name)
		default:
			a.execution = e
			if e.process.started == nil {
				e.process.started = make(map[*simConn][]*simAttempt)
			}
			e.process.started[a.conn] = append(e.process.started[a.conn], a)
		}
	}
	return attempts
}

// checkTask compares a result with what became of the attempts.
func (r *simRun) checkTask(res Result, attempts []*simAttempt, harm, halted, canceled bool) {
	s, c, task := r.sim, r.coordinator, res.Index
	plan := &r.plan.Tasks[task]
	if len(attempts) != res.Attempts {
		r.fail("I6: task %d was taken %d times, and has %d attempts", task, len(attempts), res.Attempts)
		return
	}
	settled := r.ended
	if done := r.done[task]; len(done) > 0 {
		settled = done[0].at
	}

	var executed, failures, failuresPerhaps, lostSurely, lostPerhaps int
	for i, a := range attempts {
		how, at, sure := a.fate()
		last := i == len(attempts)-1
		if e := a.execution; e != nil {
			executed++
			// On the wire a time is a number of milliseconds.
			limit := cmp.Or(plan.Timeout, c.TaskTimeout)
			limit = (limit + time.Millisecond - 1).Truncate(time.Millisecond)
			took := e.until - e.from
			if limit > 0 && e.obeys && took > limit || e.verdict == "timed out" && took != limit {
				r.fail("attempt %d of task %d has a time of %v, and its execution is %+v", a.attempt, task, limit, e)
			}
		}
		back := how == "goodbye" || how == "report" && a.report.verb == "RETURN"
		stuck := how == "report" && a.report.kind == KindStuck
		switch {
		case !sure || at > settled:
			r.perhaps++
		case back:
			r.returns++
		case stuck:
			r.stuck++
		}
		switch {
		case !sure:
			lostPerhaps++
		case how == "lost" || how == "" || at > settled: // or it was given up
			lostSurely++
		}
		if !last {
			next := attempts[i+1]
			if how == "" || at > next.taken {
				r.fail("I5: attempt %d of task %d was sent at %v, though attempt %d over %s was still out", next.attempt, task, next.taken, a.attempt, a.conn.name)
			}
			if how == "lost" && c.AtMostOnce {
				r.fail("at most once: task %d was sent again after attempt %d was lost", task, a.attempt)
			}
		}
		if a.report != nil && a.report.verb == "FAIL" {
			failuresPerhaps++
		}
		if how != "report" || !sure || at > settled {
			continue
		}
		// I7: what was reported while the session held the task counts.
		e := a.execution
		running := e != nil && (e.until == simNever || e.until > at)
		switch a.report.verb {
		case "DONE":
			if !last || res.Outcome != Done {
				r.fail("I7: attempt %d of task %d was reported as done, and the task is %v after %d", a.attempt, task, res.Outcome, len(attempts))
			}
			if e == nil || running || e.verdict != "done" {
				r.fail("attempt %d of task %d was reported as done, and its execution is %+v", a.attempt, task, e)
			} else if took := e.until - e.from; last && res.Executed != (took+time.Microsecond-1).Truncate(time.Microsecond) {
				r.fail("task %d was executed for %v, says its result, and its execution is %+v", task, res.Executed, e)
			}
		case "RETURN":
			if e != nil {
				r.fail("attempt %d of task %d was given back, and executed: %+v", a.attempt, task, e)
			}
		case "FAIL":
			failures++
			beside := strings.HasPrefix(a.report.text, "an earlier attempt still runs")
			verdicts := map[string][]string{
				KindError: {"failed"}, KindFinal: {"failed for good"}, KindPanic: {"panicked", "exited"}, KindTimeout: {"timed out"},
				KindCanceled: {"canceled"}, KindOutput: {"done"},
			}
			switch {
			case a.report.kind == KindStuck:
				if e == nil || e.until-e.from < cmp.Or(plan.Timeout, c.TaskTimeout)+stuckGrace {
					r.fail("attempt %d of task %d was reported as stuck, and its execution is %+v", a.attempt, task, e)
				}
			case beside && e == nil:
			case e == nil || running || !slices.Contains(verdicts[a.report.kind], e.verdict):
				r.fail("attempt %d of task %d was reported as %s (%s), and its execution is %+v", a.attempt, task, a.report.kind, a.report.text, e)
			}
			if a.report.kind == KindOutput {
				s.met[simTooLong] = true
			}
			if a.report.kind == KindCanceled && !canceled {
				r.fail("attempt %d of task %d is canceled, though nobody canceled the run", a.attempt, task)
			}
			if a.report.kind == KindFinal && !last {
				r.fail("WithRetry: task %d was tried again, though its handler said that is of no use", task)
			}
			wish := e != nil && a.report.kind == KindError && plan.Kind == simDoRetryAfter
			if wish && !last && attempts[i+1].taken < at+plan.After {
				r.fail("RetryAfter: attempt %d of task %d came %v after the last, want %v", a.attempt+1, task, attempts[i+1].taken-at, plan.After)
			}
			if delay, ok := s.delays[at]; !wish && !last && (!ok || attempts[i+1].taken < at+delay) {
				r.fail("WithRetry: attempt %d of task %d came %v after the last, want %v", a.attempt+1, task, attempts[i+1].taken-at, delay)
			}
		}
	}
	if res.Losses < lostSurely || res.Losses > lostSurely+lostPerhaps {
		r.fail("task %d has %d losses, and %d to %d of its %d attempts were lost", task, res.Losses, lostSurely, lostSurely+lostPerhaps, len(attempts))
	}
	if res.Losses > 1+maxStrikes {
		r.fail("task %d was lost %d times", task, res.Losses)
	}
	most := 1
	if c.Retry != nil {
		most = c.Retry.Attempts
	}
	if failures > most || res.Retries >= most {
		r.fail("WithRetry: task %d failed %d times and was tried again %d times, want at most %d attempts", task, failures, res.Retries, most)
	}
	if executed > res.Attempts || c.AtMostOnce && executed > 1+res.Retries {
		r.fail("I6: task %d was executed %d times in %d attempts with %d retries", task, executed, res.Attempts, res.Retries)
	}
	if executed > 1 {
		s.met[simTwice] = true
	}

	// I5: the outcome is that of the last attempt.
	var final *simAttempt
	if len(attempts) > 0 {
		final = attempts[len(attempts)-1]
	}
	reported := func() bool {
		if final == nil || final.report == nil {
			return false
		}
		how, at, sure := final.fate()
		return (how == "report" || !sure) && at == settled
	}
	var remote *RemoteError
	switch res.Outcome {
	case Done:
		if !reported() || final.report.verb != "DONE" || res.Worker != final.conn.process.name ||
			res.Output != simOutput(res.Worker, task, res.Attempts, plan.Output) {
			r.fail("I5: task %d is Done by %s with %.50q at %v, and its last attempt %+v", task, res.Worker, res.Output, settled, final)
		}
	case Failed:
		switch {
		case !errors.As(res.Err, &remote):
			if plan.Padding < defaultMaxLine/2 {
				r.fail("task %d is Failed without a word of its worker: %v", task, res.Err)
			}
			s.met[simTooLong] = true
		case !(reported() && final.report.verb == "FAIL") && !halted && c.OnFailure != StopSoon:
			r.fail("I5: task %d is Failed (%v) at %v, and its last attempt %+v", task, res.Err, settled, final)
		case failuresPerhaps < most && !halted && c.OnFailure != StopSoon && remote.Kind != KindFinal && remote.Kind != KindOutput && (remote.Kind != KindPanic || c.Retry.Panics):
			r.fail("WithRetry: task %d is Failed (%v) after %d failures, want %d", task, res.Err, failuresPerhaps, most)
		}
	case Canceled:
		if !canceled || !reported() {
			r.fail("I5: task %d is Canceled (%v) at %v, and its last attempt %+v", task, res.Err, settled, final)
		}
	case Skipped:
		if executed > 0 || res.Losses > 0 {
			r.fail("task %d is Skipped, with %d losses and executed %d times", task, res.Losses, executed)
		}
	case Unknown:
		s.met[simUnknown] = true
		why := fmt.Sprint(res.Err)
		struck := strings.Contains(why, "with little else in flight") && !strings.Contains(why, "stopped at")
		s.met[simStruckOut] = s.met[simStruckOut] || struck
		switch {
		case res.Losses == 0:
			r.fail("task %d is Unknown without a loss: %v", task, res.Err)
		case struck && res.Losses != 1+maxStrikes:
			r.fail("task %d is given up after %d losses: %v", task, res.Losses, res.Err)
		case !struck && !c.AtMostOnce && !halted && c.OnFailure != StopSoon:
			r.fail("task %d is Unknown after %d losses, and might have been tried again: %v", task, res.Losses, res.Err)
		}
	}

	// A report waits for nothing but the line.
	for _, a := range attempts {
		if e := a.execution; e != nil && a.said != nil && a.said.verb == "DONE" && a.said.at != e.until && !s.met[simWriteWaits] {
			r.fail("attempt %d of task %d ended at %v, and was reported at %v", a.attempt, task, e.until, a.said.at)
		}
	}

	// Two executions overlap only where the first was cut off, or is stuck.
	for i, a := range attempts {
		for _, b := range attempts[i+1:] {
			if a.execution != nil && b.execution != nil && b.execution.from < a.execution.until {
				s.met[simOverlapped] = true
				how, at, _ := a.fate()
				stuck := a.report != nil && a.report.kind == KindStuck
				if !stuck && (how != "lost" && how != "unwritten" || at > b.execution.from) {
					r.fail("task %d was executed as attempts %d and %d at the same time, though the first was not lost: %+v, %+v", task, a.attempt, b.attempt, a.execution, b.execution)
				}
			}
		}
	}
}

// checkSessions checks what each session was sent, and how long it went on.
func (r *simRun) checkSessions(attempts [][]*simAttempt, stopped time.Duration) {
	s, c := r.sim, r.coordinator
	told := make(map[string]time.Duration)
	for _, conn := range s.network.conns {
		if conn.run != r.number {
			continue
		}
		log := &conn.log
		if at, ok := told[conn.addr]; ok && conn.dialed > at {
			r.fail("%s was dialed, though its worker was told to shut down", conn.name)
		}
		if conn.opened > r.ended {
			r.fail("I8: %s was dialed when the run was over", conn.name)
		}
		if log.lost != simNever && strings.Contains(fmt.Sprint(log.lostWhy), "nothing heard for") {
			s.met[simSilence] = true
		}
		// A worker that is silent is found to be so in time, and not before.
		if slack := c.Silence + c.Interval + time.Millisecond; len(log.bytes) > 0 && !conn.plain && s.plan.Network.PerByte == 0 && !s.met[simWriteWaits] {
			if why := fmt.Sprint(log.lostWhy); conn.unwritable || strings.Contains(why, "connection lost") || strings.Contains(why, errTorn.Error()) {
				slack += lastWordsTimeout // it could not write any more, and listened to what was still to come
			}
			end := min(log.lost, r.ended, conn.closedAt)
			for _, line := range log.sent {
				if line.verb != "ERROR" {
					continue
				}
				end = min(end, line.at)
				if strings.Contains(line.text, "nothing heard for") && log.lost > line.at {
					r.fail("heartbeat: %s was given up at %v, and held its tasks until %v", conn.name, line.at, log.lost)
				}
			}
			before := log.bytes[0]
			for _, at := range append(slices.Clone(log.bytes), end) {
				if at > end {
					at = end
				}
				if at-before > slack {
					r.fail("heartbeat: nothing was heard over %s from %v until %v, and the limit is %v", conn.name, before, at, c.Silence)
				}
				if at == log.lost && at > before && at-before < c.Silence && strings.Contains(fmt.Sprint(log.lostWhy), "nothing heard for") {
					r.fail("heartbeat: %s was given up at %v, though it was heard at %v and the limit is %v", conn.name, at, before, c.Silence)
				}
				before = at
			}
		}
		// The first redial comes after the last words, which take a second at most, in
		// one of the first slots of the backoff.
		if strings.HasSuffix(conn.name, "#0") && log.lost < stopped-3*time.Second && c.WorkerWait > 3*time.Second && !c.Shutdown &&
			s.network.dials[simDial{r.number, conn.addr}] < 2 {
			r.fail("%s was lost at %v, and never dialed again until %v", conn.name, log.lost, stopped)
		}
		slots := conn.process.life.plan.Slots
		limit := max(c.Window, slots)
		if c.AtMostOnce {
			limit = slots
		}
		for _, line := range log.sent {
			if line.at > r.ended {
				r.fail("I8: %s was sent over %s at %v, when the run was over", line.verb, conn.name, line.at)
			}
			if line.verb == "SHUTDOWN" {
				told[conn.addr] = line.at
			}
			if line.verb != "RUN" {
				continue
			}
			// How much was out then, this one included.
			out, cost, suspects := 0, 0, 0
			for _, of := range attempts {
				for i, a := range of {
					if a.conn != conn || a.sent > line.at || a.report != nil && a.report.at <= line.at || a.sent == line.at && a.taken > line.at {
						continue
					}
					out++
					cost += a.cost
					for _, before := range of[:i] {
						if how, _, sure := before.fate(); how == "lost" && sure {
							suspects++
							break
						}
					}
				}
			}
			if out > limit {
				r.fail("window: %d tasks were out over %s at %v, with %d slots and a window of %d, at most once %v", out, conn.name, line.at, slots, c.Window, c.AtMostOnce)
			}
			s.met[simFullOfBytes] = s.met[simFullOfBytes] || out > 1 && cost > windowBytes/2
			if out > 1 && cost > windowBytes {
				r.fail("I10: %d tasks with %d bytes were out over %s at %v, and a window is of %d", out, cost, conn.name, line.at, windowBytes)
			}
			if suspects > 0 && out > slots {
				r.fail("suspects: %d tasks were out over %s at %v, with %d slots, and %d of them had been lost", out, conn.name, line.at, slots, suspects)
			}
		}
	}

	// The lease: a handler that obeys its ctx does not go on for longer than
	// that after its session is over, and has stopped before the coordinator
	// gives a worker up that is silent. While a line longer than a chunk is on its
	// way, the lease does not end.
	for _, of := range attempts {
		for _, a := range of {
			e := a.execution
			if e == nil || !e.obeys || a.conn.plain {
				continue
			}
			lost := min(a.conn.log.lost, r.ended)
			most := lost + c.Silence/10*8 + time.Millisecond
			if a.conn.log.lost <= r.ended && strings.Contains(fmt.Sprint(a.conn.log.lostWhy), "nothing heard for") {
				most = lost
			}
			if e.until > most && !a.conn.log.long() {
				r.fail("lease: attempt %d of task %d was executed from %v until %v (%s), though %s was over at %v (%v) and the lease is 0.8 of %v",
					a.attempt, a.task, e.from, e.until, e.verdict, a.conn.name, lost, a.conn.log.lostWhy, c.Silence)
			}
		}
	}
}

// checkStops checks what is said and done when a run is stopped, and when a worker
// drains: what has not started is taken back, and when the run is canceled, so are
// the handlers. failed is when the first task was not Done, and closed whether the
// coordinator was.
func (r *simRun) checkStops(attempts [][]*simAttempt, failed time.Duration, closed bool) {
	s, c := r.sim, r.coordinator
	stops := make(map[string]time.Duration) // by what is said
	if at := min(r.plan.CancelAt, r.left); at < r.ended {
		stops["CANCEL"] = at
	}
	soft := simNever
	if c.OnFailure == StopSoon {
		soft = failed
	}
	if closed {
		soft = min(soft, c.ShutdownAt)
	}
	if at, canceled := stops["CANCEL"]; soft < r.ended && !(canceled && at <= soft) {
		stops["RECALL"] = soft
	}
	for _, of := range attempts {
		for _, a := range of {
			if a.conn == nil {
				continue
			}
			log := &a.conn.log
			for verb, at := range stops {
				out := a.sent < at && (a.report == nil || a.report.at > at) && min(log.lost, log.farewell) > at
				told := slices.ContainsFunc(log.sent, func(line simLine) bool {
					return line.verb == verb && line.at >= at && (verb == "CANCEL" || line.task == a.task)
				})
				// A connection on which nothing can be said is lost a little later.
				if out && !told && log.lost > at+lastWordsTimeout+time.Second && !s.met[simWriteWaits] {
					r.fail("%s: attempt %d of task %d was out over %s at %v, and its worker was not told", verb, a.attempt, a.task, a.conn.name, at)
				}
			}
			e := a.execution
			if e == nil {
				continue
			}
			for _, line := range log.got {
				if line.verb == "CANCEL" && (e.from > line.at || e.obeys && e.until > line.at) {
					r.fail("CANCEL: attempt %d of task %d was canceled at %v, and its execution is %+v", a.attempt, a.task, line.at, e)
				}
			}
			for _, line := range log.said {
				if line.verb == "DRAIN" && e.from > line.at {
					r.fail("attempt %d of task %d was started at %v, though its worker had said DRAIN at %v", a.attempt, a.task, e.from, line.at)
				}
			}
		}
	}
}

// checkDismissals checks that with WithWorkerShutdown, and only with it, each
// worker is told to shut down, not before its last task has been sent, and that a
// goodbye that is missing is an error.
func (r *simRun) checkDismissals(halted bool) {
	goodbyes := make(map[*simLife]bool)
	for _, conn := range r.sim.network.conns {
		if conn.run != r.number || len(conn.log.bytes) == 0 {
			continue
		}
		life := conn.process.life
		goodbyes[life] = goodbyes[life] || conn.log.farewell != simNever
		for _, line := range conn.log.sent {
			if line.verb != "SHUTDOWN" {
				continue
			}
			if !r.coordinator.Shutdown {
				r.fail("SHUTDOWN was sent over %s", conn.name)
			}
			for at, taken := range r.taken {
				category := r.plan.Tasks[at[0]].Category
				if taken > line.at && r.reached(life, category, line.at) == conn.process {
					r.fail("WithWorkerShutdown: SHUTDOWN was sent over %s at %v, and task %d, which that worker might have executed, at %v", conn.name, line.at, at[0], taken)
				}
			}
		}
	}
	if why := fmt.Sprint(r.err); !r.coordinator.Shutdown || halted || strings.Contains(why, "goodbye") || strings.Contains(why, "not told to shut down") {
		return
	}
	for life, said := range goodbyes {
		if !said {
			r.fail("WithWorkerShutdown: worker %s has not said goodbye, and the error is %v", life.plan.Name, r.err)
		}
	}
}

// reached is the process that the run knew at a time as that of a worker for a
// category; nil if there was none yet. After a restart it may not be the one that it
// knows for another category, which may have another address.
func (r *simRun) reached(life *simLife, category string, at time.Duration) (process *simProcess) {
	for _, conn := range r.sim.network.conns {
		if conn.run == r.number && conn.process.life == life && conn.log.category == category && len(conn.log.bytes) > 0 && conn.log.bytes[0] <= at {
			process = conn.process
		}
	}
	return process
}

// long says whether a line longer than a chunk was written, by either side.
func (l *simConnLog) long() bool {
	return slices.ContainsFunc(slices.Concat(l.sent, l.said), func(line simLine) bool { return len(line.text) > chunkBytes })
}

// checkReturns checks that tasks come back because they were asked back, or the
// session takes no more; and that none is asked back on and on.
func (r *simRun) checkReturns(attempts [][]*simAttempt, stopped time.Duration) {
	s := r.sim
	if unusable := (*WorkerError)(nil); errors.As(r.err, &unusable) && r.plan.Stream {
		return // it was stopped when a category's workers could not be had, and nothing says when that was
	}
	for _, conn := range s.network.conns {
		if conn.run != r.number {
			continue
		}
		log := &conn.log
		// Once it is shutting down, or the run is, a session is asked for all
		// that it holds; and so is one whose slots are stuck.
		all := stopped
		for _, line := range log.heard {
			if line.verb == "DRAIN" || line.kind == KindStuck {
				all = min(all, line.at)
			}
		}
		recalled := make(map[int][]time.Duration)
		for _, line := range log.sent {
			if line.verb == "CANCEL" {
				all = min(all, line.at)
			}
			if line.verb != "RECALL" {
				continue
			}
			recalled[line.task] = append(recalled[line.task], line.at)
			if r.coordinator.AtMostOnce && line.at < all {
				r.fail("at most once: task %d was asked back over %s at %v, though no more is in flight than is executed", line.task, conn.name, line.at)
			}
		}
		for task, times := range recalled {
			sent := 0
			for _, a := range attempts[task] {
				if a.conn != conn {
					continue
				}
				sent++
				asked := slices.ContainsFunc(times, func(at time.Duration) bool { return at >= a.sent && at < all })
				if returned := a.report != nil && a.report.verb == "RETURN" && a.report.at < all; asked && returned {
					s.met[simTakenBack] = true
				}
				if asked && a.execution != nil {
					s.met[simAskedLate] = true
				}
			}
			early := slices.IndexFunc(append(times, simNever), func(at time.Duration) bool { return at >= all })
			if sent == 0 || early > sent {
				r.fail("task %d was sent %d times over %s, and asked back at %v", task, sent, conn.name, times)
			}
		}
		for _, line := range log.heard {
			if line.verb != "RETURN" || line.at >= all {
				continue
			}
			if times := recalled[line.task]; len(times) == 0 || times[0] > line.at {
				r.fail("task %d came back over %s at %v, and was asked back at %v", line.task, conn.name, line.at, times)
			}
		}
	}
	for task, of := range attempts {
		returned := 0
		for _, a := range of {
			if a.report != nil && a.report.verb == "RETURN" && a.report.at < stopped {
				returned++
			}
		}
		if returned > maxReturns && !s.met[simDrained] && !s.met[simStuck] {
			r.fail("task %d came back %d times", task, returned)
		}
	}
}

// checkStarts checks I3: a category with a single worker of one slot starts its
// tasks in order, but for those that were sent again.
func (r *simRun) checkStarts(attempts [][]*simAttempt, results map[int]Result) {
	workers := make(map[string][]*simWorkerPlan)
	for i := range r.sim.plan.Workers {
		w := &r.sim.plan.Workers[i]
		for _, category := range w.Categories {
			workers[category] = append(workers[category], w)
		}
	}
	last := make(map[string]int)
	for _, e := range r.executions {
		category := r.plan.Tasks[e.task].Category
		if w := workers[category]; len(w) > 1 || w[0].Slots > 1 || results[e.task].Attempts != 1 {
			continue
		}
		if before, ok := last[category]; ok && e.task < before {
			r.fail("I3: task %d was started after task %d", e.task, before)
		}
		last[category] = e.task
	}
}
