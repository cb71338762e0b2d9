package taskexec

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// WithTLS encrypts sessions, and makes both sides prove who they are. A clone of
// config is used, with TLS 1.3 as its lowest version and without session
// tickets. It needs a certificate of this side's own, and a pool of the
// authorities that the other side's certificate must come from:
//
//   - a worker takes its certificate from Certificates or GetCertificate, and
//     accepts coordinators with a certificate for client authentication that
//     ClientCAs vouch for;
//   - a coordinator takes its certificate from Certificates or
//     GetClientCertificate, and accepts workers with a certificate for server
//     authentication that RootCAs vouch for, for the host name of the worker's
//     address, or for ServerName if that is set.
//
// So one config may serve both roles. Without WithPeers, everybody with such a
// certificate may be a coordinator: use an authority that does nothing else,
// or list who may.
//
// A config without such a certificate or pool or with an empty one, with
// InsecureSkipVerify, or with a MaxVersion below TLS 1.3 is an error: of
// NewCoordinator, and of a worker's Serve, ListenAndServe and ServeConn. So are
// WithTLS and WithInsecure together. A nil config panics. The default is no TLS,
// and plaintext stays on this machine.
//
// WithHandshakeTimeout bounds the TLS handshake too. A connection that already
// is a *tls.Conn, from a dialer or a listener, is used as it is: whom it lets in
// is up to its own config, and to WithPeers.
func WithTLS(config *tls.Config) Option {
	if config == nil {
		panic("taskexec: WithTLS: nil config")
	}
	config = config.Clone()
	return option(func(c *commonConfig) {
		c.tls = config
		c.tlsClient, c.tlsServer = (*coordinatorConfig).tlsClientConn, (*workerConfig).tlsServerConn
	})
}

// A tlsConn is a connection with TLS: a *tls.Conn, or what wraps one. Only
// WithTLS names what makes them, so that the linker can leave crypto/tls out of
// programs that do not call it.
type tlsConn interface {
	net.Conn
	HandshakeContext(ctx context.Context) error
	ConnectionState() tls.ConnectionState
	CloseWrite() error
	NetConn() net.Conn
}

func (c *coordinatorConfig) tlsClientConn(conn net.Conn, addr, category string) tlsConn {
	return tls.Client(conn, c.clientTLS(addr, category))
}

func (c *workerConfig) tlsServerConn(conn net.Conn) tlsConn { return tls.Server(conn, c.tls) }

// checkSecurity finds fault with the options that say who may talk to whom.
func (c *commonConfig) checkSecurity() {
	switch {
	case c.insecure && c.tls != nil:
		c.addError("WithTLS and WithInsecure: leave one of the two out")
	case c.insecure && c.peers != nil:
		c.addError("WithPeers and WithInsecure: a peer is known by its certificate, which plaintext does not have; use WithTLS instead of WithInsecure")
	}
}

// checkSecurity is called when all options are applied. It turns the worker's
// config into the one that its sessions use.
func (c *workerConfig) checkSecurity() {
	c.commonConfig.checkSecurity()
	if c.tls == nil {
		return
	}
	var err error
	if c.tls, err = c.serverTLS(c.tls); err != nil {
		c.addError("%s", unprefixed(err))
	}
}

// checkSecurity is called when all options are applied.
func (c *coordinatorConfig) checkSecurity() {
	c.commonConfig.checkSecurity()
	if c.tls != nil {
		own := hasCertificate(c.tls) || c.tls.GetClientCertificate != nil
		if err := checkTLS(c.tls, own, c.tls.RootCAs, "Certificates or GetClientCertificate", "RootCAs", "workers"); err != nil {
			c.addError("%s", unprefixed(err))
		}
	}
	if c.peers != nil && c.tls == nil && c.dial == nil && !c.insecure {
		c.err = errors.Join(c.err, errPeersUnseen)
		return
	}
	for _, category := range slices.Sorted(maps.Keys(c.workers)) {
		for _, addr := range c.workers[category] {
			if err := c.checkAddr(addr); err != nil {
				c.err = errors.Join(c.err, err)
			}
			if c.tls != nil && c.peers == nil && c.tls.ServerName == "" && serverName(addr) == "" {
				c.addError("WithTLS: %s, of category %s, has no host name to find in the worker's certificate; set the config's ServerName, or list by WithPeers who may be a worker",
					quoteUnlessPlain(addr), quote(category))
			}
		}
	}
}

