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
	instruction = "0123456789abcdef"
	bulkBytes   = 64 << 10 // of an instruction, and of an output
)

// scenarios is all that can be measured, in the order of the tables.
func scenarios(ps processes, o options) []scenario {
	all := yardsticks(ps)
	return []scenario{
		throughput(ps, o, all),
		oneAtATime(ps, o, all),
		bulk(ps, o),
		allocated(ps, o),
		held(ps, o),
		streamMemory(ps, o),
		crowd(o),
	}
}

// A yardstick is another way to have tasks executed by worker processes.
type yardstick struct {
	name  string
	share float64 // of a scenario's tasks: a fast one gets more, a slow one fewer, so that each takes about a tenth of a second
	links func() ([]link, error)
}

func yardsticks(ps processes) []yardstick {
	return []yardstick{
		{"raw", 4, linked(ps, "raw", overConn(rawForm{}.newLink))},
		{"raw, plain", 4, linked(ps, "raw plain", overConn(rawForm{plain: true}.newLink))},
		{"lines", 4, linked(ps, "lines", overConn(newLineLink))},
		{"grpc-go stream", 0.4, linked(ps, "grpc", newGRPCLink)},
		{"NATS request/reply", 0.4, sync.OnceValues(func() ([]link, error) { return natsLinks(ps) })},
		{"net/rpc", 0.1, linked(ps, "net/rpc", overConn(newRPCLink))},
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

// A way has n tasks executed over links: flood or oneByOne.
type way func(links []link, n int, payload string) error

// A gauge makes a measurement of f, which has n tasks executed.
type gauge func(n int, f func() error) (measurement, error)

// through has n tasks executed by a yardstick.
func (y yardstick) through(execute way, n int, payload string, g gauge) contestant {
	n = max(workers, int(float64(n)*y.share))
	return contestant{y.name, func() (measurement, error) {
		links, err := y.links()
		if err != nil {
			return measurement{}, err
		}
		return g(n, func() error { return execute(links, n, payload) })
	}}
}

// throughRun has n tasks executed by Run.
func throughRun(ps processes, name, role string, order taskexec.Order, n int, payload string, g gauge, options ...taskexec.CoordinatorOption) contestant {
	return contestant{name, func() (measurement, error) {
		c, err := coordinatorOf(ps, role, order, options...)
		if err != nil {
			return measurement{}, err
		}
		list := slices.Collect(tasks(n, payload))
		runtime.GC()
		return g(n, func() error {
			_, err := c.Run(context.Background(), list)
			return err
		})
	}}
}

// throughStream has n tasks executed by Stream.
func throughStream(ps processes, name, role string, order taskexec.Order, n int, payload string, g gauge) contestant {
	return contestant{name, func() (measurement, error) {
		c, err := coordinatorOf(ps, role, order)
		if err != nil {
			return measurement{}, err
		}
		return g(n, func() error { return stream(c, n, payload) })
	}}
}

func coordinatorOf(ps processes, role string, order taskexec.Order, options ...taskexec.CoordinatorOption) (*taskexec.Coordinator, error) {
	addrs, err := ps.of(role)
	if err != nil {
		return nil, err
	}
	return newCoordinator(addrs, order, options...)
}

func throughput(ps processes, o options, yardsticks []yardstick) scenario {
	n := max(workers, o.tasks/2)
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
	rate := func(n int, f func() error) (measurement, error) {
		m, err := ps.timed(n, f)
		m.value = 1 / m.value
		return m, err
	}
	for _, y := range yardsticks {
		s.contestants = append(s.contestants, y.through(flood, n, instruction, rate))
	}
	s.contestants = append(s.contestants,
		throughRun(ps, "Run, Concurrent", "taskexec", taskexec.Concurrent, n, instruction, rate),
		throughRun(ps, "Run, ByCategory", "taskexec", taskexec.ByCategory, n, instruction, rate),
		throughStream(ps, "Stream, Concurrent", "taskexec", taskexec.Concurrent, n, instruction, rate),
		throughStream(ps, "Stream, ByCategory", "taskexec", taskexec.ByCategory, n, instruction, rate))
	return s
}

func oneAtATime(ps processes, o options, yardsticks []yardstick) scenario {
	n := max(workers, o.tasks/200)
	s := scenario{
		name:     "one at a time",
		title:    "One task at a time, the workers in turn",
		unit:     microseconds,
		rounds:   o.rounds,
		baseline: "raw",
		figures:  []figure{{"a task's round trip, ByInput, to raw", "Run, ByInput", "raw", "≤ 1.25"}},
	}
	for _, y := range yardsticks {
		y.share = 1
		s.contestants = append(s.contestants, y.through(oneByOne, n, instruction, ps.timed))
	}
	s.contestants = append(s.contestants, throughRun(ps, "Run, ByInput", "taskexec", taskexec.ByInput, n, instruction, ps.timed))
	return s
}

func bulk(ps processes, o options) scenario {
	n := max(workers, o.tasks/1000)
	text := strings.Repeat(instruction, bulkBytes/len(instruction))
	volume := func(n int, f func() error) (measurement, error) {
		m, err := ps.timed(n, f)
		m.value = bulkBytes / m.value
		return m, err
	}
	raw := yardstick{"raw", 4, linked(ps, "raw echo", overConn(rawForm{echo: true}.newLink))}
	lines := yardstick{"lines", 4, linked(ps, "lines echo", overConn(newLineLink))}
	return scenario{
		name:     "64 KiB",
		title:    "Instructions and outputs of 64 KiB",
		unit:     bytesPerSecond,
		rounds:   o.rounds,
		baseline: "raw",
		contestants: []contestant{
			raw.through(flood, n, text, volume),
			lines.through(flood, n, text, volume),
			throughRun(ps, "Run, Concurrent", "taskexec echo", taskexec.Concurrent, n, text, volume),
			throughStream(ps, "Stream, Concurrent", "taskexec echo", taskexec.Concurrent, n, text, volume), // which keeps no output
			throughRun(ps, "Run, Concurrent, random bytes", "taskexec echo", taskexec.Concurrent, n, randomBytes(bulkBytes), volume),
		},
		figures: []figure{
			{"64 KiB outputs and instructions, text, through Run, to raw", "Run, Concurrent", "raw", "≥ 0.6"},
			{"the same through Stream", "Stream, Concurrent", "raw", "≥ 0.6"},
			{"the same through Run, of random bytes, some of which are escaped", "Run, Concurrent, random bytes", "raw", "≥ 0.6"},
		},
	}
}

// allocated counts what is allocated, wherever.
func allocated(ps processes, o options) scenario {
	n := max(workers, o.tasks/5)
	count := func(ofWorkers bool) gauge {
		return func(n int, f func() error) (measurement, error) {
			ownBefore, othersBefore, err := ps.usage()
			if err != nil {
				return measurement{}, err
			}
			if err := f(); err != nil {
				return measurement{}, err
			}
			own, others, err := ps.usage()
			count := own.Mallocs - ownBefore.Mallocs
			if ofWorkers {
				count = others.Mallocs - othersBefore.Mallocs
			}
			return measurement{value: float64(count) / float64(n)}, err
		}
	}
	run := func(name string, ofWorkers bool) contestant {
		return throughRun(ps, name, "taskexec", taskexec.Concurrent, n, instruction, count(ofWorkers))
	}
	return scenario{
		name:   "allocations",
		title:  "Allocations for a no-op task",
		unit:   allocations,
		rounds: 1,
		contestants: []contestant{
			run("coordinator, Run", false),
			run("worker, Run", true),
			throughStream(ps, "coordinator, Stream", "taskexec", taskexec.Concurrent, n, instruction, count(false)),
			throughStream(ps, "worker, Stream", "taskexec", taskexec.Concurrent, n, instruction, count(true)),
		},
		figures: []figure{
			{"in the coordinator", "coordinator, Run", "", "≤ 2"},
			{"in the worker", "worker, Run", "", "≤ 2"},
		},
	}
}
