package scheduler

// settle gives lanes to whoever has use for them, until nothing that changed is
// left to look at. Every event ends with it.
func (s *Scheduler) settle() {
	for i := 0; i < len(s.work); i++ {
		h := s.work[i]
		h.queued = false
		if !h.gone {
			s.lend(h)
			s.fill(h)
		}
	}
	s.work = s.work[:0]
}

// queue has settle look at h.
func (s *Scheduler) queue(h *host) {
	if !h.queued {
		h.queued = true
		s.work = append(s.work, h)
	}
}

// offer has settle look for somebody whom p can send something.
func (s *Scheduler) offer(p *peer) {
	if !p.offered && p.host.up > 0 {
		p.offered = true
		p.host.offers = append(p.host.offers, p)
	}
}

// lend gives h's free upload lanes to the hungry, task by task. A task without
// use for them finds h in its room from then on.
func (s *Scheduler) lend(h *host) {
	for tries := len(h.offers); tries > 0 && h.sends(s.now, s.slow(h.sendRate)); tries-- {
		p := h.offers[0]
		copy(h.offers, h.offers[1:])
		h.offers = h.offers[:len(h.offers)-1]
		if s.lendTo(p) {
			h.offers = append(h.offers, p)
			tries = len(h.offers) + 1
			continue
		}
		p.offered = false
		if !h.seed {
			p.task.room.add(p.slot)
		}
	}
}

// fill gives h's free download lanes to what it wants, task by task. A task
// with nothing for them leaves h among the hungry.
func (s *Scheduler) fill(h *host) {
	for tries := len(h.wanting); tries > 0 && h.receives(s.now, s.slow(h.recvRate)); tries-- {
		h.turn++
		p := h.wanting[h.turn%len(h.wanting)]
		if s.feed(p) {
			tries = len(h.wanting) + 1
		} else if p.needs > 0 {
			p.task.hungry.add(p.slot)
		}
	}
}

// lendTo makes one of the hungry get something from p.
func (s *Scheduler) lendTo(p *peer) bool {
	child := s.childFor(p)
	if child == nil {
		return false
	}
	if p.host.seed {
		if i := s.freshFor(child, p); i >= 0 {
			s.assignRun(child, p, i)
			return true
		}
		return s.feed(child)
	}
	s.assignRun(child, p, s.pieceFor(child, p))
	return true
}

// looks is how many of the hungry, or of those with room, one search looks at
// before it gives up: the work for an event is bounded, and Tick comes back to
// who was passed over.
const looks = 16

// childFor returns the better of two random hungry peers that p has a piece for.
func (s *Scheduler) childFor(p *peer) *peer {
	t := p.task
	var best *peer
	if t.hungry.n == 0 || p.has == 0 {
		return nil
	}
	at := s.rnd.IntN(len(t.peers))
	for range looks {
		at = firstBoth(t.hungry.bitset, t.hungry.bitset, at)
		if at < 0 {
			break
		}
		c := t.peers[at]
		at++
		switch {
		case c.needs == 0 || !c.host.receives(s.now, s.slow(c.host.recvRate)):
			t.hungry.remove(c.slot)
		case c.host.shuns(s.now, p.host) || firstBoth(c.need, p.have, 0) < 0:
		case best == nil:
			best = c
		case best != c:
			if s.betterChild(c, best, p) {
				best = c
			}
			return best
		}
	}
	return best
}

// betterChild prefers who has a lane idle, then who is not slow, who is near,
// and who has more lanes free.
func (s *Scheduler) betterChild(a, b *peer, parent *peer) bool {
	if x, y := a.host.in < a.host.down, b.host.in < b.host.down; x != y {
		return x
	}
	if x, y := s.slow(a.host.recvRate), s.slow(b.host.recvRate); x != y {
		return y
	}
	if x, y := near(a.host, parent.host), near(b.host, parent.host); x != y {
		return x > y
	}
	return a.host.in*b.host.down < b.host.in*a.host.down
}

// feed makes somebody send c something: what its reader waits for, what the
// seeds have sent to nobody, the rarest of a sample, or, when no other has a
// lane for it, one more copy from a seed.
func (s *Scheduler) feed(c *peer) bool {
	if c.needs == 0 {
		return false
	}
	if c.wantFirst < c.wantEnd && s.feedWanted(c) {
		return true
	}
	slow := s.slow(c.host.recvRate)
	return !slow && s.feedFresh(c) || s.feedRare(c) || slow && s.feedFresh(c) || s.feedAgain(c)
}

// feedWanted looks for a parent for the first pieces c's reader waits for.
func (s *Scheduler) feedWanted(c *peer) bool {
	i := c.wantFirst
	for range s.cfg.Sample {
		if i = firstBoth(c.need, c.need, i); i < c.wantFirst || i >= c.wantEnd {
			return false
		}
		if p := s.parentFor(c, i); p != nil {
			s.assignRun(c, p, i)
			return true
		}
		for _, p := range c.task.seeds {
			if c.task.copies[i] == 0 && p.have.has(i) && s.seedSends(p, c) {
				s.assignRun(c, p, i)
				return true
			}
		}
		i++
	}
	return false
}

// feedFresh has a seed send c a piece of which there is no copy.
func (s *Scheduler) feedFresh(c *peer) bool {
	for _, p := range c.task.seeds {
		if i := s.freshFor(c, p); i >= 0 && s.seedSends(p, c) {
			s.assignRun(c, p, i)
			return true
		}
	}
	return false
}

