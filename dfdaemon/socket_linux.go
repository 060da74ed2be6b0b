package dfdaemon

import (
	"net"

	"golang.org/x/sys/unix"
)

// peerUser returns the user at the other end of a socket.
func peerUser(c net.Conn) (id uint32, ok bool) {
	s, is := c.(*net.UnixConn)
	if !is {
		return 0, false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return 0, false
	}
	err = raw.Control(func(fd uintptr) {
		if who, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			id, ok = who.Uid, true
		}
	})
	return id, ok && err == nil
}
