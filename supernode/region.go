package supernode

import (
	"context"
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
	given   int             // bytes since the last tick
	idle    chan<- struct{} // to be closed when no download runs; nil but while draining
}

// event is what is to be acted on: what a host has sent, or a function to call.
type event struct {
	session *session
	up      *api.Up
	call    func()
}

func newRegion(cfg Config, log *zap.Logger, m *metrics) *region {
	policy := scheduler.DefaultConfig()
	policy.CrossOnce = cfg.CrossOnce
	policy.Report = 2 * api.DoneWithin // as long again for the way
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
	if r.idle != nil && !r.busy() {
		close(r.idle)
		r.idle = nil
	}
	if len(r.tasks) == 0 {
		return
	}
	r.sched.Tick(now)
	if nth%reviewing == 0 {
		r.review(now)
	}
}

// drain sends hosts elsewhere with what they begin, and closes idle when what they
// have begun has ended.
func (r *region) drain(idle chan<- struct{}) {
	r.idle = idle
	for _, s := range r.hosts {
		s.send(message{size: 8, add: func(b *api.Down) { b.Drain = true }})
	}
}

// busy tells whether a host gets something, or waits for some.
func (r *region) busy() bool {
	for _, s := range r.hosts {
		if len(s.transfers) > 0 || len(s.joins) > 0 {
			return true
		}
	}
	for _, t := range r.tasks {
		for _, m := range t.members {
			if h := m.holds[t.id]; len(m.wants) > 0 || !m.lazy && h != nil && !h.have.Full() {
				return true
			}
		}
	}
	return false
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
		r.done(now, s, d)
	}
	for _, id := range up.Soon {
		s.known(scheduler.TransferID(id))
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

// published implements follower.
func (r *region) published(id pieces.TaskID, i int, _ pieces.Digest) {
	r.do(func() {
		t := r.tasks[id]
		if t == nil || i >= t.layout.Count() || !t.published.Add(i) {
			return
		}
		t.order, t.untold = append(t.order, i), true
		now := time.Now()
		r.sched.Have(now, seed, t.num, i, 1)
		r.judge(now, t, i)
	})
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

// lost notes that the supernode found pieces of its own missing.
func (r *region) lost(id pieces.TaskID, lost ...int) {
	r.do(func() {
		t := r.tasks[id]
		for _, i := range lost {
			if t == nil || !t.published.Has(i) || t.content.Has(i) {
				continue
			}
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
				m.callers = nil
				continue
			}
			t.needed = now
			r.renew(now, t, m)
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
