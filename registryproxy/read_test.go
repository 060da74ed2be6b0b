package registryproxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/docker/distribution/configuration"
	_ "github.com/docker/distribution/registry/auth/htpasswd"
	"github.com/docker/distribution/registry/handlers"
	_ "github.com/docker/distribution/registry/storage/driver/inmemory"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/bcrypt"
)

const ociManifest = "application/vnd.oci.image.manifest.v1+json"

// push puts a blob and a manifest that is made of it into a registry.
func push(t *testing.T, base, name, blob string, who Caller) (manifest string) {
	t.Helper()
	do := func(method, url, contentType, body string) (location *url.URL) {
		req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
		require.NoError(t, err)
		req.Header.Set("Content-Type", contentType)
		if who.Authorization != "" {
			req.Header.Set("Authorization", who.Authorization)
		}
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		_ = resp.Body.Close()
		require.Less(t, resp.StatusCode, 300, "%s %s", method, url)
		location, _ = resp.Location()
		return location
	}
	at := do("POST", base+"/v2/"+name+"/blobs/uploads/", "", "")
	require.NotNil(t, at)
	q := at.Query()
	q.Set("digest", digestOf(blob))
	at.RawQuery = q.Encode()
	do("PUT", at.String(), "application/octet-stream", blob)
	manifest = fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},"layers":[]}`,
		ociManifest, digestOf(blob), len(blob))
	do("PUT", base+"/v2/"+name+"/manifests/v1", ociManifest, manifest)
	return manifest
}

const alice = "Basic YWxpY2U6d29uZGVybGFuZA==" // alice:wonderland

// withPassword lets a registry of distribution know alice.
func withPassword(t *testing.T) *configuration.Configuration {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte("wonderland"), bcrypt.MinCost)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "htpasswd")
	require.NoError(t, os.WriteFile(file, []byte("alice:"+string(hash)+"\n"), 0o600))
	return &configuration.Configuration{Auth: configuration.Auth{"htpasswd": {"realm": "the registry", "path": file}}}
}

func distribution(t *testing.T, cfg *configuration.Configuration) http.Handler {
	t.Helper()
	logrus.SetOutput(io.Discard)
	cfg.Storage = configuration.Storage{"inmemory": nil, "maintenance": {"uploadpurging": map[any]any{"enabled": false}}}
	cfg.Log.AccessLog.Disabled = true
	cfg.Log.Level = "panic"
	cfg.HTTP.Secret = "secret"
	return handlers.NewApp(t.Context(), cfg)
}

// Real registries are read in every way there is.
func TestRealRegistries(t *testing.T) {
	registries := map[string]struct {
		handler http.Handler
		who     Caller
	}{
		"go-containerregistry": {handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))},
		"distribution":         {handler: distribution(t, &configuration.Configuration{})},
		"with basic auth":      {handler: distribution(t, withPassword(t)), who: Caller{alice}},
	}
	for name, reg := range registries {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(reg.handler)
			defer server.Close()
			blob := strings.Repeat("0123456789", 1000)
			manifest := push(t, server.URL, "org/app", blob, reg.who)
			c := newTestClient(t, Config{Upstreams: []Upstream{{Name: "reg.test", URL: server.URL + "/"}}})
			readEverything(t, c, Repository{"reg.test", "org/app"}, blob, manifest, reg.who)
		})
	}
}

func readEverything(t *testing.T, c *testClient, repo Repository, blob, manifest string, who Caller) {
	t.Helper()
	ctx := t.Context()
	for _, ref := range []string{"v1", digestOf(manifest)} {
		m, err := c.Manifest(ctx, false, repo, ref, []string{ociManifest}, who)
		require.NoError(t, err)
		require.Equal(t, &Manifest{ociManifest, digest.Digest(digestOf(manifest)), int64(len(manifest)), []byte(manifest)}, m)
		m, err = c.Manifest(ctx, true, repo, ref, nil, who)
		require.NoError(t, err)
		require.Equal(t, &Manifest{ociManifest, digest.Digest(digestOf(manifest)), int64(len(manifest)), nil}, m)
	}
	dgst := digestOf(blob)
	size, err := c.HeadBlob(ctx, repo, dgst, who)
	require.NoError(t, err)
	require.EqualValues(t, len(blob), size)
	for _, r := range []ByteRange{{Offset: 0, Length: -1}, {Offset: 1, Length: -1}, {Offset: 9999, Length: -1}, {Offset: 0, Length: 1}, {Offset: 0, Length: 10000}, {Offset: 5000, Length: 10}, {Offset: 9990, Length: 5000}} {
		var b *BlobBody
		end := int64(len(blob))
		if r.Length < 0 {
			b, err = c.Blob(ctx, repo, dgst, r.Offset, who)
		} else {
			b, err = c.BlobRange(ctx, repo, dgst, r, who)
			end = min(end, r.Offset+r.Length)
		}
		require.NoError(t, err, r)
		got, err := io.ReadAll(b)
		require.NoError(t, err, r)
		require.Equal(t, blob[r.Offset:end], string(got), r)
		require.EqualValues(t, len(blob), b.Length)
		require.NoError(t, b.Close())
	}

	resp, err := c.Forward(ctx, http.MethodGet, Route{Kind: KindTags, Repo: repo}, url.Values{"n": {"5"}, "ns": {"x"}}, nil, who)
	require.NoError(t, err)
	var body bytes.Buffer
	_, err = body.ReadFrom(resp.Body)
	require.NoError(t, err)
	_ = resp.Body.Close()
	require.JSONEq(t, `{"name":"org/app","tags":["v1"]}`, body.String())
	resp, err = c.Forward(ctx, http.MethodGet, Route{Kind: KindPing, Repo: Repository{repo.Registry, ""}}, nil, nil, who)
	require.NoError(t, err)
	_ = resp.Body.Close()
	require.Equal(t, 200, resp.StatusCode)

	for _, missing := range []func() error{
		func() error { _, err := c.Manifest(ctx, false, repo, "v2", nil, who); return err },
		func() error { _, err := c.Manifest(ctx, false, repo, sha256a, nil, who); return err },
		func() error { _, err := c.Blob(ctx, repo, sha256a, 0, who); return err },
	} {
		err := missing()
		r := refusalOf(t, err)
		require.Equal(t, 404, r.Status)
		require.True(t, r.Final())
		require.Contains(t, string(r.Body), "_UNKNOWN")
	}
}

// A registry's demand for a password is relayed as it came, and so is its no to
// a wrong one.
func TestBasicAuth(t *testing.T) {
	server := httptest.NewServer(distribution(t, withPassword(t)))
	defer server.Close()
	push(t, server.URL, "org/app", "blob", Caller{alice})
	c := newTestClient(t, Config{Upstreams: []Upstream{{Name: "reg.test", URL: server.URL}}})
	for _, who := range []Caller{{}, {"Basic YWxpY2U6d3Jvbmc="}, {"Bearer x"}} {
		_, err := c.Manifest(t.Context(), false, Repository{"reg.test", "org/app"}, "v1", nil, who)
		r := refusalOf(t, err)
		require.Equal(t, 401, r.Status)
		require.True(t, r.Final())
		require.Equal(t, []string{`Basic realm="the registry"`}, r.Header["Www-Authenticate"])
		require.Contains(t, string(r.Body), "UNAUTHORIZED")
	}
	require.Equal(t, 3, c.count("manifest", resultRefused))
	require.Zero(t, c.count("token", resultFailed)+c.count("token", resultRefused))
}

// Whatever a caller hands in, nothing but a route is made a URL.
func TestUncheckedArguments(t *testing.T) {
	c := newTestClient(t, Config{})
	for _, repo := range []Repository{{"reg.test/x", "app"}, {"a@b", "app"}, {"", "app"}, {"LOCALHOST:1", "app"}, {"reg.test", "../app"}, {"reg.test", ""}, {"reg.test", "app?x"}} {
		_, err := c.Blob(t.Context(), repo, sha256a, 0, Caller{})
		require.ErrorAs(t, err, new(*Error))
	}
	repo := Repository{"reg.test", "app"}
	_, err := c.Manifest(t.Context(), false, repo, "../x", nil, Caller{})
	require.ErrorAs(t, err, new(*Error))
	_, err = c.HeadBlob(t.Context(), repo, "latest", Caller{})
	require.ErrorAs(t, err, new(*Error))
	_, err = c.Blob(t.Context(), repo, sha256a, -1, Caller{})
	require.Error(t, err)
	_, err = c.BlobRange(t.Context(), repo, sha256a, ByteRange{}, Caller{})
	require.Error(t, err)
	err = c.forward(t.Context(), http.MethodDelete, Route{KindTags, repo, ""}, nil, nil)
	require.ErrorAs(t, err, new(*Error))
	err = c.forward(t.Context(), http.MethodGet, Route{Kind: KindWrite, Repo: repo}, nil, nil)
	require.ErrorAs(t, err, new(*Error))
}

// Where a registry is: as configured, with its path prefix, or at its name on
// TLS; and what it is asked.
func TestWhereAndWhat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		var asked []string
		source := sourceOf("{}", "blob")
		record := func(w http.ResponseWriter, r *http.Request) {
			asked = append(asked, r.Method+" "+r.Host+r.URL.RequestURI())
			assert.Equal(t, "identity", r.Header.Get("Accept-Encoding"))
			assert.Empty(t, r.Header.Values("Cookie"))
			source(w, r)
		}
		for _, addr := range []string{"registry-1.docker.io:443", "plain.test:80", "other.test:443"} {
			net.handle(addr, record)
		}
		c := net.client(Config{Upstreams: []Upstream{{Name: "Prefixed.test", URL: "http://plain.test/a/b//"}}})
		for _, registry := range []string{"docker.io", "prefixed.test", "other.test"} {
			_, err := c.Manifest(t.Context(), true, Repository{registry, "org/app"}, "latest", nil, Caller{})
			require.NoError(t, err)
		}
		_, err := c.Manifest(t.Context(), true, Repository{"plain.test", "org/app"}, "latest", nil, Caller{})
		require.ErrorContains(t, err, "registry plain.test: ", "plain HTTP that nobody configured")
		header := http.Header{"Accept": {"x/y"}, "Cookie": {"a=b"}}
		err = c.forward(t.Context(), "GET", Route{KindReferrers, Repository{"docker.io", "app"}, sha256a},
			url.Values{"artifactType": {"a/b"}, "ns": {"docker.io"}}, header)
		_ = refusalOf(t, err)
		require.Equal(t, []string{
			"HEAD registry-1.docker.io/v2/org/app/manifests/latest",
			"HEAD plain.test/a/b/v2/org/app/manifests/latest",
			"HEAD other.test/v2/org/app/manifests/latest",
			"GET registry-1.docker.io/v2/app/referrers/" + sha256a + "?artifactType=a%2Fb",
		}, asked)
	})
}

// A manifest is what its digest says, or it is an error.
func TestManifestIsChecked(t *testing.T) {
	repo := Repository{"reg.test", "app"}
	type answer struct {
		header http.Header
		body   string
	}
	right := answer{http.Header{"Docker-Content-Digest": {digestOf("{}")}}, "{}"}
	tests := map[string]struct {
		answer
		ref       string
		want      string // the digest
		err       string
		temporary bool
	}{
		"tag":                    {answer: right, ref: "v1", want: digestOf("{}")},
		"digest":                 {answer: right, ref: digestOf("{}"), want: digestOf("{}")},
		"no digest named":        {answer: answer{nil, "{}"}, ref: "v1", want: digestOf("{}")},
		"nonsense named":         {answer: answer{http.Header{"Docker-Content-Digest": {"x"}}, "{}"}, ref: "v1", want: digestOf("{}")},
		"sha512":                 {answer: right, ref: digest.SHA512.FromString("{}").String(), want: digest.SHA512.FromString("{}").String()},
		"largest":                {answer: answer{nil, strings.Repeat(" ", MaxManifestSize)}, ref: "v1", want: digestOf(strings.Repeat(" ", MaxManifestSize))},
		"other bytes by tag":     {answer: answer{right.header, "{ }"}, ref: "v1", err: "the bytes have the digest", temporary: true},
		"other bytes by digest":  {answer: answer{nil, "{ }"}, ref: digestOf("{}"), err: "the bytes have the digest", temporary: true},
		"other digest named":     {answer: right, ref: sha256a, err: "it answers with", temporary: true},
		"too large":              {answer: answer{nil, strings.Repeat(" ", MaxManifestSize+1)}, ref: "v1", err: "larger than 4 MiB"},
		"too large, says so":     {answer: answer{http.Header{"Content-Length": {"9999999"}}, ""}, ref: "v1", err: "larger than 4 MiB"},
		"shorter than announced": {answer: answer{http.Header{"Content-Length": {"3"}}, "{}"}, ref: "v1", err: "unexpected EOF", temporary: true},
		"encoded":                {answer: answer{http.Header{"Content-Encoding": {"gzip"}}, "{}"}, ref: "v1", err: "content encoding"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := newNetwork(t)
				net.handle("reg.test:443", func(w http.ResponseWriter, _ *http.Request) {
					maps.Copy(w.Header(), tt.header)
					w.Header().Set("Content-Type", "x/y; charset=utf-8")
					_, _ = io.WriteString(w, tt.body)
				})
				c := net.client(Config{})
				m, err := c.Manifest(t.Context(), false, repo, tt.ref, nil, Caller{})
				if tt.err != "" {
					require.ErrorContains(t, err, tt.err)
					require.Equal(t, tt.temporary, IsTemporary(err))
					require.Nil(t, m)
					return
				}
				require.NoError(t, err)
				require.Equal(t, &Manifest{"x/y", digest.Digest(tt.want), int64(len(tt.body)), []byte(tt.body)}, m)
				require.Equal(t, len(tt.body), c.received(KindManifest))
			})
		})
	}
}

// A HEAD says what the registry says, and that it does not say.
func TestHeadManifest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		net.handle("reg.test:443", func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "silent") {
				w.(http.Flusher).Flush() // no Content-Length
				return
			}
			w.Header().Set("Content-Length", "77")
			w.Header().Set("Docker-Content-Digest", sha256a)
		})
		c := net.client(Config{})
		m, err := c.Manifest(t.Context(), true, Repository{"reg.test", "app"}, "v1", nil, Caller{})
		require.NoError(t, err)
		require.Equal(t, &Manifest{Digest: sha256a, Size: 77}, m)
		m, err = c.Manifest(t.Context(), true, Repository{"reg.test", "app"}, "silent", nil, Caller{})
		require.NoError(t, err)
		require.Equal(t, &Manifest{Size: -1}, m)
		_, err = c.Manifest(t.Context(), true, Repository{"reg.test", "app"}, digestOf("other"), nil, Caller{})
		require.ErrorContains(t, err, "it answers with")
	})
}

// A registry may answer a range in ways of its own; the bytes are right, or it
// is an error.
func TestRangesOfABlob(t *testing.T) {
	const blob = "0123456789"
	type answer = http.HandlerFunc
	partial := func(contentRange, body string) answer {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", contentRange)
			w.WriteHeader(http.StatusPartialContent)
			_, _ = io.WriteString(w, body)
		}
	}
	whole := func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, blob) }
	chunked := func(w http.ResponseWriter, _ *http.Request) {
		w.(http.Flusher).Flush()
		_, _ = io.WriteString(w, blob)
	}
	noRanges := func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != "" {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		whole(w, r)
	}
	inChunks := func(h answer) answer {
		return func(w http.ResponseWriter, r *http.Request) { h(chunkedWriter{w}, r) }
	}
	tests := map[string]struct {
		off, n    int64 // n 0: to the end
		answer    answer
		want      string
		length    int64
		err       string
		temporary bool
	}{
		"206":                        {off: 4, answer: partial("bytes 4-9/10", "456789"), want: "456789", length: 10},
		"206 of unknown size":        {off: 4, answer: partial("bytes 4-9/*", "456789"), want: "456789", length: -1},
		"206 to a question for all":  {off: 0, answer: partial("bytes 0-9/10", blob), want: blob, length: 10},
		"206 of some":                {off: 4, n: 2, answer: partial("bytes 4-5/10", "45"), want: "45", length: 10},
		"206 at the end":             {off: 8, n: 5, answer: partial("bytes 8-9/10", "89"), want: "89", length: 10},
		"200":                        {off: 4, answer: whole, want: "456789", length: 10},
		"200 for some":               {off: 4, n: 2, answer: whole, want: "45", length: 10},
		"200 at the end":             {off: 8, n: 5, answer: whole, want: "89", length: 10},
		"200 of unknown length":      {off: 4, answer: chunked, want: "456789", length: -1},
		"200 for some of unknown":    {off: 4, n: 2, answer: chunked, want: "45", length: -1},
		"416, but 200 for the whole": {off: 4, answer: noRanges, want: "456789", length: 10},
		"200 past the end":           {off: 11, answer: whole, err: "unexpected EOF", temporary: true},
		"206 of another place":       {off: 4, answer: partial("bytes 5-9/10", "56789"), err: "not the range"},
		"206 from the start":         {off: 4, answer: partial("bytes 0-9/10", blob), err: "not the range"},
		"206 ends early":             {off: 4, answer: partial("bytes 4-7/10", "4567"), err: "not the range"},
		"206 of as many elsewhere":   {off: 4, n: 2, answer: partial("bytes 5-6/10", "56"), err: "not the range"},
		"206 in chunks, too few":     {off: 4, answer: inChunks(partial("bytes 4-9/10", "4567")), err: "unexpected EOF", temporary: true},
		"206 of fewer":               {off: 4, n: 4, answer: partial("bytes 4-5/10", "45"), err: "not the range"},
		"206 of more":                {off: 4, n: 2, answer: partial("bytes 4-9/10", "456789"), err: "not the range"},
		"206 of many":                {off: 4, answer: partial("", "--x\r\n"), err: "not the range"},
		"206 with other length":      {off: 4, answer: partial("bytes 4-9/10", "4567"), err: "not the range"},
		"204":                        {off: 4, answer: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }, err: "status 204"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := newNetwork(t)
				net.handle("reg.test:443", tt.answer)
				c := net.client(Config{})
				repo := Repository{"reg.test", "app"}
				var b *BlobBody
				var err error
				if tt.n == 0 {
					b, err = c.Blob(t.Context(), repo, sha256a, tt.off, Caller{})
				} else {
					b, err = c.BlobRange(t.Context(), repo, sha256a, ByteRange{Offset: tt.off, Length: tt.n}, Caller{})
				}
				var got []byte
				if err == nil {
					got, err = io.ReadAll(b)
					require.NoError(t, b.Close())
				}
				if tt.err != "" {
					require.ErrorContains(t, err, tt.err)
					require.Equal(t, tt.temporary, IsTemporary(err))
					return
				}
				require.NoError(t, err)
				require.Equal(t, tt.want, string(got))
				require.Equal(t, tt.length, b.Length)
				require.GreaterOrEqual(t, c.received(KindBlob), len(got))
			})
		})
	}
}

// chunkedWriter sends every piece of a body as it is written.
type chunkedWriter struct{ http.ResponseWriter }

func (w chunkedWriter) WriteHeader(status int) {
	w.ResponseWriter.WriteHeader(status)
	w.ResponseWriter.(http.Flusher).Flush()
}

// forward asks and wants nothing of the answer but its error.
func (c *testClient) forward(ctx context.Context, method string, route Route, query url.Values, header http.Header) error {
	resp, err := c.Forward(ctx, method, route, query, header, Caller{})
	if err == nil {
		_ = resp.Body.Close()
	}
	return err
}
