package dfdaemon

import (
	"bufio"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxTunnels = 1024 // passed on as they are at once
	// lingerTime is how long an end may say nothing when the other has ended: it
	// may have gone for good.
	lingerTime = 5 * time.Minute
)

// tunnels are connections that are passed on as they are.
type tunnels struct {
	linger time.Duration

	mu     sync.Mutex // guards what follows
	conns  map[net.Conn]struct{}
	closed bool
}

// join passes bytes both ways until both ends have ended, or close is called.
func (t *tunnels) join(a, b net.Conn) {
	if !t.track(a, b) {
		return
	}
	defer t.untrack(a, b)
	var half atomic.Bool
	var wg sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, err := io.Copy(way[1], lingering{way[0], &half, t.linger})
			if out, ok := way[1].(interface{ CloseWrite() error }); ok && err == nil && out.CloseWrite() == nil {
				half.Store(true)
				_ = way[1].SetReadDeadline(time.Now().Add(t.linger)) // of the Read that waits
				return
			}
			_, _ = a.Close(), b.Close()
		})
	}
	wg.Wait()
}

// lingering is a connection of which a Read waits for at most linger once the
// other way has ended.
type lingering struct {
	net.Conn
	half   *atomic.Bool
	linger time.Duration
}

// Read implements io.Reader.
func (l lingering) Read(p []byte) (int, error) {
	if l.half.Load() {
		_ = l.SetReadDeadline(time.Now().Add(l.linger))
	}
	return l.Conn.Read(p)
}

// full tells whether there are as many as there may be.
func (t *tunnels) full() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.conns) >= 2*maxTunnels
}

// track notes connections that close is to close, and closes them where it was
// called or there are too many.
func (t *tunnels) track(conns ...net.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || len(t.conns) >= 2*maxTunnels {
		for _, c := range conns {
			_ = c.Close()
		}
		return false
	}
	for _, c := range conns {
		t.conns[c] = struct{}{}
	}
	return true
}

func (t *tunnels) untrack(conns ...net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range conns {
		delete(t.conns, c)
		_ = c.Close()
	}
}

// close ends all tunnels, and those to come.
func (t *tunnels) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	for c := range t.conns {
		_ = c.Close()
	}
}

// buffered is a connection of which something has been read.
type buffered struct {
	net.Conn
	r *bufio.Reader
}

// Read implements net.Conn.
func (b *buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

// CloseWrite says that no more comes.
func (b *buffered) CloseWrite() error {
	if half, ok := b.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return b.Close()
}

// openedConn is a connection to authority that the proxy reads in its place.
type openedConn struct {
	net.Conn
	authority string
}

// opened is the listener whose connections are opened ones.
type opened struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newOpened() *opened {
	return &opened{conns: make(chan net.Conn), done: make(chan struct{})}
}

// add has c served.
func (o *opened) add(c net.Conn) {
	select {
	case o.conns <- c:
	case <-o.done:
		_ = c.Close()
	}
}

// Accept implements net.Listener.
func (o *opened) Accept() (net.Conn, error) {
	select {
	case c := <-o.conns:
		return c, nil
	case <-o.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (o *opened) Close() error {
	o.once.Do(func() { close(o.done) })
	return nil
}

// Addr implements net.Listener.
func (o *opened) Addr() net.Addr { return &net.UnixAddr{Name: "opened", Net: "proxy"} }
