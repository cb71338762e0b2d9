// Coordinator reads instructions, separated by white space, and has workers
// execute them, category by category.
//
//	coordinator -input FILE -a localhost:8001 -b localhost:8002 -c localhost:8003
//
// It says on stdout what it does, or with -json what became of each task, one
// object a line; logs go to stderr. SIGINT or SIGTERM lets running tasks
// finish and skips the rest, a second one ends it at once. It exits 0 if all
// tasks are done, 1 if one is not or the run could not go on, 2 on wrong
// usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"example.com/taskexec"
)

const sample = "a1 a2 c1 b1 c2 b3 b2 b4 a3"

func main() {
	log.SetFlags(0)
	log.SetPrefix("coordinator: ")

	workers := map[string][]string{
		"a": {"localhost:8001"},
		"b": {"localhost:8002"},
		"c": {"localhost:8003"},
	}
	setWorkers := func(category, addrs string) error {
		list := strings.Split(addrs, ",")
		if category == "" || slices.Contains(list, "") {
			return errors.New("want addresses, comma-separated")
		}
		workers[category] = list
		return nil
	}
	for _, category := range []string{"a", "b", "c"} {
		flag.Func(category, fmt.Sprintf("the `addresses` of category %s's workers, comma-separated (default %s)", category, workers[category][0]),
			func(addrs string) error { return setWorkers(category, addrs) })
	}
	flag.Func("workers", "a category and the addresses of its workers, as in `z=ADDR,ADDR`; may be given several times", func(s string) error {
		category, addrs, _ := strings.Cut(s, "=")
		return setWorkers(category, addrs)
	})
	var order taskexec.Order
	flag.Func("order", "`category` (one category after another) or input (one task after another) (default category)", func(s string) error {
		switch s {
		case "category":
			order = taskexec.ByCategory
		case "input":
			order = taskexec.ByInput
		default:
			return errors.New("want category or input")
		}
		return nil
	})
	input := flag.String("input", "", "the `file` to read instructions from; - is stdin (default the sample "+sample+")")
	keep := flag.Bool("keep-workers", false, "leave the workers running")
	asJSON := flag.Bool("json", false, "print one JSON object a result, in the order of the plan")
	flag.Parse()
	if flag.NArg() > 0 {
		usage("unexpected argument %q", flag.Arg(0))
	}

	opts := []taskexec.CoordinatorOption{taskexec.WithOrder(order)}
	for _, category := range slices.Sorted(maps.Keys(workers)) {
		opts = append(opts, taskexec.WithWorkers(category, workers[category]...))
	}
	if !*keep {
		opts = append(opts, taskexec.WithWorkerShutdown())
	}
	if !*asJSON {
		opts = append(opts, taskexec.WithObserver(narrate(os.Stdout)))
	}
	coordinator, err := taskexec.NewCoordinator(opts...)
	if err != nil {
		usage("%v", err) // only flags can be at fault
	}

	tasks, err := read(*input)
	if err != nil {
		fail(err)
	}
	if !*asJSON {
		fmt.Println("[Coordinator] Starting task distribution")
	}
	report, err := run(coordinator, tasks)
	if *asJSON {
		if err := writeJSON(os.Stdout, report.Results, order); err != nil {
			fail(err)
		}
	}
	if err != nil {
		fail(err)
	}
}

// read returns the instructions of the file with that name.
func read(name string) ([]taskexec.Task, error) {
	var r io.Reader = os.Stdin
	switch name {
	case "":
		r = strings.NewReader(sample)
	case "-":
	default:
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r = f
	}
	scanner := taskexec.ScanTasks(r)
	tasks := slices.Collect(scanner.All())
	return tasks, scanner.Err()
}

// run is the coordinator's Run, which a signal ends early. Signals are caught
// only now: while instructions are read, there is nothing to drain.
func run(coordinator *taskexec.Coordinator, tasks []taskexec.Task) (*taskexec.Report, error) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		log.Printf("%v: finishing what runs; once more to end at once", <-signals)
		go coordinator.Shutdown(context.Background()) // Run returns when it is through
		<-signals
		log.Fatal("ended before its tasks were")
	}()
	return coordinator.Run(context.Background(), tasks)
}

// fail logs an error, which may join several, and exits.
func fail(err error) {
	for line := range strings.Lines(err.Error()) {
		log.Print(printable(strings.TrimSuffix(line, "\n")))
	}
	os.Exit(1)
}

func usage(format string, args ...any) {
	log.Printf(format, args...)
	flag.Usage()
	os.Exit(2)
}
