package scheduler

import (
	"fmt"
	"slices"
)

// check compares all that s keeps for speed with what follows from the plain
// facts: who has which piece, who wants, and which transfers run.
func check(s *Scheduler) error {
	for _, t := range s.order {
		if err := checkTask(s, t); err != nil {
			return fmt.Errorf("task %d: %w", t.id, err)
		}
	}
	live := 0
	for _, tr := range s.transfers {
		if tr.child == nil {
			continue
		}
		live++
		if err := checkTransfer(s, tr); err != nil {
			return fmt.Errorf("transfer %d<-%d %d+%d of task %d: %w", tr.child.host.id, tr.parent.host.id, tr.first, tr.count, tr.child.task.id, err)
		}
	}
	if live+len(s.free) != len(s.transfers) {
		return fmt.Errorf("%d transfers and %d free slots of %d", live, len(s.free), len(s.transfers))
	}
	for i, h := range s.list {
		if h.index != i || s.hosts[h.id] != h || h.gone {
			return fmt.Errorf("host %d is lost", h.id)
		}
		if err := checkHost(h); err != nil {
			return fmt.Errorf("host %d: %w", h.id, err)
		}
	}
	if len(s.work) != 0 {
		return fmt.Errorf("%d hosts not looked at", len(s.work))
	}
	return nil
}

func checkTask(s *Scheduler, t *task) error {
	holds, copies := make([]int32, t.n), make([]int32, t.n)
	seeds := 0
	for slot, p := range t.peers {
		if p == nil {
			if t.room.has(slot) || t.hungry.has(slot) || !slices.Contains(t.slots, slot) {
				return fmt.Errorf("slot %d is half free", slot)
			}
			continue
		}
		if s.hosts[p.host.id] != p.host || p.host.peers[t.id] != p || p.slot != slot {
			return fmt.Errorf("peer %d is lost", p.host.id)
		}
		if p.host.seed {
			seeds++
		}
		has, needs := 0, 0
		for i := range t.n {
			if p.have.has(i) {
				has++
				if !p.host.seed {
					holds[i]++
					copies[i]++
				}
			}
			if t.holders[i].has(slot) != (p.have.has(i) && !p.host.seed) {
				return fmt.Errorf("host %d is wrongly among the holders of %d", p.host.id, i)
			}
			coming := 0
			for _, tr := range p.host.downs {
				if tr.child == p && tr.covers(i) {
					if !tr.late {
						copies[i]++
					}
					if !tr.reopened {
						coming++
					}
				}
			}
			if coming > 1 {
				return fmt.Errorf("piece %d comes to host %d %d times", i, p.host.id, coming)
			}
			if want := p.wants && !p.have.has(i) && coming == 0; p.need.has(i) != want {
				return fmt.Errorf("host %d needs piece %d: %v, want %v", p.host.id, i, p.need.has(i), want)
			}
			if p.need.has(i) {
				needs++
			}
		}
		if has != p.has || needs != p.needs {
			return fmt.Errorf("host %d: has %d needs %d, counted %d and %d", p.host.id, has, needs, p.has, p.needs)
		}
		if listed := p.wants && has < t.n; listed != p.listed || listed != slices.Contains(p.host.wanting, p) {
			return fmt.Errorf("host %d wants more: %v, listed %v", p.host.id, listed, p.listed)
		}
		if p.offered != slices.Contains(p.host.offers, p) {
			return fmt.Errorf("host %d offered %v", p.host.id, p.offered)
		}
		// An idle host must be found by those who look for one; one that rests
		// is looked at by Tick.
		if p.host.sends(s.now, true) && !p.host.resting && !p.host.seed && !t.room.has(slot) && !p.offered {
			return fmt.Errorf("host %d has room and nobody can find it", p.host.id)
		}
		if p.host.receives(s.now, true) && !p.host.resting && p.needs > 0 && !t.hungry.has(slot) {
			return fmt.Errorf("host %d is hungry and nobody can find it", p.host.id)
		}
	}
	if seeds != len(t.seeds) {
		return fmt.Errorf("%d seeds, listed %d", seeds, len(t.seeds))
	}
	for i := range t.n {
		if holds[i] != t.holds[i] || copies[i] != t.copies[i] || t.held.has(i) != (holds[i] > 0) || t.copied.has(i) != (copies[i] > 0) {
			return fmt.Errorf("piece %d: %d holders and %d copies, counted %d and %d", i, holds[i], copies[i], t.holds[i], t.copies[i])
		}
	}
	return nil
}

func checkTransfer(s *Scheduler, tr *transfer) error {
	c, p := tr.child, tr.parent
	switch {
	case s.find(tr.id) != tr:
		return fmt.Errorf("cannot be found")
	case c.task != p.task || c.host == p.host:
		return fmt.Errorf("goes nowhere")
	case !slices.Contains(c.host.downs, tr) || !slices.Contains(p.host.ups, tr):
		return fmt.Errorf("is not known to its hosts")
	case tr.left == 0:
		return fmt.Errorf("has ended")
	case p.host.banned:
		return fmt.Errorf("has a banned parent")
	case tr.reopened && !tr.late, tr.late && (tr.before != nil || tr.next != nil), tr.before != nil && tr.next != nil:
		return fmt.Errorf("late %v reopened %v before %v next %v", tr.late, tr.reopened, tr.before != nil, tr.next != nil)
	case tr.next != nil && (tr.next.before != tr || tr.next.child.host != c.host || tr.next.parent.host != p.host):
		return fmt.Errorf("is followed by a stranger")
	}
	for i := range c.task.n {
		if tr.covers(i) && !p.have.has(i) {
			return fmt.Errorf("parent lacks piece %d", i)
		}
		if tr.covers(i) && c.have.has(i) {
			return fmt.Errorf("child has piece %d", i)
		}
	}
	return nil
}

func checkHost(h *host) error {
	in, thin, ahead := 0, 0, 0
	for _, tr := range h.downs {
		switch {
		case tr.before != nil:
			ahead++
		case !tr.reopened:
			in++
			if tr.thinDown {
				thin++
			}
		}
	}
	if in != h.in || thin != h.thinIn || ahead > in {
		return fmt.Errorf("%d download lanes in use, %d thinly, and %d ahead, counted %d and %d", in, thin, ahead, h.in, h.thinIn)
	}
	if in-min(thin, h.down) > h.down || len(h.downs) > most*h.down {
		return fmt.Errorf("%d downloads, %d download lanes in use of %d, %d thinly", len(h.downs), in, h.down, thin)
	}
	out := 0
	thin, ahead = 0, 0
	for _, tr := range h.ups {
		switch {
		case tr.before != nil:
			ahead++
		case !tr.late:
			out++
			if tr.thinUp {
				thin++
			}
		}
	}
	if out != h.out || thin != h.thinOut || ahead > out {
		return fmt.Errorf("%d upload lanes in use, %d thinly, and %d ahead, counted %d and %d", out, thin, ahead, h.out, h.thinOut)
	}
	if out-min(thin, h.up) > h.up || len(h.ups) > most*h.up {
		return fmt.Errorf("%d uploads, %d upload lanes in use of %d, %d thinly", len(h.ups), out, h.up, thin)
	}
	if h.lent > h.up || h.lent < min(h.up, 1) {
		return fmt.Errorf("%d of %d upload lanes lent", h.lent, h.up)
	}
	return nil
}
