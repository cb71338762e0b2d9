package taskexec

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// lineOf is a line of each verb that is right by the grammar. Task 1 is the one
// that runs in these tests.
var lineOf = [...]string{
	verbHello: helloA, verbWelcome: "WELCOME taskexec/1 {}",
	verbRun: "RUN 9 1 0 x", verbRecall: "RECALL 1", verbCancel: "CANCEL enough", verbPing: "PING 7", verbPong: "PONG 7", verbShutdown: "SHUTDOWN",
	verbDone: "DONE 1 0 x", verbReturn: "RETURN 1", verbFail: "FAIL 1 error 0 x", verbDrain: "DRAIN", verbGoodbye: "GOODBYE so long", verbError: "ERROR odd x",
}

// whoMaySayWhat reads a table of docs/protocol.md whose states these are: for
// each state and verb the code of the ERROR that answers it, "" if it is taken.
func whoMaySayWhat(t *testing.T, states ...string) map[string]map[verb]string {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join("docs", "protocol.md"))
	if err != nil {
		t.Fatal(err)
	}
	cells := func(line string) []string {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		return cells
	}
	table := make(map[string]map[verb]string)
	for _, state := range states {
		table[state] = make(map[verb]string)
	}
	inside := false
	for line := range strings.Lines(string(doc)) {
		row := cells(line)
		switch {
		case strings.Join(row, " ") == "line "+strings.Join(states, " "):
			inside = true
			continue
		case !inside || strings.HasPrefix(row[0], "---"):
			continue
		case len(row) != 1+len(states):
			inside = false
			continue
		}
		var verbs []verb
		for word := range strings.SplitSeq(row[0], ", ") {
			if v := parseVerb([]byte(word)); v != verbNone {
				verbs = append(verbs, v)
			}
		}
		if row[0] == "any other verb" {
			for v := verbHello; v <= verbError; v++ {
				if _, named := table[states[0]][v]; !named {
					verbs = append(verbs, v)
				}
			}
		}
		for i, state := range states {
			code := ""
			if rest, ok := strings.CutPrefix(row[1+i], "`ERROR "); ok {
				code, _, _ = strings.Cut(rest, "`")
			}
			for _, v := range verbs {
				table[state][v] = code
			}
		}
	}
	for _, state := range states {
		if n, all := len(table[state]), int(verbError-verbNone); n != all {
			t.Fatalf("docs/protocol.md says of %d verbs what comes of them in a session that is %s, want %d", n, state, all)
		}
	}
	return table
}

func documentedForWorkers(t *testing.T) map[string]map[verb]string {
	return whoMaySayWhat(t, "new", "ready", "returning")
}

func documentedForCoordinators(t *testing.T) map[string]map[verb]string {
	return whoMaySayWhat(t, "greeting", "ready", "asking")
}

func TestRulesAreThoseOfTheDocument(t *testing.T) {
	for _, c := range []struct {
		by         role
		documented map[string]map[verb]string
		states     map[string]sessionState
	}{
		{coordinatorRole, documentedForWorkers(t), map[string]sessionState{"new": sessionNew, "ready": sessionReady, "returning": sessionReturns}},
		{workerRole, documentedForCoordinators(t), map[string]sessionState{"greeting": sessionNew, "ready": sessionReady, "asking": sessionReturns}},
	} {
		for name, state := range c.states {
			for v, want := range c.documented[name] {
				got := ""
				if rules[c.by][state][v] != taken {
					got = misplaced(c.by, state, v).Code
				}
				if got != want {
					t.Errorf("%v in a session that is %s gets the code %q, and %q by the document", v, name, got, want)
				}
			}
		}
		if rules[c.by][sessionNew][verbNone] != refused || rules[c.by][sessionReady][verbNone] != refused {
			t.Error("what is no verb is not refused")
		}
	}
}

