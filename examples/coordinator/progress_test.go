package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"example.com/taskexec"
)

func TestProgressIsOneLine(t *testing.T) {
	many := taskexec.RunSnapshot{}
	for i := range 100 {
		many.Categories = append(many.Categories, taskexec.CategorySnapshot{Category: strings.Repeat("漢", 1+i), InFlight: 1})
	}
	for _, test := range []struct {
		run    taskexec.RunSnapshot
		tasks  int
		want   string
		reason string
	}{
		{taskexec.RunSnapshot{}, 9, "0s: 0 of 9 done", "nothing is connected yet"},
		{taskexec.RunSnapshot{Elapsed: 61900 * time.Millisecond, Categories: []taskexec.CategorySnapshot{
			{Category: "a", Counts: taskexec.Counts{Done: 1000}},
			{Category: "b", Waiting: 700, InFlight: 64, Counts: taskexec.Counts{Done: 234, Failed: 2}},
			{Category: "c", Waiting: 1000},
		}}, 3000, "1m1s: 1,234 of 3,000 done, 2 failed; now b 236/1,000", "the categories that run are named"},
		{taskexec.RunSnapshot{Categories: []taskexec.CategorySnapshot{
			{Category: "a", Counts: taskexec.Counts{Unknown: 1}},
			{Category: "b\x1b", InFlight: 1},
			{Category: "c", InFlight: 1, Waiting: 1},
		}}, 4, `0s: 0 of 4 done, 1 unknown; now "b\x1b" 0/1, c 0/2`, "what is lost is said, and nothing steers the terminal"},
		{taskexec.RunSnapshot{Categories: []taskexec.CategorySnapshot{
			{Category: "a", Waiting: 1, Workers: []taskexec.WorkerSnapshot{{Addr: "h:1", Open: true}, {Addr: "h:2"}}},
			{Category: "b", Waiting: 1, Workers: []taskexec.WorkerSnapshot{{Addr: "h:3"}}},
			{Category: "c", Workers: []taskexec.WorkerSnapshot{{Addr: "h:4"}}},
		}}, 2, "0s: 0 of 2 done; waiting for a at h:2, b at h:3", "nothing goes on until they are there"},
		{many, 100, "0s: 0 of 100 done; now 漢 0/1, 漢漢 0/1, 漢漢漢 0/1, 漢漢漢漢 0/1, 漢漢漢漢漢…", "a line that wraps cannot be wiped"},
	} {
		got := progress(test.run, test.tasks)
		if got != test.want || columns(got) > 79 {
			t.Errorf("%s: got %q in %d columns, want %q", test.reason, got, columns(got), test.want)
		}
	}
}

func TestStatusLineGivesWay(t *testing.T) {
	var terminal bytes.Buffer
	status := &statusLine{terminal: &terminal}
	out := status.writer(&terminal)
	status.set("12 of 3")
	status.set("漢")
	out.Write([]byte("a line\n"))
	out.Write([]byte("another\n"))
	status.set("last")
	status.set("")
	status.set("")
	want := "12 of 3" + "\r       \r" + "漢" + "\r  \r" + "a line\nanother\n" + "last" + "\r    \r"
	if got := terminal.String(); got != want {
		t.Errorf("wrote %q, want %q", got, want)
	}
}
