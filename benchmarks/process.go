package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
)

// Workers are processes of their own: this binary, started again in a role.

const roleEnv = "TASKEXEC_BENCHMARK_ROLE"

// A role starts to serve with its arguments, goes on in goroutines, and returns
// the address to reach it at. One that has something to do instead of serving
// returns when it is done.
type role func(args []string) (addr string, err error)

var roles = map[string]role{
	"raw":           rawForm{}.serve,
	"raw echo":      rawForm{echo: true}.serve,
	"raw plain":     rawForm{plain: true}.serve,
	"lines":         serveLines(false),
	"lines echo":    serveLines(true),
	"grpc":          serveGRPC,
	"NATS server":   serveNATS,
	"NATS worker":   serveNATSWorker,
	"net/rpc":       serveRPC,
	"taskexec":      serveTaskexec(false),
	"taskexec echo": serveTaskexec(true),
	"relay":         serveRelay,
	"sleepers":      serveSleepers,
	"stream":        streamInProcess,
}

// play is the process's life in a role. It says its address, then answers each
// line of its input with what it has used up, and ends with its
// input: it does not outlive the process that started it.
func play(name string) error {
	start, ok := roles[name]
	if !ok {
		return fmt.Errorf("there is no role %q", name)
	}
	asked := make(chan struct{})
	go func() { // from the beginning: what a role has to do may take long
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			asked <- struct{}{}
		}
		os.Exit(0)
	}()
	addr, err := start(flag.Args())
	if err != nil {
		return err
	}
	fmt.Println(addr)
	for range asked {
		if err := json.NewEncoder(os.Stdout).Encode(ownUsage()); err != nil {
			return err
		}
	}
	return nil
}

// A usage is what a process has used up so far.
type usage struct {
	Mallocs uint64        // allocations
	CPU     time.Duration // of all cores; 0 where the system does not say it
}

func ownUsage() usage {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{m.Mallocs, cpuTime()}
}

// A process is one that plays a role.
type process struct {
	addr   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
}

// startProcess returns when the process serves.
func startProcess(role string, args ...string) (*process, error) {
	p, err := launch(role, args...)
	if err != nil {
		return nil, err
	}
	if err := p.serves(); err != nil {
		p.end()
		return nil, fmt.Errorf("the process %q has not said where it serves: %w", role, err)
	}
	return p, nil
}

func launch(role string, args ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
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
	return &process{cmd: cmd, stdin: stdin, stdout: bufio.NewReader(stdout)}, nil
}

// serves waits until the process serves, or has done what it was started for.
func (p *process) serves() error {
	addr, err := p.stdout.ReadString('\n')
	p.addr = strings.TrimSpace(addr)
	return err
}

// usage asks the process.
func (p *process) usage() (u usage, err error) {
	if _, err := io.WriteString(p.stdin, "usage\n"); err != nil {
		return u, err
	}
	line, err := p.stdout.ReadBytes('\n')
	if err != nil {
		return u, err
	}
	return u, json.Unmarshal(line, &u)
}

func (p *process) end() {
	p.stdin.Close()
	p.cmd.Process.Kill()
	p.cmd.Wait() // killed is how it should end
}

// processes are those started so far, by role. Each role has its workers once,
// however many scenarios use them.
type processes map[string][]*process

const workers = 3

// of gives the addresses of the workers in a role.
func (ps processes) of(role string, args ...string) ([]string, error) {
	for len(ps[role]) < workers {
		if err := ps.start(role, args...); err != nil {
			return nil, err
		}
	}
	var addrs []string
	for _, p := range ps[role] {
		addrs = append(addrs, p.addr)
	}
	return addrs, nil
}

func (ps processes) start(role string, args ...string) error {
	p, err := startProcess(role, args...)
	if err == nil {
		ps[role] = append(ps[role], p)
	}
	return err
}

// usage is that of all of them, and of this process apart.
func (ps processes) usage() (own, others usage, err error) {
	for _, started := range ps {
		for _, p := range started {
			u, err := p.usage()
			if err != nil {
				return own, others, err
			}
			others.Mallocs += u.Mallocs
			others.CPU += u.CPU
		}
	}
	return ownUsage(), others, nil
}

func (ps processes) end() {
	for _, started := range ps {
		for _, p := range started {
			p.end()
		}
	}
}
