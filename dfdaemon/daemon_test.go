package dfdaemon

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

const (
	waitLimit = time.Minute
	waitTick  = 10 * time.Millisecond
)

func testConfig(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	c := Default()
	c.DataDir, c.Socket = filepath.Join(dir, "data"), filepath.Join(dir, "d.sock")
	c.MirrorListen, c.PeerListen, c.MetricsListen = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	c.DrainTimeout = time.Second
	c.Registries.AllowAddresses = []string{"127.0.0.0/8"} // where tests have their origins
	return c
}

// run runs an agent until the test ends, or end is called.
func run(t *testing.T, c Config) (d *Daemon, end func() error) {
	t.Helper()
	d, err := New(c, zaptest.NewLogger(t), prometheus.NewRegistry())
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	end = func() error {
		cancel()
		err := <-ended
		ended <- err
		return err
	}
	t.Cleanup(func() { require.NoError(t, end()) })
	return d, end
}

// overSocket sends a request to the control socket.
func overSocket(t *testing.T, socket, method, path, body string) (status int, header http.Header, answer string) {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://dfdaemon"+path, strings.NewReader(body))
	require.NoError(t, err)
	resp, err := transport.RoundTrip(r)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, resp.Header, string(b)
}

func TestSocketGivesContent(t *testing.T) {
	g := newRegistry(t)
	want := bytes.Repeat([]byte("damselfly"), 100_000)
	g.contents["/file"] = want
	c := testConfig(t)
	_, end := run(t, c)

	for _, dgst := range []string{"", digest.FromBytes(want).String()} {
		body, length, err := dfget.SocketContent(t.Context(), c.Socket, dfget.ContentRequest{URL: g.URL + "/file", Digest: dgst})
		require.NoError(t, err)
		require.EqualValues(t, len(want), length)
		got, err := io.ReadAll(body)
		require.NoError(t, err)
		require.NoError(t, body.Close())
		require.Equal(t, want, got)
	}

	_, _, err := dfget.SocketContent(t.Context(), c.Socket, dfget.ContentRequest{URL: g.URL + "/none"})
	var no *dfget.RefusedError
	require.ErrorAs(t, err, &no)
	require.Equal(t, http.StatusNotFound, no.Status)
	require.Contains(t, string(no.Body), "UNKNOWN_HERE")

	_, _, err = dfget.SocketContent(t.Context(), c.Socket, dfget.ContentRequest{URL: "http://127.0.0.1:1/"})
	require.ErrorContains(t, err, "connection refused")

	for body, says := range map[string]string{
		`{`:                     "not a request for content",
		`{"path":"/x"}`:         "unknown field",
		`{"url":"/etc/passwd"}`: "must begin with http",
		`{"url":"http://a/","digest":"sha256:totallywrong"}`: "digest",
		`{"url":"` + strings.Repeat("x", maxRequest) + `"}`:  "too large",
	} {
		status, header, got := overSocket(t, c.Socket, http.MethodPost, "/v1/content", body)
		require.Equal(t, http.StatusBadRequest, status)
		require.Equal(t, api.CodeBadRequest, header.Get(api.ErrorHeader))
		var e api.Error
		require.NoError(t, json.Unmarshal([]byte(got), &e))
		require.Equal(t, api.CodeBadRequest, e.Code)
		require.Contains(t, e.Message, says)
	}
	status, _, _ := overSocket(t, c.Socket, http.MethodPut, "/v1/content", "")
	require.Equal(t, http.StatusMethodNotAllowed, status)
	status, _, _ = overSocket(t, c.Socket, http.MethodGet, "/v2/", "")
	require.Equal(t, http.StatusNotFound, status)
	require.NoError(t, end())
	require.NoFileExists(t, c.Socket)
}

func TestSocketTellsTheState(t *testing.T) {
	c := testConfig(t)
	store, err := pieces.OpenStore(c.DataDir, pieces.StoreConfig{})
	require.NoError(t, err)
	id := pieces.TaskID(digest.FromString("content").String())
	layout := pieces.Layout{Length: 7, PieceSize: pieces.MinPieceSize}
	content, err := store.Create(pieces.Meta{ID: id, Layout: layout})
	require.NoError(t, err)
	_, err = content.Make(0, strings.NewReader("content"))
	require.NoError(t, err)
	content.Release()
	require.NoError(t, store.Close())

	d, _ := run(t, c)
	status, _, body := overSocket(t, c.Socket, http.MethodGet, "/v1/status", "")
	require.Equal(t, http.StatusOK, status)
	var s Status
	require.NoError(t, json.Unmarshal([]byte(body), &s))
	require.Empty(t, s.Supernode)
	require.Equal(t, d.MirrorAddr(), s.Mirror)
	require.Equal(t, StoreStatus{Reserved: 7, Quota: c.Quota}, s.Store)
	require.Len(t, s.Tasks, 1)
	require.Equal(t, TaskStatus{ID: id, Length: 7, Pieces: 1, Have: 1, LastUse: s.Tasks[0].LastUse}, s.Tasks[0])
}

