package dfdaemon

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"
	"golang.org/x/crypto/bcrypt"

	"damselfly.dev/registryproxy"
	"damselfly.dev/test/meter"
)

// proxied is a client behind the forward proxy of a dfdaemon.
type proxied struct {
	*http.Client
	address string
	metrics *prometheus.Registry
	tunnels *tunnels
	end     func() error
}

// newProxied starts a dfdaemon whose proxy may reach these servers. The client
// trusts roots.
func newProxied(t *testing.T, c ProxyConfig, registries registryproxy.Config, roots *x509.CertPool, servers ...*httptest.Server) *proxied {
	t.Helper()
	cfg := testConfig(t)
	registries.AllowAddresses = cfg.Registries.AllowAddresses
	cfg.Registries = registries
	rules := cfg.Proxy.Rules
	cfg.Proxy = c
	cfg.Proxy.Listen = "127.0.0.1:0"
	if c.Rules == nil {
		cfg.Proxy.Rules = rules
	}
	for _, s := range servers {
		cfg.Proxy.Ports = append(cfg.Proxy.Ports, portOf(t, s))
	}
	p := &proxied{metrics: prometheus.NewRegistry()}
	d, err := New(cfg, zaptest.NewLogger(t), p.metrics)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	p.end = func() error {
		cancel()
		err := <-ended
		ended <- err
		return err
	}
	t.Cleanup(func() { require.NoError(t, p.end()) })
	p.address, p.tunnels = d.ProxyAddr(), d.tunnels
	via := &url.URL{Scheme: "http", Host: p.address}
	transport := &http.Transport{Proxy: http.ProxyURL(via), TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	t.Cleanup(transport.CloseIdleConnections)
	p.Client = &http.Client{Transport: transport}
	return p
}

func portOf(t *testing.T, s *httptest.Server) int {
	t.Helper()
	u, err := url.Parse(s.URL)
	require.NoError(t, err)
	n, err := strconv.Atoi(u.Port())
	require.NoError(t, err)
	return n
}

// ask sends a request and returns what came.
func (p *proxied) ask(t *testing.T, method, target string, header http.Header, body string) (status int, got http.Header, answer string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, target, strings.NewReader(body))
	require.NoError(t, err)
	maps.Copy(r.Header, header)
	resp, err := p.Do(r)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, resp.Header, string(b)
}

func (p *proxied) count(t *testing.T, action string) int {
	t.Helper()
	return int(meter.Value(t, p.metrics, "damselfly_proxy_requests_total", action))
}

// plain is the configuration of registries that are spoken to in plain HTTP.
func plain(g *registry) registryproxy.Config {
	return registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: strings.TrimPrefix(g.URL, "http://"), URL: g.URL}}}
}

