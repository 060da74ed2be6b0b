package image

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func TestSamples(t *testing.T) {
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true)))
	t.Cleanup(s.Close)
	for kind, of := range SampleKinds {
		sample, err := of("seed")
		if err != nil {
			t.Fatal(err)
		}
		again, err := of("seed")
		if err != nil {
			t.Fatal(err)
		}
		contents, err := sample.All()
		if err != nil {
			t.Fatal(err)
		}
		same, err := again.All()
		if err != nil {
			t.Fatal(err)
		}
		digest := func(d v1.Descriptor) string { return d.Digest.String() }
		if !slices.EqualFunc(contents, same, func(a, b v1.Descriptor) bool { return digest(a) == digest(b) }) {
			t.Errorf("%s: one seed makes different images", kind)
		}
		repo := strings.TrimPrefix(s.URL, "http://") + "/" + strings.ReplaceAll(kind, " ", "-")
		if err := sample.Push(t.Context(), repo, authn.Anonymous, http.DefaultTransport, name.Insecure); err != nil {
			t.Fatal(err)
		}
		from, err := name.NewRepository(repo, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range contents {
			l, err := remote.Layer(from.Digest(c.Digest.String()))
			if c.MediaType.IsImage() || c.MediaType.IsIndex() {
				_, err = remote.Get(from.Digest(c.Digest.String()))
			} else if err == nil {
				_, err = l.Size()
			}
			if err != nil {
				t.Errorf("%s: %v", kind, err)
			}
		}
	}
}
