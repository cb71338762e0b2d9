package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"example.com/taskexec"
)

// nasty could be taken for something else by a terminal.
var nasty = []string{"\x1b[31mred", "a\rb", "a\nb", "\u009b31m\x7f", "\u2028\u2029", "\u202etxt.exe\u2066", "\ufeff\U000e0041", "\xff\x9b31m", strings.Repeat("x", 10_000)}

func expectPlain(t *testing.T, text string, most int) {
	t.Helper()
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if !utf8.ValidString(line) || strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) || len(line) > most {
			t.Errorf("printed %.300q of %d bytes", line, len(line))
		}
	}
}

func TestWhatWorkersSayIsPrintedHarmless(t *testing.T) {
	for _, text := range nasty {
		var printed bytes.Buffer
		task := taskexec.Task{Category: text, Instruction: text}
		failed := taskexec.Result{Task: task, Outcome: taskexec.Failed, Worker: text,
			Err: &taskexec.TaskError{Task: task, Outcome: taskexec.Failed, Err: errors.New(text)}}
		o := narrate(&printed)
		o.GroupStarted(taskexec.GroupStartedInfo{Category: text, Tasks: []taskexec.Task{task}})
		o.TaskDone(taskexec.TaskDoneInfo{Result: failed})
		o.GroupDone(taskexec.GroupDoneInfo{Category: text, Tasks: []taskexec.Task{task}})
		o.Goodbye(taskexec.GoodbyeInfo{Worker: text, Text: text})
		expectPlain(t, printed.String(), 5000)
		if n := strings.Count(printed.String(), "\n"); n != 3 {
			t.Errorf("printed %d lines, want 3: %.300q", n, printed.String())
		}
		expectPlain(t, progress(taskexec.RunSnapshot{Categories: []taskexec.CategorySnapshot{{Category: text, InFlight: 1}}}, 1), 200)
	}
}

func TestJSONIsHarmlessAndTheSame(t *testing.T) {
	for _, text := range nasty {
		var printed bytes.Buffer
		result := taskexec.Result{Task: taskexec.Task{Category: text, Instruction: text}, Outcome: taskexec.Done, Output: text + "😀", Worker: text}
		if err := writeJSON(&printed, []taskexec.Result{result}, taskexec.ByInput); err != nil {
			t.Fatal(err)
		}
		expectPlain(t, printed.String(), 50_000)
		var got struct{ Output string }
		want := string([]rune(text)) + "😀" // each byte that is not UTF-8 is U+FFFD
		if err := json.Unmarshal(printed.Bytes(), &got); err != nil || got.Output != want {
			t.Errorf("of %.50q came %.50q, and %v", text, got.Output, err)
		}
	}
}
