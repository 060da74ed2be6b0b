package scheduler

import "damselfly.dev/pieces"

const (
	// looks is how many of the hungry, or of those with room, one search looks
	// at before it gives up: the work for an event is bounded, and Tick comes
	// back to who was passed over.
	looks = 16
	// choices is of how many that will do the best is taken.
	choices = 4
)

// childFor returns somebody hungry that p has a piece for, or nil: to bring it
// into a zone, the next that has use for it, else in its own. A seed looks in its
// own zone first.
func (s *Scheduler) childFor(p *peer) *peer {
	t := p.task
	if t.hungry.n == 0 || p.has == 0 {
		return nil
	}
	if p.host.seed {
		if c := s.childIn(p.zone, p); c != nil {
			return c
		}
	}
	for range t.zones {
		if !p.host.mayLeave() {
			break
		}
		t.turn++
		z := t.zones[t.turn%len(t.zones)]
		if z != p.zone && z.link.in.open() && firstOnly(p.have, z.barred, 0) >= 0 {
			if c := s.childIn(z, p); c != nil {
				return c
			}
		}
	}
	if !p.host.seed {
		if c := s.childIn(p.zone, p); c != nil {
			return c
		}
	}
	if p.zone != t.all {
		return s.childIn(t.all, p) // who has no zone
	}
	return nil
}

// childIn returns the best of a few random hungry peers of the zone that p has a
// piece for, or nil.
func (s *Scheduler) childIn(z *zone, p *peer) *peer {
	t := p.task
	var best *peer
	rank, found := 0, 0
	slots := len(t.peers)
	if h := p.host; len(h.ups) > h.out+h.leaving {
		slots = t.all.peers // the first to come are no more likely than others: some of them are late
	}
	at := s.rnd.IntN(slots)
	for range min(looks, t.hungry.n) {
		if at = t.hungry.first(t.hungry.bitset, z.members, at); at < 0 {
			break
		}
		c := t.peers[at]
		at++
		if c.needs == 0 || !s.receives(c.host) {
			t.hungry.remove(c.slot)
			continue
		}
		if s.shuns(c.host, p.host) || firstBut(c.need, p.have, barred(c, p), 0) < 0 || crosses(c, p) && !s.mayCross(c) {
			continue
		}
		if r := s.childRank(c, p.host); best == nil || r > rank {
			best, rank = c, r
		}
		if c.host.idles() {
			continue // it is taken when there is no other
		}
		if found++; found == choices {
			break
		}
	}
	return best
}

// childRank is highest for who gets nothing from the parent yet, then for who is
// fast, then for who gets nothing at all, then for who is near, and then for who
// needs most. With a seed, for who is fast before all else: what it sends to
// nobody else is soon had from a fast host.
func (s *Scheduler) childRank(c *peer, parent *host) int {
	class := s.class(c.host.recvRate)
	rank := c.needs + near(c.host, parent)*rankUnit + class*8*rankUnit
	if c.host.in == 0 {
		rank += 4 * rankUnit
	}
	if !c.host.idles() {
		rank += 512 * rankUnit
	}
	if !c.host.gets(parent) {
		rank += 32 * rankUnit
	}
	if parent.seed {
		rank += class * 64 * rankUnit
	}
	return rank
}

// rankUnit is more than the needs of a peer and the lanes of a host.
const rankUnit = pieces.MaxPieces + 1

// parentFor returns the best of a few random holders of piece i in the zone that
// have room, or nil.
func (s *Scheduler) parentFor(c *peer, i int, z *zone) *peer {
	t := c.task
	if t.room.n == 0 {
		return nil
	}
	var best *peer
	rank, found := 0, 0
	at := s.rnd.IntN(len(t.peers))
	for range min(looks, t.room.n) {
		if at = t.room.first(t.holders[i], z.members, at); at < 0 {
			break
		}
		p := t.peers[at]
		at++
		if !s.hasRoom(p) || s.shuns(c.host, p.host) || crosses(c, p) && !p.host.mayLeave() {
			continue
		}
		if r := s.parentRank(p.host, c.host); best == nil || r > rank {
			best, rank = p, r
		}
		if found++; found == choices {
			break
		}
	}
	return best
}

