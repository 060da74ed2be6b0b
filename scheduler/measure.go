package scheduler

import (
	"slices"
	"time"

	"damselfly.dev/pieces"
)

const (
	minRetry = 10 * time.Millisecond // the shortest and
	maxRetry = 5 * time.Second       // the longest that a busy parent is left alone
	goneFor  = 2 * time.Second       // how long a host stays off a parent that was gone or lagged,
	seedGone = restUnit              // and off a seed
	restUnit = 250 * time.Millisecond
	maxRest  = 8 * time.Second

	thinness    = 2.5 // how many times slower than its end's others a transfer leaves room beside it
	slowness    = 8   // how many times slower than others a host is slow
	censusSize  = 63  // how many hosts tell what is typical
	minShare    = 64  // a run is at most this part of the task,
	needShare   = 8   // and this part of what the child needs
	regained    = 4   // pieces sent for one upload lane more
	maxPatience = 6
	sweepSize   = 4096 // how many of the hungry one Tick looks at
)

// measure learns from the piece that tr is bringing.
func (s *Scheduler) measure(tr *transfer, piece int) {
	took, size := s.now-tr.since, tr.child.task.layout.Size(piece)
	if !tr.ahead && size >= pieces.MinPieceSize && took > 0 {
		seen := rate(took) / rate(size)
		tr.child.host.recvRate.best(seen)
		tr.parent.host.sendRate.best(seen)
	}
	tr.since = s.now
}

// census finds what is typical: the median over some hosts, so that no host can
// say it alone.
func (s *Scheduler) census() {
	var seen [censusSize]rate
	n := 0
	for range min(2*censusSize, 4*len(s.list)) {
		if r := s.list[s.rnd.IntN(len(s.list))].recvRate; r > 0 && n < censusSize {
			seen[n] = r
			n++
		}
	}
	if n > 0 {
		slices.Sort(seen[:n])
		s.typical = seen[n/2]
	}
}

// slow tells whether a host of this rate would hold its partners' lanes for
// many times as long as others do.
func (s *Scheduler) slow(r rate) bool { return s.typical > 0 && r > slowness*s.typical }

// run returns the most pieces of a transfer to child.
func (s *Scheduler) run(child *peer) int {
	r := max(s.typical, child.host.recvRate)
	if r == 0 {
		return 1
	}
	one := max(r.of(child.task.layout.PieceSize), 1)
	return max(1, min(int(s.cfg.Run/one), child.task.n/minShare, child.needs/needShare, maxRun))
}

// lags tells whether tr takes several times as long as its like.
func (s *Scheduler) lags(tr *transfer) bool {
	if s.typical == 0 || tr.reopened || tr.late {
		return false
	}
	c := tr.child.host
	expected := max(s.typical, c.recvRate).of(tr.child.task.layout.PieceSize)
	return s.now-tr.since > max(time.Duration(s.cfg.Lag)*expected, s.cfg.LagFloor+expected)<<c.patience
}

// lagging decides whose fault it is that tr lags. When the parent sent to
// others meanwhile and the child got nothing from anybody, it is the child's,
// and a second parent would not help.
func (s *Scheduler) lagging(tr *transfer) {
	c, p := tr.child.host, tr.parent.host
	if c.lastRecv <= tr.since && p.lastSent > tr.since {
		s.yield(tr)
		return
	}
	c.patience = min(c.patience+1, maxPatience)
	c.shun(s.now, s.now+goneFor, p)
	p.sendRate.best(rate(s.now-tr.since) / rate(tr.child.task.layout.PieceSize))
	s.second(tr)
}

// delivered notes that h got a piece.
func (h *host) delivered(now time.Duration) {
	h.lastRecv, h.recvRests, h.streak = now, 0, 0
	if h.patience > 0 {
		h.patience--
	}
}

// succeeded notes that h sent a piece: it gets back the lanes it lost by failures.
func (h *host) succeeded(now time.Duration) {
	h.lastSent, h.sendRests, h.misses = now, 0, 0
	if h.successes++; h.successes >= regained && h.lent < h.up {
		h.lent++
		h.successes = 0
	}
}

// undelivered notes that a transfer to h failed. When all do, it is h that
// fails, and has to rest in between.
func (s *Scheduler) undelivered(h *host) {
	h.streak++
	if n := h.streak - 2*h.down; n > 0 {
		h.recvRests = s.now + min(restUnit<<min(n-1, maxPatience), maxRest)
		s.rest(h)
	}
}

// blame notes that child had no luck with parent, which is trusted with fewer
// lanes for it. It takes more than one reporter to blame it twice, and one that
// fails everywhere is not believed.
func (s *Scheduler) blame(child, parent *host, lanes int) {
	if parent.seed || parent.blamedBy == child || child.streak >= 2*child.down {
		return
	}
	parent.blamedBy, parent.successes = child, 0
	parent.lent = max(lanes, min(1, parent.up))
	parent.misses++
	if n := parent.misses - 2; n > 0 {
		parent.sendRests = s.now + min(restUnit<<min(n-1, maxPatience), maxRest)
		s.rest(parent)
	}
}

func (s *Scheduler) rest(h *host) {
	if !h.resting {
		h.resting = true
		s.resting = append(s.resting, h)
	}
}

// accuse notes that child says parent sent wrong bytes. The child is never sent
// to it again; it is banned for all when enough hosts say so. One that alone
// accuses many is not believed.
func (s *Scheduler) accuse(child, parent *host) {
	if parent.seed {
		child.shun(s.now, s.now+seedGone, parent)
		return
	}
	child.shun(s.now, forever, parent)
	if child.distrusted || slices.Contains(parent.accusers, child) {
		return
	}
	parent.accusers = append(parent.accusers, child)
	child.accused = append(child.accused, parent)
	if len(parent.accusers) >= s.cfg.Accusers && !parent.banned {
		parent.banned = true
		for len(parent.ups) > 0 {
			s.cancel(parent.ups[len(parent.ups)-1])
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

// sweep has some of the hungry looked at again.
func (s *Scheduler) sweep() {
	left := sweepSize
	for range s.order {
		s.swept++
		t := s.order[s.swept%len(s.order)]
		for range min(t.hungry.n, left) {
			if t.sweep = t.hungry.first(t.hungry.bitset, t.sweep); t.sweep < 0 {
				t.sweep = 0
				break
			}
			s.queue(t.peers[t.sweep].host)
			t.sweep++
			left--
		}
	}
}

const forever = time.Duration(1<<63 - 1)
