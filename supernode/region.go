package supernode

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"runtime"
	"time"

	"go.uber.org/zap"

	"damselfly.dev/pieces"
	"damselfly.dev/scheduler"
	"damselfly.dev/supernode/api"
)

const (
	tickEvery = 100 * time.Millisecond
	reviewing = 10 // ticks from a review to the next: of progress, tickets, tasks nobody needs
	keeping   = int(api.TickEvery / tickEvery)
	idleAfter = 30 * time.Second // how long a task stays that nobody wants
	seed      = scheduler.HostID(0)

	maxHeld      = 2000    // tasks that a host may say it holds
	maxHeldBytes = 4 << 20 // bytes of the sets of their pieces
	digestRun    = 4096    // digests in one message
	maxGiven     = 1 << 20 // bytes given with the answers to joins from one tick to the next
)

// region is who has what and gets what from whom. One goroutine, that of run,
// owns all of it; others send it functions to call.
type region struct {
	origin  *origin
	cfg     Config
	log     *zap.Logger
	metrics *metrics
	events  chan event
	ended   chan struct{} // closed when run has returned

	sched   *scheduler.Scheduler
	names   map[string]*session // by the host's own id
	hosts   map[scheduler.HostID]*session
	free    []scheduler.HostID
	tasks   map[pieces.TaskID]*task
	nums    map[scheduler.TaskID]*task
	lastNum scheduler.TaskID
	given   int // bytes since the last tick
}

// event is what is to be acted on: what a host has sent, or a function to call.
type event struct {
	session *session
	up      *api.Up
	call    func()
}

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
	fetch     *fetch      // that fills it, or did; nil for none
	sparse    bool        // the last piece may be given away before the whole is there
	wanted    map[int]int // pieces that members' readers wait for, and of how many
	needed    time.Time   // when somebody last was found to need it
	told      int64       // bytes, by the last Progress
}

// member is a host that has joined a task.
type member struct {
	*session
	public   bool
	lazy     bool  // it wants only what its readers wait for
	wants    []int // what they wait for, where the origin can be asked for it
	given    bool  // all of it with the answer to the join, and is none of the scheduler's
	ticketed time.Time
	told     int // how many of the task's order it has the digests of
}

// holding is what a host has of a task.
type holding struct {
	layout pieces.Layout
	have   pieces.Set
}

// transfer is one that a host has been told to make.
type transfer struct {
	task         *task
	first, count int
	left         uint64 // pieces that have not come, by bit
	crosses      bool   // into the host's zone
}

func newRegion(cfg Config, log *zap.Logger, m *metrics) *region {
	policy := scheduler.DefaultConfig()
	policy.CrossOnce = cfg.CrossOnce
	return &region{
		cfg: cfg, log: log, metrics: m,
		events: make(chan event, 1024),
		ended:  make(chan struct{}),
		sched:  scheduler.New(policy, rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))), //nolint:gosec // no secret: it breaks ties
		names:  map[string]*session{},
		hosts:  map[scheduler.HostID]*session{},
		tasks:  map[pieces.TaskID]*task{},
		nums:   map[scheduler.TaskID]*task{},
	}
}

// post has e acted on by the goroutine of run, in the order of the calls; not at
// all when that has ended.
func (r *region) post(e event) {
	select {
	case r.events <- e: // mostly, and then it costs little
		return
	default:
	}
	select {
	case r.events <- e:
	case <-r.ended:
	}
}

// do is post for a function to call.
func (r *region) do(f func()) { r.post(event{call: f}) }

// ask is do, and waits until f has been called; false when it has not.
func (r *region) ask(ctx context.Context, f func()) bool {
	done := make(chan struct{})
	r.do(func() { f(); close(done) })
	select {
	case <-done:
		return true
	case <-ctx.Done():
	case <-r.ended:
	}
	return false
}

