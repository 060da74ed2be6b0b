package scheduler

import (
	"math/bits"
	"slices"
	"time"
)

const (
	// maxRun is the most pieces of one transfer: they fit a word.
	maxRun = 64
	// slotBits of a TransferID say where the transfer is kept; the others count
	// how often that place was used.
	slotBits = 24
)

// A transfer is one Assign until its last piece has come, it has failed or it
// was cancelled.
type transfer struct {
	id            TransferID
	child, parent *peer
	first, count  int
	left          uint64        // pieces of the run that have not come, the first in the lowest bit
	since         time.Duration // when it was told, became active or brought a piece, whatever was last
	ahead         bool          // it waits for the lanes of the one before it
	next          *transfer     // the one that waits for its lanes
	thinUp        bool          // the child takes a fraction of what the parent's lane gives,
	thinDown      bool          // or the parent gives a fraction of what the child's takes
	late          bool          // it lags: it holds no upload lane, its pieces are no copies
	reopened      bool          // it is late and its pieces may be had from a second parent
}

func (tr *transfer) covers(i int) bool {
	return uint(i-tr.first) < uint(tr.count) && tr.left&(1<<(i-tr.first)) != 0
}

// find returns the transfer with this id, or nil when it has ended or never was.
func (s *Scheduler) find(id TransferID) *transfer {
	slot := id & (1<<slotBits - 1)
	if slot >= TransferID(len(s.transfers)) || s.transfers[slot].id != id || s.transfers[slot].child == nil {
		return nil
	}
	return s.transfers[slot]
}

// assign makes child get the run from parent, on lanes of their own or, after
// the transfer before, on its lanes. The child needs all of it and the parent
// has all of it.
func (s *Scheduler) assign(child, parent *peer, first, count int, before *transfer) {
	c, p, t := child.host, parent.host, child.task
	tr := s.newTransfer()
	*tr = transfer{
		id: tr.id, child: child, parent: parent, first: first, count: count,
		left: ^uint64(0) >> (maxRun - count), since: s.now,
	}
	for i := first; i < first+count; i++ {
		child.need.clear(i)
		t.addCopy(i)
	}
	child.needs -= count
	c.downs = append(c.downs, tr)
	p.ups = append(p.ups, tr)
	if before != nil {
		tr.ahead, before.next = true, tr
		s.decide(Assign, tr, before.id)
		return
	}
	tr.thinUp = p.sendRate > 0 && c.recvRate > thinness*p.sendRate
	tr.thinDown = c.recvRate > 0 && p.sendRate > thinness*c.recvRate
	tr.occupy()
	s.decide(Assign, tr, 0)
	s.follow(tr)
}

// occupy takes a lane for tr at both ends.
func (tr *transfer) occupy() {
	c, p := tr.child.host, tr.parent.host
	c.in++
	p.out++
	if tr.thinUp {
		p.thinOut++
	}
	if tr.thinDown {
		c.thinIn++
	}
}

func (tr *transfer) freeUp() {
	tr.parent.host.out--
	if tr.thinUp {
		tr.parent.host.thinOut--
	}
}

func (tr *transfer) freeDown() {
	tr.child.host.in--
	if tr.thinDown {
		tr.child.host.thinIn--
	}
}

func (s *Scheduler) decide(k Kind, tr *transfer, after TransferID) {
	s.decisions = append(s.decisions, Decision{
		Kind: k, Transfer: tr.id, Task: tr.child.task.id, After: after,
		Host: tr.child.host.id, Parent: tr.parent.host.id, First: tr.first, Count: tr.count,
	})
}

func (s *Scheduler) newTransfer() *transfer {
	if n := len(s.free); n > 0 {
		tr := s.free[n-1]
		s.free = s.free[:n-1]
		return tr
	}
	tr := &transfer{id: 1<<slotBits | TransferID(len(s.transfers))}
	s.transfers = append(s.transfers, tr)
	return tr
}

// end takes tr from both hosts and gives back what it has not brought: to the
// child, which needs it again, and to the count of copies. Its lanes go to the
// transfer that waits for them, if any.
func (s *Scheduler) end(tr *transfer) {
	c, p := tr.child.host, tr.parent.host
	for left := tr.left; left != 0; left &= left - 1 {
		i := tr.first + bits.TrailingZeros64(left)
		if !tr.late {
			s.dropCopy(tr.child.task, i)
		}
		if !tr.reopened {
			tr.child.reopen(i)
		}
	}
	c.downs = without(c.downs, tr)
	j, last := slices.Index(p.ups, tr), len(p.ups)-1
	p.ups[j], p.ups[last] = p.ups[last], nil
	p.ups = p.ups[:last]
	if tr.ahead {
		for _, before := range c.downs {
			if before.next == tr {
				before.next = nil
			}
		}
	} else {
		if !tr.reopened {
			tr.freeDown()
		}
		if !tr.late {
			tr.freeUp()
		}
		if next := tr.next; next != nil {
			next.ahead, next.since = false, s.now
			next.thinUp, next.thinDown = tr.thinUp, tr.thinDown
			next.occupy()
			s.follow(next)
		}
	}
	*tr = transfer{id: tr.id + 1<<slotBits}
	s.free = append(s.free, tr)
	s.queue(p)
	s.queue(c)
}

// cancel ends tr and tells the child.
func (s *Scheduler) cancel(tr *transfer) {
	if !tr.child.host.gone {
		s.decide(Cancel, tr, 0)
	}
	s.end(tr)
}

// yield takes the upload lane from tr, whose child is slow or dead: the parent
// has better to do, and others may be sent what it was to bring.
func (s *Scheduler) yield(tr *transfer) {
	if tr.next != nil {
		s.cancel(tr.next)
	}
	tr.late = true
	for left := tr.left; left != 0; left &= left - 1 {
		s.dropCopy(tr.child.task, tr.first+bits.TrailingZeros64(left))
	}
	tr.freeUp()
	s.queue(tr.parent.host)
}

// second lets the child of tr, whose parent lags, have the pieces from another
// parent as well: the first to bring one wins. A lane of the child stays with
// tr, so the last of its lanes is never left to one that lags.
func (s *Scheduler) second(tr *transfer) {
	child, late := tr.child, 1
	for _, other := range slices.Clone(child.host.downs) {
		if other.reopened && other.child == child && other.left != 0 && overlap(other, tr) {
			s.cancel(other)
		} else if other.reopened {
			late++
		}
	}
	if late > child.host.down {
		s.cancel(tr)
		return
	}
	if !tr.late {
		s.yield(tr)
	}
	tr.reopened = true
	for left := tr.left; left != 0; left &= left - 1 {
		child.reopen(tr.first + bits.TrailingZeros64(left))
	}
	tr.freeDown()
	s.queue(child.host)
}

func overlap(a, b *transfer) bool { return a.first < b.first+b.count && b.first < a.first+a.count }
