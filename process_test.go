//go:build unix

package taskexec

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Real processes, real connections and real time: what the simulation takes for
// granted about them is tried out here.

var processTrials = flag.Int("process.trials", 8, "how many workers the tests with real processes kill while they execute a task")

const (
	recordEnv = "TASKEXEC_TEST_RECORD" // the file that executions are recorded in
	nameEnv   = "TASKEXEC_TEST_NAME"
	slotsEnv  = "TASKEXEC_TEST_SLOTS"
	hangEnv   = "TASKEXEC_TEST_HANG" // set: handlers run until their ctx ends
)

func init() {
	parts["recorder"] = func() {
		serveUntilStdinCloses(func(ctx context.Context, ln net.Listener) { serveRecorder(ctx, ln) })
	}
}

// serveRecorder serves as a worker that records each execution when it begins
// and when it ends. Its instructions end with how long they take, in
// microseconds.
func serveRecorder(ctx context.Context, ln net.Listener, options ...WorkerOption) {
	record, err := os.OpenFile(os.Getenv(recordEnv), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	slots, err := strconv.Atoi(os.Getenv(slotsEnv))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	name, hang := os.Getenv(nameEnv), os.Getenv(hangEnv) != ""
	handler := func(ctx context.Context, task Task) (string, error) {
		info, _ := TaskInfoFrom(ctx)
		note := func(what string) {
			// One write a line: with O_APPEND the file has them whole, and in
			// the order in which they came from whatever process.
			fmt.Fprintf(record, "%s %d %d %s %s %d\n", info.Run, info.Task, info.Attempt, what, name, time.Now().UnixMicro())
		}
		note("began")
		us, _ := strconv.Atoi(task.Instruction[strings.LastIndexByte(task.Instruction, ' ')+1:])
		if hang {
			us = int(30 * time.Minute / time.Microsecond) // fits an int of 32 bits
		}
		if !sleep(ctx, time.Duration(us)*time.Microsecond) {
			note("cut")
			return "", context.Cause(ctx)
		}
		note("ended")
		return name, nil
	}
	NewWorker(HandlerFunc(handler), append(options, WithName(name), WithSlots(slots))...).Serve(ctx, ln)
}

// A fleet is workers in processes of their own that record in one file what
// they execute. Each keeps its port when it is started again.
type fleet struct {
	t       *testing.T
	record  string
	slots   int
	workers []*osProcess
	options []CoordinatorOption // of every trial
	runs    map[string][]Result // of the trials, by run
}

func newFleet(t *testing.T, workers, slots int) *fleet {
	t.Helper()
	f := &fleet{t: t, record: filepath.Join(t.TempDir(), "executions"), slots: slots, runs: make(map[string][]Result)}
	if err := os.WriteFile(f.record, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.workers = make([]*osProcess, workers)
	for i := range workers {
		f.start(i)
	}
	return f
}

// start starts a worker for the first time, or again. Then the old one has been
// killed.
func (f *fleet) start(i int) {
	f.t.Helper()
	addr := ""
	if f.workers[i] != nil {
		f.workers[i].kill()
		addr = f.workers[i].addr
	}
	f.workers[i] = startProcess(f.t, "recorder", append(f.env(i), addrEnv+"="+addr)...)
}

func (f *fleet) env(i int) []string {
	return []string{recordEnv + "=" + f.record, slotsEnv + "=" + strconv.Itoa(f.slots), nameEnv + "=w" + strconv.Itoa(i)}
}

func (f *fleet) addrs() []string {
	var addrs []string
	for _, w := range f.workers {
		addrs = append(addrs, w.addr)
	}
	return addrs
}

// An execution is a line of the record.
type execution struct {
	run           string
	task, attempt int
	what, worker  string
	at            int64 // microseconds by the machine's clock, which all processes share
}

func (f *fleet) executions() []execution {
	f.t.Helper()
	text, err := os.ReadFile(f.record)
	if err != nil {
		f.t.Fatal(err)
	}
	var all []execution
	for line := range strings.Lines(string(text)) {
		var e execution
		if _, err := fmt.Sscan(line, &e.run, &e.task, &e.attempt, &e.what, &e.worker, &e.at); err != nil {
			f.t.Fatalf("the record has a line %q: %v", line, err)
		}
		all = append(all, e)
	}
	return all
}

// check holds the record against the results of all trials. The workers are
// gone by then: what a cut-off attempt still does is recorded too.
func (f *fleet) check() {
	f.t.Helper()
	for _, w := range f.workers {
		w.kill()
	}
	type attempt struct {
		run           string
		task, attempt int
	}
	began := make(map[attempt]int)
	ended := make(map[attempt]int) // to the line in the record
	firstOfB := make(map[string]int)
	repeated := 0
	for line, e := range f.executions() {
		results, ok := f.runs[e.run]
		if !ok || e.task >= len(results) {
			f.t.Errorf("the record has task %d of run %s, which was none", e.task, e.run)
			continue
		}
		key := attempt{e.run, e.task, e.attempt}
		switch e.what {
		case "ended":
			ended[key] = line
		case "began":
			if began[key]++; began[key] > 1 {
				f.t.Errorf("run %s: attempt %d at task %d was executed %d times", e.run, e.attempt, e.task, began[key])
			}
			if e.attempt > results[e.task].Attempts {
				f.t.Errorf("run %s: task %d was executed as attempt %d of %d", e.run, e.task, e.attempt, results[e.task].Attempts)
			}
			if e.attempt > 1 {
				repeated++
			}
			if _, ok := firstOfB[e.run]; !ok && results[e.task].Task.Category == "b" {
				firstOfB[e.run] = line
			}
		}
	}
	for run, results := range f.runs {
		for _, r := range results {
			line, ok := ended[attempt{run, r.Index, r.Attempts}]
			if !ok {
				f.t.Errorf("run %s: task %d is Done by attempt %d, which was not executed to its end", run, r.Index, r.Attempts)
			}
			if b, ok := firstOfB[run]; ok && r.Task.Category == "a" && line > b {
				f.t.Errorf("run %s: a task of category b was executed before task %d of category a was Done", run, r.Index)
			}
		}
	}
	f.t.Logf("%d runs, %d executions, of them %d of a task that had been sent before", len(f.runs), len(began), repeated)
}

// A trial is one run on a fleet, while something happens to its workers.
type trial struct {
	*fleet
	ctx context.Context // ends with the run

	mu       sync.Mutex // guards following
	run      string
	settled  map[int]int
	first    string                   // the address of the first worker that was sent a task
	sent     chan struct{}            // closed when it was
	lost     map[string]chan struct{} // by address: closed when its session was lost
	lostAt   map[string]time.Time
	lossErr  map[string]error
	resentAt time.Time // when a task was sent again for the first time after a session was lost
}

// try runs a's and then b's tasks, by Run or by Stream, and has happen act
// meanwhile. Whatever happens, each task must be Done in the end, once.
func (f *fleet) try(tasks []Task, happen func(*trial), options ...CoordinatorOption) *trial {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Minute)
	defer cancel()
	tr := &trial{fleet: f, ctx: ctx, settled: make(map[int]int),
		sent: make(chan struct{}), lost: make(map[string]chan struct{}),
		lostAt: make(map[string]time.Time), lossErr: make(map[string]error)}
	for _, addr := range f.addrs() {
		tr.lost[addr] = make(chan struct{})
	}
	c, err := NewCoordinator(append(append([]CoordinatorOption{
		WithWorkers("a", f.addrs()...), WithWorkers("b", f.addrs()...),
		WithHandshakeTimeout(2 * time.Second), WithObserver(tr.observer())}, f.options...), options...)...)
	if err != nil {
		f.t.Fatal(err)
	}
	var results []Result
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() {
		defer cancel() // what has not happened yet never will
		if rand.IntN(2) == 0 {
			var report *Report
			report, err = c.Run(ctx, tasks)
			results = report.Results
			return
		}
		for result, e := range c.Stream(ctx, slices.Values(tasks)) {
			if err = e; err == nil {
				results = append(results, result)
			}
		}
	})
	happen(tr)
	running.Wait()
	if err != nil {
		f.t.Fatalf("run %s: %v", tr.run, err)
	}
	f.runs[tr.run] = tr.check(tasks, results)
	return tr
}

