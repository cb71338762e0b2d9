package taskexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
)

// A job is one attempt at a task, and the context of its handler: one
// allocation for both, since most tasks need no more than the session's
// context with their name in it. It is small because there may be millions a
// second, and a handler may keep its context.
type job struct {
	session *workerSession
	number  int
	attempt int
	timeout time.Duration
	cost    int32

	// guarded by Worker.mu
	instruction string // "" when it is needed no more; the job's slot, while it has one, may read it
	started     bool
	returned    bool // given back; it stays in the list of waiting jobs until its turn

	stuck bool // reported as such; guarded by workerSession.mu
}

// key is TaskInfo.Key.
func (j *job) key() string { return j.info().Key() }

// name is what a person calls it. Worker.mu is held.
func (j *job) name() string {
	return fmt.Sprintf("task %d (%s)", j.number, quoteUnlessPlain(j.instruction))
}

func (j *job) info() TaskInfo {
	return TaskInfo{Run: j.session.hello.Run, Task: j.number, Attempt: j.attempt, Coordinator: j.session.coordinator}
}

// The context is the session's.
func (j *job) Deadline() (time.Time, bool) { return j.session.ctx.Deadline() }
func (j *job) Done() <-chan struct{}       { return j.session.ctx.Done() }
func (j *job) Err() error                  { return j.session.ctx.Err() }

func (j *job) Value(key any) any {
	if _, ok := key.(taskInfoKey); ok {
		return j
	}
	return j.session.ctx.Value(key)
}

// jobs is a list of waiting jobs.
type jobs struct {
	fifo[*job]
	returned int // of those in the list
}

// next takes the first that was not returned; nil if there is none.
func (q *jobs) next() *job {
	for q.len() > 0 {
		j := q.pop()
		if !j.returned {
			return j
		}
		q.returned--
	}
	return nil
}

// giveBack marks j returned. The list is cleaned when half of it is such, so
// that neither many RECALLs nor a slot that is long busy make it grow. The
// instruction goes at once: it no longer counts towards the window.
func (q *jobs) giveBack(j *job) {
	j.returned = true
	j.instruction = ""
	q.returned++
	if 2*q.returned < q.len() {
		return
	}
	kept := q.list[:0]
	for _, j := range q.all() {
		if !j.returned {
			kept = append(kept, j)
		}
	}
	clear(q.list[len(kept):])
	q.list, q.head, q.returned = kept, 0, 0
}

// takeAll empties the list.
func (q *jobs) takeAll() []*job {
	var all []*job
	for j := q.next(); j != nil; j = q.next() {
		all = append(all, j)
	}
	return all
}

// A workerSession is one session seen from the worker. Three kinds of
// goroutines meet in it: the reader (serveConn's own), the writer, and those of
// the slots that execute its jobs. The reader never waits for anything but
// input.
type workerSession struct {
	worker      *Worker
	accepted    net.Conn // what it is without TLS
	wire        *wire
	coordinator string          // its name, from a verified certificate; set before any job exists
	hello       hello           // likewise
	ctx         context.Context // the handlers'; ends with the session
	cancel      context.CancelCauseFunc
	slots       sync.WaitGroup
	secured     chan struct{} // closed when the TLS handshake is over, or there is none
	over        chan struct{} // closed when the connection is over
	pulse       sync.WaitGroup
	batch       []*job       // the reader's: RUNs read and not yet accepted
	fresh       []job        // the reader's: see newJob
	seen        sessionState // the reader's: the latest it knows of
	chatter     allowance    // the reader's
	log         *sessionLog  // complete before any job exists

	mu       sync.Mutex // guards following
	room     sync.Cond  // waited on by reports that do not fit
	out      []byte     // lines for the writer
	writing  int        // bytes that the writer has taken and not yet written
	inFlight table[*job]
	cost     int // of inFlight
	state    sessionState
	pings    map[int]time.Time // when those were sent that have not come back
	lease    time.Time         // from when the coordinator's patience is counted

	// guarded by Worker.mu
	place   place
	waiting jobs
	inTurn  bool // it stands in Worker.turns
}

// reportBytes is how much of reports a session buffers, and one line more. A
// finished handler whose report does not fit waits, and keeps its slot.
const reportBytes = 1 << 20

