package taskexec

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// A Task is one instruction to execute, and the category of the workers that
// may execute it.
type Task struct {
	// Category says which workers may execute the task: 1 to 255 bytes of
	// valid UTF-8 without control characters. Left empty, it is the first
	// character (rune) of Instruction.
	Category string

	// Instruction is what the handler gets. It is opaque: any bytes, newlines
	// and none at all included. What a worker takes is bounded by its line
	// limit, 1 MiB unless it says otherwise, escapes included.
	Instruction string

	// Timeout bounds how long a handler may execute the task, counted from when
	// it starts; WithTaskTimeout says what happens then. It is rounded up to a
	// whole millisecond. 0 stands for the timeout of WithTaskTimeout, which is
	// none unless set; a negative one is refused like an unusable category.
	Timeout time.Duration
}

// ParseTasks splits text into instructions at white space and gives one task for each, in the order of the text.
//
// White space is what [unicode.IsSpace] says it is; several in a row separate once, and those at either end do not count.
// Everything else is part of an instruction, control characters and a byte order mark included. Each task's Category is set
// to the first character of its instruction. A text without an instruction gives no tasks and no error.
//
// The strings of the tasks share text's memory: keeping one task keeps the whole text. No instruction is too long for
// ParseTasks, but one that does not fit the workers' line limit fails when it is run.
//
// If text is not valid UTF-8 there are no tasks, and the error names the offset of the first bad byte, counted from 0.
func ParseTasks(text string) ([]Task, error) {
	if !utf8.ValidString(text) {
		return nil, errInvalidUTF8(int64(invalidUTF8(text)))
	}
	// Counting first costs a second pass over the text, and saves growing the slice: half the time, a fifth of the memory.
	n := 0
	for range strings.FieldsSeq(text) {
		n++
	}
	if n == 0 {
		return nil, nil
	}
	tasks := make([]Task, 0, n)
	for instruction := range strings.FieldsSeq(text) {
		tasks = append(tasks, parsedTask(instruction))
	}
	return tasks, nil
}

// parsedTask is the task of an instruction found in a text.
func parsedTask(instruction string) Task {
	return Task{Category: firstRune(instruction), Instruction: instruction}
}

// firstRune is the first character of s, in s's own memory. It is one byte of s if s does not begin with valid UTF-8.
func firstRune(s string) string {
	_, size := utf8.DecodeRuneInString(s)
	return s[:size]
}

// invalidUTF8 is the offset in text of the first byte that is not part of a valid UTF-8 sequence, -1 if there is none.
func invalidUTF8(text string) int {
	for i, r := range text {
		if r != utf8.RuneError {
			continue
		}
		// U+FFFD itself, three bytes long, is a character like any other.
		if _, size := utf8.DecodeRuneInString(text[i:]); size == 1 {
			return i
		}
	}
	return -1
}

func errInvalidUTF8(offset int64) error {
	return fmt.Errorf("taskexec: invalid UTF-8 at byte %d: instructions must be UTF-8 text, convert the input to it", offset)
}

// maxScannedInstruction bounds the memory that an input without white space can make a TaskScanner take.
const maxScannedInstruction = 1 << 20

// A TaskScanner reads tasks from an [io.Reader], one at a time. [ScanTasks] makes one.
//
// It is for one goroutine at a time.
type TaskScanner struct {
	// Not a bufio.Scanner: that hands out what stands before a read error as if it were a whole word, and looks at
	// a word again from its start after every read, which takes quadratic time when the reads are small.
	in     *bufio.Reader
	offset int64  // of the next byte of in
	word   []byte // the part of the current instruction that has been read
	ended  bool
	err    error
}

// ScanTasks prepares to read tasks from r. It reads nothing yet.
//
// It finds the tasks that [ParseTasks] finds in the same text, without holding the text in memory: each instruction is
// at most 1 MiB (1,048,576 bytes) long, and has memory of its own. A task is given as soon as the white space
// after it, or the end of r, has been read. The reading is buffered, so more of r may have been read than the last task
// given. Nothing but r itself ends a call of its Read that waits.
//
// A nil r panics.
func ScanTasks(r io.Reader) *TaskScanner {
	if r == nil {
		panic("taskexec: ScanTasks(nil): give it a reader")
	}
	return &TaskScanner{in: bufio.NewReader(r)}
}

