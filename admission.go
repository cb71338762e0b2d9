package taskexec

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"
)

// This file says whom a worker lets in, so that no number of strangers can use
// it up, or keep out a coordinator.

const (
	sessionsMost  = 256 // that have greeted
	strangersMost = 32  // connections that have not
)

// An entrance counts who is connected. It is guarded by Worker.mu.
type entrance struct {
	strangers []*workerSession // those that have not greeted, the oldest first
	greeted   int
}

// place is where a session stands in an entrance. It only grows.
type place uint8

const (
	placeOutside place = iota
	placeInside
	placeGone // it is over, or had to make room
)

// enterStranger counts in a session that has not greeted yet. If it is one too
// many, the oldest such session goes, which has had the most time: so whoever
// greets at once gets in, whatever others do. It reports false if the worker
// takes no more sessions.
func (w *Worker) enterStranger(s *workerSession) bool {
	w.mu.Lock()
	if w.draining {
		w.mu.Unlock()
		return false
	}
	w.sessions[s] = struct{}{}
	e := &w.entrance
	var oldest *workerSession
	if len(e.strangers) == strangersMost {
		oldest = e.strangers[0]
		oldest.place = placeGone
		e.forget(oldest)
	}
	e.strangers = append(e.strangers, s)
	w.mu.Unlock()
	if oldest != nil {
		// Without last words, or TLS's own, all of which take time.
		raw := oldest.accepted
		if secured, ok := raw.(interface{ NetConn() net.Conn }); ok {
			raw = secured.NetConn()
		}
		raw.Close()
	}
	return true
}

// errMadeRoom is why a session that enterStranger closed is over.
var errMadeRoom = fmt.Errorf("it had not greeted, and made room: %d others came after it", strangersMost)

// admitGreeted lets in a session that has greeted.
func (w *Worker) admitGreeted(s *workerSession) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case s.place == placeGone:
		return errMadeRoom
	case len(w.stuck) >= w.config.slots:
		return faultf(codeBusy, "all slots are held by handlers that ignore their timeout")
	case w.entrance.greeted == sessionsMost:
		return faultf(codeBusy, "there are %d sessions already", sessionsMost)
	}
	w.entrance.forget(s)
	w.entrance.greeted++
	s.place = placeInside
	return nil
}

// disconnected gives the session's place to others. It reports whether it had
// been given to others before.
func (w *Worker) disconnected(s *workerSession) (madeRoom bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch s.place {
	case placeOutside:
		w.entrance.forget(s)
	case placeInside:
		w.entrance.greeted--
	case placeGone:
		return true
	}
	s.place = placeGone
	return false
}

// forget takes s off the strangers.
func (e *entrance) forget(s *workerSession) {
	e.strangers = slices.DeleteFunc(e.strangers, func(other *workerSession) bool { return other == s })
}

// removeSession forgets a session none of whose handlers runs.
func (w *Worker) removeSession(s *workerSession) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.sessions, s)
	s.mu.Lock()
	defer s.mu.Unlock()
	w.done += s.done
	w.failed += s.failed
}

// acceptBackoff is how long Serve waits after its listener has failed.
var acceptBackoff = backoff{first: 5 * time.Millisecond, factor: 2, most: time.Second}

// acceptFailures is how often a listener may fail in a row for reasons that are
// not the system's.
const acceptFailures = 10

// acceptWarning is how often at most a worker warns of a listener that fails and
// recovers over and over, as it does while file descriptors come and go.
const acceptWarning = 10 * time.Second

// An acceptLog is what was logged of a listener's failures.
type acceptLog struct {
	said bool      // one of those in a row was
	at   time.Time // when one last was
}

// due says whether to log the nth failure in a row: one of each row, though not
// the first if that comes too soon after another row.
func (l *acceptLog) due(n int) bool {
	if n == 1 {
		l.said = false
	}
	if l.said || time.Since(l.at) < acceptWarning {
		return false
	}
	l.said, l.at = true, time.Now()
	return true
}

// acceptsAgain waits until a listener that has failed n times in a row should
// be asked again. It reports false if that makes no sense: one that is closed
// stays closed. The system may have any number of reasons that pass, the first
// of which is running out of file descriptors; nobody has a list of them all.
// What the errors of other listeners mean, only they know.
func (w *Worker) acceptsAgain(ctx context.Context, err error, n int, log *acceptLog) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	if log.due(n) {
		w.logListener(err)
	}
	var system *os.SyscallError
	if !errors.As(err, &system) && n >= acceptFailures {
		return false
	}
	timer := time.NewTimer(acceptBackoff.slot(n))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-w.drains:
	case <-ctx.Done():
	}
	return true
}
