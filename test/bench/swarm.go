//go:build linux

package main

import (
	"context"
	"fmt"
	"runtime"

	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

const (
	// mib64 is what swarms pull: 256 of the smallest pieces.
	mib64 = 64 << 20
	// tooBusy is the part of the processors in use above which not the network
	// alone was the limit.
	tooBusy = 0.85
	// halvings is how often a rate is halved then.
	halvings = 2
)

// swarm is a crowd to be measured.
type swarm struct {
	name   string
	size   int64
	rate   lab.Rate // of a host's link, to begin with
	layout func(lab.Rate) layout
	crowd  func(bound float64) crowd            // by the bound in seconds; nil is all at once
	during func(context.Context, *region) error // runs beside each pull
	direct int64                                // size of the blob that all pull straight from the origin beside it; 0 is none
}

// outcome is what became of a swarm.
type outcome struct {
	layout
	name            string // with the rate of the links
	rate            lab.Rate
	size            int64
	bound           float64 // seconds
	pulls           []*pull // at that rate, of every run
	direct          *pull
	directSize      int64
	super, dfdaemon float64 // peak memory in MiB
}

// measure has a swarm pull a cold blob in every run, at a rate at which the
// network is the limit: it is halved when the processors were.
func (s swarm) measure(ctx context.Context, e *env) (*outcome, error) {
	s.size, s.direct = e.size(s.size), min(s.direct, e.size(s.direct))
	for try := 0; ; try++ {
		o, err := s.at(ctx, e, try == halvings || e.short)
		if err != nil || o != nil {
			return o, err
		}
		s.rate /= 2
	}
}

// at measures at the swarm's rate. It returns nothing when the processors were
// the limit, unless this is the final rate.
func (s swarm) at(ctx context.Context, e *env, final bool) (*outcome, error) {
	o := &outcome{layout: s.layout(s.rate), rate: s.rate, size: s.size, directSize: s.direct}
	o.name = fmt.Sprintf("%s @ %v, %d MiB: ", s.name, s.rate, s.size>>20)
	o.bound = o.layout.bound(s.size)
	o.hostFlags = append(o.hostFlags, quota(s.size))
	r, err := build(ctx, e.bin, o.layout)
	if err != nil {
		return nil, err
	}
	defer r.close()
	var c crowd
	if s.crowd != nil {
		c = s.crowd(o.bound)
	}
	if s.during != nil {
		c.during = func(ctx context.Context) error { return s.during(ctx, r) }
	}
	for range e.runs {
		p, err := r.cold(ctx, s.size, c)
		if err != nil {
			return nil, err
		}
		o.pulls = append(o.pulls, p)
		if e.report(o.name, o.bound, p) && !final {
			e.say("  again at half the rate")
			return nil, nil //nolint:nilnil // said above
		}
	}
	o.super = programs.Peak(r.super.Process.PID())
	for _, d := range r.hosts {
		o.dfdaemon = max(o.dfdaemon, programs.Peak(d.Process.PID()))
	}
	if s.direct > 0 {
		if o.direct, err = r.cold(ctx, s.direct, crowd{direct: true}); err != nil {
			return nil, err
		}
		e.report(o.name+"direct, ", o.layout.bound(s.direct), o.direct)
	}
	return o, nil
}

// quota keeps no more than two blobs on each host.
func quota(size int64) string { return fmt.Sprintf("--quota=%d", 5*size/2) }

// report tells of a pull, and whether the processors were its limit.
func (e *env) report(name string, bound float64, p *pull) (busy bool) {
	e.say("  %s%.2f s of at least %.2f, supernode %.2f, origin %.2f, machine busy %.0f %%",
		name, p.last(), bound, p.super, p.origin, 100*p.busy())
	if busy = p.busy() > tooBusy; busy {
		e.say("  THE CPU WAS THE LIMIT, and not the network: %d cores were busy for %.0f %%", runtime.NumCPU(), 100*p.busy())
	}
	return busy
}

// each gives a figure of every run.
func each(pulls []*pull, figure func(*pull) float64) []float64 {
	out := make([]float64, 0, len(pulls))
	for _, p := range pulls {
		out = append(out, figure(p))
	}
	return out
}

func originCopies(p *pull) float64 { return p.origin }
func superCopies(p *pull) float64  { return p.super }

func (o *outcome) each(figure func(*pull) float64) []float64 { return each(o.pulls, figure) }

// efficiency is the bound over the time of the last host, of every run.
func (o *outcome) efficiency() []float64 {
	return o.each(func(p *pull) float64 { return o.bound / p.last() })
}

// perGiB is a figure for each GiB that the hosts have got.
func (o *outcome) perGiB(figure float64) float64 {
	return figure / float64(o.size) / float64(len(o.hosts)) * (1 << 30)
}

// direct adds a row of the efficiency without Damselfly.
func (e *env) direct(o *outcome) {
	e.tell(o.name+"efficiency, direct", "", o.layout.bound(o.directSize)/o.direct.last())
}

// limited adds a row that says so when the processors were the limit.
func (e *env) limited(o *outcome) {
	e.atMost(o.name+"machine busy", "", tooBusy, o.each((*pull).busy)...)
}

// flash is all hosts at once, a cold supernode, equal links.
func flash(ctx context.Context, e *env) error {
	crowds := []struct {
		hosts int
		rate  lab.Rate
	}{{8, 100 * lab.Mbit}, {16, 50 * lab.Mbit}, {30, 25 * lab.Mbit}}
	if e.short {
		crowds = crowds[:1]
	}
	for _, c := range crowds {
		s := flashCrowd(c.hosts, c.rate)
		s.direct = s.size / int64(c.hosts) // takes as long as the bound
		o, err := s.measure(ctx, e)
		if err != nil {
			return err
		}
		e.atLeast(o.name+"efficiency", "", 0.90, o.efficiency()...)
		e.direct(o)
		e.tell(o.name+"last host", "s", o.each((*pull).last)...)
		e.tell(o.name+"bound", "s", o.bound)
		e.atMost(o.name+"supernode copies", "", 1.15, o.each(superCopies)...)
		e.once(o.name+"origin copies", o.each(originCopies)...)
		e.tell(o.name+"CPU", "s/GiB", o.each(func(p *pull) float64 { return o.perGiB(p.cpu) })...)
		e.tell(o.name+"peak memory, supernode", "MiB", o.super)
		e.tell(o.name+"peak memory, dfdaemon", "MiB", o.dfdaemon)
		e.limited(o)
	}
	return nil
}

// flashCrowd is a swarm of equal hosts.
func flashCrowd(hosts int, rate lab.Rate) swarm {
	return swarm{
		name: fmt.Sprintf("flash crowd, %d hosts", hosts), size: mib64, rate: rate,
		layout: func(rate lab.Rate) layout { return equal(hosts, rate) },
	}
}

// rich is a crowd beside a supernode and an origin with ten times its links.
func rich(ctx context.Context, e *env) error {
	o, err := swarm{
		name: "a supernode with ten times the link, 16 hosts", size: mib64, rate: 50 * lab.Mbit, direct: mib64,
		layout: func(rate lab.Rate) layout {
			l := equal(16, rate)
			l.supernode, l.origin = 10*rate, 10*rate
			return l
		},
	}.measure(ctx, e)
	if err != nil {
		return err
	}
	e.atLeast(o.name+"efficiency", "", 0.92, o.efficiency()...)
	e.direct(o)
	e.tell(o.name+"supernode copies", "", o.each(superCopies)...)
	e.once(o.name+"origin copies", o.each(originCopies)...)
	e.limited(o)
	return nil
}

// unequal is a crowd of which every third host has a quarter of the others'
// link. No class is held up by all uploads together: its bound is its own link.
func unequal(ctx context.Context, e *env) error {
	const hosts = 15
	slow := func(i int) bool { return i%3 == 2 }
	o, err := swarm{
		name: fmt.Sprintf("unequal links, %d hosts", hosts), size: mib64, rate: 50 * lab.Mbit, direct: mib64 / hosts,
		layout: func(rate lab.Rate) layout {
			l := equal(hosts, rate)
			for i := range l.hosts {
				if slow(i) {
					l.hosts[i] = rate / 4
				}
			}
			return l
		},
	}.measure(ctx, e)
	if err != nil {
		return err
	}
	over := func(class bool, rate lab.Rate) []float64 {
		return o.each(func(p *pull) float64 {
			last := 0.0
			for i, t := range p.ended {
				if slow(i) == class {
					last = max(last, t)
				}
			}
			return last / bytesIn(o.size, rate)
		})
	}
	e.atMost(o.name+"last fast host over its bound", "", 1.25, over(false, o.rate)...)
	e.atMost(o.name+"last slow host over its bound", "", 1.15, over(true, o.rate/4)...)
	e.direct(o)
	e.once(o.name+"origin copies", o.each(originCopies)...)
	e.limited(o)
	return nil
}

func last(values []float64) float64 { return values[len(values)-1] }
