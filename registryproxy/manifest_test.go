package registryproxy

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// gotManifest is what comes of an answer with a header and a body.
func gotManifest(reference string, h http.Header, length int64, body []byte) (*Manifest, error) {
	m, err := newManifest(reference, h, length)
	if err != nil {
		return nil, err
	}
	in := watch(io.NopCloser(bytes.NewReader(body)), time.Minute, func(error) {}, func(err error) error { return err })
	return m, m.read(in)
}

func TestManifestIsBounded(t *testing.T) {
	full := bytes.Repeat([]byte{' '}, MaxManifestSize)
	m, err := gotManifest("v1", nil, -1, full)
	require.NoError(t, err)
	require.EqualValues(t, MaxManifestSize, m.Size)
	_, err = gotManifest("v1", nil, -1, append(full, '!'))
	require.ErrorContains(t, err, "larger than 4 MiB")
	_, err = gotManifest("v1", nil, MaxManifestSize+1, nil)
	require.ErrorContains(t, err, "larger than 4 MiB")
}

// Whatever a registry answers, what passes has the digest asked for, or named.
func FuzzManifest(f *testing.F) {
	const body = `{"schemaVersion":2}`
	f.Add("v1", "", "application/vnd.oci.image.manifest.v1+json", int64(19), []byte(body))
	f.Add("v1", digest.FromString(body).String(), "application/json; charset=utf-8", int64(-1), []byte(body))
	f.Add(digest.SHA512.FromString(body).String(), digest.FromString(body).String(), "x", int64(5), []byte(body))
	f.Add(sha256a, sha256a, "", int64(0), []byte{})
	f.Add("sha384:00", "sha256:zz", "a/b;c", int64(1<<40), []byte(body))
	f.Fuzz(func(t *testing.T, reference, named, kind string, length int64, body []byte) {
		h := http.Header{"Docker-Content-Digest": {named}, "Content-Type": {kind}}
		m, err := gotManifest(reference, h, length, body)
		if err != nil {
			return
		}
		require.Equal(t, body, append([]byte{}, m.Body...))
		require.EqualValues(t, len(body), m.Size)
		require.NoError(t, m.Digest.Validate())
		require.Equal(t, m.Digest, m.Digest.Algorithm().FromBytes(body))
		for _, d := range []string{reference, named} { // the first that is a digest counts
			if digest.Digest(d).Validate() == nil {
				require.Equal(t, d, m.Digest.String())
				break
			}
		}
		require.False(t, strings.ContainsAny(m.MediaType, "; \r\n"), m.MediaType)
	})
}

// A list that is encoded though none was asked for would reach the caller without
// the header that says so.
func TestAnEncodedListIsNoAnswer(t *testing.T) {
	for encoding, good := range map[string]bool{"": true, "identity": true, "gzip": false} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if encoding != "" {
				w.Header().Set("Content-Encoding", encoding)
			}
			_, _ = io.WriteString(w, "{}")
		}))
		defer server.Close()
		c := newTestClient(t, Config{Upstreams: []Upstream{{Name: "reg.test", URL: server.URL}}})
		err := c.forward(t.Context(), http.MethodGet, Route{KindTags, Repository{"reg.test", "app"}, ""}, nil, nil)
		require.Equal(t, good, err == nil, encoding)
	}
}
