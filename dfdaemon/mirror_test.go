package dfdaemon

import (
	"bytes"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

const manifestType = "application/vnd.oci.image.manifest.v1+json"

// registry is one that holds what it is given. What intercept answers, with
// true, is its answer.
type registry struct {
	*httptest.Server
	mu        sync.Mutex
	contents  map[string][]byte // by path
	asked     map[string]int    // by method and path
	intercept func(w http.ResponseWriter, r *http.Request) bool
}

func newRegistry(t *testing.T) *registry {
	t.Helper()
	g := &registry{contents: map[string][]byte{}, asked: map[string]int{}}
	g.Server = httptest.NewServer(g)
	t.Cleanup(g.Close)
	return g
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	g.asked[r.Method+" "+r.URL.Path]++
	b, ok := g.contents[r.URL.Path]
	g.mu.Unlock()
	switch {
	case g.intercept != nil && g.intercept(w, r):
	case !ok:
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Www-Authenticate", "Custom x")
		w.WriteHeader(http.StatusNotFound)
		_, _ = fmt.Fprintf(w, `{"errors":[{"code":"UNKNOWN_HERE","detail":%q}]}`, r.URL.Path)
	case strings.Contains(r.URL.Path, "/manifests/"):
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(b).String())
		w.Header().Set("Content-Type", manifestType)
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		_, _ = w.Write(b)
	default:
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}
}

// count returns how often a path was asked for.
func (g *registry) count(method, path string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.asked[method+" "+path]
}

// blob puts a blob into org/app.
func (g *registry) blob(b []byte) string {
	d := digest.FromBytes(b).String()
	g.contents["/v2/org/app/blobs/"+d] = b
	return d
}

// manifest puts a manifest into org/app, as v1.
func (g *registry) manifest(b []byte) string {
	d := digest.FromBytes(b).String()
	g.contents["/v2/org/app/manifests/v1"] = b
	g.contents["/v2/org/app/manifests/"+d] = b
	return d
}

