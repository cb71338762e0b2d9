package taskexec

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// wireMessages are messages of every verb with every kind of value, and the
// one line that each has.
var wireMessages = []struct {
	reason string
	m      message
	line   string
}{
	{"a task without a timeout", message{verb: verbRun, task: 7, attempt: 1, text: "a1"}, "RUN 7 1 0 a1"},
	{"a timeout in milliseconds", message{verb: verbRun, task: 7, attempt: 2, time: 1500 * time.Millisecond, text: "a1"}, "RUN 7 2 1500 a1"},
	{"an empty instruction", message{verb: verbRun, attempt: 1}, "RUN 0 1 0"},
	{"an instruction that begins and ends with spaces", message{verb: verbRun, attempt: 1, text: "  a  "}, "RUN 0 1 0   a  "},
	{"what is escaped, and nothing else", message{verb: verbRun, attempt: 1, text: "a\nb\rc\\d\te\x00\xff\u2028"}, `RUN 0 1 0 a\nb\rc\\d` + "\te\x00\xff\u2028"},
	{"escapes beside each other", message{verb: verbRun, attempt: 1, text: "\\n\n\\"}, `RUN 0 1 0 \\n\n\\`},
	{"the greatest numbers", message{verb: verbRun, task: maxNumber, attempt: maxNumber, time: maxMillis * time.Millisecond}, fmt.Sprintf("RUN %d %d 1000000000000", maxNumber, maxNumber)},
	{"an execution time in microseconds", message{verb: verbDone, task: 3, time: 1234 * time.Microsecond, text: "out"}, "DONE 3 1234 out"},
	{"the longest execution time", message{verb: verbDone, time: maxMicros * time.Microsecond}, "DONE 0 1000000000000000"},
	{"a failure", message{verb: verbFail, task: 3, word: KindError, text: "no such file"}, "FAIL 3 error 0 no such file"},
	{"a failure with a delay", message{verb: verbFail, task: 3, word: KindTimeout, time: time.Second}, "FAIL 3 timeout 1000"},
	{"a recall", message{verb: verbRecall, task: 3}, "RECALL 3"},
	{"a return", message{verb: verbReturn, task: 3}, "RETURN 3"},
	{"a ping", message{verb: verbPing, task: 3}, "PING 3"},
	{"a pong", message{verb: verbPong, task: maxNumber}, fmt.Sprintf("PONG %d", maxNumber)},
	{"a cancel with a cause", message{verb: verbCancel, text: "the user\nhas left"}, `CANCEL the user\nhas left`},
	{"a cancel without a cause", message{verb: verbCancel}, "CANCEL"},
	{"a shutdown", message{verb: verbShutdown}, "SHUTDOWN"},
	{"a drain", message{verb: verbDrain}, "DRAIN"},
	{"a goodbye", message{verb: verbGoodbye, text: "Goodbye from a"}, "GOODBYE Goodbye from a"},
	{"a goodbye without a word", message{verb: verbGoodbye}, "GOODBYE"},
	{"an error", message{verb: verbError, word: codeSyntax, text: `unknown verb "X"`}, `ERROR syntax unknown verb "X"`},
	{"an error of a code that this version does not know", message{verb: verbError, word: "too-hot"}, "ERROR too-hot"},
	{"an error of a code of the first and the last character that one may have", message{verb: verbError, word: "!~"}, "ERROR !~"},
	{"a greeting, whose object is not escaped", message{verb: verbHello, word: protocolVersion, text: `{"run":"a\nb"}`}, `HELLO taskexec/1 {"run":"a\nb"}`},
	{"the shortest welcome", message{verb: verbWelcome, word: protocolVersion, text: "{}"}, "WELCOME taskexec/1 {}"},
}

// parseMessage is parse for a test, which has no message to fill in.
func parseMessage(line string) (m message, err error) {
	err = m.parse([]byte(line), new(texts))
	return m, err
}

