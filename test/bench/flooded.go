//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// slowOnes is how many slow connections each listener has to bear.
const slowOnes = 2000

// flooded is a crowd beside thousands of slow connections to the supernode and to a
// host's mirror, peer port and metrics, and the same crowd without, in turn.
func flooded(ctx context.Context, e *env) error {
	const hosts, rate = 16, 25 * lab.Mbit
	size, slow := e.size(mib64/2), slowOnes
	if e.short {
		slow = 50
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return err
	}
	if need := uint64(4*slow + 1000); files.Max < need {
		return fmt.Errorf("it takes %d files at once, %d are allowed", need, files.Max)
	}
	l := equal(hosts+1, rate) // and who floods them
	l.hostFlags = []string{quota(size)}
	r, err := build(ctx, e.bin, l)
	if err != nil {
		return err
	}
	defer r.close()
	r.hosts[hosts].Process.Kill()
	others := crowd{}
	for i := range hosts {
		others.hosts = append(others.hosts, i)
	}
	if _, err := r.cold(ctx, size/4, others); err != nil { // so that connections are there for both
		return err
	}
	name := fmt.Sprintf("%d slow connections on each listener, %d hosts @ %v, %d MiB: ", slow, hosts, rate, size>>20)
	var last [2][]float64 // flooded, calm
	var origin, opened []float64
	for run := range e.runs {
		if err := pair(run, func() error {
			end, count, err := r.flood(ctx, slow)
			if err != nil {
				return err
			}
			defer end()
			p, err := r.cold(ctx, size, others)
			if err != nil {
				return err
			}
			last[0], origin, opened = append(last[0], p.last()), append(origin, p.origin), append(opened, float64(count.Load()))
			e.report(name, l.bound(size), p)
			return nil
		}, func() error {
			p, err := r.cold(ctx, size, others)
			if err != nil {
				return err
			}
			last[1] = append(last[1], p.last())
			e.report(name+"calm, ", l.bound(size), p)
			return nil
		}); err != nil {
			return err
		}
	}
	e.atMost(name+"last host over calm", "", 1.10, ratios(last[0], last[1])...)
	e.tell(name+"last host", "s", last[0]...)
	e.tell(name+"last host, calm", "s", last[1]...)
	e.tell(name+"connections opened in all", "", opened...)
	e.once(name+"origin copies", origin...)
	e.atMost(name+"supernode peak memory", "MiB", 200, programs.Peak(r.super.Process.PID()))
	return nil
}

// flood opens slow connections, and a second later again those that are cut off, until end is called:
// some say nothing, some half a header, some read nothing of their answer. The mirror
// and the metrics of a host can be reached from it alone; to the others they come from
// the last host, which is none of the crowd.
func (r *region) flood(ctx context.Context, each int) (end func(), opened *atomic.Int64, err error) {
	victim, other := r.hosts[0].Host, r.hosts[len(r.hosts)-1].Host
	targets := []struct {
		from *lab.Host
		at   string
		path string
	}{
		{other, strings.TrimPrefix(r.super.URL(), "http://"), "/metrics"},
		{other, netip.AddrPortFrom(victim.IP(), programs.PeerPort).String(), "/"},
		{victim, strings.TrimPrefix(r.hosts[0].Mirror(), "http://"), "/v2/"},
		{victim, netip.AddrPortFrom(victim.Local(), programs.MetricsPort).String(), "/metrics"},
	}
	ctx, stop := context.WithCancel(ctx)
	var all errgroup.Group
	var first sync.WaitGroup
	opened = new(atomic.Int64)
	for _, t := range targets {
		for i := range each {
			say := []string{"", "GET " + t.path + " HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ", "GET " + t.path + " HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"}[i%3]
			first.Add(1)
			all.Go(func() error {
				begun := sync.OnceFunc(first.Done)
				defer begun()
				for ctx.Err() == nil {
					conn, err := t.from.Dial(ctx, "tcp", t.at)
					if err != nil {
						return err
					}
					opened.Add(1)
					begun()
					hangUp := context.AfterFunc(ctx, func() { _ = conn.Close() })
					if _, err = io.WriteString(conn, say); err == nil && i%3 < 2 {
						_, _ = io.Copy(io.Discard, conn) // until it is cut off
					} else {
						<-ctx.Done()
					}
					hangUp()
					_ = conn.Close()
					_ = wait(ctx, 1) // its own work is on the same processors
				}
				return nil
			})
		}
	}
	first.Wait()
	return func() { stop(); _ = all.Wait() }, opened, ctx.Err()
}
