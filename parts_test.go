package taskexec

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// The test binary can play a part in a process of its own.
const (
	partEnv = "TASKEXEC_TEST_PROCESS" // which part
	addrEnv = "TASKEXEC_TEST_ADDR"    // where it listens; a free loopback port unless set
)

// parts are what it can be. Files that are not built everywhere add theirs.
var parts = map[string]func(){
	"worker": func() {
		serveUntilStdinCloses(func(ctx context.Context, ln net.Listener) {
			NewWorker(HandlerFunc(func(context.Context, Task) (string, error) { return "", nil })).Serve(ctx, ln)
		})
	},
	"echo": func() {
		serveUntilStdinCloses(func(_ context.Context, ln net.Listener) { serveLines(ln) })
	},
}

func TestMain(m *testing.M) {
	part := os.Getenv(partEnv)
	if part == "" {
		os.Exit(m.Run())
	}
	play, ok := parts[part]
	if !ok {
		fmt.Fprintf(os.Stderr, "no part %q\n", part)
		os.Exit(2)
	}
	play()
}

// serveUntilStdinCloses runs serve on the address that the environment names,
// and prints its address first. It lives no longer than the process that
// started it.
func serveUntilStdinCloses(serve func(context.Context, net.Listener)) {
	addr := os.Getenv(addrEnv)
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	ln, err := listenSoon(addr, 10*time.Second)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(ln.Addr())
	go serve(context.Background(), ln)
	io.Copy(io.Discard, os.Stdin)
}

// listenSoon listens on addr as soon as it can be had. A port that was given up
// may for a moment be the source of somebody's attempt to reach it.
func listenSoon(addr string, patience time.Duration) (net.Listener, error) {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		ln, err := net.Listen("tcp", addr)
		if err == nil || time.Now().After(end) {
			return ln, err
		}
	}
}

// A osProcess is this test binary in a part. It ends with the test at the latest.
type osProcess struct {
	addr   string // where it listens
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	ended  func() error
}

// startProcess runs this test binary as part, and returns when it listens. env
// adds to its environment.
func startProcess(tb testing.TB, part string, env ...string) *osProcess {
	tb.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), partEnv+"="+part), env...)
	p, err := launch(cmd)
	if p != nil {
		tb.Cleanup(p.kill)
	}
	if err == nil {
		err = p.listens()
	}
	if err != nil {
		tb.Fatalf("starting a process as %s: %v", part, err)
	}
	return p
}

// launch starts cmd. If that can be started, it is also to be ended.
func launch(cmd *exec.Cmd) (*osProcess, error) {
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &osProcess{cmd: cmd, stdin: stdin, stdout: bufio.NewReader(stdout), ended: sync.OnceValue(cmd.Wait)}, nil
}

// listens waits until the process says where it listens.
func (p *osProcess) listens() error {
	addr, err := p.stdout.ReadString('\n')
	if err != nil {
		return fmt.Errorf("it has not said where it listens: %w", err)
	}
	p.addr = strings.TrimSpace(addr)
	return nil
}

// kill ends the process, which has no say in it, and waits until it is gone.
func (p *osProcess) kill() {
	p.cmd.Process.Kill() // an error means that it is gone
	p.ended()
	p.stdin.Close()
}
