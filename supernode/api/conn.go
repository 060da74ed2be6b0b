package api

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"github.com/fxamacker/cbor/v2"
)

const (
	// MaxFrame bounds one frame of a session, in bytes; a larger one ends it.
	MaxFrame = 1 << 20
	// MaxInline bounds the data that comes with an Assign, in bytes.
	MaxInline = 64 << 10

	// PingEvery is how long an end says nothing, or hears nothing, until it asks
	// whether the other is there.
	PingEvery = 2 * time.Second
	// SilenceLimit is when an end of which nothing has been heard is taken for dead.
	SilenceLimit = 5 * time.Second

	maxBatch = 1 << 16  // elements of any list in a frame
	maxKept  = 16 << 10 // bytes of a buffer that is used again
)

// Conn is one end of a session that reads In and writes Out. One goroutine may
// read and another write.
type Conn[In, Out any] struct {
	ws    *websocket.Conn
	began time.Time

	// In nanoseconds since began.
	sent    atomic.Int64 // when something was last written, or 0
	writing atomic.Int64 // when the Write under way began; 0 for none
	heard   atomic.Int64 // when the Read under way began or was last sent a ping or pong; 0 for none
}

// buffers are for frames on their way in or out.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func putBuffer(b *bytes.Buffer) {
	if b.Cap() <= maxKept {
		b.Reset()
		buffers.Put(b)
	}
}

// Dial opens a session with the supernode at base, a URL without a path. The
// client's Timeout must be 0; ctx bounds the dialling alone.
func Dial(ctx context.Context, client *http.Client, base string) (*Conn[Down, Up], error) {
	c := &Conn[Down, Up]{began: time.Now()}
	var err error
	c.ws, _, err = websocket.Dial(ctx, strings.TrimSuffix(base, "/")+SessionPath, //nolint:bodyclose // the library closes it
		&websocket.DialOptions{HTTPClient: client, OnPingReceived: c.pinged, OnPongReceived: c.ponged})
	if err != nil {
		return nil, fmt.Errorf("open session with %s: %w", base, err)
	}
	c.ws.SetReadLimit(MaxFrame)
	return c, nil
}

// Accept turns a request for SessionPath into the supernode's end of a session.
// On an error the answer has been written.
func Accept(w http.ResponseWriter, r *http.Request) (*Conn[Up, Down], error) {
	c := &Conn[Up, Down]{began: time.Now()}
	var err error
	c.ws, err = websocket.Accept(w, r, &websocket.AcceptOptions{OnPingReceived: c.pinged, OnPongReceived: c.ponged})
	if err != nil {
		return nil, fmt.Errorf("accept session: %w", err)
	}
	c.ws.SetReadLimit(MaxFrame)
	return c, nil
}

var decMode = sync.OnceValues(func() (cbor.DecMode, error) {
	return cbor.DecOptions{
		MaxArrayElements: maxBatch,
		MaxMapPairs:      1024,
		MaxNestedLevels:  8,
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
	}.DecMode()
})

// Read waits for the next batch. After an error the session is over. It costs
// least with a ctx that never ends, where CloseNow is what ends it.
func (c *Conn[In, Out]) Read(ctx context.Context) (In, error) {
	var in In
	dec, err := decMode()
	if err != nil {
		return in, err
	}
	c.heard.Store(c.now())
	defer c.heard.Store(0)
	_, r, err := c.ws.Reader(ctx)
	if err != nil {
		return in, fmt.Errorf("read session: %w", err)
	}
	frame := buffers.Get().(*bytes.Buffer)
	defer putBuffer(frame)
	if _, err := frame.ReadFrom(r); err != nil {
		return in, fmt.Errorf("read session: %w", err)
	}
	if err := dec.Unmarshal(frame.Bytes(), &in); err != nil {
		return in, fmt.Errorf("read session: malformed frame: %w", err)
	}
	return in, nil
}

