//go:build linux

package lab_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
	"damselfly.dev/test/rogue"
)

const (
	trueName = "true.test"
	quota    = 32 << 20
	metadata = "169.254.169.254:80"
	word     = "a machine's own credentials"
)

// Hostile registries lie to real processes, on a network that has no way out and where
// nobody is on loopback: a service of metadata, which both could reach, hears nothing,
// nothing is kept, and the true registry sends each blob once.
func TestRogueRegistries(t *testing.T) {
	if err := lab.Check(); err != nil {
		require.NotEqual(t, "true", os.Getenv("CI"), "CI must have what the lab needs: %v", err)
		t.Skip("no lab on this machine: ", err)
	}
	bin := t.TempDir()
	require.NoError(t, programs.Build(t.Context(), bin))
	l, err := lab.New(t.Context(), lab.Config{Hosts: []lab.HostConfig{{Name: "centre"}, {Name: "host"}, {Name: "registry"}, {Name: "rogue"}, {Name: "cloud"}}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute) // without the wait for other labs
	defer cancel()
	centre, host := l.Host("centre"), l.Host("host")
	asked := cloud(t, l.Host("cloud"), centre, host)

	registry, err := programs.StartRegistry(ctx, l.Host("registry"), bin)
	require.NoError(t, err)
	img, err := random.Image(300<<10, int64(len(rogue.Lies())))
	require.NoError(t, err)
	require.NoError(t, registry.Push(ctx, img, "org/app:v1"))
	layers, err := img.Layers()
	require.NoError(t, err)
	upstreams := map[string]string{trueName: registry.URL()}
	rogues := map[string]*rogue.Registry{}
	for i, lie := range rogue.Lies() {
		size, err := layers[i].Size()
		require.NoError(t, err)
		rogues[lie] = &rogue.Registry{Lie: lie, Name: trueName, Size: size, Room: quota}
		upstreams[lie+".test"] = serve(t, l.Host("rogue"), fmt.Sprintf("%s:%d", l.Host("rogue").IP(), 9000+i), rogues[lie])
	}
	supernode, err := programs.StartSupernode(ctx, centre, bin, upstreams, "--quota", "32MiB")
	require.NoError(t, err)
	for _, g := range rogues {
		g.Self = supernode.URL()
	}
	daemon, err := programs.StartDaemon(ctx, host, bin, supernode.URL(), upstreams)
	require.NoError(t, err)
	bases := []string{supernode.URL(), daemon.Mirror()}

	for _, base := range bases {
		var wg sync.WaitGroup
		for i, lie := range rogue.Lies() {
			wg.Go(func() {
				hash := hashOf(t, layers[i])
				b, err := read(ctx, host, base+"/v2/"+lie+".test/org/app/blobs/"+hash)
				if base == supernode.URL() && err == nil {
					t.Errorf("%s: %d bytes look whole", lie, len(b))
				}
				for _, foreign := range []string{"damselfly_", `"pieceSize"`, "root:", word} {
					if strings.Contains(string(b), foreign) {
						t.Errorf("%s: %s gives out %q", lie, base, foreign)
					}
				}
			})
		}
		wg.Wait()
		if base == supernode.URL() {
			nothingKept(ctx, t, centre, base, layers)
		}
	}
	for i, lie := range rogue.Lies() {
		hash := hashOf(t, layers[i])
		for _, base := range bases {
			b, err := read(ctx, host, base+"/v2/"+trueName+"/org/app/blobs/"+hash)
			require.NoError(t, err, "after %s", lie)
			require.Equal(t, hash, digest.FromBytes(b).String(), "after %s", lie)
		}
	}
	requests, err := registry.Requests()
	require.NoError(t, err)
	gets := map[string]int{}
	for _, q := range requests {
		if q.Content() {
			gets[q.Path]++
		}
	}
	for i, lie := range rogue.Lies() {
		require.Equal(t, 1, gets["/v2/org/app/blobs/"+hashOf(t, layers[i])], "after %s", lie)
	}
	require.Zero(t, asked.Load(), "somebody asked for the metadata of the cloud")
}

// nothingKept waits until what the registries have lied about is not among the
// supernode's tasks: it goes when the fetch has ended, which readers hear before.
func nothingKept(ctx context.Context, t *testing.T, from *lab.Host, base string, layers []v1.Layer) {
	t.Helper()
	for i, lie := range rogue.Lies() {
		if lie == "all-the-room" { // what breaks off is kept for that registry alone to go on with
			continue
		}
		hash := hashOf(t, layers[i])
		require.Eventually(t, func() bool {
			tasks, err := read(ctx, from, base+"/v1/tasks")
			return err == nil && !strings.Contains(string(tasks), hash)
		}, time.Minute, 50*time.Millisecond, lie)
	}
}

// cloud serves metadata on a link, and counts who asks. It is made known to hosts,
// which reach it, and nothing beyond the lab.
func cloud(t *testing.T, at *lab.Host, hosts ...*lab.Host) *atomic.Int64 {
	t.Helper()
	ip := func(h *lab.Host, args ...string) {
		cmd := append(strings.Fields(h.Enter()), append([]string{"ip"}, args...)...)
		out, err := exec.CommandContext(t.Context(), cmd[0], cmd[1:]...).CombinedOutput() //nolint:gosec // G204: as above
		require.NoError(t, err, string(out))
	}
	ip(at, "addr", "add", strings.TrimSuffix(metadata, ":80")+"/32", "dev", "eth0")
	var asked atomic.Int64
	serve(t, at, metadata, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		_, _ = io.WriteString(w, word)
	}))
	for _, h := range hosts {
		ip(h, "route", "add", strings.TrimSuffix(metadata, ":80"), "dev", "eth0")
		b, err := read(t.Context(), h, "http://"+metadata)
		require.NoError(t, err)
		require.Equal(t, word, string(b))
		_, err = h.Dial(t.Context(), "tcp", "192.0.2.1:80")
		require.ErrorIs(t, err, syscall.ENETUNREACH)
	}
	require.Equal(t, int64(len(hosts)), asked.Swap(0))
	return &asked
}

// serve answers on a host until the test ends, and returns the URL.
func serve(t *testing.T, h *lab.Host, address string, handler http.Handler) string {
	t.Helper()
	ln, err := h.Listen(t.Context(), "tcp", address)
	require.NoError(t, err)
	s := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return "http://" + ln.Addr().String()
}

// read gets what of an URL there is, at most twice the quota. What is not 200, or ends
// early, is an error.
func read(ctx context.Context, from *lab.Host, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	tr := &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return from.Dial(ctx, network, address)
	}}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Do(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 2*quota))
	switch {
	case err == nil && resp.StatusCode != http.StatusOK:
		err = fmt.Errorf("%s answers %s", url, resp.Status)
	case err == nil && len(b) == 2*quota:
		err = fmt.Errorf("%s does not end", url)
	}
	return b, err
}

func hashOf(t *testing.T, l v1.Layer) string {
	t.Helper()
	hash, err := l.Digest()
	require.NoError(t, err)
	return hash.String()
}