// newMirror returns a mirror of one registry, reg.test, whose region is at base,
// "" for none.
func newMirror(t *testing.T, registryURL, base string) *httptest.Server {
	t.Helper()
	gin.SetMode(gin.TestMode)
	log, metrics := zaptest.NewLogger(t), prometheus.NewRegistry()
	store, err := pieces.OpenStore(t.TempDir(), pieces.StoreConfig{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	m := &mirror{store: store, def: "reg.test", log: log}
	m.registry, err = registryproxy.New(registryproxy.Config{
		Upstreams: []registryproxy.Upstream{{Name: "reg.test", URL: registryURL}}, StallTimeout: time.Second,
	}, log, metrics)
	require.NoError(t, err)
	m.metrics, err = newMetrics(metrics, store.Usage)
	require.NoError(t, err)
	m.peer, err = dfget.NewPeer(dfget.PeerConfig{UpLanes: 1, DownLanes: 1}, store, log, metrics)
	require.NoError(t, err)
	m.relay = newRelay(func() (string, bool, bool) { return base, true, base != "" }, nil)
	srv := httptest.NewServer(m.handler())
	t.Cleanup(srv.Close)
	return srv
}

// received is an answer without its body.
type received struct {
	StatusCode    int
	Header        http.Header
	ContentLength int64
}

// ask sends a request with headers ("Key: value") and returns the answer, whose
// body is b.
func ask(t *testing.T, method, url string, headers ...string) (got received, b []byte, err error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	require.NoError(t, err)
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		r.Header.Add(k, v)
	}
	resp, err := http.DefaultTransport.RoundTrip(r) // which follows nothing
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	b, err = io.ReadAll(resp.Body)
	return received{resp.StatusCode, resp.Header, resp.ContentLength}, b, err
}

func get(t *testing.T, url string, headers ...string) (received, []byte) {
	t.Helper()
	resp, b, err := ask(t, http.MethodGet, url, headers...)
	require.NoError(t, err)
	return resp, b
}

func TestMirrorWithoutARegion(t *testing.T) {
	g := newRegistry(t)
	blob := bytes.Repeat([]byte("damselfly"), 100_000)
	d := g.blob(blob)
	manifest := []byte(`{"schemaVersion":2}`)
	md := g.manifest(manifest)
	m := newMirror(t, g.URL, "")

	for _, path := range []string{"/v2/org/app/manifests/v1", "/v2/reg.test/org/app/manifests/v1", "/v2/org/app/manifests/" + md + "?ns=reg.test"} {
		resp, b := get(t, m.URL+path, "Accept: "+manifestType)
		require.Equal(t, http.StatusOK, resp.StatusCode)
		require.Equal(t, manifest, b)
		require.Equal(t, md, resp.Header.Get("Docker-Content-Digest"))
		require.Equal(t, manifestType, resp.Header.Get("Content-Type"))
		require.Equal(t, "reg.test", resp.Header.Get("OCI-Namespace"))
	}
	resp, _, err := ask(t, http.MethodHead, m.URL+"/v2/org/app/manifests/v1")
	require.NoError(t, err)
	require.Equal(t, md, resp.Header.Get("Docker-Content-Digest"))
	require.EqualValues(t, len(manifest), resp.ContentLength)

	resp, b := get(t, m.URL+"/v2/org/app/blobs/"+d)
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.Equal(t, blob, b)
	require.EqualValues(t, len(blob), resp.ContentLength)
	require.Equal(t, d, resp.Header.Get("Docker-Content-Digest"))
	require.Equal(t, `"`+d+`"`, resp.Header.Get("Etag"))
	require.Empty(t, resp.Header.Get("Content-Encoding"))

	resp, _, err = ask(t, http.MethodHead, m.URL+"/v2/org/app/blobs/"+d)
	require.NoError(t, err)
	require.EqualValues(t, len(blob), resp.ContentLength)
	require.Equal(t, d, resp.Header.Get("Docker-Content-Digest"))
}

func TestRanges(t *testing.T) {
	g := newRegistry(t)
	blob := []byte("0123456789")
	d := g.blob(blob)
	empty := g.blob(nil)
	md := g.manifest([]byte(`{"schemaVersion":2}`))
	m := newMirror(t, g.URL, "")
	for _, c := range []struct {
		header, want, contentRange string
		status                     int
	}{
		{"", "0123456789", "", 200},
		{"bytes=0-", "0123456789", "bytes 0-9/10", 206},
		{"bytes=0-0", "0", "bytes 0-0/10", 206},
		{"bytes=4-", "456789", "bytes 4-9/10", 206},
		{"bytes=2-5", "2345", "bytes 2-5/10", 206},
		{"bytes=2-10", "23456789", "bytes 2-9/10", 206},
		{"bytes=2-500000", "23456789", "bytes 2-9/10", 206},
		{"bytes=-3", "789", "bytes 7-9/10", 206},
		{"bytes=-300", "0123456789", "bytes 0-9/10", 206},
		{"bytes=0-6,3-9", "0123456789", "", 200}, // they overlap
		{"bytes=3-4,20-", "34", "bytes 3-4/10", 206},
		{"lines=1-2", "0123456789", "", 200},
		{"bytes=10-", "", "bytes */10", 416},
		{"bytes=10-20", "", "bytes */10", 416},
		{"bytes=20-", "", "bytes */10", 416},
		{"bytes=5-2", "", "bytes */10", 416},
		{"bytes=-0", "", "bytes */10", 416},
		{"bytes=x", "", "bytes */10", 416},
	} {
		resp, b := get(t, m.URL+"/v2/org/app/blobs/"+d, "Range: "+c.header)
		require.Equal(t, c.status, resp.StatusCode, c.header)
		require.Equal(t, c.contentRange, resp.Header.Get("Content-Range"), c.header)
		if c.status != 416 {
			require.Equal(t, c.want, string(b), c.header)
			require.EqualValues(t, len(c.want), resp.ContentLength, c.header)
		} else {
			require.Contains(t, string(b), "UNSUPPORTED")
		}
	}
	resp, _ := get(t, m.URL+"/v2/org/app/blobs/"+d, "Range: bytes=4-", `If-Range: "another"`)
	require.Equal(t, 200, resp.StatusCode)
	resp, _ = get(t, m.URL+"/v2/org/app/blobs/"+d, "Range: bytes=4-", `If-Range: "`+d+`"`)
	require.Equal(t, 206, resp.StatusCode)
	resp, b := get(t, m.URL+"/v2/org/app/blobs/"+d, "Range: bytes=-2,0-0,4-6")
	require.Equal(t, 206, resp.StatusCode)
	require.Len(t, b, int(resp.ContentLength))
	_, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	require.NoError(t, err)
	parts := multipart.NewReader(bytes.NewReader(b), params["boundary"])
	for _, want := range []string{"89", "0", "456"} {
		p, err := parts.NextPart()
		require.NoError(t, err)
		part, err := io.ReadAll(p)
		require.NoError(t, err)
		require.Equal(t, want, string(part))
	}
	for _, path := range []string{"blobs/" + d, "manifests/" + md} {
		resp, b = get(t, m.URL+"/v2/org/app/"+path, `If-None-Match: "`+path[strings.Index(path, "/")+1:]+`"`)
		require.Equal(t, 304, resp.StatusCode, path)
		require.Empty(t, b)
	}
	for _, span := range []string{"", "bytes=0-", "bytes=7-", "bytes=-1", "bytes=0-0,3-4"} {
		resp, b = get(t, m.URL+"/v2/org/app/blobs/"+empty, "Range: "+span)
		require.Equal(t, 200, resp.StatusCode, span)
		require.Empty(t, b)
	}
}

// Without a region several ranges cost few requests, and each asks for no more than
// is wanted.
func TestSeveralRangesFromTheRegistry(t *testing.T) {
	g := newRegistry(t)
	blob := make([]byte, 4<<20)
	for i := range blob {
		blob[i] = byte(i * i >> 8)
	}
	path := "/v2/org/app/blobs/" + g.blob(blob)
	var mu sync.Mutex
	var asked []string
	g.intercept = func(_ http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r.Header.Get("Range"))
		return false
	}
	m := newMirror(t, g.URL, "")
	for _, c := range []struct {
		spans [][2]int // first and last
		want  []string
	}{
		{[][2]int{{10, 19}, {30, 39}, {100_000, 100_009}}, []string{"bytes=10-100009"}},
		{[][2]int{{10, 19}, {2 << 20, 2<<20 + 9}, {2<<20 + 10, 2<<20 + 19}}, []string{"bytes=10-19", "bytes=2097152-2097171"}},
		{[][2]int{{500, 509}, {30, 39}, {50, 59}}, []string{"bytes=500-509", "bytes=30-59"}},
	} {
		mu.Lock()
		asked = nil
		mu.Unlock()
		header := ""
		for _, s := range c.spans {
			header += fmt.Sprintf(",%d-%d", s[0], s[1])
		}
		resp, b := get(t, m.URL+path, "Range: bytes="+header[1:])
		require.Equal(t, http.StatusPartialContent, resp.StatusCode)
		_, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
		require.NoError(t, err)
		parts := multipart.NewReader(bytes.NewReader(b), params["boundary"])
		for _, s := range c.spans {
			p, err := parts.NextPart()
			require.NoError(t, err)
			part, err := io.ReadAll(p)
			require.NoError(t, err)
			require.Equal(t, blob[s[0]:s[1]+1], part)
		}
		require.Equal(t, append([]string{"bytes=0-0"}, c.want...), asked, "first the length")
	}
}

