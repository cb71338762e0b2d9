package taskexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A logRecorder keeps what is logged as it is, without what a handler may do to
// texts.
type logRecorder struct {
	level slog.Level
	attrs []slog.Attr // of With
	*logRecords
}

type logRecords struct {
	mu      sync.Mutex // guards following
	records []logRecord
	block   chan struct{} // if not nil, calls wait until it is closed
}

type logRecord struct {
	level slog.Level
	text  string
	attrs []slog.Attr
}

func newLogRecorder(level slog.Level) *logRecorder {
	return &logRecorder{level: level, logRecords: new(logRecords)}
}

func (r *logRecorder) Enabled(_ context.Context, level slog.Level) bool { return level >= r.level }

func (r *logRecorder) Handle(_ context.Context, record slog.Record) error {
	attrs := slices.Clone(r.attrs)
	record.Attrs(func(a slog.Attr) bool {
		attrs = append(attrs, a)
		return true
	})
	r.mu.Lock()
	r.records = append(r.records, logRecord{record.Level, record.Message, attrs})
	block := r.block
	r.mu.Unlock()
	if block != nil {
		<-block
	}
	return nil
}

func (r *logRecorder) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &logRecorder{r.level, append(slices.Clone(r.attrs), attrs...), r.logRecords}
}

func (r *logRecorder) WithGroup(string) slog.Handler { panic("no group is expected") }

// all is what was logged so far.
func (r *logRecorder) all() []logRecord {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.records)
}

// lines are the records with the attributes of these keys.
func (r *logRecorder) lines(keys ...string) []string {
	var lines []string
	for _, record := range r.all() {
		line := record.level.String() + " " + record.text
		for _, key := range keys {
			for _, a := range record.attrs {
				if a.Key == key {
					line += fmt.Sprintf(" %s=%v", key, a.Value)
				}
			}
		}
		lines = append(lines, line)
	}
	return lines
}

// expectLines compares with what lines gives, in any order: what the two sides
// and several sessions log has none.
func (r *logRecorder) expectLines(t *testing.T, keys []string, want ...string) {
	t.Helper()
	got := r.lines(keys...)
	slices.Sort(got)
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("logged (-want +got):\n%s", d)
	}
}

func TestLifeCycleIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := new(memNetwork)
		mine, theirs := newLogRecorder(slog.LevelInfo), newLogRecorder(slog.LevelInfo)
		w := NewWorker(parrot, WithName("w"), WithSlots(3), WithLogger(slog.New(theirs)))
		served := make(chan error, 1)
		ln := network.listen("a:1")
		go func() { served <- w.Serve(t.Context(), ln) }()
		c, err := NewCoordinator(WithWorkers("a", "a:1"), WithDialer(network.dial), WithWorkerShutdown(), WithLogger(slog.New(mine)))
		if err != nil {
			t.Fatal(err)
		}
		report, err := c.Run(t.Context(), tasksOf("a", 100))
		if err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		keys := []string{keyRun, keyWorker, keyAddr, keyCategory, keyCoordinator, keySlots, keyText, keyTasks}
		mine.expectLines(t, keys,
			"INFO run started run="+report.Run,
			"INFO session opened run="+report.Run+" worker=w addr=a:1 category=a slots=3",
			"INFO worker shut down run="+report.Run+" worker=w addr=a:1 text=Goodbye from w",
			"INFO session closed run="+report.Run+" worker=w addr=a:1 category=a",
			"INFO run ended run="+report.Run+" tasks=[done=100 failed=0 canceled=0 skipped=0 unknown=0]")
		theirs.expectLines(t, keys,
			"INFO worker serving worker=w addr=a:1 slots=3",
			"INFO session opened run="+report.Run+" worker=w addr=pipe category=a",
			"INFO worker draining worker=w",
			"INFO session closed run="+report.Run+" worker=w addr=pipe category=a",
			"INFO worker stopped worker=w")
	})
}

