// Benchmarks measures taskexec beside other ways to have tasks executed by
// worker processes: in one run, on one machine, in interleaved rounds.
//
//	go run -C benchmarks .
//
// It prints a table for each scenario, and one of what the project aims at. It
// judges nothing: its exit status is 0 if everything could be measured.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"regexp"
)

// options are the flags.
type options struct {
	rounds      int
	tasks       int
	streamTasks int
	only        *regexp.Regexp
	json        bool
}

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
	flag.IntVar(&o.tasks, "tasks", 1_000_000, "how many `tasks` there are in a round of the fastest; the others have less, in proportion")
	flag.IntVar(&o.streamTasks, "stream-tasks", 1_000_000, "how many `tasks` the memory of Stream is measured with")
	only := flag.String("only", "", "measure only the rows whose \"scenario/row\" matches this `regexp`; a ratio needs both its rows")
	flag.BoolVar(&o.json, "json", false, "print JSON instead of tables, with the values of each round")
	flag.Parse()
	if flag.NArg() > 0 || o.rounds < 1 || o.tasks < workers || o.streamTasks < workers {
		flag.Usage()
		os.Exit(2)
	}
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		log.Fatalf("-only: %v", err)
	}
	if err := run(o); err != nil {
		log.Fatal(err)
	}
}

func run(o options) error {
	ps := make(processes)
	defer ps.end()
	var outcome outcome
	outcome.Machine = thisMachine()
	for _, s := range scenarios(ps, o) {
		m, err := s.measure(o.only)
		if err != nil {
			return err
		}
		if len(m.Rows) > 0 {
			outcome.Scenarios = append(outcome.Scenarios, m)
		}
	}
	if len(outcome.Scenarios) == 0 {
		return fmt.Errorf("-only %s selects nothing", o.only)
	}
	if o.json {
		return outcome.writeJSON(os.Stdout)
	}
	return outcome.writeTables(os.Stdout)
}
