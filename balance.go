package taskexec

import (
	"cmp"
	"slices"
	"time"
)

// A queue sees to it that no worker is idle while tasks wait for another. What
// waits in the queue goes first to the sessions that have a slot free, and beyond
// its own slots none is given what the free slots of others would start. At the
// end of a group, or when the consumer of a Stream has no room for more, no task
// waits here any more, but some still wait at workers that turned out to be slow,
// or have come upon a long task. As many of these as free slots elsewhere can
// start are asked back, the last that were sent first. The worker decides: it
// answers RETURN for a task that has not started; for one that has, its report
// comes in time. Nothing depends on an answer.
//
// This must cost next to nothing while every worker has enough to do. So the
// queue keeps sums over its sessions, of slots that are free and of tasks that
// are ahead, and lists of sessions that may have room or something to give. A
// session enters a list when it is seen to belong there, and leaves it when it
// is found not to.

// A standing is a session's part in that. It is guarded by queue.mu.
type standing struct {
	free    int       // slots not in use
	ahead   int       // tasks in flight beyond the slots, without those of awaited
	awaited int       // tasks that were asked back and whose answer is expected
	askedAt time.Time // when the latest RECALL was sent
	barren  bool      // nothing of what is ahead can be asked back, until more is sent
	idle    bool      // it is in queue.idle
	roomy   bool      // it is in queue.roomy
	giving  bool      // it is in queue.giving
}

const (
	patience   = headStart // until tasks that were not asked back, or not returned, are looked at again
	mostGivers = 16        // sessions that are looked at together for what they can give back
	maxReturns = 3         // how often a task is asked back in a run: it must not wander forever
)

// weigh brings the sums up to date with what s holds. Each section that changes
// what s holds ends with it. q.mu is held.
func (q *queue) weigh(s *session) {
	free, ahead := 0, 0
	if beyond := s.held.len() - s.slots; s.live {
		s.setAwaited(min(s.awaited, max(beyond, 0))) // no more than that have not started
		if s.alone == nil {
			free = max(-beyond, 0)
		}
		if !s.barren {
			ahead = max(beyond-s.awaited, 0)
		}
	} else {
		s.setAwaited(0)
	}
	q.free += free - s.free
	q.ahead += ahead - s.ahead
	s.free, s.ahead = free, ahead
	if ahead > 0 && !s.giving {
		s.giving = true
		q.giving.push(s)
	}
}

// setAwaited sets how many answers to RECALL are expected of s. queue.mu is
// held.
func (s *session) setAwaited(n int) {
	s.queue.awaited += n - s.awaited
	s.awaited = n
}

// mayHold is how many tasks may be in flight to s as far as its worker is
// concerned. queue.mu is held.
func (s *session) mayHold() int {
	return min(s.window, max(s.pace.window, s.run.config.leastWindow))
}

// offer enters s among those that have room, if it has. q.mu is held.
func (q *queue) offer(s *session) {
	switch held := s.held.len(); {
	case !s.live:
	case held < s.slots && !s.idle:
		s.idle = true
		q.idle.push(s)
	case held >= s.slots && held < s.mayHold() && !s.roomy:
		s.roomy = true
		q.roomy.push(s)
	}
}

// forget takes s out of all lists. q.mu is held.
func (q *queue) forget(s *session) {
	for _, l := range []*fifo[*session]{&q.idle, &q.roomy, &q.giving} {
		*l = fifo[*session]{list: slices.DeleteFunc(l.all(), func(o *session) bool { return o == s })}
	}
	s.idle, s.roomy, s.giving = false, false, false
}

// taker takes a session that has room out of the lists, one with a free slot
// before all others; nil if there is none. When the session has taken what it may,
// it is at the end of the list again, so that single tasks are spread over the
// workers. q.mu is held.
func (q *queue) taker() *session {
	first := q.first()
	for range q.idle.len() {
		s := q.idle.pop()
		s.idle = false
		switch {
		case s.held.len() >= s.slots:
		case s.held.len() < q.limitWith(s, first):
			return s
		default: // it has to leave this one to others
			q.offer(s)
		}
	}
	for q.roomy.len() > 0 && first != nil && first.Losses == 0 && q.waits() > q.free {
		s := q.roomy.pop()
		s.roomy = false
		if q.worthWaking(s) && s.held.len() < q.limitWith(s, first) {
			return s
		}
	}
	return nil
}

