package taskexec

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestBadDataInOptionsIsAnErrorThatNamesIt(t *testing.T) {
	long := strings.Repeat("a", 256)
	for _, tt := range []struct {
		reason  string
		options []CoordinatorOption
		want    []string // in the error; none: there is no error
	}{
		{"nothing at all is fine: an empty run needs no worker", nil, nil},
		{"host:port, a literal address, a path", []CoordinatorOption{WithWorkers("a", "h:1", "[::1]:80", "unix:/run/a.sock")}, nil},
		{"the first port and the last, and a name", []CoordinatorOption{WithWorkers("a", "h:0", "h:65535", "h:http")}, nil},
		{"no such port", []CoordinatorOption{WithWorkers("a", "h:65536")}, []string{`"h:65536"`, "a port is a number up to 65535"}},
		{"a second call adds to the list", []CoordinatorOption{WithWorkers("a", "h:1"), WithWorkers("a", "h:2")}, nil},
		{"one worker for several categories", []CoordinatorOption{WithWorkers("a", "h:1"), WithWorkers("b", "h:1")}, nil},
		{"no port", []CoordinatorOption{WithWorkers("a", "localhost")}, []string{`category "a"`, `"localhost"`, "host:port"}},
		{"an empty port", []CoordinatorOption{WithWorkers("a", "localhost:")}, []string{`"localhost:"`}},
		{"an empty address", []CoordinatorOption{WithWorkers("a", "")}, []string{`""`}},
		{"a relative path", []CoordinatorOption{WithWorkers("a", "unix:a.sock")}, []string{`"unix:a.sock"`, "absolute"}},
		{"no address", []CoordinatorOption{WithWorkers("a")}, []string{`no address for category "a"`}},
		{"an address twice", []CoordinatorOption{WithWorkers("a", "h:1", "h:1")}, []string{"twice", `"h:1"`}},
		{"an address twice, in two calls", []CoordinatorOption{WithWorkers("a", "h:1"), WithWorkers("a", "h:1")}, []string{"twice"}},
		{"an empty category", []CoordinatorOption{WithWorkers("", "h:1")}, []string{"category"}},
		{"a category with a control character", []CoordinatorOption{WithWorkers("a\x1b[2J", "h:1")}, []string{`a\x1b[2J`}},
		{"a category that is too long is cut in the message", []CoordinatorOption{WithWorkers(long, "h:1")}, []string{"aaa…"}},
		{"every fault is named", []CoordinatorOption{WithWorkers("a", "x"), WithWorkers("b", "y")}, []string{`"x"`, `"y"`}},
		{"a sequence with a duplicate", []CoordinatorOption{WithSequence("b", "a", "b")}, []string{`WithSequence: category "b" is listed twice`}},
		{"a sequence with a bad category", []CoordinatorOption{WithSequence("")}, []string{"WithSequence"}},
		{"a sequence of what has no tasks is fine", []CoordinatorOption{WithSequence("z", "a")}, nil},
		{"a sequence has no meaning by input", []CoordinatorOption{WithSequence("b"), WithOrder(ByInput)}, []string{"WithSequence", "ByInput"}},
		{"in whatever order they are given", []CoordinatorOption{WithOrder(ByInput), WithSequence("b")}, []string{"WithSequence", "ByInput"}},
		{"an empty sequence is none", []CoordinatorOption{WithOrder(ByInput), WithSequence()}, nil},
		{"a literal address elsewhere", []CoordinatorOption{WithWorkers("a", "h:1", "192.0.2.1:1")}, []string{"192.0.2.1:1", "WithTLS", "WithInsecure"}},
		{"one with a zone", []CoordinatorOption{WithWorkers("a", "[fe80::1%eth0]:1")}, []string{"fe80::1%eth0"}},
		{"what only dialing can tell: whether an address of every kind leads elsewhere", []CoordinatorOption{WithWorkers("a", ":1", "0.0.0.0:1", "[::]:1", "h:1")}, nil},
		{"plaintext to elsewhere is wanted", []CoordinatorOption{WithWorkers("a", "192.0.2.1:1"), WithInsecure()}, nil},
		{"a dialer's addresses mean what it likes", []CoordinatorOption{WithWorkers("a", "192.0.2.1:1"), WithDialer(new(memNetwork).dial)}, nil},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			c, err := NewCoordinator(tt.options...)
			if (c == nil) != (err != nil) || (err != nil) != (tt.want != nil) {
				t.Fatalf("got %v and %v", c, err)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v\ndoes not say %s", err, want)
				}
			}
			if err == nil {
				return
			}
			for line := range strings.Lines(err.Error()) {
				if !strings.HasPrefix(line, "taskexec: ") || strings.Count(line, "taskexec: ") != 1 || strings.Contains(line, "\x1b") {
					t.Errorf("got the line %q", line)
				}
			}
		})
	}
}

func TestMisuseOfAnOptionPanics(t *testing.T) {
	for _, tt := range []struct {
		name   string
		option func()
	}{
		{"WithDialer(nil)", func() { WithDialer(nil) }},
		{"WithOrder(7)", func() { WithOrder(7) }},
		{"WithOrder(-1)", func() { WithOrder(-1) }},
		{"WithWindow(0)", func() { WithWindow(0) }},
		{"WithSlots(0)", func() { WithSlots(0) }},
		{"WithTaskTimeout(-1ns)", func() { WithTaskTimeout(-1) }},
		{"WithCancelGrace(0)", func() { WithCancelGrace(0) }},
		{"WithStreamBuffer(0)", func() { WithStreamBuffer(0) }},
		{"WithOnFailure(-1)", func() { WithOnFailure(-1) }},
		{"WithOnFailure(3)", func() { WithOnFailure(3) }},
		{"WithHandshakeTimeout(0)", func() { WithHandshakeTimeout(0) }},
		{"WithHandshakeTimeout(-1s)", func() { WithHandshakeTimeout(-time.Second) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer func() {
				name, _, _ := strings.Cut(tt.name, "(")
				if v := recover(); v == nil || !strings.HasPrefix(fmt.Sprint(v), "taskexec: "+name+": ") {
					t.Errorf("got the panic %v", v)
				}
			}()
			tt.option()
		})
	}
}

func TestOptionsOfOneCoordinatorDoNotReachAnother(t *testing.T) {
	workers := WithWorkers("a", "h:1")
	for range 2 { // the same value twice: each has its own list
		if _, err := NewCoordinator(workers); err != nil {
			t.Error(err)
		}
	}
	addrs := []string{"h:1"}
	option := WithWorkers("a", addrs...)
	c, err := NewCoordinator(option)
	if err != nil {
		t.Fatal(err)
	}
	addrs[0] = "changed"
	if got := c.config.workers["a"][0]; got != "h:1" {
		t.Errorf("the coordinator has %s after its caller's slice changed", got)
	}
}
