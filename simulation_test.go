package taskexec

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var (
	simSeeds = flag.Int("sim.seeds", 300, "how many random runs TestSimulation makes")
	simSeed  = flag.Uint64("sim.seed", 0, "the first seed of TestSimulation; with -sim.seeds=1 the only one")
)

// A simNetwork is a network in memory whose connections take time and break,
// as a seed has it. Like TCP, and unlike net.Pipe, it buffers what is written.
type simNetwork struct {
	memNetwork // the listeners

	mu     sync.Mutex // guards following
	random *rand.Rand
	faults bool // may connections break?
	ends   []*simConn
}

// dial fits WithDialer.
func (n *simNetwork) dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	n.memNetwork.mu.Lock()
	l := n.listeners[addr]
	n.memNetwork.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	}
	client, server := n.connect(addr)
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		err = fmt.Errorf("dial %s: connection refused", addr)
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	client.Close()
	server.Close()
	return nil, err
}

// connect makes both ends of a connection. Everything random about it is drawn
// here, so that it depends on the seed and the order of dials alone.
func (n *simNetwork) connect(addr string) (client, server *simConn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	up, down := n.link(), n.link()
	client = &simConn{in: down, out: up, addr: memAddr(addr)}
	server = &simConn{in: up, out: down, addr: memAddr(addr)}
	n.ends = append(n.ends, client, server)
	return client, server
}

// link makes one direction of a connection.
func (n *simNetwork) link() *simLink {
	base := time.Duration(n.random.IntN(5000)+1) * time.Microsecond
	jitter := rand.New(rand.NewPCG(n.random.Uint64(), 0))
	l := &simLink{
		changed: make(chan struct{}),
		latency: func() time.Duration { return base + time.Duration(jitter.IntN(1000))*time.Microsecond },
	}
	if n.faults && n.random.IntN(4) == 0 {
		l.fault = []simFault{simReset, simClose}[n.random.IntN(2)]
		l.faultAt = 150 + n.random.IntN(1200) // mostly after the greeting
	}
	return l
}

// open counts the ends that are not closed.
func (n *simNetwork) open() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	open := 0
	for _, c := range n.ends {
		if !c.isClosed() {
			open++
		}
	}
	return open
}

// A simFault is what becomes of the byte at simLink.faultAt, and of those
// after it. Bytes that vanish, one way or both, for a time or for ever, would
// be further ones; a run survives them only once it has heartbeats.
type simFault int

const (
	simNoFault simFault = iota
	simReset            // both ends get an error
	simClose            // the reader gets the end of the stream, the writer an error
)

const simBuffer = 64 << 10 // of each direction; a writer waits when it is full

var errSimReset = errors.New("connection reset by the simulation")

// A simLink is one direction of a connection.
type simLink struct {
	latency func() time.Duration
	fault   simFault
	faultAt int

	mu       sync.Mutex // guards following
	changed  chan struct{}
	chunks   []simChunk
	buffered int
	written  int
	last     time.Time // when the last chunk arrives: none overtakes another
	closed   bool      // for writing
	broken   error     // for both
}

// A simChunk is bytes that can be read from a time on.
type simChunk struct {
	at   time.Time
	data []byte // none: the end of the stream
	err  error  // of the end
}

// change tells whoever waits. l.mu is held.
func (l *simLink) change() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// push sends a chunk on its way. l.mu is held.
func (l *simLink) push(c simChunk) {
	c.at = time.Now().Add(l.latency())
	if c.at.Before(l.last) {
		c.at = l.last
	}
	l.last = c.at
	l.chunks = append(l.chunks, c)
	l.buffered += len(c.data)
	l.change()
}

// shut ends the stream after what was written. l.mu is held.
func (l *simLink) shut(err error) {
	if !l.closed {
		l.closed = true
		l.push(simChunk{err: err})
	}
}

