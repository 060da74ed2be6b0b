// Package conformance_test asks what the OCI distribution specification wants of
// who is read from, section by section: of a registry, so that the questions are
// proved, and of a supernode and a dfdaemon before it.
package conformance_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode"
	"damselfly.dev/test/meter"
	"damselfly.dev/test/region"
)

const (
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	indexType    = "application/vnd.oci.image.index.v1+json"
	configType   = "application/vnd.oci.image.config.v1+json"

	modern = "modern.test" // a registry that has all of the specification
	old    = "old.test"    // one without the referrers API
	app    = "conf/app"    // the repository there
)

// registry is one in memory. It remembers what it was asked.
type registry struct {
	*httptest.Server
	mu    sync.Mutex
	asked []*url.URL
}

func newRegistry(t *testing.T, referrers bool) *registry {
	t.Helper()
	cfg := config.Config{Storage: config.ConfigStorage{StoreType: config.StoreMem}}
	cfg.API.Referrer.Enabled = &referrers
	cfg.API.Referrer.Limit = 2000                      // so that a list has pages
	cfg.API.Referrer.PageCacheExpire = time.Nanosecond // what it remembers it gives without the filters' header
	inner := olareg.New(cfg)
	g := &registry{}
	g.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		g.asked = append(g.asked, r.URL)
		g.mu.Unlock()
		if r.URL.Path == "/v2/"+app+"/tags/list" && r.URL.Query().Get("n") == "0" { // olareg panics
			w.Header().Set("Content-Type", "application/json")
			_, _ = fmt.Fprintf(w, `{"name":%q,"tags":[]}`, app)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		g.Close()
		require.NoError(t, inner.Close())
	})
	return g
}

// forget has the registry not know what it was asked.
func (g *registry) forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = nil
}

// put sends b to a path or URL, and returns the Location of the answer.
func (g *registry) put(t *testing.T, method, path, mediaType string, b []byte) (to *url.URL) {
	t.Helper()
	target := path
	if strings.HasPrefix(path, "/") {
		target = g.URL + path
	}
	r, err := http.NewRequestWithContext(t.Context(), method, target, bytes.NewReader(b))
	require.NoError(t, err)
	r.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	_, _ = io.Copy(io.Discard, resp.Body)
	require.Less(t, resp.StatusCode, 300, path)
	to, err = resp.Location()
	require.NoError(t, err)
	return to
}

// blob puts b into the repository.
func (g *registry) blob(t *testing.T, d digest.Digest, b []byte) {
	t.Helper()
	to := g.put(t, http.MethodPost, "/v2/"+app+"/blobs/uploads/?digest-algorithm="+d.Algorithm().String(), "", nil)
	q := to.Query()
	q.Set("digest", d.String())
	to.RawQuery = q.Encode()
	g.put(t, http.MethodPut, to.String(), "application/octet-stream", b)
}

// manifest puts a manifest under a tag, or its digest where that is "".
func (g *registry) manifest(t *testing.T, algorithm digest.Algorithm, tag, mediaType string, fields map[string]any) document {
	t.Helper()
	fields["schemaVersion"], fields["mediaType"] = 2, mediaType
	b, err := json.MarshalIndent(fields, "", "  ")
	require.NoError(t, err)
	d := algorithm.FromBytes(b)
	if tag == "" {
		tag = d.String()
	}
	g.put(t, http.MethodPut, "/v2/"+app+"/manifests/"+tag, mediaType, b)
	return document{d, mediaType, b}
}

// document is a manifest or a blob.
type document struct {
	digest    digest.Digest
	mediaType string
	body      []byte
}

func (d document) descriptor() map[string]any {
	return map[string]any{"mediaType": d.mediaType, "digest": d.digest, "size": len(d.body)}
}

// contents is what is in the registries.
type contents struct {
	layer, small, empty, layer384, layer512 document // blobs
	image, image512, index                  document // manifests; image is v1
	tags                                    []string // in order
	sbom, signature, child                  document // refer to image; child is an index
	crowd                                   int      // how many refer to index
	list                                    document // the fallback of image in old
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{7, byte(n)})
	_, _ = rng.Read(b)
	return b
}

