// Benchmarks measures taskexec beside other ways to have tasks executed by
// worker processes: in one run, on one machine, in interleaved rounds.
//
//	go run -C benchmarks .
//	go run -C benchmarks . -growth
//
// The second measures how the cost of a task grows with what there is to do.
// It prints a table for each scenario, and one of what the project aims at. It
// judges nothing: its exit status is 0 if everything could be measured.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"regexp"
	"runtime/debug"
	"time"
)

// options are the flags.
type options struct {
	rounds      int
	tasks       int
	streamTasks int
	only        *regexp.Regexp
	growth      bool
	json        bool
	timeout     time.Duration
}

// window is one of them that the processes are given too.
var window = flag.Int("window", 0, "WithWindow of taskexec, in `tasks`; 0 leaves it its default")

func main() {
	log.SetFlags(0)
	log.SetPrefix("benchmarks: ")
	if name := os.Getenv(roleEnv); name != "" {
		flag.Parse()
		if err := play(name); err != nil {
			log.Fatal(err)
		}
		return
	}
	var o options
	flag.IntVar(&o.rounds, "rounds", 9, "how many `rounds` there are of what is timed")
	flag.IntVar(&o.tasks, "tasks", 1_000_000, "of how many `tasks` the memory of Run is measured; what is timed has a part of them")
	flag.IntVar(&o.streamTasks, "stream-tasks", 1_000_000, "during how many `tasks` the memory of Stream is measured")
	only := flag.String("only", "", "measure only the rows whose \"scenario/row\" matches this `regexp`; a ratio needs both its rows")
	flag.BoolVar(&o.growth, "growth", false, "measure instead how the cost of a task grows")
	flag.BoolVar(&o.json, "json", false, "print JSON instead of tables, with the values of each round")
	flag.DurationVar(&o.timeout, "timeout", 10*time.Minute, "panic after this `time`, with what every goroutine does")
	flag.Parse()
	if flag.NArg() > 0 || o.rounds < 1 || o.tasks < workers || o.streamTasks < workers {
		flag.Usage()
		os.Exit(2)
	}
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		log.Fatalf("-only: %v", err)
	}
	defer time.AfterFunc(o.timeout, func() {
		debug.SetTraceback("all")
		panic(fmt.Sprintf("not done after %v", o.timeout))
	}).Stop()
	if err := run(o); err != nil {
		log.Fatal(err)
	}
}

func run(o options) error {
	ps := make(processes)
	defer ps.end()
	result := outcome{Machine: thisMachine()}
	list := scenarios(ps, o)
	if o.growth {
		list = growth(ps, o)
	}
	for _, s := range list {
		m, err := s.measure(o.only)
		if err != nil {
			return err
		}
		if len(m.Rows) > 0 {
			result.Scenarios = append(result.Scenarios, m)
		}
	}
	if len(result.Scenarios) == 0 {
		return fmt.Errorf("-only %s selects no row", o.only)
	}
	if o.json {
		return result.writeJSON(os.Stdout)
	}
	return result.writeTables(os.Stdout)
}
