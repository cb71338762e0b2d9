package taskexec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// A simNetwork is a network in memory whose connections take time and break,
// as a seed has it. Like TCP, and unlike net.Pipe, it buffers what is written,
// and an end learns what became of the other only by what arrives from it.
//
// All that is random about a connection follows from the seed, who dials whom,
// and for the how manieth time. It does not depend on the order in which
// goroutines happen to come.
type simNetwork struct {
	seed  uint64
	plan  simNetworkPlan
	calm  time.Duration        // after the start no further connection breaks
	holes map[string][]simHole // by host
	plain map[string]bool      // hosts of workers without heartbeats
	start time.Time
	sim   *simulation
	// override replaces what would be drawn for a connection.
	override func(dial simDial, n int, plan *simConnPlan)

	mu        sync.Mutex // guards following, what connections and their directions hold, and what the simulation logs
	listeners map[string]*simListener
	dials     map[simDial]int
	drawn     map[string]simConnPlan // by name of the connection
	conns     []*simConn             // of the side that dialed
}

// A simNetworkPlan is what the connections of a simulation have in common.
type simNetworkPlan struct {
	Latency time.Duration // most of a connection's, one way
	Jitter  time.Duration // most of a chunk's besides
	PerByte time.Duration // 0 for links as fast as they are asked to be
	Buffer  int           // bytes of each direction; a writer waits when it is full
	Faults  int           // one connection in so many has one; 0 for none
	Deaf    int           // in one direction in so many a reader may stop to read; 0 for none
}

// A simHole is a time in which bytes to or from a host are on their way and do
// not arrive.
type simHole struct {
	Kind        simFault
	From, Until time.Duration // Until is simNever for good
}

const simNever = time.Duration(1<<63 - 1)

// A simDial names what is dialed by whom.
type simDial struct {
	run  int
	addr string
}

// A simConnPlan is what was drawn for a connection.
type simConnPlan struct{ Up, Down simPipePlan }

// A simPipePlan is what was drawn for one direction of a connection.
type simPipePlan struct {
	Latency    time.Duration
	JitterSeed uint64
	Fault      simFault // what becomes of the byte at FaultAt and those after it
	FaultAt    int
	FaultFor   time.Duration // of simStall
	Deaf       bool          // once a writer has to wait, the reader reads no more
}

// drawConn draws the nth connection of a run to an address.
func (p simNetworkPlan) drawConn(seed uint64, dial simDial, n int) simConnPlan {
	name := uint64(14695981039346656037) // FNV-1a
	for _, b := range []byte(fmt.Sprintf("%d %s %d", dial.run, dial.addr, n)) {
		name = (name ^ uint64(b)) * 1099511628211
	}
	random := rand.New(rand.NewPCG(seed, name))
	var c simConnPlan
	for _, pipe := range []*simPipePlan{&c.Up, &c.Down} {
		pipe.Latency = simDuration(random, p.Latency)
		pipe.JitterSeed = random.Uint64()
		pipe.Deaf = p.Deaf > 0 && random.IntN(p.Deaf) == 0
	}
	if p.Faults > 0 && random.IntN(p.Faults) == 0 {
		pipe := &c.Up
		if random.IntN(2) == 0 {
			pipe = &c.Down
		}
		pipe.Fault = []simFault{simReset, simResetDrop, simClose, simStall, simVanish}[random.IntN(5)]
		// Greetings take some 100 to 250 bytes; most of what can go wrong does
		// so after them.
		pipe.FaultAt = 110 + random.IntN(300)
		switch random.IntN(6) {
		case 0:
			pipe.FaultAt = random.IntN(200)
		case 1:
			pipe.FaultAt = random.IntN(4000)
		}
		pipe.FaultFor = simDuration(random, 3*time.Second)
	}
	return c
}

// simDuration draws a time from 1 ns to most, in nanoseconds.
func simDuration(random *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(random.Int64N(int64(max(most, 1)))) + 1
}

type simRunKey struct{}

