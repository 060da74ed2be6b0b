//go:build linux

package main

import (
	"context"
	"fmt"

	"damselfly.dev/test/lab"
)

// mib64 is what swarms pull, as in the literature's measurements beside it.
const mib64 = 64 << 20

// flash is all hosts at once, a cold supernode, equal links.
func flash(ctx context.Context, e *env) error {
	crowds := []struct {
		hosts int
		rate  lab.Rate
	}{{8, 100 * lab.Mbit}, {16, 50 * lab.Mbit}, {30, 50 * lab.Mbit}}
	size := int64(mib64)
	if e.short {
		crowds, size = crowds[:1], 8<<20
	}
	for _, c := range crowds {
		if err := e.flash(ctx, c.hosts, c.rate, size); err != nil {
			return err
		}
	}
	return nil
}

func (e *env) flash(ctx context.Context, n int, rate lab.Rate, size int64) error {
	r, err := build(ctx, e.bin, equal(n, rate))
	if err != nil {
		return err
	}
	defer r.close()
	name := fmt.Sprintf("flash crowd, %d hosts @ %v, %d MiB: ", n, rate, size>>20)
	var eff, super, origin, cpu, busy []float64
	for range e.runs {
		b, err := r.fresh(size)
		if err != nil {
			return err
		}
		p, err := r.pull(ctx, b, crowd{})
		if err != nil {
			return err
		}
		eff = append(eff, bytesIn(size, rate)/p.last())
		super, origin = append(super, p.super), append(origin, p.origin)
		cpu, busy = append(cpu, p.cpu/float64(size)/float64(n)*(1<<30)), append(busy, p.busy())
		e.say("  %s%.2f s, efficiency %.3f, supernode %.2f, origin %.2f, CPU %.2f s/GiB, machine busy %.0f %%",
			name, p.last(), last(eff), p.super, p.origin, last(cpu), 100*p.busy())
	}
	e.atLeast(name+"efficiency", "", 0.90, eff...)
	e.atMost(name+"supernode copies", "", 1.15, super...)
	e.atMost(name+"origin copies", "", 1.00, origin...)
	e.tell(name+"CPU", "s/GiB", cpu...)
	return nil
}

func last(values []float64) float64 { return values[len(values)-1] }
