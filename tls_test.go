package taskexec

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
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
		{"none", forced(tls.Certificate{}), goodWorker, "a", "refused the TLS handshake: tls: certificate required; this side has none from an authority that it accepts"},
		{"unknown authority, so that none is sent", ca.config(stranger.issue(nil, coordinatorURI)), goodWorker, "a", "refused the TLS handshake: tls: certificate required; this side has none from an authority that it accepts"},
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

		{"a name that is the right one once it is tidied", ca.config(ca.issue(func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Opaque: "//test/coordinator#"}}
		})), goodWorker, "a", "refused the TLS handshake: tls: bad certificate"},
		{"the right scheme in another case", ca.config(ca.issue(func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "SPIFFE", Opaque: "//test/coordinator"}}
		})), goodWorker, "a", "refused the TLS handshake: tls: bad certificate"},
		{"a wildcard that would match", ca.config(ca.issue(nil, "spiffe://test/*", "*.test")), goodWorker, "a", "refused the TLS handshake: tls: bad certificate"},

		{"right authority, wrong category", ca.config(goodCoordinator), goodWorker, "b", `"spiffe://test/worker", which WithPeers does not list for category "b"`},
		{"a coordinator that would be a worker", ca.config(goodCoordinator), goodCoordinator, "a", `"spiffe://test/coordinator", which WithPeers does not list for category "a"`},
		{"a worker of an unknown authority", ca.config(goodCoordinator), stranger.issue(nil, workerURI), "a", "unknown authority"},
		{"a worker's expired certificate", ca.config(goodCoordinator), ca.issue(expired, workerURI), "a", "has expired"},
		{"a worker's certificate of tomorrow", ca.config(goodCoordinator), ca.issue(notYet, workerURI), "a", "not yet valid"},
		{"a worker's certificate for clients", ca.config(goodCoordinator), ca.issue(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}, workerURI), "a", "key usage"},
		{"a worker's name that is the right one once it is tidied", ca.config(goodCoordinator), ca.issue(func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Opaque: "//test/worker#"}}
		}), "a", `"spiffe://test/worker#", which WithPeers does not list for category "a"`},
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
			if hint := "none from an authority"; strings.Contains(err.Error(), hint) && !strings.Contains(test.want, hint) {
				t.Errorf("got %v, though a certificate was sent", err)
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

// startTLSWorker is as startTCPWorker, over TLS.
func startTLSWorker(t *testing.T, handler Handler, opts ...WorkerOption) *workerTest {
	ca := newTestCA(t, "ours")
	config := ca.config(ca.issue(nil, "test"))
	config.ServerName = "test"
	wt := startTCPWorker(t, handler, append(opts, WithTLS(config))...)
	dial := wt.connect
	wt.connect = func() net.Conn { return tls.Client(dial(), config) }
	return wt
}

// bothConfigs are for a worker at any address and a coordinator.
func bothConfigs(t testing.TB) (worker, coordinator *tls.Config) {
	ca := newTestCA(t, "ours")
	worker, coordinator = ca.config(ca.issue(nil, "worker.test")), ca.config(ca.issue(nil, "coordinator.test"))
	coordinator.ServerName = "worker.test"
	return worker, coordinator
}

func TestTLSRunsTheNineOverAPipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forWorker, forCoordinator := bothConfigs(t)
		cl := newCluster(t)
		opts := []CoordinatorOption{WithTLS(forCoordinator), WithWorkerShutdown()}
		for _, category := range []string{"a", "b", "c"} {
			cl.worker(category+":1", func(ctx context.Context, task Task) (string, error) {
				info, _ := TaskInfoFrom(ctx)
				return info.Coordinator, nil
			}, WithCategories(category), WithTLS(forWorker))
			opts = append(opts, WithWorkers(category, category+":1"))
		}
		start := time.Now()
		report, err := cl.coordinator(opts...).Run(t.Context(), mustParse(t, theNine))
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("took %v, though nothing takes time", took)
		}
		for _, r := range report.Results {
			if r.Output != "coordinator.test" {
				t.Errorf("task %d was executed for coordinator %q", r.Index, r.Output)
			}
		}
	})
}

// A worker's session over TLS ends with GOODBYE or with its coordinator's close
// as it does without.
func TestTLSSessionEndsCleanly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forWorker, forCoordinator := bothConfigs(t)
		for _, opts := range [][]CoordinatorOption{nil, {WithWorkerShutdown()}} {
			served := make(chan error, 1)
			dial := func(context.Context, string, string) (net.Conn, error) {
				client, server := net.Pipe()
				go func() { served <- NewWorker(parrot, WithTLS(forWorker)).ServeConn(t.Context(), server) }()
				return client, nil
			}
			c := newTestCoordinator(t, append(opts, WithDialer(dial), WithTLS(forCoordinator), WithWorkers("a", "w:1"))...)
			if _, err := c.Run(t.Context(), mustParse(t, "a1")); err != nil {
				t.Error(err)
			}
			if err := <-served; err != nil {
				t.Errorf("ServeConn returned %v", err)
			}
		}
	})
}

// A connection that is closed without a word, as by whoever looks whether a port is
// open, is no fault, with TLS or without.
func TestLookingWhetherAPortIsOpenIsNoFault(t *testing.T) {
	forWorker, _ := bothConfigs(t)
	for _, opts := range [][]WorkerOption{nil, {WithTLS(forWorker)}} {
		synctest.Test(t, func(t *testing.T) {
			log := newLogRecorder(slog.LevelInfo)
			client, server := net.Pipe()
			client.Close()
			if err := NewWorker(parrot, append(opts, WithLogger(slog.New(log)))...).ServeConn(t.Context(), server); err != nil {
				t.Errorf("ServeConn returned %v", err)
			}
			log.expectLines(t, []string{keyError})
		})
	}
}

// A peer need not say goodbye to TLS; but an end inside a line is told, whether TLS
// ends with it or not.
func TestTLSMayEndWithoutAGoodbye(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	for _, begun := range []string{"", "RUN 1 1"} {
		for _, notify := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				defer client.Close()
				served := make(chan error, 1)
				go func() { served <- NewWorker(parrot, WithTLS(forWorker)).ServeConn(t.Context(), server) }()
				conn := tls.Client(client, forCoordinator)
				mutePeer(t, conn)
				io.WriteString(conn, begun)
				if notify {
					conn.CloseWrite()
				} else {
					client.Close()
				}
				if err := <-served; errors.Is(err, errTorn) != (begun != "") || begun == "" && err != nil {
					t.Errorf("after %q, with close_notify %v: %v", begun, notify, err)
				}
			})
		}
	}
}

// mutePeer completes a handshake, exchanges greetings, and reads only what it
// is told to.
func mutePeer(t *testing.T, conn net.Conn) *peer {
	p := newPeer(t, conn)
	p.send(helloA)
	p.expect("WELCOME …")
	return p
}

