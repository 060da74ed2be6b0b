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
	if err := checkLinks(s); err != nil {
		return err
	}
	if len(s.work) != 0 {
		return fmt.Errorf("%d hosts not looked at", len(s.work))
	}
	return nil
}

func checkTask(s *Scheduler, t *task) error {
	seeds := 0
	for slot, p := range t.peers {
		if p == nil {
			if t.room.has(slot) || t.hungry.has(slot) || t.all.members.has(slot) || !slices.Contains(t.slots, slot) {
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
		if err := checkPeer(s, p); err != nil {
			return fmt.Errorf("host %d: %w", p.host.id, err)
		}
	}
	if seeds != len(t.seeds) {
		return fmt.Errorf("%d seeds, listed %d", seeds, len(t.seeds))
	}
	for _, z := range append(slices.Clone(t.zones), t.all) {
		if err := checkZone(t, z); err != nil {
			return fmt.Errorf("zone %+v: %w", z.link, err)
		}
	}
	return nil
}

func checkPeer(s *Scheduler, p *peer) error {
	t := p.task
	if ruled := s.cfg.CrossOnce && p.host.zone != ""; ruled != (p.zone.link != nil) || ruled && p.zone.link.name != p.host.zone || !p.zone.members.has(p.slot) {
		return fmt.Errorf("stands in another zone")
	}
	has, needs := 0, 0
	for i := range t.n {
		if p.have.has(i) {
			has++
		}
		if t.holders[i].has(p.slot) != (p.have.has(i) && !p.host.seed) {
			return fmt.Errorf("is wrongly among the holders of %d", i)
		}
		coming := 0
		for _, tr := range p.host.downs {
			if tr.child == p && tr.covers(i) && !tr.reopened {
				coming++
				if tr.soon && !p.have.has(i) {
					return fmt.Errorf("piece %d is promised and not had", i)
				}
			}
		}
		if coming > 1 {
			return fmt.Errorf("piece %d comes to it %d times", i, coming)
		}
		if want := p.wants && (!p.lazy || p.want != nil && p.want.has(i)) && !p.have.has(i) && coming == 0; p.need.has(i) != want {
			return fmt.Errorf("needs piece %d: %v, want %v", i, p.need.has(i), want)
		}
		if p.need.has(i) {
			needs++
		}
	}
	if has != p.has || needs != p.needs {
		return fmt.Errorf("has %d needs %d, counted %d and %d", has, needs, p.has, p.needs)
	}
	if listed := p.wants && has < t.n; listed != p.listed || listed != slices.Contains(p.host.wanting, p) {
		return fmt.Errorf("wants more: %v, listed %v", listed, p.listed)
	}
	if p.offered != slices.Contains(p.host.offers, p) {
		return fmt.Errorf("offered %v", p.offered)
	}
	// An idle host must be found by those who look for one; one that rests
	// is looked at by Tick.
	if p.host.sends(s.now, true) && !p.host.resting && !p.host.seed && !t.room.has(p.slot) && !p.offered {
		return fmt.Errorf("has room and nobody can find it")
	}
	if p.host.receives(s.now, true) && !p.host.resting && p.needs > 0 && !t.hungry.has(p.slot) {
		return fmt.Errorf("is hungry and nobody can find it")
	}
	return nil
}

// checkZone counts again what the zone has, and that of no piece two copies
// cross into it side by side, other than to hosts that send nothing.
func checkZone(t *task, z *zone) error {
	peers, openers := 0, 0
	for _, p := range t.peers {
		if p != nil && z.members.has(p.slot) {
			peers++
			if p.wants && !p.lazy && p.host.opens() {
				openers++
			}
		}
	}
	if peers != z.peers || z.link != nil && (openers != z.openers || peers == 0) {
		return fmt.Errorf("%d peers, %d openers, counted %d and %d", peers, openers, z.peers, z.openers)
	}
	for i := range t.n {
		holds, copies, served, crossing := int32(0), int32(0), int32(0), 0
		seeded := false
		for _, p := range t.peers {
			if p == nil || !z.members.has(p.slot) {
				continue
			}
			n := int32(0)
			switch {
			case p.have.has(i) && p.host.seed:
				seeded = true
			case p.have.has(i):
				holds++
				n++
			}
			for _, tr := range p.host.downs {
				if tr.child == p && tr.covers(i) {
					if !tr.late && !tr.soon {
						n++
					}
					if tr.link != nil && !tr.soon && p.host.up > 0 && !p.host.doubted {
						crossing++
					}
				}
			}
			if p.host.doubted {
				n = 0
			}
			copies += n
			if p.host.up > 0 {
				served += n
			}
		}
		if holds != z.holds[i] || copies != z.copies[i] || z.held.has(i) != (holds > 0) || z.copied.has(i) != (copies > 0) {
			return fmt.Errorf("piece %d: %d holders and %d copies, counted %d and %d", i, holds, copies, z.holds[i], z.copies[i])
		}
		if z.link == nil {
			continue
		}
		if served != z.served[i] || z.barred.has(i) != (served > 0 || seeded) {
			return fmt.Errorf("piece %d: %d copies to be had, counted %d, barred %v", i, served, z.served[i], z.barred.has(i))
		}
		if crossing > 1 {
			return fmt.Errorf("piece %d crosses %d times at once", i, crossing)
		}
	}
	return nil
}

func checkTransfer(s *Scheduler, tr *transfer) error {
	if s.lags(tr, 1) && s.now-tr.since <= s.young() {
		return fmt.Errorf("lags at %v and is young up to %v", s.now-tr.since, s.young())
	}
	c, p := tr.child, tr.parent
	switch {
	case s.find(tr.id) != tr:
		return fmt.Errorf("cannot be found")
	case (tr.link != nil) != crosses(c, p) || tr.link != nil && (tr.late || tr.link != c.zone.link):
		return fmt.Errorf("late %v crosses %v, counted %v", tr.late, crosses(c, p), tr.link != nil)
	case c.task != p.task || c.host == p.host:
		return fmt.Errorf("goes nowhere")
	case !slices.Contains(c.host.downs, tr) || !slices.Contains(p.host.ups, tr):
		return fmt.Errorf("is not known to its hosts")
	case tr.left == 0:
		return fmt.Errorf("has ended")
	case p.host.banned:
		return fmt.Errorf("has a banned parent")
	case tr.reopened && !tr.late:
		return fmt.Errorf("is reopened, and not late")
	}
	for i := range c.task.n {
		if tr.covers(i) && !p.have.has(i) {
			return fmt.Errorf("parent lacks piece %d", i)
		}
		if tr.covers(i) && c.have.has(i) && !c.promised(i) {
			return fmt.Errorf("child has piece %d", i)
		}
	}
	return nil
}

func checkHost(h *host) error {
	in, thin, reopened, soon := 0, 0, 0, 0
	for _, tr := range h.downs {
		if tr.reopened {
			reopened++
		}
		if tr.soon {
			soon++
		}
		if !tr.reopened && !tr.soon {
			in++
			if tr.thinDown {
				thin++
			}
		}
	}
	if reopened != h.reopened || soon != h.ending {
		return fmt.Errorf("%d downloads reopened and %d about to end, counted %d and %d", reopened, soon, h.reopened, h.ending)
	}
	if in != h.in || thin != h.thinIn {
		return fmt.Errorf("%d download lanes in use, %d thinly, counted %d and %d", in, thin, h.in, h.thinIn)
	}
	if in-min(thin, h.down) > h.down || len(h.downs)-soon > most*h.down || soon > (mostSoon+most)*h.down {
		return fmt.Errorf("%d downloads, %d download lanes in use of %d, %d thinly", len(h.downs), in, h.down, thin)
	}
	out := 0
	thin, soon = 0, 0
	for _, tr := range h.ups {
		if tr.soon {
			soon++
		}
		if !tr.late && !tr.soon {
			out++
			if tr.thinUp {
				thin++
			}
		}
	}
	if out != h.out || thin != h.thinOut || soon != h.leaving {
		return fmt.Errorf("%d upload lanes in use, %d thinly, counted %d and %d", out, thin, h.out, h.thinOut)
	}
	if out-min(thin, h.up) > h.up || len(h.ups)-soon > most*h.up {
		return fmt.Errorf("%d uploads, %d upload lanes in use of %d, %d thinly", len(h.ups), out, h.up, thin)
	}
	if h.lent > h.up || h.lent < min(h.up, 1) {
		return fmt.Errorf("%d of %d upload lanes lent", h.lent, h.up)
	}
	return nil
}

func checkLinks(s *Scheduler) error {
	hosts, in, out := map[*link]int{}, map[*link]int{}, map[*link]int{}
	for _, h := range s.list {
		if h.link != nil {
			hosts[h.link]++
		}
	}
	for _, tr := range s.transfers {
		if tr.link != nil && !tr.soon {
			in[tr.link]++
			out[tr.parent.host.link]++
		}
	}
	for name, l := range s.links {
		if l.name != name || l.hosts != hosts[l] || l.hosts == 0 || l.in.flows != in[l] || l.out.flows != out[l] || min(l.in.window, l.out.window) < minCrossings {
			return fmt.Errorf("link %+v, counted %d hosts, %d flows in and %d out", *l, hosts[l], in[l], out[l])
		}
	}
	if len(hosts) != len(s.links) {
		return fmt.Errorf("%d links, known %d", len(hosts), len(s.links))
	}
	return nil
}
