package taskexec

import (
	"net"
	"strings"
)

// isLocal reports whether conn cannot leave this machine: it is a unix socket,
// TCP with both ends on loopback, or no TCP at all, such as a net.Pipe.
func isLocal(conn net.Conn) bool {
	return isLocalAddr(conn.LocalAddr()) && isLocalAddr(conn.RemoteAddr())
}

func isLocalAddr(addr net.Addr) bool {
	if addr == nil || !strings.HasPrefix(addr.Network(), "tcp") {
		return true
	}
	host, _, err := net.SplitHostPort(addr.String())
	return err == nil && net.ParseIP(host).IsLoopback()
}
