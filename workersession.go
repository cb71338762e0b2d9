package taskexec

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// A workerSession is one session seen from the worker. Three kinds of
// goroutines meet in it: the reader (serveConn's own), the writer, and those of
// the slots that execute its jobs. The reader never waits for anything but
// input.
type workerSession struct {
	worker      *Worker
	accepted    net.Conn // the connection that was accepted, without this side's TLS
	wire        *wire
	coordinator string          // the coordinator's name, from a verified certificate; set before any job exists
	hello       hello           // likewise
	ctx         context.Context // the handlers'; ends with the session
	cancel      context.CancelCauseFunc
	slots       sync.WaitGroup
	secured     chan struct{} // closed when the TLS handshake is over, or there is none
	over        chan struct{} // closed when the connection is over
	pulse       sync.WaitGroup
	unanswered  *ProtocolError // why keepLease ended the session, if it did; to be read after pulse
	batch       []job          // the reader's: RUNs read and not yet accepted
	seen        sessionState   // the reader's: the latest it knows of
	chatter     allowance      // the reader's
	log         *sessionLog    // complete before any job exists

	mu       sync.Mutex // guards following
	room     sync.Cond  // waited on by reports that do not fit
	out      []byte     // lines for the writer
	writing  int        // bytes that the writer has taken and not yet written
	waiting  jobs       // those that have not started
	inFlight table[int] // the places, in waiting, of those that are not reported
	cost     int        // of inFlight
	slotList []*slot    // all that there have been
	spare    []*slot    // those that execute nothing
	done     int64      // handlers that returned, by what they returned
	failed   int64
	state    sessionState
	pings    map[int]time.Time // when those were sent that have not come back
	lease    time.Time         // from when the coordinator's patience is counted: WELCOME, then each PING that is answered

	// guarded by Worker.mu
	place  place
	inTurn bool // it stands in Worker.turns
}

// reportBytes is how many bytes of reports a session buffers, besides one line. A
// finished handler whose report does not fit waits, and keeps its slot.
const reportBytes = 1 << 20

// answerBytes is how many more bytes the reader's own answers, RETURNs, may add:
// the reader cannot wait for room as a slot does.
const answerBytes = 1 << 20

// serveConn is a whole session.
func (w *Worker) serveConn(ctx context.Context, conn net.Conn) (err error) {
	log := w.newSessionLog(conn)
	defer func() { log.ended(err, ctx.Err() != nil) }()
	accepted := conn
	conn, err = w.config.secure(conn)
	if err != nil {
		conn.Close()
		return err
	}
	s := &workerSession{worker: w, accepted: accepted, log: log, pings: make(map[int]time.Time), secured: make(chan struct{}), over: make(chan struct{})}
	s.wire = newWire(conn, s)
	s.room.L = &s.mu
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	if !w.enterStranger(s) {
		conn.Close()
		s.cancel(nil)
		return nil
	}
	defer w.removeSession(s)

	var writer sync.WaitGroup
	var writeErr error
	writer.Go(func() {
		<-s.secured
		writeErr = s.wire.writeLoop()
	})
	stop := context.AfterFunc(ctx, func() {
		s.wire.endWithError(faultf(codeClosing, "the worker is closing"))
	})

	readErr := s.read()
	stop()
	finished, lost, idle := s.finish()
	if log != nil {
		log.lost, log.idle = lost, idle && readErr != errTorn
	}
	close(s.over)
	s.cancel(errSessionLost)
	s.lastWords(readErr, finished) // for up to a second, so handlers are told first
	s.wire.end(endAtOnce, nil)     // if nothing has ended it yet
	writer.Wait()
	conn.Close()
	madeRoom := w.disconnected(s)
	s.pulse.Wait()
	s.slots.Wait()

	// Why did it end? Our own state comes first, then what the peer said, and the
	// connection's error last: that follows from all the other reasons too.
	var said *ProtocolError
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case madeRoom:
		return &sessionError{w.config.name, errMadeRoom}
	case finished && s.seen == sessionNew: // a stranger loses nothing that was not written
		return nil
	case finished && writeErr == nil && (s.wire.saidIt || s.unanswered == nil):
		return nil
	case errors.As(readErr, &said):
		return &sessionError{w.config.name, said}
	case s.unanswered != nil:
		return &sessionError{w.config.name, s.unanswered}
	case readErr == errTorn:
		return &sessionError{w.config.name, readErr}
	case writeErr != nil:
		return &sessionError{w.config.name, writeErr}
	case readErr == io.EOF:
		return nil
	}
	return &sessionError{w.config.name, readErr}
}

