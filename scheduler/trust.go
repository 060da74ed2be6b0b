package scheduler

import (
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
	regained = 4  // pieces sent for one upload lane more
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
}

// succeeded notes that h sent a piece: it gets back the lanes it lost by failures.
func (h *host) succeeded(now time.Duration) {
	h.lastSent, h.sendRests, h.misses = now, 0, 0
	if h.successes++; h.successes >= regained && h.lent < h.up {
		h.lent++
		h.successes = 0
	}
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
// lanes for it, and rests when it fails with everybody. It takes more than one
// child to blame it twice, and one that fails everywhere is not believed.
func (s *Scheduler) blame(child, parent *host, lanes int) {
	if parent.seed || parent.blamedBy == child || child.streak >= child.patience() {
		return
	}
	parent.blamedBy, parent.successes = child, 0
	parent.lent = max(lanes, min(1, parent.up))
	if parent.misses++; parent.misses > 2 {
		parent.sendRests = s.rest(parent, parent.misses-2)
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
	if len(parent.accusers) >= s.cfg.Accusers {
		parent.banned = true
		for len(parent.ups) > 0 {
			s.cancel(parent.ups[0])
		}
	}
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
