package conformance_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/registryproxy"
)

// answer is one that has come whole.
type answer struct {
	status int
	header http.Header
	body   []byte
	length int64
}

// client asks one target.
type client struct {
	target
	*testing.T
	contents
}

// do asks a registry for a path, with headers ("Key: value"). What holds for
// every answer is checked here.
func (c client) do(method, registry, path string, headers ...string) answer {
	c.Helper()
	r, err := http.NewRequestWithContext(c.Context(), method, c.url(registry, path), nil)
	require.NoError(c, err)
	r.Header.Set("Accept-Encoding", "gzip, zstd") // a digest is of the bytes as they are
	r.Header.Set("Accept", indexType+", "+manifestType+", */*")
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		r.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(r)
	require.NoError(c, err, "%s %s", method, path)
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	require.NoError(c, err, "%s %s", method, path)
	a := answer{resp.StatusCode, resp.Header, b, resp.ContentLength}
	require.Empty(c, a.header.Get("Content-Encoding"))
	if a.status >= 400 && a.status < 500 && len(b) > 0 && strings.Contains(a.header.Get("Content-Type"), "json") {
		c.isError(a)
	}
	if c.mirror && registry != "" {
		require.Equal(c, registry, a.header.Get("OCI-Namespace"), "Registry Proxying: the namespace asked for is named")
	}
	return a
}

func (c client) get(path string, headers ...string) answer {
	c.Helper()
	return c.do(http.MethodGet, modern, path, headers...)
}

func (c client) head(path string) answer {
	c.Helper()
	a := c.do(http.MethodHead, modern, path)
	require.Empty(c, a.body)
	return a
}

var codeForm = regexp.MustCompile(`^[A-Z_]+$`)

// codes are those that the specification lists.
var codes = strings.Fields(`BLOB_UNKNOWN BLOB_UPLOAD_INVALID BLOB_UPLOAD_UNKNOWN DIGEST_INVALID MANIFEST_BLOB_UNKNOWN
	MANIFEST_INVALID MANIFEST_UNKNOWN NAME_INVALID NAME_UNKNOWN SIZE_INVALID UNAUTHORIZED DENIED UNSUPPORTED TOOMANYREQUESTS`)

func (c client) isError(a answer) (code string) {
	c.Helper()
	var e struct {
		Errors []struct{ Code string }
	}
	require.NoError(c, json.Unmarshal(a.body, &e), "%s", a.body)
	require.NotEmpty(c, e.Errors, "%s", a.body)
	for _, one := range e.Errors {
		require.Regexp(c, codeForm, one.Code)
		require.Contains(c, codes, one.Code)
	}
	return e.Errors[0].Code
}

// is checks an answer with all of a document.
func (c client) is(a answer, d document) {
	c.Helper()
	require.Equal(c, http.StatusOK, a.status, "%.200s", a.body)
	require.True(c, bytes.Equal(d.body, a.body), "other bytes than those pushed")
	c.names(a, d)
}

// names checks an answer's headers.
func (c client) names(a answer, d document) {
	c.Helper()
	require.Equal(c, http.StatusOK, a.status)
	require.Equal(c, d.digest.String(), a.header.Get("Docker-Content-Digest"))
	require.EqualValues(c, len(d.body), a.length)
	if d.mediaType == manifestType || d.mediaType == indexType {
		require.Equal(c, d.mediaType, a.header.Get("Content-Type"))
	}
}

func manifest(reference string) string { return "/v2/" + app + "/manifests/" + reference }
func blob(reference string) string     { return "/v2/" + app + "/blobs/" + reference }

// rule is one thing that the specification wants: 1.1.1, or the draft of 1.2,
// which makes some SHOULD of 1.1.1 a MUST.
type rule struct {
	section string
	level   string // MUST, MUST NOT, SHOULD; "draft MUST" where 1.1.1 says nothing of it
	says    string
	check   func(c client)
}

// mirrors are rules for who stands before a registry.
func mirrors(check func(c client)) func(c client) {
	return func(c client) {
		if !c.mirror {
			c.Skip("a rule for mirrors")
		}
		check(c)
	}
}

var rules = slices.Concat(pulling, existing, discovery, around)

func TestConformance(t *testing.T) {
	full, without := newRegistry(t, true), newRegistry(t, false)
	c := fill(t, full, without)
	full.forget()
	urls := map[string]string{modern: full.URL, old: without.URL}
	registries := registryproxy.Config{Upstreams: []registryproxy.Upstream{
		{Name: modern, URL: full.URL}, {Name: old, URL: without.URL},
	}}
	fixed := func(base string) func(string) string { return func(string) string { return base } }
	targets := []target{
		{"registry", false, func(registry string) string { return urls[registry] }},
		{"supernode", true, fixed(startSupernode(t, registries))},
		{"dfdaemon", true, fixed(startHost(t, registries, startSupernode(t, registries)))},
		{"dfdaemon without a supernode", true, fixed(startHost(t, registries, ""))},
	}
	for _, s := range targets {
		for _, pass := range []string{"first", "again"} { // what comes from the registry, and from the cache
			for _, r := range rules {
				t.Run(strings.Join([]string{s.name, pass, r.section, r.level + " " + r.says}, "/"), func(t *testing.T) {
					r.check(client{s, t, c})
				})
			}
		}
		if !s.mirror {
			full.forget()
		}
	}
	full.mu.Lock()
	defer full.mu.Unlock()
	require.NotEmpty(t, full.asked)
	for _, u := range full.asked {
		require.False(t, u.Query().Has("ns"), "Registry Proxying: a client ought not to send ns to a registry that is no proxy: %s", u)
	}
}
