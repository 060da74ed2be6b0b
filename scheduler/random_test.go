package scheduler

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"damselfly.dev/pieces"
)

// region is a dumb twin of the hosts: it follows decisions in any order, at any
// time, and tells the scheduler what comes of them, along with lies.
type region struct {
	s    *Scheduler
	rnd  *rand.Rand
	now  time.Time
	spec map[HostID]Host
	n    map[TaskID]int
	part map[HostID]map[TaskID]*pieces.Set
	told []Decision          // assignments that have not ended
	left map[TransferID]int  // pieces that have not come
	ever map[TransferID]bool // was told
	soon map[TransferID]bool // was said to end soon
	bad  map[HostID]bool     // send wrong bytes
	dead map[HostID]bool     // cannot be reached, though their session stands
}

func newRegion(seed uint64) *region {
	cfg := DefaultConfig()
	cfg.CrossOnce = seed%2 == 1
	return &region{
		s: New(cfg, rand.New(rand.NewPCG(seed, 1))), rnd: rand.New(rand.NewPCG(seed, 2)), now: time.Unix(1000, 0),
		spec: map[HostID]Host{}, n: map[TaskID]int{}, part: map[HostID]map[TaskID]*pieces.Set{}, left: map[TransferID]int{}, ever: map[TransferID]bool{}, soon: map[TransferID]bool{},
		bad: map[HostID]bool{}, dead: map[HostID]bool{},
	}
}

// settle takes the decisions and checks each against the facts.
func (r *region) settle() error {
	for _, d := range r.s.Decisions() {
		i := slices.IndexFunc(r.told, func(o Decision) bool { return o.Transfer == d.Transfer })
		if d.Kind == Cancel {
			if !r.ever[d.Transfer] {
				return fmt.Errorf("%+v cancels nothing", d)
			}
			if i >= 0 { // else it ended before the host heard of it
				r.told = slices.Delete(r.told, i, i+1)
			}
			continue
		}
		child, parent := r.part[d.Host][d.Task], r.part[d.Parent][d.Task]
		switch {
		case r.ever[d.Transfer]:
			return fmt.Errorf("%+v is told twice", d)
		case child == nil || parent == nil:
			return fmt.Errorf("%+v for who has not joined", d)
		case d.Count < 1 || d.First < 0 || d.First+d.Count > r.n[d.Task]:
			return fmt.Errorf("%+v is out of range", d)
		}
		for p := d.First; p < d.First+d.Count; p++ {
			// The child may have a piece by a transfer whose Cancel was on its way.
			if !parent.Has(p) && !r.promised(d.Parent, d.Task, p) {
				return fmt.Errorf("%+v: parent lacks %d", d, p)
			}
		}
		r.told = append(r.told, d)
		r.left[d.Transfer] = d.Count
		r.ever[d.Transfer] = true
	}
	return check(r.s)
}

// follow carries on one assignment that may be carried on, if there is one.
func (r *region) follow() {
	if len(r.told) > 0 {
		i := r.rnd.IntN(len(r.told))
		d := r.told[i]
		if r.rnd.IntN(3) == 0 {
			r.s.Soon(r.now, d.Host, d.Transfer)
			r.soon[d.Transfer] = true
			return
		}
		why, fails := Failure(0), true
		switch n := r.rnd.IntN(100); {
		case r.dead[d.Parent]:
			why = Gone
		case r.bad[d.Parent]:
			why = Corrupt
		case n < 3:
			why = Busy
		case n < 5:
			why = Cancelled
		default:
			fails = false
		}
		if fails {
			r.told = slices.Delete(r.told, i, i+1)
			r.s.Failed(r.now, d.Host, d.Transfer, why, time.Duration(r.rnd.IntN(1000))*time.Millisecond)
			return
		}
		p := d.First + d.Count - r.left[d.Transfer]
		if r.left[d.Transfer]--; r.left[d.Transfer] == 0 {
			r.told = slices.Delete(r.told, i, i+1)
		}
		if set := r.part[d.Host][d.Task]; set != nil {
			set.Add(p)
		}
		r.s.Done(r.now, d.Host, d.Transfer, p, time.Duration(r.rnd.IntN(1000))*time.Millisecond)
	}
}

