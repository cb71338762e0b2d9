package taskexec

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	defaultHandshakeTimeout = 10 * time.Second
	writeTimeout            = 10 * time.Second // for each chunk
	lastWordsTimeout        = time.Second      // to write the last line, and for the peer to read it
	chunkBytes              = 68 << 10         // written under one deadline: 64 KiB of a text, and what stands around it
	discardBytes            = 4 << 20          // of input thrown away while last words are written
	urgentBytes             = 4 << 10          // of PING, PONG and CANCEL that wait for a peer to read
)

// errTorn is why a session ended whose connection was closed inside a line.
var errTorn = errors.New("connection closed inside a line")

// A lineReader cuts lines from a stream. Its memory grows with what has
// arrived, never with what a peer announces, and a line over the limit is an
// error as soon as it is seen to be one.
type lineReader struct {
	src   io.Reader
	limit int    // of one line, newline included
	buf   []byte // whole lines, the line that has begun, and room to read more
	first int    // of buf, where the lines begin that are not handed out yet
	end   int    // where they end
	n     int    // bytes of buf that are read
	calm  int    // batches since more room than readBufferMax was needed
}

const (
	readBufferMin = 4 << 10
	readBufferMax = 64 << 10 // a buffer grows to this under load, and beyond it only for long lines
	readBufferFew = 4        // so many times readBufferMax are kept while long lines keep coming, and more only for one line
	readBatchCalm = 16       // after so many batches without a long line they are given up
)

// next returns the next line, without its newline. The line is valid until more has
// reported false and next is called again. io.EOF comes between lines only; an end
// inside a line is errTorn.
func (r *lineReader) next() ([]byte, error) {
	for !r.more() {
		if err := r.fill(); err != nil {
			return nil, err
		}
	}
	i := bytes.IndexByte(r.buf[r.first:r.end], '\n')
	line := r.buf[r.first : r.first+i]
	r.first += i + 1
	if i+1 > r.limit {
		return nil, faultf(codeLine, "a line of %d bytes is over the limit of %d", i+1, r.limit)
	}
	return line, nil
}

// more reports whether next has a line at hand without reading.
func (r *lineReader) more() bool { return r.first < r.end }

// begun is how many bytes of the next line are read, if there is no whole one.
func (r *lineReader) begun() int { return r.n - r.end }

// forget gives up what is read.
func (r *lineReader) forget() { r.buf, r.first, r.end, r.n = nil, 0, 0, 0 }

// fill reads once, when all whole lines are handed out.
func (r *lineReader) fill() error {
	if r.begun() >= r.limit {
		return faultf(codeLine, "a line is over the limit of %d bytes", r.limit)
	}
	if r.end > 0 || r.n == len(r.buf) {
		r.makeRoom()
	}
	n, err := r.src.Read(r.buf[r.n:])
	fresh := r.buf[r.n : r.n+n]
	r.n += n
	if end := lastNewline(fresh) + 1; end > 0 {
		r.end = r.n - n + end
		return nil // an error comes again with the next read
	}
	if err == io.EOF && r.n > 0 {
		return errTorn
	}
	return err
}

// makeRoom moves the line that has begun to where there is room to read more of
// it: to the beginning of the buffer, or of another, as long as what comes
// makes good use of it.
func (r *lineReader) makeRoom() {
	size := len(r.buf)
	switch {
	case r.end == 0: // the line fills it
		size = max(readBufferMin, min(2*size, r.limit))
	case r.n == size && size < readBufferMax:
		size *= 2
	case size > readBufferMax: // long lines should not cost the session their length for ever
		if r.calm++; r.n > readBufferMax {
			r.calm = 0
		}
		if r.begun() < readBufferMax && (r.calm >= readBatchCalm || size > readBufferFew*readBufferMax) {
			size = readBufferMax
		}
	}
	begun := r.buf[r.end:r.n]
	if size != len(r.buf) {
		r.buf = make([]byte, size)
	}
	r.n = copy(r.buf, begun)
	r.first, r.end = 0, 0
}

// lastNewline is where the last newline is; -1 if there is none. It first looks, in
// larger steps, for the part of b that has it: bytes.LastIndexByte takes a
// nanosecond for each byte, and the beginning of a long line has many bytes.
func lastNewline(b []byte) int {
	const step = 1 << 10
	for len(b) > 0 {
		start := max(0, len(b)-step)
		if bytes.IndexByte(b[start:], '\n') >= 0 {
			return start + bytes.LastIndexByte(b[start:], '\n')
		}
		b = b[:start]
	}
	return -1
}

