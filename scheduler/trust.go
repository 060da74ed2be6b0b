package scheduler

import (
	"math/bits"
	"slices"
	"time"
)

const (
	minRetry = 10 * time.Millisecond  // the shortest and
	maxRetry = 5 * time.Second        // the longest that a busy parent is left alone
	goneFor  = 2 * time.Second        // how long a host stays off a parent that was gone or lagged,
	seedGone = 250 * time.Millisecond // and off a seed, whatever it was
	forever  = 1 << 62

	minRest = 250 * time.Millisecond // the first and
	maxRest = 8 * time.Second        // the longest rest of a host that fails with everybody

	maxShuns = 32 // how many parents a host remembers to stay off
	regained = 4  // pieces sent for one upload lane more, or got for one to get them on

	firstLanes = 4   // each way, that a host is trusted with when it comes
	firstDebt  = 4   // pieces that a doubted host sends to be trusted: so many the first time,
	mostDebt   = 256 // twice as many each time after, and so many at most
	mostBlame  = 4   // the misses in a row for which a host is doubted
	firstWord  = 8   // what a host's word is worth: a piece adds 1,
	broken     = 4   // and a Soon that was none takes so much
)

// A shun keeps a host off one parent for a while.
type shun struct {
	parent *host
	until  time.Duration
}

// shuns tells whether child is to stay off parent now: because of what was, as
// long as others are to bring it what comes too late from that parent, or because
// it is slow and other slow ones have half of the parent's lanes. So those that
// never end leave some to the others.
func (s *Scheduler) shuns(child, parent *host) bool {
	for i := 0; i < len(child.downs) && child.reopened > 0; i++ {
		if tr := child.downs[i]; tr.reopened && tr.parent.host == parent {
			return true
		}
	}
	for i := range child.shunned {
		if child.shunned[i].parent == parent && s.now < child.shunned[i].until {
			return true
		}
	}
	if parent.doubted && child.tries() {
		return true
	}
	if !s.slow(child.recvRate) {
		return false
	}
	slow := 0
	for _, tr := range parent.ups {
		if s.slow(tr.child.host.recvRate) {
			slow++
		}
	}
	return slow >= max(1, parent.up/2)
}

// tries tells whether h gets something from a doubted host now: one at a time may
// show it what it is.
func (h *host) tries() bool {
	return slices.ContainsFunc(h.downs, func(tr *transfer) bool { return tr.parent.host.doubted && !tr.soon })
}

func (s *Scheduler) shun(child, parent *host, d time.Duration) {
	if parent.seed {
		d = min(d, seedGone)
	}
	until := s.now + d
	child.shunned = slices.DeleteFunc(child.shunned, func(x shun) bool {
		if x.parent == parent {
			until = max(until, x.until)
		}
		return x.parent == parent || x.parent.gone || x.until <= s.now
	})
	if len(child.shunned) == maxShuns {
		child.shunned = slices.Delete(child.shunned, 0, 1)
	}
	child.shunned = append(child.shunned, shun{parent, until})
}

// delivered notes that h got a piece.
func (h *host) delivered(now time.Duration) {
	h.lastRecv, h.recvRests, h.streak = now, 0, 0
	h.word = min(h.word+1, firstWord)
	if h.taken++; h.taken >= regained && h.taking < h.down {
		h.taking++
		h.taken = 0
	}
}

// claims notes that h says it has pieces that nobody sent it. Who has never sent one
// has to show it.
func (s *Scheduler) claims(h *host) {
	if h.shown == 0 {
		s.doubt(h)
	}
}

// doubt makes what h has, or is to get, no copies, until it has sent some of it:
// others get that from elsewhere, and seeds send it as fresh.
func (s *Scheduler) doubt(h *host) {
	if h.doubted || h.seed {
		return
	}
	h.eachCopy(func(p *peer, i int) { p.dropCopy(i) })
	h.doubted, h.shown = true, 0
	h.owes = min(max(2*h.owes, firstDebt), mostDebt)
	for _, p := range h.memberships() {
		s.reseed(p.task)
	}
}

// trust undoes doubt.
func (s *Scheduler) trust(h *host) {
	h.doubted = false
	h.eachCopy(func(p *peer, i int) { p.addCopy(i) })
}

