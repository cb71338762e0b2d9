// Package examples_test builds the examples and runs them as the processes
// they are.
package examples_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/taskexec"
	"github.com/google/go-cmp/cmp"
)

// patience bounds every wait for a process: a test that needs it fails.
const patience = 60 * time.Second

func TestQuickstartRunsCategoriesInOrder(t *testing.T) {
	p := start(t, build(t, "quickstart"), nil)
	want := `[Worker a] Listening on port N...
[Worker b] Listening on port N...
[Worker c] Listening on port N...
` + demo
	got := regexp.MustCompile(`port \d+\.\.\.`).ReplaceAllString(p.finish(t, 0), "port N...")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
}

func TestMtlsLetsInOnlyTheCoordinator(t *testing.T) {
	const name = "spiffe://mtls.example/"
	var want strings.Builder
	for _, category := range []string{"a", "b", "c"} {
		fmt.Fprintf(&want, "%sworker/%s listens\n", name, category)
	}
	fmt.Fprintf(&want, "%sworker/a as a coordinator: the other side refused the TLS handshake: tls: bad certificate\n", name)
	for _, instruction := range strings.Fields("a1 a2 a3 b1 b3 b2 b4 c1 c2") {
		fmt.Fprintf(&want, "%s Done \"for %scoordinator\"\n", instruction, name)
	}
	if diff := cmp.Diff(want.String(), start(t, build(t, "mtls"), nil).finish(t, 0)); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
}

// demo is what a coordinator prints of the sample's nine instructions.
const demo = `[Coordinator] Starting task distribution
[Coordinator] Sent to a: a1 a2 a3
[Coordinator] a says: a1 a2 a3 completed
[Coordinator] a shutdown: Goodbye from a
[Coordinator] Sent to b: b1 b3 b2 b4
[Coordinator] b says: b1 b3 b2 b4 completed
[Coordinator] b shutdown: Goodbye from b
[Coordinator] Sent to c: c1 c2
[Coordinator] c says: c1 c2 completed
[Coordinator] c shutdown: Goodbye from c
`

func TestProcessesRunSample(t *testing.T) {
	workers, flags := startWorkers(t, build(t, "worker"))
	p := start(t, build(t, "coordinator"), nil, flags...)
	if diff := cmp.Diff(demo, p.finish(t, 0)); diff != "" {
		t.Errorf("coordinator's stdout (-want +got):\n%s", diff)
	}
	for _, w := range workers {
		want := "listening " + w.addr + "\n"
		if diff := cmp.Diff(want, w.finish(t, 0)); diff != "" {
			t.Errorf("worker's stdout (-want +got):\n%s", diff)
		}
	}
}

func TestProcessesRunSampleInInputOrder(t *testing.T) {
	workers, flags := startWorkers(t, build(t, "worker"))
	p := start(t, build(t, "coordinator"), nil, append(flags, "-order", "input", "-keep-workers", "-json")...)
	got := parseResults(t, p.finish(t, 0))
	var want []result
	for i, instruction := range strings.Fields("a1 a2 c1 b1 c2 b3 b2 b4 a3") {
		want = append(want, result{
			Index: i, Category: instruction[:1], Instruction: instruction,
			Outcome: "Done", Output: "completed", Worker: instruction[:1], Attempts: 1,
		})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("results (-want +got):\n%s", diff)
	}
	for _, w := range workers {
		if w.exited() {
			t.Errorf("worker at %s ended in spite of -keep-workers; stderr:\n%s", w.addr, &w.stderr)
		}
	}
}

