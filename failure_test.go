package taskexec

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// scripts serves addr with a worker that play plays, once for each session, in
// turn, from 0. The connection is closed when play returns.
func (c *cluster) scripts(addr string, play func(n int, p *peer)) {
	ln := c.network.listen(addr)
	c.serving.Go(func() {
		for n := 0; ; n++ {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			play(n, newPeer(c.t, conn))
			conn.Close()
		}
	})
	c.stops = append(c.stops, func() { ln.Close() })
}

// task reads a RUN, and returns the task's number.
func (p *peer) task() string {
	p.t.Helper()
	line := p.next()
	f := strings.Fields(line + " ? ?")
	if f[0] != "RUN" {
		p.t.Errorf("got line %q, want a RUN", line)
	}
	return f[1]
}

// A process is a worker that can be killed and started again at its address,
// each time as another instance.
type process struct {
	cluster *cluster
	addr    string
	handler HandlerFunc
	opts    []WorkerOption

	mu     sync.Mutex // guards following
	worker *Worker
	conns  []net.Conn
	ln     net.Listener
	cancel context.CancelFunc
}

// process starts one. It is killed at the test's end.
func (c *cluster) process(addr string, handler HandlerFunc, opts ...WorkerOption) *process {
	p := c.lateProcess(addr, handler, opts...)
	p.start()
	return p
}

// lateProcess returns one that is not started yet.
func (c *cluster) lateProcess(addr string, handler HandlerFunc, opts ...WorkerOption) *process {
	p := &process{cluster: c, addr: addr, handler: handler, opts: append([]WorkerOption{WithName(addr)}, opts...)}
	c.stops = append(c.stops, p.kill)
	return p
}

func (p *process) start() *Worker {
	p.mu.Lock()
	defer p.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	p.worker, p.cancel, p.conns = NewWorker(p.handler, p.opts...), cancel, nil
	p.ln = &processListener{p.cluster.network.listen(p.addr), p}
	w, ln := p.worker, p.ln
	p.cluster.serving.Go(func() { w.Serve(ctx, ln) })
	return w
}

// kill ends the process as SIGKILL does: without a word. Its handlers' contexts
// end, since there is no other way to end a goroutine.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ln == nil {
		return
	}
	p.ln.Close()
	for _, conn := range p.conns {
		conn.Close()
	}
	p.cancel()
}

// current is the worker that was started last.
func (p *process) current() *Worker {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.worker
}

type processListener struct {
	net.Listener
	process *process
}

func (l *processListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.process.mu.Lock()
		l.process.conns = append(l.process.conns, conn)
		l.process.mu.Unlock()
	}
	return conn, err
}

// A relay stands between coordinators and one address, and can lose what goes
// either way without either side being told.
type relay struct {
	cluster                 *cluster
	toWorker, toCoordinator hole

	mu    sync.Mutex // guards following
	conns []net.Conn
}

// A hole is one direction of a relay.
type hole struct {
	open  atomic.Bool                                // nothing comes through, not even the end
	delay func(p []byte, write func(p []byte) error) // nil: bytes go through as they come
}

// relay listens at front for what goes on to back.
func (c *cluster) relay(front, back string) *relay {
	r := &relay{cluster: c}
	ln := c.network.listen(front)
	c.serving.Go(func() {
		for {
			here, err := ln.Accept()
			if err != nil {
				return
			}
			there, err := c.network.dial(context.Background(), "tcp", back)
			if err != nil {
				here.Close()
				continue
			}
			r.mu.Lock()
			r.conns = append(r.conns, here, there)
			r.mu.Unlock()
			c.serving.Go(func() { r.toWorker.pass(there, here) })
			c.serving.Go(func() { r.toCoordinator.pass(here, there) })
		}
	})
	c.stops = append(c.stops, func() { ln.Close(); r.cut() })
	return r
}

// cut ends all connections.
func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, conn := range r.conns {
		conn.Close()
	}
	r.conns = nil
}

func (h *hole) pass(dst, src net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
		if err != nil {
			if !h.open.Load() {
				dst.Close()
			}
			return
		}
		switch {
		case h.open.Load():
		case h.delay != nil:
			h.delay(buf[:n], func(p []byte) error { _, err := dst.Write(p); return err })
		default:
			if _, err := dst.Write(buf[:n]); err != nil {
				io.Copy(io.Discard, src)
				return
			}
		}
	}
}

// after calls f in a while, unless the test is over by then.
func (c *cluster) after(d time.Duration, f func()) {
	timer := time.AfterFunc(d, f)
	c.stops = append(c.stops, func() { timer.Stop() })
}