// answerBytes is how much more the reader's own answers, RETURNs, may add: it
// cannot wait for room as a slot does.
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
	finished := s.finish()
	close(s.over)
	s.cancel(errSessionLost)
	s.lastWords(readErr, finished) // for up to a second, so handlers are told first
	s.wire.end(endAtOnce, nil)     // if nothing has ended it yet
	writer.Wait()
	conn.Close()
	madeRoom := w.disconnected(s)
	s.pulse.Wait()
	s.slots.Wait()

	// Why did it end? Our own state first, then what the peer said, and the
	// connection's word last: an error of it follows from all the others too.
	var said *ProtocolError
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case madeRoom:
		return &sessionError{w.config.name, errMadeRoom}
	case finished && writeErr == nil:
		return nil
	case errors.As(readErr, &said):
		return &sessionError{w.config.name, said}
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
	for {
		var m message
		err := s.wire.read(&m)
		if err == nil {
			err = s.handle(m)
		}
		if err == nil && len(s.batch) > 0 && !s.wire.in.more() {
			err = s.acceptBatch()
		}
		if err != nil {
			return err
		}
	}
}

// lastWords tells a peer that broke the rules which one, if that is why
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
	h.MaxLine = min(h.MaxLine, defaultMaxLine) // so that what is buffered is bounded, whatever the coordinator can read
	s.hello = h
	s.seen = sessionReady
	s.wire.in.limit = defaultMaxLine
	s.wire.setReadDeadline(time.Time{})
	s.mu.Lock()
	if s.state == sessionNew {
		s.state = sessionReady
		s.worker.greeted.Add(1)
		s.lease = time.Now()
		s.wire.sendFirst(line) // even a PONG comes after it
	}
	s.mu.Unlock()
	if s.log != nil {
		s.pulse.Go(s.log.open(h, s.coordinator)) // the reader does not wait for it
	}
	if h.TimeoutMS > 0 {
		s.pulse.Go(func() { s.keepLease(time.Duration(h.TimeoutMS) * time.Millisecond) })
	}
	return nil
}

