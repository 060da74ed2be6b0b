package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"damselfly.dev/pieces"
	"damselfly.dev/scheduler"
)

const (
	task = scheduler.TaskID(1)

	tickEvery = 0.1 // seconds, as the supernode does
	downAfter = 1.0 // seconds from a host's death to the end of its session
	soon      = -1  // the piece of a report that a transfer ends soon

	// reportPart is how much of the time that a report may wait it waits at most.
	reportPart = 0.5
)

// network is a scenario under way. Hosts follow decisions as scheduler.Decision
// says. Times are seconds since its begin.
type network struct {
	Scenario
	sched *scheduler.Scheduler
	now   float64
	nodes []*node // by HostID: the seeds and then the hosts
	first int     // of the hosts
	zones map[string]*[2]link

	timers   timers
	arrivals arrivals
	requests line[request]
	up       line[report]
	down     line[order]
	free     float64 // when the scheduler has time for the next report

	dirty []*link
	ends  []float64
	// fair finds the new rates after a flow came or went.
	fair func(f *flow)

	waiting  int   // hosts that live and lack something
	fetched  int   // pieces the seeds have from the origin
	fresh    []int // how often each was assigned to a seed
	received int64 // bytes by all hosts
	second   int   // the present one,
	assigned int   // and what was assigned in it
	result   Result
}

// node is a host or a seed.
type node struct {
	Host
	id       scheduler.HostID
	up, down link
	have     pieces.Set
	waits    []*flow  // from it, for pieces that are about to come to it
	said     []report // that go with the next one, or a while after they were made
	flows    []*flow  // to it, in the order told
	sends    []*flow  // from it, those that wait for their first byte or flow
	joined   bool
	dead     bool // and is not waited for
	gone     bool // and cannot be reached
	result   *HostResult
}

// flow is an assignment: it waits for its first byte, then it flows.
type flow struct {
	d        scheduler.Decision
	to, from *node
	links    [maxCrossed]*link
	slot     [maxCrossed]int // in the links' flows
	crossed  int
	piece    int     // the one that is coming
	left     float64 // bytes of it, at the time since
	since    float64
	rate     float64
	due      float64 // when the piece will have come, or the flow is to end soon
	place    int     // in arrivals, or -1
	soon     bool    // that it ends soon was told
	started  bool
	flowing  bool
	stopped  bool
}

type (
	// report is on its way to the scheduler.
	report struct {
		at    float64
		made  float64
		host  scheduler.HostID
		id    scheduler.TransferID
		piece int                             // or soon
		do    func(now time.Time, s *network) // then
	}
	// order is on its way to a host.
	order struct {
		at float64
		d  scheduler.Decision
	}
	// request is a flow that waits for its first byte.
	request struct {
		at float64
		f  *flow
	}
)

func newNetwork(s Scenario) *network {
	n := &network{
		Scenario: s, first: len(s.Seeds), waiting: len(s.Hosts),
		sched: scheduler.New(s.Policy, rand.New(rand.NewPCG(s.Random, 1))),
		zones: map[string]*[2]link{},
		fresh: make([]int, s.Layout.Count()),
		result: Result{
			Hosts: make([]HostResult, len(s.Hosts)), Into: map[string]int64{},
		},
	}
	n.fair = n.local
	n.result.Bound, n.result.Limit = s.bound()
	n.sched.TaskAdd(n.time(), task, s.Layout)
	for _, h := range s.Seeds {
		h.Seed = true
		node := n.add(h, &HostResult{})
		n.tell(func(now time.Time) { n.sched.Join(now, node.id, task, node.have) })
	}
	for i := range s.Layout.Count() {
		at := float64(s.Layout.Offset(i+1)) / s.Origin
		n.timers.set(at, func() {
			n.fetched++
			seed := n.nodes[i%len(s.Seeds)].id
			n.tell(func(now time.Time) { n.sched.Have(now, seed, task, i, 1) })
		})
	}
	for i, h := range s.Hosts {
		x := n.add(h, &n.result.Hosts[i])
		if h.Rogue != "" {
			n.intrude(x)
			continue
		}
		n.live(x)
	}
	n.timers.set(0, n.tick)
	return n
}

