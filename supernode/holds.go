package supernode

import (
	"time"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const (
	maxHeld      = 2000    // tasks that a host may say it holds
	maxHeldBytes = 4 << 20 // bytes of the sets of their pieces
)

// holding is what a host has of a task.
type holding struct {
	layout pieces.Layout
	have   pieces.Set
	digest pieces.Digest // that it says the first of them has
	proved bool          // it has joined the task, or the digest was right
	given  bool          // it had all with the answer to its join
}

// hold notes what a host says it has; others are told of it only once it is proved. Of what a URL gives nobody can tell which
// version it is, so that counts only when it came through this session.
func (r *region) hold(now time.Time, s *session, h api.Hold) {
	id, err := pieces.ParseTaskID(h.Task)
	if err != nil || id.Content() == "" || h.Layout.Validate() != nil {
		return
	}
	have, err := pieces.ParseSet(h.Layout.Count(), h.Have)
	if err != nil {
		return
	}
	t := r.tasks[id]
	if t != nil && t.layout != h.Layout {
		return
	}
	var was holding
	if h := s.holds[id]; h != nil {
		was = *h
	}
	s.holding(id, nil)
	if len(s.holds) >= maxHeld || s.heldBytes+len(h.Have) > maxHeldBytes {
		return
	}
	of := &holding{layout: h.Layout, have: have, proved: was.proved, given: was.given}
	if ds, err := pieces.ParseDigests(h.Digest); err == nil && len(ds) == 1 {
		of.digest = ds[0]
	}
	s.holding(id, of)
	if t != nil {
		r.believe(now, s, t)
	}
}

// believe has others sent to a host for what it holds of a task, if it has shown that
// it does: who merely says so would learn who wants it. As long as its proof cannot be
// looked at, it waits for that.
func (r *region) believe(now time.Time, s *session, t *task) {
	h := s.holds[t.id]
	if h == nil || h.layout != t.layout {
		return
	}
	for first := range h.have.All() {
		if h.proved {
			break
		}
		if !t.published.Has(first) {
			t.doubted[s.id] = first
			return
		}
		if h.proved = t.content.Digest(first) == h.digest; !h.proved {
			return
		}
	}
	if h.given {
		r.sched.Given(now, s.id, t.num, h.have)
		return
	}
	r.sched.Hold(now, s.id, t.num, h.have)
}

// judge looks at the proofs that piece i, which has come, is.
func (r *region) judge(now time.Time, t *task, i int) {
	for id, first := range t.doubted {
		if first != i {
			continue
		}
		delete(t.doubted, id)
		if s := r.hosts[id]; s != nil && t.members[id] == nil {
			r.believe(now, s, t)
		}
	}
}

// holding makes h what s is known to hold of a task; nil is nothing.
func (s *session) holding(id pieces.TaskID, h *holding) {
	if old := s.holds[id]; old != nil {
		s.heldBytes -= (old.have.Cap() + 7) / 8
	}
	delete(s.holds, id)
	if h != nil {
		s.heldBytes += (h.have.Cap() + 7) / 8
		s.holds[id] = h
	}
}
