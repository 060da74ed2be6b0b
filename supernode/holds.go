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
}

// hold notes what a host says it has. Of what a URL gives nobody can tell which
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
	s.holding(id, nil)
	if len(s.holds) >= maxHeld || s.heldBytes+len(h.Have) > maxHeldBytes {
		return
	}
	s.holding(id, &holding{h.Layout, have})
	if t != nil {
		r.sched.Hold(now, s.id, t.num, have)
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