func (n *network) add(h Host, r *HostResult) *node {
	x := &node{
		Host: h, id: scheduler.HostID(len(n.nodes)), have: pieces.NewSet(n.Layout.Count()), result: r,
		up: link{rate: h.Uplink, level: h.Uplink}, down: link{rate: h.Downlink, level: h.Downlink},
	}
	n.nodes = append(n.nodes, x)
	if n.zones[h.Zone] == nil {
		n.zones[h.Zone] = &[2]link{{rate: n.ZoneLink, level: n.ZoneLink}, {rate: n.ZoneLink, level: n.ZoneLink}}
	}
	n.tell(func(now time.Time) { n.sched.HostUp(now, x.id, h.Host) })
	return x
}

// live sets what x does at which time.
func (n *network) live(x *node) {
	n.timers.set(x.Arrives.Seconds(), func() {
		if x.dead {
			return
		}
		x.joined = true
		n.report(func(now time.Time, n *network) { n.sched.Join(now, x.id, task, x.have) })
	})
	if x.Dies > 0 {
		n.timers.set(x.Dies.Seconds(), func() { n.kill(x) })
	}
	if x.Hangs > 0 {
		n.timers.set(x.Hangs.Seconds(), func() { n.hang(x) })
	}
}

func (n *network) run(ctx context.Context) (Result, error) {
	limit := 100*n.result.Bound.Seconds() + 60
	for n.waiting > 0 {
		if n.now > limit {
			return Result{}, fmt.Errorf("%d hosts lack something after %v", n.waiting, seconds(n.now))
		}
		if err := ctx.Err(); err != nil {
			return Result{}, err
		}
		next := n.now + tickEvery
		for k := 0; k < 1000 && n.now < next && n.waiting > 0; k++ {
			n.step()
		}
	}
	n.result.Busiest = max(n.result.Busiest, n.assigned)
	for _, x := range n.nodes[:n.first] {
		n.result.SeedBytes += x.result.Sent
	}
	return n.result, nil
}

// step lets the next thing happen. There is one: the tick.
func (n *network) step() {
	at, next := n.timers.list[0].at, 0
	if len(n.arrivals) > 0 && n.arrivals[0].due < at {
		at, next = n.arrivals[0].due, 1
	}
	if n.requests.len() > 0 && n.requests.head().at < at {
		at, next = n.requests.head().at, 2
	}
	if n.down.len() > 0 && n.down.head().at < at {
		at, next = n.down.head().at, 3
	}
	if n.up.len() > 0 {
		if t := max(n.up.head().at, n.free); t < at {
			at, next = t, 4
		}
	}
	n.now = max(n.now, at)
	switch next {
	case 0:
		n.timers.next()()
	case 1:
		n.arrived(n.arrivals[0])
	case 2:
		n.begin(n.requests.pop().f)
	case 3:
		n.follow(n.down.pop().d)
	case 4:
		r := n.up.pop()
		n.tell(func(now time.Time) {
			if r.do != nil {
				r.do(now, n)
				return
			}
			if r.piece == soon {
				n.sched.Soon(now, r.host, r.id)
				return
			}
			n.sched.Done(now, r.host, r.id, r.piece, seconds(n.now-r.made))
		})
	}
}

func (n *network) time() time.Time { return time.Unix(0, 0).Add(time.Duration(n.now * 1e9)) }

// tell runs an event of the scheduler and sends its decisions on their way.
func (n *network) tell(f func(now time.Time)) {
	f(n.time())
	for _, d := range n.sched.Decisions() {
		n.count(d)
		if n.Decisions > 0 {
			n.free = max(n.free, n.now) + 1/n.Decisions
		}
		n.down.push(order{max(n.now, n.free) + n.Control.Seconds(), d})
	}
}

func (n *network) count(d scheduler.Decision) {
	if d.Kind != scheduler.Assign {
		return
	}
	n.result.Assigned++
	if s := int(n.now); s != n.second {
		n.result.Busiest = max(n.result.Busiest, n.assigned)
		n.second, n.assigned = s, 0
	}
	n.assigned++
	if !n.nodes[d.Parent].Seed {
		return
	}
	for i := d.First; i < d.First+d.Count; i++ {
		if n.fresh[i]++; n.fresh[i] > 1 && slices.Contains(n.fresh[:n.fetched], 0) {
			n.result.Early++
		}
	}
}

