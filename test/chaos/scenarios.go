//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// size is one for the whole form, and one for the short one.
func (r *region) size(whole, short int) int {
	if r.cfg.short {
		return short
	}
	return whole
}

// half returns when the hosts have received half of what they need.
func (r *region) half(ctx context.Context, p picture) error {
	return r.await(ctx, "half of the pull", 2*time.Minute, func() bool {
		var got int64
		for _, h := range r.hosts {
			received, err := h.daemon.Received(ctx)
			if err != nil {
				return false
			}
			got += received["peer"] + received["supernode"]
		}
		return got >= p.size()*int64(len(r.hosts))/2
	})
}

// supernodeGone: must-show line 2, first half.
func supernodeGone(ctx context.Context, r *region) error {
	return r.killSupernode(ctx, false)
}

// supernodeBack: must-show line 2, second half.
func supernodeBack(ctx context.Context, r *region) error {
	return r.killSupernode(ctx, true)
}

func (r *region) killSupernode(ctx context.Context, back bool) error {
	if err := r.build(ctx, shape{hosts: r.size(16, 6), rate: lab.Rate(r.size(50, 50)) * lab.Mbit}); err != nil {
		return err
	}
	p, err := r.push(ctx, "demo/app", r.size(128, 12)*mebi, r.size(128, 12)*mebi)
	if err != nil {
		return err
	}
	var sent int64
	killed := make(chan error, 1)
	go func() {
		err := r.half(ctx, p)
		if err == nil {
			sent, err = r.supernode.Sent(ctx) // each piece once before any twice: as much as the hosts have among them
			r.supernode.Process.Kill()
			r.out.say("The supernode is killed; it had sent %.2f copies.", float64(sent)/float64(p.size()))
		}
		if err == nil && back {
			if err = errors.Join(wait(ctx, 3*time.Second), r.supernode.Restart(ctx)); err == nil {
				began := time.Now()
				late := r.await(ctx, "the hosts", 20*time.Second, func() bool { return r.sessions(ctx) == len(r.hosts) })
				r.out.check(late == nil && time.Since(began) <= 5*time.Second, "the hosts are back with it after %.1f s (5 s)", time.Since(began).Seconds())
			}
		}
		killed <- err
	}()
	failed, took := r.together(ctx, r.hosts, p)
	if err := <-killed; err != nil {
		return err
	}
	r.out.check(failed == 0, "%d hosts pulled %d MiB in %.1f s, %d failed", len(r.hosts), p.size()/mebi, took.Seconds(), failed)
	origin, err := r.origin()
	if err != nil {
		return err
	}
	copies, unheld := float64(origin)/float64(p.size()), max(0, 1-float64(sent)/float64(p.size()))
	if back {
		unheld = 0 // the supernode's disk has it
	}
	r.out.check(copies <= 1.02+unheld, "the registry sent %.2f copies; no host had %.2f (at most 1.02 and that)", copies, unheld)
	return nil
}

// partition: must-show line 7.
func partition(ctx context.Context, r *region) error {
	if err := r.build(ctx, shape{hosts: r.size(12, 4), rate: 100 * lab.Mbit}); err != nil {
		return err
	}
	first, err := r.push(ctx, "demo/apart", r.size(64, 8)*mebi, r.size(32, 4)*mebi)
	if err != nil {
		return err
	}
	near, far := r.hosts[:len(r.hosts)/2], r.hosts[len(r.hosts)/2:]
	route := func(verb string) error {
		for _, h := range far {
			for _, other := range append([]*lab.Host{r.supernode.Host}, hostsOf(near)...) {
				cmd := exec.Command("ip", "route", verb, "blackhole", other.IP().String()+"/32") //nolint:gosec // G204: an address
				if err := h.Run(ctx, "route", cmd); err != nil {
					return err
				}
			}
		}
		return nil
	}
	parted := make(chan error, 1)
	go func() {
		err := r.half(ctx, first)
		r.out.say("The hosts are parted.")
		parted <- errors.Join(err, route("add"))
	}()
	failed, took := r.together(ctx, r.hosts, first)
	if err := <-parted; err != nil {
		return err
	}
	r.out.check(failed == 0, "both halves pulled %d MiB in %.1f s while they were parted, %d failed", first.size()/mebi, took.Seconds(), failed)
	if err := r.await(ctx, "half of the sessions", 30*time.Second, func() bool { return r.sessions(ctx) == len(near) }); err != nil {
		return err
	}
	if err := route("del"); err != nil {
		return err
	}
	began := time.Now()
	if err := r.await(ctx, "all sessions", 30*time.Second, func() bool { return r.sessions(ctx) == len(r.hosts) }); err != nil {
		return err
	}
	r.out.say("They are joined again: all hosts have a session after %.1f s.", time.Since(began).Seconds())
	second, err := r.push(ctx, "demo/joined", r.size(64, 8)*mebi)
	if err != nil {
		return err
	}
	failed, took = r.together(ctx, r.hosts, second)
	origin, err := r.origin()
	if err != nil {
		return err
	}
	copies := float64(origin) / float64(second.size())
	r.out.check(failed == 0 && copies <= 1.02, "joined again, all pulled another one in %.1f s, %d failed, and the registry sent %.2f copies (at most 1.02)",
		took.Seconds(), failed, copies)
	return nil
}