func TestProcessesLoseNoneOf100000Instructions(t *testing.T) {
	const n = 100_000
	var input strings.Builder
	var want []result
	for _, category := range []string{"a", "b", "c"} {
		for i := range n {
			if instruction := instruction(i); instruction[:1] == category {
				want = append(want, result{
					Index: i, Category: category, Instruction: instruction,
					Outcome: "Done", Output: "completed", Worker: category, Attempts: 1,
				})
			}
		}
	}
	for i := range n {
		fmt.Fprintln(&input, instruction(i))
	}

	workers, flags := startWorkers(t, build(t, "worker"))
	p := start(t, build(t, "coordinator"), strings.NewReader(input.String()), append(flags, "-input", "-", "-json")...)
	got := parseResults(t, p.finish(t, 0))
	if len(got) != n {
		t.Errorf("got %d results, want %d", len(got), n)
	}
	for i := range min(len(got), n) {
		if got[i] != want[i] {
			t.Fatalf("result %d (-want +got):\n%s", i, cmp.Diff(want[i], got[i]))
		}
	}

	executed := 0
	for _, w := range workers {
		w.finish(t, 0)
		match := regexp.MustCompile(`(\d+) tasks executed`).FindStringSubmatch(w.stderr.String())
		if match == nil {
			t.Fatalf("worker at %s does not say how many tasks it executed; stderr:\n%s", w.addr, &w.stderr)
		}
		count, _ := strconv.Atoi(match[1])
		executed += count
	}
	if executed != n {
		t.Errorf("the workers executed %d tasks, want %d: each once", executed, n)
	}
}

// instruction returns the i-th of the instructions of a long run: of three
// categories, mixed.
func instruction(i int) string { return fmt.Sprintf("%c%d", "abc"[i*7%3], i) }

// TestCoordinatorSaysWhichTasksFailed uses workers of its own, since those of
// the examples never fail.
func TestCoordinatorSaysWhichTasksFailed(t *testing.T) {
	addr := serve(t, "a", func(ctx context.Context, task taskexec.Task) (string, error) {
		if task.Instruction != "a1" && task.Instruction != "a3" {
			return "", errors.New("no \x1b[2J such\nfile")
		}
		return "fine", nil
	})
	bin := build(t, "coordinator")

	p := start(t, bin, strings.NewReader("a1 a2 b1 a3"), "-a", addr, "-b", addr, "-input", "-")
	out := p.finish(t, 1)
	want := regexp.MustCompile(`^\[Coordinator\] Starting task distribution
\[Coordinator\] Sent to a: a1 a2 a3
\[Coordinator\] a says: a1 a3 completed; a2 failed: .*no \\x1b\[2J such\\nfile.*
\[Coordinator\] a shutdown: Goodbye from a
$`)
	if !want.MatchString(out) {
		t.Errorf("stdout does not match\n%s\nbut is\n%s", want, out)
	}
	if text := p.stderr.String(); !strings.Contains(text, "a2") || strings.Contains(text, "\x1b") {
		t.Errorf("stderr does not name the task that failed, or not safely: %q", text)
	}

	addr = serve(t, "a", func(ctx context.Context, task taskexec.Task) (string, error) {
		return "", errors.New("no such file")
	})
	p = start(t, bin, strings.NewReader("b1 a1"), "-a", addr, "-b", addr, "-input", "-", "-json")
	got := parseResults(t, p.finish(t, 1))
	if len(got) == 2 { // texts of errors are not promised word for word
		if got[0].Error == "" || got[1].Error == "" {
			t.Errorf("a result that is not Done has no error: %+v", got)
		}
		got[0].Error, got[1].Error = "", ""
	}
	if diff := cmp.Diff([]result{
		{Index: 1, Category: "a", Instruction: "a1", Outcome: "Failed", Worker: "a", Attempts: 1},
		{Index: 0, Category: "b", Instruction: "b1", Outcome: "Skipped"},
	}, got); diff != "" {
		t.Errorf("results (-want +got):\n%s", diff)
	}
}

func TestCoordinatorShortensLongGroups(t *testing.T) {
	addr := serve(t, "a", func(ctx context.Context, task taskexec.Task) (string, error) {
		if strings.HasSuffix(task.Instruction, "7") {
			return "", errors.New(strings.Repeat("long ", 1000))
		}
		return "", nil
	})
	var input strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&input, "a%d ", i+1)
	}
	p := start(t, build(t, "coordinator"), strings.NewReader(input.String()), "-a", addr, "-input", "-")
	out := p.finish(t, 1)
	for _, want := range []string{
		"Sent to a: a1 a2 a3 … and 99,997 more\n",
		"a says: a1 a2 a3 … and 89,997 more completed; a7 failed: ",
		" … and 9,997 more\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("stdout lacks %q", want)
		}
	}
	if len(out) > 4096 {
		t.Errorf("stdout has %d bytes, for people to read", len(out))
	}
}

