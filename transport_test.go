package taskexec

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

type addrConn struct {
	net.Conn
	local, remote net.Addr
}

func (c addrConn) LocalAddr() net.Addr  { return c.local }
func (c addrConn) RemoteAddr() net.Addr { return c.remote }

func tcpAddr(t *testing.T, s string) net.Addr {
	t.Helper()
	a, err := net.ResolveTCPAddr("tcp", s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestLocalIsWhatCannotLeaveTheMachine(t *testing.T) {
	tcp := func(s string) net.Addr { return tcpAddr(t, s) }
	for _, test := range []struct {
		reason        string
		local, remote net.Addr
		want          bool
	}{
		{"both ends on loopback", tcp("127.0.0.1:1"), tcp("127.0.0.2:2"), true},
		{"IPv6 loopback", tcp("[::1]:1"), tcp("[::1]:2"), true},
		{"loopback as IPv6 writes IPv4", tcp("[::ffff:127.0.0.1]:1"), tcp("[::ffff:127.0.0.1]:2"), true},
		{"the other end elsewhere", tcp("127.0.0.1:1"), tcp("192.0.2.1:2"), false},
		{"this end elsewhere", tcp("192.0.2.1:1"), tcp("127.0.0.1:2"), false},
		{"link-local with a zone", tcp("[fe80::1%1]:1"), tcp("[fe80::2%1]:2"), false},
		{"unspecified", tcp("0.0.0.0:1"), tcp("0.0.0.0:2"), false},
		{"unix", &net.UnixAddr{Net: "unix", Name: "/x"}, &net.UnixAddr{Net: "unix"}, true},
		{"in memory", memAddr("a"), memAddr("b"), true},
		{"no addresses at all", nil, nil, true},
	} {
		if got := isLocal(addrConn{local: test.local, remote: test.remote}); got != test.want {
			t.Errorf("%s: isLocal is %v for %v and %v", test.reason, got, test.local, test.remote)
		}
	}
}

// expectInsecure fails the test unless err is the refusal of plaintext, and says
// what to do.
func expectInsecure(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrInsecureTransport) || !strings.Contains(err.Error(), "WithTLS") || !strings.Contains(err.Error(), "WithInsecure") {
		t.Errorf("got %v, want ErrInsecureTransport and what to do", err)
	}
}

func TestPlaintextWorkerListensOnlyOnThisMachine(t *testing.T) {
	for _, test := range []struct {
		addr   string
		local  bool
		reason string
	}{
		{"127.0.0.1:0", true, "loopback"},
		{"localhost:0", true, "a name of it"},
		{"unix:" + filepath.Join(t.TempDir(), "s"), true, "a unix socket"},
		{":0", false, "every address there is"},
		{"0.0.0.0:0", false, "the same for IPv4"},
		{"[::]:0", false, "the same for IPv6"},
	} {
		for _, insecure := range []bool{false, true} {
			var opts []WorkerOption
			if insecure {
				opts = append(opts, WithInsecure())
			}
			ctx, cancel := context.WithCancel(t.Context())
			if test.local || insecure {
				cancel() // it would serve
			}
			err := NewWorker(parrot, opts...).ListenAndServe(ctx, test.addr)
			switch {
			case !test.local && !insecure:
				expectInsecure(t, err)
			case !errors.Is(err, context.Canceled) && !strings.Contains(err.Error(), "canceled"):
				t.Errorf("%s (%s), with insecure %v: got %v", test.addr, test.reason, insecure, err)
			}
			cancel()
		}
	}
}

// A hidden listener is one whose type says nothing of what it gives.
type hiddenListener struct {
	*memListener
	addr net.Addr
}

func (l hiddenListener) Addr() net.Addr { return l.addr }

func TestWorkerJudgesAnUnknownListenerByItsFirstConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var network memNetwork
		ln := hiddenListener{network.listen("w:1"), tcpAddr(t, "192.0.2.1:1")}
		served := make(chan error)
		go func() { served <- NewWorker(parrot).Serve(t.Context(), ln) }()
		synctest.Wait()
		conn, err := network.dial(t.Context(), "tcp", "w:1")
		if err != nil {
			t.Fatal(err)
		}
		expectInsecure(t, <-served)
		newPeer(t, conn).expectEnd()
		if _, err := network.dial(t.Context(), "tcp", "w:1"); err == nil {
			t.Error("it listens on")
		}
	})
}

