//go:build linux

// Package lab makes hosts out of network namespaces and joins them by shaped links.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// prefix begins the name of everything a lab leaves in the kernel or on disk;
// the owner's pid follows.
const prefix = "damselfly-"

// usualDir is on disk, also where /tmp is not.
const usualDir = "/var/tmp"

// A Rate is in bits per second; zero means unshaped.
type Rate int64

// Mbit is 10^6 bits per second.
const Mbit Rate = 1_000_000

// String gives the rate as a person says it.
func (r Rate) String() string {
	if r == 0 {
		return "unshaped"
	}
	return strconv.FormatFloat(float64(r)/float64(Mbit), 'f', -1, 64) + " Mbit/s"
}

// Config says what a lab is made of.
type Config struct {
	// Dir is where the lab keeps the hosts' files; empty means /var/tmp.
	Dir string
	// MTU of all links, in bytes; zero means 9000, which halves the cost of a
	// byte. It must be at least 1280.
	MTU int
	// Loopback makes hosts of loopback addresses: no root, no namespaces, no
	// shaping, and links that cannot be cut.
	Loopback bool
	// IPv6 gives the hosts IPv6 addresses and none of IPv4, also on loopback.
	IPv6 bool
	// ZoneLink is the rate each way of the link between a zone and all that is
	// outside of it; zero means unshaped.
	ZoneLink Rate
	// Hosts are there from the start; AddHost adds more.
	Hosts []HostConfig
}

// HostConfig is one host and its link.
type HostConfig struct {
	// Name is of letters, digits and dashes, unique in its lab.
	Name string
	// Up and Down are the rates of the host's link.
	Up, Down Rate
	// Zone is where the host stands; hosts without one stand outside of all.
	Zone string
}

// A Lab is a set of hosts on one switch. One lab at a time lives on a machine:
// New waits for the one before.
type Lab struct {
	cfg   Config
	id    string // begins all names
	dir   string
	lock  net.Listener
	start chan func()

	mu     sync.Mutex // guards what follows
	hosts  []*Host
	zones  []string
	procs  []*Process
	closed bool
}

// Check returns why no lab with namespaces can be had here, or nil.
func Check() error {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root")
	}
	for _, tool := range []string{"ip", "tc"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("find iproute2: %w", err)
		}
	}
	return nil
}

// New waits for its turn, removes what killed labs left behind, and builds the
// hosts of cfg. Close takes all of it away again; a parent that is killed
// takes its processes along, and the next New removes the rest.
func New(ctx context.Context, cfg Config) (*Lab, error) {
	if cfg.Dir == "" {
		cfg.Dir = usualDir
	}
	if cfg.MTU == 0 {
		cfg.MTU = 9000
	}
	if cfg.IPv6 && cfg.Loopback {
		return nil, errors.New("hosts of loopback addresses are on IPv4")
	}
	if cfg.MTU < 1280 {
		return nil, fmt.Errorf("mtu %d is below 1280", cfg.MTU)
	}
	l := &Lab{cfg: cfg, id: prefix + strconv.Itoa(os.Getpid()), start: make(chan func())}
	if !cfg.Loopback {
		if err := Check(); err != nil {
			return nil, err
		}
	}
	var err error
	if l.lock, err = acquire(ctx); err != nil {
		return nil, err
	}
	go l.spawn()
	if err := l.build(ctx); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Lab) build(ctx context.Context) error {
	if err := sweep(ctx, l.cfg.Dir, l.cfg.Loopback); err != nil {
		return fmt.Errorf("sweep what earlier labs left: %w", err)
	}
	var err error
	if l.dir, err = os.MkdirTemp(l.cfg.Dir, l.id+"-"); err != nil {
		return fmt.Errorf("make the lab's directory: %w", err)
	}
	if !l.cfg.Loopback {
		if err := l.makeSwitch(ctx); err != nil {
			return fmt.Errorf("make the switch: %w", err)
		}
	}
	for _, h := range l.cfg.Hosts {
		if _, err := l.AddHost(ctx, h); err != nil {
			return err
		}
	}
	return nil
}

// AddHost adds one more host to the switch.
func (l *Lab) AddHost(ctx context.Context, cfg HostConfig) (*Host, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	index := len(l.hosts) + 1
	h := &Host{lab: l, cfg: cfg, index: index, dir: filepath.Join(l.dir, cfg.Name)}
	for _, other := range l.hosts {
		if other.cfg.Name == cfg.Name {
			return nil, fmt.Errorf("add host %s: a host of that name is there", cfg.Name)
		}
	}
	if cfg.Name == "" || strings.Trim(cfg.Name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return nil, fmt.Errorf("add host %q: not a host name", cfg.Name)
	}
	if err := os.Mkdir(h.dir, 0o755); err != nil {
		return nil, fmt.Errorf("add host %s: %w", cfg.Name, err)
	}
	low, high := byte(index%250+1), byte(index/250) //nolint:gosec // G115: an index is below 2^16
	h.ip, h.local = netip.AddrFrom4([4]byte{10, 77, high, low}), netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if l.cfg.IPv6 {
		h.ip, h.local = netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x77, 14: high, 15: low}), netip.IPv6Loopback()
	}
	if l.cfg.Loopback {
		h.ip = netip.AddrFrom4([4]byte{127, 77, high, low})
		h.local = h.ip
	} else if err := h.plug(ctx); err != nil {
		return nil, fmt.Errorf("add host %s: %w", cfg.Name, err)
	}
	l.hosts = append(l.hosts, h)
	return h, nil
}

// Host returns the host of that name; it panics where there is none.
func (l *Lab) Host(name string) *Host {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.hosts {
		if h.cfg.Name == name {
			return h
		}
	}
	panic("lab: no host " + name)
}

// Dir is the lab's own directory, removed by Close.
func (l *Lab) Dir() string { return l.dir }

// Close kills all processes of the lab and removes its namespaces, control
// groups and files.
func (l *Lab) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	ctx := context.Background() // the cleaning is not given up
	for _, p := range l.procs {
		p.Kill()
	}
	var errs []error
	if !l.cfg.Loopback {
		errs = append(errs, removeNamespaces(ctx, l.id), removeGroups(l.id))
	}
	close(l.start)
	if l.dir != "" {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	return errors.Join(append(errs, l.lock.Close())...)
}
