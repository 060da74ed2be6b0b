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
	since         time.Duration // when it was told or last brought a piece
	thinUp        bool          // the child takes a fraction of what the parent's lane gives,
	thinDown      bool          // or the parent gives a fraction of what the child's takes
	link          *link         // that it crosses, where the rule is for it
	soon          bool          // its last bytes are on their way: its lanes are given away, and the child counts as having its pieces
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

// assign makes child get the run from parent, on a lane of either. The child
// needs all of it and the parent has all of it.
func (s *Scheduler) assign(child, parent *peer, first, count int) {
	c, p := child.host, parent.host
	tr := s.newTransfer()
	*tr = transfer{
		id: tr.id, child: child, parent: parent, first: first, count: count,
		left: ^uint64(0) >> (maxRun - count), since: s.now,
	}
	for i := first; i < first+count; i++ {
		child.need.clear(i)
		child.addCopy(i)
	}
	child.needs -= count
	if crosses(child, parent) {
		tr.link = child.zone.link
	}
	c.downs = append(c.downs, tr)
	p.ups = append(p.ups, tr)
	tr.thinUp = p.sendRate > 0 && c.recvRate > thinness*p.sendRate
	tr.thinDown = c.recvRate > 0 && p.sendRate > thinness*c.recvRate
	tr.occupy()
	s.decide(Assign, tr)
}

// occupy takes a lane for tr at both ends.
func (tr *transfer) occupy() {
	c, p := tr.child.host, tr.parent.host
	c.in++
	p.out++
	if tr.link != nil {
		tr.cross(1)
	}
	if tr.thinUp {
		p.thinOut++
	}
	if tr.thinDown {
		c.thinIn++
	}
}

// cross counts tr, or no longer, at the gates it goes through.
func (tr *transfer) cross(n int) {
	tr.link.in.flows += n
	if l := tr.parent.host.link; l != nil {
		l.out.flows += n
	}
}

// vacate gives up the lane of either end, or both.
func (tr *transfer) vacate(up, down bool) {
	c, p := tr.child.host, tr.parent.host
	if up {
		p.out--
		if tr.link != nil {
			tr.cross(-1)
		}
		if tr.thinUp {
			p.thinOut--
		}
	}
	if down {
		c.in--
		if tr.thinDown {
			c.thinIn--
		}
	}
}

func (s *Scheduler) decide(k Kind, tr *transfer) {
	s.decisions = append(s.decisions, Decision{
		Kind: k, Transfer: tr.id, Task: tr.child.task.id,
		Host: tr.child.host.id, Parent: tr.parent.host.id, First: tr.first, Count: tr.count,
		Crosses: tr.child.host.zone != "" && tr.child.host.zone != tr.parent.host.zone,
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
// child, which needs it again, and to the count of copies.
func (s *Scheduler) end(tr *transfer) {
	c, p := tr.child.host, tr.parent.host
	c.downs = without(c.downs, tr)
	if tr.reopened {
		c.reopened--
	}
	j, last := slices.Index(p.ups, tr), len(p.ups)-1
	p.ups[j], p.ups[last] = p.ups[last], nil
	p.ups = p.ups[:last]
	tr.vacate(!tr.late && !tr.soon, !tr.reopened && !tr.soon)
	if tr.soon {
		c.ending--
		p.leaving--
	}
	ended := *tr
	*tr = transfer{id: tr.id + 1<<slotBits}
	s.free = append(s.free, tr)
	s.giveBack(&ended)
	s.queue(p)
	s.queue(c)
}

// giveBack makes what tr, which has ended, has not brought something that its
// child needs. What it had promised nobody gets from the child any more.
func (s *Scheduler) giveBack(tr *transfer) {
	for left := tr.left; left != 0; left &= left - 1 {
		i := tr.first + bits.TrailingZeros64(left)
		switch {
		case tr.soon:
			s.lose(tr.child, i)
			continue
		case !tr.late:
			s.dropCopy(tr.child, i)
		}
		if !tr.reopened {
			tr.child.reopen(i)
		}
	}
	if tr.soon && tr.left != 0 {
		s.changed(tr.child)
	}
}

// cancel ends tr and tells the child.
func (s *Scheduler) cancel(tr *transfer) {
	if !tr.child.host.gone {
		s.decide(Cancel, tr)
	}
	s.end(tr)
}

// yield takes the upload lane from tr: others may have it, and may be sent what
// tr was to bring.
func (s *Scheduler) yield(tr *transfer) {
	tr.late = true
	for left := tr.left; left != 0; left &= left - 1 {
		s.dropCopy(tr.child, tr.first+bits.TrailingZeros64(left))
	}
	tr.vacate(!tr.soon, false)
	s.queue(tr.parent.host)
}

// second lets the child of tr, which is late, get the pieces from another parent
// as well: the first to bring one wins. No piece is sent to it three times, and
// not all that comes to it may be late ones.
func (s *Scheduler) second(tr *transfer) {
	late := 0
	for _, other := range tr.child.host.downs {
		if other.reopened {
			late++
			if other.child == tr.child && other.first < tr.first+tr.count && tr.first < other.first+other.count {
				return
			}
		}
	}
	if late >= tr.child.host.down {
		return
	}
	tr.reopened = true
	tr.child.host.reopened++
	for left := tr.left; left != 0; left &= left - 1 {
		tr.child.reopen(tr.first + bits.TrailingZeros64(left))
	}
	tr.vacate(false, !tr.soon)
	s.queue(tr.child.host)
}