func TestTLSEndsWithinASecondThoughThePeerDoesNotRead(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	within := func(t *testing.T, start time.Time) {
		t.Helper()
		if took := time.Since(start); took > lastWordsTimeout {
			t.Errorf("took %v", took)
		}
	}
	for _, reads := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			client, server := net.Pipe()
			defer client.Close()
			ctx, cancel := context.WithCancel(t.Context())
			served := make(chan error, 1)
			go func() { served <- NewWorker(parrot, WithTLS(forWorker)).ServeConn(ctx, server) }()
			p := mutePeer(t, tls.Client(client, forCoordinator))
			start := time.Now()
			cancel()
			if reads { // the last line, and not the goodbye of TLS
				p.expect("ERROR closing …")
			}
			<-served
			within(t, start)
		})
	}
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer server.Close()
		done := make(chan struct{})
		go func() {
			defer close(done)
			p := newPeer(t, tls.Server(server, forWorker))
			p.welcome()
			p.expect("RUN 0 1 0 a1")
			p.send("DONE 0 0")
		}()
		c := newTestCoordinator(t, WithTLS(forCoordinator), WithWorkers("a", "w:1"),
			WithDialer(func(context.Context, string, string) (net.Conn, error) { return client, nil }))
		start := time.Now()
		if _, err := c.Run(t.Context(), mustParse(t, "a1")); err != nil {
			t.Error(err)
		}
		within(t, start)
		<-done
	})
}

// trickle is what 8 KiB a second come through.
type trickle struct{ net.Conn }

func (c trickle) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b[:min(len(b), 100)])
	time.Sleep(time.Duration(n) * time.Second / (8 << 10))
	return n, err
}

// On this link a record of TLS takes longer to arrive than a worker may be silent,
// and is no silence: bytes of it come all the time.
func TestALongOutputOnASlowLinkIsNoSilence(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	for _, test := range []struct {
		worker      []WorkerOption
		coordinator []CoordinatorOption
	}{{}, {[]WorkerOption{WithTLS(forWorker)}, []CoordinatorOption{WithTLS(forCoordinator)}}} {
		synctest.Test(t, func(t *testing.T) {
			cl := newCluster(t)
			cl.worker("a:1", func(context.Context, Task) (string, error) { return strings.Repeat("x", 200<<10), nil }, test.worker...)
			report, err := cl.coordinator(append(test.coordinator, WithWorkers("a", "a:1"), WithHeartbeat(500*ms, 1500*ms),
				WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
					conn, err := cl.dial(ctx, network, addr)
					return trickle{conn}, err
				}))...).Run(t.Context(), mustParse(t, "a1"))
			if err != nil || report.Results[0].Attempts != 1 {
				t.Errorf("in %d attempts: %v", report.Results[0].Attempts, err)
			}
		})
	}
}

// expandLabel is HKDF-Expand-Label of RFC 8446, with SHA-256.
func expandLabel(t *testing.T, secret []byte, label string, n int) []byte {
	t.Helper()
	label = "tls13 " + label
	info := string([]byte{byte(n >> 8), byte(n), byte(len(label))}) + label + "\x00"
	key, err := hkdf.Expand(sha256.New, secret, info, n)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// recordTLS is a record of TLS_AES_128_GCM_SHA256, the n-th under the secret.
func recordTLS(t *testing.T, secret []byte, n uint64, kind byte, text string) []byte {
	t.Helper()
	block, err := aes.NewCipher(expandLabel(t, secret, "key", 16))
	if err != nil {
		t.Fatal(err)
	}
	seal, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	nonce := expandLabel(t, secret, "iv", seal.NonceSize())
	counter := nonce[len(nonce)-8:]
	binary.BigEndian.PutUint64(counter, n^binary.BigEndian.Uint64(counter))
	size := len(text) + 1 + seal.Overhead()
	header := []byte{23, 3, 3, byte(size >> 8), byte(size)}
	return append(header, seal.Seal(nil, nonce, append([]byte(text), kind), header)...)
}

// Other implementations of TLS change their keys now and then, and ask this side to
// do so too. That harms no session, however long nothing was written.
func TestTLSPeerMayAskForNewKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forWorker, forCoordinator := bothConfigs(t)
		var secrets bytes.Buffer
		forCoordinator.KeyLogWriter = &secrets
		client, server := net.Pipe()
		served := make(chan error, 1)
		go func() { served <- NewWorker(parrot, WithTLS(forWorker)).ServeConn(t.Context(), server) }()
		conn := tls.Client(client, forCoordinator)
		p := mutePeer(t, conn) // which has written one record
		var secret []byte
		for line := range strings.Lines(secrets.String()) {
			if f := strings.Fields(line); f[0] == "CLIENT_TRAFFIC_SECRET_0" {
				secret, _ = hex.DecodeString(f[2])
			}
		}
		if conn.ConnectionState().CipherSuite == tls.TLS_AES_128_GCM_SHA256 {
			time.Sleep(2 * writeTimeout)
			const handshake, application = 22, 23
			askForNewKeys := string([]byte{24, 0, 0, 1, 1})
			next := expandLabel(t, secret, "traffic upd", sha256.Size)
			go func() {
				client.Write(recordTLS(t, secret, 1, handshake, askForNewKeys))
				client.Write(recordTLS(t, next, 0, application, "RUN 0 1 0 x\n"))
			}()
			p.expectReports("DONE 0 x")
		} // else this machine has no use for it
		client.Close()
		if err := <-served; err != nil {
			t.Errorf("ServeConn returned %v", err)
		}
	})
}

// Last words and what came before them get through, whatever the peer still
// sends.
func TestTLSLastWordsReachAPeerThatWrites(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	ln := listenTCP(t)
	wt := serveTest(t, ln, func() net.Conn {
		conn, err := tls.Dial("tcp", ln.Addr().String(), forCoordinator)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		return conn
	}, parrot, WithTLS(forWorker))
	p := wt.session()
	go p.conn.Write(bytes.Repeat([]byte("NONSENSE\n"), 200_000))
	p.expect("ERROR syntax …")
	if rest, err := io.ReadAll(p.in); len(rest) > 0 || err != nil {
		t.Errorf("got %q and %v after the last words", rest, err)
	}
	wt.expectServing()
}

