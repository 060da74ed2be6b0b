package dfdaemon

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/registryproxy"
)

func TestWhatIsBehindThePrefix(t *testing.T) {
	c := Default().URLs
	for path, want := range map[string]string{
		"/p2p/https://h/a/b?x=%2F&y": "https://h/a/b?x=%2F&y",
		"/p2p/http:/h:81/a%2Fb":      "http://h:81/a%2Fb",
		"/p2p/https://[::1]:5/":      "https://[::1]:5/",
		"/p2p/ftp://h/a":             "error",
		"/p2p/h/a":                   "error",
		"/p2p/":                      "error",
		"/p2p/https://u:p@h/":        "error",
		"/p2p/https:///a":            "error",
		"/p2px/https://h/":           "",
		"/https://h/":                "",
	} {
		u, err := c.behind(httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
		switch want {
		case "error":
			require.Error(t, err, path)
		case "":
			require.NoError(t, err, path)
			require.Nil(t, u, path)
		default:
			require.NoError(t, err, path)
			require.Equal(t, want, u.String())
		}
	}
	c.Prefix = ""
	u, err := c.behind(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/p2p/https://h/", nil))
	require.NoError(t, err)
	require.Nil(t, u)
}

func TestURLsAreForThisHostAlone(t *testing.T) {
	m := &mirror{urls: Default().URLs}
	var err error
	m.registry, err = registryproxy.New(registryproxy.Config{}, zaptest.NewLogger(t), prometheus.NewRegistry())
	require.NoError(t, err)
	for from, want := range map[string]string{
		"127.0.0.1:1": "proxy-ports", "[::1]:1": "proxy-ports", "[::ffff:127.0.0.1]:1": "proxy-ports", // the next that refuses it
		"10.0.0.5:1": "proxy-ports", "10.0.0.6:1": "this host alone", "": "this host alone",
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/p2p/http://127.0.0.1/x", nil)
		r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.IPv4(10, 0, 0, 5), Port: 65001}))
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		m.handler().ServeHTTP(w, r)
		require.Equal(t, http.StatusForbidden, w.Code)
		require.Contains(t, w.Body.String(), want, from)
	}
}

func TestURLSettings(t *testing.T) {
	require.NoError(t, Default().URLs.validate())
	for _, prefix := range []string{"/", "p2p/", "/p2p", "/v2/", "/v2/x/", "/a//b/", "/a?b/"} {
		require.ErrorContains(t, URLConfig{Prefix: prefix}.validate(), "url-prefix", prefix)
	}
	require.ErrorContains(t, URLConfig{Ignore: []string{"*"}}.validate(), "url-ignore")
}

// No error tells a URL, which may be signed.
func FuzzBehind(f *testing.F) {
	f.Add("https://h/a?sig=secret")
	f.Add("http:/h")
	f.Fuzz(func(t *testing.T, raw string) {
		r := &http.Request{Method: http.MethodGet}
		var err error
		if r.URL, err = url.Parse("/p2p/" + raw); err != nil {
			return
		}
		u, err := Default().URLs.behind(r)
		if err == nil && u != nil && (u.Hostname() == "" || u.User != nil) {
			t.Errorf("%q gives %q", raw, u)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Error(err)
		}
	})
}
