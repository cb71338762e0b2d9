package taskexec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// most is how long the text of an error may be: that of a message for people, and
// names around it.
const most = 2 * maxFailText

func TestErrorsEscapeAndShortenWhatTheyTell(t *testing.T) {
	for _, tt := range nasty {
		s := tt.text
		foreign := errors.New(s) // of a certificate, say
		task := Task{Category: s, Instruction: s}
		for _, err := range []error{
			&ProtocolError{Code: s, Text: s}, &ProtocolError{Code: s, Text: s, Remote: true},
			&RemoteError{Kind: KindError, Text: s}, &RemoteError{Kind: KindFinal, Text: s}, &RemoteError{Kind: KindPanic, Text: s}, &RemoteError{Kind: s, Text: s},
			&TaskError{Task: task, Worker: s, Attempt: 1, Outcome: Failed, Err: &RemoteError{Kind: KindError, Text: s}},
			&WorkerError{Category: s, Addr: s, Err: foreign}, &WorkerError{Category: s, Addr: s, Worker: s, Err: &ProtocolError{Code: s, Text: s}},
			&RunError{Err: &TaskError{Task: task, Worker: s, Attempt: 1, Outcome: Failed, Err: &RemoteError{Kind: KindError, Text: s}}},
			&RunError{Err: &WorkerError{Category: s, Addr: s, Worker: s, Err: foreign}},
			&sessionError{s, foreign}, &servingError{s, foreign}, &canceledError{s}, &handshakeError{text: s},
		} {
			harmless(t, err.Error(), most)
		}
	}
}

func expectHarmlessLog(t *testing.T, log *logRecorder) {
	t.Helper()
	if len(log.all()) == 0 {
		t.Error("nothing is logged")
	}
	for _, record := range log.all() {
		for _, a := range record.attrs {
			limit := 4*maxLogged + len(cutMark)
			if record.text == "why the run ended" {
				limit = maxFailText
			}
			harmless(t, a.Value.String(), limit)
		}
	}
}

// lineFor is the line of m, without its newline.
func lineFor(m message) string {
	return strings.TrimSuffix(string(appendMessage(nil, m)), "\n")
}

// greetingWith is a greeting with s where names stand, if they may hold it.
func greetingWith(v verb, s, otherwise string, fields ...string) string {
	if !validName(s) {
		s = otherwise
	}
	object := make(map[string]any)
	for _, f := range fields {
		object[f] = s
		if f == "categories" {
			object[f] = []string{s, s}
		}
	}
	text, _ := json.Marshal(object)
	return lineFor(message{verb: v, word: protocolVersion, text: string(text)})
}

