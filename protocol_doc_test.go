package taskexec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The transcripts and the worker of docs/protocol.md are taken out of the
// document and played, so that it cannot say what is not so.

// codeBlocks returns the blocks of the document that begin with ```info.
func codeBlocks(t testing.TB, info string) []string {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join("docs", "protocol.md"))
	if err != nil {
		t.Fatal(err)
	}
	var blocks []string
	text := strings.ReplaceAll(string(doc), "\r\n", "\n")
	for _, m := range regexp.MustCompile("(?ms)^```"+info+"\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, m[1])
	}
	if len(blocks) == 0 {
		t.Fatalf("docs/protocol.md has no block of %s", info)
	}
	return blocks
}

// A said line of a transcript.
type said struct {
	by   string // "C" or "W"
	line string
}

func transcripts(t testing.TB, info string) [][]said {
	t.Helper()
	var all [][]said
	for _, block := range codeBlocks(t, "transcript "+info) {
		var lines []said
		for line := range strings.Lines(block) {
			line = strings.TrimSuffix(line, "\n")
			by, rest, ok := strings.Cut(line, ": ")
			switch {
			case ok && (by == "C" || by == "W"):
				lines = append(lines, said{by, rest})
			case !strings.HasPrefix(line, "   "):
				t.Errorf("a transcript has the line %q, neither said nor a remark", line)
			}
		}
		all = append(all, lines)
	}
	return all
}

// comparable is line without what differs from session to session.
func comparable(t *testing.T, line string) any {
	t.Helper()
	m, err := parseMessage(line)
	if err != nil {
		t.Errorf("%q: %v", line, err)
		return line
	}
	if m.verb != verbHello && m.verb != verbWelcome {
		return line
	}
	object := make(map[string]any)
	if err := json.Unmarshal([]byte(m.text), &object); err != nil {
		t.Errorf("%q: %v", line, err)
	}
	for _, random := range []string{"run", "instance"} {
		if v, ok := object[random]; ok && v != "" {
			object[random] = "some"
		}
	}
	return []any{m.verb.String(), m.word, object}
}

// expectSaid reads a line and compares it with that of a transcript.
func expectSaid(t *testing.T, p *peer, want said) {
	t.Helper()
	got := p.next()
	if diff := cmp.Diff(comparable(t, want.line), comparable(t, got)); diff != "" {
		t.Errorf("got the line %q, want %q (-want +got):\n%s", got, want.line, diff)
	}
}

func TestDocumentedTranscriptsHoldForAWorker(t *testing.T) {
	handler := HandlerFunc(func(ctx context.Context, task Task) (string, error) {
		switch task.Instruction {
		case "stop when told":
			<-ctx.Done()
			time.Sleep(time.Millisecond)
			return "", fmt.Errorf("stopped halfway: %w", ctx.Err())
		case "a2\nof two lines":
			return "", errors.New("out of paper\nin tray 2")
		}
		time.Sleep(1500 * time.Microsecond)
		return task.Instruction + " completed", nil
	})
	for i, transcript := range append(transcripts(t, "both"), transcripts(t, "worker")...) {
		t.Run(fmt.Sprint(i, " ", transcript[len(transcript)-1].line), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				here, there := net.Pipe()
				w := NewWorker(handler, WithName("w1"), WithCategories("a"))
				served := make(chan error, 1)
				go func() { served <- w.ServeConn(t.Context(), here) }()
				p := newPeer(t, there)
				ends := false
				for _, s := range transcript {
					if s.by == "C" {
						p.send(s.line)
						synctest.Wait() // a task that CANCEL finds started is one whose handler runs
						continue
					}
					expectSaid(t, p, s)
					ends = strings.HasPrefix(s.line, "GOODBYE") || strings.HasPrefix(s.line, "ERROR")
				}
				if ends {
					p.expectEnd()
				}
				there.Close()
				err := <-served
				if faulty := strings.HasPrefix(transcript[len(transcript)-1].line, "ERROR"); (err != nil) != faulty {
					t.Errorf("ServeConn returned %v", err)
				}
			})
		})
	}
}

func TestDocumentedTranscriptsHoldForACoordinator(t *testing.T) {
	for i, transcript := range append(transcripts(t, "both"), transcripts(t, "coordinator")...) {
		t.Run(fmt.Sprint(i, " ", transcript[len(transcript)-1].line), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { playWorker(t, transcript) })
		})
	}
}