func TestCustomhandlerPrintsChecksums(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "abc")
	if err := os.WriteFile(path, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	bin := build(t, "customhandler")
	// The digest of "abc" is the example of FIPS 180-2, appendix B.1.
	want := "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  " + path + "\n"
	if diff := cmp.Diff(want, start(t, bin, nil, path).finish(t, 0)); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}

	missing := filepath.Join(dir, "missing")
	p := start(t, bin, nil, missing, path)
	if diff := cmp.Diff(want, p.finish(t, 1)); diff != "" {
		t.Errorf("stdout with a missing file (-want +got):\n%s", diff)
	}
	if !strings.Contains(p.stderr.String(), missing) {
		t.Errorf("stderr does not name the missing file:\n%s", &p.stderr)
	}
}

func TestWrongUsageExits2(t *testing.T) {
	t.Chdir(t.TempDir()) // so that no flag names a file by accident
	for _, test := range []struct {
		example string
		args    []string
		reason  string
	}{
		{"quickstart", []string{"x"}, "takes no arguments"},
		{"mtls", []string{"x"}, "takes no arguments"},
		{"customhandler", nil, "needs a file"},
		{"worker", []string{"-type", "a", "x"}, "left-over argument"},
		{"worker", []string{"-nonsense"}, "unknown flag"},
		{"worker", []string{"-type", ""}, "no category"},
		{"worker", []string{"-type", "a,\n"}, "a control character is no category"},
		{"worker", []string{"-port", "65536"}, "no such port"},
		{"worker", []string{"-port", "http"}, "a port is a number"},
		{"worker", []string{"-slots", "0"}, "a worker without slots does nothing"},
		{"worker", []string{"-delay", "-1s"}, "time does not run backwards"},
		{"worker", []string{"-tls-cert", "x"}, "a certificate without its key"},
		{"worker", []string{"-tls-cert", "x", "-tls-key", "x", "-tls-ca", "x", "-insecure"}, "TLS and not"},
		{"coordinator", []string{"-tls-ca", "x"}, "an authority for nothing"},
		{"coordinator", []string{"-a", "192.0.2.1:8001"}, "plaintext would leave this machine"},
		{"coordinator", []string{"input.txt"}, "left-over argument, and likely a forgotten -input"},
		{"coordinator", []string{"-nonsense"}, "unknown flag"},
		{"coordinator", []string{"-order", "random"}, "no such order"},
		{"coordinator", []string{"-on-failure", "panic"}, "no such policy"},
		{"coordinator", []string{"-timeout", "-1s"}, "time does not run backwards"},
		{"coordinator", []string{"-wait", "-1s"}, "nor here"},
		{"coordinator", []string{"-workers", "z"}, "a category without addresses"},
		{"coordinator", []string{"-workers", "=localhost:1"}, "addresses without a category"},
		{"coordinator", []string{"-a", "localhost:1,"}, "an empty address"},
		{"coordinator", []string{"-a", "localhost"}, "an address without a port"},
	} {
		p := start(t, build(t, test.example), nil, test.args...)
		if out := p.finish(t, 2); out != "" || p.stderr.String() == "" {
			t.Errorf("%s %q (%s): stdout %q, stderr %q; want all on stderr", test.example, test.args, test.reason, out, &p.stderr)
		}
	}
}