// check returns the results by index.
func (tr *trial) check(tasks []Task, results []Result) []Result {
	tr.t.Helper()
	if len(results) != len(tasks) {
		tr.t.Fatalf("run %s: %d results for %d tasks", tr.run, len(results), len(tasks))
	}
	byIndex := make([]Result, len(tasks))
	for _, r := range results {
		if byIndex[r.Index].Outcome != 0 {
			tr.t.Errorf("run %s: task %d has two results", tr.run, r.Index)
		}
		byIndex[r.Index] = r
	}
	for i, r := range byIndex {
		if r.Outcome != Done || r.Output != r.Worker || tr.settled[i] != 1 {
			tr.t.Errorf("run %s: task %d is %v by %q with %q, and was settled %d times; want it Done, once", tr.run, i, r.Outcome, r.Worker, r.Output, tr.settled[i])
		}
	}
	return byIndex
}

func (tr *trial) observer() Observer {
	return Observer{
		GroupStarted: func(i GroupStartedInfo) { tr.run = i.Run },
		TaskSent: func(i TaskSentInfo) {
			tr.mu.Lock()
			defer tr.mu.Unlock()
			if tr.first == "" {
				tr.first = i.Addr
				close(tr.sent)
			}
			if i.Attempt > 1 && len(tr.lostAt) > 0 && tr.resentAt.IsZero() { // before that it was asked back
				tr.resentAt = time.Now()
			}
		},
		SessionLost: func(i SessionLostInfo) {
			tr.mu.Lock()
			defer tr.mu.Unlock()
			if _, again := tr.lostAt[i.Addr]; !again {
				tr.lostAt[i.Addr], tr.lossErr[i.Addr] = time.Now(), i.Err
			}
			closeOnce(tr.lost[i.Addr])
		},
		TaskDone: func(i TaskDoneInfo) {
			tr.mu.Lock()
			defer tr.mu.Unlock()
			tr.settled[i.Result.Index]++
		},
	}
}