func TestTasksAreLoggedAtDebug(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		mine, theirs := newLogRecorder(slog.LevelDebug), newLogRecorder(slog.LevelDebug)
		cl.worker("a:1", func(_ context.Context, task Task) (string, error) {
			time.Sleep(time.Second)
			if task.Instruction == "a1" {
				return "", errors.New("out of paper")
			}
			return "", nil
		}, WithLogger(slog.New(theirs)))
		var order []string // an observer is called beside the logger
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWindow(1), WithRetry(Retry{Attempts: 2}), WithLogger(slog.New(mine)), WithObserver(Observer{
			TaskDone: func(i TaskDoneInfo) { order = append(order, i.Result.Task.Instruction) },
		}))
		if _, err := c.Run(t.Context(), tasksOf("a", 2)); err == nil {
			t.Error("the run succeeded")
		}
		debug := func(lines []string) []string {
			return slices.DeleteFunc(lines, func(line string) bool { return !strings.HasPrefix(line, "DEBUG task") })
		}
		keys := []string{keyTask, keyAttempt, keyInstruction, keyOutcome, keyKind, keyElapsed, keyError}
		if d := cmp.Diff([]string{
			"DEBUG task sent task=0 attempt=1 instruction=a0", "DEBUG task settled task=0 attempt=1 outcome=Done",
			"DEBUG task sent task=1 attempt=1 instruction=a1",
			"DEBUG task failed, and is tried again task=1 attempt=1 error=out of paper",
			"DEBUG task sent task=1 attempt=2 instruction=a1",
			"DEBUG task settled task=1 attempt=2 outcome=Failed error=task 1 (a1) Failed on worker a:1, attempt 2: out of paper",
		}, debug(mine.lines(keys...))); d != "" {
			t.Errorf("the coordinator logged (-want +got):\n%s", d)
		}
		if d := cmp.Diff([]string{
			"DEBUG task started task=0 attempt=1 instruction=a0", "DEBUG task done task=0 attempt=1 elapsed=1s",
			"DEBUG task started task=1 attempt=1 instruction=a1", "DEBUG task failed task=1 attempt=1 kind=error error=out of paper",
			"DEBUG task started task=1 attempt=2 instruction=a1", "DEBUG task failed task=1 attempt=2 kind=error error=out of paper",
		}, debug(theirs.lines(keys...))); d != "" {
			t.Errorf("the worker logged (-want +got):\n%s", d)
		}
		if d := cmp.Diff([]string{"a0", "a1"}, order); d != "" {
			t.Errorf("the observer was called for (-want +got):\n%s", d)
		}
	})
}

func TestRefusalsAndLossesAreLoggedAsWarnings(t *testing.T) {
	keys := []string{keyCode, keyByPeer}
	for _, c := range []struct {
		name string
		say  []string
		want string
		opts []WorkerOption
	}{
		{"a stranger", []string{"GET / HTTP/1.1"}, "WARN connection refused code=protocol by_peer=false", nil},
		{"a fault", []string{helloA, "DONE 1 0"}, "WARN session lost code=state by_peer=false", nil},
		{"a fault of syntax", []string{helloA, "RUN 1 x SECRET"}, "WARN session lost code=syntax by_peer=false", nil},
		{"an ERROR", []string{helloA, "ERROR task no such task"}, "WARN session lost code=task by_peer=true", nil},
		{"SHUTDOWN refused", []string{helloA, "SHUTDOWN"}, "WARN session lost code=refused by_peer=false", []WorkerOption{WithRemoteShutdown(FromNobody)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := newLogRecorder(slog.LevelInfo)
				wt := startWorker(t, parrot, append(c.opts, WithLogger(slog.New(log)))...)
				p := wt.stranger()
				go p.send(c.say...)
				synctest.Wait()
				for !strings.HasPrefix(c.say[len(c.say)-1], "ERROR") {
					if line := p.next(); strings.HasPrefix(line, "ERROR") || t.Failed() {
						break
					}
				}
				p.conn.Close()
				synctest.Wait()
				warnings := slices.DeleteFunc(log.lines(keys...), func(line string) bool { return !strings.HasPrefix(line, "WARN") })
				if d := cmp.Diff([]string{c.want}, warnings); d != "" {
					t.Errorf("logged (-want +got):\n%s", d)
				}
				expectNoSecret(t, log)
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		cl := newCluster(t)
		cl.worker("a:1", func(ctx context.Context, task Task) (string, error) {
			time.Sleep(time.Second) // or it might take the other's task too
			return echo(ctx, task)
		}, WithRemoteShutdown(FromNobody))
		cl.script("a:2", func(p *peer) {
			p.welcome()
			p.expect("RUN …")
			p.send(`ERROR syntax bad escape in line "RUN 0 1 0 SECRET"`)
		})
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithWorkerShutdown(), WithLogger(slog.New(log)))
		tasks := []Task{{Category: "a", Instruction: "SECRET"}, {Category: "a", Instruction: "SECRET"}}
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		for _, want := range []string{
			"WARN session lost addr=a:2 code=syntax by_peer=true", "WARN no goodbye addr=a:1 code=refused by_peer=true",
			"WARN session lost addr=a:1 code=refused by_peer=true",
		} {
			if !slices.Contains(log.lines(keyAddr, keyCode, keyByPeer), want) {
				t.Errorf("%q was not logged, but %q", want, log.lines(keyAddr, keyCode, keyByPeer))
			}
		}
		expectNoSecret(t, log)
	})
}

// A greeting that is wrong is described, but not quoted.
func TestAWrongGreetingIsLoggedInThisSidesWords(t *testing.T) {
	for said, want := range map[string]string{
		"SECRET / HTTP/1.1": "this is a worker of taskexec/1, which expects HELLO first",
		"RUN 0 1 0 SECRET":  "this is a worker of taskexec/1, which expects HELLO first",
		"HELLO SECRET {}":   "this side speaks taskexec/1",
	} {
		synctest.Test(t, func(t *testing.T) {
			log := newLogRecorder(slog.LevelInfo)
			p := startWorker(t, parrot, WithLogger(slog.New(log))).stranger()
			p.send(said)
			p.expect("ERROR protocol …")
			p.conn.Close()
			synctest.Wait()
			log.expectLines(t, []string{keyCode, keyByPeer, keyError}, "INFO worker serving", "WARN connection refused code=protocol by_peer=false error="+want)
			expectNoSecret(t, log)
		})
	}
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		cl := newCluster(t)
		cl.script("a:1", func(p *peer) { p.send("SSH-2.0-SECRET"); io.Copy(io.Discard, p.in) })
		cl.coordinator(WithWorkers("a", "a:1"), WithLogger(slog.New(log))).Run(t.Context(), tasksOf("a", 1))
		if want := "WARN worker not reached code=protocol by_peer=false error=it does not speak taskexec/1"; !slices.Contains(log.lines(keyCode, keyByPeer, keyError), want) {
			t.Errorf("logged %q", log.lines(keyCode, keyByPeer, keyError))
		}
		expectNoSecret(t, log)
	})
}

