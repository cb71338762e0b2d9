package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// Raw is the least that can be exchanged: a task is its payload's length in 4
// bytes, its number in 8, and the payload; an acknowledgement is the number. A
// worker that echoes answers in the form of a task.

const bufferBytes = 64 << 10

type rawLink struct {
	in   *bufio.Reader
	out  *bufio.Writer
	echo bool
	buf  []byte // an echoed payload
}

func newRawLink(echo bool) func(net.Conn) link {
	return func(conn net.Conn) link {
		return &rawLink{in: bufio.NewReaderSize(conn, bufferBytes), out: bufio.NewWriterSize(conn, bufferBytes), echo: echo}
	}
}

func (l *rawLink) send(first, n int, payload string) error {
	for number := first; number < first+n; number++ {
		if err := writeFrameHeader(l.out, number, len(payload)); err != nil {
			return err
		}
		if _, err := l.out.WriteString(payload); err != nil {
			return err
		}
	}
	return l.out.Flush()
}

func (l *rawLink) receive(first, n int) error {
	for want := first; want < first+n; want++ {
		var got int
		var err error
		if l.echo {
			got, l.buf, err = readFrame(l.in, l.buf)
		} else {
			got, err = readNumber(l.in)
		}
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("acknowledgement of task %d where that of %d was due", got, want)
		}
	}
	return nil
}

func serveRaw(echo bool) role {
	return func([]string) (string, error) {
		return serveEach(func(conn net.Conn) {
			defer conn.Close()
			in, out := bufio.NewReaderSize(conn, bufferBytes), bufio.NewWriterSize(conn, bufferBytes)
			var payload []byte
			for {
				var number int
				var err error
				if number, payload, err = readFrame(in, payload); err != nil {
					return
				}
				if echo {
					writeFrameHeader(out, number, len(payload))
					out.Write(payload)
				} else {
					out.Write(binary.BigEndian.AppendUint64(out.AvailableBuffer(), uint64(number)))
				}
				if in.Buffered() == 0 && out.Flush() != nil {
					return
				}
			}
		})
	}
}

func writeFrameHeader(out *bufio.Writer, number, length int) error {
	header := binary.BigEndian.AppendUint32(out.AvailableBuffer(), uint32(length))
	_, err := out.Write(binary.BigEndian.AppendUint64(header, uint64(number)))
	return err
}

// readFrame reads a payload into buf, or a larger one in its place.
func readFrame(in *bufio.Reader, buf []byte) (number int, payload []byte, err error) {
	header, err := in.Peek(12)
	if err != nil {
		return 0, buf, err
	}
	length := int(binary.BigEndian.Uint32(header))
	number = int(binary.BigEndian.Uint64(header[4:]))
	in.Discard(12)
	if length > cap(buf) {
		buf = make([]byte, length)
	}
	_, err = io.ReadFull(in, buf[:length])
	return number, buf[:length], err
}

func readNumber(in *bufio.Reader) (int, error) {
	b, err := in.Peek(8)
	if err != nil {
		return 0, err
	}
	number := int(binary.BigEndian.Uint64(b))
	in.Discard(8)
	return number, nil
}
