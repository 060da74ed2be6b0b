package scheduler

import (
	"slices"
	"time"
)

const (
	maxZones     = 256         // that the rule is for; hosts of further ones are as those of none
	minCrossings = 2           // transfers side by side into a zone, at least
	stuckAfter   = time.Second // without a piece, until who is sent none in its zone may do without
)

// A zone is what the hosts of one zone have of a task. Another is that of all
// hosts: it counts for everybody when the rule is off, and for those without a
// zone when it is on.
type zone struct {
	link    *link // into it; nil for that of all
	peers   int
	members bitset // their slots
	openers int    // of them, those that want the task, and send too

	// Of the hosts that are no seeds: how many have a piece, and how many have
	// it or have it on the way.
	holds, copies []int32 // by piece
	held, copied  bitset  // pieces where they are not 0

	// With a link: the copies with hosts that send, and the pieces that are not
	// to cross, because there is such a copy or a seed in the zone has them.
	served []int32
	barred bitset
}

// A link joins a zone to the others, for all tasks.
type link struct {
	name    string
	hosts   int // of the zone
	in, out gate
	pace    rate          // at which a piece comes in; 0 is not known yet
	came    time.Duration // when one last did
}

// A gate is how many transfers cross a link one way, and how many may.
type gate struct{ flows, window int }

func (g *gate) open() bool { return g.flows < g.window }

func newZone(n, words int, l *link) *zone {
	z := &zone{
		link: l, members: make(bitset, words),
		holds: make([]int32, n), copies: make([]int32, n), held: newBitset(n), copied: newBitset(n),
	}
	if l != nil {
		z.served, z.barred = make([]int32, n), newBitset(n)
	}
	return z
}

// enter gives p, who is new in its task, its zone.
func (t *task) enter(p *peer) {
	p.zone = t.all
	if l := p.host.link; l != nil {
		i := slices.IndexFunc(t.zones, func(z *zone) bool { return z.link == l })
		if i < 0 {
			i = len(t.zones)
			t.zones = append(t.zones, newZone(t.n, len(t.all.members), l))
		}
		p.zone = t.zones[i]
		p.zone.peers++
		p.zone.members.set(p.slot)
	}
	t.all.peers++
	t.all.members.set(p.slot)
}

// quit undoes enter, for a peer that has no piece and no transfer.
func (t *task) quit(p *peer) {
	t.all.peers--
	t.all.members.clear(p.slot)
	if z := p.zone; z != t.all {
		z.members.clear(p.slot)
		if z.peers--; z.peers == 0 {
			t.zones = without(t.zones, z)
		}
	}
}

// addCopy counts a copy of piece i that p has or that comes to it.
func (p *peer) addCopy(i int) {
	if p.host.doubted {
		return
	}
	p.task.all.addCopy(i)
	if z := p.zone; z.link != nil {
		z.addCopy(i)
		if p.host.up > 0 {
			z.served[i]++
			z.barred.set(i)
		}
	}
}

// dropCopy undoes addCopy. It tells whether there is none left where one was.
func (p *peer) dropCopy(i int) bool {
	if p.host.doubted {
		return false
	}
	last := p.task.all.dropCopy(i)
	if z := p.zone; z.link != nil {
		last = z.dropCopy(i) || last
		if p.host.up > 0 {
			z.served[i]--
			p.task.bar(z, i)
		}
	}
	return last
}

// bar finds anew whether piece i may cross into z.
func (t *task) bar(z *zone, i int) {
	if z.served[i] > 0 || slices.ContainsFunc(t.seeds, func(p *peer) bool { return p.zone == z && p.have.has(i) }) {
		z.barred.set(i)
	} else {
		z.barred.clear(i)
	}
}

func (z *zone) addCopy(i int) {
	if z.copies[i]++; z.copies[i] == 1 {
		z.copied.set(i)
	}
}

func (z *zone) dropCopy(i int) bool {
	if z.copies[i]--; z.copies[i] == 0 {
		z.copied.clear(i)
	}
	return z.copies[i] == 0
}

func (z *zone) addHolder(i int) {
	if z.holds[i]++; z.holds[i] == 1 {
		z.held.set(i)
	}
}