func TestRefusalsAreTheRegistrysOwn(t *testing.T) {
	g := newRegistry(t)
	d := digest.FromString("nothing").String()
	g.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "secret") {
			return false
		}
		w.Header().Add("Www-Authenticate", `Bearer realm="https://auth.test/token",service="reg.test",scope="repository:org/secret:pull"`)
		w.Header().Add("Www-Authenticate", `Basic realm="reg.test"`)
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","detail":"its own words"}]}`)
		return true
	}
	for _, base := range []string{"", newRegion(t, g, nil).URL} {
		m := newMirror(t, g.URL, base)
		for _, path := range []string{
			"/v2/org/app/blobs/" + d, "/v2/org/app/manifests/" + d, "/v2/org/app/manifests/v9",
			"/v2/org/secret/blobs/" + d, "/v2/org/secret/manifests/v1", "/v2/org/app/tags/list",
		} {
			want, body := get(t, g.URL+path, "Authorization: Basic eDp5")
			resp, b := get(t, m.URL+path, "Authorization: Basic eDp5")
			require.Equal(t, want.StatusCode, resp.StatusCode, path)
			require.Equal(t, body, b, path)
			require.Equal(t, want.Header["Www-Authenticate"], resp.Header["Www-Authenticate"], path)
			require.Equal(t, want.Header["Content-Type"], resp.Header["Content-Type"], path)
			require.Empty(t, resp.Header.Get("Docker-Content-Digest"), path)
			require.Empty(t, resp.Header.Get(api.ErrorHeader), path)
		}
	}
}

