package dfdaemon

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
)

// A dfdaemon that starts with the same settings takes the place of the one that runs:
// nobody is refused a connection, and an answer under way comes to its end, from the
// new one's mirror.
func TestTakeOver(t *testing.T) {
	g := newRegistry(t)
	want := make([]byte, 32<<20) // more than the sockets hold
	d := g.blob(want)
	c := testConfig(t)
	c.DrainTimeout = time.Hour // it is not what ends it
	c.Registries.Upstreams = []registryproxy.Upstream{{Name: "reg.test", URL: g.URL}}
	old, err := New(c, zaptest.NewLogger(t), prometheus.NewRegistry())
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() { ended <- old.Run(context.WithoutCancel(t.Context())) }() // it ends when its engine has all, or is gone

	path := "/v2/reg.test/org/app/blobs/" + d
	engine, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", old.MirrorAddr())
	require.NoError(t, err)
	t.Cleanup(func() { _ = engine.Close() })
	_, err = io.WriteString(engine, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n")
	require.NoError(t, err)
	answer := bufio.NewReader(engine)
	resp, err := http.ReadResponse(answer, nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.StatusCode)

	var asked, failed atomic.Int64
	over := make(chan struct{})
	loop := make(chan struct{})
	go func() { // connections all the while, each a new one
		defer close(loop)
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		for {
			select {
			case <-over:
				return
			default:
			}
			resp, err := client.Get("http://" + old.MirrorAddr() + "/v2/") //nolint:noctx // the listener is there
			if err != nil || resp.StatusCode != http.StatusOK {
				failed.Add(1)
				t.Log(err, resp)
			}
			if err == nil {
				_ = resp.Body.Close()
			}
			asked.Add(1)
		}
	}()
	require.Eventually(t, func() bool { return asked.Load() > 0 }, waitLimit, waitTick)
	heir, end := run(t, c)
	require.Equal(t, old.addr, heir.addr)
	before := asked.Load()
	require.Eventually(t, func() bool { return asked.Load() > before+10 }, waitLimit, waitTick)
	close(over)
	<-loop
	require.Zero(t, failed.Load())

	status, _, _ := overSocket(t, c.Socket, http.MethodGet, "/v1/status", "")
	require.Equal(t, http.StatusOK, status)
	select {
	case err := <-ended:
		t.Fatal("the old one did not wait for its engine: ", err)
	default:
	}
	got, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, d, digest.FromBytes(got).String())
	require.NoError(t, resp.Body.Close())
	require.NoError(t, engine.Close())
	require.NoError(t, <-ended)
	require.FileExists(t, c.Socket)
	require.NoError(t, end())
	require.NoFileExists(t, c.Socket)
	_, err = os.Stat(old.store.Dir() + "/clean")
	require.NoError(t, err)
}

// What the old one reads past the region it reads from the new one.
func TestHeir(t *testing.T) {
	g := newRegistry(t)
	d := g.blob([]byte("damselfly"))
	c := testConfig(t)
	c.Registries.Upstreams = []registryproxy.Upstream{{Name: "reg.test", URL: g.URL}}
	next, _ := run(t, c)
	h := newHeir()
	b := registryBlob{heir: h, route: registryproxy.Route{
		Kind: registryproxy.KindBlob, Repo: registryproxy.Repository{Registry: "reg.test", Name: "org/app"}, Reference: d,
	}}
	_, _, err := h.open(t.Context(), b, 3)
	require.ErrorIs(t, err, errNoHeir)
	mirror := next.MirrorAddr()
	h.mirror.Store(&mirror)
	for end, want := range map[int64]string{0: "selfly", 5: "se"} {
		b.end = end
		body, size, err := b.Open(t.Context(), 3) // it has no registry that it could ask
		require.NoError(t, err)
		require.EqualValues(t, 9, size)
		got, err := io.ReadAll(body)
		require.NoError(t, err)
		require.NoError(t, body.Close())
		require.Equal(t, want, string(got))
	}
	b.route.Reference = digest.FromString("none").String()
	_, _, err = h.open(t.Context(), b, 0)
	require.ErrorContains(t, err, "404")
}

// One with another mirror is no successor; a listener whose setting is another one is
// opened anew.
func TestWhoTakesOver(t *testing.T) {
	c := testConfig(t)
	first, end := run(t, c)
	other := c
	other.MirrorListen, other.Socket = "127.0.0.2:0", ""
	_, err := New(other, zaptest.NewLogger(t), prometheus.NewRegistry())
	require.ErrorIs(t, err, pieces.ErrLocked)
	resp, _ := get(t, "http://"+first.MirrorAddr()+"/v2/")
	require.Equal(t, http.StatusOK, resp.StatusCode)

	moved := c
	moved.PeerListen = "127.0.0.2:0"
	next, _ := run(t, moved)
	require.Equal(t, first.MirrorAddr(), next.MirrorAddr())
	require.NotEqual(t, first.PeerAddr(), next.PeerAddr())
	require.NoError(t, end())
	resp, _ = get(t, "http://"+first.MirrorAddr()+"/v2/")
	require.Equal(t, http.StatusOK, resp.StatusCode)
}

// One that cannot begin, whichever setting is wrong, leaves the one that runs as it is.
func TestWhoCannotTakeOver(t *testing.T) {
	c := testConfig(t)
	first, _ := run(t, c)
	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = taken.Close() })
	for name, wrong := range map[string]func(*Config){
		"certificate":  func(c *Config) { c.TLS = filepath.Join(t.TempDir(), "none") },
		"join token":   func(c *Config) { c.JoinToken = filepath.Join(t.TempDir(), "none") },
		"address":      func(c *Config) { c.MetricsListen = taken.Addr().String() },
		"peer address": func(c *Config) { c.PeerListen = taken.Addr().String() },
		"proxy":        func(c *Config) { c.Proxy.Listen = taken.Addr().String() },
		"proxy users":  func(c *Config) { c.Proxy.Listen, c.Proxy.Users = "127.0.0.1:0", filepath.Join(t.TempDir(), "none") },
		"group":        func(c *Config) { c.SocketGroup = "no-such-group" },
		"user":         func(c *Config) { c.SocketUsers = []string{"no-such-user"} },
		"advertise":    func(c *Config) { c.Advertise = "a b" },
		"supernode":    func(c *Config) { c.Supernodes = []string{"ftp://x"} },
	} {
		t.Run(name, func(t *testing.T) {
			bad := c
			wrong(&bad)
			_, err := New(bad, zaptest.NewLogger(t), prometheus.NewRegistry())
			require.Error(t, err)
			require.NotErrorIs(t, err, pieces.ErrLocked)
			resp, _ := get(t, "http://"+first.MirrorAddr()+"/v2/")
			require.Equal(t, http.StatusOK, resp.StatusCode)
			at, err := (&net.Dialer{}).DialContext(t.Context(), "unix", c.Socket)
			require.NoError(t, err)
			require.NoError(t, at.Close())
			require.True(t, first.ready.Load())
		})
	}
}

// Who may use the control socket is as the one that takes over has it.
func TestTakeOverSocket(t *testing.T) {
	c := testConfig(t)
	_, end := run(t, c)
	c.SocketUsers = []string{strconv.Itoa(os.Getuid())}
	_, _ = run(t, c)
	require.NoError(t, end())
	info, err := os.Stat(c.Socket)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o666), info.Mode().Perm())
}
