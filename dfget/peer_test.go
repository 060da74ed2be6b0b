package dfget

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sync/errgroup"

	"damselfly.dev/httprange"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
)

// complete tells whether the host has all of b, for good.
func complete(h *host, b *blob) bool {
	c, err := h.store.Get(b.id)
	if err != nil {
		return false
	}
	defer c.Release()
	return c.Complete()
}

// idle tells whether the host has nothing to do.
func idle(h *host) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.tasks) == 0
}

func TestPiecesComeFromParents(t *testing.T) {
	b := newBlob(3<<20 + 17)
	parents := []*httptest.Server{httptest.NewServer(content(b)), httptest.NewServer(content(b))}
	for _, p := range parents {
		t.Cleanup(p.Close)
	}
	n, h := loopback(t, PeerConfig{}, serving(b, addr(parents[0]), addr(parents[1])), b)
	up := &upstream{bytes: b.bytes}
	req := Request{b.id, registryOrigin(), up}
	got, err := get(t, h, req, 0, -1)
	require.NoError(t, err)
	require.Equal(t, b.bytes, got)
	require.Empty(t, up.opened())
	require.Eventually(t, func() bool { return len(heard(n, dones)) == b.layout.Count() }, waitFor, tick)
	require.Equal(t, len(b.bytes), h.metric(t, "damselfly_received_bytes_total", sourcePeer))
	require.Eventually(t, func() bool { return complete(h, b) && idle(h) }, waitFor, tick)

	s := open(t, h, req, 100, 1<<20)
	var part bytes.Buffer
	_, err = s.WriteTo(&part)
	require.NoError(t, err)
	require.Equal(t, b.bytes[100:100+1<<20], part.Bytes())
	require.Equal(t, 1<<20, h.metric(t, "damselfly_received_bytes_total", sourceStore))
	require.Equal(t, Stats{Store: 1 << 20}, s.Stats())
	require.Len(t, heard(n, joins), 2, "what is there is asked for all the same")
	require.Empty(t, up.opened())
	require.NoError(t, s.Close())
	require.Eventually(t, func() bool { return idle(h) }, waitFor, tick, "nothing is kept of what is done")
}

func TestRanges(t *testing.T) {
	b := newBlob(1<<20 + 5)
	size := int64(len(b.bytes))
	_, h := loopback(t, PeerConfig{}, serving(b, ""), b)
	alone := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
	for _, h := range []*host{h, alone} {
		req := Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}
		for _, c := range []struct{ off, n, want int64 }{
			{0, -1, size}, {0, 0, 0}, {0, size, size}, {0, 2 * size, size}, {size - 1, -1, 1}, {size - 1, 5, 1}, {5, 0, 0}, {300_000, 300_000, 300_000},
		} {
			s := open(t, h, req, c.off, c.n)
			require.Equal(t, size, s.Size())
			require.Equal(t, c.want, s.Length())
			got, err := io.ReadAll(s)
			require.NoError(t, err)
			require.True(t, bytes.Equal(b.bytes[c.off:c.off+c.want], got))
			n, err := s.WriteTo(io.Discard)
			require.NoError(t, err)
			require.Zero(t, n)
		}
		for _, off := range []int64{size, size + 1, -1} {
			_, err := h.Open(t.Context(), Request{b.id, registryOrigin(), unsized{b.bytes, size}}, off, 1)
			outside, ok := errors.AsType[*RangeError](err)
			require.True(t, ok, "%v", err)
			require.Equal(t, RangeError{off, size}, *outside)
		}
	}
}

// unsized is an origin that gives what it has from any offset.
type unsized struct {
	bytes []byte
	size  int64
}

func (u unsized) Open(_ context.Context, off int64) (io.ReadCloser, int64, error) {
	return io.NopCloser(bytes.NewReader(u.bytes[min(max(off, 0), int64(len(u.bytes))):])), u.size, nil
}

func TestOriginOfUnknownSize(t *testing.T) {
	b := newBlob(100_000)
	h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
	req := Request{b.id, registryOrigin(), unsized{b.bytes, -1}}
	for _, c := range []struct{ off, n, want int64 }{{0, -1, 100_000}, {5, 10, 10}, {99_999, 10, 1}} {
		s := open(t, h, req, c.off, c.n)
		require.EqualValues(t, -1, s.Size())
		require.EqualValues(t, -1, s.Length())
		got, err := io.ReadAll(s)
		require.NoError(t, err)
		require.Equal(t, b.bytes[c.off:c.off+c.want], got)
	}
}

