package taskexec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Whole sessions are tried out here: a live worker or a live coordinator in
// fake time, and a peer that says anything. Whatever it is, nobody panics, all
// is over in the time that docs/protocol.md gives it, no goroutine is left, and
// every task has one outcome, which is its own.

const (
	hostileStay = 20 * time.Second // how long a hostile peer stays when it has said all: beyond every timeout but for the heartbeat's silence
	hostileMost = 40 * time.Second // of pauses while it says that
	sessionMost = 8 << 10          // bytes of a session that is fuzzed; more bring nothing new
)

// A spoken is one write of a peer, and the pause before it.
type spoken struct {
	pause time.Duration
	bytes []byte
}

// textOf is all of a script.
func textOf(script []spoken) []byte {
	var text []byte
	for _, s := range script {
		text = append(text, s.bytes...)
	}
	return text
}

// cutUp makes a script of text, as cuts says: each of its bytes is the length
// of a write, where 0 stands for the rest of a line and 63 for the rest of all,
// and a pause before it. It begins again when it ends; without any there is one
// write.
func cutUp(text, cuts []byte) []spoken {
	var script []spoken
	var paused time.Duration
	for i := 0; len(text) > 0; i++ {
		next := spoken{bytes: text}
		if len(cuts) > 0 {
			cut := cuts[i%len(cuts)]
			n := int(cut % 64)
			switch n {
			case 0:
				n = bytes.IndexByte(text, '\n') + 1
				if n == 0 {
					n = len(text)
				}
			case 63:
				n = len(text)
			}
			next.bytes = text[:min(n, len(text))]
			next.pause = min([]time.Duration{0, time.Millisecond, 2 * time.Second, 11 * time.Second}[cut/64], hostileMost-paused)
			paused += next.pause
		}
		text = text[len(next.bytes):]
		script = append(script, next)
	}
	return script
}

// A hostile is a peer that says what it was told to, whatever it hears.
type hostile struct {
	script []spoken
	deaf   bool   // it reads nothing until it has said all
	heard  []byte // what it was told, when play has returned
}

// play is the peer's whole session.
func (h *hostile) play(t *testing.T, conn net.Conn) {
	var listening sync.WaitGroup
	listen := func() { listening.Go(func() { h.heard, _ = io.ReadAll(conn) }) }
	if !h.deaf {
		listen()
	}
	for _, s := range h.script {
		time.Sleep(s.pause)
		conn.SetWriteDeadline(time.Now().Add(2 * lastWordsTimeout))
		if _, err := conn.Write(s.bytes); err != nil {
			if isTimeout(err) {
				t.Errorf("the other side has not closed the connection, and does not read it: %v", err)
			}
			break
		}
	}
	if h.deaf {
		listen()
	}
	timer := time.AfterFunc(hostileStay, func() { conn.Close() })
	listening.Wait()
	timer.Stop()
	conn.Close()
}

// linesOf takes whole lines apart. ok says that all were lines of the protocol.
func linesOf(text []byte) (messages []message, ok bool) {
	ok = true
	for line := range strings.Lines(string(text)) {
		line, whole := strings.CutSuffix(line, "\n")
		if !whole {
			break // the connection ended there
		}
		m, err := parseMessage(line)
		if err != nil {
			ok = false
			continue
		}
		messages = append(messages, m)
	}
	return messages, ok
}

// awaitOver waits for the end of what should be over within most.
func awaitOver(what string, over <-chan struct{}, most time.Duration) {
	select {
	case <-over:
	case <-time.After(most):
		stacks := make([]byte, 1<<20)
		panic(fmt.Sprintf("%s is not over after %v:\n%s", what, most, stacks[:runtime.Stack(stacks, true)]))
	}
}

// An order is a RUN as a worker got it.
type runOrder struct {
	task, attempt int
	instruction   string
}

