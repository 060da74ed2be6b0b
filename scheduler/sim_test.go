package scheduler

import (
	"container/heap"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"damselfly.dev/pieces"
)

// net is a fluid network: a transfer flows at the max-min fair share of its
// sender's uplink and its receiver's downlink, nothing else is a limit. Hosts
// follow decisions as the real ones do: a worker for each download lane, what
// is told beyond that waits in order. Messages take latency each way.
type simNet struct {
	s                *Scheduler
	now              float64 // seconds
	events           simEvents
	hosts            map[HostID]*simHost
	latency          float64
	batch            float64
	pending          bool
	sameParent       bool // a worker goes on with the parent it has just had, where it can
	queueAtParent    bool // the other model: hosts ask at once, parents serve their lanes in order
	layout           pieces.Layout
	task             TaskID
	sent             map[HostID]int // pieces sent, by parent
	dup              int            // pieces that came to who had them
	cancels, assigns int
	seq              int
	late             map[TransferID]bool
}

type simLink struct {
	cap, level float64
	flows      []*simFlow
}

type simHost struct {
	id       HostID
	spec     Host
	up, down simLink
	have     pieces.Set
	queue    []*simFlow // told, in order; the first spec.Down flow
	serving  []*simFlow // asked of it, in order (queueAtParent)
	joined   float64
	finished float64
	dead     bool
}

type simFlow struct {
	d          Decision
	to, from   *simHost
	piece      int
	left, rate float64
	at         float64 // when left was right
	running    bool
	ended      bool
	ev         *simEvent
}

type simEvent struct {
	at    float64
	seq   int
	do    func()
	index int
}

type simEvents []*simEvent

func (e simEvents) Len() int { return len(e) }
func (e simEvents) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].seq < e[j].seq
}
func (e simEvents) Swap(i, j int) { e[i], e[j] = e[j], e[i]; e[i].index, e[j].index = i, j }
func (e *simEvents) Push(x any)   { v := x.(*simEvent); v.index = len(*e); *e = append(*e, v) }
func (e *simEvents) Pop() any {
	old := *e
	v := old[len(old)-1]
	*e = old[:len(old)-1]
	v.index = -1
	return v
}

func (n *simNet) after(d float64, do func()) *simEvent {
	n.seq++
	ev := &simEvent{at: n.now + d, seq: n.seq, do: do}
	heap.Push(&n.events, ev)
	return ev
}

func (n *simNet) time() time.Time {
	return time.Unix(0, 0).Add(time.Duration(n.now * float64(time.Second)))
}

// tell runs an event of the scheduler and sends its decisions on their way.
func (n *simNet) tell(f func(now time.Time)) {
	f(n.time())
	if n.pending {
		return
	}
	n.pending = true
	n.after(n.batch, func() {
		n.pending = false
		for _, d := range n.s.Decisions() {
			n.after(n.latency, func() { n.follow(d) })
		}
	})
}

// report is tell after the way from a host to the scheduler.
func (n *simNet) report(f func(now time.Time)) { n.after(n.latency, func() { n.tell(f) }) }

func (n *simNet) follow(d Decision) {
	h := n.hosts[d.Host]
	if h == nil || h.dead {
		return
	}
	if d.Kind == Cancel {
		n.cancels++
		for _, f := range h.queue {
			if f.d.Transfer == d.Transfer {
				n.stop(f)
				return
			}
		}
		return
	}
	n.assigns++
	f := &simFlow{d: d, to: h, from: n.hosts[d.Parent], piece: d.First, left: float64(n.layout.Size(d.First))}
	h.queue = append(h.queue, f)
	f.from.serving = append(f.from.serving, f)
	n.startNext(f.to, f.from)
}

// startNext starts what waited for a transfer that ended or never was.
func (n *simNet) startNext(to, from *simHost) {
	for _, f := range to.queue {
		if !f.running && !slices.ContainsFunc(to.queue, func(g *simFlow) bool { return g.d.Transfer == f.d.After }) {
			n.start(f)
			n.startNext(to, from)
			return
		}
	}
}