func TestMirrorRefuses(t *testing.T) {
	m := newMirror(t, newRegistry(t).URL, "")
	sha384 := "sha384:" + strings.Repeat("0", 96)
	for _, c := range []struct {
		method, path string
		status       int
		says         string
	}{
		{"GET", "/v2/", 200, "{}"},
		{"GET", "/v2", 200, "{}"},
		{"POST", "/v2/org/app/blobs/uploads/", 405, "UNSUPPORTED"},
		{"PUT", "/v2/org/app/manifests/v1", 405, "UNSUPPORTED"},
		{"DELETE", "/v2/org/app/manifests/v1", 405, "UNSUPPORTED"},
		{"GET", "/v2/org/app/blobs/sha256:totallywrong", 400, "DIGEST_INVALID"},
		{"GET", "/v2/org/app/blobs/" + sha384, 404, "UNKNOWN_HERE"},
		{"GET", "/v2/org/../app/manifests/v1", 400, "NAME_INVALID"},
		{"GET", "/v2/org/app/manifests/v1?ns=a%2Fb", 400, "NAME_INVALID"},
		{"GET", "/v2/nothing", 404, "UNSUPPORTED"},
		{"GET", "/", 404, "UNSUPPORTED"},
		{"GET", "/metrics", 404, "UNSUPPORTED"},
		{"GET", "/v2/org/app/manifests/v1?ns=127.0.0.1:1", 502, "UNAVAILABLE"},
	} {
		resp, b, err := ask(t, c.method, m.URL+c.path)
		require.NoError(t, err)
		require.Equal(t, c.status, resp.StatusCode, c.path)
		require.Contains(t, string(b), c.says)
		require.Equal(t, c.status == 502, resp.Header.Get(api.ErrorHeader) != "", c.path)
	}
}

// newRegion returns a supernode's /v2/ in front of g. What break does, with
// true, is its answer.
func newRegion(t *testing.T, g *registry, intercept func(w http.ResponseWriter, r *http.Request) bool) *httptest.Server {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if intercept != nil && intercept(w, r) {
			return
		}
		w.Header().Set("Damselfly-Stale", "7")
		g.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return srv
}

func TestTheRegionAnswersFirst(t *testing.T) {
	g := newRegistry(t)
	manifest := []byte(`{"schemaVersion":2}`)
	md := g.manifest(manifest)
	d := g.blob([]byte("blob"))
	g.contents["/v2/org/app/tags/list"] = []byte(`{"tags":[]}`)
	var seen atomic.Pointer[http.Request]
	region := newRegion(t, g, func(_ http.ResponseWriter, r *http.Request) bool { seen.Store(r); return false })
	m := newMirror(t, "http://127.0.0.1:1", region.URL)
	for _, c := range []struct{ method, path, query, want string }{
		{"GET", "/v2/org/app/manifests/v1", "", string(manifest)},
		{"GET", "/v2/reg.test/org/app/manifests/" + md, "", string(manifest)},
		{"HEAD", "/v2/org/app/manifests/v1", "?ns=reg.test", ""},
		{"HEAD", "/v2/org/app/blobs/" + d, "", ""},
		{"GET", "/v2/org/app/tags/list", "?n=2&last=a", `{"tags":[]}`},
	} {
		resp, b, err := ask(t, c.method, m.URL+c.path+c.query, "Accept: a/b", "Accept: c/d", "Authorization: Bearer t", "Cookie: no")
		require.NoError(t, err)
		require.Equal(t, 200, resp.StatusCode, c.path)
		require.Equal(t, c.want, string(b))
		require.Equal(t, "7", resp.Header.Get(api.StaleHeader))
		r := seen.Load()
		require.Equal(t, strings.Replace(c.path, "/reg.test", "", 1), r.URL.Path)
		require.Equal(t, "reg.test", r.URL.Query().Get("ns"))
		require.Equal(t, []string{"a/b", "c/d"}, r.Header["Accept"])
		require.Equal(t, "Bearer t", r.Header.Get("Authorization"))
		require.Empty(t, r.Header.Get("Cookie"))
	}
	require.Equal(t, "a", seen.Load().URL.Query().Get("last"))
	resp, _, err := ask(t, http.MethodHead, m.URL+"/v2/org/app/blobs/"+d)
	require.NoError(t, err)
	require.EqualValues(t, 4, resp.ContentLength)
}