// A sessionError is why a session of a worker ended.
type sessionError struct {
	worker string
	err    error
}

func (e *sessionError) Error() string {
	return "taskexec: session of worker " + quoteUnlessPlain(e.worker) + ": " + plainText(unprefixed(e.err))
}

func (e *sessionError) Unwrap() error { return e.err }

// read is the reader: it handles messages until the connection is over, and
// returns why it is.
func (s *workerSession) read() error {
	if err := s.greet(); err != nil {
		return err
	}
	var m message
	for {
		err := s.wire.read(&m)
		if err == nil {
			err = s.handle(&m)
		}
		if n := len(s.batch); err == nil && (n == windowTasks || n > 0 && !s.wire.in.more()) {
			err = s.acceptBatch()
		}
		if err != nil {
			return err
		}
	}
}

// lastWords tells a peer that broke a rule which one it was, if that is why
// reading ended.
func (s *workerSession) lastWords(readErr error, finished bool) {
	var fault *ProtocolError
	switch {
	case readErr == errTorn:
		fault = faultf(codeSyntax, "%v", errTorn) // the peer may have closed only its own half
	case !errors.As(readErr, &fault) || fault.Remote:
		return
	}
	if finished { // GOODBYE is on its way, and weighs more
		s.wire.conn.SetDeadline(s.wire.overSoon())
	} else {
		s.wire.endWithError(fault)
	}
	s.wire.discard()
}

// greet reads HELLO and answers WELCOME.
func (s *workerSession) greet() error {
	w := s.worker
	deadline := time.Now().Add(w.config.handshakeTimeout)
	if err := s.handshake(deadline); err != nil {
		return err
	}
	s.wire.setReadDeadline(deadline)
	var m message
	err := s.wire.read(&m)
	var fault *ProtocolError
	switch {
	case isTimeout(err):
		return faultf(codeTimeout, "no HELLO within %v", w.config.handshakeTimeout)
	case errors.As(err, &fault) && fault.Code == codeSyntax:
		return faultf(codeProtocol, "this is a worker of %s, which expects HELLO first: %s", protocolVersion, fault.Text)
	case err != nil:
		return err
	case rules[coordinatorRole][sessionNew][m.verb] != taken:
		return misplaced(coordinatorRole, sessionNew, m.verb)
	case m.verb == verbError:
		return &ProtocolError{Code: m.word, Text: m.text, Remote: true}
	}
	h, err := parseHello(m)
	if err != nil {
		return err
	}
	if err := w.admitGreeted(s); err != nil {
		return err
	}
	line, err := w.welcomeLine()
	if err != nil {
		return err
	}
	if h.Run == "" {
		h.Run = rand.Text() // or its tasks would have the keys of those of all others who do not name theirs
	}
	h.MaxLine = min(h.MaxLine, defaultMaxLine) // so that what is buffered is bounded, whatever the coordinator can read
	s.hello = h
	s.mu.Lock()
	late := s.state != sessionNew
	if !late {
		s.state = sessionReady
		s.worker.greeted.Add(1)
		s.lease = time.Now()
		s.wire.sendFirst(line) // even a PONG comes after it
	}
	s.mu.Unlock()
	if late { // drain has said so
		return faultf(codeClosing, "the worker is shutting down")
	}
	s.seen = sessionReady
	s.wire.in.limit = defaultMaxLine
	s.wire.liftReadDeadline()
	if s.log != nil {
		s.pulse.Go(s.log.open(h, s.coordinator)) // the reader does not wait for it
	}
	if h.TimeoutMS > 0 {
		s.pulse.Go(func() { s.keepLease(time.Duration(h.TimeoutMS) * time.Millisecond) })
	}
	return nil
}

