package scheduler

import (
	"maps"
	"math/bits"
	"slices"
	"time"

	"damselfly.dev/pieces"
)

// HostUp introduces a host. What was known of an id that is up is forgotten, as
// by HostDown.
func (s *Scheduler) HostUp(now time.Time, id HostID, spec Host) {
	s.HostDown(now, id)
	h := &host{
		id: id, index: len(s.list), peers: map[TaskID]*peer{}, zone: spec.Zone, rack: spec.Rack, seed: spec.Seed,
		up: min(max(spec.Up, 0), MaxLanes), down: min(max(spec.Down, 0), MaxLanes),
	}
	h.lent, h.taking, h.word = min(h.up, firstLanes), min(h.down, firstLanes), firstWord
	if h.seed {
		h.lent, h.down = h.up, 0
	}
	if s.cfg.CrossOnce && spec.Zone != "" {
		h.link = s.links[spec.Zone]
		if h.link == nil && len(s.links) < maxZones {
			h.link = &link{name: spec.Zone, in: gate{window: minCrossings}, out: gate{window: minCrossings}}
			s.links[spec.Zone] = h.link
		}
		if h.link != nil {
			h.link.hosts++
		}
	}
	s.hosts[id] = h
	s.list = append(s.list, h)
}

// HostDown forgets a host, its pieces and its transfers; the children of those
// are told.
func (s *Scheduler) HostDown(now time.Time, id HostID) {
	s.clock(now)
	h := s.hosts[id]
	if h == nil {
		return
	}
	h.gone = true
	for len(h.downs) > 0 {
		s.end(h.downs[len(h.downs)-1])
	}
	for len(h.ups) > 0 {
		s.cancel(h.ups[len(h.ups)-1])
	}
	for _, p := range h.memberships() {
		s.detach(p)
	}
	for _, other := range h.accused {
		other.accusers = without(other.accusers, h)
	}
	for _, other := range h.accusers {
		other.accused = without(other.accused, h)
	}
	last := s.list[len(s.list)-1]
	s.list[h.index], last.index = last, h.index
	s.list = s.list[:len(s.list)-1]
	delete(s.hosts, id)
	if l := h.link; l != nil {
		if l.hosts--; l.hosts == 0 {
			delete(s.links, l.name)
		}
	}
}

// memberships returns the host's peers, always in the same order.
func (h *host) memberships() []*peer {
	ps := make([]*peer, 0, len(h.peers))
	for _, id := range slices.Sorted(maps.Keys(h.peers)) {
		ps = append(ps, h.peers[id])
	}
	return ps
}

// TaskAdd introduces a task, whose layout must be valid. A known id stays what
// it is.
func (s *Scheduler) TaskAdd(now time.Time, id TaskID, l pieces.Layout) {
	s.clock(now)
	if s.tasks[id] == nil {
		t := newTask(id, l)
		s.tasks[id] = t
		s.order = append(s.order, t)
	}
}

// TaskRemove forgets a task and cancels its transfers.
func (s *Scheduler) TaskRemove(now time.Time, id TaskID) {
	s.clock(now)
	t := s.tasks[id]
	if t == nil {
		return
	}
	for _, p := range t.peers {
		if p != nil {
			s.detach(p)
		}
	}
	delete(s.tasks, id)
	s.order = without(s.order, t)
}

// Join makes host one that has these pieces of task and wants all others; a
// seed wants none. Joining again replaces what is known of its pieces.
func (s *Scheduler) Join(now time.Time, host HostID, task TaskID, have pieces.Set) {
	s.join(now, host, task, have, wantsAll, true)
}

// JoinLazy is Join for a host that wants only what it asks for by Want. One that
// has joined goes on wanting all.
func (s *Scheduler) JoinLazy(now time.Time, host HostID, task TaskID, have pieces.Set) {
	s.join(now, host, task, have, wantsSome, true)
}

// Hold is Join for a host that wants nothing more. One that has joined goes on
// wanting.
func (s *Scheduler) Hold(now time.Time, host HostID, task TaskID, have pieces.Set) {
	s.join(now, host, task, have, wantsNone, true)
}

