package taskexec

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"
)

// These attacks are on limits: how many sessions and strangers a worker has, how
// many lines bring no work, and what lines make either side hold.

// startPatientWorker is one whose limits are all that ends a stranger's
// connection while a test runs.
func startPatientWorker(t *testing.T) *attack {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveTest(t, ln, nil, HandlerFunc(moody), WithHandshakeTimeout(time.Hour))
	return &attack{t: t, addr: ln.Addr().String()}
}

// Strangers who say nothing make room for those who come after them, so that
// none keeps a coordinator out.
func TestAttackOfStrangersWhoStay(t *testing.T) {
	a := startPatientWorker(t)
	const most, strangers = 32, 100
	left := make(chan struct{}, strangers)
	for range strangers {
		conn := a.dial()
		if conn == nil {
			t.Fatal("not connected")
		}
		defer conn.Close()
		a.all.Go(func() {
			if _, ended := a.hold(conn, 20*time.Second); ended {
				left <- struct{}{}
			}
		})
		t.Cleanup(a.all.Wait) // when conn is closed
	}
	for i := range strangers - most {
		select {
		case <-left:
		case <-time.After(10 * time.Second):
			t.Fatalf("only %d of %d silent strangers were dropped, and at most %d may stay", i, strangers, most)
		}
	}
	a.run(tasksOf("a", 8)...)
}

// A worker has so many sessions and no more, and says so.
func TestAttackOfMoreSessionsThanThereMayBe(t *testing.T) {
	a := startPatientWorker(t)
	const fewest, most = 224, 256 // beside strangers, or with them
	var peers []*peer
	greet := func() string {
		conn := a.dial()
		if conn == nil {
			t.Fatal("not connected")
		}
		t.Cleanup(func() { conn.Close() })
		p := newPeer(t, conn)
		p.send(helloA)
		line := p.next()
		if strings.HasPrefix(line, "WELCOME ") {
			peers = append(peers, p)
		}
		return line
	}
	answer := greet()
	for len(peers) <= most && strings.HasPrefix(answer, "WELCOME ") {
		answer = greet()
	}
	if !strings.HasPrefix(answer, "ERROR busy ") || len(peers) < fewest || len(peers) > most {
		t.Errorf("after %d sessions another is answered with %q; want ERROR busy after %d to %d", len(peers), answer, fewest, most)
	}
	peers[0].send("RUN 0 1 0 x")
	peers[0].expectReports("DONE 0 did x")
	for _, p := range peers[1:] {
		p.conn.Close()
	}
	a.run(tasksOf("a", 8)...) // it tries again until the worker has noticed
}

// Lines that bring no work end a session when there are too many, though the
// peer reads all the answers.
func TestAttackOfLinesThatBringNoWork(t *testing.T) {
	const most = 64 << 20 // bytes of them
	for _, line := range []string{"PING 1\n", "RECALL 1\n", "CANCEL\n"} {
		t.Run(strings.TrimSpace(line), func(t *testing.T) {
			a := startPatientWorker(t)
			conn := a.dial()
			if conn == nil {
				t.Fatal("not connected")
			}
			defer conn.Close()
			var end string
			a.all.Go(func() {
				heard, _ := a.hold(conn, time.Minute)
				end = heard[strings.LastIndexByte(strings.TrimSuffix(heard, "\n"), '\n')+1:]
			})
			batch := []byte(strings.Repeat(line, 8000))
			_, err := io.WriteString(conn, helloA+"\n")
			wrote := 0
			for ; err == nil && wrote < most; wrote += len(batch) {
				conn.SetWriteDeadline(time.Now().Add(20 * time.Second))
				_, err = conn.Write(batch)
			}
			if err == nil {
				conn.CloseWrite()
			}
			a.all.Wait()
			if want := "ERROR flood "; err == nil || !strings.HasPrefix(end, want) {
				t.Errorf("after %d bytes the last line is %q, want %s", wrote, cut(end, 200), want)
			}
			a.run(tasksOf("a", 1)...)
		})
	}
}

