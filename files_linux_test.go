package taskexec

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// spareFiles is how many files the part "frugal" can open beyond those it has.
const spareFiles = 8

func init() {
	parts["frugal"] = func() {
		serveUntilStdinCloses(func(ctx context.Context, ln net.Listener) {
			if err := limitFiles(spareFiles); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			NewWorker(parrot).Serve(ctx, frugalListener{ln})
		})
	}
}

// limitFiles lets this process open about n more files. Its limit is that of
// the numbers that they get, of which some are taken.
func limitFiles(n int) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	open := make(map[string]bool)
	for _, entry := range entries {
		open[entry.Name()] = true
	}
	limit := uint64(0)
	for ; n > 0; limit++ {
		if !open[strconv.FormatUint(limit, 10)] {
			n--
		}
	}
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: limit, Max: limit})
}

// frugalListener says when it could not accept for want of a file.
type frugalListener struct{ net.Listener }

func (l frugalListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if errors.Is(err, syscall.EMFILE) {
		fmt.Println("no file left")
	}
	return conn, err
}

// A worker that has run out of file descriptors goes on with the sessions it
// has, and takes new ones as soon as it can.
func TestAWorkerSurvivesRunningOutOfFileDescriptors(t *testing.T) {
	p := startProcess(t, "frugal")
	dial := func() *peer {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		return newPeer(t, conn)
	}
	session := dial()
	session.send(helloA)
	session.expect("WELCOME …")
	var strangers []*peer
	for range 2 * spareFiles {
		strangers = append(strangers, dial())
	}
	for range 3 {
		if line, err := p.stdout.ReadString('\n'); err != nil || line != "no file left\n" {
			t.Fatalf("it says %q, and %v", line, err)
		}
		session.send("RUN 0 1 0 still there?")
		session.expectReports("DONE 0 still there?")
	}
	for _, s := range strangers {
		s.conn.Close()
	}
	c, err := NewCoordinator(WithWorkers("a", p.addr))
	if err != nil {
		t.Fatal(err)
	}
	tasks := tasksOf("a", 10)
	report, err := c.Run(t.Context(), tasks)
	checkReport(t, tasks, report, err)
	if err != nil {
		t.Error(err)
	}
}
