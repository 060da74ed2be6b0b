package supernode

import (
	"math/bits"
	"time"

	"damselfly.dev/scheduler"
	"damselfly.dev/supernode/api"
)

const maxAgo = time.Minute // that a host may say a piece came before it says so

// transfer is one that a host has been told to make.
type transfer struct {
	task         *task
	parent       scheduler.HostID
	first, count int
	left         uint64 // pieces that have not come, by bit
	crosses      bool   // into the host's zone
}

// decide passes on what the scheduler has decided.
func (r *region) decide() {
	for _, d := range r.sched.Decisions() {
		host := r.hosts[d.Host]
		if host == nil {
			continue
		}
		id := uint64(d.Transfer)
		if d.Kind == scheduler.Cancel {
			if _, ok := host.transfers[d.Transfer]; ok {
				delete(host.transfers, d.Transfer)
				r.metrics.transfers[resultCancelled].Inc()
				host.send(message{size: 16, add: func(b *api.Down) { b.Cancel = append(b.Cancel, id) }})
			}
			continue
		}
		t := r.nums[d.Task]
		if t == nil {
			continue
		}
		if t.untold {
			if m := t.members[d.Host]; m != nil {
				m.tell(t)
			}
		}
		host.transfers[d.Transfer] = transfer{task: t, parent: d.Parent, first: d.First, count: d.Count, left: 1<<d.Count - 1, crosses: d.Crosses}
		a := api.Assign{Transfer: id, Task: int32(d.Task), First: d.First, Count: d.Count}
		if d.Parent != seed {
			a.Parent = r.hosts[d.Parent].addr
			host.send(message{size: 96, assign: a})
			continue
		}
		size := t.layout.Offset(d.First+d.Count) - t.layout.Offset(d.First)
		if size > api.MaxInline {
			size = 0
		}
		host.send(message{size: 96 + int(size), add: func(b *api.Down) {
			if size > 0 {
				a.Data = host.inline(t.content, t.layout.Offset(a.First), size)
			}
			b.Assign = append(b.Assign, a)
		}})
	}
}

// known returns the host's transfer with this id, if it has one. Reports and
// cancellations cross, but who reports ever more of none loses its session.
func (s *session) known(id scheduler.TransferID) (transfer, bool) {
	tr, ok := s.transfers[id]
	switch {
	case ok:
		s.strays = max(s.strays-1, 0)
	default:
		if s.strays++; s.strays > maxStrays {
			s.end(errFlood)
		}
	}
	return tr, ok
}

// done notes a piece that has come.
func (r *region) done(now time.Time, s *session, d api.Done) {
	id, piece := scheduler.TransferID(d.Transfer), d.Piece
	tr, ok := s.known(id)
	if !ok || piece < tr.first || piece >= tr.first+tr.count {
		return
	}
	if h := s.holds[tr.task.id]; h != nil && h.layout == tr.task.layout {
		h.have.Add(piece)
	}
	if bit := uint64(1) << (piece - tr.first); tr.crosses && tr.left&bit != 0 {
		r.metrics.crossingBytes.Add(float64(tr.task.layout.Size(piece)))
	}
	if tr.left &^= 1 << (piece - tr.first); tr.left == 0 {
		delete(s.transfers, id)
		r.metrics.transfers[resultOK].Inc()
	} else {
		s.transfers[id] = tr
	}
	ago := time.Duration(min(max(d.AgoMS, 0), maxAgo.Milliseconds())) * time.Millisecond
	r.sched.Done(now, s.id, id, piece, ago)
}

// failures says what the scheduler and the metrics call a failure.
var failures = map[api.Failure]struct {
	why    scheduler.Failure
	result string
}{
	api.Busy:    {scheduler.Busy, resultBusy},
	api.Gone:    {scheduler.Gone, resultGone},
	api.Corrupt: {scheduler.Corrupt, resultCorrupt},
	api.Local:   {scheduler.Cancelled, resultLocal},
}

func (r *region) failed(now time.Time, s *session, f api.Failed) {
	id := scheduler.TransferID(f.Transfer)
	why, known := failures[f.Why]
	tr, ok := s.known(id)
	if !ok || !known {
		return
	}
	delete(s.transfers, id)
	r.metrics.transfers[why.result].Inc()
	if f.Why == api.Corrupt {
		r.metrics.verifyFailures.Inc()
		r.verify(tr)
	}
	retry := time.Duration(min(max(f.RetryMS, 0), 60_000)) * time.Millisecond
	r.sched.Failed(now, s.id, id, why.why, retry)
}

// verify has the parent of a transfer look at the piece that came wrong: it may
// have rotted on its disk.
func (r *region) verify(tr transfer) {
	t, i := tr.task, tr.first+bits.TrailingZeros64(tr.left)
	if tr.parent == seed && r.origin.ctx.Err() == nil {
		r.origin.wg.Go(func() { t.content.Recheck(i) })
		return
	}
	if p := r.hosts[tr.parent]; p != nil {
		p.send(message{size: 96, add: func(b *api.Down) {
			b.Verify = append(b.Verify, api.Verify{Task: string(t.id), First: i, Count: 1})
		}})
	}
}