func TestProxyOfPlainHTTP(t *testing.T) {
	g := newRegistry(t)
	want := bytes.Repeat([]byte("damselfly"), 100_000)
	blob, manifest := "/v2/org/app/blobs/"+g.blob(want), "/v2/org/app/manifests/v1"
	g.manifest([]byte(`{"schemaVersion":2}`))
	g.contents["/other"] = []byte("other")
	g.contents["/model"] = want
	var written string
	g.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPut {
			return false
		}
		b, _ := io.ReadAll(r.Body)
		written = r.URL.RawQuery + " " + r.Header.Get("Authorization") + " " + string(b)
		w.Header().Set("Location", "/here")
		w.WriteHeader(http.StatusCreated)
		return true
	}
	p := newProxied(t, ProxyConfig{Rules: append(registryproxy.DefaultRules(),
		registryproxy.Rule{Match: `/model$`, Action: registryproxy.ActionSwarm},
		registryproxy.Rule{Match: `/secret`, Action: registryproxy.ActionRefuse},
	)}, plain(g), nil, g.Server)

	status, header, got := p.ask(t, http.MethodGet, g.URL+blob, nil, "")
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, string(want), got)
	require.NotEmpty(t, header.Get("Docker-Content-Digest"), "not from the mirror")
	status, _, got = p.ask(t, http.MethodGet, g.URL+manifest, nil, "")
	require.Equal(t, http.StatusOK, status)
	require.JSONEq(t, `{"schemaVersion":2}`, got)
	status, _, got = p.ask(t, http.MethodGet, g.URL+"/model?signature=x", http.Header{"Range": {"bytes=9-17"}}, "")
	require.Equal(t, http.StatusPartialContent, status)
	require.Equal(t, "damselfly", got)
	require.Equal(t, 3, p.count(t, "swarm"))

	status, _, got = p.ask(t, http.MethodGet, g.URL+"/other?q=1", nil, "")
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "other", got)
	status, _, got = p.ask(t, http.MethodGet, g.URL+"/v2/", nil, "")
	require.Equal(t, http.StatusNotFound, status, "the registry's own answer to a ping")
	require.Contains(t, got, "UNKNOWN_HERE")
	status, header, _ = p.ask(t, http.MethodPut, g.URL+blob+"?digest=x", http.Header{"Authorization": {"Bearer t"}}, "bytes")
	require.Equal(t, http.StatusCreated, status)
	require.Equal(t, "/here", header.Get("Location"))
	require.Equal(t, "digest=x Bearer t bytes", written)
	require.Equal(t, 3, p.count(t, "direct"))

	status, _, got = p.ask(t, http.MethodGet, g.URL+"/secret", nil, "")
	require.Equal(t, http.StatusForbidden, status)
	require.Contains(t, got, "rule refuses")
	require.Equal(t, 1, p.count(t, "refuse"))
	require.Zero(t, g.count(http.MethodGet, "/secret"))
}

// A registry that is not known to speak plain HTTP is not asked through the
// region, which would use HTTPS.
func TestProxyOfAnUnknownPlainRegistry(t *testing.T) {
	g := newRegistry(t)
	blob := "/v2/org/app/blobs/" + g.blob([]byte("layer"))
	p := newProxied(t, ProxyConfig{}, registryproxy.Config{}, nil, g.Server)
	status, _, got := p.ask(t, http.MethodGet, g.URL+blob, nil, "")
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "layer", got)
	require.Equal(t, 1, p.count(t, "direct"))
}

func TestProxyRedirects(t *testing.T) {
	there, here := newRegistry(t), newRegistry(t)
	var seen http.Header
	here.contents["/mirror/x"] = []byte("here")
	here.intercept = func(_ http.ResponseWriter, r *http.Request) bool {
		seen = r.Header.Clone()
		seen.Set("Host", r.Host)
		return false
	}
	p := newProxied(t, ProxyConfig{Rules: []registryproxy.Rule{
		{Match: "^" + there.URL, Action: registryproxy.ActionRedirect, To: here.URL + "/mirror"},
	}}, registryproxy.Config{}, nil)
	status, _, got := p.ask(t, http.MethodGet, there.URL+"/x", http.Header{"Authorization": {"Basic c2VjcmV0"}, "Cookie": {"a=b"}, "X-Other": {"1"}}, "")
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "here", got)
	require.Empty(t, seen["Authorization"])
	require.Empty(t, seen["Cookie"])
	require.Equal(t, "1", seen.Get("X-Other"))
	require.Equal(t, strings.TrimPrefix(here.URL, "http://"), seen.Get("Host"))
	require.Equal(t, 1, p.count(t, "redirect"))
	require.Zero(t, there.count(http.MethodGet, "/x"))
}

// What a caller says under TLS does not go on in clear, to the same host neither.
func TestProxyRedirectsToPlainHTTP(t *testing.T) {
	g := newRegistry(t)
	g.contents["/x"] = []byte("here")
	var seen http.Header
	g.intercept = func(_ http.ResponseWriter, r *http.Request) bool { seen = r.Header.Clone(); return false }
	cert, key, roots := authority(t, "127.0.0.1")
	p := newProxied(t, ProxyConfig{
		Rules:     []registryproxy.Rule{{Match: "^https:", Action: registryproxy.ActionRedirect, To: g.URL}},
		Intercept: registryproxy.Hosts{"127.0.0.1"}, CA: cert, CAKey: key,
	}, registryproxy.Config{}, roots, g.Server)
	secure := strings.Replace(g.URL, "http:", "https:", 1) + "/x"
	status, _, got := p.ask(t, http.MethodGet, secure, http.Header{"Authorization": {"Basic c2VjcmV0"}, "Cookie": {"a=b"}, "X-Other": {"1"}}, "")
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "here", got)
	require.Equal(t, "1", seen.Get("X-Other"))
	require.Empty(t, seen["Authorization"])
	require.Empty(t, seen["Cookie"])
}