func TestEmptyContent(t *testing.T) {
	b := newBlob(0)
	_, h := loopback(t, PeerConfig{}, serving(b), b)
	got, err := get(t, h, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
	require.NoError(t, err)
	require.Empty(t, got)
	require.Eventually(t, func() bool { return complete(h, b) }, waitFor, tick)
}

func TestInlineAndMalformedAssignments(t *testing.T) {
	b := newBlob(1<<20 + 5)
	n, h := loopback(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
		for _, j := range up.Join {
			n.send(api.Down{Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{
				{Task: 1, First: 4, Digests: pieces.AppendDigests(nil, b.digests...)},
				{Task: 1, First: -1},
				{Task: 7},
				{Task: 1, Digests: []byte{1}},
				digestsOf(b),
			}, Assign: []api.Assign{
				{Transfer: 1, Task: 1, First: -1, Count: 1},
				{Transfer: 2, Task: 1, First: 5, Count: 1},
				{Transfer: 3, Task: 1, Count: 0},
				{Transfer: 4, Task: 1, First: 1, Count: 1 << 62},
				{Transfer: 5, Task: 9, Count: 1},
				{Transfer: 6, Task: 1, First: 4, Count: 1, Data: []byte("four")},
				{Transfer: 7, Task: 1, First: 4, Count: 1, Data: []byte("wrong")},
				{Transfer: 8, Task: 1, First: 4, Count: 1, Data: b.piece(4)},
				{Transfer: 9, Task: 1, First: 0, Count: 1, Data: b.piece(0)},
				{Transfer: 10, Task: 1, First: 0, Count: 4, Parent: ""},
			}, Cancel: []uint64{77}, Invalidate: []api.Invalidate{{Task: "../../etc"}}, Progress: []api.Progress{{Task: 3}}})
		}
	}, b)
	got, err := get(t, h, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
	require.NoError(t, err)
	require.Equal(t, b.bytes, got)
	require.Eventually(t, func() bool { return len(heard(n, dones)) == 6 }, waitFor, tick)
	why := map[uint64]api.Failure{}
	for _, f := range heard(n, faileds) {
		why[f.Transfer] = f.Why
	}
	require.Equal(t, map[uint64]api.Failure{
		1: api.Local, 2: api.Local, 3: api.Local, 4: api.Local, 5: api.Local, 6: api.Gone, 7: api.Corrupt,
	}, why)
	require.Equal(t, len(b.bytes)+len("four")+len("wrong"), h.metric(t, "damselfly_received_bytes_total", sourceSupernode))
}

func TestSmallContentComesWithTheAnswer(t *testing.T) {
	b := newBlob(20_000)
	for name, data := range map[string][]byte{"right": b.bytes, "wrong": make([]byte, 20_000), "short": b.bytes[:100]} {
		t.Run(name, func(t *testing.T) {
			n, h := loopback(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
				for _, j := range up.Join {
					k := n.grant(j, b)
					k.Ticket, k.Digest, k.Data = "", pieces.AppendDigests(nil, b.digests...), data
					require.True(t, j.Small)
					n.send(api.Down{Task: []api.Task{k}})
				}
			}, b)
			up := &upstream{bytes: b.bytes}
			got, err := get(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
			require.NoError(t, err)
			require.Equal(t, b.bytes, got)
			require.Empty(t, heard(n, wants))
			if name != "right" {
				require.Equal(t, []int64{0}, up.opened())
				require.Eventually(t, func() bool { return len(heard(n, leaves)) == 1 && idle(h) }, waitFor, tick)
				require.Empty(t, heard(n, holds))
				return
			}
			require.Empty(t, up.opened())
			require.Eventually(t, func() bool { return complete(h, b) && len(heard(n, holds)) == 1 }, waitFor, tick)
			require.Equal(t, len(b.bytes), h.metric(t, "damselfly_received_bytes_total", sourceSupernode))
		})
	}
}

func TestRefusalsAreRelayed(t *testing.T) {
	b := newBlob(10)
	want := api.Refused{Status: 401, Header: http.Header{"Www-Authenticate": {"Bearer realm=x"}}, Body: []byte("no"), Final: true}
	_, h := loopback(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
		for _, j := range up.Join {
			r := want
			r.Seq = j.Seq
			n.send(api.Down{Refused: []api.Refused{{Seq: 4711, Status: 500}, r, r}})
		}
	}, nil)
	up := &upstream{}
	_, err := h.Open(t.Context(), Request{b.id, registryOrigin(), up}, 0, -1)
	refused, ok := errors.AsType[*RefusedError](err)
	require.True(t, ok)
	require.Equal(t, RefusedError{want.Status, want.Header, want.Body}, *refused)
	require.Empty(t, up.opened())
	require.True(t, idle(h))

	alone := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
	_, err = alone.Open(t.Context(), Request{b.id, registryOrigin(), &upstream{err: refused}}, 0, -1)
	require.ErrorIs(t, err, refused)
}