// expectAnswer says line, and then PING: it is answered by an ERROR of that
// code and the end; or, if the code is "", by anything else before the PONG, or
// before the end, if ends.
func (p *peer) expectAnswer(line, code string, ends bool) {
	p.t.Helper()
	go io.WriteString(p.conn, line+"\nPING 99\n") // which may find the connection closed
	for {
		answer, err := p.in.ReadString('\n')
		switch {
		case err != nil:
			if code != "" || !ends {
				p.t.Errorf("the session ended with %v", err)
			}
			return
		case strings.HasPrefix(answer, "ERROR "):
			if got := strings.Fields(answer)[1]; got != code {
				p.t.Errorf("got %q, want the code %q", answer, code)
			}
			p.expectEnd()
			return
		case answer == "PONG 99\n":
			if code != "" || ends {
				p.t.Errorf("the session goes on, want the code %q", code)
			}
			return
		}
	}
}

// Every verb in every state of a worker's session is taken or refused as the
// document says; and what is refused harms nobody else.
func TestAWorkerRefusesWhatTheDocumentDoesNotName(t *testing.T) {
	documented := documentedForWorkers(t)
	running := func(wt *workerTest, g *gate) *peer {
		p := wt.session()
		p.send(runs(1, 2)...)
		g.expectStarted(t, "i1")
		return p
	}
	for _, state := range []struct {
		name  string
		as    string // of the document
		reach func(wt *workerTest, g *gate) *peer
	}{
		{"new", "new", func(wt *workerTest, _ *gate) *peer { return wt.stranger() }},
		{"ready", "ready", running},
		{"canceled", "returning", func(wt *workerTest, g *gate) *peer {
			p := running(wt, g)
			p.send("CANCEL stop")
			p.expect("RETURN 2")
			return p
		}},
		{"drained", "returning", func(wt *workerTest, g *gate) *peer {
			p := running(wt, g)
			wt.worker.drain()
			p.expect("DRAIN", "RETURN 2")
			return p
		}},
	} {
		for v := verbHello; v <= verbError; v++ {
			t.Run(fmt.Sprint(state.name, " ", v), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := newGate()
					wt := startWorker(t, deaf(g))
					p := state.reach(wt, g)
					code := documented[state.as][v]
					p.expectAnswer(lineOf[v], code, v == verbError)
					if state.name == "drained" != wt.worker.isDraining() && v != verbShutdown {
						t.Error("it had the worker shut down")
					}
					if !wt.worker.isDraining() {
						wt.session().expectAnswer("PING 98", "", false)
					}
					close(g.release)
				})
			})
		}
	}
}

// After GOODBYE a worker reads, so that nothing is lost that it has written,
// and takes nothing of what it reads for a message.
func TestAWorkerIgnoresWhatComesAfterGoodbye(t *testing.T) {
	for v := verbHello; v <= verbError; v++ {
		t.Run(v.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				defer client.Close()
				returned := make(chan error, 1)
				go func() { returned <- NewWorker(parrot).ServeConn(t.Context(), &halfConn{Conn: server}) }()
				p := newPeer(t, client)
				p.send(helloA)
				p.expect("WELCOME …")
				p.send("SHUTDOWN")
				p.expect("DRAIN", "GOODBYE …")
				synctest.Wait()
				p.send(lineOf[v])
				p.expectEnd()
				if err := <-returned; err != nil {
					t.Errorf("ServeConn returned %v", err)
				}
			})
		})
	}
}

// Nor does it cut off what the worker still has to say: a coordinator may take
// its time to read reports, and have sent something before it saw GOODBYE.
func TestWhatComesAfterGoodbyeCutsNoReportOff(t *testing.T) {
	for v := verbHello; v <= verbError; v++ {
		t.Run(v.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, output := saidGoodbyeBehindALongReport(t)
				p.send(lineOf[v])
				time.Sleep(5 * time.Second)
				p.expectReports("DONE 0 "+output, "DRAIN", "GOODBYE …")
				p.expectEnd()
			})
		})
	}
}