// promised tells whether the host has said that the piece is about to be there.
func (r *region) promised(host HostID, task TaskID, p int) bool {
	return slices.ContainsFunc(r.told, func(d Decision) bool {
		return d.Host == host && d.Task == task && r.soon[d.Transfer] && d.First <= p && p < d.First+d.Count
	})
}

func (r *region) hostUp() {
	id := HostID(r.rnd.IntN(20))
	if _, ok := r.spec[id]; ok && r.rnd.IntN(4) > 0 {
		return
	}
	r.told = slices.DeleteFunc(r.told, func(d Decision) bool { return d.Host == id })
	h := Host{Up: r.rnd.IntN(4), Down: r.rnd.IntN(4), Zone: []string{"", "za", "zb"}[r.rnd.IntN(3)], Rack: "r" + string(rune('a'+r.rnd.IntN(3)))}
	r.spec[id] = h
	r.part[id] = map[TaskID]*pieces.Set{}
	r.bad[id], r.dead[id] = r.rnd.IntN(15) == 0, r.rnd.IntN(15) == 0
	r.s.HostUp(r.now, id, h)
}

func (r *region) hostDown(id HostID) {
	r.told = slices.DeleteFunc(r.told, func(d Decision) bool { return d.Host == id })
	delete(r.spec, id)
	delete(r.part, id)
	r.s.HostDown(r.now, id)
}

func (r *region) join(id HostID, task TaskID) {
	if r.spec[id].Seed || r.part[id] == nil {
		return
	}
	have := pieces.NewSet(r.n[task])
	if r.rnd.IntN(4) == 0 {
		for range r.rnd.IntN(r.n[task]) {
			have.Add(r.rnd.IntN(r.n[task]))
		}
	}
	if old := r.part[id][task]; old != nil && r.rnd.IntN(2) == 0 {
		have = old.Clone()
	}
	set := have.Clone()
	r.part[id][task] = &set
	switch r.rnd.IntN(10) {
	case 0:
		r.s.Hold(r.now, id, task, have)
	case 1, 2:
		r.s.JoinLazy(r.now, id, task, have)
	default:
		r.s.Join(r.now, id, task, have)
	}
}

// step does one random thing.
func (r *region) step() {
	r.now = r.now.Add(time.Duration(r.rnd.IntN(2000)) * time.Microsecond)
	id, task := HostID(r.rnd.IntN(20)), TaskID(r.rnd.IntN(3))
	n := r.n[task]
	at := r.rnd.IntN(n)
	count := 1 + r.rnd.IntN(n-at)
	set := r.part[id][task]
	switch k := r.rnd.IntN(100); {
	case k < 60:
		r.follow()
	case k < 66:
		r.hostUp()
	case k < 68:
		r.hostDown(id)
	case k < 76:
		r.join(id, task)
	case k < 78:
		if r.part[id] != nil {
			delete(r.part[id], task)
		}
		r.s.Leave(r.now, id, task)
	case k < 82:
		if set != nil {
			for i := range count {
				set.Add(at + i)
			}
		}
		r.s.Have(r.now, id, task, at, count)
	case k < 83:
		if set != nil {
			for i := range count {
				set.Remove(at + i)
			}
		}
		r.s.Lost(r.now, id, task, at, count)
	case k < 88:
		r.s.Want(r.now, id, task, Run{at, count}, Run{r.rnd.IntN(r.n[task]), 1})
	case k < 91:
		r.lie()
	case k < 92:
		r.again(task)
	default:
		r.now = r.now.Add(time.Duration(r.rnd.IntN(300)) * time.Millisecond)
		r.s.Tick(r.now)
	}
}