func TestStreamsShareOneDownload(t *testing.T) {
	b := newBlob(4 << 20)
	n, h := loopback(t, PeerConfig{}, serving(b, ""), b)
	var group errgroup.Group
	for i := range 8 {
		group.Go(func() error {
			off := int64(i) * 100_000
			got, err := get(t, h, Request{b.id, registryOrigin("caller", string(rune('a'+i))), &upstream{}}, off, -1)
			if err == nil && !bytes.Equal(got, b.bytes[off:]) {
				return errors.New("other bytes")
			}
			return err
		})
	}
	require.NoError(t, group.Wait())
	require.Len(t, heard(n, joins), 8)
	require.Equal(t, len(b.bytes), h.metric(t, "damselfly_received_bytes_total", sourceSupernode))
}

func TestReaderThatLeavesEndsNothing(t *testing.T) {
	b := newBlob(4 << 20)
	hold := make(chan struct{})
	parent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != "bytes=0-262143" {
			<-hold
		}
		content(b)(w, r)
	}))
	defer parent.Close()
	_, h := loopback(t, PeerConfig{}, serving(b, addr(parent)), b)
	ctx, cancel := context.WithCancel(t.Context())
	s, err := h.Open(ctx, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
	require.NoError(t, err)
	stays := open(t, h, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
	_, err = io.CopyN(io.Discard, s, 1000)
	require.NoError(t, err)
	cancel()
	_, err = io.Copy(io.Discard, struct{ io.Reader }{s})
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, s.Close())
	close(hold)
	got, err := io.ReadAll(stays)
	require.NoError(t, err)
	require.Equal(t, b.bytes, got)
	require.NoError(t, stays.Close())
	require.Eventually(t, func() bool { return complete(h, b) }, waitFor, tick)
}

// A writer that fails is no reason to ask the origin.
func TestWriterThatFails(t *testing.T) {
	b := newBlob(1 << 20)
	_, h := loopback(t, PeerConfig{}, serving(b, ""), b)
	up := &upstream{bytes: b.bytes}
	s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
	_, err := s.WriteTo(failing{})
	require.ErrorIs(t, err, io.ErrClosedPipe)
	require.Empty(t, up.opened())
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestRestartGoesOn(t *testing.T) {
	b := newBlob(1 << 20)
	for name, kill := range map[string]bool{"clean": false, "killed": true} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t, half(b))
			n.routes.HandleFunc(api.ContentPath(b.id), content(b))
			srv := httptest.NewServer(n.routes)
			defer srv.Close()
			cfg := PeerConfig{Supernodes: []string{srv.URL}}
			dir := t.TempDir()
			first := newHost(t, dir, cfg, 0, nil)
			require.NoError(t, first.Ready(t.Context()))
			_, err := get(t, first, Request{b.id, registryOrigin(), &upstream{}}, 0, 2*b.layout.PieceSize)
			require.NoError(t, err)
			first.stop()
			if kill { // no marker of a clean end, and a piece that is not what was recorded
				require.NoError(t, os.Remove(filepath.Join(dir, "clean")))
				name := filepath.Join(dir, strings.Replace(string(b.id), ":", "-", 1), "content")
				f, err := os.OpenFile(name, os.O_WRONLY, 0)
				require.NoError(t, err)
				_, err = f.WriteAt([]byte("rotten"), b.layout.Offset(1)+99)
				require.NoError(t, err)
				require.NoError(t, f.Close())
			}

			n2 := newFakeNode(t, serving(b, ""))
			n2.routes.HandleFunc(api.ContentPath(b.id), content(b))
			srv2 := httptest.NewServer(n2.routes)
			defer srv2.Close()
			cfg.Supernodes = []string{srv2.URL}
			second := newHost(t, dir, cfg, 0, nil)
			require.Equal(t, first.cfg.Host, second.cfg.Host)
			require.NoError(t, second.Ready(t.Context()))
			require.Eventually(t, func() bool { return len(heard(n2, holds)) == 1 }, waitFor, tick)
			require.Equal(t, []byte{0b11}, heard(n2, holds)[0].Have)
			s := open(t, second, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
			lost := 0
			if kill {
				lost = 1
				require.Eventually(t, func() bool { // it is verified, and found out
					all := heard(n2, holds)
					return all[len(all)-1].Have[0]&0b10 == 0
				}, waitFor, tick)
				n2.send(api.Down{Assign: []api.Assign{{Transfer: 99, Task: 1, First: 1, Count: 1}}})
			}
			got, err := io.ReadAll(s)
			require.NoError(t, err)
			require.Equal(t, b.bytes, got)
			require.Equal(t, len(b.bytes)/2+lost*int(b.layout.PieceSize), second.metric(t, "damselfly_received_bytes_total", sourceSupernode))
			require.Eventually(t, func() bool { return complete(second, b) }, waitFor, tick)
		})
	}
}