// keepLease pings the coordinator, and cancels what runs when no answer has come
// for 0.8 of the silence after which the coordinator takes the worker to be dead.
// The lease counts from when the answered PING was sent: at that time the
// coordinator cannot have received it yet, so it gives the worker up later than
// the worker gives up itself. (Gray and Cheriton, "Leases", SOSP 1989.)
func (s *workerSession) keepLease(timeout time.Duration) {
	interval := timeout / 3
	lease := timeout / 10 * 8
	timer := time.NewTimer(interval)
	defer timer.Stop()
	var slowUntil time.Time
	for n := 1; ; {
		select {
		case <-s.over:
			return
		case <-timer.C:
		}
		now := time.Now()
		s.mu.Lock()
		end := s.lease.Add(lease)
		s.mu.Unlock()
		if s.wire.midWrite.Load() {
			slowUntil = now.Add(2 * interval) // a PING sent right after the line needs time to be answered
		}
		midLine := s.wire.midLine(lease)
		switch {
		case end.After(now):
		case midLine > 0:
			end = now.Add(midLine) // neither PING nor PONG can overtake within a line
		case now.Before(slowUntil):
			end = slowUntil
		default:
			s.cancel(errLeaseOver)
			s.unanswered = faultf(codeTimeout, "no answer to a PING for %v", lease)
			s.wire.endWithError(s.unanswered)
			return
		}
		s.mu.Lock()
		s.pings[n] = now
		s.mu.Unlock()
		s.wire.ping(n)
		n++
		timer.Reset(min(interval, end.Sub(now)))
	}
}

// echoed takes note of a PONG.
func (s *workerSession) echoed(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sent, ok := s.pings[n]
	if !ok {
		return
	}
	s.lease = sent
	for m := range s.pings {
		if m <= n { // whatever came before has been answered, or never will be
			delete(s.pings, m)
		}
	}
}