// moody does what the first letter of its instruction says.
func moody(ctx context.Context, task Task) (string, error) {
	switch letter, _, _ := strings.Cut(task.Instruction, " "); letter {
	case "wait":
		<-ctx.Done()
		return "", context.Cause(ctx)
	case "slow":
		if !sleep(ctx, 6*time.Second) {
			return "", context.Cause(ctx)
		}
	case "sulk":
		if !sleep(ctx, 6*time.Second) {
			return "", context.Cause(ctx)
		}
		return "", errors.New("told to fail after a while")
	case "deaf":
		time.Sleep(5 * time.Second)
	case "panic":
		panic("told to panic")
	case "exit":
		runtime.Goexit()
	case "fail":
		return "", errors.New("told to fail,\nin two lines")
	case "final":
		return "", Final(errors.New("told to fail for good"))
	case "later":
		return "", RetryAfter(errors.New("told to fail for now"), time.Second)
	case "long":
		return strings.Repeat("long\\", 5_000), nil
	}
	return "did " + task.Instruction, nil
}

// besiegeWorker has a hostile coordinator talk to a worker, in a bubble.
func besiegeWorker(t *testing.T, h *hostile, slots int) {
	var mu sync.Mutex
	executed := make(map[runOrder]int)
	w := NewWorker(HandlerFunc(func(ctx context.Context, task Task) (string, error) {
		info, _ := TaskInfoFrom(ctx)
		mu.Lock()
		executed[runOrder{info.Task, info.Attempt, task.Instruction}]++
		mu.Unlock()
		return moody(ctx, task)
	}), WithName("w"), WithCategories("a"), WithSlots(slots))
	here, there := net.Pipe()
	over := make(chan struct{})
	go func() {
		defer close(over)
		w.ServeConn(context.Background(), here) // t's context would end what is left over
	}()
	h.play(t, there)
	awaitOver("a session whose connection is closed", over, 10*time.Second) // its handlers have ended too

	orders := make(map[runOrder]int)  // that were sent
	sent := make(map[int]int)         // RUNs of each task
	outputs := make(map[int][]string) // that its executions have
	said, _ := linesOf(textOf(h.script))
	greeted := false
	for i, m := range said {
		if i == 0 {
			if _, err := parseHello(m); m.verb != verbHello || err != nil {
				break
			}
			greeted = true
		}
		if m.verb == verbRun {
			o := runOrder{m.task, m.attempt, m.text}
			orders[o]++
			sent[m.task]++
			if executed[o] > 0 {
				output, _ := moodyOutput(m.text)
				outputs[m.task] = append(outputs[m.task], output)
			}
		}
	}
	ran := make(map[int]int) // executions of each task
	for o, n := range executed {
		if ran[o.task] += n; n > orders[o] {
			t.Errorf("%+v was executed %d times, and sent %d times", o, n, orders[o])
		}
	}
	answers, ok := linesOf(h.heard)
	if !ok {
		t.Errorf("the worker has said what is no line: %q", h.heard)
	}
	answered := make(map[int]int)
	for i, m := range answers {
		switch {
		case i == 0 && m.verb == verbError:
		case i == 0 && (m.verb != verbWelcome || !greeted):
			t.Errorf("the worker began with %+v, and the coordinator with a good HELLO: %v", m, greeted)
		case i < len(answers)-1 && (m.verb == verbGoodbye || m.verb == verbError):
			t.Errorf("the worker went on after %+v: %+v", m, answers[i+1])
		}
		switch m.verb {
		case verbDone:
			if !slices.Contains(outputs[m.task], m.text) {
				t.Errorf("task %d was reported with %q, which is that of none of its executions: %q", m.task, m.text, outputs[m.task])
			}
			fallthrough
		case verbFail, verbReturn:
			if answered[m.task]++; answered[m.task] > sent[m.task] {
				t.Errorf("task %d was sent %d times, and answered once more: %+v", m.task, sent[m.task], m)
			}
		case verbGoodbye:
			for task, n := range ran {
				if answered[task] < n {
					t.Errorf("task %d was executed %d times, and answered %d times before GOODBYE", task, n, answered[task])
				}
			}
		}
	}

	if stats := w.Stats(); stats.Sessions != 0 || stats.Running != 0 || stats.Stuck != 0 || stats.Waiting != 0 {
		t.Errorf("the session has left something behind: %+v", stats)
	}
	if w.isDraining() { // it was told to
		over := make(chan struct{})
		go func() {
			defer close(over)
			w.Shutdown(t.Context())
		}()
		awaitOver("a worker without sessions that was told to shut down", over, time.Second)
		return
	}
	here, there = net.Pipe()
	over = make(chan struct{})
	go func() {
		defer close(over)
		w.ServeConn(context.Background(), here)
	}()
	p := newPeer(t, there)
	p.send(helloA)
	p.expect("WELCOME taskexec/1 …")
	p.send("RUN 0 1 0 still there?")
	p.expectReports("DONE 0 did still there?")
	there.Close()
	awaitOver("a session that is closed", over, time.Second)
}