// Without a supernode a complete content is given to whom the registry would
// give it, and to nobody else.
func TestContentWithoutSession(t *testing.T) {
	b := newBlob(1 << 20)
	no := &RefusedError{Status: 403, Body: []byte("not you")}
	down := errors.New("no route to the registry")
	for name, c := range map[string]struct {
		public []string
		up     *upstream
		asked  int
		err    error
	}{
		"public":             {[]string{"r.example/a/b"}, &upstream{err: down}, 0, nil},
		"public elsewhere":   {[]string{"r.example/other"}, &upstream{err: no}, 1, no},
		"private, refused":   {nil, &upstream{err: no}, 1, no},
		"private, no answer": {nil, &upstream{err: down}, 1, down},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
			fill(t, h, b, b.layout.Count(), c.public...)
			got, err := get(t, h, Request{b.id, registryOrigin(), c.up}, 5, -1)
			require.ErrorIs(t, err, c.err)
			require.Len(t, c.up.opened(), c.asked)
			if c.err == nil {
				require.Equal(t, b.bytes[5:], got)
				require.Equal(t, len(got), h.metric(t, "damselfly_received_bytes_total", sourceStore))
			}
		})
	}
	t.Run("private, and a server that says it has it", func(t *testing.T) {
		h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
		fill(t, h, b, b.layout.Count())
		up := &upstream{bytes: []byte("its own bytes")}
		_, err := get(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
		require.ErrorIs(t, err, errWrongOrigin)
	})
	t.Run("incomplete", func(t *testing.T) {
		h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
		fill(t, h, b, 2)
		up := &upstream{bytes: b.bytes}
		got, err := get(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)
		require.Equal(t, []int64{0}, up.opened())
	})
	t.Run("unreadable", func(t *testing.T) {
		h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
		fill(t, h, b, b.layout.Count(), "r.example/a/b")
		up := &upstream{bytes: b.bytes}
		s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
		require.NoError(t, h.store.Remove(b.id))
		var got bytes.Buffer
		_, err := s.WriteTo(&got)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got.Bytes())
	})
}

// fill puts the first n pieces of b into the host's store.
func fill(t *testing.T, h *host, b *blob, n int, public ...string) {
	t.Helper()
	c, err := h.store.Create(pieces.Meta{ID: b.id, Layout: b.layout})
	require.NoError(t, err)
	defer c.Release()
	for i := range n {
		_, err := c.Make(i, bytes.NewReader(b.piece(i)))
		require.NoError(t, err)
	}
	if n == b.layout.Count() {
		require.NoError(t, c.SetComplete())
		for _, name := range public {
			require.NoError(t, c.AddPublic(name))
		}
	}
}

func TestFullDisk(t *testing.T) {
	b := newBlob(1 << 20)
	node := func(t *testing.T, on func(*fakeNode, api.Up)) (*fakeNode, PeerConfig) {
		t.Helper()
		n := newFakeNode(t, on)
		n.routes.HandleFunc(api.ContentPath(b.id), content(b))
		srv := httptest.NewServer(n.routes)
		t.Cleanup(srv.Close)
		return n, PeerConfig{Supernodes: []string{srv.URL}}
	}
	t.Run("no room below the quota", func(t *testing.T) {
		n, cfg := node(t, serving(b, ""))
		h := newHost(t, t.TempDir(), cfg, 1<<19, nil)
		require.NoError(t, h.Ready(t.Context()))
		up := &upstream{bytes: b.bytes}
		got, err := get(t, h, Request{b.id, registryOrigin(), up}, 3, -1)
		require.NoError(t, err)
		require.Equal(t, b.bytes[3:], got)
		require.Equal(t, []int64{3}, up.opened())
		require.Equal(t, 1, h.metric(t, "damselfly_fallbacks_total", causeStore))
		require.Eventually(t, func() bool { return len(heard(n, leaves)) == 1 }, waitFor, tick)
	})
	t.Run("the disk takes no more", func(t *testing.T) {
		n, cfg := node(t, half(b))
		dir := t.TempDir()
		h := newHost(t, dir, cfg, 0, nil)
		require.NoError(t, h.Ready(t.Context()))
		c, err := h.store.Create(pieces.Meta{ID: b.id, Layout: b.layout})
		require.NoError(t, err)
		defer c.Release()
		name := filepath.Join(dir, strings.Replace(string(b.id), ":", "-", 1), "content")
		require.NoError(t, os.Remove(name)) // and nothing can be written there
		up := &upstream{bytes: b.bytes}
		began := time.Now()
		got, err := get(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)
		require.Less(t, time.Since(began), 2*time.Second)
		require.Equal(t, 1, h.metric(t, "damselfly_fallbacks_total", causeStore))
		require.Eventually(t, func() bool { return len(heard(n, leaves)) == 1 }, waitFor, tick)
		require.Equal(t, api.Local, heard(n, faileds)[0].Why)
	})
}