// keepLease pings the coordinator, and cancels what runs when no answer has come
// for 0.8 of what the coordinator takes for the worker's death. The lease counts
// from when the answered PING was sent: at that time the coordinator cannot have
// heard of it yet, so that it holds the worker for dead later than the worker
// holds itself so. (Gray and Cheriton, "Leases", SOSP 1989.)
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
			slowUntil = now.Add(2 * interval) // what was sent right after the line needs time to come back
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
			s.wire.endWithError(faultf(codeTimeout, "no answer to a PING for %v", lease))
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
		Slots:      w.config.slots,
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
func (s *workerSession) handle(m message) error {
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
		j := s.newJob()
		*j = job{session: s, number: m.task, attempt: m.attempt, timeout: m.time, instruction: m.text}
		j.cost = int32(taskCost(len(m.text))) // without the verb and numbers: never more than the coordinator counts
		s.batch = append(s.batch, j)
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

// newJob returns an unused job. Jobs that come together are allocated together,
// but not so many that one whose handler takes long holds on to much; the
// instructions of the others, which may be long, go as soon as they are not needed.
func (s *workerSession) newJob() *job {
	const most = 64
	if len(s.fresh) == 0 {
		s.fresh = make([]job, min(len(s.batch)+1, most))
	}
	j := &s.fresh[0]
	s.fresh = s.fresh[1:]
	return j
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
	if back, err := s.admit(batch); back || err != nil {
		return err
	}
	s.keepLittle(batch)
	w := s.worker
	var beside []*job // those whose earlier attempt still runs here
	w.mu.Lock()
	for _, j := range batch {
		if len(w.stuck) > 0 && w.stuck[j.key()] != nil {
			beside = append(beside, j)
			continue
		}
		s.waiting.push(j)
	}
	if !s.inTurn {
		s.inTurn = true
		w.turns = append(w.turns, s)
	}
	w.mu.Unlock()
	w.dispatch()
	s.mu.Lock()
	for _, j := range beside {
		s.settle(j)
		s.appendReport(message{verb: verbFail, task: j.number, word: kindError, text: "an earlier attempt still runs on this worker, stuck after its timeout"})
	}
	back := s.state == sessionReturns
	s.mu.Unlock()
	if back { // a drain began meanwhile, and did not see these yet
		return s.returnAll(s.withdraw(), sessionReturns)
	}
	return nil
}

// keepLittle copies the instructions of a batch if they would hold on to much
// more than themselves: they are cut from all that was read with them, and a peer
// decides what that is.
func (s *workerSession) keepLittle(batch []*job) {
	bytes := 0
	for _, j := range batch {
		bytes += int(j.cost)
	}
	if bytes >= s.wire.in.batch/4 {
		return
	}
	for _, j := range batch {
		j.instruction = strings.Clone(j.instruction)
	}
}

// admit enters jobs as in flight, or gives them back in a session that takes
// no more.
func (s *workerSession) admit(batch []*job) (back bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == sessionFinished {
		return true, nil // what comes after GOODBYE counts as returned
	}
	for _, j := range batch {
		if s.state == sessionReturns {
			j.instruction = ""
			s.appendReport(message{verb: verbReturn, task: j.number})
			continue
		}
		if _, twice := s.inFlight.get(j.number); twice {
			return false, faultf(codeTask, "task %d is already in flight", j.number)
		}
		if s.cost > 0 && s.cost+int(j.cost) > windowBytes {
			return false, faultf(codeWindow, "more in flight than the %d tasks and %d bytes granted", windowTasks, windowBytes)
		}
		s.inFlight.put(j.number, j)
		s.cost += int(j.cost)
		if j.attempt > 1 {
			s.worker.repeated.Add(1)
		}
	}
	return s.state == sessionReturns, s.flooded()
}

// appendReport adds a line for the writer, and wakes it. s.mu is held.
func (s *workerSession) appendReport(m message) {
	s.addReport(m)
	s.wire.wakeWriter()
}

// addReport adds a line. s.mu is held.
func (s *workerSession) addReport(m message) {
	if m.verb == verbReturn {
		s.worker.returned.Add(1)
	}
	s.out = appendMessage(s.out, m)
}

// flooded says whether the reader's own answers pile up unread, beside as many
// reports as there may be. s.mu is held.
func (s *workerSession) flooded() error {
	if len(s.out)+s.writing > reportBytes+defaultMaxLine+answerBytes {
		return faultf(codeFlood, "too many tasks returned whose RETURNs are not read")
	}
	return nil
}

// recall gives a job back that has not started. One that has, or is already
// reported, is left alone: the report tells the coordinator.
func (s *workerSession) recall(number int) error {
	s.mu.Lock()
	j, ok := s.inFlight.get(number)
	s.mu.Unlock()
	if !ok {
		return nil
	}
	w := s.worker
	w.mu.Lock()
	back := !j.started && !j.returned
	if back {
		s.waiting.giveBack(j)
	}
	w.mu.Unlock()
	if !back {
		return nil
	}
	return s.returnAll([]*job{j}, sessionReady)
}

// cancelAll cancels what runs, and gives back what does not.
func (s *workerSession) cancelAll(cause string) error {
	s.cancel(&canceledError{cause})
	return s.returnAll(s.withdraw(), sessionReturns)
}

// withdraw takes away all jobs that have not started, and the turn: a session
// that is over must not wait for one while slots are long busy.
func (s *workerSession) withdraw() []*job {
	w := s.worker
	w.mu.Lock()
	defer w.mu.Unlock()
	unstarted := s.waiting.takeAll()
	for _, j := range unstarted {
		j.returned = true
		j.instruction = ""
	}
	if s.inTurn {
		s.inTurn = false
		w.turns = slices.DeleteFunc(w.turns, func(other *workerSession) bool { return other == s })
	}
	return unstarted
}

// returnAll reports jobs as returned, and moves the session to state.
func (s *workerSession) returnAll(unstarted []*job, state sessionState) error {
	s.mu.Lock()
	for _, j := range unstarted {
		s.settle(j)
		s.appendReport(message{verb: verbReturn, task: j.number})
	}
	s.state = max(s.state, state)
	err := s.flooded()
	s.mu.Unlock()
	s.sayGoodbyeIfDrained()
	return err
}

// settle takes j out of what is in flight. s.mu is held.
func (s *workerSession) settle(j *job) {
	s.inFlight.take(j.number)
	s.cost -= int(j.cost)
}

// drain tells the coordinator that no more is taken, gives back what has not
// started, and ends the session when nothing runs.
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
	s.returnAll(s.withdraw(), sessionReturns) // its answers are bounded by the window
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
// starts and nothing is reported any more. It says whether GOODBYE was said.
func (s *workerSession) finish() bool {
	unstarted := s.withdraw()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, j := range unstarted {
		s.settle(j)
	}
	finished := s.state == sessionFinished
	s.state = sessionFinished
	if !finished {
		s.worker.lost.Add(int64(len(unstarted) + s.inFlight.len()))
	}
	s.room.Broadcast()
	return finished
}

// running names the tasks that execute now.
func (s *workerSession) running() []string {
	s.mu.Lock()
	var list []*job
	for _, j := range s.inFlight.all {
		list = append(list, j)
	}
	s.mu.Unlock()
	slices.SortFunc(list, func(a, b *job) int { return a.number - b.number })
	s.worker.mu.Lock()
	defer s.worker.mu.Unlock()
	var names []string
	for _, j := range list {
		if j.started {
			names = append(names, j.name())
		}
	}
	return names
}

// fill hands the writer what waits. The writer's buffer comes back as the
// next one to fill, so the two alternate.
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

// written makes room for as much as was written.
func (s *workerSession) written() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing = 0
	s.room.Broadcast()
}

