package taskexec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Two network namespaces, joined by a virtual cable: the coordinator in one and
// a worker in the other, and between them packets that vanish or are refused.
// The namespaces have no name and belong to the processes that they were made
// for, so that nothing is left of them whatever becomes of the test.

const (
	insideEnv = "TASKEXEC_TEST_INSIDE" // set: this process has a namespace of its own

	nearAddr = "10.99.0.1" // the coordinator's side
	farAddr  = "10.99.0.2" // the worker's
	farPort  = "7001"
)

func init() {
	parts["far recorder"] = func() {
		// The cable is put in when this process is known.
		var line [1]byte
		os.Stdin.Read(line[:])
		for _, args := range [][]string{
			{"addr", "add", farAddr + "/24", "dev", "far"},
			{"link", "set", "far", "up"},
		} {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "ip %s: %v: %s\n", strings.Join(args, " "), err, out)
				os.Exit(1)
			}
		}
		serveUntilStdinCloses(func(ctx context.Context, ln net.Listener) { serveRecorder(ctx, ln, WithInsecure()) })
	}
}

// ownNamespace has a command start in a network namespace of its own.
func ownNamespace(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if uid := os.Getuid(); uid != 0 { // who must first be root somewhere
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
}

// A worker behind a network that loses or refuses everything for a time is
// given up at the peer timeout or at once, and its tasks are executed, once and
// in order, when it can be reached again.
func TestNetworkThatLosesEverythingForATime(t *testing.T) {
	if os.Getenv(insideEnv) == "" {
		runInNamespace(t)
		return
	}
	must(t, "ip", "link", "set", "lo", "up")
	for _, test := range networkFaults {
		t.Run(test.name, func(t *testing.T) { test.run(t) })
	}
}

// runInNamespace runs the test once more, in a process that has a network
// namespace of its own.
func runInNamespace(t *testing.T) {
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("this needs ip (iproute2) and nft (nftables): %v", err)
		}
	}
	probe := exec.CommandContext(t.Context(), "nft", "list", "ruleset")
	ownNamespace(probe)
	if out, err := probe.CombinedOutput(); err != nil {
		t.Skipf("network namespaces with nftables are not allowed here: %v: %s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=2m",
		fmt.Sprintf("-process.trials=%d", *processTrials))
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.WaitDelay = 10 * time.Second
	ownNamespace(cmd)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in a namespace of its own: %v\n%s", err, out)
		return
	}
	t.Logf("in a namespace of its own:\n%s", out)
}

// must runs a command that has to succeed.
func must(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// Rules for packets that leave the coordinator's side, and for those that
// arrive there.
const (
	dropOut = "ip daddr " + farAddr + " drop"
	dropIn  = "ip saddr " + farAddr + " drop"
	// A reset is not answered by another, and would be dropped by this rule.
	resetOut = "ip daddr " + farAddr + " tcp flags & rst == 0 reject with tcp reset"
	resetIn  = "ip saddr " + farAddr + " tcp flags & rst == 0 reject with tcp reset"
)

// breakNetwork puts rules in force; heal takes them away.
func breakNetwork(t *testing.T, out, in string) {
	t.Helper()
	rules := fmt.Sprintf(`table inet faults {
	chain out {
		type filter hook output priority 0
		%s
	}
	chain in {
		type filter hook input priority 0
		%s
	}
}
`, out, in)
	cmd := exec.CommandContext(t.Context(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s\n%s", err, said, rules)
	}
}

func heal(t *testing.T) {
	t.Helper()
	must(t, "nft", "flush", "ruleset")
}

// newFarFleet is a fleet of one worker in a namespace of its own, at the other
// end of a cable.
func newFarFleet(t *testing.T, slots int, env ...string) *fleet {
	t.Helper()
	f := newFleet(t, 0, slots)
	f.options = append(f.options, WithInsecure())
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), partEnv+"=far recorder", addrEnv+"="+net.JoinHostPort(farAddr, farPort))
	cmd.Env = append(append(cmd.Env, f.env(0)...), env...)
	ownNamespace(cmd)
	p, err := launch(cmd)
	if err != nil {
		t.Fatalf("a worker in a namespace of its own: %v", err)
	}
	t.Cleanup(p.kill)
	// The cable goes with the worker's namespace.
	must(t, "ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", fmt.Sprint(p.cmd.Process.Pid))
	must(t, "ip", "addr", "add", nearAddr+"/24", "dev", "near")
	must(t, "ip", "link", "set", "near", "up")
	t.Cleanup(func() { exec.Command("ip", "link", "del", "near").Run() })
	if _, err := p.stdin.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	if err := p.listens(); err != nil {
		t.Fatal(err)
	}
	f.workers = append(f.workers, p)
	return f
}

