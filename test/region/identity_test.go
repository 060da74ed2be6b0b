package region_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/dfdaemon"
	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode"
	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
	"damselfly.dev/test/certs"
)

// A hostile host of the region, or none of it, gets no private piece with what it
// can come by: no, an old, another task's or another host's ticket; and nobody who
// is not of the region gets as far.
func TestTicketsAreTheirHosts(t *testing.T) {
	const secret = "Basic dXNlcjpwYXNz"
	o := newOrigin(t)
	push(t, o)
	o.set(func() { o.secret = secret })
	dir := filepath.Join(t.TempDir(), "ca")
	ca, err := identity.CreateCA(dir)
	require.NoError(t, err)
	token, err := ca.AddToken(0)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte(token.Text()), 0o600))
	centre := startSupernodeFor(t, registries(o), t.TempDir(), "", func(c *supernode.Config) { c.TLS, c.CA = "", dir })
	hosts, ids := make([]*node, 3), make([]*identity.Source, 3)
	for i := range hosts {
		var data string
		hosts[i] = startHostFor(t, registries(o), centre, nil, func(c *dfdaemon.Config) {
			c.TLS, c.JoinToken, data = "", file, c.DataDir
		})
		ids[i], err = identity.FromDir(filepath.Join(data, "identity"), zaptest.NewLogger(t))
		require.NoError(t, err)
	}
	var m struct{ Layers []struct{ Digest string } }
	require.NoError(t, json.Unmarshal([]byte(get(t, hosts[0].url(), "/v2/org/app/manifests/v1", secret).body), &m))
	for _, h := range hosts[:2] {
		for _, l := range m.Layers {
			require.Equal(t, http.StatusOK, get(t, h.url(), "/v2/org/app/blobs/"+l.Digest, secret).status)
			require.Equal(t, http.StatusUnauthorized, get(t, h.url(), "/v2/org/app/blobs/"+l.Digest, "Basic d3Jvbmc=").status)
		}
		require.Zero(t, h.value(t, "damselfly_fallbacks_total", ""))
	}
	requireOnce(t, o, centre)

	first, second := m.Layers[0].Digest, m.Layers[1].Digest
	mine := ticketOf(t, centre, ids[2], first, secret)
	another := ticketOf(t, centre, ids[1], first, secret)
	at := []string{centre.address}
	for _, h := range hosts[:2] {
		at = append(at, h.peer)
	}
	stranger := certsOf(t, authority(t), "damselfly://host/0123")
	for _, to := range at {
		for name, c := range map[string]struct {
			by     *identity.Source
			ticket string
			want   int
		}{
			"its own":        {ids[2], mine, http.StatusPartialContent},
			"none":           {ids[2], "", http.StatusUnauthorized},
			"another host's": {ids[2], another, http.StatusUnauthorized},
			"another task's": {ids[2], ticketOf(t, centre, ids[2], second, secret), http.StatusUnauthorized},
			"forged":         {ids[2], mine[:len(mine)-2] + "AA", http.StatusUnauthorized},
		} {
			got, err := piece(t, to, first, c.by, c.ticket)
			require.NoError(t, err, "%s at %s", name, to)
			require.Equal(t, c.want, got, "%s at %s", name, to)
		}
		_, err := piece(t, to, first, stranger, mine)
		require.ErrorContains(t, err, "tls", "a stranger's certificate at %s", to)
		got, err := piece(t, to, first, nil, mine)
		if to == centre.address { // which also serves who has no certificate, at /v2/
			require.NoError(t, err)
			require.Equal(t, http.StatusUnauthorized, got)
		} else {
			require.ErrorContains(t, err, "certificate required")
		}
	}
	_, err = api.Dial(t.Context(), &http.Client{Transport: insecure(nil)}, centre.url())
	require.ErrorContains(t, err, "401", "a session")
}

// ticketOf returns the ticket with which a host is granted a blob.
func ticketOf(t *testing.T, centre *node, who *identity.Source, d, secret string) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialTLSContext: who.DialSupernode((&net.Dialer{}).DialContext)}}
	conn, err := api.Dial(t.Context(), client, centre.url())
	require.NoError(t, err)
	defer conn.CloseNow()
	require.NoError(t, conn.Write(t.Context(), api.Up{Hello: &api.Hello{Version: api.Version, Host: "rogue"}}))
	require.NoError(t, conn.Write(t.Context(), api.Up{Join: []api.Join{{Seq: 1, Task: d, Origin: api.Origin{
		Registry: registryName, Repository: "org/app", Header: map[string][]string{"Authorization": {secret}},
	}}}}))
	for {
		down, err := conn.Read(t.Context())
		require.NoError(t, err)
		require.Empty(t, down.Refused)
		if len(down.Task) > 0 {
			return down.Task[0].Ticket
		}
	}
}

// insecure is a transport that trusts everybody, and shows who's certificate.
func insecure(who *identity.Source) *http.Transport {
	return &http.Transport{DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13} //nolint:gosec // as an attacker
		if who != nil {
			own, err := who.Peer()
			if err != nil {
				return nil, err
			}
			cfg.GetClientCertificate = own.GetClientCertificate
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return tls.Client(conn, cfg), nil
	}}
}

