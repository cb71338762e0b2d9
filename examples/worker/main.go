// Worker listens for coordinators and executes their tasks. The work is a
// simulated one: each task takes -delay.
//
//	worker -type a -port 8001
//
// Its first line on stdout is "listening HOST:PORT"; logs go to stderr. It
// listens on loopback unless -host says otherwise; then coordinators have to
// prove who they are, with -tls-cert, -tls-key and -tls-ca on both sides, or
// -insecure lets in anybody.
//
// SIGINT or SIGTERM lets running tasks finish and then ends it, a second
// one ends it at once. It exits 0 when it has drained, whether a signal or a
// coordinator asked for it, 1 when it could not serve, 2 on wrong usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/taskexec"
	"example.com/taskexec/examples/internal/security"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("worker: ")
	types := flag.String("type", "a", "the `categories` to execute, comma-separated; also the worker's name")
	host := flag.String("host", "127.0.0.1", "the `address` to listen on")
	port := flag.Uint("port", 8001, "the TCP `port` to listen on; 0 lets the system pick one")
	slots := flag.Int("slots", 1, "how many tasks to execute at a time")
	delay := flag.Duration("delay", 0, "how long each task takes")
	verbose := flag.Bool("v", false, "log each task on stderr")
	secure := security.Register()
	flag.Parse()

	categories := strings.Split(*types, ",")
	switch {
	case flag.NArg() > 0:
		usage("unexpected argument %q", flag.Arg(0))
	case !usable(categories):
		usage("-type %q: want categories, comma-separated", *types)
	case *port > 65535:
		usage("-port %d: want 0 to 65535", *port)
	case *slots < 1:
		usage("-slots %d: want at least 1", *slots)
	case *delay < 0:
		usage("-delay %v: want 0 or more", *delay)
	}
	if err := secure.Check(); err != nil {
		usage("%v", err)
	}

	handler := &simulation{delay: *delay, verbose: *verbose}
	opts := []taskexec.WorkerOption{
		taskexec.WithName(*types), taskexec.WithCategories(categories...), taskexec.WithSlots(*slots),
	}
	secured, err := secure.Options()
	if err != nil {
		log.Fatal(err)
	}
	for _, o := range secured {
		opts = append(opts, o)
	}
	w := taskexec.NewWorker(handler, opts...)
	if err := serve(w, net.JoinHostPort(*host, strconv.FormatUint(uint64(*port), 10))); err != nil {
		log.Fatal(err)
	}
	log.Printf("done, %d tasks executed", handler.executed.Load())
}

// serve returns nil once the worker has drained.
func serve(w *taskexec.Worker, addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		log.Printf("%v: finishing what runs; once more to end at once", <-signals)
		go w.Shutdown(context.Background()) // Serve returns when it is through
		<-signals
		log.Fatal("ended before its tasks were")
	}()

	if err := w.Serve(context.Background(), &announced{TCPListener: ln.(*net.TCPListener)}); !errors.Is(err, taskexec.ErrWorkerClosed) {
		return err
	}
	return nil // the signal came before Serve did
}

// announced says that it listens when Serve first asks it for a connection:
// before that, Serve may still find fault with the worker's options, or with the
// listener, since it can tell that this is a TCP one.
type announced struct {
	*net.TCPListener
	once sync.Once
}

func (l *announced) Accept() (net.Conn, error) {
	l.once.Do(func() { fmt.Printf("listening %v\n", l.Addr()) })
	return l.TCPListener.Accept()
}

// simulation is the handler: it waits and says that it is done.
type simulation struct {
	delay    time.Duration
	verbose  bool
	executed atomic.Int64
}

func (s *simulation) Handle(ctx context.Context, task taskexec.Task) (string, error) {
	s.executed.Add(1)
	if s.verbose {
		log.Printf("executing %.300q", task.Instruction)
	}
	if s.delay > 0 {
		select {
		case <-time.After(s.delay):
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
	return "completed", nil
}

// usable reports whether each category is one that a task can have, by asking
// the library where it would file such a task.
func usable(categories []string) bool {
	for _, category := range categories {
		groups := taskexec.Partition([]taskexec.Task{{Category: category}})
		if len(groups) != 1 || groups[0].Category == "" {
			return false
		}
	}
	return true
}

func usage(format string, args ...any) {
	log.Printf(format, args...)
	flag.Usage()
	os.Exit(2)
}
