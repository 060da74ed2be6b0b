// Package region runs the parts of a region in the process of a test.
package region

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"damselfly.dev/dfdaemon"
	"damselfly.dev/supernode"
)

// run runs what serve does until end, at the latest until the test ends.
func run(t *testing.T, serve func(context.Context) error) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx) }()
	end = func() {
		t.Helper()
		cancel()
		err := <-ended
		ended <- nil
		require.NoError(t, err)
	}
	t.Cleanup(end)
	return end
}

// StartSupernode runs a supernode at cfg.Listen, and returns where that is.
func StartSupernode(t *testing.T, cfg supernode.Config, log *zap.Logger) (address string, metrics *prometheus.Registry, end func()) {
	t.Helper()
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", cfg.Listen)
	require.NoError(t, err)
	cfg.Listen, metrics = ln.Addr().String(), prometheus.NewRegistry()
	s, err := supernode.New(cfg, log, metrics)
	require.NoError(t, err)
	return cfg.Listen, metrics, run(t, func(ctx context.Context) error { return s.Run(ctx, ln) })
}

// Host returns the settings of a dfdaemon on loopback with an empty store.
func Host(t *testing.T) dfdaemon.Config {
	t.Helper()
	cfg := dfdaemon.Default()
	cfg.DrainTimeout = 5 * time.Second
	cfg.DataDir, cfg.Socket = filepath.Join(t.TempDir(), "data"), ""
	cfg.MirrorListen, cfg.PeerListen, cfg.MetricsListen = "127.0.0.1:0", "127.0.0.1:0", ""
	return cfg
}

// StartHost runs a dfdaemon.
func StartHost(t *testing.T, cfg dfdaemon.Config, log *zap.Logger) (d *dfdaemon.Daemon, metrics *prometheus.Registry, end func()) {
	t.Helper()
	metrics = prometheus.NewRegistry()
	d, err := dfdaemon.New(cfg, log, metrics)
	require.NoError(t, err)
	return d, metrics, run(t, d.Run)
}
