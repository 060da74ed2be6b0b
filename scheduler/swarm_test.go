package scheduler

import (
	"container/heap"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"damselfly.dev/pieces"
)

// crowd is a scenario: hosts that want one task of a cold supernode, whose
// origin delivers at the rate of the supernode's link.
type crowd struct {
	hosts, pieces    int
	lanes, seedLanes int                 // 2 when not set
	link             float64             // bytes per second, 12.5e6 when not set
	seedLink, origin float64             // link when not set
	latency          float64             // of control messages, in piece times; 0.01 when not set
	scale            func(i int) float64 // of host i's link
	start            func(i int) float64 // when host i joins
	kill             func(i int) float64 // when host i dies, 0 for never
	hang             func(i int) float64 // when host i stops without dying, 0 for never
	reading          bool                // hosts tell what piece their reader waits at
	seed             uint64
}

type outcome struct {
	crowd
	net   *simNet
	hosts []*simHost
}

func orElse[T comparable](v *T, other T) {
	var zero T
	if *v == zero {
		*v = other
	}
}

// run simulates the crowd until every living host has everything.
func (c crowd) run(t *testing.T) outcome {
	t.Helper()
	orElse(&c.lanes, 2)
	orElse(&c.seedLanes, c.lanes)
	orElse(&c.link, 12.5e6)
	orElse(&c.seedLink, c.link)
	orElse(&c.origin, c.seedLink)
	orElse(&c.latency, 0.01)
	size := float64(pieces.MinPieceSize)
	n := &simNet{
		s:     New(DefaultConfig(), rand.New(rand.NewPCG(c.seed, 1))),
		hosts: map[HostID]*simHost{}, sent: map[HostID]int{},
		layout:  pieces.Layout{Length: int64(c.pieces) * pieces.MinPieceSize, PieceSize: pieces.MinPieceSize},
		latency: c.latency * size / c.link,
		fresh:   make([]int, c.pieces),
	}
	add := func(id HostID, link float64, spec Host) *simHost {
		h := &simHost{id: id, up: simLink{rate: link, level: link}, down: simLink{rate: link, level: link}, have: pieces.NewSet(c.pieces)}
		n.hosts[id] = h
		n.tell(func(now time.Time) { n.s.HostUp(now, id, spec) })
		return h
	}
	n.tell(func(now time.Time) { n.s.TaskAdd(now, simTask, n.layout) })
	seed := add(0, c.seedLink, Host{Up: c.seedLanes, Seed: true})
	n.tell(func(now time.Time) { n.s.Join(now, 0, simTask, seed.have) })
	for i := range c.pieces {
		n.after(float64(i+1)*size/c.origin, func() {
			n.fetched++
			n.tell(func(now time.Time) { n.s.Have(now, 0, simTask, i, 1) })
		})
	}
	o := outcome{crowd: c, net: n}
	for i := range c.hosts {
		h := add(HostID(i+1), c.linkOf(i), Host{Up: c.lanes, Down: c.lanes})
		o.hosts = append(o.hosts, h)
		if c.start != nil {
			h.joined = c.start(i)
		}
		n.after(h.joined, func() { n.tell(func(now time.Time) { n.s.Join(now, h.id, simTask, h.have) }) })
		if c.kill != nil && c.kill(i) > 0 {
			n.after(c.kill(i), func() { n.kill(h) })
		}
		if c.hang != nil && c.hang(i) > 0 {
			n.after(c.hang(i), func() { n.hang(h) })
		}
	}
	var tick func()
	tick = func() {
		n.tell(n.s.Tick)
		for _, h := range o.hosts {
			if c.reading {
				n.want(h)
			}
		}
		n.after(0.1, tick)
	}
	tick()
	for !o.done() {
		if n.now > 1e4*size*float64(c.pieces)/c.link {
			t.Fatal("somebody never ends")
		}
		ev := heap.Pop(&n.events).(*simEvent)
		n.now = ev.at
		ev.do()
	}
	return o
}

func (c crowd) linkOf(i int) float64 {
	if c.scale == nil {
		return c.link
	}
	return c.link * c.scale(i)
}

func (o outcome) done() bool {
	for _, h := range o.hosts {
		if !h.dead && h.finished == 0 {
			return false
		}
	}
	return true
}

func (o outcome) bytes() float64 { return float64(o.net.layout.Length) }

// efficiency is the fluid bound over the time of the last host.
func (o outcome) efficiency() float64 {
	slowest, sum, last := math.Inf(1), o.seedLink, 0.0
	for i, h := range o.hosts {
		slowest = min(slowest, o.linkOf(i))
		sum += o.linkOf(i)
		last = max(last, h.finished)
	}
	bound := o.bytes() * max(1/o.origin, 1/o.seedLink, 1/slowest, float64(o.crowd.hosts)/sum)
	return bound / last
}

// stretch is how many times longer than its own link demands the worst of the
// hosts took, from its start, among those the filter takes.
func (o outcome) stretch(filter func(i int) bool) float64 {
	worst := 0.0
	for i, h := range o.hosts {
		if !h.dead && (filter == nil || filter(i)) {
			worst = max(worst, (h.finished-h.joined)/(o.bytes()/o.linkOf(i)))
		}
	}
	return worst
}

