package taskexec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// nine is the list that the documentation uses throughout.
const nine = "a1 a2 c1 b1 c2 b3 b2 b4 a3"

func parsed(t testing.TB, text string) []Task {
	t.Helper()
	tasks, err := ParseTasks(text)
	if err != nil {
		t.Fatalf("ParseTasks(%.80q): %v", text, err)
	}
	return tasks
}

// scanned reads r to its end, which an error may be.
func scanned(r io.Reader) ([]Task, error) {
	s := ScanTasks(r)
	return slices.Collect(s.All()), s.Err()
}

// inChunks gives the bytes of text in reads of 0 to 5 bytes, so that every kind of character is cut everywhere.
func inChunks(text string, random *rand.Rand) io.Reader {
	return &chunkReader{rest: text, random: random}
}

type chunkReader struct {
	rest   string
	random *rand.Rand
}

func (r *chunkReader) Read(p []byte) (int, error) {
	if r.rest == "" {
		return 0, io.EOF
	}
	n := copy(p, r.rest[:min(r.random.IntN(6), len(r.rest))])
	r.rest = r.rest[n:]
	return n, nil
}

func TestParseTasksSplitsAtWhiteSpaceAndNowhereElse(t *testing.T) {
	for _, c := range []struct {
		text string
		want []Task
		why  string
	}{
		{"", nil, "an empty input is an empty list, not an error"},
		{" \t\r\n\u00a0\u3000", nil, "nothing but white space has no instruction in it"},
		{"a1", []Task{{Category: "a", Instruction: "a1"}}, "the end of the text ends an instruction"},
		{"a1 b1", []Task{{Category: "a", Instruction: "a1"}, {Category: "b", Instruction: "b1"}}, "a space separates"},
		{"\n\na1\r\n \tb1\v\f", []Task{{Category: "a", Instruction: "a1"}, {Category: "b", Instruction: "b1"}}, "several in a row separate once, and none at the ends counts"},
		{"a1\u0085b1\u00a0c1\u1680d1", []Task{{Category: "a", Instruction: "a1"}, {Category: "b", Instruction: "b1"}, {Category: "c", Instruction: "c1"}, {Category: "d", Instruction: "d1"}}, "next line, no-break space and ogham space are white space"},
		{"a1\u2003b1\u2028c1\u2029d1\u3000e1", []Task{{Category: "a", Instruction: "a1"}, {Category: "b", Instruction: "b1"}, {Category: "c", Instruction: "c1"}, {Category: "d", Instruction: "d1"}, {Category: "e", Instruction: "e1"}}, "so are em space, both separators and the ideographic space"},
		{"a\u200b1", []Task{{Category: "a", Instruction: "a\u200b1"}}, "a zero width space is none to Unicode"},
		{"a\x00b\x1bc", []Task{{Category: "a", Instruction: "a\x00b\x1bc"}}, "an instruction is opaque, control characters included"},
		{"\x00a", []Task{{Category: "\x00", Instruction: "\x00a"}}, "an unusable category is a run's to refuse, not the parser's"},
		{"é1 日本 🙂 a", []Task{{Category: "é", Instruction: "é1"}, {Category: "日", Instruction: "日本"}, {Category: "🙂", Instruction: "🙂"}, {Category: "a", Instruction: "a"}}, "a category is a whole character of 1 to 4 bytes"},
		{"e\u0301x", []Task{{Category: "e", Instruction: "e\u0301x"}}, "a character is a rune: a combining accent is not part of it"},
		{"\ufeffa1", []Task{{Category: "\ufeff", Instruction: "\ufeffa1"}}, "a byte order mark is a character like any other"},
		{"\ufffdx", []Task{{Category: "\ufffd", Instruction: "\ufffdx"}}, "U+FFFD in the text is valid, though decoders use it for what is not"},
	} {
		got, err := ParseTasks(c.text)
		if err != nil {
			t.Errorf("ParseTasks(%q): %v; %s", c.text, err, c.why)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("ParseTasks(%q): %s (-want +got):\n%s", c.text, c.why, diff)
		}
	}
}

