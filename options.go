package taskexec

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A CoordinatorOption configures NewCoordinator. An option that serves both
// roles is an Option.
type CoordinatorOption interface {
	applyCoordinator(*coordinatorConfig)
}

// A WorkerOption configures NewWorker. An option that serves both roles is an
// Option.
type WorkerOption interface {
	applyWorker(*workerConfig)
}

// An Option configures either role.
type Option interface {
	CoordinatorOption
	WorkerOption
}

type coordinatorOption func(*coordinatorConfig)

func (o coordinatorOption) applyCoordinator(c *coordinatorConfig) { o(c) }

type workerOption func(*workerConfig)

func (o workerOption) applyWorker(c *workerConfig) { o(c) }

// option sets what both roles have.
type option func(*commonConfig)

func (o option) applyCoordinator(c *coordinatorConfig) { o(&c.commonConfig) }
func (o option) applyWorker(c *workerConfig)           { o(&c.commonConfig) }

type commonConfig struct {
	handshakeTimeout time.Duration
	insecure         bool            // plaintext may leave this machine
	logger           *slog.Logger    // nil: silent
	peers            map[string]Peer // by name; nil if there is no list

	// Set by WithTLS, and nil without.
	tls       *tls.Config
	tlsClient func(c *coordinatorConfig, conn net.Conn, addr, category string) tlsConn
	tlsServer func(c *workerConfig, conn net.Conn) tlsConn

	err error // bad data, reported by the function that the option's comment names
}

// addError keeps bad data for later: options return nothing.
func (c *commonConfig) addError(format string, args ...any) {
	c.err = errors.Join(c.err, fmt.Errorf("taskexec: "+format, args...))
}

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

type coordinatorConfig struct {
	commonConfig
	workers        map[string][]string // addresses by category
	dial           dialFunc            // nil for the default, until NewCoordinator fills it in
	order          Order
	sequence       []string
	window         int
	leastWindow    int // the window is no less, whatever is measured; 0: as many as slots. Tests set it
	shutdown       bool
	observer       *Observer
	onFailure      OnFailure
	taskTimeout    time.Duration
	retry          Retry
	atMostOnce     bool
	workerWait     time.Duration
	heartbeat      time.Duration
	silence        time.Duration
	jitter         func(most time.Duration) time.Duration // tests set it
	streamBuffer   int
	cancelGrace    time.Duration
	goodbyeTimeout time.Duration
}

func defaultCoordinatorConfig() coordinatorConfig {
	return coordinatorConfig{
		commonConfig:   commonConfig{handshakeTimeout: defaultHandshakeTimeout},
		workers:        make(map[string][]string),
		window:         windowTasks,
		streamBuffer:   8192,
		retry:          Retry{Attempts: 1},
		workerWait:     30 * time.Second,
		heartbeat:      5 * time.Second,
		silence:        15 * time.Second,
		jitter:         fullJitter,
		cancelGrace:    10 * time.Second,
		goodbyeTimeout: 30 * time.Second,
	}
}

type workerConfig struct {
	commonConfig
	slots      int
	categories []string
	name       string

	remoteShutdown RemoteShutdown
}

func defaultWorkerConfig() workerConfig {
	host, err := os.Hostname()
	if err != nil || !validName(host) || len(host) > 200 {
		host = "worker"
	}
	return workerConfig{
		commonConfig: commonConfig{handshakeTimeout: defaultHandshakeTimeout},
		slots:        1,
		name:         fmt.Sprintf("%s-%d", host, os.Getpid()),
	}
}

