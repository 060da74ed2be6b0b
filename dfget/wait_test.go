package dfget

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/supernode/api"
)

// noLonger is how long no reader is to wait for a byte, whatever the region does.
const noLonger = 10 * time.Second

// hiccup is an origin of which the first answer takes as long as one does whose
// first connection is dead.
type hiccup struct {
	*upstream
	asked atomic.Int32
}

func (u *hiccup) Open(ctx context.Context, off int64) (io.ReadCloser, int64, error) {
	if u.asked.Add(1) == 1 {
		select {
		case <-time.After(3700 * time.Millisecond):
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
	return u.upstream.Open(ctx, off)
}

// paced reads all and returns the longest time without a byte.
func paced(t *testing.T, h *host, r Request) (gap time.Duration, got []byte) {
	t.Helper()
	last := time.Now()
	moved := func() { gap, last = max(gap, time.Since(last)), time.Now() }
	s, err := h.Open(t.Context(), r, 0, -1)
	require.NoError(t, err)
	defer func() { _ = s.Close() }()
	buf := make([]byte, 32<<10)
	for {
		n, err := s.Read(buf)
		moved()
		got = append(got, buf[:n]...)
		if errors.Is(err, io.EOF) {
			return gap, got
		}
		require.NoError(t, err)
	}
}

// dribble sends body at so many bytes a second.
func dribble(ctx context.Context, w io.Writer, body []byte, rate int) {
	for len(body) > 0 {
		n := min(rate/10, len(body))
		if _, err := w.Write(body[:n]); err != nil {
			return
		}
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		body = body[n:]
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
}

// Whatever the supernode and the parents do, and with an origin that hangs at
// first as well, a reader waits for ten seconds at the most.
func TestNoReaderWaitsTenSeconds(t *testing.T) {
	b := newBlob(1<<20 + 5)
	at := func(d time.Duration, then func(n *fakeNode, j api.Join)) func(*fakeNode, api.Up) {
		return func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				go func() { pause(n.t, d); then(n, j) }()
			}
		}
	}
	grant := func(n *fakeNode, j api.Join) {
		n.send(api.Down{Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{digestsOf(b)}})
	}
	assigns := func(count int) func(n *fakeNode, j api.Join) {
		return func(n *fakeNode, j api.Join) {
			grant(n, j)
			n.send(api.Down{Assign: []api.Assign{{Transfer: 1, Task: 1, Count: count, Parent: "bad:80"}}})
		}
	}
	drip := func(from int) http.HandlerFunc {
		return parent(b, func(w http.ResponseWriter, r *http.Request, body []byte) {
			header(w, r, b, len(body))
			_, _ = w.Write(body[:from])
			_ = http.NewResponseController(w).Flush()
			dribble(r.Context(), w, body[from:], 20_000)
		})
	}
	third := int(b.layout.Offset(3))
	for name, c := range map[string]struct {
		on   func(*fakeNode, api.Up)
		from http.HandlerFunc
	}{
		"says nothing":                   {on: at(time.Hour, grant)},
		"grants late, then says nothing": {on: at(4900*time.Millisecond, grant)},
		"drips from the beginning":       {on: at(0, assigns(5)), from: drip(0)},
		"drips in the middle":            {on: at(0, assigns(5)), from: drip(third + 1000)},
		"drips at a piece's end":         {on: at(0, assigns(5)), from: drip(third - 5)},
		"gives one piece, then nothing":  {on: at(0, assigns(1)), from: content(b)},
		"gives pieces, but not the first": {on: at(0, func(n *fakeNode, j api.Join) {
			grant(n, j)
			for i := 1; i < 5; i++ {
				n.send(api.Down{Assign: []api.Assign{{Transfer: uint64(i), Task: 1, First: i, Count: 1, Parent: "bad:80"}}})
				pause(n.t, 2*time.Second)
			}
		}), from: content(b)},
		"drips and ends its session": {on: at(0, func(n *fakeNode, j api.Join) {
			assigns(5)(n, j)
			pause(n.t, 3*time.Second)
			n.hang()
		}), from: drip(0)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net, _, h := bubble(t, PeerConfig{}, c.on, nil)
				if c.from != nil {
					net.serve(t, "bad", c.from)
				}
				up := &hiccup{upstream: &upstream{bytes: b.bytes}}
				gap, got := paced(t, h, Request{b.id, registryOrigin(), up})
				require.True(t, bytes.Equal(b.bytes, got))
				require.LessOrEqual(t, gap, noLonger)
				t.Log("longest wait", gap)
			})
		})
	}
}