func TestABrokenRegionIsPassedBy(t *testing.T) {
	t.Parallel()
	manifest := []byte(`{"schemaVersion":2}`)
	for name, intercept := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"its own error": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set(api.ErrorHeader, api.CodeUnavailable)
			w.WriteHeader(http.StatusNotFound)
			return true
		},
		"503": func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		},
		"403 by who stands before it": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Del("OCI-Namespace")
			w.WriteHeader(http.StatusForbidden)
			return true
		},
		"408": func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(http.StatusRequestTimeout)
			return true
		},
		"redirect": func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
			return true
		},
		"a page": func(w http.ResponseWriter, _ *http.Request) bool {
			_, _ = io.WriteString(w, "<html>hello")
			return true
		},
		"other bytes": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(manifest).String())
			_, _ = w.Write([]byte(`{"schemaVersion":3}`))
			return true
		},
		"encoded": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(manifest).String())
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(manifest)
			return true
		},
		"truncated": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(manifest).String())
			w.Header().Set("Content-Length", fmt.Sprint(len(manifest)))
			_, _ = w.Write(manifest[:5])
			panic(http.ErrAbortHandler)
		},
		"truncated refusal": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Length", "10")
			w.WriteHeader(http.StatusForbidden)
			panic(http.ErrAbortHandler)
		},
		"endless": func(w http.ResponseWriter, _ *http.Request) bool {
			for range 200 {
				_, _ = w.Write(make([]byte, 64<<10))
			}
			return true
		},
		"silent": func(_ http.ResponseWriter, r *http.Request) bool {
			<-r.Context().Done()
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newRegistry(t)
			md := g.manifest(manifest)
			m := newMirror(t, g.URL, newRegion(t, g, intercept).URL)
			for _, ref := range []string{"v1", md} { // it ends, whatever the region does
				resp, b := get(t, m.URL+"/v2/org/app/manifests/"+ref)
				require.Equal(t, 200, resp.StatusCode)
				require.Equal(t, manifest, b)
				require.Equal(t, 1, g.count("GET", "/v2/org/app/manifests/"+ref))
			}
		})
	}
}

func TestLinksLeadBack(t *testing.T) {
	g := newRegistry(t)
	g.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Link", `<`+r.URL.Path+`?last=b&n=2>; rel="next"`)
		_, _ = io.WriteString(w, `{}`)
		return true
	}
	for _, base := range []string{"", newRegion(t, g, nil).URL} {
		m := newMirror(t, g.URL, base)
		for path, want := range map[string]string{
			"/v2/org/app/tags/list?n=2":             `</v2/org/app/tags/list?last=b&n=2>; rel="next"`,
			"/v2/reg.test/org/app/tags/list?n=2":    `</v2/reg.test/org/app/tags/list?last=b&n=2>; rel="next"`,
			"/v2/org/app/tags/list?n=2&ns=reg.test": `</v2/org/app/tags/list?last=b&n=2&ns=reg.test>; rel="next"`,
		} {
			resp, b := get(t, m.URL+path)
			require.Equal(t, "{}", string(b))
			require.Equal(t, want, resp.Header.Get("Link"))
		}
	}
}

func TestCutAnswersLookCut(t *testing.T) {
	t.Parallel()
	g := newRegistry(t)
	blob := bytes.Repeat([]byte("damselfly"), 100_000)
	d := g.blob(blob)
	g.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" { // it cannot be resumed
			w.WriteHeader(http.StatusBadGateway)
			return true
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		_, _ = w.Write(blob[:500_000])
		panic(http.ErrAbortHandler)
	}
	m := newMirror(t, g.URL, "")
	resp, b, err := ask(t, http.MethodGet, m.URL+"/v2/org/app/blobs/"+d)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.EqualValues(t, len(blob), resp.ContentLength)
	require.Equal(t, blob[:len(b)], b)
}
