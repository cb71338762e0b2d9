package taskexec

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"slices"
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
		_, rest, _ := bytes.Cut(line, []byte(" "))
		task, _, _ := bytes.Cut(rest, []byte(" "))
		out.WriteString("DONE ")
		out.Write(task)
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

// The following are in one process, over pipes, with one side played by hand:
// what one side of taskexec computes for a task.

// BenchmarkQueue is Run with more and more workers that share a queue, each of
// which reports at once.
func BenchmarkQueue(b *testing.B) {
	for _, workers := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			benchmarkRun(b, doneByHand(b, workers, nil))
		})
	}
}

// BenchmarkWindow is Run with windows of different sizes: how much sending many
// tasks together saves.
func BenchmarkWindow(b *testing.B) {
	for _, window := range []int{1, 16, 256, windowTasks} {
		b.Run(fmt.Sprintf("tasks=%d", window), func(b *testing.B) {
			benchmarkRun(b, doneByHand(b, 1, nil, WithWindow(window)))
		})
	}
}

func benchmarkRun(b *testing.B, c *Coordinator) {
	tasks := noOps(b.N)
	b.ReportAllocs()
	b.ResetTimer()
	if _, err := c.Run(b.Context(), tasks); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkStream is Stream, Concurrent, and its loop.
func BenchmarkStream(b *testing.B) {
	c, tasks := doneByHand(b, 1, nil, WithOrder(Concurrent)), noOps(b.N)
	b.ReportAllocs()
	b.ResetTimer()
	for _, err := range c.Stream(b.Context(), slices.Values(tasks)) {
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWorker is a worker and no coordinator.
func BenchmarkWorker(b *testing.B) {
	near, far := net.Pipe()
	served := make(chan error)
	go func() { served <- NewWorker(HandlerFunc(noOp)).ServeConn(b.Context(), far) }()
	b.ReportAllocs()
	b.ResetTimer()
	if err := sendAll(near, b.N); err != nil {
		b.Error(err)
	}
	near.Close()
	if err := <-served; err != nil {
		b.Error(err)
	}
}
