package taskexec

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Attacks on a worker in a process of its own, over real connections. What is
// looked at is what the worker does and the memory it takes, never how fast it
// is.

var attackTime = flag.Duration("attack", time.Second, "how long each attack on a worker goes on; 10s makes it 5,000 connections")

const (
	besiegedSlots   = 4
	floodMemory     = 32 << 20 // what a flood may add to the worker's heap, garbage included
	oversizedMemory = 16 << 20 // the same for lines over the limit
)

func init() {
	parts["besieged"] = func() {
		b := new(besieged)
		serveUntilStdinCloses(func(ctx context.Context, ln net.Listener) {
			go b.watch()
			NewWorker(HandlerFunc(b.handle), WithSlots(besiegedSlots)).Serve(ctx, ln)
		})
	}
}

// A besieged is the handler of a worker that watches its own memory.
type besieged struct {
	running, mostRunning atomic.Int64
	base, most           atomic.Int64 // bytes of the heap
}

// watch notes the most that the heap ever holds.
func (b *besieged) watch() {
	for ; ; time.Sleep(time.Millisecond) {
		raise(&b.most, heapBytes())
	}
}

// heapBytes is what the heap holds, what is garbage and not yet swept included.
func heapBytes() int64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return int64(sample[0].Value.Uint64())
}

// raise sets most to n unless it is more already.
func raise(most *atomic.Int64, n int64) {
	for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
	}
}

// handle takes as long as its instruction says, or begins to watch anew, or says
// what has been seen since.
func (b *besieged) handle(ctx context.Context, task Task) (string, error) {
	switch task.Instruction {
	case "watch":
		runtime.GC() // twice, for what only a first one sets free
		runtime.GC()
		b.base.Store(heapBytes())
		b.most.Store(heapBytes())
		b.mostRunning.Store(0)
		return "", nil
	case "seen":
		return fmt.Sprint(b.most.Load()-b.base.Load(), b.mostRunning.Load()), nil
	}
	raise(&b.mostRunning, b.running.Add(1))
	defer b.running.Add(-1)
	d, err := time.ParseDuration(task.Instruction)
	if err != nil {
		return "", err
	}
	if !sleep(ctx, d) {
		return "", context.Cause(ctx)
	}
	return task.Instruction, nil
}

// An attack is on a worker that was just started.
type attack struct {
	t    *testing.T
	addr string
	end  time.Time // for attacks that go on for attackTime
	all  sync.WaitGroup

	dials, refused, answered, cutOff atomic.Int64
}

func newAttack(t *testing.T) *attack {
	a := &attack{t: t, addr: startProcess(t, "besieged").addr}
	a.run(Task{Instruction: "watch"})
	a.end = time.Now().Add(*attackTime)
	return a
}

// run is a run by a new coordinator, in which each task must be Done.
func (a *attack) run(tasks ...Task) []Result {
	a.t.Helper()
	for i := range tasks {
		tasks[i].Category = "a"
	}
	c, err := NewCoordinator(WithWorkers("a", a.addr))
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(a.t.Context(), time.Minute+2**attackTime)
	defer cancel()
	report, err := c.Run(ctx, tasks)
	if err != nil {
		a.t.Errorf("an honest run: %v", err)
	}
	if report.Troubles.Losses > 0 {
		a.t.Errorf("an honest run has lost sessions: %+v", report.Troubles)
	}
	return report.Results
}

// pausesOf makes n tasks that take d each.
func pausesOf(n int, d time.Duration) []Task {
	tasks := make([]Task, n)
	for i := range tasks {
		tasks[i].Instruction = d.String()
	}
	return tasks
}