// runSlot executes j and then whatever nextJob gives, until the slot goes to
// another session or nothing waits.
func (s *workerSession) runSlot(j *job) {
	over := false
	defer func() {
		if over {
			return
		}
		// The handler called runtime.Goexit: this goroutine is ending, and
		// the slot needs another.
		if j := s.nextJob(j); j != nil {
			s.slots.Go(func() { s.runSlot(j) })
		}
	}()
	for start := s.wire.age(); j != nil; j = s.nextJob(j) {
		start = s.execute(j, start)
	}
	over = true
}

// nextJob lets the slot go on when its report is added. The report does not
// wait for what the slot does next: it is on its way, or somebody is awake who
// sends it.
func (s *workerSession) nextJob(finished *job) *job {
	j := s.worker.nextJob(finished)
	if j == nil {
		s.wire.flush() // this goroutine has nothing else to do
	} else {
		s.wire.wakeWriter()
	}
	return j
}

// execute calls the handler and adds a report of what it returned. It is given
// the time, since the session began, and returns it: looking at the clock is a
// good part of what a short task costs.
func (s *workerSession) execute(j *job, start time.Duration) (end time.Duration) {
	if s.ctx.Err() != nil {
		// The session was canceled or lost before its list was emptied.
		s.report(j, message{verb: verbReturn, task: j.number})
		return start
	}
	if s.log.started(j) {
		start = s.wire.age()
	}
	m := message{verb: verbFail, task: j.number, word: kindPanic, text: "the handler ended its goroutine (runtime.Goexit)"}
	// Deferred, so that a Goexit is reported too.
	defer func() {
		waited := s.report(j, m)
		if s.log.debugs() {
			s.wire.wakeWriter() // a report does not wait for a logger
		}
		if s.log.finished(j, m) || waited {
			end = s.wire.age() // the wait is none of the next task's time
		}
	}()
	m = s.call(j)
	end = s.wire.age()
	if m.verb == verbDone {
		m.time = end - start
	}
	return end
}

// call calls the handler and turns what it returns, or panics with, into a
// report.
func (s *workerSession) call(j *job) (m message) {
	defer func() {
		if v := recover(); v != nil {
			m = message{verb: verbFail, task: j.number, word: kindPanic, text: cut(fmt.Sprintf("panic: %v", v), maxFailText/4) + "\n" + shortStack(debug.Stack())}
		}
	}()
	var ctx context.Context = j
	if j.timeout > 0 {
		c, cancel := context.WithTimeout(j, j.timeout)
		defer cancel()
		defer time.AfterFunc(j.timeout+stuckGrace, func() { s.stuck(j) }).Stop()
		ctx = c
	}
	output, err := s.worker.handler.Handle(ctx, Task{Category: s.hello.Category, Instruction: j.instruction})
	if err == nil {
		return message{verb: verbDone, task: j.number, text: output}
	}
	kind := kindError
	final, after := wishOf(err)
	switch {
	case final:
		kind = kindFinal
	case s.ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(s.ctx))):
		kind = kindCanceled
	case j.timeout > 0 && ctx.Err() != nil && errors.Is(err, context.DeadlineExceeded):
		kind = kindTimeout
	}
	text := err.Error()
	if text == "" {
		text = fmt.Sprintf("%T without a text", err)
	}
	return message{verb: verbFail, task: j.number, word: kind, time: after, text: text}
}