// The handshake is part of what WithHandshakeTimeout bounds, on either side.
func TestTLSHandshakeCountsAsPartOfTheGreeting(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	for _, test := range []struct {
		reason string
		play   func(conn net.Conn)
	}{
		{"silence", func(net.Conn) {}},
		{"a handshake that begins", func(conn net.Conn) { conn.Write([]byte{22, 3, 1}) }},
		{"a slow handshake, and then silence", func(conn net.Conn) {
			time.Sleep(7 * time.Second)
			secured := tls.Client(conn, forCoordinator)
			if err := secured.Handshake(); err != nil {
				t.Error(err)
			}
			io.Copy(io.Discard, secured)
		}},
		{"a handshake of which nothing is read", func(conn net.Conn) {
			tls.Client(deafConn{conn}, forCoordinator).Handshake()
		}},
		{"a handshake a byte a second", func(conn net.Conn) {
			tls.Client(slowConn{conn}, forCoordinator).Handshake()
		}},
	} {
		synctest.Test(t, func(t *testing.T) {
			client, server := net.Pipe()
			start := time.Now()
			played := make(chan struct{})
			go func() { defer close(played); test.play(client) }()
			err := NewWorker(parrot, WithTLS(forWorker)).ServeConn(t.Context(), server)
			var fault *ProtocolError
			if took := time.Since(start); !errors.As(err, &fault) || fault.Code != codeTimeout || took < 10*time.Second || took > 11*time.Second {
				t.Errorf("%s: got %v after %v", test.reason, err, took)
			}
			client.Close()
			<-played
		})
	}
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer server.Close()
		go io.Copy(io.Discard, server)
		c := newTestCoordinator(t, WithTLS(forCoordinator), WithWorkers("a", "w:1"), WithWorkerWait(0),
			WithDialer(func(context.Context, string, string) (net.Conn, error) { return client, nil }))
		start := time.Now()
		_, err := c.Run(t.Context(), mustParse(t, "a1"))
		if took := time.Since(start); err == nil || !strings.Contains(err.Error(), "no TLS handshake within 10s") || took != 10*time.Second {
			t.Errorf("a silent worker: got %v after %v", err, took)
		}
	})
}

// A session that ends just before its handshake begins is over in a second all
// the same.
func TestTLSHandshakeKeepsToAnEndThatHasBegun(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		shaken := make(chan struct{})
		go func() {
			defer close(shaken)
			tls.Client(deafConn{client}, forCoordinator).Handshake()
		}()
		w := NewWorker(parrot, WithTLS(forWorker))
		conn, err := w.config.secure(server)
		if err != nil {
			t.Fatal(err)
		}
		s := &workerSession{worker: w, wire: newWire(conn, nil), secured: make(chan struct{})}
		s.wire.endWithError(faultf(codeClosing, "it ends"))
		start := time.Now()
		err = s.handshake(start.Add(10 * time.Second))
		if took := time.Since(start); err == nil || took > lastWordsTimeout {
			t.Errorf("got %v after %v", err, took)
		}
		client.Close()
		<-shaken
	})
}

// The alert that says why a certificate is refused is not followed by a reset,
// with which the peer's system may throw it away.
func TestTLSRefusalReachesAPeerThatWrites(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	forCoordinator.Certificates = nil
	ln := listenTCP(t)
	serveTest(t, ln, nil, parrot, WithTLS(forWorker))
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(20 * time.Second))
	conn := tls.Client(raw, forCoordinator)
	if _, err := conn.Write(make([]byte, 64<<10)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || alertOf(err) == nil {
		t.Errorf("got %v, want an alert", err)
	}
	if n, err := raw.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("got %d bytes and %v after the alert", n, err)
	}
}

// To close a TCP connection with unread input would reset it, and with it the
// refusal might be lost.
func TestAfterATLSRefusalWhatThePeerSendsIsStillRead(t *testing.T) {
	forWorker, _ := bothConfigs(t)
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		returned := make(chan error, 1)
		go func() {
			returned <- NewWorker(parrot, WithTLS(forWorker)).ServeConn(t.Context(), &halfConn{Conn: server})
		}()
		p := newPeer(t, client)
		p.send(helloA)
		p.expect("ERROR protocol this worker expects TLS; the coordinator needs WithTLS")
		synctest.Wait()
		p.send("RUN 0 1 0 x")
		client.Close()
		if err := <-returned; err == nil {
			t.Error("ServeConn returned nil")
		}
	})
}

// A peer whose handshake has failed has no more time than for last words, though it
// goes on holding, or using, its connection.
func TestARefusedTLSHandshakeKeepsNoConnection(t *testing.T) {
	forWorker, _ := bothConfigs(t)
	for _, then := range []struct {
		reason string
		do     func(conn net.Conn)
	}{
		{"it is silent", func(conn net.Conn) { io.Copy(io.Discard, conn) }},
		{"it goes on, a byte at a time", func(conn net.Conn) {
			go io.Copy(io.Discard, conn)
			for {
				if _, err := conn.Write([]byte("x")); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		}},
	} {
		t.Run(then.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				served := make(chan error, 1)
				go func() {
					served <- NewWorker(parrot, WithTLS(forWorker)).ServeConn(t.Context(), elsewhere{server})
				}()
				start := time.Now()
				var stranger sync.WaitGroup
				stranger.Go(func() {
					io.WriteString(client, "GET / HTTP/1.1\r\n")
					then.do(client)
				})
				err := <-served
				if took := time.Since(start); err == nil || took > lastWordsTimeout {
					t.Errorf("got %v after %v", err, took)
				}
				stranger.Wait()
				client.Close()
			})
		})
	}
}

// A coordinator that refuses a worker says so at once, though on a net.Pipe the
// worker is still writing the rest of its handshake.
func TestTLSRefusalOfAWorkerTakesNoTimeOverAPipe(t *testing.T) {
	for _, peers := range [][]CoordinatorOption{nil, {WithPeers(thePeers...)}} {
		synctest.Test(t, func(t *testing.T) {
			forWorker, forCoordinator := bothConfigs(t)
			forCoordinator.ServerName = "other.test"
			served := make(chan error, 10)
			dial := func(context.Context, string, string) (net.Conn, error) {
				client, server := net.Pipe()
				go func() { served <- NewWorker(parrot, WithTLS(forWorker)).ServeConn(t.Context(), server) }()
				return client, nil
			}
			c := newTestCoordinator(t, append(peers, WithDialer(dial), WithTLS(forCoordinator), WithWorkers("a", "w:1"))...)
			start := time.Now()
			_, err := c.Run(t.Context(), mustParse(t, "a1"))
			if took := time.Since(start); err == nil || !strings.Contains(err.Error(), "worker.test") || took != 0 {
				t.Errorf("after %v: %v", took, err)
			}
			if err := <-served; err == nil || !strings.Contains(err.Error(), "the other side refused the TLS handshake") {
				t.Errorf("the worker says %v", err)
			}
		})
	}
}

// longSigner signs with as much as a long RSA key would, and nobody gets as far as
// to look at it.
type longSigner struct{ key *rsa.PublicKey }

func (s longSigner) Public() crypto.PublicKey { return s.key }
func (s longSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return make([]byte, s.key.Size()), nil
}