// checkTLS finds fault with a config of either role.
func checkTLS(config *tls.Config, own bool, pool *x509.CertPool, certificates, authorities, others string) error {
	switch {
	case !own:
		return fmt.Errorf("taskexec: WithTLS: the config has no certificate; set %s", certificates)
	case pool == nil || pool.Equal(x509.NewCertPool()):
		return fmt.Errorf("taskexec: WithTLS: the config says nothing of the authorities that %s' certificates come from; set %s", others, authorities)
	case config.InsecureSkipVerify:
		return errors.New("taskexec: WithTLS: the config has InsecureSkipVerify, with which anybody can pretend to be a worker; leave it out")
	case config.MaxVersion != 0 && config.MaxVersion < tls.VersionTLS13:
		return fmt.Errorf("taskexec: WithTLS: the config allows at most %s; leave MaxVersion out, or allow TLS 1.3", tls.VersionName(config.MaxVersion))
	}
	return nil
}

// hasCertificate says whether there is a certificate in Certificates. One that
// could not be loaded is zero.
func hasCertificate(config *tls.Config) bool {
	return slices.ContainsFunc(config.Certificates, func(c tls.Certificate) bool { return len(c.Certificate) > 0 })
}

// strict is a clone of config with what both roles insist on.
func strict(config *tls.Config) *tls.Config {
	config = config.Clone()
	config.MinVersion = max(config.MinVersion, tls.VersionTLS13)
	// A resumed session would be one whose certificate nobody looks at again.
	config.SessionTicketsDisabled = true
	config.ClientSessionCache = nil
	return config
}

// serverTLS turns the config that was given into the one that a worker uses.
func (c *workerConfig) serverTLS(given *tls.Config) (*tls.Config, error) {
	own := hasCertificate(given) || given.GetCertificate != nil
	if err := checkTLS(given, own, given.ClientCAs, "Certificates or GetCertificate", "ClientCAs", "coordinators"); err != nil {
		return given, err
	}
	config := strict(given)
	config.ClientAuth = tls.RequireAndVerifyClientCert
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if given.VerifyConnection != nil {
			if err := given.VerifyConnection(state); err != nil {
				return err
			}
		}
		_, err := c.coordinatorName(state.VerifiedChains)
		return err
	}
	if another := given.GetConfigForClient; another != nil {
		// The config that it returns has to meet the same conditions.
		config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			given, err := another(hello)
			if err != nil || given == nil {
				return nil, err
			}
			return c.serverTLS(given)
		}
	}
	return config, nil
}

// clientTLS is the config for a connection to a worker at addr for category.
func (c *coordinatorConfig) clientTLS(addr, category string) *tls.Config {
	given := c.tls
	config := strict(given)
	if config.ServerName == "" {
		config.ServerName = serverName(addr)
	}
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if c.peers != nil {
			chains, err := c.verifyWorker(state.PeerCertificates)
			if err != nil {
				return err
			}
			state.VerifiedChains = chains
			if err := c.checkWorkerName(chains, category); err != nil {
				return err
			}
		}
		if given.VerifyConnection != nil {
			if err := given.VerifyConnection(state); err != nil {
				return &refusedError{err}
			}
		}
		return nil
	}
	if check := given.VerifyPeerCertificate; check != nil {
		config.VerifyPeerCertificate = func(raw [][]byte, chains [][]*x509.Certificate) error {
			if err := check(raw, chains); err != nil {
				return &refusedError{err}
			}
			return nil
		}
	}
	if c.peers != nil {
		// crypto/tls verifies a chain only together with a host name, and the list
		// takes the host name's place: verifyWorker does the rest.
		config.InsecureSkipVerify = true
		config.VerifyPeerCertificate = nil
	}
	return config
}