// expectNoSecret says that no instruction is logged above Debug.
func expectNoSecret(t *testing.T, log *logRecorder) {
	t.Helper()
	for _, record := range log.all() {
		if record.level > slog.LevelDebug && strings.Contains(fmt.Sprint(record.attrs), "SECRET") {
			t.Errorf("an instruction is logged: %v", record)
		}
	}
}

// However a run ends, what it logs of that above Debug holds no instruction.
func TestNoInstructionIsLoggedAboveDebug(t *testing.T) {
	secret := []Task{{Category: "a", Instruction: "SECRET 1"}, {Category: "a", Instruction: "SECRET 2"}}
	for _, c := range []struct {
		name  string
		tasks []Task
		opts  []CoordinatorOption
		want  string // the reason
	}{
		{"a task fails", secret, nil, "not every task is Done"},
		{"stopped soon", secret, []CoordinatorOption{WithOnFailure(StopSoon)}, "not every task is Done"},
		{"no category", []Task{{Category: "\n", Instruction: "SECRET"}}, nil, "not every task is Done"},
		{"no worker listed", []Task{{Category: "z", Instruction: "SECRET"}}, nil, "no worker"},
		{"no worker there", []Task{{Category: "b", Instruction: "SECRET"}}, nil, "a worker cannot be used"},
		{"no worker in time", []Task{{Category: "b", Instruction: "SECRET"}}, []CoordinatorOption{WithDialer(
			func(ctx context.Context, _, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() })}, "a worker cannot be used"},
		{"canceled", []Task{{Category: "a", Instruction: "SECRET cancel"}}, nil, "context canceled"},
		{"no goodbye", []Task{{Category: "c", Instruction: "SECRET"}}, []CoordinatorOption{WithWorkerShutdown()}, "a worker said no goodbye"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newCluster(t)
				log := newLogRecorder(slog.LevelDebug)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				cl.worker("a:1", func(ctx context.Context, task Task) (string, error) {
					if strings.Contains(task.Instruction, "cancel") {
						cancel()
						return until(ctx, task)
					}
					return "", errors.New("no")
				}, WithLogger(slog.New(log)))
				cl.worker("c:1", echo, WithRemoteShutdown(FromNobody))
				coordinator := cl.coordinator(append(c.opts, WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithWorkers("c", "c:1"), WithLogger(slog.New(log)))...)
				report, err := coordinator.Run(ctx, c.tasks)
				checkReport(t, c.tasks, report, err)
				expectNoSecret(t, log)
				if c.name == "no worker there" && !slices.Contains(log.lines(keyAddr), "WARN worker not reached addr=b:1") {
					t.Errorf("logged %q", log.lines(keyAddr))
				}
				for _, line := range log.lines(keyError) {
					if want := "WARN run ended error=" + c.want; strings.HasPrefix(line, "WARN run ended") && line != want {
						t.Errorf("logged %q, want %q", line, want)
					}
				}
			})
		})
	}
}

func TestTheEndOfARunIsLoggedWithTheTaskThatFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		cl := newCluster(t)
		cl.worker("a:1", func(_ context.Context, task Task) (string, error) {
			if task.Instruction == "a1" {
				panic("SECRET")
			}
			return "", nil
		})
		c := cl.coordinator(WithWorkers("a", "a:1"), WithLogger(slog.New(log)))
		tasks := tasksOf("a", 3)
		c.Run(t.Context(), tasks)
		c.Run(t.Context(), append(tasks, Task{Instruction: "\nSECRET"}))
		ends := slices.DeleteFunc(log.lines(keyError, keyTask, keyOutcome, keyCategory, keyWorker, keyAttempt, keyKind), func(line string) bool { return !strings.HasPrefix(line, "WARN run ended") })
		if d := cmp.Diff([]string{
			"WARN run ended error=not every task is Done task=1 outcome=Failed category=a worker=a:1 attempt=1 kind=panic",
			"WARN run ended error=not every task is Done task=3 outcome=Failed",
		}, ends); d != "" {
			t.Errorf("logged (-want +got):\n%s", d)
		}
		expectNoSecret(t, log)
	})
}

func TestAStreamIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", echo)
		for _, leaveAfter := range []int{2, 100} {
			log := newLogRecorder(slog.LevelInfo)
			c := cl.coordinator(WithWorkers("a", "a:1"), WithOrder(ByInput), WithLogger(slog.New(log)))
			n := 0
			for range c.Stream(t.Context(), slices.Values(tasksOf("a", 4))) {
				if n++; n == leaveAfter {
					break
				}
			}
			want := "INFO run ended tasks=[done=4 failed=0 canceled=0 skipped=0 unknown=0]"
			if leaveAfter == 2 {
				want = "INFO run ended tasks=[done=2 failed=0 canceled=0 skipped=0 unknown=0] error=the consumer of the Stream left its loop"
			}
			if lines := log.lines(keyTasks, keyError); lines[0] != "INFO run started" || lines[len(lines)-1] != want {
				t.Errorf("logged %q, want the last to be %s", lines, want)
			}
		}
	})
}

func TestAStreamWhoseSequenceBreaksIsNotLoggedAsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", echo)
		log := newLogRecorder(slog.LevelInfo)
		c := cl.coordinator(WithWorkers("a", "a:1"), WithOrder(ByInput), WithLogger(slog.New(log)))
		func() {
			defer func() { recover() }()
			for range c.Stream(t.Context(), func(yield func(Task) bool) { yield(Task{Instruction: "a1"}); panic("oops") }) {
			}
		}()
		want := "WARN run ended tasks=[done=1 failed=0 canceled=0 skipped=0 unknown=0] error=the sequence of the Stream panicked or called runtime.Goexit"
		if lines := log.lines(keyTasks, keyError); lines[len(lines)-1] != want {
			t.Errorf("logged %q, want the last to be %s", lines, want)
		}
	})
}

// A logger that blocks holds up neither a session's tasks nor its heartbeats.
func TestALoggerThatBlocksHoldsUpNoSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		block := make(chan struct{})
		wt := startWorker(t, parrot, WithLogger(slog.New(log)))
		synctest.Wait() // Serve itself waits for its logger
		log.mu.Lock()
		log.block = block
		log.mu.Unlock()
		p := wt.session()
		time.Sleep(time.Hour)
		p.send("RUN 1 1 0 x", "PING 1")
		p.expectReportsInAnyOrder("DONE 1 x", "PONG 1")
		wt.expectServing()
		close(block)
	})
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		log := newLogRecorder(slog.LevelInfo)
		executed := make(chan struct{}, 1000)
		cl.worker("a:1", func(context.Context, Task) (string, error) { executed <- struct{}{}; return "", nil })
		c := cl.coordinator(WithWorkers("a", "a:1"), WithLogger(slog.New(log)), WithObserver(Observer{
			SessionOpened: func(SessionOpenedInfo) {
				log.mu.Lock()
				log.block = make(chan struct{})
				log.mu.Unlock()
			},
		}))
		ended := make(chan error, 1)
		go func() {
			_, err := c.Run(t.Context(), tasksOf("a", 1000))
			ended <- err
		}()
		for range 1000 {
			<-executed
		}
		synctest.Wait()
		if n := len(c.Snapshot()); n != 1 {
			t.Errorf("%d runs are there, want the one that waits for its logger", n)
		}
		close(log.block)
		log.mu.Lock()
		log.block = nil
		log.mu.Unlock()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestAReportDoesNotWaitForALoggerThatBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelDebug)
		block := make(chan struct{})
		wt := startWorker(t, HandlerFunc(func(context.Context, Task) (string, error) {
			log.mu.Lock()
			defer log.mu.Unlock()
			log.block = block
			return "", nil
		}), WithLogger(slog.New(log)))
		p := wt.session()
		synctest.Wait() // the writer has nothing more to look at
		p.send("RUN 1 1 0 x")
		synctest.Wait()
		if n := len(log.lines()); !strings.HasSuffix(log.lines()[n-1], "task done") {
			t.Errorf("logged %q, want the end of the task last", log.lines())
		}
		p.expectReports("DONE 1 ")
		close(block)
	})
}

// Nor has a task started that waits for a slot which waits for a logger.
func TestATaskThatWaitsForALoggerCanBeRecalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelDebug)
		block := make(chan struct{})
		p := startWorker(t, HandlerFunc(func(context.Context, Task) (string, error) {
			log.mu.Lock()
			defer log.mu.Unlock()
			log.block = block
			return "", nil
		}), WithLogger(slog.New(log))).session()
		p.send(runs(1, 2)...)
		p.expectReports("DONE 1 ")
		synctest.Wait()
		p.send("RECALL 2")
		p.expect("RETURN 2")
		close(block)
	})
}

func TestTheTimeOfALoggerIsNotTheTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelDebug)
		wt := startWorker(t, parrot, WithLogger(slog.New(log)))
		p := wt.session()
		synctest.Wait()
		block := make(chan struct{})
		log.mu.Lock()
		log.block = block
		log.mu.Unlock()
		time.AfterFunc(time.Second, func() { close(block) })
		p.send("RUN 1 1 0 x", "RUN 2 1 0 y")
		p.expect("DONE 1 0 x", "DONE 2 0 y")
	})
}

func TestASessionEndsWhenItsOpeningIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		block := make(chan struct{})
		log.block = block
		client, server := net.Pipe()
		returned := make(chan error, 1)
		go func() { returned <- NewWorker(parrot, WithLogger(slog.New(log))).ServeConn(t.Context(), server) }()
		p := newPeer(t, client)
		p.send(helloA)
		p.expect("WELCOME …")
		synctest.Wait()
		log.mu.Lock()
		log.block = nil // for what follows
		log.mu.Unlock()
		p.conn.Close()
		synctest.Wait()
		select {
		case err := <-returned:
			t.Errorf("ServeConn returned %v while its logger was called", err)
			returned <- err
		default:
		}
		close(block)
		if err := <-returned; err != nil {
			t.Error(err)
		}
		log.expectLines(t, nil, "INFO session opened", "INFO session closed")
	})
}

func TestTheVerifiedNameOfACoordinatorIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		forWorker, forCoordinator := bothConfigs(t)
		cl := newCluster(t)
		cl.worker("a:1", echo, WithTLS(forWorker), WithLogger(slog.New(log)))
		if _, err := cl.coordinator(WithWorkers("a", "a:1"), WithTLS(forCoordinator)).Run(t.Context(), tasksOf("a", 1)); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if want := "INFO session opened coordinator=coordinator.test"; !slices.Contains(log.lines(keyCoordinator), want) {
			t.Errorf("logged %q", log.lines(keyCoordinator))
		}
	})
}

func TestNothingIsAllocatedForTasksThatAreNotLogged(t *testing.T) {
	silent := NewWorker(parrot)
	quiet := NewWorker(parrot, WithLogger(slog.New(newLogRecorder(slog.LevelInfo))))
	conn, other := net.Pipe()
	defer conn.Close()
	defer other.Close()
	r := &Result{Task: Task{"a", "a1", 0}, Outcome: Done}
	for name, worker := range map[string]*Worker{"silent": silent, "at Info": quiet} {
		s := &workerSession{worker: worker, log: worker.newSessionLog(conn), ctx: t.Context()}
		s.wire = newWire(conn, s)
		s.hello.MaxLine = defaultMaxLine
		l := s.newSlot()
		if n := testing.AllocsPerRun(100, func() {
			s.out = s.out[:0]
			s.waiting.push(job{number: 1, attempt: 1, instruction: "a1"})
			l.begin()
			l.execute(0)
		}); n > 1 {
			t.Errorf("%s, a worker allocates %v times a task, beside its context", name, n-1)
		}
		if string(s.out) == "" {
			t.Errorf("%s, no task was executed", name)
		}
	}
	for name, observer := range map[string]*Observer{"silent": joined(nil, logObserver(nil)), "at Info": joined(nil, logObserver(quiet.config.logger))} {
		events := newEvents(observer)
		if n := testing.AllocsPerRun(100, func() {
			events.taskSent("r", r, "a:1")
			events.taskDone("r", r, 0)
		}); n != 0 {
			t.Errorf("%s, a coordinator allocates %v times a task", name, n)
		}
		events.close()
	}
}

func TestAStuckHandlerIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		g := newGate()
		wt := startWorker(t, deaf(g), WithLogger(slog.New(log)))
		p := wt.session()
		p.send("RUN 7 2 1000 SECRET")
		p.expectReports("FAIL 7 stuck …")
		synctest.Wait()
		if want := "WARN handler stuck after its task's timeout task=7 attempt=2"; !slices.Contains(log.lines(keyTask, keyAttempt), want) {
			t.Errorf("logged %q", log.lines(keyTask, keyAttempt))
		}
		close(g.release)
		synctest.Wait()
		if want := "INFO stuck handler returned task=7 attempt=2"; !slices.Contains(log.lines(keyTask, keyAttempt), want) {
			t.Errorf("logged %q", log.lines(keyTask, keyAttempt))
		}
		expectNoSecret(t, log)
	})
}

// What a worker logs of a task is what it reports, or it says that it does not.
func TestAWorkerLogsWhatItReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelDebug)
		release := make(chan struct{})
		wt := startWorker(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			switch task.Instruction {
			case "long":
				return strings.Repeat("x", defaultMaxLine), nil
			case "exit":
				runtime.Goexit()
			case "deaf":
				<-release
				return "", nil
			case "too late":
				until(ctx, task)
				return "", nil
			}
			return until(ctx, task)
		}), WithLogger(slog.New(log)))
		p := wt.session()
		p.send("RUN 0 1 0 long", "RUN 1 1 0 exit", "RUN 2 1 1000 deaf")
		p.expectReports("FAIL 0 output …", "FAIL 1 panic …", "FAIL 2 stuck …")
		close(release)
		synctest.Wait()
		for _, run := range []string{"RUN 3 1 0 cut off", "RUN 4 1 0 too late"} {
			p.send(run)
			synctest.Wait()
			p.conn.Close()
			synctest.Wait()
			p = wt.session()
		}
		lines := slices.DeleteFunc(log.lines(keyTask, keyKind, keyReported), func(line string) bool { return !strings.HasPrefix(line, "DEBUG task ") })
		if d := cmp.Diff([]string{
			"DEBUG task started task=0", "DEBUG task failed task=0 kind=output",
			"DEBUG task started task=1", "DEBUG task failed task=1 kind=panic",
			"DEBUG task started task=2", "DEBUG task done task=2 reported=false",
			"DEBUG task started task=3", "DEBUG task failed task=3 kind=canceled reported=false",
			"DEBUG task started task=4", "DEBUG task done task=4 reported=false",
		}, lines); d != "" {
			t.Errorf("logged (-want +got):\n%s", d)
		}
	})
}

