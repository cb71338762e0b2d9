package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"strconv"
)

// Lines is the exchange of the lines that taskexec writes, by hand: nothing is
// escaped, dispatched, timed or kept.
//
//	RUN <number> 1 0 <payload>
//	DONE <number> 0 [<payload>]

// lineBufferBytes has room for the longest line that is sent.
const lineBufferBytes = 128 << 10

var errBadLine = errors.New("not a line of this exchange")

type lineLink struct {
	in  *bufio.Reader
	out *bufio.Writer
}

func newLineLink(conn net.Conn) link {
	return &lineLink{in: bufio.NewReaderSize(conn, lineBufferBytes), out: bufio.NewWriterSize(conn, bufferBytes)}
}

func (l *lineLink) send(first, n int, payload string) error {
	for number := first; number < first+n; number++ {
		line := append(l.out.AvailableBuffer(), "RUN "...)
		line = strconv.AppendInt(line, int64(number), 10)
		line = append(line, " 1 0 "...)
		if _, err := l.out.Write(line); err != nil {
			return err
		}
		l.out.WriteString(payload)
		if err := l.out.WriteByte('\n'); err != nil {
			return err
		}
	}
	return l.out.Flush()
}

func (l *lineLink) receive(first, n int) error {
	for want := first; want < first+n; want++ {
		line, err := l.in.ReadSlice('\n')
		if err != nil {
			return err
		}
		fields, ok := bytes.CutPrefix(line, []byte("DONE "))
		if !ok {
			return errBadLine
		}
		digits, _, _ := bytes.Cut(fields, []byte(" "))
		got, err := strconv.Atoi(string(digits))
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("DONE of task %d where that of %d was due", got, want)
		}
	}
	return nil
}

func serveLines(echo bool) role {
	return func([]string) (string, error) {
		return serveEach(func(conn net.Conn) {
			defer conn.Close()
			in, out := bufio.NewReaderSize(conn, lineBufferBytes), bufio.NewWriterSize(conn, bufferBytes)
			for {
				line, err := in.ReadSlice('\n')
				if err != nil {
					return
				}
				fields, _ := bytes.CutPrefix(line[:len(line)-1], []byte("RUN "))
				number, fields, _ := bytes.Cut(fields, []byte(" "))
				_, fields, _ = bytes.Cut(fields, []byte(" ")) // the attempt
				_, payload, ok := bytes.Cut(fields, []byte(" "))
				if !ok {
					return
				}
				out.WriteString("DONE ")
				out.Write(number)
				out.WriteString(" 0")
				if echo {
					out.WriteByte(' ')
					out.Write(payload)
				}
				out.WriteByte('\n')
				if in.Buffered() == 0 && out.Flush() != nil {
					return
				}
			}
		})
	}
}