// piece asks for bytes of a task as a child does.
func piece(t *testing.T, at, d string, who *identity.Source, ticket string) (status int, err error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+at+api.ContentPath(pieces.TaskID(d)), nil)
	require.NoError(t, err)
	r.Header.Set(api.TicketHeader, ticket)
	r.Header.Set("Range", "bytes=0-99")
	transport := insecure(who)
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(r)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

func authority(t *testing.T) *certs.Authority {
	t.Helper()
	a, err := certs.New(t.Name())
	require.NoError(t, err)
	return a
}

func certsOf(t *testing.T, a *certs.Authority, uri string) *identity.Source {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, a.Write(dir, certs.Name{URI: uri}, a))
	s, err := identity.FromDir(dir, zaptest.NewLogger(t))
	require.NoError(t, err)
	return s
}

// While a crowd pulls, all certificates are replaced, and then the authority with
// them: no pull fails, none goes past the region, and the registry hears nothing
// of it.
func TestCertificatesAreReplacedInThePull(t *testing.T) {
	before, after := authority(t), authority(t)
	o := newOrigin(t)
	dirs := make([]string, 5) // the first is the supernode's
	all := func(by *certs.Authority, trusts ...*certs.Authority) {
		t.Helper()
		for i := range dirs {
			n := certs.Name{URI: fmt.Sprintf("spiffe://corp/host/%d", i), DNS: "host.corp"}
			require.NoError(t, by.Write(dirs[i], n, trusts...))
		}
	}
	for i := range dirs {
		dirs[i] = t.TempDir()
	}
	all(before, before)
	centre := startSupernodeFor(t, registries(o), t.TempDir(), "", func(c *supernode.Config) { c.TLS = dirs[0] })
	hosts := make([]*node, 4)
	for i := range hosts {
		hosts[i] = startHostFor(t, registries(o), centre, nil, func(c *dfdaemon.Config) { c.TLS = dirs[i+1] })
	}
	// A crowd whose links are opened anew at every step, as those that idle are.
	for step, swap := range []func(){
		func() { all(before, before) },        // renewed
		func() { all(before, before, after) }, // both are trusted
		func() { all(after, before, after) },
		func() { all(after, after) },
		func() {},
	} {
		img, err := random.Image(layerSize, layers)
		require.NoError(t, err)
		o.set(func() { o.pause = 0 })
		write(t, o.URL, img)
		o.set(func() { clear(o.gets); o.sent, o.pause = 0, 20e6 })
		digest, err := img.Digest()
		require.NoError(t, err)
		errs := make(chan error, len(hosts))
		for _, h := range hosts {
			go func() { errs <- pull(t.Context(), h, "org/app@"+digest.String()) }()
		}
		require.Eventually(t, func() bool { _, sent := o.counts(); return sent > layerSize }, waitLimit, waitTick)
		swap()
		for range hosts {
			require.NoError(t, <-errs, "step %d", step)
		}
		gets, _ := o.counts()
		for path, n := range gets {
			require.True(t, n == 1 || path == "/v2/", "step %d: %s %d", step, path, n)
		}
	}
	for _, h := range hosts {
		require.Zero(t, h.value(t, "damselfly_fallbacks_total", ""))
		require.Positive(t, h.value(t, "damselfly_received_bytes_total", "peer"))
	}
	late := certs.Name{URI: "spiffe://corp/host/late"}
	dir := t.TempDir()
	require.NoError(t, after.Write(dir, late, after))
	host := startHostFor(t, registries(o), centre, nil, func(c *dfdaemon.Config) { c.TLS = dir })
	require.NoError(t, pull(t.Context(), host, "org/app:v1"))
	require.NoError(t, before.Write(dir, late, before))
	_, err := identity.FromDir(dir, zaptest.NewLogger(t))
	require.NoError(t, err)
	_, err = piece(t, centre.address, "sha256:"+strings.Repeat("0", 64), certsOf(t, before, "spiffe://corp/host/1"), "")
	require.ErrorContains(t, err, "tls", "the old authority's are strangers now")
}

// A dfget without a dfdaemon joins as a host does.
func TestDfgetJoins(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	ca, err := identity.CreateCA(dir)
	require.NoError(t, err)
	token, err := ca.AddToken(0)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte(token.Text()), 0o600))
	o := newOrigin(t)
	push(t, o)
	var m struct{ Layers []struct{ Digest string } }
	require.NoError(t, json.Unmarshal([]byte(get(t, o.URL, "/v2/org/app/manifests/v1", "").body), &m))
	d := m.Layers[0].Digest
	centre := startSupernodeFor(t, registries(o), t.TempDir(), "", func(c *supernode.Config) { c.TLS, c.CA = "", dir })
	log := zaptest.NewLogger(t)
	for i := range 2 {
		bases := []string{centre.url()}
		id, err := identity.ForHost("", file, filepath.Join(t.TempDir(), "identity"), bases, log)
		require.NoError(t, err)
		var from dfget.Stats
		get := dfget.Download{
			URL: o.URL + "/v2/org/app/blobs/" + d, Digest: d, Output: filepath.Join(t.TempDir(), "out"), DataDir: t.TempDir(), Log: log,
			Peer:     dfget.PeerConfig{Supernodes: bases, Advertise: "127.0.0.1", Identity: id},
			Progress: func(_, _ int64, s dfget.Stats) { from = s },
		}
		require.NoError(t, get.Run(t.Context()))
		require.Zero(t, from.Origin, i)
		require.Positive(t, from.Supernode, i)
	}
}