func TestEvictionIsTold(t *testing.T) {
	a, b := newBlob(1<<20), newBlob(1<<20+1)
	both := func(n *fakeNode, up api.Up) {
		for _, x := range []*blob{a, b} {
			for _, j := range up.Join {
				if j.Task == string(x.id) {
					n.send(api.Down{Task: []api.Task{n.grant(j, x)}, Digests: []api.Digests{digestsOf(x)}, Assign: []api.Assign{
						{Transfer: j.Seq, Task: 1, Count: x.layout.Count()},
					}})
				}
			}
		}
	}
	n := newFakeNode(t, both)
	for _, x := range []*blob{a, b} {
		n.routes.HandleFunc(api.ContentPath(x.id), content(x))
	}
	srv := httptest.NewServer(n.routes)
	defer srv.Close()
	h := newHost(t, t.TempDir(), PeerConfig{Supernodes: []string{srv.URL}}, 3<<19, nil)
	require.NoError(t, h.Ready(t.Context()))
	for _, x := range []*blob{a, b, a} {
		got, err := get(t, h, Request{x.id, registryOrigin(), &upstream{}}, 0, -1)
		require.NoError(t, err)
		require.True(t, bytes.Equal(x.bytes, got))
		require.Eventually(t, func() bool { return complete(h, x) && idle(h) }, waitFor, tick)
	}
	require.Eventually(t, func() bool { return len(heard(n, leaves)) == 2 }, waitFor, tick)
	require.Equal(t, []api.Leave{{Task: string(a.id)}, {Task: string(b.id)}}, heard(n, leaves))
}

// Of a URL's content nobody can tell whether the origin still has that version.
func TestDroppedURLIsNotMixed(t *testing.T) {
	b := newBlob(1 << 20)
	b.id = pieces.URLTaskID("http://o.example/f")
	n, h := loopback(t, PeerConfig{}, half(b), b)
	up := &upstream{bytes: b.bytes}
	s := open(t, h, Request{b.id, api.Origin{URL: "http://o.example/f"}, up}, 0, -1)
	_, err := io.CopyN(io.Discard, struct{ io.Reader }{s}, 10)
	require.NoError(t, err)
	n.send(api.Down{Invalidate: []api.Invalidate{{Task: string(b.id)}}})
	_, err = io.ReadAll(s)
	require.ErrorIs(t, err, errDropped)
	require.Empty(t, up.opened())
	_, err = h.store.Get(b.id)
	require.ErrorIs(t, err, pieces.ErrNotFound)
}

func TestCancelledTransferIsNotReported(t *testing.T) {
	b := newBlob(1 << 10)
	asked, gone := make(chan struct{}), make(chan struct{})
	parent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done()
		close(gone)
	}))
	defer parent.Close()
	n, h := loopback(t, PeerConfig{}, serving(b, addr(parent)), b)
	go func() {
		<-asked
		n.send(api.Down{Cancel: []uint64{1}})
		<-gone
		n.send(api.Down{Assign: []api.Assign{{Transfer: 2, Task: 1, Count: 1}}})
	}()
	got, err := get(t, h, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
	require.NoError(t, err)
	require.Equal(t, b.bytes, got)
	require.Eventually(t, func() bool { return len(heard(n, dones)) == 1 }, waitFor, tick)
	require.Empty(t, heard(n, faileds))
	require.Eventually(t, func() bool { return h.metric(t, "damselfly_transfers_total", resultCancelled) == 1 }, waitFor, tick)
}

func TestTooManyTransfers(t *testing.T) {
	b := newBlob(8 << 20)
	hold := make(chan struct{})
	parent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-hold
		content(b)(w, r)
	}))
	defer parent.Close()
	n, h := loopback(t, PeerConfig{DownLanes: 2}, func(n *fakeNode, up api.Up) {
		for _, j := range up.Join {
			d := api.Down{Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{digestsOf(b)}}
			for i := range b.layout.Count() {
				d.Assign = append(d.Assign, api.Assign{Transfer: uint64(i + 1), Task: 1, First: i, Count: 1, Parent: addr(parent)})
			}
			n.send(d)
		}
	}, b)
	ctx, cancel := context.WithCancel(t.Context())
	opened := make(chan struct{})
	go func() {
		defer close(opened)
		if s, err := h.Open(ctx, Request{b.id, registryOrigin(), &upstream{}}, 0, -1); err == nil {
			_ = s.Close()
		}
	}()
	require.Eventually(t, func() bool {
		f := heard(n, faileds)
		return len(f) >= b.layout.Count()-6 && f[0].Why == api.Busy && f[0].RetryMS > 0
	}, waitFor, tick)
	close(hold)
	cancel()
	<-opened
	require.Eventually(t, func() bool {
		return len(heard(n, faileds))+len(heard(n, dones)) == b.layout.Count()
	}, waitFor, tick)
	require.LessOrEqual(t, len(heard(n, dones)), 6)
}