// The same of a worker that refuses a coordinator, which is still writing too if
// its handshake is a long one.
func TestTLSRefusalOfACoordinatorTakesNoTimeOverAPipe(t *testing.T) {
	key := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 8191), E: 65537}
	key.N.Add(key.N, big.NewInt(1))
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t, "ours")
		template := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{"other.test"}, NotAfter: tlsNow.Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
		der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key, ca.key)
		if err != nil {
			t.Fatal(err)
		}
		forCoordinator := ca.config(tls.Certificate{Certificate: [][]byte{der}, PrivateKey: longSigner{key}})
		served := make(chan error, 10)
		dial := func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			go func() {
				served <- NewWorker(parrot, WithTLS(ca.config(ca.issue(nil, workerURI))), WithPeers(thePeers...)).ServeConn(t.Context(), server)
			}()
			return client, nil
		}
		c := newTestCoordinator(t, WithPeers(thePeers...), WithDialer(dial), WithTLS(forCoordinator), WithWorkers("a", "w:1"))
		start := time.Now()
		_, err = c.Run(t.Context(), mustParse(t, "a1"))
		if took := time.Since(start); err == nil || !strings.Contains(err.Error(), "the other side refused the TLS handshake") || took != 0 {
			t.Errorf("after %v: %v", took, err)
		}
		if err := <-served; err == nil || !strings.Contains(err.Error(), "other.test") {
			t.Errorf("the worker says %v", err)
		}
	})
}

// A coordinator on another machine may shut a worker down by its certificate.
func TestShutdownIsTakenFromAVerifiedCertificateElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forWorker, forCoordinator := bothConfigs(t)
		served := make(chan error, 1)
		c := newTestCoordinator(t, WithTLS(forCoordinator), WithWorkerShutdown(), WithWorkers("a", "w:1"),
			WithDialer(func(context.Context, string, string) (net.Conn, error) {
				client, server := net.Pipe()
				go func() { served <- NewWorker(parrot, WithTLS(forWorker)).ServeConn(t.Context(), elsewhere{server}) }()
				return elsewhere{client}, nil
			}))
		if _, err := c.Run(t.Context(), mustParse(t, "a1")); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Errorf("ServeConn returned %v", err)
		}
	})
}

// Strangers who never get on with the handshake make room for who does.
func TestTLSStrangersKeepNoCoordinatorOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forWorker, forCoordinator := bothConfigs(t)
		wt := startWorker(t, parrot, WithTLS(forWorker))
		start := time.Now()
		var strangers []*peer
		for range 3 * strangersMost {
			strangers = append(strangers, wt.connected())
		}
		for _, p := range strangers[:2*strangersMost] {
			p.expectEnd()
		}
		p := newPeer(t, tls.Client(wt.connect(), forCoordinator))
		p.send(helloA)
		p.expect("WELCOME …")
		if took := time.Since(start); took != 0 {
			t.Errorf("it took %v", took)
		}
		synctest.Wait() // until the one that made room for the last is forgotten
		if n := wt.worker.Stats().Sessions; n != strangersMost {
			t.Errorf("%d sessions are open", n)
		}
		p.conn.Close()
	})
}

// Nor do those who have come in by a listener's own TLS, and then neither greet
// nor read: to say goodbye to them would take 5 s each.
func TestStrangersOfAListenersTLSMakeRoomAtOnce(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	synctest.Test(t, func(t *testing.T) {
		w := NewWorker(parrot)
		var serving sync.WaitGroup
		connect := func() net.Conn {
			client, server := net.Pipe()
			serving.Go(func() { w.ServeConn(t.Context(), tls.Server(server, forWorker)) })
			conn := tls.Client(client, forCoordinator)
			if err := conn.Handshake(); err != nil {
				t.Error(err)
			}
			return conn
		}
		var conns []net.Conn
		for range strangersMost {
			conns = append(conns, connect())
		}
		start := time.Now()
		last := connect()
		p := newPeer(t, last)
		p.send(helloA)
		p.expect("WELCOME …")
		if took := time.Since(start); took != 0 {
			t.Errorf("the next had to wait for %v", took)
		}
		for _, conn := range append(conns, last) {
			conn.(*tls.Conn).NetConn().Close()
		}
		serving.Wait()
	})
}

// deafConn reads nothing for longer than anybody waits.
type deafConn struct{ net.Conn }

func (deafConn) Read([]byte) (int, error) {
	time.Sleep(time.Minute)
	return 0, io.EOF
}

// slowConn writes a byte a second.
type slowConn struct{ net.Conn }

