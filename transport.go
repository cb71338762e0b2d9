package taskexec

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// ErrInsecureTransport is wrapped by an error that refuses to talk plaintext with
// another machine: one of NewCoordinator or Run, or of a worker's Serve,
// ListenAndServe or ServeConn. See WithInsecure.
var ErrInsecureTransport = errors.New("taskexec: insecure transport")

// An insecureError says where plaintext would have gone.
type insecureError struct{ where string }

func (e *insecureError) Error() string {
	return ErrInsecureTransport.Error() + ": " + e.where + " would be plaintext that can leave this machine, " +
		"and whoever can connect could have anything executed; use WithTLS, a loopback address or a unix socket, or, on a network you trust, WithInsecure"
}

func (e *insecureError) Unwrap() error { return ErrInsecureTransport }

// errPeersUnseen is why a connection without TLS is refused if there is a list
// of peers.
var errPeersUnseen = errors.New("taskexec: WithPeers: a peer is known by its certificate, and there is none without TLS; add WithTLS")

// WithInsecure allows plaintext that can leave this machine, for listening and
// for dialing. By default it is refused with ErrInsecureTransport: a worker
// executes what it is sent, so whoever can connect to it can make it do so.
// Loopback addresses, unix sockets and connections that are not TCP, such as a
// net.Pipe, never need it, nor does TLS. What counts is the address that was
// bound or reached, whatever name it was given by. Together with WithTLS or
// WithPeers it is an error.
func WithInsecure() Option {
	return option(func(c *commonConfig) { c.insecure = true })
}

// errNoDeadlines is why a connection is refused that cannot be told when to give
// up: whoever waits for its other side could wait for ever.
var errNoDeadlines = errors.New("taskexec: the connection takes no deadlines; use one whose SetDeadline, SetReadDeadline and SetWriteDeadline work")

// errNoConnection is why there is no session if a dialer is at fault.
var errNoConnection = errors.New("taskexec: WithDialer: the function returned neither a connection nor an error")

// checkDeadlines refuses conn if it does not take deadlines of all kinds.
func checkDeadlines(conn net.Conn) error {
	for _, set := range []func(time.Time) error{conn.SetDeadline, conn.SetReadDeadline, conn.SetWriteDeadline} {
		err := set(time.Time{})
		if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) { // of a closed one, reading says why
			return fmt.Errorf("%w: %w", errNoDeadlines, err)
		}
	}
	return nil
}

// aboutSocket adds to err, which says that a unix socket cannot be listened at or
// dialed, what the system does not tell.
func aboutSocket(network, path string, err error) error {
	const surely = 103 // bytes of a path that every system takes
	var system *os.SyscallError
	if network == "unix" && len(path) > surely && errors.As(err, &system) {
		return fmt.Errorf("%w; its path has %d bytes, and a system may take no more than %d", err, len(path), surely)
	}
	return err
}

// checkPlaintext refuses conn, which is without TLS, unless it may be without.
func (c *commonConfig) checkPlaintext(conn net.Conn) error {
	switch {
	case c.peers != nil:
		return errPeersUnseen
	case c.insecure || isLocal(conn):
		return nil
	}
	return &insecureError{fmt.Sprintf("the connection from %v to %v", conn.LocalAddr(), conn.RemoteAddr())}
}

// checkListener refuses a listener that is known to accept connections that may
// not be used. If its type is not known, checkAccepted has to see the first
// connection.
func (c *workerConfig) checkListener(ln net.Listener) error {
	plain := false
	switch ln.(type) {
	case interface{ AcceptTCP() (*net.TCPConn, error) }, interface{ AcceptUnix() (*net.UnixConn, error) }:
		plain = true // a *net.TCPListener or *net.UnixListener, or what embeds one
	}
	if !plain || c.tls != nil {
		return nil
	}
	if c.peers != nil {
		return errPeersUnseen
	}
	return c.checkBound(ln)
}

// checkAccepted refuses ln, judging by the first connection that it accepted.
func (c *workerConfig) checkAccepted(ln net.Listener, conn net.Conn) error {
	if _, ok := conn.(tlsConn); ok || c.tls != nil {
		return nil
	}
	if c.peers != nil {
		return errPeersUnseen
	}
	return c.checkBound(ln)
}

// checkBound refuses a listener without TLS by where it listens.
func (c *workerConfig) checkBound(ln net.Listener) error {
	if c.insecure || isLocalAddr(ln.Addr()) {
		return nil
	}
	return &insecureError{fmt.Sprintf("what comes in at %v", ln.Addr())}
}

// checkAddr refuses an address of WithWorkers that can only be reached over the
// network. For a host name that is not known before it is dialed.
func (c *coordinatorConfig) checkAddr(addr string) error {
	network, address, err := splitAddr(addr)
	if err != nil || network == "unix" || c.insecure || c.tls != nil || c.dial != nil {
		return nil
	}
	host, _, _ := net.SplitHostPort(address)
	host, _, _ = strings.Cut(host, "%") // a zone
	// To dial an unspecified address is to dial this machine.
	if ip := net.ParseIP(host); ip == nil || ip.IsLoopback() || ip.IsUnspecified() {
		return nil
	}
	return &insecureError{"a connection to " + quoteUnlessPlain(addr)}
}

// isLocal reports whether conn cannot leave this machine: it is a unix socket,
// TCP with both ends on loopback, or no TCP at all, such as a net.Pipe.
func isLocal(conn net.Conn) bool {
	return isLocalAddr(conn.LocalAddr()) && isLocalAddr(conn.RemoteAddr())
}

func isLocalAddr(addr net.Addr) bool {
	if addr == nil || !strings.HasPrefix(addr.Network(), "tcp") {
		return true
	}
	host, _, err := net.SplitHostPort(addr.String())
	return err == nil && net.ParseIP(host).IsLoopback()
}