func TestHandler(t *testing.T) {
	b, whole := newBlob(1<<20), newBlob(1000)
	n, h := loopback(t, PeerConfig{UpLanes: 1}, nil, nil)
	fill(t, h, b, 3)
	fill(t, h, whole, 1)
	_, forged, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	sign := func(key ed25519.PrivateKey, id pieces.TaskID, life time.Duration) string {
		s, err := api.SignTicket(key, api.Ticket{Task: string(id), Expires: time.Now().Add(life).Unix()})
		require.NoError(t, err)
		return s
	}
	good := n.ticket(b.id)
	last := b.layout.Offset(3) - 1
	remote := "127.0.0.1:1"
	ask := func(method, path, ticket, span string) *httptest.ResponseRecorder {
		r := httptest.NewRequestWithContext(t.Context(), method, path, nil)
		r.RemoteAddr = remote
		r.Header.Set(api.TicketHeader, ticket)
		if span != "" {
			r.Header.Set("Range", span)
		}
		w := httptest.NewRecorder()
		h.Handler().ServeHTTP(w, r)
		return w
	}
	path := api.ContentPath(b.id)
	for _, c := range []struct {
		name, method, path, ticket, span string
		status                           int
	}{
		{"a run", "GET", path, good, "bytes=5-" + itoa(int(last)), 206},
		{"again", "GET", path, good, "bytes=0-0", 206},
		{"head", "HEAD", path, good, "bytes=0-9", 206},
		{"all of it", "GET", path, good, "", 404},
		{"a piece that is not there", "GET", path, good, "bytes=0-" + itoa(int(last)+1), 404},
		{"another task", "GET", api.ContentPath(newBlob(1).id), n.ticket(newBlob(1).id), "", 404},
		{"no task", "GET", api.ContentPath("sha256:totallywrong"), good, "", 400},
		{"no ticket", "GET", path, "", "bytes=0-0", 401},
		{"forged", "GET", path, sign(forged, b.id, time.Hour), "bytes=0-0", 401},
		{"expired", "GET", path, sign(n.key, b.id, -time.Second), "bytes=0-0", 401},
		{"ticket of another", "GET", path, n.ticket(newBlob(1).id), "bytes=0-0", 401},
		{"a good one elsewhere", "GET", api.ContentPath(newBlob(1).id), good, "bytes=0-0", 401},
		{"past the end", "GET", path, good, "bytes=1048576-", 416},
		{"two ranges", "HEAD", api.ContentPath(whole.id), n.ticket(whole.id), "bytes=0-1,4-5", 200},
		{"suffix", "HEAD", api.ContentPath(whole.id), n.ticket(whole.id), "bytes=-5", 206},
		{"post", "POST", path, good, "bytes=0-0", 405},
		{"elsewhere", "GET", "/v1/tasks", good, "", 404},
	} {
		w := ask(c.method, c.path, c.ticket, c.span)
		require.Equal(t, c.status, w.Code, c.name)
		if c.status == http.StatusPartialContent && c.method == "GET" {
			part, _, ok := httprange.ParseContent(w.Header().Get("Content-Range"))
			require.True(t, ok)
			require.Equal(t, b.bytes[part.Offset:int(part.Offset)+w.Body.Len()], w.Body.Bytes())
			require.Equal(t, itoa(w.Body.Len()), w.Header().Get("Content-Length"))
		}
	}
	require.Equal(t, int(last)-5+1+1, h.metric(t, "damselfly_sent_bytes_total", ""))

	for range cap(h.slots) {
		h.slots <- struct{}{}
	}
	w := ask("GET", path, good, "bytes=0-0")
	require.Equal(t, http.StatusServiceUnavailable, w.Code)
	require.Equal(t, api.CodeBusy, w.Header().Get(api.ErrorHeader))
	require.NotEmpty(t, w.Header().Get(api.RetryHeader))
	<-h.slots
	require.Equal(t, http.StatusPartialContent, ask("GET", path, good, "bytes=0-0").Code)

	remote = "192.0.2.1:1"
	w = ask("GET", path, good, "bytes=0-0")
	require.Equal(t, http.StatusUnauthorized, w.Code, "in clear")
	require.Contains(t, w.Body.String(), "turn TLS on")
	public, err := api.SignTicket(n.key, api.Ticket{Task: string(b.id), Public: true, Expires: time.Now().Add(time.Hour).Unix()})
	require.NoError(t, err)
	require.Equal(t, http.StatusPartialContent, ask("GET", path, public, "bytes=0-0").Code)
	remote = "127.0.0.1:1"

	next, after := forged, n.key
	h.tickets.learn([]ed25519.PublicKey{next.Public().(ed25519.PublicKey)})
	require.Equal(t, http.StatusPartialContent, ask("GET", path, good, "bytes=0-0").Code, "that of the last supernode")
	h.tickets.learn([]ed25519.PublicKey{ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)})
	require.Equal(t, http.StatusUnauthorized, ask("GET", path, sign(after, b.id, time.Hour), "bytes=0-0").Code)
	require.Equal(t, http.StatusUnauthorized, ask("GET", path, good, "bytes=0-0").Code)
}

