package dfdaemon

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// Config is what an agent may be told.
type Config struct {
	// Supernodes are the base URLs of the region's supernodes, tried in turn.
	// With none, or while none answers, all comes from the registries.
	Supernodes []string
	// Advertise is where other hosts reach this one's peer listener: a host, or
	// host:port where the port they see is another. With "" it is the address that
	// the supernode sees.
	Advertise string
	// DataDir is where content is kept; one process at a time uses it.
	DataDir string

	// Where the agent listens, as host:port. Without PeerListen it takes pieces
	// and gives none; without MetricsListen nobody can look.
	MirrorListen, PeerListen, MetricsListen string
	// MirrorHosts are names by which the mirror may be asked beside addresses, names
	// without a dot, the machine's own and that of MirrorListen: a web page can have a
	// name of its own lead here.
	MirrorHosts []string
	// Socket is the path of the control socket, "" for none. Beside root and the
	// agent's own user those of SocketGroup may use it, or SocketUsers, if set.
	Socket, SocketGroup string
	SocketUsers         []string

	// TLS is a directory with tls.crt, tls.key and ca.crt, or JoinToken a file with
	// what supernode ca has printed; with either, all goes over TLS between the hosts
	// of the region, http:// in Supernodes too. With neither nothing private goes
	// that way, unless ClearPrivate says that the network itself is encrypted.
	TLS, JoinToken string
	ClearPrivate   bool

	// DrainTimeout is how long running answers may take once the agent is to end.
	DrainTimeout time.Duration

	// Quota is the most bytes of content kept, 0 for no bound. More means fewer
	// pulls of the same content; it should hold a few images at the least.
	Quota int64
	// KeepFree is how much of the file system the store leaves free, at most half of
	// it. More is kinder to what else is on the disk.
	KeepFree int64
	// ScrubRate is how many bytes a second of the store are looked at for rot, 0 for
	// none. More finds it sooner.
	ScrubRate int64
	// Zone and Rack are where the host is; pieces come from near rather than far.
	Zone, Rack string
	// UpLanes and DownLanes are how many transfers run at once each way. Equal
	// numbers on all hosts use the network best; more of them suit long round
	// trips, fewer suit small hosts.
	UpLanes, DownLanes int

	// RangeBackground says when the rest of a content is got after the first bounded
	// range of it was asked for: "off" for never, "first" for at once, else how long
	// after. The rest costs network and disk, and makes later ranges quick.
	RangeBackground string

	// Proxy is the forward proxy for the host's programs.
	Proxy ProxyConfig

	// URLs are contents that are asked for by their whole URL at the mirror's
	// address; they are at the ports that the proxy may reach.
	URLs URLConfig

	// Registries are those that engines pull from.
	Registries registryproxy.Config
}

// Default returns the settings of an agent that is told nothing.
func Default() Config {
	return Config{
		DataDir:       "/var/lib/damselfly/dfdaemon",
		MirrorListen:  "127.0.0.1:65001",
		PeerListen:    "0.0.0.0:65002",
		MetricsListen: "127.0.0.1:65003",
		Socket:        "/run/damselfly/dfdaemon.sock",
		Quota:         20 << 30,
		KeepFree:      5 << 30,
		ScrubRate:     4 << 20,
		DrainTimeout:  25 * time.Second,
		UpLanes:       3,
		DownLanes:     3,

		RangeBackground: backgroundOff,
		Proxy:           ProxyConfig{Rules: registryproxy.DefaultRules(), Ports: []int{80, 443}},
		URLs:            URLConfig{Prefix: "/p2p/", Ignore: signatures},
		Registries:      registryproxy.Config{Default: "docker.io", AllowAddresses: registryproxy.PrivateNetworks()},
	}
}