// parentRank is highest for who sends the child nothing yet, then for who is not
// slow, then for who is near, and then for who has most lanes free.
func (s *Scheduler) parentRank(p, child *host) int {
	rank := p.lent - p.out + near(p, child)*rankUnit
	if !s.slow(p.sendRate) {
		rank += 4 * rankUnit
	}
	if !p.doubted {
		rank += 16 * rankUnit
	}
	if !child.gets(p) {
		rank += 8 * rankUnit
	}
	return rank
}

// hasRoom tells whether p, who was found in the room of its task, belongs there.
// When not, it looks for the hungry once it does.
func (s *Scheduler) hasRoom(p *peer) bool {
	if s.sends(p.host) {
		return true
	}
	p.task.room.remove(p.slot)
	s.offer(p)
	return false
}

// feed makes somebody send c something: what its reader waits for, what the
// seeds have sent to nobody, the rarest of a sample, or, when no other has a
// lane for it, one more copy from a seed.
func (s *Scheduler) feed(c *peer) bool {
	if c.needs == 0 {
		return false
	}
	slow := s.class(c.host.recvRate) < usual
	return s.feedWanted(c) || !slow && s.feedFirst(c) || s.feedRare(c) || slow && s.feedFirst(c) || s.feedAgain(c)
}

// feedFirst looks for what is to be the first copy, in the region or the zone.
func (s *Scheduler) feedFirst(c *peer) bool { return s.feedFresh(c) || s.feedAcross(c) }

// feedWanted looks for a parent for the first pieces c's reader waits for.
func (s *Scheduler) feedWanted(c *peer) bool {
	at := 0
	for range s.cfg.Sample {
		i := c.wanted(c.need, at)
		if i < 0 {
			return false
		}
		if p := s.parentFor(c, i, s.sourceOf(c, i)); p != nil {
			s.assignRun(c, p, i)
			return true
		}
		if !c.zone.copied.has(i) && s.feedFresh(c) {
			return true
		}
		at = i + 1
	}
	return false
}

// sourceOf returns the zone in which to look for piece i for c.
func (s *Scheduler) sourceOf(c *peer, i int) *zone {
	if c.zone.link != nil && !c.zone.barred.has(i) && s.mayCross(c) {
		return c.task.all
	}
	return c.zone
}

// feedAcross looks in other zones for pieces that c's lacks, from the rarest on,
// or for those that nobody there will send it.
func (s *Scheduler) feedAcross(c *peer) bool {
	t := c.task
	if c.zone.link == nil || t.room.n == 0 || !s.mayCross(c) {
		return false
	}
	s.draw(c.need, t.all.held, c.zone.barred, t.all.copies)
	free := len(s.sample)
	if free == 0 {
		s.draw(c.need, t.all.held, nil, t.all.copies)
	}
	for _, x := range s.sample {
		if free == 0 && !s.stuck(c, x.piece) {
			continue
		}
		if p := s.parentFor(c, x.piece, t.all); p != nil {
			s.assign(c, p, x.piece, 1)
			return true
		}
	}
	return false
}

// feedFresh has a seed send c a piece of which there is no copy.
func (s *Scheduler) feedFresh(c *peer) bool {
	for _, p := range c.task.seeds {
		if i := s.freshFor(c, p); i >= 0 && s.seedSends(p, c) && s.mayBring(c, p) {
			s.assignRun(c, p, i)
			return true
		}
	}
	return false
}

// freshFor returns a piece of which there is no copy for c to get from a seed:
// one its reader waits for, else the next round the task; or -1.
func (s *Scheduler) freshFor(c, seed *peer) int {
	t, copied := c.task, copied(c, seed)
	if c.lazy {
		return firstBut(c.need, seed.have, copied, 0)
	}
	if i := c.wanted(seed.have, 0); i >= 0 && !copied.has(i) {
		return i
	}
	at := t.fresh
	for range s.cfg.Sample {
		i := firstOnly(seed.have, copied, at)
		if i < 0 || c.need.has(i) {
			return i
		}
		at = i + 1
	}
	return -1
}

// copied returns the pieces that c is not the first to have if it gets them from
// p: the first in p's zone when that is its own.
func copied(c, p *peer) bitset {
	if c.zone == p.zone {
		return c.zone.copied
	}
	return c.task.all.copied
}