// closeOnce closes c unless it is closed. Its callers take turns.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// during waits until a worker has been sent tasks, and a random time up to most
// more. It returns which one; false if the run is over.
func (tr *trial) during(most time.Duration) (worker int, ok bool) {
	select {
	case <-tr.sent:
		return slices.Index(tr.addrs(), tr.first), sleep(tr.ctx, rand.N(most))
	case <-tr.ctx.Done():
		return 0, false
	}
}

// loss waits until the session with a worker is lost.
func (tr *trial) loss(worker int) bool {
	tr.mu.Lock()
	lost := tr.lost[tr.workers[worker].addr]
	tr.mu.Unlock()
	select {
	case <-lost:
		return true
	case <-tr.ctx.Done():
		return false
	}
}

// someTasks makes tasks of categories a and b, in no order. Each takes between
// half of most and most.
func someTasks(a, b int, most time.Duration) []Task {
	var tasks []Task
	for i := range a + b {
		category := "a"
		if i >= a {
			category = "b"
		}
		tasks = append(tasks, Task{Category: category, Instruction: fmt.Sprintf("%s%d %d", category, i, (most/2 + rand.N(most/2)).Microseconds())})
	}
	rand.Shuffle(len(tasks), func(i, j int) { tasks[i], tasks[j] = tasks[j], tasks[i] })
	return tasks
}

