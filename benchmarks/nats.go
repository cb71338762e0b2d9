package main

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// Of NATS, core requests and replies, by way of a server in a process of its
// own. Each worker is subscribed to a subject; all requests of a link name one
// inbox for their replies, so that none has a subscription to itself.

func serveNATS([]string) (string, error) {
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true})
	if err != nil {
		return "", err
	}
	s.Start()
	if !s.ReadyForConnections(10 * time.Second) {
		return "", fmt.Errorf("the NATS server is not ready after 10 s")
	}
	return s.Addr().String(), nil
}

// serveNATSWorker is a worker of the server at args[0], for a subject of its
// own, which is the address that it gives.
func serveNATSWorker(args []string) (string, error) {
	conn, err := nats.Connect("nats://" + args[0])
	if err != nil {
		return "", err
	}
	subject := nats.NewInbox()
	sub, err := conn.Subscribe(subject, func(m *nats.Msg) {
		m.Respond(m.Data[:8]) // the number
	})
	if err != nil {
		return "", err
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return "", err
	}
	return subject, conn.Flush()
}

// natsLinks starts the server and its workers.
func natsLinks(ps processes) ([]link, error) {
	if err := ps.start("NATS server"); err != nil {
		return nil, err
	}
	server := ps["NATS server"][0].addr
	subjects, err := ps.of("NATS worker", server)
	if err != nil {
		return nil, err
	}
	return linkAll(subjects, func(subject string) (link, error) { return newNATSLink(server, subject) })
}

const (
	natsInFlight = 8192 // requests that a worker has; the server drops a client that leaves it with too many
	natsBatch    = 256  // requests for which room is made at a time
)

type natsLink struct {
	conn           *nats.Conn
	subject, inbox string
	replies        chan *nats.Msg
	room           chan struct{} // a token for each batch in flight
}

func newNATSLink(server, subject string) (link, error) {
	conn, err := nats.Connect("nats://" + server)
	if err != nil {
		return nil, err
	}
	l := &natsLink{conn: conn, subject: subject, inbox: nats.NewInbox(),
		replies: make(chan *nats.Msg, 2*natsInFlight), room: make(chan struct{}, natsInFlight/natsBatch)}
	if _, err := conn.ChanSubscribe(l.inbox, l.replies); err != nil {
		return nil, err
	}
	return l, conn.Flush()
}

func (l *natsLink) send(first, n int, payload string) error {
	task := make([]byte, 8, 8+len(payload))
	task = append(task, payload...)
	for i := range n {
		if i%natsBatch == 0 {
			l.room <- struct{}{}
		}
		binary.BigEndian.PutUint64(task, uint64(first+i))
		if err := l.conn.PublishRequest(l.subject, l.inbox, task); err != nil {
			return err
		}
	}
	return nil // the connection has a goroutine that writes
}

func (l *natsLink) receive(first, n int) error {
	for i := range n {
		m, ok := <-l.replies
		if !ok {
			return nats.ErrConnectionClosed
		}
		if got := int(binary.BigEndian.Uint64(m.Data)); got != first+i {
			return fmt.Errorf("reply of task %d where that of %d was due", got, first+i)
		}
		if i%natsBatch == natsBatch-1 || i == n-1 {
			<-l.room
		}
	}
	return nil
}
