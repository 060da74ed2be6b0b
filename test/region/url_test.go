package region_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/dfdaemon"
)

// bucket is an object store that gives one content to who has a signature, and
// counts what goes out.
type bucket struct {
	*httptest.Server
	content []byte

	mu   sync.Mutex // guards sent
	sent int64
}

func newBucket(t *testing.T, content []byte) *bucket {
	t.Helper()
	b := &bucket{content: content}
	b.Server = httptest.NewServer(b)
	t.Cleanup(b.Close)
	return b
}

func (b *bucket) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// As with S3, a signature is for one method.
	if r.Method != http.MethodGet || !strings.HasPrefix(r.URL.Query().Get("X-Amz-Signature"), "right") {
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, "<Code>SignatureDoesNotMatch</Code>")
		return
	}
	w.Header().Set("Etag", `"one"`)
	http.ServeContent(&tally{w, b}, r, "", time.Time{}, bytes.NewReader(b.content))
}

type tally struct {
	http.ResponseWriter
	b *bucket
}

func (t *tally) Write(p []byte) (int, error) {
	n, err := t.ResponseWriter.Write(p)
	t.b.mu.Lock()
	defer t.b.mu.Unlock()
	t.b.sent += int64(n)
	return n, err
}

// noise is n bytes that do not compress, the same for one seed.
func noise(n int, seed uint64) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// span asks for n bytes from off on, and returns the answer.
func span(t *testing.T, address string, off, n int64) (int, []byte) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
	require.NoError(t, err)
	r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	resp, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, b
}

// What overlaybd asks for: the registry's redirect, followed by itself, behind
// the prefix, with Range. Each host has a signature of its own, and the content
// comes once for all of them.
func TestWholeURLsWithSignatures(t *testing.T) {
	o := newOrigin(t)
	store := newBucket(t, noise(3<<20, 1))
	at, err := url.Parse(store.URL)
	require.NoError(t, err)
	port, err := strconv.Atoi(at.Port())
	require.NoError(t, err)
	centre := startSupernode(t, o, t.TempDir(), "")
	signed := func(host *node, signature string) string {
		return host.url() + "/p2p/" + store.URL + "/docker/blobs/sha256/ab/data?a=%2F1&X-Amz-Date=" + signature + "&X-Amz-Signature=" + signature
	}
	for i := range 3 {
		host := startHostFor(t, registries(o), centre, nil, func(c *dfdaemon.Config) { c.Proxy.Ports = []int{port} })
		for _, off := range []int64{0, 1 << 20, 3<<20 - 4096, 77_777} {
			status, got := span(t, signed(host, fmt.Sprint("right", i)), off, 4096)
			require.Equal(t, http.StatusPartialContent, status, string(got))
			require.True(t, bytes.Equal(store.content[off:off+4096], got))
		}
		require.Zero(t, host.value(t, "damselfly_fallbacks_total", ""))
		status, got := span(t, signed(host, "wrong"), 0, 4096)
		require.Equal(t, http.StatusForbidden, status)
		require.Contains(t, string(got), "SignatureDoesNotMatch", "the store's own words")
		status, _ = span(t, host.url()+"/p2p/http://127.0.0.1:9/x", 0, 1)
		require.Equal(t, http.StatusForbidden, status, "a port that may not be asked for")
		status, got = span(t, host.url()+"/p2p/ftp://secret@host/x?sig=secret", 0, 1)
		require.Equal(t, http.StatusBadRequest, status)
		require.NotContains(t, string(got), "secret")
	}
	store.mu.Lock()
	defer store.mu.Unlock()
	require.LessOrEqual(t, store.sent, int64(len(store.content)+16), "each probe of who may read it takes a byte")
}

// A registry that gives its blobs itself is asked behind the prefix too, and
// shares them with who pulls the image.
func TestWholeURLsOfARegistry(t *testing.T) {
	content := noise(2<<20, 2)
	sum := sha256.Sum256(content)
	d := "sha256:" + hex.EncodeToString(sum[:])
	o := newOrigin(t)
	upload(t, o, d, content)
	centre := startSupernode(t, o, t.TempDir(), "")
	host := startHost(t, o, centre, nil)
	status, got := span(t, host.url()+"/p2p/http://"+registryName+"/v2/org/app/blobs/"+d, 1<<20, 65536)
	require.Equal(t, http.StatusPartialContent, status, string(got))
	require.True(t, bytes.Equal(content[1<<20:1<<20+65536], got))
	require.Equal(t, string(content), get(t, host.url(), "/v2/org/app/blobs/"+d, "").body)
	_, sent := o.counts()
	require.EqualValues(t, len(content), sent)
}

// upload puts a blob into the registry.
func upload(t *testing.T, o *origin, d string, content []byte) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, o.URL+"/v2/org/app/blobs/uploads/?digest="+d, bytes.NewReader(content))
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	_ = resp.Body.Close()
	require.Equal(t, http.StatusCreated, resp.StatusCode)
	o.set(func() { clear(o.gets); o.sent = 0 })
}