// moodyOutput is what moody returns for an instruction, if it returns an output.
func moodyOutput(instruction string) (string, bool) {
	switch letter, _, _ := strings.Cut(instruction, " "); letter {
	case "wait", "sulk", "panic", "exit", "fail", "final", "later":
		return "", false
	case "long":
		return strings.Repeat("long\\", 5_000), true
	}
	return "did " + instruction, true
}

// A siege is a run whose worker of category a is hostile in its first sessions.
// That of category b is honest.
type siege struct {
	tasks       []Task
	sessions    []*hostile
	options     []CoordinatorOption
	cancelAfter time.Duration // 0: never
	stream      bool
	honest      bool // the sessions of category a after the hostile ones are with an honest worker; else nobody is there
}

// do is the whole run, in a bubble.
func (s *siege) do(t *testing.T) {
	var sides sync.WaitGroup
	var mu sync.Mutex // guards following
	dials := 0
	var firstB, lastA time.Time
	settled := make(map[int]int)

	worker := NewWorker(HandlerFunc(func(_ context.Context, task Task) (string, error) {
		mu.Lock()
		defer mu.Unlock()
		if task.Category == "b" && firstB.IsZero() {
			firstB = time.Now()
		}
		return "did " + task.Instruction, nil
	}), WithName("honest"))
	dial := func(_ context.Context, _, addr string) (net.Conn, error) {
		mu.Lock()
		n := dials
		if addr == "a:1" {
			dials++
		}
		mu.Unlock()
		here, there := net.Pipe()
		switch {
		case addr == "a:1" && n < len(s.sessions):
			sides.Go(func() { s.sessions[n].play(t, there) })
		case addr == "a:1" && !s.honest:
			return nil, errors.New("connection refused")
		default:
			sides.Go(func() { worker.ServeConn(context.Background(), there) })
		}
		return here, nil
	}
	c, err := NewCoordinator(append([]CoordinatorOption{
		WithWorkers("a", "a:1"), WithWorkers("b", "b:1"), WithDialer(dial), WithWorkerWait(3 * time.Second),
		coordinatorOption(func(c *coordinatorConfig) { c.jitter = func(most time.Duration) time.Duration { return most / 2 } }),
		WithObserver(Observer{TaskDone: func(i TaskDoneInfo) {
			mu.Lock()
			defer mu.Unlock()
			settled[i.Result.Index]++
			if i.Result.Task.Category == "a" {
				lastA = time.Now()
			}
		}}),
	}, s.options...)...)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background() // t's would end what is left over
	if s.cancelAfter > 0 {
		c, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer time.AfterFunc(s.cancelAfter, func() { cancel(errors.New("the user pressed Ctrl-C")) }).Stop()
		ctx = c
	}
	var results []Result
	over := make(chan struct{})
	go func() {
		defer close(over)
		if !s.stream {
			report, err := c.Run(ctx, s.tasks)
			checkReport(t, s.tasks, report, err)
			results = report.Results
			return
		}
		for r, err := range c.Stream(ctx, slices.Values(s.tasks)) {
			if err == nil {
				results = append(results, r)
			}
		}
	}()
	// Hostile sessions last for the pauses and the stay, and after that there
	// are waits of at most a minute in all.
	awaitOver("a run", over, time.Duration(len(s.sessions))*(hostileMost+hostileStay)+time.Minute)
	over = make(chan struct{})
	go func() { defer close(over); sides.Wait() }()
	awaitOver("what a run has left behind", over, hostileMost+hostileStay)

	outputs := make(map[int][]string) // by task: those that reports on it had
	sent := make(map[int]int)         // by task: RUNs seen
	for _, h := range s.sessions {
		said, _ := linesOf(textOf(h.script))
		for _, m := range said {
			if m.verb == verbDone {
				outputs[m.task] = append(outputs[m.task], m.text)
			}
		}
		heard, ok := linesOf(h.heard)
		if !ok {
			t.Errorf("the coordinator has said what is no line: %q", h.heard)
		}
		attempts := make(map[int]int)
		for i, m := range heard {
			switch {
			case i == 0 && m.verb == verbError: // at a worker that does not wait for HELLO
			case (i == 0) != (m.verb == verbHello):
				t.Errorf("line %d of the coordinator is %+v", i, m)
			case i < len(heard)-1 && m.verb == verbError:
				t.Errorf("the coordinator went on after %+v: %+v", m, heard[i+1])
			case m.verb == verbRun:
				sent[m.task]++
				if m.task >= len(s.tasks) || m.text != s.tasks[m.task].Instruction || m.attempt <= attempts[m.task] {
					t.Errorf("a RUN that is none of this run, or an old one: %+v", m)
				}
				attempts[m.task] = m.attempt
			}
		}
	}
	seen := make(map[int]bool)
	for _, r := range results {
		if seen[r.Index] {
			t.Errorf("task %d has two results", r.Index)
		}
		seen[r.Index] = true
		if r.Outcome == Done && !slices.Contains(outputs[r.Index], r.Output) && r.Output != "did "+r.Task.Instruction {
			t.Errorf("task %d is Done with %q, which nobody has reported for it: %q", r.Index, r.Output, outputs[r.Index])
		}
		if sent[r.Index] > r.Attempts {
			t.Errorf("task %d was sent %d times in %d attempts", r.Index, sent[r.Index], r.Attempts)
		}
		if n := settled[r.Index]; n > 1 || n == 0 && r.Outcome != Skipped && r.Attempts > 0 {
			t.Errorf("task %d is %v, and was settled %d times", r.Index, r.Outcome, n)
		}
	}
	if !firstB.IsZero() && firstB.Before(lastA) && c.config.order == ByCategory {
		t.Errorf("a task of category b was executed %v before the last of category a was settled", lastA.Sub(firstB))
	}
	if err := c.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
}

