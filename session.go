package taskexec

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// A session is one connection to a worker, for one category of one run, seen
// from the coordinator. Its writer sends what it takes from the queue; its
// reader settles what the worker reports. Nobody else touches a task that it
// holds, and when it ends it holds none: the session is the fence.
type session struct {
	run   *run
	queue *queue
	link  *link
	addr  string // the link's
	wire  *wire
	gone  chan struct{} // closed when the session is over, and everything it knew is told
	wrote chan struct{} // closed when the writer has nothing more to say

	mayGive  atomic.Bool // the worker has reason to send RETURN; set with queue.mu held
	chatter  allowance   // the reader's
	follower *follower   // likewise; of this session, once its worker drains

	// From WELCOME; set before the session joins its queue.
	name      string // the worker's, or its address if it gave none
	instance  string
	window    int
	maxLine   int
	heartbeat bool

	// guarded by queue.mu
	slots    int // of the worker, less those that are stuck
	held     table[flight]
	cost     int  // of held
	cramped  bool // cost leaves too few bytes of the window for task tooLong
	tooLong  int
	live     bool // it takes tasks
	pace     pace // of the worker
	standing      // among the sessions of the queue
	pinged   int  // the number of the latest PING
	pingedAt time.Time
	suspects int     // of held, those that were on a session that was lost
	alone    *Result // held, and nothing may be held beside it; nil if there is no such task
	heardOf  bool    // it has reported that a task was executed
	out      []byte  // lines other than RUN that wait for the writer
	told     bool    // SHUTDOWN was sent
	goodbye  bool    // GOODBYE was received
	ending   bool    // this side ends it; nothing it says counts any more
	err      error   // why it ended, if not as it should
	writeErr error
}

// newSession dials l's worker and greets. The error is a *WorkerError.
func newSession(ctx context.Context, l *link) (*session, error) {
	q := l.queue
	r := q.run
	timeout := r.config.handshakeTimeout
	deadline := time.Now().Add(timeout)
	dialCtx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	s := &session{run: r, queue: q, link: l, addr: l.addr, gone: make(chan struct{}), wrote: make(chan struct{})}
	network, address, err := splitAddr(l.addr)
	if err != nil {
		return nil, s.fail(err)
	}
	conn, err := r.config.dial(dialCtx, network, address)
	if conn == nil && err == nil {
		err = errNoConnection
	}
	if err != nil {
		if ctx.Err() == nil && dialCtx.Err() != nil {
			err = fmt.Errorf("no connection within %v: %w", timeout, err)
		} else if handshake := newHandshakeError(err); handshake.stays { // of a dialer that brings TLS
			err = handshake
		}
		return nil, s.fail(aboutSocket(network, address, err))
	}
	conn, err = r.config.secure(dialCtx, conn, l.addr, q.category)
	if err != nil {
		conn.Close()
		if ctx.Err() == nil && dialCtx.Err() != nil {
			err = fmt.Errorf("no TLS handshake within %v: %w", timeout, err)
		}
		return nil, s.fail(err)
	}
	s.wire = newWire(conn, s)
	greeting, err := appendGreeting(nil, verbHello, hello{Run: r.id, Category: q.category, MaxLine: defaultMaxLine,
		TimeoutMS: ceilDiv(r.config.silence, time.Millisecond, maxMillis)})
	if err != nil {
		conn.Close()
		return nil, s.fail(err)
	}
	s.wire.sendFirst(greeting) // a worker may say WELCOME and PING without waiting for it
	r.sessions.Go(func() error { s.write(); return nil })
	s.wire.setReadDeadline(deadline)
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { conn.Close(); close(closed) })
	err = s.greet(deadline)
	if !stop() {
		<-closed // TLS says goodbye, and a peer may not read
		err = context.Cause(ctx)
	}
	if err != nil {
		s.hangUp(err)
		return nil, s.fail(err)
	}
	s.wire.liftReadDeadline()
	if s.heartbeat {
		r.sessions.Go(func() error { s.beat(); return nil })
	}
	return s, nil
}