// dial fits WithDialer. The host is what stands before the first - or : of the
// address, and the run is that of ctx.
func (n *simNetwork) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	run, _ := ctx.Value(simRunKey{}).(int)
	host := addr[:strings.IndexAny(addr, "-:")]
	key := simDial{run, addr}
	n.mu.Lock()
	number := n.dials[key]
	n.dials[key]++
	name := fmt.Sprintf("%d>%s#%d", run, addr, number)
	plan := n.plan.drawConn(n.seed, key, number)
	if n.override != nil {
		n.override(key, number, &plan)
	}
	n.drawn[name] = plan
	for _, p := range []*simPipePlan{&plan.Up, &plan.Down} {
		if n.since() > n.calm {
			p.Fault, p.Deaf = simNoFault, false
		}
		if n.plain[host] && p.Fault == simVanish {
			p.Fault = simStall // nobody would ever find out
		}
	}
	client := &simConn{network: n, name: name, run: run, addr: addr, plain: n.plain[host], dialed: n.since()}
	server := &simConn{network: n, name: name, run: run, addr: addr, plain: n.plain[host]}
	client.peer, server.peer = server, client
	up := &simPipe{simPipePlan: plan.Up, from: client, to: server, host: host, incoming: true}
	down := &simPipe{simPipePlan: plan.Down, from: server, to: client, host: host}
	for _, p := range []*simPipe{up, down} {
		p.network = n
		p.changed = make(chan struct{})
		p.jitter = rand.New(rand.NewPCG(p.JitterSeed, 0))
		p.brokenAt = simNever
	}
	client.in, client.out, server.in, server.out = down, up, up, down
	// SYN and its answer meet with the same holes as everything else.
	there := up.arrival(n.since(), 0)
	back := simNever
	if there != simNever {
		back = down.arrival(there, 0)
	}
	if back-n.since() > time.Second {
		n.sim.note(simDialHung, client, "the dial takes long")
	}
	n.mu.Unlock()
	if back == simNever {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	if !sleep(ctx, back-n.sinceStart()) {
		return nil, context.Cause(ctx)
	}
	n.mu.Lock()
	l := n.listeners[host]
	if l == nil {
		n.sim.note(simDialRefused, client, "the dial is refused")
		n.mu.Unlock()
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	}
	server.process = l.process
	client.process = l.process
	client.opened = n.since()
	n.conns = append(n.conns, client)
	client.log.lost, client.log.farewell = simNever, simNever
	n.mu.Unlock()
	err := fmt.Errorf("dial %s: connection refused", addr)
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	client.Close()
	server.Close()
	return nil, err
}

func (n *simNetwork) sinceStart() time.Duration { return time.Since(n.start) }

// since is sinceStart; it stands where mu is held.
func (n *simNetwork) since() time.Duration { return time.Since(n.start) }

// listen makes host reachable until the listener is closed. mu is held.
func (n *simNetwork) listen(host string, process *simProcess) *simListener {
	l := &simListener{network: n, host: host, process: process, conns: make(chan net.Conn), closed: make(chan struct{})}
	n.listeners[host] = l
	return l
}

// open names the connections of which an end is not closed.
func (n *simNetwork) open() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var open []string
	for _, c := range n.conns {
		if !c.closed || !c.peer.closed {
			open = append(open, c.name)
		}
	}
	return open
}

// kill ends all connections of a process, as the kernel of its host would; or,
// if silent, as the host's power failure would: the other side hears nothing.
func (n *simNetwork) kill(process *simProcess, silent bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		if c.process != process || c.peer.closed {
			continue
		}
		if silent {
			c.out.vanished, c.in.vanished = true, true
		}
		c.peer.close()
	}
}

// A simListener is a net.Listener of a simNetwork.
type simListener struct {
	network *simNetwork
	host    string
	process *simProcess
	conns   chan net.Conn
	closed  chan struct{}
	once    sync.Once
}

func (l *simListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *simListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.network.mu.Lock()
		defer l.network.mu.Unlock()
		if l.network.listeners[l.host] == l {
			delete(l.network.listeners, l.host)
		}
	})
	return nil
}

func (l *simListener) Addr() net.Addr { return memAddr(l.host) }

var errSimReset = errors.New("connection reset by the simulation")

// A simPipe is one direction of a connection.
type simPipe struct {
	simPipePlan
	network  *simNetwork
	from, to *simConn
	host     string // of the worker
	incoming bool   // to the worker
	jitter   *rand.Rand
	changed  chan struct{} // closed and renewed with every change

	chunks   []simChunk
	buffered int
	written  int
	busy     time.Duration // until when what was written before keeps the line busy
	last     time.Duration // when the last chunk arrives: none overtakes another
	stalled  time.Duration // until when nothing arrives
	vanished bool          // nothing more arrives
	deafened bool          // nothing more is read, until the writer closes
	ended    bool          // the end of the stream is on its way
	deaf     bool          // the reader has closed: what arrives is answered by a reset
	brokenAt time.Duration // when writing begins to fail
}

