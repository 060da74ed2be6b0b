package pieces

import (
	"context"
	"time"
)

const (
	tendEvery = 10 * time.Second // between two looks at the file system's free space
	// scrubShare is how many times as long as a read took the next one waits at
	// least: a disk that is busy is left alone.
	scrubShare = 20
)

// Tend takes care of the store until ctx ends: it evicts what is not in use when
// the file system gets full, and verifies pieces that nobody has looked at for
// a while, at most rate bytes a second, none with 0. It returns ctx's cause.
func (s *Store) Tend(ctx context.Context, rate int64) error {
	next := time.NewTimer(tendEvery)
	defer next.Stop()
	free := time.NewTicker(tendEvery)
	defer free.Stop()
	var at place
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-free.C:
			s.evict(func() shortage { return s.missingLocked(0, false) })
			s.deliver()
		case <-next.C:
			wait := tendEvery
			if rate > 0 {
				began := time.Now()
				if n := s.scrub(&at); n > 0 {
					took := time.Since(began)
					wait = max(time.Duration(float64(n)/float64(rate)*float64(time.Second)), scrubShare*took)
				}
			}
			next.Reset(wait)
		}
	}
}

// place is where the scrub goes on: from that piece of that task on.
type place struct {
	id    TaskID
	piece int
}

// scrub verifies the next piece that is not fresh, and returns how many bytes
// that was; 0 when all are.
func (s *Store) scrub(at *place) int64 {
	c, i := s.following(*at)
	if c == nil {
		*at = place{} // from the first task on again
		if c, i = s.following(*at); c == nil {
			return 0
		}
	}
	defer c.Release()
	*at = place{c.id, i + 1}
	n := c.layout.Size(i)
	if c.ready() != nil {
		return n
	}
	_, _ = c.verify(i) // what cannot be looked at now is, another time
	s.count(func(u *Usage) { u.Scrubbed += n })
	s.deliver()
	return n
}

// following returns the first piece at at or after it that is not fresh, its task
// pinned; nil for none.
func (s *Store) following(at place) (*Content, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var next *task
	piece := 0
	for id, t := range s.tasks {
		if s.closed || !t.made || id < at.id || next != nil && id > next.id {
			continue
		}
		from := 0
		if id == at.id {
			from = at.piece
		}
		if i := t.stale(from); i >= 0 {
			next, piece = t, i
		}
	}
	if next == nil {
		return nil, 0
	}
	return s.lookLocked(next), piece
}

// stale returns the first piece from i on that is there and not fresh, -1 for none.
func (t *task) stale(i int) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ageLocked()
	for ; i < t.layout.Count(); i++ {
		if t.have.Has(i) && !t.fresh.Has(i) {
			return i
		}
	}
	return -1
}

// ageLocked has pieces looked at again when that was done long ago.
func (t *task) ageLocked() {
	if now := time.Now(); now.Sub(t.freshFrom) > freshFor {
		t.fresh, t.freshFrom = NewSet(t.layout.Count()), now
	}
}
