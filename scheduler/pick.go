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

// childFor returns the best of a few random hungry peers that p has a piece
// for, or nil.
func (s *Scheduler) childFor(p *peer) *peer {
	t := p.task
	if t.hungry.n == 0 || p.has == 0 {
		return nil
	}
	var best *peer
	rank, found := 0, 0
	at := s.rnd.IntN(len(t.peers))
	for range min(looks, t.hungry.n) {
		if at = t.hungry.first(t.hungry.bitset, at); at < 0 {
			break
		}
		c := t.peers[at]
		at++
		if c.needs == 0 || !s.receives(c.host) {
			t.hungry.remove(c.slot)
			continue
		}
		if s.shuns(c.host, p.host) || firstBoth(c.need, p.have, 0) < 0 {
			continue
		}
		if r := s.childRank(c, p.host); best == nil || r > rank {
			best, rank = c, r
		}
		if found++; found == choices {
			break
		}
	}
	return best
}

// childRank is highest for who gets nothing from the parent yet, then for who is
// not slow, then for who gets nothing at all, then for who is near, and then for
// who needs most.
func (s *Scheduler) childRank(c *peer, parent *host) int {
	rank := c.needs + near(c.host, parent)*rankUnit
	if c.host.in == 0 {
		rank += 4 * rankUnit
	}
	if !s.slow(c.host.recvRate) {
		rank += 8 * rankUnit
	}
	if !c.host.gets(parent) {
		rank += 16 * rankUnit
	}
	return rank
}

// rankUnit is more than the needs of a peer and the lanes of a host.
const rankUnit = pieces.MaxPieces + 1

// parentFor returns the best of a few random holders of piece i that have room,
// or nil.
func (s *Scheduler) parentFor(c *peer, i int) *peer {
	t := c.task
	if t.room.n == 0 {
		return nil
	}
	var best *peer
	rank, found := 0, 0
	at := s.rnd.IntN(len(t.peers))
	for range min(looks, t.room.n) {
		if at = t.room.first(t.holders[i], at); at < 0 {
			break
		}
		p := t.peers[at]
		at++
		if !s.hasRoom(p) || s.shuns(c.host, p.host) {
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
	slow := s.slow(c.host.recvRate)
	return s.feedWanted(c) || !slow && s.feedFresh(c) || s.feedRare(c) || slow && s.feedFresh(c) || s.feedAgain(c)
}

// feedWanted looks for a parent for the first pieces c's reader waits for.
func (s *Scheduler) feedWanted(c *peer) bool {
	at := c.wantFirst
	for range s.cfg.Sample {
		i := c.wanted(c.need, at)
		if i < 0 {
			return false
		}
		if p := s.parentFor(c, i); p != nil {
			s.assignRun(c, p, i, nil)
			return true
		}
		if c.task.copies[i] == 0 && s.feedFresh(c) {
			return true
		}
		at = i + 1
	}
	return false
}

// feedFresh has a seed send c a piece of which there is no copy.
func (s *Scheduler) feedFresh(c *peer) bool {
	for _, p := range c.task.seeds {
		if i := s.freshFor(c, p); i >= 0 && s.seedSends(p, c) {
			s.assignRun(c, p, i, nil)
			return true
		}
	}
	return false
}

// freshFor returns a piece of which there is no copy for c to get from a seed:
// one its reader waits for, else the next round the task; or -1.
func (s *Scheduler) freshFor(c, seed *peer) int {
	t := c.task
	if i := c.wanted(seed.have, c.wantFirst); i >= 0 && t.copies[i] == 0 {
		return i
	}
	at := t.fresh
	for range s.cfg.Sample {
		i := firstOnly(seed.have, t.copied, at)
		if i < 0 || c.need.has(i) {
			return i
		}
		at = i + 1
	}
	return -1
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
	s.draw(c.need, t.held, t.copies)
	for _, x := range s.sample {
		if p := s.parentFor(c, x.piece); p != nil {
			s.assignRun(c, p, x.piece, nil)
			return true
		}
	}
	if len(s.sample) < s.cfg.Sample {
		return false // that was all there is
	}
	at := s.rnd.IntN(len(t.peers))
	for range min(looks, t.room.n) {
		if at = t.room.first(t.room.bitset, at); at < 0 {
			return false
		}
		p := t.peers[at]
		at++
		if s.hasRoom(p) && !s.shuns(c.host, p.host) && firstBoth(c.need, p.have, 0) >= 0 {
			s.assignRun(c, p, s.pieceFor(c, p), nil)
			return true
		}
	}
	return false
}

// feedAgain has a seed send c a piece that others have as well: only when none
// of them has a lane for it (which the caller has tried), the seed has sent all
// it has once, and both have a lane idle. As long as the seed still gets pieces
// itself, all their lanes must be.
func (s *Scheduler) feedAgain(c *peer) bool {
	t := c.task
	for _, p := range t.seeds {
		idle := p.host.out == 0 && c.host.in == 0 && s.now-c.host.lastRecv > s.cfg.LagFloor
		if p.has < t.n && !idle || !s.seedSends(p, c) || s.freshFor(c, p) >= 0 {
			s.offer(p)
			continue
		}
		if firstBoth(c.need, p.have, 0) >= 0 {
			s.assignRun(c, p, s.pieceFor(c, p), nil)
			return true
		}
	}
	return false
}

// pieceFor returns the piece for c to get from p: one its reader waits for,
// else the rarest of a sample. There is one.
func (s *Scheduler) pieceFor(c, p *peer) int {
	if i := c.wanted(p.have, c.wantFirst); i >= 0 {
		return i
	}
	s.draw(c.need, p.have, c.task.copies)
	return s.sample[0].piece
}

// wanted returns the first piece from at on that c needs, its reader waits for
// and is in the set, or -1.
func (c *peer) wanted(set bitset, at int) int {
	if c.wantFirst == c.wantEnd {
		return -1
	}
	if i := firstBoth(c.need, set, at); i >= at && i < c.wantEnd {
		return i
	}
	return -1
}

// candidate is a piece that may be assigned, and how many copies there are.
type candidate struct {
	piece  int
	copies int32
}

// draw fills s.sample with pieces at random that are in both sets, the rarest
// first, equals in random order: as many as cfg.Sample, or all when there are
// no more.
func (s *Scheduler) draw(a, b bitset, copies []int32) {
	s.sample = s.sample[:0]
	first := firstBoth(a, b, s.rnd.IntN(64*len(a)))
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
		if at = firstBoth(a, b, at+1); at == first {
			return
		}
	}
}
