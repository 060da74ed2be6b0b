package supernode

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/supernode/api"
)

func TestMirrorGivesARealClientAnImage(t *testing.T) {
	h := newHub(t)
	img, err := random.Image(300_000, 4)
	require.NoError(t, err)
	direct, err := name.ParseReference(strings.TrimPrefix(h.URL, "http://")+"/demo/app:v1", name.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.Write(direct, img))
	r := start(t, h, t.TempDir(), nil)
	total := 0
	for i := range 3 {
		ref, err := name.ParseReference(strings.TrimPrefix(r.url, "http://")+"/hub.test/demo/app:v1", name.Insecure)
		require.NoError(t, err)
		got, err := remote.Image(ref)
		require.NoError(t, err)
		want, err := img.Digest()
		require.NoError(t, err)
		sum, err := got.Digest()
		require.NoError(t, err)
		require.Equal(t, want, sum)
		_, err = got.RawConfigFile()
		require.NoError(t, err)
		layers, err := got.Layers()
		require.NoError(t, err)
		for _, l := range layers {
			rc, err := l.Compressed()
			require.NoError(t, err)
			_, err = io.Copy(io.Discard, rc) // verified on the way
			require.NoError(t, err)
			require.NoError(t, rc.Close())
		}
		if i == 0 {
			total = r.metric("damselfly_origin_bytes_total")
			size, err := partial.Size(img)
			require.NoError(t, err)
			require.Greater(t, int64(total), size)
		}
		require.Equal(t, total, r.metric("damselfly_origin_bytes_total"))
		require.Equal(t, total, r.metric("damselfly_unique_bytes_total"))
	}
	require.Equal(t, 5, h.times(blobs), "four layers and a config")
	require.Equal(t, 1, h.times("GET /v2/demo/app/manifests/"))
}

func TestMirrorAnswersAsARegistryDoes(t *testing.T) {
	h := newHub(t)
	b := newBytes(1<<20 + 5)
	d := h.blob(t, b)
	manifest := []byte(`{"schemaVersion":2}`)
	md := h.manifest(t, manifest)
	r := start(t, h, t.TempDir(), nil)
	for _, cached := range []bool{false, true} {
		for _, c := range []struct {
			method, path, span string
			status             int
			body               []byte
			header             map[string]string
		}{
			{"GET", "/v2/", "", 200, []byte("{}"), nil},
			{"HEAD", v2("blobs", d), "", 200, nil, map[string]string{"Content-Length": fmt.Sprint(len(b)), "Docker-Content-Digest": d, "Oci-Namespace": "hub.test"}},
			{"GET", v2("blobs", d), "bytes=0-99", 206, b[:100], map[string]string{"Content-Range": fmt.Sprintf("bytes 0-99/%d", len(b))}},
			{"GET", v2("blobs", d), "bytes=-5", 206, b[len(b)-5:], nil},
			{"GET", v2("blobs", d), "bytes=1000000-9999999", 206, b[1000000:], map[string]string{"Content-Length": fmt.Sprint(len(b) - 1000000)}},
			{"GET", v2("blobs", d), "bytes=300000-", 206, b[300000:], nil},
			{"GET", v2("blobs", d), fmt.Sprintf("bytes=%d-", len(b)), 416, nil, map[string]string{"Content-Range": fmt.Sprintf("bytes */%d", len(b))}},
			{"GET", v2("blobs", d), "", 200, b, map[string]string{"Docker-Content-Digest": d, "Content-Encoding": ""}},
			{"GET", v2("manifests", "v1"), "", 200, manifest, map[string]string{"Docker-Content-Digest": md, "Content-Type": manifestType}},
			{"HEAD", v2("manifests", "v1"), "", 200, nil, map[string]string{"Docker-Content-Digest": md, "Content-Length": fmt.Sprint(len(manifest))}},
			{"GET", v2("manifests", md), "bytes=0-", 200, manifest, map[string]string{"Content-Type": manifestType}},
			{"GET", v2("tags", "list"), "", 200, ask(t, h.URL+"/v2/demo/app/tags/list").body, nil},
			{"GET", v2("blobs", "sha256:totallywrong"), "", 400, nil, nil},
			{"GET", "/v2/demo/app/manifests/v1", "", 404, nil, nil},
			{"GET", "/v2/demo/app/nothing/v1?ns=hub.test", "", 404, nil, nil},
			{"PUT", v2("manifests", "v1"), "", 405, nil, nil},
			{"POST", "/v2/demo/app/blobs/uploads/", "", 405, nil, nil},
			{"GET", "/nothing", "", 404, nil, map[string]string{api.ErrorHeader: api.CodeNotFound}},
			{"POST", "/v1/tasks", "", 405, nil, map[string]string{api.ErrorHeader: api.CodeNotAllowed}},
			{"GET", "/healthz", "", 200, []byte("ok\n"), nil},
			{"GET", "/readyz", "", 200, []byte("ok\n"), nil},
		} {
			got := r.get(c.method, c.path, "Range", c.span)
			require.NoError(t, got.err)
			require.Equal(t, c.status, got.status, "%s %s %s: %s", c.method, c.path, c.span, got.body)
			if c.body != nil {
				require.Equal(t, hexOf(c.body), hexOf(got.body), "%s %s %s", c.method, c.path, c.span)
			}
			for k, v := range c.header {
				require.Equal(t, v, got.header.Get(k), "%s %s %s", c.method, c.path, k)
			}
		}
		require.Equal(t, 1, h.times(blobs), "cached: %v", cached)
	}
	require.Contains(t, string(r.get("GET", "/v1/tasks").body), d)
	require.Contains(t, string(r.get("GET", "/v1/hosts").body), `"id":"supernode"`)
	require.Contains(t, string(r.get("GET", "/metrics").body), "damselfly_cache_bytes")
}