// WithWorkers lists the addresses of the workers of a category, each host:port
// or unix:/path. Called again for the same category it adds to the list. A
// worker that serves several categories is listed under each. There is no
// default: a task of a category without workers is refused.
//
// An address is connected to again when its worker is lost, and when it drains:
// what listens there then takes the tasks that wait, while the old worker
// finishes those that it runs.
func WithWorkers(category string, addrs ...string) CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) {
		if !validCategory(category) {
			c.addError("WithWorkers: category %s is not 1 to %d bytes of UTF-8 without control characters", quote(category), maxNameLen)
			return
		}
		if len(addrs) == 0 {
			c.addError("WithWorkers: no address for category %s", quote(category))
		}
		for _, addr := range addrs {
			if _, _, err := splitAddr(addr); err != nil {
				c.addError("WithWorkers: category %s: %s", quote(category), unprefixed(err))
				continue
			}
			if slices.Contains(c.workers[category], addr) {
				c.addError("WithWorkers: category %s lists %s twice; a worker takes part once, with as many slots as it has", quote(category), quote(addr))
				continue
			}
			c.workers[category] = append(c.workers[category], addr)
		}
	})
}

// splitAddr turns host:port or unix:/path into what a dialer takes.
func splitAddr(addr string) (network, address string, err error) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		if !filepath.IsAbs(path) {
			return "", "", fmt.Errorf("taskexec: address %s: the path after unix: must be absolute", quote(addr))
		}
		return "unix", path, nil
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil || port == "" {
		return "", "", fmt.Errorf("taskexec: address %s is neither host:port nor unix:/path", quote(addr))
	}
	if n, err := strconv.Atoi(port); err == nil && uint(n) > math.MaxUint16 || errors.Is(err, strconv.ErrRange) {
		return "", "", fmt.Errorf("taskexec: address %s: a port is a number up to %d, or a name", quote(addr), math.MaxUint16)
	}
	return "tcp", addr, nil
}

// WithDialer has dial make the connections to workers. It is called with the
// network "tcp" or "unix" and the address of WithWorkers without its unix:
// prefix, on several goroutines at a time. Its ctx bounds the dial, and not the
// connection; a run waits for a dial that goes on when its ctx has ended. The
// DialContext methods of net.Dialer and tls.Dialer fit, and so does a function
// that returns one end of a net.Pipe. A *tls.Conn is used as it is, whatever
// WithTLS says. A connection that takes no deadlines, such as one through an SSH
// client, is refused, since nothing could bound a wait for it; those that dial has
// set are lifted. The default is the DialContext of a zero net.Dialer. A nil dial
// panics; a panic of dial is not recovered, and ends the program.
func WithDialer(dial func(ctx context.Context, network, addr string) (net.Conn, error)) CoordinatorOption {
	if dial == nil {
		panic("taskexec: WithDialer: nil function")
	}
	return coordinatorOption(func(c *coordinatorConfig) { c.dial = dial })
}

// WithOrder says which tasks wait for which: ByCategory (the default),
// ByInput or Concurrent. An unknown order panics.
func WithOrder(o Order) CoordinatorOption {
	if o < ByCategory || o > Concurrent {
		panic("taskexec: WithOrder: unknown order " + o.String())
	}
	return coordinatorOption(func(c *coordinatorConfig) { c.order = o })
}

// WithSequence puts the given categories first, in this order; those it does
// not list follow, sorted. The default lists none. It belongs to the order
// ByCategory: with another order it is an error of NewCoordinator.
func WithSequence(categories ...string) CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) {
		for i, category := range categories {
			if !validCategory(category) {
				c.addError("WithSequence: category %s is not 1 to %d bytes of UTF-8 without control characters", quote(category), maxNameLen)
			}
			if slices.Contains(categories[:i], category) {
				c.addError("WithSequence: category %s is listed twice", quote(category))
			}
		}
		c.sequence = slices.Clone(categories)
	})
}

// OnFailure says what becomes of the rest of a run when a task is not Done.
type OnFailure int

const (
	// FinishStage, the default, runs the stage to its end and skips those
	// after it. With ByCategory, the rest of the category still runs; with
	// ByInput, the failed task was its whole stage; with Concurrent, all tasks
	// are one stage.
	FinishStage OnFailure = iota

	// StopSoon starts nothing new after the first failure, as make does: what
	// was sent and has not started is taken back, what runs finishes, and the
	// rest is Skipped.
	StopSoon

	// KeepGoing tries every task, as make -k does.
	KeepGoing
)

