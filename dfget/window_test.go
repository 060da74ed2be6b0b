package dfget

import (
	"bytes"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// A host that is told to look at a piece says when it has rotted.
func TestVerifyOnDemand(t *testing.T) {
	b := newBlob(1 << 20)
	n, h := loopback(t, PeerConfig{}, nil, nil)
	fill(t, h, b, b.layout.Count())
	name := filepath.Join(h.store.Dir(), strings.Replace(string(b.id), ":", "-", 1), "content")
	wrong := bytes.Clone(b.bytes)
	wrong[b.layout.Offset(3)] ^= 1
	require.NoError(t, os.WriteFile(name, wrong, 0o600))
	n.send(api.Down{Verify: []api.Verify{{Task: string(b.id), First: 2, Count: 2}, {Task: "nonsense", Count: 1}, {Task: string(b.id), First: -1, Count: 1 << 40}}})
	require.Eventually(t, func() bool {
		for _, hold := range heard(n, holds) {
			if have, err := pieces.ParseSet(b.layout.Count(), hold.Have); err == nil && !have.Has(3) && have.Has(2) {
				return true
			}
		}
		return false
	}, waitFor, tick)
}

// A content without room for all of it is asked for by runs, and all of it is
// read; what the store has dropped is not said to be there.
func TestWindow(t *testing.T) {
	b := newBlob(40 << 20)
	brought := pieces.NewSet(b.layout.Count())
	n := newFakeNode(t, func(n *fakeNode, up api.Up) {
		for _, j := range up.Join {
			n.send(api.Down{Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{digestsOf(b)}})
		}
		for _, w := range up.Want {
			for _, r := range w.Runs(b.layout.Count()) {
				for r.Count > 0 && !brought.Add(r.First) {
					r.First++
					r.Count--
				}
				for i := range r.Count {
					brought.Add(r.First + i)
				}
				if r.Count > 0 {
					n.send(api.Down{Assign: []api.Assign{{Transfer: uint64(r.First + 1), Task: w.Task, First: r.First, Count: r.Count}}})
				}
			}
		}
	})
	n.routes.HandleFunc(api.ContentPath(b.id), content(b))
	srv := httptest.NewServer(n.routes)
	defer srv.Close()
	h := newHost(t, t.TempDir(), PeerConfig{Supernodes: []string{srv.URL}}, 20<<20, nil)
	require.NoError(t, h.Ready(t.Context()))
	up := &upstream{bytes: b.bytes}
	s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
	got, err := io.ReadAll(s)
	require.NoError(t, err)
	require.True(t, bytes.Equal(b.bytes, got))
	require.Empty(t, up.opened())
	require.NotEmpty(t, heard(n, func(u api.Up) []api.Want {
		return slices.DeleteFunc(slices.Clone(u.Want), func(w api.Want) bool { return !w.Only })
	}))
	u := h.store.Usage()
	require.LessOrEqual(t, u.Reserved, int64(20<<20))
	require.Positive(t, u.Dropped)
	c, err := h.store.Get(b.id)
	require.NoError(t, err)
	defer c.Release()
	require.Eventually(t, func() bool {
		held := heard(n, holds)
		have := c.Have()
		return len(held) > 0 && bytes.Equal(held[len(held)-1].Have, have.Bytes())
	}, waitFor, tick)
}
