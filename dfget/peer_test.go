package dfget

import (
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPiecesComeFromParents(t *testing.T) {
	b := newBlob(3<<20 + 17)
	parents := []*httptest.Server{httptest.NewServer(content(b)), httptest.NewServer(content(b))}
	for _, p := range parents {
		t.Cleanup(p.Close)
	}
	n, h := loopback(t, PeerConfig{}, serving(b, addr(parents[0]), addr(parents[1])), b)
	up := &upstream{bytes: b.bytes}
	got, err := get(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
	require.NoError(t, err)
	require.Equal(t, b.bytes, got)
	require.Empty(t, up.opened())
	require.Eventually(t, func() bool { return len(heard(n, dones)) == b.layout.Count() }, waitFor, tick)
	require.Equal(t, len(b.bytes), h.metric(t, "received_bytes_total", sourcePeer))
	require.Eventually(t, func() bool {
		c, err := h.store.Get(b.id)
		if err != nil {
			return false
		}
		defer c.Release()
		return c.Complete() && c.Meta().Public[0] == "r.example/a/b"
	}, waitFor, tick)

	got, err = get(t, h, Request{b.id, registryOrigin(), up}, 100, 1<<20)
	require.NoError(t, err)
	require.Equal(t, b.bytes[100:100+1<<20], got)
	require.Equal(t, 1<<20, h.metric(t, "received_bytes_total", sourceStore))
	require.Len(t, heard(n, joins), 2)
}
