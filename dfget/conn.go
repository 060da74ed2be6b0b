package dfget

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"damselfly.dev/address"
	"damselfly.dev/pieces"
)

const (
	headerBuffer = 4 << 10                // bytes; heads are read into as much
	maxWait      = 128 << 10              // bytes to wait for at most; pieces are read in such steps
	oftenEnough  = 100 * time.Millisecond // a reader that is woken less often than this waits for less

	maxIdle     = 512 // connections that wait to be used again
	idleTimeout = time.Minute
)

var errHead = errors.New("the head of its answer is too long")

// A transport makes the requests of transfers, each by the goroutine that calls
// it: those of http.Transport go from one goroutine to another and back, and
// waking those costs more than the request. It follows no proxy.
type transport struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)
	each int // connections to one parent that wait to be used again
	// tls returns the configuration for a parent over TLS; nil trusts whom the
	// system does.
	tls func() (*tls.Config, error)

	mu     sync.Mutex // guards what follows
	idle   []*link    // the last used one last
	closed bool       // nothing is idle any more
}

func newTransport(each int) *transport {
	return &transport{each: each, dial: newDialer().DialContext}
}

// nearKey is, in the context of a dial to a parent, whether that may be on this machine.
type nearKey struct{}

// newDialer returns what connects a transport. What a parent's name stands for is judged
// when it is connected to: no host is to be sent to what only it may ask.
func newDialer() *net.Dialer {
	return &net.Dialer{Timeout: dialTimeout, ControlContext: func(ctx context.Context, _, at string, _ syscall.RawConn) error {
		near, parent := ctx.Value(nearKey{}).(bool)
		if !parent {
			return nil
		}
		a, err := netip.ParseAddrPort(at)
		if err == nil && !address.IsAHost(a.Addr(), near) {
			err = fmt.Errorf("%s is no other host's address: which host advertises it?", a.Addr())
		}
		return err
	}}
}

// RoundTrip implements http.RoundTripper for requests without a body. Until the
// answer's body is closed, the end of the request's context breaks the connection.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	for {
		l, err := t.take(req)
		if err != nil {
			return nil, err
		}
		resp, err := l.roundTrip(req)
		if err == nil || !l.stale || req.Context().Err() != nil {
			return resp, err
		}
	}
}

// CloseIdleConnections closes what is not in use, and what is as soon as it no
// longer is.
func (t *transport) CloseIdleConnections() {
	t.mu.Lock()
	idle := t.idle
	t.idle, t.closed = nil, true
	t.mu.Unlock()
	for _, l := range idle {
		l.timer.Stop()
		_ = l.Close()
	}
}

// take returns a connection to where the request goes.
func (t *transport) take(req *http.Request) (*link, error) {
	parent := req.URL.Scheme + "://" + req.URL.Host
	t.mu.Lock()
	for i, l := range slices.Backward(t.idle) {
		if l.parent == parent {
			t.idle = slices.Delete(t.idle, i, i+1)
			t.mu.Unlock()
			l.timer.Stop()
			l.stale = true
			return l, nil
		}
	}
	t.mu.Unlock()
	conn, err := t.connect(req)
	if err != nil {
		return nil, err
	}
	l := &link{Conn: conn, transport: t, parent: parent}
	l.r, l.w = bufio.NewReaderSize(l, headerBuffer), bufio.NewWriterSize(conn, headerBuffer)
	return l, nil
}

func (t *transport) connect(req *http.Request) (net.Conn, error) {
	at, port := req.URL.Host, "80"
	if req.URL.Scheme == "https" {
		port = "443"
	}
	if req.URL.Port() == "" {
		at = net.JoinHostPort(req.URL.Hostname(), port)
	}
	conn, err := t.dial(req.Context(), "tcp", at)
	if err != nil {
		return nil, err
	}
	if req.URL.Scheme == "https" {
		return t.secure(req, conn)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		return &receiver{TCPConn: tcp, wait: pieces.MinPieceSize / 8, low: 1}, nil
	}
	return conn, nil
}

