//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"damselfly.dev/test/image"
	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

const mebi = 1 << 20

// A region is a registry, a supernode and hosts with a dfdaemon each.
type region struct {
	cfg       config
	out       *report
	lab       *lab.Lab
	registry  *programs.Registry
	centre    sync.Mutex // held by who replaces the supernode
	supernode *programs.Supernode
	hosts     []*host
}

// A host is one that pulls. Whoever replaces its daemon holds mu.
type host struct {
	*lab.Host
	disk string // its data directory, as seen from outside; "" where it is on the machine's disk

	mu     sync.Mutex
	daemon *programs.Daemon
}

// shape is what a region is like.
type shape struct {
	hosts  int
	rate   lab.Rate // of every link but the registry's, which has as much as the hosts may need
	disk   int64    // bytes of each host's disk; 0 is the machine's own
	daemon []string // flags
}

// build starts all of it.
func (r *region) build(ctx context.Context, s shape) (err error) {
	hosts := []lab.HostConfig{{Name: "registry", Up: s.rate, Down: s.rate}, {Name: "supernode", Up: s.rate, Down: s.rate}}
	for i := range s.hosts {
		hosts = append(hosts, lab.HostConfig{Name: fmt.Sprintf("host%d", i+1), Up: s.rate, Down: s.rate})
	}
	if r.lab, err = lab.New(ctx, lab.Config{Hosts: hosts, Dir: r.cfg.dir}); err != nil {
		return err
	}
	if r.registry, err = programs.StartRegistry(ctx, r.lab.Host("registry"), r.cfg.bin); err != nil {
		return err
	}
	r.supernode, err = programs.StartSupernode(ctx, r.lab.Host("supernode"), r.cfg.bin, r.upstreams(), "--keep-free", "1GiB")
	if err != nil {
		return err
	}
	var group errgroup.Group
	r.hosts = make([]*host, s.hosts)
	for i := range r.hosts {
		group.Go(func() (err error) {
			h := &host{Host: r.lab.Host(fmt.Sprintf("host%d", i+1))}
			bin := r.cfg.bin
			if s.disk > 0 {
				if bin, err = h.mount(ctx, s.disk, bin); err != nil {
					return err
				}
			}
			h.daemon, err = programs.StartDaemon(ctx, h.Host, bin, r.supernode.URL(), r.upstreams(), s.daemon...)
			r.hosts[i] = h
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return r.await(ctx, "all sessions", 20*time.Second, func() bool { return r.sessions(ctx) == s.hosts })
}

func (r *region) upstreams() map[string]string {
	return map[string]string{programs.RegistryName: r.registry.URL()}
}

// sessions is how many hosts the supernode counts, -1 where it does not answer.
func (r *region) sessions(ctx context.Context) int {
	n, err := r.supernode.Hosts(ctx)
	if err != nil {
		return -1
	}
	return int(n)
}

// await looks until ok, as long as the limit allows.
func (r *region) await(ctx context.Context, what string, limit time.Duration, ok func() bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("waited in vain for %s", what))
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	return nil
}

// mount gives the host a disk of its own for its dfdaemon's data, which lives as long
// as the lab, and returns where a dfdaemon is that uses it.
func (h *host) mount(ctx context.Context, size int64, bin string) (string, error) {
	dir, own := filepath.Join(h.Dir(), "dfdaemon"), filepath.Join(h.Dir(), "bin")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(own, 0o755)); err != nil {
		return "", err
	}
	// A process of the lab has mounts of its own: this one keeps them.
	keeper, err := h.Start("disk", exec.Command("sh", "-c", `mount -t tmpfs -o size="$0",mode=700 disk "$1" && exec sleep infinity`, fmt.Sprint(size), dir)) //nolint:gosec // as above
	if err != nil {
		return "", err
	}
	h.disk = filepath.Join("/proc", fmt.Sprint(keeper.PID()), "root", dir)
	mounted := func() bool {
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", keeper.PID()))
		return err == nil && strings.Contains(string(mounts), dir+" tmpfs")
	}
	if err := (&region{}).await(ctx, "a disk", 10*time.Second, mounted); err != nil {
		return "", fmt.Errorf("%w: %s", err, keeper.LastWords())
	}
	script := fmt.Sprintf("#!/bin/sh\nexec nsenter -t %d -m -- %q \"$@\"\n", keeper.PID(), filepath.Join(bin, "dfdaemon"))
	return own, os.WriteFile(filepath.Join(own, "dfdaemon"), []byte(script), 0o755) //nolint:gosec // G306: a program
}

// A picture is an image at the registry.
type picture struct {
	name     string // such as "demo/app1:v1"
	contents []v1.Descriptor
}

func (p picture) size() int64 { return image.Size(p.contents) }

// push makes an image of layers of noise, and puts it into the registry.
func (r *region) push(ctx context.Context, name string, layers ...int) (picture, error) {
	img, err := image.Noise(fmt.Sprint(r.cfg.seed, name), layers...)
	if err != nil {
		return picture{}, err
	}
	p := picture{name: name + ":v1"}
	if p.contents, err = image.Contents(img); err != nil {
		return picture{}, err
	}
	return p, r.registry.Push(ctx, img, p.name)
}

// origin is how many bytes of contents the registry has sent since the last push.
func (r *region) origin() (n int64, err error) {
	requests, err := r.registry.Requests()
	for _, q := range requests {
		if q.Content() {
			n += q.Bytes
		}
	}
	return n, err
}

// together has all hosts pull p at once, and returns how many failed.
func (r *region) together(ctx context.Context, hosts []*host, p picture) (failed int, took time.Duration) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	began := time.Now()
	for _, h := range hosts {
		wg.Go(func() {
			e := newEngine(h.Host, h.daemon.Mirror(), r.registry.URL())
			defer e.close()
			if err := e.pull(ctx, p); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed++
				r.out.say("%s: %v", h.Name(), err)
			}
		})
	}
	wg.Wait()
	return failed, time.Since(began)
}