func TestAFailingListenerIsLoggedOnceInARow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		ln := &moodyListener{memListener: new(memNetwork).listen("w:1"), errs: make(chan error, 100)}
		for range 100 {
			ln.errs <- errNoFiles
		}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- NewWorker(parrot, WithName("w"), WithLogger(slog.New(log))).Serve(ctx, ln) }()
		time.Sleep(time.Hour)
		cancel()
		<-served
		log.expectLines(t, []string{keyWorker, keyError}, "INFO worker serving worker=w",
			"WARN listener failed worker=w error=accept tcp: accept4: too many open files", "WARN worker stopped worker=w error=context canceled")
	})
}

func TestAWorkerThatIsNotReachedDoesNotFillTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelDebug)
		start := time.Now()
		dial := func(context.Context, string, string) (net.Conn, error) {
			if time.Since(start) < 5*time.Minute {
				return nil, errors.New("no route")
			}
			return nil, errors.New("refused")
		}
		c := newTestCoordinator(t, WithWorkers("a", "a:1"), WithDialer(dial), WithWorkerWait(10*time.Minute), WithLogger(slog.New(log)))
		c.Run(t.Context(), tasksOf("a", 1))
		count := make(map[string]int)
		for _, line := range log.lines(keyError) {
			count[line]++
		}
		for _, reason := range []string{"no route", "refused"} {
			line := " worker not reached error=" + reason
			// There is a dial in each slot of 10 s, and its reason is told for each minute.
			if warned, all := count["WARN"+line], count["WARN"+line]+count["DEBUG"+line]; warned < 4 || warned > 6 || all < 28 {
				t.Errorf("%d of %d times %q was a warning", warned, all, reason)
			}
		}
	})
}

func TestAnotherReasonWhyAWorkerIsNotReachedIsWarnedOfAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		dials := 0
		dial := func(context.Context, string, string) (net.Conn, error) {
			dials++
			return nil, errors.New([]string{"refused", "reset", "late"}[min(dials, 3)-1])
		}
		c := newTestCoordinator(t, WithWorkers("a", "a:1"), WithDialer(dial), WithWorkerWait(50*time.Second), WithLogger(slog.New(log)))
		c.Run(t.Context(), tasksOf("a", 1))
		warnings := slices.DeleteFunc(log.lines(keyError), func(line string) bool { return !strings.HasPrefix(line, "WARN worker") })
		want := []string{"WARN worker not reached error=refused", "WARN worker not reached error=reset", "WARN worker not reached error=late"}
		if d := cmp.Diff(want, warnings); d != "" || dials < 5 {
			t.Errorf("%d dials; logged (-want +got):\n%s", dials, d)
		}
	})
}

func TestAWorkerThatWasReachedInBetweenIsWarnedOfAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		cl := newCluster(t)
		start := time.Now()
		cl.script("a:1", func(p *peer) {
			p.welcome()
			p.expect("RUN 0 1 0 …")
		})
		dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
			if time.Since(start) < 5*time.Second {
				return nil, fmt.Errorf("dial %s: connection refused", addr)
			}
			return cl.dial(ctx, network, addr)
		}
		c := cl.coordinator(WithWorkers("a", "a:1"), WithDialer(dial), WithWorkerWait(20*time.Second), WithLogger(slog.New(log)))
		tasks := tasksOf("a", 1)
		report, err := c.Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if time.Since(start) >= time.Minute {
			t.Errorf("it took %v, after which there is a further warning anyway", time.Since(start))
		}
		warnings := slices.DeleteFunc(log.lines(keyError), func(line string) bool { return strings.HasPrefix(line, "INFO") })
		unreached := "WARN worker not reached error=dial a:1: connection refused"
		if len(warnings) < 3 || warnings[0] != unreached || !strings.HasPrefix(warnings[1], "WARN session lost") || warnings[2] != unreached {
			t.Errorf("logged %q", warnings)
		}
	})
}

func TestAReasonIsNotNewWithEachLocalPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelDebug)
		port := 40000
		dial := func(context.Context, string, string) (net.Conn, error) {
			port++
			return nil, fmt.Errorf("lookup a: read udp 10.0.0.5:%d->10.0.0.2:53: i/o timeout", port)
		}
		c := newTestCoordinator(t, WithWorkers("a", "a:1"), WithDialer(dial), WithWorkerWait(5*time.Minute), WithLogger(slog.New(log)))
		c.Run(t.Context(), tasksOf("a", 1))
		warned := 0
		for _, line := range log.lines() {
			if line == "WARN worker not reached" {
				warned++
			}
		}
		if warned < 4 || warned > 6 {
			t.Errorf("%d warnings in 5 minutes", warned)
		}
	})
}