// A simConn is one end of a connection.
type simConn struct {
	in, out *simLink
	addr    memAddr

	// observe sees what is written before it is on its way.
	observe func(p []byte)

	mu            sync.Mutex // guards following
	closed        bool
	readDeadline  time.Time
	writeDeadline time.Time
}

func (c *simConn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *simConn) state() (closed bool, read, write time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed, c.readDeadline, c.writeDeadline
}

func (c *simConn) Read(p []byte) (int, error) {
	for {
		c.in.mu.Lock()
		changed := c.in.changed
		closed, deadline, _ := c.state()
		until := deadline
		switch {
		case closed:
			c.in.mu.Unlock()
			return 0, net.ErrClosed
		case !deadline.IsZero() && !time.Now().Before(deadline):
			c.in.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case len(c.in.chunks) > 0:
			chunk := &c.in.chunks[0]
			if !time.Now().Before(chunk.at) {
				defer c.in.mu.Unlock()
				if chunk.err != nil {
					return 0, chunk.err
				}
				n := copy(p, chunk.data)
				chunk.data = chunk.data[n:]
				if len(chunk.data) == 0 {
					c.in.chunks = c.in.chunks[1:]
				}
				c.in.buffered -= n
				c.in.change()
				return n, nil
			}
			if until.IsZero() || chunk.at.Before(until) {
				until = chunk.at
			}
		}
		c.in.mu.Unlock()
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

func (c *simConn) Write(p []byte) (int, error) {
	if c.observe != nil {
		c.observe(p)
	}
	written := 0
	for len(p) > 0 {
		c.out.mu.Lock()
		changed := c.out.changed
		closed, _, deadline := c.state()
		switch {
		case closed:
			c.out.mu.Unlock()
			return written, net.ErrClosed
		case c.out.broken != nil:
			c.out.mu.Unlock()
			return written, c.out.broken
		case !deadline.IsZero() && !time.Now().Before(deadline):
			c.out.mu.Unlock()
			return written, os.ErrDeadlineExceeded
		case c.out.buffered >= simBuffer:
			c.out.mu.Unlock()
			await(changed, deadline)
			continue
		}
		n := min(len(p), simBuffer-c.out.buffered)
		if c.out.fault != simNoFault && c.out.written+n > c.out.faultAt {
			n = max(c.out.faultAt-c.out.written, 0)
		}
		if n > 0 {
			c.out.push(simChunk{data: slices.Clone(p[:n])})
			c.out.written += n
			written += n
			p = p[n:]
		}
		cut := c.out.fault != simNoFault && c.out.written >= c.out.faultAt && len(p) > 0
		if cut {
			c.out.broken = errSimReset
			if c.out.fault == simClose {
				c.out.shut(io.EOF)
			} else {
				c.out.shut(errSimReset)
			}
		}
		c.out.mu.Unlock()
		if cut && c.out.fault == simReset {
			c.in.mu.Lock()
			c.in.shut(errSimReset)
			c.in.broken = errSimReset
			c.in.change()
			c.in.mu.Unlock()
		}
	}
	return written, nil
}

// Close ends the stream that the other end reads; what it still writes is an
// error there.
func (c *simConn) Close() error {
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	c.mu.Unlock()
	if !first {
		return nil
	}
	c.out.mu.Lock()
	c.out.shut(io.EOF)
	c.out.mu.Unlock()
	c.in.mu.Lock()
	c.in.broken = errSimReset
	c.in.change()
	c.in.mu.Unlock()
	return nil
}

// CloseWrite ends the stream that the other end reads.
func (c *simConn) CloseWrite() error {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.out.shut(io.EOF)
	c.out.broken = net.ErrClosed
	return nil
}

func (c *simConn) LocalAddr() net.Addr  { return c.addr }
func (c *simConn) RemoteAddr() net.Addr { return c.addr }

func (c *simConn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *simConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	c.readDeadline = t
	c.mu.Unlock()
	c.in.mu.Lock()
	c.in.change()
	c.in.mu.Unlock()
	return nil
}

func (c *simConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	c.writeDeadline = t
	c.mu.Unlock()
	c.out.mu.Lock()
	c.out.change()
	c.out.mu.Unlock()
	return nil
}

// A simulation is one run, drawn from a seed, and what was seen of it.
type simulation struct {
	t       *testing.T
	seed    uint64
	random  *rand.Rand
	network simNetwork

	categories []string
	workers    []*simWorker
	tasks      []Task
	order      Order
	config     string // for messages

	mu     sync.Mutex // guards following
	starts []simStart
	sends  []simSend
	events map[int][]simEvent // by task
}

type simWorker struct {
	name       string
	categories []string
	slots      int
	worker     *Worker
	cancel     func()
}

// A simStart is a call of the handler.
type simStart struct {
	at      time.Time
	worker  string
	task    int
	attempt int
	verdict string // what it came to: done, failed, panicked, canceled; "" as long as it runs
}

// A simSend is a RUN that the coordinator wrote.
type simSend struct {
	at            time.Time
	task, attempt int
}

type simEvent struct {
	at     time.Time
	result Result
}

func (s *simulation) fail(format string, args ...any) {
	s.t.Helper()
	s.t.Errorf("seed %d (run again with -sim.seed=%d -sim.seeds=1; %s): %s", s.seed, s.seed, s.config, fmt.Sprintf(format, args...))
}

// handler does what the instruction says: KIND MILLISECONDS …
func (s *simulation) handler(name string) HandlerFunc {
	return func(ctx context.Context, task Task) (output string, err error) {
		info, _ := TaskInfoFrom(ctx)
		s.mu.Lock()
		number := len(s.starts)
		s.starts = append(s.starts, simStart{at: time.Now(), worker: name, task: info.Task, attempt: info.Attempt})
		s.mu.Unlock()
		verdict := "panicked"
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.starts[number].verdict = verdict
		}()
		f := strings.Fields(task.Instruction)
		ms, _ := strconv.Atoi(f[1])
		if f[0] == "stubborn" {
			time.Sleep(time.Duration(ms) * time.Millisecond)
		} else if ms > 0 {
			select {
			case <-time.After(time.Duration(ms) * time.Millisecond):
			case <-ctx.Done():
				verdict = "canceled"
				return "", ctx.Err()
			}
		}
		switch f[0] {
		case "fail":
			verdict = "failed"
			return "", errors.New("told to fail")
		case "panic":
			panic("told to panic")
		case "exit":
			runtime.Goexit()
		}
		verdict = "done"
		return fmt.Sprintf("%s %d %d", name, info.Task, info.Attempt), nil
	}
}

// chance is true once in n times.
func (s *simulation) chance(n int) bool { return s.random.IntN(n) == 0 }

func (s *simulation) run() {
	s.network.random = rand.New(rand.NewPCG(s.random.Uint64(), 1))
	s.network.faults = s.chance(2)
	s.events = make(map[int][]simEvent)
	s.categories = []string{"a", "b", "c"}[:1+s.random.IntN(3)]

	var serving sync.WaitGroup
	options := []CoordinatorOption{WithDialer(s.dial)}
	start := func(categories ...string) {
		name := fmt.Sprintf("w%d", len(s.workers))
		w := &simWorker{name: name, categories: categories, slots: 1 + s.random.IntN(3)}
		w.worker = NewWorker(s.handler(name), WithName(name), WithSlots(w.slots))
		ctx, cancel := context.WithCancel(context.Background())
		w.cancel = cancel
		addr := name + ":1"
		ln := s.network.listen(addr)
		serving.Go(func() { w.worker.Serve(ctx, ln) })
		s.workers = append(s.workers, w)
		for _, category := range categories {
			options = append(options, WithWorkers(category, addr))
		}
	}
	for _, category := range s.categories {
		for range 1 + s.random.IntN(3) {
			start(category)
		}
	}
	if s.chance(3) {
		start(s.categories...)
	}

	kinds := []string{"do", "do", "do", "do", "do", "do", "stubborn"}
	if s.chance(4) {
		kinds = append(kinds, "fail", "panic", "exit")
	}
	for i := range s.random.IntN(60) {
		kind := kinds[s.random.IntN(len(kinds))]
		padding := ""
		if s.chance(20) {
			padding = strings.Repeat("x\n", s.random.IntN(2000))
		}
		s.tasks = append(s.tasks, Task{
			Category:    s.categories[s.random.IntN(len(s.categories))],
			Instruction: fmt.Sprintf("%s %d %d %s", kind, s.random.IntN(4)*s.random.IntN(30), i, padding),
		})
	}
	if s.chance(10) {
		s.tasks = append(s.tasks, Task{Category: s.categories[0], Instruction: "do 0 " + strings.Repeat("y", 1<<20)})
	}

	switch s.random.IntN(6) {
	case 0, 1:
		s.order = ByInput
	case 2:
		s.order = Concurrent
	}
	onFailure := []OnFailure{FinishStage, FinishStage, StopSoon, KeepGoing}[s.random.IntN(4)]
	tries, once := 1, s.chance(4)
	if s.chance(3) {
		tries = 2 + s.random.IntN(2)
	}
	wait := time.Duration(s.random.IntN(3)) * time.Second
	window := 1 + s.random.IntN(20)
	shutdown := s.chance(3)
	options = append(options, WithOrder(s.order), WithWindow(window), WithOnFailure(onFailure), WithRetry(Retry{Attempts: tries, Panics: true}), WithWorkerWait(wait))
	if once {
		options = append(options, WithAtMostOnce())
	}
	options = append(options, WithObserver(Observer{TaskDone: func(i TaskDoneInfo) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.events[i.Result.Index] = append(s.events[i.Result.Index], simEvent{time.Now(), i.Result})
	}}))
	if shutdown {
		options = append(options, WithWorkerShutdown())
	}
	c, err := NewCoordinator(options...)
	if err != nil {
		s.fail("%v", err)
		return
	}

	// What happens meanwhile, at random times.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var timers []*time.Timer
	var happens []string
	later := func(what string, f func()) {
		after := time.Duration(s.random.IntN(400)) * time.Millisecond
		happens = append(happens, fmt.Sprintf("%s after %v", what, after))
		timers = append(timers, time.AfterFunc(after, f))
	}
	canceled, closed := s.chance(6), s.chance(6)
	if canceled {
		later("cancel", cancel)
	}
	if closed {
		later("coordinator shutdown", func() { c.Shutdown(ctx) })
	}
	for _, w := range s.workers {
		switch {
		case s.chance(8):
			later(w.name+" shutdown", func() { w.worker.Shutdown(context.Background()) })
		case s.chance(12):
			later(w.name+" killed", w.cancel)
		}
	}
	s.config = fmt.Sprintf("%d tasks, %d workers, %v, %v, window %d, %d tries, at most once %v, wait %v, shutdown %v, faults %v, %s",
		len(s.tasks), len(s.workers), s.order, onFailure, window, tries, once, wait, shutdown, s.network.faults, strings.Join(happens, ", "))
	if testing.Verbose() && *simSeeds == 1 {
		s.t.Log(s.config)
	}

	began := time.Now()
	report, err := c.Run(ctx, s.tasks)
	if took := time.Since(began); took > 5*time.Minute {
		s.fail("I9: the run took %v", took)
	}
	for _, timer := range timers {
		timer.Stop()
	}
	s.network.mu.Lock()
	for i := 0; i < len(s.network.ends); i += 2 { // those of the coordinator
		if !s.network.ends[i].isClosed() {
			s.fail("I8: Run left the connection to %s open", s.network.ends[i].addr)
		}
	}
	s.network.mu.Unlock()

	// Handlers that an ended session has left behind come to their end, and so
	// does whatever is still on its way.
	time.Sleep(time.Minute)
	synctest.Wait()
	for _, w := range s.workers {
		w.worker.mu.Lock()
		if len(w.worker.sessions) > 0 || w.worker.free != w.slots {
			s.fail("I8: worker %s has %d sessions and %d of %d slots free", w.name, len(w.worker.sessions), w.worker.free, w.slots)
		}
		w.worker.mu.Unlock()
	}
	if open := s.network.open(); open > 0 {
		s.fail("I8: %d ends of connections are open", open)
	}
	for _, w := range s.workers {
		w.cancel()
	}
	serving.Wait()
	s.check(report, err)
	if once {
		for _, r := range report.Results {
			if r.Losses > 1 || r.Losses == 1 && r.Outcome != Unknown {
				s.fail("task %d is %v with %d losses, though it may be executed at most once", r.Index, r.Outcome, r.Losses)
			}
		}
	}
}

