package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
)

// Of grpc-go, a bidirectional stream to each worker. Its messages are bytes
// that no schema encodes, and its windows and buffers are wider than by default:
// both are in its favor.

const (
	grpcWindowBytes = 4 << 20
	grpcBufferBytes = 256 << 10
)

// bytesCodec passes *[]byte through.
type bytesCodec struct{}

func (bytesCodec) Name() string { return "bytes" }

func (bytesCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (bytesCodec) Unmarshal(data mem.BufferSlice, v any) error {
	message := v.(*[]byte)
	if cap(*message) < data.Len() {
		*message = make([]byte, data.Len())
	}
	*message = (*message)[:data.Len()]
	data.CopyTo(*message)
	return nil
}

var _ encoding.CodecV2 = bytesCodec{}

const executeMethod = "/benchmarks.Tasks/Execute"

var tasksService = grpc.ServiceDesc{
	ServiceName: "benchmarks.Tasks",
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName:    "Execute",
		ServerStreams: true,
		ClientStreams: true,
		Handler: func(_ any, stream grpc.ServerStream) error {
			for {
				var task []byte
				if err := stream.RecvMsg(&task); err == io.EOF {
					return nil
				} else if err != nil {
					return err
				}
				done := task[:8] // the number
				if err := stream.SendMsg(&done); err != nil {
					return err
				}
			}
		},
	}},
}

func serveGRPC([]string) (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	s := grpc.NewServer(
		grpc.ForceServerCodecV2(bytesCodec{}),
		grpc.InitialWindowSize(grpcWindowBytes), grpc.InitialConnWindowSize(grpcWindowBytes),
		grpc.WriteBufferSize(grpcBufferBytes), grpc.ReadBufferSize(grpcBufferBytes))
	s.RegisterService(&tasksService, nil)
	go s.Serve(ln)
	return ln.Addr().String(), nil
}

type grpcLink struct{ stream grpc.ClientStream }

func newGRPCLink(addr string) (link, error) {
	conn, err := grpc.NewClient(addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(bytesCodec{})),
		grpc.WithInitialWindowSize(grpcWindowBytes), grpc.WithInitialConnWindowSize(grpcWindowBytes),
		grpc.WithWriteBufferSize(grpcBufferBytes), grpc.WithReadBufferSize(grpcBufferBytes))
	if err != nil {
		return nil, err
	}
	stream, err := conn.NewStream(context.Background(), &tasksService.Streams[0], executeMethod)
	if err != nil {
		return nil, err
	}
	return grpcLink{stream}, nil
}

func (l grpcLink) send(first, n int, payload string) error {
	for number := first; number < first+n; number++ {
		// A message of its own each, since grpc may hold on to it.
		task := append(binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(payload)), uint64(number)), payload...)
		if err := l.stream.SendMsg(&task); err != nil {
			return err
		}
	}
	return nil
}

func (l grpcLink) receive(first, n int) error {
	var done []byte
	for want := first; want < first+n; want++ {
		if err := l.stream.RecvMsg(&done); err != nil {
			return err
		}
		if got := int(binary.BigEndian.Uint64(done)); got != want {
			return fmt.Errorf("acknowledgement of task %d where that of %d was due", got, want)
		}
	}
	return nil
}
