package api

import (
	"bytes"
	"context"
	"fmt"
	"io"
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

	// BeatEvery is how often an end that says nothing shows that it is there, by
	// an empty frame.
	BeatEvery = 2 * tick
	// SilenceLimit is when an end of which nothing has been heard is taken for
	// dead. One that stands still for some seconds between beats is not.
	SilenceLimit = 7 * tick
	// StuckLimit is how long the other end may take over one frame: longer than
	// any back-pressure, shorter than memory lasts.
	StuckLimit = 30 * tick

	tick = time.Second // what KeepAlive counts

	maxBatch = 1 << 16  // elements of any list in a frame
	maxKept  = 16 << 10 // bytes of a buffer that is used again
)

// Conn is one end of a session that reads In and writes Out. One goroutine may
// read and another write.
type Conn[In, Out any] struct {
	ws      *websocket.Conn
	frame   heard         // being read
	reads   atomic.Uint64 // begun and ended: odd while one waits
	writes  atomic.Uint64 // begun and ended, without beats: odd while one is under way
	beating atomic.Bool   // a beat is being written
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
	c := &Conn[Down, Up]{}
	var err error
	c.ws, _, err = websocket.Dial(ctx, strings.TrimSuffix(base, "/")+SessionPath, //nolint:bodyclose // the library closes it
		&websocket.DialOptions{HTTPClient: client})
	if err != nil {
		return nil, fmt.Errorf("open session with %s: %w", base, err)
	}
	c.ws.SetReadLimit(MaxFrame)
	return c, nil
}

// Accept turns a request for SessionPath into the supernode's end of a session.
// On an error the answer has been written.
func Accept(w http.ResponseWriter, r *http.Request) (*Conn[Up, Down], error) {
	c := &Conn[Up, Down]{}
	var err error
	c.ws, err = websocket.Accept(w, r, nil)
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
	frame := buffers.Get().(*bytes.Buffer)
	defer putBuffer(frame)
	for frame.Len() == 0 {
		if err := c.readFrame(ctx, frame); err != nil {
			return in, fmt.Errorf("read session: %w", err)
		}
	}
	if err := dec.Unmarshal(frame.Bytes(), &in); err != nil {
		return in, fmt.Errorf("read session: malformed frame: %w", err)
	}
	return in, nil
}

func (c *Conn[In, Out]) readFrame(ctx context.Context, to *bytes.Buffer) error {
	c.reads.Add(1)
	defer c.reads.Add(1)
	_, r, err := c.ws.Reader(ctx)
	if err == nil {
		c.frame = heard{r, &c.reads}
		_, err = to.ReadFrom(&c.frame)
	}
	return err
}

// heard notes that something comes of a frame.
type heard struct {
	io.Reader
	reads *atomic.Uint64
}

func (h *heard) Read(p []byte) (int, error) {
	h.reads.Add(2)
	return h.Reader.Read(p)
}

// Write sends one batch, which must stay below MaxFrame. After an error the
// session is over. It costs least with a ctx that never ends, where CloseNow is
// what ends it.
func (c *Conn[In, Out]) Write(ctx context.Context, out Out) error {
	frame := buffers.Get().(*bytes.Buffer)
	defer putBuffer(frame)
	if err := cbor.MarshalToBuffer(out, frame); err != nil {
		return fmt.Errorf("write session: %w", err)
	}
	c.writes.Add(1)
	defer c.writes.Add(1)
	return c.writeFrame(ctx, frame.Bytes())
}

func (c *Conn[In, Out]) writeFrame(ctx context.Context, frame []byte) error {
	if err := c.ws.Write(ctx, websocket.MessageBinary, frame); err != nil {
		return fmt.Errorf("write session: %w", err)
	}
	return nil
}

// KeepAlive shows the other end that this one is there, until ctx ends. It is
// an error when nothing comes from the other end for SilenceLimit while this one
// Reads, or when it takes nothing of a Write for StuckLimit. Time is counted in
// ticks, so that a machine that stood still takes nobody for dead. The session
// must be closed then: a beat may be under way until that.
func (c *Conn[In, Out]) KeepAlive(ctx context.Context) error {
	t := time.NewTicker(tick)
	defer t.Stop()
	broken := make(chan error, 1)
	var read, written uint64
	var silent, stuck, quiet time.Duration // the other end speaks, or takes, nothing; this one says nothing
	for silent < SilenceLimit && stuck < StuckLimit {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-broken:
			return err
		case <-t.C:
		}
		silent += tick
		stuck += tick
		quiet += tick
		if now := c.reads.Load(); now != read || now%2 == 0 {
			read, silent = now, 0
		}
		now := c.writes.Load()
		if now != written || now%2 == 0 {
			stuck = 0
		}
		if now != written {
			written, quiet = now, 0
		}
		if quiet >= BeatEvery && c.beating.CompareAndSwap(false, true) {
			quiet = 0
			go c.beat(broken) // the other end may be slow to read
		}
	}
	if stuck >= StuckLimit {
		return fmt.Errorf("the other end has taken nothing for %v", StuckLimit)
	}
	return fmt.Errorf("session silent for %v", SilenceLimit)
}

// beat writes an empty frame; only where that succeeds is there another.
func (c *Conn[In, Out]) beat(broken chan<- error) {
	if err := c.writeFrame(context.Background(), nil); err != nil {
		broken <- err
		return
	}
	c.beating.Store(false)
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
