package taskexec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// This file is the wire: what may stand in a line, and nothing about who sends
// it when. Parsing and appending are pure; wire.go moves the lines. The whole
// is specified in docs/protocol.md.

// protocolVersion is the second word of both greetings.
const protocolVersion = "taskexec/1"

// Limits of the wire. Lengths are those of encoded lines, newline included.
const (
	greetingLimit  = 4 << 10                   // longest line before the session is ready
	defaultMaxLine = 1 << 20                   // longest line after that, unless a greeting says otherwise
	minMaxLine     = 4 << 10                   // a peer may not ask for less
	windowTasks    = 4096                      // most tasks in flight on a session
	windowBytes    = 1 << 20                   // most bytes in flight on a session, counted by taskCost
	minTaskCost    = 256                       // what a short task counts for: windowTasks of them fill windowBytes
	maxFailText    = minMaxLine - 64           // a longer error message is cut, so that its line fits whatever the limit is
	maxNameLen     = 255                       // bytes of a category, a worker's name, an instance, a run
	maxDouble      = int64(1<<53 - 1)          // every number fits a double, so that any language can read it
	maxNumber      = (1<<53 - 1) & math.MaxInt // the greatest that counts something here
	maxMillis      = 1_000_000_000_000
	maxMicros      = 1_000_000_000_000_000
)

// taskCost is what a RUN line of n bytes takes of a session's windowBytes.
func taskCost(n int) int { return max(minTaskCost, n) }

// verb is the first word of a line.
type verb uint8

const (
	verbNone verb = iota
	verbHello
	verbWelcome
	verbRun
	verbRecall
	verbCancel
	verbPing
	verbPong
	verbShutdown
	verbDone
	verbReturn
	verbFail
	verbDrain
	verbGoodbye
	verbError
)

var verbNames = [...]string{
	verbNone: "NONE", verbHello: "HELLO", verbWelcome: "WELCOME", verbRun: "RUN", verbRecall: "RECALL",
	verbCancel: "CANCEL", verbPing: "PING", verbPong: "PONG", verbShutdown: "SHUTDOWN", verbDone: "DONE",
	verbReturn: "RETURN", verbFail: "FAIL", verbDrain: "DRAIN", verbGoodbye: "GOODBYE", verbError: "ERROR",
}

func (v verb) String() string { return verbNames[v] }

func parseVerb(word []byte) verb {
	// A switch, not a map: it is on the path of every message.
	switch string(word) {
	case "RUN":
		return verbRun
	case "DONE":
		return verbDone
	case "FAIL":
		return verbFail
	case "RETURN":
		return verbReturn
	case "RECALL":
		return verbRecall
	case "PING":
		return verbPing
	case "PONG":
		return verbPong
	case "CANCEL":
		return verbCancel
	case "DRAIN":
		return verbDrain
	case "SHUTDOWN":
		return verbShutdown
	case "GOODBYE":
		return verbGoodbye
	case "HELLO":
		return verbHello
	case "WELCOME":
		return verbWelcome
	case "ERROR":
		return verbError
	}
	return verbNone
}

// kindOf is the kind that word names; "" if it is none.
func kindOf(word []byte) string {
	for _, kind := range kinds {
		if string(word) == kind {
			return kind
		}
	}
	return ""
}

var kinds = [...]string{KindError, KindFinal, KindPanic, KindCanceled, KindTimeout, KindStuck, KindOutput}

// The codes of ERROR: why a session is closed.
const (
	codeProtocol = "protocol" // the first line is no greeting of this protocol
	codeVersion  = "version"  // a greeting of a version that this side does not speak
	codeGreeting = "greeting" // the greeting's object is malformed, or a value in it is out of range
	codeSyntax   = "syntax"   // a malformed line: an unknown verb or kind, a bad number, a bad escape
	codeLine     = "line"     // a line over the limit
	codeState    = "state"    // a verb that this side may not send, or not now
	codeTask     = "task"     // a report for a task not in flight, or a RUN for one that already is
	codeWindow   = "window"   // more in flight than WELCOME granted
	codeCategory = "category" // a RUN of a category that the worker does not serve
	codeTimeout  = "timeout"  // the peer was silent for too long
	codeBusy     = "busy"     // too many sessions, or no slot that is not stuck
	codeRefused  = "refused"  // this peer may not ask for that
	codeFlood    = "flood"    // more control messages, or answers left unread, than a peer has reason for
	codeClosing  = "closing"  // this side is going away
)