// Given is Hold for what host was sent by other means than a transfer: nobody has to
// take its word for it.
func (s *Scheduler) Given(now time.Time, host HostID, task TaskID, have pieces.Set) {
	s.join(now, host, task, have, wantsNone, false)
}

// What a host that joins wants.
const (
	wantsNone = iota
	wantsSome
	wantsAll
)

func (s *Scheduler) join(now time.Time, host HostID, task TaskID, have pieces.Set, wants int, says bool) {
	s.clock(now)
	h, t := s.hosts[host], s.tasks[task]
	if h == nil || t == nil || have.Cap() != t.n && have.Cap() != 0 {
		return
	}
	p := h.peers[task]
	if p == nil {
		p = t.add(h)
		h.peers[task] = p
	}
	for i := range have.All() {
		if !p.have.has(i) {
			if says {
				s.claims(h)
			}
			s.gain(p, i, nil)
		}
	}
	for i := p.have.next(0); i >= 0; i = p.have.next(i + 1) {
		if !have.Has(i) && !p.promised(i) {
			s.lose(p, i)
		}
	}
	switch {
	case h.seed || wants == wantsNone:
	case wants == wantsSome && !p.wants:
		p.wants, p.lazy, p.since = true, true, s.now
		p.rethink(nil)
	case wants == wantsAll && (!p.wants || p.lazy):
		p.wants, p.lazy, p.since = true, false, s.now
		if h.opens() {
			p.zone.openers++
		}
		p.needAll()
	}
	s.changed(p)
}

// Leave makes host one that neither wants nor has any of task.
func (s *Scheduler) Leave(now time.Time, host HostID, task TaskID) {
	s.clock(now)
	if p := s.peer(host, task); p != nil {
		s.detach(p)
	}
}

// Have notes pieces that host got by other means than a transfer: the seed from
// the origin, a host from its fallback.
func (s *Scheduler) Have(now time.Time, host HostID, task TaskID, first, count int) {
	s.clock(now)
	p := s.peer(host, task)
	if p == nil || !p.task.includes(first, count) {
		return
	}
	for i := first; i < first+count; i++ {
		if !p.have.has(i) {
			s.claims(p.host)
			s.gain(p, i, nil)
		}
	}
	s.changed(p)
}

// Lost notes pieces that host has no longer. It wants them again if it wanted
// the task.
func (s *Scheduler) Lost(now time.Time, host HostID, task TaskID, first, count int) {
	s.clock(now)
	p := s.peer(host, task)
	if p == nil || !p.task.includes(first, count) {
		return
	}
	for i := first; i < first+count; i++ {
		if p.have.has(i) && !p.promised(i) {
			s.lose(p, i)
		}
	}
	s.changed(p)
}

// Want puts runs of pieces before all others that host lacks of task: readers
// wait at them. It replaces the host's earlier Want for the task; without a run it
// ends it. A run out of range is left out.
func (s *Scheduler) Want(now time.Time, host HostID, task TaskID, runs ...Run) {
	s.clock(now)
	p := s.peer(host, task)
	if p == nil {
		return
	}
	before := p.want
	p.want = nil
	for _, r := range runs {
		if !p.task.includes(r.First, r.Count) {
			continue
		}
		if p.want == nil {
			p.want = newBitset(p.task.n)
		}
		for i := r.First; i < r.First+r.Count; i++ {
			p.want.set(i)
		}
	}
	if p.lazy {
		p.rethink(before)
	}
	s.queue(p.host)
}

// rethink makes what readers wait for all that p needs, after they waited for
// before.
func (p *peer) rethink(before bitset) {
	for w, word := range before {
		word &= p.need[w]
		if p.want != nil {
			word &^= p.want[w]
		}
		p.need[w] &^= word
		p.needs -= bits.OnesCount64(word)
	}
	for w, word := range p.want {
		for word &^= p.have[w] | p.need[w]; word != 0; word &= word - 1 {
			if i := w<<6 + bits.TrailingZeros64(word); !p.coming(i) {
				p.reopen(i)
			}
		}
	}
}