func TestRunThatCannotGoOnExits1(t *testing.T) {
	bin := build(t, "coordinator")
	dir := t.TempDir()
	nobody := "unix:" + filepath.Join(dir, "s")
	other := serve(t, "b", func(context.Context, taskexec.Task) (string, error) { return "", nil })
	for _, test := range []struct {
		args   []string
		stdin  string
		stderr string
		reason string
	}{
		{[]string{"-input", filepath.Join(dir, "none")}, "", "none", "no such input"},
		{[]string{"-input", "-"}, "a\xff", "byte", "input that is not UTF-8"},
		{[]string{"-input", "-"}, "z1", "z", "a category without workers"},
		{[]string{"-input", "-", "-a", nobody, "-wait", "0s"}, "a1", nobody, "nobody listens"},
		{[]string{"-input", "-", "-a", other}, "a1", other, "a worker of another category"},
	} {
		p := start(t, bin, strings.NewReader(test.stdin), test.args...)
		p.finish(t, 1)
		if !strings.Contains(p.stderr.String(), test.stderr) {
			t.Errorf("%q (%s): stderr %q lacks %q", test.args, test.reason, &p.stderr, test.stderr)
		}
	}

	p := start(t, bin, strings.NewReader("a1"), "-input", "-", "-a", nobody, "-json", "-wait", "0s")
	if got := parseResults(t, p.finish(t, 1)); len(got) != 1 || got[0].Outcome != "Skipped" {
		t.Errorf("-json with nobody listening: %+v, want one result, Skipped", got)
	}

	worker := build(t, "worker")
	_, port, err := net.SplitHostPort(startWorker(t, worker).addr)
	if err != nil {
		t.Fatal(err)
	}
	start(t, worker, nil, "-port", port).finish(t, 1)
}

func TestEmptyInputSucceedsWithoutWorkers(t *testing.T) {
	nobody := "unix:" + filepath.Join(t.TempDir(), "s")
	p := start(t, build(t, "coordinator"), strings.NewReader(" \n"), "-input", "-", "-a", nobody, "-json", "-wait", "0s")
	if out := p.finish(t, 0); out != "" {
		t.Errorf("stdout is %q, want nothing", out)
	}
}

func TestSignalDrainsWorker(t *testing.T) {
	skipWithoutSignals(t)
	w := startWorker(t, build(t, "worker"), "-v", "-delay", "500ms")
	p := start(t, build(t, "coordinator"), strings.NewReader("a1"), "-input", "-", "-a", w.addr, "-keep-workers", "-json")
	w.stderr.await(t, `executing "a1"`)
	w.signal(t, syscall.SIGTERM)
	w.finish(t, 0)
	if got := parseResults(t, p.finish(t, 0)); len(got) != 1 || got[0].Outcome != "Done" {
		t.Errorf("the task that ran at the signal: %+v, want Done", got)
	}
}

func TestSignalDrainsIdleWorker(t *testing.T) {
	skipWithoutSignals(t)
	w := startWorker(t, build(t, "worker"))
	w.signal(t, os.Interrupt)
	w.finish(t, 0)
}

func TestSecondSignalEndsWorkerAtOnce(t *testing.T) {
	skipWithoutSignals(t)
	w := startWorker(t, build(t, "worker"), "-v", "-delay", "1h")
	p := start(t, build(t, "coordinator"), strings.NewReader("a1"), "-input", "-", "-a", w.addr, "-json", "-wait", "0s")
	w.stderr.await(t, `executing "a1"`)
	w.signal(t, syscall.SIGTERM)
	w.stderr.await(t, "finishing what runs")
	w.signal(t, syscall.SIGTERM)
	w.finish(t, 1)
	if got := parseResults(t, p.finish(t, 1)); len(got) != 1 || got[0].Outcome != "Unknown" {
		t.Errorf("the task that ran on the worker that died: %+v, want Unknown", got)
	}
}

func TestSignalDrainsCoordinator(t *testing.T) {
	skipWithoutSignals(t)
	worker := build(t, "worker")
	a, b := startWorker(t, worker, "-v", "-delay", "500ms"), startWorker(t, worker, "-type", "b")
	p := start(t, build(t, "coordinator"), strings.NewReader("a1 b1"), "-input", "-", "-a", a.addr, "-b", b.addr, "-json")
	a.stderr.await(t, `executing "a1"`)
	p.signal(t, syscall.SIGTERM)
	got := map[string]string{}
	for _, r := range parseResults(t, p.finish(t, 1)) {
		got[r.Instruction] = r.Outcome
	}
	if diff := cmp.Diff(map[string]string{"a1": "Done", "b1": "Skipped"}, got); diff != "" {
		t.Errorf("outcomes (-want +got):\n%s", diff)
	}
}