func TestFailureOfOursIsMarked(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(1000))
	h.Close()
	r := start(t, h, t.TempDir(), nil)
	for _, path := range []string{v2("blobs", d), v2("manifests", "v1"), v2("manifests", d), v2("tags", "list")} {
		got := r.get(http.MethodGet, path)
		require.Equal(t, http.StatusBadGateway, got.status, path)
		require.Equal(t, api.CodeUnavailable, got.header.Get(api.ErrorHeader), path)
	}
}

func TestTagIsCheckedWhenItIsNoLongerFresh(t *testing.T) {
	h := newHub(t)
	old := h.manifest(t, []byte(`{"schemaVersion":2}`))
	r := start(t, h, t.TempDir(), func(c *Config) { c.TagFreshness = 0 })
	for range 3 {
		require.Equal(t, old, r.get("GET", v2("manifests", "v1")).header.Get("Docker-Content-Digest"))
	}
	require.Equal(t, 3, h.times("HEAD /v2/demo/app/manifests/v1"))
	require.Equal(t, 1, h.times("GET /v2/demo/app/manifests/"))
	require.Equal(t, 19, r.metric("damselfly_origin_bytes_total"))

	next := h.manifest(t, []byte(`{"schemaVersion":2} `))
	got := r.get("GET", v2("manifests", "v1"))
	require.Equal(t, next, got.header.Get("Docker-Content-Digest"))
	require.Equal(t, next, digest.FromBytes(got.body).String())
	require.Equal(t, 2, h.times("GET /v2/demo/app/manifests/"))
	require.Equal(t, r.metric("damselfly_unique_bytes_total"), r.metric("damselfly_origin_bytes_total"))
}

func TestTagIsServedAsLastKnownWhileTheRegistryIsAway(t *testing.T) {
	h := newHub(t)
	h.manifest(t, []byte(`{"schemaVersion":2}`))
	dir := t.TempDir()
	stale := func(c *Config) { c.TagFreshness = 0 }
	r := start(t, h, dir, stale)
	require.Empty(t, r.get("GET", v2("manifests", "v1")).header.Get(api.StaleHeader))
	require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)
	r.stop()

	h.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusBadGateway)
		return true
	})
	r = start(t, h, dir, stale)
	for _, method := range []string{"GET", "HEAD"} {
		got := r.get(method, v2("manifests", "v1"))
		require.Equal(t, 200, got.status, string(got.body))
		require.Equal(t, "1", got.header.Get(api.StaleHeader))
	}
	require.Equal(t, 2, r.metric("damselfly_stale_answers_total"))
	r.stop()

	h.misbehave(nil)
	r = start(t, h, dir, stale)
	require.Empty(t, r.get("GET", v2("manifests", "v1")).header.Get(api.StaleHeader))
	h.misbehave(private("Basic good"))
	got := r.get("GET", v2("manifests", "v1"))
	require.Equal(t, 401, got.status, "a no is a no")
	require.Equal(t, noEntry, string(got.body))
	r.stop()

	h.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusBadGateway)
		return true
	})
	r = start(t, h, dir, func(c *Config) { c.TagFreshness = 0; c.StaleFor = time.Nanosecond })
	require.Equal(t, 502, r.get("GET", v2("manifests", "v1")).status, "too old")
}

func TestPrivateManifestGoesOnlyToWhomTheRegistryAccepts(t *testing.T) {
	h := newHub(t)
	d := h.manifest(t, []byte(`{"schemaVersion":2}`))
	h.misbehave(private("Basic good"))
	r := start(t, h, t.TempDir(), nil)
	for _, ref := range []string{"v1", d, "v1"} {
		for who, status := range map[string]int{"Basic good": 200, "": 401, "Basic bad": 401} {
			got := r.get("GET", v2("manifests", ref), "Authorization", who)
			require.Equal(t, status, got.status)
			if status == 401 {
				require.Equal(t, noEntry, string(got.body))
			}
		}
	}
	require.Equal(t, 19, r.metric("damselfly_origin_bytes_total"))

	// The registry goes away: what was private is not served to strangers.
	h.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusBadGateway)
		return true
	})
	require.NotEqual(t, 200, r.get("GET", v2("manifests", d)).status)
	require.Equal(t, 200, r.get("GET", v2("manifests", d), "Authorization", "Basic good").status)
}

