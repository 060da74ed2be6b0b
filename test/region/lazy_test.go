package region_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"mime/multipart"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/dfdaemon"
	"damselfly.dev/pieces"
)

// lazyBlob puts a blob of n bytes into the registry, and returns the path it is
// read at.
func lazyBlob(t *testing.T, o *origin, n int, seed uint64) (content []byte, path string) {
	t.Helper()
	content = noise(n, seed)
	sum := sha256.Sum256(content)
	d := "sha256:" + hex.EncodeToString(sum[:])
	upload(t, o, d, content)
	return content, "/v2/org/app/blobs/" + d + "?ns=" + registryName
}

// touched counts the bytes of the pieces that ranges touch.
type touched struct {
	mu     sync.Mutex
	layout pieces.Layout
	set    pieces.Set
}

func newTouched(n int) *touched {
	l := pieces.NewRangedLayout(int64(n))
	return &touched{layout: l, set: pieces.NewSet(l.Count())}
}

func (x *touched) add(off, n int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i, end := x.layout.Span(off, n); i < end; i++ {
		x.set.Add(i)
	}
}

func (x *touched) bytes() (sum int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i := range x.set.All() {
		sum += x.layout.Size(i)
	}
	return sum
}

// readSpan is span for goroutines: it compares what it gets.
func readSpan(ctx context.Context, address string, content []byte, off, n int64) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err == nil && (resp.StatusCode != http.StatusPartialContent || !bytes.Equal(b, content[off:off+n])) {
		err = fmt.Errorf("status %d and %d bytes for %d from %d on, not the content's", resp.StatusCode, len(b), n, off)
	}
	return err
}

// Readers on four hosts take ranges at random places, some go away: the registry
// gives each piece that is touched once, and no other.
func TestRangesTakeWhatTheyTouch(t *testing.T) {
	const size, readers, reads, length = 64 << 20, 16, 12, 64 << 10
	o := newOrigin(t)
	content, path := lazyBlob(t, o, size, 3)
	centre := startSupernode(t, o, t.TempDir(), "")
	hosts := make([]*node, 4)
	for i := range hosts {
		hosts[i] = startHost(t, o, centre, nil)
	}
	all := newTouched(size)
	errs := make(chan error, readers)
	for k := range readers {
		go func() {
			rnd := rand.New(rand.NewPCG(uint64(k), 7))
			var err error
			for i := 0; i < reads && err == nil; i++ {
				off := rnd.Int64N(size - length)
				if i%4 == 3 { // all readers want some
					off = int64(i) * 5 << 20
				}
				all.add(off, length)
				err = readSpan(t.Context(), hosts[k%len(hosts)].url()+path, content, off, length)
			}
			errs <- err
		}()
	}
	for k := range 8 { // who asks and hangs up
		off := int64(k)*7<<20 + 4321
		all.add(off, 1<<20)
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(k)*time.Millisecond)
		_ = readSpan(ctx, hosts[k%len(hosts)].url()+path, content, off, 1<<20)
		cancel()
	}
	for range readers {
		require.NoError(t, <-errs)
	}
	var sent int64
	require.Eventually(t, func() bool { // what those wanted who hung up may still be on its way
		_, sent = o.counts()
		return sent == int64(centre.value(t, "damselfly_origin_bytes_total", "")) && sent == int64(centre.value(t, "damselfly_unique_bytes_total", ""))
	}, waitLimit, waitTick)
	require.LessOrEqual(t, sent, all.bytes())
	require.Less(t, all.bytes(), int64(size/2))
	for _, h := range hosts {
		require.Zero(t, h.value(t, "damselfly_fallbacks_total", ""))
	}

	t.Run("the tail is there before the whole is", func(t *testing.T) {
		require.NoError(t, readSpan(t.Context(), hosts[0].url()+path, content, size-47, 47))
		_, after := o.counts()
		require.LessOrEqual(t, after-sent, all.layout.PieceSize)
	})
	t.Run("who pulls the whole gets the rest, and the registry sends no byte twice", func(t *testing.T) {
		for _, h := range hosts[:2] {
			require.Equal(t, string(content), get(t, h.url(), path[:len(path)-len("?ns="+registryName)], "").body)
		}
		require.InDelta(t, size, centre.value(t, "damselfly_origin_bytes_total", ""), 0)
		require.InDelta(t, size, centre.value(t, "damselfly_unique_bytes_total", ""), 0)
		require.NoError(t, readSpan(t.Context(), hosts[3].url()+path, content, 12345, 2<<20))
		for _, h := range hosts {
			require.Zero(t, h.value(t, "damselfly_fallbacks_total", ""))
		}
	})
}