// playWorker plays the worker's part of a transcript to a coordinator that is
// given the tasks of its RUN lines.
func playWorker(t *testing.T, transcript []said) {
	var tasks []Task
	var want []Outcome
	shutdown := false
	for _, s := range transcript {
		m, err := parseMessage(s.line)
		if err != nil {
			t.Fatalf("%q: %v", s.line, err)
		}
		switch {
		case m.verb == verbRun:
			tasks = append(tasks, Task{Category: "a", Instruction: m.text})
			want = append(want, Skipped)
		case m.verb == verbShutdown:
			shutdown = true
		case s.by != "W" || m.task >= len(want):
		case m.verb == verbDone:
			want[m.task] = Done
		case m.verb == verbFail && m.word == KindCanceled:
			want[m.task] = Canceled
		case m.verb == verbFail:
			want[m.task] = Failed
		}
	}
	last := transcript[len(transcript)-1]
	if strings.HasPrefix(last.line, "ERROR") { // the session is lost, and so is what it held
		for i := range want {
			want[i] = Unknown
		}
	}

	here, there := net.Pipe()
	opts := []CoordinatorOption{
		WithWorkers("a", "worker:1"),
		WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) { return here, nil }),
		withLeastWindow(3), // as if it had been seen that more than the slots hide the round trip
	}
	if shutdown {
		opts = append(opts, WithWorkerShutdown())
	}
	c, err := NewCoordinator(opts...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	reports := make(chan *Report, 1)
	go func() {
		report, _ := c.Run(ctx, tasks)
		reports <- report
	}()
	p := newPeer(t, there)
	for _, s := range transcript {
		if s.by == "W" {
			p.send(s.line)
			continue
		}
		if strings.HasPrefix(s.line, "CANCEL") {
			synctest.Wait()
			cancel(errors.New("the user pressed Ctrl-C"))
		}
		expectSaid(t, p, s)
	}
	p.expectEnd()
	there.Close()
	report := <-reports
	var got []Outcome
	for _, r := range report.Results {
		got = append(got, r.Outcome)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("outcomes (-want +got):\n%s", diff)
	}
}

// The worker of the document is run as it stands there, by bash, in a
// process of its own, under a real coordinator.
func TestDocumentedWorkerWorks(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash here to run the worker with")
	}
	blocks := codeBlocks(t, "bash")
	if len(blocks) != 1 {
		t.Fatalf("docs/protocol.md has %d blocks of bash, want the worker alone", len(blocks))
	}
	if n := strings.Count(blocks[0], "\n"); n > 12 {
		t.Errorf("the worker of about ten lines has %d", n)
	}
	script := filepath.Join(t.TempDir(), "worker.sh")
	if err := os.WriteFile(script, []byte(blocks[0]), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ended := make(chan error, 1)
	start := func() (net.Conn, error) {
		here, there := net.Pipe()
		worker := exec.CommandContext(ctx, bash, script)
		worker.Stdin, worker.Stdout, worker.Stderr = there, there, os.Stderr
		worker.WaitDelay = time.Second // for one that ends before its input does
		if err := worker.Start(); err != nil {
			return nil, err
		}
		go func() {
			err := worker.Wait()
			there.Close()
			ended <- err
		}()
		here.SetDeadline(time.Now().Add(30 * time.Second))
		return here, nil
	}
	c, err := NewCoordinator(
		WithWorkers("a", "worker.sh:1"),
		WithWorkerShutdown(),
		WithObserver(Observer{Goodbye: func(info GoodbyeInfo) {
			if info.Text != "so long" {
				t.Errorf("the worker's goodbye is %q", info.Text)
			}
		}}),
		WithDialer(func(context.Context, string, string) (net.Conn, error) {
			return start()
		}),
	)
	if err != nil {
		t.Fatal(err)
	}
	tasks := []Task{{Instruction: "a", Category: "a"}, {Category: "a"}, {Instruction: "a line\nand \\n * $HOME `ls`", Category: "a"}}
	for i := range 20 {
		tasks = append(tasks, Task{Instruction: fmt.Sprint("a", i), Category: "a"})
	}
	report, err := c.Run(ctx, tasks)
	if err != nil {
		t.Error(err)
	}
	for i, r := range report.Results {
		if want := "did " + tasks[i].Instruction; r.Outcome != Done || r.Output != want {
			t.Errorf("task %d is %v with %q, want %q", i, r.Outcome, r.Output, want)
		}
	}
	if err := <-ended; err != nil {
		t.Errorf("the worker ended with %v", err)
	}

	// And what this coordinator has no reason to send.
	conn, err := start()
	if err != nil {
		t.Fatal(err)
	}
	p := newPeer(t, conn)
	p.send(`HELLO taskexec/1 {"category":"a"}`, "PING 7")
	p.expect("WELCOME taskexec/1 {}", "PONG 7")
	p.send("RUN 4 1 0 a b", "RECALL 4", "PONG 1", "CANCEL enough", "RUN 5 1 0 c")
	p.expect("DONE 4 0 did a b", "GOODBYE so long")
	conn.Close()
	if err := <-ended; err != nil {
		t.Errorf("the worker ended with %v", err)
	}
}