// A wire is one connection as either side uses it: a reader that always reads,
// and a writer that nobody waits for. The reader's half is for one goroutine,
// writeLoop for another, and the rest for any.
//
// Nothing here knows what a verb means.
type wire struct {
	conn   net.Conn
	in     lineReader
	texts  texts // of what is read
	source source
	wake   chan struct{} // holds a token when the writer should look for something to write
	buf    []byte        // what is being written; for whoever has claimed the writing
	saidIt bool          // all that waited was written before the last line; to be read after writeLoop

	// What tells a silent peer from a slow one. Times are counted from born.
	born     time.Time
	heard    atomic.Int64 // when a byte was last received
	signs    atomic.Int64 // how often that was noted, since the clock may stand still meanwhile
	probed   atomic.Int64 // when the first PING was written after that; 0 if none was
	midRead  atomic.Bool  // a line is arriving of which more than a chunk has come, and the end has not
	midWrite atomic.Bool  // a line longer than a chunk is being written

	mu      sync.Mutex // guards following
	claimed bool       // somebody is writing: writeLoop or flush
	wanted  bool       // somebody else had something to say meanwhile
	failed  error      // of a write that was not writeLoop's
	urgent  []byte     // whole lines that go ahead of all others
	ending  ending
	last    []byte    // the line to end with, if any
	by      time.Time // when all must be over; zero until the end has begun. It is never moved to a later time
}

// A source has what a wire is to write, beside urgent lines.
type source interface {
	// fill appends whole lines to dst, and nothing if there is nothing to say.
	fill(dst []byte) []byte
	// written says that what fill appended last is written.
	written()
}

// ending is how far a wire has come on its way to being closed. It only grows.
type ending uint8

const (
	notEnding   ending = iota
	endAfterAll        // when all that waits is written, write the last line and close
	endAtOnce          // drop what waits
)

func newWire(conn net.Conn, source source) *wire {
	c := &wire{
		conn:   conn,
		source: source,
		wake:   make(chan struct{}, 1),
		born:   time.Now(),
	}
	c.in = lineReader{src: listening{c}, limit: greetingLimit}
	if secured, ok := conn.(*promptConn); ok && secured.below != nil {
		secured.below.heard = c.hear
	}
	return c
}

// age is how long the connection has been there.
func (c *wire) age() time.Duration { return time.Since(c.born) }

// listening is the reader's half of a wire's connection. It notes signs of
// life.
type listening struct{ c *wire }

func (l listening) Read(p []byte) (int, error) {
	l.c.midRead.Store(l.c.in.begun() > chunkBytes)
	n, err := l.c.conn.Read(p)
	if n > 0 {
		l.c.hear()
	}
	return n, err
}

// hear notes a sign of life.
func (c *wire) hear() {
	c.heard.Store(int64(c.age()))
	c.signs.Add(1)
	c.probed.Store(0)
}

// ping sends a PING.
func (c *wire) ping(n int) { c.sendUrgent(message{verb: verbPing, task: n}) }

// silent says whether the peer has sent nothing for timeout, though it has had
// timeout-interval to answer a PING. Any byte counts, so a long line on a slow
// link is not silence; nor does silence count while a PING waits behind one.
func (c *wire) silent(timeout, interval time.Duration) bool {
	now := c.age()
	heard, probed := time.Duration(c.heard.Load()), time.Duration(c.probed.Load())
	return now-heard >= timeout && probed > 0 && now-probed >= timeout-interval
}

// read fills in m with the next message. A *ProtocolError is this side's finding,
// and any other error the connection's.
func (c *wire) read(m *message) error {
	line, err := c.in.next()
	if err != nil {
		return err
	}
	return m.parse(line, &c.texts)
}

// midLine says for how long to believe that a line longer than a chunk, which no
// PING can overtake, is on its way in either direction; 0 if none is. One of which
// nothing has arrived for timeout is not. A shorter line holds up nothing. It must
// not count when it has only begun, or a few bytes just before a link breaks
// would.
func (c *wire) midLine(timeout time.Duration) time.Duration {
	switch {
	case c.midWrite.Load():
		return timeout
	case c.midRead.Load():
		return max(0, time.Duration(c.heard.Load())+timeout-c.age())
	}
	return 0
}

// wakeWriter makes writeLoop ask its source again.
func (c *wire) wakeWriter() {
	select {
	case c.wake <- struct{}{}:
	default: // a token is there already
	}
}