// eachCopy calls f for what h has and what is on the way to it, as far as that is
// to be counted.
func (h *host) eachCopy(f func(p *peer, i int)) {
	for _, p := range h.peers {
		for i := p.have.next(0); i >= 0; i = p.have.next(i + 1) {
			f(p, i)
		}
	}
	for _, tr := range h.downs {
		for left := tr.left; left != 0 && !tr.late && !tr.soon; left &= left - 1 {
			f(tr.child, tr.first+bits.TrailingZeros64(left))
		}
	}
}

// succeeded notes that h sent a piece: it gets back the lanes it lost by failures.
func (s *Scheduler) succeeded(h *host, now time.Duration) {
	h.lastSent, h.sendRests, h.misses, h.blamers = now, 0, 0, h.blamers[:0]
	if h.shown++; h.shown == 1 {
		for _, other := range h.accused {
			s.judge(other)
		}
	}
	if h.doubted && !h.banned && h.shown >= h.owes {
		s.trust(h)
	}
	if h.successes++; h.successes >= regained && h.lent < h.up {
		h.lent++
		h.successes = 0
	}
}

// idles tells whether h has been sent something, and never took any.
func (h *host) idles() bool {
	return h.lastRecv == 0 && (h.streak > 0 || len(h.downs) > 0 && h.downs[0].late)
}

// patience is how many downloads in a row may fail before it is h that fails.
func (h *host) patience() int { return 2 * min(h.down, 8) }

// undelivered notes that a transfer to h failed. When all do, it is h that
// fails, and has to rest in between.
func (s *Scheduler) undelivered(h *host) {
	if h.streak++; h.streak > h.patience() {
		h.recvRests = s.rest(h, h.streak-h.patience())
	}
}

// blame notes that child had no luck with parent, which is trusted with fewer
// lanes for it, and rests when it fails with everybody. Each child counts once
// until the parent has sent something again, twice if it has itself sent
// something, and one that fails everywhere is not believed.
func (s *Scheduler) blame(child, parent *host, lanes int) {
	if parent.seed || child.streak >= child.patience() || slices.Contains(parent.blamers, child) {
		return
	}
	parent.successes = 0
	parent.lent = max(lanes, min(1, parent.up))
	if len(parent.blamers) == mostBlame {
		parent.blamers = slices.Delete(parent.blamers, 0, 1)
	}
	parent.blamers = append(parent.blamers, child)
	if parent.misses++; child.shown > 0 {
		parent.misses++
	}
	if parent.misses >= mostBlame || parent.shown == 0 {
		s.doubt(parent)
	}
	if parent.misses > mostBlame || parent.doubted {
		parent.sendRests = s.rest(parent, max(parent.misses-mostBlame, 1))
	}
}

// rest returns until when h is to rest for the nth time in a row, and has Tick
// look at it then.
func (s *Scheduler) rest(h *host, nth int) time.Duration {
	if !h.resting {
		h.resting = true
		s.resting = append(s.resting, h)
	}
	return s.now + min(minRest<<min(nth-1, 10), maxRest)
}

// accuse notes that child says parent sent wrong bytes. The child is never sent
// to it again; it is banned for all when enough hosts say so. One that alone
// accuses many is not believed.
func (s *Scheduler) accuse(child, parent *host) {
	s.shun(child, parent, forever)
	if parent.seed || child.distrusted || slices.Contains(parent.accusers, child) {
		return
	}
	parent.accusers = append(parent.accusers, child)
	child.accused = append(child.accused, parent)
	s.judge(parent)
	alone := 0
	for _, h := range child.accused {
		if len(h.accusers) == 1 {
			alone++
		}
	}
	if alone > s.cfg.Accusers {
		s.distrust(child)
	}
}

// judge bans h when enough say that it sent wrong bytes, of those who have themselves
// sent something.
func (s *Scheduler) judge(h *host) {
	n := 0
	for _, a := range h.accusers {
		if a.shown > 0 {
			n++
		}
	}
	if h.banned || n < s.cfg.Accusers {
		return
	}
	h.banned = true
	s.doubt(h)
	for len(h.ups) > 0 {
		s.cancel(h.ups[0])
	}
}

// distrust takes back all that h has said of others.
func (s *Scheduler) distrust(h *host) {
	h.distrusted = true
	for _, other := range h.accused {
		other.accusers = without(other.accusers, h)
		if other.banned && len(other.accusers) < s.cfg.Accusers {
			other.banned = false
			s.queue(other)
		}
	}
	h.accused = nil
}