// Tasks that wait take no more memory than is stated, though the peer has each of
// them stand among others that it takes back.
func TestAttackOfTasksThatHoldOnToOthers(t *testing.T) {
	const most = 5 << 20 // of .github/SECURITY.md
	release := make(chan struct{})
	worker := NewWorker(HandlerFunc(func(context.Context, Task) (string, error) {
		<-release
		return "", nil
	}))
	here, there := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- worker.ServeConn(t.Context(), there) }()
	p := newPeer(t, here)
	p.send(helloA)
	p.expect("WELCOME …")
	other := fmt.Sprintf("RUN %d 1 0 %s\nRECALL %[1]d\n", windowTasks, strings.Repeat("x", longText))
	const waiting = windowTasks - 2 // and one that runs, and one that comes and goes
	lines := new(strings.Builder)
	lines.WriteString("RUN 0 1 0 x\n")
	for i := range waiting {
		fmt.Fprintf(lines, "RUN %d 1 0 x\n", i+1)
		for range pieceBytes/longText + 1 {
			lines.WriteString(other)
		}
	}
	lines.WriteString("PING 1\n")
	before := heapInUse()
	go io.WriteString(here, lines.String())
	line := p.next()
	for strings.HasPrefix(line, "RETURN ") {
		line = p.next()
	}
	if line != "PONG 1" {
		t.Errorf("got %q", line)
	}
	if n := heapInUse() - before; n > most {
		t.Errorf("%d tasks that wait take %d bytes, and %d are stated", waiting, n, most)
	}
	runtime.KeepAlive(lines) // before and after
	if stats := worker.Stats(); stats.Waiting != waiting {
		t.Errorf("%d tasks wait, want %d", stats.Waiting, waiting)
	}
	here.Close()
	close(release)
	<-served
}

// RUNs that are read together are taken window by window: the list of them stays
// with the session, and does not grow to what the room for one very long line
// can hold of them.
func TestAttackOfManyRunsReadTogether(t *testing.T) {
	worker := NewWorker(parrot)
	here, there := net.Pipe() // of which all is read that there is room for
	served := make(chan error, 1)
	go func() { served <- worker.ServeConn(t.Context(), there) }()
	p := newPeer(t, here)
	p.send(helloA)
	p.expect("WELCOME …")
	p.send("CANCEL", "PING 1") // what follows is given back
	p.expect("PONG 1")
	session := (&workerTest{t: t, worker: worker}).only()
	var lines strings.Builder
	for _, kib := range []int{900, 200} { // the second begins in the room for the first
		lines.WriteString("RUN 1 1 0 " + strings.Repeat("x", kib<<10) + "\n")
	}
	const short = 80_000
	lines.WriteString(strings.Repeat("RUN 1 1 0\n", short))
	go io.WriteString(here, lines.String())
	for range short + 2 {
		p.expect("RETURN 1")
	}
	here.Close()
	<-served
	if n := cap(session.batch); n > 2*windowTasks {
		t.Errorf("the session goes on holding room for %d RUNs", n)
	}
}

// A worker's reports are settled window by window, as a coordinator's RUNs are
// taken, however many are read together: it is an error anyway to report more.
func TestAttackOfManyReportsReadTogether(t *testing.T) {
	var lines strings.Builder
	for task, kib := range []int{900, 200} { // the second begins in the room for the first
		fmt.Fprintf(&lines, "DONE %d 0 %s\n", task, strings.Repeat("x", kib<<10))
	}
	lines.WriteString(strings.Repeat("DONE 2 0\n", 80_000))
	attack := lines.String()
	c, err := NewCoordinator(WithWorkers("a", "worker:1"), WithWorkerWait(0), WithWindow(windowTasks),
		WithDialer(func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe() // of which all is read that there is room for
			go func() {
				defer there.Close()
				p := newPeer(t, there)
				p.next() // HELLO
				p.send("WELCOME taskexec/1 {\"slots\":3}")
				for range 3 {
					p.next()
				}
				io.WriteString(there, attack)
			}()
			return here, nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	tasks := []Task{{"a", "0", 0}, {"a", "1", 0}, {"a", "2", 0}}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	report, _ := c.Run(t.Context(), tasks)
	runtime.ReadMemStats(&after)
	if report.Counts.Done != len(tasks) {
		t.Errorf("counts %+v, want all Done", report.Counts)
	}
	const most = 8 << 20 // of which the buffers and the outputs take half
	if n := after.TotalAlloc - before.TotalAlloc; n > most {
		t.Errorf("it took %d bytes to read %d, want at most %d", n, len(attack), most)
	}
}

// heapInUse is what is left on the heap when garbage is collected.
func heapInUse() int64 {
	runtime.GC()
	return heapBytes()
}
