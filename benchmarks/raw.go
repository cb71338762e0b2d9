package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// Raw is the least that can be exchanged: a task is its payload's length in 4
// bytes, its number in 8, and the payload; an acknowledgement is the number, or
// for a worker that echoes the same frame again.
//
// What is measured is mostly how the frames are read. Raw reads them where they
// lie in the buffer; plain raw copies them out with io.ReadFull, as is usual.

const bufferBytes = 64 << 10

// A rawForm is how raw is done, by both sides.
type rawForm struct {
	plain bool // by io.ReadFull
	echo  bool // whole frames are acknowledgements
}

type rawConn struct {
	rawForm
	in  *bufio.Reader
	out *bufio.Writer
	buf []byte // for what is copied out
}

func (f rawForm) newConn(conn net.Conn) *rawConn {
	return &rawConn{f, bufio.NewReaderSize(conn, bufferBytes), bufio.NewWriterSize(conn, bufferBytes), make([]byte, headerBytes)}
}

func (f rawForm) newLink(conn net.Conn) link { return f.newConn(conn) }

func (c *rawConn) send(first, n int, payload string) error {
	for number := first; number < first+n; number++ {
		if err := c.writeHeader(number, len(payload)); err != nil {
			return err
		}
		if _, err := c.out.WriteString(payload); err != nil {
			return err
		}
	}
	return c.out.Flush()
}

func (c *rawConn) receive(first, n int) error {
	for want := first; want < first+n; want++ {
		var got int
		var err error
		if c.echo {
			got, _, err = c.readFrame()
		} else {
			got, err = c.readNumber()
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

func (f rawForm) serve([]string) (string, error) {
	return serveEach(func(conn net.Conn) {
		defer conn.Close()
		c := f.newConn(conn)
		for {
			number, payload, err := c.readFrame()
			if err != nil {
				return
			}
			if f.echo {
				c.writeHeader(number, len(payload))
				c.out.Write(payload)
			} else {
				c.out.Write(binary.BigEndian.AppendUint64(c.out.AvailableBuffer(), uint64(number)))
			}
			if c.in.Buffered() == 0 && c.out.Flush() != nil {
				return
			}
		}
	})
}

const headerBytes = 4 + 8

func (c *rawConn) writeHeader(number, length int) error {
	header := binary.BigEndian.AppendUint32(c.out.AvailableBuffer(), uint32(length))
	_, err := c.out.Write(binary.BigEndian.AppendUint64(header, uint64(number)))
	return err
}

// readFrame gives a payload that is valid until the next call.
func (c *rawConn) readFrame() (number int, payload []byte, err error) {
	header, err := c.take(headerBytes)
	if err != nil {
		return 0, nil, err
	}
	length := int(binary.BigEndian.Uint32(header))
	number = int(binary.BigEndian.Uint64(header[4:]))
	payload, err = c.take(length)
	return number, payload, err
}

func (c *rawConn) readNumber() (int, error) {
	number, err := c.take(8)
	if err != nil {
		return 0, err
	}
	return int(binary.BigEndian.Uint64(number)), nil
}

// take reads n bytes, which are valid until the next call.
func (c *rawConn) take(n int) ([]byte, error) {
	if !c.plain && n <= c.in.Size()/4 { // a long one is read past the buffer, which is faster still
		b, err := c.in.Peek(n)
		c.in.Discard(len(b))
		return b, err
	}
	if n > len(c.buf) {
		c.buf = make([]byte, n)
	}
	_, err := io.ReadFull(c.in, c.buf[:n])
	return c.buf[:n], err
}