// ProtocolError is why a session was ended by one of its sides: a line that
// breaks the rules of docs/protocol.md, a peer that was silent for too long, a
// side that is going away.
type ProtocolError struct {
	Code   string // one of the codes of docs/protocol.md, such as "syntax"
	Text   string // for people
	Remote bool   // the peer said so in an ERROR; otherwise this side found it
}

func (e *ProtocolError) Error() string {
	who := "protocol error"
	if e.Remote {
		who = "peer reports"
	}
	return who + " (" + quoteUnlessPlain(e.Code) + "): " + plainText(e.Text)
}

func faultf(code, format string, args ...any) *ProtocolError {
	return &ProtocolError{Code: code, Text: fmt.Sprintf(format, args...)}
}

// message is one line, taken apart. Which fields count depends on the verb.
type message struct {
	verb    verb
	task    int           // RUN, RECALL, DONE, RETURN, FAIL: the task's number; PING, PONG: the number to send back
	attempt int           // RUN
	time    time.Duration // RUN: timeout, 0 is none; DONE: execution time; FAIL: delay before another attempt
	word    string        // FAIL: kind; ERROR: code; HELLO, WELCOME: version
	text    string        // what stands at the end of the line, unescaped; HELLO, WELCOME: the JSON object
}

// appendMessage appends m's line, newline included.
func appendMessage(dst []byte, m message) []byte {
	if m.verb == verbRun {
		return appendRun(dst, m.task, m.attempt, m.time, m.text)
	}
	dst = append(dst, m.verb.String()...)
	switch m.verb {
	case verbDone:
		dst = appendNumber(dst, m.task)
		dst = appendNumber(dst, ceilDiv(m.time, time.Microsecond, maxMicros))
		dst = appendText(dst, m.text)
	case verbFail:
		dst = appendNumber(dst, m.task)
		dst = append(append(dst, ' '), m.word...)
		dst = appendNumber(dst, ceilDiv(m.time, time.Millisecond, maxMillis))
		dst = appendText(dst, m.text)
	case verbRecall, verbReturn, verbPing, verbPong:
		dst = appendNumber(dst, m.task)
	case verbCancel, verbGoodbye:
		dst = appendText(dst, m.text)
	case verbError:
		dst = append(append(dst, ' '), m.word...)
		dst = appendText(dst, m.text)
	case verbHello, verbWelcome:
		dst = append(append(dst, ' '), m.word...)
		dst = append(append(dst, ' '), m.text...)
	}
	return append(dst, '\n')
}

// appendRun appends a line of RUN. It is appendMessage for the verb that is sent
// most, without a message to be copied.
func appendRun(dst []byte, task, attempt int, timeout time.Duration, text string) []byte {
	dst = appendNumber(append(dst, "RUN"...), task)
	dst = appendNumber(dst, attempt)
	dst = appendNumber(dst, ceilDiv(timeout, time.Millisecond, maxMillis))
	return append(appendText(dst, text), '\n')
}

func appendNumber[N int | int64](dst []byte, n N) []byte {
	if 0 <= n && n <= 9 { // most attempts and times
		return append(dst, ' ', '0'+byte(n))
	}
	return strconv.AppendInt(append(dst, ' '), int64(n), 10)
}

// appendText appends a space and text, escaped; nothing if text is empty.
func appendText(dst []byte, text string) []byte {
	if text == "" {
		return dst
	}
	dst = append(slices.Grow(dst, len(text)+len(" \n")), ' ')
	// Looking for what needs an escape is fast where there is nothing (see
	// needsEscape). A block in which there is something is gone through byte by
	// byte, so that the time for a text of many lines is linear too.
	const block = 512
	for len(text) > block {
		dst = appendEscaped(dst, text[:block])
		text = text[block:]
	}
	return appendEscaped(dst, text)
}