func (r *region) run(ctx context.Context) {
	defer close(r.ended)
	r.sched.HostUp(time.Now(), seed, scheduler.Host{Up: r.cfg.UpLanes, Zone: r.cfg.Zone, Rack: r.cfg.Rack, Seed: true})
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for ticks := 1; ; {
		select {
		case <-ctx.Done():
			for _, t := range r.tasks {
				t.content.Release()
			}
			return
		case e := <-r.events:
			runtime.Gosched() // for what others are about to say
			r.act(e)
			for range len(r.events) { // what has come meanwhile is decided on together
				r.act(<-r.events)
			}
		case now := <-tick.C:
			ticks++
			r.tick(now, ticks)
		}
		r.decide()
		r.metrics.hosts.Set(float64(len(r.hosts)))
		r.metrics.tasks.Set(float64(len(r.tasks)))
	}
}

func (r *region) act(e event) {
	if e.call != nil {
		e.call()
	} else {
		r.up(e.session, e.up)
	}
}

// tick is what is to be done every tickEvery; nth counts its calls.
func (r *region) tick(now time.Time, nth int) {
	r.given = 0
	if nth%keeping == 0 {
		r.keepAlive()
	}
	if len(r.tasks) == 0 {
		return
	}
	r.sched.Tick(now)
	if nth%reviewing == 0 {
		r.review(now)
	}
}