// Several ranges of one request come at once, not one after the other.
func TestSeveralRangesComeAtOnce(t *testing.T) {
	const size, ranges = 32 << 20, 4
	o := newOrigin(t)
	content, path := lazyBlob(t, o, size, 8)
	inner, all := o.backend, make(chan struct{})
	var asked atomic.Int32
	o.backend = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != "" { // each waits for the others
			if asked.Add(1) == ranges {
				close(all)
			}
			select {
			case <-all:
			case <-r.Context().Done():
			}
		}
		inner.ServeHTTP(w, r)
	})
	host := startHost(t, o, startSupernode(t, o, t.TempDir(), ""), nil)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, host.url()+path, nil)
	require.NoError(t, err)
	offsets := []int{20 << 20, 1 << 20, 9 << 20, 30 << 20}
	header := "bytes="
	for _, off := range offsets {
		header += fmt.Sprintf("%d-%d,", off, off+999)
	}
	r.Header.Set("Range", strings.TrimSuffix(header, ","))
	resp, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	_, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	require.NoError(t, err)
	parts := multipart.NewReader(resp.Body, params["boundary"])
	for _, off := range offsets {
		p, err := parts.NextPart()
		require.NoError(t, err)
		got, err := io.ReadAll(p)
		require.NoError(t, err)
		require.Equal(t, content[off:off+1000], got)
	}
	require.Zero(t, host.value(t, "damselfly_fallbacks_total", ""))
}

// A registry that knows no ranges is read once, in order.
func TestRangesOfARegistryWithoutRanges(t *testing.T) {
	const size = 8 << 20
	o := newOrigin(t)
	content, path := lazyBlob(t, o, size, 4)
	inner := o.backend
	o.backend = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Range")
		inner.ServeHTTP(w, r)
	})
	centre := startSupernode(t, o, t.TempDir(), "")
	host := startHost(t, o, centre, nil)
	for _, off := range []int64{5 << 20, 100, size - 10} {
		require.NoError(t, readSpan(t.Context(), host.url()+path, content, off, 10))
	}
	require.Eventually(t, func() bool {
		return centre.value(t, "damselfly_origin_bytes_total", "") == size
	}, waitLimit, waitTick)
	require.Zero(t, host.value(t, "damselfly_fallbacks_total", ""))
}

// The rest comes in the background where that is asked for.
func TestRangesInTheBackground(t *testing.T) {
	const size = 8 << 20
	for _, setting := range []string{"first", "50ms"} {
		t.Run(setting, func(t *testing.T) {
			o := newOrigin(t)
			content, path := lazyBlob(t, o, size, 5)
			centre := startSupernode(t, o, t.TempDir(), "")
			host := startHostFor(t, registries(o), centre, nil, func(c *dfdaemon.Config) { c.RangeBackground = setting })
			require.NoError(t, readSpan(t.Context(), host.url()+path, content, 3<<20, 100))
			require.Eventually(t, func() bool {
				return host.value(t, "damselfly_received_bytes_total", "supernode") >= size
			}, waitLimit, waitTick)
			_, sent := o.counts()
			require.EqualValues(t, size, sent)
			require.NoError(t, readSpan(t.Context(), host.url()+path, content, 0, size))
		})
	}
}

// A registry that gives other bytes than the digest's is found out when all are
// there, and what hosts have of them is gone.
func TestRangesOfWhatIsWrong(t *testing.T) {
	const size = 2 << 20
	o := newOrigin(t)
	content, path := lazyBlob(t, o, size, 6)
	inner := o.backend
	wrong := bytes.Clone(content)
	wrong[size-1] ^= 1
	o.backend = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && len(path) > len(r.URL.Path) && path[:len(r.URL.Path)] == r.URL.Path {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(wrong))
			return
		}
		inner.ServeHTTP(w, r)
	})
	centre := startSupernode(t, o, t.TempDir(), "")
	host := startHost(t, o, centre, nil)
	require.NoError(t, readSpan(t.Context(), host.url()+path, content, 0, 1<<20), "these are as they should be")
	_ = readSpan(t.Context(), host.url()+path, content, 1<<20, 1<<20)
	require.Eventually(t, func() bool {
		return centre.value(t, "damselfly_verify_failures_total", "") == 1
	}, waitLimit, waitTick)
	require.Eventually(t, func() bool {
		return get(t, centre.url(), "/v1/tasks", "").body == "[]"
	}, waitLimit, waitTick)
}
