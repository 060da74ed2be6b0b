package dfget

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/httprange"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// assigning grants b and assigns what is wanted of it, from the node itself.
func assigning(b *blob) func(*fakeNode, api.Up) {
	transfer := uint64(0)
	return func(n *fakeNode, up api.Up) {
		for _, j := range up.Join {
			n.send(api.Down{Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{digestsOf(b)}})
		}
		for _, w := range up.Want {
			for _, r := range w.Runs(b.layout.Count()) {
				transfer++
				n.send(api.Down{Assign: []api.Assign{{Transfer: transfer, Task: 1, First: r.First, Count: r.Count}}})
			}
		}
	}
}

// alive lets time pass on a session that stands.
func alive(t *testing.T, n *fakeNode, d time.Duration) {
	t.Helper()
	for ; d > 0; d -= time.Second {
		pause(t, time.Second)
		n.send(api.Down{})
	}
	synctest.Wait()
}

// Ranges join lazily and want their own pieces, also those that follow, and a
// minute after the last reader the host has no part in the task but what it holds.
func TestLazyRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(64 << 20)
		_, n, h := bubble(t, PeerConfig{Background: -1}, assigning(b), b)
		req := Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}
		for range 2 {
			for _, off := range []int64{5, b.layout.Offset(7) - 10, int64(len(b.bytes)) - 50} {
				got, err := get(t, h, req, off, 50)
				require.NoError(t, err)
				require.Equal(t, b.bytes[off:off+50], got)
			}
		}
		last := b.layout.Count() - 1
		require.Equal(t, []api.Want{
			{Task: 1, First: 0, Count: 1}, {Task: 1, First: 6, Count: 2}, {Task: 1, First: last, Count: 1},
		}, heard(n, wants), "each piece is asked for once")
		for _, j := range heard(n, joins) {
			require.True(t, j.Lazy)
		}
		require.Empty(t, heard(n, holds), "what is known is not said again")

		got, err := get(t, h, req, b.layout.Offset(8), 100*b.layout.PieceSize)
		require.NoError(t, err)
		require.Equal(t, b.bytes[b.layout.Offset(8):b.layout.Offset(108)], got)
		ws := heard(n, wants)[3:]
		require.Equal(t, api.Want{Task: 1, First: 8, Count: lazyRun}, ws[0])
		require.Greater(t, len(ws), 1, "the next are asked for before their reader waits")

		require.Empty(t, heard(n, leaves))
		alive(t, n, restAfter+time.Second)
		require.Len(t, heard(n, leaves), 1)
		require.Len(t, heard(n, holds), 1)
		h.mu.Lock()
		require.Empty(t, h.tasks)
		h.mu.Unlock()
		_, err = get(t, h, req, 5, 50)
		require.NoError(t, err)
		require.Zero(t, h.metric(t, "damselfly_fallbacks_total", ""))
	})
}

// A reader that goes away wants nothing any more.
func TestLazyReaderGoesAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(8 << 20)
		_, n, h := bubble(t, PeerConfig{Background: -1}, func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				n.send(api.Down{Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{digestsOf(b)}})
			}
		}, b)
		req := Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			_, err := h.Open(ctx, req, 1<<20, 100)
			ended <- err
		}()
		synctest.Wait()
		require.Equal(t, []api.Want{{Task: 1, First: 4, Count: 1}}, heard(n, wants))
		cancel()
		require.ErrorIs(t, <-ended, context.Canceled)
		synctest.Wait()
		require.Equal(t, api.Want{Task: 1}, heard(n, wants)[1])
	})
}

// Who reads several ranges asks for all of them at once.
func TestSeveralSpansAreWantedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(64 << 20)
		_, n, h := bubble(t, PeerConfig{Background: -1}, assigning(b), b)
		req := Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}
		first, err := h.Open(t.Context(), req, 0, 0)
		require.NoError(t, err)
		last := b.layout.Count() - 1
		spans := []httprange.Range{{Offset: int64(len(b.bytes)) - 50, Length: 50}, {Offset: 5, Length: 50}, {Offset: b.layout.Offset(7) - 10, Length: 50}, {Offset: 9}}
		require.True(t, first.Want(spans))
		synctest.Wait()
		asked := []api.Want{{Task: 1, First: 0, Count: 1, More: []api.Run{{First: 6, Count: 2}, {First: last, Count: 1}}}}
		require.Equal(t, asked, heard(n, wants))
		for _, s := range spans {
			got, err := get(t, h, req, s.Offset, s.Length)
			require.NoError(t, err)
			require.Equal(t, b.bytes[s.Offset:s.Offset+s.Length], got)
		}
		require.NoError(t, first.Close())
		synctest.Wait()
		require.Equal(t, asked, heard(n, wants), "and not again")
	})
	h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
	b := newBlob(1 << 20)
	s := open(t, h, Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}, 0, 0)
	require.False(t, s.Want([]httprange.Range{{Length: 1}}), "there is no region")
}

// The rest is wanted after a while, or by a whole reader at once.
func TestLazyTasksBecomeWhole(t *testing.T) {
	for name, read := range map[string]func(t *testing.T, n *fakeNode, h *host, r Request){
		"later": func(t *testing.T, n *fakeNode, _ *host, _ Request) {
			t.Helper()
			alive(t, n, 6*time.Second)
		},
		"all by a range": func(t *testing.T, _ *fakeNode, h *host, r Request) {
			t.Helper()
			s, err := h.Open(t.Context(), r, 0, 8<<20)
			require.NoError(t, err)
			require.NoError(t, s.Close())
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBlob(8 << 20)
				_, n, h := bubble(t, PeerConfig{Background: 5 * time.Second}, assigning(b), b)
				req := Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}
				_, err := get(t, h, req, 5, 50)
				require.NoError(t, err)
				require.False(t, heard(n, wants)[0].All)
				read(t, n, h, req)
				synctest.Wait()
				require.True(t, slices.ContainsFunc(heard(n, wants), func(w api.Want) bool { return w.All }))
			})
		})
	}
}

// What came by ranges is not complete before the host has found the whole right.
func TestSparseContentIsVerified(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(1 << 20)
		b.id = "sha256:" + pieces.TaskID(strings.Repeat("0", 64))
		_, n, h := bubble(t, PeerConfig{Background: -1}, func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				k := n.grant(j, b)
				k.Sparse = true
				n.send(api.Down{Task: []api.Task{k}, Digests: []api.Digests{digestsOf(b)}})
				n.send(api.Down{Assign: []api.Assign{{Transfer: 1, Task: 1, Count: b.layout.Count()}}})
			}
		}, b)
		_, _ = get(t, h, Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}, 5, 50)
		synctest.Wait()
		require.NotEmpty(t, heard(n, dones))
		_, err := h.store.Get(b.id)
		require.ErrorIs(t, err, pieces.ErrNotFound)
	})
}
