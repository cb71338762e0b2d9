package taskexec

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// tlsNow is what the clocks of these tests say, so that a certificate is expired
// because it says so.
var tlsNow = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// A testCA makes certificates.
type testCA struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newTestCA(t testing.TB, name string) *testCA {
	t.Helper()
	ca := &testCA{t: t, pool: x509.NewCertPool()}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	ca.cert = ca.sign(template).Leaf
	ca.pool.AddCert(ca.cert)
	return ca
}

// issue makes a certificate for names, URIs if they have a scheme and DNS names
// otherwise. change, if not nil, changes it before it is signed.
func (ca *testCA) issue(change func(*x509.Certificate), names ...string) tls.Certificate {
	ca.t.Helper()
	template := &x509.Certificate{
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	for _, name := range names {
		if uri, err := url.Parse(name); err == nil && uri.Scheme != "" {
			template.URIs = append(template.URIs, uri)
		} else if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	if change != nil {
		change(template)
	}
	return ca.sign(template)
}

func (ca *testCA) sign(template *x509.Certificate) tls.Certificate {
	ca.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		ca.t.Fatal(err)
	}
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = tlsNow.Add(-time.Hour), tlsNow.Add(time.Hour)
	}
	template.SerialNumber = big.NewInt(1)
	issuer, signer := ca.cert, ca.key
	if issuer == nil { // the authority's own
		ca.key = key
		issuer, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), signer)
	if err != nil {
		ca.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		ca.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// config is for either role: with that certificate, trusting the authority.
func (ca *testCA) config(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		RootCAs:      ca.pool,
		ClientCAs:    ca.pool,
		Time:         func() time.Time { return tlsNow },
	}
}

const (
	coordinatorURI = "spiffe://test/coordinator"
	workerURI      = "spiffe://test/worker"
)

// thePeers are who may be what in these tests.
var thePeers = []Peer{{Name: coordinatorURI, Coordinator: true}, {Name: workerURI, Categories: []string{"a"}}}

// countedListener counts what it has accepted.
type countedListener struct {
	net.Listener
	accepted atomic.Int32
}

func (l *countedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.accepted.Add(1)
	}
	return conn, err
}

func listenTCP(t *testing.T) *countedListener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return &countedListener{Listener: ln}
}