// again removes and adds a task.
func (r *region) again(task TaskID) {
	r.s.TaskRemove(r.now, task)
	for _, part := range r.part {
		delete(part, task)
	}
	r.add(task)
}

// lie tells the scheduler something that cannot be.
func (r *region) lie() {
	id, task := HostID(r.rnd.IntN(40)-10), TaskID(r.rnd.IntN(8)-2)
	tr := TransferID(r.rnd.Uint64() >> r.rnd.IntN(64))
	if len(r.told) > 0 && r.rnd.IntN(2) == 0 {
		d := r.told[r.rnd.IntN(len(r.told))]
		if tr = d.Transfer; d.Host == id {
			return
		}
	}
	huge := []int{-1, 0, 1 << 40, 1<<63 - 1, -1 << 63, 77}
	a, b := huge[r.rnd.IntN(len(huge))], huge[r.rnd.IntN(len(huge))]
	r.s.Done(r.now, id, tr, a, time.Duration(b))
	r.s.Failed(r.now, id, tr, Failure(r.rnd.IntN(9)-2), -time.Hour)
	if r.n[task] < 78 {
		r.s.Have(r.now, id, task, a, b)
		r.s.Lost(r.now, id, task, a, b)
		r.s.Want(r.now, id, task, Run{a, b})
	}
	r.s.Join(r.now, id, task, pieces.FullSet(77))
	r.s.HostDown(r.now, 99)
	r.s.TaskRemove(r.now, 99)
	r.s.Tick(r.now.Add(-time.Hour))
}

func TestRandomEvents(t *testing.T) {
	for seed := range uint64(60) {
		r := newRegion(seed)
		r.start()
		for step := range 1500 {
			r.step()
			if r.rnd.IntN(3) > 0 {
				continue
			}
			if err := r.settle(); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
		}
		if err := r.calm(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

// start makes a seed and three tasks.
func (r *region) start() {
	r.spec[0] = Host{Up: 2, Seed: true}
	r.part[0] = map[TaskID]*pieces.Set{}
	r.s.HostUp(r.now, 0, r.spec[0])
	for task := range TaskID(3) {
		r.add(task)
		set := pieces.NewSet(r.n[task])
		r.part[0][task] = &set
		r.s.Join(r.now, 0, task, set.Clone())
	}
}

func (r *region) add(task TaskID) {
	n := []int{1, 10, 150}[task]
	r.n[task] = n
	r.s.TaskAdd(r.now, task, pieces.Layout{Length: int64(n) * pieces.MinPieceSize, PieceSize: pieces.MinPieceSize})
}

// calm ends all trouble and leaves one host, a seed or another, with all pieces:
// every host that wants them, and can receive, must get them.
func (r *region) calm() error {
	clear(r.bad)
	clear(r.dead)
	r.hostDown(0)
	source := HostID(0)
	if r.rnd.IntN(2) == 0 {
		r.start()
	} else {
		source = 50
		r.spec[source] = Host{Up: 1}
		r.part[source] = map[TaskID]*pieces.Set{}
		r.s.HostUp(r.now, source, r.spec[source])
	}
	for task, n := range r.n {
		full := pieces.FullSet(n)
		r.part[source][task] = &full
		r.s.Join(r.now, source, task, full.Clone())
	}
	for range 4000 {
		r.now = r.now.Add(100 * time.Millisecond)
		r.s.Tick(r.now)
		if err := r.settle(); err != nil {
			return err
		}
		for range 20 {
			r.follow()
		}
		if r.fed() {
			return nil
		}
	}
	return fmt.Errorf("somebody is left hungry")
}

func (r *region) fed() bool {
	for _, h := range r.s.list {
		for _, p := range h.wanting {
			if h.down > 0 && (!p.lazy || p.needs > 0) {
				return false
			}
		}
	}
	return true
}