// verifyWorker verifies a worker's chain as crypto/tls would, except for the host
// name.
func (c *coordinatorConfig) verifyWorker(certs []*x509.Certificate) ([][]*x509.Certificate, error) {
	options := x509.VerifyOptions{
		Roots:         c.tls.RootCAs,
		Intermediates: x509.NewCertPool(),
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if c.tls.Time != nil {
		options.CurrentTime = c.tls.Time()
	}
	for _, cert := range certs[1:] {
		options.Intermediates.AddCert(cert)
	}
	chains, err := certs[0].Verify(options)
	if err != nil {
		return nil, &tls.CertificateVerificationError{UnverifiedCertificates: certs, Err: err}
	}
	if c.tls.VerifyPeerCertificate != nil {
		raw := make([][]byte, len(certs))
		for i, cert := range certs {
			raw[i] = cert.Raw
		}
		if err := c.tls.VerifyPeerCertificate(raw, chains); err != nil {
			return nil, &refusedError{err}
		}
	}
	return chains, nil
}

// serverName is the host of an address of WithWorkers; "" if it has none. A zone
// says by which of this machine's interfaces the host is reached, so no
// certificate can name it.
func serverName(addr string) string {
	if network, _, err := splitAddr(addr); err != nil || network == "unix" {
		return ""
	}
	host, _, _ := net.SplitHostPort(addr)
	host, _, _ = strings.Cut(host, "%")
	return host
}

// secure turns a connection that was dialed into one that a session may use. The
// error is a *handshakeError if there is TLS. ctx bounds the handshake; the
// caller closes conn after an error.
func (c *coordinatorConfig) secure(ctx context.Context, conn net.Conn, addr, category string) (net.Conn, error) {
	if err := checkDeadlines(conn); err != nil {
		return conn, err
	}
	var below *belowTLS
	secured, given := conn.(tlsConn)
	if !given {
		if c.tls == nil {
			return conn, c.checkPlaintext(conn)
		}
		below = newBelowTLS(conn)
		secured = c.tlsClient(c, below, addr, category)
	}
	if err := secured.HandshakeContext(ctx); err != nil {
		return conn, newHandshakeError(err)
	}
	if given {
		state := secured.ConnectionState()
		if !state.HandshakeComplete { // what wraps it does without TLS
			return conn, c.checkPlaintext(conn)
		}
		if c.peers != nil {
			if err := c.checkWorkerName(state.VerifiedChains, category); err != nil {
				return conn, newHandshakeError(err)
			}
		}
	}
	return &promptConn{tlsConn: secured, below: below}, nil
}

// A belowTLS is the connection that this side's TLS runs over.
type belowTLS struct {
	net.Conn
	in io.Reader // what comes from Conn

	// heard is called when bytes have come; nil before there is a wire. It hears of
	// them before TLS does: a record, of up to 16 KiB, comes out of TLS when all of
	// it is there, and on a slow link that may take longer than a peer may be silent.
	heard func()
}

// newBelowTLS makes one of conn. If conn has no buffers, it gets one that takes in
// at once all that a peer writes of its handshake. Otherwise a peer whose
// certificate is refused would still be writing when it should read why, and both
// would wait for each other.
func newBelowTLS(conn net.Conn) *belowTLS {
	const chain = 64 << 10 // of some certificates
	c := &belowTLS{Conn: conn, in: conn}
	if unbuffered(conn) {
		c.in = bufio.NewReaderSize(conn, chain)
	}
	return c
}

func (c *belowTLS) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	if n > 0 && c.heard != nil {
		c.heard()
	}
	return n, err
}

// secure turns a connection that was accepted into one that a session may use.
// The handshake, if there is one, is still to be done.
func (c *workerConfig) secure(conn net.Conn) (net.Conn, error) {
	if err := checkDeadlines(conn); err != nil {
		return conn, err
	}
	if secured, ok := conn.(tlsConn); ok {
		return &promptConn{tlsConn: secured}, nil
	}
	if c.tls == nil {
		return conn, c.checkPlaintext(conn)
	}
	below := newBelowTLS(conn)
	return &promptConn{tlsConn: c.tlsServer(c, below), below: below}, nil
}

// handshake completes the handshake of a connection that a worker accepted, and
// takes note of who is there. Nothing can be written before it is over.
func (s *workerSession) handshake(deadline time.Time) error {
	defer close(s.secured)
	conn, ok := s.wire.conn.(*promptConn)
	if !ok {
		return nil
	}
	config := &s.worker.config
	s.wire.conn.SetWriteDeadline(deadline)
	s.wire.setReadDeadline(deadline)
	if by := s.wire.mustEnd(); !by.IsZero() {
		s.wire.conn.SetDeadline(by)
	}
	err := conn.HandshakeContext(context.Background()) // deadlines bound it
	switch {
	case err == nil:
	case err == io.EOF: // whoever only looks whether the port is open goes like this
		return err
	case isTimeout(err):
		return faultf(codeTimeout, "no TLS handshake within %v", config.handshakeTimeout)
	default:
		raw := conn.NetConn()
		if conn.below != nil {
			raw = conn.below.Conn
		}
		s.wire.refuse(raw, err)
		return newHandshakeError(err)
	}
	state := conn.ConnectionState()
	if !state.HandshakeComplete { // what wraps it does without TLS
		err = config.checkPlaintext(conn)
	} else {
		s.coordinator, err = config.coordinatorName(state.VerifiedChains)
	}
	if err != nil { // the listener's own config has let it in
		return faultf(codeRefused, "%s", unprefixed(err))
	}
	return nil
}

