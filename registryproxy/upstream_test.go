package registryproxy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// writePEM writes a block of PEM into a new file and returns its name.
func writePEM(t *testing.T, dir, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	require.NoError(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	return path
}

// writeClient makes a certificate that signs itself, for a client of that name.
func writeClient(t *testing.T, dir, name string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	require.NoError(t, err)
	bare, err := x509.MarshalPKCS8PrivateKey(private)
	require.NoError(t, err)
	return writePEM(t, dir, "client.pem", "CERTIFICATE", der), writePEM(t, dir, "client.key", "PRIVATE KEY", bare)
}

// serveTLS answers over TLS, and asks for client certificates. It returns the file
// with what its certificate is vouched for by.
func serveTLS(t *testing.T, h http.HandlerFunc) (s *httptest.Server, ca string) {
	t.Helper()
	s = httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s, writePEM(t, t.TempDir(), "ca.pem", "CERTIFICATE", s.Certificate().Raw)
}

// shown is the name on the certificate that a client has shown.
func shown(r *http.Request) string {
	if len(r.TLS.PeerCertificates) == 0 {
		return ""
	}
	return r.TLS.PeerCertificates[0].Subject.CommonName
}

// A registry's own CA is believed for it; its client certificate is shown to it,
// the new one when it changes, and not to the store that it redirects to.
func TestOwnCertificates(t *testing.T) {
	dir := t.TempDir()
	cert, key := writeClient(t, dir, "region")
	var want atomic.Value
	want.Store("region")
	bucket := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if shown(r) != "" || r.Header.Get("Authorization") != "" || r.Header.Get("Cookie") != "" {
			http.Error(w, "one credential too many", http.StatusBadRequest)
			return
		}
		sourceOf("{}", "blob")(w, r)
	}))
	bucket.Config.ErrorLog = log.New(io.Discard, "", 0)
	bucket.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	bucket.StartTLS()
	defer bucket.Close()
	s, ca := serveTLS(t, func(w http.ResponseWriter, r *http.Request) {
		if shown(r) != want.Load() || r.Header.Get("Authorization") != alice {
			http.Error(w, shown(r), http.StatusForbidden)
			return
		}
		http.SetCookie(w, &http.Cookie{Name: "session", Value: "s3cr3t"})
		if strings.Contains(r.URL.Path, "blobs") {
			http.Redirect(w, r, bucket.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return
		}
		sourceOf("{}", "blob")(w, r)
	})
	_, err := newTestClient(t, Config{Upstreams: []Upstream{{Name: "reg.test", URL: s.URL}}}).HeadBlob(t.Context(), public, digestOf("blob"), Caller{alice})
	require.ErrorContains(t, err, "failed to verify certificate")
	require.False(t, IsTemporary(err))
	_, err = newTestClient(t, Config{Upstreams: []Upstream{{Name: "reg.test", URL: s.URL, TLS: TLS{CA: ca}}}}).HeadBlob(t.Context(), public, digestOf("blob"), Caller{alice})
	require.Equal(t, 403, refusalOf(t, err).Status)

	c := newTestClient(t, Config{
		Upstreams:      []Upstream{{Name: "reg.test", URL: s.URL, TLS: TLS{CA: ca, ClientCert: cert, ClientKey: key}}},
		AllowAddresses: []string{"127.0.0.1"},
	})
	read := func() {
		t.Helper()
		_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{alice})
		require.NoError(t, err)
		b, err := c.Blob(t.Context(), public, digestOf("blob"), 0, Caller{alice})
		require.NoError(t, err)
		got, err := io.ReadAll(b)
		require.NoError(t, err)
		require.NoError(t, b.Close())
		require.Equal(t, "blob", string(got))
	}
	read()
	want.Store("another")
	writeClient(t, dir, "another")
	s.CloseClientConnections()
	c.get("reg.test").endpoints[0].own.(*http.Transport).CloseIdleConnections()
	read()
	require.NoError(t, os.WriteFile(cert, []byte("half a fi"), 0o600)) // that of before does
	c.get("reg.test").endpoints[0].own.(*http.Transport).CloseIdleConnections()
	read()
}