// Who says that it waits for the origin is waited for a little longer: the origin would
// answer another request no sooner.
func TestAskingIsWaitedFor(t *testing.T) {
	for answer, cause := range map[time.Duration]string{7 * time.Second: "", 9 * time.Second: causeNoAnswer} {
		t.Run(fmt.Sprint(answer), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBlob(100)
				serve := serving(b, "node:80")
				_, _, h := bubble(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
					if len(up.Join) == 0 {
						serve(n, up)
						return
					}
					go func() {
						for range answer / time.Second {
							pause(n.t, time.Second)
							n.send(api.Down{Asking: []uint64{up.Join[0].Seq}})
						}
						serve(n, up)
					}()
				}, b)
				up := &upstream{bytes: b.bytes}
				began := time.Now()
				got, err := get(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
				require.NoError(t, err)
				require.Equal(t, b.bytes, got)
				if cause == "" {
					require.Empty(t, up.opened())
					return
				}
				require.InDelta(t, hopeLimit, time.Since(began), float64(100*time.Millisecond))
				require.Equal(t, 1, h.metric(t, "damselfly_fallbacks_total", cause))
			})
		})
	}
}

// What comes slowly and can be seen to come in time is waited for, what cannot is not.
func TestPaceOfATransfer(t *testing.T) {
	for rate, asked := range map[int]bool{40_000: false, 20_000: true} { // of pieces of 256 KiB
		synctest.Test(t, func(t *testing.T) {
			b := newBlob(256 << 10)
			net, _, h := bubble(t, PeerConfig{}, serving(b, "slow:80"), b)
			net.serve(t, "slow", parent(b, func(w http.ResponseWriter, r *http.Request, body []byte) {
				header(w, r, b, len(body))
				dribble(r.Context(), w, body, rate)
			}))
			up := &upstream{bytes: b.bytes}
			began := time.Now()
			got, err := get(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
			require.NoError(t, err)
			require.Equal(t, b.bytes, got)
			require.Equal(t, asked, len(up.opened()) > 0)
			if asked {
				require.InDelta(t, turnAfter, time.Since(began), float64(wantAfter+100*time.Millisecond))
			}
		})
	}
}

// What has come from the origin at last has its time to come from the supernode.
func TestSlowOriginIsNotAskedWhenItIsDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(1 << 20)
		_, n, h := bubble(t, PeerConfig{}, half(b), b)
		up := &upstream{bytes: b.bytes}
		s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
		go func() {
			for i := range 30 {
				n.send(api.Down{Progress: []api.Progress{{Task: 1, Fetched: b.layout.Offset(2) + int64(i)}}})
				pause(t, time.Second)
			}
			n.send(api.Down{Progress: []api.Progress{{Task: 1, Fetched: 1 << 20}}})
			pause(t, 3*time.Second)
			n.send(api.Down{Assign: []api.Assign{{Transfer: 2, Task: 1, First: 2, Count: 2}}})
		}()
		got, err := io.ReadAll(s)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)
		require.Empty(t, up.opened())
	})
}

// An origin's wrong bytes are not taken for the whole, alone or behind the region's.
func TestOriginOfWrongBytes(t *testing.T) {
	b := newBlob(1<<20 + 5)
	wrong := bytes.Clone(b.bytes)
	wrong[len(wrong)-100] ^= 1
	synctest.Test(t, func(t *testing.T) {
		_, _, h := bubble(t, PeerConfig{}, half(b), b)
		for _, req := range []Request{
			{b.id, registryOrigin(), &upstream{bytes: wrong}}, // the second half of it
			{newBlob(7).id, registryOrigin(), &upstream{bytes: wrong}},
			{newBlob(8).id, registryOrigin(), unsized{wrong, -1}},
			{newBlob(9).id, registryOrigin(), &upstream{}},
		} {
			_, err := get(t, h, req, 0, -1)
			require.ErrorIs(t, err, errWrongOrigin)
		}
		got, err := get(t, h, Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}, 0, -1)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)
		require.Equal(t, 4, h.metric(t, "damselfly_verify_failures_total", ""))
	})
}
