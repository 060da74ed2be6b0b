package registryproxy

import (
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestAddresses(t *testing.T) {
	r := newReach(Config{AllowAddresses: []string{"10.1.0.0/16", "fd00::/8", "192.0.0.192", "169.254.7.0/24", "10.1.0.1"}})
	r.own = func() ([]net.Addr, error) {
		var all []net.Addr
		for _, s := range []string{"127.0.0.1/8", "203.0.113.5/24", "10.1.0.1/16", "10.1.0.2/16", "2001:db8::5/64"} {
			p := netip.MustParsePrefix(s)
			all = append(all, &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())})
		}
		return all, nil
	}
	for s, want := range map[string]string{
		"8.8.8.8": "", "2606:4700::1": "", "203.0.113.6": "", "64:ff9b::808:808": "",
		"10.1.2.3": "", "fd12::1": "", "192.0.0.192": "", "169.254.7.1": "", "10.1.0.1": "", "::ffff:10.1.2.3": "",
		"10.1.0.2": "this machine", "203.0.113.5": "this machine", "2001:db8::5": "this machine", "127.0.0.1": "this machine",
		"::1": "this machine", "::ffff:127.0.0.1": "this machine", "64:ff9b::7f00:1": "this machine", "2002:7f00:1::": "this machine",
		"::ffff:0:7f00:1": "no host's",
		"169.254.169.254": "secrets", "fd00:ec2::254": "secrets", "100.100.100.200": "secrets", "::ffff:a9fe:a9fe": "secrets",
		"169.254.8.1": "link-local", "fe80::1%eth0": "link-local",
		"224.0.0.1": "no host's", "ff02::1": "no host's", "255.255.255.255": "no host's", "0.0.0.0": "no host's", "::": "no host's",
		"0.1.2.3": "no host's", "::7f00:1": "no host's", "192.0.0.1": "no host's",
		"10.2.0.1": "private", "172.31.0.1": "private", "192.168.1.1": "private", "100.64.0.1": "private", "fc00::1": "private",
	} {
		err := r.judge(netip.MustParseAddr(s), false)
		near := r.judge(netip.MustParseAddr(s), true)
		if want == "" {
			require.NoError(t, err, s)
			require.NoError(t, near, s)
			continue
		}
		require.ErrorContains(t, err, want, s)
		if want == "private" {
			require.NoError(t, near, s)
		} else {
			require.ErrorContains(t, near, want, s)
		}
	}
}

func TestNames(t *testing.T) {
	for _, c := range []struct {
		allow     Hosts
		host      string
		near, bad bool
	}{
		{nil, "a.test", false, false},
		{Hosts{"*"}, "a.test", false, false},
		{Hosts{"*", "*.corp"}, "a.corp", true, false},
		{Hosts{"*", "*.corp"}, "corp", false, false},
		{Hosts{"*.corp", "b.test"}, "B.test", true, false},
		{Hosts{"*.corp"}, "a.test", false, true},
		{Hosts{"none"}, "a.test", false, true},
	} {
		near, err := newReach(Config{Allow: c.allow}).name(c.host)
		require.Equal(t, c.near, near, c)
		require.Equal(t, c.bad, err != nil, c)
	}
	for _, bad := range []Config{{Allow: Hosts{"a:5000"}}, {AllowAddresses: Networks{"10.0.0.0/33"}}, {AllowAddresses: Networks{"ten"}}, {AllowAddresses: Networks{""}}} {
		require.Error(t, bad.Validate(), bad)
	}
}

// What a registry that nobody configured is called decides nothing: it is its
// address that does, also when a redirect or a token's realm names it; and one
// that is configured is asked where it is, and leads where that is allowed.
func TestReach(t *testing.T) {
	n := 0
	inside := serveTo(t, func(w http.ResponseWriter, _ *http.Request) { n++; _, _ = w.Write([]byte("secret")) })
	to := ""
	s := serveTo(t, func(w http.ResponseWriter, _ *http.Request) {
		if to == "realm" {
			w.Header().Set("Www-Authenticate", `Bearer realm="`+inside+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Location", to)
		w.WriteHeader(http.StatusTemporaryRedirect)
	})
	ask := func(cfg Config, registry string) error {
		c := newTestClient(t, cfg)
		b, err := c.Blob(t.Context(), Repository{registry, "a"}, digestOf("secret"), 0, Caller{})
		if err == nil {
			require.NoError(t, b.Close())
		}
		return err
	}
	named := Config{Upstreams: []Upstream{{Name: "reg.test", URL: s}}}
	for _, to = range []string{inside + "/v2/a", "http://169.254.169.254/x", "http://localhost" + inside[len("http://127.0.0.1"):], "http://[fd00:ec2::254]/"} {
		err := ask(named, "reg.test")
		require.ErrorContains(t, err, "not asked for others", to)
		require.False(t, IsTemporary(err))
	}
	for _, to = range []string{"file:///etc/passwd", "gopher://a/"} {
		require.ErrorContains(t, ask(named, "reg.test"), "a redirect leads from http to ", to)
	}
	to = "realm"
	require.Equal(t, http.StatusUnauthorized, refusalOf(t, ask(named, "reg.test")).Status)
	require.Zero(t, n, "asked all the same")

	u, err := url.Parse(inside)
	require.NoError(t, err)
	require.ErrorContains(t, ask(Config{}, "127.0.0.1:"+u.Port()), "is this machine")
	require.ErrorContains(t, ask(Config{Allow: Hosts{"*.corp"}}, "quay.io"), "none of the hosts")
	_, err = newTestClient(t, Config{Allow: Hosts{"*.corp"}}).TransportTo(u).RoundTrip(&http.Request{URL: u, Body: http.NoBody}) //nolint:bodyclose // there is none
	require.ErrorContains(t, err, "none of the hosts")
	conn, err := newTestClient(t, Config{}).Dial(t.Context(), "tcp", u.Host)
	require.ErrorContains(t, err, "is this machine", conn)

	to = inside + "/v2/a"
	named.AllowAddresses = []string{"127.0.0.1"}
	require.NoError(t, ask(named, "reg.test"))
	require.Equal(t, 1, n)
	conn, err = newTestClient(t, named).Dial(t.Context(), "tcp", u.Host)
	require.NoError(t, err)
	require.NoError(t, conn.Close())
}

// With a proxy in the environment it is the proxy that is connected to; what is
// named by its address is looked at all the same.
func TestReachByProxy(t *testing.T) {
	asked := ""
	through := serveTo(t, func(_ http.ResponseWriter, r *http.Request) { asked = r.URL.String() })
	at, err := url.Parse(through)
	require.NoError(t, err)
	r := newReach(Config{})
	r.proxies[at.Host] = true
	r.env = func(*http.Request) (*url.URL, error) { return at, nil }
	c := &http.Client{Transport: newTransport(r, false, time.Second)}
	get := func(to string) error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, to, nil)
		require.NoError(t, err)
		resp, err := c.Do(req)
		if err == nil {
			require.NoError(t, resp.Body.Close())
		}
		return err
	}
	require.NoError(t, get("http://registry.test/v2/"))
	require.Equal(t, "http://registry.test/v2/", asked)
	require.ErrorContains(t, get("http://169.254.169.254/"), "secrets")
	require.ErrorContains(t, get("http://[::1]/"), "this machine")
	require.Equal(t, "http://registry.test/v2/", asked)
}

// serveTo answers with h, and returns the URL.
func serveTo(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}