// greet reads WELCOME, which is to come by deadline. A *ProtocolError that it
// returns is this side's finding unless it is Remote.
func (s *session) greet(deadline time.Time) error {
	var m message
	err := s.wire.read(&m)
	var fault *ProtocolError
	alert := alertOf(err)
	switch {
	case alert != nil:
		return alert
	case isTimeout(err) && !time.Now().Before(deadline): // before that, the writer has failed, and says why
		return faultf(codeTimeout, "no WELCOME within %v", s.run.config.handshakeTimeout)
	case errors.As(err, &fault) && fault.Code == codeSyntax:
		return faultf(codeProtocol, "it does not speak %s: %s", protocolVersion, fault.Text)
	case err == io.EOF:
		return errors.New("it closed the connection instead of greeting")
	case err != nil:
		return s.whyLost(err)
	case rules[workerRole][sessionNew][m.verb] != taken:
		return misplaced(workerRole, sessionNew, m.verb)
	case m.verb == verbError:
		return &ProtocolError{Code: m.word, Text: m.text, Remote: true}
	}
	w, err := parseWelcome(m)
	if err != nil {
		return err
	}
	s.name = w.Worker
	if s.name == "" {
		s.name = s.addr
	}
	if !serves(w.Categories, s.queue.category) {
		return faultf(codeCategory, "worker %s serves %s, not %s; list it under what it serves", quoteUnlessPlain(s.name), quote(strings.Join(w.Categories, ", ")), quote(s.queue.category))
	}
	s.instance = w.Instance
	granted := int(min(w.Window, windowTasks))
	s.slots = int(min(w.Slots, int64(granted)))
	s.window = min(granted, max(s.run.config.window, s.slots))
	if s.run.config.atMostOnce {
		s.window = s.slots
	}
	s.heartbeat = w.Heartbeat
	s.maxLine = int(min(w.MaxLine, defaultMaxLine))
	s.pace.window = s.slots // until something is measured
	s.pace.tripTook(s.wire.age())
	s.wire.in.limit = defaultMaxLine
	return nil
}

// fail names the worker in err.
func (s *session) fail(err error) error {
	name := s.name
	if name == s.addr {
		name = ""
	}
	return &WorkerError{Category: s.queue.category, Addr: s.addr, Worker: name, Err: err}
}

// write is the writer.
func (s *session) write() {
	defer close(s.wrote)
	err := s.wire.writeLoop()
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	s.writeErr = err
}

// fill hands the writer what there is to say.
func (s *session) fill(buf []byte) []byte {
	s.queue.mu.Lock()
	defer s.queue.unlock()
	buf = append(buf, s.out...)
	s.out = nil
	return s.queue.take(s, buf)
}

// written has nothing to do: a task is in flight from when it is taken.
func (s *session) written() {}

// serve is the reader, from WELCOME to the end of the session.
func (s *session) serve() {
	defer close(s.gone)
	err := s.read()
	s.faulted(err)
	// The fence: from here on no report of this session counts.
	s.leave(err)
	s.hangUp(err)
}

// faulted ends the wire with last words if err says that the peer broke the
// rules. It comes before whatever may end the run, which would close the
// session without a word.
func (s *session) faulted(err error) bool {
	var fault *ProtocolError
	if !errors.As(err, &fault) || fault.Remote {
		return false
	}
	s.wire.endWithError(fault)
	return true
}

// hangUp ends the connection; with last words if the peer broke the rules.
func (s *session) hangUp(err error) {
	if s.faulted(err) {
		s.wire.discard()
		<-s.wrote // a worker that has ended its half has nothing to discard, and may still read
	}
	s.wire.end(endAtOnce, nil)
	s.wire.conn.Close()
}

// close ends a session that the run no longer needs. One that is already being
// ended still has its last words to say, and closes itself soon after.
func (s *session) close() {
	s.queue.mu.Lock()
	s.ending = true
	s.queue.mu.Unlock()
	if s.wire.end(endAtOnce, nil) {
		s.wire.conn.Close()
	}
}

// leave ends the session's part in the queue.
func (s *session) leave(err error) {
	s.queue.mu.Lock()
	defer s.queue.unlock()
	s.leaveLocked(err, s.held.len())
}