// report is tell after the way from a host to the scheduler.
func (n *network) report(do func(now time.Time, n *network)) { n.say(nil, report{do: do}) }

// say sends r on its way from x, after what waits to be said.
func (n *network) say(x *node, r report) {
	r.at, r.made = n.now+n.Control.Seconds(), n.now
	if x != nil {
		n.flush(x)
	}
	n.up.push(r)
}

// done reports a piece that f brings. When it is known that f ends soon that can
// wait for the next report.
func (n *network) done(f *flow) {
	x, r := f.to, report{made: n.now, host: f.to.id, id: f.d.Transfer, piece: f.piece}
	if !f.soon {
		n.say(x, r)
		return
	}
	if x.said = append(x.said, r); len(x.said) == 1 {
		n.timers.set(n.now+n.Policy.Report.Seconds()*reportPart, func() { n.flush(x) })
	}
}

func (n *network) flush(x *node) {
	for _, r := range x.said {
		r.at = n.now + n.Control.Seconds()
		n.up.push(r)
	}
	x.said = x.said[:0]
}

func (n *network) tick() {
	n.tell(n.sched.Tick)
	if n.Reading {
		for _, x := range n.nodes[n.first:] {
			n.want(x)
		}
	}
	if n.Progress != nil {
		n.Progress(seconds(n.now), float64(n.received)/float64(n.Layout.Length)/float64(len(n.Hosts)))
	}
	n.timers.set(n.now+tickEvery, n.tick)
}

// want reports what a reader of the task on x waits for.
func (n *network) want(x *node) {
	next := x.have.Run(0, x.have.Cap())
	if next < x.have.Cap() && !x.dead && x.joined {
		n.report(func(now time.Time, n *network) { n.sched.Want(now, x.id, task, scheduler.Run{First: next, Count: 1}) })
	}
}

func (n *network) follow(d scheduler.Decision) {
	x := n.nodes[d.Host]
	if x.gone {
		return
	}
	if d.Kind == scheduler.Cancel {
		if i := slices.IndexFunc(x.flows, func(f *flow) bool { return f.d.Transfer == d.Transfer }); i >= 0 {
			n.stop(x.flows[i])
		}
		return
	}
	f := &flow{d: d, to: x, from: n.nodes[d.Parent], piece: d.First, place: -1}
	x.flows = append(x.flows, f)
	if x.Rogue != "" {
		n.cheat(f)
		return
	}
	n.start(f)
}

// start has f ask for its pieces, after those it has already.
func (n *network) start(f *flow) {
	if n.skip(f) {
		return
	}
	if f.from.gone {
		n.fail(f)
		return
	}
	f.started = true
	f.from.sends = append(f.from.sends, f)
	n.requests.push(request{n.now + n.Request.Seconds(), f})
}

// skip reports the pieces from f's on that its host has, and tells whether f has
// ended with them.
func (n *network) skip(f *flow) bool {
	for ; f.piece < f.d.First+f.d.Count; f.piece++ {
		if !f.to.have.Has(f.piece) {
			return false
		}
		n.done(f)
	}
	n.stop(f)
	return true
}

func (n *network) fail(f *flow) { n.failed(f, scheduler.Gone) }

// failed ends f and says why.
func (n *network) failed(f *flow, why scheduler.Failure) {
	n.report(func(now time.Time, n *network) { n.sched.Failed(now, f.to.id, f.d.Transfer, why, 0) })
	n.stop(f)
}

// begin lets f flow: its first byte comes.
func (n *network) begin(f *flow) {
	if f.stopped {
		return
	}
	if f.from.Rogue != "" && f.from.Rogue != Wrong {
		n.deceive(f)
		return
	}
	if !f.from.Seed && !f.there() {
		f.from.waits = append(f.from.waits, f)
		return
	}
	add := func(l *link) { f.links[f.crossed] = l; f.crossed++ }
	add(&f.from.up)
	if n.ZoneLink > 0 && f.from.Zone != f.to.Zone {
		add(&n.zones[f.from.Zone][0])
		add(&n.zones[f.to.Zone][1])
	}
	add(&f.to.down)
	f.flowing, f.since, f.left = true, n.now, float64(n.Layout.Size(f.piece))
	f.attach()
	n.fair(f)
}