// Whenever a worker is killed, the other one executes what it held, and nothing
// is lost or recorded twice.
func TestProcessKilledAndItsTasksGoToAnother(t *testing.T) {
	tests := []struct {
		why   string
		slots int
	}{
		// Nothing but the library takes time between the loss and the next
		// sending.
		{"the other has slots to spare", 32},
		// What it holds comes first, for a task that was lost is not sent
		// where it would wait behind others.
		{"the other is busy", 2},
	}
	for _, test := range tests {
		t.Run(test.why, func(t *testing.T) {
			f := newFleet(t, 2, test.slots)
			var sinceLoss, sinceKill []time.Duration
			trials := max(1, *processTrials/4)
			for range trials {
				victim, killed := -1, time.Time{}
				tr := f.try(someTasks(16, 8, 10*time.Millisecond), func(tr *trial) {
					if worker, ok := tr.during(10 * time.Millisecond); ok {
						victim, killed = worker, time.Now()
						f.workers[victim].kill()
					}
				})
				if victim >= 0 {
					f.start(victim)
				}
				if !tr.resentAt.IsZero() { // else it had nothing left to do
					sinceLoss = append(sinceLoss, tr.resentAt.Sub(tr.lostAt[f.workers[victim].addr]))
					sinceKill = append(sinceKill, tr.resentAt.Sub(killed))
				}
			}
			f.check()
			if len(sinceLoss) < trials/2 {
				t.Errorf("%d of %d workers were killed too late to leave anything unfinished, so that this has shown little", trials-len(sinceLoss), trials)
			}
			t.Logf("from the loss of a session to sending its tasks again: %s; from the kill: %s", spread(sinceLoss), spread(sinceKill))
		})
	}
}

// spread sums up durations.
func spread(all []time.Duration) string {
	if len(all) == 0 {
		return "none"
	}
	slices.Sort(all)
	return fmt.Sprintf("median %v, p99 %v of %d", all[len(all)/2], all[len(all)*99/100], len(all))
}

// A worker that is killed and started again on its port, the only one, is given
// what it held.
func TestProcessKilledAndRestartedOnItsPortGoesOn(t *testing.T) {
	f := newFleet(t, 1, 2)
	losses := 0
	for range max(1, *processTrials/2) {
		tr := f.try(someTasks(24, 8, 3*time.Millisecond), func(tr *trial) {
			if _, ok := tr.during(20 * time.Millisecond); ok {
				f.start(0)
			}
		})
		if !tr.resentAt.IsZero() {
			losses++
		}
	}
	f.check()
	t.Logf("%d of the workers had unfinished tasks when they were killed", losses)
}

// When all workers of a category are killed, its tasks wait for the one that
// comes back.
func TestProcessesAllKilledAndOneBroughtBackGoesOn(t *testing.T) {
	f := newFleet(t, 3, 2)
	for range max(1, *processTrials/10) {
		back := rand.IntN(3)
		f.try(someTasks(40, 8, 10*time.Millisecond), func(tr *trial) {
			if _, ok := tr.during(20 * time.Millisecond); !ok {
				return
			}
			for _, w := range f.workers {
				w.kill()
			}
			f.start(back)
		})
		for i := range f.workers {
			if i != back {
				f.start(i)
			}
		}
	}
	f.check()
}