func (c slowConn) Write(b []byte) (int, error) {
	for i := range b {
		time.Sleep(time.Second)
		if _, err := c.Conn.Write(b[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

// Who does not get on with the handshake keeps nobody else waiting, neither for
// a session nor for the worker's end.
func TestTLSHandshakeHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forWorker, forCoordinator := bothConfigs(t)
		wt := startWorker(t, parrot, WithTLS(forWorker))
		start := time.Now()
		for range 3 {
			wt.stranger()
		}
		p := newPeer(t, tls.Client(wt.connect(), forCoordinator))
		p.send(helloA)
		p.expect("WELCOME …")
		p.send("RUN 0 1 0 x")
		p.expectReports("DONE 0 x")
		p.conn.Close()
		if took := time.Since(start); took != 0 {
			t.Errorf("the session took %v", took)
		}
		if err := wt.worker.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took > lastWordsTimeout {
			t.Errorf("Shutdown took %v", took)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		forWorker, _ := bothConfigs(t)
		wt := startWorker(t, parrot, WithTLS(forWorker))
		wt.stranger()
		synctest.Wait()
		start := time.Now()
		wt.stop(errors.New("enough"))
		<-wt.served
		if took := time.Since(start); took > lastWordsTimeout {
			t.Errorf("Serve took %v to end", took)
		}
	})
}

// Two sides of which only one has TLS find out at once, and say so.
func TestTLSOnOneSideOnlyIsSaid(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	for _, test := range []struct {
		reason string
		worker []WorkerOption
		mine   []CoordinatorOption
		want   string
	}{
		{"the worker has it", []WorkerOption{WithTLS(forWorker)}, nil, "this worker expects TLS; the coordinator needs WithTLS"},
		{"the coordinator has it", nil, []CoordinatorOption{WithTLS(forCoordinator)}, "the other side does not speak TLS; it needs WithTLS too"},
		{"the coordinator's dialer has it", nil, []CoordinatorOption{WithDialer((&tls.Dialer{Config: forCoordinator}).DialContext)},
			"the other side does not speak TLS; it needs WithTLS too"},
	} {
		ln := listenTCP(t)
		serveTest(t, ln, nil, parrot, test.worker...)
		c := newTestCoordinator(t, append(test.mine, WithWorkers("a", ln.Addr().String()))...)
		_, err := c.Run(t.Context(), mustParse(t, "a1"))
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v", test.reason, err)
		}
		if ln.accepted.Load() != 1 {
			t.Errorf("%s: dialed %d times", test.reason, ln.accepted.Load())
		}
	}
}

// A config that cannot prove or check anything is refused: by NewCoordinator, and
// by whatever has a worker serve.
func TestBadSecurityIsRefusedWithWhatToDo(t *testing.T) {
	ca := newTestCA(t, "ours")
	cert := ca.issue(nil, "x.test")
	good := func(change func(*tls.Config)) Option {
		config := ca.config(cert)
		change(config)
		return WithTLS(config)
	}
	noDial := WithDialer(func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("dialed") })
	getCertificate := func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &cert, nil }
	getClientCertificate := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	peer := Peer{Name: "a.test", Coordinator: true}
	for _, test := range []struct {
		reason      string
		options     []Option
		worker      string // in its error; none: it is fine
		coordinator string
	}{
		{"nothing", nil, "", ""},
		{"a config for both", []Option{good(func(*tls.Config) {})}, "", ""},
		{"a highest version of 1.3", []Option{good(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS13 })}, "", ""},
		{"an empty config", []Option{WithTLS(new(tls.Config))}, "set Certificates or GetCertificate", "set Certificates or GetClientCertificate"},
		{"no certificate", []Option{good(func(c *tls.Config) { c.Certificates = nil })}, "set Certificates or GetCertificate", "set Certificates or GetClientCertificate"},
		{"a certificate that was not loaded", []Option{good(func(c *tls.Config) { c.Certificates = []tls.Certificate{{}} })}, "set Certificates or GetCertificate", "set Certificates or GetClientCertificate"},
		{"authorities that were not loaded", []Option{good(func(c *tls.Config) { c.RootCAs, c.ClientCAs = x509.NewCertPool(), x509.NewCertPool() })}, "set ClientCAs", "set RootCAs"},
		{"a server's certificate on demand", []Option{good(func(c *tls.Config) { c.Certificates, c.GetCertificate = nil, getCertificate })}, "", "set Certificates or GetClientCertificate"},
		{"a client's certificate on demand", []Option{good(func(c *tls.Config) { c.Certificates, c.GetClientCertificate = nil, getClientCertificate })}, "set Certificates or GetCertificate", ""},
		{"no authorities for coordinators", []Option{good(func(c *tls.Config) { c.ClientCAs = nil })}, "set ClientCAs", ""},
		{"no authorities for workers", []Option{good(func(c *tls.Config) { c.RootCAs = nil })}, "", "set RootCAs"},
		{"anybody may be a worker", []Option{good(func(c *tls.Config) { c.InsecureSkipVerify = true })}, "InsecureSkipVerify", "InsecureSkipVerify"},
		{"TLS 1.2 at most", []Option{good(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })}, "at most TLS 1.2", "at most TLS 1.2"},
		{"both TLS and not", []Option{good(func(*tls.Config) {}), WithInsecure()}, "WithTLS and WithInsecure", "WithTLS and WithInsecure"},
		{"in whatever order", []Option{WithInsecure(), good(func(*tls.Config) {})}, "WithTLS and WithInsecure", "WithTLS and WithInsecure"},
		{"peers that cannot be known", []Option{WithInsecure(), WithPeers(peer)}, "WithPeers and WithInsecure", "WithPeers and WithInsecure"},
		{"peers without TLS", []Option{WithPeers(peer)}, "add WithTLS", "add WithTLS"},
		{"peers with TLS", []Option{good(func(*tls.Config) {}), WithPeers(peer), WithPeers(Peer{Name: "b.test", Categories: []string{"a"}})}, "", ""},
		{"no peers", []Option{good(func(*tls.Config) {}), WithPeers()}, "no peer", "no peer"},
		{"a peer without a name", []Option{good(func(*tls.Config) {}), WithPeers(Peer{Coordinator: true})}, "no name", "no name"},
		{"a peer twice", []Option{good(func(*tls.Config) {}), WithPeers(peer, peer)}, `"a.test" is listed twice`, "twice"},
		{"a peer twice, in two calls", []Option{good(func(*tls.Config) {}), WithPeers(peer), WithPeers(peer)}, "twice", "twice"},
		{"a peer for nothing", []Option{good(func(*tls.Config) {}), WithPeers(Peer{Name: "n.test"})}, "for nothing", "for nothing"},
		{"a peer for what is no category", []Option{good(func(*tls.Config) {}), WithPeers(Peer{Name: "n.test", Categories: []string{"a\x1b"}})}, `category "a\x1b"`, `"a\x1b"`},
	} {
		t.Run(test.reason, func(t *testing.T) {
			check := func(who, want string, err error) {
				t.Helper()
				if want == "" {
					if err != nil && !errors.Is(err, context.Canceled) {
						t.Errorf("%s: %v", who, err)
					}
					return
				}
				if err == nil || !strings.Contains(err.Error(), want) || strings.Count(err.Error(), "taskexec: ") != 1 {
					t.Errorf("%s: got %v, want an error that says %s", who, err, want)
				}
			}
			canceled, cancel := context.WithCancel(t.Context())
			cancel()
			var coordinator []CoordinatorOption
			var worker []WorkerOption
			for _, o := range test.options {
				coordinator, worker = append(coordinator, o), append(worker, o)
			}
			_, err := NewCoordinator(append(coordinator, WithWorkers("a", "h:1"))...)
			check("NewCoordinator", test.coordinator, err)
			if test.reason != "peers without TLS" { // a dialer may bring it
				_, err = NewCoordinator(append(coordinator, WithWorkers("a", "h:1"), noDial)...)
				check("NewCoordinator with a dialer", test.coordinator, err)
			}
			w := NewWorker(parrot, worker...)
			check("ListenAndServe", test.worker, w.ListenAndServe(canceled, "127.0.0.1:0"))
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			check("Serve", test.worker, w.Serve(canceled, ln))
			client, server := net.Pipe()
			client.Close()
			check("ServeConn", test.worker, w.ServeConn(canceled, server))
		})
	}
	for _, addr := range []string{"unix:/run/w", ":1"} {
		_, err := NewCoordinator(WithTLS(ca.config(cert)), WithWorkers("a", addr))
		if err == nil || !strings.Contains(err.Error(), "no host name") {
			t.Errorf("%s, which names no host: got %v", addr, err)
		}
		named := ca.config(cert)
		named.ServerName = "x.test"
		for _, o := range [][]CoordinatorOption{{WithTLS(named)}, {WithTLS(ca.config(cert)), WithPeers(peer)}} {
			if _, err := NewCoordinator(append(o, WithWorkers("a", addr))...); err != nil {
				t.Errorf("%s: %v", addr, err)
			}
		}
	}
	defer func() {
		if v := recover(); v != "taskexec: WithTLS: nil config" {
			t.Errorf("WithTLS(nil): got the panic %v", v)
		}
	}()
	WithTLS(nil)
}

