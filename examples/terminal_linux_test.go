package examples_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

// openTerminal returns both ends of a new pseudo-terminal.
func openTerminal(t *testing.T) (screen, terminal *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no pseudo-terminals: ", err)
	}
	t.Cleanup(func() { screen.Close() })
	var unlocked, number int32
	for _, request := range []struct {
		code uintptr
		arg  *int32
	}{{syscall.TIOCSPTLCK, &unlocked}, {syscall.TIOCGPTN, &number}} {
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, screen.Fd(), request.code, uintptr(unsafe.Pointer(request.arg))); errno != 0 {
			t.Skip("no pseudo-terminals: ", errno)
		}
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no pseudo-terminals: ", err)
	}
	t.Cleanup(func() { terminal.Close() })
	return screen, terminal
}

func TestProgressIsShownOnATerminalAndWipedInTheEnd(t *testing.T) {
	w := startWorker(t, build(t, "worker"), "-delay", "700ms")
	for _, test := range []struct {
		args   []string
		want   string
		reason string
	}{
		{[]string{"-json", "-keep-workers"}, "", "stdout is elsewhere, so nothing else wipes the line"},
		{nil, `[Coordinator] Starting task distribution
[Coordinator] Sent to a: a1 a2
[Coordinator] a says: a1 a2 completed
[Coordinator] a shutdown: Goodbye from a
`, "other output takes the line's place"},
	} {
		screen, terminal := openTerminal(t)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		cmd := exec.CommandContext(ctx, build(t, "coordinator"), append(test.args, "-input", "-", "-a", w.addr)...)
		cmd.Stdin, cmd.Stderr = strings.NewReader("a1 a2"), terminal
		if test.args == nil {
			cmd.Stdout = terminal
		}
		var shown output
		read := make(chan struct{})
		go func() {
			defer close(read)
			io.Copy(&shown, screen) // until the terminal is closed
		}()
		if err := cmd.Run(); err != nil {
			t.Error(err)
		}
		terminal.Close()
		<-read
		text := shown.String()
		if !strings.Contains(text, "0s: 0 of 2 done; now a 0/2") || !strings.Contains(text, "1 of 2 done; now a 1/2") {
			t.Errorf("%q: no progress in %q", test.args, text)
		}
		if diff := cmp.Diff(test.want, display(text)); diff != "" {
			t.Errorf("%q (%s): in the end the terminal shows (-want +got):\n%s", test.args, test.reason, diff)
		}
	}
}

// display is what a terminal shows that was sent text, as far as text has no
// more than line ends and carriage returns to it.
func display(text string) string {
	var lines []string
	for line := range strings.Lines(strings.ReplaceAll(text, "\r\n", "\n")) {
		shown := []rune{}
		column := 0
		for _, r := range strings.TrimSuffix(line, "\n") {
			if r == '\r' {
				column = 0
				continue
			}
			if column == len(shown) {
				shown = append(shown, ' ')
			}
			shown[column] = r
			column++
		}
		if strings.HasSuffix(line, "\n") {
			shown = append([]rune(strings.TrimRight(string(shown), " ")), '\n')
		}
		lines = append(lines, string(shown))
	}
	return strings.TrimRight(strings.Join(lines, ""), " ")
}