// siegeTasks are of both categories. Those of a are settled in many ways by a
// worker that is moody.
func siegeTasks() []Task {
	return []Task{
		{Category: "a", Instruction: "a0 of\ntwo lines"},
		{Category: "a", Instruction: "sulk a1"},
		{Category: "a", Instruction: "slow a2"},
		{Category: "b", Instruction: "b3"},
		{Category: "a", Instruction: "slow a4"},
		{Category: "a", Instruction: "a5"},
		{Category: "b", Instruction: "b6"},
	}
}

// A tapConn notes what is written to it, and when.
type tapConn struct {
	net.Conn
	last   time.Time
	script []spoken
}

func (c *tapConn) Write(p []byte) (int, error) {
	// What is answered must have been heard, when this is said again too.
	time.Sleep(time.Millisecond)
	now := time.Now()
	c.script = append(c.script, spoken{now.Sub(c.last), bytes.Clone(p)})
	c.last = now
	return c.Conn.Write(p)
}

// A recording is a session between this package's coordinator and worker.
type recording struct {
	name        string
	options     []CoordinatorOption
	cancelAfter time.Duration
	up, down    []spoken // by the coordinator, by the worker
}

// record records sessions in which every verb is said but ERROR. Of a run with
// siegeTasks they are those of category a.
func record(t *testing.T) []*recording {
	recordings := []*recording{
		// After the failure of task 1 what was sent behind it is asked back.
		{name: "stopped", options: []CoordinatorOption{WithOnFailure(StopSoon), WithWorkerShutdown()}},
		{name: "canceled", options: []CoordinatorOption{WithOnFailure(KeepGoing)}, cancelAfter: time.Second},
	}
	for _, r := range recordings {
		synctest.Test(t, func(t *testing.T) {
			var up, down *tapConn
			var serving sync.WaitGroup
			worker := NewWorker(HandlerFunc(moody), WithName("w"), WithCategories("a", "b"))
			c, err := NewCoordinator(append([]CoordinatorOption{WithWorkers("a", "a:1"), WithWorkers("b", "b:1"),
				WithDialer(func(_ context.Context, _, addr string) (net.Conn, error) {
					here, there := net.Pipe()
					tapHere, tapThere := &tapConn{Conn: here, last: time.Now()}, &tapConn{Conn: there, last: time.Now()}
					if addr == "a:1" {
						up, down = tapHere, tapThere
					}
					serving.Go(func() { worker.ServeConn(t.Context(), tapThere) })
					return tapHere, nil
				})}, r.options...)...)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			if r.cancelAfter > 0 {
				defer time.AfterFunc(r.cancelAfter, func() { cancel(errors.New("the user pressed Ctrl-C")) }).Stop()
			}
			c.Run(ctx, siegeTasks())
			cancel(nil)
			serving.Wait()
			r.up, r.down = up.script, down.script
		})
	}
	var all []byte
	for _, r := range recordings {
		all = append(append(all, textOf(r.up)...), textOf(r.down)...)
	}
	for v := verbHello; v < verbError; v++ {
		if !bytes.Contains(append([]byte("\n"), all...), []byte("\n"+v.String())) {
			t.Errorf("nobody has said %s", v)
		}
	}
	return recordings
}

