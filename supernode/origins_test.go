package supernode

import (
	"bytes"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// twoHubs runs a supernode for hub.test and for other.test, a registry of
// somebody else.
func twoHubs(t *testing.T, h, other *hub) *testRegion {
	t.Helper()
	return start(t, h, t.TempDir(), func(c *Config) {
		c.Registries.Upstreams = append(c.Registries.Upstreams, registryproxy.Upstream{Name: "other.test", URL: other.URL})
	})
}

func fromOther() api.Origin { return api.Origin{Registry: "other.test", Repository: "demo/app"} }

// claims says that a registry has every blob, of n bytes, and sends those it is
// given for it.
func claims(n int, bytes []byte) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", strconv.Itoa(n))
		w.Header().Set("Docker-Content-Digest", r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:])
		if r.Method == http.MethodGet {
			_, _ = w.Write(bytes)
		}
		return true
	}
}

func TestRegistryThatOnlyClaimsABlobOpensNothing(t *testing.T) {
	h, evil := newHub(t), newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	h.misbehave(private("Basic good"))
	wrong := bytes.Repeat([]byte("x"), len(b))
	evil.misbehave(claims(len(b), wrong))
	r := twoHubs(t, h, evil)
	owner, thief := dial(t, r, "owner"), dial(t, r, "thief")
	_, no := owner.join(d, from("Basic good"))
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(owner.content(d)))

	_, no = thief.join(d, fromOther())
	require.NotNil(t, no)
	require.False(t, no.Final, "the thief is to ask the registry it names")
	_, no = thief.join(d, api.Origin{URL: evil.URL + "/v2/demo/app/blobs/" + d})
	require.NotNil(t, no)
	got := r.get(http.MethodGet, "/v2/demo/app/blobs/"+d+"?ns=other.test")
	require.Error(t, got.err, "what is no such blob looks whole")
	require.True(t, bytes.HasPrefix(wrong, got.body), "its own bytes and no others")
	require.Equal(t, hexOf(b), hexOf(r.get(http.MethodGet, v2("blobs", d), "Authorization", "Basic good").body))
}

// A registry says that a tag of its own is somebody else's manifest, and then goes away.
func TestTagOfAnothersManifestOpensNothing(t *testing.T) {
	h, evil := newHub(t), newHub(t)
	manifest := []byte(`{"schemaVersion":2}`)
	d := h.manifest(t, manifest)
	h.misbehave(private("Basic good"))
	evil.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Type", manifestType)
		w.Header().Set("Content-Length", strconv.Itoa(len(manifest)))
		w.Header().Set("Docker-Content-Digest", d)
		return r.Method == http.MethodHead
	})
	r := start(t, h, t.TempDir(), func(c *Config) {
		c.TagFreshness = 0
		c.Registries.Upstreams = append(c.Registries.Upstreams, registryproxy.Upstream{Name: "other.test", URL: evil.URL})
	})
	require.Equal(t, 200, r.get(http.MethodGet, v2("manifests", d), "Authorization", "Basic good").status)
	const theft = "/v2/demo/app/manifests/v1?ns=other.test"
	require.NotEqual(t, 200, r.get(http.MethodGet, theft).status)
	_, noted := r.tags.get("other.test/demo/app:v1")
	require.True(t, noted)

	evil.misbehave(away)
	got := r.get(http.MethodGet, theft)
	require.NotEqual(t, 200, got.status)
	require.NotContains(t, string(got.body), string(manifest))
	require.Equal(t, 200, r.get(http.MethodGet, v2("manifests", d), "Authorization", "Basic good").status)
}

func TestWhatOneRegistryBeganAnotherDoesNotGoOnWith(t *testing.T) {
	h, evil := newHub(t), newHub(t)
	b := newBytes(2 << 20)
	d := h.blob(t, b)
	evil.misbehave(claims(len(b), bytes.Repeat([]byte("x"), 1<<20))) // and then it breaks off
	r := twoHubs(t, h, evil)
	_, no := dial(t, r, "victim of its own").join(d, fromOther())
	require.Nil(t, no)
	one := dial(t, r, "one")
	_, no = one.join(d, from("")) // while the other's bytes still come
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(one.content(d)))
	require.Equal(t, hexOf(b), hexOf(r.get(http.MethodGet, v2("blobs", d)).body))
	require.Equal(t, 1, h.times(blobs+d), "one fetch")
}

func TestSameBlobOfTwoRegistriesIsOneContent(t *testing.T) {
	h, other := newHub(t), newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	require.Equal(t, d, other.blob(t, b))
	r := twoHubs(t, h, other)
	one := dial(t, r, "one")
	_, no := one.join(d, from(""))
	require.Nil(t, no)
	one.content(d)
	for _, name := range []string{"two", "three"} {
		next := dial(t, r, name)
		_, no = next.join(d, fromOther())
		require.Nil(t, no)
		require.Equal(t, hexOf(b), hexOf(next.content(d)))
	}
	require.Equal(t, 1, h.times(blobs+d))
	require.Equal(t, 1, other.times(blobs+d), "read once, to see that it is the same")
	require.Equal(t, len(b), r.metric("damselfly_unique_bytes_total"))
}

// What goes past the cache has its digest, too, or breaks off before its end: also where
// the registry names no length.
func TestWrongBytesBreakOffPastTheCache(t *testing.T) {
	h, other := newHub(t), newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	other.blob(t, b)
	r := twoHubs(t, h, other)
	require.Equal(t, hexOf(b), hexOf(r.get(http.MethodGet, v2("blobs", d)).body)) // and others have to show that they have it
	path := "/v2/demo/app/blobs/" + d + "?ns=other.test"
	for name, sends := range map[string][]byte{"right": b, "another": newBytes(1 << 20)[1:], "with more": append(bytes.Clone(b), 1)} {
		for _, length := range []bool{true, false} {
			asked := 0
			other.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
				if length {
					w.Header().Set("Content-Length", strconv.Itoa(len(sends)))
				}
				if r.Method == http.MethodHead {
					return true
				}
				if asked++; asked%2 == 1 { // that which would let it into the cache
					w.Header().Set("Content-Length", "1")
				}
				_, _ = w.Write(sends)
				return true
			})
			got := r.get(http.MethodGet, path)
			require.Equal(t, name == "right", got.err == nil && len(got.body) == len(sends), "%s: %d bytes, %v", name, len(got.body), got.err)
		}
	}
}