// leaveLocked is leave for a session that held so many tasks. q.mu is held.
func (s *session) leaveLocked(err error, held int) {
	q := s.queue
	if !s.ending && err != nil {
		s.err = s.fail(s.whyLostLocked(err))
	}
	closed := s.ending
	s.ending = true
	if !closed && s.link.session == s {
		s.link.err = nil
	}
	q.retire(s)
	q.sessions = slices.DeleteFunc(q.sessions, func(l *session) bool { return l == s })
	if s.goodbye {
		held = 0 // what was not reported was never started
	}
	q.takeBack(s, !s.goodbye)
	if !closed {
		s.run.events.sessionLost(SessionLostInfo{Run: s.run.id, Category: q.category, Addr: s.addr, Worker: s.name, Goodbye: s.goodbye, Lost: held, Err: s.err})
	}
}

// whyLost puts the writer's reason before the reader's, which follows from it,
// unless the reader's is what the peer said.
func (s *session) whyLost(err error) error {
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	return s.whyLostLocked(err)
}

func (s *session) whyLostLocked(err error) error {
	var said *ProtocolError
	switch {
	case errors.As(err, &said):
		return err
	case s.writeErr != nil:
		return fmt.Errorf("connection lost: %w", s.writeErr)
	case err == io.EOF:
		return errors.New("it closed the connection")
	case err == errAllStuck:
		return err
	}
	return fmt.Errorf("connection lost: %w", err)
}

// read handles messages until the session is over: nil after GOODBYE.
func (s *session) read() error {
	var batch []message // reports not settled yet
	for {
		batch = append(batch, message{})
		m := &batch[len(batch)-1]
		err := s.wire.read(m)
		if err == nil {
			err = s.judge(m.verb)
		}
		isReport := err == nil && (m.verb == verbDone || m.verb == verbFail || m.verb == verbReturn)
		if isReport && len(batch) < windowTasks && s.wire.in.more() {
			continue
		}
		other := *m // of which the batch keeps nothing
		if !isReport {
			batch = batch[:len(batch)-1]
		}
		if fault := s.report(batch); fault != nil {
			return fault
		}
		clear(batch)
		batch = batch[:0]
		if err != nil {
			return err
		}
		switch m := other; m.verb {
		case verbPing:
			if !s.wire.sendUrgent(message{verb: verbPong, task: m.task}) {
				return faultf(codeFlood, "too many PINGs whose PONGs are not read")
			}
		case verbPong:
			s.ponged(m.task)
		case verbDrain:
			s.drained()
		case verbGoodbye:
			s.saidGoodbye(m.text)
			return nil
		case verbError:
			return &ProtocolError{Code: m.word, Text: m.text, Remote: true}
		}
	}
}

// judge says what is wrong with a message of that verb, and returns nil if nothing
// is. What comes once the session is finished is not read.
func (s *session) judge(v verb) error {
	state := sessionReady
	if s.mayGive.Load() {
		state = sessionReturns
	}
	if rules[workerRole][state][v] != taken {
		return misplaced(workerRole, state, v)
	}
	return s.chatter.note(v)
}

// report settles the tasks that a worker reported together.
func (s *session) report(batch []message) error {
	if len(batch) == 0 {
		return nil
	}
	q := s.queue
	q.mu.Lock()
	defer q.unlock()
	now := time.Now()
	at := now.Sub(s.run.started)
	executed := 0
	var spent time.Duration // since their sending, added up
	var back []*Result
	var err error
	for i := range batch {
		m := &batch[i]
		r, sent := q.release(s, m.task)
		if r == nil {
			err = faultf(codeTask, "%s for task %d, which is not in flight here", m.verb, m.task)
			break
		}
		roundTrip := at - sent
		if m.verb != verbReturn {
			s.heardOf = true
			q.progressed()
			executed++
			spent += roundTrip
		}
		switch m.verb {
		case verbDone:
			r.Output = m.text
			r.Executed = min(m.time, roundTrip.Truncate(time.Microsecond)) // a worker may count a wait for the processor before it
			s.link.counts.add(Done)
			q.settle(r, Done, nil, roundTrip)
		case verbFail:
			if m.word == KindStuck {
				q.loseSlot(s)
			}
			q.failed(s, r, m, roundTrip, now)
		case verbReturn:
			back = append(back, r)
			q.troubles.Returns++
		}
	}
	if err != nil {
		s.faulted(err)
		if !s.ending {
			s.err = s.fail(err) // if nobody else is left, the run ends with it
		}
		q.retire(s) // or it would be sent what is put back
	}
	s.pace.reported(executed, spent, s.held.len(), s.slots, s.window, now)
	q.weigh(s)
	q.putBack(back)
	switch {
	case q.waits() == 0:
		q.offer(s)
		if q.uneven() {
			q.evenOut(now)
		}
	case q.worthWaking(s):
		s.wire.wakeWriter()
	}
	if err == nil && s.slots == 0 && s.held.len() == 0 {
		return errAllStuck
	}
	return err
}