// verbsOf says in short what a side has said, without PINGs and PONGs, whose
// place is by chance.
func verbsOf(text []byte) string {
	var verbs []string
	messages, _ := linesOf(text)
	for _, m := range messages {
		if m.verb != verbPing && m.verb != verbPong {
			verbs = append(verbs, m.verb.String())
		}
	}
	return strings.Join(verbs, " ")
}

// The two ways to play a recording once more, with one side live. flip is the
// bit to be flipped in what the other says; -1 is none.
func (r *recording) toWorker(t *testing.T, flip int) *hostile {
	h := &hostile{script: flipped(r.up, flip)}
	besiegeWorker(t, h, 1)
	return h
}

func (r *recording) toCoordinator(t *testing.T, flip int) *hostile {
	h := &hostile{script: flipped(r.down, flip)}
	s := &siege{tasks: siegeTasks(), sessions: []*hostile{h}, options: r.options, cancelAfter: r.cancelAfter, honest: true}
	s.do(t)
	return h
}

func flipped(script []spoken, bit int) []spoken {
	script = slices.Clone(script)
	for i := range script {
		if n := len(script[i].bytes); bit >= 8*n {
			bit -= 8 * n
			continue
		}
		if bit >= 0 {
			script[i].bytes = bytes.Clone(script[i].bytes)
			script[i].bytes[bit/8] ^= 1 << (bit % 8)
		}
		break
	}
	return script
}

