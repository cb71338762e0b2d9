package taskexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The peer of these tests is a scripted coordinator; what it hears is compared
// without the times in it, which are not the same over pipe and TCP.

const helloA = `HELLO taskexec/1 {"run":"r1","category":"a"}`

// report reads a line and leaves out the times of DONE and FAIL.
func (p *peer) report() string {
	p.t.Helper()
	line := p.next()
	m, err := parseMessage(line)
	if err != nil {
		p.t.Errorf("got line %q: %v", cut(line, 200), err)
		return line
	}
	m.time = 0
	switch m.verb {
	case verbDone:
		return fmt.Sprintf("DONE %d %s", m.task, m.text)
	case verbFail:
		return fmt.Sprintf("FAIL %d %s %s", m.task, m.word, m.text)
	}
	return line
}

// expectReports compares with what report gives. A want that ends in …
// matches what begins like it.
func (p *peer) expectReports(wants ...string) {
	p.t.Helper()
	for _, want := range wants {
		got := p.report()
		prefix, open := strings.CutSuffix(want, "…")
		if got != want && !(open && strings.HasPrefix(got, prefix)) {
			p.t.Errorf("got report %q, want %q", cut(got, 300), cut(want, 300))
		}
	}
}

// expectReportsInAnyOrder is for what several slots, or a slot and the reader,
// report side by side.
func (p *peer) expectReportsInAnyOrder(wants ...string) {
	p.t.Helper()
	var got []string
	for range wants {
		got = append(got, p.report())
	}
	slices.Sort(got)
	slices.Sort(wants)
	if d := cmp.Diff(wants, got); d != "" {
		p.t.Errorf("reports (-want +got):\n%s", d)
	}
}

// expectClosing reads the last words of a worker whose ctx has ended. What
// ended and what never started may still be told before.
func (p *peer) expectClosing() {
	p.t.Helper()
	line := p.report()
	for strings.HasPrefix(line, "FAIL ") && strings.Contains(line, " canceled ") || strings.HasPrefix(line, "RETURN ") {
		line = p.report()
	}
	if line != "ERROR closing the worker is closing" {
		p.t.Errorf("got %q", line)
	}
	p.expectEnd()
}

// runs gives the lines of tasks first to last, with their numbers for
// instruction.
func runs(first, last int) []string {
	var lines []string
	for i := first; i <= last; i++ {
		lines = append(lines, fmt.Sprintf("RUN %d 1 0 i%d", i, i))
	}
	return lines
}

// workerTest is a worker that serves, and the way to it.
type workerTest struct {
	t      *testing.T
	worker *Worker
	stop   context.CancelCauseFunc // ends Serve's ctx
	served chan struct{}           // closed when Serve has returned
	err    error                   // Serve's, after that
	connect
}

// connect makes a connection to a worker.
type connect func() net.Conn

// serveTest starts a worker on ln. The test's end stops it and waits for it.
func serveTest(t *testing.T, ln net.Listener, dial connect, handler Handler, opts ...WorkerOption) *workerTest {
	ctx, stop := context.WithCancelCause(t.Context())
	wt := &workerTest{
		t:       t,
		worker:  NewWorker(handler, append([]WorkerOption{WithName("w")}, opts...)...),
		stop:    stop,
		served:  make(chan struct{}),
		connect: dial,
	}
	go func() {
		defer close(wt.served)
		wt.err = wt.worker.Serve(ctx, ln)
	}()
	t.Cleanup(func() {
		stop(errors.New("the test is over"))
		<-wt.served
	})
	return wt
}

// stranger is connected, and has said nothing.
func (wt *workerTest) stranger() *peer {
	conn := wt.connect()
	wt.t.Cleanup(func() { conn.Close() })
	return newPeer(wt.t, conn)
}

// session is a peer that has exchanged greetings.
func (wt *workerTest) session() *peer {
	wt.t.Helper()
	p := wt.stranger()
	p.send(helloA)
	p.expect("WELCOME taskexec/1 …")
	return p
}

// expectServing fails the test unless the worker takes a session and a task.
func (wt *workerTest) expectServing() {
	wt.t.Helper()
	p := wt.session()
	p.send("RUN 0 1 0 still there?")
	p.expectReports("DONE 0 still there?")
	p.conn.Close()
}

// expectServed waits for Serve, and compares what it returned.
func (wt *workerTest) expectServed(want error) {
	wt.t.Helper()
	<-wt.served
	if !errors.Is(wt.err, want) {
		wt.t.Errorf("Serve returned %v, want %v", wt.err, want)
	}
}

// only is the worker's session when it has just one.
func (wt *workerTest) only() *workerSession {
	wt.t.Helper()
	wt.worker.mu.Lock()
	defer wt.worker.mu.Unlock()
	if len(wt.worker.sessions) != 1 {
		wt.t.Fatalf("the worker has %d sessions, want 1", len(wt.worker.sessions))
	}
	for s := range wt.worker.sessions {
		return s
	}
	return nil
}

// startWorker is a worker on a network in memory; for tests in a bubble.
func startWorker(t *testing.T, handler Handler, opts ...WorkerOption) *workerTest {
	network := new(memNetwork)
	return serveTest(t, network.listen("w:1"), func() net.Conn {
		conn, err := network.dial(t.Context(), "mem", "w:1")
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}, handler, opts...)
}

// startFunc makes a worker on the network of a test that has several.
type startFunc func(t *testing.T, handler Handler, opts ...WorkerOption) *workerTest

// pipeAndTCP runs body over net.Pipe in a bubble of fake time, and over TCP,
// without TLS and with. No goroutine may be left.
func pipeAndTCP(t *testing.T, body func(t *testing.T, start startFunc)) {
	t.Run("pipe", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { body(t, startWorker) })
	})
	for _, network := range []struct {
		name  string
		start startFunc
	}{{"tcp", startTCPWorker}, {"tls", startTLSWorker}} {
		t.Run(network.name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			t.Run("session", func(t *testing.T) { body(t, network.start) })
			for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					buf := make([]byte, 1<<20)
					t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
				}
			}
		})
	}
}

func startTCPWorker(t *testing.T, handler Handler, opts ...WorkerOption) *workerTest {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveTest(t, ln, func() net.Conn {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(20 * time.Second)) // a broken promise should not cost the whole -timeout
		return conn
	}, handler, opts...)
}

// parrot is done at once, and its output is the instruction.
var parrot = HandlerFunc(echo)

// gate is a handler that tells when it starts a task and lets the test say
// when it ends. A ctx that ends ends it too.
type gate struct {
	started chan string   // instructions
	release chan struct{} // a token for each task that may end, or closed for all
}

func newGate() *gate {
	return &gate{started: make(chan string, 2*windowTasks), release: make(chan struct{}, 2*windowTasks)}
}

func (g *gate) Handle(ctx context.Context, task Task) (string, error) {
	g.started <- task.Instruction
	select {
	case <-g.release:
		return task.Instruction, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// expectStarted waits until tasks have started, in this order.
func (g *gate) expectStarted(t *testing.T, instructions ...string) {
	t.Helper()
	for _, want := range instructions {
		if got := <-g.started; got != want {
			t.Errorf("task %q started, want %q", got, want)
		}
	}
}

// expectNothingStarted is for a bubble in which all that happens has happened.
func (g *gate) expectNothingStarted(t *testing.T) {
	t.Helper()
	synctest.Wait()
	select {
	case got := <-g.started:
		t.Errorf("task %q started, want none", got)
	default:
	}
}

// deaf is a handler that ignores its ctx until the test releases it.
func deaf(g *gate) HandlerFunc {
	return func(ctx context.Context, task Task) (string, error) {
		return g.Handle(context.WithoutCancel(ctx), task)
	}
}

// --- greetings ---

func TestWorkerGreetsWithWhatItIs(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		wt := start(t, parrot, WithSlots(3), WithCategories("a", "é"), WithName("lab 1"))
		p := wt.stranger()
		p.send(`HELLO taskexec/1 {"category":"a","from":"the future","features":["x"]}`)
		m, err := parseMessage(p.next())
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseWelcome(m)
		if err != nil {
			t.Fatal(err)
		}
		want := welcome{
			Worker: "lab 1", Instance: wt.worker.instance, Categories: []string{"a", "é"},
			Slots: 3, Window: 4096, MaxLine: 1 << 20, Heartbeat: true,
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("WELCOME (-want +got):\n%s", d)
		}
	})
}

func TestAWorkerMayHaveSlotsWithoutLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const tasks = 500
		var together sync.WaitGroup
		together.Add(tasks)
		c := newTestCoordinator(t, serveMem(t, HandlerFunc(func(context.Context, Task) (string, error) {
			together.Done()
			together.Wait()
			return "", nil
		}), "a", WithSlots(math.MaxInt))...)
		if _, err := c.Run(t.Context(), tasksOf("a", tasks)); err != nil {
			t.Error(err)
		}
	})
}

func TestEachWorkerHasAnInstanceOfItsOwn(t *testing.T) {
	if a, b := NewWorker(parrot), NewWorker(parrot); a.instance == b.instance || len(a.instance) < 16 {
		t.Errorf("instances %q and %q", a.instance, b.instance)
	}
}

func TestBadGreetingIsAnsweredWithItsFaultAndHarmsNobody(t *testing.T) {
	cases := []struct {
		name, input, want string
		reason            string
	}{
		{"http", "GET / HTTP/1.1\r\nHost: w\r\n\r\n", `ERROR protocol this is a worker of taskexec/1, which expects HELLO first: unknown verb "GET"…`, "a browser came by"},
		{"version 2", "HELLO taskexec/2 {\"category\":\"a\"}\n", `ERROR version this side speaks taskexec/1, not "taskexec/2"`, "a later coordinator"},
		{"no version", "HELLO\n", "ERROR protocol …", "HELLO needs two fields"},
		{"tls", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", "ERROR protocol …", "a TLS client of a plaintext worker"},
		{"garbage", "\x00\xff\xfe\n", `ERROR protocol …`, "no text at all"},
		{"empty line", "\n", `ERROR protocol …`, "the line is there, and has no verb"},
		{"other verb", "RUN 0 1 0 x\n", "ERROR protocol this is a worker of taskexec/1, which expects HELLO first, not RUN", "a good line at the wrong time"},
		{"wrong role", "WELCOME taskexec/1 {}\n", "ERROR protocol this is a worker of taskexec/1, which expects HELLO first, not WELCOME", "two workers connected with each other"},
		{"no object", "HELLO taskexec/1 \n", "ERROR greeting HELLO needs a JSON object…", "empty text is no JSON"},
		{"half an object", "HELLO taskexec/1 {\"category\":\n", "ERROR greeting the object of HELLO is not …", "JSON ends early"},
		{"two objects", "HELLO taskexec/1 {\"category\":\"a\"}{}\n", "ERROR greeting the object of HELLO is not …", "one object, no more"},
		{"wrong type", "HELLO taskexec/1 {\"category\":1}\n", "ERROR greeting the object of HELLO is not …", "a category is a string"},
		{"no category", "HELLO taskexec/1 {}\n", "ERROR greeting HELLO needs a category", "a session is for one category"},
		{"bad category", "HELLO taskexec/1 {\"category\":\"a\\u0007\"}\n", `ERROR greeting category "a\\a" is not 1 to 255 bytes of UTF-8 without control characters`, "it would ring in logs"},
		{"long run", "HELLO taskexec/1 {\"category\":\"a\",\"run\":\"" + strings.Repeat("r", 256) + "\"}\n", `ERROR greeting run "rrr…`, "names are short"},
		{"negative timeout", "HELLO taskexec/1 {\"category\":\"a\",\"timeout_ms\":-1}\n", "ERROR greeting timeout_ms -1 is out of range", "no time is negative"},
		{"small max_line", "HELLO taskexec/1 {\"category\":\"a\",\"max_line\":4095}\n", "ERROR greeting max_line 4095 is not …", "a FAIL must fit"},
		{"long", helloA + strings.Repeat(" ", greetingLimit-len(helloA)) + "\n", "ERROR line …", "4 KiB and a byte, newline included"},
		{"endless", strings.Repeat("x", greetingLimit+1), "ERROR line a line is over the limit of 4096 bytes", "no newline is waited for"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			pipeAndTCP(t, func(t *testing.T, start startFunc) {
				wt := start(t, parrot)
				p := wt.stranger()
				io.WriteString(p.conn, c.input) // what comes after the fault may find the connection closed
				p.expect(c.want)
				p.expectEnd()
				wt.expectServing()
				if t.Failed() {
					t.Log("the case's reason:", c.reason)
				}
			})
		})
	}
}

func TestLongestGreetingIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, parrot).stranger()
		p.send(helloA + strings.Repeat(" ", greetingLimit-1-len(helloA)))
		p.expect("WELCOME taskexec/1 …")
	})
}

// The peer's limit before WELCOME is that of a greeting.
func TestErrorOverAGreetingFitsInAGreetingsLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, parrot).stranger()
		head, tail := `HELLO taskexec/1 {"category":"a","timeout_ms":`, `}`
		p.send(head + strings.Repeat("1", greetingLimit-1-len(head)-len(tail)) + tail)
		line := p.next()
		if !strings.HasPrefix(line, "ERROR greeting ") || len(line)+1 > greetingLimit {
			t.Errorf("got a line of %d bytes, %q", len(line), cut(line, 100))
		}
	})
}

func TestSilentOrHalfGreetingTimesOut(t *testing.T) {
	for _, input := range []string{"", "HELLO taskexec/1 {\"cat"} {
		synctest.Test(t, func(t *testing.T) {
			wt := startWorker(t, parrot, WithHandshakeTimeout(3*time.Second))
			p := wt.stranger()
			io.WriteString(p.conn, input)
			start := time.Now()
			p.expect("ERROR timeout no HELLO within 3s")
			p.expectEnd()
			if d := time.Since(start); d != 3*time.Second {
				t.Errorf("after %v, want 3s", d)
			}
			wt.expectServing()
		})
	}
}

func TestHandshakeTimeoutEndsWithTheHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, parrot).session()
		time.Sleep(24 * time.Hour)
		p.send("RUN 0 1 0 x")
		p.expectReports("DONE 0 x")
	})
}

// A half line whose sender reads on is told what is wrong with it.
func TestHalfLineIsAnsweredWithItsFault(t *testing.T) {
	wt := startTCPWorker(t, parrot)
	for input, p := range map[string]*peer{"HELLO taskexec/1 {\"cat": wt.stranger(), "RUN 0 1 0 x": wt.session()} {
		io.WriteString(p.conn, input)
		p.conn.(*net.TCPConn).CloseWrite()
		p.expect("ERROR syntax connection closed inside a line")
		p.expectEnd()
		wt.expectServing()
	}
}

// A connection that says nothing of its halves stays open after the last words,
// so that input which is not read yet does not cost the peer what was written.
func TestAfterLastWordsAConnectionWithoutHalvesIsStillRead(t *testing.T) {
	for _, addr := range []net.Addr{tcpAddr(t, "127.0.0.1:1"), nil} { // a connection of the program's own may have no address
		synctest.Test(t, func(t *testing.T) {
			client, server := net.Pipe()
			returned := make(chan error, 1)
			go func() { returned <- NewWorker(parrot).ServeConn(t.Context(), addrConn{server, addr, addr}) }()
			p := newPeer(t, client)
			p.send(helloA)
			p.expect("WELCOME …")
			p.send("DONE 1 1")
			p.expect("ERROR state …")
			synctest.Wait()
			p.send("PING 1")
			p.conn.Close()
			<-returned
		})
	}
}

// --- tasks and reports ---

func TestTaskIsExecutedAndReported(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		var got Task
		wt := start(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			got = task
			if strings.HasPrefix(task.Instruction, "bad") {
				return "ignored", errors.New("no such thing:\n" + task.Instruction)
			}
			return "did " + task.Instruction, nil
		}))
		p := wt.session()
		p.send("RUN 7 1 0 paint it")
		p.expectReports("DONE 7 did paint it")
		if d := cmp.Diff(Task{Category: "a", Instruction: "paint it"}, got); d != "" {
			t.Errorf("the handler's task (-want +got):\n%s", d)
		}
		p.send("RUN 7 2 0 bad one") // a number is free again once it is reported
		p.expectReports("FAIL 7 error no such thing:\nbad one")
		p.send("RUN 8 1 0")
		p.expectReports("DONE 8 did ")
	})
}

func TestDoneSaysHowLongTheHandlerTook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, HandlerFunc(func(context.Context, Task) (string, error) {
			time.Sleep(1500*time.Microsecond + 1)
			return "", nil
		})).session()
		p.send("RUN 0 1 0 a", "RUN 1 1 0 b")
		p.expect("DONE 0 1501", "DONE 1 1501") // each its own time, without that in the queue
	})
}

func TestTheWaitOfAReportIsNotTheNextTasksTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, HandlerFunc(func(context.Context, Task) (string, error) {
			return strings.Repeat("x", 600<<10), nil
		})).session()
		p.send(runs(1, 4)...)
		time.Sleep(5 * time.Second) // for which the third report waits for room
		p.expect("DONE 1 0 x…", "DONE 2 0 x…", "DONE 3 0 x…", "DONE 4 0 x…")
	})
}