// A line that is none leaves the coordinator a second to read what was written,
// and takes nothing of it away.
func TestAFaultAfterGoodbyeTakesNoReportAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, output := saidGoodbyeBehindALongReport(t)
		p.send("NONSENSE")
		time.Sleep(time.Second / 2)
		p.expectReports("DONE 0 "+output, "DRAIN", "GOODBYE …")
		p.expectEnd()
	})
}

// saidGoodbyeBehindALongReport is a session whose coordinator has not read yet
// what was reported before GOODBYE, a DONE with this output.
func saidGoodbyeBehindALongReport(t *testing.T) (p *peer, output string) {
	output = strings.Repeat("x", 300<<10)
	wt := startWorker(t, HandlerFunc(func(context.Context, Task) (string, error) { return output, nil }))
	p = wt.session()
	p.send("RUN 0 1 0 x")
	synctest.Wait()
	wt.worker.drain()
	synctest.Wait()
	return p, output
}

func TestACoordinatorRefusesWhatTheDocumentDoesNotName(t *testing.T) {
	documented := documentedForCoordinators(t)
	running := func(p *peer) {
		p.expect("HELLO …")
		p.send(`WELCOME taskexec/1 {"slots":2}`)
		p.expect("RUN 0 …", "RUN 1 …")
	}
	for _, state := range []struct {
		name  string
		as    string // of the document
		reach func(p *peer, c *Coordinator, cancel func())
	}{
		{"greeting", "greeting", func(p *peer, _ *Coordinator, _ func()) { p.expect("HELLO …") }},
		{"ready", "ready", func(p *peer, _ *Coordinator, _ func()) { running(p) }},
		{"told of DRAIN", "asking", func(p *peer, _ *Coordinator, _ func()) {
			running(p)
			p.send("DRAIN")
		}},
		{"after RECALL", "asking", func(p *peer, c *Coordinator, _ func()) {
			running(p)
			go c.Shutdown(context.Background())
			p.expect("RECALL …", "RECALL …")
		}},
		{"after CANCEL", "asking", func(p *peer, _ *Coordinator, cancel func()) {
			running(p)
			cancel()
			p.expect("CANCEL …")
		}},
	} {
		for v := verbHello; v <= verbError; v++ {
			t.Run(fmt.Sprint(state.name, " ", v), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					cl := newCluster(t)
					code := documented[state.as][v]
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					var c *Coordinator
					cl.script("a:1", func(p *peer) {
						state.reach(p, c, cancel)
						p.expectAnswer(lineOf[v], code, v == verbError || v == verbGoodbye)
					})
					c = cl.coordinator(WithWorkers("a", "a:1"))
					tasks := tasksOf("a", 2)
					report, err := c.Run(ctx, tasks)
					checkReport(t, tasks, report, err)
					if err == nil {
						t.Error("the run succeeded")
					}
					if canceled := state.name == "after CANCEL" || state.name == "after RECALL"; code != "" && !canceled && !strings.Contains(err.Error(), "("+code+")") {
						t.Errorf("the error does not say %q: %v", code, err)
					}
				})
			})
		}
	}
}

// elsewhere is a connection that says it goes to another machine.
type elsewhere struct{ net.Conn }

func (elsewhere) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 8001} }
func (elsewhere) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 8001} }

// secured says what TLS has verified.
type secured struct {
	elsewhere
	state tls.ConnectionState
}

func (c secured) ConnectionState() tls.ConnectionState { return c.state }