// welcomeLine is the worker's greeting.
func (w *Worker) welcomeLine() ([]byte, error) {
	return appendGreeting(nil, verbWelcome, welcome{
		Worker:     w.config.name,
		Instance:   w.instance,
		Categories: w.config.categories,
		Slots:      min(int64(w.config.slots), maxDouble),
		Window:     windowTasks,
		MaxLine:    defaultMaxLine,
		Heartbeat:  true,
	})
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// handle acts on one message. Its error ends the session.
func (s *workerSession) handle(m *message) error {
	if m.verb != verbRun {
		if err := s.acceptBatch(); err != nil {
			return err
		}
		s.seen = s.currentState()
	}
	switch rules[coordinatorRole][s.seen][m.verb] {
	case refused:
		return misplaced(coordinatorRole, s.seen, m.verb)
	case ignored:
		return nil
	}
	if m.verb == verbRun { // of a state that has changed meanwhile, admit will know
		s.batch = append(s.batch, job{})
		j := &s.batch[len(s.batch)-1]
		j.number, j.attempt, j.timeout, j.instruction = m.task, m.attempt, m.time, m.text
		j.cost = int32(taskCost(len(m.text))) // without the verb and numbers: never more than the coordinator counts
		return s.chatter.note(verbRun)
	}
	if err := s.chatter.note(m.verb); err != nil {
		return err
	}
	switch m.verb {
	case verbRecall:
		return s.recall(m.task)
	case verbCancel:
		return s.cancelAll(m.text)
	case verbPing:
		if !s.wire.sendUrgent(message{verb: verbPong, task: m.task}) {
			return faultf(codeFlood, "too many PINGs whose PONGs are not read")
		}
	case verbPong:
		s.echoed(m.task)
	case verbShutdown:
		if !s.worker.config.remoteShutdown.lets(s.wire.conn) {
			return faultf(codeRefused, "this worker does not shut down for you; it is for its own program, or for WithRemoteShutdown, to allow it")
		}
		s.worker.drain()
	case verbError:
		return &ProtocolError{Code: m.word, Text: m.text, Remote: true}
	}
	return nil
}

func (s *workerSession) currentState() sessionState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// acceptBatch takes the RUNs that were read together.
func (s *workerSession) acceptBatch() error {
	if len(s.batch) == 0 {
		return nil
	}
	batch := s.batch
	s.batch = s.batch[:0]
	defer clear(batch)
	if !serves(s.worker.config.categories, s.hello.Category) {
		return faultf(codeCategory, "this worker does not serve category %s", quote(s.hello.Category))
	}
	w := s.worker
	if err := s.admit(batch, w.stuckNow()); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !s.inTurn {
		s.inTurn = true
		w.turns = append(w.turns, s)
		w.setSole()
	}
	w.dispatch()
	return nil
}

// admit enters jobs as in flight, or gives them back in a session that takes
// no more. A job fails if an earlier attempt is among stuck, which were stuck here
// just before. Of one that got stuck later the coordinator does not know yet, so
// it sends no other attempt.
func (s *workerSession) admit(batch []job, stuck map[string]stuckJob) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range batch {
		j := &batch[i]
		switch s.state {
		case sessionFinished:
			return nil // what comes after GOODBYE counts as returned
		case sessionReturns:
			s.appendReport(message{verb: verbReturn, task: j.number})
			continue
		}
		if s.cost > 0 && s.cost+int(j.cost) > windowBytes {
			return faultf(codeWindow, "more in flight than the %d tasks and %d bytes granted", windowTasks, windowBytes)
		}
		if !s.inFlight.put(j.number, s.waiting.end()) {
			return faultf(codeTask, "task %d is already in flight", j.number)
		}
		s.cost += int(j.cost)
		if j.attempt > 1 {
			s.worker.repeated.Add(1)
		}
		if len(stuck) > 0 && stuck[s.keyOf(j)].ctx != nil {
			s.settle(j.number, j.cost)
			s.appendReport(message{verb: verbFail, task: j.number, word: KindError, text: "an earlier attempt still runs on this worker, stuck after its timeout"})
			continue
		}
		s.waiting.push(*j)
	}
	return s.flooded()
}

// keyOf is TaskInfo.Key of j's task.
func (s *workerSession) keyOf(j *job) string {
	return TaskInfo{Run: s.hello.Run, Task: j.number}.Key()
}

// appendReport adds a line for the writer, and wakes it. s.mu is held.
func (s *workerSession) appendReport(m message) {
	s.addReport(&m)
	s.wire.wakeWriter()
}

// addReport adds a line. s.mu is held.
func (s *workerSession) addReport(m *message) {
	if m.verb == verbReturn {
		s.worker.returned.Add(1)
	}
	s.out = appendMessage(s.out, *m)
}

// flooded returns an error if the reader's own answers pile up unread, beside as
// many reports as there may be. s.mu is held.
func (s *workerSession) flooded() error {
	if len(s.out)+s.writing > reportBytes+defaultMaxLine+answerBytes {
		return faultf(codeFlood, "too many tasks returned whose RETURNs are not read")
	}
	return nil
}

// recall gives back a job that has not started. One that has, or is already
// reported, is left alone: the report tells the coordinator.
func (s *workerSession) recall(number int) error {
	s.mu.Lock()
	defer s.sayGoodbyeIfDrained()
	defer s.mu.Unlock()
	place, ok := s.inFlight.get(number)
	if !ok {
		return nil
	}
	j := s.waiting.giveBack(place)
	if j == nil {
		return nil
	}
	s.giveBack(*j) // of which the instruction is gone already
	s.waiting.clean(func(number, place int) {
		s.inFlight.take(number)
		s.inFlight.put(number, place)
	})
	return s.flooded()
}