// oneSession is a dialer to a worker, whatever the address, that can be used
// once, and gives what ServeConn returned.
func oneSession(t *testing.T, opts ...WorkerOption) (dialFunc, <-chan error) {
	t.Helper()
	ln := listenTCP(t)
	served := make(chan error, 1)
	go func() {
		conn, err := ln.Accept()
		ln.Close()
		if err == nil {
			err = NewWorker(parrot, opts...).ServeConn(context.WithoutCancel(t.Context()), conn)
		}
		served <- err
	}()
	var dials atomic.Int32
	return func(context.Context, string, string) (net.Conn, error) {
		if dials.Add(1) > 1 {
			t.Error("dialed again")
		}
		return net.Dial("tcp", ln.Addr().String())
	}, served
}

// Without a list a coordinator looks for the host that it wanted to reach, and a
// worker takes whom the authority lets in.
func TestTLSWithoutPeersChecksTheHost(t *testing.T) {
	ca := newTestCA(t, "ours")
	mine := ca.config(ca.issue(nil, "c.test"))
	named := mine.Clone()
	named.ServerName = "w.test"
	for _, test := range []struct {
		reason string
		addr   string
		config *tls.Config
		worker tls.Certificate
		want   string
	}{
		{"the host of the address", "w.test:1", mine, ca.issue(nil, "w.test"), ""},
		{"an IP address", "127.0.0.1:1", mine, ca.issue(nil, "127.0.0.1"), ""},
		{"one of IPv6", "[::1]:1", mine, ca.issue(nil, "::1"), ""},
		{"one of IPv6 with a zone", "[::1%eth0]:1", mine, ca.issue(nil, "::1"), ""},
		{"another host", "w.test:1", mine, ca.issue(nil, "other.test"), "valid for other.test, not w.test"},
		{"ServerName in its place", "other.test:1", named, ca.issue(nil, "w.test"), ""},
		{"ServerName on a unix socket", "unix:/w", named, ca.issue(nil, "w.test"), ""},
		{"another than ServerName", "other.test:1", named, ca.issue(nil, "other.test"), "not w.test"},
		{"no name at all", "w.test:1", mine, ca.issue(func(c *x509.Certificate) { c.Subject.CommonName = "w.test" }), "Common Name"},
	} {
		t.Run(test.reason, func(t *testing.T) {
			dial, served := oneSession(t, WithTLS(ca.config(test.worker)))
			c := newTestCoordinator(t, WithTLS(test.config), WithWorkers("a", test.addr), WithDialer(dial))
			_, err := c.Run(t.Context(), mustParse(t, "a1"))
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if err := <-served; (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), "refused the TLS handshake: tls: bad certificate") {
				t.Errorf("the worker says %v", err)
			}
		})
	}
}

// What a certificate says is a stranger's text.
func TestTextOfCertificatesIsEscaped(t *testing.T) {
	ca := newTestCA(t, "ours")
	evil := ca.issue(func(c *x509.Certificate) {
		c.DNSNames = []string{"\x1b[2J\n", strings.Repeat("long", 1000), "c", "d", "e"}
	})
	if len(evil.Leaf.DNSNames) == 0 {
		t.Skip("crypto/x509 does not read such names any more")
	}
	for _, peers := range [][]CoordinatorOption{nil, {WithPeers(thePeers...)}} {
		dial, served := oneSession(t, WithTLS(ca.config(evil)))
		c := newTestCoordinator(t, append(peers, WithTLS(ca.config(ca.issue(nil, "c.test"))), WithWorkers("a", "w.test:1"), WithDialer(dial))...)
		_, err := c.Run(t.Context(), mustParse(t, "a1"))
		if err == nil || strings.ContainsAny(err.Error(), "\x1b\n") || !strings.Contains(err.Error(), `\x1b[2J\n`) || len(err.Error()) > 4500 {
			t.Errorf("got %q", err)
		}
		<-served
	}
	dial, served := oneSession(t, WithTLS(ca.config(ca.issue(nil, workerURI))), WithPeers(thePeers...))
	c := newTestCoordinator(t, WithPeers(thePeers...), WithTLS(ca.config(evil)), WithWorkers("a", "w.test:1"), WithDialer(dial))
	c.Run(t.Context(), mustParse(t, "a1"))
	if err := <-served; err == nil || strings.ContainsAny(err.Error(), "\x1b\n") || !strings.Contains(err.Error(), `\x1b[2J\n`) || !strings.Contains(err.Error(), "and 2 more") {
		t.Errorf("the worker says %q", err)
	}
}

// TLS that a dialer or a listener brings is used as it is, and the list still
// decides.
func TestTLSOfDialersAndListenersIsUsed(t *testing.T) {
	ca := newTestCA(t, "ours")
	forWorker, forCoordinator := ca.config(ca.issue(nil, workerURI, "127.0.0.1")), ca.config(ca.issue(nil, coordinatorURI))
	verifying := forWorker.Clone()
	verifying.ClientAuth = tls.RequireAndVerifyClientCert
	blind := forCoordinator.Clone()
	blind.InsecureSkipVerify = true
	for _, test := range []struct {
		reason   string
		listener *tls.Config
		dialer   *tls.Config
		peers    []Peer
		want     string // in Run's error
		output   string // the coordinator's name
	}{
		{"verified on both sides", verifying, forCoordinator, nil, "", coordinatorURI},
		{"and listed", verifying, forCoordinator, thePeers, "", coordinatorURI},
		{"verified by the coordinator alone", forWorker, forCoordinator, nil, "", ""},
		{"a list, and the listener does not ask for certificates", forWorker, forCoordinator, thePeers, "no verified certificate", ""},
		{"a list, and the dialer does not verify any", verifying, blind, thePeers, "no verified certificate", ""},
		{"not listed as a coordinator", verifying, forCoordinator, []Peer{{Name: workerURI, Categories: []string{"a"}}}, `which WithPeers does not list as a coordinator`, ""},
		{"not listed as a worker", verifying, forCoordinator, []Peer{{Name: coordinatorURI, Coordinator: true}}, `which WithPeers does not list for category "a"`, ""},
	} {
		t.Run(test.reason, func(t *testing.T) {
			ln := listenTCP(t)
			var worker []WorkerOption
			coordinator := []CoordinatorOption{
				WithWorkers("a", ln.Addr().String()), WithDialer((&tls.Dialer{Config: test.dialer}).DialContext),
			}
			if test.peers != nil {
				worker, coordinator = append(worker, WithPeers(test.peers...)), append(coordinator, WithPeers(test.peers...))
			}
			serveTest(t, tls.NewListener(ln, test.listener), nil, HandlerFunc(func(ctx context.Context, task Task) (string, error) {
				info, _ := TaskInfoFrom(ctx)
				return info.Coordinator, nil
			}), worker...)
			report, err := newTestCoordinator(t, coordinator...).Run(t.Context(), mustParse(t, "a1"))
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) || report.Results[0].Output != test.output {
				t.Errorf("got %v and %q, want %q and %q", err, report.Results[0].Output, test.want, test.output)
			}
			if ln.accepted.Load() != 1 {
				t.Errorf("dialed %d times", ln.accepted.Load())
			}
		})
	}
}