// All gives the tasks, each with its Category set, in the order of the input, reading as it goes.
//
// It ends with the input or at the first error; [TaskScanner.Err] then tells which. An instruction that an error
// cut short is not given. The tasks can be gone through once: after a break, calling All again goes on with the next task.
func (s *TaskScanner) All() iter.Seq[Task] {
	return func(yield func(Task) bool) {
		for {
			task, ok := s.next()
			if !ok || !yield(task) {
				return
			}
		}
	}
}

// Err is the error that ended [TaskScanner.All], and nil if the input was read to its end, or has not ended yet.
//
// It is an error of the reader, which it wraps, or is about invalid UTF-8 or an instruction of more than 1 MiB. Each names
// the offset in the input, in bytes counted from 0: how far the reader came, the first bad byte, or the first byte of the
// instruction.
func (s *TaskScanner) Err() error {
	return s.err
}

// next reads up to the end of the next instruction; ok is false when there is none.
func (s *TaskScanner) next() (task Task, ok bool) {
	for !s.ended {
		r, size, err := s.in.ReadRune()
		switch {
		case err == io.EOF:
			s.ended = true
			return s.takeWord()
		case err != nil:
			return s.fail(s.errRead(err))
		case r == utf8.RuneError && size == 1:
			return s.fail(s.errBadByte())
		}
		start := s.offset - int64(len(s.word))
		s.offset += int64(size)
		if unicode.IsSpace(r) {
			if task, ok := s.takeWord(); ok {
				return task, true
			}
			continue
		}
		if len(s.word)+size > maxScannedInstruction {
			return s.fail(fmt.Errorf("taskexec: the instruction at byte %d is longer than %d bytes: "+
				"put white space between instructions, or make it shorter", start, maxScannedInstruction))
		}
		s.word = utf8.AppendRune(s.word, r)
	}
	return Task{}, false
}

// takeWord makes a task of the word that has been read, if there is one.
func (s *TaskScanner) takeWord() (task Task, ok bool) {
	if len(s.word) == 0 {
		return Task{}, false
	}
	task = parsedTask(string(s.word))
	s.word = s.word[:0]
	return task, true
}

func (s *TaskScanner) fail(err error) (Task, bool) {
	s.ended, s.err = true, err
	return Task{}, false
}

func (s *TaskScanner) errRead(err error) error {
	return fmt.Errorf("taskexec: cannot read tasks beyond byte %d: %w", s.offset, err)
}

// errBadByte says what is wrong with the byte that ReadRune has just refused. A character that is cut off because
// the reader failed in the middle of it is the reader's error, not the text's.
func (s *TaskScanner) errBadByte() error {
	_ = s.in.UnreadRune() // always possible just after ReadRune
	// Only what is buffered: waiting for more input here would keep a bad byte from being reported.
	rest, _ := s.in.Peek(min(utf8.UTFMax, s.in.Buffered()))
	if !utf8.FullRune(rest) {
		// ReadRune has asked for more and met the reader's error, which Peek finds waiting.
		if _, err := s.in.Peek(len(rest) + 1); err != io.EOF {
			s.offset += int64(len(rest))
			return s.errRead(err)
		}
	}
	return errInvalidUTF8(s.offset)
}

// wantedCategory is the category that t names, whether it can be used or not: its own, or else the first
// character of its instruction.
func wantedCategory(t Task) string {
	if t.Category != "" {
		return t.Category
	}
	return firstRune(t.Instruction)
}

// categoryFault says why category cannot be used, and "" if it can. The reasons are constants, because Partition
// may ask for one of each of a million tasks.
func categoryFault(category string) string {
	switch {
	case category == "":
		return "it is empty"
	case len(category) > maxNameLen:
		return "it is longer than 255 bytes"
	case !utf8.ValidString(category):
		return "it is not valid UTF-8"
	case strings.ContainsFunc(category, unicode.IsControl):
		return "it has a control character"
	}
	return ""
}

// categoryOf is the category under which t is dispatched. If t has none that can be used, it is "" and ok is false.
func categoryOf(t Task) (category string, ok bool) {
	category = wantedCategory(t)
	if categoryFault(category) != "" {
		return "", false
	}
	return category, true
}

// taskFault says why t cannot be run on any worker, and is nil if it can. It has no "taskexec: " of its own, as it is always
// the cause in a TaskError.
func taskFault(t Task) error {
	wanted := wantedCategory(t)
	if fault := categoryFault(wanted); fault != "" {
		// 64 characters show which category is meant; the text of a task may be of any length.
		return fmt.Errorf("category %.64q cannot be used, %s: set Task.Category to 1 to 255 bytes of UTF-8 without control characters",
			wanted, fault)
	}
	if t.Timeout < 0 {
		return fmt.Errorf("its timeout %v is negative: set Task.Timeout to 0 for none", t.Timeout)
	}
	return nil
}

