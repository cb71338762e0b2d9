package main

import (
	"errors"
	"net"
	"net/rpc"
)

// Of net/rpc, asynchronous calls in its own encoding, gob.

// RPCTask is exported because net/rpc wants it so.
type RPCTask struct {
	Number  int
	Payload string
}

type rpcWorker struct{}

// Execute is the method that is called.
func (rpcWorker) Execute(task RPCTask, done *int) error {
	*done = task.Number
	return nil
}

func serveRPC([]string) (string, error) {
	s := rpc.NewServer()
	if err := s.RegisterName("Worker", rpcWorker{}); err != nil {
		return "", err
	}
	return serveEach(func(conn net.Conn) { s.ServeConn(conn) })
}

// rpcInFlight is how many calls a worker has; more makes none faster.
const rpcInFlight = 1024

type rpcLink struct {
	client *rpc.Client
	room   chan struct{} // a token for each call in flight
	done   chan *rpc.Call
}

func newRPCLink(conn net.Conn) link {
	return &rpcLink{rpc.NewClient(conn), make(chan struct{}, rpcInFlight), make(chan *rpc.Call, rpcInFlight)}
}

func (l *rpcLink) send(first, n int, payload string) error {
	for number := first; number < first+n; number++ {
		l.room <- struct{}{}
		l.client.Go("Worker.Execute", RPCTask{number, payload}, new(int), l.done)
	}
	return nil
}

func (l *rpcLink) receive(first, n int) error {
	var failure error
	missing := 0 // the sum of the numbers to come, which come in any order
	for number := first; number < first+n; number++ {
		missing += number
	}
	for range n {
		call := <-l.done
		<-l.room
		if call.Error != nil {
			failure = call.Error // the others are still received, so that send ends
		}
		missing -= *call.Reply.(*int)
	}
	if failure == nil && missing != 0 {
		failure = errors.New("a reply has the number of another task")
	}
	return failure
}
