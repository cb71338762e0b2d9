package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"example.com/taskexec"
)

// isTerminal reports whether f is a terminal, or another character device, such
// as the null device.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// A statusLine is the last line of a terminal. It is rewritten in place, and
// gives way to whatever else is written there.
type statusLine struct {
	mu       sync.Mutex // guards following, and writing through writer
	terminal io.Writer
	blank    string // what wipes the line that is shown; "" if none is
}

// set shows a text of one line; "" shows none.
func (s *statusLine) set(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wipe()
	if text == "" {
		return
	}
	io.WriteString(s.terminal, text)
	s.blank = "\r" + strings.Repeat(" ", columns(text)) + "\r"
}

// wipe is called with mu held. Spaces are understood by every terminal.
func (s *statusLine) wipe() {
	io.WriteString(s.terminal, s.blank)
	s.blank = ""
}

// writer returns a writer that wipes the line before it writes to w.
func (s *statusLine) writer(w io.Writer) io.Writer { return statusWriter{s, w} }

type statusWriter struct {
	status *statusLine
	w      io.Writer
}

func (w statusWriter) Write(p []byte) (int, error) {
	w.status.mu.Lock()
	defer w.status.mu.Unlock()
	w.status.wipe()
	return w.w.Write(p)
}

// follow shows how far the coordinator's run has come, until stop is called.
func (s *statusLine) follow(coordinator *taskexec.Coordinator, tasks int) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		defer s.set("")
		ticker := time.NewTicker(200 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-quit:
				return
			case <-ticker.C:
			}
			for _, run := range coordinator.Snapshot() { // there is one
				s.set(progress(run, tasks))
			}
		}
	}()
	return func() { close(quit); <-done }
}

// progress returns a line about a run of that many tasks, such as
// "3s: 1,204 of 3,000 done, 2 failed; now b 206/1,000", at most 79
// columns wide: a line that is wrapped cannot be wiped.
func progress(run taskexec.RunSnapshot, tasks int) string {
	var line strings.Builder
	counts := run.Counts()
	fmt.Fprintf(&line, "%v: %s of %s done", run.Elapsed.Truncate(time.Second), thousands(counts.Done), thousands(tasks))
	if counts.Failed > 0 {
		fmt.Fprintf(&line, ", %s failed", thousands(counts.Failed))
	}
	if counts.Unknown > 0 {
		fmt.Fprintf(&line, ", %s unknown", thousands(counts.Unknown))
	}
	before := "; now "
	for _, c := range run.Categories {
		if c.InFlight == 0 {
			continue
		}
		all := c.Waiting + c.InFlight + c.Counts.Total()
		fmt.Fprintf(&line, "%s%s %s/%s", before, printable(c.Category), thousands(c.Counts.Total()), thousands(all))
		before = ", "
	}
	if before == "; now " {
		line.WriteString(absent(run))
	}
	return fit(line.String(), 79)
}

// absent returns which workers a run waits for in which nothing is in flight,
// such as "; waiting for b at localhost:8002".
func absent(run taskexec.RunSnapshot) string {
	var line strings.Builder
	before := "; waiting for "
	for _, c := range run.Categories {
		for _, w := range c.Workers {
			if c.Waiting > 0 && !w.Open {
				fmt.Fprintf(&line, "%s%s at %s", before, printable(c.Category), printable(w.Addr))
				before = ", "
			}
		}
	}
	return line.String()
}

// fit cuts text to that many columns.
func fit(text string, width int) string {
	if columns(text) <= width {
		return text
	}
	used := columns("…")
	for i, r := range text {
		if used += columns(string(r)); used > width {
			return text[:i] + "…"
		}
	}
	return text
}

// columns returns how many columns of a terminal a text takes at most: a
// character beyond ASCII may be twice as wide.
func columns(text string) int {
	n := 0
	for _, r := range text {
		if n++; r > '~' {
			n++
		}
	}
	return n
}