func (n *simNet) start(f *simFlow) {
	f.running, f.at = true, n.now
	if f.from.dead {
		n.report(func(now time.Time) { n.s.Failed(now, f.to.id, f.d.Transfer, Gone, 0) })
		n.stop(f)
		return
	}
	f.from.up.flows = append(f.from.up.flows, f)
	f.to.down.flows = append(f.to.down.flows, f)
	n.rates(f)
}

func (n *simNet) stop(f *simFlow) {
	f.ended = true
	if f.ev != nil && f.ev.index >= 0 {
		heap.Remove(&n.events, f.ev.index)
	}
	f.to.queue = without(f.to.queue, f)
	f.from.serving = without(f.from.serving, f)
	f.from.up.flows = without(f.from.up.flows, f)
	f.to.down.flows = without(f.to.down.flows, f)
	n.rates(f)
	n.startNext(f.to, f.from)
}

// rates finds new shares after a flow came or went.
func (n *simNet) rates(f *simFlow) {
	work := []*simLink{&f.from.up, &f.to.down}
	touched := map[*simLink]bool{work[0]: true, work[1]: true}
	order := []*simLink{work[0], work[1]}
	for i := 0; i < len(work) && i < 60; i++ {
		l := work[i]
		old := l.level
		l.level = l.fill()
		if math.Abs(l.level-old) < 0.01*old {
			continue
		}
		for _, g := range l.flows {
			o := &g.from.up
			if o == l {
				o = &g.to.down
			}
			work = append(work, o)
			if !touched[o] {
				touched[o] = true
				order = append(order, o)
			}
		}
	}
	for _, l := range order {
		for _, g := range l.flows {
			n.setRate(g, min(g.from.up.level, g.to.down.level))
		}
	}
}

// fill returns the level at which the link is full, given what its flows may
// have at their other ends.
func (l *simLink) fill() float64 {
	ends := make([]float64, len(l.flows))
	for i, f := range l.flows {
		o := &f.from.up
		if o == l {
			o = &f.to.down
		}
		ends[i] = o.level
	}
	slices.Sort(ends)
	left := l.cap
	for i, end := range ends {
		if share := left / float64(len(ends)-i); end >= share {
			return share
		}
		left -= end
	}
	if len(ends) == 0 {
		return l.cap
	}
	return ends[len(ends)-1] + left
}

func (n *simNet) setRate(f *simFlow, rate float64) {
	f.left -= f.rate * (n.now - f.at)
	f.at, f.rate = n.now, rate
	if f.ev != nil && f.ev.index >= 0 {
		f.ev.at = n.now + max(f.left, 0)/rate
		heap.Fix(&n.events, f.ev.index)
		return
	}
	f.ev = n.after(max(f.left, 0)/rate, func() { n.arrived(f) })
}

func (n *simNet) arrived(f *simFlow) {
	i := f.piece
	if !f.to.have.Add(i) {
		n.dup++
	}
	n.sent[f.from.id]++
	if f.to.have.Full() && f.to.finished == 0 {
		f.to.finished = n.now
	}
	n.report(func(now time.Time) { n.s.Done(now, f.to.id, f.d.Transfer, i) })
	f.piece++
	if f.piece == f.d.First+f.d.Count {
		n.stop(f)
		return
	}
	f.left, f.at = float64(n.layout.Size(f.piece)), n.now
	f.ev = nil
	n.setRate(f, f.rate)
}

// simSpec is a scenario.
type simSpec struct {
	hosts, pieces             int
	lanes                     int
	seedLanes                 int
	link                      float64 // bytes/s
	seedLink                  float64 // of the supernode, 0 for link
	origin                    float64 // bytes/s, 0 for seedLink
	warm                      bool
	latency                   float64 // of a piece time
	queueAtParent, sameParent bool
	batch                     float64
	scale                     func(i int) float64 // of a host's link
	start                     func(i int) float64 // seconds
	kill                      map[int]float64
	seed                      uint64
	cfg                       *Config
	wants                     bool
}

type simResult struct {
	bound, last float64
	net         *simNet
	hosts       []*simHost
}

func (r simResult) efficiency() float64 { return r.bound / r.last }
func (r simResult) seedCopies() float64 {
	return float64(r.net.sent[0]) / float64(r.net.layout.Count())
}

var probe func(n *simNet)