// secure is a registry that speaks HTTPS with a certificate of its own.
func secure(t *testing.T) (*registry, *x509.CertPool, registryproxy.Config) {
	t.Helper()
	g := &registry{contents: map[string][]byte{}, asked: map[string]int{}}
	g.Server = httptest.NewTLSServer(g)
	t.Cleanup(g.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: g.Certificate().Raw}), 0o600))
	roots := x509.NewCertPool()
	roots.AddCert(g.Certificate())
	name := strings.TrimPrefix(g.URL, "https://")
	return g, roots, registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: name, URL: g.URL, TLS: registryproxy.TLS{CA: ca}}}}
}

func TestProxyTunnels(t *testing.T) {
	g, roots, registries := secure(t)
	g.contents["/x"] = []byte("end to end")
	p := newProxied(t, ProxyConfig{}, registries, roots, g.Server)
	status, _, got := p.ask(t, http.MethodGet, g.URL+"/x", nil, "")
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "end to end", got)
	require.Equal(t, 1, p.count(t, "tunnel"))

	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", p.address)
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	host := strings.TrimPrefix(g.URL, "https://")
	_, err = fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", host, host)
	require.NoError(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.NoError(t, p.end())
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(waitLimit)))
	_, err = conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "a tunnel has outlived its proxy")
}

// authority makes one in files, and what trusts it.
func authority(t *testing.T, hosts ...string) (cert, key string, roots *x509.CertPool) {
	t.Helper()
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	c, k, err := registryproxy.CreateAuthority(hosts)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(cert, c, 0o600))
	require.NoError(t, os.WriteFile(key, k, 0o600))
	roots = x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(c))
	return cert, key, roots
}