// needAll makes all that p lacks, and that nothing brings, what it needs: by words,
// since who joins and leaves in turn must not cost a task of many pieces each time.
func (p *peer) needAll() {
	for w := range p.need {
		p.need[w] |= ^p.have[w]
	}
	if rest := p.task.n & 63; rest > 0 {
		p.need[len(p.need)-1] &= 1<<rest - 1
	}
	for _, tr := range p.host.downs {
		for left := tr.left; left != 0 && tr.child == p && !tr.reopened; left &= left - 1 {
			p.need.clear(tr.first + bits.TrailingZeros64(left))
		}
	}
	p.needs = 0
	for _, word := range p.need {
		p.needs += bits.OnesCount64(word)
	}
}

// coming tells whether a transfer brings piece i to p that nothing else is to bring.
func (p *peer) coming(i int) bool {
	for _, tr := range p.host.downs {
		if tr.child == p && !tr.reopened && tr.covers(i) {
			return true
		}
	}
	return false
}

// promised tells whether p counts as having piece i because a transfer is about to
// have brought it.
func (p *peer) promised(i int) bool {
	for _, tr := range p.host.downs {
		if tr.child == p && tr.soon && tr.covers(i) {
			return true
		}
	}
	return false
}

// Done notes that one verified piece of a transfer has come, so long ago. The last
// one ends the transfer.
func (s *Scheduler) Done(now time.Time, host HostID, id TransferID, piece int, ago time.Duration) {
	s.clock(now)
	tr := s.find(id)
	if tr == nil || tr.child.host.id != host || !tr.covers(piece) {
		return
	}
	at := max(s.now-max(ago, 0), tr.since)
	s.measure(tr, piece, at)
	child, parent := tr.child, tr.parent.host
	child.host.delivered(at)
	s.succeeded(parent, at)
	if child.have.has(piece) {
		s.arrived(child, piece, tr)
	} else {
		s.gain(child, piece, tr)
	}
	s.changed(child)
}

// Soon notes that the last bytes of a transfer are on their way. Its lanes may
// have their next one, which will begin when this one ends or just before; and
// its pieces count as had: who asks the child for one too early will wait there
// for it. Done has to follow within Config.Report, or Failed, which takes them back.
func (s *Scheduler) Soon(now time.Time, host HostID, id TransferID) {
	s.clock(now)
	tr := s.find(id)
	if tr == nil || tr.child.host.id != host || tr.soon || tr.late || tr.child.host.word <= 0 {
		return
	}
	child, parent := tr.child, tr.parent.host
	tr.soon = true
	tr.vacate(true, true)
	child.host.ending++
	parent.leaving++
	child.host.lastRecv, parent.lastSent = s.now, s.now
	for left := tr.left; left != 0; left &= left - 1 {
		i := tr.first + bits.TrailingZeros64(left)
		child.take(i)
		child.dropCopy(i) // which was on the way and now is there
	}
	s.queue(parent)
	s.changed(child)
}

// Failed notes that the rest of a transfer will not come. For a busy parent,
// retry is when it may be asked again.
func (s *Scheduler) Failed(now time.Time, host HostID, id TransferID, why Failure, retry time.Duration) {
	s.clock(now)
	tr := s.find(id)
	if tr == nil || tr.child.host.id != host {
		return
	}
	child, parent := tr.child.host, tr.parent.host
	if tr.soon {
		child.word -= broken
	}
	s.end(tr)
	switch why {
	case Busy:
		s.shun(child, parent, min(max(retry, minRetry), maxRetry))
		s.blame(child, parent, parent.lent-1)
	case Gone:
		s.shun(child, parent, goneFor)
		s.blame(child, parent, parent.lent/2)
	case Corrupt:
		s.blame(child, parent, parent.lent/2)
		s.accuse(child, parent)
	}
	s.undelivered(child)
}