// String returns the name of the constant.
func (p OnFailure) String() string {
	switch p {
	case FinishStage:
		return "FinishStage"
	case StopSoon:
		return "StopSoon"
	case KeepGoing:
		return "KeepGoing"
	}
	return fmt.Sprintf("OnFailure(%d)", int(p))
}

// WithOnFailure says what becomes of the rest of a run when a task is not
// Done. The default is FinishStage. An unknown policy panics.
func WithOnFailure(p OnFailure) CoordinatorOption {
	if p < FinishStage || p > KeepGoing {
		panic("taskexec: WithOnFailure: unknown policy " + p.String())
	}
	return coordinatorOption(func(c *coordinatorConfig) { c.onFailure = p })
}

// WithAtMostOnce never sends a task again whose fate is not known: when its
// session is lost, its outcome is Unknown at once, with ErrOutcomeUnknown. With
// this option no more tasks are in flight to a worker than it has slots, so that
// little is lost with it, and each task costs a round trip. By default such a
// task is sent again, and may be executed twice.
//
// A task whose failure was reported may be tried again, as WithRetry says.
func WithAtMostOnce() CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) { c.atMostOnce = true })
}

// WithWorkerWait bounds how long a run waits for workers: at its start for each
// that cannot be reached, and later while all workers of a category are gone
// and tasks wait for one. Meanwhile they are dialed again, with a backoff of
// 100 ms, doubled up to 10 s, with full jitter. The first dial of each may take
// as long as WithHandshakeTimeout says, whatever d is. The default is 30 s; 0
// means not to wait. A negative d panics.
func WithWorkerWait(d time.Duration) CoordinatorOption {
	if d < 0 {
		panic(fmt.Sprintf("taskexec: WithWorkerWait: %v is negative", d))
	}
	return coordinatorOption(func(c *coordinatorConfig) { c.workerWait = d })
}

// WithHeartbeat pings workers every interval, and takes one from which no byte
// was received for timeout to be lost, whatever its connection says. (Over TLS
// that a dialer has brought, bytes are seen by the record, of up to 16 KiB.) It
// concerns workers that offer heartbeats in their greeting, as those of this
// package do; such a worker in turn cancels what it runs when it has not had an
// answer for 0.8 of timeout, so that it has stopped before the tasks are sent
// elsewhere.
// The default is 5 s and 15 s. An interval below 1 ms, or of more than half of
// timeout, is an error of NewCoordinator.
func WithHeartbeat(interval, timeout time.Duration) CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) {
		if interval < heartbeatLeast || interval > timeout/2 {
			c.addError("WithHeartbeat: %v and %v; the timeout must leave room for two intervals of %v or more", interval, timeout, heartbeatLeast)
			return
		}
		c.heartbeat, c.silence = interval, timeout
	})
}

// WithTaskTimeout bounds the execution of each task whose own Timeout is 0,
// counted on the worker from when its handler starts. The handler's ctx ends
// then; a task whose handler returns an error that wraps
// context.DeadlineExceeded because of that fails with KindTimeout, and one whose
// handler has not returned a second later with KindStuck: the handler keeps its
// slot until it returns, and what it returns is dropped. d is rounded up to a
// whole millisecond. The default, 0, is none. A negative d panics.
func WithTaskTimeout(d time.Duration) CoordinatorOption {
	if d < 0 {
		panic(fmt.Sprintf("taskexec: WithTaskTimeout: %v is negative", d))
	}
	return coordinatorOption(func(c *coordinatorConfig) { c.taskTimeout = d })
}

// WithCancelGrace bounds how long a canceled run waits for workers to report
// the tasks that they execute; what is not reported by then is Unknown. The
// default is 10 s. d of 0 or less panics.
func WithCancelGrace(d time.Duration) CoordinatorOption {
	if d <= 0 {
		panic(fmt.Sprintf("taskexec: WithCancelGrace: %v is not positive", d))
	}
	return coordinatorOption(func(c *coordinatorConfig) { c.cancelGrace = d })
}