// stuckGrace is what a handler has to return after its task's time is over,
// before it counts as stuck.
const stuckGrace = time.Second

// stuck reports a job whose time is over and whose handler goes on. The slot
// stays taken until the handler returns; what it returns is dropped.
func (s *workerSession) stuck(j *job) {
	w := s.worker
	// Entered before it is reported, so that another attempt, which the report
	// may bring, does not start beside this one.
	w.mu.Lock()
	w.stuck[j.key()] = j
	w.mu.Unlock()
	s.mu.Lock()
	held, _ := s.inFlight.get(j.number)
	j.stuck = held == j && s.state < sessionFinished
	if j.stuck {
		s.settle(j)
		s.appendReport(message{verb: verbFail, task: j.number, word: kindStuck,
			text: fmt.Sprintf("the handler still runs %v after its timeout of %v, and keeps its slot", stuckGrace, j.timeout)})
		if s.log != nil {
			s.slots.Go(func() { s.log.stuck(j) }) // the handler's own goroutine cannot end before mu is free
		}
	}
	stuck := j.stuck
	s.mu.Unlock()
	if !stuck { // it has just returned, or there is nobody to report to
		w.unstick(j)
		return
	}
	s.sayGoodbyeIfDrained()
}

// unstick forgets a stuck job whose handler has returned.
func (w *Worker) unstick(j *job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stuck[j.key()] == j {
		delete(w.stuck, j.key())
	}
}

// givenUp says whether the session is ending without having been asked to: the
// worker's own ctx has ended, or the lease is over, or the connection is lost.
func (s *workerSession) givenUp() bool {
	var canceled *canceledError
	return s.ctx.Err() != nil && !errors.As(context.Cause(s.ctx), &canceled)
}

// shortStack keeps the part of a panic's stack that names the handler: what
// follows the frame of panic itself.
func shortStack(stack []byte) string {
	s := string(stack)
	if i := strings.LastIndex(s, "\npanic("); i >= 0 {
		s = s[i+1:]
		for range 2 { // the frame is two lines
			_, s, _ = strings.Cut(s, "\n")
		}
	}
	return cut(s, maxFailText/2)
}

// report adds the report of a job that ran, as soon as there is room, and says
// whether it had to wait for that.
func (s *workerSession) report(j *job, m message) (waited bool) {
	switch m.verb {
	case verbDone:
		s.worker.done.Add(1)
	case verbFail:
		m.text = cutText(m.text)
		s.worker.failed.Add(1)
	}
	s.mu.Lock()
	for !j.stuck && s.state < sessionFinished && len(s.out)+s.writing > reportBytes {
		waited = true
		s.room.Wait()
	}
	if m.verb != verbDone && s.givenUp() && !j.stuck {
		// A failure may well be a consequence, and the task deserves another
		// worker. It stays in flight, so that no GOODBYE disowns it.
		s.mu.Unlock()
		return waited
	}
	if j.stuck { // perhaps only while it waited for room
		s.mu.Unlock()
		s.worker.unstick(j)
		return waited
	}
	s.settle(j)
	if s.state < sessionFinished {
		before := len(s.out)
		s.addReport(m)
		if n := len(s.out) - before; n > s.hello.MaxLine {
			s.out = s.out[:before]
			// An output is not cut: half of one would pass for a whole.
			s.addReport(message{verb: verbFail, task: j.number, word: kindOutput,
				text: fmt.Sprintf("the output needs a line of %d bytes, over the coordinator's limit of %d", n, s.hello.MaxLine)})
		}
	}
	draining := s.state == sessionReturns && s.inFlight.len() == 0
	s.mu.Unlock()
	if draining {
		s.sayGoodbyeIfDrained()
	}
	return waited
}
