package region_test

import (
	"context"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"damselfly.dev/test/region"
)

// slowOnes is how many slow connections each listener has to bear.
const slowOnes = 2000

// keep opens so many connections to an address, and again those that end, until
// the test ends: some say nothing, some half a header, some take nothing of their
// answer. It returns, when all are open for the first time, what counts them.
func keep(t *testing.T, address, path string) (opened, cut *atomic.Int64) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	opened, cut = new(atomic.Int64), new(atomic.Int64)
	var all errgroup.Group
	t.Cleanup(func() { cancel(); _ = all.Wait() })
	for i := range slowOnes {
		say := []string{"", "GET " + path + " HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ", "GET " + path + " HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"}[i%3]
		all.Go(func() error {
			for ctx.Err() == nil {
				conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
				if err != nil {
					return err
				}
				opened.Add(1)
				stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
				if _, err = io.WriteString(conn, say); err == nil && i%3 < 2 {
					_, _ = io.Copy(io.Discard, conn) // until it is cut off
					cut.Add(1)
				} else {
					<-ctx.Done()
				}
				stop()
				_ = conn.Close()
			}
			return nil
		})
	}
	require.Eventually(t, func() bool { return opened.Load() >= slowOnes }, waitLimit, waitTick)
	return opened, cut
}

// Whoever holds thousands of connections to the listeners of a region, and is slow,
// does nothing to a crowd that pulls: it gets all from the region, which asks the
// registry once.
func TestSlowConnectionsBesideACrowd(t *testing.T) {
	var files syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files))
	if need := uint64(4*2*slowOnes + 2000); files.Max < need {
		if os.Getenv("CI") == "true" {
			t.Fatalf("it takes %d files at once, %d are allowed", need, files.Max)
		}
		t.Skipf("it takes %d files at once, %d are allowed", need, files.Max)
	}
	o := newOrigin(t)
	image := push(t, o)
	centre := startSupernode(t, o, t.TempDir(), "")
	cfg := region.Host(t)
	cfg.Registries, cfg.TLS, cfg.Supernodes = registries(o), secure().settings(), []string{centre.url()}
	metricsAt := free(t)
	cfg.MetricsListen = metricsAt
	d, metrics, end := region.StartHost(t, cfg, infoLog(t))
	first := &node{metrics: metrics, address: d.MirrorAddr(), end: end}
	require.Eventually(t, func() bool { return first.value(t, "damselfly_session_up", "") == 1 }, waitLimit, waitTick)
	hosts := []*node{first}
	for range 3 {
		hosts = append(hosts, startHostFor(t, registries(o), centre, nil))
	}
	for what, at := range map[string][2]string{
		"supernode": {centre.address, "/metrics"}, "mirror": {d.MirrorAddr(), "/v2/"}, "peer": {d.PeerAddr(), "/"}, "metrics": {metricsAt, "/metrics"},
	} {
		opened, cut := keep(t, at[0], at[1])
		t.Cleanup(func() { t.Logf("%s: %d slow connections opened, %d cut off", what, opened.Load(), cut.Load()) })
	}
	begin := time.Now()
	pullAll(t, hosts, image)
	t.Logf("the crowd has the image after %v", time.Since(begin).Round(time.Millisecond))
	for i, h := range hosts {
		require.Zero(t, h.value(t, "damselfly_fallbacks_total", ""), "host %d went past the region", i)
		require.Zero(t, h.value(t, "damselfly_connections_refused_total", ""), i)
	}
	require.Zero(t, centre.value(t, "damselfly_connections_refused_total", ""))
	gets, _ := o.counts()
	for path, n := range gets {
		require.Equal(t, 1, n, path)
	}
}

// free is an address on loopback that nobody has now.
func free(t *testing.T) string {
	t.Helper()
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { require.NoError(t, ln.Close()) }()
	return ln.Addr().String()
}