// cancelAll cancels what runs, and gives back what has not started.
func (s *workerSession) cancelAll(cause string) error {
	s.cancel(&canceledError{cause})
	return s.giveAllBack(sessionReturns)
}

// giveAllBack gives back all jobs that have not started, and moves the session
// to state.
func (s *workerSession) giveAllBack(state sessionState) error {
	s.mu.Lock()
	for j := (job{}); s.waiting.next(&j); {
		s.giveBack(j)
	}
	s.state = max(s.state, state)
	err := s.flooded()
	s.mu.Unlock()
	s.sayGoodbyeIfDrained()
	return err
}

// giveBack reports a job as returned. s.mu is held.
func (s *workerSession) giveBack(j job) {
	s.settle(j.number, j.cost)
	s.appendReport(message{verb: verbReturn, task: j.number})
}

// settle takes a job out of what is in flight. s.mu is held.
func (s *workerSession) settle(number int, cost int32) {
	s.inFlight.take(number)
	s.cost -= int(cost)
}

// drain tells the coordinator that no more tasks are taken, gives back what has
// not started, and ends the session when nothing runs.
func (s *workerSession) drain() {
	s.mu.Lock()
	switch {
	case s.state == sessionNew:
		s.state = sessionFinished
		s.mu.Unlock()
		s.wire.endWithError(faultf(codeClosing, "the worker is shutting down"))
		return
	case s.state < sessionFinished:
		s.state = sessionReturns
		s.appendReport(message{verb: verbDrain})
	}
	s.mu.Unlock()
	s.giveAllBack(sessionReturns) // its answers are bounded by the window
}

// sayGoodbyeIfDrained ends a session of a draining worker that has nothing in
// flight. Everything reported is written first.
func (s *workerSession) sayGoodbyeIfDrained() {
	if !s.worker.isDraining() {
		return
	}
	s.mu.Lock()
	say := s.state == sessionReturns && s.inFlight.len() == 0
	if say {
		s.state = sessionFinished
	}
	s.mu.Unlock()
	if say {
		s.wire.end(endAfterAll, appendMessage(nil, message{verb: verbGoodbye, text: "Goodbye from " + s.worker.config.name}))
	}
}

// finish ends the session's bookkeeping when its connection is over: nothing
// starts and nothing is reported any more. It says whether GOODBYE was said, how
// many tasks are lost if not, and whether there is nothing to report either.
func (s *workerSession) finish() (finished bool, lost int, idle bool) {
	s.worker.endTurns(s)
	s.mu.Lock()
	defer s.mu.Unlock()
	finished = s.state == sessionFinished
	s.state = sessionFinished
	if !finished {
		lost = s.inFlight.len()
		s.worker.lost.Add(int64(lost))
	}
	idle = s.inFlight.len() == 0 && len(s.out)+s.writing == 0
	for j := (job{}); s.waiting.next(&j); {
		s.settle(j.number, j.cost)
	}
	s.room.Broadcast()
	return finished, lost, idle
}

// running names the tasks that execute now, unless they are stuck.
func (s *workerSession) running() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []*job
	for _, l := range s.slotList {
		if l.ctx != nil && !l.stuck {
			list = append(list, &l.job)
		}
	}
	slices.SortFunc(list, func(a, b *job) int { return a.number - b.number })
	var names []string
	for _, j := range list {
		names = append(names, j.name())
	}
	return names
}

// fill hands the writer the lines that wait for it. The writer's buffer becomes
// the next one to fill, so the two alternate.
func (s *workerSession) fill(buf []byte) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.out) == 0 {
		s.out = letGo(s.out)
		return buf
	}
	buf, s.out = s.out, buf
	s.writing = len(buf)
	return buf
}

// written makes room for as many bytes as were written.
func (s *workerSession) written() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing = 0
	s.room.Broadcast()
}
