package scheduler

import (
	"slices"
	"time"

	"damselfly.dev/pieces"
)

const (
	// firstPatience is how long a transfer may take before anybody knows how long
	// they do, and hopeless how many times longer than one that lags one may take
	// before it is given up.
	firstPatience = 2 * time.Second
	hopeless      = 8

	slowness   = 8   // how many times slower than others a host is slow
	thinness   = 2.5 // how many times slower than one end's others a transfer leaves room beside it
	censusSize = 63  // how many hosts tell what is typical
)

// rate is how long a lane takes for a byte, in nanoseconds; 0 is not known yet.
type rate float64

// of returns the time for so many bytes.
func (r rate) of(bytes int64) time.Duration { return time.Duration(float64(r) * float64(bytes)) }

// note moves r quickly towards faster and slowly towards slower, so that it
// tells what a host can do: one slow partner does not make the host slow.
func (r *rate) note(took time.Duration, bytes int64) {
	seen := rate(took) / rate(bytes)
	switch {
	case *r == 0:
		*r = seen
	case seen < *r:
		*r += (seen - *r) / 2
	default:
		*r += (seen - *r) / 8
	}
}

// measure learns from the piece that tr has brought at a time.
func (s *Scheduler) measure(tr *transfer, piece int, at time.Duration) {
	took, size := at-tr.since, tr.child.task.layout.Size(piece)
	switch {
	case size < pieces.MinPieceSize || took <= 0:
	case tr.link != nil:
		s.crossed(tr, took, size) // it says nothing of the hosts
	default:
		tr.child.host.recvRate.note(took, size)
		tr.parent.host.sendRate.note(took, size)
	}
	tr.since = at
}

// census finds what is typical: the median over some hosts, so that no host can
// say it alone.
func (s *Scheduler) census() {
	var seen [censusSize]rate
	n := 0
	for range min(2*censusSize, 4*len(s.list)) {
		if h := s.list[s.rnd.IntN(len(s.list))]; h.recvRate > 0 && h.streak == 0 && n < censusSize {
			seen[n] = h.recvRate
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

// usual is the class of a host about as fast as what is typical, or not known.
const usual = 2

// class is higher for faster hosts, 0 to 3.
func (s *Scheduler) class(r rate) int {
	switch {
	case r == 0 || s.typical == 0:
		return usual
	case 2*r < s.typical:
		return usual + 1
	case r <= 2*s.typical:
		return usual
	case s.slow(r):
		return 0
	}
	return usual - 1
}

// pieceTime is how long a piece of c's task should take to come to c.
func (s *Scheduler) pieceTime(c *peer) time.Duration {
	return max(s.typical, c.host.recvRate).of(c.task.layout.PieceSize)
}

// lags tells whether tr takes several times as long as its like, so many times
// over.
func (s *Scheduler) lags(tr *transfer, times int) bool {
	expected := s.pieceTime(tr.child)
	known := expected > 0
	if tr.link != nil {
		expected = max(expected, tr.link.pace.of(tr.child.task.layout.PieceSize))
		known = tr.link.pace > 0
	}
	limit := firstPatience
	if known {
		limit = max(time.Duration(s.cfg.Lag)*expected, s.cfg.LagFloor+expected)
	}
	if tr.soon {
		limit += s.cfg.Report
	}
	return s.now-tr.since > time.Duration(times)*limit
}

// young returns an age up to which no transfer lags, whichever it is.
func (s *Scheduler) young() time.Duration {
	least := int64(0)
	for _, t := range s.order {
		if least == 0 || t.layout.PieceSize < least {
			least = t.layout.PieceSize
		}
	}
	expected := s.typical.of(least) // lags expects no less
	return min(firstPatience, max(time.Duration(s.cfg.Lag)*expected, s.cfg.LagFloor+expected))
}

// lagging takes from tr, which lags, what others can use better. When the parent
// sent to others meanwhile and the child got nothing from anybody, it is the
// child's fault, and a second parent would not help.
func (s *Scheduler) lagging(tr *transfer) {
	if tr.link != nil {
		s.abandon(tr)
		return
	}
	c, p := tr.child.host, tr.parent.host
	if tr.soon {
		s.giveUp(tr) // it was to end long ago, and its lanes have been given away
		return
	}
	if !tr.late {
		s.yield(tr)
	}
	if c.lastRecv <= tr.since && p.lastSent > tr.since {
		return
	}
	if p.doubted {
		s.giveUp(tr)
		return
	}
	p.sendRate.note(s.now-tr.since, tr.child.task.layout.PieceSize)
	s.shun(c, p, goneFor)
	if p.lastSent <= tr.since {
		s.blame(c, p, p.lent/2)
	}
	s.second(tr)
}

// giveUp ends a transfer that brings nothing, so that it takes no place at its
// parent any more. Where it is not the parent's fault the child may only be slow: the
// next has more time.
func (s *Scheduler) giveUp(tr *transfer) {
	c, p := tr.child.host, tr.parent.host
	if !tr.soon && p.lastSent <= tr.since && (c.lastRecv > tr.since || p.doubted) {
		s.blame(c, p, p.lent/2)
	} else {
		s.fault(tr)
	}
	s.shun(c, p, goneFor)
	s.cancel(tr)
}

// fault notes that it was the child that did not take what tr was to bring.
func (s *Scheduler) fault(tr *transfer) {
	c := tr.child.host
	switch {
	case tr.soon:
		c.word -= broken
	case s.typical > 0:
		c.recvRate = max(c.recvRate, rate(s.now-tr.since)/rate(tr.child.task.layout.PieceSize))
	}
	c.taking, c.taken = max(c.taking/2, min(1, c.down)), 0
	if c.lastRecv == 0 && s.typical > 0 { // it never took anything
		c.streak = max(c.streak, c.patience())
	}
	s.undelivered(c)
}