// dial notes what the coordinator sends.
func (s *simulation) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := s.network.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	conn.(*simConn).observe = func(p []byte) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for line := range strings.Lines(string(p)) {
			var send simSend
			if _, err := fmt.Sscanf(line, "RUN %d %d ", &send.task, &send.attempt); err == nil {
				send.at = time.Now()
				s.sends = append(s.sends, send)
			}
		}
	}
	return conn, nil
}

// stageOf is the number of a task's stage.
func (s *simulation) stageOf(task int) int {
	switch s.order {
	case ByInput:
		return task
	case Concurrent:
		return 0
	}
	return slices.Index(s.categories, s.tasks[task].Category)
}

func (s *simulation) check(report *Report, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(report.Results) != len(s.tasks) {
		s.fail("I1: %d results for %d tasks", len(report.Results), len(s.tasks))
		return
	}
	executions := make(map[int][]simStart)
	for _, start := range s.starts {
		executions[start.task] = append(executions[start.task], start)
	}

	// When each stage ended, by its last outcome. The observer is called at the
	// very time at which the task was settled, by the bubble's clock.
	ended := make(map[int]time.Time)
	var counts Counts
	for i, r := range report.Results {
		var te *TaskError
		if r.Index != i || r.Task.Instruction != s.tasks[i].Instruction {
			s.fail("I3: result %d is that of task %d", i, r.Index)
		}
		if r.Outcome < Done || r.Outcome > Unknown {
			s.fail("I1: task %d has the outcome %v", i, r.Outcome)
		}
		if (r.Outcome != Done) != errors.As(r.Err, &te) || te != nil && te.Outcome != r.Outcome {
			s.fail("I1: task %d is %v with %v", i, r.Outcome, r.Err)
		}
		counts.add(r.Outcome)
		events := s.events[i]
		if len(events) > 1 {
			s.fail("I2: task %d was reported %d times: %+v", i, len(events), events)
		}
		if len(events) == 0 && r.Outcome != Skipped && r.Attempts > 0 {
			s.fail("I7: the observer has not heard of task %d, which is %v", i, r.Outcome)
		}
		for _, e := range events {
			if e.result.Outcome != r.Outcome || e.result.Output != r.Output || e.result.Attempts != r.Attempts {
				s.fail("I2: the observer got %+v, the report has %+v", e.result, r)
			}
			if stage := s.stageOf(i); e.at.After(ended[stage]) {
				ended[stage] = e.at
			}
		}
		s.checkTask(r, executions[i])
	}
	if counts != report.Counts {
		s.fail("I1: counts %+v, results %+v", report.Counts, counts)
	}
	if counts.Done < len(s.tasks) && err == nil {
		s.fail("no error, though %+v", counts)
	}

	// I4, for what was sent; what a handler starts comes later still.
	attempts := make(map[int]int)
	for _, send := range s.sends {
		attempts[send.task] = max(attempts[send.task], send.attempt)
		for stage, end := range ended {
			if stage < s.stageOf(send.task) && send.at.Before(end) {
				s.fail("I4: task %d of stage %d was sent at %v, before stage %d had ended at %v", send.task, s.stageOf(send.task), send.at, stage, end)
			}
		}
	}
	for task, attempt := range attempts {
		if attempt > report.Results[task].Attempts {
			s.fail("I6: task %d was sent with attempt %d, but has only %d", task, attempt, report.Results[task].Attempts)
		}
	}

	// I3: a category with a single worker of one slot starts its tasks in order.
	for _, category := range s.categories {
		var serve []*simWorker
		for _, w := range s.workers {
			if slices.Contains(w.categories, category) {
				serve = append(serve, w)
			}
		}
		if len(serve) > 1 || serve[0].slots > 1 {
			continue
		}
		last := -1
		for _, start := range s.starts {
			if s.tasks[start.task].Category != category || report.Results[start.task].Attempts > 1 {
				continue
			}
			if start.task < last {
				s.fail("I3: task %d was started after task %d", start.task, last)
			}
			last = start.task
		}
	}
}