// seedSends tells whether a seed may send to c. When it has no lane it looks
// for the hungry once it has.
func (s *Scheduler) seedSends(p, c *peer) bool {
	if !s.sends(p.host) {
		s.offer(p)
		return false
	}
	return !s.shuns(c.host, p.host)
}

// feedRare looks at a sample of the pieces that c needs and others have, from
// the rarest on, for one that has a holder with room; and if it finds none, at a
// few who have room, for any piece.
func (s *Scheduler) feedRare(c *peer) bool {
	t := c.task
	if t.room.n == 0 {
		return false
	}
	s.draw(c.need, c.zone.held, nil, c.zone.copies)
	for _, x := range s.sample {
		if p := s.parentFor(c, x.piece, c.zone); p != nil {
			s.assignRun(c, p, x.piece)
			return true
		}
	}
	if len(s.sample) < s.cfg.Sample {
		return false // that was all there is
	}
	at := s.rnd.IntN(len(t.peers))
	for range min(looks, t.room.n) {
		if at = t.room.first(t.room.bitset, c.zone.members, at); at < 0 {
			return false
		}
		p := t.peers[at]
		at++
		if s.hasRoom(p) && !s.shuns(c.host, p.host) && firstBoth(c.need, p.have, 0) >= 0 {
			s.assignRun(c, p, s.pieceFor(c, p))
			return true
		}
	}
	return false
}

// feedAgain has a seed send c a piece that others have as well: only when none
// of them has a lane for it (which the caller has tried), the seed has sent all
// it has once, and both have a lane idle. As long as the seed still gets pieces
// itself, all their lanes must be; but who is lazy has a reader waiting.
func (s *Scheduler) feedAgain(c *peer) bool {
	t := c.task
	for _, p := range t.seeds {
		idle := len(p.host.ups) == p.host.leaving && len(c.host.downs) == c.host.ending && s.now-c.host.lastRecv > s.cfg.LagFloor
		if p.has < t.n && !idle && !c.lazy || !s.seedSends(p, c) || s.freshFor(c, p) >= 0 || !s.mayBring(c, p) {
			s.offer(p)
			continue
		}
		if firstBut(c.need, p.have, barred(c, p), 0) >= 0 {
			s.assignRun(c, p, s.pieceFor(c, p))
			return true
		}
	}
	return false
}

// pieceFor returns the piece for c to get from p: one its reader waits for,
// else the rarest of a sample. There is one.
func (s *Scheduler) pieceFor(c, p *peer) int {
	no := barred(c, p)
	if i := c.wanted(p.have, 0); i >= 0 && (no == nil || !no.has(i)) {
		return i
	}
	copies := c.zone.copies
	if no != nil {
		copies = c.task.all.copies
	}
	s.draw(c.need, p.have, no, copies)
	return s.sample[0].piece
}

// wanted returns the first piece from at on that c needs, its reader waits for
// and is in the set, or -1.
func (c *peer) wanted(set bitset, at int) int {
	if c.want == nil {
		return -1
	}
	return firstOfAll(c.need, set, c.want, at)
}

// candidate is a piece that may be assigned, and how many copies there are.
type candidate struct {
	piece  int
	copies int32
}

// draw fills s.sample with pieces at random that are in a and b and not in but,
// the rarest first, equals in random order: as many as cfg.Sample, or all when there are
// no more.
func (s *Scheduler) draw(a, b, but bitset, copies []int32) {
	s.sample = s.sample[:0]
	first := firstBut(a, b, but, s.rnd.IntN(64*len(a)))
	if first < 0 {
		return
	}
	at := first
	for range s.cfg.Sample {
		x := candidate{at, copies[at]}
		i := len(s.sample)
		s.sample = append(s.sample, x)
		for ; i > 0 && s.sample[i-1].copies > x.copies; i-- {
			s.sample[i] = s.sample[i-1]
		}
		s.sample[i] = x
		if but == nil {
			at = firstBoth(a, b, at+1) // which is inlined, and this the hottest of loops
		} else {
			at = firstBut(a, b, but, at+1)
		}
		if at == first {
			return
		}
	}
}
