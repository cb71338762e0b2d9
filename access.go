package taskexec

import (
	"crypto/tls"
	"fmt"
	"net"
)

// This file decides who may say what, and when. Each message that either side
// reads, the greetings included, passes through rules, and what these do not
// name is refused. The one exception is what a peer sends while last words are
// written to it: that is thrown away. docs/protocol.md has the same table, "Who
// may say what, when", and a test compares the two.

// A role is one of the two sides of a session.
type role uint8

const (
	coordinatorRole role = iota
	workerRole
)

// sessionState is how far a session has come, as seen by the side that reads. It
// only grows.
type sessionState uint8

const (
	sessionNew      sessionState = iota // no greeting from the peer yet
	sessionReady                        // tasks are sent and reported
	sessionReturns                      // a worker has drained or was canceled, and a RUN gets RETURN; a coordinator has given reason for RETURN, or was given DRAIN
	sessionFinished                     // GOODBYE is said, the worker drained before HELLO, or the connection is over: nothing is reported any more
)

// A ruling is what becomes of a message.
type ruling uint8

const (
	refused ruling = iota // ERROR, and the session is over
	taken
	ignored // it comes too late to mean anything
)

// rules are indexed by who says it, the state of the session, and the verb.
var rules = [...][sessionFinished + 1][verbError + 1]ruling{
	coordinatorRole: {
		sessionNew:      may(verbHello, verbError),
		sessionReady:    may(verbRun, verbRecall, verbCancel, verbShutdown, verbPing, verbPong, verbError),
		sessionReturns:  may(verbRun, verbRecall, verbCancel, verbShutdown, verbPing, verbPong, verbError),
		sessionFinished: tooLate(),
	},
	workerRole: {
		sessionNew:      may(verbWelcome, verbError),
		sessionReady:    may(verbDone, verbFail, verbDrain, verbGoodbye, verbPing, verbPong, verbError),
		sessionReturns:  may(verbDone, verbFail, verbReturn, verbDrain, verbGoodbye, verbPing, verbPong, verbError),
		sessionFinished: tooLate(),
	},
}

func may(verbs ...verb) (row [verbError + 1]ruling) {
	for _, v := range verbs {
		row[v] = taken
	}
	return row
}

func tooLate() (row [verbError + 1]ruling) {
	for v := range row {
		row[v] = ignored
	}
	return row
}

// misplaced is the fault of saying v where the rules do not name it.
func misplaced(by role, state sessionState, v verb) *ProtocolError {
	switch {
	case state == sessionNew && by == coordinatorRole:
		return faultf(codeProtocol, "this is a worker of %s, which expects HELLO first, not %s", protocolVersion, v)
	case state == sessionNew:
		return faultf(codeProtocol, "a coordinator of %s expects WELCOME first, not %s", protocolVersion, v)
	case by == coordinatorRole:
		return faultf(codeState, "a coordinator may not send %s here", v)
	case v == verbReturn:
		return faultf(codeState, "a worker may not send RETURN here: nothing was recalled, drained or canceled")
	}
	return faultf(codeState, "a worker may not send %s here", v)
}

// RemoteShutdown says which coordinators may have a worker shut down, which ends
// it for all coordinators.
type RemoteShutdown int

const (
	// FromTrusted, the default, allows it to coordinators whose connection does
	// not come from another machine (loopback, a unix socket, or what is not TCP
	// at all and so counts as in memory), or whose certificate TLS has verified.
	FromTrusted RemoteShutdown = iota

	// FromAnyone allows it to every coordinator that can connect.
	FromAnyone

	// FromNobody leaves it to the worker's own program.
	FromNobody
)

// String returns the name of the constant.
func (p RemoteShutdown) String() string {
	switch p {
	case FromTrusted:
		return "FromTrusted"
	case FromAnyone:
		return "FromAnyone"
	case FromNobody:
		return "FromNobody"
	}
	return fmt.Sprintf("RemoteShutdown(%d)", int(p))
}

// WithRemoteShutdown says which coordinators may have the worker shut down, as
// WithWorkerShutdown does. The default is FromTrusted. One that may not is
// answered with an error, which ends its session, and the worker goes on
// serving. An unknown policy panics.
func WithRemoteShutdown(p RemoteShutdown) WorkerOption {
	if p < FromTrusted || p > FromNobody {
		panic("taskexec: WithRemoteShutdown: unknown policy " + p.String())
	}
	return workerOption(func(c *workerConfig) { c.remoteShutdown = p })
}

// lets says whether the peer at the other end of conn, which has greeted, may
// have the worker shut down.
func (p RemoteShutdown) lets(conn net.Conn) bool {
	switch p {
	case FromAnyone:
		return true
	case FromTrusted:
		return isLocal(conn) || isVerified(conn)
	}
	return false
}

// isVerified says whether conn is a TLS connection whose peer has shown a
// certificate that this side has verified. A connection that wraps one may say so
// for it.
func isVerified(conn net.Conn) bool {
	secured, ok := conn.(interface{ ConnectionState() tls.ConnectionState })
	return ok && len(secured.ConnectionState().VerifiedChains) > 0
}
