package taskexec

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A link keeps a run connected to one worker of a category: by one session, and
// by another when that is lost, or its worker drains.
type link struct {
	queue *queue
	addr  string // as given to WithWorkers

	// of the goroutine that dials, of which there is one at a time
	slotEnds time.Time // when the slot of the backoff ends that the latest dial was in
	failures int       // sessions in a row that were of no use
	warned   string    // why the worker could not be reached, without numbers, when that was last a warning
	warnedAt time.Time

	// guarded by queue.mu
	session *session // the latest; nil before the first
	redials int      // sessions after the first
	sent    int      // tasks, each sending counted
	counts  Counts   // of what was reported
	err     error    // why no session follows the latest; a *WorkerError

	draining  int  // sessions that have a follower
	dismissed bool // its worker was told to shut down, or should have been
}

// open connects for the first time. A worker that cannot be reached, or is just
// coming or going, is tried again for as long as WithWorkerWait says; anything
// else that is wrong with it is an error at once. The error is a *WorkerError.
func (l *link) open(ctx context.Context) error {
	r := l.queue.run
	started := time.Now()
	patience, cancel := context.WithTimeout(ctx, r.config.workerWait)
	defer cancel()
	s, err := l.connect(ctx)
	waited := max(r.config.workerWait, time.Since(started).Round(time.Millisecond)) // if it is never reached
	if err != nil && mayPass(err) {
		if s = l.redial(patience, 1, true); s == nil {
			l.queue.mu.Lock()
			err = l.err
			l.queue.mu.Unlock()
			if patience.Err() != nil && ctx.Err() == nil && r.config.workerWait > 0 {
				err = &WorkerError{Category: l.queue.category, Addr: l.addr,
					Err: fmt.Errorf("not reached within %v: %w", waited, errors.Unwrap(err))}
			}
		} else {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	r.sessions.Go(func() error { l.keep(r.dialing, s); return nil })
	return nil
}

// keep serves s, and the sessions that follow it for as long as the run wants
// them.
func (l *link) keep(ctx context.Context, s *session) {
	for s != nil {
		s.serve()
		if s.follower != nil && s.endFollower() {
			return
		}
		s = l.follow(ctx, s)
	}
}

// follow connects again after s, whose worker takes no more tasks.
func (l *link) follow(ctx context.Context, s *session) *session {
	// A worker that greets and is lost again before it has executed anything
	// is not dialed any faster than one that does not greet, unless it was there
	// for longer than the longest wait between two dials.
	if s.reported() || s.wire.age() > defaultBackoff.most {
		l.failures = 0
	}
	l.failures++
	return l.redial(ctx, l.failures, false)
}

// A follower connects again beside a session whose worker drains: what that
// worker still executes may take its time, and meanwhile another may listen at
// its address.
type follower struct {
	stop  context.CancelFunc
	found chan bool
}

// mostDraining is how many sessions of a link may drain beside one another, each
// followed by the next. A worker that drains over and over, and never says
// goodbye, must not cause more and more of them.
const mostDraining = 16

// startFollower starts the follower of s, if s holds anything that may take its
// time, and has no follower yet. Only its reader calls it.
func (s *session) startFollower() {
	l := s.link
	s.queue.mu.Lock()
	start := s.follower == nil && s.held.len() > 0 && l.draining < mostDraining
	if start {
		l.draining++
	}
	s.queue.mu.Unlock()
	if !start {
		return
	}
	whole := s.run.dialing
	ctx, stop := context.WithCancel(whole)
	f := &follower{stop, make(chan bool, 1)}
	s.follower = f
	s.run.sessions.Go(func() error {
		defer close(f.found) // should the dialer end this goroutine (runtime.Goexit)
		slotEnds, failures := l.slotEnds, l.failures
		next := l.follow(ctx, s)
		switch soon := time.Now().Add(defaultBackoff.slot(l.failures)); {
		case next != nil:
		case l.slotEnds.Equal(slotEnds): // it has not dialed
			l.failures = failures
		case soon.Before(l.slotEnds):
			// However long the follower has dialed in vain, a worker that is started
			// again when s is over is found soon.
			l.slotEnds = soon
		}
		f.found <- next != nil
		l.keep(whole, next)
		return nil
	})
}

// endFollower stops the follower of s, which is over. It reports true if another
// session has followed; otherwise the caller is again the one that dials.
func (s *session) endFollower() bool {
	s.queue.mu.Lock()
	s.link.draining--
	s.queue.mu.Unlock()
	s.follower.stop()
	return <-s.follower.found
}

// wanted says whether the run wants another session.
func (l *link) wanted() bool {
	l.queue.mu.Lock()
	defer l.queue.mu.Unlock()
	return l.wantedLocked()
}

func (l *link) wantedLocked() bool {
	return !l.queue.over && l.queue.halted == notHalted && !l.dismissed
}

// redial connects again, once in each slot of the backoff and at a random time
// in it, so that many coordinators do not come all at once. It returns nil when
// ctx has ended or no session is wanted any more, or, if strict, when the
// failure will not pass.
func (l *link) redial(ctx context.Context, failures int, strict bool) *session {
	for ; ; failures++ {
		// A dial that succeeds uses its slot up as well.
		if !sleep(ctx, time.Until(l.slotEnds)) || !l.wanted() {
			return nil
		}
		slot := defaultBackoff.slot(failures)
		slotEnds := time.Now().Add(slot)
		if !sleep(ctx, l.queue.run.config.jitter(slot)) || !l.wanted() {
			return nil
		}
		l.slotEnds = slotEnds
		s, err := l.connect(ctx)
		if err == nil {
			return s
		}
		if ctx.Err() != nil {
			return nil
		}
		if strict && !mayPass(err) {
			return nil
		}
	}
}

// mayPass says whether a failure to connect may be over soon: nobody is there,
// the greetings did not get through in time, or the peer says that it is going or
// has no slot. So may a syntax error that the peer reports: HELLO may have been
// cut off inside its line. A peer that greets wrongly is not what was meant, and
// will not change.
//
// What is wrong with a certificate, with a connection without one, with the kind
// of the connection, or with the dialer, stays so.
func mayPass(err error) bool {
	var handshake *handshakeError
	if errors.As(err, &handshake) && handshake.stays || refusesCertificate(err) ||
		errors.Is(err, ErrInsecureTransport) || errors.Is(err, errPeersUnseen) || errors.Is(err, errNoDeadlines) || errors.Is(err, errNoConnection) {
		return false
	}
	var said *ProtocolError
	if !errors.As(err, &said) || said.Code == codeTimeout {
		return true
	}
	switch said.Code {
	case codeClosing, codeBusy, codeSyntax:
		return said.Remote
	}
	return false
}

// connect opens a session and adds it to the queue. The error is a
// *WorkerError.
func (l *link) connect(ctx context.Context) (*session, error) {
	s, err := newSession(ctx, l)
	q := l.queue
	switch {
	case err == nil:
		l.warned = ""
	case ctx.Err() == nil:
		q.run.logNotReached(l, err, mayPass(err) && l.drains() || l.hasWarned(err))
	}
	q.mu.Lock()
	defer q.unlock()
	if err != nil {
		if ctx.Err() == nil || l.session == nil && l.err == nil { // that a follower was stopped is no reason to tell
			l.err = err
		}
		return nil, err
	}
	if !l.wantedLocked() {
		s.ending = true
		close(s.gone)
		q.run.sessions.Go(func() error { s.hangUp(nil); return nil }) // not here: TLS says goodbye, and a peer may not read
		return nil, s.fail(errors.New("the run needs it no more"))
	}
	l.err = nil
	if l.session != nil {
		l.redials++
		q.troubles.Redials++
	}
	l.session = s
	q.run.events.sessionOpened(SessionOpenedInfo{Run: q.run.id, Category: q.category, Addr: l.addr, Worker: s.name, Slots: s.slots, Window: s.window})
	q.join(s)
	return s, nil
}

// warnAgain is how long a worker that is not reached goes without a further warning
// of the same reason: it may be dialed in vain for as long as a run takes.
const warnAgain = time.Minute

// hasWarned says whether err was a warning not long ago. It is one now if not. Its
// numbers make no difference: a local port, or the time, is another with each dial.
func (l *link) hasWarned(err error) bool {
	why := strings.Map(func(r rune) rune {
		if '0' <= r && r <= '9' {
			return -1
		}
		return r
	}, err.Error())
	if why == l.warned && time.Since(l.warnedAt) < warnAgain {
		return true
	}
	l.warned, l.warnedAt = why, time.Now()
	return false
}

// drains says whether the latest session's worker is still there, though another
// session is wanted.
func (l *link) drains() bool {
	l.queue.mu.Lock()
	defer l.queue.mu.Unlock()
	return l.session != nil && !l.session.ending
}

// beat pings the worker, and takes the session to be lost when nothing is heard
// from it for too long. Nothing that it calls waits for the connection.
func (s *session) beat() {
	interval, timeout := s.run.config.heartbeat, s.run.config.silence
	timer := time.NewTimer(interval)
	defer timer.Stop()
	next := time.Now().Add(interval)
	for n := 1; ; {
		select {
		case <-s.gone:
			return
		case <-timer.C:
		}
		if s.wire.silent(timeout, interval) {
			fault := faultf(codeTimeout, "nothing heard for %v", timeout)
			s.leave(fault) // at once: what it may still say does not count
			s.wire.endWithError(fault)
			return
		}
		now := time.Now()
		if !now.Before(next) {
			s.isPinged(n, now)
			s.wire.ping(n)
			n++
			next = now.Add(interval)
		}
		deadline := s.wire.born.Add(time.Duration(s.wire.heard.Load()) + timeout)
		wake := next
		if deadline.After(now) && deadline.Before(wake) {
			wake = deadline
		}
		timer.Reset(wake.Sub(now))
	}
}
