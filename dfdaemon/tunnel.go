package dfdaemon

import (
	"bufio"
	"io"
	"net"
	"sync"
)

// maxTunnels bounds what is passed on as it is at once.
const maxTunnels = 1024

// tunnels are connections that are passed on as they are.
type tunnels struct {
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
	var wg sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, err := io.Copy(way[1], way[0])
			if half, ok := way[1].(interface{ CloseWrite() error }); ok && err == nil && half.CloseWrite() == nil {
				return
			}
			_, _ = a.Close(), b.Close()
		})
	}
	wg.Wait()
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
