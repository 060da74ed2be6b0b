// Package supernode is a region's centre: it fetches each content from its
// origin once, tells the hosts who gets which piece from whom, and is a
// pull-through mirror of registries.
package supernode

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// Config is what a supernode may be told.
type Config struct {
	// Listen is the address of the one listener, host:port.
	Listen string
	// Advertise is the name or address under which hosts reach it, for people
	// who look at the region's hosts; "" is that of Listen.
	Advertise string
	// DataDir is the directory for all that outlives a restart.
	DataDir string
	// Quota is the most bytes of content kept, 0 for no bound. A blob that does
	// not fit goes to its hosts straight from the registry.
	Quota int64
	// KeepFree is how much of the file system the store leaves free, at most half of
	// it, and ScrubRate how many bytes a second of it are looked at for rot, 0 for none.
	KeepFree, ScrubRate int64
	// Zone and Rack say where it stands; hosts near by are preferred.
	Zone, Rack string
	// CrossOnce has each piece come into a zone once, and spread from host to
	// host there. For links between zones that are thin or paid for.
	CrossOnce bool
	// UpLanes is how many transfers share its upload bandwidth. More serve more
	// hosts at a time, each more slowly; few spread fresh pieces sooner.
	UpLanes int
	// MaxHosts bounds the sessions, and with them memory.
	MaxHosts int
	// Tokens is the file of those who may use the HTTP API, "" for programs of this
	// machine, which may look. ProtectMetrics has /metrics ask for a token, too.
	Tokens         string
	ProtectMetrics bool
	// AddressConnections bounds the connections from one address, 0 for no bound, and
	// as many sessions. Raise it where many hosts come from behind one.
	AddressConnections int
	// Registries says how registries are reached.
	Registries registryproxy.Config
	// TLS is a directory with tls.crt, tls.key and ca.crt, or CA one that `supernode
	// ca` has made; with either, hosts show certificates of the region. With neither
	// nothing private goes to them, unless ClearPrivate says that the network itself
	// is encrypted.
	TLS, CA      string
	ClearPrivate bool
	// DrainTimeout is how long running downloads may take once the supernode is to
	// end; with 0 they break off.
	DrainTimeout time.Duration
	// TagFreshness is how long the registry is not asked again what a tag or a
	// URL stands for. Raising it saves requests and shows changes later.
	TagFreshness time.Duration
	// StaleFor is how long after its last check a tag is still answered for
	// while its registry cannot be reached.
	StaleFor time.Duration
	// Now is the clock by which rights and tickets end; nil is time.Now.
	Now func() time.Time
}

// Default returns the configuration of a supernode that is told nothing.
func Default() Config {
	return Config{
		Listen:       "0.0.0.0:8002",
		DataDir:      "/var/lib/damselfly/supernode",
		UpLanes:      3,
		Registries:   registryproxy.Config{Default: "docker.io"},
		MaxHosts:     20000,
		TagFreshness: 5 * time.Second,
		KeepFree:     5 << 30,
		ScrubRate:    16 << 20,
		StaleFor:     24 * time.Hour,
		DrainTimeout: 25 * time.Second,

		AddressConnections: 2048,
	}
}

// Validate tells what is wrong with c.
func (c Config) Validate() error {
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("listen address %q: want host:port", c.Listen)
	}
	if strings.ContainsAny(c.Advertise, "/ @?#") {
		return fmt.Errorf("advertised address %q: want a host name or an IP address", c.Advertise)
	}
	switch {
	case c.DataDir == "":
		return errors.New("no data directory is given")
	case c.Quota < 0:
		return fmt.Errorf("quota %d is negative", c.Quota)
	case c.UpLanes < 1 || c.UpLanes > api.MaxLanes:
		return fmt.Errorf("%d upload lanes: want 1 to %d", c.UpLanes, api.MaxLanes)
	case c.ProtectMetrics && c.Tokens == "":
		return errors.New("protect-metrics needs tokens: name their file")
	case c.AddressConnections < 0:
		return fmt.Errorf("at most %d connections from an address: want 0 or more", c.AddressConnections)
	case c.MaxHosts < 1:
		return fmt.Errorf("at most %d hosts: want 1 or more", c.MaxHosts)
	case c.KeepFree < 0 || c.ScrubRate < 0:
		return fmt.Errorf("keep-free %d, scrub-rate %d: want 0 or more", c.KeepFree, c.ScrubRate)
	case c.TLS != "" && c.CA != "":
		return errors.New("tls and ca exclude each other: a directory with a certificate of your own authority, or one of supernode ca")
	case c.TagFreshness < 0 || c.StaleFor < 0 || c.DrainTimeout < 0:
		return errors.New("tag freshness, stale time and drain timeout cannot be negative")
	}
	return c.Registries.Validate()
}