// check waits for the end of the attack, and compares what the worker has seen.
func (a *attack) check(memory int64) {
	a.t.Helper()
	a.all.Wait()
	var grown, most int64
	if r := a.run(Task{Instruction: "seen"}); r[0].Outcome == Done {
		if _, err := fmt.Sscan(r[0].Output, &grown, &most); err != nil {
			a.t.Errorf("%q: %v", r[0].Output, err)
		}
	}
	if grown > memory {
		a.t.Errorf("the worker's heap has grown by %d KiB, more than %d KiB", grown>>10, memory>>10)
	}
	if most > besiegedSlots {
		a.t.Errorf("%d handlers ran at a time in %d slots", most, besiegedSlots)
	}
	a.t.Logf("%d connections, %d not made, %d answered, %d cut off; the worker's heap grew by %d KiB at most, and up to %d handlers ran",
		a.dials.Load(), a.refused.Load(), a.answered.Load(), a.cutOff.Load(), grown>>10, most)
}

// dial connects, with a deadline that ends the attack whatever happens. nil is
// counted.
func (a *attack) dial() *net.TCPConn {
	a.dials.Add(1)
	conn, err := net.DialTimeout("tcp", a.addr, 5*time.Second)
	if err != nil {
		a.refused.Add(1)
		return nil
	}
	// It ends with a reset, so that no port of this machine is kept from use.
	tcp := conn.(*net.TCPConn)
	tcp.SetLinger(0)
	tcp.SetDeadline(time.Now().Add(*attackTime + 15*time.Second))
	return tcp
}

// hold reads until the other side ends the connection, or for d.
func (a *attack) hold(conn net.Conn, d time.Duration) (heard string, ended bool) {
	conn.SetReadDeadline(time.Now().Add(d))
	all, err := io.ReadAll(conn)
	if len(all) > 0 {
		a.answered.Add(1)
	}
	if ended = !isTimeout(err); ended {
		a.cutOff.Add(1)
	}
	return string(all), ended
}

// Thousands of connections, most of which say nothing sensible, take little of a
// worker's memory, and a run that goes on meanwhile does not notice.
func TestAttackOfManyConnections(t *testing.T) {
	a := newAttack(t)
	const interval = 2 * time.Millisecond
	connections := int(*attackTime / interval)
	a.all.Go(func() { // for as long as they come
		const each = 20 * time.Millisecond
		a.run(pausesOf(int(*attackTime/each)*besiegedSlots, each)...)
	})
	noise := make([]byte, 8<<10)
	rand.NewChaCha8([32]byte{}).Read(noise)
	strangers := []func(conn *net.TCPConn){
		func(conn *net.TCPConn) {},
		func(conn *net.TCPConn) {
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
			a.hold(conn, 2*time.Second)
		},
		func(conn *net.TCPConn) { a.hold(conn, time.Second) },
		func(conn *net.TCPConn) { conn.Write(noise) },
		func(conn *net.TCPConn) {
			io.WriteString(conn, helloA+"\n")
			a.hold(conn, 100*time.Millisecond)
		},
		func(conn *net.TCPConn) {
			io.WriteString(conn, helloA[:20])
			a.hold(conn, time.Second)
		},
		func(conn *net.TCPConn) {
			conn.SetLinger(-1)
			conn.CloseWrite()
			a.hold(conn, 2*time.Second)
		},
	}
	open := make(chan struct{}, 400) // bounds them by what a process may have open
	start := time.Now()
	for i := range connections {
		time.Sleep(time.Until(start.Add(time.Duration(i) * interval)))
		open <- struct{}{}
		a.all.Go(func() {
			defer func() { <-open }()
			if conn := a.dial(); conn != nil {
				defer conn.Close()
				strangers[i%len(strangers)](conn)
			}
		})
	}
	a.check(floodMemory)
	if n := a.refused.Load(); n > int64(connections)/10 {
		t.Errorf("%d of %d connections were not made, so that this has shown little", n, connections)
	}
}