func appendEscaped(dst []byte, text string) []byte {
	if !needsEscape(text) {
		return append(dst, text...)
	}
	start := 0 // of what is copied as it is
	for i := range len(text) {
		c := escapes[text[i]]
		if c == 0 {
			continue
		}
		dst = append(append(dst, text[start:i]...), '\\', c)
		start = i + 1
	}
	return append(dst, text[start:]...)
}

// escapes is what stands behind the backslash for a byte that needs one.
var escapes = [256]byte{'\\': '\\', '\n': 'n', '\r': 'r'}

// needsEscape goes through the text once for each of the three bytes that need an
// escape, with the processor's instructions for that, which is faster than going
// through it once with three comparisons.
func needsEscape(text string) bool {
	return strings.IndexByte(text, '\\') >= 0 || strings.IndexByte(text, '\n') >= 0 || strings.IndexByte(text, '\r') >= 0
}

// ceilDiv counts d in units, rounded up so that a short time never becomes 0,
// which means none.
func ceilDiv(d, unit time.Duration, most int64) int64 {
	if d <= 0 {
		return 0
	}
	n := int64(d / unit)
	if d%unit != 0 {
		n++
	}
	return min(n, most)
}

// parse takes a line apart, its newline already cut off. Its error is a
// *ProtocolError with codeSyntax, and m is then zero. m keeps nothing of line,
// which may be a part of a buffer: its text comes from texts.
//
// It fills in a message in place, rather than return it, because there may be
// millions a second, and copying one takes longer than most of this.
func (m *message) parse(line []byte, texts *texts) error {
	f := fields{rest: line, more: true, texts: texts}
	*m = message{}
	switch { // most are one of two
	case len(line) > 4 && string(line[:4]) == "RUN ":
		m.verb, f.rest = verbRun, line[4:]
	case len(line) > 5 && string(line[:5]) == "DONE ":
		m.verb, f.rest = verbDone, line[5:]
	default:
		m.verb = parseVerb(f.word())
	}
	switch m.verb {
	case verbRun:
		m.task = int(f.number(maxNumber))
		m.attempt = int(f.number(maxNumber))
		m.time = time.Duration(f.number(maxMillis)) * time.Millisecond
		m.text = f.text()
		if m.attempt == 0 && f.fault == "" {
			f.fault = "attempts are numbered from 1"
		}
	case verbDone:
		m.task = int(f.number(maxNumber))
		m.time = time.Duration(f.number(maxMicros)) * time.Microsecond
		m.text = f.text()
	case verbFail:
		m.task = int(f.number(maxNumber))
		kind := f.word()
		m.word = kindOf(kind)
		m.time = time.Duration(f.number(maxMillis)) * time.Millisecond
		m.text = f.text()
		if m.word == "" && f.fault == "" {
			f.fault = "unknown kind " + quote(string(kind))
		}
	case verbRecall, verbReturn, verbPing, verbPong:
		m.task = int(f.number(maxNumber))
		f.end()
	case verbCancel, verbGoodbye:
		m.text = f.text()
	case verbShutdown, verbDrain:
		f.end()
	case verbError:
		// Any code: those of later versions should be heard too.
		m.word = string(f.word())
		m.text = f.text()
		if strings.IndexFunc(m.word, func(r rune) bool { return r <= ' ' || r > '~' }) >= 0 {
			f.fail("bad code " + quote(m.word))
		}
	case verbHello, verbWelcome:
		m.word = string(f.word())
		m.text = string(f.rest)
	case verbNone:
		word, _, _ := bytes.Cut(line, []byte(" "))
		f.fault = "unknown verb " + quote(string(word))
	}
	if f.fault != "" {
		*m = message{}
		return faultf(codeSyntax, "%s in line %s", f.fault, quote(string(line)))
	}
	return nil
}

// fields cuts a line at its spaces. The first thing wrong is kept in fault.
type fields struct {
	rest  []byte
	more  bool // rest is there, though it may be empty
	fault string
	texts *texts
}

func (f *fields) word() []byte {
	if !f.more || len(f.rest) == 0 || f.rest[0] == ' ' {
		f.fail("missing field")
		return nil
	}
	n := 0
	for n < len(f.rest) && f.rest[n] != ' ' { // not by bytes.IndexByte: words are short
		n++
	}
	w := f.rest[:n]
	f.cut(n)
	return w
}