// Order says in which stages the tasks of a run are dispatched. Stages run one after another: every task of a stage has
// its outcome before the first task of the next one is sent.
type Order int

const (
	// ByCategory, the default, makes each category a stage, in the order of the
	// categories' bytes, which is that of their Unicode code points, or as
	// WithSequence says. Within a category the tasks keep the order of the list.
	ByCategory Order = iota

	// ByInput makes each task a stage, in the order of the list: one task runs
	// at a time.
	ByInput

	// Concurrent makes one stage of all categories: nothing waits for anything
	// else. Within a category the tasks are sent in the order of the list.
	Concurrent
)

// String is the name of the constant, such as "ByCategory"; for any other value it is "Order(7)".
func (o Order) String() string {
	switch o {
	case ByCategory:
		return "ByCategory"
	case ByInput:
		return "ByInput"
	case Concurrent:
		return "Concurrent"
	}
	return "Order(" + strconv.Itoa(int(o)) + ")"
}

// A Group is the tasks of one category that are dispatched together.
type Group struct {
	Category string
	Tasks    []Task // in input order, at least one
}

// Partition sorts tasks into one group for each category. The groups are sorted by category, as [ByCategory] runs them, and
// within a group the tasks keep their order. Every task is in exactly one group, with its Category set to the group's.
//
// Tasks whose category cannot be used (see [Task]) are in a group with the Category "", unchanged. That group comes first, and
// a run would refuse its tasks. An empty list gives no groups.
//
// The tasks are copied, and tasks is left as it is; the text of categories and instructions is shared. Partition takes
// linear time, apart from sorting the categories.
func Partition(tasks []Task) []Group {
	a := arrange(tasks, ByCategory, nil)
	indices := a.byCategory()
	copies := make([]Task, len(tasks))
	for to, from := range indices {
		copies[to] = tasks[from]
		if category := a.categories[a.of[from]]; category != "" {
			copies[to].Category = category
		}
	}
	groups := make([]Group, len(a.categories))
	for c, extent := range a.extents {
		size := extent.tasks
		// The capacity ends with the group, so that appending to one never writes into the next.
		groups[c] = Group{Category: a.categories[c], Tasks: copies[:size:size]}
		copies = copies[size:]
	}
	return groups
}

// An arrangement says of each task which category it belongs to, and in which order the categories come. It is what
// Partition shows and what a plan dispatches by, so that the two cannot differ.
type arrangement struct {
	categories []string // each once; "" if there are tasks without a usable one
	extents    []extent // of each category
	of         []int32  // of[i] is the index in categories of task i's category
	negative   int      // the first task whose timeout is negative; -1 if there is none
}

// An extent says where the tasks of a category are.
type extent struct {
	tasks       int // how many there are
	first, last int // the index of the first and of the last
}

// arrange finds the category of every task. With ByInput the categories are in order of first appearance; with any other
// order those of sequence that have tasks come first, and then the rest, sorted.
func arrange(tasks []Task, order Order, sequence []string) arrangement {
	a := arrangement{of: make([]int32, len(tasks)), negative: -1}
	numbers := make(map[string]int32)
	var letters [utf8.RuneSelf]int32 // the numbers of categories of one byte, plus 1: most are, and a map takes five times as long
	for i := range tasks {
		wanted := wantedCategory(tasks[i])
		if tasks[i].Timeout < 0 && a.negative < 0 {
			a.negative = i
		}
		letter := len(wanted) == 1 && wanted[0] < utf8.RuneSelf
		var number int32
		if letter && letters[wanted[0]] > 0 {
			number = letters[wanted[0]] - 1
		} else {
			number = a.number(numbers, wanted)
			if letter && a.categories[number] == wanted {
				letters[wanted[0]] = number + 1
			}
		}
		a.of[i] = number
		e := &a.extents[number]
		if e.tasks == 0 {
			e.first = i
		}
		e.tasks++
		e.last = i
	}
	if order == ByInput {
		return a
	}

	// Below zero for the categories listed, zero for all others.
	rank := make(map[string]int, len(sequence))
	for i, category := range sequence {
		rank[category] = i - len(sequence)
	}
	slices.SortFunc(a.categories, func(x, y string) int {
		return cmp.Or(cmp.Compare(rank[x], rank[y]), strings.Compare(x, y))
	})

	renumbered := make([]int32, len(a.categories))
	extents := make([]extent, len(a.categories))
	for number, category := range a.categories {
		renumbered[numbers[category]] = int32(number)
		extents[number] = a.extents[numbers[category]]
	}
	a.extents = extents
	if !slices.IsSorted(renumbered) { // else they are as they were
		for i, number := range a.of {
			a.of[i] = renumbered[number]
		}
	}
	return a
}