func simulate(spec simSpec) simResult {
	cfg := DefaultConfig()
	if spec.cfg != nil {
		cfg = *spec.cfg
	}
	size := float64(pieces.MinPieceSize)
	n := &simNet{
		s:      New(cfg, rand.New(rand.NewPCG(spec.seed, 1))),
		hosts:  map[HostID]*simHost{},
		layout: pieces.Layout{Length: int64(spec.pieces) * pieces.MinPieceSize, PieceSize: pieces.MinPieceSize},
		task:   1, sent: map[HostID]int{},
		latency: spec.latency * size / spec.link, queueAtParent: spec.queueAtParent, sameParent: spec.sameParent, batch: spec.batch,
	}
	if spec.seedLink == 0 {
		spec.seedLink = spec.link
	}
	if spec.origin == 0 {
		spec.origin = spec.seedLink
	}
	if spec.seedLanes == 0 {
		spec.seedLanes = spec.lanes
	}
	add := func(id HostID, link float64, h Host) *simHost {
		x := &simHost{id: id, spec: h, up: simLink{cap: link, level: link}, down: simLink{cap: link, level: link}, have: pieces.NewSet(spec.pieces)}
		n.hosts[id] = x
		n.tell(func(now time.Time) { n.s.HostUp(now, id, h) })
		return x
	}
	seed := add(0, spec.seedLink, Host{Up: spec.seedLanes, Seed: true})
	n.tell(func(now time.Time) { n.s.TaskAdd(now, n.task, n.layout) })
	if spec.warm {
		seed.have = pieces.FullSet(spec.pieces)
	}
	n.tell(func(now time.Time) { n.s.Join(now, 0, n.task, seed.have) })
	for i := range spec.pieces {
		if !spec.warm {
			n.after(float64(i+1)*size/spec.origin, func() {
				n.tell(func(now time.Time) { n.s.Have(now, 0, n.task, i, 1) })
			})
		}
	}
	if probe != nil {
		probe(n)
	}
	r := simResult{net: n}
	slowest, sum := math.Inf(1), spec.seedLink
	for i := 1; i <= spec.hosts; i++ {
		link := spec.link
		if spec.scale != nil {
			link *= spec.scale(i)
		}
		h := add(HostID(i), link, Host{Up: spec.lanes, Down: spec.lanes})
		r.hosts = append(r.hosts, h)
		slowest = min(slowest, link)
		sum += link
		if spec.start != nil {
			h.joined = spec.start(i)
		}
		n.after(h.joined, func() {
			n.tell(func(now time.Time) { n.s.Join(now, h.id, n.task, h.have) })
		})
		if at, ok := spec.kill[i]; ok {
			n.after(at, func() { n.kill(h) })
		}
	}
	total := float64(n.layout.Length)
	r.bound = max(total/spec.seedLink, total/spec.origin, total/slowest, total*float64(spec.hosts)/sum)
	var tick func()
	tick = func() {
		n.tell(n.s.Tick)
		if spec.wants {
			for _, h := range r.hosts {
				next := 0
				for h.have.Has(next) {
					next++
				}
				if next < spec.pieces {
					n.tell(func(now time.Time) { n.s.Want(now, h.id, n.task, next, 1) })
				}
			}
		}
		n.after(0.1, tick)
	}
	tick()
	for n.events.Len() > 0 && !r.done() && n.now < 1000*r.bound {
		ev := heap.Pop(&n.events).(*simEvent)
		n.now = ev.at
		ev.do()
	}
	for _, h := range r.hosts {
		if !h.dead {
			if h.finished == 0 {
				h.finished = math.Inf(1)
			}
			r.last = max(r.last, h.finished)
		}
	}
	return r
}

func (n *simNet) kill(h *simHost) {
	h.dead = true
	for len(h.queue) > 0 {
		n.stop(h.queue[0])
	}
	for _, f := range append([]*simFlow(nil), h.up.flows...) {
		n.stop(f)
	}
	n.after(1, func() { n.tell(func(now time.Time) { n.s.HostDown(now, h.id) }) })
}

func (r simResult) done() bool {
	for _, h := range r.hosts {
		if !h.dead && h.finished == 0 {
			return false
		}
	}
	return true
}
