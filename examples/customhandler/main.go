// Customhandler computes SHA-256 checksums of files on a worker. It shows
// tasks whose instructions and outputs are typed values in JSON: any program
// that moves more than a word needs something like it.
//
//	customhandler FILE...
//
// It prints what sha256sum would, in the order of its arguments. Files that
// cannot be read are named on stderr, and it then exits 1.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"example.com/taskexec"
)

// request and checksum are what coordinator and worker say to each other.
type (
	request struct {
		Path string `json:"path"`
	}
	checksum struct {
		SHA256 string `json:"sha256"`
		Bytes  int64  `json:"bytes"`
	}
)

// sum reads the file once, and stops between two reads if the run is
// canceled.
func sum(ctx context.Context, in request) (checksum, error) {
	f, err := os.Open(in.Path)
	if err != nil {
		return checksum{}, err
	}
	defer f.Close()
	hash := sha256.New()
	n, err := io.Copy(hash, reader(func(p []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return f.Read(p)
	}))
	return checksum{hex.EncodeToString(hash.Sum(nil)), n}, err
}

type reader func(p []byte) (int, error)

func (r reader) Read(p []byte) (int, error) { return r(p) }

func main() {
	log.SetFlags(0)
	log.SetPrefix("customhandler: ")
	flag.Usage = func() { fmt.Fprintln(flag.CommandLine.Output(), "usage: customhandler FILE...") }
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	if err := run(ctx, flag.Args()); err != nil {
		for line := range strings.Lines(err.Error()) { // it may join several
			log.Print(printable(strings.TrimSuffix(line, "\n")))
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, paths []string) error {
	tasks := make([]taskexec.Task, len(paths))
	for i, path := range paths {
		var err error
		if tasks[i], err = taskexec.TaskOf("checksum", request{path}); err != nil {
			return err
		}
	}

	// The worker could as well be a process of its own on the machine that
	// has the files.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	worker := taskexec.NewWorker(taskexec.HandlerOf(sum),
		taskexec.WithCategories("checksum"), taskexec.WithSlots(runtime.GOMAXPROCS(0)))
	served := make(chan error, 1)
	go func() { served <- worker.Serve(context.Background(), ln) }()

	coordinator, err := taskexec.NewCoordinator(taskexec.WithWorkers("checksum", ln.Addr().String()))
	if err != nil {
		return err
	}
	report, err := coordinator.Run(ctx, tasks)
	for i, result := range report.Results {
		if result.Outcome != taskexec.Done {
			log.Print(printable(fmt.Sprintf("%s: %v", paths[i], errors.Unwrap(result.Err))))
			continue
		}
		c, err := taskexec.OutputOf[checksum](result)
		if err != nil {
			return err
		}
		fmt.Printf("%s  %s\n", printable(c.SHA256), printable(paths[i]))
	}
	return errors.Join(err, worker.Shutdown(context.Background()), <-served)
}

// printable returns text fit for a terminal: quoted if it holds anything that
// could be taken for more than text.
func printable(text string) string {
	if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(text)
	}
	return text
}