func TestEveryMessageHasOneLine(t *testing.T) {
	verbs := make(map[verb]bool)
	for _, tt := range wireMessages {
		t.Run(tt.reason, func(t *testing.T) {
			verbs[tt.m.verb] = true
			line := string(appendMessage([]byte("before "), tt.m))
			if diff := cmp.Diff("before "+tt.line+"\n", line); diff != "" {
				t.Errorf("appendMessage (-want +got):\n%s", diff)
			}
			m, err := parseMessage(tt.line)
			if err != nil {
				t.Fatalf("parseMessage(%q): %v", tt.line, err)
			}
			if diff := cmp.Diff(tt.m, m, cmp.AllowUnexported(message{})); diff != "" {
				t.Errorf("parseMessage(%q) (-want +got):\n%s", tt.line, diff)
			}
		})
	}
	for v := verbNone + 1; int(v) < len(verbNames); v++ {
		if !verbs[v] {
			t.Errorf("no case for %s", v)
		}
	}
}

// A short time must never become 0, which means none, and a long one must not
// overflow.
func TestTimesRoundUp(t *testing.T) {
	for _, tt := range []struct {
		reason string
		verb   verb
		time   time.Duration
		want   string
	}{
		{"none stays none", verbRun, 0, "0"},
		{"a negative timeout is none", verbRun, -time.Second, "0"},
		{"a nanosecond is a millisecond", verbRun, 1, "1"},
		{"one over a millisecond is two", verbRun, time.Millisecond + 1, "2"},
		{"whole milliseconds stay", verbRun, 3 * time.Millisecond, "3"},
		{"the longest duration is cut", verbRun, math.MaxInt64, "1000000000000"},
		{"a nanosecond is a microsecond", verbDone, 1, "1"},
		{"the longest duration is cut", verbDone, math.MaxInt64, "1000000000000000"},
		{"a nanosecond is a millisecond", verbFail, 1, "1"},
	} {
		line := string(appendMessage(nil, message{verb: tt.verb, attempt: 1, word: KindError, time: tt.time}))
		words := strings.Fields(line)
		if got := words[len(words)-1]; got != tt.want {
			t.Errorf("%s: %s of %v has the line %q, want %s", tt.reason, tt.verb, tt.time, line, tt.want)
		}
	}
}

func TestAbsentTextIsEmptyText(t *testing.T) {
	for _, line := range []string{"RUN 0 1 0", "DONE 0 0", "FAIL 0 error 0", "CANCEL", "GOODBYE", "ERROR syntax"} {
		absent, err := parseMessage(line)
		if err != nil {
			t.Errorf("parseMessage(%q): %v", line, err)
		}
		empty, err := parseMessage(line + " ")
		if err != nil {
			t.Errorf("parseMessage(%q): %v", line+" ", err)
		}
		if absent != empty || absent.text != "" {
			t.Errorf("%q is %+v, and with a space after it %+v", line, absent, empty)
		}
	}
}

