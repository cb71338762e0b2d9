package taskexec

import (
	"net"
	"testing"
)

type addrConn struct {
	net.Conn
	local, remote net.Addr
}

func (c addrConn) LocalAddr() net.Addr  { return c.local }
func (c addrConn) RemoteAddr() net.Addr { return c.remote }

func TestLocalIsWhatCannotLeaveTheMachine(t *testing.T) {
	tcp := func(s string) net.Addr {
		a, err := net.ResolveTCPAddr("tcp", s)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for _, test := range []struct {
		reason        string
		local, remote net.Addr
		want          bool
	}{
		{"both ends on loopback", tcp("127.0.0.1:1"), tcp("127.0.0.2:2"), true},
		{"IPv6 loopback", tcp("[::1]:1"), tcp("[::1]:2"), true},
		{"loopback as IPv6 writes IPv4", tcp("[::ffff:127.0.0.1]:1"), tcp("[::ffff:127.0.0.1]:2"), true},
		{"the other end elsewhere", tcp("127.0.0.1:1"), tcp("192.0.2.1:2"), false},
		{"this end elsewhere", tcp("192.0.2.1:1"), tcp("127.0.0.1:2"), false},
		{"link-local with a zone", tcp("[fe80::1%1]:1"), tcp("[fe80::2%1]:2"), false},
		{"unspecified", tcp("0.0.0.0:1"), tcp("0.0.0.0:2"), false},
		{"unix", &net.UnixAddr{Net: "unix", Name: "/x"}, &net.UnixAddr{Net: "unix"}, true},
		{"in memory", memAddr("a"), memAddr("b"), true},
		{"no addresses at all", nil, nil, true},
	} {
		if got := isLocal(addrConn{local: test.local, remote: test.remote}); got != test.want {
			t.Errorf("%s: isLocal is %v for %v and %v", test.reason, got, test.local, test.remote)
		}
	}
}