func TestProxyIntercepts(t *testing.T) {
	g, _, registries := secure(t)
	want := bytes.Repeat([]byte("damselfly"), 100_000)
	blob := "/v2/org/app/blobs/" + g.blob(want)
	g.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/v2/" {
			return false
		}
		w.Header().Set("Www-Authenticate", `Bearer realm="https://auth.corp/token"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	cert, key, roots := authority(t, "127.0.0.1")
	p := newProxied(t, ProxyConfig{Intercept: registryproxy.Hosts{"127.0.0.1"}, CA: cert, CAKey: key}, registries, roots, g.Server)
	for range 2 {
		status, _, got := p.ask(t, http.MethodGet, g.URL+blob, nil, "")
		require.Equal(t, http.StatusOK, status)
		require.Equal(t, string(want), got)
	}
	status, header, _ := p.ask(t, http.MethodGet, g.URL+"/v2/", nil, "")
	require.Equal(t, http.StatusUnauthorized, status)
	require.Equal(t, `Bearer realm="https://auth.corp/token"`, header.Get("Www-Authenticate"))
	require.Equal(t, 2, p.count(t, "swarm"))
	require.Equal(t, 1, p.count(t, "direct"))

	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+"/x", nil)
	require.NoError(t, err)
	r.Host = "other.corp"
	resp, err := p.Do(r)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusMisdirectedRequest, resp.StatusCode)
}

func TestProxyIsNoOpenRelay(t *testing.T) {
	g := newRegistry(t)
	p := newProxied(t, ProxyConfig{Ports: []int{443}}, registryproxy.Config{}, nil)
	status, _, got := p.ask(t, http.MethodGet, g.URL+"/x", nil, "")
	require.Equal(t, http.StatusForbidden, status)
	require.Contains(t, got, "proxy-ports")
	for request, want := range map[string]int{
		"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\n\r\n":                   http.StatusForbidden,
		"CONNECT 127.0.0.1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n":                         http.StatusBadGateway, // 443, where nothing listens
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n":                                             http.StatusBadRequest,
		"GET ftp://x/ HTTP/1.1\r\nHost: x\r\n\r\n":                                      http.StatusBadRequest,
		"GET http://x:443/ HTTP/1.1\r\nHost: x\r\nVia: 1.1 damselfly\r\n\r\n":           http.StatusLoopDetected,
		"GET http://x:443/ HTTP/1.1\r\nHost: x\r\nVia: 1.1 a, 1.1 damselfly\r\n\r\n":    http.StatusLoopDetected,
		"GET http://x:443/ HTTP/1.1\r\nHost: x\r\nVia: 1.1 damselfly, 1.1 a\r\n\r\n":    http.StatusLoopDetected,
		"GET http://x:443/ HTTP/1.1\r\nHost: x\r\nVia: 1.1 damselfly,1.1 a (b)\r\n\r\n": http.StatusLoopDetected,
	} {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", p.address)
		require.NoError(t, err)
		_, err = io.WriteString(conn, request)
		require.NoError(t, err)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, want, resp.StatusCode, request)
		require.NoError(t, conn.Close())
	}
}

func TestProxyKnowsItsUsers(t *testing.T) {
	g := newRegistry(t)
	g.contents["/x"] = []byte("x")
	var seen http.Header
	g.intercept = func(_ http.ResponseWriter, r *http.Request) bool { seen = r.Header.Clone(); return false }
	hash, err := bcrypt.GenerateFromPassword([]byte("s3cret"), bcrypt.MinCost)
	require.NoError(t, err)
	users := filepath.Join(t.TempDir(), "users")
	require.NoError(t, os.WriteFile(users, fmt.Appendf(nil, "# those\nann:%s\n", hash), 0o600))
	p := newProxied(t, ProxyConfig{Users: users}, registryproxy.Config{}, nil, g.Server)
	for user, want := range map[string]int{
		"": http.StatusProxyAuthRequired, "ann:wrong": http.StatusProxyAuthRequired, "bob:s3cret": http.StatusProxyAuthRequired,
		"ann:s3cret": http.StatusOK, "ann:" + strings.Repeat("x", 100): http.StatusProxyAuthRequired,
	} {
		via := &url.URL{Scheme: "http", Host: p.address}
		if name, password, ok := strings.Cut(user, ":"); ok {
			via.User = url.UserPassword(name, password)
		}
		transport := &http.Transport{Proxy: http.ProxyURL(via)}
		p.Client = &http.Client{Transport: transport}
		for range 2 {
			status, header, _ := p.ask(t, http.MethodGet, g.URL+"/x", nil, "")
			require.Equal(t, want, status, user)
			if want == http.StatusProxyAuthRequired {
				require.Contains(t, header.Get("Proxy-Authenticate"), "Basic")
			}
		}
		transport.CloseIdleConnections()
	}
	require.Empty(t, seen["Proxy-Authorization"], "it goes no further than the proxy")
}

func TestWrongProxySettings(t *testing.T) {
	cert, key, _ := authority(t, "a.test")
	empty := filepath.Join(t.TempDir(), "empty")
	require.NoError(t, os.WriteFile(empty, []byte("ann:plain\n"), 0o600))
	// All but the address is checked also where there is no proxy.
	for says, c := range map[string]ProxyConfig{
		"want host:port":      {Listen: "65004"},
		"needs proxy-users":   {Listen: "0.0.0.0:65004"},
		"proxy-users: ":       {Listen: "0.0.0.0:0", Users: empty},
		"needs proxy-ca":      {Intercept: registryproxy.Hosts{"a.test"}},
		"name both files":     {CA: cert},
		"proxy-intercept":     {Intercept: registryproxy.Hosts{"a.test:443"}, CA: cert, CAKey: key},
		"proxy-ca: ":          {Listen: "127.0.0.1:0", CA: key, CAKey: cert},
		"proxy-ports 0":       {Ports: []int{0}},
		"[0].match":           {Rules: []registryproxy.Rule{{Match: "(", Action: registryproxy.ActionSwarm}}},
		"[1].action":          {Rules: append(registryproxy.DefaultRules(), registryproxy.Rule{Match: "x", Action: "drop"})},
		"[0].to: ":            {Rules: []registryproxy.Rule{{Match: "x", Action: registryproxy.ActionRedirect, To: "host"}}},
		"only of use with":    {Rules: []registryproxy.Rule{{Match: "x", Action: registryproxy.ActionDirect, To: "http://a"}}},
		"[0].match: want a r": {Listen: "127.0.0.1:0", Rules: []registryproxy.Rule{{Action: registryproxy.ActionDirect}}},
	} {
		cfg := testConfig(t)
		cfg.Proxy = c
		_, err := New(cfg, zaptest.NewLogger(t), prometheus.NewRegistry())
		require.ErrorContains(t, err, says)
	}
}

func TestProxyMetricsAreClean(t *testing.T) {
	p := newProxied(t, ProxyConfig{}, registryproxy.Config{}, nil)
	problems, err := testutil.GatherAndLint(p.metrics, "damselfly_proxy_requests_total")
	require.NoError(t, err)
	require.Empty(t, problems)
}

// What a caller sends along may be what lets it in, or what it is asked for.
func TestProxyTakesAlongWhatCounts(t *testing.T) {
	g := newRegistry(t)
	blob := "/v2/org/app/blobs/" + g.blob([]byte("layer"))
	g.contents["/model"] = []byte("model")
	var seen http.Header
	g.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		seen = r.Header.Clone()
		if r.Header.Get("Private-Token") == "s3cret" || r.URL.Query().Get("token") == "s3cret" {
			return false
		}
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	p := newProxied(t, ProxyConfig{Rules: append(registryproxy.DefaultRules(),
		registryproxy.Rule{Match: `/model$`, Action: registryproxy.ActionSwarm},
	)}, plain(g), nil, g.Server)
	status, _, got := p.ask(t, http.MethodGet, g.URL+"/model", http.Header{
		"Private-Token": {"s3cret"}, "Connection": {"X-Hop"}, "X-Hop": {"1"}, "If-None-Match": {`"x"`},
	}, "")
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "model", got)
	require.Equal(t, 1, p.count(t, "swarm"))
	require.Empty(t, seen["X-Hop"])
	require.Empty(t, seen["If-None-Match"], "it would be answered with no content")
	status, _, got = p.ask(t, http.MethodGet, g.URL+blob+"?token=s3cret", nil, "")
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "layer", got)
	require.Equal(t, 1, p.count(t, "direct"))
}

// A rule that refuses is not passed by with another spelling.
func TestProxyRefusesInAnySpelling(t *testing.T) {
	g := newRegistry(t)
	g.intercept = func(_ http.ResponseWriter, r *http.Request) bool {
		t.Error("asked for", r.URL)
		return false
	}
	port := strconv.Itoa(portOf(t, g.Server))
	p := newProxied(t, ProxyConfig{Rules: []registryproxy.Rule{
		{Match: `^https?://localhost(:\d+)?/`, Action: registryproxy.ActionRefuse},
		{Match: `/secret/`, Action: registryproxy.ActionRefuse},
	}}, registryproxy.Config{}, nil, g.Server)
	for _, request := range []string{
		"GET http://localhost:" + port + "/x", "GET http://LOCALHOST:" + port + "/x", "GET http://localhost.:" + port + "/x",
		"GET http://127.0.0.1:" + port + "/%73ecret/x", "GET http://127.0.0.1:" + port + "/secret%2Fx",
		"GET http://127.0.0.1:" + port + "/secret//x", "GET http://127.0.0.1:" + port + "/./secret/x",
		"CONNECT localhost:" + port, "CONNECT LocalHost:" + port, "CONNECT localhost.:" + port,
	} {
		status, got := p.raw(t, request+" HTTP/1.1\r\nHost: other\r\n\r\n")
		require.Equal(t, http.StatusForbidden, status, request)
		require.Contains(t, got, "rule refuses", request)
	}
}

