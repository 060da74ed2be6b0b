package supernode

import (
	"io"
	"log"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

func nullLogger() *log.Logger { return log.New(io.Discard, "", 0) }

func TestBlobFlowsFromRegistryToHosts(t *testing.T) {
	h := newHub(t)
	b := random(3<<20 + 100)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	one, two := dial(t, r, "one", true), dial(t, r, "two", true)
	for _, host := range []*host{one, two} {
		task, no := host.join(d, from(""))
		require.Nil(t, no)
		require.True(t, task.Public)
		require.EqualValues(t, len(b), task.Layout.Length)
	}
	require.Equal(t, hexOf(b), hexOf(one.content(d)))
	require.Equal(t, hexOf(b), hexOf(two.content(d)))
	require.Equal(t, 1, h.times("GET /v2/demo/app/blobs/"))
	require.Equal(t, len(b), r.metric("damselfly_origin_bytes_total"))
	require.Equal(t, len(b), r.metric("damselfly_unique_bytes_total"))
	got := r.get(http.MethodGet, v2("blobs", d))
	require.Equal(t, http.StatusOK, got.status)
	require.Equal(t, hexOf(b), hexOf(got.body))
	require.Equal(t, 1, h.times("GET /v2/demo/app/blobs/"))
}
