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
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// readLines reads until the first error.
func readLines(r *lineReader) (lines []string, err error) {
	for {
		line, err := r.next()
		if err != nil {
			return lines, err
		}
		lines = append(lines, string(line))
	}
}

// randomReader gives chunks of any size.
type randomReader struct {
	src  io.Reader
	rand *rand.Rand
}

func (r randomReader) Read(p []byte) (int, error) {
	return r.src.Read(p[:min(len(p), 1+r.rand.IntN(10_000))])
}

func TestLinesAreTheSameHoweverTheyArrive(t *testing.T) {
	var want []string
	for i, n := range []int{0, 1, 100, 4094, 4095, 4096, 0, 0, 8191, 70_000, 3, 65_535, 65_536, 200_000, 1<<20 - 1, 5} {
		want = append(want, strings.Repeat(string(rune('a'+i)), n))
		for j := range 50 {
			want = append(want, fmt.Sprint("RUN ", i*50+j, " 1 0 x"))
		}
	}
	stream := strings.Join(want, "\n") + "\n"
	for _, tt := range []struct {
		reason string
		src    func(r io.Reader) io.Reader
	}{
		{"as much as there is room for", func(r io.Reader) io.Reader { return r }},
		{"a byte at a time", iotest.OneByteReader},
		{"half of the room at a time", iotest.HalfReader},
		{"with the end beside the last bytes", iotest.DataErrReader},
		{"in chunks of any size", func(r io.Reader) io.Reader { return randomReader{r, rand.New(rand.NewPCG(1, 2))} }},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			r := &lineReader{src: tt.src(strings.NewReader(stream)), limit: defaultMaxLine}
			got, err := readLines(r)
			if err != io.EOF {
				t.Errorf("the end is %v, want io.EOF", err)
			}
			if !cmp.Equal(want, got) {
				t.Errorf("%d lines in, %d other lines out", len(want), len(got))
			}
		})
	}
}

func TestEndInsideALineIsTold(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		reason, stream string
		end            error
		lines          int
		want           error
	}{
		{"nothing at all", "", io.EOF, 0, io.EOF},
		{"between lines", "a\nb\n", io.EOF, 2, io.EOF},
		{"after an empty line", "\n", io.EOF, 1, io.EOF},
		{"inside the first line", "a", io.EOF, 0, errTorn},
		{"inside a later line", "a\nb", io.EOF, 1, errTorn},
		{"inside a line longer than a buffer", "a\n" + strings.Repeat("x", 10_000), io.EOF, 1, errTorn},
		{"another error between lines", "a\n", broken, 1, broken},
		{"another error inside a line", "a\nb", broken, 1, broken},
	} {
		for _, chunking := range []func(io.Reader) io.Reader{iotest.OneByteReader, iotest.DataErrReader, func(r io.Reader) io.Reader { return r }} {
			src := io.MultiReader(strings.NewReader(tt.stream), iotest.ErrReader(tt.end))
			r := &lineReader{src: chunking(src), limit: defaultMaxLine}
			lines, err := readLines(r)
			if len(lines) != tt.lines || err != tt.want {
				t.Errorf("%s: %d lines, then %v; want %d, then %v", tt.reason, len(lines), err, tt.lines, tt.want)
			}
			if _, again := r.next(); again != tt.want {
				t.Errorf("%s: asked again it ends with %v", tt.reason, again)
			}
		}
	}
}

// endless is a line without an end, which counts what is read of it.
type endless struct{ n int }

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	e.n += len(p)
	return len(p), nil
}