// Two peers and the session between them and a supernode: pieces pass from one
// store to the next through Handler.
func TestPeerServesPeer(t *testing.T) {
	b := newBlob(2<<20 + 1)
	n, seed := loopback(t, PeerConfig{}, nil, nil)
	fill(t, seed, b, b.layout.Count())
	srv := httptest.NewServer(seed.Handler())
	defer srv.Close()
	n.does(serving(b, addr(srv)))
	cfg := PeerConfig{Supernodes: seed.cfg.Supernodes}
	h := newHost(t, t.TempDir(), cfg, 0, nil)
	require.NoError(t, h.Ready(t.Context()))
	got, err := get(t, h, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
	require.NoError(t, err)
	require.Equal(t, b.bytes, got)
	require.Equal(t, len(b.bytes), h.metric(t, "damselfly_received_bytes_total", sourcePeer))
	require.Equal(t, len(b.bytes), seed.metric(t, "damselfly_sent_bytes_total", ""))
}

func TestTicketIsRenewed(t *testing.T) {
	b := newBlob(1 << 10)
	shown := make(chan string, 2)
	parent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shown <- r.Header.Get(api.TicketHeader)
		content(b)(w, r)
	}))
	defer parent.Close()
	_, h := loopback(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
		for _, j := range up.Join {
			renewed := n.grant(j, b)
			renewed.Seq, renewed.Ticket = 0, "renewed"
			n.send(api.Down{Task: []api.Task{n.grant(j, b), renewed}, Digests: []api.Digests{digestsOf(b)}, Assign: []api.Assign{
				{Transfer: 1, Task: 1, Count: 1, Parent: addr(parent)},
			}})
		}
	}, b)
	_, err := get(t, h, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
	require.NoError(t, err)
	require.Equal(t, "renewed", <-shown)
}

func TestHugeHeaderIsNotSent(t *testing.T) {
	b := newBlob(10)
	n, h := loopback(t, PeerConfig{}, serving(b, ""), b)
	got, err := get(t, h, Request{b.id, registryOrigin(strings.Repeat("x", 2*maxHeader)), &upstream{bytes: b.bytes}}, 0, -1)
	require.NoError(t, err)
	require.Equal(t, b.bytes, got)
	require.Empty(t, heard(n, joins))
	_, ok := h.Supernode()
	require.True(t, ok)
}

func TestWrongSupernodes(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"no supernode": http.NotFound,
		"other version": func(w http.ResponseWriter, r *http.Request) {
			c, err := api.Accept(w, r)
			if err != nil {
				return
			}
			defer c.CloseNow()
			_, _ = c.Read(r.Context())
			_ = c.Write(r.Context(), api.Down{Welcome: &api.Welcome{Version: api.Version + 1, Keys: [][]byte{make([]byte, 32)}}})
			_, _ = c.Read(r.Context())
		},
		"no key": func(w http.ResponseWriter, r *http.Request) {
			c, err := api.Accept(w, r)
			if err != nil {
				return
			}
			defer c.CloseNow()
			_, _ = c.Read(r.Context())
			_ = c.Write(r.Context(), api.Down{Welcome: &api.Welcome{Version: api.Version}})
			_, _ = c.Read(r.Context())
		},
	} {
		t.Run(name, func(t *testing.T) {
			bad := httptest.NewServer(handler)
			defer bad.Close()
			good := httptest.NewServer(newFakeNode(t, nil).routes)
			defer good.Close()
			h := newHost(t, t.TempDir(), PeerConfig{Supernodes: []string{bad.URL, good.URL}}, 0, nil)
			require.NoError(t, h.Ready(t.Context()))
			base, _ := h.Supernode()
			require.Equal(t, good.URL, base)
		})
	}
}

