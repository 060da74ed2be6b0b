package dfdaemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// A dfdaemon that is started while another one runs with the same data directory and
// mirror address takes its place, without a connection refused:
//
//	new  asks at the socket in the data directory
//	old  gives it the listeners, and goes on
//	new  tries all of its settings, and says that it is ready; until then its end changes nothing
//	old  takes nothing new: connections wait. It ends its session, closes the store and then the connection
//	new  opens the store and answers
//	old  brings its running answers to their end, and ends
//
// What an answer of the old one needs, and its open files do not have, it reads from
// the new one's mirror. Where either dies in between, the lock of the store says whose
// turn it is.
const (
	handoverName  = "handover.sock"
	handoverLimit = 5 * time.Second  // for what is said
	releaseLimit  = 30 * time.Second // for the store to be closed
	maxHandover   = 16 << 10         // bytes of what is said
	maxHandedOver = 16               // listeners

	// answersLimit is for running answers once another has taken the place: nobody
	// waits for their end.
	answersLimit = 10 * time.Minute

	ready = 'r' // what the new one says before it takes over
)

// claim is what the new one says: where it is to listen, by setting.
type claim struct {
	Listen map[string]string `json:"listen"`
}

// bequest is the answer: the settings whose listeners come along, in their order.
type bequest struct {
	Refused   string   `json:"refused,omitempty"`
	Listeners []string `json:"listeners,omitempty"`
}

// claimed are the addresses of the listeners that can be handed over.
func (c Config) claimed() map[string]string {
	all := map[string]string{
		mirrorListen: c.MirrorListen, peerListen: c.PeerListen, metricsListen: c.MetricsListen, proxyListen: c.Proxy.Listen,
	}
	if c.Socket != "" {
		all[socketListen] = c.Socket
	}
	return all
}

// claim asks the one that runs in this one's place for its listeners. It goes on until
// takeOver; where there is none, or it does not give way, nothing is inherited.
func (d *Daemon) claim(cfg Config) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: filepath.Join(cfg.DataDir, handoverName)})
	if err != nil {
		return
	}
	listeners, err := askFor(conn, cfg.claimed())
	if err != nil {
		d.log.Warn("the dfdaemon that runs here does not give way", zap.Error(err))
		_ = conn.Close()
		return
	}
	d.before, d.inherited = conn, listeners
}

// takeOver has the one that runs in this one's place, if one does, close the store.
func (d *Daemon) takeOver() {
	if d.before == nil {
		return
	}
	_ = d.before.SetDeadline(time.Now().Add(releaseLimit))
	if _, err := d.before.Write([]byte{ready}); err == nil {
		_, _ = d.before.Read(make([]byte, 1)) // its end; where it does not come, the store's lock says so
	}
	_ = d.before.Close()
	d.before = nil
	d.log.Info("took over from another dfdaemon")
}

func askFor(conn *net.UnixConn, listen map[string]string) (map[string]net.Listener, error) {
	_ = conn.SetDeadline(time.Now().Add(handoverLimit))
	said, err := json.Marshal(claim{listen}) // and nothing after it, before ready
	if err != nil {
		return nil, err
	}
	if _, err = conn.Write(said); err != nil {
		return nil, err
	}
	text, rights := make([]byte, maxHandover), make([]byte, unix.CmsgSpace(4*maxHandedOver))
	n, r, _, _, err := conn.ReadMsgUnix(text, rights)
	if err != nil {
		return nil, err
	}
	files, err := filesOf(rights[:r])
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	var b bequest
	if err := json.Unmarshal(text[:n], &b); err != nil {
		return nil, err
	}
	if b.Refused != "" {
		return nil, errors.New(b.Refused)
	}
	if len(b.Listeners) != len(files) {
		return nil, fmt.Errorf("it names %d listeners and gives %d", len(b.Listeners), len(files))
	}
	listeners := make(map[string]net.Listener, len(files))
	for i, f := range files {
		if listeners[b.Listeners[i]], err = net.FileListener(f); err != nil {
			closeAll(listeners)
			return nil, err
		}
	}
	return listeners, nil
}

// filesOf returns the files whose descriptors came along.
func filesOf(rights []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "listener")) //nolint:gosec // a descriptor
		}
	}
	return files, nil
}

func closeAll(listeners map[string]net.Listener) {
	for _, ln := range listeners {
		if ln != nil {
			_ = ln.Close()
		}
	}
}

// listenHandover opens the socket at which another one can take this one's place; the
// data directory is this one's alone, so what is there is left over.
func (d *Daemon) listenHandover(cfg Config) {
	path := filepath.Join(cfg.DataDir, handoverName)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Warn("no other dfdaemon can take over", zap.Error(err))
		return
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err == nil {
		if err = os.Chmod(path, 0o600); err != nil {
			_ = ln.Close()
		}
	}
	if err != nil {
		d.log.Warn("no other dfdaemon can take over", zap.Error(err))
		return
	}
	d.handover, d.claimed = ln, cfg.claimed()
}

// handOver waits for another one to take this one's place. Then it closes handed, and
// calls release, which closes the store. It returns when the socket is closed.
func (d *Daemon) handOver(handed chan<- struct{}, release func() error) {
	for {
		conn, err := d.handover.AcceptUnix()
		if err != nil {
			return
		}
		if err = d.giveListeners(conn); err == nil {
			err = awaitReady(conn)
		}
		if err == nil {
			d.log.Info("another dfdaemon takes over")
			if d.socket != nil {
				d.socket.kept.Store(true)
			}
			mirror := d.MirrorAddr()
			d.heir.mirror.Store(&mirror)
			close(handed)
			_ = release()          // Run returns what it does, too
			_ = d.handover.Close() // before the other one makes its own
			_ = conn.Close()
			return
		}
		d.log.Warn("another dfdaemon cannot take over", zap.Error(err))
		_ = conn.Close()
	}
}

// giveListeners answers a claim.
func (d *Daemon) giveListeners(conn *net.UnixConn) error {
	_ = conn.SetDeadline(time.Now().Add(handoverLimit))
	if id, ok := peerUser(conn); !ok || id != 0 && int(id) != os.Geteuid() {
		return errors.New("it is another user's")
	}
	var c claim
	if err := json.NewDecoder(io.LimitReader(conn, maxHandover)).Decode(&c); err != nil {
		return err
	}
	if c.Listen[mirrorListen] != d.claimed[mirrorListen] {
		b, _ := json.Marshal(bequest{Refused: "it has another --" + mirrorListen}) // strings always marshal
		_, err := conn.Write(b)
		return errors.Join(errors.New("it has another --"+mirrorListen), err)
	}
	var b bequest
	var fds []int
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for _, s := range d.servers {
		if s.setting == "" || c.Listen[s.setting] != d.claimed[s.setting] {
			continue
		}
		if fd, err := duplicate(s.ln); err == nil { // else it is closed: this one is about to end
			b.Listeners, fds = append(b.Listeners, s.setting), append(fds, fd)
		}
	}
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	_, _, err = conn.WriteMsgUnix(text, unix.UnixRights(fds...), nil)
	return err
}

// awaitReady waits until the one that has the listeners is ready to take over.
func awaitReady(conn *net.UnixConn) error {
	_ = conn.SetDeadline(time.Now().Add(handoverLimit))
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("it was not ready: its own log says why: %w", err)
	}
	return nil
}

// duplicate returns one more descriptor of a listener.
func duplicate(ln net.Listener) (fd int, err error) {
	of, ok := ln.(syscall.Conn)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	raw, err := of.SyscallConn()
	if err != nil {
		return 0, err
	}
	failed := raw.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(failed, err)
}
