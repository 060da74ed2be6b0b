package dfdaemon

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// maxSocketPath is the longest path that a socket can have, in bytes.
const maxSocketPath = 107

// listenSocket opens the control socket for its owner alone, or with group set
// for that group too. What a killed process has left there is replaced; a socket
// that answers is not.
func listenSocket(path, group string) (net.Listener, error) {
	ln, err := openSocket(path, group)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("control socket %s: %w: choose a path this user may write with --socket, or none with --socket=", path, err)
	case err != nil:
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	return ln, nil
}

func openSocket(path, group string) (net.Listener, error) {
	mode, gid := fs.FileMode(0o600), -1
	if group != "" {
		var err error
		if gid, err = groupID(group); err != nil {
			return nil, err
		}
		mode = 0o660
	}
	temp := path + ".new" // it gets its name when it has its mode
	if len(temp) > maxSocketPath {
		return nil, fmt.Errorf("the path is longer than %d bytes", maxSocketPath-len(".new"))
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	for _, p := range []string{path, temp} {
		if err := unused(p); err != nil {
			return nil, err
		}
	}
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: temp})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false) // or it would be temp that Close removes
	err = errors.Join(os.Chmod(temp, mode), os.Lchown(temp, -1, gid))
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return nil, errors.Join(err, ln.Close(), os.Remove(temp))
	}
	return &socket{ln, path}, nil
}

// socket removes its own name when it closes.
type socket struct {
	*net.UnixListener
	path string
}

// Close ends listening.
func (s *socket) Close() error {
	err := os.Remove(s.path) // first: once closed, another process may put its own there
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, s.UnixListener.Close())
}

// unused tells whether path is free, or a socket on which nobody answers.
func unused(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return errors.New("there is a file that is no socket")
	}
	c, err := net.Dial("unix", path) //nolint:noctx // at once: it is this host's
	if err == nil {
		_ = c.Close()
		return errors.New("another process answers there: end it, or choose another with --socket")
	}
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// groupID returns the id of a group by its name or its number.
func groupID(group string) (int, error) {
	if id, err := strconv.Atoi(group); err == nil && id >= 0 {
		return id, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(g.Gid)
}