// Files that cannot be used are named at the start, by the key that names them.
func TestWrongFiles(t *testing.T) {
	dir := t.TempDir()
	cert, key := writeClient(t, dir, "x")
	empty := filepath.Join(dir, "empty")
	require.NoError(t, os.WriteFile(empty, nil, 0o600))
	long := filepath.Join(dir, "long")
	require.NoError(t, os.WriteFile(long, make([]byte, maxFile+1), 0o600))
	none := filepath.Join(dir, "none")
	for says, u := range map[string]Upstream{
		`registry "a.b": ca: open ` + none:                                                                  {TLS: TLS{CA: none}},
		`name a file that this process can read`:                                                            {TLS: TLS{CA: none}},
		`registry "a.b": ca: ` + empty + ` holds no certificate`:                                            {TLS: TLS{CA: empty}},
		`registry "a.b": ca: ` + long + ` is larger than 1 MiB`:                                             {TLS: TLS{CA: long}},
		`registry "a.b": client-cert and client-key: ` + cert:                                               {TLS: TLS{ClientCert: cert, ClientKey: empty}},
		`registry "a.b": mirrors[0].ca: open`:                                                               {Mirrors: []Mirror{{URL: "https://x", TLS: TLS{CA: none}}}},
		`registry "a.b": credentials.password-file: stat ` + none:                                           {Credentials: Credentials{Username: "u", PasswordFile: none}},
		`want one line with the password`:                                                                   {Credentials: Credentials{Username: "u", PasswordFile: empty}},
		`registry "a.b": credentials.docker-config: ` + key + `: it is no`:                                  {Credentials: Credentials{DockerConfig: key}},
		`registry "a.b": mirrors[0].credentials.helper: there is no program docker-credential-none in PATH`: {Mirrors: []Mirror{{URL: "https://x", Credentials: Credentials{Helper: "none"}}}},
	} {
		u.Name, u.Readers = "a.b", ReadersRegion
		_, err := New(Config{Upstreams: []Upstream{u}}, zap.NewNop(), prometheus.NewRegistry())
		require.ErrorContains(t, err, says)
	}
}

// place is one of several hosts that may have a content.
type place struct {
	asked atomic.Int64
	auth  atomic.Value // the last Authorization
	h     http.HandlerFunc
}

func (p *place) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.asked.Add(1)
	p.auth.Store(r.Header.Get("Authorization"))
	p.h(w, r)
}

// Mirrors are asked in their order, and the registry has the last word.
func TestMirrors(t *testing.T) {
	const blob = "0123456789"
	source := sourceOf("{}", blob)
	damaged := func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			w.Header().Set("Content-Length", "10")
			_, _ = io.WriteString(w, "0123X56789")
			return
		}
		w.Header().Set("Docker-Content-Digest", digestOf("{}"))
		_, _ = io.WriteString(w, "[]")
	}
	tests := map[string]struct {
		first, second, last http.HandlerFunc
		who                 Caller
		asked               [3]int64 // for a manifest and a blob
		status              int      // of the registry's no, 0 for none
		takes               time.Duration
	}{
		"the first has it":        {first: source, asked: [3]int64{2, 0, 0}},
		"the second has it":       {first: answers(404, nil, ""), second: source, asked: [3]int64{2, 2, 0}},
		"none has it":             {first: answers(404, nil, ""), second: answers(403, nil, "no"), last: source, asked: [3]int64{2, 2, 2}},
		"they are asked too much": {first: limited(429, "60"), second: limited(503, "60"), last: source, asked: [3]int64{2, 2, 2}},
		"they want a login":       {first: answers(401, http.Header{"Www-Authenticate": {`Basic realm="mirror"`}}, ""), second: answers(401, nil, ""), last: source, asked: [3]int64{2, 2, 2}},
		"they are ill":            {first: answers(500, nil, ""), second: reset, last: source, asked: [3]int64{2, 2, 2}},
		"the first stalls":        {first: stall, second: source, asked: [3]int64{2, 2, 0}, takes: 2 * mirrorHeaderTimeout},
		"no one but the registry": {first: answers(404, nil, ""), second: answers(404, nil, ""), last: answers(403, nil, "the registry's own words"), asked: [3]int64{2, 2, 2}, status: 403},
		"the caller's own":        {first: source, second: source, last: source, who: Caller{alice}, asked: [3]int64{0, 2, 0}},
		"damaged":                 {first: damaged, second: source, asked: [3]int64{2, 2, 0}},
		"broken off":              {first: after(reset), second: source, asked: [3]int64{2, 2, 0}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := newNetwork(t)
				places := [3]*place{}
				for i, h := range []http.HandlerFunc{tt.first, tt.second, tt.last} {
					if h == nil {
						h = func(http.ResponseWriter, *http.Request) { t.Error("asked in vain") }
					}
					places[i] = &place{h: h}
					net.serve([]string{"one.test:443", "two.test:80", "reg.test:443"}[i], places[i])
				}
				c := net.client(Config{Upstreams: []Upstream{{Name: "reg.test", Mirrors: []Mirror{
					{URL: "https://one.test"}, {URL: "http://two.test", CallerCredentials: true},
				}}}})
				start := time.Now()
				_, err := c.Manifest(t.Context(), false, public, "latest", nil, tt.who)
				got := ""
				for off := int64(0); err == nil && len(got) < len(blob); off = int64(len(got)) { // as the supernode does
					var b *BlobBody
					if b, err = c.Blob(t.Context(), public, digestOf(blob), off, tt.who); err != nil {
						break
					}
					part, readErr := io.ReadAll(b)
					_ = b.Close()
					got += string(part)
					if readErr != nil && len(part) == 0 {
						require.True(t, IsTemporary(readErr), "%v", readErr)
					}
				}
				if tt.status != 0 {
					require.Equal(t, tt.status, refusalOf(t, err).Status)
					_, err = c.Blob(t.Context(), public, digestOf(blob), 0, tt.who)
					require.Equal(t, "the registry's own words", string(refusalOf(t, err).Body))
				} else {
					require.NoError(t, err)
					require.Equal(t, blob, got)
				}
				require.Equal(t, tt.takes, time.Since(start))
				asked := [3]int64{places[0].asked.Load(), places[1].asked.Load(), places[2].asked.Load()}
				require.Equal(t, tt.asked, asked)
				if tt.who != (Caller{}) {
					require.Equal(t, alice, places[1].auth.Load())
				}
			})
		})
	}
}

