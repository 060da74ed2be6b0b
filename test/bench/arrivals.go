//go:build linux

package main

import (
	"context"
	"fmt"

	"damselfly.dev/test/lab"
)

// after is when, in link times from the first host's start, those before have
// the blob for sure.
const after = 1.3

// staggered is hosts that come one after the other when the first eight have it.
func staggered(ctx context.Context, e *env) error {
	const early, late, every = 8, 5, 0.2 // every: in link times
	o, err := swarm{
		name: fmt.Sprintf("%d late hosts after %d", late, early), size: mib64, rate: 50 * lab.Mbit,
		layout: func(rate lab.Rate) layout { return equal(early+late, rate) },
		crowd: func(bound float64) crowd {
			return crowd{start: func(i int) float64 {
				if i < early {
					return 0
				}
				return (after + every*float64(i-early)) * bound
			}}
		},
	}.measure(ctx, e)
	if err != nil {
		return err
	}
	e.atMost(o.name+"slowest late host over its link time", "", 1.15, o.each(func(p *pull) float64 {
		worst := 0.0
		for i := early; i < early+late; i++ {
			worst = max(worst, p.took(i))
		}
		return worst / o.bound
	})...)
	e.once(o.name+"origin copies", o.each(originCopies)...)
	e.limited(o)
	return nil
}

// oneFirst is one host, and all others at once when it has the blob.
func oneFirst(ctx context.Context, e *env) error {
	o, err := swarm{
		name: "one host, then 15 at once", size: mib64, rate: 50 * lab.Mbit,
		layout: func(rate lab.Rate) layout { return equal(16, rate) },
		crowd: func(bound float64) crowd {
			return crowd{start: func(i int) float64 {
				if i == 0 {
					return 0
				}
				return after * bound
			}}
		},
	}.measure(ctx, e)
	if err != nil {
		return err
	}
	e.tell(o.name+"efficiency of the 15", "", o.each(func(p *pull) float64 { return o.bound / (p.last() - p.started[1]) })...)
	e.tell(o.name+"supernode copies", "", o.each(superCopies)...)
	e.once(o.name+"origin copies", o.each(originCopies)...)
	e.limited(o)
	return nil
}
