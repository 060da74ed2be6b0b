// Package hostile is a host that does to a region what it can: it has a session like
// others, and none of their manners.
package hostile

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// Ways are what a host can do.
var Ways = []string{
	"lies",     // it says it has all pieces, and refuses whoever asks
	"silent",   // the same, and it never answers
	"drips",    // it sends a byte now and then
	"wrong",    // its bytes are wrong
	"takes",    // it takes what it is sent, over and over, and never says that it has it
	"promises", // it says at once that all ends soon
	"pretends", // it says at once that it has what it is to get
	"blames",   // it says of all parents that they are gone, or their bytes wrong
	"joins",    // it joins and leaves in turn, and asks for digests that nobody has
	"replays",  // it says again all that it has ever said, and of transfers of others
	"frames",   // it begins frames of 1 GiB, and connections that go no further
}

// Host is a hostile host.
type Host struct {
	Supernode            string // its URL
	Client               *http.Client
	Dial                 func(ctx context.Context, network, address string) (net.Conn, error)
	Addr                 string // where Host serves, as other hosts reach it
	Registry, Repository string
	Digest               string // of what the others pull
	Size                 int64

	Asked atomic.Int64 // how often another host has asked it for something
	Told  atomic.Int64 // how many messages and assignments it has had
}

const (
	pause  = 50 * time.Millisecond
	floods = 16 // elements of a batch
)

// Run does harm until ctx ends, in a new session when one ends.
func (h *Host) Run(ctx context.Context, way string) {
	for ctx.Err() == nil {
		if way == "frames" {
			h.frames(ctx)
		} else {
			h.session(ctx, way)
		}
		_ = wait(ctx, pause)
	}
}

// Serve is what whoever asks for a piece gets.
func (h *Host) Serve(way string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.Asked.Add(1)
		var first, last int64
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil || way == "lies" || way == "pretends" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		if way != "wrong" && way != "drips" {
			<-r.Context().Done()
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, h.Size))
		w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
		w.WriteHeader(http.StatusPartialContent)
		if way == "wrong" {
			_, _ = io.CopyN(w, zeros{}, last-first+1)
			return
		}
		for range last - first {
			_, err := w.Write([]byte{0})
			if err != nil || http.NewResponseController(w).Flush() != nil || wait(r.Context(), time.Second) != nil {
				return
			}
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// session is one session.
func (h *Host) session(ctx context.Context, way string) {
	conn, err := api.Dial(ctx, h.Client, h.Supernode)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	hello := api.Hello{Version: api.Version, Host: "hostile", Addr: h.Addr, Up: api.MaxLanes, Down: api.MaxLanes}
	if conn.Write(ctx, api.Up{Hello: &hello}) != nil {
		return
	}
	if _, err = conn.Read(ctx); err != nil {
		return
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		<-ctx.Done()
		conn.CloseNow()
		return ctx.Err()
	})
	g.Go(func() error {
		return conn.KeepAlive(ctx, func() { _ = conn.Write(ctx, api.Up{}) })
	})
	g.Go(func() error {
		defer h.Told.Add(1)
		return h.begin(ctx, conn, way)
	})
	g.Go(func() error { return h.follow(ctx, conn, way) })
	_ = g.Wait() // it ends with an error, whoever ends it
}

func (h *Host) origin() api.Origin {
	return api.Origin{Registry: h.Registry, Repository: h.Repository}
}

// begin says what the host says of itself.
func (h *Host) begin(ctx context.Context, conn *api.Conn[api.Down, api.Up], way string) error {
	join := api.Join{Seq: 1, Task: h.Digest, Origin: h.origin()}
	switch way {
	case "lies", "silent", "drips", "wrong":
		l := pieces.NewLayout(h.Size)
		all := pieces.FullSet(l.Count())
		return conn.Write(ctx, api.Up{ // who has not joined is not believed
			Hold: []api.Hold{{Task: h.Digest, Layout: l, Have: all.Bytes()}}, Join: []api.Join{join},
		})
	case "joins":
		return h.joins(ctx, conn)
	}
	return conn.Write(ctx, api.Up{Join: []api.Join{join}})
}