func TestShutdownIsTakenFromThoseWhoMay(t *testing.T) {
	verified := tls.ConnectionState{HandshakeComplete: true, VerifiedChains: [][]*x509.Certificate{{}}}
	anonymous := tls.ConnectionState{HandshakeComplete: true}
	from := map[string]func(net.Conn) net.Conn{
		"in memory":                   func(c net.Conn) net.Conn { return c },
		"elsewhere":                   func(c net.Conn) net.Conn { return elsewhere{c} },
		"elsewhere, with TLS":         func(c net.Conn) net.Conn { return secured{elsewhere{c}, verified} },
		"elsewhere, with TLS, nobody": func(c net.Conn) net.Conn { return secured{elsewhere{c}, anonymous} },
	}
	for _, c := range []struct {
		opts  []WorkerOption
		from  string
		taken bool
	}{
		{nil, "in memory", true},
		{nil, "elsewhere", false},
		{nil, "elsewhere, with TLS", true},
		{nil, "elsewhere, with TLS, nobody", false},
		{[]WorkerOption{WithRemoteShutdown(FromTrusted)}, "elsewhere", false},
		{[]WorkerOption{WithRemoteShutdown(FromAnyone)}, "in memory", true},
		{[]WorkerOption{WithRemoteShutdown(FromAnyone)}, "elsewhere", true},
		{[]WorkerOption{WithRemoteShutdown(FromAnyone)}, "elsewhere, with TLS, nobody", true},
		{[]WorkerOption{WithRemoteShutdown(FromNobody)}, "in memory", false},
		{[]WorkerOption{WithRemoteShutdown(FromNobody)}, "elsewhere, with TLS", false},
	} {
		synctest.Test(t, func(t *testing.T) {
			g := newGate()
			wt := startWorker(t, g, append(c.opts, WithInsecure())...) // plaintext from elsewhere is taken for the sake of this
			bystander := wt.session()
			bystander.send("RUN 1 1 0 x")
			g.expectStarted(t, "x")
			here, there := net.Pipe()
			served := make(chan error, 1)
			go func() { served <- wt.worker.ServeConn(t.Context(), from[c.from](there)) }()
			p := newPeer(t, here)
			p.send(helloA)
			p.expect("WELCOME …")
			p.send("SHUTDOWN")
			if c.taken {
				bystander.expect("DRAIN")
				p.expect("DRAIN", "GOODBYE …")
			} else {
				p.expect("ERROR refused …")
			}
			p.expectEnd()
			here.Close()
			var fault *ProtocolError
			if err := <-served; c.taken != (err == nil) || !c.taken && (!errors.As(err, &fault) || fault.Code != codeRefused) {
				t.Errorf("%v from %s: ServeConn returned %v", c.opts, c.from, err)
			}
			g.release <- struct{}{}
			bystander.expectReports("DONE 1 x")
			if !c.taken {
				g.release <- struct{}{}
				wt.expectServing()
			}
		})
	}
}

// The run that may not shut its workers down says so, and is otherwise what it
// was.
func TestARefusedShutdownIsInTheRunsError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newCluster(t)
		w := cl.worker("a:1", echo, WithRemoteShutdown(FromNobody))
		c := cl.coordinator(WithWorkers("a", "a:1"), WithWorkerShutdown())
		for range 2 {
			tasks := tasksOf("a", 3)
			report, err := c.Run(t.Context(), tasks)
			checkReport(t, tasks, report, err)
			var refusal *ProtocolError
			if report.Counts.Done != 3 || !errors.As(err, &refusal) || refusal.Code != codeRefused || !refusal.Remote || !strings.Contains(err.Error(), "no goodbye") {
				t.Errorf("%d are done, and %v", report.Counts.Done, err)
			}
			if report.Elapsed > time.Second {
				t.Errorf("it took %v", report.Elapsed)
			}
		}
		if w.isDraining() {
			t.Error("the worker shuts down")
		}
	})
}

func TestRemoteShutdownHasNames(t *testing.T) {
	for p, want := range map[RemoteShutdown]string{FromTrusted: "FromTrusted", FromAnyone: "FromAnyone", FromNobody: "FromNobody", 7: "RemoteShutdown(7)"} {
		if got := p.String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