// Before the first certificate nothing is warned of here, so that what fails after it is.
func TestSessionAwaitsCertificate(t *testing.T) {
	ca, err := identity.CreateCA(t.TempDir())
	require.NoError(t, err)
	token, err := ca.AddToken(0)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte(token.Text()), 0o600))
	store, err := pieces.OpenStore(t.TempDir(), pieces.StoreConfig{})
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		cfg := PeerConfig{Supernodes: []string{"https://127.0.0.1:1"}}
		cfg.Identity, err = identity.ForHost("", file, t.TempDir(), cfg.Supernodes, zap.New(core))
		require.NoError(t, err)
		p, err := NewPeer(cfg, store, zap.New(core), prometheus.NewRegistry())
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // nobody asks for the certificate meanwhile
		defer cancel()
		require.Error(t, p.keepSession(ctx))
		require.Empty(t, logs.All())
	})
}

func TestWrongConfig(t *testing.T) {
	store, err := pieces.OpenStore(t.TempDir(), pieces.StoreConfig{})
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	for says, cfg := range map[string]PeerConfig{
		"supernode":    {Supernodes: []string{"10.0.0.1:8002"}},
		"host:port":    {Advertise: "10.0.0.1"},
		"at most 64":   {Host: strings.Repeat("h", 65)},
		"-1 lanes":     {UpLanes: -1},
		"100000 lanes": {DownLanes: 100000},
	} {
		_, err := NewPeer(cfg, store, zaptest.NewLogger(t), prometheus.NewRegistry())
		require.ErrorContains(t, err, says)
	}
	reg := prometheus.NewRegistry()
	one, err := NewPeer(PeerConfig{}, store, zaptest.NewLogger(t), reg)
	require.NoError(t, err)
	_, err = NewPeer(PeerConfig{}, store, zaptest.NewLogger(t), reg)
	require.ErrorContains(t, err, "metrics")
	require.NoError(t, os.WriteFile(filepath.Join(store.Dir(), hostFile), bytes.Repeat([]byte("x"), 1000), 0o600))
	two, err := NewPeer(PeerConfig{}, store, zaptest.NewLogger(t), prometheus.NewRegistry())
	require.NoError(t, err)
	require.NotEqual(t, one.cfg.Host, two.cfg.Host)
}

// Many streams of many tasks against a session that comes and goes: all bytes
// are right, and nothing is left.
func TestChaos(t *testing.T) {
	blobs := []*blob{newBlob(1 << 20), newBlob(700_000), newBlob(100)}
	var mu sync.Mutex
	next := uint64(0)
	n, h := loopback(t, PeerConfig{}, nil, nil)
	n.does(func(n *fakeNode, up api.Up) {
		mu.Lock()
		defer mu.Unlock()
		for _, j := range up.Join {
			for i, b := range blobs {
				if string(b.id) != j.Task {
					continue
				}
				g, d := n.grant(j, b), digestsOf(b)
				g.Num, d.Task = int32(i+1), int32(i+1)
				next++
				n.send(api.Down{Task: []api.Task{g}, Digests: []api.Digests{d}, Assign: []api.Assign{
					{Transfer: next, Task: g.Num, Count: b.layout.Count()},
				}})
				if next%5 == 0 {
					n.hang()
				}
				if next%7 == 0 {
					n.send(api.Down{Invalidate: []api.Invalidate{{Task: j.Task}}})
				}
			}
		}
	})
	for _, b := range blobs {
		n.routes.HandleFunc(api.ContentPath(b.id), content(b))
	}
	var group errgroup.Group
	for i := range 6 {
		group.Go(func() error {
			for k := range 10 {
				b := blobs[(i+k)%len(blobs)]
				got, err := get(t, h, Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}, 0, -1)
				if errors.Is(err, errDropped) {
					continue // what it had given might have been wrong
				}
				if err != nil {
					return err
				}
				if !bytes.Equal(got, b.bytes) {
					return errors.New("other bytes")
				}
			}
			return nil
		})
	}
	require.NoError(t, group.Wait())
	h.stop()
	require.True(t, idle(h))
}

// What is in the store reaches a connection as files do, by sendfile.
func TestStoreIsSentAsAFile(t *testing.T) {
	b := newBlob(2 << 20)
	h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
	fill(t, h, b, b.layout.Count(), "r.example/a/b")
	s := open(t, h, Request{b.id, registryOrigin(), &upstream{}}, 1, -1)
	var w fileTaker
	n, err := io.Copy(&w, s)
	require.NoError(t, err)
	require.EqualValues(t, len(b.bytes)-1, n)
	require.Equal(t, b.bytes[1:], w.Bytes())
}

// fileTaker takes nothing but ranges of files.
type fileTaker struct{ bytes.Buffer }

func (w *fileTaker) ReadFrom(r io.Reader) (int64, error) {
	if part, ok := r.(*io.LimitedReader); ok {
		if _, ok := part.R.(*os.File); ok {
			return w.Buffer.ReadFrom(r)
		}
	}
	return 0, errors.New("no range of a file")
}
