package supernode

import (
	"errors"
	"maps"
	"slices"
	"time"

	"damselfly.dev/pieces"
	"damselfly.dev/scheduler"
	"damselfly.dev/supernode/api"
)

const (
	digestRun = 4096    // digests in one message
	maxGiven  = 1 << 20 // bytes given with the answers to joins from one tick to the next
)

// task is a content being distributed.
type task struct {
	id        pieces.TaskID
	num       scheduler.TaskID
	content   *pieces.Content // pinned
	layout    pieces.Layout
	published pieces.Set // pieces whose digests anyone may have
	order     []int      // in which they were published
	untold    bool       // some members were not told of all of them
	members   map[scheduler.HostID]*member
	fetch     *fetch                   // that fills it, or did; nil for none
	sparse    bool                     // the last piece may be given away before the whole is there
	wanted    map[int]int              // pieces that members' readers wait for, and of how many
	needed    time.Time                // when somebody last was found to need it
	told      int64                    // bytes, by the last Progress
	doubted   map[scheduler.HostID]int // hosts of which it is not known whether they hold it, by the piece that will tell
}

// member is a host that has joined a task.
type member struct {
	*session
	public   bool
	open     bool  // as the lease's
	lazy     bool  // it wants only what its readers wait for
	wants    []int // what they wait for, where the origin can be asked for it
	given    bool  // all of it with the answer to the join, and is none of the scheduler's
	ticketed time.Time
	told     int // how many of the task's order it has the digests of

	callers []source  // for whom it has joined, the latest last; none once it has all
	joined  time.Time // when it last did
	until   time.Time // when the origin is to be asked again about them
	asking  bool
}

// grant makes a host one of a task's members and answers its join, with data
// being all of a small content or nil. The lease is the region's from then on.
func (r *region) grant(s *session, j api.Join, l *lease, data []byte) {
	id, now, seq := l.ID(), time.Now(), j.Seq
	if r.hosts[s.id] != s {
		l.Release()
		return
	}
	idle := l.fetch != nil && errors.Is(l.fetch.err(), errIdle) // it has ended meanwhile
	if l.drops != r.origin.drops.Load() || idle {
		l.Release() // it may have been dropped meanwhile
		s.refuse(seq, errDropped)
		return
	}
	t := r.tasks[id]
	if t == nil {
		t = r.activate(now, l)
	} else {
		l.Release()
	}
	t.fillBy(l.fetch)
	m := t.members[s.id]
	fresh := m == nil
	if fresh {
		m = &member{session: s, ticketed: now, lazy: j.Lazy}
		t.members[s.id] = m
	}
	m.entitle(l, now)
	t.needed = now
	if fresh && data != nil && r.gives(s, t, len(data)) {
		m.given = true
		s.send(m.gift(t, seq, data))
		return
	}
	s.send(m.message(t, seq))
	if !fresh && !m.given {
		if m.lazy && !j.Lazy {
			r.whole(now, t, m)
		}
		return
	}
	m.given = false // it lacks it again
	m.tell(t)
	h := s.holds[id]
	if h == nil || h.layout != t.layout {
		h = &holding{layout: t.layout, have: pieces.NewSet(t.layout.Count())}
		s.holding(id, h)
	}
	h.proved, h.given = true, false
	if m.lazy {
		r.sched.JoinLazy(now, s.id, t.num, h.have)
		return
	}
	r.sched.Join(now, s.id, t.num, h.have)
}

// entitle notes for whom a host has joined.
func (m *member) entitle(l *lease, now time.Time) {
	m.public, m.open, m.joined = l.public, l.open, now
	if l.until.After(m.until) {
		m.until = l.until
	}
	if m.open {
		return
	}
	key := l.src.key()
	m.callers = slices.DeleteFunc(m.callers, func(s source) bool { return s.key() == key })
	if m.callers = append(m.callers, l.src); len(m.callers) > maxSpares {
		m.callers = m.callers[1:]
	}
}

// gives tells whether a host that joins gets all n bytes of a small content with
// the answer, and notes it as holding them. Not in a crowd: then the scheduler
// spreads them from host to host. Nor into another zone, which it counts; nor
// what a URL gives, of which a Hold does not tell the version.
func (r *region) gives(s *session, t *task, n int) bool {
	h := s.holds[t.id]
	if h != nil && h.have.Len() > 0 || s.far || t.id.Content() == "" || r.given+n > maxGiven {
		return false
	}
	r.given += n
	have := pieces.NewSet(1)
	have.Add(0)
	s.holding(t.id, &holding{layout: t.layout, have: have, proved: true, given: true})
	return true
}

