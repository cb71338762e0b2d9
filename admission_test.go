package taskexec

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// connected is a stranger whom the worker has seen.
func (wt *workerTest) connected() *peer {
	p := wt.stranger()
	synctest.Wait()
	return p
}

func TestTheOldestStrangerMakesRoomForTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, parrot)
		var strangers []*peer
		for range strangersMost {
			strangers = append(strangers, wt.connected())
		}
		for range 3 * strangersMost {
			next := wt.connected()
			strangers[0].expectEnd()
			strangers = append(strangers[1:], next)
		}
		// Those that are left are as welcome as ever, and no longer in the way.
		for _, p := range strangers {
			p.send(helloA)
			p.expect("WELCOME …")
		}
		for range strangersMost {
			strangers = append(strangers, wt.connected())
		}
		strangers[0].send("PING 1")
		strangers[0].expect("PONG 1")
	})
}

func TestAStrangerThatMadeRoomIsAnErrorOfServeConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt := startWorker(t, parrot)
		here, there := net.Pipe()
		defer here.Close()
		served := make(chan error, 1)
		go func() { served <- wt.worker.ServeConn(t.Context(), there) }()
		synctest.Wait()
		for range strangersMost {
			wt.connected()
		}
		if err := <-served; !errors.Is(err, errMadeRoom) {
			t.Errorf("ServeConn returned %v", err)
		}
	})
}

// Whatever strangers do, a coordinator that greets at once gets in.
func TestStrangersKeepNoCoordinatorOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		w := cl.worker("a:1", echo)
		ctx, cancel := context.WithCancel(t.Context())
		var strangers sync.WaitGroup
		for i := range 8 * strangersMost {
			strangers.Go(func() {
				for sleep(ctx, time.Duration(i)*time.Millisecond) { // and again, when it had to make room
					conn, err := cl.network.dial(ctx, "mem", "a:1")
					if err != nil {
						return
					}
					for _, b := range []byte(helloA) { // but never its end
						if _, err := conn.Write([]byte{b}); err != nil || !sleep(ctx, time.Second) {
							break
						}
					}
					conn.Close()
				}
			})
		}
		time.Sleep(5 * time.Second)
		synctest.Wait() // one that makes room is there for a moment
		if n := w.Stats().Sessions; n > strangersMost {
			t.Errorf("%d strangers are connected", n)
		}
		tasks := tasksOf("a", 100)
		start := time.Now()
		report, err := cl.coordinator(WithWorkers("a", "a:1")).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err != nil || time.Since(start) > time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		cancel()
		strangers.Wait()
	})
}

func TestAWorkerWithAllItsSessionsIsBusyUntilOneEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("a:1", echo)
		session := func() *peer {
			conn, err := cl.network.dial(t.Context(), "mem", "a:1")
			if err != nil {
				t.Fatal(err)
			}
			p := newPeer(t, conn)
			p.send(helloA)
			return p
		}
		var sessions []*peer
		for range sessionsMost {
			p := session()
			p.expect("WELCOME …")
			sessions = append(sessions, p)
		}
		for range 3 * strangersMost {
			p := session()
			p.expect("ERROR busy there are 256 sessions already")
			p.expectEnd()
			p.conn.Close()
		}
		time.AfterFunc(20*time.Second, func() { sessions[0].conn.Close() })
		tasks := tasksOf("a", 10)
		report, err := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Minute)).Run(t.Context(), tasks)
		checkReport(t, tasks, report, err)
		if err != nil || report.Elapsed < 20*time.Second {
			t.Errorf("after %v: %v", report.Elapsed, err)
		}
		synctest.Wait()   // the worker has noticed that the coordinator has left
		last := session() // whose place is free again
		last.expect("WELCOME …")
		for _, p := range append(sessions, last) {
			p.conn.Close()
		}
	})
}

// moodyListener fails as its errors say, one after another, and notes when it
// was asked.
type moodyListener struct {
	*memListener
	errs chan error

	mu    sync.Mutex // guards following
	asked []time.Time
}

func (l *moodyListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	l.asked = append(l.asked, time.Now())
	l.mu.Unlock()
	select {
	case err := <-l.errs:
		return nil, err
	default:
		return l.memListener.Accept()
	}
}

// waits are the times between.
func (l *moodyListener) waits() []time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var waits []time.Duration
	for i := 1; i < len(l.asked); i++ {
		waits = append(waits, l.asked[i].Sub(l.asked[i-1]))
	}
	return waits
}

// A system without file descriptors fails in this way.
var errNoFiles = &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", syscall.EMFILE)}

func moodyWorker(t *testing.T, errs ...error) (*workerTest, *moodyListener) {
	network := new(memNetwork)
	ln := &moodyListener{memListener: network.listen("w:1"), errs: make(chan error, len(errs))}
	for _, err := range errs {
		ln.errs <- err
	}
	return serveTest(t, ln, func() net.Conn {
		conn, err := network.dial(t.Context(), "mem", "w:1")
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}, parrot), ln
}