// After a first connection that was as it should be, a stranger cannot end
// Serve by one that is not.
func TestPlaintextFromElsewhereEndsOnlyItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conns := make(chan net.Conn, 1)
		ln := &chanListener{conns: conns, addr: tcpAddr(t, "192.0.2.1:1"), closed: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error)
		go func() { served <- NewWorker(parrot).Serve(ctx, ln) }()
		client, server := net.Pipe()
		conns <- tls.Server(server, &tls.Config{Certificates: []tls.Certificate{{}}})
		client.Close()

		client, server = net.Pipe()
		conns <- addrConn{server, tcpAddr(t, "192.0.2.1:1"), tcpAddr(t, "192.0.2.2:2")}
		newPeer(t, client).expectEnd()

		client, server = net.Pipe()
		conns <- server
		p := newPeer(t, client)
		p.send(helloA)
		p.expect("WELCOME …")
		client.Close()
		cancel()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve returned %v", err)
		}
	})
}

// chanListener gives what it is sent.
type chanListener struct {
	conns  chan net.Conn
	addr   net.Addr
	closed chan struct{}
}

func (l *chanListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *chanListener) Addr() net.Addr { return l.addr }

func (l *chanListener) Close() error {
	select {
	case <-l.closed:
	default:
		close(l.closed)
	}
	return nil
}

func TestServeConnRefusesPlaintextFromElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, insecure := range []bool{false, true} {
			var opts []WorkerOption
			if insecure {
				opts = append(opts, WithInsecure())
			}
			client, server := net.Pipe()
			served := make(chan error, 1)
			go func() {
				served <- NewWorker(parrot, opts...).ServeConn(t.Context(), addrConn{server, tcpAddr(t, "192.0.2.1:1"), tcpAddr(t, "192.0.2.2:2")})
			}()
			if !insecure {
				newPeer(t, client).expectEnd()
				expectInsecure(t, <-served)
				continue
			}
			p := newPeer(t, client)
			p.send(helloA)
			p.expect("WELCOME …")
			client.Close()
			if err := <-served; err != nil {
				t.Errorf("with WithInsecure: %v", err)
			}
		}
	})
}

// Names may lead anywhere; what counts is where the connection goes. Nothing is
// sent, and nobody waits for it to change.
func TestCoordinatorSendsNoPlaintextElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var heard []byte
		var dials int
		dial := func(context.Context, string, string) (net.Conn, error) {
			dials++
			client, server := net.Pipe()
			go func() {
				b, _ := io.ReadAll(server)
				heard = append(heard, b...)
			}()
			return addrConn{client, tcpAddr(t, "192.0.2.1:1"), tcpAddr(t, "192.0.2.2:2")}, nil
		}
		c := newTestCoordinator(t, WithDialer(dial), WithWorkers("a", "localhost:1"))
		start := time.Now()
		report, err := c.Run(t.Context(), mustParse(t, "a1"))
		checkReport(t, mustParse(t, "a1"), report, err)
		expectInsecure(t, err)
		var we *WorkerError
		if !errors.As(err, &we) || we.Addr != "localhost:1" {
			t.Errorf("%v does not name the worker", err)
		}
		synctest.Wait()
		if len(heard) > 0 || dials != 1 || time.Since(start) != 0 {
			t.Errorf("the other side heard %q in %d dials over %v", heard, dials, time.Since(start))
		}
	})
}

