package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"example.com/taskexec"
)

// narrate returns an observer that prints to w a line when a group starts,
// one when it is done, and one for each goodbye.
func narrate(w io.Writer) taskexec.Observer {
	results := map[string][]taskexec.Result{} // of the groups under way, by category
	return taskexec.Observer{
		GroupStarted: func(g taskexec.GroupStartedInfo) {
			results[g.Category] = make([]taskexec.Result, 0, len(g.Tasks))
			fmt.Fprintf(w, "[Coordinator] Sent to %s: %s\n", short(g.Category), list(" ", len(g.Tasks), func(i int) string {
				return short(g.Tasks[i].Instruction)
			}))
		},
		TaskDone: func(t taskexec.TaskDoneInfo) {
			// A task that is skipped with its whole group never shows up in a
			// line of this observer: Run's error counts it.
			if group, ok := results[t.Result.Task.Category]; ok {
				results[t.Result.Task.Category] = append(group, t.Result)
			}
		},
		GroupDone: func(g taskexec.GroupDoneInfo) {
			fmt.Fprintf(w, "[Coordinator] %s says: %s\n", short(g.Category), verdict(results[g.Category]))
			delete(results, g.Category)
		},
		Goodbye: func(g taskexec.GoodbyeInfo) {
			name := cmp.Or(g.Worker, g.Addr)
			fmt.Fprintf(w, "[Coordinator] %s shutdown: %s\n", short(name), short(g.Text))
		},
	}
}

// verdict returns what became of a group's tasks, such as "a1 a3 completed;
// a2 failed: no such file".
func verdict(results []taskexec.Result) string {
	slices.SortFunc(results, byIndex) // they came in the order they ended
	var done, rest []taskexec.Result
	for _, r := range results {
		if r.Outcome == taskexec.Done {
			done = append(done, r)
		} else {
			rest = append(rest, r)
		}
	}
	var parts []string
	if len(done) > 0 {
		parts = append(parts, list(" ", len(done), func(i int) string {
			return short(done[i].Task.Instruction)
		})+" completed")
	}
	if len(rest) > 0 {
		parts = append(parts, list("; ", len(rest), func(i int) string {
			return short(rest[i].Task.Instruction) + " " + strings.ToLower(rest[i].Outcome.String()) + ": " + short(reason(rest[i]))
		}))
	}
	return strings.Join(parts, "; ")
}

// reason returns why a task is not done, without the task's name and number,
// which stand beside it already.
func reason(r taskexec.Result) string {
	if failure, ok := errors.AsType[*taskexec.TaskError](r.Err); ok && failure.Err != nil {
		return failure.Err.Error()
	}
	return fmt.Sprint(r.Err)
}

// list returns n items, or the first three and the number of the others if
// there are more than 20: a line is for people.
func list(separator string, n int, item func(i int) string) string {
	shown := n
	if n > 20 {
		shown = 3
	}
	items := make([]string, shown)
	for i := range items {
		items[i] = item(i)
	}
	line := strings.Join(items, separator)
	if n > shown {
		line += " … and " + thousands(n-shown) + " more"
	}
	return line
}

// thousands returns n as in 99,997.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// short returns text of at most 300 bytes, fit for a terminal.
func short(text string) string {
	const limit = 300
	if len(text) > limit {
		cut := limit
		for cut > limit-utf8.UTFMax && !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut] + "…"
	}
	return printable(text)
}

// printable returns text fit for a terminal: quoted if it holds anything that
// could be taken for more than text. It may come from the input or from a
// worker.
func printable(text string) string {
	if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(text)
	}
	return text
}

// writeJSON writes each result as a line of JSON, in the order of the plan;
// that of Concurrent has none, so there it is the order of the input.
// Text that is not valid UTF-8 cannot stand in JSON: each wrong byte becomes
// U+FFFD.
func writeJSON(w io.Writer, results []taskexec.Result, order taskexec.Order) error {
	if order == taskexec.ByCategory {
		results = slices.SortedStableFunc(slices.Values(results), func(x, y taskexec.Result) int {
			return cmp.Compare(x.Task.Category, y.Task.Category)
		})
	}
	buffered := bufio.NewWriter(w)
	encoder := json.NewEncoder(plainJSON{buffered})
	encoder.SetEscapeHTML(false)
	for _, r := range results {
		line := struct {
			Index       int    `json:"index"`
			Category    string `json:"category"`
			Instruction string `json:"instruction"`
			Outcome     string `json:"outcome"`
			Output      string `json:"output"`
			Error       string `json:"error"`
			Worker      string `json:"worker"`
			Attempts    int    `json:"attempts"`
		}{r.Index, r.Task.Category, r.Task.Instruction, r.Outcome.String(), r.Output, "", r.Worker, r.Attempts}
		if r.Err != nil {
			line.Error = brief(reason(r))
		}
		if err := encoder.Encode(line); err != nil {
			return err
		}
	}
	return buffered.Flush()
}

// plainJSON writes JSON in which whatever could act on a terminal is escaped. It
// stands for the same text: json escapes only some of it, and outside of its
// strings there is none.
type plainJSON struct{ w *bufio.Writer }

func (p plainJSON) Write(text []byte) (int, error) {
	for _, r := range string(text) {
		if r == '\n' || unicode.IsPrint(r) {
			p.w.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(p.w, "\\u%04x", unit)
		}
	}
	return len(text), nil // Flush says if something went wrong
}

// brief returns the first line of a text. The error of a run that could not go
// on has a line for each worker at fault, and stands in each result that is
// skipped because of it; stderr has it in full.
func brief(text string) string {
	first, rest, more := strings.Cut(text, "\n")
	if !more {
		return first
	}
	return fmt.Sprintf("%s (and %d more)", first, 1+strings.Count(rest, "\n"))
}

func byIndex(x, y taskexec.Result) int { return cmp.Compare(x.Index, y.Index) }
