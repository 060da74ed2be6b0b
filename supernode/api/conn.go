package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fxamacker/cbor/v2"
)

const (
	// MaxFrame bounds one frame of a session, in bytes; a larger one ends it.
	MaxFrame = 1 << 20
	// MaxInline bounds the data that comes with an Assign, in bytes.
	MaxInline = 64 << 10

	// TickEvery is how often Tick is to be called.
	TickEvery = time.Second
	// BeatEvery is how often an end that says nothing shows that it is there, by
	// an empty batch.
	BeatEvery = 2 * TickEvery
	// SilenceLimit is when an end of which nothing has been heard is taken for
	// dead. One that stands still for some seconds between beats is not.
	SilenceLimit = 7 * TickEvery
	// StuckLimit is how long the other end may take over one frame, of either's:
	// longer than any back-pressure, shorter than memory lasts.
	StuckLimit = 30 * TickEvery

	protocol  = "damselfly" // of the Upgrade header
	headSize  = 4           // bytes before a frame: its length
	goodbye   = 1 << 31     // added to it where the frame says, for people, why the session ends
	maxReason = 256         // bytes of that
	farewell  = time.Second // for writing it

	maxBatch = 1 << 16  // elements of any list in a frame
	maxKept  = 16 << 10 // bytes of a buffer that is used again
)

// ErrFrame is of a frame that no program of ours sends.
var ErrFrame = errors.New("malformed frame")

// Conn is one end of a session that reads In and writes Out: after an HTTP
// upgrade, frames of CBOR, each behind its length in four bytes, the highest
// first. One goroutine may read while others write and one calls Tick.
type Conn[In, Out any] struct {
	rw     io.ReadWriteCloser
	in     *bufio.Reader
	reads  atomic.Uint64 // begun and ended: odd while one waits
	frames atomic.Uint64 // that have come
	writes atomic.Uint64 // begun and ended: odd while one is under way
	turn   chan struct{} // to write to rw: it holds one token while somebody does

	// What Tick has seen, and for how long the other end says, or takes, nothing,
	// or ends no frame, and this one says nothing.
	read, came, written        uint64
	silent, slow, stuck, quiet time.Duration
}

// buffers are for frames on their way out, and for large ones on their way in.
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
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(base, "/")+SessionPath, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("open session with %s: %w", base, err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", protocol)
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("open session with %s: %w", base, advised(err))
	}
	rw, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok {
		_ = resp.Body.Close()
		err = fmt.Errorf("open session with %s: it answers %s", base, resp.Status)
		if resp.StatusCode == http.StatusBadRequest && req.URL.Scheme == "http" { // so net/http answers plain HTTP at a port for TLS
			err = fmt.Errorf("%w: where it has TLS, give --tls or --join-token here, too", err)
		}
		return nil, err
	}
	c := &Conn[Down, Up]{rw: rw, turn: make(chan struct{}, 1)}
	c.in = bufio.NewReader(heard{rw, &c.reads})
	return c, nil
}

// advised adds to err what to do where one side alone has TLS.
func advised(err error) error {
	if errors.Is(err, http.ErrSchemeMismatch) {
		return fmt.Errorf("%w: give the supernode --tls or --ca, too", err)
	}
	if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); unknown {
		return fmt.Errorf("%w: --tls or --join-token must name the supernode's", err)
	}
	return err
}

// Accept turns a request for SessionPath into the supernode's end of a session.
// On an error the answer has been written.
func Accept(w http.ResponseWriter, r *http.Request) (*Conn[Up, Down], error) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), protocol) || !strings.EqualFold(r.Header.Get("Connection"), "Upgrade") {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", protocol)
		http.Error(w, "here a host of the supernode's own version opens its session", http.StatusUpgradeRequired)
		return nil, errors.New("accept session: the request asks for none")
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "a session needs HTTP/1.1", http.StatusHTTPVersionNotSupported)
		return nil, fmt.Errorf("accept session: %w", err)
	}
	c := &Conn[Up, Down]{rw: conn, in: buffered.Reader, turn: make(chan struct{}, 1)}
	if c.in.Buffered() > 0 {
		err = errors.New("the host speaks before it is answered")
	} else {
		_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+protocol+"\r\n\r\n")
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("accept session: %w", err)
	}
	c.in.Reset(heard{conn, &c.reads})
	return c, nil
}

// heard notes that something comes of a frame.
type heard struct {
	io.Reader
	reads *atomic.Uint64
}