func TestHealth(t *testing.T) {
	d, _ := run(t, testConfig(t))
	base := "http://" + d.addr[metricsListen]
	require.Eventually(t, d.ready.Load, waitLimit, waitTick)
	resp, _ := get(t, base+"/readyz")
	require.Equal(t, http.StatusOK, resp.StatusCode)
	resp, _ = get(t, base+"/healthz")
	require.Equal(t, http.StatusOK, resp.StatusCode)
	_, _ = get(t, "http://"+d.MirrorAddr()+"/v2/")
	_, b := get(t, base+"/metrics")
	require.Contains(t, string(b), `damselfly_mirror_requests_total{kind="ping",result="ok"} 1`)
	require.Contains(t, string(b), `damselfly_cache_limit_bytes 2.147483648e+10`)
	d.ready.Store(false)
	resp, _ = get(t, base+"/readyz")
	require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
	resp, _ = get(t, base+"/debug/pprof/")
	require.Equal(t, http.StatusNotFound, resp.StatusCode)
}

// What New has opened before it failed is free again.
func TestNewLeavesNothingBehind(t *testing.T) {
	c := testConfig(t)
	bad := c
	bad.Socket = filepath.Join(c.DataDir, "lock") // it is a file
	_, err := New(bad, zaptest.NewLogger(t), prometheus.NewRegistry())
	require.ErrorContains(t, err, "no socket")
	_, end := run(t, c)
	require.NoError(t, end())
	_, err = os.Stat(filepath.Join(c.DataDir, "clean"))
	require.NoError(t, err, "the store's end was not a clean one")
}

// The credentials that a caller sends are in no log.
func TestNothingSecretIsLogged(t *testing.T) {
	g := newRegistry(t)
	d := g.blob([]byte("blob"))
	g.manifest([]byte("{}"))
	var lines bytes.Buffer // written with the agent's own lock, read after its end
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.Lock(zapcore.AddSync(&lines)), zap.DebugLevel))
	c := testConfig(t)
	c.Registries.Upstreams = []registryproxy.Upstream{{Name: "reg.test", URL: g.URL}}
	agent, err := New(c, log, prometheus.NewRegistry())
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx) }()
	for _, path := range []string{"/v2/reg.test/org/app/blobs/" + d, "/v2/reg.test/org/app/manifests/v1", "/v2/127.0.0.1:1/a/manifests/v1", "/v2/127.0.0.1:1/a/blobs/" + d} {
		_, _ = get(t, "http://"+agent.MirrorAddr()+path+"?token=s3cret", "Authorization: Bearer s3cret")
	}
	_, _, err = dfget.SocketContent(t.Context(), c.Socket, dfget.ContentRequest{
		URL: "http://127.0.0.1:1/x?sig=s3cret", Headers: http.Header{"Authorization": {"s3cret"}},
	})
	require.NotContains(t, err.Error(), "s3cret")
	cancel()
	require.NoError(t, <-ended)
	require.NotEmpty(t, lines.String())
	require.NotContains(t, lines.String(), "s3cret")
}

func TestEnginesMayHangUp(t *testing.T) {
	g := newRegistry(t)
	d := g.blob(make([]byte, 32<<20)) // more than the sockets hold
	c := testConfig(t)
	c.Registries.Upstreams = []registryproxy.Upstream{{Name: "reg.test", URL: g.URL}}
	agent, _ := run(t, c)
	engine, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", agent.MirrorAddr())
	require.NoError(t, err)
	_, err = io.WriteString(engine, "GET /v2/reg.test/org/app/blobs/"+d+" HTTP/1.1\r\nHost: x\r\n\r\n")
	require.NoError(t, err)
	_, err = io.ReadFull(engine, make([]byte, 1000))
	require.NoError(t, err)
	require.NoError(t, engine.Close())
	require.Eventually(t, func() bool {
		_, b := get(t, "http://"+agent.addr[metricsListen]+"/metrics")
		return bytes.Contains(b, []byte(`damselfly_mirror_requests_total{kind="blob",result="gone"} 1`))
	}, waitLimit, waitTick)
}
