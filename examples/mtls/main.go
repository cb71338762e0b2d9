// Mtls runs three workers and a coordinator in one process that talk over mutual
// TLS: each has a certificate, and a list says what each may be. The authority
// that vouches for them is made on the spot and forgotten in the end; real ones
// keep their key elsewhere, and hand out certificates that last for days or
// hours.
//
// It prints what becomes of nine instructions, category a before b before c, and
// for whom each was executed. Before that it shows that a worker's certificate
// does not make a coordinator.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"slices"

	"example.com/taskexec"
)

const (
	sample      = "a1 a2 c1 b1 c2 b3 b2 b4 a3"
	coordinator = "spiffe://mtls.example/coordinator"
)

func workerName(category string) string { return "spiffe://mtls.example/worker/" + category }

func main() {
	log.SetFlags(0)
	log.SetPrefix("mtls: ")
	if len(os.Args) > 1 {
		log.Print("usage: mtls (it takes no arguments)")
		os.Exit(2)
	}
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	ca, err := newAuthority()
	if err != nil {
		return err
	}
	categories := []string{"a", "b", "c"}
	// The same list for everybody.
	peers := []taskexec.Peer{{Name: coordinator, Coordinator: true}}
	for _, category := range categories {
		peers = append(peers, taskexec.Peer{Name: workerName(category), Categories: []string{category}})
	}

	served := make(chan error, len(categories))
	opts := []taskexec.CoordinatorOption{taskexec.WithPeers(peers...), taskexec.WithWorkerShutdown()}
	for _, category := range categories {
		config, err := ca.config(workerName(category))
		if err != nil {
			return err
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		w := taskexec.NewWorker(taskexec.HandlerFunc(handle), taskexec.WithName(category),
			taskexec.WithCategories(category), taskexec.WithTLS(config), taskexec.WithPeers(peers...))
		go func() { served <- w.Serve(ctx, ln) }()
		opts = append(opts, taskexec.WithWorkers(category, ln.Addr().String()))
		fmt.Println(workerName(category), "listens")
	}
	tasks, err := taskexec.ParseTasks(sample)
	if err != nil {
		return err
	}

	// A worker's certificate is in order, but not for this.
	impostor, err := newCoordinator(ca, workerName("a"), opts)
	if err != nil {
		return err
	}
	_, err = impostor.Run(ctx, tasks)
	refused, ok := errors.AsType[*taskexec.WorkerError](err)
	if !ok {
		return fmt.Errorf("a worker was taken for a coordinator: %v", err)
	}
	fmt.Printf("%s as a coordinator: %v\n", workerName("a"), refused.Err)

	c, err := newCoordinator(ca, coordinator, opts)
	if err != nil {
		return err
	}
	for result, err := range c.Stream(ctx, slices.Values(tasks)) {
		if err != nil {
			return err
		}
		fmt.Printf("%s %v %q\n", result.Task.Instruction, result.Outcome, result.Output) // quoted: a worker may say anything
	}
	for range categories {
		if err := <-served; err != nil { // nil, since the coordinator shut it down
			return err
		}
	}
	return nil
}

// newCoordinator returns one with a certificate for that name.
func newCoordinator(ca *authority, name string, opts []taskexec.CoordinatorOption) (*taskexec.Coordinator, error) {
	config, err := ca.config(name)
	if err != nil {
		return nil, err
	}
	return taskexec.NewCoordinator(append(slices.Clip(opts), taskexec.WithTLS(config))...)
}

// handle says for whom it works.
func handle(ctx context.Context, task taskexec.Task) (string, error) {
	info, _ := taskexec.TaskInfoFrom(ctx)
	return "for " + info.Coordinator, nil
}
