package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"runtime"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A Sample is a small image made of a seed, so that each has bytes of its own.
type Sample struct {
	Image v1.Image      // of this machine's platform
	Index v1.ImageIndex // that the image is one of, or nil
	// Artifact refers to the image, as a signature or a list of parts does; or nil.
	Artifact v1.Image
}

// The tags of a sample: of the image or its index, and of the artifact.
const (
	Tag         = "v1"
	ArtifactTag = "artifact"
)

const zstdLayer types.MediaType = "application/vnd.oci.image.layer.v1.tar+zstd"

// SampleKinds are the ways to make a Sample.
var SampleKinds = map[string]func(seed string) (Sample, error){
	"plain":       func(seed string) (Sample, error) { return plain(seed, 600_000, 90_000, 500) },
	"index":       multiArch,
	"zstd":        zstd,
	"100 layers":  hundred,
	"empty layer": withEmpty,
	"no bytes":    withoutBytes,
	"artifact":    withArtifact,
}

// noise are bytes that the seed makes, and that do not compress.
func noise(seed string, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte(seed))).Read(b)
	return b
}

// layer holds one file of noise.
func layer(seed string, size int, kind types.MediaType, by compression.Compression) (v1.Layer, error) {
	text := new(bytes.Buffer)
	out := tar.NewWriter(text)
	header := &tar.Header{Name: fmt.Sprintf("%x", sha256.Sum256([]byte(seed))), Mode: 0o644, Size: int64(size), ModTime: stamp}
	if err := out.WriteHeader(header); err != nil {
		return nil, err
	}
	if _, err := out.Write(noise(seed, size)); err != nil {
		return nil, err
	}
	if err := out.Close(); err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text.Bytes())), nil }
	return tarball.LayerFromOpener(open, tarball.WithMediaType(kind), tarball.WithCompression(by), tarball.WithCompressionLevel(1))
}

// of makes an image of layers.
func of(architecture string, layers ...v1.Layer) (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(img, layers...)
	if err != nil {
		return nil, err
	}
	config := configured(img)
	config.Architecture = architecture
	return mutate.ConfigFile(img, config)
}

func sized(seed, architecture string, sizes ...int) (v1.Image, error) {
	layers := make([]v1.Layer, len(sizes))
	for i, size := range sizes {
		var err error
		if layers[i], err = layer(fmt.Sprint(seed, i), size, types.OCILayer, compression.GZip); err != nil {
			return nil, err
		}
	}
	return of(architecture, layers...)
}

func plain(seed string, sizes ...int) (Sample, error) {
	img, err := sized(seed, runtime.GOARCH, sizes...)
	return Sample{Image: img}, err
}

// multiArch is one of three platforms.
func multiArch(seed string) (s Sample, err error) {
	s.Index = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, architecture := range []string{"riscv64", runtime.GOARCH, "s390x"} {
		img, err := sized(seed+architecture, architecture, 200_000, 700)
		if err != nil {
			return s, err
		}
		s.Index = mutate.AppendManifests(s.Index, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: architecture}},
		})
		if architecture == runtime.GOARCH {
			s.Image = img
		}
	}
	return s, nil
}

func zstd(seed string) (Sample, error) {
	big, err := layer(seed, 300_000, zstdLayer, compression.ZStd)
	if err != nil {
		return Sample{}, err
	}
	small, err := layer(seed+"small", 400, zstdLayer, compression.ZStd)
	if err != nil {
		return Sample{}, err
	}
	img, err := of(runtime.GOARCH, big, small)
	return Sample{Image: img}, err
}

func hundred(seed string) (Sample, error) {
	sizes := make([]int, 100)
	for i := range sizes {
		sizes[i] = 100 + i*i
	}
	return plain(seed, sizes...)
}

// withEmpty has a layer without files.
func withEmpty(seed string) (Sample, error) {
	noFiles := make([]byte, 1024+512*int(noise(seed, 1)[0])) // an archive's end, and what fills it up
	return over(seed, func() (v1.Layer, error) {
		return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(noFiles)), nil },
			tarball.WithMediaType(types.OCILayer))
	})
}

