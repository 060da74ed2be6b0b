//go:build linux

package programs

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"damselfly.dev/test/lab"
)

// LibraryEngine is an engine inside this process, made of the library
// go-containerregistry, for machines without a real one.
type LibraryEngine struct {
	from   string // the registry or mirror, and the prefix of names there
	client *http.Transport
	dir    string
}

// StartLibrary returns an engine with an empty store. It knows no mirrors:
// through one it asks for the registry by path.
func StartLibrary(h *lab.Host, mirror, registry string) (*LibraryEngine, error) {
	dir, err := os.MkdirTemp(h.Dir(), "library-")
	if err != nil {
		return nil, fmt.Errorf("make the library's directory: %w", err)
	}
	from := strings.TrimPrefix(registry, "http://") + "/"
	if mirror != "" {
		from = strings.TrimPrefix(mirror, "http://") + "/" + RegistryName + "/"
	}
	return &LibraryEngine{from: from, client: &http.Transport{DialContext: h.Dial}, dir: dir}, nil
}

// Fetch brings an image such as "demo/app:v1" into the engine's store.
func (e *LibraryEngine) Fetch(ctx context.Context, image string) error {
	ref, err := name.ParseReference(e.from+image, name.Insecure)
	if err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	img, err := remote.Image(ref, remote.WithContext(ctx), remote.WithTransport(e.client))
	if err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	to, err := layout.Write(e.dir, empty.Index)
	if err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	if err := to.AppendImage(img); err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	return nil
}

// Verify checks every content in the engine's store.
func (e *LibraryEngine) Verify(contents []v1.Descriptor) error {
	return Verify(filepath.Join(e.dir, "blobs", "sha256"), contents)
}

// Close removes the store.
func (e *LibraryEngine) Close() error {
	e.client.CloseIdleConnections()
	return os.RemoveAll(e.dir)
}