// secure is conn with TLS on it. Its reads are of records, whose ends may come
// late: no read waits for more than there is.
func (t *transport) secure(req *http.Request, conn net.Conn) (net.Conn, error) {
	cfg := &tls.Config{ServerName: req.URL.Hostname(), MinVersion: tls.VersionTLS12}
	var err error
	if t.tls != nil {
		cfg, err = t.tls()
	}
	if err == nil {
		ctx, cancel := context.WithTimeout(req.Context(), dialTimeout)
		defer cancel()
		secure := tls.Client(conn, cfg)
		if err = secure.HandshakeContext(ctx); err == nil {
			return secure, nil
		}
	}
	_ = conn.Close()
	return nil, err
}

// put keeps a connection to be used again, for a while.
func (t *transport) put(l *link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	same := 0
	for _, other := range t.idle {
		if other.parent == l.parent {
			same++
		}
	}
	if t.closed || same >= t.each || len(t.idle) >= maxIdle {
		_ = l.Close()
		return
	}
	t.idle = append(t.idle, l)
	if l.timer == nil {
		l.timer = time.AfterFunc(idleTimeout, func() { t.expire(l) })
	} else {
		l.timer.Reset(idleTimeout)
	}
}

func (t *transport) expire(l *link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if i := slices.Index(t.idle, l); i >= 0 {
		t.idle = slices.Delete(t.idle, i, i+1)
		_ = l.Close()
	}
}

// A link is a connection to a parent, of one request at a time.
type link struct {
	net.Conn
	transport *transport
	parent    string // scheme, host and port
	r         *bufio.Reader
	w         *bufio.Writer
	head      int         // bytes that a head may still have; negative while none is read
	stale     bool        // it waited to be used again, and nothing has come since
	timer     *time.Timer // closes it when it waits too long; nil before it first does
}

// Read implements io.Reader.
func (l *link) Read(p []byte) (int, error) {
	if l.head == 0 {
		return 0, errHead
	}
	if l.head > 0 {
		p = p[:min(len(p), l.head)]
	}
	n, err := l.Conn.Read(p)
	if l.head > 0 {
		l.head -= n
	}
	if n > 0 {
		l.stale = false
	}
	return n, err
}

// roundTrip makes a request. After an error the connection is closed.
func (l *link) roundTrip(req *http.Request) (*http.Response, error) {
	stop := context.AfterFunc(req.Context(), func() { _ = l.Close() })
	err := req.Write(l.w)
	if err == nil {
		err = l.w.Flush()
	}
	var resp *http.Response
	if err == nil {
		l.head = maxHeader
		resp, err = http.ReadResponse(l.r, req)
		l.head = -1
	}
	if err != nil {
		stop()
		_ = l.Close()
		return nil, err
	}
	resp.Body = &body{Reader: resp.Body, link: l, stop: stop, again: !resp.Close}
	return resp, nil
}

// body is that of an answer.
type body struct {
	io.Reader
	link  *link // nil once it is closed
	stop  func() bool
	again bool // the connection may be used again
	ended bool // it was read to its end
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.ended = b.ended || errors.Is(err, io.EOF)
	return n, err
}

// Close implements io.Closer. Of a body that was not read to its end the
// connection is closed.
func (b *body) Close() error {
	l := b.link
	if l == nil {
		return nil
	}
	b.link = nil
	if !b.stop() || !b.ended || !b.again || l.r.Buffered() > 0 {
		return l.Close()
	}
	l.transport.put(l)
	return nil
}

// A receiver is a connection whose reader is not woken for every packet: waking
// costs more than the packet. A read into more than headerBuffer is one of a
// body whose rest is no shorter than the read, so it can wait until much of it
// has come. Reads are one goroutine's at a time.
type receiver struct {
	*net.TCPConn
	wait int // bytes that a read of a body waits for
	low  int // as the socket has it
}

// Read implements net.Conn.
func (c *receiver) Read(p []byte) (int, error) {
	low := 1
	if len(p) > headerBuffer {
		low = min(len(p), c.wait)
	}
	if low != c.low && c.setLow(low) == nil {
		c.low = low
	}
	if low == 1 {
		return c.TCPConn.Read(p)
	}
	began := time.Now()
	n, err := c.TCPConn.Read(p)
	switch took := time.Since(began); {
	case took > oftenEnough:
		c.wait = max(c.wait/2, headerBuffer)
	case n >= c.wait:
		c.wait = min(2*c.wait, maxWait)
	}
	return n, err
}