func TestLinesOverTheLimitAreRefusedAsSoonAsTheyAreSeen(t *testing.T) {
	isOver := func(err error) bool {
		var fault *ProtocolError
		return errors.As(err, &fault) && fault.Code == codeLine
	}
	for _, limit := range []int{greetingLimit, 5000, readBufferMax, 100_000, defaultMaxLine} {
		for _, chunking := range []func(io.Reader) io.Reader{iotest.HalfReader, func(r io.Reader) io.Reader { return r }} {
			fits := strings.Repeat("x", limit-1)
			r := &lineReader{src: chunking(strings.NewReader("a\n" + fits + "\nb\n")), limit: limit}
			if lines, err := readLines(r); len(lines) != 3 || err != io.EOF {
				t.Errorf("limit %d, a line that just fits: %d lines, %v", limit, len(lines), err)
			}
			r = &lineReader{src: chunking(strings.NewReader("a\nx" + fits + "\nb\n")), limit: limit}
			if lines, err := readLines(r); len(lines) != 1 || !isOver(err) {
				t.Errorf("limit %d, a line of one byte more: %d lines, %v", limit, len(lines), err)
			}
		}

		src := &endless{}
		r := &lineReader{src: io.MultiReader(strings.NewReader("a\n"), src), limit: limit}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		lines, err := readLines(r)
		runtime.ReadMemStats(&after)
		if len(lines) != 1 || !isOver(err) {
			t.Errorf("limit %d, an endless line: %d lines, %v", limit, len(lines), err)
		}
		if src.n > limit+readBufferMin {
			t.Errorf("limit %d: %d bytes of an endless line were read", limit, src.n)
		}
		// Buffers that double, up to the limit.
		most := 4 * readBufferMin
		for size := readBufferMin; size < 2*limit; size *= 2 {
			most += size
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > uint64(most) {
			t.Errorf("limit %d: an endless line made the reader allocate %d bytes", limit, n)
		}

		// It comes a little at a time: the verdict does not wait for a buffer
		// to be full, and not for the newline.
		drip := &endless{}
		r = &lineReader{src: iotest.OneByteReader(drip), limit: limit}
		if _, err := r.next(); !isOver(err) || drip.n > limit {
			t.Errorf("limit %d: %v after %d bytes of an endless line", limit, err, drip.n)
		}
	}
}

func TestReaderGivesBackTheMemoryOfALongLine(t *testing.T) {
	long := strings.Repeat("x", 1<<20-1)
	r := &lineReader{src: strings.NewReader("a\n" + long + "\nb\nc"), limit: defaultMaxLine}
	if lines, err := readLines(r); len(lines) != 3 || err != errTorn {
		t.Errorf("%d lines, %v", len(lines), err)
	}
	if len(r.buf) > readBufferMax {
		t.Errorf("the buffer stays at %d bytes", len(r.buf))
	}
}

// Texts come from a buffer that is used again, and from memory that they share.
func TestATextStaysAsItWasRead(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var want []string
	var stream []byte
	for i := range 3000 {
		n := rnd.IntN(100)
		if i%10 == 0 {
			n = rnd.IntN(3 * longText)
		}
		text := make([]byte, n)
		for i := range text {
			text[i] = "ab\\\n\r"[rnd.IntN(5)*rnd.IntN(2)]
		}
		want = append(want, string(text))
		stream = appendMessage(stream, message{verb: verbDone, task: i, text: string(text)})
	}
	r := &lineReader{src: randomReader{bytes.NewReader(stream), rnd}, limit: defaultMaxLine}
	var read texts
	messages := make([]message, len(want))
	for i := range messages {
		line, err := r.next()
		if err != nil {
			t.Fatal(err)
		}
		if err := messages[i].parse(line, &read); err != nil {
			t.Fatal(err)
		}
	}
	for i, m := range messages {
		if m.task != i || m.text != want[i] {
			t.Fatalf("task %d: a text of %d bytes is now %.80q", i, len(want[i]), m.text)
		}
	}
}

func TestTextsReadTogetherShareAllocations(t *testing.T) {
	batch := strings.Repeat("RUN 123456 1 0 instruction\n", readBufferMax/27)
	src := strings.NewReader("")
	r := &lineReader{src: src, limit: defaultMaxLine, buf: make([]byte, readBufferMax)}
	var m message
	var read texts
	n := testing.AllocsPerRun(10, func() {
		src.Reset(batch)
		for range strings.Count(batch, "\n") {
			line, err := r.next()
			if err != nil {
				t.Fatal(err)
			}
			if err := m.parse(line, &read); err != nil {
				t.Fatal(err)
			}
		}
	})
	if most := float64(len(batch)/pieceBytes + 1); n > most {
		t.Errorf("%v allocations for %d lines, want at most %v", n, strings.Count(batch, "\n"), most)
	}
}

// A wireSide is a wire with its writer running, fed by say.
type wireSide struct {
	*wire
	mu   sync.Mutex // guards following
	out  []byte
	done chan struct{} // closed when the writer is over
	err  error         // of the writer
}

func startWire(conn net.Conn) *wireSide {
	w := &wireSide{done: make(chan struct{})}
	w.wire = newWire(conn, sourceFunc(func(dst []byte) []byte {
		w.mu.Lock()
		defer w.mu.Unlock()
		dst = append(dst, w.out...)
		w.out = nil
		return dst
	}))
	w.in.limit = defaultMaxLine
	go func() {
		defer close(w.done)
		w.err = w.writeLoop()
	}()
	return w
}

// sourceFunc is the source of a wire that does not care what becomes of it.
type sourceFunc func(dst []byte) []byte

func (f sourceFunc) fill(dst []byte) []byte { return f(dst) }
func (f sourceFunc) written()               {}

func (w *wireSide) say(line string) {
	w.mu.Lock()
	w.out = append(append(w.out, line...), '\n')
	w.mu.Unlock()
	w.wakeWriter()
}

// countingConn counts the writes.
type countingConn struct {
	net.Conn
	writes atomic.Int64
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

// A peer that has not been asked need not say anything.
func TestSilenceCountsFromAPing(t *testing.T) {
	const timeout, interval = 15 * time.Second, 5 * time.Second
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := startWire(here)
		go io.Copy(io.Discard, there)
		time.Sleep(time.Second)
		w.say("RUN 1 1 0 PING")
		w.sendUrgent(message{verb: verbPong, task: 7})
		time.Sleep(time.Hour)
		if w.silent(timeout, interval) {
			t.Error("silent, though it was not asked")
		}
		w.ping(1)
		for _, want := range []bool{false, true} {
			synctest.Wait()
			if got := w.silent(timeout, interval); got != want {
				t.Errorf("after a PING silent is %v, want %v", got, want)
			}
			time.Sleep(timeout - interval)
		}
		w.end(endAtOnce, nil)
		<-w.done
		there.Close()
	})
}