var networkFaults = []struct {
	name string
	run  func(t *testing.T)
}{
	{"everything vanishes, and the network heals", func(t *testing.T) {
		const timeout = 500 * time.Millisecond
		f := newFarFleet(t, 2)
		for range max(1, *processTrials/50) {
			var broken time.Time
			tr := f.try(someTasks(60, 8, 10*time.Millisecond), func(tr *trial) {
				if _, ok := tr.during(40 * time.Millisecond); !ok {
					return
				}
				breakNetwork(t, dropOut, dropIn)
				broken = time.Now()
				tr.loss(0)
				heal(t)
			}, WithHeartbeat(timeout/5, timeout), WithHandshakeTimeout(300*time.Millisecond))
			expectTimeout(t, tr, broken, timeout)
		}
		f.check()
	}},
	{"what goes to the worker vanishes", func(t *testing.T) { oneWay(t, dropOut, "") }},
	{"what comes from the worker vanishes", func(t *testing.T) { oneWay(t, "", dropIn) }},
	{"connections are reset", func(t *testing.T) {
		f := newFarFleet(t, 2)
		for range max(1, *processTrials/50) {
			var broken time.Time
			tr := f.try(someTasks(60, 8, 10*time.Millisecond), func(tr *trial) {
				if _, ok := tr.during(40 * time.Millisecond); !ok {
					return
				}
				breakNetwork(t, resetOut, resetIn)
				broken = time.Now()
				tr.loss(0)
				heal(t)
			}, WithHeartbeat(100*time.Millisecond, 30*time.Second)) // whoever is not told by the network finds out with the next PING
			err := tr.lossErr[f.workers[0].addr]
			took := tr.lostAt[f.workers[0].addr].Sub(broken)
			if !errors.Is(err, syscall.ECONNRESET) || took > 2*time.Second {
				t.Errorf("the session ended after %v with %v, want a reset soon", took, err)
			}
			t.Logf("reset noticed after %v", took)
		}
		f.check()
	}},
}

// expectTimeout checks that the session with a fleet's far worker was given up
// for silence, and when.
func expectTimeout(t *testing.T, tr *trial, broken time.Time, timeout time.Duration) {
	t.Helper()
	addr := tr.workers[0].addr
	var fault *ProtocolError
	if err := tr.lossErr[addr]; !errors.As(err, &fault) || fault.Code != codeTimeout {
		t.Errorf("the session ended with %v, want a timeout", err)
		return
	}
	took := tr.lostAt[addr].Sub(broken)
	if took < timeout/2 || took > 2*timeout+500*time.Millisecond {
		t.Errorf("the session ended %v after the network broke, with a timeout of %v", took, timeout)
	}
	t.Logf("found after %v, with a timeout of %v", took, timeout)
}

// oneWay breaks the network in one direction, and checks that the worker has
// stopped before its task is given to another.
func oneWay(t *testing.T, out, in string) {
	const timeout = 800 * time.Millisecond
	f := newFarFleet(t, 1, hangEnv+"=1")
	near := startProcess(t, "recorder", f.env(1)...)
	f.workers = append(f.workers, near)
	var broken time.Time
	far := f.workers[0].addr
	tr := f.try(someTasks(2, 4, 5*time.Millisecond), func(tr *trial) {
		for tr.ctx.Err() == nil && !f.hasBegun("w0") {
			sleep(tr.ctx, 5*time.Millisecond)
		}
		breakNetwork(t, out, in)
		broken = time.Now()
		tr.loss(0)
	}, WithHeartbeat(timeout/5, timeout), withoutLink("b", far))
	heal(t)
	took := tr.lostAt[far].Sub(broken)
	// The worker can be heard until its lease is over, which is one timeout more.
	if took < timeout/2 || took > 3*timeout+500*time.Millisecond {
		t.Errorf("the session ended %v after the network broke, with a timeout of %v", took, timeout)
	}
	t.Logf("found after %v, with a timeout of %v: %v", took, timeout, tr.lossErr[far])
	var cut, again int64
	for _, e := range f.executions() {
		switch {
		case e.worker == "w0" && e.what == "cut":
			cut = e.at
		case e.attempt > 1 && e.what == "began" && again == 0:
			again = e.at
		}
	}
	// A worker that can still be heard says that its lease is over when it has
	// told the handler, which then has to return.
	if overlap := time.Duration(cut-again) * time.Microsecond; cut == 0 || again == 0 || overlap > 100*time.Millisecond {
		t.Errorf("the handler was cut off %v after the task's next attempt had begun (cut off at %d, began at %d); want it before", overlap, cut, again)
	}
	f.check()
}

// withoutLink takes an address away from a category.
func withoutLink(category, addr string) CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) {
		c.workers[category] = nil
		for _, a := range c.workers["a"] {
			if a != addr {
				c.workers[category] = append(c.workers[category], a)
			}
		}
	})
}

// hasBegun says whether a worker has begun to execute something.
func (f *fleet) hasBegun(worker string) bool {
	text, _ := os.ReadFile(f.record)
	return bytes.Contains(text, []byte(" began "+worker+" "))
}