func TestAListenerThatFailsIsAskedAgainLaterAndLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wt, ln := moodyWorker(t, slices.Repeat([]error{errNoFiles}, 100)...)
		time.Sleep(time.Hour)
		ms := time.Millisecond
		waits := ln.waits()
		want := []time.Duration{5 * ms, 10 * ms, 20 * ms, 40 * ms, 80 * ms, 160 * ms, 320 * ms, 640 * ms, 1000 * ms, 1000 * ms}
		if d := cmp.Diff(want, waits[:min(len(want), len(waits))]); d != "" || len(waits) != 100 {
			t.Errorf("it was asked again %d times, after (-want +got):\n%s", len(waits), d)
		}
		wt.expectServing()
		synctest.Wait()       // it is asked again already
		ln.errs <- errNoFiles // a new row
		wt.expectServing()
		time.Sleep(time.Second)
		if waits = ln.waits(); waits[len(waits)-1] != 5*ms {
			t.Errorf("after a session it was asked again after %v", waits[len(waits)-1])
		}
	})
}

func TestAListenerWithTroublesOfItsOwnIsAskedTenTimes(t *testing.T) {
	broken := errors.New("out of order")
	for _, c := range []struct {
		err    error
		n      int // errors
		fails  bool
		asked  int
		reason string
	}{
		{broken, 9, false, 10, "it may have been the peer's fault"},
		{broken, 10, true, 10, "nobody knows whether this will ever pass"},
		{fmt.Errorf("multiplexed: %w", net.ErrClosed), 1, true, 1, "it is closed, and will not be open again"},
	} {
		synctest.Test(t, func(t *testing.T) {
			wt, ln := moodyWorker(t, slices.Repeat([]error{c.err}, c.n)...)
			time.Sleep(time.Hour)
			if c.fails {
				wt.expectServed(c.err)
				if !strings.Contains(wt.err.Error(), "worker w: ") {
					t.Errorf("%v does not name the worker", wt.err)
				}
			} else {
				wt.expectServing()
			}
			if n := 1 + len(ln.waits()); n < c.asked || n > c.asked+2 {
				t.Errorf("%v was asked %d times, want %d: %s", c.err, n, c.asked, c.reason)
			}
		})
	}
}

// A listener whose first connection is looked at, because its type says nothing,
// has not been looked at when it has failed.
func TestAListenerThatFailsFirstIsStillChecked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := &moodyListener{memListener: new(memNetwork).listen("w:1"), errs: make(chan error, 1)}
		ln.errs <- errNoFiles
		worker := NewWorker(parrot)
		served := make(chan error, 1)
		go func() { served <- worker.Serve(t.Context(), publicListener{ln}) }()
		conn, err := ln.network.dial(t.Context(), "mem", "w:1")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := <-served; !errors.Is(err, ErrInsecureTransport) {
			t.Errorf("Serve returned %v", err)
		}
	})
}

// publicListener says that it can be reached from other machines.
type publicListener struct{ net.Listener }

func (publicListener) Addr() net.Addr { return elsewhere{}.LocalAddr() }

// A failing listener holds up neither the end of the worker's work nor its drain.
func TestServeEndsThoughItsListenerFails(t *testing.T) {
	cause := errors.New("power cut")
	for name, end := range map[string]struct {
		how  func(wt *workerTest)
		want error
	}{
		"Shutdown": {func(wt *workerTest) { wt.worker.Shutdown(context.Background()) }, nil},
		"ctx":      {func(wt *workerTest) { wt.stop(cause) }, cause},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				wt, _ := moodyWorker(t, slices.Repeat([]error{errNoFiles}, 1000)...)
				time.Sleep(10*time.Second + time.Millisecond)
				start := time.Now()
				end.how(wt)
				wt.expectServed(end.want)
				if d := time.Since(start); d != 0 {
					t.Errorf("it took %v", d)
				}
			})
		})
	}
}

// panickyListener panics once it has accepted a connection.
type panickyListener struct {
	*memListener
	accepted bool
}

func (l *panickyListener) Accept() (net.Conn, error) {
	if l.accepted {
		time.Sleep(time.Second)
		panic("no good")
	}
	l.accepted = true
	return l.memListener.Accept()
}

func TestAPanicOfAListenerEndsItsSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var network memNetwork
		ln := &panickyListener{memListener: network.listen("w:1")}
		raised := make(chan any, 1)
		go func() {
			defer func() { raised <- recover() }()
			NewWorker(parrot).Serve(t.Context(), ln)
		}()
		p := network.greeted(t, "w:1")
		p.expectClosing()
		if got := <-raised; got != "no good" {
			t.Errorf("Serve panicked with %v", got)
		}
	})
}

// Whatever connections do, and a drain too, each gives back the place that it
// had, and no other's.
func TestEachConnectionGivesBackItsOwnPlace(t *testing.T) {
	says := []string{helloA + "\nRUN 0 1 0 x\n", helloA + "\n", helloA, "NONSENSE\n", ""}
	for trial := range 20 {
		synctest.Test(t, func(t *testing.T) {
			w := NewWorker(parrot)
			var all sync.WaitGroup
			for i := range 10 * strangersMost {
				here, there := net.Pipe()
				all.Go(func() { w.ServeConn(t.Context(), there) })
				all.Go(func() {
					defer here.Close()
					if _, err := here.Write([]byte(says[i%len(says)])); err == nil {
						here.Read(make([]byte, 100))
					}
				})
			}
			if trial%2 == 0 {
				if err := w.Shutdown(t.Context()); err != nil {
					t.Error(err)
				}
			}
			all.Wait()
			if e := w.entrance; len(e.strangers) != 0 || e.greeted != 0 || len(w.sessions) != 0 {
				t.Errorf("%d strangers, %d that have greeted and %d sessions are left", len(e.strangers), e.greeted, len(w.sessions))
			}
		})
	}
}
