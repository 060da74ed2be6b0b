package region_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// snapshotter asks for ranges of one content as a lazy snapshotter does.
type snapshotter struct {
	ctx     context.Context
	url     string
	content []byte
}

// ask sends a Range, compares all that comes with the content, and returns how
// many bytes that were. A take of 0 or more hangs up after so many.
func (s snapshotter) ask(span string, take int64) (n int64, err error) {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return 0, err
	}
	r.Header.Set("Range", span)
	r.Header.Set("Accept-Encoding", "identity")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	kind, params, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if resp.StatusCode != http.StatusPartialContent {
		return 0, fmt.Errorf("%s is answered with %s", span, resp.Status)
	}
	if kind != "multipart/byteranges" {
		return s.compare(resp.Header.Get("Content-Range"), resp.Body, take)
	}
	for parts := multipart.NewReader(resp.Body, params["boundary"]); ; {
		part, err := parts.NextPart()
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		k, err := s.compare(part.Header.Get("Content-Range"), part, -1)
		if n += k; err != nil {
			return n, err
		}
	}
}

// compare reads a range and compares it.
func (s snapshotter) compare(named string, body io.Reader, take int64) (int64, error) {
	var first, last, size int64
	if _, err := fmt.Sscanf(named, "bytes %d-%d/%d", &first, &last, &size); err != nil || size != int64(len(s.content)) {
		return 0, fmt.Errorf("range %q of %d bytes: %w", named, len(s.content), err)
	}
	want := s.content[first : last+1]
	if take >= 0 {
		want, body = want[:take], io.LimitReader(body, take)
	}
	got, err := io.ReadAll(body)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%s: %d bytes are not the %d of the content", named, len(got), len(want))
	}
	return int64(len(got)), err
}

// all asks for spans, so many at a time.
func (s snapshotter) all(atOnce int, take int64, spans ...string) error {
	places := make(chan struct{}, atOnce)
	errs := make([]error, len(spans))
	var wg sync.WaitGroup
	for i, span := range spans {
		places <- struct{}{}
		wg.Go(func() {
			_, errs[i] = s.ask(span, take)
			<-places
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// bounded is n spans of so many bytes, one every step from first on.
func bounded(first, size, step, n int64) (spans []string) {
	for i := range n {
		spans = append(spans, fmt.Sprintf("bytes=%d-%d", first+i*step, first+i*step+size-1))
	}
	return spans
}

// patterns are the requests of lazy snapshotters, of a content of 24 MiB.
var patterns = map[string]func(s snapshotter) error{
	// It looks who is there, then asks for chunks of 50 000 bytes, several by one
	// request, and for the table of contents at the end.
	"stargz": func(s snapshotter) error {
		size := int64(len(s.content))
		if err := s.all(1, -1, "bytes=0-1", fmt.Sprintf("bytes=%d-%d", size-51, size-1), fmt.Sprintf("bytes=%d-%d", size-300_000, size-52)); err != nil {
			return err
		}
		for k := range int64(4) {
			var chunks []string
			for _, c := range bounded(k*3_000_000, 50_000, 250_000, 8) {
				chunks = append(chunks, strings.TrimPrefix(c, "bytes="))
			}
			if n, err := s.ask("bytes="+strings.Join(chunks, ","), -1); err != nil || n != 400_000 {
				return fmt.Errorf("%d bytes of 8 chunks: %w", n, err)
			}
		}
		return s.all(4, -1, append(bounded(50_000, 50_000, 50_000, 10), "bytes=0-1")...)
	},
	// The footer, the table, and then the chunks that are new, adjacent ones together.
	"zstd:chunked": func(s snapshotter) error {
		size := int64(len(s.content))
		if err := s.all(1, -1, fmt.Sprintf("bytes=%d-%d", size-72, size-1), fmt.Sprintf("bytes=%d-%d", size-72-20_000, size-73)); err != nil {
			return err
		}
		_, err := s.ask("bytes=100-70000,70001-90000,1000000-1500000,9000000-9000001,12000000-14000000", -1)
		return err
	},
	// Batches of 1 MiB from eight threads, and one that reads on to the end.
	"nydus": func(s snapshotter) error {
		if err := s.all(8, -1, bounded(1<<20+4096, 1<<20, 2<<20, 10)...); err != nil {
			return err
		}
		return s.all(1, -1, "bytes=20971520-")
	},
	// Spans here and there, and chunks of 8 MiB side by side.
	"SOCI": func(s snapshotter) error {
		if err := s.all(2, -1, bounded(777, 131_072, 3<<20, 7)...); err != nil {
			return err
		}
		return s.all(3, -1, bounded(0, 8<<20, 8<<20, 3)...)
	},
	// Blocks, one after the other and at random.
	"overlaybd": func(s snapshotter) error {
		if err := s.all(1, -1, append([]string{"bytes=0-0", "bytes=25161728-25165823"}, bounded(0, 262_144, 262_144, 6)...)...); err != nil {
			return err
		}
		return s.all(4, -1, bounded(5<<20+512, 65_536, 999_424, 15)...)
	},
	// Chunks that are open at their end, of which each reader takes its own part and
	// hangs up.
	"containerd": func(s snapshotter) error {
		var open []string
		for i := range 6 {
			open = append(open, fmt.Sprintf("bytes=%d-", i*4<<20))
		}
		return s.all(3, 4<<20, open...)
	},
}

// Each reads through two hosts, and both get its bytes from the region.
func TestPatternsOfLazySnapshotters(t *testing.T) {
	const size = 24 << 20
	seed := uint64(20)
	for name, run := range patterns {
		seed++
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t)
			content, path := lazyBlob(t, o, size, seed)
			if name == "overlaybd" {
				path = "/p2p/http://" + registryName + strings.TrimSuffix(path, "?ns="+registryName)
			}
			centre := startSupernode(t, o, t.TempDir(), "")
			for range 2 {
				host := startHost(t, o, centre, nil)
				require.NoError(t, run(snapshotter{t.Context(), host.url() + path, content}))
				require.Zero(t, host.value(t, "damselfly_fallbacks_total", ""))
				require.Zero(t, host.value(t, "damselfly_received_bytes_total", "origin"))
			}
			_, sent := o.counts()
			require.LessOrEqual(t, sent, int64(size))
			require.InDelta(t, centre.value(t, "damselfly_unique_bytes_total", ""), centre.value(t, "damselfly_origin_bytes_total", ""), size/4,
				"what is under way is not counted yet")
		})
	}
}