// Peers that send a byte a second, as many as a worker has sessions, keep no new
// coordinator out.
func TestAttackOfSlowPeers(t *testing.T) {
	a := newAttack(t)
	const peers = 256
	over := make(chan struct{}) // not before the last run is
	pause := func() bool {
		select {
		case <-over:
			return false
		case <-time.After(time.Second):
			return true
		}
	}
	var connected sync.WaitGroup
	connected.Add(peers)
	for i := range peers {
		a.all.Go(func() {
			conn := a.dial()
			connected.Done()
			for again := true; again; again = pause() {
				if conn == nil {
					conn = a.dial()
				}
				if conn == nil {
					continue
				}
				conn.SetDeadline(time.Time{})     // it does not leave before a coordinator has lost its patience
				said := strings.Repeat(helloA, 4) // it does not come to its end
				if i%4 == 0 {
					// This one greets first, and dawdles with what it orders. There
					// is room for those beside the coordinator.
					io.WriteString(conn, helloA+"\n")
					said = "RUN 1 1 0 " + said
				}
				for _, c := range []byte(said) {
					if _, err := conn.Write([]byte{c}); err != nil {
						a.cutOff.Add(1)
						break
					}
					if !pause() {
						break
					}
				}
				conn.Close()
				conn = nil
			}
			if conn != nil {
				conn.Close()
			}
		})
	}
	connected.Wait()
	runs := 0
	for again := true; again; again = time.Now().Before(a.end) && !t.Failed() {
		a.run(pausesOf(8, 50*time.Millisecond)...)
		runs++
	}
	close(over)
	a.check(floodMemory)
	t.Logf("%d runs, each by a new coordinator", runs)
}

// A line that never ends is cut off at the limit, however much the peer goes on
// to write.
func TestAttackOfLinesWithoutEnd(t *testing.T) {
	a := newAttack(t)
	const most = 64 << 20 // buffers of the system between the two included
	chunk := bytes.Repeat([]byte("x"), 64<<10)
	tests := []struct {
		name   string
		before string
		want   string
	}{
		{"instead of a greeting", "", fmt.Sprintf("ERROR line a line is over the limit of %d bytes\n", greetingLimit)},
		{"in a session", helloA + "\nRUN 1 1 0 ", fmt.Sprintf("ERROR line a line is over the limit of %d bytes\n", defaultMaxLine)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			conn := a.dial()
			if conn == nil {
				t.Fatal("not connected")
			}
			defer conn.Close()
			var heard string
			var ended bool
			a.all.Go(func() { heard, ended = a.hold(conn, 10*time.Second) })
			// It would be 4 GiB.
			n, err := io.WriteString(conn, test.before)
			for wrote := n; err == nil; wrote += n {
				if wrote > most {
					t.Errorf("it is still read after %d bytes", wrote)
					break
				}
				n, err = conn.Write(chunk)
			}
			a.all.Wait()
			if !strings.HasSuffix(heard, test.want) || !ended {
				t.Errorf("got %q, and the connection ended: %v; want %q", heard, ended, test.want)
			}
		})
	}
	a.check(oversizedMemory)
}

// Many lines over the limit take no more of a worker's memory than a few.
func TestAttackOfOversizedLines(t *testing.T) {
	const peers = 256
	overGreeting := bytes.Repeat([]byte("x"), 2*greetingLimit)
	tests := []struct {
		name   string
		atOnce int
		before string
		line   []byte
	}{
		{"instead of greetings, at once", peers, "", overGreeting},
		// The limit of a session is 1 MiB, and at once they could hold as much
		// each, which is theirs by the protocol.
		{"in sessions, by turns", 1, helloA + "\n", bytes.Repeat([]byte("x"), defaultMaxLine+1)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			a := newAttack(t)
			var told atomic.Int64
			for range peers / test.atOnce {
				var connected sync.WaitGroup
				connected.Add(test.atOnce)
				if t.Failed() {
					break
				}
				for range test.atOnce {
					a.all.Go(func() {
						conn := a.dial()
						connected.Done()
						connected.Wait()
						if conn == nil {
							return
						}
						defer conn.Close()
						conn.Write(append([]byte(test.before), test.line...))
						heard, ended := a.hold(conn, 10*time.Second)
						if !ended {
							t.Errorf("it goes on, after %q", heard)
						}
						if strings.Contains(heard, "ERROR line ") {
							told.Add(1)
						}
					})
				}
				a.all.Wait()
			}
			a.check(oversizedMemory)
			if told.Load() == 0 { // others may have been cut off because they were too many
				t.Error("nobody was told that his line is too long")
			}
		})
	}
}