// A worker that is stopped for longer than the heartbeat allows is taken for
// dead, though its connection stands. What it does when it goes on counts for
// nothing, and the next run can use it.
func TestProcessStoppedIsTakenForDeadAndComesBack(t *testing.T) {
	const timeout = 300 * time.Millisecond
	f := newFleet(t, 2, 2)
	var found []time.Duration
	for range max(1, *processTrials/20) {
		var addr string
		var stopped time.Time
		tr := f.try(someTasks(40, 8, 10*time.Millisecond), func(tr *trial) {
			victim, ok := tr.during(20 * time.Millisecond)
			if !ok {
				return
			}
			addr, stopped = f.workers[victim].addr, time.Now()
			f.signal(victim, syscall.SIGSTOP)
			tr.loss(victim)
			f.signal(victim, syscall.SIGCONT)
		}, WithHeartbeat(timeout/3, timeout))
		var fault *ProtocolError
		if err := tr.lossErr[addr]; !errors.As(err, &fault) || fault.Code != codeTimeout {
			t.Errorf("the session with a stopped worker ended with %v, want a timeout", err)
			continue
		}
		// It may have been heard for the last time a moment before.
		took := tr.lostAt[addr].Sub(stopped)
		if took < timeout/2 || took > 2*timeout+500*time.Millisecond {
			t.Errorf("a worker was taken for dead %v after it was stopped, with a timeout of %v", took, timeout)
		}
		found = append(found, took)
	}
	f.check()
	t.Logf("from the stop of a worker to the end of its session, with a timeout of %v: %s", timeout, spread(found))
}

// A worker that is stopped for less than the heartbeat allows loses nothing.
func TestProcessStoppedForAMomentLosesNothing(t *testing.T) {
	f := newFleet(t, 2, 2)
	for range max(1, *processTrials/20) {
		tr := f.try(someTasks(40, 8, 10*time.Millisecond), func(tr *trial) {
			victim, ok := tr.during(20 * time.Millisecond)
			if !ok {
				return
			}
			f.signal(victim, syscall.SIGSTOP)
			sleep(tr.ctx, 100*time.Millisecond+rand.N(100*time.Millisecond))
			f.signal(victim, syscall.SIGCONT)
		}, WithHeartbeat(100*time.Millisecond, 5*time.Second))
		if len(tr.lossErr) > 0 {
			t.Errorf("sessions were lost: %v", tr.lossErr)
		}
	}
	f.check()
}

func (f *fleet) signal(worker int, s syscall.Signal) {
	f.t.Helper()
	if err := f.workers[worker].cmd.Process.Signal(s); err != nil {
		f.t.Errorf("signal %v: %v", s, err)
	}
}

// What the comment of Handler says of commands: "signal: killed" alone does not
// tell why.
func TestAKilledCommandIsWhatItsHandlerSays(t *testing.T) {
	for _, tt := range []struct {
		reason   string
		says     func(ctx context.Context, err error) error
		timeout  time.Duration // of the task; or the run is canceled
		outcome  Outcome
		kind     string
		contains string
	}{
		{"its context's cause, after its time", func(ctx context.Context, _ error) error { return context.Cause(ctx) }, 100 * time.Millisecond, Failed, KindTimeout, ""},
		{"its context's cause, after a cancel", func(ctx context.Context, _ error) error { return context.Cause(ctx) }, 0, Canceled, KindCanceled, ""},
		{"the command's own error", func(_ context.Context, err error) error { return err }, 0, Failed, KindError, "signal: killed"},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			h := HandlerFunc(func(ctx context.Context, _ Task) (string, error) {
				cmd := exec.CommandContext(ctx, os.Args[0])
				cmd.Env = append(os.Environ(), partEnv+"=echo") // which goes on until its stdin ends
				stdin, err := cmd.StdinPipe()
				if err != nil {
					return "", err
				}
				defer stdin.Close()
				if err := cmd.Start(); err != nil {
					return "", err // which is the context's if its time is over already
				}
				if tt.timeout == 0 {
					cancel()
				}
				if err := cmd.Wait(); ctx.Err() == nil {
					return "", fmt.Errorf("it ended before its context: %v", err)
				} else {
					return "", tt.says(ctx, err)
				}
			})
			report, _ := newTestCoordinator(t, serveMem(t, h, "a")...).Run(ctx, []Task{{Instruction: "a", Timeout: tt.timeout}})
			remote, ok := errors.AsType[*RemoteError](report.Results[0].Err)
			if !ok || report.Results[0].Outcome != tt.outcome || remote.Kind != tt.kind || !strings.Contains(remote.Text, tt.contains) {
				t.Errorf("got %+v", report.Results[0])
			}
		})
	}
}
