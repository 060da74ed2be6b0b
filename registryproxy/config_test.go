package registryproxy

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

func TestConfigValidate(t *testing.T) {
	up := func(name, url string) Config { return Config{Upstreams: []Upstream{{name, url}}} }
	tests := map[string]struct {
		cfg Config
		err string // "" for none
	}{
		"nothing":       {Config{}, ""},
		"default":       {Config{Default: "docker.io"}, ""},
		"plain":         {up("docker.io", "http://10.0.0.1:5000"), ""},
		"prefix":        {up("reg:5000", "https://reg.test/a/b/"), ""},
		"IPv6":          {up("[::1]:5000", "http://[::1]:5000"), ""},
		"bad default":   {Config{Default: "docker.io/x"}, `default registry "docker.io/x" is not a host or host:port`},
		"bad name":      {up("https://docker.io", "https://x"), `upstream "https://docker.io": the name is not a host or host:port`},
		"empty name":    {up("", "https://x"), `upstream "": the name is not a host or host:port`},
		"twice":         {Config{Upstreams: []Upstream{{"docker.io", "https://x"}, {"index.Docker.io", "https://y"}}}, `upstream "index.Docker.io" is listed twice`},
		"no scheme":     {up("a.b", "reg.test"), `upstream "a.b": the URL must begin with https:// or http://`},
		"no host":       {up("a.b", "https://:80/x"), `upstream "a.b": the URL names no host`},
		"query":         {up("a.b", "https://x?y"), `upstream "a.b": the URL must end with its path`},
		"credentials":   {up("a.b", "https://u:p@x"), `upstream "a.b": the URL must not hold credentials`},
		"nonsense":      {up("a.b", "https://[x"), `upstream "a.b": the URL cannot be read`},
		"empty URL":     {up("a.b", ""), `upstream "a.b": the URL must begin with https:// or http://`},
		"stall timeout": {Config{StallTimeout: -1}, "stall timeout -1ns is negative"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := tt.cfg.Validate()
			_, newErr := New(tt.cfg, zap.NewNop(), prometheus.NewRegistry())
			if tt.err == "" {
				require.NoError(t, err)
				require.NoError(t, newErr)
				return
			}
			require.EqualError(t, err, tt.err)
			require.EqualError(t, newErr, tt.err)
		})
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	_, err := New(Config{}, zap.NewNop(), reg)
	require.NoError(t, err)
	problems, err := testutil.GatherAndLint(reg)
	require.NoError(t, err)
	require.Empty(t, problems)
	n, err := testutil.GatherAndCount(reg, "damselfly_upstream_requests_total")
	require.NoError(t, err)
	require.Equal(t, 6*4, n, "every series is there from the start")
	_, err = New(Config{}, zap.NewNop(), reg)
	require.ErrorContains(t, err, "register the metrics of registries")
}

func TestWriteError(t *testing.T) {
	w := httptest.NewRecorder()
	WriteError(w, &Error{http.StatusNotFound, CodeManifestUnknown, `no "such" thing`})
	require.Equal(t, 404, w.Code)
	require.Equal(t, "application/json", w.Header().Get("Content-Type"))
	require.Equal(t, "no-store", w.Header().Get("Cache-Control"))
	require.JSONEq(t, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no \"such\" thing"}]}`, w.Body.String())
}