// isPinged takes note of a PING.
func (s *session) isPinged(n int, now time.Time) {
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	s.pinged, s.pingedAt = n, now
}

// ponged takes note of a PONG.
func (s *session) ponged(n int) {
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	if n > 0 && n == s.pinged {
		s.pinged = 0
		s.pace.tripTook(time.Since(s.pingedAt))
	}
}

// errAllStuck is why a session whose worker has no slot left is ended. Another
// session follows when the worker has a slot again.
var errAllStuck = errors.New("all of its slots are held by handlers that ignore their timeout")

// reported says whether the worker has executed anything.
func (s *session) reported() bool {
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	return s.heardOf
}

// drained takes note of DRAIN.
func (s *session) drained() {
	q := s.queue
	q.mu.Lock()
	s.mayGive.Store(true)
	q.retire(s)
	q.unlock()
	s.startFollower()
}

// saidGoodbye takes note of GOODBYE.
func (s *session) saidGoodbye(text string) {
	s.queue.mu.Lock()
	s.goodbye = true
	told := s.told
	s.queue.mu.Unlock()
	if told {
		s.run.events.goodbye(GoodbyeInfo{Run: s.run.id, Worker: s.name, Addr: s.addr, Category: s.queue.category, Text: text})
	}
}

// halt asks for what the session holds: back what has not started, and, if
// the run is canceled, the rest soon. queue.mu is held.
func (s *session) halt(how halt, why error) {
	if s.ending || how == haltCancel && s.held.len() == 0 {
		return
	}
	if how == haltCancel {
		s.mayGive.Store(true)
		text := why.Error()
		if ended := (*contextError)(nil); errors.As(why, &ended) {
			text = ended.text()
		}
		// It goes even to a peer that leaves PONGs unread.
		s.wire.sendFirst(appendMessage(nil, message{verb: verbCancel, text: cutText(text)}))
		return
	}
	s.recall()
}

// recall asks for everything back that has not started. queue.mu is held.
func (s *session) recall() {
	s.mayGive.Store(true)
	for _, f := range s.flights() {
		s.out = appendMessage(s.out, message{verb: verbRecall, task: f.result.Index})
	}
	s.wire.wakeWriter()
}

// flights lists what the session holds, in input order. queue.mu is held.
func (s *session) flights() []flight {
	var held []flight
	for _, f := range s.held.all {
		held = append(held, f)
	}
	slices.SortFunc(held, func(a, b flight) int { return cmp.Compare(a.result.Index, b.result.Index) })
	return held
}

// dismiss takes note that the worker is no longer needed: no session follows.
func (s *session) dismiss() {
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	s.link.dismissed = true
}

// tellShutdown sends SHUTDOWN. It reports false if the session is over.
func (s *session) tellShutdown() bool {
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	if s.ending {
		return false
	}
	s.told = true
	s.out = appendMessage(s.out, message{verb: verbShutdown})
	s.wire.wakeWriter()
	return true
}

// end says how the session ended: whether GOODBYE came, and what went wrong,
// without the name of the worker.
func (s *session) end() (goodbye bool, why error) {
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	why = errSessionOver
	if named := (*WorkerError)(nil); errors.As(s.err, &named) {
		why = named.Err
	}
	return s.goodbye, why
}