// Whichever bit of a session is flipped on its way, the side that gets it
// neither fails nor hangs. The wire has no checksum: a flipped bit in an
// instruction, an output or a number makes another one, and passes. But what
// was received is what counts: nothing is executed that no line orders, and no
// task is settled but by a line with its number.
func TestEverySingleBitFlipOfASessionIsSurvived(t *testing.T) {
	for _, r := range record(t) {
		sides := []struct {
			name        string
			said, heard []spoken // by whom bits are flipped, and by whom they are read
			play        func(t *testing.T, flip int) *hostile
		}{
			{"worker", r.up, r.down, r.toWorker},
			{"coordinator", r.down, r.up, r.toCoordinator},
		}
		for _, side := range sides {
			t.Run(r.name+" "+side.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					h := side.play(t, -1)
					// After the recorded end, which it does not hear of, it may say more.
					if got, want := verbsOf(h.heard), verbsOf(textOf(side.heard)); !strings.HasPrefix(got, want) {
						t.Fatalf("the live side says %s, and said %s when it was recorded", got, want)
					}
				})
				bits := 8 * len(textOf(side.said))
				for bit := range bits {
					synctest.Test(t, func(t *testing.T) { side.play(t, bit) })
					if t.Failed() {
						t.Fatalf("with bit %d of byte %d flipped: %q", bit%8, bit/8, textOf(flipped(side.said, bit)))
					}
				}
				t.Logf("%d bits", bits)
			})
		}
	}
}

// linewise is for cutUp: each line waits until the other side has done what the
// one before it asks for.
var linewise = []byte{1 << 6}

// saidBy is what one side says in the transcripts of docs/protocol.md.
func saidBy(tb testing.TB, side string) [][]byte {
	var texts [][]byte
	for _, info := range []string{"both", "worker", "coordinator"} {
		for _, transcript := range transcripts(tb, info) {
			var text []byte
			for _, s := range transcript {
				if s.by == side {
					text = append(append(text, s.line...), '\n')
				}
			}
			texts = append(texts, text)
		}
	}
	return texts
}

// spell puts a phrase for each byte above 127 that stands where a line begins,
// so that the fuzzer, which knows no lines, comes to say sensible things in
// senseless order.
func spell(text []byte, phrases []string) []byte {
	var spelled []byte
	start := true
	for _, c := range text {
		if start && c >= 0x80 {
			spelled = append(append(spelled, phrases[int(c-0x80)%len(phrases)]...), '\n')
			continue
		}
		spelled = append(spelled, c)
		start = c == '\n'
	}
	return spelled
}

// all makes each phrase of those with a % several, for tasks 0, 1 and 2.
func all(phrases ...string) []string {
	var each []string
	for _, p := range phrases {
		if !strings.Contains(p, "%") {
			each = append(each, p)
			continue
		}
		for task := range 3 {
			each = append(each, fmt.Sprintf(p, task))
		}
	}
	return each
}

var (
	coordinatorPhrases = all(helloA, `HELLO taskexec/1 {"category":"a","timeout_ms":5000,"max_line":4096}`,
		"RUN %d 1 0 quick", "RUN %d 2 0 slow", "RUN %d 1 1000 deaf", "RUN %d 1 0 wait", "RUN %d 3 0 long", "RUN %d 1 0 panic", "RUN %d 1 0 fail",
		"RECALL %d", "CANCEL", "CANCEL enough", "SHUTDOWN", "PING 1", "PONG 1", "PONG 2", "ERROR closing", "GOODBYE", "DONE 0 0")
	workerPhrases = all("WELCOME taskexec/1 {}", `WELCOME taskexec/1 {"worker":"w","instance":"i","slots":3,"window":5,"heartbeat":true}`,
		`WELCOME taskexec/1 {"slots":1,"window":4096,"max_line":4096}`,
		"DONE %d 7 out", "DONE 4 0", "DONE 5 0", "FAIL %d error 0 why", "FAIL %d error 2000", "FAIL %d canceled 0", "FAIL %d stuck 0 still", "FAIL 4 stuck 0", "FAIL 5 timeout 0",
		"RETURN %d", "RETURN 4", "RETURN 5", "DRAIN", "GOODBYE", "GOODBYE bye", "PING 1", "PONG 1", "ERROR closing", "ERROR busy all", "RUN 0 1 0 x")
)