func TestSecondSignalCancelsWhatTheCoordinatorRuns(t *testing.T) {
	skipWithoutSignals(t)
	w := startWorker(t, build(t, "worker"), "-v", "-delay", "1h")
	p := start(t, build(t, "coordinator"), strings.NewReader("a1 a2"), "-input", "-", "-a", w.addr, "-json")
	w.stderr.await(t, `executing "a1"`)
	p.signal(t, syscall.SIGTERM)
	p.stderr.await(t, "finishing what runs")
	p.signal(t, os.Interrupt)
	got := map[string]string{}
	for _, r := range parseResults(t, p.finish(t, 1)) {
		got[r.Instruction] = r.Outcome
	}
	if diff := cmp.Diff(map[string]string{"a1": "Canceled", "a2": "Skipped"}, got); diff != "" {
		t.Errorf("outcomes (-want +got):\n%s", diff)
	}
}

func TestThirdSignalEndsCoordinatorAtOnce(t *testing.T) {
	skipWithoutSignals(t)
	started, release := make(chan struct{}), make(chan struct{})
	addr := serve(t, "a", func(context.Context, taskexec.Task) (string, error) {
		close(started)
		<-release // whatever becomes of ctx
		return "", nil
	})
	defer close(release)
	p := start(t, build(t, "coordinator"), strings.NewReader("a1"), "-input", "-", "-a", addr, "-json")
	<-started
	p.signal(t, syscall.SIGTERM)
	p.stderr.await(t, "finishing what runs")
	p.signal(t, syscall.SIGTERM)
	p.stderr.await(t, "canceling what runs")
	p.signal(t, syscall.SIGTERM)
	if out := p.finish(t, -1); out != "" { // -1: a signal ended it
		t.Errorf("stdout is %q", out)
	}
}

func TestOrderConcurrentRunsCategoriesAtOnce(t *testing.T) {
	var both sync.WaitGroup
	both.Add(2)
	meet := func(context.Context, taskexec.Task) (string, error) {
		both.Done()
		both.Wait() // until the other runs too
		return "met", nil
	}
	a, b := serve(t, "a", meet), serve(t, "c", meet)
	p := start(t, build(t, "coordinator"), strings.NewReader("b1 a1"), "-input", "-", "-a", a, "-b", b, "-order", "concurrent", "-json")
	if diff := cmp.Diff([]result{
		{Index: 0, Category: "b", Instruction: "b1", Outcome: "Done", Output: "met", Worker: "c", Attempts: 1},
		{Index: 1, Category: "a", Instruction: "a1", Outcome: "Done", Output: "met", Worker: "a", Attempts: 1},
	}, parseResults(t, p.finish(t, 0))); diff != "" {
		t.Errorf("results (-want +got):\n%s", diff)
	}
}

func TestOnFailureSaysWhatBecomesOfTheRest(t *testing.T) {
	addr := serve(t, "a", func(ctx context.Context, task taskexec.Task) (string, error) {
		if task.Instruction == "a1" {
			return "", errors.New("no such file")
		}
		return "", nil
	})
	for _, test := range []struct {
		policy string
		order  string
		want   string
		reason string
	}{
		{"finish", "category", "a1 Failed a2 Done b1 Skipped", "the stage is that of category a"},
		{"finish", "input", "a1 Failed b1 Skipped a2 Skipped", "each task is a stage"},
		{"soon", "category", "a1 Failed a2 Skipped b1 Skipped", "nothing is started after it, in its own stage either"},
		{"keep", "category", "a1 Failed a2 Done b1 Done", "all are tried"},
	} {
		p := start(t, build(t, "coordinator"), strings.NewReader("a1 b1 a2"), "-input", "-", "-a", addr, "-b", addr,
			"-keep-workers", "-json", "-on-failure", test.policy, "-order", test.order)
		var got []string
		for _, r := range parseResults(t, p.finish(t, 1)) {
			got = append(got, r.Instruction, r.Outcome)
		}
		if diff := cmp.Diff(test.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("-on-failure %s -order %s (%s) (-want +got):\n%s", test.policy, test.order, test.reason, diff)
		}
	}
}