// checkTask compares a result with what became of its executions.
func (s *simulation) checkTask(r Result, executions []simStart) {
	if len(executions) > r.Attempts {
		s.fail("I6: task %d was executed %d times in %d attempts", r.Index, len(executions), r.Attempts)
	}
	var last *simStart // the execution of the last attempt
	seen := make(map[int]bool)
	for i, e := range executions {
		if e.attempt < 1 || e.attempt > r.Attempts || seen[e.attempt] {
			s.fail("I6: task %d was executed twice, or never sent, with attempt %d of %d", r.Index, e.attempt, r.Attempts)
		}
		seen[e.attempt] = true
		if e.attempt == r.Attempts {
			last = &executions[i]
		}
	}
	wants := func(verdicts ...string) {
		if last == nil || last.worker != r.Worker || !slices.Contains(verdicts, last.verdict) {
			s.fail("I5, I7: task %d is %v by %s, attempt %d, but was executed like this: %+v", r.Index, r.Outcome, r.Worker, r.Attempts, executions)
		}
	}
	switch r.Outcome {
	case Done:
		wants("done")
		if want := fmt.Sprintf("%s %d %d", r.Worker, r.Index, r.Attempts); r.Output != want {
			s.fail("I5: task %d has the output %q, want %q", r.Index, r.Output, want)
		}
	case Failed:
		var remote *RemoteError
		if errors.As(r.Err, &remote) {
			// A task that failed, and came back unstarted from its next attempt
			// when nothing was sent any more, stays failed.
			if final := executions[max(len(executions)-1, 0):]; last == nil && len(final) == 1 {
				last = &final[0]
				r.Worker = last.worker
			}
			wants("failed", "panicked")
		} else if r.Attempts > 0 || len(executions) > 0 {
			s.fail("I1: task %d is Failed without a word of its worker: %v", r.Index, r.Err)
		}
	case Canceled:
		wants("canceled")
	case Skipped:
		if len(executions) > 0 || r.Losses > 0 {
			s.fail("I1: task %d is Skipped with %d losses, and was executed: %+v", r.Index, r.Losses, executions)
		}
	case Unknown:
		if r.Losses == 0 {
			s.fail("I1: task %d is Unknown without a loss: %v", r.Index, r.Err)
		}
	}
}

// Every random run holds the invariants of the library: each task has one
// outcome, none twice; no stage begins early; only the session that holds a
// task settles it; nothing is left behind.
func TestSimulation(t *testing.T) {
	for i := range *simSeeds {
		seed := *simSeed + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &simulation{t: t, seed: seed, random: rand.New(rand.NewPCG(seed, 0))}
				s.run()
			})
		})
	}
}