func TestAListenerThatFailsNowAndThenDoesNotFillTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		network := new(memNetwork)
		ln := &moodyListener{memListener: network.listen("w:1"), errs: make(chan error, 1)}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- NewWorker(parrot, WithLogger(slog.New(log))).Serve(ctx, ln) }()
		for range 15 * 10 { // in 15 s
			ln.errs <- errNoFiles // after the next connection
			conn, err := network.dial(t.Context(), "tcp", "w:1")
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			time.Sleep(100 * time.Millisecond)
		}
		cancel()
		<-served
		log.expectLines(t, nil, "INFO worker serving", "WARN listener failed", "WARN listener failed", "WARN worker stopped")
	})
}

func TestAListenerThatFailsForGoodSoonAfterItRecoveredIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		network := new(memNetwork)
		ln := &moodyListener{memListener: network.listen("w:1"), errs: make(chan error, 1000)}
		ln.errs <- errNoFiles
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- NewWorker(parrot, WithLogger(slog.New(log))).Serve(ctx, ln) }()
		time.Sleep(time.Second)
		for range 1000 { // after the next connection
			ln.errs <- errNoFiles
		}
		conn, err := network.dial(t.Context(), "tcp", "w:1")
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		time.Sleep(10 * time.Minute)
		cancel()
		<-served
		log.expectLines(t, nil, "INFO worker serving", "WARN listener failed", "WARN listener failed", "WARN worker stopped")
	})
}

func TestAListenerWithoutAnAddressIsLoggedWithoutOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		ln := hiddenListener{memListener: new(memNetwork).listen("w:1")}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		NewWorker(parrot, WithName("w"), WithLogger(slog.New(log))).Serve(ctx, ln)
		log.expectLines(t, []string{keyWorker, keyAddr}, "INFO worker serving worker=w", "WARN worker stopped worker=w")
	})
}

func TestWithLoggerOfNoneIsAMisuse(t *testing.T) {
	defer func() {
		if got := recover(); got != "taskexec: WithLogger: nil logger" {
			t.Errorf("panic with %v", got)
		}
	}()
	WithLogger(nil)
}

// What a peer says on its way out may quote anything, and so may the first line
// of a session that is no greeting.
func TestNoInstructionThatAPeerQuotesIsLoggedAboveDebug(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, lines := range [][]string{
			{"RUN x 1 0 SECRET"},
			{helloA, "ERROR busy not for SECRET"},
		} {
			log := newLogRecorder(slog.LevelInfo)
			wt := startWorker(t, parrot, WithLogger(slog.New(log)))
			here, there := net.Pipe()
			served := make(chan error, 1)
			go func() { served <- wt.worker.ServeConn(t.Context(), there) }()
			go io.Copy(io.Discard, here)
			io.WriteString(here, strings.Join(lines, "\n")+"\n")
			if err := <-served; err == nil {
				t.Errorf("%q: ServeConn returned nil", lines)
			}
			here.Close()
			synctest.Wait() // the listener's line has a goroutine of its own
			expectNoSecret(t, log)
			if len(log.lines(keyCode)) < 2 {
				t.Errorf("%q: logged %q", lines, log.lines(keyCode))
			}
		}
	})
}

// panickyLog panics when it is given anything to log.
type panickyLog struct{ logRecorder }

func (l *panickyLog) Handle(context.Context, slog.Record) error { panic("no good") }
func (l *panickyLog) WithAttrs([]slog.Attr) slog.Handler        { return l }

func TestShutdownDoesNotWaitForARunThatPanicked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCoordinator(t, WithWorkers("a", "a:1"), WithLogger(slog.New(new(panickyLog))))
		func() {
			defer func() {
				if got := recover(); got != "no good" {
					t.Errorf("Run panicked with %v", got)
				}
			}()
			c.Run(t.Context(), tasksOf("a", 1))
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := c.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
}

func TestARunThatGivesUpSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mine, theirs := newLogRecorder(slog.LevelInfo), newLogRecorder(slog.LevelInfo)
		cl := newCluster(t)
		release := make(chan struct{})
		cl.worker("a:1", func(context.Context, Task) (string, error) { <-release; return "", nil })
		cl.worker("a:2", until, WithLogger(slog.New(theirs))) // it reports
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		c := cl.coordinator(WithWorkers("a", "a:1", "a:2"), WithLogger(slog.New(mine)))
		tasks := tasksOf("a", 2)
		report, err := c.Run(ctx, tasks)
		checkReport(t, tasks, report, err)
		close(release)
		synctest.Wait()
		keys := []string{keyAddr, keyLost, keyCode, keyByPeer, keyError}
		want := "WARN session lost addr=a:1 lost=1 code=timeout by_peer=false error=tasks were not reported within 10s after CANCEL"
		lost := slices.DeleteFunc(mine.lines(keys...), func(line string) bool { return !strings.HasPrefix(line, "WARN session") })
		if d := cmp.Diff([]string{want}, lost); d != "" {
			t.Errorf("the coordinator logged (-want +got):\n%s", d)
		}
		theirs.expectLines(t, nil, "INFO worker serving", "INFO session opened", "INFO session closed")
	})
}

