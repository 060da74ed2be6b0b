package dfdaemon

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
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
