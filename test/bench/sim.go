//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"regexp"
	"strconv"
	"time"

	"damselfly.dev/scheduler/sim"
	"damselfly.dev/test/lab"
)

// simulated compares the lab with the simulator, and asks the simulator for
// sizes that no lab has.
func simulated(ctx context.Context, e *env) error {
	crowds := []struct {
		hosts int
		rate  lab.Rate
	}{{16, 50 * lab.Mbit}, {30, 25 * lab.Mbit}}
	sizes := []int{1000, 10_000}
	if e.short {
		crowds, sizes = crowds[:1], []int{100}
	}
	for _, c := range crowds {
		if err := e.besideLab(ctx, flashCrowd(c.hosts, c.rate)); err != nil {
			return err
		}
	}
	for _, hosts := range sizes {
		began := time.Now()
		got, err := sim.Run(ctx, sim.Crowd(hosts, 3<<30, 1.25e8))
		if err != nil {
			return err
		}
		name := fmt.Sprintf("simulated, %d hosts @ 1000 Mbit/s, 3 GiB: ", hosts)
		e.say("  %sefficiency %.3f", name, got.Efficiency())
		e.atLeast(name+"efficiency", "", 0.90, got.Efficiency())
		e.tell(name+"takes", "s", time.Since(began).Seconds())
	}
	return nil
}

// besideLab has the lab and the simulator do the same. How long a request waits
// on loaded links is measured while the lab's crowd is halfway.
func (e *env) besideLab(ctx context.Context, s swarm) error {
	var waits []float64 // of each pull in seconds; those at a rate that was too high come first
	s.during = func(ctx context.Context, r *region) error {
		if err := wait(ctx, r.bound(e.size(s.size))/2); err != nil {
			return err
		}
		rtt, err := r.rtt(ctx)
		waits = append(waits, rtt)
		return err
	}
	o, err := s.measure(ctx, e)
	if err != nil {
		return err
	}
	waits = waits[len(waits)-len(o.pulls):]
	var apart, modelled []float64
	for run, p := range o.pulls {
		twin := sim.Crowd(len(o.hosts), o.size, float64(o.rate)*payload/8)
		rtt := time.Duration(waits[run] * float64(time.Second))
		twin.Request, twin.Control = rtt, sim.DefaultControl-sim.DefaultRequest/2+rtt/2
		got, err := sim.Run(ctx, twin)
		if err != nil {
			return err
		}
		modelled, apart = append(modelled, got.Last.Seconds()), append(apart, math.Abs(p.last()/got.Last.Seconds()-1))
		e.say("  lab %.2f s, simulator %.2f s with round trips of %.1f ms", p.last(), got.Last.Seconds(), 1000*waits[run])
	}
	e.atMost(o.name+"lab and simulator apart", "", 0.10, apart...)
	e.tell(o.name+"lab", "s", o.each((*pull).last)...)
	e.tell(o.name+"simulator", "s", modelled...)
	e.limited(o)
	return nil
}

var rttField = regexp.MustCompile(`\srtt:([0-9.]+)/`)

// rtt is the median of what TCP has measured as round trips, in seconds, on the
// hosts' connections with each other and the supernode.
func (r *region) rtt(ctx context.Context) (float64, error) {
	var all []float64
	for _, d := range r.hosts {
		var out bytes.Buffer
		cmd := exec.Command("ss", "-tinH", "state", "established", "src", d.Host.IP().String()) //nolint:gosec // G204: our own
		cmd.Stdout = &out
		if err := d.Host.Run(ctx, "ss", cmd); err != nil {
			return 0, err
		}
		for _, m := range rttField.FindAllStringSubmatch(out.String(), -1) {
			if v, err := strconv.ParseFloat(m[1], 64); err == nil {
				all = append(all, v/1000)
			}
		}
	}
	if len(all) == 0 {
		return 0, errors.New("ss tells no round trips")
	}
	return median(all), nil
}
