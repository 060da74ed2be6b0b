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
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode"
	"damselfly.dev/supernode/api"
)

// rogueName is a hostile registry, as engines name it.
const rogueName = "rogue.test"

// rogue is a registry that has every blob, and lies about it.
type rogue struct {
	*httptest.Server
	lie  string
	self string // the URL of the supernode
	size int64  // of the blob that it lies about
	sent atomic.Int64
}

func (g *rogue) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	to := map[string]string{
		"cloud":         "http://169.254.169.254/latest/meta-data",
		"cloud, by six": "http://[::ffff:169.254.169.254]/latest/meta-data",
		"supernode":     g.self + "/v1/tasks",
		"supernode, v2": g.self + strings.Replace(r.URL.Path, "/v2/", "/v2/"+registryName+"/", 1),
		"localhost":     strings.Replace(g.self, "127.0.0.1", "localhost", 1) + "/metrics",
		"file":          "file:///etc/passwd",
	}[g.lie]
	if to != "" {
		w.Header().Set("Location", to)
		w.WriteHeader(http.StatusTemporaryRedirect)
		return
	}
	length := map[string]int64{"other": g.size, "shorter": g.size - 1, "longer": g.size + 1, "huge": 1 << 39, "too huge": 1 << 62}[g.lie]
	if length > 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(length, 10))
	}
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return
	}
	b, n := make([]byte, 64<<10), int64(0)
	for length == 0 || n < length {
		part := b
		if length > 0 {
			part = b[:min(int64(len(b)), length-n)]
		}
		k, err := w.Write(part)
		n += int64(k)
		g.sent.Add(int64(k))
		if err != nil {
			return
		}
	}
}

// What a hostile registry says of a digest is kept nowhere, it leads the supernode
// nowhere, and who pulls the same digest from its own registry gets the right bytes,
// which that has sent once.
func TestRogueRegistry(t *testing.T) {
	for _, lie := range []string{
		"other", "shorter", "longer", "endless", "huge", "too huge",
		"cloud", "cloud, by six", "supernode", "supernode, v2", "localhost", "file",
	} {
		t.Run(lie, func(t *testing.T) {
			t.Parallel()
			rogueRegistry(t, &rogue{lie: lie})
		})
	}
}

func rogueRegistry(t *testing.T, g *rogue) {
	t.Helper()
	const quota = 32 << 20
	o := newOrigin(t)
	img, err := random.Image(3<<20, 1)
	require.NoError(t, err)
	write(t, o.URL, img)
	o.set(func() { clear(o.gets); o.sent = 0 })
	all, err := img.Layers()
	require.NoError(t, err)
	hash, err := all[0].Digest()
	require.NoError(t, err)
	g.size, err = all[0].Size()
	require.NoError(t, err)
	g.Server = httptest.NewServer(g)
	t.Cleanup(g.Close)

	cfg := registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: registryName, URL: o.URL}, {Name: rogueName, URL: g.URL}}}
	dir := t.TempDir()
	centre := startSupernodeFor(t, cfg, dir, "", func(c *supernode.Config) { c.Quota = quota })
	g.self = centre.url()
	host := startHostFor(t, cfg, centre, nil)

	path := "/org/app/blobs/" + hash.String()
	for _, base := range []string{centre.url(), host.url()} {
		b, err := read(t, base+"/v2/"+rogueName+path, 2*quota)
		require.False(t, err == nil && digest.Digest(hash.String()).Algorithm().FromBytes(b) != digest.Digest(hash.String()) && base == centre.url(),
			"%d bytes that are not the blob's look whole", len(b))
		require.NotContains(t, string(b), "damselfly_", "the supernode's own words")
	}
	require.Less(t, g.sent.Load(), int64(8*quota), "it is read without end")
	nothingKept(t, centre, dir, hash.String())

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