func TestMalformedLinesAreSyntaxErrors(t *testing.T) {
	for _, tt := range []struct {
		reason, line, want string // want is in the error's text
	}{
		{"an empty line", "", "unknown verb"},
		{"a space first", " RUN 0 1 0", "unknown verb"},
		{"an unknown verb", "JUMP 1", `unknown verb "JUMP"`},
		{"verbs are in capitals", "run 0 1 0", `unknown verb "run"`},
		{"the name of no verb", "NONE", "unknown verb"},
		{"a verb with a carriage return", "SHUTDOWN\r", "unknown verb"},
		{"another protocol", "GET / HTTP/1.1\r", `unknown verb "GET"`},
		{"binary", "\x16\x03\x01\x02\x00\x01", `unknown verb "\x16`},
		{"RUN alone", "RUN", "missing field"},
		{"RUN without an attempt", "RUN 0", "missing field"},
		{"RUN without a timeout", "RUN 0 1", "missing field"},
		{"RUN that ends after a space", "RUN 0 1 ", "missing field"},
		{"two spaces between fields", "RUN 0  1 0", "missing field"},
		{"a tab between fields", "RUN\t0 1 0", "unknown verb"},
		{"DONE without a time", "DONE 0", "missing field"},
		{"FAIL without a kind", "FAIL 0", "missing field"},
		{"FAIL without a delay", "FAIL 0 error", "missing field"},
		{"FAIL of an unknown kind", "FAIL 0 sad 0", `unknown kind "sad"`},
		{"kinds are in small letters", "FAIL 0 Error 0", "unknown kind"},
		{"RECALL of nothing", "RECALL", "missing field"},
		{"PING without a number", "PING ", "missing field"},
		{"ERROR without a code", "ERROR", "missing field"},
		{"ERROR with a code that is no word", "ERROR a\rb", "bad code"},
		{"ERROR with a code beyond ASCII", "ERROR é", "bad code"},
		{"HELLO alone", "HELLO", "missing field"},
		{"WELCOME with two spaces", "WELCOME  taskexec/1 {}", "missing field"},
		{"SHUTDOWN with a text", "SHUTDOWN now", "more than the verb takes"},
		{"SHUTDOWN with a space", "SHUTDOWN ", "more than the verb takes"},
		{"DRAIN with a text", "DRAIN now", "more than the verb takes"},
		{"RECALL of two", "RECALL 1 2", "more than the verb takes"},
		{"RETURN with a space", "RETURN 1 ", "more than the verb takes"},
		{"PONG with a text", "PONG 1 x", "more than the verb takes"},
		{"a plus sign", "RUN +1 1 0", `bad number "+1"`},
		{"a minus sign", "DONE -1 0", `bad number "-1"`},
		{"a leading zero", "RECALL 01", `bad number "01"`},
		{"two zeros", "RECALL 00", `bad number "00"`},
		{"a fraction", "DONE 1 0.5", `bad number "0.5"`},
		{"an exponent", "DONE 1 1e3", `bad number "1e3"`},
		{"hexadecimal", "PING 0x10", `bad number "0x10"`},
		{"digits of another script", "PING ١", "bad number"},
		{"a carriage return after a number", "PING 1\r", "bad number"},
		{"one over the greatest number", "PING 9007199254740992", "is over"},
		{"one over the greatest int64", "PING 9223372036854775808", "is over"},
		{"a number of a thousand digits", "PING " + strings.Repeat("9", 1000), "is over"},
		{"a timeout over the greatest", "RUN 0 1 1000000000001", "is over"},
		{"an execution time over the greatest", "DONE 0 1000000000000001", "is over"},
		{"a delay over the greatest", "FAIL 0 error 1000000000001", "is over"},
		{"attempt 0", "RUN 0 0 0 a1", "numbered from 1"},
		{"an escape of no meaning", `RUN 0 1 0 a\tb`, "bad escape"},
		{"an escape of a capital", `DONE 0 0 a\N`, "bad escape"},
		{"an escape by number", `CANCEL \x0a`, "bad escape"},
		{"a backslash at the end", `GOODBYE a\`, "bad escape"},
		{"three backslashes at the end", `FAIL 0 error 0 a\\\`, "bad escape"},
		{"a bare carriage return", "DONE 0 0 a\rb", "bad escape"},
		{"a carriage return at the beginning", "DONE 0 0 \ra", "bad escape"},
		{"a carriage return at the end", "DONE 0 0 a\r", "bad escape"},
		{"a bad escape in an error", `ERROR syntax \q`, "bad escape"},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			m, err := parseMessage(tt.line)
			var fault *ProtocolError
			if !errors.As(err, &fault) {
				t.Fatalf("parseMessage(%q) is %+v, %v; want a *ProtocolError", tt.line, m, err)
			}
			if m != (message{}) {
				t.Errorf("parseMessage(%q) is %+v beside its error", tt.line, m)
			}
			if fault.Code != codeSyntax || fault.Remote || !strings.Contains(fault.Text, tt.want) {
				t.Errorf("parseMessage(%q): %+v; want %s with %q", tt.line, fault, codeSyntax, tt.want)
			}
			harmless(t, err.Error(), 2*maxFailText)
		})
	}
}

// greetingOf parses a whole greeting line as a session does.
func greetingOf(line string) (any, error) {
	m, err := parseMessage(line)
	if err != nil {
		return nil, err
	}
	if m.verb == verbHello {
		return parseHello(m)
	}
	return parseWelcome(m)
}

func TestGreetingsHaveDefaults(t *testing.T) {
	for _, tt := range []struct {
		reason, line string
		want         any
	}{
		{"the shortest hello", `HELLO taskexec/1 {"category":"a"}`, hello{Category: "a", MaxLine: defaultMaxLine}},
		{"a whole hello", `HELLO taskexec/1 {"run":"r","category":"ä","timeout_ms":15000,"max_line":4096,"features":["x"]}`,
			hello{Run: "r", Category: "ä", TimeoutMS: 15000, MaxLine: 4096, Features: []string{"x"}}},
		{"fields and features of later versions are ignored", `HELLO taskexec/1 {"category":"a","codec":{"name":["zip"]},"features":["zip"]}`,
			hello{Category: "a", MaxLine: defaultMaxLine, Features: []string{"zip"}}},
		{"white space and escapes are JSON's", `HELLO taskexec/1 { "category" : "\u0061\/b" }`, hello{Category: "a/b", MaxLine: defaultMaxLine}},
		{"null is absent", `HELLO taskexec/1 {"category":"a","run":null,"max_line":null}`, hello{Category: "a", MaxLine: defaultMaxLine}},
		{"the shortest welcome", `WELCOME taskexec/1 {}`, welcome{Slots: 1, Window: 1, MaxLine: defaultMaxLine}},
		{"a window is as many as slots", `WELCOME taskexec/1 {"slots":3}`, welcome{Slots: 3, Window: 3, MaxLine: defaultMaxLine}},
		{"a whole welcome", `WELCOME taskexec/1 {"worker":"w","instance":"i","categories":["a","b"],"slots":2,"window":8,"max_line":8192,"heartbeat":true,"features":[]}`,
			welcome{Worker: "w", Instance: "i", Categories: []string{"a", "b"}, Slots: 2, Window: 8, MaxLine: 8192, Heartbeat: true, Features: []string{}}},
		{"more than an int of 32 bits can count", `WELCOME taskexec/1 {"slots":9007199254740991,"window":9007199254740991,"max_line":9007199254740991}`,
			welcome{Slots: maxDouble, Window: maxDouble, MaxLine: maxDouble}},
		{"lines as long as you like", `HELLO taskexec/1 {"category":"a","max_line":9007199254740991}`, hello{Category: "a", MaxLine: maxDouble}},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			got, err := greetingOf(tt.line)
			if err != nil {
				t.Fatalf("%s: %v", tt.line, err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", tt.line, diff)
			}
		})
	}
}

func TestBadGreetingsAreRefused(t *testing.T) {
	long := strings.Repeat("x", maxNameLen+1)
	for _, tt := range []struct {
		reason, line, code, want string
	}{
		{"another protocol", `HELLO chat/1 {"category":"a"}`, codeProtocol, "chat/1"},
		{"another version", `HELLO taskexec/2 {"category":"a"}`, codeVersion, `"taskexec/2"`},
		{"a version that only begins like this one", `WELCOME taskexec/10 {}`, codeVersion, "taskexec/10"},
		{"no object", "WELCOME taskexec/1", codeGreeting, "object"},
		{"no object after the space", "WELCOME taskexec/1 ", codeGreeting, "object"},
		{"null is no object", "WELCOME taskexec/1 null", codeGreeting, "object"},
		{"a list is no object", "WELCOME taskexec/1 []", codeGreeting, "object"},
		{"two spaces", "WELCOME taskexec/1  {}", codeGreeting, "object"},
		{"half an object", `WELCOME taskexec/1 {"worker":`, codeGreeting, "JSON"},
		{"two objects", `WELCOME taskexec/1 {} {}`, codeGreeting, "after top-level value"},
		{"a line that ends as in Windows", "WELCOME taskexec/1 {}\r", codeGreeting, "carriage return"},
		{"an object that is not UTF-8", "HELLO taskexec/1 {\"category\":\"\xff\"}", codeGreeting, "UTF-8"},
		{"a number where a string belongs", `HELLO taskexec/1 {"category":1}`, codeGreeting, "category"},
		{"a string where a number belongs", `WELCOME taskexec/1 {"slots":"1"}`, codeGreeting, "slots"},
		{"a fraction", `WELCOME taskexec/1 {"slots":1.5}`, codeGreeting, "slots"},
		{"an exponent", `WELCOME taskexec/1 {"slots":1e3}`, codeGreeting, "slots"},
		{"a number that overflows", `WELCOME taskexec/1 {"window":99999999999999999999}`, codeGreeting, "window"},
		{"a number beyond a double", `WELCOME taskexec/1 {"slots":9007199254740992}`, codeGreeting, "slots"},
		{"no category", "HELLO taskexec/1 {}", codeGreeting, "needs a category"},
		{"an empty category", `HELLO taskexec/1 {"category":""}`, codeGreeting, "needs a category"},
		{"a category with a control character", `HELLO taskexec/1 {"category":"a\u0000"}`, codeGreeting, "control"},
		{"a category too long", `HELLO taskexec/1 {"category":"` + long + `"}`, codeGreeting, "255"},
		{"a run with a newline", `HELLO taskexec/1 {"category":"a","run":"r\n"}`, codeGreeting, "control"},
		{"a run too long", `HELLO taskexec/1 {"category":"a","run":"` + long + `"}`, codeGreeting, "255"},
		{"a negative timeout", `HELLO taskexec/1 {"category":"a","timeout_ms":-1}`, codeGreeting, "timeout_ms"},
		{"a timeout of centuries", `HELLO taskexec/1 {"category":"a","timeout_ms":1000000000001}`, codeGreeting, "timeout_ms"},
		{"a line limit too low", `HELLO taskexec/1 {"category":"a","max_line":4095}`, codeGreeting, "max_line"},
		{"a negative line limit", `HELLO taskexec/1 {"category":"a","max_line":-1}`, codeGreeting, "max_line"},
		{"a worker's name too long", `WELCOME taskexec/1 {"worker":"` + long + `"}`, codeGreeting, "255"},
		{"an instance with an escape sequence", `WELCOME taskexec/1 {"instance":"\u001b[31m"}`, codeGreeting, "control"},
		{"a served category with a control character", `WELCOME taskexec/1 {"categories":["a","\u007f"]}`, codeGreeting, "control"},
		{"negative slots", `WELCOME taskexec/1 {"slots":-1}`, codeGreeting, "slots"},
		{"a negative window", `WELCOME taskexec/1 {"window":-1}`, codeGreeting, "window"},
		{"a worker's line limit too low", `WELCOME taskexec/1 {"max_line":1}`, codeGreeting, "max_line"},
		{"a literal of 4000 digits", `WELCOME taskexec/1 {"slots":` + strings.Repeat("1", 4000) + `}`, codeGreeting, "slots"},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			_, err := greetingOf(tt.line)
			var fault *ProtocolError
			if !errors.As(err, &fault) {
				t.Fatalf("%s: %v; want a *ProtocolError", tt.line, err)
			}
			if fault.Code != tt.code || !strings.Contains(fault.Text, tt.want) {
				t.Errorf("%s: %+v; want %s with %q", tt.line, fault, tt.code, tt.want)
			}
			harmless(t, err.Error(), 2*maxFailText)
		})
	}
}

func TestGreetingsThatDoNotFitAreRefusedByTheirSender(t *testing.T) {
	w := welcome{Slots: 1}
	for range 40 {
		w.Categories = append(w.Categories, strings.Repeat("x", 100))
	}
	if line, err := appendGreeting(nil, verbWelcome, w); err == nil || len(line) > 0 {
		t.Errorf("a greeting of %d bytes: %v; want an error and no line", len(line), err)
	}
	w.Categories = w.Categories[:30]
	line, err := appendGreeting(nil, verbWelcome, w)
	if err != nil {
		t.Fatal(err)
	}
	for over := range 2 {
		fits := w
		fits.Categories = append(slices.Clip(w.Categories), strings.Repeat("x", greetingLimit-len(line)-len(`,""`)+over))
		if full, err := appendGreeting(nil, verbWelcome, fits); (err == nil) != (over == 0) || err == nil && len(full) != greetingLimit {
			t.Errorf("%d bytes over the limit: %d bytes and %v", over, len(full), err)
		}
	}
	got, err := greetingOf(strings.TrimSuffix(string(line), "\n"))
	if err != nil {
		t.Fatal(err)
	}
	w.Window, w.MaxLine = 1, defaultMaxLine
	if diff := cmp.Diff(w, got); diff != "" {
		t.Errorf("a greeting that fits comes back changed (-sent +got):\n%s", diff)
	}
}

// harmless checks that s can be printed anywhere: on one line, without
// anything that a terminal, a log or an editor acts on.
func harmless(t testing.TB, s string, limit int) {
	t.Helper()
	if len(s) > limit {
		t.Errorf("%d bytes where at most %d may be: %.100q…", len(s), limit, s)
	}
	if !utf8.ValidString(s) {
		t.Errorf("not UTF-8: %.100q", s)
	}
	for _, r := range s {
		if unicode.IsControl(r) || unicode.Is(unicode.Zl, r) || unicode.Is(unicode.Zp, r) || unicode.Is(unicode.Cf, r) {
			t.Errorf("%U gets through in %.100q", r, s)
		}
	}
}

// nasty are texts that must not reach a terminal or a log as they are.
var nasty = []struct{ reason, text string }{
	{"a newline forges a log line", "done\nroot logged in"},
	{"a carriage return overwrites", "failed\rdone  "},
	{"ANSI colors", "\x1b[31mred\x1b[0m"},
	{"a title set by an 8-bit control", "\u009d0;title\u009c"},
	{"a raw 8-bit control", "\x9b31m"},
	{"NUL, bell, backspace, delete", "\x00\a\b\x7f"},
	{"a line separator", "a\u2028b\u2029c"},
	{"a bidirectional override", "user\u202e txt.exe"},
	{"bidirectional isolates", "\u2066a\u2069"},
	{"a byte order mark and zero width spaces", "\ufeffa\u200bb\u200d"},
	{"tags, which are invisible", "a\U000e0041"},
	{"not UTF-8", "\xff\xfe\xc3"},
	{"a surrogate in UTF-8", "\xed\xa0\x80"},
	{"only continuation bytes", strings.Repeat("\x80", 10_000)},
	{"long", strings.Repeat("x", 10_000)},
	{"long, and escaped at length", strings.Repeat("\x01", 10_000)},
	{"long, of wide characters", strings.Repeat("\U0001f600", 5_000)},
	{"quotes and backslashes", `say "hi" \n \`},
	{"quotes and controls", "\"\\\"\x01\\"},
}

func TestTextFromPeersIsHarmless(t *testing.T) {
	for _, tt := range nasty {
		t.Run(tt.reason, func(t *testing.T) {
			checkHarmless(t, tt.text)
			if m, err := parseMessage("RUN 0 1 x " + tt.text); err == nil {
				t.Errorf("parsed as %+v", m)
			} else {
				harmless(t, err.Error(), 2*maxFailText)
			}
		})
	}
	if got, want := plainText("say \"hi\"\n\\"), `say "hi"\n\\`; got != want {
		t.Errorf("plainText keeps quotes: got %s, want %s", got, want)
	}
	if got, want := plainText(`C:\dir "x"`), `C:\dir "x"`; got != want {
		t.Errorf("plainText leaves plain text alone: got %s, want %s", got, want)
	}
	json := `{"path":"` + strings.Repeat("x", 2*maxQuoted)
	for in, want := range map[string]string{json + "\n": "`" + cut(json, maxQuoted) + "`", "a": "a", "": `""`, "a b": `"a b"`, `"`: "`\"`", "\"`": "\"\\\"`\"", "\"\n": `"\"\n"`, "é": "é", "\u202e": `"\u202e"`} {
		if got := quoteUnlessPlain(in); got != want {
			t.Errorf("quoteUnlessPlain(%q) is %s, want %s", in, got, want)
		}
	}
}

// checkHarmless holds for every string.
func checkHarmless(t testing.TB, s string) {
	t.Helper()
	harmless(t, quote(s), 4*maxQuoted+2)
	harmless(t, quoteUnlessPlain(s), 4*maxQuoted+2)
	harmless(t, plainText(s), maxFailText)
	harmless(t, (&ProtocolError{Code: s, Text: s}).Error(), 2*maxFailText)
	harmless(t, (&ProtocolError{Code: s, Text: s, Remote: true}).Error(), 2*maxFailText)
	for _, n := range []int{3, 4, 10, maxQuoted} {
		short := cut(s, n)
		if len(short) > n {
			t.Errorf("cut(%.100q, %d) has %d bytes", s, n, len(short))
		}
		if utf8.ValidString(s) && !utf8.ValidString(short) {
			t.Errorf("cut(%.100q, %d) is %q, cut inside a character", s, n, short)
		}
		if kept := strings.TrimSuffix(short, "…"); len(s) > n && len(kept) < n-len("…")-utf8.UTFMax+1 {
			t.Errorf("cut(%.100q, %d) keeps %d bytes", s, n, len(kept))
		}
		if len(s) <= n && short != s {
			t.Errorf("cut(%q, %d) is %q, though nothing was too long", s, n, short)
		}
	}
}

// Error messages are cut, never refused: their lines must fit where any line
// fits, whatever is in them.
func TestErrorMessagesFitEveryLine(t *testing.T) {
	for _, text := range []string{
		strings.Repeat("x", 10_000), strings.Repeat("\n", 10_000), strings.Repeat("\\", 10_000), strings.Repeat("é\r", 5_000),
		strings.Repeat("\x80", 10_000), strings.Repeat("x", maxFailText), strings.Repeat("\n", maxFailText/2), strings.Repeat("\n", maxFailText/2+1), "",
	} {
		short := cutText(text)
		for _, m := range []message{
			{verb: verbFail, task: maxNumber, word: KindCanceled, time: math.MaxInt64, text: short},
			{verb: verbError, word: codeProtocol, text: short},
			{verb: verbCancel, text: short},
		} {
			if n := len(appendMessage(nil, m)); n > minMaxLine || n > greetingLimit {
				t.Errorf("%s of %.10q… has a line of %d bytes, over %d", m.verb, text, n, minMaxLine)
			}
		}
		if fits := len(text)+strings.Count(text, "\n")+strings.Count(text, "\\") <= maxFailText; fits && short != text {
			t.Errorf("a text of %d bytes that fits was cut to %d", len(text), len(short))
		}
		if len(text) > maxFailText && len(short) < maxFailText/2-10 {
			t.Errorf("a text of %d bytes was cut to %d", len(text), len(short))
		}
	}
}

// checkCanonical holds for every line: it is refused, or it is the only one
// for its message but for the space that may stand before an empty text.
func checkCanonical(t testing.TB, line string) {
	t.Helper()
	m, err := parseMessage(line)
	if err != nil {
		var fault *ProtocolError
		if !errors.As(err, &fault) || fault.Code != codeSyntax {
			t.Errorf("parseMessage(%q): %v; want a *ProtocolError of %s", line, err, codeSyntax)
		}
		harmless(t, err.Error(), 2*maxFailText)
		return
	}
	again := string(appendMessage(nil, m))
	want := line
	if m.text == "" && m.verb != verbHello && m.verb != verbWelcome {
		want = strings.TrimSuffix(line, " ")
	}
	if m.verb == verbHello || m.verb == verbWelcome {
		// Without an object they are refused one step later.
		again, want = strings.TrimSuffix(again, " \n"), strings.TrimSuffix(line, " ")
		again = strings.TrimSuffix(again, "\n")
	} else {
		want += "\n"
	}
	if again != want {
		t.Errorf("%q comes back as %q", line, again)
	}
}

func FuzzParseMessage(f *testing.F) {
	for _, tt := range wireMessages {
		f.Add(tt.line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		line, _, _ = strings.Cut(line, "\n") // a newline never gets here
		checkCanonical(t, line)
	})
}

func FuzzEscapes(f *testing.F) {
	for _, tt := range nasty {
		f.Add(tt.text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		line := string(appendText(nil, text))
		if strings.ContainsAny(line, "\n\r") {
			t.Errorf("%q is escaped as %q", text, line)
		}
		var read texts
		if got, ok := read.unescaped([]byte(strings.TrimPrefix(line, " "))); !ok || got != text {
			t.Errorf("%q comes back as %q, %v", text, got, ok)
		}
		if got, ok := read.unescaped([]byte(text)); ok && text != "" && !strings.Contains(text, "\n") && string(appendText(nil, got)) != " "+text {
			t.Errorf("%q and another text both mean %q", text, got)
		}
		checkHarmless(t, text)
		if n := len(appendMessage(nil, message{verb: verbError, word: codeProtocol, text: cutText(text)})); n > greetingLimit {
			t.Errorf("an ERROR of %d bytes", n)
		}
	})
}

func FuzzGreetings(f *testing.F) {
	f.Add("HELLO", `{"run":"r","category":"a","timeout_ms":15000,"max_line":4096,"features":["x"]}`)
	f.Add("WELCOME", `{"worker":"w","instance":"i","categories":["a","b"],"slots":2,"window":8,"max_line":8192,"heartbeat":true}`)
	f.Fuzz(func(t *testing.T, word, object string) {
		m := message{verb: verbHello, word: protocolVersion, text: object}
		if word == "WELCOME" {
			m.verb = verbWelcome
		}
		var got any
		var err error
		if m.verb == verbHello {
			got, err = parseHello(m)
		} else {
			got, err = parseWelcome(m)
		}
		if err != nil {
			var fault *ProtocolError
			if !errors.As(err, &fault) || fault.Code != codeGreeting {
				t.Errorf("%s %q: %v; want a *ProtocolError of %s", word, object, err, codeGreeting)
			}
			harmless(t, err.Error(), 2*maxFailText)
			return
		}
		switch g := got.(type) {
		case hello:
			if !validCategory(g.Category) || !validName(g.Run) || g.TimeoutMS < 0 || g.MaxLine < minMaxLine {
				t.Errorf("%q gives %+v", object, g)
			}
		case welcome:
			if g.Slots < 1 || g.Window < 1 || g.MaxLine < minMaxLine {
				t.Errorf("%q gives %+v", object, g)
			}
		}
		if !json.Valid([]byte(object)) || strings.ContainsAny(object, "\r") {
			t.Errorf("%q was taken", object)
		}
		// What was understood comes back from a greeting of one's own.
		line, err := appendGreeting(nil, m.verb, got)
		if err != nil {
			return // it did not fit
		}
		again, err := greetingOf(strings.TrimSuffix(string(line), "\n"))
		if err != nil {
			t.Fatalf("%q gives %+v, whose greeting is refused: %v", object, got, err)
		}
		if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", again) { // nil and empty lists are the same here
			t.Errorf("%q gives %+v, which comes back as %+v", object, got, again)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	for _, bb := range []struct{ name, line string }{
		{"RUN", "RUN 123456 1 0 instruction 1234"},
		{"DONE", "DONE 123456 1234 an output"},
		{"FAIL", "FAIL 123456 error 0 no such file"},
		{"escaped", `DONE 123456 1234 two\nlines`},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(bb.line) + 1))
			line := []byte(bb.line)
			var m message
			var read texts
			for b.Loop() {
				if err := m.parse(line, &read); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, bb := range []struct {
		name string
		m    message
	}{
		{"RUN", message{verb: verbRun, task: 123456, attempt: 1, text: "instruction 1234"}},
		{"DONE", message{verb: verbDone, task: 123456, time: 1234 * time.Microsecond, text: "an output"}},
		{"escaped", message{verb: verbDone, task: 123456, time: 1234 * time.Microsecond, text: "two\nlines"}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			var buf []byte
			for b.Loop() {
				buf = appendMessage(buf[:0], bb.m)
			}
			b.SetBytes(int64(len(buf)))
		})
	}
}

func TestEscapesAreTheSameWhereverTheyStandInALongText(t *testing.T) {
	var read texts
	for _, c := range []string{"\n", "\r", `\`, "\\\n\r"} {
		for at := range 1100 {
			text := strings.Repeat("x", at) + c + strings.Repeat("y", 1100-at)
			line := string(appendText(nil, text))
			want := " " + strings.NewReplacer("\n", `\n`, "\r", `\r`, `\`, `\\`).Replace(text)
			if line != want {
				t.Fatalf("%q at %d is written %q", c, at, line)
			}
			if got, ok := read.unescaped([]byte(line[1:])); !ok || got != text {
				t.Fatalf("%q at %d is read %q", c, at, got)
			}
		}
	}
}
