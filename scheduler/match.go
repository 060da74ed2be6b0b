package scheduler

// match gives lanes to whoever has use for them, until nothing that changed is
// left to look at: first the upload lanes, each to one of the hungry, then the
// download lanes that are still free; and at last it looks ahead.
func (s *Scheduler) match() {
	for len(s.work) > 0 {
		work := s.work
		s.work, s.spare = s.spare[:0], work
		for _, h := range work {
			h.queued = false
			s.open(h)
		}
		for _, h := range work {
			s.lend(h)
		}
		for _, h := range work {
			s.fill(h)
		}
	}
	for _, id := range s.ahead {
		if tr := s.find(id); tr != nil && tr.before == nil && !tr.late && tr.next == nil {
			s.lookAhead(tr)
		}
	}
	s.ahead = s.ahead[:0]
}

// queue has match look at h.
func (s *Scheduler) queue(h *host) {
	if !h.queued {
		h.queued = true
		s.work = append(s.work, h)
	}
}

// offer has match look for somebody whom p can send something.
func (s *Scheduler) offer(p *peer) {
	if !p.offered && p.host.up > 0 {
		p.offered = true
		p.host.offers = append(p.host.offers, p)
	}
}

// sends and receives tell whether a host has a lane free.
func (s *Scheduler) sends(h *host) bool    { return h.sends(s.now, s.slow(h.sendRate)) }
func (s *Scheduler) receives(h *host) bool { return h.receives(s.now, s.slow(h.recvRate)) }

// open lets others find h in its tasks, as far as it has lanes free.
func (s *Scheduler) open(h *host) {
	if s.sends(h) && !h.seed {
		for _, p := range h.offers {
			p.task.room.add(p.slot)
		}
	}
	if s.receives(h) {
		for _, p := range h.wanting {
			if p.needs > 0 {
				p.task.hungry.add(p.slot)
			}
		}
	}
}

// lend gives h's free upload lanes to the hungry, task by task. What is left of
// them can be found through the room of its tasks, those of seeds by feed.
func (s *Scheduler) lend(h *host) {
	for tries := len(h.offers); tries > 0 && s.sends(h); tries-- {
		p := h.offers[0]
		copy(h.offers, h.offers[1:])
		h.offers = h.offers[:len(h.offers)-1]
		if s.lendTo(p) {
			h.offers = append(h.offers, p)
			tries = len(h.offers) + 1
			continue
		}
		p.offered = false
	}
}

// lendTo makes one of the hungry get something from p. Who does already looks
// around itself before it takes more from the same host.
func (s *Scheduler) lendTo(p *peer) bool {
	child := s.childFor(p)
	if child == nil {
		return false
	}
	if !p.host.seed {
		if child.host.gets(p.host) {
			return false
		}
		s.assignRun(child, p, s.pieceFor(child, p), nil)
		return true
	}
	if i := s.freshFor(child, p); i >= 0 {
		s.assignRun(child, p, i, nil)
		return true
	}
	return s.feed(child)
}

// fill gives h's free download lanes to what it wants, task by task. A task
// with nothing for them keeps h among its hungry.
func (s *Scheduler) fill(h *host) {
	for tries := len(h.wanting); tries > 0 && s.receives(h); tries-- {
		h.turn++
		if s.feed(h.wanting[h.turn%len(h.wanting)]) {
			tries = len(h.wanting) + 1
		}
	}
}

// follow has match decide what tr's lanes are to do after it.
func (s *Scheduler) follow(tr *transfer) { s.ahead = append(s.ahead, tr.id) }

// lookAhead gives tr's two lanes their next assignment before tr ends. Lanes
// that stay together end together, so neither ever waits for the other; what
// waits ahead for two lanes that end at different times idles one of them. But
// lanes that never part would spread nothing, so they part when the parent has
// something for one who gets nothing at all, or as rare for another as for c.
func (s *Scheduler) lookAhead(tr *transfer) {
	c, p := tr.child.host, tr.parent.host
	if s.slow(c.recvRate) || s.slow(p.sendRate) || s.shuns(c, p) || s.now < p.sendRests ||
		len(p.ups) >= most*p.up || len(c.downs) >= most*c.down {
		return
	}
	for range c.wanting {
		c.turn++
		child, parent := c.wanting[c.turn%len(c.wanting)], tr.parent
		if child.task != parent.task {
			parent = p.peers[child.task.id]
		}
		if child.needs == 0 || parent == nil {
			continue
		}
		i := s.nextFor(child, parent)
		if i < 0 {
			continue
		}
		if other := s.childFor(parent); other == nil || other.host == c || !s.prior(other, child, parent, i) {
			s.assignRun(child, parent, i, tr)
		}
		return
	}
}

// nextFor returns the piece for c to get from p ahead, or -1. A seed sends
// ahead only what it has sent to nobody.
func (s *Scheduler) nextFor(c, p *peer) int {
	if crosses(c, p) && !s.goesOn(c, p) {
		return -1
	}
	if p.host.seed {
		return s.freshFor(c, p)
	}
	if firstBut(c.need, p.have, barred(c, p), 0) < 0 {
		return -1
	}
	return s.pieceFor(c, p)
}

// goesOn tells whether c may go on getting from p what crosses.
func (s *Scheduler) goesOn(c, p *peer) bool {
	in, out := &c.zone.link.in, p.host.link
	return in.flows <= in.window && (out == nil || out.out.flows <= out.out.window)
}

// prior tells whether p's next free lane is for other before it is for c, who
// would get piece i. What crosses goes on crossing, but from a seed only when
// its own zone has no use for it.
func (s *Scheduler) prior(other, c, p *peer, i int) bool {
	if crosses(c, p) && !crosses(other, p) {
		return p.host.seed
	}
	if its, class := s.class(other.host.recvRate), s.class(c.host.recvRate); p.host.seed && its != class {
		return its > class
	}
	if other.host.in == 0 {
		return true
	}
	copies := p.task.all.copies
	return !p.host.seed && copies[s.pieceFor(other, p)] <= copies[i]
}

// assignRun assigns piece i and as many after it as one transfer should bring.
func (s *Scheduler) assignRun(child, parent *peer, i int, before *transfer) {
	t, count := child.task, 1
	copied, no := copied(child, parent), barred(child, parent)
	fresh := !copied.has(i)
	for limit := s.run(child); count < limit; count++ {
		next := i + count
		if next >= t.n || !child.need.has(next) || !parent.have.has(next) || copied.has(next) == fresh || no != nil && no.has(next) {
			break
		}
	}
	if fresh {
		t.fresh = i + count
	}
	s.assign(child, parent, i, count, before)
}

// run returns the most pieces of a transfer to child.
func (s *Scheduler) run(child *peer) int {
	one := s.pieceTime(child)
	if one == 0 {
		return 1
	}
	return max(1, min(int(s.cfg.Run/one), child.task.n/taskShare, child.needs/needShare, maxRun))
}

const (
	taskShare = 64 // a run is at most this part of the task,
	needShare = 8  // and this part of what the child needs
)

// sweep has some of the hungry looked at again, whom a search may have passed
// over.
func (s *Scheduler) sweep() {
	left := sweepSize
	for range s.order {
		s.swept++
		t := s.order[s.swept%len(s.order)]
		for range min(t.hungry.n, left) {
			t.sweep = t.hungry.first(t.hungry.bitset, t.hungry.bitset, t.sweep)
			s.queue(t.peers[t.sweep].host)
			t.sweep++
			left--
		}
	}
}

// sweepSize is how many of the hungry one Tick looks at.
const sweepSize = 4096
