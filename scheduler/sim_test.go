package scheduler

import (
	"container/heap"
	"math"
	"slices"
	"time"

	"damselfly.dev/pieces"
)

// simNet is a fluid network under the scheduler: a transfer flows at the max-min
// fair share of its sender's uplink and its receiver's downlink, and nothing else
// is a limit. Hosts follow decisions as Decision says; every message between a
// host and the scheduler takes latency.
type simNet struct {
	s       *Scheduler
	now     float64 // seconds
	latency float64
	events  simEvents
	made    int // events so far, to keep their order
	layout  pieces.Layout
	hosts   map[HostID]*simHost
	sent    map[HostID]int // pieces, by sender
	wasted  int            // pieces that came to who had them
	fetched int            // pieces the seed has from the origin
	fresh   []int          // how often each was assigned to the seed
	early   int            // assignments of a second copy to the seed while it had a piece sent to nobody
}

const simTask TaskID = 1

type simHost struct {
	id       HostID
	up, down simLink
	have     pieces.Set
	flows    []*simFlow // to it, in the order told
	joined   float64
	finished float64 // 0 before
	dead     bool    // and is not waited for
	gone     bool    // and cannot be reached
}

type simLink struct {
	rate  float64 // bytes per second
	level float64 // what a flow gets here at most
	flows []*simFlow
}

// simFlow is an assignment, running or waiting for the one before it.
type simFlow struct {
	d        Decision
	to, from *simHost
	piece    int     // the one that is coming
	left     float64 // bytes of it, at the time at
	at, rate float64
	running  bool
	arrival  *simEvent
}

type simEvent struct {
	at    float64
	order int
	do    func()
	index int // in the heap, -1 outside
}

type simEvents []*simEvent

func (e simEvents) Len() int { return len(e) }
func (e simEvents) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].order < e[j].order
}
func (e simEvents) Swap(i, j int) { e[i], e[j] = e[j], e[i]; e[i].index, e[j].index = i, j }
func (e *simEvents) Push(x any)   { v := x.(*simEvent); v.index = len(*e); *e = append(*e, v) }
func (e *simEvents) Pop() any {
	last := len(*e) - 1
	v := (*e)[last]
	*e, v.index = (*e)[:last], -1
	return v
}

func (n *simNet) after(d float64, do func()) *simEvent {
	n.made++
	ev := &simEvent{at: n.now + d, order: n.made, do: do}
	heap.Push(&n.events, ev)
	return ev
}

// tell runs an event of the scheduler and sends its decisions on their way.
func (n *simNet) tell(f func(now time.Time)) {
	f(time.Unix(0, 0).Add(time.Duration(n.now * float64(time.Second))))
	for _, d := range n.s.Decisions() {
		n.count(d)
		n.after(n.latency, func() { n.follow(d) })
	}
}

// count watches that the seed sends every piece once before it sends any twice.
func (n *simNet) count(d Decision) {
	if d.Kind != Assign || d.Parent != 0 {
		return
	}
	for i := d.First; i < d.First+d.Count; i++ {
		if n.fresh[i]++; n.fresh[i] > 1 && slices.Contains(n.fresh[:n.fetched], 0) {
			n.early++
		}
	}
}

// report is tell after the way from a host to the scheduler.
func (n *simNet) report(f func(now time.Time)) { n.after(n.latency, func() { n.tell(f) }) }

func (n *simNet) follow(d Decision) {
	h := n.hosts[d.Host]
	if h.gone {
		return
	}
	if d.Kind == Cancel {
		if i := slices.IndexFunc(h.flows, func(f *simFlow) bool { return f.d.Transfer == d.Transfer }); i >= 0 {
			n.stop(h.flows[i])
		}
		return
	}
	h.flows = append(h.flows, &simFlow{d: d, to: h, from: n.hosts[d.Parent], piece: d.First, left: float64(n.layout.Size(d.First))})
	n.startNext(h)
}

// startNext starts what has nothing to wait for.
func (n *simNet) startNext(h *simHost) {
	for _, f := range slices.Clone(h.flows) {
		waits := slices.ContainsFunc(h.flows, func(g *simFlow) bool { return g.d.Transfer == f.d.After })
		if !f.running && !waits && slices.Contains(h.flows, f) {
			n.start(f)
		}
	}
}

