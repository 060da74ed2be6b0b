//go:build linux

package programs

import (
	"context"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"damselfly.dev/test/lab"
)

// A Supernode is a supernode on a host.
type Supernode struct {
	*server
	bin       string
	upstreams map[string]string
	flags     []string
	base      string
}

// StartSupernode starts the supernode in bin for the registries named by
// upstreams, with more flags if there are any. Started again on the same host
// it finds what the one before left.
func StartSupernode(ctx context.Context, h *lab.Host, bin string, upstreams map[string]string, flags ...string) (*Supernode, error) {
	flags, err := withTLS(ctx, bin, "supernode", flags)
	if err != nil {
		return nil, err
	}
	args := []string{
		"--listen", netip.AddrPortFrom(h.IP(), apiPort).String(),
		"--advertise", h.IP().String(),
		"--data-dir", filepath.Join(h.Dir(), "supernode"),
	}
	args = slices.Concat(args, zone(h), registries(upstreams), flags)
	cmd := exec.Command(filepath.Join(bin, "supernode"), args...) //nolint:gosec // G204: built by Build
	n := &Supernode{bin: bin, upstreams: upstreams, flags: flags, base: url(h.IP(), apiPort, "")}
	if isSecure(flags) && !slices.Contains(flags, "--clear-private") {
		n.base = strings.Replace(n.base, "http:", "https:", 1)
	}
	if n.server, err = serve(ctx, h, "supernode", cmd, n.base+"/healthz", n.base+"/metrics"); err != nil {
		return nil, err
	}
	return n, nil
}

// URL is where the supernode answers.
func (s *Supernode) URL() string { return s.base }

// Restart starts the supernode again after its process has ended.
func (s *Supernode) Restart(ctx context.Context) error {
	next, err := StartSupernode(ctx, s.Host, s.bin, s.upstreams, s.flags...)
	if err == nil {
		*s = *next
	}
	return err
}

// Hosts is how many hosts have a session.
func (s *Supernode) Hosts(ctx context.Context) (int64, error) {
	return s.value(ctx, "damselfly_hosts")
}

// Sent is the supernode's own count of the bytes it has sent to hosts.
func (s *Supernode) Sent(ctx context.Context) (int64, error) {
	return s.value(ctx, "damselfly_sent_bytes_total")
}

// Crossed is the supernode's own count of the bytes that have come into zones.
func (s *Supernode) Crossed(ctx context.Context) (int64, error) {
	return s.value(ctx, "damselfly_zone_crossing_bytes_total")
}

// Origin is the supernode's own count: the bytes it had from registries, and
// how many of them were different ones.
func (s *Supernode) Origin(ctx context.Context) (total, unique int64, err error) {
	if total, err = s.value(ctx, "damselfly_origin_bytes_total"); err != nil {
		return 0, 0, err
	}
	unique, err = s.value(ctx, "damselfly_unique_bytes_total")
	return total, unique, err
}

// A Daemon is a dfdaemon on a host.
type Daemon struct {
	*server
	bin       string
	supernode string
	upstreams map[string]string
	flags     []string
}

// StartDaemon starts the dfdaemon in bin, with more flags if there are any;
// supernode is a URL. Started again on the same host it finds what the one
// before left.
func StartDaemon(ctx context.Context, h *lab.Host, bin, supernode string, upstreams map[string]string, flags ...string) (*Daemon, error) {
	flags, err := withTLS(ctx, bin, "dfdaemon", flags)
	if err != nil {
		return nil, err
	}
	args := []string{
		"--supernode", supernode,
		"--advertise", h.IP().String(),
		"--data-dir", filepath.Join(h.Dir(), "dfdaemon"),
		"--mirror-listen", netip.AddrPortFrom(h.Local(), mirrorPort).String(),
		"--peer-listen", netip.AddrPortFrom(h.IP(), PeerPort).String(),
		"--metrics-listen", netip.AddrPortFrom(h.Local(), MetricsPort).String(),
		"--socket", filepath.Join(h.Dir(), "dfdaemon.sock"),
	}
	args = slices.Concat(args, zone(h), registries(upstreams), flags)
	cmd := exec.Command(filepath.Join(bin, "dfdaemon"), args...) //nolint:gosec // G204: built by Build
	s, err := serve(ctx, h, "dfdaemon", cmd, url(h.Local(), MetricsPort, "/healthz"), url(h.Local(), MetricsPort, "/metrics"))
	if err != nil {
		return nil, err
	}
	return &Daemon{server: s, bin: bin, supernode: supernode, upstreams: upstreams, flags: flags}, nil
}

// Restart starts the daemon again after its process has ended.
func (d *Daemon) Restart(ctx context.Context) error {
	next, err := StartDaemon(ctx, d.Host, d.bin, d.supernode, d.upstreams, d.flags...)
	if err == nil {
		*d = *next
	}
	return err
}

// Dead says whether the daemon's process has ended.
func (d *Daemon) Dead() bool {
	select {
	case <-d.Process.Done():
		return true
	default:
		return false
	}
}

// Mirror is where engines on the host find the daemon.
func (d *Daemon) Mirror() string { return url(d.Host.Local(), mirrorPort, "") }

// Received is the daemon's own count of bytes by where they came from: peer,
// supernode, origin, and store for what was served without a transfer.
func (d *Daemon) Received(ctx context.Context) (map[string]int64, error) {
	return d.values(ctx, "damselfly_received_bytes_total", "source")
}

// Requests is the daemon's own count of engines' requests by kind, such as blob.
func (d *Daemon) Requests(ctx context.Context) (map[string]int64, error) {
	return d.values(ctx, "damselfly_mirror_requests_total", "kind")
}

// Direct is the daemon's own count of requests, other than for blobs, that went
// past the region.
func (d *Daemon) Direct(ctx context.Context) (int64, error) {
	return d.value(ctx, "damselfly_mirror_direct_total")
}

func registries(upstreams map[string]string) []string {
	var args []string
	for name, at := range upstreams {
		args = append(args, "--registry", name+"="+at)
	}
	return args
}

func zone(h *lab.Host) []string {
	if h.Zone() == "" {
		return nil
	}
	return []string{"--zone", h.Zone()}
}