func (h heard) Read(p []byte) (int, error) {
	n, err := h.Reader.Read(p)
	h.reads.Add(2)
	return n, err
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

// AppendFrame puts a batch into b as it goes over the wire.
func AppendFrame(b *bytes.Buffer, batch any) error {
	at := b.Len()
	b.Write(make([]byte, headSize))
	if err := cbor.MarshalToBuffer(batch, b); err != nil {
		return fmt.Errorf("encode a frame: %w", err)
	}
	frame := b.Bytes()[at:]
	binary.BigEndian.PutUint32(frame, uint32(len(frame)-headSize)) //nolint:gosec // below MaxFrame
	return nil
}

// FrameSize returns how many bytes the frame takes that b begins with, its head
// among them; 0 when b is too short to tell.
func FrameSize(b []byte) (int, error) {
	if len(b) < headSize {
		return 0, nil
	}
	n := binary.BigEndian.Uint32(b) &^ goodbye
	if n > MaxFrame {
		return 0, fmt.Errorf("%w: %d bytes, more than %d", ErrFrame, n, MaxFrame)
	}
	return headSize + int(n), nil
}

// ParseFrame reads a frame, of which all is there, into a batch. One that says
// why the session ends is an error.
func ParseFrame(frame []byte, batch any) error {
	body := frame[headSize:]
	if binary.BigEndian.Uint32(frame)&goodbye != 0 {
		return fmt.Errorf("the other end says %q", body[:min(len(body), maxReason)])
	}
	dec, err := decMode()
	if err != nil {
		return err
	}
	if err := dec.Unmarshal(body, batch); err != nil {
		return fmt.Errorf("%w: %w", ErrFrame, err)
	}
	return nil
}

// Read waits for the next batch. After an error the session is over. It costs
// least with a ctx that never ends, where CloseNow is what ends it.
func (c *Conn[In, Out]) Read(ctx context.Context) (In, error) {
	if ctx.Done() != nil {
		defer context.AfterFunc(ctx, c.CloseNow)()
	}
	var in In
	if err := c.readFrame(&in); err != nil {
		return in, fmt.Errorf("read session: %w", because(ctx, err))
	}
	c.frames.Add(1)
	return in, nil
}

// readFrame reads a frame where it lies, or, when it is a large one, into a
// buffer that grows as it comes.
func (c *Conn[In, Out]) readFrame(in *In) error {
	c.reads.Add(1)
	defer c.reads.Add(1)
	head, err := c.in.Peek(headSize)
	if err != nil {
		return err
	}
	size, err := FrameSize(head)
	if err != nil {
		return err
	}
	if size <= c.in.Size() {
		frame, err := c.in.Peek(size)
		if err == nil {
			err = ParseFrame(frame, in)
		}
		_, _ = c.in.Discard(len(frame))
		return err
	}
	frame := buffers.Get().(*bytes.Buffer)
	defer putBuffer(frame)
	if _, err := io.CopyN(frame, c.in, int64(size)); err != nil {
		return err
	}
	return ParseFrame(frame.Bytes(), in)
}

// Write sends one batch, which must stay below MaxFrame. After an error the
// session is over. It costs least with a ctx that never ends, where CloseNow is
// what ends it.
func (c *Conn[In, Out]) Write(ctx context.Context, out Out) error {
	if ctx.Done() != nil {
		defer context.AfterFunc(ctx, c.CloseNow)()
	}
	frame := buffers.Get().(*bytes.Buffer)
	defer putBuffer(frame)
	err := AppendFrame(frame, &out)
	if err == nil {
		c.turn <- struct{}{}
		c.writes.Add(1)
		_, err = c.rw.Write(frame.Bytes())
		c.writes.Add(1)
		<-c.turn
	}
	if err != nil {
		return fmt.Errorf("write session: %w", because(ctx, err))
	}
	return nil
}

// because returns why ctx ended, when it did, and else err.
func because(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// Tick notes that TickEvery has passed, and tells whether this end has said
// nothing for BeatEvery: it is to Write an empty batch then, and not wait for
// that, as the other end may be slow to read. It is an error when nothing comes from the
// other end for SilenceLimit while this one Reads, or no whole frame for StuckLimit,
// or when it takes nothing of a Write for as long. Time is counted in calls, so that a machine that stood
// still takes nobody for dead.
func (c *Conn[In, Out]) Tick() (beat bool, err error) {
	read, came, written := c.reads.Load(), c.frames.Load(), c.writes.Load()
	c.silent += TickEvery
	c.slow += TickEvery
	c.stuck += TickEvery
	c.quiet += TickEvery
	if read != c.read || read%2 == 0 {
		c.silent = 0
	}
	if came != c.came || read%2 == 0 {
		c.slow = 0
	}
	if written != c.written || written%2 == 0 {
		c.stuck = 0
	}
	if written != c.written || written%2 == 1 {
		c.quiet = 0
	}
	c.read, c.came, c.written = read, came, written
	switch {
	case c.silent >= SilenceLimit:
		return false, fmt.Errorf("session silent for %v", SilenceLimit)
	case c.slow >= StuckLimit:
		return false, fmt.Errorf("the other end has not ended a frame for %v", StuckLimit)
	case c.stuck >= StuckLimit:
		return false, fmt.Errorf("the other end has taken nothing for %v", StuckLimit)
	}
	return c.quiet > 0 && c.quiet%BeatEvery == 0, nil
}

// KeepAlive calls Tick until ctx ends or it returns an error, and beat, which
// must not wait, when an empty batch is to be written.
func (c *Conn[In, Out]) KeepAlive(ctx context.Context, beat func()) error {
	t := time.NewTicker(TickEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-t.C:
		}
		due, err := c.Tick()
		if err != nil {
			return err
		}
		if due {
			beat()
		}
	}
}

// Close ends the session at once, telling the other end why in a short phrase.
func (c *Conn[In, Out]) Close(reason string) {
	defer c.CloseNow()
	if conn, ok := c.rw.(net.Conn); ok {
		_ = conn.SetWriteDeadline(time.Now().Add(farewell)) // also for what is being written
	}
	reason = reason[:min(len(reason), maxReason)]
	head := binary.BigEndian.AppendUint32(nil, goodbye|uint32(len(reason))) //nolint:gosec // below maxReason
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	_, _ = c.rw.Write(append(head, reason...))
}

// CloseNow ends the session without a word.
func (c *Conn[In, Out]) CloseNow() { _ = c.rw.Close() }

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
		return net.JoinHostPort(host, port), nil
	}
	addr := net.JoinHostPort(host, port)
	if u, err := url.Parse("//" + addr); err != nil || u.Hostname() != host || u.Port() != port { // it becomes part of URLs
		return "", fmt.Errorf("advertised address %q: want host:port", advertised)
	}
	return addr, nil
}
