//go:build linux

package main

import (
	"context"
	"fmt"
	"slices"

	"damselfly.dev/test/lab"
)

// zones is two zones with a thin link between, with and without the rule that a
// piece comes into a zone once.
func zones(ctx context.Context, e *env) error {
	if err := e.zones(ctx, true); err != nil {
		return err
	}
	return e.zones(ctx, false)
}

func (e *env) zones(ctx context.Context, once bool) error {
	const each, rate = 8, 40 * lab.Mbit
	size := e.size(mib64)
	l := equal(2*each, rate)
	l.zones = append(slices.Repeat([]string{"near"}, each), slices.Repeat([]string{"far"}, each)...)
	l.zoneLink = rate / 2
	l.hostFlags = []string{quota(size)}
	name := fmt.Sprintf("two zones of %d hosts @ %v, %v between, %d MiB: ", each, rate, l.zoneLink, size>>20)
	if once {
		l.superFlags = []string{"--cross-once"}
	} else {
		name += "no rule, "
	}
	r, err := build(ctx, e.bin, l)
	if err != nil {
		return err
	}
	defer r.close()
	bound := max(l.bound(size), bytesIn(size, l.zoneLink))
	var crossed, near, far, origin []float64
	for range e.runs {
		p, err := r.cold(ctx, size, crowd{})
		if err != nil {
			return err
		}
		crossed, origin = append(crossed, p.crossed), append(origin, p.origin)
		near, far = append(near, slices.Max(p.ended[:each])), append(far, slices.Max(p.ended[each:])/bound)
		e.report(name, bound, p)
		e.say("  %.3f copies crossed", p.crossed)
	}
	if once {
		e.atMost(name+"copies that cross", "", 1.1, crossed...)
		e.atMost(name+"far zone over its bound", "", 1.2, far...)
	} else {
		e.tell(name+"copies that cross", "", crossed...)
		e.tell(name+"far zone over its bound", "", far...)
	}
	e.tell(name+"last of the near zone", "s", near...)
	e.once(name+"origin copies", origin...)
	return nil
}
