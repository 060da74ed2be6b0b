package region_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/stretchr/testify/require"

	"damselfly.dev/test/hostile"
)

// Whatever a host of the region does, the others have the right bytes, all of them, and
// the region asks the registry once.
func TestHostileHost(t *testing.T) {
	for _, way := range hostile.Ways {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			besideHostile(t, way)
		})
	}
}

func besideHostile(t *testing.T, way string) {
	t.Helper()
	o := newOrigin(t)
	img, err := random.Image(2<<20, 1)
	require.NoError(t, err)
	write(t, o.URL, img)
	o.set(func() { clear(o.gets); o.sent = 0 })
	ls, err := img.Layers()
	require.NoError(t, err)
	layer, err := ls[0].Digest()
	require.NoError(t, err)
	size, err := ls[0].Size()
	require.NoError(t, err)
	centre := startSupernode(t, o, t.TempDir(), "")

	transport := secure().transport()
	bad := &hostile.Host{
		Supernode: centre.url(), Client: &http.Client{Transport: transport}, Dial: (&net.Dialer{}).DialContext,
		Registry: registryName, Repository: "org/app", Digest: layer.String(), Size: size,
	}
	srv := httptest.NewUnstartedServer(bad.Serve(way))
	secure().begin(srv)
	bad.Addr = srv.Listener.Addr().String()
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan struct{})
	go func() { bad.Run(ctx, way); close(ended) }()
	t.Cleanup(func() {
		stop()
		srv.CloseClientConnections()
		srv.Close()
		<-ended
		transport.CloseIdleConnections()
	})
	if way != "frames" || secure() == nil { // which it begins in clear
		require.Eventually(t, func() bool { return bad.Told.Load() > 0 }, waitLimit, waitTick)
	}
	hosts := make([]*node, 3)
	for i := range hosts {
		hosts[i] = startHost(t, o, centre, nil)
	}
	pullAll(t, hosts, "org/app:v1")
	past := 0.0 // where this machine is so slow that hosts turn to the registry, as they should
	for _, h := range hosts {
		past += h.value(t, "damselfly_received_bytes_total", "origin")
	}
	gets, _ := o.counts()
	if past == 0 {
		require.Equal(t, 1, gets["/v2/org/app/blobs/"+layer.String()])
	}
	t.Logf("%s: told %d times, asked %d times; %.0f bytes came past the region", way, bad.Told.Load(), bad.Asked.Load(), past)
}
