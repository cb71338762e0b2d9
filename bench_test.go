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
	"testing"
)

// helperEnv makes the test binary play a part in a process of its own.
const helperEnv = "TASKEXEC_TEST_PROCESS"

func TestMain(m *testing.M) {
	switch part := os.Getenv(helperEnv); part {
	case "":
		os.Exit(m.Run())
	case "worker":
		serveUntilStdinCloses(func(ctx context.Context, ln net.Listener) {
			NewWorker(HandlerFunc(func(context.Context, Task) (string, error) { return "", nil })).Serve(ctx, ln)
		})
	case "echo":
		serveUntilStdinCloses(func(_ context.Context, ln net.Listener) { serveLines(ln) })
	default:
		fmt.Fprintf(os.Stderr, "no part %q\n", part)
		os.Exit(2)
	}
}

// serveUntilStdinCloses runs serve on a loopback port, and prints its address
// first. It lives no longer than the process that started it.
func serveUntilStdinCloses(serve func(context.Context, net.Listener)) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(ln.Addr())
	go serve(context.Background(), ln)
	io.Copy(io.Discard, os.Stdin)
}

// startProcess runs this test binary as part, and returns its address.
func startProcess(tb testing.TB, part string) string {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"="+part)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	addr, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		tb.Fatal(err)
	}
	return strings.TrimSpace(addr)
}

// serveLines answers each RUN line with a DONE line, and does nothing else.
func serveLines(ln net.Listener) {
	conn, err := ln.Accept()
	if err != nil {
		return
	}
	defer conn.Close()
	in := lineReader{src: conn, limit: defaultMaxLine}
	out := bufio.NewWriterSize(conn, chunkBytes)
	for {
		line, err := in.next()
		if err != nil {
			return
		}
		_, rest, _ := strings.Cut(line, " ")
		task, _, _ := strings.Cut(rest, " ")
		out.WriteString("DONE ")
		out.WriteString(task)
		out.WriteString(" 0\n")
		if !in.more() {
			out.Flush()
		}
	}
}

const benchInstruction = "0123456789abcdef"

// BenchmarkRun is no-op tasks through Run to a worker in a process of its own
// over loopback. Read it beside BenchmarkLoopback, in the same run.
func BenchmarkRun(b *testing.B) {
	c, err := NewCoordinator(WithWorkers("0", startProcess(b, "worker")), WithWindow(windowTasks))
	if err != nil {
		b.Fatal(err)
	}
	tasks := make([]Task, b.N)
	for i := range tasks {
		tasks[i].Instruction = benchInstruction
	}
	b.ReportAllocs()
	b.ResetTimer()
	if _, err := c.Run(b.Context(), tasks); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tasks/s")
}

// BenchmarkLoopback exchanges the same lines with a process of its own, without
// parsing, dispatch or results: what the wire allows.
func BenchmarkLoopback(b *testing.B) {
	conn, err := net.Dial("tcp", startProcess(b, "echo"))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	b.ReportAllocs()
	b.ResetTimer()
	go func() {
		var buf []byte
		for i := range b.N {
			buf = appendMessage(buf, message{verb: verbRun, task: i, attempt: 1, text: benchInstruction})
			if len(buf) >= chunkBytes || i == b.N-1 {
				if _, err := conn.Write(buf); err != nil {
					return // the reader sees it too
				}
				buf = buf[:0]
			}
		}
	}()
	in := lineReader{src: conn, limit: defaultMaxLine}
	for range b.N {
		if _, err := in.next(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tasks/s")
}