// A dialer that brings TLS sometimes has none for a list to look at.
func TestPeersNeedTLSOfTheirDialer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer server.Close()
		c := newTestCoordinator(t, WithPeers(thePeers...), WithWorkers("a", "w:1"),
			WithDialer(func(context.Context, string, string) (net.Conn, error) { return client, nil }))
		start := time.Now()
		if _, err := c.Run(t.Context(), mustParse(t, "a1")); err == nil || !strings.Contains(err.Error(), "add WithTLS") || time.Since(start) != 0 {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
	})
}

// seeming goes to another machine and looks like TLS, and does without it.
type seeming struct{ elsewhere }

func (seeming) HandshakeContext(context.Context) error { return nil }
func (seeming) ConnectionState() tls.ConnectionState   { return tls.ConnectionState{} }
func (seeming) CloseWrite() error                      { return nil }
func (c seeming) NetConn() net.Conn                    { return c.Conn }

// A type that wraps a *tls.Conn may also wrap what is none.
func TestAConnectionThatOnlyLooksLikeTLSIsPlaintext(t *testing.T) {
	for _, allowed := range []bool{false, true} {
		var both []Option
		if allowed {
			both = append(both, WithInsecure())
		}
		synctest.Test(t, func(t *testing.T) {
			worker := []WorkerOption{WithName("w")}
			for _, o := range both {
				worker = append(worker, o)
			}
			client, server := net.Pipe()
			defer client.Close()
			served := make(chan error, 1)
			go func() { served <- NewWorker(parrot, worker...).ServeConn(t.Context(), seeming{elsewhere{server}}) }()
			p := newPeer(t, client)
			p.send(helloA)
			if allowed {
				p.expect("WELCOME …")
				client.Close()
			} else {
				p.expect("ERROR refused insecure transport: …")
			}
			if err := <-served; (err == nil) != allowed {
				t.Errorf("allowed: %v: ServeConn returned %v", allowed, err)
			}
		})
		synctest.Test(t, func(t *testing.T) {
			client, server := net.Pipe()
			go func() {
				p := newPeer(t, server)
				if allowed {
					p.welcome()
					p.send("DONE " + p.task() + " 0")
				}
				p.expectEnd()
				server.Close()
			}()
			options := []CoordinatorOption{WithWorkers("a", "w:1"),
				WithDialer(func(context.Context, string, string) (net.Conn, error) { return seeming{elsewhere{client}}, nil })}
			for _, o := range both {
				options = append(options, o)
			}
			_, err := newTestCoordinator(t, options...).Run(t.Context(), mustParse(t, "a1"))
			if errors.Is(err, ErrInsecureTransport) == allowed || (err == nil) != allowed {
				t.Errorf("allowed: %v: Run returned %v", allowed, err)
			}
		})
	}
}

// A listener's own TLS may be tried by anybody.
func TestAHandshakeThatFailsOverAListenersTLSHarmsNobody(t *testing.T) {
	forWorker, forCoordinator := bothConfigs(t)
	ln := listenTCP(t)
	wt := serveTest(t, tls.NewListener(ln, forWorker), func() net.Conn {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		return conn
	}, parrot)
	p := wt.stranger()
	p.send(helloA)
	p.expect("ERROR protocol this worker expects TLS; the coordinator needs WithTLS")
	plain := wt.connect
	wt.connect = func() net.Conn { return tls.Client(plain(), forCoordinator) }
	wt.expectServing()
}

// A listener whose type does not say that it brings no TLS shows it by its first
// connection.
func TestPeersNeedTLSOfAnUnknownListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var network memNetwork
		ln := network.listen("w:1")
		served := make(chan error, 1)
		go func() { served <- NewWorker(parrot, WithPeers(thePeers...)).Serve(t.Context(), ln) }()
		conn, err := network.dial(t.Context(), "tcp", "w:1")
		if err != nil {
			t.Fatal(err)
		}
		newPeer(t, conn).expectEnd()
		synctest.Wait()
		select {
		case err := <-served:
			if !errors.Is(err, errPeersUnseen) {
				t.Errorf("Serve returned %v", err)
			}
		default:
			t.Error("it serves on, and nobody can get in")
			ln.Close()
			<-served
		}
	})
}

// A config's own checks come on top of those of this package.
func TestTLSConfigsOwnChecksCount(t *testing.T) {
	ca := newTestCA(t, "ours")
	names := []string{workerURI, coordinatorURI, "w.test"}
	both := func(change func(*tls.Config)) (worker, coordinator *tls.Config) {
		worker, coordinator = ca.config(ca.issue(nil, names...)), ca.config(ca.issue(nil, names...))
		change(worker)
		change(coordinator)
		return worker, coordinator
	}
	enough := errors.New("enough")
	for _, peers := range [][]Option{nil, {WithPeers(Peer{Name: "w.test", Coordinator: true, Categories: []string{"a"}})}} {
		for _, refuses := range []string{"nobody", "VerifyConnection", "VerifyPeerCertificate"} {
			refuse := refuses != "nobody"
			var connections, certificates atomic.Int32
			worker, coordinator := both(func(config *tls.Config) {
				config.VerifyConnection = func(state tls.ConnectionState) error {
					if len(state.VerifiedChains) == 0 {
						t.Error("VerifyConnection saw no verified chain")
					}
					connections.Add(1)
					return nil
				}
				config.VerifyPeerCertificate = func(raw [][]byte, chains [][]*x509.Certificate) error {
					if len(raw) == 0 || len(chains) == 0 {
						t.Error("VerifyPeerCertificate saw no verified chain")
					}
					certificates.Add(1)
					return nil
				}
			})
			switch refuses {
			case "VerifyConnection":
				coordinator.VerifyConnection = func(tls.ConnectionState) error { return enough }
			case "VerifyPeerCertificate":
				coordinator.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { return enough }
			}
			options := []WorkerOption{WithTLS(worker)}
			mine := []CoordinatorOption{WithTLS(coordinator), WithWorkers("a", "w.test:1")}
			for _, o := range peers {
				options, mine = append(options, o), append(mine, o)
			}
			dial, served := oneSession(t, options...)
			_, err := newTestCoordinator(t, append(mine, WithDialer(dial))...).Run(t.Context(), mustParse(t, "a1"))
			if errors.Is(err, enough) != refuse || err != nil && !refuse {
				t.Errorf("got %v", err)
			}
			if err := <-served; (err != nil) != refuse {
				t.Errorf("the worker says %v", err)
			}
			if n, m := connections.Load(), certificates.Load(); !refuse && (n != 2 || m != 2) {
				t.Errorf("with %d lists: VerifyConnection was called %d times, VerifyPeerCertificate %d times", len(peers), n, m)
			}
		}
	}
}

