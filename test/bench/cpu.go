//go:build linux

package main

import (
	"context"
	"fmt"

	"damselfly.dev/test/lab"
)

// cpu is what all parts together take for a crowd's bytes, beside what nginx
// and curl alone take for the same.
func cpu(ctx context.Context, e *env) error {
	const hosts, rate = 16, 100 * lab.Mbit
	size := e.size(mib64)
	l := equal(hosts, rate)
	l.hostFlags = []string{quota(size)}
	r, err := build(ctx, e.bin, l)
	if err != nil {
		return err
	}
	defer r.close()
	name := fmt.Sprintf("CPU, %d hosts @ %v, %d MiB: ", hosts, rate, size>>20)
	var programs, machine [2][]float64
	for run := range e.runs {
		way := func(k int, name string, c crowd) func() error {
			return func() error {
				p, err := r.cold(ctx, size, c)
				if err != nil {
					return err
				}
				gib := float64(size) * hosts / (1 << 30)
				programs[k], machine[k] = append(programs[k], p.cpu/gib), append(machine[k], p.machine/gib)
				e.report(name, l.bound(size), p)
				e.say("  %.2f s/GiB, the whole machine %.2f", p.cpu/gib, p.machine/gib)
				return nil
			}
		}
		if err := pair(run, way(0, name, crowd{}), way(1, name+"direct, ", crowd{direct: true})); err != nil {
			return err
		}
	}
	e.atMost(name+"all parts over direct", "", 1.5, ratios(programs[0], programs[1])...)
	e.tell(name+"all parts", "s/GiB", programs[0]...)
	e.tell(name+"direct", "s/GiB", programs[1]...)
	e.tell(name+"whole machine over direct", "", ratios(machine[0], machine[1])...)
	e.tell(name+"whole machine", "s/GiB", machine[0]...)
	e.tell(name+"whole machine, direct", "s/GiB", machine[1]...)
	return nil
}