// keepAlive shows quiet hosts that the supernode is there, and ends the sessions
// of those that are not.
func (r *region) keepAlive() {
	for _, s := range r.hosts {
		quiet, err := s.conn.Tick()
		if err != nil {
			s.end(err)
		} else if quiet {
			s.send(message{})
		}
	}
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
		host.transfers[d.Transfer] = transfer{task: t, first: d.First, count: d.Count, left: 1<<d.Count - 1, crosses: d.Crosses}
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

// hostUp takes in a host, in place of one with the same name.
func (r *region) hostUp(s *session, hello *api.Hello) {
	if old := r.names[s.name]; old != nil {
		r.log.Warn("host replaced by another session", zap.String("host", s.name), zap.String("remote", s.remote))
		old.end(errReplaced)
		r.hostDown(old)
	}
	s.id = scheduler.HostID(len(r.hosts) + len(r.free) + 1)
	if n := len(r.free); n > 0 {
		s.id, r.free = r.free[n-1], r.free[:n-1]
	}
	r.names[s.name], r.hosts[s.id] = s, s
	s.far = hello.Zone != "" && hello.Zone != r.cfg.Zone
	up := hello.Up
	if s.addr == "" {
		up = 0
	}
	r.sched.HostUp(time.Now(), s.id, scheduler.Host{Up: up, Down: hello.Down, Zone: hello.Zone, Rack: hello.Rack})
}

// hostDown forgets a host.
func (r *region) hostDown(s *session) {
	if r.hosts[s.id] != s {
		return
	}
	r.sched.HostDown(time.Now(), s.id)
	for id := range s.holds {
		if t := r.tasks[id]; t != nil {
			t.forget(s.id)
		}
	}
	for range s.transfers {
		r.metrics.transfers[resultGone].Inc()
	}
	delete(r.names, s.name)
	delete(r.hosts, s.id)
	r.free = append(r.free, s.id)
}

// up acts on what a host has sent, but for its joins.
func (r *region) up(s *session, up *api.Up) {
	if r.hosts[s.id] != s {
		return
	}
	now := time.Now()
	for _, h := range up.Hold {
		r.hold(now, s, h)
	}
	for _, w := range up.Want {
		if t := r.nums[scheduler.TaskID(w.Task)]; t != nil {
			r.want(now, s, t, w)
		}
	}
	for _, d := range up.Done {
		r.done(now, s, scheduler.TransferID(d.Transfer), d.Piece)
	}
	for _, id := range up.Soon {
		r.sched.Soon(now, s.id, scheduler.TransferID(id))
	}
	for _, f := range up.Failed {
		r.failed(now, s, f)
	}
	for _, l := range up.Leave {
		id := pieces.TaskID(l.Task)
		s.holding(id, nil)
		if t := r.tasks[id]; t != nil {
			t.forget(s.id)
			r.sched.Leave(now, s.id, t.num)
		}
	}
}

// want notes what readers on a host wait for.
func (r *region) want(now time.Time, s *session, t *task, w api.Want) {
	asked := w.Runs(t.layout.Count())
	runs := make([]scheduler.Run, len(asked))
	var wants []int
	for k, a := range asked {
		runs[k] = scheduler.Run{First: a.First, Count: a.Count}
		for i := range a.Count {
			wants = append(wants, a.First+i)
		}
	}
	r.sched.Want(now, s.id, t.num, runs...)
	m := t.members[s.id]
	if m == nil {
		return
	}
	if m.lazy || t.sparse {
		t.demand(m, wants)
	}
	if m.lazy && w.All {
		r.whole(now, t, m)
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

// done notes a piece that has come.
func (r *region) done(now time.Time, s *session, id scheduler.TransferID, piece int) {
	tr, ok := s.transfers[id]
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
	r.sched.Done(now, s.id, id, piece)
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
	if _, ok := s.transfers[id]; !ok || !known {
		return
	}
	delete(s.transfers, id)
	r.metrics.transfers[why.result].Inc()
	if f.Why == api.Corrupt {
		r.metrics.verifyFailures.Inc()
	}
	retry := time.Duration(min(max(f.RetryMS, 0), 60_000)) * time.Millisecond
	r.sched.Failed(now, s.id, id, why.why, retry)
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
	m.public = l.public
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
		h = &holding{t.layout, pieces.NewSet(t.layout.Count())}
		s.holding(id, h)
	}
	if m.lazy {
		r.sched.JoinLazy(now, s.id, t.num, h.have)
		return
	}
	r.sched.Join(now, s.id, t.num, h.have)
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
	s.holding(t.id, &holding{t.layout, have})
	return true
}

// activate makes a task of a content, with all hosts that hold some of it.
func (r *region) activate(now time.Time, l *lease) *task {
	r.lastNum++
	t := &task{
		id: l.ID(), num: r.lastNum, content: l.Content, layout: l.Layout(),
		members: map[scheduler.HostID]*member{}, wanted: map[int]int{}, needed: now,
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
			r.sched.Hold(now, s.id, t.num, h.have)
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

// published implements follower.
func (r *region) published(id pieces.TaskID, i int, _ pieces.Digest) {
	r.do(func() {
		t := r.tasks[id]
		if t == nil || i >= t.layout.Count() || !t.published.Add(i) {
			return
		}
		t.order, t.untold = append(t.order, i), true
		r.sched.Have(time.Now(), seed, t.num, i, 1)
	})
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

// dropped implements follower.
func (r *region) dropped(id pieces.TaskID, reason string) {
	r.do(func() {
		if t := r.tasks[id]; t != nil {
			r.deactivate(t)
		}
		for _, s := range r.hosts {
			if _, ok := s.holds[id]; ok {
				s.holding(id, nil)
				s.send(message{size: 256, add: func(b *api.Down) {
					b.Invalidate = append(b.Invalidate, api.Invalidate{Task: string(id), Reason: reason})
				}})
			}
		}
	})
}

// lost notes that the supernode found a piece of its own missing.
func (r *region) lost(id pieces.TaskID, i int) {
	r.do(func() {
		if t := r.tasks[id]; t != nil && t.published.Has(i) && !t.content.Has(i) {
			t.published.Remove(i)
			if t.fetch != nil && t.fetch.sparse.Load() {
				t.fetch.demand.lost(i, t.wanted[i] > 0)
			}
			r.sched.Lost(time.Now(), seed, t.num, i, 1)
		}
	})
}

// review says what has come of the tasks, renews tickets, and ends tasks that
// nobody has needed for a while.
func (r *region) review(now time.Time) {
	for _, t := range r.tasks {
		f := r.origin.find(t.id)
		if f != nil {
			if !f.idles() {
				t.needed = now
			}
			r.progress(t, f.fetched.Load())
		}
		for _, m := range t.members {
			m.tell(t)
			if h := m.holds[t.id]; h == nil || h.have.Full() {
				continue
			}
			t.needed = now
			if now.Sub(m.ticketed) > api.TicketLife/2 {
				m.ticketed = now
				m.send(m.message(t, 0))
			}
		}
		t.untold = false
		if now.Sub(t.needed) > idleAfter {
			r.deactivate(t)
		}
	}
}

func (r *region) progress(t *task, fetched int64) {
	if fetched == t.told {
		return
	}
	t.told = fetched
	p := api.Progress{Task: int32(t.num), Fetched: fetched}
	for _, m := range t.members {
		m.send(message{size: 24, add: func(b *api.Down) { b.Progress = append(b.Progress, p) }})
	}
}