// What a worker says reaches errors and logs escaped and shortened, wherever it
// stands.
func TestWhatAWorkerSaysIsHarmlessToACoordinator(t *testing.T) {
	for name, play := range map[string]func(p *peer, s string){
		"its name": func(p *peer, s string) {
			p.send(greetingWith(verbWelcome, s, "w", "worker", "instance"))
			p.expect("RUN …")
			p.send("FAIL 0 error 0 x")
		},
		"its categories": func(p *peer, s string) { p.send(greetingWith(verbWelcome, s, "w", "worker", "categories")) },
		"a bad greeting": func(p *peer, s string) { p.send("WELCOME " + s) },
		"a bad object":   func(p *peer, s string) { p.send("WELCOME taskexec/1 {" + s) },
		"an object of another kind": func(p *peer, s string) {
			text, _ := json.Marshal(map[string]any{"slots": s})
			p.send("WELCOME taskexec/1 " + string(text))
		},
		"garbage instead of a greeting": func(p *peer, s string) { p.send(s) },
		"ERROR instead of a greeting": func(p *peer, s string) {
			p.send(lineFor(message{verb: verbError, word: "odd", text: cut(s, maxFailText/2)}))
		},
		"a failure": func(p *peer, s string) {
			p.send(greetingWith(verbWelcome, s, "w", "worker"))
			p.expect("RUN …")
			p.send(lineFor(message{verb: verbFail, word: KindError, text: s}))
		},
		"a panic": func(p *peer, s string) {
			p.send("WELCOME taskexec/1 {}")
			p.expect("RUN …")
			p.send(lineFor(message{verb: verbFail, word: KindPanic, text: s}))
		},
		"ERROR": func(p *peer, s string) {
			p.send(greetingWith(verbWelcome, s, "w", "worker"))
			p.expect("RUN …")
			p.send(lineFor(message{verb: verbError, word: "odd", text: s}))
		},
		"garbage": func(p *peer, s string) {
			p.send("WELCOME taskexec/1 {}")
			p.expect("RUN …")
			p.send(s)
		},
		"an unknown kind": func(p *peer, s string) {
			p.send("WELCOME taskexec/1 {}")
			p.expect("RUN …")
			p.send("FAIL 0 " + s)
		},
		"its goodbye": func(p *peer, s string) {
			p.send(greetingWith(verbWelcome, s, "w", "worker"))
			p.expect("RUN …")
			p.send(lineFor(message{verb: verbFail, word: KindError, text: s}))
			p.expect("SHUTDOWN")
			p.send(lineFor(message{verb: verbGoodbye, text: s}))
		},
		"no goodbye": func(p *peer, s string) {
			p.send(greetingWith(verbWelcome, s, "w", "worker"))
			p.expect("RUN …")
			p.send(lineFor(message{verb: verbFail, word: KindError, text: s}))
			p.expect("SHUTDOWN")
			p.send(lineFor(message{verb: verbError, word: codeRefused, text: s}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, tt := range nasty {
				s := tt.text
				synctest.Test(t, func(t *testing.T) {
					here, there := net.Pipe()
					log := newLogRecorder(slog.LevelDebug)
					dialed := false
					c, err := NewCoordinator(WithWorkers("a", "a:1"), WithWorkerWait(0), WithWorkerShutdown(), WithLogger(slog.New(log)),
						WithDialer(func(context.Context, string, string) (net.Conn, error) {
							if dialed {
								return nil, errors.New(s)
							}
							dialed = true
							return here, nil
						}))
					if err != nil {
						t.Fatal(err)
					}
					go func() {
						quiet := newPeer(silentTB{t}, there) // what it says may be cut off by an ERROR
						quiet.expect("HELLO …")
						play(quiet, s)
						quiet.hangUp()
					}()
					report, err := c.Run(t.Context(), []Task{{Category: "a", Instruction: s}})
					if err == nil {
						t.Fatalf("the run succeeded, of %.20q", s)
					}
					// Joined errors have a line each.
					for line := range strings.SplitSeq(err.Error(), "\n") {
						harmless(t, line, most)
					}
					for line := range strings.SplitSeq(report.Results[0].Err.Error(), "\n") {
						harmless(t, line, most)
					}
					expectHarmlessLog(t, log)
				})
			}
		})
	}
}

// hangUp closes the connection when the other side does, or after a minute.
func (p *peer) hangUp() {
	p.conn.SetReadDeadline(time.Now().Add(time.Minute))
	io.Copy(io.Discard, p.in)
	p.conn.Close()
}

// silentTB is a test that does not fail when its peer is cut off.
type silentTB struct{ testing.TB }

func (silentTB) Errorf(string, ...any) {}

func TestWhatACoordinatorSaysIsHarmlessToAWorker(t *testing.T) {
	for name, play := range map[string]func(p *peer, s string){
		"its greeting": func(p *peer, s string) {
			p.send(greetingWith(verbHello, s, "a", "run", "category"))
			p.expect("WELCOME …")
			p.send("NONSENSE")
		},
		"a bad greeting": func(p *peer, s string) { p.send("HELLO " + s) },
		"a bad category": func(p *peer, s string) {
			p.send(lineFor(message{verb: verbHello, word: protocolVersion, text: fmt.Sprintf(`{"category":%q}`, s)}))
			p.next() // some are not bad
			p.send("NONSENSE")
		},
		"garbage instead of a greeting": func(p *peer, s string) { p.send(s) },
		"garbage": func(p *peer, s string) {
			p.send(helloA)
			p.expect("WELCOME …")
			p.send(s)
		},
		"ERROR": func(p *peer, s string) {
			p.send(helloA)
			p.expect("WELCOME …")
			p.send(lineFor(message{verb: verbError, word: "odd", text: s}))
		},
		"an instruction, and a cause": func(p *peer, s string) {
			p.send(helloA)
			p.expect("WELCOME …")
			p.send(lineFor(message{verb: verbRun, attempt: 1, text: s}))
			synctest.Wait()
			p.send(lineFor(message{verb: verbCancel, text: s}))
			p.next()
			p.send("NONSENSE")
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, tt := range nasty {
				s := tt.text
				synctest.Test(t, func(t *testing.T) {
					here, there := net.Pipe()
					log := newLogRecorder(slog.LevelDebug)
					w := NewWorker(HandlerFunc(func(ctx context.Context, task Task) (string, error) {
						<-ctx.Done()
						over, cancel := context.WithCancel(context.Background())
						cancel()
						harmless(t, workerOf(ctx).Shutdown(over).Error(), most)
						harmless(t, context.Cause(ctx).Error(), most)
						return "", errors.New(task.Instruction)
					}), WithLogger(slog.New(log)))
					served := make(chan error, 1)
					go func() { served <- w.ServeConn(t.Context(), there) }()
					quiet := newPeer(silentTB{t}, here)
					go func() {
						play(quiet, s)
						quiet.hangUp()
					}()
					err := <-served
					if err == nil && name != "an instruction, and a cause" {
						t.Fatalf("ServeConn returned nil, of %.20q", s)
					}
					if err != nil {
						harmless(t, err.Error(), most)
					}
					expectHarmlessLog(t, log)
				})
			}
		})
	}
}

// workerOf is the worker whose handler has that ctx.
func workerOf(ctx context.Context) *Worker {
	return ctx.Value(taskInfoKey{}).(*jobContext).session.worker
}