// WithStreamBuffer bounds how many tasks a Stream holds: sent, or read from its
// sequence and waiting, or settled and not yet consumed. With ByCategory, which
// collects its tasks first, a task counts from when it may be sent. The default
// is 8192. If n is less than the windows of all workers together, these cannot
// all be filled. n below 1 panics.
func WithStreamBuffer(n int) CoordinatorOption {
	if n < 1 {
		panic(fmt.Sprintf("taskexec: WithStreamBuffer: %d is below 1", n))
	}
	return coordinatorOption(func(c *coordinatorConfig) { c.streamBuffer = n })
}

// WithWindow lets at most n tasks be in flight to a worker at a time: sent, and
// not yet reported. How many are, up to that, follows from measurement: as many
// as the worker has slots, plus what it starts within one and a half round trips
// and about 2 ms. The default is what the worker grants, and at most 4096. A
// worker is always given as many as it has slots. A smaller n bounds what is
// lost with a worker, at the cost of speed if tasks are short. n below 1 panics.
func WithWindow(n int) CoordinatorOption {
	if n < 1 {
		panic(fmt.Sprintf("taskexec: WithWindow: %d is below 1", n))
	}
	return coordinatorOption(func(c *coordinatorConfig) { c.window = min(n, windowTasks) })
}

// WithWorkerShutdown tells each worker to shut down as soon as no later stage of
// the run needs it; the run waits for its goodbye, for at most 30 s, before the
// next stage. By default workers are left serving.
//
// Workers are told after a stage with failures too, but not after Run's ctx has
// ended or the loop of a Stream was left, nor by a Run or a Stream that was refused
// before it sent anything. A worker is known by the instance it names in its
// greeting, so one that serves several categories is told once; one that names none
// is told in each of its sessions, when no later stage needs its address. A goodbye
// that is refused (see WithRemoteShutdown) or does not come is part of Run's error,
// though every task may be Done.
func WithWorkerShutdown() CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) { c.shutdown = true })
}

// WithObserver calls o's functions as runs go on. The default is none.
func WithObserver(o Observer) CoordinatorOption {
	return coordinatorOption(func(c *coordinatorConfig) { c.observer = &o })
}

// WithSlots lets a worker execute up to n tasks at a time, over all its
// sessions. The default is 1. n below 1 panics.
func WithSlots(n int) WorkerOption {
	if n < 1 {
		panic(fmt.Sprintf("taskexec: WithSlots: %d is below 1", n))
	}
	return workerOption(func(c *workerConfig) { c.slots = n })
}

// WithCategories lets a worker serve these categories only. By default it
// serves any. A category that is not 1 to 255 bytes of UTF-8 without control
// characters is an error of Serve, ListenAndServe and ServeConn, and so is a
// list too long for the worker's greeting, which holds 4 KiB.
func WithCategories(categories ...string) WorkerOption {
	return workerOption(func(c *workerConfig) {
		for _, category := range categories {
			if !validCategory(category) {
				c.addError("WithCategories: category %s is not 1 to %d bytes of UTF-8 without control characters", quote(category), maxNameLen)
			}
		}
		c.categories = slices.Clone(categories)
	})
}

// WithName names a worker in results, errors and its goodbye. The default is
// made of the host's name and the process's id, so workers that share a process
// should be given names of their own. A name that is not 1 to 255 bytes of UTF-8
// without control characters is an error of Serve, ListenAndServe and ServeConn.
func WithName(name string) WorkerOption {
	return workerOption(func(c *workerConfig) {
		if name == "" || !validName(name) {
			c.addError("WithName: %s is not 1 to %d bytes of UTF-8 without control characters", quote(name), maxNameLen)
			return
		}
		c.name = name
	})
}

// WithHandshakeTimeout bounds how long either side waits for the other's
// greeting, a TLS handshake included; for a coordinator that includes the dial
// too. The default is 10 s. d of 0 or less panics.
func WithHandshakeTimeout(d time.Duration) Option {
	if d <= 0 {
		panic(fmt.Sprintf("taskexec: WithHandshakeTimeout: %v is not positive", d))
	}
	return option(func(c *commonConfig) { c.handshakeTimeout = d })
}