// wakeTakers wakes at most n of the sessions that have room. q.mu is held.
func (q *queue) wakeTakers(n int) {
	for range min(n, len(q.live)) {
		s := q.taker()
		if s == nil {
			return
		}
		s.wire.wakeWriter()
	}
}

// evenOut asks back what is ahead at some workers while others have slots free,
// if the last of it would otherwise wait for longer than it takes to move it.
// q.mu is held.
func (q *queue) evenOut(now time.Time) {
	if q.free > q.awaited {
		var givers [mostGivers]*session
		n := 0
		for range min(q.giving.len(), mostGivers) {
			s := q.giving.pop()
			if s.ahead == 0 {
				s.giving = false
				continue
			}
			q.giving.push(s)
			givers[n] = s
			n++
		}
		q.askBack(givers[:n], q.free-q.awaited, now)
	}
	// What is not worth a RECALL now may yet be held up, and what was asked back may
	// be held by a worker that is slow to see the RECALL.
	if q.ahead > 0 && q.giving.len() > 0 && !q.evening {
		q.evening = true
		if q.evener == nil {
			q.evener = time.AfterFunc(patience, q.evenOutAgain)
			return
		}
		q.evener.Reset(patience)
	}
}

// uneven says whether slots are free, nothing waits for them, and tasks wait at
// workers. q.mu is held.
func (q *queue) uneven() bool {
	return q.free > 0 && q.ahead > 0 && q.coming() == 0 && q.halted == notHalted && !q.over && !q.stopping() && !q.run.config.atMostOnce
}

// evenOutAgain is evenOut when patience is over.
func (q *queue) evenOutAgain() {
	q.mu.Lock()
	defer q.unlock()
	q.evening = false
	if !q.uneven() {
		return // whatever makes it so again calls evenOut
	}
	now := time.Now()
	for _, s := range q.live {
		if s.awaited > 0 && now.Sub(s.askedAt) > s.pace.trip+patience {
			s.setAwaited(0)
			q.weigh(s)
		}
	}
	q.evenOut(now)
}

// askBack asks givers for n tasks altogether, each time the one whose last task
// would wait longest. q.mu is held.
func (q *queue) askBack(givers []*session, n int, now time.Time) {
	var asked [mostGivers]int
	for range n {
		most, from := time.Duration(0), -1
		for i, s := range givers {
			wait := s.pace.wait(s.ahead-asked[i], now)
			if wait > 2*s.pace.trip && wait > most { // back, and to another
				most, from = wait, i
			}
		}
		if from < 0 {
			break
		}
		asked[from]++
	}
	for i, s := range givers {
		if asked[i] > 0 {
			s.askBack(asked[i], now)
		}
	}
}

// askBack recalls the n tasks that s was sent last, leaving out those that were
// asked back before and not returned, or are to stay. queue.mu is held.
func (s *session) askBack(n int, now time.Time) {
	q := s.queue
	held := s.flights()
	slices.SortStableFunc(held, func(a, b flight) int { return cmp.Compare(a.sent, b.sent) })
	held = held[min(s.slots, len(held)):] // the others have started, or are about to
	for _, f := range slices.Backward(held) {
		if n == 0 {
			break
		}
		r := f.result
		if f.asked || f.suspect || r.Attempts-1-r.Losses-r.Retries >= maxReturns {
			continue
		}
		i, _ := s.held.find(r.Index)
		s.held.at(i).asked = true
		s.mayGive.Store(true)
		s.out = appendMessage(s.out, message{verb: verbRecall, task: r.Index})
		s.setAwaited(s.awaited + 1)
		s.askedAt = now
		n--
	}
	s.barren = n > 0
	s.wire.wakeWriter()
	q.weigh(s)
}
