package taskexec

import (
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"
)

func init() {
	parts["besieged with few files"] = func() {
		limit := syscall.Rlimit{Cur: 24, Max: 24}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		parts["besieged"]()
	}
}

// A worker whose process can open no more files goes on with what it has, and
// takes sessions again when it can.
func TestAttackOfMoreConnectionsThanThereAreFiles(t *testing.T) {
	a := &attack{t: t, addr: startProcess(t, "besieged with few files").addr}
	a.run(Task{Instruction: "watch"})
	conn := a.dial()
	if conn == nil {
		t.Fatal("not connected")
	}
	defer conn.Close()
	p := newPeer(t, conn)
	p.send(helloA)
	p.expect("WELCOME …")
	var strangers []net.Conn
	for range 100 {
		if conn := a.dial(); conn != nil {
			defer conn.Close()
			strangers = append(strangers, conn)
		}
	}
	for i := range 100 {
		p.send(fmt.Sprintf("RUN %d 1 0 10ms", i))
		p.expectReports(fmt.Sprintf("DONE %d 10ms", i))
	}
	if t.Failed() {
		return
	}
	for _, conn := range strangers {
		conn.Close()
	}
	a.check(floodMemory)
}
