package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"sync"
	"time"

	"example.com/taskexec"
)

// held is what Run holds of a long list, in this process's heap.
func held(ps processes, o options) scenario {
	afterwards := func(role string, outputBytes int) func() (measurement, error) {
		return func() (measurement, error) {
			c, list, err := prepared(ps, role, o.tasks)
			if err != nil {
				return measurement{}, err
			}
			before := liveHeap()
			report, err := c.Run(context.Background(), list)
			after := liveHeap()
			runtime.KeepAlive(report)
			runtime.KeepAlive(list)
			return measurement{value: float64(after-before)/float64(o.tasks) - float64(outputBytes)}, err
		}
	}
	highest := func() (measurement, error) {
		c, list, err := prepared(ps, "taskexec", o.tasks)
		if err != nil {
			return measurement{}, err
		}
		before := liveHeap()
		most, err := highestHeap(func() error {
			_, err := c.Run(context.Background(), list)
			return err
		})
		runtime.KeepAlive(list)
		return measurement{value: float64(most-before) / float64(o.tasks)}, err
	}
	return scenario{
		name:   "Run's memory",
		title:  fmt.Sprintf("What Run over %d tasks holds beyond the tasks and the outputs", o.tasks),
		unit:   bytesPerTask,
		rounds: 1,
		contestants: []contestant{
			{"afterwards", afterwards("taskexec", 0)},
			{"afterwards, outputs of 16 bytes", afterwards("taskexec echo", len(instruction))},
			{"meanwhile, at the most", highest},
		},
		figures: []figure{
			{"what Run holds afterwards", "afterwards", "", "≤ 200"},
			{"what it holds meanwhile", "meanwhile, at the most", "", "≤ 200"},
		},
	}
}

func prepared(ps processes, role string, n int) (*taskexec.Coordinator, []taskexec.Task, error) {
	c, err := coordinatorOf(ps, role, taskexec.Concurrent)
	return c, slices.AppendSeq(make([]taskexec.Task, 0, n), tasks(n, instruction)), err
}

// liveHeap is what is in use in the heap, in bytes.
func liveHeap() int64 {
	runtime.GC()
	return lastLiveHeap()
}

// lastLiveHeap is what was in use in the heap when the garbage collector last
// looked.
func lastLiveHeap() int64 {
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	return int64(sample[0].Value.Uint64())
}

// highestHeap is what is in use in the heap at the most while f goes on.
func highestHeap(f func() error) (int64, error) {
	defer debug.SetGCPercent(debug.SetGCPercent(10)) // look often
	done := make(chan error)
	go func() { done <- f() }()
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	var most int64
	for {
		select {
		case err := <-done:
			return most, err
		case <-ticker.C:
			most = max(most, lastLiveHeap())
		}
	}
}

// streamMemory is what coordinator and workers hold while a Stream goes on,
// seen from outside. Both are processes of their own that have done nothing
// else before.
func streamMemory(ps processes, o options) scenario {
	s := scenario{
		name:   "Stream's memory",
		title:  fmt.Sprintf("Resident memory during a Stream of %d tasks", o.streamTasks),
		unit:   mebibytes,
		rounds: 1,
	}
	if _, err := readMemory(os.Getpid()); err != nil {
		s.note = "Not measured: only Linux says how much memory a process has."
		return s
	}
	measured := sync.OnceValues(func() (map[string][]residentMemory, error) { return watchStream(o.streamTasks) })
	for _, who := range []string{"coordinator", "worker"} {
		for _, percent := range []int{25, 50, 75, 100} {
			s.contestants = append(s.contestants, contestant{fmt.Sprintf("%s, after %d %%", who, percent), func() (measurement, error) {
				m, err := measured()
				if err != nil {
					return measurement{}, err
				}
				return measurement{value: float64(m[who][(len(m[who])-1)*percent/100].now)}, nil
			}})
		}
		most := who + ", at the most"
		s.contestants = append(s.contestants, contestant{most, func() (measurement, error) {
			m, err := measured()
			if err != nil {
				return measurement{}, err
			}
			return measurement{value: float64(m[who][len(m[who])-1].highest)}, nil
		}})
		s.figures = append(s.figures,
			figure{"resident memory of the " + who + " of a Stream", most, "", "≤ 64"},
			figure{"the same at the end, to that after a quarter", who + ", after 100 %", who + ", after 25 %", "flat"})
	}
	return s
}

// watchStream has n tasks go through a Stream, and looks at the memory of the
// processes meanwhile. For the workers it notes the largest.
func watchStream(n int) (map[string][]residentMemory, error) {
	ps := make(processes)
	defer ps.end()
	addrs, err := ps.of("taskexec")
	if err != nil {
		return nil, err
	}
	args := append([]string{"-window", strconv.Itoa(*window), strconv.Itoa(n)}, addrs...)
	coordinator, err := launch("stream", args...)
	if err != nil {
		return nil, err
	}
	defer coordinator.end()
	done := make(chan error, 1)
	go func() { done <- coordinator.serves() }()
	seen := make(map[string][]residentMemory)
	look := func() error {
		m, err := readMemory(coordinator.cmd.Process.Pid)
		if err != nil {
			return err
		}
		seen["coordinator"] = append(seen["coordinator"], m)
		var most residentMemory
		for _, p := range ps["taskexec"] {
			m, err := readMemory(p.cmd.Process.Pid)
			if err != nil {
				return err
			}
			most = residentMemory{max(most.now, m.now), max(most.highest, m.highest)}
		}
		seen["worker"] = append(seen["worker"], most)
		return nil
	}
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return nil, err
			}
			return seen, look()
		case <-ticker.C:
			if err := look(); err != nil {
				return nil, err
			}
		}
	}
}

// streamInProcess is the role of a coordinator that streams args[0] tasks to
// the workers at the other addresses.
func streamInProcess(args []string) (string, error) {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return "", err
	}
	c, err := newCoordinator(args[1:], taskexec.Concurrent)
	if err != nil {
		return "", err
	}
	return "", stream(c, n, instruction)
}

// residentMemory is what of a process is in physical memory, in bytes.
type residentMemory struct {
	now, highest int64
}

// readMemory has an error elsewhere than on Linux.
func readMemory(pid int) (m residentMemory, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return m, err
	}
	for line := range bytes.Lines(status) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		kib, _ := strconv.ParseInt(string(bytes.TrimSuffix(bytes.TrimSpace(value), []byte(" kB"))), 10, 64)
		switch string(key) {
		case "VmRSS":
			m.now = kib << 10
		case "VmHWM":
			m.highest = kib << 10
		}
	}
	return m, nil
}
