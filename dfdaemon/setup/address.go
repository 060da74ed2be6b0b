package setup

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

const etcHosts = "/etc/hosts"

// named gives the mirror a name of the host's own where its address is IPv6:
// containerd 1 reads no hosts.toml with a bracket in a host, and podman and CRI-O
// refuse each pull with such a mirror.
func (t *tree) named(c Config) (Config, error) {
	host, port, _ := net.SplitHostPort(c.Mirror)
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Is4() {
		return c, nil
	}
	f, err := t.open(etcHosts)
	if err != nil {
		return c, err
	}
	name := nameOf(f.now, addr)
	if name == "" {
		return c, fmt.Errorf("the engine takes no IPv6 address for its mirror, and %s has no name for %s: give it one there, or name the mirror with --mirror NAME:%s", f.path, addr, port)
	}
	c.Mirror = net.JoinHostPort(name, port)
	return c, nil
}

// nameOf returns the name of an address in a hosts file, one that is no other's if
// there is one, "" for none.
func nameOf(hosts []byte, addr netip.Addr) (best string) {
	others := map[string]bool{}
	var names []string
	for line := range bytes.Lines(hosts) {
		text, _, _ := strings.Cut(string(line), "#")
		fields := strings.Fields(text)
		if len(fields) < 2 {
			continue
		}
		a, err := netip.ParseAddr(fields[0])
		for _, name := range fields[1:] {
			switch {
			case err == nil && a == addr && registryForm.MatchString(name) && !strings.Contains(name, ":"):
				names = append(names, name)
			default:
				others[name] = true
			}
		}
	}
	for _, name := range names {
		if best == "" || others[best] && !others[name] {
			best = name
		}
	}
	return best
}