func hostsOf(of []*host) (hosts []*lab.Host) {
	for _, h := range of {
		hosts = append(hosts, h.Host)
	}
	return hosts
}

// upgrade: must-show line 8.
func upgrade(ctx context.Context, r *region) error {
	if err := r.build(ctx, shape{hosts: r.size(8, 3), rate: 100 * lab.Mbit}); err != nil {
		return err
	}
	var pictures []picture
	for i := range r.size(40, 12) {
		p, err := r.push(ctx, fmt.Sprintf("demo/app%d", i), r.size(16, 4)*mebi, r.size(4, 1)*mebi, 20_000)
		if err != nil {
			return err
		}
		pictures = append(pictures, p)
	}
	var pulls, failed atomic.Int64
	loop, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	for _, h := range r.hosts {
		e, err := programs.DebianContainerd().Start(ctx, h.Host, h.daemon.Mirror(), r.registry.URL())
		if err != nil {
			return err
		}
		wg.Go(func() {
			for i := 0; loop.Err() == nil; i++ {
				p := pictures[i%len(pictures)] // what containerd has already costs it little: the first round counts
				if err := e.Fetch(ctx, p.name); err != nil {
					failed.Add(1)
					r.out.say("%s: %s: %v", h.Name(), p.name, err)
				}
				if i < len(pictures) {
					pulls.Add(1)
				}
			}
		})
	}
	err := r.replaceAll(ctx)
	done := pulls.Load()
	stop()
	wg.Wait()
	if err != nil {
		return err
	}
	received := map[string]int64{}
	for _, h := range r.hosts {
		got, err := h.daemon.Received(ctx)
		if err != nil {
			return err
		}
		for source, n := range got {
			received[source] += n
		}
	}
	r.out.check(failed.Load() == 0 && done > 0, "%d pulls while all was replaced, %d failed (the new dfdaemons had %d MiB from peers, %d from the supernode, %d from the registry)",
		done, failed.Load(), received["peer"]/mebi, received["supernode"]/mebi, received["origin"]/mebi)
	return nil
}

// replaceAll replaces each dfdaemon while it runs, then the supernode as a service
// manager does, then each dfdaemon as a DaemonSet does.
func (r *region) replaceAll(ctx context.Context) error {
	codes := map[string]int{}
	for _, h := range r.hosts {
		code, err := h.takeOver(ctx)
		if err != nil {
			return err
		}
		codes[fmt.Sprint("takeover ", code)]++
	}
	old := r.supernode.Process
	if err := old.Stop(ctx); err != nil {
		return err
	}
	codes[fmt.Sprint("supernode ", old.ExitCode())]++
	if err := r.supernode.Restart(ctx); err != nil {
		return err
	}
	if err := r.await(ctx, "all sessions", 30*time.Second, func() bool { return r.sessions(ctx) == len(r.hosts) }); err != nil {
		return err
	}
	for _, h := range r.hosts {
		old := h.daemon.Process
		if err := errors.Join(old.Stop(ctx), h.daemon.Restart(ctx)); err != nil {
			return err
		}
		codes[fmt.Sprint("restart ", old.ExitCode())]++
	}
	n := len(r.hosts)
	r.out.check(codes["takeover 0"] == n && codes["supernode 0"] == 1 && codes["restart 0"] == n, "all ended with 0: %v", codes)
	return nil
}

// takeOver starts a new dfdaemon beside the old one, and waits for the old one's end.
func (h *host) takeOver(ctx context.Context) (code int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.daemon.Process
	if err := h.daemon.Restart(ctx); err != nil {
		return 0, err
	}
	select {
	case <-old.Done():
		return old.ExitCode(), nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// smallDisk: must-show line 9.
func smallDisk(ctx context.Context, r *region) error {
	disk := r.size(200, 40)
	err := r.build(ctx, shape{
		hosts: r.size(4, 3), rate: lab.Rate(r.size(400, 200)) * lab.Mbit, disk: int64(disk) * mebi,
	})
	if err != nil {
		return err
	}
	p, err := r.push(ctx, "demo/large", r.size(512, 96)*mebi, r.size(512, 32)*mebi)
	if err != nil {
		return err
	}
	failed, took := r.together(ctx, r.hosts, p)
	r.out.check(failed == 0, "%d hosts with a disk of %d MiB each pulled %d MiB in %.1f s, %d failed", len(r.hosts), disk, p.size()/mebi, took.Seconds(), failed)
	for _, h := range r.hosts {
		sent, err := h.daemon.Sent(ctx)
		if err != nil {
			return err
		}
		received, err := h.daemon.Received(ctx)
		if err != nil {
			return err
		}
		r.out.check(sent > 0, "%s has sent %d MiB to others (some), and had %d from peers, %d from the supernode, %d from the registry",
			h.Name(), sent/mebi, received["peer"]/mebi, received["supernode"]/mebi, received["origin"]/mebi)
	}
	origin, err := r.origin()
	r.out.say("The registry sent %.2f copies.", float64(origin)/float64(p.size()))
	return err
}