// raw sends a request as it is.
func (p *proxied) raw(t *testing.T, request string) (status int, answer string) {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", p.address)
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	_, err = io.WriteString(conn, request)
	require.NoError(t, err)
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err, request)
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err, request)
	require.NoError(t, resp.Body.Close())
	return resp.StatusCode, string(b)
}

// dial opens a connection to the proxy, sends a request, and returns the answer's
// status line.
func (p *proxied) dial(t *testing.T, request string) (net.Conn, string) {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", p.address)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	_, err = io.WriteString(conn, request)
	require.NoError(t, err)
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(waitLimit)))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	return conn, resp.Status
}

// Whatever outlives its request has one of the places, and ends with the proxy.
func TestTunnelsHavePlaces(t *testing.T) {
	g := newRegistry(t)
	g.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Upgrade") == "" {
			return false
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
			go func() { _, _ = io.Copy(io.Discard, conn); _ = conn.Close() }()
		}
		return true
	}
	cert, key, roots := authority(t, "localhost")
	p := newProxied(t, ProxyConfig{Intercept: registryproxy.Hosts{"localhost"}, CA: cert, CAKey: key}, registryproxy.Config{}, roots, g.Server)
	port := strconv.Itoa(portOf(t, g.Server))
	intercepted := "CONNECT localhost:" + port + " HTTP/1.1\r\nHost: x\r\n\r\n"
	others := []string{
		"CONNECT 127.0.0.1:" + port + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET http://127.0.0.1:" + port + "/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
	}
	for range cap(p.tunnels.places) - 1 {
		_, _, ok := p.tunnels.enter(t.Context())
		require.True(t, ok)
	}
	for _, request := range append(others, intercepted) {
		conn, status := p.dial(t, request)
		require.NotContains(t, status, "50", request)
		_, status = p.dial(t, request)
		require.Contains(t, status, "503", request)
		require.NoError(t, conn.Close())
		require.Eventually(t, func() bool { return len(p.tunnels.places) < cap(p.tunnels.places) }, waitLimit, waitTick, request)
	}
	for range cap(p.tunnels.places) - 1 {
		<-p.tunnels.places
	}
	var open []net.Conn
	for _, request := range others {
		conn, _ := p.dial(t, request)
		open = append(open, conn)
	}
	_, _, _ = p.ask(t, http.MethodGet, "https://localhost:"+port, nil, "") // on a connection that stays
	require.Len(t, p.tunnels.places, 3)
	require.NoError(t, p.end())
	require.Len(t, p.tunnels.places, cap(p.tunnels.places), "nobody gets a place any more")
	for i, conn := range open {
		_, err := conn.Read(make([]byte, 1))
		require.Error(t, err, others[i])
		require.NotErrorIs(t, err, os.ErrDeadlineExceeded, "it outlives the proxy: %s", others[i])
	}
}