// With a list crypto/tls does not verify a worker's chain, and this package does.
func TestAChainIsVerifiedInTheSameWayWithAList(t *testing.T) {
	now := time.Now()
	valid := func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.Add(-time.Hour), now.Add(time.Hour) }
	root := &testCA{t: t, pool: x509.NewCertPool()}
	authority := func(by *testCA, name string) tls.Certificate {
		template := &x509.Certificate{
			Subject:               pkix.Name{CommonName: name},
			IsCA:                  true,
			BasicConstraintsValid: true,
			KeyUsage:              x509.KeyUsageCertSign,
		}
		valid(template)
		return by.sign(template)
	}
	root.cert = authority(root, "root").Leaf
	root.pool.AddCert(root.cert)
	below := authority(root, "below")
	ca := &testCA{t: t, cert: below.Leaf, key: below.PrivateKey.(*ecdsa.PrivateKey), pool: root.pool}
	issue := func(name string, whole bool) tls.Certificate {
		cert := ca.issue(valid, name)
		if whole {
			cert.Certificate = append(cert.Certificate, below.Certificate[0])
		}
		return cert
	}
	for _, list := range []bool{false, true} {
		for _, whole := range []bool{true, false} {
			forWorker, forCoordinator := ca.config(issue("w.test", whole)), ca.config(issue("c.test", true))
			forWorker.Time, forCoordinator.Time = nil, nil // the clock's
			worker := []WorkerOption{WithTLS(forWorker)}
			mine := []CoordinatorOption{WithTLS(forCoordinator), WithWorkers("a", "w.test:1")}
			if list {
				mine = append(mine, WithPeers(Peer{Name: "w.test", Categories: []string{"a"}}))
			}
			dial, served := oneSession(t, worker...)
			_, err := newTestCoordinator(t, append(mine, WithDialer(dial))...).Run(t.Context(), mustParse(t, "a1"))
			if (err == nil) != whole || err != nil && !strings.Contains(err.Error(), "certificate signed by unknown authority") {
				t.Errorf("with a list: %v, with the whole chain: %v: got %v", list, whole, err)
			}
			if err := <-served; (err == nil) != whole {
				t.Errorf("with a list: %v, with the whole chain: %v: the worker says %v", list, whole, err)
			}
		}
	}
}

func TestACertificateIsRefusedWhateverTheReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forWorker, forCoordinator := bothConfigs(t)
		forCoordinator.VerifyConnection = func(tls.ConnectionState) error {
			return fmt.Errorf("asking whether it is revoked: %w", context.Canceled)
		}
		cl := newCluster(t)
		cl.worker("a:1", echo, WithTLS(forWorker))
		c := cl.coordinator(WithTLS(forCoordinator), WithWorkers("a", "a:1"), WithWorkerWait(time.Hour))
		report, err := c.Run(t.Context(), mustParse(t, "a1"))
		if err == nil || !strings.Contains(err.Error(), "revoked") || report.Elapsed > 0 {
			t.Errorf("after %v: got %v, want the refusal at once", report.Elapsed, err)
		}
	})
}

// A worker that cannot get at its certificate yet is waited for, as one that
// cannot be reached is.
func TestAWorkerWhoseCertificateIsNotThereYetIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forWorker, forCoordinator := bothConfigs(t)
		cert := forWorker.Certificates[0]
		forWorker.Certificates = nil
		ready := time.Now().Add(10 * time.Second)
		forWorker.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if time.Now().Before(ready) {
				return nil, errors.New("not there yet")
			}
			return &cert, nil
		}
		cl := newCluster(t)
		cl.worker("a:1", echo, WithTLS(forWorker))
		for _, wait := range []time.Duration{time.Second, time.Minute} {
			_, err := cl.coordinator(WithTLS(forCoordinator), WithWorkers("a", "a:1"), WithWorkerWait(wait)).Run(t.Context(), mustParse(t, "a1"))
			if patient := wait == time.Minute; (err == nil) != patient || err != nil && !strings.Contains(err.Error(), "not reached within 1s: the other side refused the TLS handshake: tls: internal error") {
				t.Errorf("after a wait of %v: %v", wait, err)
			}
		}
	})
}

// A config that a worker's config gives for a connection is held to the same,
// and one that was handed over cannot be changed any more.
func TestTLSConfigsCannotBeSoftened(t *testing.T) {
	ca, stranger := newTestCA(t, "ours"), newTestCA(t, "theirs")
	cert := ca.issue(nil, workerURI)
	soft := ca.config(cert)
	soft.ClientAuth = tls.NoClientCert
	soft.MinVersion = tls.VersionTLS12
	handedOver := soft.Clone()
	option := WithTLS(handedOver)
	handedOver.ClientCAs = stranger.pool
	handedOver.Certificates = nil
	byConnection := soft.Clone()
	byConnection.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return soft, nil }
	bad := ca.config(cert)
	bad.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return new(tls.Config), nil }
	mine := ca.config(ca.issue(nil, coordinatorURI))
	mine.InsecureSkipVerify = true // this peer is a test
	mine.ClientSessionCache = tls.NewLRUClientSessionCache(10)
	for _, test := range []struct {
		reason string
		option Option
		fine   bool
	}{
		{"changed later", option, true},
		{"another for each connection", WithTLS(byConnection), true},
		{"one that is no good for each connection", WithTLS(bad), false},
	} {
		t.Run(test.reason, func(t *testing.T) {
			ln := listenTCP(t)
			serveTest(t, ln, nil, parrot, test.option, WithPeers(thePeers...))
			try := func(change func(*tls.Config)) (resumed bool, err error) {
				config := mine.Clone()
				change(config)
				conn, err := tls.Dial("tcp", ln.Addr().String(), config)
				if err != nil {
					return false, err
				}
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(20 * time.Second))
				if _, err = io.WriteString(conn, helloA+"\n"); err == nil {
					_, err = conn.Read(make([]byte, 100))
				}
				return conn.ConnectionState().DidResume, err
			}
			for range 3 {
				if resumed, err := try(func(*tls.Config) {}); (err == nil) != test.fine || resumed {
					t.Errorf("the right coordinator: %v, with a session resumed: %v", err, resumed)
				}
			}
			for reason, change := range map[string]func(*tls.Config){
				"TLS 1.2":        func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
				"no certificate": func(c *tls.Config) { c.Certificates = nil },
				"another's":      func(c *tls.Config) { c.Certificates = []tls.Certificate{ca.issue(nil, "other.test")} },
			} {
				if _, err := try(change); err == nil || alertOf(err) == nil {
					t.Errorf("%s: got %v, want an alert", reason, err)
				}
			}
		})
	}
}