// cut drops the next n bytes and the space after them.
func (f *fields) cut(n int) {
	if n == len(f.rest) {
		f.rest, f.more = nil, false
	} else {
		f.rest = f.rest[n+1:]
	}
}

// number reads digits, with neither sign nor leading zero, so that every
// number has one form.
func (f *fields) number(most int64) int64 {
	// A good number is read in one go; a bad one is read again, to say why.
	if n, size := digits(f.rest); size > 0 && n <= most && f.more && f.fault == "" &&
		(size == len(f.rest) || f.rest[size] == ' ') {
		f.cut(size)
		return n
	}
	w := f.word()
	if f.fault != "" {
		return 0
	}
	var n int64
	for i := range w {
		d := w[i] - '0'
		if d > 9 || (w[0] == '0' && len(w) > 1) {
			f.fail("bad number " + quote(string(w)))
			return 0
		}
		n = n*10 + int64(d)
		if n > most {
			f.fail("number " + quote(string(w)) + " is over " + strconv.FormatInt(most, 10))
			return 0
		}
	}
	return n
}

// digits reads the number that s begins with, and how many bytes it has: 0 if
// there is no number, or one with a leading zero, or one that could overflow.
func digits(s []byte) (n int64, size int) {
	const most = 18 // so many nines fit an int64
	for size < len(s) && s[size]-'0' <= 9 {
		n = n*10 + int64(s[size]-'0')
		size++
		if size > most {
			return 0, 0
		}
	}
	if size > 1 && s[0] == '0' {
		return 0, 0
	}
	return n, size
}

// text reads the rest of the line.
func (f *fields) text() string {
	if !f.more || len(f.rest) == 0 || f.fault != "" {
		return ""
	}
	text, ok := f.texts.unescaped(f.rest)
	if !ok {
		f.fail("bad escape")
	}
	return text
}

func (f *fields) end() {
	if f.more {
		f.fail("more than the verb takes")
	}
}

func (f *fields) fail(fault string) {
	if f.fault == "" {
		f.fault = fault
	}
}

// texts makes the texts of messages out of the bytes of lines. Short ones share
// pieces of memory, so that a task costs no allocation of its own. A piece is
// small: even if a peer arranges that one text is kept and the rest of its piece is
// given up, that text holds on to no more than four times what a task counts for.
type texts struct {
	piece strings.Builder
}

const (
	pieceBytes = 4 * minTaskCost
	longText   = minTaskCost // has memory of its own
)

// unescaped is the text from which appendText has made escaped. ok is false for
// an escape that appendText does not make, and for a bare carriage return: every
// text has one encoding.
func (t *texts) unescaped(escaped []byte) (text string, ok bool) {
	if bytes.IndexByte(escaped, '\r') >= 0 {
		return "", false
	}
	i := bytes.IndexByte(escaped, '\\')
	if i < 0 && len(escaped) > longText {
		return string(escaped), true
	}
	b := &t.piece
	if len(escaped) > longText {
		b = new(strings.Builder)
	}
	if b.Cap()-b.Len() < len(escaped) {
		b.Reset() // texts made from the old piece keep it
		b.Grow(max(pieceBytes, len(escaped)))
	}
	start := b.Len()
	for ; i >= 0; i = bytes.IndexByte(escaped, '\\') {
		b.Write(escaped[:i])
		if i+1 == len(escaped) {
			return "", false
		}
		switch escaped[i+1] {
		case '\\':
			b.WriteByte('\\')
		case 'n':
			b.WriteByte('\n')
		case 'r':
			b.WriteByte('\r')
		default:
			return "", false
		}
		escaped = escaped[i+2:]
	}
	b.Write(escaped)
	return b.String()[start:], true
}

// hello is the object of HELLO. Its numbers have 64 bits on every machine: a peer
// that has more of something than an int can count is not at fault.
type hello struct {
	Run       string   `json:"run,omitempty"`        // names the run in logs and in the handlers' TaskInfo
	Category  string   `json:"category"`             // of every task of the session
	TimeoutMS int64    `json:"timeout_ms,omitempty"` // silence after which the coordinator counts the worker as dead; 0: never
	MaxLine   int64    `json:"max_line,omitempty"`   // longest line the coordinator reads; 0: defaultMaxLine
	Features  []string `json:"features,omitempty"`   // of later versions; unknown ones are ignored
}

