package region_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"damselfly.dev/dfdaemon"
)

// What is asked of a dfdaemon that takes another's place, before it has a session, comes
// from the region all the same.
func TestTakeOverAwaitsSession(t *testing.T) {
	o := newOrigin(t)
	centre := startSupernode(t, o, t.TempDir(), "")
	var cfg dfdaemon.Config
	old := startHostFor(t, registries(o), centre, nil, func(c *dfdaemon.Config) {
		c.Supernodes = []string{centre.url()}
		cfg = *c
	})
	img, err := random.Image(layerSize, 1)
	require.NoError(t, err)
	write(t, o.URL, img)
	all, err := img.Layers()
	require.NoError(t, err)
	want, err := all[0].Digest()
	require.NoError(t, err)

	answered := make(chan struct{})
	cfg.Supernodes = []string{centre.scheme + "://" + late(t, centre.address, answered)}
	metrics := prometheus.NewRegistry()
	next, err := dfdaemon.New(cfg, infoLog(t), metrics)
	require.NoError(t, err)
	old.end() // who asks from now on asks the next one
	got := make(chan error, 1)
	go func() {
		got <- func() error {
			url := fmt.Sprintf("http://%s/v2/%s/org/app/blobs/%s", next.MirrorAddr(), registryName, want)
			r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
			if err != nil {
				return err
			}
			resp, err := http.DefaultClient.Do(r)
			if err != nil {
				return err
			}
			close(answered)
			defer func() { _ = resp.Body.Close() }()
			d := digest.SHA256.Digester()
			if _, err = io.Copy(d.Hash(), resp.Body); err == nil && d.Digest().String() != want.String() {
				err = fmt.Errorf("%s: %s", resp.Status, d.Digest())
			}
			return err
		}()
	}()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- next.Run(ctx) }()
	require.NoError(t, <-got)
	n := node{metrics: metrics}
	require.Zero(t, n.value(t, "damselfly_fallbacks_total", "no_session"))
	require.Zero(t, n.value(t, "damselfly_received_bytes_total", "origin"))
	cancel()
	require.NoError(t, <-ended)
}

// late returns an address that leads to another one, to which it connects only a little
// after it is asked to, or when answered is closed.
func late(t *testing.T, to string, answered <-chan struct{}) string {
	t.Helper()
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			from, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = from.Close() }()
				select {
				case <-answered:
				case <-time.After(300 * time.Millisecond):
				}
				on, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", to)
				if err != nil {
					return
				}
				defer func() { _ = on.Close() }()
				go func() { _, _ = io.Copy(on, from) }()
				_, _ = io.Copy(from, on)
			}()
		}
	}()
	return ln.Addr().String()
}
