//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"damselfly.dev/test/image"
	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// app is the image that all pull.
const app = "demo/app:v1"

// A stage is a region that is ready to pull.
type stage struct {
	cfg       config
	out       *report
	lab       *lab.Lab
	bin       string
	registry  *programs.Registry
	supernode *programs.Supernode
	members   []*member
	contents  []v1.Descriptor
	size      int64 // of all contents, in bytes
}

// A member is a host that pulls.
type member struct {
	host   *lab.Host
	daemon *programs.Daemon
	engine engine // the one that has pulled through the daemon
}

// An engine fetches images into a store of its own.
type engine interface {
	Fetch(ctx context.Context, name string) error
	Verify(contents []v1.Descriptor) error
	Close() error
}

// setUp builds the programs, makes the image, and starts everything.
func setUp(ctx context.Context, cfg config, out *report) (_ *stage, err error) {
	cache, err := programs.Cache()
	if err != nil {
		return nil, err
	}
	s := &stage{cfg: cfg, out: out}
	hosts := []lab.HostConfig{s.hostConfig("registry"), s.hostConfig("supernode")}
	for i := range cfg.hosts {
		hosts = append(hosts, s.hostConfig(fmt.Sprintf("host%d", i+1)))
	}
	out.say("Building the hosts, when no other lab lives on this machine.")
	if s.lab, err = lab.New(ctx, lab.Config{Loopback: cfg.loopback, Hosts: hosts, Dir: cfg.dir}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.lab.Close())
		}
	}()
	out.say("Building the programs, and an image of real files (a minute, the first time; kept in %s).", cache)
	s.bin = filepath.Join(s.lab.Dir(), "bin")
	var img v1.Image
	making, makingCtx := errgroup.WithContext(ctx)
	making.Go(func() error { return programs.Build(makingCtx, s.bin) })
	making.Go(func() error {
		var err error
		img, err = cfg.make(makingCtx, cache)
		return err
	})
	if err := making.Wait(); err != nil {
		return nil, err
	}
	if s.contents, err = image.Contents(img); err != nil {
		return nil, err
	}
	s.size = image.Size(s.contents)
	if err := s.start(ctx, img, hosts[2:]); err != nil {
		return nil, err
	}
	links := fmt.Sprintf("every link with %v", cfg.rate)
	if cfg.loopback {
		links = "links unshaped"
	}
	out.say("%d hosts, a registry and a supernode are up, %s; the image has %s in %d layers.",
		cfg.hosts, links, megabytes(s.size), len(s.contents)-2)
	return s, nil
}

// hostConfig is a host on a link like all others.
func (s *stage) hostConfig(name string) lab.HostConfig {
	return lab.HostConfig{Name: name, Up: s.cfg.rate, Down: s.cfg.rate}
}

func (s *stage) start(ctx context.Context, img v1.Image, hosts []lab.HostConfig) (err error) {
	if s.registry, err = programs.StartRegistry(ctx, s.lab.Host("registry"), s.bin); err != nil {
		return err
	}
	if err := s.registry.Push(ctx, img, app); err != nil {
		return err
	}
	s.supernode, err = programs.StartSupernode(ctx, s.lab.Host("supernode"), s.bin, s.upstreams())
	if err != nil {
		return err
	}
	for _, h := range hosts {
		if err := s.join(ctx, s.lab.Host(h.Name)); err != nil {
			return err
		}
	}
	return nil
}

func (s *stage) upstreams() map[string]string {
	return map[string]string{programs.RegistryName: s.registry.URL()}
}

// join makes a host a member of the region.
func (s *stage) join(ctx context.Context, h *lab.Host) error {
	daemon, err := programs.StartDaemon(ctx, h, s.bin, s.supernode.URL(), s.upstreams())
	if err != nil {
		return err
	}
	s.members = append(s.members, &member{host: h, daemon: daemon})
	return nil
}

// newEngine starts an engine with an empty store; an empty mirror means none.
func (s *stage) newEngine(ctx context.Context, h *lab.Host, mirror string) (engine, error) {
	if s.cfg.loopback {
		return programs.StartLibrary(h, mirror, s.registry.URL())
	}
	e, err := programs.DebianContainerd().Start(ctx, h, mirror, s.registry.URL())
	if err == nil && s.cfg.unpack {
		return unpacking{e}, nil
	}
	return e, err
}

// unpacking is a containerd whose fetches end when the image is unpacked.
type unpacking struct{ *programs.ContainerdEngine }

func (u unpacking) Fetch(ctx context.Context, name string) error { return u.Pull(ctx, name) }

// addresses tells how to look around in what is left running.
func (s *stage) addresses() {
	s.out.say("Left running, until Ctrl-C:")
	s.out.say("  registry   %s  log %s", s.registry.URL(), s.registry.Process.Log())
	s.out.say("  supernode  %s  log %s", s.supernode.URL(), s.supernode.Process.Log())
	for _, m := range s.members {
		s.out.say("  %-9s  %s  mirror %s  log %s", m.host.Name(), m.host.IP(), m.daemon.Mirror(), m.daemon.Process.Log())
	}
	if s.cfg.loopback {
		return
	}
	first := s.members[0]
	s.out.say("A shell on a host:  %s sh", first.host.Enter())
	if e, ok := first.engine.(interface{ Command(image string) string }); ok {
		s.out.say("A pull on it:       %s %s", first.host.Enter(), e.Command(app))
	}
}

// cpu is the processor time used so far by the lab's hosts, as far as it is counted.
func (s *stage) cpu() time.Duration {
	var sum time.Duration
	hosts := []*lab.Host{s.registry.Host, s.supernode.Host}
	for _, m := range s.members {
		hosts = append(hosts, m.host)
	}
	for _, h := range hosts {
		used, _ := h.CPU()
		sum += used
	}
	return sum
}

// crossed is what the members' links have received so far; nothing on loopback.
func (s *stage) crossed() int64 {
	var sum int64
	for _, m := range s.members {
		if c, err := m.host.Counters(); err == nil {
			sum += c.Received
		}
	}
	return sum
}

// fromRegistry adds up the registry's own log: the content bytes that each
// member's host, and all others together, have had from it.
func (s *stage) fromRegistry() (byMember map[*member]int64, others int64, err error) {
	requests, err := s.registry.Requests()
	if err != nil {
		return nil, 0, err
	}
	byMember = map[*member]int64{}
	for _, q := range requests {
		if !q.Content() {
			continue
		}
		at := slices.IndexFunc(s.members, func(m *member) bool { return m.host.IP() == q.Client })
		if at < 0 {
			others += q.Bytes
			continue
		}
		byMember[s.members[at]] += q.Bytes
	}
	return byMember, others, nil
}

// busy says how many of the machine's processors work over a time has used.
func busy(work, over time.Duration) string {
	if work == 0 {
		return "not counted"
	}
	return fmt.Sprintf("%.1f of %d", work.Seconds()/over.Seconds(), runtime.NumCPU())
}
