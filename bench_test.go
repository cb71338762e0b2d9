package taskexec

import (
	"bufio"
	"net"
	"strings"
	"testing"
)

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
	c, err := NewCoordinator(WithWorkers("0", startProcess(b, "worker").addr), WithWindow(windowTasks))
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
	conn, err := net.Dial("tcp", startProcess(b, "echo").addr)
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