func (n *simNet) start(f *simFlow) {
	if f.from.gone {
		n.report(func(now time.Time) { n.s.Failed(now, f.to.id, f.d.Transfer, Gone, 0) })
		n.stop(f)
		return
	}
	f.running, f.at = true, n.now
	f.from.up.flows = append(f.from.up.flows, f)
	f.to.down.flows = append(f.to.down.flows, f)
	n.share(f)
}

func (n *simNet) stop(f *simFlow) {
	if f.arrival != nil && f.arrival.index >= 0 {
		heap.Remove(&n.events, f.arrival.index)
	}
	f.to.flows = without(f.to.flows, f)
	f.from.up.flows = without(f.from.up.flows, f)
	f.to.down.flows = without(f.to.down.flows, f)
	n.share(f)
	n.startNext(f.to)
}

// share finds the new levels of links after f came or went, from its own links
// outwards for as long as they change much.
func (n *simNet) share(f *simFlow) {
	links := []*simLink{&f.from.up, &f.to.down}
	for i := 0; i < len(links) && i < 60; i++ {
		l := links[i]
		was := l.level
		l.level = l.fill()
		if math.Abs(l.level-was) < 0.01*was {
			continue
		}
		for _, g := range l.flows {
			links = append(links, g.other(l))
		}
	}
	for _, l := range links {
		for _, g := range l.flows {
			n.flow(g, min(g.from.up.level, g.to.down.level))
		}
	}
}

func (f *simFlow) other(l *simLink) *simLink {
	if l == &f.to.down {
		return &f.from.up
	}
	return &f.to.down
}

// fill returns the level at which the link is full, given what its flows may
// have at their other ends.
func (l *simLink) fill() float64 {
	if len(l.flows) == 0 {
		return l.rate
	}
	ends := make([]float64, len(l.flows))
	for i, f := range l.flows {
		ends[i] = f.other(l).level
	}
	slices.Sort(ends)
	left := l.rate
	for i, end := range ends {
		if share := left / float64(len(ends)-i); end >= share {
			return share
		}
		left -= end
	}
	return ends[len(ends)-1] + left
}

// flow sets f's rate from now on.
func (n *simNet) flow(f *simFlow, rate float64) {
	f.left = max(f.left-f.rate*(n.now-f.at), 0)
	f.at, f.rate = n.now, rate
	if f.arrival != nil && f.arrival.index >= 0 {
		f.arrival.at = n.now + f.left/rate
		heap.Fix(&n.events, f.arrival.index)
		return
	}
	f.arrival = n.after(f.left/rate, func() { n.arrived(f) })
}

func (n *simNet) arrived(f *simFlow) {
	h, i := f.to, f.piece
	if !h.have.Add(i) {
		n.wasted++
	}
	n.sent[f.from.id]++
	if h.have.Full() && h.finished == 0 {
		h.finished = n.now
	}
	n.report(func(now time.Time) { n.s.Done(now, h.id, f.d.Transfer, i) })
	if f.piece++; f.piece == f.d.First+f.d.Count {
		n.stop(f)
		return
	}
	f.left, f.at, f.arrival = float64(n.layout.Size(f.piece)), n.now, nil
	n.flow(f, f.rate)
}

// kill ends a host without a word. The break of its session is noticed a second later.
func (n *simNet) kill(h *simHost) {
	h.dead, h.gone = true, true
	for len(h.flows) > 0 {
		n.stop(h.flows[0])
	}
	for len(h.up.flows) > 0 {
		f := h.up.flows[0]
		n.report(func(now time.Time) { n.s.Failed(now, f.to.id, f.d.Transfer, Gone, 0) })
		n.stop(f)
	}
	n.after(1, func() { n.tell(func(now time.Time) { n.s.HostDown(now, h.id) }) })
}

// hang stops a host's links; nobody is told.
func (n *simNet) hang(h *simHost) {
	h.dead = true
	h.up.rate, h.down.rate = 1, 1
	for _, l := range []*simLink{&h.up, &h.down} {
		for _, f := range l.flows {
			n.share(f)
		}
	}
}

// want reports what a reader of the task on h waits for.
func (n *simNet) want(h *simHost) {
	next := h.have.Run(0, h.have.Cap())
	if next < h.have.Cap() && !h.dead && n.now >= h.joined {
		n.report(func(now time.Time) { n.s.Want(now, h.id, simTask, next, 1) })
	}
}
