package image

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func TestSmall(t *testing.T) {
	cache := t.TempDir()
	img, err := Small(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	contents, err := Contents(img)
	if err != nil {
		t.Fatal(err)
	}
	if size := Size(contents); len(contents) != 7 || size < 15e6 || size > 40e6 {
		t.Errorf("the image has %d contents of %d bytes", len(contents), size)
	}
	first, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Small(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if second, err := again.Digest(); err != nil || second != first {
		t.Errorf("made again, %v is %v, %v", first, second, err)
	}
	if left, err := filepath.Glob(filepath.Join(cache, "images", "making-*")); err != nil || len(left) > 0 {
		t.Error("left in the cache: ", left, err)
	}

	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	ref := strings.TrimPrefix(server.URL, "http://") + "/test/small:v1"
	if err := Push(t.Context(), img, ref, http.DefaultTransport); err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if pushed, err := remote.Head(tag); err != nil || pushed.Digest != first {
		t.Errorf("pushed %v, the registry has %v, %v", first, pushed, err)
	}
}

func TestBrokenCacheIsAnError(t *testing.T) {
	cache := t.TempDir()
	if _, err := Small(t.Context(), cache); err != nil {
		t.Fatal(err)
	}
	entries, err := filepath.Glob(filepath.Join(cache, "images", "*", "index.json"))
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	if err := os.WriteFile(entries[0], []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Small(t.Context(), cache); err == nil {
		t.Error("a broken index was loaded")
	}
}
