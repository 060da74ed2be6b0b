//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"

	"damselfly.dev/test/lab"
)

// overTLS is a crowd in a region with TLS, and the same crowd in one without, in turn.
func overTLS(ctx context.Context, e *env) error {
	hosts, rate := 16, 25*lab.Mbit
	if e.short {
		hosts = 4
	}
	size := e.size(mib64)
	name := fmt.Sprintf("TLS, %d hosts @ %v, %d MiB: ", hosts, rate, size>>20)
	var efficiency, cpu, machine [2][]float64
	var busy []float64
	for run := range e.runs {
		way := func(k int, name string) func() error {
			return func() (err error) {
				l := equal(hosts, rate)
				l.hostFlags, l.secure = []string{quota(size)}, k == 0
				r, err := build(ctx, e.bin, l)
				if err != nil {
					return err
				}
				defer func() { err = errors.Join(err, r.close()) }()
				p, err := r.cold(ctx, size, crowd{})
				if err != nil {
					return err
				}
				gib := float64(size) * float64(hosts) / (1 << 30)
				efficiency[k] = append(efficiency[k], l.bound(size)/p.last())
				cpu[k], machine[k] = append(cpu[k], p.cpu/gib), append(machine[k], p.machine/gib)
				busy = append(busy, p.busy())
				e.report(name, l.bound(size), p)
				return nil
			}
		}
		if err := pair(run, way(0, name), way(1, name+"without, ")); err != nil {
			return err
		}
	}
	e.tell(name+"efficiency", "", efficiency[0]...)
	e.tell(name+"efficiency without", "", efficiency[1]...)
	e.tell(name+"CPU of all parts", "s/GiB", cpu[0]...)
	e.tell(name+"CPU of all parts without", "s/GiB", cpu[1]...)
	e.tell(name+"CPU over that without", "", ratios(cpu[0], cpu[1])...)
	e.tell(name+"whole machine over that without", "", ratios(machine[0], machine[1])...)
	e.atMost(name+"machine busy", "", tooBusy, busy...)
	return nil
}
