package scheduler

import (
	"time"

	"damselfly.dev/pieces"
)

// A task is one TaskAdd to its TaskRemove.
type task struct {
	id     TaskID
	layout pieces.Layout
	n      int

	peers []*peer // by slot; nil where one is free
	slots []int   // free slots
	seeds []*peer

	holders []bitset // by piece, the slots of who has it, but for seeds
	all     *zone
	zones   []*zone // with the rule, the others
	turn    int     // of them, whom somebody last looked for a child in

	fresh int // where to look on for a piece without a copy

	// Slots of who may have a lane free. Both are true of at least those that
	// have: who is found without one is cleared, and set again when it has one
	// and finds no use for it.
	room   roster // may send; no seeds
	hungry roster // needs pieces and may receive
	sweep  int    // the slot at which Tick goes on through hungry
}

// A peer is one host's part in one task, from Join to Leave.
type peer struct {
	host  *host
	task  *task
	slot  int
	wants bool          // what it lacks; else it only serves
	zone  *zone         // where it looks for pieces first
	since time.Duration // when it last began to want
	have  bitset
	need  bitset // wanted, not had, and in no transfer or only in one that lags
	has   int
	needs int

	lazy    bool   // it wants only what readers wait for
	want    bitset // what readers wait for; nil is nothing
	offered bool   // stands in host.offers
	listed  bool   // stands in host.wanting
}

func newTask(id TaskID, l pieces.Layout) *task {
	n := l.Count()
	t := &task{
		id: id, layout: l, n: n, holders: make([]bitset, n), all: newZone(n, 0, nil),
	}
	t.grow(64)
	return t
}

// grow makes places for so many peers.
func (t *task) grow(n int) {
	words := (n + 63) / 64
	all := make(bitset, words*t.n)
	for i, h := range t.holders {
		t.holders[i] = all[i*words : (i+1)*words : (i+1)*words]
		copy(t.holders[i], h)
	}
	for _, z := range append(t.zones, t.all) {
		z.members = append(make(bitset, 0, words), z.members...)[:words]
	}
	t.room.grow(words)
	t.hungry.grow(words)
	for i := words*64 - 1; i >= len(t.peers); i-- {
		t.slots = append(t.slots, i)
	}
	t.peers = append(t.peers, make([]*peer, words*64-len(t.peers))...)
}

func (t *task) add(h *host) *peer {
	if len(t.slots) == 0 {
		t.grow(2 * len(t.peers))
	}
	last := len(t.slots) - 1
	p := &peer{host: h, task: t, slot: t.slots[last], have: newBitset(t.n), need: newBitset(t.n)}
	t.slots = t.slots[:last]
	t.peers[p.slot] = p
	t.enter(p)
	if h.seed {
		t.seeds = append(t.seeds, p)
	}
	return p
}

// remove takes out a peer that has no piece and no transfer.
func (t *task) remove(p *peer) {
	t.quit(p)
	t.room.remove(p.slot)
	t.hungry.remove(p.slot)
	t.peers[p.slot] = nil
	t.slots = append(t.slots, p.slot)
	t.seeds = without(t.seeds, p)
}

// take notes that p has piece i, which it had not.
func (p *peer) take(i int) {
	p.have.set(i)
	p.has++
	if p.need.has(i) {
		p.need.clear(i)
		p.needs--
	}
	t := p.task
	if !p.host.seed {
		t.holders[i].set(p.slot)
		p.addCopy(i)
		t.all.addHolder(i)
	}
	if z := p.zone; z.link != nil {
		if p.host.seed {
			t.bar(z, i)
		} else {
			z.addHolder(i)
		}
	}
}

// lose is the reverse of take. It tells whether it was the last copy.
func (p *peer) lose(i int) (last bool) {
	p.have.clear(i)
	p.has--
	t := p.task
	if !p.host.seed {
		t.holders[i].clear(p.slot)
		last = p.dropCopy(i)
		t.all.dropHolder(i)
	}
	if z := p.zone; z.link != nil {
		if p.host.seed {
			t.bar(z, i)
		} else {
			z.dropHolder(i)
		}
	}
	p.reopen(i)
	return last
}

// reopen makes piece i one that p needs, if it wants and lacks it.
func (p *peer) reopen(i int) {
	if p.wants && !p.have.has(i) && !p.need.has(i) && (!p.lazy || p.want != nil && p.want.has(i)) {
		p.need.set(i)
		p.needs++
	}
}