func TestInvalidUTF8IsAnErrorNamingItsByte(t *testing.T) {
	for _, c := range []struct {
		text   string
		offset int
		before []Task // what ScanTasks has given by then
		why    string
	}{
		{"\xff", 0, nil, "a byte that no sequence has, at the start"},
		{"a1 b\xffc d1", 4, []Task{{Category: "a", Instruction: "a1"}}, "in the middle of an instruction, which is not given"},
		{"é1 \xc3", 4, []Task{{Category: "é", Instruction: "é1"}}, "the offset counts bytes, not characters; the text ends within a sequence"},
		{"a1 \xe2\x82", 3, []Task{{Category: "a", Instruction: "a1"}}, "a sequence cut off after two of its three bytes begins at its first"},
		{"a1 \xe2\x28\xa1", 3, []Task{{Category: "a", Instruction: "a1"}}, "a sequence that goes on with the wrong byte"},
		{"\ufffd \x80", 4, []Task{{Category: "\ufffd", Instruction: "\ufffd"}}, "U+FFFD before it is valid"},
		{"a \xed\xa0\x80", 2, []Task{{Category: "a", Instruction: "a"}}, "half a surrogate pair is not UTF-8"},
		{"a \xc0\xa0", 2, []Task{{Category: "a", Instruction: "a"}}, "an overlong space does not pass as white space"},
		{strings.Repeat("a ", 2047) + "日\xe6\x97", 4097, nil, "a sequence that a buffer of 4096 bytes cuts, and the end cuts again"},
	} {
		want := fmt.Sprintf("taskexec: invalid UTF-8 at byte %d: instructions must be UTF-8 text, convert the input to it", c.offset)
		tasks, err := ParseTasks(c.text)
		if err == nil || err.Error() != want || tasks != nil {
			t.Errorf("ParseTasks(%.20q) = %v, %v; want error %q: %s", c.text, tasks, err, want, c.why)
		}
		for name, r := range map[string]io.Reader{
			"at once":         strings.NewReader(c.text),
			"a byte at once":  iotest.OneByteReader(strings.NewReader(c.text)),
			"error with data": iotest.DataErrReader(strings.NewReader(c.text)),
		} {
			tasks, err := scanned(r)
			if err == nil || err.Error() != want {
				t.Errorf("ScanTasks(%.20q), %s: error %v; want %q: %s", c.text, name, err, want, c.why)
			}
			if c.before == nil {
				continue
			}
			if diff := cmp.Diff(c.before, tasks); diff != "" {
				t.Errorf("ScanTasks(%.20q), %s: %s (-want +got):\n%s", c.text, name, c.why, diff)
			}
		}
	}
}