// A mirror that is down costs its time three times, and not again for half a minute.
func TestMirrorThatIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		mirror, registry := &place{h: stall}, &place{h: sourceOf("{}")}
		net.serve("mirror.test:443", mirror)
		net.serve("reg.test:443", registry)
		c := net.client(Config{Upstreams: []Upstream{{Name: "reg.test", Mirrors: []Mirror{{URL: "https://mirror.test"}}}}})
		start := time.Now()
		for range 50 {
			_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
			require.NoError(t, err)
		}
		require.Equal(t, 3*mirrorHeaderTimeout, time.Since(start))
		<-time.After(mirrorPause + time.Second)
		mirror.h = sourceOf("{}")
		for range 2 {
			_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
			require.NoError(t, err)
		}
		require.EqualValues(t, 5, mirror.asked.Load())
		require.EqualValues(t, 50, registry.asked.Load())
	})
}

// The times of a registry are its own.
func TestOwnTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		net.handle("reg.test:443", stall)
		c := net.client(Config{Upstreams: []Upstream{{Name: "reg.test", HeaderTimeout: 90 * time.Second}}})
		start := time.Now()
		_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
		require.ErrorIs(t, err, errNoAnswer)
		require.Equal(t, 90*time.Second, time.Since(start))
	})
	c := newTestClient(t, Config{Upstreams: []Upstream{{Name: "a.test", ConnectTimeout: time.Nanosecond}, {Name: "b.test"}}})
	_, err := c.Manifest(t.Context(), false, Repository{"a.test", "x"}, "latest", nil, Caller{})
	require.ErrorContains(t, err, "timeout")
	require.NotSame(t, c.get("a.test").endpoints[0].own, c.get("b.test").endpoints[0].own)
}

// Hosts that are IPv6 addresses are reached, as a registry and as a mirror.
func TestIPv6(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		net.handle("[fd00::1]:5000", sourceOf("{}"))
		net.handle("[fd00::2]:443", answers(404, nil, ""))
		c := net.client(Config{Upstreams: []Upstream{{Name: "[fd00::1]:5000", Mirrors: []Mirror{{URL: "https://[fd00::2]/x"}}}}})
		_, err := c.Manifest(t.Context(), false, Repository{"[fd00::1]:5000", "app"}, "latest", nil, Caller{})
		require.NoError(t, err)
	})
}
