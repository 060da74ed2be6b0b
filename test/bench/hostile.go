//go:build linux

package main

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"damselfly.dev/test/hostile"
	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// hostileHost is fifteen hosts beside a sixteenth that does harm, in each way in turn,
// and the same fifteen without it.
func hostileHost(ctx context.Context, e *env) error {
	const hosts, rate = 16, 25 * lab.Mbit
	size := int64(16 << 20)
	if e.short {
		size = 2 << 20
	}
	l := equal(hosts, rate)
	l.hostFlags = []string{quota(size)}
	r, err := build(ctx, e.bin, l)
	if err != nil {
		return err
	}
	defer r.close()
	r.hosts[hosts-1].Process.Kill() // in whose place it is
	others := crowd{}
	for i := range hosts - 1 {
		others.hosts = append(others.hosts, i)
	}
	name := fmt.Sprintf("one of %d hosts @ %v hostile, %d MiB: ", hosts, rate, size>>20)
	if _, err := r.cold(ctx, size/4, others); err != nil { // so that connections are there
		return err
	}
	last := func(way string) (float64, error) {
		b, err := r.fresh(size)
		if err != nil {
			return 0, err
		}
		ctx, stop := context.WithCancel(ctx)
		defer stop()
		if way != "" {
			end, err := r.beside(ctx, way, b)
			if err != nil {
				return 0, err
			}
			defer end()
			defer stop()
		}
		p, err := r.pull(ctx, b, others)
		if err != nil {
			return 0, err
		}
		e.report(name+way+", ", l.bound(size), p)
		if p.origin != 1 {
			return 0, fmt.Errorf("%s: the registry has sent %.3f copies", way, p.origin)
		}
		return p.last(), r.origin.Remove(b.digest)
	}
	var calm []float64
	took := map[string][]float64{}
	for range e.runs {
		for i, way := range hostile.Ways {
			if i%4 == 0 {
				t, err := last("")
				if err != nil {
					return err
				}
				calm = append(calm, t)
			}
			t, err := last(way)
			if err != nil {
				return err
			}
			took[way] = append(took[way], t)
		}
	}
	for _, way := range hostile.Ways {
		over := make([]float64, len(took[way]))
		for i, t := range took[way] {
			over[i] = t / median(calm)
		}
		e.atMost(name+way+": last of the others over calm", "", 1.10, over...)
	}
	e.tell(name+"last of the others, calm", "s", calm...)
	e.atMost(name+"supernode peak memory", "MiB", 200, programs.Peak(r.super.Process.PID()))
	return nil
}

// beside has a hostile host in the place of the last one do harm to who pulls b, until
// ctx ends.
func (r *region) beside(ctx context.Context, way string, b blob) (end func(), err error) {
	at := r.hosts[len(r.hosts)-1].Host
	address := netip.AddrPortFrom(at.IP(), programs.PeerPort).String()
	ln, err := at.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{DialContext: at.Dial}
	h := &hostile.Host{
		Supernode: r.super.URL(), Client: &http.Client{Transport: transport}, Dial: at.Dial, Addr: address,
		Registry: programs.RegistryName, Repository: programs.Repository, Digest: b.digest, Size: b.size,
	}
	srv := &http.Server{Handler: h.Serve(way), ReadHeaderTimeout: time.Minute}
	done := make(chan struct{}, 2)
	go func() { _ = srv.Serve(ln); done <- struct{}{} }()
	go func() { h.Run(ctx, way); done <- struct{}{} }()
	until, stop := context.WithTimeout(ctx, time.Second) // what it says goes ahead of the others
	defer stop()
	for h.Told.Load() == 0 && until.Err() == nil {
		_ = wait(until, 0.01)
	}
	return func() {
		_ = srv.Close()
		<-done
		<-done
		transport.CloseIdleConnections()
	}, nil
}
