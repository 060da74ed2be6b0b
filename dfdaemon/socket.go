package dfdaemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"damselfly.dev/supernode/api"
)

// maxSocketPath is the longest path that a socket can have, in bytes.
const maxSocketPath = 107

// listenSocket opens the control socket for its owner alone, with group set for
// that group too, or for all, of whom forUsers chooses. What a killed process has left there is replaced; a socket
// that answers is not.
func listenSocket(path, group string, all bool) (*socket, error) {
	ln, err := openSocket(path, group, all)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("control socket %s: %w: choose a path this user may write with --socket, or none with --socket=", path, err)
	case err != nil:
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	return ln, nil
}

func openSocket(path, group string, all bool) (*socket, error) {
	mode, gid, err := socketMode(group, all)
	if err != nil {
		return nil, err
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
	if err = permit(temp, mode, gid); err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return nil, errors.Join(err, ln.Close(), os.Remove(temp))
	}
	return &socket{UnixListener: ln, path: path}, nil
}

// socketMode returns who may connect: a mode, and a group or -1.
func socketMode(group string, all bool) (mode fs.FileMode, gid int, err error) {
	mode, gid = 0o600, -1
	if group != "" {
		if gid, err = groupID(group); err != nil {
			return 0, 0, err
		}
		mode = 0o660
	}
	if all {
		mode = 0o666
	}
	return mode, gid, nil
}

func permit(path string, mode fs.FileMode, gid int) error {
	return errors.Join(os.Chmod(path, mode), os.Lchown(path, -1, gid))
}

// socket removes its own name when it closes, unless that is another's by now.
type socket struct {
	*net.UnixListener
	path string
	kept atomic.Bool
	once sync.Once
}

// Close ends listening.
func (s *socket) Close() (err error) {
	s.once.Do(func() {
		if !s.kept.Load() {
			err = os.Remove(s.path) // first: once closed, another process may put its own there
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		err = errors.Join(err, s.UnixListener.Close())
	})
	return err
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

// userIDs returns the ids of users by their names or numbers.
func userIDs(users []string) ([]uint32, error) {
	var ids []uint32
	for _, name := range users {
		text := name
		if u, err := user.Lookup(name); err == nil {
			text = u.Uid
		}
		id, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("socket-users %q: there is no such user", name)
		}
		ids = append(ids, uint32(id))
	}
	return ids, nil
}

// peerKey is of the user at the other end of a connection, in its context.
type peerKey struct{}

// withUser notes who is at the other end, as the kernel says.
func withUser(ctx context.Context, c net.Conn) context.Context {
	if id, ok := peerUser(c); ok {
		return context.WithValue(ctx, peerKey{}, id)
	}
	return ctx
}

// forUsers has h answer root, the agent's own user and users; with group whoever the
// socket's mode has let in.
func forUsers(users []uint32, group bool, h http.Handler) http.Handler {
	users = append([]uint32{0, uint32(os.Geteuid())}, users...)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, known := r.Context().Value(peerKey{}).(uint32)
		if !group && (!known || !slices.Contains(users, id)) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set(api.ErrorHeader, api.CodeForbidden)
			w.WriteHeader(http.StatusForbidden)
			_ = json.NewEncoder(w).Encode(api.Error{ // to who may be gone
				Code: api.CodeForbidden, Message: "the control socket is for root and dfdaemon's own user: start dfdaemon with --socket-users or --socket-group",
			})
			return
		}
		h.ServeHTTP(w, r)
	})
}