func (z *zone) dropHolder(i int) {
	if z.holds[i]--; z.holds[i] == 0 {
		z.held.clear(i)
	}
}

// crosses tells whether the rule is for what c gets from p.
func crosses(c, p *peer) bool { return c.zone.link != nil && c.zone != p.zone }

// barred returns the pieces that c may not get from p, nil for none.
func barred(c, p *peer) bitset {
	if crosses(c, p) {
		return c.zone.barred
	}
	return nil
}

// mayCross tells whether c may be the one to bring a piece into its zone. Not
// while enough are on their way, nor when it would keep it for itself, or for
// long, and others would not.
func (s *Scheduler) mayCross(c *peer) bool {
	z := c.zone
	return z.link.in.open() && (c.host.in == 0 || !s.slow(c.host.recvRate)) &&
		(c.host.up > 0 || z.openers == 0 || s.starves(c) && s.now-z.link.came > stuckAfter)
}

// mayLeave tells whether one transfer more may leave h's zone.
func (h *host) mayLeave() bool { return h.link == nil || h.link.out.open() }

// mayBring tells whether the rule lets c get from p what its zone lacks.
func (s *Scheduler) mayBring(c, p *peer) bool {
	return !crosses(c, p) || s.mayCross(c) && p.host.mayLeave()
}

// starves tells whether nothing has come to c for long, and nothing is to come.
func (s *Scheduler) starves(c *peer) bool {
	return c.host.in == 0 && s.now-max(c.host.lastRecv, c.since) > stuckAfter
}

// opens tells whether h brings pieces into its zone for others.
func (h *host) opens() bool { return h.up > 0 && h.down > 0 }

// stuck tells whether nobody in c's zone will send it piece i, which it waits
// for in vain: those who have it have failed it, are slow, or may not send.
func (s *Scheduler) stuck(c *peer, i int) bool {
	if !s.starves(c) {
		return false
	}
	t, holders := c.task, int32(0)
	for _, p := range t.seeds {
		if p.zone == c.zone && p.have.has(i) {
			return false
		}
	}
	for at := firstBoth(t.holders[i], c.zone.members, 0); at >= 0; {
		p := t.peers[at]
		if p.host.up > 0 {
			holders++
			if !p.host.banned && s.now >= p.host.sendRests && !s.slow(p.host.sendRate) && !s.shuns(c.host, p.host) {
				return false
			}
		}
		next := firstBoth(t.holders[i], c.zone.members, at+1)
		if next <= at {
			break
		}
		at = next
	}
	return c.zone.served[i] == holders
}

// crossed learns from a piece that tr took so long to bring across.
func (s *Scheduler) crossed(tr *transfer, took time.Duration, bytes int64) {
	l, lane := tr.link, s.typical.of(bytes)
	l.came = s.now
	l.slowed(took, bytes)
	l.in.learn(took, lane)
	if l := tr.parent.host.link; l != nil {
		l.out.learn(took, lane)
	}
}

// learn opens the gate for as many transfers side by side as find the link no
// narrower than a lane.
func (g *gate) learn(took, lane time.Duration) {
	switch {
	case took <= lane*3/2 || lane == 0:
		g.window = max(g.window, min(g.flows+1, g.window+1))
	case took > 3*lane:
		g.window = max(g.window-1, minCrossings)
	}
}

// slowed moves the pace quickly towards slower, so that what is late is late.
func (l *link) slowed(took time.Duration, bytes int64) {
	seen := rate(took) / rate(bytes)
	switch {
	case l.pace == 0:
		l.pace = seen
	case seen > l.pace:
		l.pace += (seen - l.pace) / 2
	default:
		l.pace += (seen - l.pace) / 8
	}
}

// abandon gives up a crossing that lags, so that another may be made: two of one
// piece never cross together. The next is given more time.
func (s *Scheduler) abandon(tr *transfer) {
	c, p := tr.child.host, tr.parent.host
	l, seen := tr.link, rate(s.now-tr.since)/rate(tr.child.task.layout.PieceSize)
	if l.pace == 0 {
		l.pace = seen
	}
	l.pace += (seen - l.pace) / 8
	if c.lastRecv <= tr.since && p.lastSent > tr.since {
		s.undelivered(c)
	}
	s.shun(c, p, goneFor)
	s.cancel(tr)
}