// welcome is the object of WELCOME. What it leaves out is 0 here until
// withDefaults has been called.
type welcome struct {
	Worker     string   `json:"worker,omitempty"`     // the worker's name, for people
	Instance   string   `json:"instance,omitempty"`   // tells one worker from another, whatever their addresses and names
	Categories []string `json:"categories,omitempty"` // what it serves; none: anything
	Slots      int64    `json:"slots,omitempty"`      // tasks it executes at a time; 0: 1
	Window     int64    `json:"window,omitempty"`     // tasks it lets be in flight; 0: as many as slots
	MaxLine    int64    `json:"max_line,omitempty"`   // longest line it reads; 0: defaultMaxLine
	Heartbeat  bool     `json:"heartbeat,omitempty"`  // it answers PING at once, whatever its handlers do
	Features   []string `json:"features,omitempty"`
}

// appendGreeting appends HELLO or WELCOME with object, which is one of the two
// structs above.
func appendGreeting(dst []byte, v verb, object any) ([]byte, error) {
	text, err := json.Marshal(object)
	if err != nil {
		return dst, err
	}
	start := len(dst)
	dst = appendMessage(dst, message{verb: v, word: protocolVersion, text: string(text)})
	if n := len(dst) - start; n > greetingLimit {
		return dst[:start], fmt.Errorf("a greeting of %d bytes is over the limit of %d", n, greetingLimit)
	}
	return dst, nil
}

// parseHello reads HELLO's object. Its error is a *ProtocolError.
func parseHello(m message) (hello, error) {
	var h hello
	if err := decodeGreeting(m, &h); err != nil {
		return h, err
	}
	switch {
	case h.Category == "":
		return h, faultf(codeGreeting, "HELLO needs a category")
	case !validCategory(h.Category):
		return h, faultf(codeGreeting, "category %s is not 1 to %d bytes of UTF-8 without control characters", quote(h.Category), maxNameLen)
	case !validName(h.Run):
		return h, faultf(codeGreeting, "run %s is not at most %d bytes of UTF-8 without control characters", quote(h.Run), maxNameLen)
	case h.TimeoutMS < 0 || h.TimeoutMS > maxMillis:
		return h, faultf(codeGreeting, "timeout_ms %d is out of range", h.TimeoutMS)
	case h.MaxLine != 0 && (h.MaxLine < minMaxLine || h.MaxLine > maxDouble):
		return h, faultf(codeGreeting, "max_line %d is not %d to %d", h.MaxLine, minMaxLine, maxDouble)
	}
	if h.MaxLine == 0 {
		h.MaxLine = defaultMaxLine
	}
	return h, nil
}

// parseWelcome reads WELCOME's object, with its defaults filled in. Its error
// is a *ProtocolError.
func parseWelcome(m message) (welcome, error) {
	var w welcome
	if err := decodeGreeting(m, &w); err != nil {
		return w, err
	}
	for _, s := range append([]string{w.Worker, w.Instance}, w.Categories...) {
		if !validName(s) {
			return w, faultf(codeGreeting, "%s is not at most %d bytes of UTF-8 without control characters", quote(s), maxNameLen)
		}
	}
	switch {
	case w.Slots < 0 || w.Slots > maxDouble:
		return w, faultf(codeGreeting, "slots %d is not 0 to %d", w.Slots, maxDouble)
	case w.Window < 0 || w.Window > maxDouble:
		return w, faultf(codeGreeting, "window %d is not 0 to %d", w.Window, maxDouble)
	case w.MaxLine != 0 && (w.MaxLine < minMaxLine || w.MaxLine > maxDouble):
		return w, faultf(codeGreeting, "max_line %d is not %d to %d", w.MaxLine, minMaxLine, maxDouble)
	}
	if w.Slots == 0 {
		w.Slots = 1
	}
	if w.Window == 0 {
		w.Window = w.Slots
	}
	if w.MaxLine == 0 {
		w.MaxLine = defaultMaxLine
	}
	return w, nil
}