// there tells whether f's parent has all that f has still to bring.
func (f *flow) there() bool {
	n := f.d.First + f.d.Count - f.piece
	return f.from.have.Run(f.piece, n) == n
}

// came lets those begin that wait for a piece that x has now.
func (n *network) came(x *node) {
	waits := x.waits
	x.waits = nil
	for _, f := range waits {
		n.begin(f)
	}
}

// stop ends f.
func (n *network) stop(f *flow) {
	f.stopped = true
	f.from.waits = without(f.from.waits, f)
	f.to.flows = without(f.to.flows, f)
	if f.started {
		f.from.sends = without(f.from.sends, f)
	}
	if f.flowing {
		f.flowing = false
		n.arrivals.remove(f)
		f.detach()
		n.fair(f)
	}
}

func without(list []*flow, f *flow) []*flow {
	if i := slices.Index(list, f); i >= 0 {
		return slices.Delete(list, i, i+1)
	}
	return list
}

// setRate sets f's rate from now on.
func (n *network) setRate(f *flow, rate float64) {
	if rate == f.rate {
		return
	}
	f.left = max(f.left-f.rate*(n.now-f.since), 0)
	f.since, f.rate = n.now, rate
	n.expect(f)
}

// expect sets when something of f is to be told next.
func (n *network) expect(f *flow) {
	f.due = n.now + max(f.left-n.lead(f), 0)/f.rate
	n.arrivals.fix(f)
}

// lead is how many bytes before its end f is told to end soon: as many as come
// until the next transfer's first byte, which dfget knows by what it measures. 0
// when f is not in its last piece, or was told.
func (n *network) lead(f *flow) float64 {
	if f.soon || f.piece+1 < f.d.First+f.d.Count {
		return 0
	}
	return min((2*n.Control+n.Request).Seconds()*f.rate, float64(n.Layout.Size(f.piece))/2)
}

// arrived notes the piece that f has brought, or that it will end soon.
func (n *network) arrived(f *flow) {
	if n.lead(f) > 0 {
		f.left, f.since, f.soon = max(f.left-f.rate*(n.now-f.since), 0), n.now, true
		n.say(f.to, report{host: f.to.id, id: f.d.Transfer, piece: soon})
		n.expect(f)
		return
	}
	if f.from.Rogue == Wrong {
		n.failed(f, scheduler.Corrupt)
		return
	}
	x, size := f.to, n.Layout.Size(f.piece)
	f.from.result.Sent += size
	x.result.Received += size
	n.received += size
	if f.from.Zone != x.Zone {
		n.result.Into[x.Zone] += size
	}
	if !x.have.Add(f.piece) {
		n.result.Wasted++
	}
	if x.have.Full() && x.result.Done == 0 {
		x.result.Done = seconds(n.now)
		if !x.dead {
			n.waiting--
			n.result.Last = x.result.Done
		}
	}
	n.done(f)
	n.came(x)
	if f.piece++; f.piece == f.d.First+f.d.Count {
		n.stop(f)
		return
	}
	f.left, f.since = float64(n.Layout.Size(f.piece)), n.now
	n.expect(f)
}

// lost no longer waits for x.
func (n *network) lost(x *node) {
	if !x.dead && x.result.Done == 0 {
		n.waiting--
	}
	x.dead = true
}

// kill ends a host without a word. Who gets something from it notices at once.
func (n *network) kill(x *node) {
	n.lost(x)
	x.gone = true
	for len(x.flows) > 0 {
		n.stop(x.flows[len(x.flows)-1])
	}
	for len(x.sends) > 0 {
		n.fail(x.sends[0])
	}
	n.timers.set(n.now+downAfter, func() { n.tell(func(now time.Time) { n.sched.HostDown(now, x.id) }) })
}

// hang stops a host's links. Nobody is told.
func (n *network) hang(x *node) {
	n.lost(x)
	for _, l := range []*link{&x.up, &x.down} {
		l.rate, l.change = 1, 1
		for _, f := range slices.Clone(l.flows) {
			n.fair(f)
		}
	}
}
