// Package image makes container images out of real files: a Debian root and the Go tree.
package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// recipe is part of every cached image's name: raise it when what is made changes.
const recipe = "1"

// Small is an image of some 25 MB in five layers, of the Go tree alone.
func Small(ctx context.Context, cache string) (v1.Image, error) {
	return cached(ctx, cache, "small", func(_ context.Context, goTree, _ string) ([]source, error) {
		return []source{
			{root: goTree, prefix: "usr/local/go", paths: []string{"src/crypto", "src/net"}},
			{root: goTree, prefix: "usr/local/go", paths: []string{"bin"}},
			{root: goTree, prefix: "usr/local/go", paths: []string{"src/cmd/compile", "src/cmd/link"}},
			{root: goTree, prefix: "usr/local/go", paths: []string{"src/runtime", "src/syscall"}},
			{root: goTree, prefix: "usr/local/go", paths: []string{"VERSION", "lib"}},
		}, nil
	})
}

// GoTree is an image of some 75 MB in five layers, of the Go tree alone.
func GoTree(ctx context.Context, cache string) (v1.Image, error) {
	return cached(ctx, cache, "gotree", func(_ context.Context, goTree, _ string) ([]source, error) {
		return wholeTree(goTree), nil
	})
}

// Debian is an image of some 180 MB in eight layers: a Debian root that
// debootstrap makes, which needs root, and the Go tree on top of it.
func Debian(ctx context.Context, cache string) (v1.Image, error) {
	return cached(ctx, cache, "debian", func(ctx context.Context, goTree, work string) ([]source, error) {
		root, err := debootstrap(ctx, work)
		if err != nil {
			return nil, err
		}
		base := []source{
			{root: root, skip: []string{"dev", "proc", "sys", "run", "tmp", "var/cache", "var/log", "var/lib/apt/lists", "usr/lib", "usr/share"}},
			{root: root, paths: []string{"usr/lib"}},
			{root: root, paths: []string{"usr/share"}},
		}
		return append(base, wholeTree(goTree)...), nil
	})
}

func wholeTree(goTree string) []source {
	return []source{
		{root: goTree, prefix: "usr/local/go", paths: []string{"pkg", "lib"}},
		{root: goTree, prefix: "usr/local/go", paths: []string{"bin"}},
		{root: goTree, prefix: "usr/local/go", paths: []string{"src/cmd"}},
		{root: goTree, prefix: "usr/local/go", paths: []string{"src"}, skip: []string{"src/cmd"}},
		{root: goTree, prefix: "usr/local/go", paths: []string{"VERSION", "api", "doc", "misc", "test"}},
	}
}

// sources are the layers of an image, lowest first, made of the Go tree and of
// what it makes itself below work.
type sources func(ctx context.Context, goTree, work string) ([]source, error)

// cached returns the image of that name, which it makes once for each recipe,
// Go tree and processor and keeps below cache.
func cached(ctx context.Context, cache, name string, of sources) (v1.Image, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("find the Go tree: %w", err)
	}
	goTree := strings.TrimSpace(string(out))
	version, err := os.ReadFile(filepath.Join(goTree, "VERSION"))
	if err != nil {
		return nil, fmt.Errorf("read the Go tree's version: %w", err)
	}
	goVersion, _, _ := strings.Cut(string(version), "\n")
	path := filepath.Join(cache, "images", strings.Join([]string{name, recipe, runtime.GOARCH, goVersion}, "-"))
	img, err := load(path)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return img, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make the image cache: %w", err)
	}
	work, err := os.MkdirTemp(filepath.Dir(path), "making-")
	if err != nil {
		return nil, fmt.Errorf("make the image cache: %w", err)
	}
	defer os.RemoveAll(work)
	layers, err := of(ctx, goTree, work)
	if err != nil {
		return nil, err
	}
	if err := build(ctx, work, layers); err != nil {
		return nil, fmt.Errorf("make image %s: %w", name, err)
	}
	err = os.Rename(filepath.Join(work, "layout"), path)
	if err != nil && !errors.Is(err, fs.ErrExist) { // another made the same at the same time
		return nil, fmt.Errorf("keep image %s: %w", name, err)
	}
	return load(path)
}

func load(path string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("load the cached image: %w", err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("load the cached image: %w", err)
	}
	if len(manifest.Manifests) != 1 {
		return nil, fmt.Errorf("load the cached image: %d images in %s", len(manifest.Manifests), path)
	}
	return index.Image(manifest.Manifests[0].Digest)
}

// build writes an image with a layer for each source as an OCI layout below work.
func build(ctx context.Context, work string, sources []source) error {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for i, s := range sources {
		path := filepath.Join(work, fmt.Sprintf("layer%d.tar.gz", i))
		if err := s.write(ctx, path); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		layer, err := tarball.LayerFromFile(path, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	img, err := mutate.ConfigFile(img, configured(img))
	if err != nil {
		return err
	}
	to, err := layout.Write(filepath.Join(work, "layout"), empty.Index)
	if err != nil {
		return err
	}
	return to.AppendImage(img)
}

// configured returns img's configuration with a platform and a command.
func configured(img v1.Image) *v1.ConfigFile {
	config, err := img.ConfigFile()
	if err != nil {
		panic("image: an image in memory has no configuration: " + err.Error())
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config.Cmd = []string{"/usr/local/go/bin/go", "version"}
	return config
}

// Push uploads the image to a registry that speaks plain HTTP.
func Push(ctx context.Context, img v1.Image, ref string, transport http.RoundTripper) error {
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	if err := remote.Write(tag, img, remote.WithContext(ctx), remote.WithTransport(transport)); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	return nil
}

// Contents lists all that a pull of the image brings: manifest, configuration, layers.
func Contents(img v1.Image) ([]v1.Descriptor, error) {
	self, err := partial.Descriptor(img)
	if err != nil {
		return nil, fmt.Errorf("describe the image: %w", err)
	}
	manifest, err := img.Manifest()
	if err != nil {
		return nil, fmt.Errorf("describe the image: %w", err)
	}
	return append([]v1.Descriptor{*self, manifest.Config}, manifest.Layers...), nil
}

// Size is the sum of the sizes of contents, in bytes.
func Size(contents []v1.Descriptor) int64 {
	var sum int64
	for _, c := range contents {
		sum += c.Size
	}
	return sum
}