// refuse ends a connection whose handshake has failed. The alert that says why
// is written already; to close a TCP connection with unread input would reset it,
// and the peer could lose the alert. A coordinator that has tried without TLS is
// told so in a line that it can read.
func (c *wire) refuse(raw net.Conn, why error) {
	raw.SetDeadline(c.overSoon())
	var plain tls.RecordHeaderError
	if errors.As(why, &plain) && verbHello.String() == string(plain.RecordHeader[:]) {
		line := appendMessage(nil, message{verb: verbError, word: codeProtocol, text: "this worker expects TLS; the coordinator needs WithTLS"})
		if _, err := raw.Write(line); err != nil {
			return
		}
	}
	if half, ok := raw.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	} else if unbuffered(raw) {
		return
	}
	io.CopyN(io.Discard, raw, discardBytes)
}

// A promptConn is a connection with TLS whose end takes no longer than a wire's
// may: crypto/tls itself gives a peer that does not read 5 s for each goodbye.
type promptConn struct {
	tlsConn
	below *belowTLS  // nil if the connection came with its TLS, and tells of whole records only
	mu    sync.Mutex // guards following
	by    time.Time  // when all must be over; zero before SetDeadline
}

// SetDeadline is called by a wire that ends. One that does not end sets its read
// and write deadlines separately.
func (c *promptConn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	c.by = t
	c.mu.Unlock()
	return c.tlsConn.SetDeadline(t)
}

// Write leaves no deadline behind. A peer that wants new keys is answered by
// crypto/tls while it reads; with the deadline of a write of long ago that would
// fail, and all writing with it.
func (c *promptConn) Write(b []byte) (int, error) {
	n, err := c.tlsConn.Write(b)
	c.SetWriteDeadline(time.Time{})
	if by := c.mustEnd(); !by.IsZero() {
		c.SetWriteDeadline(by)
	}
	return n, err
}

// mustEnd says by when all must be over; zero if nothing says so.
func (c *promptConn) mustEnd() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.by
}

func (c *promptConn) Close() error      { return c.soon(c.tlsConn.Close) }
func (c *promptConn) CloseWrite() error { return c.soon(c.tlsConn.CloseWrite) }

// soon calls end, which says goodbye, and cuts it off in time.
func (c *promptConn) soon(end func() error) error {
	left := lastWordsTimeout
	if by := c.mustEnd(); !by.IsZero() {
		left = min(left, time.Until(by))
	}
	defer time.AfterFunc(left, func() { c.NetConn().Close() }).Stop()
	return end()
}

// A refusedError is why this side refuses a certificate that its authority
// vouches for.
type refusedError struct{ err error }

func (e *refusedError) Error() string { return e.err.Error() }
func (e *refusedError) Unwrap() error { return e.err }

// A handshakeError says why there is no TLS with a peer. Its text may hold what
// the peer's certificate says, and is escaped.
type handshakeError struct {
	text  string
	err   error
	stays bool // it would be the same the next time
}

func (e *handshakeError) Error() string { return plainText(e.text) }
func (e *handshakeError) Unwrap() error { return e.err }

func newHandshakeError(err error) *handshakeError {
	var notTLS tls.RecordHeaderError
	if alert := alertOf(err); alert != nil {
		return alert
	}
	if errors.As(err, &notTLS) {
		return &handshakeError{"the other side does not speak TLS; it needs WithTLS too", err, true}
	}
	return &handshakeError{"TLS handshake: " + unprefixed(err), err, refusesCertificate(err)}
}

// alertOf returns the alert of a peer that refused the handshake, if err is one,
// else nil. In TLS 1.3 it may come only with the first read after the handshake.
func alertOf(err error) *handshakeError {
	var op *net.OpError
	// This is how crypto/tls marks an alert that it received.
	if !errors.As(err, &op) || op.Op != "remote error" {
		return nil
	}
	const (
		internalError       tls.AlertError = 80
		certificateRequired tls.AlertError = 116
	)
	// An internal error has nothing to do with who is at either end: a certificate
	// that is fetched when it is needed may be there the next time.
	passes := op.Err.Error() == internalError.Error()
	text := fmt.Sprintf("the other side refused the TLS handshake: %v", op.Err)
	// A certificate from an authority that the other side does not name is not even
	// shown, so whoever has configured one would look in the wrong place.
	if op.Err.Error() == certificateRequired.Error() {
		text += "; this side has none from an authority that it accepts"
	}
	return &handshakeError{text, err, !passes}
}

// refusesCertificate says whether err is this side's verdict on a certificate.
func refusesCertificate(err error) bool {
	var unverified *tls.CertificateVerificationError
	var refused *refusedError
	return errors.As(err, &unverified) || errors.As(err, &refused)
}
