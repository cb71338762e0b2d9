package main

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"time"

	"example.com/taskexec"
)

// growth is how the cost of a task grows with what there is to do, so that what
// docs/performance.md says of it can be measured again.
func growth(ps processes, o options) []scenario {
	return []scenario{
		byTasks(ps, o),
		byWindow(ps, o),
		byPayload(ps, o),
		byRoundTrip(ps, o),
		byWorkers(o),
		byDuration(o),
	}
}

// grows is a scenario of growth, without its contestants. A few rounds do: the
// steps are larger than what the machine adds.
func grows(o options, name, title string) scenario {
	return scenario{name: name, title: title, unit: nanoseconds, rounds: min(o.rounds, 3), apart: true}
}

// byTasks has lists of different lengths run. A short one is run so often that
// each row executes a tenth of o.tasks or more.
func byTasks(ps processes, o options) scenario {
	s := grows(o, "by tasks", "Tasks in one Run")
	var lengths []int
	for _, part := range []int{1000, 100, 10, 1} {
		lengths = append(lengths, max(workers, o.tasks/part))
	}
	for _, n := range slices.Compact(append(lengths, 5*o.tasks)) {
		s.contestants = append(s.contestants, contestant{fmt.Sprintf("%d tasks", n), func() (measurement, error) {
			c, err := coordinatorOf(ps, "taskexec", taskexec.Concurrent)
			if err != nil {
				return measurement{}, err
			}
			list := slices.Collect(tasks(n, instruction))
			runtime.GC()
			times := max(1, o.tasks/10/n)
			return ps.timed(times*n, func() error {
				for range times {
					if _, err := c.Run(context.Background(), list); err != nil {
						return err
					}
				}
				return nil
			})
		}})
	}
	return s
}

// byWindow lets more and more tasks travel together.
func byWindow(ps processes, o options) scenario {
	s := grows(o, "by window", "Tasks in flight to each of three workers, at the most")
	for _, w := range []int{1, 2, 4, 16, 64, 256, 1024, 4096} {
		n := min(max(workers, o.tasks/100)*w, o.tasks/2)
		s.contestants = append(s.contestants, throughRun(ps, fmt.Sprintf("WithWindow(%d)", w), "taskexec", taskexec.Concurrent, n, instruction, ps.timed,
			taskexec.WithWindow(w)))
	}
	return s
}

// byPayload has instructions come back as outputs.
func byPayload(ps processes, o options) scenario {
	s := grows(o, "by payload", "Bytes of an instruction, and of its output, through Stream")
	for size := len(instruction); size <= bulkBytes; size *= 4 {
		n := max(workers, min(o.tasks/5, o.tasks*100/size))
		text := strings.Repeat(instruction, size/len(instruction))
		s.contestants = append(s.contestants, throughStream(ps, fmt.Sprintf("%d bytes", size), "taskexec echo", taskexec.Concurrent, n, text, ps.timed))
	}
	return s
}

// byRoundTrip has one worker further and further away.
func byRoundTrip(ps processes, o options) scenario {
	s := grows(o, "by round trip", fmt.Sprintf("Added to the round trip to one worker, %d tasks", max(workers, o.tasks/10)))
	for _, trip := range []time.Duration{0, time.Millisecond, 10 * time.Millisecond, 100 * time.Millisecond} {
		s.contestants = append(s.contestants, contestant{trip.String(), func() (measurement, error) {
			addrs, err := ps.of("taskexec")
			if err != nil {
				return measurement{}, err
			}
			// Not among ps: what it computes is neither side's.
			relay, err := startProcess("relay", (trip / 2).String(), addrs[0])
			if err != nil {
				return measurement{}, err
			}
			defer relay.end()
			c, err := newCoordinator([]string{relay.addr}, taskexec.Concurrent)
			if err != nil {
				return measurement{}, err
			}
			list := slices.Collect(tasksOf(categories[:1], max(workers, o.tasks/10), instruction))
			return ps.timed(len(list), func() error {
				_, err := c.Run(context.Background(), list)
				return err
			})
		}})
	}
	return s
}

// byWorkers is in this process, and so cannot tell the two sides apart.
func byWorkers(o options) scenario {
	s := grows(o, "by workers", "Workers of one category, in-process")
	s.apart = false
	for _, n := range []int{10, 100, 1000} {
		s.contestants = append(s.contestants, crowded(n, o.tasks))
	}
	return s
}

// sleepersEach is how many workers each of three processes has in byDuration:
// 999 together, and as many connections.
const sleepersEach = 333

// byDuration has 999 workers that take their time, so that little travels
// together. Rows have so many tasks that connecting is a small part of them.
func byDuration(o options) scenario {
	s := grows(o, "by duration", fmt.Sprintf("Tasks that take their time, %d workers of three categories", workers*sleepersEach))
	s.rounds = 1
	row := func(name string, n int, d time.Duration) {
		s.contestants = append(s.contestants, contestant{name, func() (measurement, error) {
			ps := make(processes) // which nobody else needs
			defer ps.end()
			addrs, err := ps.of("sleepers", d.String())
			if err != nil {
				return measurement{}, err
			}
			c, err := newCoordinator(addrs, taskexec.Concurrent)
			if err != nil {
				return measurement{}, err
			}
			list := slices.Collect(tasks(n, instruction))
			return ps.timed(n, func() error {
				_, err := c.Run(context.Background(), list)
				return err
			})
		}})
	}
	row("no time, one task each: connecting", workers*sleepersEach, 0)
	row("1ms", max(workers, o.tasks/5), time.Millisecond)
	row("10ms", max(workers, o.tasks/10), 10*time.Millisecond)
	row("100ms", max(workers, o.tasks/50), 100*time.Millisecond)
	return s
}

// serveSleepers is the role of many workers whose handlers sleep for args[0]. It
// has an address for each, separated by commas.
func serveSleepers(args []string) (string, error) {
	d, err := time.ParseDuration(args[0])
	if err != nil {
		return "", err
	}
	var addrs []string
	for range sleepersEach {
		addr, err := serveHandler(func(taskexec.Task) string {
			time.Sleep(d)
			return ""
		})
		if err != nil {
			return "", err
		}
		addrs = append(addrs, addr)
	}
	return strings.Join(addrs, ","), nil
}

// serveRelay is the role of a way to args[1] that takes args[0] in each
// direction, however much goes over it.
func serveRelay(args []string) (string, error) {
	delay, err := time.ParseDuration(args[0])
	if err != nil {
		return "", err
	}
	return serveEach(func(near net.Conn) {
		defer near.Close()
		far, err := net.Dial("tcp", args[1])
		if err != nil {
			return
		}
		defer far.Close()
		back := make(chan struct{})
		go func() {
			defer close(back)
			relayOneWay(near, far, delay)
		}()
		relayOneWay(far, near, delay)
		<-back
	})
}

// relayOneWay passes on what src sends, and its end.
func relayOneWay(dst, src net.Conn, delay time.Duration) {
	type chunk struct {
		due  time.Time
		data []byte
	}
	onTheWay := make(chan chunk, 1<<10)
	go func() {
		defer close(onTheWay)
		for {
			buf := make([]byte, bufferBytes)
			n, err := src.Read(buf)
			if n > 0 {
				onTheWay <- chunk{time.Now().Add(delay), buf[:n]}
			}
			if err != nil {
				return
			}
		}
	}()
	for c := range onTheWay {
		time.Sleep(time.Until(c.due))
		if _, err := dst.Write(c.data); err != nil {
			src.Close() // which ends the reading
		}
	}
	dst.(*net.TCPConn).CloseWrite()
}