func TestScanTasksReportsABadByteWithoutWaitingForMore(t *testing.T) {
	// Once the scanner has the bad byte it has no reason to read on, and a terminal might never give more.
	read := false
	r := readerFunc(func(p []byte) (int, error) {
		if read {
			t.Fatal("ScanTasks reads on after a bad byte")
		}
		read = true
		return copy(p, "a1 \xff"), nil
	})
	if _, err := scanned(r); err == nil || !strings.Contains(err.Error(), "byte 3") {
		t.Errorf("error %v, want one that names byte 3", err)
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestParsedTasksShareTheMemoryOfTheText(t *testing.T) {
	text := strings.Repeat(nine+"\n", 1000)
	allocations := testing.AllocsPerRun(10, func() {
		if tasks, err := ParseTasks(text); err != nil || len(tasks) != 9000 {
			t.Fatal(len(tasks), err)
		}
	})
	if allocations > 1 {
		t.Errorf("%v allocations for 9000 tasks, want only that of the slice", allocations)
	}
}

func TestScanTasksFindsWhatParseTasksFinds(t *testing.T) {
	const seed = 2
	random := rand.New(rand.NewPCG(seed, seed))
	pieces := []string{" ", "\n", "\r\n", "\u0085", "\u2003", "\u3000", "a", "b1", "é", "日本", "🙂", "\x00", "\ufffd", "\ufeff",
		"\xff", "\xe2\x82", "\xc3", strings.Repeat("x", 5000)}
	valid := len(pieces) - 4 // before the three that are not UTF-8, so that most texts parse
	for range 500 {
		var b strings.Builder
		for range random.IntN(40) {
			b.WriteString(pieces[random.IntN(valid)])
			if random.IntN(100) == 0 {
				b.WriteString(pieces[valid+random.IntN(4)])
			}
		}
		text := b.String()
		want, wantErr := ParseTasks(text)
		for name, r := range map[string]io.Reader{
			"at once":         strings.NewReader(text),
			"a byte at once":  iotest.OneByteReader(strings.NewReader(text)),
			"half at once":    iotest.HalfReader(strings.NewReader(text)),
			"error with data": iotest.DataErrReader(strings.NewReader(text)),
			"random chunks":   inChunks(text, random),
		} {
			got, err := scanned(r)
			if fmt.Sprint(err) != fmt.Sprint(wantErr) {
				t.Fatalf("ScanTasks(%.200q), %s: error %v, ParseTasks has %v", text, name, err, wantErr)
			}
			if wantErr != nil {
				continue
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("ScanTasks(%.200q), %s (-ParseTasks +ScanTasks):\n%s", text, name, diff)
			}
		}
	}
}

func TestScanTasksGivesATaskBeforeItReadsOn(t *testing.T) {
	// A program that pipes instructions in as they come up must see each executed, not wait for a full buffer.
	given := 0
	reads := 0
	s := ScanTasks(readerFunc(func(p []byte) (int, error) {
		if given != reads {
			t.Fatalf("read number %d comes when %d tasks were given", reads+1, given)
		}
		if reads++; reads > 3 {
			return 0, io.EOF
		}
		return copy(p, fmt.Sprintf("a%d\n", reads)), nil
	}))
	for task := range s.All() {
		given++
		if want := fmt.Sprintf("a%d", given); task.Instruction != want {
			t.Errorf("task %d is %q, want %q", given, task.Instruction, want)
		}
		if given == 3 {
			break
		}
	}
	if given != 3 {
		t.Errorf("%d tasks, want 3", given)
	}
}

func TestScanTasksNeverGivesAnInstructionThatAReadErrorCutShort(t *testing.T) {
	// "rm-old" must not run because the connection broke before the rest of "rm-old-backups" came.
	broken := errors.New("the line broke")
	for _, c := range []struct {
		text, want string
		why        string
	}{
		{"a1 rm-old", "taskexec: cannot read tasks beyond byte 9: the line broke", "within a word"},
		{"a1 日\xe6\x97", "taskexec: cannot read tasks beyond byte 8: the line broke", "within a character: the text is not to blame"},
		{"a1 ", "taskexec: cannot read tasks beyond byte 3: the line broke", "between words"},
		{"a1\n\xf0\x9f\x99", "taskexec: cannot read tasks beyond byte 6: the line broke", "within the first character of a word"},
	} {
		for name, r := range map[string]io.Reader{
			"error after data": io.MultiReader(strings.NewReader(c.text), iotest.ErrReader(broken)),
			"error with data":  iotest.DataErrReader(io.MultiReader(strings.NewReader(c.text), iotest.ErrReader(broken))),
			"a byte at once":   io.MultiReader(iotest.OneByteReader(strings.NewReader(c.text)), iotest.ErrReader(broken)),
		} {
			tasks, err := scanned(r)
			if diff := cmp.Diff([]Task{{Category: "a", Instruction: "a1"}}, tasks); diff != "" {
				t.Errorf("%q, %s, %s (-want +got):\n%s", c.text, name, c.why, diff)
			}
			if !errors.Is(err, broken) || err.Error() != c.want {
				t.Errorf("%q, %s, %s: error %v, want %s", c.text, name, c.why, err, c.want)
			}
		}
	}
}

func TestScanTasksTakesInstructionsUpTo1MiB(t *testing.T) {
	longest := strings.Repeat("x", 1<<20-2) + "é"
	for _, c := range []struct {
		text    string
		want    []string
		wantErr string
		why     string
	}{
		{longest, []string{longest}, "", "exactly the limit, ended by the end"},
		{" " + longest + "\u3000b1", []string{longest, "b1"}, "", "exactly the limit, ended by white space of three bytes"},
		{"a1 " + longest + "y b1", []string{"a1"}, "taskexec: the instruction at byte 3 is longer than 1048576 bytes: " +
			"put white space between instructions, or make it shorter", "one byte more, and the instruction's first byte is named"},
		{strings.Repeat(" ", 3<<20) + "a1", []string{"a1"}, "", "white space has no limit"},
	} {
		s := ScanTasks(strings.NewReader(c.text))
		var got []string
		for task := range s.All() {
			got = append(got, task.Instruction)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %d instructions, want %d", c.why, len(got), len(c.want))
		}
		if err := s.Err(); (err != nil || c.wantErr != "") && fmt.Sprint(err) != c.wantErr {
			t.Errorf("%s: error %v, want %q", c.why, err, c.wantErr)
		}
	}
}

func TestScanTasksTakesLinearTimeHoweverSmallTheReads(t *testing.T) {
	// Nothing is timed: looking at the instruction again after each of its million reads would outlast the test's timeout.
	tasks, err := scanned(iotest.OneByteReader(strings.NewReader(strings.Repeat("x", 1<<20))))
	if err != nil || len(tasks) != 1 {
		t.Errorf("%d tasks, %v; want 1", len(tasks), err)
	}
}

func TestScanTasksStopsReadingAtATooLongInstruction(t *testing.T) {
	read := 0
	_, err := scanned(readerFunc(func(p []byte) (int, error) {
		read += len(p)
		return copy(p, bytes.Repeat([]byte("x"), len(p))), nil
	}))
	if err == nil || read > 1<<20+1<<16 {
		t.Errorf("error %v after %d bytes of an endless instruction, want one soon after 1 MiB", err, read)
	}
}

func TestScanTasksGoesOnAfterABreak(t *testing.T) {
	s := ScanTasks(strings.NewReader("a1 a2 a3"))
	for range s.All() {
		break
	}
	if diff := cmp.Diff([]Task{{Category: "a", Instruction: "a2"}, {Category: "a", Instruction: "a3"}}, slices.Collect(s.All())); diff != "" {
		t.Errorf("after a break (-want +got):\n%s", diff)
	}
	if more := slices.Collect(s.All()); more != nil || s.Err() != nil {
		t.Errorf("after the end: %v, %v; want nothing", more, s.Err())
	}
}

func TestScanTasksErrorStays(t *testing.T) {
	s := ScanTasks(strings.NewReader("a1 \xff a2"))
	for range s.All() {
	}
	err := s.Err()
	if more := slices.Collect(s.All()); err == nil || more != nil || s.Err() != err {
		t.Errorf("after error %v, going on gives %v and error %v; want nothing and the same error", err, more, s.Err())
	}
}

func TestScanTasksOfNilPanics(t *testing.T) {
	defer func() {
		if got := fmt.Sprint(recover()); !strings.HasPrefix(got, "taskexec: ") {
			t.Errorf("panic %q, want one of taskexec", got)
		}
	}()
	ScanTasks(nil)
}

func TestCategoryIsTheTasksOwnOrItsFirstCharacter(t *testing.T) {
	long := strings.Repeat("é", 127) + "x"
	for _, c := range []struct {
		task  Task
		want  string
		fault string
		why   string
	}{
		{Task{Category: "", Instruction: "a1"}, "a", "", "by default the first character"},
		{Task{Category: "b", Instruction: "a1"}, "b", "", "unless the task says otherwise"},
		{Task{Category: "b", Instruction: ""}, "b", "", "an instruction may be empty when the task has a category"},
		{Task{Category: "", Instruction: "日本"}, "日", "", "a character may have several bytes"},
		{Task{Category: "", Instruction: " x"}, " ", "", "a space is a character, and an instruction is not trimmed"},
		{Task{Category: "", Instruction: "a\xff"}, "a", "", "only the first character has to be valid"},
		{Task{Category: "gpu large/2", Instruction: "x"}, "gpu large/2", "", "a category may be longer than a character, spaces included"},
		{Task{Category: long, Instruction: "x"}, long, "", "255 bytes are allowed"},
		{Task{Category: "\ufffd", Instruction: "x"}, "\ufffd", "", "U+FFFD is valid UTF-8"},
		{Task{Category: "", Instruction: ""}, "", "it is empty", "there is no first character"},
		{Task{Category: long + "x", Instruction: "x"}, "", "it is longer than 255 bytes", "256 bytes are too many"},
		{Task{Category: "\xff", Instruction: "x"}, "", "it is not valid UTF-8", "the own category is bad"},
		{Task{Category: "a\xe2\x82", Instruction: "x"}, "", "it is not valid UTF-8", "the own category ends within a character"},
		{Task{Category: "", Instruction: "\xffa"}, "", "it is not valid UTF-8", "the instruction is bytes, and none was meant as a category"},
		{Task{Category: "", Instruction: "\x00a"}, "", "it has a control character", "a control character is no category by default"},
		{Task{Category: "a\nb", Instruction: "x"}, "", "it has a control character", "nor when it is within a category"},
		{Task{Category: "a\u0085", Instruction: "x"}, "", "it has a control character", "nor when it has two bytes"},
		{Task{Category: "a\x7f", Instruction: "x"}, "", "it has a control character", "delete is one"},
	} {
		got, ok := categoryOf(c.task)
		if got != c.want || ok != (c.fault == "") {
			t.Errorf("categoryOf(%.20q) = %.20q, %v; want %.20q: %s", c.task, got, ok, c.want, c.why)
		}
		_, err := newPlan([]Task{{Category: "a", Instruction: "a1"}, c.task}, ByCategory, nil)
		if c.fault == "" {
			if err != nil {
				t.Errorf("newPlan refuses %.20q: %v; %s", c.task, err, c.why)
			}
			continue
		}
		var refused *TaskError
		if !errors.As(err, &refused) {
			t.Errorf("newPlan with %.20q: error %v, want a *TaskError: %s", c.task, err, c.why)
			continue
		}
		if refused.Index != 1 || refused.Task != c.task || refused.Outcome != Failed || !strings.Contains(refused.Err.Error(), c.fault) {
			t.Errorf("newPlan with %.20q: %+v, want task 1 Failed because %s: %s", c.task, refused, c.fault, c.why)
		}
	}
}

func TestPlanRefusesTheFirstUnusableCategory(t *testing.T) {
	tasks := []Task{{Category: "b", Instruction: "b1"}, {Category: "", Instruction: "\x01"}, {Category: "a", Instruction: "a1"}, {Category: "", Instruction: ""}}
	for _, order := range []Order{ByCategory, ByInput} {
		p, err := newPlan(tasks, order, []string{"b"})
		var refused *TaskError
		if p != nil || !errors.As(err, &refused) || refused.Index != 1 {
			t.Errorf("%v: newPlan = %v, %v; want no plan, and the error of task 1", order, p, err)
		}
	}
}

func TestPlanRefusesTheFirstNegativeTimeout(t *testing.T) {
	for first := range 2 {
		tasks := mustParse(t, "a1 b1 a2 b2")
		tasks[first].Timeout, tasks[3].Timeout = -time.Second, -time.Minute
		for _, order := range []Order{ByCategory, ByInput, Concurrent} {
			_, err := newPlan(tasks, order, nil)
			var refused *TaskError
			if !errors.As(err, &refused) || refused.Index != first || !strings.Contains(err.Error(), "timeout -1s is negative") {
				t.Errorf("%v: newPlan gives %v, want the error of task %d", order, err, first)
			}
		}
	}
}

func TestAnUnusableCategoryIsQuotedAndCut(t *testing.T) {
	err := taskFault(Task{Category: "x\n" + strings.Repeat("日", 1000)})
	if text := err.Error(); len(text) > 400 || strings.Contains(text, "\n") || !strings.Contains(text, `x\n日`) {
		t.Errorf("%d bytes: %s; want the beginning of the category, quoted", len(text), text)
	}
}

func TestPartitionGroupsByCategoryInInputOrder(t *testing.T) {
	for _, c := range []struct {
		tasks []Task
		want  []Group
		why   string
	}{
		{nil, []Group{}, "no tasks give no groups"},
		{parsed(t, nine), []Group{
			{"a", []Task{{Category: "a", Instruction: "a1"}, {Category: "a", Instruction: "a2"}, {Category: "a", Instruction: "a3"}}},
			{"b", []Task{{Category: "b", Instruction: "b1"}, {Category: "b", Instruction: "b3"}, {Category: "b", Instruction: "b2"}, {Category: "b", Instruction: "b4"}}},
			{"c", []Task{{Category: "c", Instruction: "c1"}, {Category: "c", Instruction: "c2"}}},
		}, "groups are sorted, tasks are not"},
		{[]Task{{Category: "", Instruction: "b1"}, {Category: "b", Instruction: "x"}, {Category: "", Instruction: "a1"}}, []Group{
			{"a", []Task{{Category: "a", Instruction: "a1"}}},
			{"b", []Task{{Category: "b", Instruction: "b1"}, {Category: "b", Instruction: "x"}}},
		}, "a category is the same, said or taken from the instruction, and is set in the result"},
		{[]Task{{Category: "a", Instruction: "a1"}, {Category: "a", Instruction: "a1"}}, []Group{{"a", []Task{{Category: "a", Instruction: "a1"}, {Category: "a", Instruction: "a1"}}}}, "equal tasks are two tasks"},
		{parsed(t, "日 é z Z 10 9"), []Group{
			{"1", []Task{{Category: "1", Instruction: "10"}}}, {"9", []Task{{Category: "9", Instruction: "9"}}}, {"Z", []Task{{Category: "Z", Instruction: "Z"}}},
			{"z", []Task{{Category: "z", Instruction: "z"}}}, {"é", []Task{{Category: "é", Instruction: "é"}}}, {"日", []Task{{Category: "日", Instruction: "日"}}},
		}, "sorted by code point, without regard to language"},
		{[]Task{{Category: "a", Instruction: "a1"}, {Category: "\n", Instruction: "x"}, {Category: "", Instruction: ""}, {Category: "", Instruction: "\xff"}}, []Group{
			{"", []Task{{Category: "\n", Instruction: "x"}, {Category: "", Instruction: ""}, {Category: "", Instruction: "\xff"}}},
			{"a", []Task{{Category: "a", Instruction: "a1"}}},
		}, "tasks without a usable category stay together as they are, and none is dropped"},
	} {
		before := slices.Clone(c.tasks)
		if diff := cmp.Diff(c.want, Partition(c.tasks)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.why, diff)
		}
		if diff := cmp.Diff(before, c.tasks); diff != "" {
			t.Errorf("%s: the input changed (-before +after):\n%s", c.why, diff)
		}
	}
}

func TestPartitionSharesNoTaskWithItsInputOrBetweenGroups(t *testing.T) {
	tasks := parsed(t, "a1 b1")
	groups := Partition(tasks)
	groups[0].Tasks = append(groups[0].Tasks, Task{Category: "a", Instruction: "a2"})
	groups[1].Tasks[0].Instruction = "b2"
	want := []Group{{"a", []Task{{Category: "a", Instruction: "a1"}, {Category: "a", Instruction: "a2"}}}, {"b", []Task{{Category: "b", Instruction: "b2"}}}}
	if diff := cmp.Diff(want, groups); diff != "" {
		t.Errorf("appending to a group (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]Task{{Category: "a", Instruction: "a1"}, {Category: "b", Instruction: "b1"}}, tasks); diff != "" {
		t.Errorf("the input (-want +got):\n%s", diff)
	}
}

// shown is a stage as the tests write it down: its groups, each as category:index,index and, after a bar, the categories that
// are needed no more.
func shown(stages iter.Seq2[int, stage]) []string {
	var lines []string
	for number, s := range stages {
		var b strings.Builder
		fmt.Fprintf(&b, "%d", number)
		for _, g := range s.groups {
			fmt.Fprintf(&b, " %s:%s", g.category, strings.Trim(strings.Join(strings.Fields(fmt.Sprint(g.indices)), ","), "[]"))
		}
		fmt.Fprintf(&b, " |%s", strings.Join(s.last, ","))
		lines = append(lines, b.String())
	}
	return lines
}

func TestPlanStages(t *testing.T) {
	for _, c := range []struct {
		text       string
		order      Order
		sequence   []string
		categories []string
		stages     []string
		why        string
	}{
		{nine, ByCategory, nil, []string{"a", "b", "c"}, []string{"0 a:0,1,8 |a", "1 b:3,5,6,7 |b", "2 c:2,4 |c"},
			"a stage a category, sorted"},
		{nine, ByCategory, []string{"c"}, []string{"c", "a", "b"}, []string{"0 c:2,4 |c", "1 a:0,1,8 |a", "2 b:3,5,6,7 |b"},
			"the listed category first, the rest sorted"},
		{nine, ByCategory, []string{"c", "b", "a"}, []string{"c", "b", "a"}, []string{"0 c:2,4 |c", "1 b:3,5,6,7 |b", "2 a:0,1,8 |a"},
			"all listed"},
		{nine, ByCategory, []string{"x", "b", "y"}, []string{"b", "a", "c"}, []string{"0 b:3,5,6,7 |b", "1 a:0,1,8 |a", "2 c:2,4 |c"},
			"a listed category without a task makes no stage"},
		{nine, ByInput, nil, []string{"a", "c", "b"}, []string{"0 a:0 |", "1 a:1 |", "2 c:2 |", "3 b:3 |", "4 c:4 |c", "5 b:5 |", "6 b:6 |", "7 b:7 |b", "8 a:8 |a"},
			"a stage a task; a category is needed until its last task"},
		{"b1 a1", ByInput, []string{"a"}, []string{"b", "a"}, []string{"0 b:0 |b", "1 a:1 |a"},
			"the list's own order is not reordered by category"},
		{"", ByCategory, []string{"a"}, nil, nil, "no tasks, no stages, whatever is listed"},
		{"", ByInput, nil, nil, nil, "no tasks, no stages"},
	} {
		p, err := newPlan(parsed(t, c.text), c.order, c.sequence)
		if err != nil {
			t.Errorf("%s: %v", c.why, err)
			continue
		}
		if diff := cmp.Diff(c.categories, p.categories()); diff != "" {
			t.Errorf("%v, %v: categories: %s (-want +got):\n%s", c.order, c.sequence, c.why, diff)
		}
		for range 2 { // a plan can be gone through again
			if diff := cmp.Diff(c.stages, shown(p.stages())); diff != "" {
				t.Errorf("%v, %v: %s (-want +got):\n%s", c.order, c.sequence, c.why, diff)
			}
		}
	}
}

func TestIndicesOfAGroupOutliveItsStage(t *testing.T) {
	p, err := newPlan(parsed(t, nine), ByCategory, nil)
	if err != nil {
		t.Fatal(err)
	}
	var kept [][]int
	for _, s := range p.stages() {
		kept = append(kept, s.groups[0].indices)
	}
	if diff := cmp.Diff([][]int{{0, 1, 8}, {3, 5, 6, 7}, {2, 4}}, kept); diff != "" {
		t.Errorf("kept (-want +got):\n%s", diff)
	}
}

func TestStagesEndWithTheLoop(t *testing.T) {
	p, err := newPlan(parsed(t, nine), ByInput, nil)
	if err != nil {
		t.Fatal(err)
	}
	for number := range p.stages() {
		if number == 1 {
			break // an iterator that goes on all the same is a panic of the runtime's
		}
	}
}

func TestAStageMayHaveSeveralGroups(t *testing.T) {
	// What an order that runs categories at the same time needs of stages: all groups in one, each category's end seen once.
	p, err := newPlan(parsed(t, nine), ByCategory, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.width = 2
	if diff := cmp.Diff([]string{"0 a:0,1,8 b:3,5,6,7 |a,b", "1 c:2,4 |c"}, shown(p.stages())); diff != "" {
		t.Errorf("two groups a stage (-want +got):\n%s", diff)
	}
	p.width = len(p.categories())
	if diff := cmp.Diff([]string{"0 a:0,1,8 b:3,5,6,7 c:2,4 |a,b,c"}, shown(p.stages())); diff != "" {
		t.Errorf("all groups in a stage (-want +got):\n%s", diff)
	}
}

func TestPlanDispatchesWhatPartitionShows(t *testing.T) {
	const seed = 3
	random := rand.New(rand.NewPCG(seed, seed))
	for range 100 {
		tasks := randomTasks(random, random.IntN(200))
		p, err := newPlan(tasks, ByCategory, nil)
		if err != nil {
			t.Fatal(err)
		}
		groups := []Group{}
		for _, s := range p.stages() {
			g := Group{Category: s.groups[0].category}
			for _, i := range s.groups[0].indices {
				g.Tasks = append(g.Tasks, Task{Category: g.Category, Instruction: tasks[i].Instruction})
			}
			groups = append(groups, g)
		}
		if diff := cmp.Diff(groups, Partition(tasks)); diff != "" {
			t.Fatalf("(-plan +Partition):\n%s", diff)
		}
	}
}

// randomTasks gives n tasks of up to 30 categories, some of which name their own.
func randomTasks(random *rand.Rand, n int) []Task {
	tasks := make([]Task, n)
	for i := range tasks {
		tasks[i].Instruction = fmt.Sprintf("%c%d", 'a'+rune(random.IntN(26)), i)
		if random.IntN(3) == 0 {
			tasks[i].Category = fmt.Sprintf("c%d", random.IntN(5))
		}
	}
	return tasks
}

func TestEveryTaskIsInExactlyOneStage(t *testing.T) {
	const seed = 4
	random := rand.New(rand.NewPCG(seed, seed))
	for range 500 {
		tasks := randomTasks(random, random.IntN(100))
		for _, order := range []Order{ByCategory, ByInput} {
			p, err := newPlan(tasks, order, []string{"c3", "b"}[:random.IntN(3)])
			if err != nil {
				t.Fatal(err)
			}
			times := make([]int, len(tasks))
			ended := map[string]bool{}
			for number, s := range p.stages() {
				for _, g := range s.groups {
					if ended[g.category] {
						t.Fatalf("%v: stage %d needs %q, which was said to be needed no more", order, number, g.category)
					}
					for _, i := range g.indices {
						times[i]++
						if category, _ := categoryOf(tasks[i]); category != g.category {
							t.Fatalf("%v: task %d of %q is in a group of %q", order, i, category, g.category)
						}
					}
				}
				for _, category := range s.last {
					ended[category] = true
				}
			}
			if i := slices.IndexFunc(times, func(n int) bool { return n != 1 }); i >= 0 {
				t.Fatalf("%v: task %d is in %d stages", order, i, times[i])
			}
			if len(ended) != len(p.categories()) {
				t.Fatalf("%v: %d of %d categories are said to be needed no more at the end", order, len(ended), len(p.categories()))
			}
		}
	}
}

func TestStagesCostNoAllocationEach(t *testing.T) {
	p, err := newPlan(parsed(t, strings.Repeat(nine+" ", 1000)), ByInput, nil)
	if err != nil {
		t.Fatal(err)
	}
	allocations := testing.AllocsPerRun(10, func() {
		for number, s := range p.stages() {
			if len(s.groups) != 1 || s.groups[0].indices[0] != number {
				t.Fatal(number, s)
			}
		}
	})
	if allocations > 10 {
		t.Errorf("%v allocations for 9000 stages, want those of one stage", allocations)
	}
}

func TestAMillionTasksTakeLinearTime(t *testing.T) {
	// Nothing is timed: what takes quadratic time here would not end before the test's timeout.
	const n = 1_000_000
	var b strings.Builder
	for c := range 20000 { // categories
		b.WriteRune(rune(0x4e00 + c))
		b.WriteByte('\n')
	}
	tasks := parsed(t, strings.Repeat(b.String(), n/20000))
	if len(tasks) != n {
		t.Fatalf("%d tasks, want %d", len(tasks), n)
	}
	if groups := Partition(tasks); len(groups) != 20000 {
		t.Errorf("%d groups, want 20000", len(groups))
	}
	reversed := make([]string, 0, 20000)
	for i := range 20000 {
		reversed = append(reversed, string(rune(0x4e00+19999-i)))
	}
	for order, stages := range map[Order]int{ByCategory: 20000, ByInput: n} {
		p, err := newPlan(tasks, order, reversed)
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		for range p.stages() {
			got++
		}
		if got != stages {
			t.Errorf("%v: %d stages, want %d", order, got, stages)
		}
	}
}

func TestOrderIsNamedInMessages(t *testing.T) {
	for order, want := range map[Order]string{ByCategory: "ByCategory", ByInput: "ByInput", 7: "Order(7)", -1: "Order(-1)"} {
		if got := order.String(); got != want {
			t.Errorf("Order(%d).String() = %q, want %q", int(order), got, want)
		}
	}
}

func FuzzParseTasks(f *testing.F) {
	f.Add(nine)
	f.Fuzz(func(t *testing.T, text string) {
		tasks, err := ParseTasks(text)
		if (err == nil) != utf8.ValidString(text) {
			t.Fatalf("error %v for %q", err, text)
		}
		if slices.ContainsFunc(tasks, func(task Task) bool { return len(task.Instruction) > maxScannedInstruction }) {
			t.Skip("ScanTasks has a limit that ParseTasks has not")
		}
		again, scanErr := scanned(iotest.OneByteReader(strings.NewReader(text)))
		if fmt.Sprint(err) != fmt.Sprint(scanErr) {
			t.Fatalf("ParseTasks: %v, ScanTasks: %v", err, scanErr)
		}
		if err != nil {
			return
		}
		if !slices.Equal(tasks, again) { // cmp.Diff is slow, and says only how they differ
			t.Fatalf("(-ParseTasks +ScanTasks):\n%s", cmp.Diff(tasks, again))
		}

		var instructions []string
		for _, task := range tasks {
			if task.Instruction == "" || strings.ContainsFunc(task.Instruction, unicode.IsSpace) {
				t.Fatalf("instruction %q", task.Instruction)
			}
			instructions = append(instructions, task.Instruction)
		}
		if again := parsed(t, strings.Join(instructions, " ")); !slices.Equal(tasks, again) {
			t.Fatalf("joined and parsed again (-before +after):\n%s", cmp.Diff(tasks, again))
		}

		left := map[Task]int{}
		for _, task := range tasks {
			left[task]++
		}
		for _, group := range Partition(tasks) {
			for _, task := range group.Tasks {
				if task.Category != group.Category && group.Category != "" {
					t.Fatalf("task %q in group %q", task, group.Category)
				}
				left[task]--
			}
		}
		for task, n := range left {
			if n != 0 {
				t.Fatalf("Partition has task %q %d times too few", task, n)
			}
		}
	})
}

// millionText is a million instructions of 16 bytes, in three categories.
func millionText() string {
	var b strings.Builder
	for i := range 1_000_000 {
		fmt.Fprintf(&b, "%c%015d\n", 'a'+rune(i%3), i)
	}
	return b.String()
}

func BenchmarkParseTasks(b *testing.B) {
	text := millionText()
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseTasks(text); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkScanTasks(b *testing.B) {
	text := millionText()
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		s := ScanTasks(strings.NewReader(text))
		for range s.All() {
		}
		if err := s.Err(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPartition(b *testing.B) {
	tasks := parsed(b, millionText())
	b.ReportAllocs()
	for b.Loop() {
		Partition(tasks)
	}
}

func BenchmarkPlan(b *testing.B) {
	tasks := parsed(b, millionText())
	for _, order := range []Order{ByCategory, ByInput, Concurrent} {
		b.Run(order.String(), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p, err := newPlan(tasks, order, nil)
				if err != nil {
					b.Fatal(err)
				}
				for range p.stages() {
				}
			}
		})
	}
}