// Two signs of life may come while the clock stands still.
func TestAnAnswerCountsWhateverTheClockSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := startWire(pingedConn{here})
		go func() {
			for m := (message{}); w.read(&m) == nil; {
			}
		}()
		time.Sleep(time.Second)
		fmt.Fprintln(there, "DONE 1 0")
		synctest.Wait()
		go func() {
			io.CopyN(io.Discard, there, int64(len("PING 1\n")))
			fmt.Fprintln(there, "PONG 1")
		}()
		w.ping(1)
		time.Sleep(time.Hour) // no other PING is written
		if w.silent(15*time.Second, 5*time.Second) {
			t.Error("silent, though it has answered")
		}
		w.end(endAtOnce, nil)
		<-w.done
		there.Close()
	})
}

func TestWriterCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		conn := &countingConn{Conn: here}
		w := startWire(conn)
		const lines, line = 10_000, "DONE 123456 0 the output"
		for range lines {
			w.say(line)
		}
		got, err := io.ReadAll(io.LimitReader(there, lines*(int64(len(line))+1)))
		if want := strings.Repeat(line+"\n", lines); string(got) != want || err != nil {
			t.Errorf("%d bytes arrived of %d, %v", len(got), len(want), err)
		}
		// One for the line that found the writer idle, and one a chunk.
		if n, most := int(conn.writes.Load()), 2+len(got)/chunkBytes+1; n > most {
			t.Errorf("%d writes for %d lines, want at most %d", n, lines, most)
		}
		w.end(endAtOnce, nil)
		<-w.done
	})
}

// The last line is written at the latest when the writer has nothing more to
// say, without anything that comes after it.
func TestWriterHoldsNothingBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := startWire(here)
		p := newPeer(t, there)
		start := time.Now()
		for i := range 100 {
			w.say(fmt.Sprint("RETURN ", i))
			p.expect(fmt.Sprint("RETURN ", i))
			w.sendUrgent(message{verb: verbPing, task: i})
			p.expect(fmt.Sprint("PING ", i))
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("it took %v", d)
		}
		w.end(endAtOnce, nil)
		<-w.done
	})
}

// countingSource says one line, and counts what it is asked and told.
type countingSource struct {
	line          string
	asked, writes int
}

func (s *countingSource) fill(dst []byte) []byte {
	if s.asked++; s.asked == 1 {
		dst = append(dst, s.line...)
	}
	return dst
}

func (s *countingSource) written() { s.writes++ }