// activate makes a task of a content, with all hosts that hold some of it.
func (r *region) activate(now time.Time, l *lease) *task {
	r.lastNum++
	t := &task{
		id: l.ID(), num: r.lastNum, content: l.Content, layout: l.Layout(),
		members: map[scheduler.HostID]*member{}, wanted: map[int]int{}, doubted: map[scheduler.HostID]int{}, needed: now,
		sparse: l.sparse(),
	}
	t.published = l.Have()
	last := t.layout.Count() - 1
	for i := range t.layout.Count() {
		switch {
		case !t.published.Has(i):
		case !l.Has(i), i == last && !l.whole() && !t.sparse:
			t.published.Remove(i)
		default:
			t.order = append(t.order, i)
		}
	}
	r.tasks[t.id], r.nums[t.num] = t, t
	r.sched.TaskAdd(now, t.num, t.layout)
	r.sched.Join(now, seed, t.num, t.published)
	for _, s := range r.hosts {
		if h := s.holds[t.id]; h != nil && h.layout == t.layout && h.have.Len() > 0 {
			r.believe(now, s, t)
		}
	}
	return t
}

// deactivate ends the distribution of a task. What hosts hold of it stays known.
func (r *region) deactivate(t *task) {
	r.sched.TaskRemove(time.Now(), t.num)
	r.decide() // cancels what is under way, while the task is known
	for _, m := range t.members {
		maps.DeleteFunc(m.transfers, func(_ scheduler.TransferID, tr transfer) bool { return tr.task == t })
	}
	if f := t.fetch; f != nil && f.demand != nil {
		f.demand.end(errIdle)
	}
	t.content.Release()
	delete(r.tasks, t.id)
	delete(r.nums, t.num)
}

// want notes what readers on a host wait for.
func (r *region) want(now time.Time, s *session, t *task, w api.Want) {
	m := t.members[s.id]
	if m == nil {
		return // who merely holds it gets none of it
	}
	asked := w.Runs(t.layout.Count())
	runs := make([]scheduler.Run, len(asked))
	var wants []int
	for k, a := range asked {
		runs[k] = scheduler.Run{First: a.First, Count: a.Count}
		for i := range a.Count {
			wants = append(wants, a.First+i)
		}
	}
	if w.Only && !m.lazy {
		r.narrow(now, t, m)
	}
	r.sched.Want(now, s.id, t.num, runs...)
	if m.lazy || t.sparse {
		t.demand(m, wants)
	}
	if m.lazy && w.All {
		r.whole(now, t, m)
	}
}

// narrow makes a member that wants all a lazy one.
func (r *region) narrow(now time.Time, t *task, m *member) {
	m.lazy = true
	r.sched.Leave(now, m.id, t.num)
	if h := m.holds[t.id]; h != nil && h.layout == t.layout {
		r.sched.JoinLazy(now, m.id, t.num, h.have)
	}
}

// whole makes a lazy member one that wants all.
func (r *region) whole(now time.Time, t *task, m *member) {
	m.lazy = false
	if h := m.holds[t.id]; h != nil {
		r.sched.Join(now, m.id, t.num, h.have)
	}
	if t.fetch != nil && t.fetch.demand != nil {
		t.fetch.demand.wantAll()
	}
}

// demand makes wants what a member's readers wait for, and asks the origin for what nobody
// else does, or no longer.
func (t *task) demand(m *member, wants []int) {
	old := m.wants
	m.wants = wants
	var more, less []int
	for _, i := range wants {
		if t.wanted[i]++; t.wanted[i] == 1 && !t.published.Has(i) {
			more = append(more, i)
		}
	}
	for _, i := range old {
		if t.wanted[i]--; t.wanted[i] <= 0 {
			delete(t.wanted, i)
			less = append(less, i)
		}
	}
	if t.fetch == nil || t.fetch.demand == nil {
		return
	}
	if len(less) > 0 {
		t.fetch.demand.unwant(less...)
	}
	if len(more) > 0 {
		t.fetch.demand.want(more...)
	}
}

// forget makes a host no member.
func (t *task) forget(id scheduler.HostID) {
	if m := t.members[id]; m != nil {
		t.demand(m, nil)
		delete(t.members, id)
	}
}

// fillBy notes the fetch that fills t from now on, and tells it what is wanted.
func (t *task) fillBy(f *fetch) {
	if f == nil || f == t.fetch {
		return
	}
	t.fetch = f
	if !f.sparse.Load() {
		return
	}
	t.sparse = true
	for i := range t.wanted {
		if !t.published.Has(i) {
			f.demand.want(i)
		}
	}
	for _, m := range t.members {
		if !m.lazy && !m.given {
			f.demand.wantAll()
		}
	}
}

// tell sends the digests that the member does not have. They go with the next
// thing it is told, or with a review: not each on its own to every member.
func (m *member) tell(t *task) {
	for m.told < len(t.order) {
		first, n := t.order[m.told], 1
		for n < digestRun && m.told+n < len(t.order) && t.order[m.told+n] == first+n {
			n++
		}
		m.sendDigests(t, first, n)
		m.told += n
	}
}
