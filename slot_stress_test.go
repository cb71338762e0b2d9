package taskexec

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// Whatever coordinators and handlers do, each task is answered once unless its
// session is lost, with RETURN if it never started and only then. Afterwards
// nothing runs, waits or is stuck. This is on real goroutines and real time, so
// that they meet in ways that a bubble would not have them meet.
func TestEachTaskIsAnsweredOnceHoweverGoroutinesMeet(t *testing.T) {
	for _, test := range []struct {
		slots  int
		logged bool
	}{{1, false}, {2, false}, {4, false}, {2, true}} {
		t.Run(fmt.Sprintf("%d slots, logged: %v", test.slots, test.logged), func(t *testing.T) {
			const coordinators, sessions = 4, 10
			m := &meddlers{t: t, runs: make(map[string]*meddledRun)}
			opts := []WorkerOption{WithSlots(test.slots)}
			if test.logged {
				opts = append(opts, WithLogger(slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelDebug}))))
			}
			m.worker = NewWorker(HandlerFunc(m.handle), opts...)
			for _, drain := range []bool{false, true} {
				var all sync.WaitGroup
				for c := range coordinators {
					all.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(test.slots), uint64(c)))
						for i := range sessions {
							m.session(rnd, fmt.Sprintf("%d.%d.%v", c, i, drain), drain)
						}
					})
				}
				all.Wait()
			}
			if err := m.worker.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			stats := m.worker.Stats()
			if stats.Running != 0 || stats.Waiting != 0 || stats.Stuck != 0 || stats.Sessions != 0 {
				t.Errorf("when all is over there are %+v", stats)
			}
			started := 0
			for _, r := range m.runs {
				for _, s := range r.started {
					if s {
						started++
					}
				}
			}
			if n := int(stats.Done + stats.Failed); n != started {
				t.Errorf("%d handlers are counted, and %d were called", n, started)
			}
		})
	}
}

// meddlers are coordinators that change their minds, and a worker that has to
// put up with them.
type meddlers struct {
	t      *testing.T
	worker *Worker

	mu   sync.Mutex // guards following
	runs map[string]*meddledRun
}

// meddledRun is what became of a run's tasks.
type meddledRun struct {
	started  [meddledTasks]bool
	answered [meddledTasks]verb
}

const meddledTasks = 150

// handle executes a task whose instruction is its number.
func (m *meddlers) handle(ctx context.Context, task Task) (string, error) {
	info, _ := TaskInfoFrom(ctx)
	m.mu.Lock()
	r := m.runs[info.Run]
	if r.started[info.Task] || task.Instruction != fmt.Sprint(info.Task) {
		m.t.Errorf("run %s: task %d starts with instruction %q, and was started before: %v", info.Run, info.Task, task.Instruction, r.started[info.Task])
	}
	r.started[info.Task] = true
	m.mu.Unlock()
	switch info.Task % 16 {
	case 3:
		panic("it had to be")
	case 5:
		runtime.Goexit()
	case 7:
		return "", errors.New("no luck")
	case 9:
		if info.Task%64 == 9 { // has a timeout
			<-ctx.Done()
			return "", ctx.Err()
		}
	case 11:
		runtime.Gosched()
	case 13:
		return strings.Repeat("x", 5000), nil
	}
	return task.Instruction, nil
}

// session is one session, at the end of which each task has been answered, or
// the connection was closed in its midst. With drain the worker is shut down
// meanwhile.
func (m *meddlers) session(rnd *rand.Rand, run string, drain bool) {
	r := new(meddledRun)
	m.mu.Lock()
	m.runs[run] = r
	m.mu.Unlock()
	here, there := net.Pipe()
	here.SetDeadline(time.Now().Add(20 * time.Second)) // a broken promise should not cost the whole -timeout
	var all sync.WaitGroup
	defer all.Wait()
	defer here.Close()
	all.Go(func() { m.worker.ServeConn(context.Background(), there) })
	in := bufio.NewReader(here)
	fmt.Fprintf(here, "HELLO taskexec/1 {\"run\":%q,\"category\":\"a\"}\n", run)
	if line, err := in.ReadString('\n'); err != nil || !strings.HasPrefix(line, "WELCOME ") {
		if !drain {
			m.t.Errorf("run %s: got %q and %v instead of a greeting", run, line, err)
		}
		return
	}
	over := make(chan struct{}) // all tasks are answered, or the worker has closed the connection
	goodbye := false            // for whoever has seen over
	all.Go(func() {
		defer close(over)
		goodbye = m.listen(in, run, r)
	})

	cancelAt, closeAt, drainAt := -1, -1, -1
	switch at := rnd.IntN(meddledTasks); {
	case drain:
		drainAt = at
	case at%4 == 0:
		cancelAt = at
	case at%4 == 1:
		closeAt = at
	}
	for n := 0; n < meddledTasks; {
		var lines strings.Builder
		for range 1 + rnd.IntN(40) {
			if n == meddledTasks || n == closeAt {
				break
			}
			timeout := 0
			if n%64 == 9 {
				timeout = 1
			}
			fmt.Fprintf(&lines, "RUN %d 1 %d %[1]d\n", n, timeout)
			if n++; rnd.IntN(3) == 0 {
				fmt.Fprintf(&lines, "RECALL %d\n", rnd.IntN(n))
			}
			switch n {
			case cancelAt:
				lines.WriteString("CANCEL enough\n")
			case drainAt:
				all.Go(func() { m.worker.Shutdown(context.Background()) })
			}
		}
		if _, err := io.WriteString(here, lines.String()); err != nil && !drain {
			m.t.Errorf("run %s: sending: %v", run, err)
			return
		} else if err != nil {
			break
		}
		if n == closeAt {
			return
		}
	}
	<-over
	m.mu.Lock()
	defer m.mu.Unlock()
	for n, v := range r.answered {
		if v == verbNone && (!goodbye || r.started[n]) { // what GOODBYE leaves out has not started
			m.t.Errorf("run %s: task %d is not answered", run, n)
		}
	}
}

// listen hears all answers of a session, and says whether it ended with GOODBYE.
func (m *meddlers) listen(in *bufio.Reader, run string, r *meddledRun) (goodbye bool) {
	for answers := 0; answers < meddledTasks; {
		line, err := in.ReadString('\n')
		if err != nil {
			return false
		}
		a, err := parseMessage(strings.TrimSuffix(line, "\n"))
		switch {
		case err != nil:
			m.t.Errorf("run %s: %v", run, err)
			return false
		case a.verb == verbDrain:
			continue
		case a.verb == verbGoodbye:
			return true
		case a.verb != verbDone && a.verb != verbFail && a.verb != verbReturn:
			m.t.Errorf("run %s: got %q", run, line)
			return false
		}
		answers++
		m.mu.Lock()
		if r.answered[a.task] != verbNone || r.started[a.task] == (a.verb == verbReturn) {
			m.t.Errorf("run %s: task %d is answered with %v, was answered with %v, was started: %v", run, a.task, a.verb, r.answered[a.task], r.started[a.task])
		}
		r.answered[a.task] = a.verb
		m.mu.Unlock()
	}
	return false
}
