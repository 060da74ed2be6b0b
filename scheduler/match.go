package scheduler

import "damselfly.dev/pieces"

// match gives lanes to whoever has use for them, until nothing that changed is
// left to look at: first the upload lanes, each to one of the hungry, then the
// download lanes that are still free.
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
	for tries := len(h.offers); tries > 0 && s.sends(h) && !h.doubted; tries-- {
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
		s.assignRun(child, p, s.pieceFor(child, p))
		return true
	}
	if i := s.freshFor(child, p); i >= 0 {
		s.assignRun(child, p, i)
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

// assignRun assigns piece i and as many after it as one transfer should bring.
func (s *Scheduler) assignRun(child, parent *peer, i int) {
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
	s.assign(child, parent, i, count)
}

// run returns the most pieces of a transfer to child.
func (s *Scheduler) run(child *peer) int {
	one := s.pieceTime(child)
	least := max(1, int(pieces.MinPieceSize/child.task.layout.PieceSize))
	if one == 0 {
		return least
	}
	return max(least, min(int(s.cfg.Run/one), child.task.n/taskShare, child.needs/needShare, maxRun))
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
