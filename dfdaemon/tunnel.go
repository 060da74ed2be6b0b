package dfdaemon

import (
	"bufio"
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxTunnels = 1024 // at once
	// lingerTime is how long an end may say nothing when the other has ended: it
	// may have gone for good.
	lingerTime = 5 * time.Minute
)

// tunnels are the connections that outlive their request, as far as there are
// places: passed on as they are, intercepted, or upgraded.
type tunnels struct {
	linger time.Duration
	places chan struct{}   // one taken by each
	ctx    context.Context // ends when close waits no longer
	cancel context.CancelFunc
}

func newTunnels() *tunnels {
	t := &tunnels{linger: lingerTime, places: make(chan struct{}, maxTunnels)}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// enter takes a place until leave is called; false where none is left. Its ctx
// ends with leave, with parent and with close, which waits for leave.
func (t *tunnels) enter(parent context.Context) (ctx context.Context, leave func(), ok bool) {
	select {
	case t.places <- struct{}{}:
	default:
		return nil, nil, false
	}
	ctx, cancel := context.WithCancel(parent)
	stop := context.AfterFunc(t.ctx, cancel)
	return ctx, sync.OnceFunc(func() { stop(); cancel(); <-t.places }), true
}

// close waits for all that have a place, ends them when ctx ends, and lets nobody in
// again.
func (t *tunnels) close(ctx context.Context) {
	defer context.AfterFunc(ctx, t.cancel)()
	for range cap(t.places) {
		t.places <- struct{}{}
	}
	t.cancel()
}

// join passes bytes both ways until both ends have ended, or ctx, and closes them.
func (t *tunnels) join(ctx context.Context, a, b net.Conn) {
	end := func() { _, _ = a.Close(), b.Close() }
	stop := context.AfterFunc(ctx, end)
	defer end()
	defer stop()
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
			end()
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

// interceptedConn is a connection to authority that the proxy reads in its place.
type interceptedConn struct {
	net.Conn
	authority string
	leave     func() // gives its place back
}

// Close implements net.Conn.
func (c *interceptedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// intercepted is the listener whose connections are intercepted ones.
type intercepted struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newIntercepted() *intercepted {
	return &intercepted{conns: make(chan net.Conn), done: make(chan struct{})}
}

// add has c served.
func (l *intercepted) add(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		_ = c.Close()
	}
}

// Accept implements net.Listener.
func (l *intercepted) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *intercepted) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *intercepted) Addr() net.Addr { return &net.UnixAddr{Name: "intercepted", Net: "proxy"} }