// fill puts the contents into both registries.
func fill(t *testing.T, g, without *registry) (c contents) {
	t.Helper()
	blob := func(algorithm digest.Algorithm, b []byte) document {
		d := document{algorithm.FromBytes(b), "application/vnd.oci.image.layer.v1.tar", b}
		g.blob(t, d.digest, b)
		without.blob(t, d.digest, b)
		return d
	}
	c.layer, c.small = blob(digest.SHA256, randomBytes(1_300_000)), blob(digest.SHA256, randomBytes(3000))
	c.empty = blob(digest.SHA256, nil)
	c.layer384, c.layer512 = blob(digest.SHA384, randomBytes(4000)), blob(digest.SHA512, randomBytes(700_000))
	configBlob := blob(digest.SHA256, []byte("{}"))
	configBlob.mediaType = configType
	image := func(layers ...document) map[string]any {
		descriptors := []any{}
		for _, l := range layers {
			descriptors = append(descriptors, l.descriptor())
		}
		return map[string]any{"config": configBlob.descriptor(), "layers": descriptors}
	}
	c.image = g.manifest(t, digest.SHA256, "v1", manifestType, image(c.layer, c.small))
	without.manifest(t, digest.SHA256, "v1", manifestType, image(c.layer, c.small))
	c.image512 = g.manifest(t, digest.SHA512, "", manifestType, image(c.layer512))
	c.index = g.manifest(t, digest.SHA256, "multi", indexType, map[string]any{"manifests": []any{c.image.descriptor()}})
	c.tags = []string{"Latest", "a1", "a2", "b_1", "multi", "v1", "v1.0"}
	for _, tag := range []string{"a2", "v1.0", "Latest", "b_1", "a1"} {
		g.put(t, http.MethodPut, "/v2/"+app+"/manifests/"+tag, manifestType, c.image.body)
	}
	refer := func(to, what document, kind, note string) document {
		m := image()
		m["subject"], m["annotations"] = to.descriptor(), map[string]string{"note": note}
		if kind != "" {
			m["artifactType"] = kind
		}
		if what.mediaType == indexType {
			delete(m, "config")
			delete(m, "layers")
			m["manifests"] = []any{}
		}
		return g.manifest(t, digest.SHA256, "", what.mediaType, m)
	}
	c.sbom = refer(c.image, c.image, "application/vnd.test.sbom", "one")
	c.signature = refer(c.image, c.image, "", "two")
	c.child = refer(c.image, c.index, "", "three")
	for c.crowd < 20 {
		c.crowd++
		refer(c.index, c.image, "application/vnd.test.sbom", fmt.Sprint("number ", c.crowd))
	}
	tag := strings.Replace(c.image.digest.String(), ":", "-", 1)
	c.list = without.manifest(t, digest.SHA256, tag, indexType, map[string]any{"manifests": []any{c.image.descriptor()}})
	return c
}

// target is who is asked: registry finds the base URL of one by its name. A
// mirror is told the name.
type target struct {
	name   string
	mirror bool
	base   func(registry string) string
}

func (s target) url(registry, path string) string {
	u := s.base(registry) + path
	if !s.mirror {
		return u
	}
	if strings.Contains(path, "?") {
		return u + "&ns=" + registry
	}
	return u + "?ns=" + registry
}

func quiet(t *testing.T) *zap.Logger {
	t.Helper()
	return zaptest.NewLogger(t, zaptest.Level(zap.ErrorLevel))
}

func startSupernode(t *testing.T, registries registryproxy.Config) (base string) {
	t.Helper()
	cfg := supernode.Default()
	cfg.DataDir, cfg.Listen, cfg.Registries = t.TempDir(), "127.0.0.1:0", registries
	address, _, _ := region.StartSupernode(t, cfg, quiet(t))
	return "http://" + address
}

// startHost runs a dfdaemon in the region of a supernode, "" for none.
func startHost(t *testing.T, registries registryproxy.Config, centre string) (base string) {
	t.Helper()
	cfg := region.Host(t)
	cfg.Registries = registries
	if centre != "" {
		cfg.Supernodes = []string{centre}
	}
	d, metrics, _ := region.StartHost(t, cfg, quiet(t))
	if centre != "" {
		require.Eventually(t, func() bool { return meter.Value(t, metrics, "damselfly_session_up", "") == 1 }, 30*time.Second, 10*time.Millisecond)
		t.Cleanup(func() {
			require.Zero(t, meter.Value(t, metrics, "damselfly_fallbacks_total", ""), "streams went past the region")
		})
	}
	return "http://" + d.MirrorAddr()
}
