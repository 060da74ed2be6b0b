package dfget

import (
	"context"
	"net"
	"net/http"
	"time"

	"damselfly.dev/pieces"
)

const (
	headerBuffer = 4 << 10                // what net/http reads into when it does not know how much will come
	maxWait      = 128 << 10              // bytes to wait for at most; pieces are read in such steps
	oftenEnough  = 100 * time.Millisecond // a reader that is woken less often than this waits for less
)

// newTransfers returns the client of transfers over plain TCP.
func newTransfers(lanes int) *http.Client {
	t := newTransport(lanes)
	t.ReadBufferSize = headerBuffer
	dial := t.DialContext
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if tcp, ok := conn.(*net.TCPConn); ok {
			return &receiver{TCPConn: tcp, wait: pieces.MinPieceSize / 16, low: 1}, nil
		}
		return conn, err
	}
	return &http.Client{Transport: t, CheckRedirect: noRedirect}
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