// Reports wait for room, which is there again when a buffer is written.
func TestSourceIsToldWhenItsBufferIsWrittenAndAskedAgain(t *testing.T) {
	for _, size := range []int{10, chunkBytes, 10 * chunkBytes} {
		synctest.Test(t, func(t *testing.T) {
			here, there := net.Pipe()
			source := &countingSource{line: strings.Repeat("x", size-1) + "\n"}
			w := newWire(here, source)
			done := make(chan error, 1)
			go func() { done <- w.writeLoop() }()
			synctest.Wait()
			if source.writes != 0 {
				t.Error("told that all is written, and nothing is read")
			}
			if _, err := io.ReadFull(there, make([]byte, size)); err != nil {
				t.Error(err)
			}
			synctest.Wait()
			if source.asked != 2 || source.writes != 1 {
				t.Errorf("after a buffer of %d bytes was written the source was asked %d times, want 2, and told %d times, want 1", size, source.asked, source.writes)
			}
			w.end(endAtOnce, nil)
			<-done
		})
	}
}

// A peer that pings on and on does not keep a wire open that has said
// everything.
func TestUrgentLinesDoNotHoldUpTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		conn := &talkativeConn{Conn: here}
		w := startWire(conn)
		conn.afterWrite = func() { w.sendUrgent(message{verb: verbPong, task: 1}) }
		w.sendUrgent(message{verb: verbPong, task: 0})
		w.end(endAfterAll, []byte("GOODBYE\n"))
		p := newPeer(t, there)
		for range 10 {
			if p.next() == "GOODBYE" {
				p.expectEnd()
				<-w.done
				return
			}
		}
		t.Error("ten PONGs, and no GOODBYE")
		there.Close()
		<-w.done
	})
}

// talkativeConn does something after each write.
type talkativeConn struct {
	net.Conn
	afterWrite func()
}

func (c *talkativeConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.afterWrite()
	return n, err
}

func TestUrgentLinesOvertakeButNeverInsideALine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := startWire(here)
		var want []string
		for i := range 20_000 {
			line := fmt.Sprintf("RUN %d 1 0 %s", i, strings.Repeat("x", i%97))
			if i == 1000 {
				line += strings.Repeat("y", 300_000) // longer than chunks
			}
			want = append(want, line)
		}
		w.mu.Lock()
		w.out = []byte(strings.Join(want, "\n") + "\n")
		w.mu.Unlock()
		w.wakeWriter()

		var read, said int
		var got []string
		var late []int // bytes between the sending of an urgent line and its arrival
		in := lineReader{src: there, limit: defaultMaxLine}
		at := map[int]bool{0: true, 500: true, 999: true, 1000: true, 5000: true, 19_000: true}
		sent := make(map[string]int)
		for len(got) < len(want) || len(late) < len(at) {
			b, err := in.next()
			if err != nil {
				t.Fatal(err)
			}
			line := string(b)
			read += len(line) + 1
			if from, ok := sent[line]; ok {
				late = append(late, read-from)
				continue
			}
			if at[len(got)] {
				m := message{verb: verbPing, task: len(got)}
				if len(got) == 5000 {
					m = message{verb: verbCancel, text: "enough"}
				}
				sent[strings.TrimSuffix(string(appendMessage(nil, m)), "\n")] = read
				if !w.sendUrgent(m) {
					t.Error("an urgent line was dropped")
				}
				said++
			}
			got = append(got, line)
		}
		if !cmp.Equal(want, got) {
			t.Error("the other lines are not what was sent, in order")
		}
		for _, n := range late {
			// What this side has read ahead, the chunk being written, and the long line.
			if n > 2*readBufferMax+2*chunkBytes+300_100 {
				t.Errorf("an urgent line came %d bytes after it was sent", n)
			}
		}
		if said != len(at) {
			t.Errorf("%d urgent lines were sent, want %d", said, len(at))
		}
		w.end(endAtOnce, nil)
		<-w.done
	})
}

// PONGs that nobody reads must not pile up.
func TestUrgentLinesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := startWire(here)
		n := 0
		for w.sendUrgent(message{verb: verbPong, task: n}) {
			if n++; n > 2*urgentBytes {
				t.Fatalf("%d PONGs wait to be read", n)
			}
		}
		if n < 100 {
			t.Errorf("only %d PONGs may wait", n)
		}
		p := newPeer(t, there)
		for i := range n {
			p.expect(fmt.Sprint("PONG ", i))
		}
		w.end(endAtOnce, nil)
		<-w.done
	})
}

