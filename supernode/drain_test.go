package supernode

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/supernode/api"
)

// A supernode that is to end lets its hosts finish what they have begun, and takes
// nothing new.
func TestDrain(t *testing.T) {
	h := newHub(t)
	b := newBytes(8 << 20)
	d, other := h.blob(t, b), h.blob(t, newBytes(1<<20))
	r := start(t, h, t.TempDir(), func(c *Config) { c.DrainTimeout = time.Hour })
	host := dial(t, r, "one")
	host.lazy = true
	_, no := host.join(d, from(""))
	require.Nil(t, no)
	host.await("an assignment", func() bool { return len(host.assigns) > 0 })

	ended := make(chan struct{})
	go func() { r.stop(); close(ended) }()
	host.await("the word to go", func() bool { return host.drained })
	_, no = host.join(other, from(""))
	require.NotNil(t, no)
	require.False(t, no.Final, "the host is to ask elsewhere")
	for _, path := range []string{"/readyz", api.SessionPath, v2("blobs", d), v2("manifests", "v1")} {
		got := r.get(http.MethodGet, path)
		require.Equal(t, http.StatusServiceUnavailable, got.status, path)
		require.Equal(t, api.CodeUnavailable, got.header.Get(api.ErrorHeader), path)
	}
	select {
	case <-ended:
		t.Fatal("it did not wait for the host")
	default:
	}
	host.mu.Lock()
	host.lazy = false
	for _, a := range host.assigns {
		go host.follow(a, host.tasks[a.Task])
	}
	host.mu.Unlock()
	require.Equal(t, hexOf(b), hexOf(host.content(d)))
	<-ended
	<-host.gone
}

// What takes longer than the limit breaks off.
func TestDrainHasALimit(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(8<<20))
	r := start(t, h, t.TempDir(), func(c *Config) { c.DrainTimeout = time.Second })
	host := dial(t, r, "one")
	host.lazy = true
	_, no := host.join(d, from(""))
	require.Nil(t, no)
	r.stop()
	<-host.gone
	require.True(t, host.drained)
}