func TestACoordinatorThatDoesNotAnswerIsNamedAsTheReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		w := NewWorker(HandlerFunc(until), WithLogger(slog.New(log)))
		here, there := net.Pipe()
		defer here.Close()
		p := newPeer(t, here)
		go func() {
			p.send(`HELLO taskexec/1 {"category":"a","timeout_ms":10000}`)
			p.expect("WELCOME taskexec/1 …")
			p.send("RUN 0 1 0 x")
			io.Copy(io.Discard, p.in)
		}()
		err := w.ServeConn(t.Context(), there)
		if fault, ok := errors.AsType[*ProtocolError](err); !ok || fault.Code != codeTimeout || fault.Remote {
			t.Errorf("ServeConn returned %v", err)
		}
		log.expectLines(t, []string{keyCode, keyByPeer, keyError}, "INFO session opened",
			"WARN session lost code=timeout by_peer=false error=no answer to a PING for 8s")
	})
}

// A worker's lines name it once.
func TestWhatALineNamesIsNotInItsReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLogRecorder(slog.LevelInfo)
		w := NewWorker(parrot, WithName("w"), WithLogger(slog.New(log)))
		network := new(memNetwork)
		ln := network.listen("a:1")
		served := make(chan error, 1)
		go func() { served <- w.Serve(t.Context(), ln) }()
		conn, err := network.dial(t.Context(), "tcp", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		p := newPeer(t, conn)
		p.send(helloA)
		p.expect("WELCOME taskexec/1 …")
		if _, err := io.WriteString(conn, "RUN"); err != nil {
			t.Error(err)
		}
		conn.Close()
		synctest.Wait()
		ln.Close()
		if err := <-served; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve returned %v", err)
		}
		log.expectLines(t, []string{keyWorker, keyError}, "INFO worker serving worker=w", "INFO session opened worker=w",
			"WARN session lost worker=w error=connection closed inside a line", "WARN worker stopped worker=w error=use of closed network connection")
	})
}

// resetConn is reset by a peer that closes it.
type resetConn struct{ net.Conn }

func (c resetConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == io.EOF {
		err = errReset
	}
	return n, err
}

var errReset = errors.New("connection reset")

// A coordinator that ends a run closes its sessions, whose connections may be
// reset if something is under way to it just then. That costs nothing; to be
// closed or reset with a task in flight does.
func TestASessionIsLostWithWhatIsInFlight(t *testing.T) {
	for _, c := range []struct {
		name  string
		say   []string
		reset bool
		want  string
	}{
		{"closed", nil, false, "INFO session closed"},
		{"closed with a task", []string{"RUN 0 1 0 x"}, false, "WARN session lost lost=1 error=the coordinator closed the connection"},
		{"closed with tasks", []string{"RUN 0 1 0 x", "RUN 1 1 0 x"}, false, "WARN session lost lost=2 error=the coordinator closed the connection"},
		{"reset", nil, true, "INFO session closed error=connection reset"},
		{"reset with a task", []string{"RUN 0 1 0 x"}, true, "WARN session lost lost=1 error=connection reset"},
		{"cut off in a line", []string{"PING 1\nRUN"}, false, "WARN session lost error=connection closed inside a line"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := newLogRecorder(slog.LevelInfo)
				w := NewWorker(HandlerFunc(until), WithName("w"), WithLogger(slog.New(log)))
				here, there := net.Pipe()
				conn := there
				if c.reset {
					conn = resetConn{there}
				}
				go func() {
					p := newPeer(t, here)
					p.send(helloA)
					p.expect("WELCOME taskexec/1 …")
					if c.say != nil {
						io.WriteString(here, strings.Join(c.say, "\n"))
						if !strings.Contains(c.say[0], "PING") {
							p.send("")
						}
					}
					synctest.Wait()
					here.Close()
				}()
				w.ServeConn(t.Context(), conn)
				log.expectLines(t, []string{keyLost, keyCode, keyByPeer, keyError}, "INFO session opened", c.want)
				if stats := w.Stats(); strings.Contains(c.want, "lost=2") != (stats.Lost == 2) {
					t.Errorf("Stats are %+v", stats)
				}
			})
		})
	}
}

// Whoever stops a worker knows what is in flight, and is not warned.
func TestAConnectionThatEndsWithItsWorkerIsNotWarnedOf(t *testing.T) {
	for _, c := range []struct {
		name, say string
		want      []string
	}{
		{"with a task", helloA + "\nRUN 0 1 0 x\n", []string{"INFO session opened", "INFO session closed lost=1"}},
		{"before it has greeted", "HELLO", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := newLogRecorder(slog.LevelInfo)
				w := NewWorker(HandlerFunc(until), WithLogger(slog.New(log)))
				here, there := net.Pipe()
				defer here.Close()
				go io.Copy(io.Discard, here)
				go io.WriteString(here, c.say)
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("enough"))
				defer cancel()
				if err := w.ServeConn(ctx, there); err != context.Cause(ctx) {
					t.Errorf("ServeConn returned %v", err)
				}
				log.expectLines(t, []string{keyLost, keyCode, keyError}, c.want...)
			})
		})
	}
}