func TestSlowReaderSurvivesAsLongAsItReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := startWire(here)
		line := "DONE 0 0 " + strings.Repeat("x", 10*chunkBytes)
		w.say(line)
		for range 5 {
			w.say("DRAIN")
		}
		var got []byte
		chunk := make([]byte, chunkBytes)
		start := time.Now()
		for len(got) < len(line)+1+5*len("DRAIN\n") {
			time.Sleep(9 * time.Second)
			n, err := io.ReadAtLeast(there, chunk, min(len(chunk), len(line)+1+5*len("DRAIN\n")-len(got)))
			got = append(got, chunk[:n]...)
			if err != nil {
				t.Fatalf("after %v and %d bytes: %v", time.Since(start), len(got), err)
			}
		}
		if want := line + "\n" + strings.Repeat("DRAIN\n", 5); string(got) != want {
			t.Error("what arrived is not what was sent")
		}
		if d := time.Since(start); d < 90*time.Second {
			t.Errorf("it took %v, which shows nothing", d)
		}
		w.end(endAtOnce, nil)
		<-w.done
	})
}

func TestReaderThatStallsIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := startWire(here)
		w.say("DONE 0 0 " + strings.Repeat("x", 10*chunkBytes))
		time.Sleep(9 * time.Second)
		if _, err := io.ReadFull(there, make([]byte, chunkBytes)); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		<-w.done
		if d := time.Since(start); d != writeTimeout || !errors.Is(w.err, os.ErrDeadlineExceeded) {
			t.Errorf("the writer ended after %v with %v", d, w.err)
		}
		err := w.read(new(message))
		if d := time.Since(start); d > writeTimeout+lastWordsTimeout || !isTimeout(err) {
			t.Errorf("the reader ended after %v with %v", d, err)
		}
		here.Close()
		there.Close()
	})
}

// A peer that found a fault stops reading, says so and closes. What it said
// matters more than that it could not be written to.
func TestPeersLastWordsAreHeardAfterAWriteError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := startWire(here)
		w.say("DONE 0 0")
		<-w.done
		if !isTimeout(w.err) {
			t.Errorf("the writer ended with %v", w.err)
		}
		go func() {
			time.Sleep(lastWordsTimeout / 2)
			io.WriteString(there, "ERROR busy too many sessions\n")
		}()
		var m message
		err := w.read(&m)
		if want := (message{verb: verbError, word: codeBusy, text: "too many sessions"}); m != want || err != nil {
			t.Errorf("read %+v, %v; want %+v", m, err, want)
		}
		here.Close()
		there.Close()
	})
}

// The end that the writer has set must outlast the handshake's deadline.
func TestReaderEndsAfterAWriteErrorThoughTheHandshakeIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		here.SetReadDeadline(time.Now().Add(time.Minute))
		w := startWire(here)
		w.say("HELLO") // which the peer does not read
		<-w.done
		go func() {
			time.Sleep(lastWordsTimeout / 2)
			io.WriteString(there, "DRAIN\n")
		}()
		start := time.Now()
		if err := w.read(new(message)); err != nil {
			t.Fatal(err)
		}
		w.liftReadDeadline()
		if err := w.read(new(message)); !isTimeout(err) || time.Since(start) > lastWordsTimeout {
			t.Errorf("the reader ended after %v with %v", time.Since(start), err)
		}
		here.Close()
		there.Close()
	})
}

func TestEndAtOnceIsOverWithinASecond(t *testing.T) {
	for _, tt := range []struct {
		reason string
		before func(w *wireSide)
		last   []byte
	}{
		{"an idle wire, with last words", func(w *wireSide) {}, []byte("ERROR closing\n")},
		{"an idle wire, without", func(w *wireSide) {}, nil},
		{"a line that the peer does not read", func(w *wireSide) { w.say("DRAIN") }, []byte("ERROR closing\n")},
		{"a long line that the peer does not read", func(w *wireSide) { w.say(strings.Repeat("x", 500_000)) }, []byte("ERROR closing\n")},
		{"a goodbye that the peer does not read", func(w *wireSide) { w.end(endAfterAll, []byte("GOODBYE\n")) }, nil},
		{"a writer that has just failed", func(w *wireSide) { w.say("DRAIN"); <-w.done }, []byte("ERROR closing\n")},
	} {
		for _, reads := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, peer closes %v", tt.reason, reads), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					here, there := net.Pipe()
					w := startWire(here)
					tt.before(w)
					synctest.Wait()
					start := time.Now()
					w.end(endAtOnce, tt.last)
					if reads {
						there.Close()
					}
					w.discard()
					<-w.done
					if d := time.Since(start); d > lastWordsTimeout {
						t.Errorf("it took %v", d)
					}
					here.Close()
					there.Close()
				})
			})
		}
	}
}

func TestOnlyTheFirstLastWordsAreSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := startWire(here)
		w.end(endAtOnce, []byte("ERROR syntax the first fault\n"))
		w.end(endAtOnce, []byte("ERROR state what followed from it\n"))
		w.end(endAfterAll, []byte("GOODBYE\n"))
		w.end(endAtOnce, nil)
		p := newPeer(t, there)
		p.expect("ERROR syntax the first fault")
		p.expectEnd()
		<-w.done
	})
}

func TestEndAfterAllWritesWhatWaitsFirst(t *testing.T) {
	overPipeAndTCP(t, func(t *testing.T, here, there net.Conn) {
		w := startWire(here)
		w.sendUrgent(message{verb: verbPong, task: 1})
		line := "DONE 0 0 " + strings.Repeat("x", 100_000)
		for range 3 {
			w.say(line)
		}
		w.end(endAfterAll, []byte("GOODBYE see you\n"))
		var owner sync.WaitGroup
		owner.Go(func() {
			w.discard()
			<-w.done
			here.Close()
		})
		got, err := io.ReadAll(there)
		if want := "PONG 1\n" + strings.Repeat(line+"\n", 3) + "GOODBYE see you\n"; string(got) != want || err != nil {
			t.Errorf("%d bytes arrived, %v; want %d", len(got), err, len(want))
		}
		there.Close()
		owner.Wait()
		if w.err != nil {
			t.Errorf("the writer ended with %v", w.err)
		}
	})
}

// bareConn hides what a connection can do beyond net.Conn, as wrappers do.
type bareConn struct{ net.Conn }

// overPipeAndTCP runs body over net.Pipe, over TCP, and over TCP with a
// wrapper on this side that cannot close one half.
func overPipeAndTCP(t *testing.T, body func(t *testing.T, here, there net.Conn)) {
	t.Run("pipe", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			here, there := net.Pipe()
			defer here.Close()
			defer there.Close()
			body(t, here, there)
		})
	})
	for _, bare := range []bool{false, true} {
		name := "tcp"
		if bare {
			name = "wrapped tcp"
		}
		t.Run(name, func(t *testing.T) {
			here, there, err := tcpPair()
			if err != nil {
				t.Fatal(err)
			}
			defer here.Close()
			defer there.Close()
			there.SetDeadline(time.Now().Add(20 * time.Second))
			if bare {
				body(t, bareConn{here}, there)
			} else {
				body(t, here, there)
			}
		})
	}
}

// tcpPair is a connection over loopback, seen from both ends.
func tcpPair() (here, there *net.TCPConn, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	dialed, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	accepted, err := ln.Accept()
	if err != nil {
		dialed.Close()
		return nil, nil, err
	}
	return dialed.(*net.TCPConn), accepted.(*net.TCPConn), nil
}

// On a pipe the peer cannot read before it has finished writing; on TCP a
// connection closed with unread input is reset, and the peer's kernel may
// throw away what it has not read yet.
func TestLastWordsReachAPeerThatIsStillWriting(t *testing.T) {
	for _, how := range []ending{endAtOnce, endAfterAll} {
		t.Run([]string{endAtOnce: "at once", endAfterAll: "after all"}[how], func(t *testing.T) {
			overPipeAndTCP(t, func(t *testing.T, here, there net.Conn) {
				w := startWire(here)
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					if err := w.read(new(message)); err != nil {
						t.Errorf("reading the first line: %v", err)
					}
					w.end(how, []byte("ERROR window too much in flight\n"))
					if !unbuffered(here) {
						<-w.done // with much input unread
					}
					w.discard()
					<-w.done
					here.Close()
				}()
				// All of it is written before anything is read.
				if _, err := there.Write(bytes.Repeat([]byte("RUN 0 1 0 x\n"), 20_000)); err != nil {
					t.Errorf("writing: %v", err)
				}
				if !unbuffered(here) {
					<-w.done
					// After a reset this would fail.
					if _, err := there.Write([]byte("RUN 0 1 0 x\n")); err != nil {
						t.Errorf("writing on: %v", err)
					}
				}
				newPeer(t, there).expect("ERROR window too much in flight")
				there.Close()
				<-ended
			})
		})
	}
}

