package image

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func tiny(t *testing.T, cache string) v1.Image {
	t.Helper()
	img, err := cached(t.Context(), cache, "tiny", func(_ context.Context, root, _ string) ([]source, error) {
		return []source{
			{root: root, prefix: "go", paths: []string{"src/sync", "not/there"}, skip: []string{"src/sync/atomic"}},
			{root: root, prefix: "go", paths: []string{"VERSION"}},
		}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestSameFilesSameImage(t *testing.T) {
	cache := t.TempDir()
	img, again := tiny(t, cache), tiny(t, t.TempDir())
	first, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if second, err := again.Digest(); err != nil || second != first {
		t.Errorf("made again, %v is %v, %v", first, second, err)
	}
	if left, err := filepath.Glob(filepath.Join(cache, "images", "making-*")); err != nil || len(left) > 0 {
		t.Error("left in the cache: ", left, err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	files := names(t, layers[0])
	if !slices.Contains(files, "go/src/sync/mutex.go") || !slices.Contains(files, "go/src/sync/") {
		t.Error("files are missing: ", files)
	}
	if slices.ContainsFunc(files, func(f string) bool { return strings.HasPrefix(f, "go/src/sync/atomic") }) {
		t.Error("a directory to be skipped was not: ", files)
	}
}

func names(t *testing.T, layer v1.Layer) []string {
	t.Helper()
	content, err := layer.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	var all []string
	for r := tar.NewReader(content); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, header.Name)
	}
}

func TestPush(t *testing.T) {
	img := tiny(t, t.TempDir())
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	ref := strings.TrimPrefix(server.URL, "http://") + "/test/tiny:v1"
	if err := Push(t.Context(), img, ref, http.DefaultTransport); err != nil {
		t.Fatal(err)
	}
	contents, err := Contents(img)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	pushed, err := remote.Head(tag)
	if err != nil || len(contents) != 4 || pushed.Digest != contents[0].Digest || pushed.Size != contents[0].Size {
		t.Errorf("pushed %v, the registry has %v, %v", contents, pushed, err)
	}
	sum := pushed.Size
	for _, c := range contents[1:] {
		layer, err := remote.Layer(tag.Digest(c.Digest.String()))
		if err != nil {
			t.Fatal(err)
		}
		blob, err := layer.Compressed() // fails at its end if a byte is wrong
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, blob)
		if err != nil {
			t.Error(err)
		}
		sum += n
	}
	if sum != Size(contents) {
		t.Errorf("contents of %d bytes are %d in the registry", Size(contents), sum)
	}
}

func TestBrokenCacheIsAnError(t *testing.T) {
	cache := t.TempDir()
	tiny(t, cache)
	entries, err := filepath.Glob(filepath.Join(cache, "images", "*", "index.json"))
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	if err := os.WriteFile(entries[0], []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := cached(t.Context(), cache, "tiny", nil); err == nil {
		t.Error("a broken index was loaded")
	}
}