// number is the index in categories of the category that a task wants: it can be used if it is known.
func (a *arrangement) number(numbers map[string]int32, wanted string) int32 {
	if number, known := numbers[wanted]; known {
		return number
	}
	category := wanted
	if categoryFault(wanted) != "" {
		category = ""
	}
	number, known := numbers[category]
	if !known {
		number = int32(len(a.categories))
		numbers[category] = number
		a.categories = append(a.categories, category)
		a.extents = append(a.extents, extent{})
	}
	return number
}

// byCategory gives the index of every task, category by category and in input order within one.
func (a arrangement) byCategory() []int {
	next := make([]int, len(a.extents)) // where the next task of each category goes
	for c := 1; c < len(next); c++ {
		next[c] = next[c-1] + a.extents[c-1].tasks
	}
	indices := make([]int, len(a.of))
	for i, c := range a.of {
		indices[next[c]] = i
		next[c]++
	}
	return indices
}

// A plan is the stages of a run. It names tasks by their index in the list it was made from, and never changes.
type plan struct {
	arrangement arrangement
	indices     []int // every task once, in the order of stages and groups
	single      bool  // each task is a group of its own, rather than all of a category
	width       int   // how many groups make a stage
}

// A stage is the groups that may run at the same time.
type stage struct {
	groups []stageGroup
	last   []string // the categories that no later stage needs
}

// A stageGroup is a Group by its tasks' indices, which are ascending.
type stageGroup struct {
	category string
	indices  []int
}

// newPlan plans tasks, in linear time apart from sorting the categories. Its error is the *TaskError of the first task whose
// category, or else whose timeout, cannot be used.
//
// sequence lists categories that come before all others, in that order, each once; those without a task are passed over.
// ByInput has no use for it.
func newPlan(tasks []Task, order Order, sequence []string) (*plan, error) {
	a := arrange(tasks, order, sequence)
	if unusable := slices.Index(a.categories, ""); unusable >= 0 {
		i := a.extents[unusable].first
		return nil, &TaskError{Index: i, Task: tasks[i], Outcome: Failed, Err: taskFault(tasks[i])}
	}

	if i := a.negative; i >= 0 {
		return nil, &TaskError{Index: i, Task: tasks[i], Outcome: Failed, Err: taskFault(tasks[i])}
	}

	p := &plan{arrangement: a, width: 1}
	switch order {
	case ByInput:
		p.single = true
		p.indices = make([]int, len(tasks))
		for i := range p.indices {
			p.indices[i] = i
		}
	case Concurrent:
		p.width = max(1, len(a.categories))
		p.indices = a.byCategory()
	default:
		p.indices = a.byCategory()
	}
	return p, nil
}

// categories is every category of the plan once, in the order in which the stages first need them. The caller must not change it.
func (p *plan) categories() []string {
	return p.arrangement.categories
}

// stages gives the stages in order, numbered from 0, none of them empty.
//
// The slices of a stage are used again for the next one, so that a million stages cost no allocation each: they are
// valid until the loop goes on. The indices within a group are the plan's: they are valid as long as it is, and must not be changed.
func (p *plan) stages() iter.Seq2[int, stage] {
	return func(yield func(int, stage) bool) {
		var s stage
		rest := p.indices
		for number := 0; len(rest) > 0; number++ {
			s.groups, s.last = s.groups[:0], s.last[:0]
			for len(rest) > 0 && len(s.groups) < p.width {
				c := p.arrangement.of[rest[0]]
				size := 1
				if !p.single {
					size = p.arrangement.extents[c].tasks
				}
				group := stageGroup{category: p.arrangement.categories[c], indices: rest[:size]}
				rest = rest[size:]
				s.groups = append(s.groups, group)
				// The group with a category's last task is the last group of it.
				if group.indices[size-1] == p.arrangement.extents[c].last {
					s.last = append(s.last, group.category)
				}
			}
			if !yield(number, s) {
				return
			}
		}
	}
}