// Most clients show of a failed CONNECT nothing but its first line.
func TestConnectSaysWhyItFails(t *testing.T) {
	p := newProxied(t, ProxyConfig{Ports: []int{443}}, registryproxy.Config{}, nil)
	_, status := p.dial(t, "CONNECT 127.0.0.1 HTTP/1.1\r\nHost: x\r\n\r\n")
	require.Regexp(t, "^502 damselfly: .*refused$", status)
	_, body := p.raw(t, "CONNECT 127.0.0.1 HTTP/1.1\r\nHost: x\r\n\r\n")
	require.Contains(t, body, "refused")
	_, status = p.dial(t, "CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n")
	require.Equal(t, "403 damselfly: this port is not one of proxy-ports", status)
}

// A server that goes on when its client has gone keeps no place for ever.
func TestTunnelsEndWithTheirClients(t *testing.T) {
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	ends := func() (near, far net.Conn) {
		near, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", ln.Addr().String())
		require.NoError(t, err)
		far, err = ln.Accept()
		require.NoError(t, err)
		t.Cleanup(func() { _, _ = near.Close(), far.Close() })
		return near, far
	}
	client, a := ends()
	b, server := ends()
	tunnels := newTunnels()
	tunnels.linger = 100 * time.Millisecond
	over := make(chan struct{})
	go func() {
		tunnels.join(t.Context(), a, b)
		close(over)
	}()
	require.NoError(t, client.Close())
	_, err = io.Copy(io.Discard, server) // it has seen the end, and does nothing
	require.NoError(t, err)
	select {
	case <-over:
	case <-time.After(10 * time.Second):
		t.Fatal("the tunnel of a client that has gone stays")
	}
}