// decodeGreeting reads the object of a greeting of this version into a struct.
func decodeGreeting(m message, object any) error {
	switch name, _, _ := strings.Cut(protocolVersion, "/"); {
	case m.word == protocolVersion:
	case strings.HasPrefix(m.word, name+"/"):
		return faultf(codeVersion, "this side speaks %s, not %s", protocolVersion, quote(m.word))
	default:
		return faultf(codeProtocol, "this side speaks %s, not %s", protocolVersion, quote(m.word))
	}
	// What encoding/json lets pass, but would be puzzling later.
	switch {
	case !strings.HasPrefix(m.text, "{"):
		return faultf(codeGreeting, "%s needs a JSON object after its version, and one space between, not %s", m.verb, quote(m.text))
	case strings.Contains(m.text, "\r"):
		return faultf(codeGreeting, "a carriage return in %s: lines end with a newline alone", m.verb)
	case !utf8.ValidString(m.text):
		return faultf(codeGreeting, "the object of %s is not UTF-8", m.verb)
	}
	if err := json.Unmarshal([]byte(m.text), object); err != nil {
		return faultf(codeGreeting, "the object of %s is not the JSON that belongs there: %v", m.verb, err)
	}
	return nil
}

// serves reports whether a worker with these categories takes category.
func serves(categories []string, category string) bool {
	return len(categories) == 0 || slices.Contains(categories, category)
}

// validCategory reports whether s may name a category.
func validCategory(s string) bool { return categoryFault(s) == "" }

// validName reports whether s may stand in a greeting: short and harmless to
// print.
func validName(s string) bool {
	return len(s) <= maxNameLen && utf8.ValidString(s) && strings.IndexFunc(s, unicode.IsControl) < 0
}

// Text from a peer or a task reaches errors only through the functions below:
// shortened, and with whatever could act on a terminal or a log escaped.

const maxQuoted = 80 // bytes of a text that an error shows

// quote is s in double quotes, escaped and shortened.
func quote(s string) string {
	return strconv.Quote(cut(s, maxQuoted))
}

// quoteUnlessPlain is s itself if it is short and plain; in backquotes, as Go has
// them, if that spares escapes; else as quote.
func quoteUnlessPlain(s string) string {
	shown := cut(s, maxQuoted)
	switch {
	case s == "" || strings.IndexFunc(shown, notPlain) >= 0:
	case len(s) <= maxQuoted && !strings.ContainsAny(s, " \""):
		return s
	case strings.Contains(shown, `"`) && !strings.Contains(shown, "`"): // JSON, say
		return "`" + shown + "`"
	}
	return quote(s)
}

// plainText is a message for people: escaped, newlines included, and cut at
// maxFailText.
func plainText(s string) string {
	s = cut(s, maxFailText)
	if strings.IndexFunc(s, notPlain) < 0 {
		return s
	}
	q := strconv.Quote(s)
	return cut(strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`), maxFailText)
}

func notPlain(r rune) bool { return r == utf8.RuneError || !strconv.IsPrint(r) }

const cutMark = "…" // stands for what was cut off

// cut shortens s to at most n bytes, between two runes, and shows that it did.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:runeEnd(s, n-len(cutMark))] + cutMark
}

// cutText shortens an error message so that it takes at most maxFailText bytes
// of a line, escapes included.
func cutText(s string) string {
	n, end := 0, 0 // bytes that s[:i] takes; the last i that leaves room for the mark
	for i := range len(s) {
		if n <= maxFailText-len(cutMark) {
			end = i
		}
		n++
		if c := s[i]; c == '\\' || c == '\n' || c == '\r' {
			n++
		}
		if n > maxFailText {
			return s[:runeEnd(s, end)] + cutMark
		}
	}
	return s
}

// runeEnd is end, or the start of the rune that would be cut there.
func runeEnd(s string, end int) int {
	for i := end; i > max(end-utf8.UTFMax, -1); i-- { // no farther: s may not be UTF-8 at all
		if utf8.RuneStart(s[i]) {
			return i
		}
	}
	return end
}