// A worker may greet, and have something to report, while its writer is on the
// way from urgent lines to others.
func TestReportsDoNotOvertakeAGreeting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		var w *wire
		greeted := false
		w = newWire(here, sourceFunc(func(dst []byte) []byte {
			if greeted {
				return dst
			}
			greeted = true
			w.sendFirst([]byte("WELCOME taskexec/1 {}\n"))
			return append(dst, "DONE 0 0\n"...)
		}))
		done := make(chan struct{})
		go func() { defer close(done); w.writeLoop() }()
		p := newPeer(t, there)
		p.expect("WELCOME taskexec/1 {}", "DONE 0 0")
		w.end(endAtOnce, nil)
		<-done
	})
}

// What a worker answers to a PING goes ahead of reports, but not of its
// greeting.
func TestWelcomeComesFirst(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			here, there := net.Pipe()
			w := NewWorker(HandlerFunc(func(ctx context.Context, task Task) (string, error) { return "", nil }))
			served := make(chan error, 1)
			go func() { served <- w.ServeConn(t.Context(), here) }()
			p := newPeer(t, there)
			p.send(`HELLO taskexec/1 {"category":"a"}`, "PING 5")
			p.expect("WELCOME…", "PONG 5")
			there.Close()
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestLastNewlineIsFoundWhereverItIs(t *testing.T) {
	for _, n := range []int{0, 1, 1023, 1024, 1025, 3000} {
		b := bytes.Repeat([]byte("x"), n)
		if got := lastNewline(b); got != -1 {
			t.Errorf("%d bytes without a newline: %d", n, got)
		}
		for at := range n {
			b[at] = '\n'
			if at >= 7 {
				b[at-7] = '\n' // not the last
			}
			if got := lastNewline(b); got != at {
				t.Fatalf("%d bytes, the last newline at %d: %d", n, at, got)
			}
			b = bytes.Repeat([]byte("x"), n)
		}
	}
}

// Long lines that go on coming are read into room that stays; when there are no
// more of them it does not.
func TestRoomForLongLinesIsKeptWhileTheyCome(t *testing.T) {
	long, short := strings.Repeat("x", 100_000)+"\n", "x\n"
	var in bytes.Buffer
	r := lineReader{src: &in, limit: defaultMaxLine}
	read := func(line string) {
		t.Helper()
		in.WriteString(line)
		if got, err := r.next(); err != nil || string(got)+"\n" != line {
			t.Fatalf("got %d bytes and %v", len(got), err)
		}
	}
	read(long)
	room := &r.buf[0]
	for range 20 {
		for range readBatchCalm - 1 {
			read(short)
		}
		read(long)
		if &r.buf[0] != room {
			t.Fatal("the room was made anew while long lines come")
		}
	}
	for range 2 * readBatchCalm {
		read(short)
	}
	if len(r.buf) > readBufferMax {
		t.Errorf("a session with short lines only keeps %d bytes", len(r.buf))
	}
	read(strings.Repeat("x", readBufferFew*readBufferMax) + "\n")
	read(short)
	if len(r.buf) > readBufferMax {
		t.Errorf("after one very long line it keeps %d bytes", len(r.buf))
	}
}

// fullReader fails the test if it is asked for nothing: what a connection answers
// to that is its own affair.
type fullReader struct {
	t   *testing.T
	src io.Reader
}

func (r fullReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		r.t.Error("the reader asks for no bytes")
	}
	return r.src.Read(p)
}

// A line that has begun leaves room to read more of it in the smaller buffer that
// takes over.
func TestReaderAlwaysHasRoomToRead(t *testing.T) {
	for _, begun := range []int{readBufferMax - 1, readBufferMax, readBufferMax + 1} {
		first := strings.Repeat("x", defaultMaxLine-begun-1) + "\n" // the rest of the room for it is begun
		second := strings.Repeat("y", 2*readBufferMax) + "\n"
		r := &lineReader{src: fullReader{t, strings.NewReader(first + second)}, limit: defaultMaxLine}
		if lines, err := readLines(r); err != io.EOF || len(lines) != 2 || lines[0]+"\n" != first || lines[1]+"\n" != second {
			t.Errorf("%d bytes of a line begun: %d lines, %v", begun, len(lines), err)
		}
	}
}