func TestTimeoutEndsATask(t *testing.T) {
	w := startWorker(t, build(t, "worker"), "-delay", "1h")
	p := start(t, build(t, "coordinator"), strings.NewReader("a1"), "-input", "-", "-a", w.addr, "-timeout", "20ms", "-json")
	got := parseResults(t, p.finish(t, 1))
	if len(got) != 1 || got[0].Outcome != "Failed" || !strings.Contains(got[0].Error, "timeout") {
		t.Errorf("got %+v, want one result, Failed by its timeout", got)
	}
}

// An error that stands in each of a hundred thousand results must be short.
func TestErrorsOfResultsAreOneLine(t *testing.T) {
	dir := t.TempDir()
	one, two := "unix:"+filepath.Join(dir, "one"), "unix:"+filepath.Join(dir, "two")
	p := start(t, build(t, "coordinator"), strings.NewReader("a1 a2 b1"), "-input", "-", "-a", one+","+two, "-b", two, "-json", "-wait", "0s")
	results := parseResults(t, p.finish(t, 1))
	for _, r := range results {
		if strings.Contains(r.Error, "\n") || !strings.Contains(r.Error, one) || !strings.HasSuffix(r.Error, "(and 2 more)") {
			t.Errorf("error of %s: %q", r.Instruction, r.Error)
		}
	}
	if n := strings.Count(p.stderr.String(), two); n < 2 || len(results) != 3 {
		t.Errorf("%d results; stderr does not name every worker in full:\n%s", len(results), &p.stderr)
	}
}

func TestWorkerListensOnlyIfItCanServe(t *testing.T) {
	types := strings.Repeat("a,", 200) + "a" // each fine, together too long for a name
	p := start(t, build(t, "worker"), nil, "-port", "0", "-type", types)
	if out := p.finish(t, 1); out != "" {
		t.Errorf("stdout is %q, want nothing", out)
	}
}

func TestNoProgressIsShownWithoutATerminal(t *testing.T) {
	w := startWorker(t, build(t, "worker"), "-delay", "500ms")
	p := start(t, build(t, "coordinator"), strings.NewReader("a1"), "-input", "-", "-a", w.addr, "-json")
	p.finish(t, 0)
	if text := p.stderr.String(); text != "" {
		t.Errorf("stderr is %q", text)
	}
}

func TestProcessesRunSampleOverTLS(t *testing.T) {
	files := writeCertificate(t)
	workers, flags := startWorkers(t, build(t, "worker"), files...)
	p := start(t, build(t, "coordinator"), nil, append(flags, files...)...)
	if diff := cmp.Diff(demo, p.finish(t, 0)); diff != "" {
		t.Errorf("coordinator's stdout (-want +got):\n%s", diff)
	}
	for _, w := range workers {
		w.finish(t, 0)
	}
}

func TestWhoBringsNoCertificateIsToldSo(t *testing.T) {
	files := writeCertificate(t)
	w := startWorker(t, build(t, "worker"), files...)
	p := start(t, build(t, "coordinator"), strings.NewReader("a1"), "-input", "-", "-a", w.addr)
	p.finish(t, 1)
	if text := p.stderr.String(); !strings.Contains(text, "expects TLS") {
		t.Errorf("stderr: %q", text)
	}
}

func TestWorkerListensBeyondLoopbackOnlyIfToldSo(t *testing.T) {
	bin := build(t, "worker")
	p := start(t, bin, nil, "-host", "0.0.0.0", "-port", "0")
	if out := p.finish(t, 1); out != "" || !strings.Contains(p.stderr.String(), "insecure transport") {
		t.Errorf("stdout %q, stderr %q", out, &p.stderr)
	}
	p = start(t, bin, nil, append(writeCertificate(t), "-host", "0.0.0.0", "-port", "0")...)
	p.stdout.await(t, "listening ")
}

// writeCertificate writes a certificate for localhost and its key, and returns
// the flags with which it is this side's and the authority for the other's.
func writeCertificate(t *testing.T) (flags []string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "a test"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		DNSNames:              []string{"localhost"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, file := range []struct {
		flag, kind string
		der        []byte
	}{{"-tls-cert", "CERTIFICATE", cert}, {"-tls-ca", "CERTIFICATE", cert}, {"-tls-key", "PRIVATE KEY", der}} {
		name := filepath.Join(dir, file.flag)
		if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: file.kind, Bytes: file.der}), 0o600); err != nil {
			t.Fatal(err)
		}
		flags = append(flags, file.flag, name)
	}
	return flags
}

