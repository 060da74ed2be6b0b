package dfget

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// giving answers every join with all of b.
func giving(b *blob) func(*fakeNode, api.Up) {
	return func(n *fakeNode, up api.Up) {
		for _, j := range up.Join {
			k := n.grant(j, b)
			k.Ticket, k.Digest, k.Data = "", pieces.AppendDigests(nil, b.digests...), b.bytes
			n.send(api.Down{Task: []api.Task{k}})
		}
	}
}

func likely(reqs ...Request) (l []Likely) {
	for _, r := range reqs {
		l = append(l, Likely{r, 20_000})
	}
	return l
}

func TestAhead(t *testing.T) {
	b := newBlob(20_000)
	ask := func(header ...string) (Request, *upstream) {
		up := &upstream{bytes: b.bytes}
		return Request{b.id, registryOrigin(header...), up}, up
	}
	mine, _ := ask("Bearer mine")
	read := func(t *testing.T, h *host, r Request) {
		t.Helper()
		got, err := get(t, h, r, 0, -1)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)
	}
	t.Run("is there when it is asked for", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, n, h := bubble(t, PeerConfig{}, giving(b), b)
			h.Ahead(likely(mine, mine))
			synctest.Wait()
			require.Len(t, heard(n, joins), 1)
			require.EqualValues(t, 20_000, heard(n, joins)[0].Size)
			read(t, h, mine)
			require.Len(t, heard(n, joins), 1, "it was joined before")
			read(t, h, mine)
			require.Len(t, heard(n, joins), 2, "it is given once")
			h.Ahead(likely(mine))
			synctest.Wait()
			require.Len(t, heard(n, joins), 2, "what the store has is left alone")
		})
	})
	t.Run("is nobody else's", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, n, h := bubble(t, PeerConfig{}, giving(b), b)
			h.Ahead(likely(mine))
			synctest.Wait()
			for i, header := range [][]string{{"Bearer other"}, nil} {
				r, _ := ask(header...)
				read(t, h, r)
				require.Len(t, heard(n, joins), 2+i)
			}
		})
	})
	t.Run("nobody comes for it", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, n, h := bubble(t, PeerConfig{}, giving(b), b)
			h.Ahead(likely(mine))
			pause(t, aheadLife+time.Second)
			require.True(t, idle(h))
			require.Empty(t, h.early)
			require.True(t, complete(h, b))
			read(t, h, mine)
			require.Len(t, heard(n, joins), 2)
		})
	})
	t.Run("is refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, n, h := bubble(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
				for _, j := range up.Join {
					n.send(api.Down{Refused: []api.Refused{{Seq: j.Seq, Status: 403, Final: true}}})
				}
			}, nil)
			h.Ahead(likely(mine))
			synctest.Wait()
			_, err := h.Open(t.Context(), mine, 0, -1)
			_, refused := errors.AsType[*RefusedError](err)
			require.True(t, refused, "%v", err)
			require.Len(t, heard(n, joins), 2)
		})
	})
	t.Run("does not come in time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, _, h := bubble(t, PeerConfig{}, func(*fakeNode, api.Up) {}, nil)
			r, up := ask()
			h.Ahead(likely(r))
			synctest.Wait()
			began := time.Now()
			read(t, h, r)
			require.LessOrEqual(t, time.Since(began), turnAfter)
			require.Equal(t, []int64{0}, up.opened(), "the origin is asked by who wants it")
		})
	})
	t.Run("is larger than it was said to be", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			large := newBlob(8 << 20)
			_, n, h := bubble(t, PeerConfig{Background: -1}, func(n *fakeNode, up api.Up) {
				for _, j := range up.Join {
					n.send(api.Down{Task: []api.Task{n.grant(j, large)}, Digests: []api.Digests{digestsOf(large)}})
				}
			}, large)
			r := Request{large.id, registryOrigin(), &upstream{bytes: large.bytes}}
			h.Ahead(likely(r))
			synctest.Wait()
			for _, j := range heard(n, joins) {
				require.True(t, j.Lazy, "all of it is wanted")
			}
			got, err := get(t, h, r, 0, -1)
			require.NoError(t, err)
			require.Equal(t, large.bytes, got)
			require.False(t, heard(n, joins)[1].Lazy)
			pause(t, aheadLife+time.Second)
			h.mu.Lock()
			defer h.mu.Unlock()
			require.Empty(t, h.early)
		})
	})
	t.Run("without a session", func(t *testing.T) {
		h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
		r, up := ask()
		h.Ahead(likely(r))
		require.Empty(t, up.opened())
		read(t, h, r)
	})
}
