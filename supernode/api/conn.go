package api

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/coder/websocket"
	"github.com/fxamacker/cbor/v2"
)

const (
	// MaxFrame bounds one frame of a session, in bytes; a larger one ends it.
	MaxFrame = 1 << 20
	// MaxInline bounds the data that comes with an Assign, in bytes.
	MaxInline = 64 << 10

	// PingEvery is how often each end asks whether the other is there.
	PingEvery = 2 * time.Second
	// SilenceLimit is when an end that has not answered is taken for dead.
	SilenceLimit = 5 * time.Second

	maxBatch = 1 << 16 // elements of any list in a frame
)

// Conn is one end of a session that reads In and writes Out. One goroutine may
// read and another write.
type Conn[In, Out any] struct {
	ws  *websocket.Conn
	dec cbor.DecMode
}

// Dial opens a session with the supernode at base, a URL without a path. The
// client's Timeout must be 0; ctx bounds the dialling alone.
func Dial(ctx context.Context, client *http.Client, base string) (*Conn[Down, Up], error) {
	ws, _, err := websocket.Dial(ctx, strings.TrimSuffix(base, "/")+SessionPath, //nolint:bodyclose // the library closes it
		&websocket.DialOptions{HTTPClient: client})
	if err != nil {
		return nil, fmt.Errorf("open session with %s: %w", base, err)
	}
	return newConn[Down, Up](ws)
}

// Accept turns a request for SessionPath into the supernode's end of a session.
// On an error the answer has been written.
func Accept(w http.ResponseWriter, r *http.Request) (*Conn[Up, Down], error) {
	ws, err := websocket.Accept(w, r, nil)
	if err != nil {
		return nil, fmt.Errorf("accept session: %w", err)
	}
	return newConn[Up, Down](ws)
}

func newConn[In, Out any](ws *websocket.Conn) (*Conn[In, Out], error) {
	dec, err := decMode()
	if err != nil {
		_ = ws.CloseNow()
		return nil, err
	}
	ws.SetReadLimit(MaxFrame)
	return &Conn[In, Out]{ws: ws, dec: dec}, nil
}

func decMode() (cbor.DecMode, error) {
	return cbor.DecOptions{
		MaxArrayElements: maxBatch,
		MaxMapPairs:      1024,
		MaxNestedLevels:  8,
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
	}.DecMode()
}

// Read waits for the next batch. After an error the session is over.
func (c *Conn[In, Out]) Read(ctx context.Context) (In, error) {
	var in In
	_, frame, err := c.ws.Read(ctx)
	if err != nil {
		return in, fmt.Errorf("read session: %w", err)
	}
	if err := c.dec.Unmarshal(frame, &in); err != nil {
		return in, fmt.Errorf("read session: malformed frame: %w", err)
	}
	return in, nil
}

// Write sends one batch, which must stay below MaxFrame. After an error the
// session is over.
func (c *Conn[In, Out]) Write(ctx context.Context, out Out) error {
	frame, err := cbor.Marshal(out)
	if err != nil {
		return fmt.Errorf("write session: %w", err)
	}
	if err := c.ws.Write(ctx, websocket.MessageBinary, frame); err != nil {
		return fmt.Errorf("write session: %w", err)
	}
	return nil
}

// KeepAlive pings every PingEvery until ctx ends or the other end has been
// silent for SilenceLimit, which is an error. It needs a concurrent Read.
func (c *Conn[In, Out]) KeepAlive(ctx context.Context) error {
	t := time.NewTicker(PingEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-t.C:
		}
		pctx, cancel := context.WithTimeout(ctx, SilenceLimit-PingEvery)
		err := c.ws.Ping(pctx)
		cancel()
		if err != nil {
			return fmt.Errorf("session silent for %v: %w", SilenceLimit, err)
		}
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