// Write sends one batch, which must stay below MaxFrame. After an error the
// session is over. It costs least with a ctx that never ends: who does not read
// loses the session by KeepAlive.
func (c *Conn[In, Out]) Write(ctx context.Context, out Out) error {
	frame := buffers.Get().(*bytes.Buffer)
	defer putBuffer(frame)
	if err := cbor.MarshalToBuffer(out, frame); err != nil {
		return fmt.Errorf("write session: %w", err)
	}
	now := c.now()
	c.sent.Store(now)
	c.writing.Store(now)
	defer c.writing.Store(0)
	if err := c.ws.Write(ctx, websocket.MessageBinary, frame.Bytes()); err != nil {
		return fmt.Errorf("write session: %w", err)
	}
	return nil
}

// now is the time since the session began, never 0.
func (c *Conn[In, Out]) now() int64 { return int64(time.Since(c.began)) | 1 }

func (c *Conn[In, Out]) pinged(context.Context, []byte) bool {
	c.sent.Store(c.now()) // the pong
	c.heard.Store(c.now())
	return true
}

func (c *Conn[In, Out]) ponged(context.Context, []byte) { c.heard.Store(c.now()) }

// KeepAlive pings when this end has said or heard nothing for PingEvery, until
// ctx ends. It is an error when the other end says nothing for SilenceLimit while
// this one Reads, or takes nothing of a Write for as long.
func (c *Conn[In, Out]) KeepAlive(ctx context.Context) error {
	t := time.NewTimer(PingEvery)
	defer t.Stop()
	broken := make(chan error, 1)
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-broken:
			return fmt.Errorf("ping session: %w", err)
		case <-t.C:
		}
		now := c.now()
		silent := since(now, &c.heard)
		if max(silent, since(now, &c.writing)) >= SilenceLimit {
			return fmt.Errorf("session silent for %v", SilenceLimit)
		}
		next := min(PingEvery-max(silent, time.Duration(now-c.sent.Load())), SilenceLimit-silent)
		if next <= 0 {
			next = min(PingEvery, SilenceLimit-silent)
			c.sent.Store(now)
			go c.ping(ctx, broken) // its pong may be late, and the next must not wait for that
		}
		t.Reset(next)
	}
}

// since is how long before now what at says was; 0 when it says nothing.
func since(now int64, at *atomic.Int64) time.Duration {
	if at := at.Load(); at != 0 {
		return time.Duration(now - at)
	}
	return 0
}

// ping asks for a word, and says when it could not. Silence is not for it to judge.
func (c *Conn[In, Out]) ping(ctx context.Context, broken chan<- error) {
	ctx, cancel := context.WithTimeout(ctx, SilenceLimit)
	defer cancel()
	err := c.ws.Ping(ctx)
	if err == nil || ctx.Err() != nil {
		return
	}
	select {
	case broken <- err:
	default:
	}
}

// Close ends the session at once, telling the other end why in a short phrase.
func (c *Conn[In, Out]) Close(reason string) {
	if len(reason) > 100 {
		reason = reason[:100]
	}
	_ = c.ws.Close(websocket.StatusPolicyViolation, reason)
}

// CloseNow ends the session without a word.
func (c *Conn[In, Out]) CloseNow() { _ = c.ws.CloseNow() }

// PeerAddr completes the address a host advertises: with an empty host it gets
// that of remote, the session's remote address (host:port). "" stays "".
func PeerAddr(advertised, remote string) (string, error) {
	if advertised == "" {
		return "", nil
	}
	host, port, err := net.SplitHostPort(advertised)
	if err != nil {
		return "", fmt.Errorf("advertised address %q: want host:port", advertised)
	}
	if host == "" {
		if host, _, err = net.SplitHostPort(remote); err != nil {
			return "", fmt.Errorf("remote address %q: want host:port", remote)
		}
	}
	return net.JoinHostPort(host, port), nil
}
