package main

import (
	"net"

	"golang.org/x/sync/errgroup"
)

// A link is how a yardstick reaches one of its worker processes. A task is a
// number and a payload; it is acknowledged with its number, and by workers
// that echo with its payload too.
type link interface {
	// send sends n tasks, numbered from first. It may wait until some of them
	// have been received.
	send(first, n int, payload string) error

	// receive receives the acknowledgements of the same tasks. It is called
	// beside send, or after it.
	receive(first, n int) error
}

// flood has n tasks executed by all workers at once, with as many in flight as
// the yardstick is best with.
func flood(links []link, n int, payload string) error {
	var g errgroup.Group
	for i, l := range links {
		share := n / len(links)
		if i < n%len(links) {
			share++
		}
		g.Go(func() error { return l.send(0, share, payload) })
		g.Go(func() error { return l.receive(0, share) })
	}
	return g.Wait()
}

// oneByOne has n tasks executed by the workers in turn, each sent when the one
// before it is acknowledged.
func oneByOne(links []link, n int, payload string) error {
	for i := range n {
		l := links[i%len(links)]
		if err := l.send(i, 1, payload); err != nil {
			return err
		}
		if err := l.receive(i, 1); err != nil {
			return err
		}
	}
	return nil
}

// linkAll makes a link to each address.
func linkAll(addrs []string, newLink func(addr string) (link, error)) ([]link, error) {
	var links []link
	for _, addr := range addrs {
		l, err := newLink(addr)
		if err != nil {
			return nil, err
		}
		links = append(links, l)
	}
	return links, nil
}

// overConn makes links of connections.
func overConn(newLink func(net.Conn) link) func(addr string) (link, error) {
	return func(addr string) (link, error) {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return nil, err
		}
		return newLink(conn), nil
	}
}

// serveEach serves each connection with serve, in a goroutine of its own, until
// the process ends.
func serveEach(serve func(net.Conn)) (addr string, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(conn)
		}
	}()
	return ln.Addr().String(), nil
}