// freshFor returns a piece of which there is no copy for c to get from a seed,
// in ascending order round the task, or -1.
func (s *Scheduler) freshFor(c, seed *peer) int {
	t := c.task
	at := t.fresh
	for range s.cfg.Sample {
		i := firstOnly(seed.have, t.copied, at)
		if i < 0 {
			return -1
		}
		if c.need.has(i) {
			return i
		}
		at = i + 1
	}
	return -1
}

// seedSends tells whether a seed may send to c; when not, it comes back to the
// hungry when it may.
func (s *Scheduler) seedSends(p, c *peer) bool {
	if !p.host.sends(s.now, false) {
		s.offer(p)
		return false
	}
	return !c.host.shuns(s.now, p.host)
}

// candidate is a piece that may be assigned, and how many copies there are.
type candidate struct {
	piece  int
	copies int32
}

// feedRare looks at a sample of the pieces that c needs and others have, from
// the rarest on, for one that has a holder with room.
func (s *Scheduler) feedRare(c *peer) bool {
	t := c.task
	if t.room.n == 0 {
		return false
	}
	s.draw(c.need, t.held, t.copies)
	for _, x := range s.sample {
		if p := s.parentFor(c, x.piece); p != nil {
			s.assignRun(c, p, x.piece)
			return true
		}
	}
	if len(s.sample) < s.cfg.Sample {
		return false // that was all there is
	}
	at := s.rnd.IntN(t.n)
	for range 4 * looks {
		if t.room.n == 0 {
			return false
		}
		i := firstBoth(c.need, t.held, at)
		if p := s.parentFor(c, i); p != nil {
			s.assignRun(c, p, i)
			return true
		}
		at = i + 1
	}
	return false
}

// feedAgain has a seed send c a piece that others have as well: only when none
// of them has a lane for it (which the caller has tried), the seed has sent all
// it has once, and both have a lane idle.
func (s *Scheduler) feedAgain(c *peer) bool {
	t := c.task
	for _, p := range t.seeds {
		idle := p.host.out < p.host.lent && c.host.in < c.host.down
		if p.has < t.n {
			idle = p.host.out == 0 && c.host.in == 0
		}
		if !idle {
			s.offer(p)
			continue
		}
		if s.freshFor(c, p) >= 0 || !s.seedSends(p, c) {
			continue
		}
		if s.draw(c.need, p.have, t.copies); len(s.sample) > 0 {
			s.assignRun(c, p, s.sample[0].piece)
			return true
		}
	}
	return false
}

// pieceFor returns the piece for c to get from p: the one its reader waits for,
// else the rarest of a sample. There is one.
func (s *Scheduler) pieceFor(c, p *peer) int {
	if c.wantFirst < c.wantEnd {
		if i := firstBoth(c.need, p.have, c.wantFirst); i >= c.wantFirst && i < c.wantEnd {
			return i
		}
	}
	s.draw(c.need, p.have, c.task.copies)
	return s.sample[0].piece
}

// draw fills s.sample with pieces at random that are in both sets, the rarest
// first, equals in random order: as many as cfg.Sample, or all when there are
// no more.
func (s *Scheduler) draw(a, b bitset, copies []int32) {
	s.sample = s.sample[:0]
	n := len(a) * 64
	first := firstBoth(a, b, s.rnd.IntN(n))
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
		at = firstBoth(a, b, at+1)
		if at == first {
			return
		}
	}
}

// parentFor returns the better of two random holders of piece i that have room,
// or nil.
func (s *Scheduler) parentFor(c *peer, i int) *peer {
	t := c.task
	if t.room.n == 0 {
		return nil
	}
	row := t.holders[i]
	var best *peer
	at := s.rnd.IntN(len(t.peers))
	for range looks {
		at = firstBoth(row, t.room.bitset, at)
		if at < 0 {
			break
		}
		p := t.peers[at]
		at++
		switch {
		case !p.host.sends(s.now, s.slow(p.host.sendRate)):
			t.room.remove(p.slot)
			s.offer(p)
		case c.host.shuns(s.now, p.host):
		case best == nil:
			best = p
		case best != p:
			if s.betterParent(p, best, c) {
				best = p
			}
			return best
		}
	}
	return best
}

// betterParent prefers who has a lane idle, then who is not slow, who is near,
// and who has more lanes free.
func (s *Scheduler) betterParent(a, b *peer, child *peer) bool {
	if x, y := a.host.out < a.host.lent, b.host.out < b.host.lent; x != y {
		return x
	}
	if x, y := s.slow(a.host.sendRate), s.slow(b.host.sendRate); x != y {
		return y
	}
	if x, y := near(a.host, child.host), near(b.host, child.host); x != y {
		return x > y
	}
	return a.host.out*b.host.lent < b.host.out*a.host.lent
}

// assignRun assigns piece i and as many after it as one transfer should bring:
// enough to last for cfg.Run, no more than a share of what the task has and the
// child needs.
func (s *Scheduler) assignRun(child, parent *peer, i int) {
	t, count := child.task, 1
	fresh := t.copies[i] == 0
	for limit := s.run(child); count < limit; count++ {
		next := i + count
		if next >= t.n || !child.need.has(next) || !parent.have.has(next) || parent.host.seed && (t.copies[next] == 0) != fresh {
			break
		}
	}
	if fresh {
		t.fresh = i + count
	}
	s.assign(child, parent, i, count)
}