// The corpus has what recordings say, too.
func FuzzWorkerSession(f *testing.F) {
	for _, text := range saidBy(f, "C") {
		f.Add(text, linewise, uint8(0))
		f.Add(text, []byte{}, uint8(0))
		f.Add(text, []byte{1}, uint8(1))
	}
	moods := helloA + "\n"
	for i, mood := range []string{"wait", "slow", "deaf", "panic", "exit", "fail", "final", "later", "long", "quick"} {
		moods += fmt.Sprintf("RUN %d 1 1000 %s\n", i, mood)
	}
	f.Add([]byte(moods+"SHUTDOWN\n"), []byte{63}, uint8(2))
	f.Add([]byte(moods+"RECALL 8\nRECALL 9\nPING 1\nRUN 9 2 0 again\nCANCEL\nRUN 10 1 0\n"), linewise, uint8(3))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), []byte{}, uint8(0))
	f.Fuzz(func(t *testing.T, text, cuts []byte, how uint8) {
		if len(text) > sessionMost {
			return
		}
		synctest.Test(t, func(t *testing.T) {
			besiegeWorker(t, &hostile{script: cutUp(spell(text, coordinatorPhrases), cuts), deaf: how&1 != 0}, 1+int(how>>1&1))
		})
	})
}

// Each bit of how is a choice.
func FuzzCoordinatorSession(f *testing.F) {
	for i, text := range saidBy(f, "W") {
		f.Add(text, []byte{}, linewise, uint16(0))
		f.Add(text, text, linewise, uint16(1<<i))
		f.Add([]byte{}, text, []byte{1 << 7}, uint16(2<<i))
	}
	const welcome = "WELCOME taskexec/1 {\"slots\":2,\"window\":9}\n"
	f.Add([]byte(welcome+"DRAIN\nRETURN 0\nDONE 1 7 x\nFAIL 2 later 5\nGOODBYE\n"), []byte(welcome+"FAIL 0 stuck 0\nFAIL 4 stuck 0\n"), linewise, uint16(2))
	f.Add([]byte(welcome+"DONE 0 1 x\nDONE 1 1\nDONE 2 1\nDONE 4 1\nDONE 5 1\n"), []byte{}, linewise, uint16(0))
	f.Fuzz(func(t *testing.T, first, second, cuts []byte, how uint16) {
		if len(first)+len(second) > sessionMost {
			return
		}
		choose := func(n int) int {
			choice := int(how) % n
			how /= uint16(n)
			return choice
		}
		deaf := choose(2) == 1
		say := func(text []byte) *hostile {
			return &hostile{script: cutUp(spell(text, workerPhrases), cuts), deaf: deaf}
		}
		s := &siege{
			tasks:    siegeTasks(),
			sessions: []*hostile{say(first), say(second)},
			honest:   choose(2) == 1,
			stream:   choose(2) == 1,
			options:  []CoordinatorOption{WithOnFailure(OnFailure(choose(3))), WithOrder(Order(choose(3)))},
		}
		if choose(2) == 1 {
			s.cancelAfter = time.Second
		}
		for _, o := range []CoordinatorOption{WithAtMostOnce(), WithWorkerShutdown(), WithTaskTimeout(time.Second), WithRetry(Retry{Attempts: 3, FirstDelay: time.Second})} {
			if choose(2) == 1 {
				s.options = append(s.options, o)
			}
		}
		synctest.Test(t, s.do)
	})
}