func TestBytesOfAnyKindSurvive(t *testing.T) {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	texts := []string{string(all), "", " ", "\n", "\r\n", `\`, `\n`, "a  b ", "日本語", "\xff\xfe", strings.Repeat("\n\\", 100_000)}
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		seen := make(chan string, len(texts))
		p := start(t, HandlerFunc(func(_ context.Context, task Task) (string, error) {
			seen <- task.Instruction
			return task.Instruction, nil
		})).session()
		for i, text := range texts {
			p.conn.Write(appendMessage(nil, message{verb: verbRun, task: i, attempt: 1, text: text}))
			p.expectReports(fmt.Sprintf("DONE %d %s", i, text))
			if got := <-seen; got != text {
				t.Errorf("the handler got %q, want %q", cut(got, 300), cut(text, 300))
			}
		}
	})
}

func TestTasksOfASessionStartInTheOrderTheyCame(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		p := start(t, parrot).session()
		const n = 1000
		go p.send(runs(1, n)...) // in many reads
		for i := 1; i <= n; i++ {
			p.expectReports(fmt.Sprintf("DONE %d i%d", i, i))
		}
	})
}

func TestHandlersAtOnceAreAsManyAsSlots(t *testing.T) {
	const slots, sessions, each = 3, 4, 50
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		var now, peak atomic.Int32
		full := make(chan struct{}) // closed when all slots have been busy at once
		var once sync.Once
		wt := start(t, HandlerFunc(func(context.Context, Task) (string, error) {
			n := now.Add(1)
			defer now.Add(-1)
			for {
				old := peak.Load()
				if n <= old || peak.CompareAndSwap(old, n) {
					break
				}
			}
			if n == slots {
				once.Do(func() { close(full) })
			}
			<-full
			return "", nil
		}), WithSlots(slots))
		var peers sync.WaitGroup
		for range sessions {
			p := wt.session()
			peers.Go(func() {
				p.send(runs(1, each)...)
				for range each {
					p.expectReports("DONE …")
				}
			})
		}
		peers.Wait()
		if got := peak.Load(); got != slots {
			t.Errorf("at most %d handlers at once, want %d", got, slots)
		}
		wt.worker.mu.Lock()
		defer wt.worker.mu.Unlock()
		if wt.worker.free > slots {
			t.Errorf("%d slots are free, of %d", wt.worker.free, slots)
		}
	})
}

func TestFreeSlotsComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g, WithSlots(3))
		p, q := wt.session(), wt.session()
		p.send(runs(1, 5)...)
		q.send(runs(1, 5)...)
		synctest.Wait()
		close(g.release)
		synctest.Wait()
		p.conn.Close()
		q.conn.Close()
		synctest.Wait()
		wt.worker.mu.Lock()
		defer wt.worker.mu.Unlock()
		if wt.worker.free != 3 || len(wt.worker.turns) != 0 {
			t.Errorf("%d slots free and %d turns, want 3 and 0", wt.worker.free, len(wt.worker.turns))
		}
	})
}

func TestTurnsBetweenSessionsAreFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g)
		long, short, late := wt.session(), wt.session(), wt.session()
		long.send(runs(1, 1000)...)
		g.expectStarted(t, "i1")
		short.send("RUN 1 1 0 s1", "RUN 2 1 0 s2")
		synctest.Wait()
		late.send("RUN 1 1 0 l1", "RUN 2 1 0 l2", "RUN 3 1 0 l3")
		synctest.Wait()
		go io.Copy(io.Discard, long.conn)
		for range 8 {
			g.release <- struct{}{}
		}
		g.expectStarted(t, "i2", "s1", "l1", "i3", "s2", "l2", "i4", "l3")
		short.expectReports("DONE 1 s1", "DONE 2 s2")
		late.expectReports("DONE 1 l1", "DONE 2 l2")
	})
}

func TestReportDoesNotWaitForAnotherHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, HandlerFunc(func(_ context.Context, task Task) (string, error) {
			if task.Instruction == "slow" {
				time.Sleep(time.Hour)
			}
			return "", nil
		}), WithSlots(2)).session()
		start := time.Now()
		p.send("RUN 0 1 0 slow", "RUN 1 1 0 fast", "RUN 2 1 0 fast")
		p.expect("DONE 1 0", "DONE 2 0")
		if d := time.Since(start); d != 0 {
			t.Errorf("the fast tasks were reported after %v", d)
		}
		p.expect("DONE 0 3600000000")
	})
}

func TestOneSlotReportsEachTaskBeforeTheNextEnds(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		g := newGate()
		p := start(t, g).session()
		p.send(runs(1, 2)...)
		g.expectStarted(t, "i1")
		g.release <- struct{}{}
		g.expectStarted(t, "i2")
		p.expectReports("DONE 1 i1") // though i2 blocks
	})
}

func TestPingIsAnsweredWhileAllSlotsAreBusy(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		g := newGate()
		p := start(t, g).session()
		p.send(append(runs(1, 100), "PING 5")...)
		p.expect("PONG 5")
		p.send(fmt.Sprint("PING ", maxNumber), "PONG 3")
		p.expect(fmt.Sprint("PONG ", maxNumber))
	})
}

// bigOutputs returns n bytes for each task, and counts its starts.
func bigOutputs(n int, started *atomic.Int32) HandlerFunc {
	output := strings.Repeat("x", n)
	return func(context.Context, Task) (string, error) {
		started.Add(1)
		return output, nil
	}
}

func TestPongOvertakesReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var started atomic.Int32
		p := startWorker(t, bigOutputs(50_000, &started)).session()
		p.send(runs(1, 10)...)
		synctest.Wait() // the reports stand in line, the first in Write
		p.send("PING 1")
		var order []string
		for range 11 {
			line := p.next()
			verb, _, _ := strings.Cut(line, " ")
			order = append(order, verb)
		}
		if i := slices.Index(order, "PONG"); i < 0 || i > 2 {
			t.Errorf("got %q, want PONG among the first", order)
		}
	})
}

func TestCancelIsSeenWhileThePeerReadsNoReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		canceled := make(chan error, 1)
		output := strings.Repeat("x", 600<<10)
		p := startWorker(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			if task.Instruction == "i1" {
				<-ctx.Done()
				canceled <- context.Cause(ctx)
			}
			return output, nil
		}), WithSlots(2)).session()
		p.send(runs(1, 20)...)
		synctest.Wait() // one slot runs i1, the other waits for room
		p.send("CANCEL enough")
		synctest.Wait()
		select {
		case err := <-canceled:
			if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "enough") {
				t.Errorf("cause %v", err)
			}
		default:
			t.Error("CANCEL has not reached the handler")
		}
	})
}

func TestReportBufferIsBoundedAndAFinishedHandlerKeepsItsSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const slots, tasks, size = 4, 40, 300_000
		var started atomic.Int32
		wt := startWorker(t, bigOutputs(size, &started), WithSlots(slots))
		p := wt.session()
		p.send(runs(1, tasks)...)
		synctest.Wait()
		s := wt.only()
		s.mu.Lock()
		held := len(s.out) + s.writing
		s.mu.Unlock()
		if most := reportBytes + size + 100; held > most || held < reportBytes {
			t.Errorf("%d bytes of reports are held, want 1 MiB and at most one line", held)
		}
		// 4 reports stand in the buffer, and each slot holds one.
		if got := started.Load(); got != 4+slots {
			t.Errorf("%d handlers were called, want %d", got, 4+slots)
		}
		p.send("PING 1") // and the reader still reads
		got := make(map[int]bool)
		for range tasks + 1 {
			m, err := parseMessage(p.next())
			if err != nil {
				t.Fatal(err)
			}
			if m.verb == verbDone {
				got[m.task] = true
			}
		}
		if len(got) != tasks {
			t.Errorf("%d tasks were reported, want %d", len(got), tasks)
		}
	})
}

// A report waits for room while the writer has all the others, and nobody else
// wakes either.
func TestReportWaitingForRoomGoesOnWhenTheOthersAreWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sizes := map[string]int{"i1": 270 << 10, "i2": 700 << 10, "i3": 1000 << 10, "i4": 1}
		p := startWorker(t, HandlerFunc(func(_ context.Context, task Task) (string, error) {
			return strings.Repeat("x", sizes[task.Instruction]), nil
		})).session()
		p.send(runs(1, 4)...)
		synctest.Wait()
		p.expectReports("DONE 1 x…", "DONE 2 x…", "DONE 3 x…", "DONE 4 x")
	})
}

func TestRecallIsAnsweredBesideAFullReportBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// The fullest that reports can make it: 1 MiB, and then a whole line.
		sizes := map[string]int{"i1": 1<<20 - 20, "i2": 1<<20 - 30}
		wt := startWorker(t, HandlerFunc(func(_ context.Context, task Task) (string, error) {
			return strings.Repeat("x", sizes[task.Instruction]), nil
		}))
		p := wt.session()
		p.send(runs(1, 1000)...)
		synctest.Wait()
		s := wt.only()
		s.mu.Lock()
		held := len(s.out) + s.writing
		s.mu.Unlock()
		if held < 2*reportBytes-100 {
			t.Fatalf("%d bytes are held", held)
		}
		var recalls []string
		for i := 900; i < 1000; i++ {
			recalls = append(recalls, fmt.Sprintf("RECALL %d", i))
		}
		p.send(recalls...)
		synctest.Wait() // all are answered before a report leaves
		counts := make(map[verb]int)
		for range 1000 {
			m, err := parseMessage(p.next())
			if err != nil {
				t.Fatal(err)
			}
			counts[m.verb]++
		}
		if d := cmp.Diff(map[verb]int{verbDone: 900, verbReturn: 100}, counts); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	})
}

func TestPeerThatReadsNothingForTheWriteTimeoutLosesItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		canceled := make(chan error, 1)
		wt := startWorker(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			if task.Instruction == "i2" {
				<-ctx.Done()
				canceled <- context.Cause(ctx)
			}
			return task.Instruction, nil
		}), WithSlots(2))
		p := wt.session()
		start := time.Now()
		p.send(runs(1, 2)...)
		if err := <-canceled; !errors.Is(err, errSessionLost) {
			t.Errorf("cause %v", err)
		}
		if d := time.Since(start); d < writeTimeout || d > writeTimeout+lastWordsTimeout {
			t.Errorf("after %v", d)
		}
		wt.expectServing()
	})
}

// --- what a coordinator may not do ---

func TestBadLineIsAnsweredWithItsFaultAndHarmsNobody(t *testing.T) {
	cases := []struct{ line, want, reason string }{
		{"", "ERROR syntax unknown verb …", "an empty line has no verb"},
		{"GARBAGE", `ERROR syntax unknown verb "GARBAGE" in line "GARBAGE"`, "no such verb"},
		{"run 0 1 0 x", "ERROR syntax unknown verb …", "verbs are in capitals"},
		{"\x00\x01\xff", "ERROR syntax unknown verb …", "binary"},
		{"RUN", "ERROR syntax missing field …", "a field of each kind left out"},
		{"RUN 0", "ERROR syntax missing field …", "no attempt"},
		{"RUN 0 1", "ERROR syntax missing field …", "no timeout"},
		{"RUN  0 1 0 x", "ERROR syntax missing field …", "one space, not two"},
		{"RUN -1 1 0 x", `ERROR syntax bad number "-1" …`, "no signs"},
		{"RUN +1 1 0 x", `ERROR syntax bad number "+1" …`, "no signs"},
		{"RUN 01 1 0 x", `ERROR syntax bad number "01" …`, "each number has one form"},
		{"RUN 0x1 1 0 x", `ERROR syntax bad number "0x1" …`, "decimal"},
		{"RUN 0 0 0 x", "ERROR syntax attempts are numbered from 1 …", "attempt 0"},
		{"RUN 9007199254740992 1 0 x", "ERROR syntax number …", "2⁵³ is no number of every language"},
		{"RUN 99999999999999999999999999 1 0 x", "ERROR syntax number …", "over 64 bits"},
		{"RUN 0 1 1000000000001 x", "ERROR syntax number …", "a time.Duration would overflow"},
		{`RUN 0 1 0 a\tb`, "ERROR syntax bad escape …", `only \\ \n \r`},
		{`RUN 0 1 0 a\`, "ERROR syntax bad escape …", "an escape cut off"},
		{"RUN 0 1 0 x\r", "ERROR syntax bad escape …", "a line ends in \\n alone"},
		{"RECALL", "ERROR syntax missing field …", "recall what?"},
		{"RECALL 1 2", "ERROR syntax more than the verb takes …", "one at a time"},
		{"PING", "ERROR syntax missing field …", "nothing to send back"},
		{"PING x", "ERROR syntax bad number …", "a number to send back"},
		{"SHUTDOWN now", "ERROR syntax more than the verb takes …", "no argument"},
		{"HELLO taskexec/1 {\"category\":\"a\"}", "ERROR state a coordinator may not send HELLO here", "one greeting a session"},
		{"WELCOME taskexec/1 {}", "ERROR state a coordinator may not send WELCOME here", "a worker's verb"},
		{"DONE 0 0", "ERROR state a coordinator may not send DONE here", "a worker's verb"},
		{"FAIL 0 error 0 x", "ERROR state a coordinator may not send FAIL here", "a worker's verb"},
		{"FAIL 0 odd 0 x", `ERROR syntax unknown kind "odd" …`, "no such kind"},
		{"RETURN 0", "ERROR state a coordinator may not send RETURN here", "a worker's verb"},
		{"DRAIN", "ERROR state a coordinator may not send DRAIN here", "a worker's verb"},
		{"GOODBYE x", "ERROR state a coordinator may not send GOODBYE here", "a worker's verb"},
		{"RUN 5 1 0 again", "ERROR task task 5 is already in flight", "the running task's number"},
		{"RUN 6 1 0 again", "ERROR task task 6 is already in flight", "the waiting task's number"},
		{"RUN 6 1 0 again\nPING 1", "ERROR task task 6 is already in flight", "as well if more has come than the task"},
		{"RUN 0 1 0 " + strings.Repeat("x", 1<<20), "ERROR line …", "a line over 1 MiB"},
	}
	for _, c := range cases {
		t.Run(cut(c.line, 40), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ended := make(chan error, 1)
				wt := startWorker(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
					if task.Instruction == "i5" {
						<-ctx.Done()
						ended <- context.Cause(ctx)
					}
					if task.Instruction == "i6" {
						t.Error("a task was started after its session's fault")
					}
					return task.Instruction, nil
				}))
				p := wt.session()
				p.send(runs(5, 6)...)
				synctest.Wait()
				start := time.Now()
				io.WriteString(p.conn, c.line+"\n")
				p.expect(strings.Replace(c.want, " …", "…", 1))
				p.expectEnd()
				if err := <-ended; !errors.Is(err, errSessionLost) {
					t.Errorf("the running handler's cause is %v", err)
				}
				if d := time.Since(start); d != 0 {
					t.Errorf("it took %v", d)
				}
				wt.expectServing()
				if t.Failed() {
					t.Log("the case's reason:", c.reason)
				}
			})
		})
	}
}

// The peer that broke the rules may leave its last words unread for a second;
// its tasks do not run on meanwhile.
func TestLineOverTheLimitIsNotKeptWhileLastWordsAreWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, parrot)
		p := wt.session()
		io.WriteString(p.conn, strings.Repeat("x", defaultMaxLine)) // and does not read why that was too long
		synctest.Wait()
		if n := cap(wt.only().wire.in.buf); n > 0 {
			t.Errorf("%d bytes of it are kept", n)
		}
	})
}

func TestFaultEndsTheSessionsTasksBeforeLastWordsAreRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g)
		p := wt.session()
		p.send(runs(1, 100)...)
		g.expectStarted(t, "i1")
		p.send("NONSENSE")
		synctest.Wait()
		g.expectNothingStarted(t)
		other := wt.session() // the slot is free for others
		other.send("RUN 1 1 0 other")
		synctest.Wait()
		g.expectStarted(t, "other")
		p.expect("ERROR syntax …")
	})
}

func TestWindowExceededIsAnError(t *testing.T) {
	cases := []struct {
		name   string
		fits   []string
		over   string
		reason string
	}{
		{"tasks", runs(1, 4096), "RUN 5000 1 0 x", "4096 short tasks are granted"},
		{"bytes", []string{"RUN 1 1 0 " + strings.Repeat("x", 700<<10)}, "RUN 2 1 0 " + strings.Repeat("x", 400<<10), "together over 1 MiB"},
		{"one byte", []string{"RUN 1 1 0 " + strings.Repeat("x", 600<<10)}, "RUN 2 1 0 " + strings.Repeat("x", 424<<10+1), "together one byte over 1 MiB"},
		{"to the byte", []string{"RUN 1 1 0 " + strings.Repeat("x", 600<<10), "RUN 2 1 0 " + strings.Repeat("x", 424<<10)}, "RUN 3 1 0", "1 MiB is granted"},
		{"one", []string{"RUN 1 1 0 " + strings.Repeat("x", 1<<20-11)}, "RUN 2 1 0 x", "one task of any size is granted, and fills the window"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				wt := startWorker(t, g)
				p := wt.session()
				p.send(append(c.fits, "PING 1")...)
				p.expect("PONG 1")
				p.send(c.over)
				p.expect("ERROR window more in flight than the 4096 tasks and 1048576 bytes granted")
				p.expectEnd()
				if t.Failed() {
					t.Log("the case's reason:", c.reason)
				}
			})
		})
	}
}

func TestWindowIsGivenBackByReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, HandlerFunc(func(context.Context, Task) (string, error) { return "", nil })).session()
		text := strings.Repeat("x", 600<<10)
		for i := range 10 {
			p.send(fmt.Sprintf("RUN %d 1 0 %s", i, text))
			p.expectReports(fmt.Sprintf("DONE %d ", i))
		}
	})
}

func TestRunOfACategoryNotServedIsAnError(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		wt := start(t, HandlerFunc(func(context.Context, Task) (string, error) {
			t.Error("the handler was called")
			return "", nil
		}), WithCategories("b", "c"))
		p := wt.session() // for a: WELCOME says what is served, and the coordinator judges
		p.send("PING 1")
		p.expect("PONG 1")
		p.send("RUN 0 1 0 x")
		p.expect(`ERROR category this worker does not serve category "a"`)
		p.expectEnd()
	})
}

func TestFloodOfPingsWhosePongsAreNotReadIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, parrot)
		p := wt.session()
		var pings strings.Builder
		for pings.Len() < 64<<10 {
			pings.WriteString("PING 1\n")
		}
		go io.WriteString(p.conn, pings.String())
		synctest.Wait()
		all, err := io.ReadAll(p.in)
		if lines := strings.SplitAfter(string(all), "\n"); err != nil || !strings.HasPrefix(lines[len(lines)-2], "ERROR flood ") {
			t.Errorf("got %d lines, the last %q, and %v", len(lines), lines[len(lines)-2], err)
		}
		if len(all) > 4*urgentBytes {
			t.Errorf("%d bytes of PONGs were held", len(all))
		}
		wt.expectServing()
	})
}

func TestRunRecallLoopIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g)
		p := wt.session()
		p.send(runs(1, 2000)...) // the list of waiting jobs is long
		g.expectStarted(t, "i1")
		s := wt.only()
		big := strings.Repeat("x", 400<<10)
		for i := range 40 {
			p.send(fmt.Sprintf("RUN %d 1 0 %s", 5000+i, big), fmt.Sprintf("RECALL %d", 5000+i))
			p.expectReports(fmt.Sprintf("RETURN %d", 5000+i))
		}
		synctest.Wait()
		s.mu.Lock()
		held, length := 0, len(s.waiting.list)
		for _, j := range s.waiting.all() {
			held += taskCost(len(j.instruction))
		}
		s.mu.Unlock()
		if length > 2*windowTasks || held > 2*windowBytes {
			t.Errorf("%d bytes of instructions are held in a list of %d", held, length)
		}
	})
}

func TestReturnsThatAreNotReadAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g)
		p := wt.session()
		p.send("RUN 1 1 0 x")
		g.expectStarted(t, "x")
		s := wt.only()
		loop := strings.Repeat(fmt.Sprintf("RUN %d 1 0 y\nRECALL %[1]d\n", maxNumber), 1000)
		peak, wrote := 0, 0
		for wrote < 64<<20 {
			n, err := io.WriteString(p.conn, loop)
			wrote += n
			s.mu.Lock()
			peak = max(peak, len(s.out)+s.writing)
			s.mu.Unlock()
			if err != nil {
				break
			}
		}
		if peak > 4*reportBytes || wrote >= 64<<20 {
			t.Errorf("%d bytes of answers were held, after %d bytes of input", peak, wrote)
		}
	})
}

// Nothing that is over stays with a worker whose slots are long busy.
func TestSessionsThatAreOverLeaveNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g)
		busy := wt.session()
		busy.send("RUN 1 1 0 x")
		g.expectStarted(t, "x")
		for range 100 {
			p := wt.session()
			p.send(runs(1, 10)...)
			synctest.Wait()
			p.conn.Close()
		}
		synctest.Wait()
		wt.worker.mu.Lock()
		defer wt.worker.mu.Unlock()
		if n := len(wt.worker.turns); n > 0 {
			t.Errorf("%d sessions that are over wait for a turn", n)
		}
		if n := len(wt.worker.sessions); n != 1 {
			t.Errorf("%d sessions, want 1", n)
		}
	})
}

func TestATurnForNothingLeavesNoSlotBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g)
		idle := wt.session()
		s := wt.only()
		busy := wt.session()
		for i := range 100 {
			busy.send(fmt.Sprintf("RUN %d 1 0 x", i))
			g.expectStarted(t, "x")
			idle.send(runs(1, 3)...)
			idle.send("RECALL 1", "RECALL 2", "RECALL 3")
			idle.expect("RETURN 1", "RETURN 2", "RETURN 3")
			g.release <- struct{}{}
			busy.expectReports(fmt.Sprintf("DONE %d x", i))
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if n := len(s.slotList); n > 1 {
			t.Errorf("%d slots were made for a session that has executed nothing", n)
		}
	})
}

func TestLongReportsLeaveNoLongBuffersBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, bigOutputs(1<<20-100, new(atomic.Int32)))
		p := wt.session()
		p.send(runs(1, 3)...)
		synctest.Wait()
		for range 3 {
			p.next()
		}
		synctest.Wait()
		s := wt.only()
		s.mu.Lock()
		defer s.mu.Unlock()
		if kept := max(cap(s.out), cap(s.wire.buf)); kept > 2*reportBytes {
			t.Errorf("a buffer of %d bytes is kept", kept)
		}
	})
}

func TestWaitingListDoesNotGrowWithTheTasksThatHavePassed(t *testing.T) {
	var q jobs
	var j job
	q.push(job{number: 0})
	for i := 1; i <= 100_000; i++ { // one always waits, as in any long run
		q.push(job{number: i})
		if !q.next(&j) || j.number != i-1 {
			t.Fatalf("next gave %v, want task %d", j, i-1)
		}
	}
	if n := cap(q.list); n > 1024 {
		t.Errorf("the list has room for %d, and 2 ever waited", n)
	}
}

// --- RECALL and CANCEL ---

func TestRecallReturnsWhatHasNotStartedAndLeavesTheRest(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		g := newGate()
		p := start(t, g).session()
		p.send(runs(1, 4)...)
		g.expectStarted(t, "i1")
		p.send("RECALL 3", "RECALL 1", "RECALL 99", "RECALL 3", "PING 1") // waiting, running, unknown, returned
		p.expectReportsInAnyOrder("RETURN 3", "PONG 1")
		g.release <- struct{}{}
		p.expectReports("DONE 1 i1")
		p.send("RECALL 1", "PING 2") // finished
		p.expect("PONG 2")
		close(g.release)
		p.expectReports("DONE 2 i2", "DONE 4 i4")
		p.send("RUN 3 2 0 i3") // its number is free
		p.expectReports("DONE 3 i3")
	})
}

func TestRecalledTaskDoesNotRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		p := startWorker(t, g).session()
		p.send(runs(1, 100)...)
		g.expectStarted(t, "i1")
		var recalls, returns, dones []string
		for i := 2; i <= 100; i++ {
			if i%3 == 0 {
				dones = append(dones, fmt.Sprintf("DONE %d i%d", i, i))
				continue
			}
			recalls = append(recalls, fmt.Sprintf("RECALL %d", i))
			returns = append(returns, fmt.Sprintf("RETURN %d", i))
		}
		p.send(recalls...)
		p.expectReports(returns...)
		close(g.release)
		p.expectReports("DONE 1 i1")
		p.expectReports(dones...)
	})
}

func TestCancelReachesHandlersWithItsCause(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		causes := make(chan error, 4)
		started := make(chan string, 4)
		p := start(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			started <- task.Instruction
			<-ctx.Done()
			if !errors.Is(ctx.Err(), context.Canceled) {
				t.Errorf("ctx.Err() = %v", ctx.Err())
			}
			causes <- context.Cause(ctx)
			switch task.Instruction {
			case "i1":
				return "", fmt.Errorf("i1: %w", ctx.Err())
			case "i2":
				return "", fmt.Errorf("i2: %w", context.Cause(ctx))
			case "i3":
				return "", errors.New("disk full")
			}
			return "made it", nil
		}), WithSlots(4)).session()
		p.send(runs(1, 6)...)
		for range 4 {
			<-started
		}
		p.send(`CANCEL out of\nmoney`)
		p.expectReportsInAnyOrder("FAIL 1 canceled i1: context canceled",
			`FAIL 2 canceled i2: taskexec: canceled by the coordinator: out of\nmoney`,
			"FAIL 3 error disk full", "DONE 4 made it", "RETURN 5", "RETURN 6")
		if err := <-causes; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), `out of\nmoney`) {
			t.Errorf("cause %v", err)
		}
		p.send("RUN 7 1 0 x", "RUN 8 1 0 x")
		p.expectReports("RETURN 7", "RETURN 8")
		p.send("CANCEL again", "PING 1")
		p.expect("PONG 1")
	})
}

// Between the end of the session's ctx and the taking back of what waits, a
// slot may become free. Here nothing is taken back at all.
func TestTaskDoesNotStartOnceItsSessionIsCanceled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g)
		p := wt.session()
		p.send(runs(1, 4)...)
		g.expectStarted(t, "i1")
		wt.only().cancel(&canceledError{"x"})
		p.expectReports("FAIL 1 canceled …", "RETURN 2", "RETURN 3", "RETURN 4")
		g.expectNothingStarted(t)
	})
}

func TestCancelIsOfOneSession(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		g := newGate()
		wt := start(t, g, WithSlots(2))
		p, q := wt.session(), wt.session()
		p.send("RUN 1 1 0 p")
		g.expectStarted(t, "p")
		q.send("RUN 1 1 0 q")
		g.expectStarted(t, "q")
		p.send("CANCEL stop")
		p.expectReports("FAIL 1 canceled …")
		q.send("PING 1")
		q.expect("PONG 1")
		g.release <- struct{}{}
		q.expectReports("DONE 1 q")
	})
}

func TestContextErrorWithoutCancelIsAnOrdinaryError(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		p := start(t, HandlerFunc(func(_ context.Context, task Task) (string, error) {
			if task.Instruction == "i1" {
				return "", context.Canceled
			}
			return "", context.DeadlineExceeded
		})).session()
		p.send(runs(1, 2)...)
		p.send("RUN 3 1 60000 x") // it has a timeout, which is not over
		p.expectReports("FAIL 1 error context canceled", "FAIL 2 error context deadline exceeded", "FAIL 3 error context deadline exceeded")
	})
}

func TestTimeoutReachesTheHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			deadline, ok := ctx.Deadline()
			if task.Instruction == "none" {
				return fmt.Sprint(ok), nil
			}
			if left := time.Until(deadline); left != 1500*time.Millisecond {
				t.Errorf("the deadline is in %v", left)
			}
			if task.Timeout != 1500*time.Millisecond {
				t.Errorf("the task's timeout is %v", task.Timeout)
			}
			if info, ok := TaskInfoFrom(ctx); !ok || info.Task == 0 {
				t.Errorf("TaskInfo %v, %v", info, ok)
			}
			<-ctx.Done()
			switch task.Instruction {
			case "late":
				return "late", nil
			case "other":
				return "", errors.New("other")
			}
			return "", fmt.Errorf("gave up: %w", ctx.Err())
		}), WithSlots(3)).session()
		start := time.Now()
		p.send("RUN 1 1 1500 obey", "RUN 2 1 1500 late", "RUN 3 1 1500 other")
		p.expectReportsInAnyOrder("FAIL 1 timeout gave up: context deadline exceeded", "DONE 2 late", "FAIL 3 error other")
		if d := time.Since(start); d != 1500*time.Millisecond {
			t.Errorf("after %v", d)
		}
		p.send("RUN 4 1 0 none")
		p.expectReports("DONE 4 false")
	})
}

// A handler that ignores its timeout is reported while it runs, keeps its slot,
// and what it returns is dropped.
func TestStuckHandlerIsReportedOnceAndKeepsItsSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, deaf(g))
		p := wt.session()
		start := time.Now()
		p.send("RUN 1 1 2000 deaf", "RUN 2 1 0 next")
		p.expectReports("FAIL 1 stuck the handler still runs 1s after its timeout of 2s, and keeps its slot")
		if d := time.Since(start); d != 2*time.Second+stuckGrace {
			t.Errorf("after %v", d)
		}
		g.expectStarted(t, "deaf")
		p.send("RUN 1 2 0 deaf") // it does not run beside itself
		p.expectReports("FAIL 1 error an earlier attempt still runs on this worker…")
		if got := wt.worker.Stats(); got.Stuck != 1 || got.Running != 1 || got.Waiting != 1 {
			t.Errorf("Stats: %+v", got)
		}
		time.Sleep(time.Hour)
		g.expectNothingStarted(t)
		g.release <- struct{}{}
		g.expectStarted(t, "next")
		if got := wt.worker.Stats(); got.Stuck != 0 {
			t.Errorf("Stats: %+v", got)
		}
		p.send("RUN 1 3 0 again")
		close(g.release)
		p.expectReports("DONE 2 next", "DONE 1 again")
	})
}

func TestTasksOfRunsWithoutAnIDAreTheirSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		keys := make(map[string]bool)
		g := newGate()
		wt := startWorker(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			info, _ := TaskInfoFrom(ctx)
			mu.Lock()
			keys[info.Key()] = true
			mu.Unlock()
			if task.Instruction == "deaf" {
				return deaf(g)(ctx, task)
			}
			return task.Instruction, nil
		}), WithSlots(2))
		one, other := wt.stranger(), wt.stranger()
		for _, p := range []*peer{one, other} {
			p.send(`HELLO taskexec/1 {"category":"a"}`)
			p.expect("WELCOME …")
		}
		one.send("RUN 0 1 1 deaf")
		one.expectReports("FAIL 0 stuck …")
		other.send("RUN 0 1 0 x")
		other.expectReports("DONE 0 x")
		one.send("RUN 0 2 0 x")
		one.expectReports("FAIL 0 error an earlier attempt still runs on this worker…")
		if len(keys) != 2 {
			t.Errorf("the keys of two tasks are %v", keys)
		}
		close(g.release)
	})
}

func TestShutdownNamesAndWaitsForAStuckHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, deaf(g))
		p := wt.session()
		p.send("RUN 1 1 1 deaf", "SHUTDOWN")
		p.expect("DRAIN", "FAIL 1 stuck …", "GOODBYE Goodbye from w")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := wt.worker.Shutdown(ctx); err == nil || !strings.Contains(err.Error(), "task 1 (deaf), which is stuck") {
			t.Errorf("Shutdown returned %v", err)
		}
		close(g.release)
		if err := wt.worker.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
}

// The handler returns just before it is found stuck, and its report waits for
// room: that is not the handler's fault, and costs the worker no slot.
func TestTaskIsNotStuckWhileItsReportWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var started atomic.Int32
		wt := startWorker(t, bigOutputs(300_000, &started))
		p := wt.session()
		p.send(runs(1, 8)...)
		synctest.Wait()
		s := wt.only()
		s.mu.Lock()
		l := s.slotList[0]
		s.mu.Unlock()
		l.foundStuck(l.ctx)
		got := make(map[int]int)
		for range 8 {
			m, err := parseMessage(p.next())
			if err != nil {
				t.Fatal(err)
			}
			got[m.task]++
			if m.verb != verbDone {
				t.Errorf("task %d: %v %s", m.task, m.verb, m.word)
			}
		}
		p.send("PING 1")
		p.expect("PONG 1")
		if len(got) != 8 {
			t.Errorf("reports by task: %v", got)
		}
		if n := wt.worker.Stats().Stuck; n != 0 {
			t.Errorf("%d handlers count as stuck", n)
		}
	})
}

func TestLostSessionCancelsItsHandlersAndServeConnWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		causes := make(chan error, 1)
		release := make(chan struct{})
		w := NewWorker(HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			if task.Instruction != "i1" {
				t.Errorf("task %s started", task.Instruction)
			}
			<-ctx.Done()
			causes <- context.Cause(ctx)
			<-release
			return "too late", nil
		}))
		returned := make(chan error, 1)
		go func() { returned <- w.ServeConn(t.Context(), server) }()
		p := newPeer(t, client)
		p.send(helloA)
		p.expect("WELCOME …")
		p.send(runs(1, 10)...)
		synctest.Wait()
		client.Close()
		if err := <-causes; !errors.Is(err, errSessionLost) {
			t.Errorf("cause %v", err)
		}
		time.Sleep(time.Minute)
		select {
		case err := <-returned:
			t.Errorf("ServeConn returned %v before the handler", err)
		default:
		}
		close(release)
		if err := <-returned; err != nil {
			t.Errorf("ServeConn returned %v", err)
		}
	})
}

// A handler that outlives its session keeps its slot: the limit holds.
func TestHandlerThatIgnoresItsContextKeepsItsSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, deaf(g))
		p := wt.session()
		p.send("RUN 1 1 0 deaf")
		g.expectStarted(t, "deaf")
		p.conn.Close()
		q := wt.session()
		q.send("RUN 1 1 0 next")
		time.Sleep(time.Hour)
		g.expectNothingStarted(t)
		g.release <- struct{}{}
		g.expectStarted(t, "next")
		g.release <- struct{}{}
		q.expectReports("DONE 1 next")
	})
}

// --- handlers that misbehave ---

type panickyError struct{}

func (*panickyError) Error() string { panic("no text for you") }

//go:noinline
func blowUpOn(what string) (string, error) {
	switch what {
	case "error":
		panic(errors.New("an error"))
	case "string":
		panic("a string")
	case "long":
		panic(strings.Repeat("long ", 10_000))
	case "nil pointer":
		var t *Task
		return t.Instruction, nil
	case "index":
		return "abc"[len(what)-5+10:], nil
	case "again":
		defer func() { panic(fmt.Sprint("again: ", recover())) }()
		panic("first")
	case "Error":
		return "", &panickyError{}
	case "nil Error":
		var e *net.OpError
		return "", e
	case "Goexit":
		runtime.Goexit()
	case "Goexit in panic":
		defer runtime.Goexit()
		panic("lost")
	}
	return what, nil
}

func TestPanicFailsItsTaskAndTheWorkerGoesOn(t *testing.T) {
	cases := []struct {
		what, want string
		frame      string // that the stack must name
	}{
		{"error", "an error\n", "blowUpOn"},
		{"string", "a string\n", "blowUpOn"},
		{"long", "long long ", "blowUpOn"},
		{"nil pointer", "runtime error: invalid memory address", "blowUpOn"},
		{"index", "runtime error: slice bounds", "blowUpOn"},
		{"again", "again: first", "blowUpOn"},
		{"Error", "no text for you\n", "panickyError"},
		{"Goexit", "the handler ended its goroutine (runtime.Goexit)", ""},
		{"Goexit in panic", "the handler ended its goroutine (runtime.Goexit)", ""},
	}
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		wt := start(t, HandlerFunc(func(_ context.Context, task Task) (string, error) { return blowUpOn(task.Instruction) }))
		p := wt.session()
		for i, c := range cases {
			// In one write, so that the next waits for the slot already.
			p.send(fmt.Sprintf("RUN %d 1 0 %s", 2*i, c.what), fmt.Sprintf("RUN %d 1 0 fine", 2*i+1))
			line := p.next()
			m, err := parseMessage(line)
			if err != nil || m.verb != verbFail || m.word != KindPanic || m.task != 2*i || !strings.HasPrefix(m.text, c.want) {
				t.Errorf("%s: got %q, want a FAIL that begins with %q", c.what, line, c.want)
			}
			if !strings.Contains(m.text, c.frame) || len(m.text) > maxFailText {
				t.Errorf("%s: a text of %d bytes, want one that names %s:\n%s", c.what, len(m.text), c.frame, m.text)
			}
			if strings.Contains(m.text, "runtime/debug.Stack") || strings.Contains(m.text, "\npanic(") {
				t.Errorf("%s: the stack begins with the worker's own frames:\n%s", c.what, m.text)
			}
			p.expectReports(fmt.Sprintf("DONE %d fine", 2*i+1))
		}
		q := wt.session() // the slot changes sessions too
		p.send("RUN 1000 1 0 Goexit", "RUN 1001 1 0 Goexit")
		q.send("RUN 1 1 0 fine", "RUN 2 1 0 fine")
		p.expectReports("FAIL 1000 panic …", "FAIL 1001 panic …")
		q.expectReports("DONE 1 fine", "DONE 2 fine")
		wt.expectServing()
	})
}

func TestTypedNilErrorThatPanicsDoesNotHarmTheWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, HandlerFunc(func(_ context.Context, task Task) (string, error) { return blowUpOn(task.Instruction) })).session()
		p.send("RUN 0 1 0 nil Error", "RUN 1 1 0 fine")
		p.expectReports("FAIL 0 …", "DONE 1 fine")
	})
}

func TestOutputTooLongForALineFailsItsTask(t *testing.T) {
	cases := []struct {
		name    string
		maxLine int
		output  string
		want    string
		reason  string
	}{
		{"fits", 4096, strings.Repeat("x", 4096-len("DONE 0 0 \n")), "DONE 0 x…", "to the byte"},
		{"a byte over", 4096, strings.Repeat("x", 4097-len("DONE 0 0 \n")), "FAIL 0 output an output of 4087 bytes does not fit in a line of the coordinator, which takes 4096 bytes, escapes included", "the newline counts"},
		{"escapes", 4096, strings.Repeat("\n", 3000), "FAIL 0 output an output of 3000 bytes does not fit in a line of the coordinator, which takes 4096 bytes, escapes included", "encoded bytes count"},
		{"default", 0, strings.Repeat("x", 1<<20), "FAIL 0 output an output of 1048576 bytes does not fit in a line of the coordinator, which takes 1048576 bytes, escapes included", "1 MiB unless HELLO says otherwise"},
		{"no more than the default", 1 << 30, strings.Repeat("x", 1<<20), "FAIL 0 output an output of 1048576 bytes does not fit in a line of the coordinator, which takes 1048576 bytes, escapes included", "a worker buffers 1 MiB and one line, whatever a peer would read"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				wt := startWorker(t, HandlerFunc(func(_ context.Context, task Task) (string, error) {
					if task.Instruction == "long" {
						return c.output, nil
					}
					return "ok", nil
				}))
				p := wt.stranger()
				p.send(fmt.Sprintf(`HELLO taskexec/1 {"category":"a","max_line":%d}`, c.maxLine))
				p.expect("WELCOME …")
				p.send("RUN 0 1 0 long", "RUN 1 1 0 short")
				p.expectReports(c.want, "DONE 1 ok")
				if t.Failed() {
					t.Log("the case's reason:", c.reason)
				}
			})
		})
	}
}

func TestErrorTooLongIsCut(t *testing.T) {
	for _, c := range []struct {
		text    string
		maxLine int
		reason  string
	}{
		{strings.Repeat("x", 1<<20), 0, "longer than anybody reads"},
		{strings.Repeat("é", 5000), 0, "cut between runes"},
		{strings.Repeat("x", 4096), 4096, "the coordinator's line is shorter than the text alone"},
		{strings.Repeat("\n", 4000), 4096, "escapes make it longer"},
		{strings.Repeat("x", 2040) + strings.Repeat("\n", 20) + "é", 4096, "no cut inside an escape or a rune"},
	} {
		synctest.Test(t, func(t *testing.T) {
			wt := startWorker(t, HandlerFunc(func(context.Context, Task) (string, error) { return "", errors.New(c.text) }))
			p := wt.stranger()
			p.send(fmt.Sprintf(`HELLO taskexec/1 {"category":"a","max_line":%d}`, c.maxLine))
			p.expect("WELCOME …")
			p.send("RUN 0 1 0 x")
			line := p.next()
			m, err := parseMessage(line)
			if err != nil || m.verb != verbFail || m.word != KindError || len(m.text) > maxFailText || len(m.text) < 1000 {
				t.Errorf("got FAIL %s with %d bytes, %v, want error", m.word, len(m.text), err)
			}
			if want := strings.TrimSuffix(m.text, "…"); !strings.HasPrefix(c.text, want) {
				t.Errorf("got %q", cut(m.text, 100))
			}
			if c.maxLine > 0 && len(line)+1 > c.maxLine {
				t.Errorf("a line of %d bytes, over the coordinator's %d", len(line)+1, c.maxLine)
			}
			if t.Failed() {
				t.Log("the case's reason:", c.reason)
			}
		})
	}
}

type mute struct{}

func (mute) Error() string { return "" }

func TestErrorWithoutTextIsNamedByItsType(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, HandlerFunc(func(context.Context, Task) (string, error) { return "", mute{} })).session()
		p.send("RUN 0 1 0 x")
		p.expectReports("FAIL 0 error taskexec.mute without a text")
	})
}

// --- drain ---

func TestShutdownLineDrainsTheWholeWorker(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		g := newGate()
		wt := start(t, g, WithSlots(2))
		p, q, idle := wt.session(), wt.session(), wt.session()
		p.send(runs(1, 1)...)
		g.expectStarted(t, "i1")
		q.send(runs(11, 13)...)
		g.expectStarted(t, "i11")
		q.send("PING 1") // what it sent before has been read
		q.expect("PONG 1")
		p.send("SHUTDOWN")
		p.expect("DRAIN")
		idle.expect("DRAIN", "GOODBYE Goodbye from w")
		q.expect("DRAIN", "RETURN 12", "RETURN 13")
		q.send("RUN 14 1 0 i14")
		q.expect("RETURN 14")
		g.release <- struct{}{}
		g.release <- struct{}{}
		p.expectReports("DONE 1 i1", "GOODBYE Goodbye from w")
		q.expectReports("DONE 11 i11", "GOODBYE Goodbye from w")
		for _, p := range []*peer{p, q, idle} {
			p.expectEnd()
			p.conn.Close() // the worker would give it a second
		}
		wt.expectServed(nil)
		if wt.err != nil {
			t.Errorf("Serve returned %v", wt.err)
		}
		if err := wt.worker.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown after the drain: %v", err)
		}
	})
}

func TestShutdownWaitsForRunningHandlers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			time.Sleep(time.Minute)
			return "", ctx.Err()
		}))
		p := wt.session()
		p.send(runs(1, 3)...)
		synctest.Wait()
		start := time.Now()
		done := make(chan time.Duration)
		go func() {
			if err := wt.worker.Shutdown(t.Context()); err != nil {
				t.Errorf("Shutdown: %v", err)
			}
			done <- time.Since(start)
		}()
		p.expect("DRAIN", "RETURN 2", "RETURN 3", "DONE 1 60000000", "GOODBYE Goodbye from w")
		p.expectEnd()
		if d := <-done; d != time.Minute {
			t.Errorf("Shutdown took %v, want the minute of the handler and no more: it does not poll", d)
		}
		wt.expectServed(nil)
	})
}

func TestShutdownThatRunsOutOfPatienceNamesWhatRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g, WithSlots(2))
		p := wt.session()
		p.send("RUN 3 1 0 mow\\nthe lawn", "RUN 4 1 0 sow", "RUN 5 1 0 reap")
		synctest.Wait()
		impatient := errors.New("impatient")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, impatient)
		defer cancel()
		errs := make(chan error)
		go func() { errs <- wt.worker.Shutdown(ctx) }()
		p.expect("DRAIN", "RETURN 5")
		err := <-errs
		if !errors.Is(err, impatient) {
			t.Errorf("Shutdown returned %v, want its ctx's cause", err)
		}
		const want = `taskexec: worker w still runs task 3 ("mow\nthe lawn"), task 4 (sow): impatient`
		if err == nil || err.Error() != want {
			t.Errorf("Shutdown returned %v, want %v", err, want)
		}
		// The drain goes on, and Shutdown may be called again.
		p.send("RUN 6 1 0 x")
		p.expect("RETURN 6")
		if err := wt.worker.Shutdown(ctx); !errors.Is(err, impatient) {
			t.Errorf("a second Shutdown returned %v", err)
		}
		go func() { errs <- wt.worker.Shutdown(t.Context()) }()
		close(g.release)
		p.expectReportsInAnyOrder("DONE 3 mow\nthe lawn", "DONE 4 sow")
		p.expect("GOODBYE Goodbye from w")
		if err := <-errs; err != nil {
			t.Errorf("the last Shutdown returned %v", err)
		}
		for range 20 { // over is over, whatever the ctx, and not by chance
			if err := wt.worker.Shutdown(ctx); err != nil {
				t.Errorf("Shutdown after the drain, with a ctx that has ended: %v", err)
			}
		}
	})
}

func TestShutdownNamesNoTaskThatHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g, WithSlots(2))
		p := wt.session()
		p.send(runs(1, 2)...)
		synctest.Wait()
		g.release <- struct{}{}
		runs := 2
		if p.report() == "DONE 2 i2" {
			runs = 1
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := wt.worker.Shutdown(ctx)
		if want := fmt.Sprintf("taskexec: worker w still runs task %d (i%d): context deadline exceeded", runs, runs); err == nil || err.Error() != want {
			t.Errorf("Shutdown returned %v, want %s", err, want)
		}
	})
}

func TestShutdownNamesAtMostTenTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, newGate(), WithSlots(12))
		p := wt.session()
		p.send(runs(1, 12)...)
		synctest.Wait()
		go p.expect("DRAIN")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := wt.worker.Shutdown(ctx)
		if err == nil || !strings.Contains(err.Error(), "task 10 (i10) and 2 more: ") || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

func TestShutdownSaysThatOnlySessionsAreOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, parrot)
		wt.session() // which does not read DRAIN
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		err := wt.worker.Shutdown(ctx)
		if err == nil || err.Error() != "taskexec: worker w still runs no task, but sessions are still open: context deadline exceeded" {
			t.Errorf("got %v", err)
		}
	})
}

func TestShutdownBeforeServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorker(parrot)
		if err := w.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown of an idle worker: %v", err)
		}
		network := new(memNetwork)
		if err := w.Serve(t.Context(), network.listen("w:1")); err != ErrWorkerClosed {
			t.Errorf("Serve returned %v", err)
		}
		if _, err := network.dial(t.Context(), "mem", "w:1"); err == nil {
			t.Error("Serve left its listener open")
		}
		client, server := net.Pipe()
		if err := w.ServeConn(t.Context(), server); err != ErrWorkerClosed {
			t.Errorf("ServeConn returned %v", err)
		}
		newPeer(t, client).expectEnd()
		if err := w.ListenAndServe(t.Context(), "127.0.0.1:0"); err != ErrWorkerClosed {
			t.Errorf("ListenAndServe returned %v", err)
		}
		if err := w.Shutdown(t.Context()); err != nil {
			t.Errorf("a second Shutdown: %v", err)
		}
	})
}

func TestConcurrentShutdownsAllWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g)
		p := wt.session()
		p.send(runs(1, 1)...)
		g.expectStarted(t, "i1")
		var returned atomic.Int32
		for range 10 {
			go func() {
				if err := wt.worker.Shutdown(t.Context()); err != nil {
					t.Errorf("Shutdown: %v", err)
				}
				returned.Add(1)
			}()
		}
		p.expect("DRAIN") // once
		synctest.Wait()
		if n := returned.Load(); n > 0 {
			t.Errorf("%d returned while a handler runs", n)
		}
		close(g.release)
		p.expectReports("DONE 1 i1", "GOODBYE …")
		synctest.Wait()
		if n := returned.Load(); n != 10 {
			t.Errorf("%d returned, want 10", n)
		}
	})
}

func TestShutdownOfAnIdleWorkerIsImmediate(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		wt := start(t, parrot)
		wt.expectServing() // it has entered Serve
		if err := wt.worker.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		wt.expectServed(nil)
	})
}

func TestGoodbyeComesAfterAllReports(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		var started atomic.Int32
		wt := start(t, bigOutputs(200_000, &started), WithSlots(8))
		p := wt.session()
		p.send(append(runs(1, 30), "SHUTDOWN")...)
		dones, returns := 0, 0
		for {
			line := p.next()
			switch verb, _, _ := strings.Cut(line, " "); verb {
			case "DRAIN":
				continue
			case "DONE":
				dones++
				continue
			case "RETURN":
				returns++
				continue
			}
			if line != "GOODBYE Goodbye from w" {
				t.Errorf("got %q", cut(line, 100))
			}
			break
		}
		p.expectEnd()
		p.conn.Close()
		if dones+returns != 30 || dones != int(started.Load()) {
			t.Errorf("%d DONE and %d RETURN for 30 tasks, %d started", dones, returns, started.Load())
		}
		wt.expectServed(nil)
	})
}

// halfConn gives a pipe the CloseWrite of a TCP connection, so that its fake
// time covers the wait for a peer that never closes: the worker's side sees
// the end of input only when the peer closes.
type halfConn struct {
	net.Conn
	readDeadline func(inner func(time.Time) error, t time.Time) error
}

func (c *halfConn) CloseWrite() error { return nil }

func (c *halfConn) SetReadDeadline(t time.Time) error {
	if c.readDeadline != nil {
		return c.readDeadline(c.Conn.SetReadDeadline, t)
	}
	return c.Conn.SetReadDeadline(t)
}

func TestSilentStrangerHoldsUpADrainForASecondAtMost(t *testing.T) {
	forWorker, _ := bothConfigs(t)
	for _, opts := range [][]WorkerOption{nil, {WithTLS(forWorker)}} {
		for _, reads := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				log := newLogRecorder(slog.LevelWarn)
				w := NewWorker(parrot, append(opts, WithLogger(slog.New(log)))...)
				client, server := net.Pipe()
				defer client.Close()
				returned := make(chan error, 1)
				go func() { returned <- w.ServeConn(t.Context(), &halfConn{Conn: server}) }()
				synctest.Wait()
				if reads && opts == nil {
					p := newPeer(t, client)
					go p.expect("ERROR closing the worker is shutting down")
				}
				start := time.Now()
				if err := w.Shutdown(t.Context()); err != nil {
					t.Errorf("Shutdown: %v", err)
				}
				if d := time.Since(start); d > lastWordsTimeout {
					t.Errorf("Shutdown took %v", d)
				}
				if err := <-returned; err != nil {
					t.Errorf("ServeConn returned %v, want nil: the session has drained", err)
				}
				log.expectLines(t, nil) // the stranger is not to blame
			})
		}
	}
}

func TestStrangerWhoComesAsTheDrainBeginsDoesNotHoldItUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorker(parrot)
		client, server := net.Pipe()
		defer client.Close()
		go io.Copy(io.Discard, client)
		var once atomic.Bool
		conn := &halfConn{Conn: server}
		conn.readDeadline = func(inner func(time.Time) error, deadline time.Time) error {
			if once.CompareAndSwap(false, true) { // the handshake's: the drain begins just before it is set
				w.drain()
				synctest.Wait()
			}
			return inner(deadline)
		}
		start := time.Now()
		w.ServeConn(t.Context(), conn)
		if d := time.Since(start); d > lastWordsTimeout {
			t.Errorf("it took %v", d)
		}
	})
}

// A greeting that comes when the worker has begun to shut down opens no session,
// whether the peer reads why or not.
func TestAGreetingThatComesAfterTheDrainHasBegunIsTooLate(t *testing.T) {
	for _, reads := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			log := newLogRecorder(slog.LevelInfo)
			w := NewWorker(parrot, WithLogger(slog.New(log)))
			client, server := net.Pipe()
			defer client.Close()
			returned := make(chan error, 1)
			go func() { returned <- w.ServeConn(t.Context(), &halfConn{Conn: server}) }()
			synctest.Wait()
			w.drain()
			p := newPeer(t, client)
			p.send(helloA, "RUN 0 1 0 x")
			if reads {
				p.expect("ERROR closing the worker is shutting down")
			}
			if err := <-returned; err != nil {
				t.Errorf("ServeConn returned %v, want nil: the session has drained", err)
			}
			if greeted := w.Stats().Greeted; greeted != 0 {
				t.Errorf("%d sessions are counted", greeted)
			}
			log.expectLines(t, nil)
		})
	}
}

func TestPeerThatNeverClosesAfterGoodbyeHoldsUpADrainForASecondAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorker(parrot)
		client, server := net.Pipe()
		defer client.Close()
		returned := make(chan error, 1)
		go func() { returned <- w.ServeConn(t.Context(), &halfConn{Conn: server}) }()
		p := newPeer(t, client)
		p.send(helloA)
		p.expect("WELCOME …")
		start := time.Now()
		p.send("SHUTDOWN")
		p.expect("DRAIN", "GOODBYE …")
		p.send("RUN 1 1 0 x") // what comes after GOODBYE counts as returned
		if err := <-returned; err != nil {
			t.Errorf("ServeConn returned %v", err)
		}
		if d := time.Since(start); d != lastWordsTimeout {
			t.Errorf("after %v, want %v", d, lastWordsTimeout)
		}
	})
}

func TestPeerThatGoesOnPingingDoesNotHoldUpADrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, parrot)
		p := wt.session()
		unanswered := make(chan struct{}, 100) // more would soon be a flood
		go func() {
			for {
				unanswered <- struct{}{}
				if _, err := io.WriteString(p.conn, "PING 1\n"); err != nil {
					return
				}
			}
		}()
		go wt.worker.Shutdown(t.Context())
		for lines := 0; ; lines++ {
			line := p.next()
			if line == "PONG 1" {
				<-unanswered
			}
			if strings.HasPrefix(line, "GOODBYE") {
				break
			}
			if lines > 1000 || t.Failed() {
				t.Errorf("no GOODBYE among %d lines", lines)
				break
			}
		}
		p.conn.Close()
		for len(unanswered) > 0 { // the pinger may wait for its place
			<-unanswered
		}
	})
}

// The same where the peer's next ping always comes before the writer looks.
func TestUrgentLinesDoNotKeepAWireFromEnding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		pongs := 0
		var c *wire
		c = newWire(server, sourceFunc(func(dst []byte) []byte {
			if pongs++; pongs < 1000 {
				c.sendUrgent(message{verb: verbPong, task: pongs})
			}
			return dst
		}))
		c.sendUrgent(message{verb: verbPong, task: pongs})
		c.end(endAfterAll, []byte("GOODBYE\n"))
		go c.writeLoop()
		if all, err := io.ReadAll(client); err != nil || pongs > 10 || !strings.HasSuffix(string(all), "GOODBYE\n") {
			t.Errorf("%d PONGs, then %q and %v", pongs, cut(string(all), 100), err)
		}
	})
}

func TestDrainAfterCancelSaysGoodbye(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, newGate())
		p := wt.session()
		p.send(runs(1, 2)...)
		synctest.Wait()
		p.send("CANCEL x")
		p.expectReportsInAnyOrder("FAIL 1 canceled taskexec: canceled by the coordinator: x", "RETURN 2")
		p.send("SHUTDOWN")
		p.expect("DRAIN", "GOODBYE Goodbye from w")
		wt.expectServed(nil)
	})
}

func TestShutdownWaitsForAHandlerWhoseSessionIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, deaf(g))
		p := wt.session()
		p.send(runs(1, 1)...)
		g.expectStarted(t, "i1")
		p.conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := wt.worker.Shutdown(ctx); err == nil || !strings.Contains(err.Error(), "task 1 (i1)") {
			t.Errorf("Shutdown returned %v, want an error that names the handler that ignores its ctx", err)
		}
		close(g.release)
		if err := wt.worker.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
}

// --- Serve, ServeConn, ListenAndServe ---

func TestServeReturnsItsContextsCauseAfterItsHandlers(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		started := make(chan struct{})
		var over atomic.Bool
		cause := errors.New("power cut")
		wt := start(t, HandlerFunc(func(ctx context.Context, _ Task) (string, error) {
			close(started)
			<-ctx.Done()
			if got := context.Cause(ctx); got != cause {
				t.Errorf("the handler's cause is %v", got)
			}
			over.Store(true)
			return "", ctx.Err()
		}))
		p := wt.session()
		p.send(runs(1, 100)...) // those that wait never start
		<-started
		wt.stop(cause)
		p.expectClosing()
		p.conn.Close()
		wt.expectServed(cause)
		if !over.Load() {
			t.Error("Serve returned before its handler")
		}
	})
}

func TestServeWaitsForHandlersThatIgnoreTheEndOfItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, deaf(g))
		p := wt.session()
		p.send("RUN 1 1 0 x")
		g.expectStarted(t, "x")
		p.conn.Close()
		wt.stop(errors.New("stop"))
		time.Sleep(time.Hour)
		select {
		case <-wt.served:
			t.Errorf("Serve returned %v while a handler runs", wt.err)
		default:
		}
		close(g.release)
		<-wt.served
	})
}

func TestEndOfContextCutsADrainShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, newGate())
		p := wt.session()
		p.send("RUN 1 1 0 x", "SHUTDOWN")
		p.expect("DRAIN")
		cause := errors.New("second signal")
		wt.stop(cause)
		wt.expectServed(cause)
		if err := wt.worker.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
}

// failingListener accepts what conns has and then fails.
type failingListener struct {
	*memListener
	err error
}

func (l failingListener) Accept() (net.Conn, error) {
	conn, err := l.memListener.Accept()
	if err != nil {
		err = l.err
	}
	return conn, err
}

func TestServeReturnsTheAcceptErrorAndEndsItsSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := new(memNetwork)
		inner := network.listen("w:1")
		broken := errors.New("no more file descriptors")
		wt := serveTest(t, failingListener{inner, broken}, func() net.Conn {
			conn, _ := network.dial(t.Context(), "mem", "w:1")
			return conn
		}, newGate())
		p := wt.session()
		p.send("RUN 1 1 0 x")
		synctest.Wait()
		inner.Close()
		p.expectClosing()
		wt.expectServed(broken)
		if !strings.Contains(wt.err.Error(), "worker w") {
			t.Errorf("%v does not name the worker", wt.err)
		}
	})
}

// unhashableListener cannot be the key of a map.
type unhashableListener struct {
	net.Listener
	_ []string
}

func TestServeTakesAListenerOfAnyType(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := new(memNetwork)
		wt := serveTest(t, unhashableListener{Listener: network.listen("w:1")}, func() net.Conn {
			conn, _ := network.dial(t.Context(), "mem", "w:1")
			return conn
		}, parrot)
		wt.expectServing()
		wt.worker.Shutdown(t.Context())
		wt.expectServed(nil)
	})
}

func TestWorkerServesSeveralListeners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorker(parrot, WithName("w"))
		network := new(memNetwork)
		errs := make(chan error, 2)
		for _, addr := range []string{"w:1", "w:2"} {
			ln := network.listen(addr)
			go func() { errs <- w.Serve(t.Context(), ln) }()
		}
		for _, addr := range []string{"w:1", "w:2"} {
			p := network.greeted(t, addr)
			go p.expect("DRAIN", "GOODBYE …")
		}
		if err := w.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := <-errs; err != nil {
				t.Errorf("Serve returned %v", err)
			}
		}
	})
}

func TestAListenerThatHasFailedIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorker(parrot)
		for range 100 {
			ln := new(memNetwork).listen("w:1")
			ln.Close()
			if err := w.Serve(t.Context(), ln); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Serve returned %v", err)
			}
		}
		if n := len(w.listeners); n != 0 {
			t.Errorf("%d listeners are kept", n)
		}
	})
}

func TestListenAndServeRefusesABadAddress(t *testing.T) {
	for _, c := range []struct{ addr, want, reason string }{
		{"", `address "" is neither host:port nor unix:/path`, "an empty flag"},
		{"8001", "neither host:port nor unix:/path", "a port alone"},
		{"localhost", "neither host:port nor unix:/path", "a host alone"},
		{"localhost:", "neither host:port nor unix:/path", "no port"},
		{"unix:w.sock", "must be absolute", "it would depend on the directory"},
		{"127.0.0.1:65536", `address "127.0.0.1:65536": a port is a number up to 65535, or a name`, "no such port"},
		{"127.0.0.1:-1", "a port is a number", "no such port"},
		{"127.0.0.1:99999999999999999999", "a port is a number", "more than an int can be"},
		{"127.0.0.1:nosuchservice", "worker w: listen tcp", "a name that the system does not know"},
		{"unix:/nonexistent/w.sock", "worker w: listen unix", "no such directory"},
		{"unix:/nonexistent/\x1b[2J", `worker w: listen unix /nonexistent/\x1b[2J: `, "a terminal would be cleared"},
	} {
		err := NewWorker(parrot, WithName("w")).ListenAndServe(t.Context(), c.addr)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "taskexec: ") {
			t.Errorf("%q (%s): got %v, want %s", c.addr, c.reason, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "remove the file") {
			t.Errorf("%q (%s): got %v, but there is no file", c.addr, c.reason, err)
		}
	}
}

func TestWhatIsWrongWithAUnixSocketIsExplained(t *testing.T) {
	dir, err := os.MkdirTemp("", "") // t.TempDir's path may be too long
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	left, long := filepath.Join(dir, "left"), filepath.Join(dir, strings.Repeat("x", 110))
	if err := os.WriteFile(left, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tooLong := fmt.Sprintf("; its path has %d bytes, and a system may take no more than 103", len(long))
	for addr, want := range map[string]string{
		"unix:" + left: "; if nobody listens there any more, remove the file",
		"unix:" + long: tooLong,
	} {
		if err := NewWorker(parrot).ListenAndServe(t.Context(), addr); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("ListenAndServe returned %v, want an end of %q", err, want)
		}
	}
	_, err = newTestCoordinator(t, WithWorkers("a", "unix:"+long), WithWorkerWait(0)).Run(t.Context(), tasksOf("a", 1))
	if err == nil || !strings.HasSuffix(err.Error(), tooLong) {
		t.Errorf("Run returned %v, want an end of %q", err, tooLong)
	}
	fails := func(err error) CoordinatorOption {
		return WithDialer(func(context.Context, string, string) (net.Conn, error) { return nil, err })
	}
	for name, opts := range map[string][]CoordinatorOption{
		"of a path that is not too long": {WithWorkers("a", "unix:"+filepath.Join(dir, strings.Repeat("x", 103-len(dir)-1)))},
		"that is not the system's":       {WithWorkers("a", "unix:"+long), fails(errors.New("no"))},
		"of another network":             {WithWorkers("a", strings.Repeat("x", 110)+":1"), fails(os.NewSyscallError("connect", errors.New("no")))},
	} {
		_, err := newTestCoordinator(t, append(opts, WithWorkerWait(0))...).Run(t.Context(), tasksOf("a", 1))
		if err == nil || strings.Contains(err.Error(), "its path has") {
			t.Errorf("an error %s is %v", name, err)
		}
	}
	_, err = newTestCoordinator(t, WithWorkers("a", "unix:"+filepath.Join(dir, strings.Repeat("x", 104-len(dir)-1))), WithWorkerWait(0)).Run(t.Context(), tasksOf("a", 1))
	if err == nil || !strings.Contains(err.Error(), "its path has 104 bytes") {
		t.Errorf("of a path that may be too long, Run returned %v", err)
	}
}

func TestListenAndServeThatComesTooLateSaysSoThoughItCannotListen(t *testing.T) {
	// As when a worker is shut down at its start, and another has its address.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	closed := NewWorker(parrot)
	if err := closed.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := closed.ListenAndServe(t.Context(), ln.Addr().String()); err != ErrWorkerClosed {
		t.Errorf("after Shutdown: got %v, want ErrWorkerClosed", err)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	for _, addr := range []string{ln.Addr().String(), "localhost:0"} {
		if err := NewWorker(parrot).ListenAndServe(ctx, addr); err != cause {
			t.Errorf("%s, after the end of its context: got %v, want the cause", addr, err)
		}
	}
}

func TestListenAndServeOnAUnixSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "taskexec") // shorter than t.TempDir: the path of a socket is limited
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "w.sock")
	// Listening first tells when it is reachable; ListenAndServe then finds
	// the address taken.
	w := NewWorker(parrot, WithName("w"))
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.ListenAndServe(t.Context(), "unix:"+path); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("ListenAndServe on a path that is taken returned %v", err)
	}
	ln.Close()
	errs := make(chan error, 1)
	go func() { errs <- w.ListenAndServe(t.Context(), "unix:"+path) }()
	var conn net.Conn
	for deadline := time.Now().Add(5 * time.Second); ; {
		if conn, err = net.Dial("unix", path); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
	defer conn.Close()
	p := newPeer(t, conn)
	p.send(helloA)
	p.expect("WELCOME …")
	p.send("RUN 1 1 0 x")
	p.expectReports("DONE 1 x")
	p.send("SHUTDOWN")
	p.expect("DRAIN", "GOODBYE Goodbye from w")
	p.expectEnd()
	conn.Close()
	if err := <-errs; err != nil {
		t.Errorf("ListenAndServe returned %v", err)
	}
}

func TestServeConnSaysHowTheSessionEnded(t *testing.T) {
	cause := errors.New("power cut")
	isNil := func(err error) bool { return err == nil }
	fault := func(code string, remote bool) func(error) bool {
		return func(err error) bool {
			var e *ProtocolError
			return errors.As(err, &e) && e.Code == code && e.Remote == remote && strings.Contains(err.Error(), "worker w")
		}
	}
	for _, c := range []struct {
		name  string
		peer  func(p *peer, w *Worker, stop func())
		right func(error) bool
	}{
		{"closed between lines", func(p *peer, w *Worker, stop func()) { p.conn.Close() }, isNil},
		{"closed between lines, and a report is not read", func(p *peer, w *Worker, stop func()) {
			p.send("RUN 1 1 0 x")
			synctest.Wait()
			p.conn.Close()
		}, func(err error) bool { return errors.Is(err, io.ErrClosedPipe) }},
		{"closed inside a line", func(p *peer, w *Worker, stop func()) {
			io.WriteString(p.conn, "RUN 1 1")
			p.conn.Close()
		}, func(err error) bool { return errors.Is(err, errTorn) }},
		{"rules broken", func(p *peer, w *Worker, stop func()) {
			p.send("DONE 1 1")
			p.expect("ERROR state …")
		}, fault("state", false)},
		{"rules broken, and gone", func(p *peer, w *Worker, stop func()) {
			p.send("DONE 1 1")
			p.conn.Close()
		}, fault("state", false)},
		{"told of a fault", func(p *peer, w *Worker, stop func()) {
			p.send("ERROR window too \x1b[31m much")
		}, fault("window", true)},
		{"ctx", func(p *peer, w *Worker, stop func()) {
			stop()
			p.expect("ERROR closing …")
		}, func(err error) bool { return err == cause }},
		{"ctx, and the peer does not read", func(p *peer, w *Worker, stop func()) { stop() }, func(err error) bool { return err == cause }},
		{"shutdown by the peer", func(p *peer, w *Worker, stop func()) {
			p.send("SHUTDOWN")
			p.expect("DRAIN", "GOODBYE …")
		}, isNil},
		{"shutdown by the program", func(p *peer, w *Worker, stop func()) {
			go w.Shutdown(context.Background())
			p.expect("DRAIN", "GOODBYE …")
		}, isNil},
		{"the peer does not read", func(p *peer, w *Worker, stop func()) {
			p.send("RUN 1 1 0 x")
		}, func(err error) bool { return isTimeout(err) && strings.Contains(err.Error(), "worker w") }},
		{"the peer does not read, and the worker drains", func(p *peer, w *Worker, stop func()) {
			p.send("RUN 1 1 0 x")
			go w.Shutdown(context.Background())
		}, func(err error) bool { return isTimeout(err) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := NewWorker(parrot, WithName("w"))
				ctx, stop := context.WithCancelCause(t.Context())
				defer stop(nil)
				client, server := net.Pipe()
				returned := make(chan error, 1)
				go func() { returned <- w.ServeConn(ctx, server) }()
				p := newPeer(t, client)
				p.send(helloA)
				p.expect("WELCOME …")
				c.peer(p, w, func() { stop(cause) })
				err := <-returned
				if !c.right(err) {
					t.Errorf("ServeConn returned %v (%T)", err, err)
				}
				if err != nil && strings.Contains(err.Error(), "\x1b") {
					t.Errorf("the error carries the peer's escapes: %q", err)
				}
				if _, err := client.Write([]byte("x")); err != io.ErrClosedPipe {
					t.Errorf("ServeConn left its connection open: %v", err)
				}
			})
		})
	}
}

func TestADrainWhoseReportsAreDroppedIsAnErrorOfServeConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorker(parrot, WithName("w"))
		client, server := net.Pipe()
		returned := make(chan error, 1)
		go func() { returned <- w.ServeConn(t.Context(), server) }()
		p := newPeer(t, client)
		p.send(`HELLO taskexec/1 {"run":"r","category":"a","timeout_ms":5000}`)
		p.expect("WELCOME …")
		for _, line := range []string{"RUN 0 1 0 x", "RUN 1 1 0 x"} {
			p.send(line)
			synctest.Wait() // the first report is being written, and the other waits
		}
		go w.Shutdown(context.Background())
		time.Sleep(4500 * time.Millisecond) // the lease is over, and the last words are not yet
		p.expectReports("DONE 0 x", "ERROR timeout …")
		p.expectEnd()
		var fault *ProtocolError
		if err := <-returned; !errors.As(err, &fault) || fault.Code != codeTimeout || fault.Remote {
			t.Errorf("ServeConn returned %v", err)
		}
	})
}

func TestContextThatHasEndedBeforeServeConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancelCause(t.Context())
		cause := errors.New("too late")
		client, server := net.Pipe()
		defer client.Close()
		go io.Copy(io.Discard, client)
		conn := &halfConn{Conn: server}
		var once atomic.Bool
		conn.readDeadline = func(inner func(time.Time) error, deadline time.Time) error {
			if once.CompareAndSwap(false, true) {
				synctest.Wait() // what the end of ctx does, it does before the handshake's deadline is set
			}
			return inner(deadline)
		}
		stop(cause)
		start := time.Now()
		if err := NewWorker(parrot).ServeConn(ctx, conn); err != cause {
			t.Errorf("ServeConn returned %v", err)
		}
		if d := time.Since(start); d > lastWordsTimeout {
			t.Errorf("after %v", d)
		}
	})
}

// What waits when the worker's ctx ends never starts, though slots become free
// before its session is over.
func TestWaitingTaskDoesNotStartAfterTheContextsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g, WithSlots(2))
		p := wt.session()
		p.send(runs(1, 100)...)
		synctest.Wait()
		<-g.started
		<-g.started
		wt.stop(errors.New("stop"))
		g.expectNothingStarted(t) // the peer has read nothing yet
		p.expectClosing()
		g.expectNothingStarted(t)
	})
}

func TestSeveralCoordinatorsAreServedAtOnce(t *testing.T) {
	pipeAndTCP(t, func(t *testing.T, start startFunc) {
		wt := start(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			info, _ := TaskInfoFrom(ctx)
			return fmt.Sprintf("%s %s %s", info.Key(), task.Category, task.Instruction), nil
		}), WithSlots(2))
		var peers sync.WaitGroup
		for c := range 5 {
			p := wt.stranger()
			peers.Go(func() {
				p.send(fmt.Sprintf(`HELLO taskexec/1 {"run":"r%d","category":"c%d"}`, c, c))
				p.expect("WELCOME …")
				for i := range 100 { // the same numbers in each session
					p.send(fmt.Sprintf("RUN %d 1 0 x%d", i, i))
					p.expectReports(fmt.Sprintf("DONE %d r%d/%d c%d x%d", i, c, i, c, i))
				}
			})
		}
		peers.Wait()
	})
}

func TestTaskInfoNamesTheAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		infos := make(chan TaskInfo, 3)
		p := startWorker(t, HandlerFunc(func(ctx context.Context, _ Task) (string, error) {
			type key struct{}
			derived, cancel := context.WithTimeout(context.WithValue(ctx, key{}, 1), time.Hour)
			defer cancel()
			info, ok := TaskInfoFrom(derived)
			if !ok {
				t.Error("no TaskInfo")
			}
			infos <- info
			return "", nil
		})).session()
		p.send("RUN 42 1 0 x")
		p.expectReports("DONE 42 ")
		p.send("RUN 42 3 5000 x")
		p.expectReports("DONE 42 ")
		if d := cmp.Diff([]TaskInfo{{Run: "r1", Task: 42, Attempt: 1}, {Run: "r1", Task: 42, Attempt: 3}}, []TaskInfo{<-infos, <-infos}); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	})
	if got := (TaskInfo{Run: "r1", Task: 42, Attempt: 3}).Key(); got != "r1/42" {
		t.Errorf("Key is %q", got)
	}
	if info, ok := TaskInfoFrom(context.Background()); ok || info != (TaskInfo{}) {
		t.Errorf("a ctx that no worker made has %v", info)
	}
}

func TestDerivedContextStartsNoGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startWorker(t, HandlerFunc(func(ctx context.Context, _ Task) (string, error) {
			before := runtime.NumGoroutine()
			for range 100 {
				derived, cancel := context.WithCancel(ctx)
				defer cancel()
				stop := context.AfterFunc(derived, func() {})
				defer stop()
			}
			if n := runtime.NumGoroutine(); n > before+50 {
				t.Errorf("%d goroutines, %d before", n, before)
			}
			return "", nil
		})).session()
		p.send("RUN 1 1 0 x", "RUN 2 1 60000 x")
		p.expectReports("DONE 1 ", "DONE 2 ")
	})
}

func TestContextOfAFinishedTaskIsNotLeaked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var kept context.Context
		wt := startWorker(t, HandlerFunc(func(ctx context.Context, _ Task) (string, error) {
			derived, cancel := context.WithCancel(ctx)
			_ = cancel // forgotten
			kept = derived
			return "", nil
		}))
		p := wt.session()
		p.send("RUN 1 1 0 x")
		p.expectReports("DONE 1 ")
		p.conn.Close()
		synctest.Wait()
		if !errors.Is(context.Cause(kept), errSessionLost) {
			t.Errorf("a ctx that a handler forgot to cancel ended with %v, want the session's end", context.Cause(kept))
		}
	})
}

// --- configuration ---

func TestMisuseOfNewWorkerPanics(t *testing.T) {
	var nilFunc HandlerFunc
	for _, c := range []struct {
		want string
		call func()
	}{
		{"taskexec: NewWorker: nil handler", func() { NewWorker(nil) }},
		{"taskexec: NewWorker: nil HandlerFunc", func() { NewWorker(nilFunc) }},
		{"taskexec: WithSlots: 0 is below 1", func() { NewWorker(parrot, WithSlots(0)) }},
		{"taskexec: WithSlots: -1 is below 1", func() { NewWorker(parrot, WithSlots(-1)) }},
		{"taskexec: WithRemoteShutdown: unknown policy RemoteShutdown(3)", func() { NewWorker(parrot, WithRemoteShutdown(3)) }},
		{"taskexec: WithRemoteShutdown: unknown policy RemoteShutdown(-1)", func() { NewWorker(parrot, WithRemoteShutdown(-1)) }},
		{"taskexec: WithHandshakeTimeout: 0s is not positive", func() { NewWorker(parrot, WithHandshakeTimeout(0)) }},
	} {
		func() {
			defer func() {
				if got := recover(); got != c.want {
					t.Errorf("panic with %v, want %s", got, c.want)
				}
			}()
			c.call()
		}()
	}
}

func TestBadOptionDataIsAnErrorOfServe(t *testing.T) {
	var many []string
	for i := range 100 {
		many = append(many, fmt.Sprintf("%s%d", strings.Repeat("c", 50), i))
	}
	for _, c := range []struct {
		opt  WorkerOption
		want string
	}{
		{WithName(""), `taskexec: WithName: "" is not`},
		{WithName("a\nb"), `taskexec: WithName: "a\nb" is not`},
		{WithName(strings.Repeat("x", 256)), "taskexec: WithName: "},
		{WithName("\xff"), `taskexec: WithName: "\xff" is not`},
		{WithCategories("a", ""), `taskexec: WithCategories: category "" is not`},
		{WithCategories("a\x00"), `taskexec: WithCategories: category "a\x00" is not`},
		{WithCategories(many...), "taskexec: "},
	} {
		w := NewWorker(parrot, c.opt)
		network := new(memNetwork)
		_, server := net.Pipe()
		for what, err := range map[string]error{
			"Serve":          w.Serve(t.Context(), network.listen("w:1")),
			"ServeConn":      w.ServeConn(t.Context(), server),
			"ListenAndServe": w.ListenAndServe(t.Context(), "127.0.0.1:0"),
		} {
			if err == nil || !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("%s returned %v, want %s…", what, err, c.want)
			}
		}
		if _, err := network.dial(t.Context(), "mem", "w:1"); err == nil {
			t.Error("the listener was left open")
		}
		if err := w.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	}
}

func TestWorkerHasANameOfItsOwn(t *testing.T) {
	if got := NewWorker(parrot, WithName("lab 1")).Name(); got != "lab 1" {
		t.Errorf("Name is %q", got)
	}
	host, err := os.Hostname()
	if err != nil || !validName(host) || len(host) > 200 {
		host = "worker"
	}
	if got, want := NewWorker(parrot).Name(), fmt.Sprint(host, "-", os.Getpid()); got != want {
		t.Errorf("the default name is %q, want %q", got, want)
	}
}

// A handler that stops because its worker ends has not failed its task, nor
// was the run canceled: whoever lost the session sends the task elsewhere. A
// GOODBYE would say that the task was never started.
func TestFailureThatFollowsFromTheWorkersEndIsNotReported(t *testing.T) {
	for _, drain := range []bool{false, true} {
		for range 100 { // it is a race between the handler and the session
			synctest.Test(t, func(t *testing.T) {
				started := make(chan struct{})
				w := NewWorker(HandlerFunc(func(ctx context.Context, task Task) (string, error) {
					close(started)
					<-ctx.Done()
					return "", ctx.Err()
				}))
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				n := &simNetwork{start: time.Now(), plan: simNetworkPlan{Buffer: 1 << 10}, listeners: make(map[string]*simListener),
					dials: make(map[simDial]int), drawn: make(map[string]simConnPlan), sim: &simulation{}}
				n.sim.network.start = n.start
				n.mu.Lock()
				ln := n.listen("w", nil)
				n.mu.Unlock()
				served := make(chan error)
				go func() { served <- w.Serve(ctx, ln) }()
				conn, err := n.dial(ctx, "tcp", "w:1")
				if err != nil {
					t.Fatal(err)
				}
				p := newPeer(t, conn)
				p.send(helloA, "RUN 0 1 0 x")
				p.expect("WELCOME …")
				<-started
				if drain {
					go w.Shutdown(context.Background())
					p.expect("DRAIN")
				}
				cancel()
				for line := p.next(); !strings.HasPrefix(line, "ERROR closing "); line = p.next() {
					t.Errorf("got line %q before ERROR", line)
					if t.Failed() {
						break
					}
				}
				conn.Close()
				<-served
			})
			if t.Failed() {
				return
			}
		}
	}
}

func TestStatsCountWhatWentWrong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
			switch task.Instruction {
			case "right":
				return "", nil
			case "wrong":
				return "", errors.New("no")
			}
			return until(ctx, task)
		}))
		p := wt.session()
		p.send("RUN 8 1 0 wrong", "RUN 9 1 0 right")
		p.expectReports("FAIL 8 error no", "DONE 9 ")
		synctest.Wait()
		if diff := cmp.Diff(WorkerStats{Sessions: 1, Slots: 1, Done: 1, Failed: 1, Greeted: 1}, wt.worker.Stats()); diff != "" {
			t.Errorf("while the session is open (-want +got):\n%s", diff)
		}
		p.send("RUN 0 1 0 x", "RUN 1 2 0 x", "RUN 2 1 0 x", "RECALL 2")
		p.expect("RETURN 2")
		synctest.Wait()
		p.conn.Close()
		synctest.Wait()
		want := WorkerStats{Slots: 1, Done: 1, Failed: 2, Greeted: 1, Repeated: 1, Returned: 1, Lost: 2}
		if diff := cmp.Diff(want, wt.worker.Stats()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}