// Tick notes that time has passed: it looks for transfers that lag, hosts that
// have rested, and whoever may have been passed over. Call it every 100 ms or so
// while there is a task.
func (s *Scheduler) Tick(now time.Time) {
	s.clock(now)
	s.census()
	s.resting = slices.DeleteFunc(s.resting, func(h *host) bool {
		h.resting = !h.gone && (s.now < h.sendRests || s.now < h.recvRests)
		if !h.resting {
			s.queue(h)
		}
		return !h.resting
	})
	young := s.young()
	for _, tr := range s.transfers {
		switch {
		case s.now-tr.since <= young || tr.child == nil: // which looks at nothing but tr
		case tr.late && (s.lags(tr, hopeless) || tr.parent.host.crowded()):
			s.giveUp(tr)
		case !tr.reopened && s.lags(tr, 1):
			s.lagging(tr)
		}
	}
	s.sweep()
}

func (s *Scheduler) peer(host HostID, task TaskID) *peer {
	if h := s.hosts[host]; h != nil {
		return h.peers[task]
	}
	return nil
}

// includes tells whether the run is some of the task's pieces.
func (t *task) includes(first, count int) bool {
	return first >= 0 && count > 0 && first < t.n && count <= t.n-first
}

// gain makes p have piece i, which it had not. Whatever is to bring it goes on
// for the rest of its run, and is cancelled when that was all; by is the
// transfer that brought it and needs no cancelling.
func (s *Scheduler) gain(p *peer, i int, by *transfer) {
	p.take(i)
	s.arrived(p, i, by)
}

// arrived is gain for a piece that p counts as having.
func (s *Scheduler) arrived(p *peer, i int, by *transfer) {
	downs := p.host.downs
	for k := 0; k < len(downs); k++ {
		tr := downs[k]
		if tr.child != p || !tr.covers(i) {
			continue
		}
		tr.left &^= 1 << (i - tr.first)
		if !tr.late && !tr.soon {
			s.dropCopy(p, i)
		}
		if tr.left != 0 {
			continue
		}
		if tr == by {
			s.end(tr)
		} else {
			s.cancel(tr)
		}
		downs = p.host.downs
		k--
	}
}

// lose makes p lack piece i, which it had, and takes from it what it was to send.
func (s *Scheduler) lose(p *peer, i int) {
	if p.lose(i) {
		s.reseed(p.task)
	}
	for _, tr := range slices.Clone(p.host.ups) {
		if tr.parent == p && tr.covers(i) {
			s.cancel(tr)
		}
	}
}

// changed has p's host looked at, after p's pieces changed.
func (s *Scheduler) changed(p *peer) {
	if p.wants && p.has < p.task.n {
		if !p.listed {
			p.listed = true
			p.host.wanting = append(p.host.wanting, p)
		}
	} else if p.listed {
		p.listed = false
		p.host.wanting = without(p.host.wanting, p)
	}
	s.offer(p)
	s.queue(p.host)
}

// detach takes p out of its task and its host, with its transfers.
func (s *Scheduler) detach(p *peer) {
	h, t := p.host, p.task
	for _, tr := range slices.Concat(h.downs, h.ups) {
		if tr.child == p || tr.parent == p {
			s.cancel(tr)
		}
	}
	if p.wants && !p.lazy && h.opens() {
		p.zone.openers--
	}
	p.wants = false
	for i := p.have.next(0); i >= 0; i = p.have.next(i + 1) {
		p.lose(i)
	}
	t.remove(p)
	delete(h.peers, t.id)
	h.wanting, h.offers = without(h.wanting, p), without(h.offers, p)
	s.reseed(t)
}

// dropCopy counts one copy of piece i less. What has none is the seeds' to send.
func (s *Scheduler) dropCopy(p *peer, i int) {
	if p.dropCopy(i) {
		s.reseed(p.task)
	}
}

// reseed has the task's seeds looked at.
func (s *Scheduler) reseed(t *task) {
	for _, p := range t.seeds {
		s.offer(p)
		s.queue(p.host)
	}
}

// without returns list without x, which it may not hold; the order is kept.
func without[T comparable](list []T, x T) []T {
	if i := slices.Index(list, x); i >= 0 {
		return slices.Delete(list, i, i+1)
	}
	return list
}
