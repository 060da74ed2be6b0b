package region_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode"
	"damselfly.dev/supernode/api"
	"damselfly.dev/test/rogue"
)

// rogueName is a hostile registry, as engines name it.
const rogueName = "rogue.test"

// What a hostile registry says of a digest is kept nowhere, it leads the supernode
// nowhere, and who pulls the same digest from its own registry gets the right bytes,
// which that has sent once.
func TestRogueRegistry(t *testing.T) {
	for _, lie := range rogue.Lies() {
		t.Run(lie, func(t *testing.T) {
			t.Parallel()
			rogueRegistry(t, &rogue.Registry{Lie: lie, Name: registryName})
		})
	}
}

func rogueRegistry(t *testing.T, g *rogue.Registry) {
	t.Helper()
	const quota = 32 << 20
	o := newOrigin(t)
	img, err := random.Image(3<<20, 2)
	require.NoError(t, err)
	write(t, o.URL, img)
	o.set(func() { clear(o.gets); o.sent = 0 })
	all, err := img.Layers()
	require.NoError(t, err)
	hash, err := all[0].Digest()
	require.NoError(t, err)
	g.Size, err = all[0].Size()
	require.NoError(t, err)
	server := httptest.NewServer(g)
	t.Cleanup(server.Close)

	cfg := registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: registryName, URL: o.URL}, {Name: rogueName, URL: server.URL}}}
	dir := t.TempDir()
	centre := startSupernodeFor(t, cfg, dir, "", func(c *supernode.Config) { c.Quota = quota })
	g.Self, g.Room = centre.url(), quota
	host := startHostFor(t, cfg, centre, nil)

	path := "/org/app/blobs/" + hash.String()
	other, err := all[1].Digest()
	require.NoError(t, err)
	cached, err := read(t, centre.url()+"/v2/"+registryName+"/org/app/blobs/"+other.String(), quota)
	require.NoError(t, err)
	require.NotEmpty(t, cached)
	for _, base := range []string{centre.url(), host.url()} {
		b, err := read(t, base+"/v2/"+rogueName+path, 2*quota)
		require.False(t, err == nil && digest.Digest(hash.String()).Algorithm().FromBytes(b) != digest.Digest(hash.String()) && base == centre.url(),
			"%d bytes that are not the blob's look whole", len(b))
		require.NotContains(t, string(b), "damselfly_", "the supernode's own words")
	}
	require.Less(t, g.Sent.Load(), int64(8*quota), "it is read without end")
	if g.Lie != "all-the-room" { // what breaks off is kept for that registry alone to go on with
		nothingKept(t, centre, dir, hash.String())
	}
	require.Zero(t, centre.value(t, "damselfly_cache_evictions_total", ""), "what it claims takes the place of what is there")

	for _, base := range []string{centre.url(), host.url()} {
		b, err := read(t, base+"/v2/"+registryName+path, 2*quota)
		require.NoError(t, err)
		require.Equal(t, hash.String(), digest.FromBytes(b).String())
	}
	gets, _ := o.counts()
	require.Equal(t, 1, gets["/v2"+path], "the registry is asked once: %v", gets)
	require.NoError(t, pull(t.Context(), host, "org/app:v1"))
}

// read gets at most limit bytes of an URL. What is not 200 is an error.
func read(t *testing.T, from string, limit int64) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	require.NoError(t, err)
	resp, err := secure().client(from).Do(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	var b bytes.Buffer
	_, err = b.ReadFrom(io.LimitReader(resp.Body, limit))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, b.Bytes())
	}
	if err == nil && int64(b.Len()) == limit {
		err = errors.New("it does not end")
	}
	return b.Bytes(), err
}

// nothingKept waits until the supernode has nothing of a content, in its store, in
// what is under way, and in what it keeps aside.
func nothingKept(t *testing.T, centre *node, dir, task string) {
	t.Helper()
	require.Eventually(t, func() bool { return centre.value(t, "damselfly_origin_fetches_in_flight", "") == 0 }, waitLimit, waitTick)
	b, err := read(t, centre.url()+api.TasksPath, 1<<20)
	require.NoError(t, err)
	require.NotContains(t, string(b), task)
	require.NoError(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		require.NoError(t, err)
		require.NotContains(t, path, strings.TrimPrefix(task, "sha256:"))
		if !d.IsDir() && filepath.Base(filepath.Dir(path)) == "spool" {
			t.Errorf("%s is left", path)
		}
		return nil
	}))
}
