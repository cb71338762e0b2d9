// Coordinator reads instructions, separated by white space, and has workers
// execute them, category by category.
//
//	coordinator -input FILE -a localhost:8001 -b localhost:8002 -c localhost:8003
//
// It says on stdout what it does, or with -json what became of each task, one
// object a line; logs go to stderr, and if that is a terminal, so does a line
// that shows how far the run has come. For workers on other machines, both sides
// need -tls-cert, -tls-key and -tls-ca, or -insecure. A worker is told to shut
// down as soon as nothing later needs it, unless -keep-workers is given.
//
// SIGINT or SIGTERM lets running tasks finish and skips the rest, a second one
// cancels what runs, and a third ends the coordinator at once. It exits 0 if all
// tasks are done, 1 if one is not or the run could not go on, 2 on wrong usage.
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
	"time"

	"example.com/taskexec"
	"example.com/taskexec/examples/internal/security"
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
	order := choice("order", "`category` (one category after another), input (one task after another) or concurrent (all at once)",
		map[string]taskexec.Order{"category": taskexec.ByCategory, "input": taskexec.ByInput, "concurrent": taskexec.Concurrent})
	onFailure := choice("on-failure", "what to do when a task is not done: `finish` (its stage, skip later ones), soon (start nothing more) or keep (try every task)",
		map[string]taskexec.OnFailure{"finish": taskexec.FinishStage, "soon": taskexec.StopSoon, "keep": taskexec.KeepGoing})
	timeout := flag.Duration("timeout", 0, "how long a task may execute; 0 is without end")
	wait := flag.Duration("wait", 30*time.Second, "how long to wait for workers that cannot be reached")
	input := flag.String("input", "", "the `file` to read instructions from; - is stdin (default the sample "+sample+")")
	keep := flag.Bool("keep-workers", false, "leave the workers running; with -insecure, those on other machines refuse to shut down")
	asJSON := flag.Bool("json", false, "print one JSON object a result, in the order of the plan; with -order concurrent, in that of the input")
	secure := security.Register()
	flag.Parse()
	if flag.NArg() > 0 {
		usage("unexpected argument %q", flag.Arg(0))
	}
	if *timeout < 0 {
		usage("-timeout %v: want 0 or more", *timeout)
	}
	if *wait < 0 {
		usage("-wait %v: want 0 or more", *wait)
	}
	if err := secure.Check(); err != nil {
		usage("%v", err)
	}

	var stdout io.Writer = os.Stdout
	var status *statusLine // nil unless there is a terminal to show it on
	if isTerminal(os.Stderr) {
		status = &statusLine{terminal: os.Stderr}
		stdout = status.writer(stdout)
		log.SetOutput(status.writer(os.Stderr))
	}

	opts := []taskexec.CoordinatorOption{
		taskexec.WithOrder(*order), taskexec.WithOnFailure(*onFailure), taskexec.WithTaskTimeout(*timeout),
		taskexec.WithWorkerWait(*wait),
	}
	for _, category := range slices.Sorted(maps.Keys(workers)) {
		opts = append(opts, taskexec.WithWorkers(category, workers[category]...))
	}
	secured, err := secure.Options()
	if err != nil {
		fail(err)
	}
	for _, o := range secured {
		opts = append(opts, o)
	}
	if !*keep {
		opts = append(opts, taskexec.WithWorkerShutdown())
	}
	if !*asJSON {
		opts = append(opts, taskexec.WithObserver(narrate(stdout)))
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
		fmt.Fprintln(stdout, "[Coordinator] Starting task distribution")
	}
	stop := func() {}
	if status != nil {
		stop = status.follow(coordinator, len(tasks))
	}
	report, err := run(coordinator, tasks)
	stop()
	if *asJSON {
		if err := writeJSON(stdout, report.Results, *order); err != nil {
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

// run is the coordinator's Run, which signals end early. Signals are caught only
// from here on: while instructions are read, there is nothing to drain.
func run(coordinator *taskexec.Coordinator, tasks []taskexec.Task) (*taskexec.Report, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		log.Printf("%v: finishing what runs; once more to cancel it", <-signals)
		go coordinator.Shutdown(context.Background()) // Run returns when it is through
		second := <-signals
		signal.Stop(signals) // a third one has its usual effect
		log.Printf("%v: canceling what runs; once more to end at once", second)
		cancel(fmt.Errorf("%v", second))
	}()
	return coordinator.Run(ctx, tasks)
}

// fail logs an error, which may join several, and exits.
func fail(err error) {
	for line := range strings.Lines(err.Error()) {
		log.Print(printable(strings.TrimSuffix(line, "\n")))
	}
	os.Exit(1)
}

// choice defines a flag that takes one of some words, each of which stands for a
// value. The default is the zero value.
func choice[T any](name, help string, values map[string]T) *T {
	chosen := new(T)
	flag.Func(name, help, func(word string) error {
		value, ok := values[word]
		if !ok {
			return fmt.Errorf("want one of %s", strings.Join(slices.Sorted(maps.Keys(values)), ", "))
		}
		*chosen = value
		return nil
	})
	return chosen
}

func usage(format string, args ...any) {
	log.Printf(format, args...)
	flag.Usage()
	os.Exit(2)
}