func (o outcome) seedCopies() float64 { return float64(o.net.sent[0]) / float64(o.pieces) }

// expect fails unless got is in [low, high].
func expect(t *testing.T, what string, got, low, high float64) {
	t.Helper()
	t.Logf("%s %.3f", what, got)
	if !(got >= low && got <= high) {
		t.Errorf("%s is %.3f, want %.2f to %.2f", what, got, low, high)
	}
}

func TestFlashCrowd(t *testing.T) {
	for _, c := range []crowd{
		{hosts: 1, pieces: 256},
		{hosts: 2, pieces: 256},
		{hosts: 8, pieces: 256},
		{hosts: 16, pieces: 256},
		{hosts: 30, pieces: 256},
		{hosts: 300, pieces: 256},
		{hosts: 8, pieces: 256, lanes: 4},
		{hosts: 16, pieces: 256, lanes: 4},
		{hosts: 30, pieces: 256, lanes: 4},
		{hosts: 30, pieces: 256, lanes: 1},
		{hosts: 8, pieces: 256, latency: 0.1},
		{hosts: 16, pieces: 256, latency: 0.1},
		{hosts: 30, pieces: 256, latency: 0.1},
		{hosts: 30, pieces: 256, reading: true},
	} {
		t.Run(fmt.Sprintf("hosts=%d,lanes=%d,latency=%v,reading=%v", c.hosts, c.lanes, c.latency, c.reading), func(t *testing.T) {
			o := c.run(t)
			expect(t, "efficiency", o.efficiency(), 0.9, 1)
			expect(t, "seed copies", o.seedCopies(), 1, 1.15)
			expect(t, "pieces wasted", float64(o.net.wasted), 0, 0)
			expect(t, "second copies before all firsts", float64(o.net.early), 0, 0)
		})
	}
}

func TestFewPieces(t *testing.T) {
	o := crowd{hosts: 8, pieces: 4}.run(t)
	expect(t, "stretch", o.stretch(nil), 1, 3)
	o = crowd{hosts: 8, pieces: 1}.run(t)
	expect(t, "stretch of one piece", o.stretch(nil), 1, 6)
}

func TestUnequalLinks(t *testing.T) {
	fast := func(i int) bool { return i%3 != 0 }
	scale := func(i int) float64 {
		if fast(i) {
			return 1
		}
		return 0.25
	}
	for _, lanes := range []int{2, 4} {
		o := crowd{hosts: 15, pieces: 256, lanes: lanes, scale: scale}.run(t)
		expect(t, "stretch of the fast", o.stretch(fast), 1, 1.25)
		expect(t, "stretch of the slow", o.stretch(func(i int) bool { return !fast(i) }), 1, 1.15)
		expect(t, "seed copies", o.seedCopies(), 1, 1.15)
	}
}

// The others lose less than a tenth when one host is far slower than they are,
// or dies halfway.
func TestTrouble(t *testing.T) {
	calm := crowd{hosts: 15, pieces: 256}.run(t).stretch(nil)
	sick := func(i int) bool { return i == 4 }
	healthy := func(i int) bool { return !sick(i) }
	at := func(i int) float64 {
		if sick(i) {
			return 2.7
		}
		return 0
	}
	slow := crowd{hosts: 16, pieces: 256, scale: func(i int) float64 {
		if sick(i) {
			return 0.01
		}
		return 1
	}}.run(t)
	expect(t, "stretch beside a slow host", slow.stretch(healthy)/calm, 0.9, 1.1)
	expect(t, "stretch of the slow host", slow.stretch(sick), 1, 1.15)
	dead := crowd{hosts: 16, pieces: 256, kill: at}.run(t)
	expect(t, "stretch beside a dead host", dead.stretch(healthy)/calm, 0.9, 1.1)
	hung := crowd{hosts: 16, pieces: 256, hang: at}.run(t)
	expect(t, "stretch beside a host that hangs", hung.stretch(healthy)/calm, 0.9, 1.1)
}

func TestLateHosts(t *testing.T) {
	o := crowd{hosts: 16, pieces: 256, start: func(i int) float64 { return float64(i) }}.run(t)
	expect(t, "stretch of late hosts", o.stretch(nil), 1, 1.15)
	expect(t, "seed copies", o.seedCopies(), 1, 1.15)
	o = crowd{hosts: 16, pieces: 256, start: func(i int) float64 { return min(float64(i), 1) * 20 }}.run(t)
	expect(t, "stretch after the first host", o.stretch(nil), 1, 1.15)
	expect(t, "seed copies", o.seedCopies(), 1, 1.15)
}

func TestSeedOfAnotherSpeed(t *testing.T) {
	o := crowd{hosts: 16, pieces: 256, seedLink: 125e6, seedLanes: 20}.run(t)
	expect(t, "efficiency with a fast seed", o.efficiency(), 0.95, 1)
	o = crowd{hosts: 16, pieces: 256, origin: 6.25e6}.run(t)
	expect(t, "efficiency with a slow origin", o.efficiency(), 0.95, 1)
	expect(t, "seed copies", o.seedCopies(), 1, 1.15)
}