// TestReadmeProgramsRun takes the Go programs of README.md as they stand there,
// and runs them. What each prints follows it.
func TestReadmeProgramsRun(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	programs := regexp.MustCompile("(?s)\n```go\n(package main\n.*?)```\n.*?\n```text\n(.*?)```\n").FindAllSubmatch(readme, -1)
	if want := strings.Count(string(readme), "```go\n"); want == 0 || len(programs) != want {
		t.Fatalf("README.md holds %d programs that say what they print, of %d", len(programs), want)
	}
	for _, program := range programs {
		runProgram(t, program[1], string(program[2]))
	}
}

// TestDocumentedProgramRuns does so with that of the package documentation.
func TestDocumentedProgramRuns(t *testing.T) {
	doc, err := os.ReadFile("../doc.go")
	if err != nil {
		t.Fatal(err)
	}
	program := regexp.MustCompile(`(?s)//\tpackage main\n.*?\n//\n// [A-Z]`).Find(doc)
	program = regexp.MustCompile(`(?m)^//\t?`).ReplaceAll(program, nil)
	if end := bytes.LastIndexByte(program, '}'); end > 0 {
		program = program[:end+1]
	}
	runProgram(t, program, "executing a1\nexecuting a2\nexecuting b1\n"+
		"b1 Done output of b1\na1 Done output of a1\na2 Done output of a2\n")
}

func runProgram(t *testing.T, program []byte, want string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(file, program, 0o600); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, start(t, buildPackage(t, file), nil).finish(t, 0)); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
}

// result is a line of the coordinator's -json.
type result struct {
	Index       int
	Category    string
	Instruction string
	Outcome     string
	Output      string
	Error       string
	Worker      string
	Attempts    int
}

// parseResults fails the test if a line has a field too many, or too few.
func parseResults(t *testing.T, out string) []result {
	t.Helper()
	var results []result
	for line := range strings.Lines(out) {
		fields := map[string]json.RawMessage{}
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		if len(fields) != 8 {
			t.Fatalf("line %q has %d fields, want 8", line, len(fields))
		}
		var r result
		decoder := json.NewDecoder(strings.NewReader(line))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&r); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		results = append(results, r)
	}
	return results
}

// serve serves on a loopback port, as a worker of that category and of b, until
// the test ends.
func serve(t *testing.T, name string, handler taskexec.HandlerFunc) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	w := taskexec.NewWorker(handler, taskexec.WithName(name), taskexec.WithCategories(name, "b"))
	go func() { defer close(served); w.Serve(ctx, ln) }()
	t.Cleanup(func() { cancel(); <-served })
	return ln.Addr().String()
}

var (
	buildOnce sync.Once
	buildDir  string
	buildErr  error
)

// TestMain removes what build has built.
func TestMain(m *testing.M) {
	defer func() {
		if buildDir != "" {
			os.RemoveAll(buildDir)
		}
	}()
	m.Run()
}

// build returns the path of that example's binary. All are built together, by
// the first test that needs one.
func build(t *testing.T, example string) string {
	t.Helper()
	buildOnce.Do(func() {
		if buildDir, buildErr = os.MkdirTemp("", "taskexec-examples"); buildErr == nil {
			buildErr = goBuild(buildDir+string(filepath.Separator), "./examples/quickstart", "./examples/worker", "./examples/coordinator", "./examples/customhandler", "./examples/mtls")
		}
	})
	if buildErr != nil {
		t.Fatal(buildErr)
	}
	return withSuffix(filepath.Join(buildDir, example))
}

func buildPackage(t *testing.T, pkg string) string {
	t.Helper()
	bin := withSuffix(filepath.Join(t.TempDir(), "program"))
	if err := goBuild(bin, pkg); err != nil {
		t.Fatal(err)
	}
	return bin
}

var root, _ = filepath.Abs("..") // before a test changes directory