func TestCoordinatorDialsElsewhereWithInsecure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		cl.worker("w:1", echo)
		dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := cl.dial(ctx, network, addr)
			return addrConn{conn, tcpAddr(t, "192.0.2.1:1"), tcpAddr(t, "192.0.2.2:2")}, err
		}
		c := newTestCoordinator(t, WithDialer(dial), WithWorkers("a", "w:1"), WithInsecure())
		if _, err := c.Run(t.Context(), mustParse(t, "a1")); err != nil {
			t.Error(err)
		}
	})
}

// endlessConn takes no deadlines, as connections through an SSH client do not.
type endlessConn struct{ net.Conn }

func (endlessConn) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (endlessConn) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (endlessConn) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

// patientConn takes no deadline for reading alone.
type patientConn struct{ net.Conn }

func (patientConn) SetReadDeadline(time.Time) error { return os.ErrNoDeadline }

// busyConn takes no deadline for writing alone.
type busyConn struct{ net.Conn }

func (busyConn) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

func TestAConnectionThatTakesOnlySomeDeadlinesIsRefused(t *testing.T) {
	for _, conn := range []func(net.Conn) net.Conn{
		func(c net.Conn) net.Conn { return patientConn{c} }, func(c net.Conn) net.Conn { return busyConn{c} },
	} {
		synctest.Test(t, func(t *testing.T) {
			cl := newCluster(t)
			cl.script("a:1", func(p *peer) { // it is silent for ever
				io.Copy(io.Discard, p.in)
			})
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour) // or the run would go on for ever
			defer cancel()
			report, err := cl.coordinator(WithWorkers("a", "a:1"), WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
				dialed, err := cl.dial(ctx, network, addr)
				return conn(dialed), err
			})).Run(ctx, mustParse(t, "a1"))
			if !errors.Is(err, os.ErrNoDeadline) || report.Elapsed > 0 {
				t.Errorf("Run returned %v after %v", err, report.Elapsed)
			}
		})
	}
}

func TestAConnectionWithoutDeadlinesIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer client.Close()
		if err := NewWorker(parrot).ServeConn(t.Context(), endlessConn{server}); !errors.Is(err, os.ErrNoDeadline) {
			t.Errorf("ServeConn returned %v", err)
		}
		newPeer(t, client).expectEnd()

		cl := newCluster(t)
		cl.script("a:1", func(p *peer) { // it would be silent for ever
			io.Copy(io.Discard, p.in)
		})
		report, err := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerWait(time.Hour), WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := cl.dial(ctx, network, addr)
			return endlessConn{conn}, err
		})).Run(t.Context(), mustParse(t, "a1"))
		if !errors.Is(err, os.ErrNoDeadline) || report.Elapsed > 0 {
			t.Errorf("Run returned %v after %v", err, report.Elapsed)
		}
	})
}

func TestAConnectionThatIsClosedIsNotSaidToTakeNoDeadlines(t *testing.T) {
	pipe, _ := net.Pipe()
	ln := listenTCP(t)
	defer ln.Close()
	tcp, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, conn := range []net.Conn{pipe, tcp} {
		conn.Close()
		if err := NewWorker(parrot).ServeConn(t.Context(), conn); errors.Is(err, errNoDeadlines) {
			t.Errorf("a closed %T: ServeConn returned %v", conn, err)
		}
	}
}

func TestADialerThatReturnsNothingIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nothing := func(context.Context, string, string) (net.Conn, error) { return nil, nil }
		report, err := newTestCoordinator(t, WithWorkers("a", "a:1"), WithWorkerWait(time.Hour), WithDialer(nothing)).Run(t.Context(), mustParse(t, "a1"))
		if !errors.Is(err, errNoConnection) || report.Elapsed > 0 {
			t.Errorf("Run returned %v after %v", err, report.Elapsed)
		}
	})
}