// A simChunk is bytes that can be read from a time on.
type simChunk struct {
	at   time.Duration
	data []byte // none: the end of the stream
	err  error  // of the end
}

// change tells whoever waits.
func (p *simPipe) change() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// arrival says when n bytes arrive that are sent at a time, if not never.
func (p *simPipe) arrival(sent time.Duration, n int) time.Duration {
	if p.vanished {
		return simNever
	}
	p.busy = max(p.busy, sent) + time.Duration(n)*p.network.plan.PerByte
	at := max(p.busy+p.Latency+simDuration(p.jitter, p.network.plan.Jitter), p.last, p.stalled)
	for _, h := range p.network.holes[p.host] {
		when := sent // a host that is frozen does not send; what is on its way comes through
		switch h.Kind {
		case simHoleIn:
			if !p.incoming {
				continue
			}
		case simHoleOut:
			if p.incoming {
				continue
			}
		case simFrozen:
			if p.incoming { // it does not read
				when = at
			}
		}
		if when < h.From || when >= h.Until {
			continue
		}
		p.network.sim.note(h.Kind, p.from, "%d bytes meet with a hole until %v", n, h.Until)
		if h.Until == simNever {
			return simNever
		}
		at = max(at, h.Until+simDuration(p.jitter, 50*time.Millisecond))
	}
	return at
}

// push sends a chunk on its way.
func (p *simPipe) push(c simChunk) {
	c.at = p.arrival(p.network.since(), len(c.data))
	p.last = c.at
	p.chunks = append(p.chunks, c)
	p.buffered += len(c.data)
	p.change()
}

// end ends the stream after what was written.
func (p *simPipe) end(err error) {
	if !p.ended {
		p.ended = true
		p.push(simChunk{err: err})
	}
}

// reset ends both directions at once, as something between the hosts would.
func (p *simPipe) reset(drop bool) {
	for _, q := range []*simPipe{p, p.from.in} {
		q.brokenAt = 0
		q.ended = true
		at := max(p.network.since(), q.last)
		if drop || q.last == simNever {
			q.chunks, at = nil, p.network.since()
		}
		q.chunks = append(q.chunks, simChunk{at: at, err: errSimReset})
		q.change()
	}
}

// room is how many bytes may be written; before the fault, if there is one.
func (p *simPipe) room(n int) (room int, atFault bool) {
	room = min(n, p.network.plan.Buffer-p.buffered)
	if p.Fault != simNoFault && p.network.since() > p.network.calm {
		p.Fault = simNoFault
	}
	if p.Fault != simNoFault && p.written+room > p.FaultAt {
		return max(p.FaultAt-p.written, 0), true
	}
	return room, false
}

// fault has the fault come.
func (p *simPipe) fault() {
	fault := p.Fault
	p.Fault = simNoFault
	p.network.sim.note(fault, p.from, "the fault at byte %d (%v)", p.written, p.FaultFor)
	switch fault {
	case simReset, simResetDrop:
		p.reset(fault == simResetDrop)
	case simClose:
		p.brokenAt = 0
		p.end(io.EOF)
	case simStall:
		p.stalled = p.network.since() + p.FaultFor
	case simVanish:
		p.vanished = true
	}
}

// A simConn is one end of a connection.
type simConn struct {
	network *simNetwork
	name    string
	run     int
	addr    string
	plain   bool        // without heartbeats
	process *simProcess // that was dialed
	peer    *simConn
	in, out *simPipe

	dialed, opened, closedAt    time.Duration // dialed is when that began
	closed                      bool
	unwritable                  bool // as a write has found out
	readDeadline, writeDeadline time.Time

	// The log, kept by the side that dialed.
	log   simConnLog
	lines struct{ read, written []byte } // that have begun
}

