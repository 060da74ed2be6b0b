package registryproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"

	"damselfly.dev/address"
)

// ReachError says that something is not asked on behalf of others.
type ReachError struct{ why string }

// Error says what is not asked, and what would allow it.
func (e *ReachError) Error() string { return e.why }

// Networks are such as 10.0.0.0/8, or single addresses.
type Networks []string

// PrivateNetworks are those that are not reached from the Internet.
func PrivateNetworks() Networks {
	return Networks{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"}
}

func (n Networks) parse() ([]netip.Prefix, error) {
	var all []netip.Prefix
	for _, s := range n {
		p, err := netip.ParsePrefix(s)
		if a, one := netip.ParseAddr(s); one == nil {
			p, err = a.Prefix(a.BitLen())
		}
		if err != nil || p.Addr().Is4In6() || p.Addr().Zone() != "" {
			return nil, fmt.Errorf("%.100q: want a network such as 10.0.0.0/8 or fd00::/8, or an address", s)
		}
		all = append(all, p)
	}
	return all, nil
}

// must parses what is known to be right.
func (n Networks) must() []netip.Prefix {
	all, err := n.parse()
	if err != nil {
		panic(err)
	}
	return all
}

var (
	private = PrivateNetworks().must()
	// reserved is what else nobody on the Internet has.
	reserved = Networks{"0.0.0.0/8", "192.0.0.0/24", "198.18.0.0/15", "240.0.0.0/4", "::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "fec0::/10"}.must()
)

// reach says what may be connected to on behalf of others, by the names that they
// give and by the addresses that these have at the time of connecting, so that
// no name can change what it means in between. The hosts of the configuration
// are reached wherever they are.
type reach struct {
	allow      Hosts // empty for all
	addresses  []netip.Prefix
	configured map[string]bool            // host:port of registries and mirrors
	proxies    map[string]bool            // host:port of the environment's proxies
	own        func() ([]net.Addr, error) // this machine's addresses
	env        func(*http.Request) (*url.URL, error)
}

func newReach(cfg Config) *reach {
	addresses, _ := cfg.AllowAddresses.parse() // Validate has seen them
	r := &reach{allow: cfg.Allow, addresses: addresses, configured: map[string]bool{}, proxies: map[string]bool{}, own: net.InterfaceAddrs, env: environment}
	for _, u := range cfg.Upstreams {
		name, _ := canonicalRegistry(u.Name) // Validate has seen it
		all := []Mirror{{URL: u.URL}}
		if u.URL == "" {
			all[0].URL = "https://" + registryHost(name)
		}
		for _, m := range append(all, u.Mirrors...) {
			if base, err := parseBase(m.URL); err == nil {
				r.configured[dialed(base)] = true
			}
		}
	}
	for _, scheme := range []string{"http", "https"} {
		if p, err := r.env(&http.Request{URL: &url.URL{Scheme: scheme, Host: "registry.invalid"}}); err == nil && p != nil {
			r.proxies[dialed(p)] = true
		}
	}
	return r
}

// environment is the proxy that the environment names for a request.
func environment(q *http.Request) (*url.URL, error) {
	u, err := http.ProxyFromEnvironment(q)
	if err != nil { // it would quote the proxy's password
		return nil, errors.New("the proxy that the environment names is not a URL")
	}
	return u, nil
}

// dialed is host:port of a URL as it is connected to.
func dialed(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[u.Scheme]
	}
	return strings.ToLower(net.JoinHostPort(u.Hostname(), port))
}

// name tells whether a host that the configuration does not name may be asked,
// and with near, whether also in private networks.
func (r *reach) name(hosts ...string) (near bool, err error) {
	all := len(r.allow) == 0
	for _, pattern := range r.allow {
		for _, host := range hosts {
			switch {
			case pattern == "*":
				all = true
			case Hosts{pattern}.Has(host):
				return true, nil
			}
		}
	}
	if all {
		return false, nil
	}
	return false, &ReachError{fmt.Sprintf("%.100q is none of the hosts that are asked here: --allow lists them, --registry and registries name more", hosts[0])}
}

// judge returns why an address is not connected to, nil where it is.
func (r *reach) judge(a netip.Addr, near bool) error {
	a = address.Plain(a)
	secret, own := address.IsSecret(a), r.isOwn(a)
	for _, p := range r.addresses {
		if p.Contains(a) && (p.IsSingleIP() || !secret && !own) {
			return nil
		}
	}
	what := ""
	switch {
	case secret:
		what = "is where a cloud tells a machine its secrets"
	case a.IsLoopback(), own:
		what = "is this machine"
	case a.IsLinkLocalUnicast():
		what = "is link-local"
	case a.IsMulticast(), in(reserved, a):
		what = "is no host's"
	case in(private, a) && !near:
		what = "is in a private network"
	default:
		return nil
	}
	return &ReachError{fmt.Sprintf("%s %s, which is not asked for others: name the registry with --registry, or allow %s with --allow-address",
		a, what, netip.PrefixFrom(a, a.BitLen()))}
}

func in(all []netip.Prefix, a netip.Addr) bool {
	for _, p := range all {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// isOwn tells whether a is one of this machine's addresses beside loopback.
func (r *reach) isOwn(a netip.Addr) bool {
	if a.IsLoopback() {
		return false
	}
	all, _ := r.own() // without any nothing is known of them
	for _, o := range all {
		if p, err := netip.ParsePrefix(o.String()); err == nil && address.Plain(p.Addr()) == a {
			return true
		}
	}
	return false
}

// dial connects where it may.
func (r *reach) dial(near bool, timeout time.Duration) func(ctx context.Context, network, addr string) (net.Conn, error) {
	free := &net.Dialer{Timeout: timeout}
	guarded := &net.Dialer{Timeout: timeout, ControlContext: func(_ context.Context, _, addr string, _ syscall.RawConn) error {
		a, err := netip.ParseAddrPort(addr)
		if err != nil {
			return err
		}
		return r.judge(a.Addr(), near)
	}}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if key := strings.ToLower(addr); r.proxies[key] || near && r.configured[key] {
			return free.DialContext(ctx, network, addr)
		}
		return guarded.DialContext(ctx, network, addr)
	}
}

// proxy is the environment's, but for addresses that are not asked: a proxy would ask them.
// What names mean there, only the proxy knows.
func (r *reach) proxy(near bool) func(*http.Request) (*url.URL, error) {
	return func(q *http.Request) (*url.URL, error) {
		u, err := r.env(q)
		if u == nil || err != nil || near && r.configured[dialed(q.URL)] {
			return u, err
		}
		if a, err := netip.ParseAddr(q.URL.Hostname()); err == nil {
			if err := r.judge(a, near); err != nil {
				return nil, err
			}
		}
		return u, nil
	}
}

// refusing is a transport to what may not be asked.
type refusing struct{ err error }

// RoundTrip implements http.RoundTripper.
func (r refusing) RoundTrip(q *http.Request) (*http.Response, error) {
	if q.Body != nil {
		_ = q.Body.Close()
	}
	return nil, r.err
}

// Trust has the host that a base URL of the configuration names reached wherever it
// is, as registries are. It is for before the Client is used.
func (c *Client) Trust(base string) {
	if u, err := parseBase(base); err == nil {
		c.reach.configured[dialed(u)] = true
	}
}

// TransportTo returns what reaches a URL's host on behalf of others, with the
// authorities that are configured for the registry there; it shows no certificate.
// Where it leads on to is reached by the same.
func (c *Client) TransportTo(u *url.URL) http.RoundTripper {
	for _, up := range c.named {
		e := up.endpoints[len(up.endpoints)-1]
		if u.Scheme == e.base.Scheme && strings.EqualFold(u.Host, e.base.Host) {
			return e.others
		}
	}
	near, err := c.reach.name(u.Hostname())
	switch {
	case c.reach.configured[dialed(u)]:
		return c.near
	case err != nil:
		return refusing{err}
	case near:
		return c.near
	}
	return c.far
}

// Dial connects to host:port on behalf of others.
func (c *Client) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	near := c.reach.configured[strings.ToLower(addr)]
	if !near {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		if near, err = c.reach.name(host); err != nil {
			return nil, err
		}
	}
	return c.reach.dial(near, 0)(ctx, network, addr)
}