// sendFirst writes line, a greeting, before anything else that is sent after
// it, urgent lines included.
func (c *wire) sendFirst(line []byte) {
	c.mu.Lock()
	c.urgent = append(c.urgent, line...)
	c.mu.Unlock()
	c.wakeWriter()
}

// sendUrgent puts m ahead of everything that is not yet being written. It
// reports false, and drops m, if the peer leaves too much of this kind unread.
func (c *wire) sendUrgent(m message) bool {
	c.mu.Lock()
	ok := len(c.urgent) < urgentBytes
	if ok {
		c.urgent = appendMessage(c.urgent, m)
	}
	c.mu.Unlock()
	c.wakeWriter()
	return ok
}

// end makes writeLoop finish: after all that waits, or at once. last is the
// line to end with, or nil. Only the first call for each ending counts; end
// reports whether this was it.
//
// With endAtOnce everything is over within lastWordsTimeout. The reader should
// meanwhile discard, since on a connection without buffers the peer may have
// to finish writing before it reads.
func (c *wire) end(how ending, last []byte) bool {
	c.mu.Lock()
	if how <= c.ending {
		c.mu.Unlock()
		return false
	}
	c.ending = how
	c.last = last
	c.mu.Unlock()
	if how == endAtOnce {
		c.conn.SetDeadline(c.overSoon())
	}
	c.wakeWriter()
	return true
}

// overSoon sets by when all must be over, unless that is set already. A
// deadline that is set to c.by is never moved to a later time: whoever sets
// another looks at c.by afterwards.
func (c *wire) overSoon() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by.IsZero() {
		c.by = time.Now().Add(lastWordsTimeout)
	}
	return c.by
}

// mustEnd says by when all must be over; zero if nothing says so.
func (c *wire) mustEnd() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.by
}

// liftReadDeadline lets the reader wait for as long as it takes, unless the
// wire has begun to end meanwhile.
func (c *wire) liftReadDeadline() { c.setReadDeadline(time.Time{}) }

// setReadDeadline lets the reader wait until t, unless the wire has begun to
// end meanwhile and its nearer deadline stands.
func (c *wire) setReadDeadline(t time.Time) {
	c.conn.SetReadDeadline(t)
	if by := c.mustEnd(); !by.IsZero() {
		c.conn.SetReadDeadline(by)
	}
}

// endWithError ends the wire at once, with an ERROR as last words.
func (c *wire) endWithError(e *ProtocolError) {
	c.end(endAtOnce, appendMessage(nil, message{verb: verbError, word: e.Code, text: cutText(e.Text)}))
}

// discard reads input and throws it away until the connection ends, or too
// much has come. A line that has begun goes at once: a peer that was told that
// it is too long should not have it kept for a second more.
func (c *wire) discard() {
	c.in.forget()
	io.CopyN(io.Discard, c.conn, discardBytes)
}

// writeLoop writes what its source has to say, and urgent lines before that,
// until the wire is ended. The source is asked again when something was written
// or wakeWriter was called.
//
// When writeLoop returns, the peer has been told that no more will come, and
// the reader has at most lastWordsTimeout left: on an error too, since the
// peer may have said in its last words why it does not read.
func (c *wire) writeLoop() error {
	for {
		if !c.claim() {
			<-c.wake // release has left a token, or will
			continue
		}
		// The ending is looked at before the source is asked, so that whatever
		// was there to be said before end was called is said.
		urgent, ending, err := c.takeUrgent()
		if err == nil && ending == endAtOnce {
			return c.writeLast()
		}
		var wrote bool
		if err == nil {
			wrote, err = c.writeAll(urgent)
		}
		if err != nil {
			c.conn.SetReadDeadline(c.overSoon())
			return err
		}
		if !wrote && ending == endAfterAll {
			// Even if urgent lines go on coming: a peer that pings on and on
			// does not keep the wire open.
			c.saidIt = true
			return c.writeLast()
		}
		c.release()
		if !wrote && len(urgent) == 0 {
			<-c.wake
		}
	}
}

// flush writes what there is to say in the caller's goroutine, unless somebody
// is writing already, who will then do it. It spares a line the way through
// another goroutine, and is for a caller that has nothing else to do: the peer
// may take its time. Ends and errors are left to writeLoop.
func (c *wire) flush() {
	if !c.claim() {
		return
	}
	urgent, ending, err := c.takeUrgent()
	if err == nil && ending != endAtOnce {
		_, err = c.writeAll(urgent)
	}
	if err != nil || ending != notEnding {
		c.mu.Lock()
		c.failed, c.wanted = err, true
		c.mu.Unlock()
	}
	c.release()
}