// A coordinator that sends RUN and RECALL as fast as it can, within its rights
// or beyond them, has no more handlers run than there are slots, and leaves the
// worker as it was.
func TestAttackOfRunsAndRecalls(t *testing.T) {
	large := strings.Repeat("x", 60<<10)
	floods := []struct {
		name  string
		lines string // are said again and again, with another number for # each time
		reads bool   // the peer reads the answers
	}{
		{"more than the window", "RUN # 1 0 1h\n", true},
		{"runs that are taken back", "RUN # 1 0 1h\nRECALL #\n", true},
		{"runs that are taken back, and answers not read", "RUN # 1 0 1h\nRECALL #\n", false},
		{"runs that end at once", "RUN # 1 0 0s\n", true},
		{"runs that end at once, and answers not read", "RUN # 1 0 0s\n", false},
		{"large runs that are taken back", "RUN # 1 0 " + large + "\nRECALL #\n", true},
	}
	a := newAttack(t)
	for _, flood := range floods {
		a.all.Go(func() {
			for time.Now().Before(a.end) {
				conn := a.dial()
				if conn == nil {
					time.Sleep(100 * time.Millisecond)
					continue
				}
				var reading sync.WaitGroup
				if flood.reads {
					reading.Go(func() { io.Copy(io.Discard, conn) })
				}
				conn.SetDeadline(a.end)
				_, err := io.WriteString(conn, helloA+"\n")
				for task := 0; err == nil; {
					batch := make([]byte, 0, 64<<10)
					for len(batch)+len(flood.lines) <= cap(batch) {
						batch = append(batch, strings.ReplaceAll(flood.lines, "#", strconv.Itoa(task))...)
						task++
					}
					_, err = conn.Write(batch)
				}
				if !isTimeout(err) {
					a.cutOff.Add(1)
				}
				conn.Close()
				reading.Wait()
			}
		})
	}
	a.all.Wait()
	a.run(pausesOf(2*besiegedSlots, time.Millisecond)...)
	a.check(int64(len(floods)) * sessionMemory)
}

// sessionMemory is what a session with a greeted peer may take: instructions
// and reports of 1 MiB each, a line that is read and one that is written, the
// answers that the peer leaves unread, and as much again as garbage.
const sessionMemory = 12 << 20

// A dribble is a connection whose writes go out byte by byte.
type dribble struct{ *net.TCPConn }

func (d dribble) Write(p []byte) (int, error) {
	for i := range p {
		if n, err := d.TCPConn.Write(p[i : i+1]); err != nil {
			return i + n, err
		}
	}
	return len(p), nil
}

type dribbles struct{ net.Listener }

func (l dribbles) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return dribble{conn.(*net.TCPConn)}, nil
}

// It does not matter in what pieces a session arrives.
func TestSessionOfOneByteWritesWorks(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := NewWorker(HandlerFunc(moody), WithName("w"))
	served := make(chan error, 1)
	go func() { served <- w.Serve(t.Context(), dribbles{ln}) }()
	goodbyes := 0
	c, err := NewCoordinator(WithWorkers("a", ln.Addr().String()), WithWorkerShutdown(), WithOnFailure(KeepGoing),
		WithObserver(Observer{Goodbye: func(GoodbyeInfo) { goodbyes++ }}),
		WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return dribble{conn.(*net.TCPConn)}, nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	tasks := append(tasksOf("a", 100), Task{Category: "a", Instruction: "fail"}, Task{Category: "a", Instruction: "in\ntwo lines\\"},
		Task{Category: "a", Instruction: strings.Repeat("long ", 2000)})
	report, err := c.Run(t.Context(), tasks)
	checkReport(t, tasks, report, err)
	for i, r := range report.Results {
		if output, ok := moodyOutput(tasks[i].Instruction); ok != (r.Outcome == Done) || r.Output != output {
			t.Errorf("task %d is %v with %q", i, r.Outcome, cut(r.Output, 100))
		}
	}
	if err := <-served; err != nil || goodbyes != 1 {
		t.Errorf("Serve returned %v, after %d goodbyes", err, goodbyes)
	}
}
