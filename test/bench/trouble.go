//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"

	"damselfly.dev/test/lab"
)

// A trouble befalls one host of a crowd.
type trouble struct {
	name   string
	before func(ctx context.Context, r *region, host int) error
	during func(ctx context.Context, r *region, host int) error
}

// killed is a host whose dfdaemon is killed when it has half of the blob.
func killed(ctx context.Context, e *env) error {
	return e.trouble(ctx, trouble{
		name: "one of 9 hosts killed halfway",
		during: func(ctx context.Context, r *region, host int) error {
			if err := wait(ctx, r.bound(e.size(mib64))/2); err != nil {
				return err
			}
			r.hosts[host].Process.Kill()
			return nil
		},
	})
}

// slowest is a host whose link has a hundredth of the others' rate.
func slowest(ctx context.Context, e *env) error {
	return e.trouble(ctx, trouble{
		name: "one of 9 hosts at a hundredth of the rate",
		before: func(ctx context.Context, r *region, host int) error {
			rate := r.layout.hosts[host] / 100
			return r.hosts[host].Host.SetRate(ctx, rate, rate)
		},
	})
}

// trouble measures what the others lose when one of nine hosts is in trouble,
// against the same crowd without, in turn.
func (e *env) trouble(ctx context.Context, t trouble) error {
	const hosts, rate = 9, 50 * lab.Mbit
	const victim = hosts - 1
	size := e.size(mib64)
	l := equal(hosts, rate)
	l.hostFlags = []string{quota(size)}
	r, err := build(ctx, e.bin, l)
	if err != nil {
		return err
	}
	defer r.close()
	name := fmt.Sprintf("%s @ %v, %d MiB: ", t.name, rate, size>>20)
	c := crowd{doomed: func(i int) bool { return i == victim }}
	if t.during != nil {
		c.during = func(ctx context.Context) error { return t.during(ctx, r, victim) }
	}
	var others [2][]float64 // in trouble, calm
	var super, origin []float64
	troubled := func() error {
		if t.before != nil {
			if err := t.before(ctx, r, victim); err != nil {
				return err
			}
		}
		p, err := r.cold(ctx, size, c)
		if err != nil {
			return err
		}
		others[0], super, origin = append(others[0], p.last()), append(super, p.super), append(origin, p.origin)
		e.report(name, l.bound(size), p)
		return r.mend(ctx, victim)
	}
	calm := func() error {
		p, err := r.cold(ctx, size, crowd{})
		if err != nil {
			return err
		}
		p.ended[victim] = 0 // the same others
		others[1] = append(others[1], p.last())
		e.report(name+"calm, ", l.bound(size), p)
		return nil
	}
	for run := range e.runs {
		if err := pair(run, troubled, calm); err != nil {
			return err
		}
	}
	e.atMost(name+"last of the others over calm", "", 1.10, ratios(others[0], others[1])...)
	e.tell(name+"last of the others", "s", others[0]...)
	e.tell(name+"last of the others, calm", "s", others[1]...)
	e.tell(name+"supernode copies", "", super...)
	e.once(name+"origin copies", origin...)
	return nil
}

// mend gives a host its link back, and a dfdaemon that has nothing to do.
func (r *region) mend(ctx context.Context, host int) error {
	d := r.hosts[host]
	d.Process.Kill()
	return errors.Join(d.Host.SetRate(ctx, r.layout.hosts[host], r.layout.hosts[host]), d.Restart(ctx))
}