// joins joins without end.
func (h *Host) joins(ctx context.Context, conn *api.Conn[api.Down, api.Up]) error {
	for seq := uint64(1); ; {
		var up api.Up
		for range floods {
			up.Join = append(up.Join,
				api.Join{Seq: seq, Task: h.Digest, Origin: h.origin()},
				api.Join{Seq: seq + 1, Task: fmt.Sprintf("sha256:%064x", rand.Uint64()), Origin: h.origin()}, //nolint:gosec // no secret
			)
			up.Leave = append(up.Leave, api.Leave{Task: h.Digest})
			seq += 2
		}
		if err := conn.Write(ctx, up); err != nil {
			return err
		}
	}
}

// follow does with assignments what the host does.
func (h *Host) follow(ctx context.Context, conn *api.Conn[api.Down, api.Up], way string) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(floods)
	defer func() { _ = g.Wait() }() // takers end with ctx
	ticket := ""
	for {
		down, err := conn.Read(ctx)
		if err != nil {
			return err
		}
		h.Told.Add(1 + int64(len(down.Assign)))
		for _, t := range down.Task {
			ticket = t.Ticket
		}
		if len(down.Assign) == 0 {
			continue
		}
		var up api.Up
		for _, a := range down.Assign {
			switch way {
			case "promises":
				up.Soon = append(up.Soon, a.Transfer)
			case "pretends":
				up.Done = append(up.Done, done(a)...)
			case "blames":
				up.Failed = append(up.Failed, api.Failed{Transfer: a.Transfer, Why: api.Gone + api.Failure(a.Transfer%2)})
			case "replays":
				for back := range min(a.Transfer, floods) {
					id := a.Transfer - back
					up.Soon = append(up.Soon, id)
					up.Done = append(up.Done, done(api.Assign{Transfer: id, First: a.First, Count: a.Count})...)
					up.Failed = append(up.Failed, api.Failed{Transfer: id, Why: api.Corrupt})
				}
			case "takes":
				g.TryGo(func() error { h.take(gctx, a, ticket); return nil })
			}
		}
		if err := conn.Write(ctx, up); err != nil {
			return err
		}
	}
}

func done(a api.Assign) (all []api.Done) {
	for i := range a.Count {
		all = append(all, api.Done{Transfer: a.Transfer, Piece: a.First + i})
	}
	return all
}

// take asks the parent, and reads nothing of the answer.
func (h *Host) take(ctx context.Context, a api.Assign, ticket string) {
	at := a.Parent
	if at == "" {
		at = strings.TrimPrefix(h.Supernode, "http://")
	}
	conn, err := h.Dial(ctx, "tcp", at)
	if err != nil {
		return
	}
	defer conn.Close()
	l := pieces.NewLayout(h.Size)
	_, _ = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nRange: bytes=%d-%d\r\n%s: %s\r\n\r\n", api.ContentPath(pieces.TaskID(h.Digest)), at,
		l.Offset(a.First), l.Offset(a.First+a.Count)-1, api.TicketHeader, ticket)
	<-ctx.Done()
}

// frames begins a session with a frame that is far too long.
func (h *Host) frames(ctx context.Context) {
	at := strings.TrimPrefix(h.Supernode, "http://")
	conn, err := h.Dial(ctx, "tcp", at)
	if err != nil {
		return
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	_, _ = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: damselfly\r\n\r\n", api.SessionPath, at)
	head := make([]byte, 12) // HTTP/1.1 101
	if _, err := io.ReadFull(conn, head); err != nil || !bytes.HasSuffix(head, []byte("101")) {
		return
	}
	h.Told.Add(1)
	frame := make([]byte, 64<<10)
	binary.BigEndian.PutUint32(frame, 1<<30)
	for err == nil {
		_, err = conn.Write(frame)
	}
}
