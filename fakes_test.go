package taskexec

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// memNetwork is a network in memory: its listeners are reached by their
// address, over net.Pipe. The zero value is ready.
type memNetwork struct {
	mu        sync.Mutex // guards following
	listeners map[string]*memListener
}

// listen makes addr reachable until the listener is closed.
func (n *memNetwork) listen(addr string) *memListener {
	l := &memListener{network: n, addr: addr, conns: make(chan net.Conn), closed: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners == nil {
		n.listeners = make(map[string]*memListener)
	}
	n.listeners[addr] = l
	return l
}

// dial fits WithDialer.
func (n *memNetwork) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listeners[addr]
	n.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	}
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// greeted is a coordinator by hand, in a session with the worker at addr.
func (n *memNetwork) greeted(t testing.TB, addr string) *peer {
	t.Helper()
	conn, err := n.dial(t.Context(), "mem", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	p := newPeer(t, conn)
	p.send(helloA)
	p.expect("WELCOME …")
	return p
}

// memListener is a net.Listener of a memNetwork.
type memListener struct {
	network *memNetwork
	addr    string
	conns   chan net.Conn
	closed  chan struct{}
	once    sync.Once
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.network.mu.Lock()
		defer l.network.mu.Unlock()
		if l.network.listeners[l.addr] == l {
			delete(l.network.listeners, l.addr)
		}
	})
	return nil
}

func (l *memListener) Addr() net.Addr { return memAddr(l.addr) }

type memAddr string

func (a memAddr) Network() string { return "mem" }
func (a memAddr) String() string  { return string(a) }

// withLeastWindow has sessions hold so many tasks, however slow their workers
// are, for tests that need tasks to wait at a worker.
func withLeastWindow(n int) CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) { c.leastWindow = n })
}

// peer is one side of a session played by a test, line by line.
type peer struct {
	t    testing.TB
	conn net.Conn
	in   *bufio.Reader
}

func newPeer(t testing.TB, conn net.Conn) *peer {
	return &peer{t: t, conn: conn, in: bufio.NewReader(conn)}
}

// send writes lines, each with a newline after it.
func (p *peer) send(lines ...string) {
	p.t.Helper()
	if _, err := io.WriteString(p.conn, strings.Join(lines, "\n")+"\n"); err != nil {
		p.t.Errorf("sending %q: %v", lines, err)
	}
}

// next reads a line, without its newline.
func (p *peer) next() string {
	p.t.Helper()
	line, err := p.in.ReadString('\n')
	if err != nil {
		p.t.Errorf("reading a line: got %q and %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

// expect reads lines and compares them. A want that ends in … matches any line
// that begins with what stands before it.
func (p *peer) expect(wants ...string) {
	p.t.Helper()
	for _, want := range wants {
		got := p.next()
		prefix, open := strings.CutSuffix(want, "…")
		if got != want && !(open && strings.HasPrefix(got, prefix)) {
			p.t.Errorf("got line %q, want %q", got, want)
		}
	}
}

// expectEnd reads until the connection ends, which should be at once.
func (p *peer) expectEnd() {
	p.t.Helper()
	if rest, err := io.ReadAll(p.in); len(rest) > 0 || err != nil {
		p.t.Errorf("got %q and %v, want the end of the connection", rest, err)
	}
}