func goBuild(output string, packages ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute) // the build cache may be empty
	defer cancel()
	// Without VCS stamping, a build needs no git and no checkout.
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-buildvcs=false", "-o", output}, packages...)...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd, err, out)
	}
	return nil
}

func withSuffix(path string) string {
	if runtime.GOOS == "windows" {
		return path + ".exe"
	}
	return path
}

func skipWithoutSignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be sent a signal on Windows")
	}
}

// startWorkers starts a worker of each category of the sample, and returns the
// coordinator's flags for them.
func startWorkers(t *testing.T, bin string, args ...string) (workers []worker, flags []string) {
	t.Helper()
	for _, category := range []string{"a", "b", "c"} {
		w := startWorker(t, bin, append([]string{"-type", category}, args...)...)
		workers = append(workers, w)
		flags = append(flags, "-"+category, w.addr)
	}
	return workers, flags
}

// worker is a process of examples/worker that listens on addr.
type worker struct {
	*process
	addr string
}

func startWorker(t *testing.T, bin string, args ...string) worker {
	t.Helper()
	p := start(t, bin, nil, append([]string{"-port", "0"}, args...)...)
	first, _, _ := strings.Cut(p.stdout.await(t, "\n"), "\n")
	addr, ok := strings.CutPrefix(first, "listening ")
	if host, port, err := net.SplitHostPort(addr); !ok || err != nil || host != "127.0.0.1" || port == "0" {
		t.Fatalf("worker's first line is %q, want %q", first, "listening 127.0.0.1:PORT")
	}
	return worker{p, addr}
}

// process is a process that was started, and that is ended and waited for when
// the test ends.
type process struct {
	cmd            *exec.Cmd
	stdout, stderr output
	done           chan struct{} // closed when the process has ended
}

func start(t *testing.T, bin string, stdin io.Reader, args ...string) *process {
	t.Helper()
	// t.Context is canceled just before the cleanup, which kills the process.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	p := &process{cmd: exec.CommandContext(ctx, bin, args...), done: make(chan struct{})}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = stdin, &p.stdout, &p.stderr
	p.cmd.WaitDelay = 5 * time.Second
	if err := p.cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		defer cancel()
		p.cmd.Wait() // what it returns is in ProcessState too
		p.stdout.close()
		p.stderr.close()
	}()
	t.Cleanup(func() { <-p.done })
	return p
}

// finish waits for the process to end with that exit code, and returns what it
// printed on stdout.
func (p *process) finish(t *testing.T, code int) string {
	t.Helper()
	<-p.done
	if p.cmd.ProcessState.ExitCode() != code {
		t.Errorf("%v: %v, want exit code %d\nstdout:\n%s\nstderr:\n%s", p.cmd, p.cmd.ProcessState, code, abridge(p.stdout.String()), abridge(p.stderr.String()))
	}
	return p.stdout.String()
}

func (p *process) exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) signal(t *testing.T, sig os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatalf("%v: %v", p.cmd, err)
	}
}

// output collects what a process prints, and lets a test wait for a text in
// it. Its zero value is empty.
type output struct {
	mu     sync.Mutex // guards following
	text   bytes.Buffer
	closed bool
	more   chan struct{} // if not nil, closed when text grows or closed is set
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.wake()
	return o.text.Write(p)
}

func (o *output) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.wake()
	o.closed = true
}

// wake is called with mu held.
func (o *output) wake() {
	if o.more != nil {
		close(o.more)
		o.more = nil
	}
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// await returns the whole output once it contains text. The process's limit
// bounds the wait.
func (o *output) await(t *testing.T, text string) string {
	t.Helper()
	for {
		o.mu.Lock()
		all, closed := o.text.String(), o.closed
		if o.more == nil {
			o.more = make(chan struct{})
		}
		more := o.more
		o.mu.Unlock()
		if strings.Contains(all, text) {
			return all
		}
		if closed {
			t.Fatalf("the process ended without printing %q, but\n%s", text, abridge(all))
		}
		<-more
	}
}

func abridge(text string) string {
	const limit = 2000
	if len(text) > limit {
		return text[:limit] + "…"
	}
	return text
}
