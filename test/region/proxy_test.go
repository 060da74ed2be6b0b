package region_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/stretchr/testify/require"

	"damselfly.dev/dfdaemon"
	"damselfly.dev/registryproxy"
)

// Hosts that know no mirror, only HTTPS_PROXY, pull from a registry with a
// certificate of its own: what the proxy opens comes through the swarm.
func TestPullsThroughTheForwardProxy(t *testing.T) {
	o := newOrigin(t)
	image := push(t, o)
	secure := httptest.NewTLSServer(o)
	t.Cleanup(secure.Close)
	dir := t.TempDir()
	ca := filepath.Join(dir, "registry.pem")
	require.NoError(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600))
	at, err := url.Parse(secure.URL)
	require.NoError(t, err)
	port, err := strconv.Atoi(at.Port())
	require.NoError(t, err)
	upstreams := reachable(registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: at.Host, URL: secure.URL, TLS: registryproxy.TLS{CA: ca}}}})

	cert, key, err := registryproxy.CreateAuthority(registryproxy.Hosts{at.Hostname()})
	require.NoError(t, err)
	proxy := dfdaemon.ProxyConfig{
		Listen: "127.0.0.1:0", Rules: registryproxy.DefaultRules(), Ports: []int{port},
		Intercept: registryproxy.Hosts{at.Hostname()}, CA: filepath.Join(dir, "ca.crt"), CAKey: filepath.Join(dir, "ca.key"),
	}
	require.NoError(t, os.WriteFile(proxy.CA, cert, 0o600))
	require.NoError(t, os.WriteFile(proxy.CAKey, key, 0o600))
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(cert))

	centre := startSupernodeFor(t, upstreams, t.TempDir(), "")
	for range 3 {
		host := startHostFor(t, upstreams, centre, nil, func(c *dfdaemon.Config) { c.Proxy = proxy })
		transport := &http.Transport{
			Proxy:           http.ProxyURL(&url.URL{Scheme: "http", Host: host.proxy}),
			TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		}
		ref, err := name.ParseReference(at.Host + "/" + strings.TrimPrefix(image, "/"))
		require.NoError(t, err)
		img, err := remote.Image(ref, remote.WithContext(t.Context()), remote.WithTransport(transport))
		require.NoError(t, err)
		all, err := img.Layers()
		require.NoError(t, err)
		for _, l := range all {
			require.NoError(t, check(l))
		}
		transport.CloseIdleConnections()
		require.Positive(t, host.value(t, "damselfly_proxy_requests_total", "swarm"))
	}
	requireOnce(t, o, centre)
}