// withoutBytes has a layer of 0 bytes.
func withoutBytes(seed string) (Sample, error) {
	return over(seed, func() (v1.Layer, error) { return static.NewLayer(nil, types.OCIUncompressedLayer), nil })
}

// over has a layer above one with a file.
func over(seed string, above func() (v1.Layer, error)) (Sample, error) {
	first, err := layer(seed, 5000, types.OCILayer, compression.GZip)
	if err != nil {
		return Sample{}, err
	}
	second, err := above()
	if err != nil {
		return Sample{}, err
	}
	img, err := of(runtime.GOARCH, first, second)
	return Sample{Image: img}, err
}

func withArtifact(seed string) (Sample, error) {
	s, err := plain(seed, 200_000)
	if err != nil {
		return s, err
	}
	artifact, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{Author: seed})
	if err != nil {
		return s, err
	}
	artifact = mutate.ConfigMediaType(mutate.MediaType(artifact, types.OCIManifestSchema1), "application/vnd.example.parts.v1+json")
	artifact, err = mutate.AppendLayers(artifact, static.NewLayer(noise(seed+"artifact", 3000), "text/plain"))
	if err != nil {
		return s, err
	}
	subject, err := partial.Descriptor(s.Image)
	if err != nil {
		return s, err
	}
	s.Artifact = mutate.Subject(artifact, *subject).(v1.Image)
	return s, nil
}

// Push uploads a sample, by its tags, to a repository such as
// "10.0.0.1:5000/demo/app".
func (s Sample) Push(ctx context.Context, repo string, login authn.Authenticator, transport http.RoundTripper, opts ...name.Option) error {
	to, err := name.NewRepository(repo, opts...)
	if err != nil {
		return fmt.Errorf("push to %s: %w", repo, err)
	}
	as := []remote.Option{remote.WithContext(ctx), remote.WithTransport(transport), remote.WithAuth(login)}
	if s.Index != nil {
		err = remote.WriteIndex(to.Tag(Tag), s.Index, as...)
	} else {
		err = remote.Write(to.Tag(Tag), s.Image, as...)
	}
	if err == nil && s.Artifact != nil {
		err = remote.Write(to.Tag(ArtifactTag), s.Artifact, as...)
	}
	if err != nil {
		return fmt.Errorf("push to %s: %w", repo, err)
	}
	return nil
}

// Platform lists all that a pull for this machine's platform brings.
func (s Sample) Platform() ([]v1.Descriptor, error) {
	contents, err := Contents(s.Image)
	if err != nil || s.Index == nil {
		return contents, err
	}
	self, err := partial.Descriptor(s.Index)
	if err != nil {
		return nil, err
	}
	return append(contents, *self), nil
}

// Metadata is Platform, and the manifests and configurations of all others.
func (s Sample) Metadata() ([]v1.Descriptor, error) {
	return s.and(func(contents []v1.Descriptor) []v1.Descriptor { return contents[:2] })
}

// All lists all that there is but the artifact.
func (s Sample) All() ([]v1.Descriptor, error) {
	return s.and(func(contents []v1.Descriptor) []v1.Descriptor { return contents })
}

// and is Platform, and of the other platforms' images what part says.
func (s Sample) and(part func([]v1.Descriptor) []v1.Descriptor) ([]v1.Descriptor, error) {
	contents, err := s.Platform()
	if err != nil || s.Index == nil {
		return contents, err
	}
	index, err := s.Index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, m := range index.Manifests {
		if m.Platform.Architecture == runtime.GOARCH {
			continue
		}
		img, err := s.Index.Image(m.Digest)
		if err != nil {
			return nil, err
		}
		more, err := Contents(img)
		if err != nil {
			return nil, err
		}
		contents = append(contents, part(more)...)
	}
	return contents, nil
}

// Noise makes an image of layers that are noise of these lengths, the same for each
// seed: nothing about it compresses, and nothing unpacks it.
func Noise(seed string, layers ...int) (v1.Image, error) {
	made := make([]v1.Layer, len(layers))
	for i, n := range layers {
		made[i] = static.NewLayer(noise(fmt.Sprint(seed, " ", i), n), types.OCIUncompressedLayer)
	}
	return of(runtime.GOARCH, made...)
}