// claim makes the caller the one who writes, until it calls release. If
// somebody else is, claim reports false, and the writer looks again afterwards.
func (c *wire) claim() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.claimed {
		c.wanted = true
		return false
	}
	c.claimed = true
	return true
}

func (c *wire) release() {
	c.mu.Lock()
	c.claimed = false
	wanted := c.wanted
	c.wanted = false
	c.mu.Unlock()
	if wanted {
		c.wakeWriter()
	}
}

// writeAll writes urgent lines and then what the source has to say, and reports
// whether that was anything. The writing is claimed.
func (c *wire) writeAll(urgent []byte) (wrote bool, err error) {
	if err := c.writeUrgent(urgent); err != nil {
		return false, err
	}
	c.buf = c.source.fill(c.buf[:0])
	if len(c.buf) == 0 {
		c.buf = letGo(c.buf)
		return false, nil
	}
	err = c.write(c.buf)
	c.source.written()
	return true, err
}

// letGo gives up a buffer that has grown beyond what a window of large outputs
// needs, when there is nothing left to write. If it gave up smaller ones too, they
// would have to be made anew for each such window.
func letGo(buf []byte) []byte {
	if cap(buf) > 2*reportBytes {
		return nil
	}
	return buf
}

func (c *wire) takeUrgent() ([]byte, ending, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	urgent := c.urgent
	c.urgent = nil
	return urgent, c.ending, c.failed
}

// write writes whole lines in chunks, cut between lines where it can be, and
// lets urgent lines in between. It stops early if the wire is ended at once.
func (c *wire) write(lines []byte) error {
	for len(lines) > 0 {
		// Before the first chunk too: lines may follow from a greeting that was
		// not there yet when urgent lines were last taken.
		urgent, ending, _ := c.takeUrgent()
		if ending == endAtOnce {
			return nil
		}
		if err := c.writeUrgent(urgent); err != nil {
			return err
		}
		n := len(lines)
		if n > chunkBytes {
			if n = lastNewline(lines[:chunkBytes]) + 1; n == 0 {
				n = bytes.IndexByte(lines, '\n') + 1 // one line longer than a chunk
			}
		}
		if err := c.writeLine(lines[:n]); err != nil {
			return err
		}
		lines = lines[n:]
	}
	return nil
}

// writeUrgent writes urgent lines, and notes if the peer has now been asked for
// a sign of life.
func (c *wire) writeUrgent(lines []byte) error {
	if !bytes.Contains(lines, []byte("PING ")) {
		return c.writeLine(lines)
	}
	signs := c.signs.Load()
	err := c.writeLine(lines)
	if err == nil {
		c.probed.CompareAndSwap(0, int64(c.age()))
		if c.signs.Load() != signs { // the answer is there already
			c.probed.Store(0)
		}
	}
	return err
}

// writeLine writes to the end of a line, with a new deadline for each chunk.
func (c *wire) writeLine(b []byte) error {
	if len(b) > chunkBytes {
		c.midWrite.Store(true)
		defer c.midWrite.Store(false)
	}
	for len(b) > 0 {
		c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		// end may have set its nearer deadline just before this one.
		if by := c.mustEnd(); !by.IsZero() {
			c.conn.SetWriteDeadline(by)
		}
		n, err := c.conn.Write(b[:min(len(b), chunkBytes)])
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// writeLast writes the last line and ends the writing half. What the peer
// still sends can be read for lastWordsTimeout: closing a TCP connection with
// unread input would reset it, and the peer could lose what was just written.
func (c *wire) writeLast() error {
	c.mu.Lock()
	last := c.last
	c.mu.Unlock()
	err := c.writeLine(last)
	half, ok := c.conn.(interface{ CloseWrite() error })
	if err != nil || last == nil || !ok && unbuffered(c.conn) {
		c.conn.Close()
		return err
	}
	c.conn.SetReadDeadline(c.overSoon())
	// A connection that cannot end one half, such as one that is wrapped,
	// stays open until the peer closes it, or time is over.
	if ok {
		half.CloseWrite()
	}
	return nil
}

// unbuffered reports whether conn is a net.Pipe, where all that was written
// has been read.
func unbuffered(conn net.Conn) bool {
	addr := conn.LocalAddr()
	return addr != nil && addr.Network() == "pipe"
}