func (c *simConn) Read(b []byte) (int, error) {
	n := c.network
	for {
		n.mu.Lock()
		changed := c.in.changed
		until := c.readDeadline
		switch {
		case c.closed:
			n.mu.Unlock()
			return 0, net.ErrClosed
		case !until.IsZero() && !time.Now().Before(until):
			n.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case len(c.in.chunks) > 0 && !(c.in.deafened && !c.peer.closed):
			chunk := &c.in.chunks[0]
			if chunk.at <= n.since() {
				defer n.mu.Unlock()
				if chunk.err != nil {
					return 0, chunk.err
				}
				k := copy(b, chunk.data)
				chunk.data = chunk.data[k:]
				if len(chunk.data) == 0 {
					c.in.chunks = c.in.chunks[1:]
				}
				c.in.buffered -= k
				c.in.change()
				if len(c.log.bytes) > 0 {
					c.log.bytes = append(c.log.bytes, n.since())
				}
				c.logLines(&c.lines.read, b[:k], false)
				return k, nil
			}
			if at := n.start.Add(chunk.at); chunk.at != simNever && (until.IsZero() || at.Before(until)) {
				until = at
			}
		}
		n.mu.Unlock()
		await(changed, until)
	}
}

// await waits for a change, at most until a time if there is one.
func await(changed <-chan struct{}, until time.Time) {
	if until.IsZero() {
		<-changed
		return
	}
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	}
}

func (c *simConn) Write(b []byte) (int, error) {
	n := c.network
	written, p := 0, c.out
	for first := true; len(b) > 0; first = false {
		n.mu.Lock()
		if first {
			if c.plain {
				// Both greetings are as those of a peer that knows of no
				// heartbeat, and as long as they were.
				b = bytes.Replace(b, []byte(`"heartbeat":true`), []byte(`"heartbeat":null`), 1)
				b = bytes.Replace(b, []byte(`"timeout_ms":`), []byte(`"timeout_no":`), 1)
			}
			c.logLines(&c.lines.written, b, true)
		}
		changed := p.changed
		until := c.writeDeadline
		room, atFault := p.room(len(b))
		switch {
		case c.closed:
			n.mu.Unlock()
			return written, net.ErrClosed
		case p.brokenAt <= n.since():
			c.unwritable = true
			n.mu.Unlock()
			return written, errSimReset
		case !until.IsZero() && !time.Now().Before(until):
			n.sim.note(simWriteTimeout, c, "a write took too long")
			n.mu.Unlock()
			return written, os.ErrDeadlineExceeded
		case p.deaf:
			if p.brokenAt == simNever { // it is answered by a reset
				if there := p.arrival(n.since(), 0); there != simNever {
					p.brokenAt = c.in.arrival(there, 0)
				}
			}
			n.mu.Unlock()
			return written + len(b), nil
		case room <= 0 && !atFault:
			n.sim.note(simWriteWaits, c, "a write waits")
			if p.Deaf && !p.deafened && n.since() <= n.calm {
				p.deafened = true
				n.sim.note(simDeaf, c, "nothing is read any more")
			}
			if at := n.start.Add(p.brokenAt); p.brokenAt != simNever && (until.IsZero() || at.Before(until)) {
				until = at
			}
			n.mu.Unlock()
			await(changed, until)
			continue
		}
		if room > 0 {
			// On a slow line it arrives bit by bit.
			if n.plan.PerByte > 0 {
				room = min(room, 512)
			}
			p.push(simChunk{data: slices.Clone(b[:room])})
			p.written += room
			written += room
			b = b[room:]
		}
		if atFault && p.written >= p.FaultAt {
			p.fault()
		}
		n.mu.Unlock()
	}
	return written, nil
}

// Close ends the stream that the other end reads; what it still writes will be
// an error there.
func (c *simConn) Close() error {
	c.network.mu.Lock()
	defer c.network.mu.Unlock()
	c.close()
	return nil
}

func (c *simConn) close() {
	if c.closed {
		return
	}
	c.closed, c.closedAt = true, c.network.since()
	c.out.end(io.EOF)
	c.out.change()
	c.in.deaf = true
	c.in.change()
}

// CloseWrite ends the stream that the other end reads.
func (c *simConn) CloseWrite() error {
	c.network.mu.Lock()
	defer c.network.mu.Unlock()
	c.out.end(io.EOF)
	c.out.brokenAt = 0
	c.out.change()
	return nil
}

func (c *simConn) LocalAddr() net.Addr  { return memAddr(c.addr) }
func (c *simConn) RemoteAddr() net.Addr { return memAddr(c.addr) }

func (c *simConn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *simConn) SetReadDeadline(t time.Time) error {
	c.network.mu.Lock()
	defer c.network.mu.Unlock()
	c.readDeadline = t
	c.in.change()
	return nil
}

func (c *simConn) SetWriteDeadline(t time.Time) error {
	c.network.mu.Lock()
	defer c.network.mu.Unlock()
	c.writeDeadline = t
	c.out.change()
	return nil
}