// A certificate that is not what it should be, on either side, ends a run at
// once, before anything is executed, and the error says why. The worker goes on
// for those that are as they should be.
func TestTLSLetsInWhoBelongs(t *testing.T) {
	ca, stranger := newTestCA(t, "ours"), newTestCA(t, "theirs")
	expired := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = tlsNow.Add(-2*time.Hour), tlsNow.Add(-time.Hour)
	}
	notYet := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = tlsNow.Add(time.Hour), tlsNow.Add(2*time.Hour)
	}
	goodCoordinator, goodWorker := ca.issue(nil, coordinatorURI), ca.issue(nil, workerURI)
	forced := func(cert tls.Certificate) *tls.Config {
		config := ca.config(tls.Certificate{})
		config.Certificates = nil
		// Certificates are only sent if they are of an authority that the server
		// asks for.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		return config
	}
	for _, test := range []struct {
		reason      string
		coordinator *tls.Config
		worker      tls.Certificate
		category    string
		want        string // in the error; none if it is let in
	}{
		{"right", ca.config(goodCoordinator), goodWorker, "a", ""},
		{"right, by GetClientCertificate", forced(goodCoordinator), goodWorker, "a", ""},
		{"right, with a second name", ca.config(ca.issue(nil, "other.test", coordinatorURI)), goodWorker, "a", ""},
		{"none", forced(tls.Certificate{}), goodWorker, "a", "refused the TLS handshake: tls: certificate required"},
		{"unknown authority, so that none is sent", ca.config(stranger.issue(nil, coordinatorURI)), goodWorker, "a", "refused the TLS handshake: tls: certificate required"},
		{"wrong certificate forced upon the worker", forced(stranger.issue(nil, coordinatorURI)), goodWorker, "a", "refused the TLS handshake: tls: unknown certificate authority"},
		{"expired", ca.config(ca.issue(expired, coordinatorURI)), goodWorker, "a", "refused the TLS handshake: tls: expired certificate"},
		{"not yet valid", ca.config(ca.issue(notYet, coordinatorURI)), goodWorker, "a", "refused the TLS handshake: tls: expired certificate"},
		{"wrong role: a worker that would be a coordinator", ca.config(goodWorker), goodWorker, "a", "refused the TLS handshake: tls: bad certificate"},
		{"wrong role: a certificate for servers", ca.config(ca.issue(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, coordinatorURI)), goodWorker, "a", "refused the TLS handshake: tls: bad certificate"},
		{"the right name in the wrong place", ca.config(ca.issue(func(c *x509.Certificate) {
			c.Subject.CommonName = coordinatorURI
		}, "other.test")), goodWorker, "a", "refused the TLS handshake: tls: bad certificate"},
		{"the right name in another case", ca.config(ca.issue(nil, "spiffe://test/Coordinator")), goodWorker, "a", "refused the TLS handshake: tls: bad certificate"},

		{"right authority, wrong category", ca.config(goodCoordinator), goodWorker, "b", `"spiffe://test/worker", which WithPeers does not list for category "b"`},
		{"a coordinator that would be a worker", ca.config(goodCoordinator), goodCoordinator, "a", `"spiffe://test/coordinator", which WithPeers does not list for category "a"`},
		{"a worker of an unknown authority", ca.config(goodCoordinator), stranger.issue(nil, workerURI), "a", "unknown authority"},
		{"a worker's expired certificate", ca.config(goodCoordinator), ca.issue(expired, workerURI), "a", "has expired"},
		{"a worker's certificate of tomorrow", ca.config(goodCoordinator), ca.issue(notYet, workerURI), "a", "not yet valid"},
		{"a worker's certificate for clients", ca.config(goodCoordinator), ca.issue(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}, workerURI), "a", "key usage"},
		{"a worker without a name", ca.config(goodCoordinator), ca.issue(nil), "a", "no verified certificate with a URI or DNS name"},
		{"a worker's name in the wrong place", ca.config(goodCoordinator), ca.issue(func(c *x509.Certificate) {
			c.Subject.CommonName = workerURI
		}, "127.0.0.1"), "a", "no verified certificate with a URI or DNS name"},
	} {
		t.Run(test.reason, func(t *testing.T) {
			ln := listenTCP(t)
			var executed atomic.Int32
			handler := HandlerFunc(func(ctx context.Context, task Task) (string, error) {
				executed.Add(1)
				info, _ := TaskInfoFrom(ctx)
				return info.Coordinator, nil
			})
			serveTest(t, ln, nil, handler, WithTLS(ca.config(test.worker)), WithPeers(thePeers...))
			var opened atomic.Int32
			c := newTestCoordinator(t, WithWorkers(test.category, ln.Addr().String()), WithTLS(test.coordinator), WithPeers(thePeers...),
				WithObserver(Observer{SessionOpened: func(SessionOpenedInfo) { opened.Add(1) }}))
			tasks := tasksOf(test.category, 3)
			report, err := c.Run(t.Context(), tasks)
			checkReport(t, tasks, report, err)
			if test.want == "" {
				if err != nil || report.Results[2].Output != coordinatorURI || opened.Load() != 1 {
					t.Errorf("got %v, %d sessions and the coordinator's name %q", err, opened.Load(), report.Results[2].Output)
				}
				return
			}
			var we *WorkerError
			if !errors.As(err, &we) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v\nwant a *WorkerError that says %s", err, test.want)
			}
			if executed.Load() != 0 || opened.Load() != 0 || ln.accepted.Load() != 1 {
				t.Errorf("%d tasks executed, %d sessions opened, %d dials", executed.Load(), opened.Load(), ln.accepted.Load())
			}
			if test.worker.Leaf == goodWorker.Leaf { // others get on
				c := newTestCoordinator(t, WithWorkers("a", ln.Addr().String()), WithTLS(ca.config(goodCoordinator)), WithPeers(thePeers...))
				if _, err := c.Run(t.Context(), tasksOf("a", 1)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