func TestClientThatTakesOtherTypesGetsAnAnswerOfItsOwn(t *testing.T) {
	h := newHub(t)
	h.manifest(t, []byte(`{"schemaVersion":2}`))
	r := start(t, h, t.TempDir(), nil)
	require.Equal(t, 200, r.get("GET", v2("manifests", "v1"), "Accept", manifestType+";q=0.5, x/y").status)
	require.Equal(t, 1, h.times("GET /v2/demo/app/manifests/"))
	require.Equal(t, 200, r.get("GET", v2("manifests", "v1"), "Accept", "application/vnd.docker.distribution.manifest.v1+json").status)
	require.Equal(t, 2, h.times("GET /v2/demo/app/manifests/"))
	require.Equal(t, 200, r.get("HEAD", v2("manifests", "v1"), "Accept", "x/y").status)
	require.Equal(t, 2, h.times("GET /v2/demo/app/manifests/"))
	require.Equal(t, 200, r.get("GET", "/v2").status)
}

func TestNothingSecretIsKept(t *testing.T) {
	h := newHub(t)
	b := newBytes(600_000)
	d := h.blob(t, b)
	h.manifest(t, []byte(`{"schemaVersion":2}`))
	h.misbehave(private("Basic s3cr3t"))
	dir := t.TempDir()
	r := start(t, h, dir, nil)
	host := dial(t, r, "one")
	_, no := host.join(d, from("Basic s3cr3t"))
	require.Nil(t, no)
	require.Equal(t, 200, r.get("GET", v2("manifests", "v1"), "Authorization", "Basic s3cr3t").status)
	host.content(d)
	r.stop()
	require.NoError(t, filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		f, err := os.Open(path)
		require.NoError(t, err)
		defer func() { _ = f.Close() }()
		content, err := io.ReadAll(f)
		require.NoError(t, err)
		require.NotContains(t, string(content), "s3cr3t", path)
		require.Zero(t, info.Mode().Perm()&0o077, path)
		return nil
	}))
}

func TestListsAreAskedForOnceWhileTheyAreFresh(t *testing.T) {
	h := newHub(t)
	d := h.manifest(t, []byte(`{"schemaVersion":2}`))
	tags, list := "GET /v2/demo/app/tags/list", "/v2/demo/app/tags/list?ns=hub.test&n=1"
	r := start(t, h, t.TempDir(), nil) // fresh for an hour
	hold := make(chan struct{})
	h.misbehave(func(http.ResponseWriter, *http.Request) bool { <-hold; return false })
	answers := make(chan string, 5)
	for range cap(answers) {
		go func() { answers <- string(r.get("GET", list).body) }()
	}
	require.Eventually(t, func() bool { return h.times(tags) > 0 }, wait, poll)
	close(hold)
	for range cap(answers) {
		require.JSONEq(t, `{"name":"demo/app","tags":["v1"]}`, <-answers)
	}
	require.Equal(t, 1, h.times(tags))

	require.Equal(t, 200, r.get("GET", list, "Authorization", "Basic good").status)
	require.Equal(t, 2, h.times(tags), "what one may see another may not")
	require.Equal(t, 200, r.get("GET", v2("tags", "list")).status)
	require.Equal(t, 3, h.times(tags), "another question")

	h.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusNotFound)
		return true
	})
	for range 3 {
		require.Equal(t, 404, r.get("GET", v2("referrers", d)).status)
	}
	require.Equal(t, 1, h.times("GET /v2/demo/app/referrers/"), "that there is none is remembered as long")
	h.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusBadGateway)
		return true
	})
	for range 2 {
		require.Equal(t, 502, r.get("GET", v2("tags", "list")+"&last=x").status)
	}
	require.GreaterOrEqual(t, h.times(tags), 5, "trouble is not")
}

func TestAListTooLongToKeepIsPassedOn(t *testing.T) {
	h := newHub(t)
	long := `{"name":"demo/app","tags":["` + strings.Repeat("v", maxList) + `"]}`
	h.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, long)
		return true
	})
	r := start(t, h, t.TempDir(), nil)
	got := r.get("GET", v2("tags", "list"))
	require.Equal(t, 200, got.status)
	require.Equal(t, hexOf([]byte(long)), hexOf(got.body))
}

func TestListsAreBounded(t *testing.T) {
	s := newLists(time.Hour)
	body := make([]byte, maxList)
	for range 3 * maxLists / maxList {
		s.put(proof{1}, list{body: body})
		require.LessOrEqual(t, s.size, 2*maxList, "one list is counted once")
	}
	s.put(proof{2}, list{})
	require.Len(t, s.known, 2)
	for i := range 3 * maxLists / maxList {
		s.put(proof{byte(i)}, list{body: body})
		require.LessOrEqual(t, len(s.known)*maxList, maxLists)
	}
}
