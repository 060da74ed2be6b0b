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
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/dfdaemon"
	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode"
	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
	"damselfly.dev/test/certs"
)

// A hostile host of the region, or none of it, gets no private piece with what it
// can come by: no, an old, another task's or another host's ticket; and nobody who
// is not of the region gets as far. All the while a crowd pulls the same.
func TestTicketsAreTheirHosts(t *testing.T) {
	for kind, bearer := range map[string]bool{"a password": false, "a token": true} {
		t.Run(kind, func(t *testing.T) {
			d := startDebian(t, "127.0.0.1", bearer)
			img := d.pushImage(t, 2)
			var clock moved
			r := newSealed(t, d, &clock, 3)
			layers, err := img.Layers()
			require.NoError(t, err)
			var digests []string
			for _, l := range layers {
				h, err := l.Digest()
				require.NoError(t, err)
				digests = append(digests, h.String())
			}
			first, second, secret := digests[0], digests[1], d.login(t, user, "org/app", "pull")
			clock.to(-10 * time.Minute) // before anything else is remembered
			old := ticketOf(t, r.centre, r.ids[2], first, secret)
			clock.to(0)
			stop := d.crowd(t, r.hosts[:2])
			defer stop()
			for _, h := range r.hosts[:2] {
				require.Equal(t, http.StatusOK, (&engine{d: d, user: user, password: password}).pull(t, h, "org/app"))
			}

			mine := ticketOf(t, r.centre, r.ids[2], first, secret)
			another := ticketOf(t, r.centre, r.ids[1], first, secret)
			what, _, _ := strings.Cut(mine, ".")
			_, signature, _ := strings.Cut(old, ".")
			forged := what + "." + signature
			stranger := certsOf(t, authority(t), "damselfly://host/0123")
			for _, to := range []string{r.centre.address, r.hosts[0].peer, r.hosts[1].peer} {
				for name, c := range map[string]struct {
					by     *identity.Source
					ticket string
					want   int
				}{
					"its own":        {r.ids[2], mine, http.StatusPartialContent},
					"none":           {r.ids[2], "", http.StatusUnauthorized},
					"an old one":     {r.ids[2], old, http.StatusUnauthorized},
					"another host's": {r.ids[2], another, http.StatusUnauthorized},
					"another task's": {r.ids[2], ticketOf(t, r.centre, r.ids[2], second, secret), http.StatusUnauthorized},
					"forged":         {r.ids[2], forged, http.StatusUnauthorized},
				} {
					require.Eventually(t, func() bool { // all places may be taken
						got, err := piece(t, to, first, c.by, c.ticket)
						require.NoError(t, err, "%s at %s", name, to)
						if got != http.StatusServiceUnavailable {
							require.Equal(t, c.want, got, "%s at %s", name, to)
						}
						return got == c.want
					}, waitLimit, waitTick)
				}
				_, err := piece(t, to, first, stranger, mine)
				require.ErrorContains(t, err, "tls", "a stranger's certificate at %s", to)
				got, err := piece(t, to, first, nil, mine)
				if to == r.centre.address { // which also serves who has no certificate, at /v2/
					require.NoError(t, err)
					require.Equal(t, http.StatusUnauthorized, got)
				} else {
					require.ErrorContains(t, err, "certificate required")
				}
			}
			_, err = api.Dial(t.Context(), &http.Client{Transport: insecure(nil)}, r.centre.url())
			require.ErrorContains(t, err, "401", "a session")
			stop()
			total, unique := r.centre.value(t, "damselfly_origin_bytes_total", ""), r.centre.value(t, "damselfly_unique_bytes_total", "")
			require.InDelta(t, unique, total, 0, "the registry is asked once")
		})
	}
}

// moved is a clock that is ahead of the real one by so much.
type moved struct{ atomic.Int64 }

func (m *moved) now() time.Time { return time.Now().Add(time.Duration(m.Load())) }

func (m *moved) to(d time.Duration) { m.Store(int64(d)) }

// sealed is a region for a registry, over TLS, whose hosts came by a join token.
type sealed struct {
	centre *node
	hosts  []*node
	ids    []*identity.Source // the hosts' own
}

func newSealed(t *testing.T, d *debian, clock *moved, hosts int) *sealed {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	ca, err := identity.CreateCA(dir)
	require.NoError(t, err)
	token, err := ca.AddToken(0)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte(token.Text()), 0o600))
	cfg := registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: registryName, URL: d.url(), TLS: registryproxy.TLS{CA: d.cert}}}}
	r := &sealed{centre: startSupernodeFor(t, cfg, t.TempDir(), "", func(c *supernode.Config) { c.TLS, c.CA, c.Now = "", dir, clock.now })}
	for range hosts {
		var data string
		r.hosts = append(r.hosts, startHostFor(t, cfg, r.centre, nil, func(c *dfdaemon.Config) {
			c.TLS, c.JoinToken, data = "", file, c.DataDir
		}))
		id, err := identity.FromDir(filepath.Join(data, "identity"), zaptest.NewLogger(t))
		require.NoError(t, err)
		r.ids = append(r.ids, id)
	}
	return r
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
