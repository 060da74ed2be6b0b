package registryproxy

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

func TestConfigValidate(t *testing.T) {
	up := func(name, url string) Config { return Config{Upstreams: []Upstream{{Name: name, URL: url}}} }
	one := func(u Upstream) Config { u.Name = "a.b"; return Config{Upstreams: []Upstream{u}} }
	mirror := func(m Mirror) Config { return one(Upstream{Mirrors: []Mirror{{URL: "https://x"}, m}}) }
	static := Credentials{Username: "u", PasswordFile: "p"}
	few := func(n int) *int { return &n }
	tests := map[string]struct {
		cfg Config
		err string // "" for none
	}{
		"nothing":          {Config{}, ""},
		"default":          {Config{Default: "docker.io"}, ""},
		"plain":            {up("docker.io", "http://10.0.0.1:5000"), ""},
		"prefix":           {up("reg:5000", "https://reg.test/a/b/"), ""},
		"no URL":           {up("reg:5000", ""), ""},
		"IPv6":             {up("[::1]:5000", "http://[::1]:5000"), ""},
		"IPv6 without":     {up("[fd00::1]", "https://[fd00::1]/x"), ""},
		"IPv6 by name":     {up("[fd00::1]", ""), ""},
		"times":            {one(Upstream{ConnectTimeout: 1, HeaderTimeout: 1, Retries: few(0)}), ""},
		"mirrors":          {mirror(Mirror{URL: "http://[::1]:5000/x"}), ""},
		"bad default":      {Config{Default: "docker.io/x"}, `default registry "docker.io/x" is not a host or host:port`},
		"bad name":         {up("https://docker.io", "https://x"), `registries[0].name "https://docker.io" is not a host or host:port: write it as in images' names, such as docker.io`},
		"empty name":       {up("", "https://x"), `registries[0].name "" is not a host or host:port: write it as in images' names, such as docker.io`},
		"twice":            {Config{Upstreams: []Upstream{{Name: "docker.io", URL: "https://x"}, {Name: "index.Docker.io", URL: "https://y"}}}, `registry "index.Docker.io" is listed twice: keep one`},
		"no scheme":        {up("a.b", "reg.test"), `registry "a.b": url: the URL must begin with https:// or http://`},
		"no host":          {up("a.b", "https://:80/x"), `registry "a.b": url: the URL names no host`},
		"query":            {up("a.b", "https://x?y"), `registry "a.b": url: the URL must end with its path`},
		"credentials":      {up("a.b", "https://u:p@x"), `registry "a.b": url: the URL must not hold credentials: there is credentials: for them`},
		"nonsense":         {up("a.b", "https://[x"), `registry "a.b": url: the URL cannot be read: want one like https://registry.corp:5000`},
		"bad port":         {up("a.b", "https://x:0"), `registry "a.b": url: the URL's host is not a host name, an IPv4 address or an IPv6 address in brackets, with a port of 1 to 65535 or none`},
		"zone":             {up("a.b", "http://[fe80::1%25eth0]"), `registry "a.b": url: the URL's host is not a host name, an IPv4 address or an IPv6 address in brackets, with a port of 1 to 65535 or none`},
		"bad mirror":       {mirror(Mirror{URL: "x"}), `registry "a.b": mirrors[1].url: the URL must begin with https:// or http://`},
		"mirror's key":     {mirror(Mirror{URL: "https://x", TLS: TLS{ClientKey: "k"}}), `registry "a.b": mirrors[1].client-cert and client-key: name both files, or neither`},
		"cert alone":       {one(Upstream{TLS: TLS{ClientCert: "c"}}), `registry "a.b": client-cert and client-key: name both files, or neither`},
		"CA without TLS":   {one(Upstream{URL: "http://x", TLS: TLS{CA: "c"}}), `registry "a.b": url: a ca or a client-cert is of use only where the URL begins with https://`},
		"retries":          {one(Upstream{Retries: few(6)}), `registry "a.b": retries 6: want 0 to 5`},
		"timeout":          {one(Upstream{HeaderTimeout: -1}), `registry "a.b": connect-timeout and header-timeout: want times above 0, or leave them out`},
		"readers":          {one(Upstream{Readers: "all"}), `registry "a.b": readers "all": want callers or region`},
		"away":             {one(Upstream{ReadersWhenAway: -1}), `registry "a.b": readers-when-away -1ns: want 0s to 24h0m0s`},
		"away too long":    {one(Upstream{ReadersWhenAway: 25 * time.Hour}), `registry "a.b": readers-when-away 25h0m0s: want 0s to 24h0m0s`},
		"no password":      {one(Upstream{Readers: ReadersRegion, Credentials: Credentials{Username: "u"}}), `registry "a.b": credentials: username and password-file: give both, or neither`},
		"two ways":         {one(Upstream{Readers: ReadersRegion, Credentials: Credentials{Helper: "u", DockerConfig: "x"}}), `registry "a.b": credentials: give one of username with password-file, docker-config, and helper`},
		"helper's path":    {one(Upstream{Readers: ReadersRegion, Credentials: Credentials{Helper: "/bin/x"}}), `registry "a.b": credentials.helper "/bin/x": want what follows docker-credential- in the program's name, such as ecr-login`},
		"for whom":         {one(Upstream{Credentials: static}), `registry "a.b": credentials: with them, whoever reaches the region reads what they can: say so by readers: region, or leave them out`},
		"for callers":      {one(Upstream{Credentials: static, Readers: ReadersCallers}), `registry "a.b": credentials: with them, whoever reaches the region reads what they can: say so by readers: region, or leave them out`},
		"mirror, for whom": {mirror(Mirror{URL: "https://x", Credentials: static}), `registry "a.b": mirrors[1].credentials: with them, whoever reaches the region reads what they can: say so by readers: region, or leave them out`},
		"stall timeout":    {Config{StallTimeout: -1}, "stall timeout -1ns is negative"},
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
	n, err = testutil.GatherAndCount(reg, "damselfly_upstream_endpoints")
	require.NoError(t, err)
	require.Equal(t, 3, n)
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
