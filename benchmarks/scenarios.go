package main

import (
	"context"
	"runtime"
	"slices"
	"strings"
	"sync"

	"example.com/taskexec"
)

const (
	instruction     = "0123456789abcdef"
	bigPayloadBytes = 64 << 10
)

// scenarios is all that can be measured, in the order of the tables.
func scenarios(ps processes, o options) []scenario {
	all := yardsticks(ps)
	return []scenario{
		throughput(ps, o, all),
		oneAtATime(ps, o, all),
		bulk(ps, o),
	}
}

// A yardstick is another way to have tasks executed by worker processes.
type yardstick struct {
	name  string
	share float64 // of a scenario's tasks: a slow one gets fewer, and as much time
	links func() ([]link, error)
}

func yardsticks(ps processes) []yardstick {
	return []yardstick{
		{"raw", 1, linked(ps, "raw", overConn(rawForm{}.newLink))},
		{"raw, plain", 1, linked(ps, "raw plain", overConn(rawForm{plain: true}.newLink))},
		{"lines", 1, linked(ps, "lines", overConn(newLineLink))},
		{"grpc-go stream", 0.2, linked(ps, "grpc", newGRPCLink)},
		{"NATS request/reply", 0.2, sync.OnceValues(func() ([]link, error) { return natsLinks(ps) })},
		{"net/rpc", 0.05, linked(ps, "net/rpc", overConn(newRPCLink))},
	}
}

// linked makes a link to each worker of a role when they are first needed; the
// same are used from then on.
func linked(ps processes, role string, newLink func(addr string) (link, error)) func() ([]link, error) {
	return sync.OnceValues(func() ([]link, error) {
		addrs, err := ps.of(role)
		if err != nil {
			return nil, err
		}
		return linkAll(addrs, newLink)
	})
}

// measured has n tasks executed over the yardstick's links.
func (y yardstick) measured(n int, payload string, execute func([]link, int, string) error, value timing) contestant {
	n = max(workers, int(float64(n)*y.share))
	return contestant{y.name, func() (float64, error) {
		links, err := y.links()
		if err != nil {
			return 0, err
		}
		runtime.GC()
		return value(n, func() error { return execute(links, n, payload) })
	}}
}

// ran has n tasks executed by Run.
func ran(ps processes, name, role string, order taskexec.Order, n int, payload string, value timing) contestant {
	return contestant{name, func() (float64, error) {
		c, err := coordinatorOf(ps, role, order)
		if err != nil {
			return 0, err
		}
		list := slices.Collect(tasks(n, payload))
		runtime.GC()
		return value(n, func() error {
			_, err := c.Run(context.Background(), list)
			return err
		})
	}}
}

// streamed has n tasks executed by Stream, Concurrent.
func streamed(ps processes, name string, n int, payload string, value timing) contestant {
	return contestant{name, func() (float64, error) {
		c, err := coordinatorOf(ps, "taskexec", taskexec.Concurrent)
		if err != nil {
			return 0, err
		}
		runtime.GC()
		return value(n, func() error { return stream(c, n, payload) })
	}}
}

func coordinatorOf(ps processes, role string, order taskexec.Order) (*taskexec.Coordinator, error) {
	addrs, err := ps.of(role)
	if err != nil {
		return nil, err
	}
	return newCoordinator(addrs, order)
}

func throughput(ps processes, o options, yardsticks []yardstick) scenario {
	s := scenario{
		name:     "throughput",
		title:    "No-op tasks of 16 bytes, each acknowledged",
		unit:     tasksPerSecond,
		rounds:   o.rounds,
		baseline: "raw",
		figures: []figure{
			{"no-op tasks through Run, to raw", "Run, Concurrent", "raw", "≥ 0.35"},
			{"no-op tasks through Run, to plain raw", "Run, Concurrent", "raw, plain", "≥ 0.35"},
			{"no-op tasks through Run, to a grpc-go stream", "Run, Concurrent", "grpc-go stream", "≥ 6"},
			{"no-op tasks through Run, to NATS request/reply", "Run, Concurrent", "NATS request/reply", "≥ 4"},
			{"no-op tasks through Stream, to Run", "Stream, Concurrent", "Run, Concurrent", "≥ 0.8"},
		},
	}
	for _, y := range yardsticks {
		s.contestants = append(s.contestants, y.measured(o.tasks, instruction, flood, perSecond))
	}
	s.contestants = append(s.contestants,
		ran(ps, "Run, Concurrent", "taskexec", taskexec.Concurrent, o.tasks, instruction, perSecond),
		ran(ps, "Run, ByCategory", "taskexec", taskexec.ByCategory, o.tasks, instruction, perSecond),
		streamed(ps, "Stream, Concurrent", o.tasks, instruction, perSecond))
	return s
}

func oneAtATime(ps processes, o options, yardsticks []yardstick) scenario {
	n := max(workers, o.tasks/200)
	s := scenario{
		name:     "one at a time",
		title:    "One task at a time, the workers in turn",
		unit:     roundTrip,
		rounds:   o.rounds,
		baseline: "raw",
		figures:  []figure{{"a task's round trip, ByInput, to raw", "Run, ByInput", "raw", "≤ 1.25"}},
	}
	for _, y := range yardsticks {
		y.share = 1
		s.contestants = append(s.contestants, y.measured(n, instruction, oneByOne, secondsEach))
	}
	s.contestants = append(s.contestants, ran(ps, "Run, ByInput", "taskexec", taskexec.ByInput, n, instruction, secondsEach))
	return s
}

func bulk(ps processes, o options) scenario {
	n := max(workers, o.tasks/250)
	plain := strings.Repeat(instruction, bigPayloadBytes/len(instruction))
	bytesEachSecond := func(n int, f func() error) (float64, error) {
		rate, err := perSecond(n, f)
		return rate * bigPayloadBytes, err
	}
	raw := yardstick{"raw", 1, linked(ps, "raw echo", overConn(rawForm{echo: true}.newLink))}
	lines := yardstick{"lines", 1, linked(ps, "lines echo", overConn(newLineLink))}
	return scenario{
		name:     "64 KiB",
		title:    "Instructions and outputs of 64 KiB",
		unit:     bytesPerSecond,
		rounds:   o.rounds,
		baseline: "raw",
		contestants: []contestant{
			raw.measured(n, plain, flood, bytesEachSecond),
			lines.measured(n, plain, flood, bytesEachSecond),
			ran(ps, "Run, Concurrent", "taskexec echo", taskexec.Concurrent, n, plain, bytesEachSecond),
			ran(ps, "Run, Concurrent, random bytes", "taskexec echo", taskexec.Concurrent, n, randomBytes(bigPayloadBytes), bytesEachSecond),
		},
		figures: []figure{
			{"64 KiB outputs and instructions, to raw", "Run, Concurrent", "raw", "≥ 0.6"},
		},
	}
}