// Validate tells what is wrong with c.
func (c Config) Validate() error {
	for i, s := range c.Supernodes {
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || // never quoted: somebody may
			u.User != nil || u.RawQuery != "" || u.Fragment != "" || (u.Path != "" && u.Path != "/") { // put a password there
			return fmt.Errorf("supernode number %d: want a URL like http://10.0.0.1:8002, without path or credentials", i+1)
		}
	}
	if _, err := c.advertised(""); err != nil {
		return err
	}
	if c.DataDir == "" {
		return errors.New("data-dir is empty: name a directory for the content")
	}
	if c.MirrorListen == "" {
		return errors.New("mirror-listen is empty: engines need an address, such as 127.0.0.1:65001")
	}
	for name, addr := range map[string]string{
		mirrorListen: c.MirrorListen, peerListen: c.PeerListen, metricsListen: c.MetricsListen,
	} {
		if _, _, err := net.SplitHostPort(addr); err != nil && addr != "" {
			return fmt.Errorf("%s %q: want host:port", name, addr)
		}
	}
	switch {
	case c.TLS != "" && c.JoinToken != "":
		return errors.New("tls and join-token exclude each other: a certificate of your own authority, or one that the supernode gives")
	case c.JoinToken != "" && len(c.Supernodes) == 0:
		return errors.New("join-token: name the supernode that gives the certificate")
	case c.Quota < 0:
		return fmt.Errorf("quota %d is negative", c.Quota)
	case c.DrainTimeout < 0:
		return fmt.Errorf("drain-timeout %v: want 0 or more", c.DrainTimeout)
	case c.KeepFree < 0 || c.ScrubRate < 0:
		return fmt.Errorf("keep-free %d, scrub-rate %d: want 0 or more", c.KeepFree, c.ScrubRate)
	case c.UpLanes < 1 || c.UpLanes > api.MaxLanes || c.DownLanes < 1 || c.DownLanes > api.MaxLanes:
		return fmt.Errorf("up-lanes %d, down-lanes %d: want 1 to %d", c.UpLanes, c.DownLanes, api.MaxLanes)
	case runtime.GOOS != "linux" && len(c.SocketUsers) > 0:
		return errors.New("socket-users: only Linux tells them apart, use socket-group")
	case c.SocketGroup != "" && len(c.SocketUsers) > 0:
		return errors.New("socket-group and socket-users: name either")
	case len(c.Zone) > 64 || len(c.Rack) > 64:
		return errors.New("zone and rack: want at most 64 bytes")
	}
	if _, err := c.background(); err != nil {
		return err
	}
	if err := c.Proxy.validate(); err != nil {
		return err
	}
	if err := c.URLs.validate(); err != nil {
		return err
	}
	return c.Registries.Validate()
}

// forThisHost has h answer what names this host. Else a web page whose name leads
// here could read what programs of this host can.
func (c Config) forThisHost(h http.Handler) http.Handler {
	names := []string{}
	if own, err := os.Hostname(); err == nil {
		names = append(names, strings.ToLower(own))
	}
	if host, _, err := net.SplitHostPort(c.MirrorListen); err == nil {
		names = append(names, strings.ToLower(host))
	}
	for _, name := range c.MirrorHosts {
		names = append(names, strings.ToLower(name))
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !api.NamesThisHost(r, names...) {
			registryproxy.WriteError(w, &registryproxy.Error{
				Status: http.StatusForbidden, Code: "DENIED",
				Message: "the mirror is not asked by this name: ask it by its address, or start dfdaemon with --mirror-hosts",
			})
			return
		}
		h.ServeHTTP(w, r)
	})
}

const (
	backgroundOff   = "off"
	backgroundFirst = "first"
)

// background is RangeBackground as the peer takes it.
func (c Config) background() (time.Duration, error) {
	switch c.RangeBackground {
	case backgroundOff:
		return -1, nil
	case backgroundFirst:
		return 0, nil
	}
	d, err := time.ParseDuration(c.RangeBackground)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("range-background %q: want off, first, or a duration such as 10m", c.RangeBackground)
	}
	return d, nil
}

// advertised returns host:port of the peer listener, at listen, for others.
func (c Config) advertised(listen string) (string, error) {
	_, port, _ := net.SplitHostPort(listen)
	if c.Advertise == "" {
		return ":" + port, nil
	}
	if addr, err := netip.ParseAddr(c.Advertise); err == nil && addr.Zone() == "" {
		return net.JoinHostPort(addr.String(), port), nil
	}
	host := c.Advertise
	if h, own, err := net.SplitHostPort(c.Advertise); err == nil {
		if n, err := strconv.ParseUint(own, 10, 16); err != nil || n == 0 {
			return "", fmt.Errorf("advertise %q: want a host, or host:port", c.Advertise)
		}
		host, port = h, own
	}
	if u, err := url.Parse("//" + net.JoinHostPort(host, "1")); err != nil || host == "" || u.Hostname() != host || strings.Contains(host, "%") {
		return "", fmt.Errorf("advertise %q: want a host, or host:port", c.Advertise)
	}
	return net.JoinHostPort(host, port), nil
}
