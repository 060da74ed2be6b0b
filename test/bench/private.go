//go:build linux

package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"damselfly.dev/test/lab"
)

// private is a crowd of hosts with credentials of their own that pull a private
// blob, and the same crowd with a public one, in turn; both with TLS, without which
// a private one does not go from host to host.
func private(ctx context.Context, e *env) error {
	hosts, rate := 30, 10*lab.Mbit // that TLS at both ends of so many is not the limit
	if e.short {
		hosts = 8
	}
	size := e.size(mib64 / 2)
	l := equal(hosts, rate)
	l.hostFlags, l.secure = []string{quota(size)}, true // nothing private goes in clear
	r, err := build(ctx, e.bin, l)
	if err != nil {
		return err
	}
	defer r.close()
	if err := r.gather(ctx); err != nil {
		return err
	}
	if _, err := r.cold(ctx, size/8, crowd{}); err != nil { // so that connections are there for both
		return err
	}
	name := fmt.Sprintf("a private blob, %d hosts @ %v, %d MiB: ", hosts, rate, size>>20)
	var closed, open, heads, origin, busy []float64
	for run := range e.runs {
		if err := pair(run, func() error {
			as := func(i int) string { return fmt.Sprintf("host%d-%d:secret", i, run) } // whom nobody remembers
			p, err := r.cold(ctx, size, crowd{login: as})
			if err != nil {
				return err
			}
			n, err := r.heads()
			closed, heads = append(closed, p.last()), append(heads, n)
			origin, busy = append(origin, p.origin), append(busy, p.busy())
			e.report(name, l.bound(size), p)
			return err
		}, func() error {
			p, err := r.cold(ctx, size, crowd{})
			if err != nil {
				return err
			}
			open = append(open, p.last())
			e.report(name+"as a public one, ", l.bound(size), p)
			return nil
		}); err != nil {
			return err
		}
	}
	e.atMost(name+"last host over a public one's", "", 1.05, ratios(closed, open)...)
	e.tell(name+"last host", "s", closed...)
	e.tell(name+"last host, as a public one", "s", open...)
	e.atMost(name+"HEADs for one host, at most", "", 1, heads...)
	e.once(name+"origin copies", origin...)
	e.atMost(name+"machine busy", "", tooBusy, busy...)
	return nil
}

// gather waits until all hosts have sessions: with TLS they first come by certificates.
func (r *region) gather(ctx context.Context) error {
	for {
		n, err := r.super.Hosts(ctx)
		if err != nil || n >= int64(len(r.hosts)) {
			return err
		}
		if err := wait(ctx, 0.1); err != nil {
			return err
		}
	}
}

// heads is how often the origin was asked whether a host may read, for the host
// for which it was asked most, since it was told to forget.
func (r *region) heads() (float64, error) {
	requests, err := r.origin.Requests()
	if err != nil {
		return 0, err
	}
	most, of := 0, map[string]int{}
	for _, q := range requests {
		if q.Method == http.MethodHead && strings.HasPrefix(q.User, "host") {
			of[q.User]++
			most = max(most, of[q.User])
		}
	}
	return float64(most), nil
}
