package dfget

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"damselfly.dev/httprange"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const (
	wantRun   = 16                     // pieces that a reader of a bounded range asks for at once
	lazyRun   = 64                     // and one of a lazy task
	wantEvery = 250 * time.Millisecond // between two Wants of a task
)

// maxSpans is how many spans Stream.Want has the region bring at once: the first ones.
const maxSpans = 32

// task is the host's part in one task, shared by all its streams. It lives while
// a stream needs it or the download goes on; when the region can no longer give
// the task here it is over, and the next Open begins another one.
type task struct {
	id    pieces.TaskID
	over  chan struct{}
	moved atomic.Int64 // when anything of it last came, in Unix nanoseconds
	wrong atomic.Bool  // it was dropped: what has been given of it may be wrong

	fromPeers, fromSupernode atomic.Int64 // bytes

	// Guarded by Peer.mu.
	streams  map[*Stream]struct{}
	content  *pieces.Content // pinned, from the first grant on
	session  *session        // through which the task is joined now
	num      int32           // in that session
	ticket   string
	asked    int // joins without an answer
	coming   int // transfers that have not ended
	checking bool
	check    bool // once more
	complete bool
	want     []api.Run // the last one
	wanted   time.Time
	wants    map[*Stream][]api.Run // what streams wait for, or will before long
	lazy     bool                  // only that is got, and not yet all
	later    *time.Timer           // until the rest is wanted, or nothing of it any more
	sparse   bool                  // the supernode has not found the whole right when the last digest comes
	fetched  int64                 // bytes that the supernode has, by its last Progress,
	progress time.Time
}

func (t *task) touch(now time.Time) { t.moved.Store(now.UnixNano()) }

func (t *task) isOver() bool {
	select {
	case <-t.over:
		return true
	default:
		return false
	}
}

// settleLocked ends t when nothing is left to do for it, and returns what is then
// to be released.
func (p *Peer) settleLocked(t *task) *pieces.Content {
	if len(t.streams) > 0 || t.asked > 0 || t.coming > 0 || t.checking || t.session != nil && !t.complete {
		return nil
	}
	p.forgetLocked(t)
	c := t.content
	t.content = nil
	return c
}

func (p *Peer) forgetLocked(t *task) {
	if p.tasks[t.id] == t {
		delete(p.tasks, t.id)
	}
	if s := t.session; s != nil && s.nums[t.num] == t {
		delete(s.nums, t.num)
	}
	t.session = nil
}

func release(contents ...*pieces.Content) {
	for _, c := range contents {
		if c != nil {
			c.Release()
		}
	}
}

// giveUp makes t over: its streams turn to their origin.
func (p *Peer) giveUp(t *task) {
	p.mu.Lock()
	if !t.isOver() {
		close(t.over)
	}
	if s := t.session; s != nil {
		for id, tr := range s.running {
			if tr.task == t {
				delete(s.running, id)
				tr.cancel(errCancelled)
			}
		}
	}
	p.forgetLocked(t)
	idle := p.settleLocked(t)
	p.mu.Unlock()
	release(idle)
}

// follow acts on one batch from the supernode. It is called by one goroutine at
// a time.
func (p *Peer) follow(s *session, d api.Down) {
	if len(d.Keys) > 0 {
		p.tickets.learn(api.TicketKeys(d.Keys))
	}
	for _, m := range d.Task {
		p.granted(s, m)
	}
	for _, m := range d.Refused {
		p.mu.Lock()
		s.answerLocked(m.Seq, answer{err: refusal(m)})
		p.mu.Unlock()
	}
	for _, m := range d.Digests {
		p.learn(s, m)
	}
	for _, m := range d.Assign {
		p.assigned(s, m)
	}
	for _, id := range d.Cancel {
		p.mu.Lock()
		if tr := s.running[id]; tr != nil {
			delete(s.running, id)
			tr.cancel(errCancelled)
		}
		p.mu.Unlock()
	}
	for _, m := range d.Verify {
		p.verify(m)
	}
	for _, m := range d.Invalidate {
		if id, err := pieces.ParseTaskID(m.Task); err == nil {
			p.drop(id, m.Reason)
		}
	}
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	s.drains = s.drains || d.Drain
	for _, m := range d.Progress {
		if t := s.nums[m.Task]; t != nil {
			t.fetched, t.progress = m.Fetched, now
			t.touch(now)
		}
	}
	for _, seq := range d.Asking {
		if st := s.joins[seq]; st != nil {
			st.asking.Store(now.UnixNano())
		}
	}
}

// refusal is what a stream is told when its Join is not granted.
func refusal(m api.Refused) error {
	if m.Final && m.Status >= 400 {
		return &RefusedError{Status: m.Status, Header: m.Header, Body: m.Body}
	}
	if m.Clear {
		return api.ErrClear
	}
	return fmt.Errorf("%w: %s", errNotNow, m.Reason)
}

// answerLocked gives the stream behind a Join its answer.
func (s *session) answerLocked(seq uint64, a answer) {
	st := s.joins[seq]
	if st == nil {
		return
	}
	delete(s.joins, seq)
	st.task.asked--
	select {
	case st.answer <- a:
	default: // joined again: nobody waits for this
	}
}

// granted takes the task into the store.
func (p *Peer) granted(s *session, m api.Task) {
	p.mu.Lock()
	st := s.joins[m.Seq]
	known := s.nums[m.Num]
	if st == nil && known != nil && string(known.id) == m.Task {
		known.ticket = m.Ticket
	}
	p.mu.Unlock()
	if st == nil {
		if m.Seq == 0 && m.Ticket == "" && known != nil && string(known.id) == m.Task {
			p.log.Info("the supernode gives no more of a task", zap.String("task", m.Task))
			p.giveUp(known)
		}
		return
	}
	t := st.task
	c, err := p.prepare(t, m, st.origin)
	if err == nil && len(m.Data) > 0 {
		err = p.given(t, c, m)
	}
	p.mu.Lock()
	if err == nil && t.isOver() {
		err = errNotNow
	}
	if err != nil {
		if c == t.content {
			c = nil
		}
		s.answerLocked(m.Seq, answer{err: err})
		s.send(leaveMessage(t.id))
		p.mu.Unlock()
		release(c)
		p.log.Warn("task cannot be stored", zap.String("task", string(t.id)), zap.Error(err))
		p.giveUp(t)
		return
	}
	if c.Layout() != m.Layout { // it is whole in another one, and the caller may read it
		t.content, t.complete = c, true
		s.send(leaveMessage(t.id))
		s.answerLocked(m.Seq, answer{content: c, stored: true})
		idle := p.settleLocked(t)
		p.mu.Unlock()
		release(idle)
		return
	}
	if t.session != s {
		t.session, t.want, t.wanted = s, nil, time.Time{}
	}
	t.num, t.ticket, t.sparse = m.Num, m.Ticket, t.sparse || m.Sparse
	s.nums[m.Num] = t
	if t.lazy = c.IsWindow() || t.lazy && st.lazy; t.lazy && !c.IsWindow() && t.later == nil && p.cfg.Background > 0 {
		t.later = time.AfterFunc(p.cfg.Background, func() { p.wantAll(t) })
	}
	if t.lazy && !c.IsWindow() {
		p.wantLocked(t)
	}
	fresh := t.content == nil
	t.content = c
	if c.IsWindow() {
		p.narrowLocked(t)
	}
	if fresh {
		have := c.Have()
		if have.Len() > 0 && len(m.Data) == 0 || have.Full() && !c.Complete() { // empty content is full
			p.checkLocked(s.life, t)
		}
	}
	if len(m.Data) > 0 {
		s.send(holdMessage(p.store, t.id))
	}
	t.complete = t.complete || c.Complete()
	now := time.Now()
	if now.Sub(time.Unix(0, st.asking.Load())) < askingLimit { // it was the origin that took the time
		t.progress = now
	}
	t.touch(now)
	s.answerLocked(m.Seq, answer{content: c, stored: t.complete})
	idle := p.settleLocked(t)
	p.mu.Unlock()
	release(idle)
}

// prepare returns t's content, made when it is missing.
func (p *Peer) prepare(t *task, m api.Task, o api.Origin) (*pieces.Content, error) {
	if m.Task != string(t.id) {
		return nil, fmt.Errorf("%w: it answers with another task", errNotNow)
	}
	if err := m.Layout.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotNow, err)
	}
	var public []string
	if m.Public {
		public = []string{publicName(o)}
	}
	c := t.content // only this goroutine sets it, and asked keeps it
	switch {
	case c == nil:
		if c = p.wholeElse(t.id, m.Layout); c != nil {
			break
		}
		var err error
		meta := pieces.Meta{ID: t.id, Layout: m.Layout, Public: public}
		if c, err = p.store.Create(meta); errors.Is(err, pieces.ErrQuota) {
			meta.Window = true
			c, err = p.store.Create(meta)
		}
		if err != nil {
			return nil, err
		}
	case c.Layout() != m.Layout && (!c.Complete() || t.id.Content() == ""):
		return nil, fmt.Errorf("%w: it has another length now", errNotNow)
	}
	for _, name := range public {
		if err := c.AddPublic(name); err != nil {
			p.log.Warn("task is not noted as public", zap.String("task", string(t.id)), zap.Error(err))
		}
	}
	return c, nil
}

// wholeElse returns a content of that length that is whole in the store in another
// layout, or nil: the region began it anew, for ranges or for all.
func (p *Peer) wholeElse(id pieces.TaskID, l pieces.Layout) *pieces.Content {
	c, err := p.store.Get(id)
	if err != nil {
		return nil
	}
	if id.Content() != "" && c.Complete() && c.Layout() != l && c.Layout().Length == l.Length {
		return c
	}
	c.Release()
	return nil
}

// given takes in a content that came with the answer.
func (p *Peer) given(t *task, c *pieces.Content, m api.Task) error {
	ds, err := pieces.ParseDigests(m.Digest)
	if err != nil {
		return err
	}
	if err := c.SetDigests(0, ds); err != nil {
		return err
	}
	if err := c.Put(m.Data); err != nil { // the supernode has found the whole right
		return err
	}
	p.metrics.received.WithLabelValues(sourceSupernode).Add(float64(len(m.Data)))
	t.fromSupernode.Add(int64(len(m.Data)))
	return nil
}

// publicName names what an anonymous caller may read, in a store's metadata.
func publicName(o api.Origin) string {
	if o.Registry != "" {
		return o.Registry + "/" + o.Repository
	}
	return string(pieces.URLTaskID(o.URL)) // the URL itself may be signed
}

// checkLocked has all pieces there are looked at: those that an earlier process
// left are verified, and when all are there and right, the content is complete.
func (p *Peer) checkLocked(ctx context.Context, t *task) {
	t.check = true
	if t.checking {
		return
	}
	t.checking = true
	p.group.Go(func() error {
		p.mu.Lock()
		for t.check && ctx.Err() == nil {
			t.check = false
			c, sparse := t.content, t.sparse
			p.mu.Unlock()
			full, lost, wrong := p.check(ctx, c, sparse)
			if wrong {
				p.drop(t.id, "it does not have its digest")
			}
			p.mu.Lock()
			t.complete = full || t.complete && !lost
			if lost && t.session != nil {
				t.session.send(holdMessage(p.store, t.id))
			}
		}
		t.checking = false
		idle := p.settleLocked(t)
		p.mu.Unlock()
		release(idle)
		return nil
	})
}

// check tells whether all pieces are there, whether one turned out not to be, and
// of a sparse content whether all of them are not what they should be together.
func (p *Peer) check(ctx context.Context, c *pieces.Content, sparse bool) (full, lost, wrong bool) {
	have := c.Have()
	for i := range have.All() {
		if ctx.Err() != nil {
			return false, false, false
		}
		lost = !c.Has(i) || lost
	}
	if lost || !have.Full() {
		return false, lost, false
	}
	if d := c.ID().Content(); d != "" && sparse && !c.Complete() {
		sum := d.Verifier()
		if _, err := c.CopyRange(sum, 0, c.Layout().Length); err != nil {
			return false, false, false
		}
		if !sum.Verified() {
			return false, false, true
		}
	}
	if !c.Complete() {
		// The last digest came when the supernode had found the whole right.
		if err := c.SetComplete(); err != nil && !errors.Is(err, pieces.ErrGone) {
			p.log.Warn("task is not noted as complete", zap.String("task", string(c.ID())), zap.Error(err))
		}
	}
	return true, false, false
}

// learn takes in digests of pieces.
func (p *Peer) learn(s *session, m api.Digests) {
	t, c := p.joined(s, m.Task)
	if t == nil {
		return
	}
	ds, err := pieces.ParseDigests(m.Digests)
	if err == nil {
		err = c.SetDigests(m.First, ds)
	}
	if errors.Is(err, pieces.ErrConflict) {
		p.drop(t.id, "its pieces are other ones now")
		p.report(s, leaveMessage(t.id))
		return
	}
	if err != nil {
		p.log.Warn("digests cannot be used", zap.String("task", string(t.id)), zap.Error(err))
		return
	}
	t.touch(time.Now())
}

// joined returns a task by its number in s, with its content.
func (p *Peer) joined(s *session, num int32) (*task, *pieces.Content) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := s.nums[num]
	if t == nil {
		return nil, nil
	}
	return t, t.content
}

// drop removes what there is of a task.
func (p *Peer) drop(id pieces.TaskID, reason string) {
	p.log.Warn("task is dropped", zap.String("task", string(id)), zap.String("reason", reason))
	p.mu.Lock()
	t := p.tasks[id]
	p.mu.Unlock()
	if err := p.store.Remove(id); err != nil && !errors.Is(err, pieces.ErrNotFound) {
		p.log.Error("task is not removed", zap.String("task", string(id)), zap.Error(err))
	}
	if t != nil {
		t.wrong.Store(true)
		p.giveUp(t)
	}
}

// ask puts what a reader waits for before other pieces: those from first to end,
// as far as is good.
func (p *Peer) ask(s *Stream, first, end int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.asked = end
	s.wantLocked([]api.Run{{First: first, Count: end - first}})
}

// Want has the region bring what streams of their own will read, until s is closed
// or Want is called again; the spans lie within the content. Who reads several spans one after
// the other then waits for all of them at once. False tells that the region has no
// part in s.
func (s *Stream) Want(spans []httprange.Range) bool {
	if s.task == nil || s.content == nil {
		return s.content != nil // what is stored needs no region
	}
	if s.content.IsWindow() {
		return true // each stream asks for its own when it comes to it
	}
	var runs []api.Run
	for _, b := range spans[:min(len(spans), maxSpans)] {
		if first, end := s.content.Layout().Span(b.Offset, b.Length); first < end {
			runs = append(runs, api.Run{First: first, Count: min(end-first, lazyRun)})
		}
	}
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.wantLocked(runs)
	return true
}

func (s *Stream) wantLocked(runs []api.Run) {
	if s.task.wants == nil {
		s.task.wants = make(map[*Stream][]api.Run)
	}
	s.task.wants[s] = runs
	s.task.protectLocked()
	s.p.wantLocked(s.task)
}

// wantLocked tells the supernode what t's streams wait for, when that is news.
func (p *Peer) wantLocked(t *task) {
	now := time.Now()
	if t.session == nil || t.content == nil || !t.lazy && now.Sub(t.wanted) < wantEvery {
		return
	}
	runs := slices.Concat(slices.Collect(maps.Values(t.wants))...)
	for i := range runs {
		for r := &runs[i]; r.Count > 0 && t.content.Has(r.First); r.Count-- {
			r.First++
		}
	}
	runs = slices.DeleteFunc(runs, func(r api.Run) bool { return r.Count == 0 })
	slices.SortFunc(runs, func(a, b api.Run) int { return cmp.Or(a.First-b.First, a.Count-b.Count) })
	runs = slices.Compact(runs)
	runs = runs[:min(len(runs), api.MaxRuns)]
	if t.lazy {
		if t.withinLocked(runs, t.want) && t.withinLocked(t.want, runs) {
			return
		}
	} else if slices.Equal(runs, t.want) || len(runs) == 0 {
		return
	}
	t.want, t.wanted = runs, now
	t.session.send(wantMessage(api.Want{Task: t.num}, runs))
}

// withinLocked tells whether all of some runs that has not come is in others.
func (t *task) withinLocked(runs, others []api.Run) bool {
	for _, r := range runs {
		for i := r.First; i < r.First+r.Count; i++ {
			in := func(o api.Run) bool { return o.First <= i && i < o.First+o.Count }
			if !t.content.Has(i) && !slices.ContainsFunc(others, in) {
				return false
			}
		}
	}
	return true
}

func wantMessage(w api.Want, runs []api.Run) message {
	if len(runs) > 0 {
		w.First, w.Count, w.More = runs[0].First, runs[0].Count, runs[1:]
	}
	return message{size: 24 + 8*len(runs), add: func(u *api.Up) { u.Want = append(u.Want, w) }}
}

// wantAll makes t one of which the host wants all.
func (p *Peer) wantAll(t *task) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !t.lazy || t.session == nil || t.content.IsWindow() {
		return
	}
	t.lazy = false
	t.session.send(wantMessage(api.Want{Task: t.num, All: true}, t.want))
}

// restAfter is how long the digests of a lazy task are kept after its last reader.
const restAfter = time.Minute

// rest ends the host's part in a lazy task that nobody reads any more, but for
// what it has of it.
func (p *Peer) rest(t *task) {
	p.mu.Lock()
	var idle *pieces.Content
	if s := t.session; s != nil && t.lazy && len(t.streams) == 0 && t.asked == 0 && t.coming == 0 && !t.checking {
		s.send(leaveMessage(t.id))
		s.send(holdMessage(p.store, t.id))
		p.forgetLocked(t)
		idle = p.settleLocked(t)
	}
	p.mu.Unlock()
	release(idle)
}

// verify has pieces looked at that another host got wrong from here.
func (p *Peer) verify(m api.Verify) {
	id, err := pieces.ParseTaskID(m.Task)
	if err != nil {
		return
	}
	p.group.Go(func() error {
		c, err := p.store.Get(id)
		if err != nil {
			return nil //nolint:nilerr // it is gone, and the supernode was told
		}
		defer c.Release()
		for i := m.First; i < m.First+m.Count && i < c.Layout().Count(); i++ {
			if !c.Recheck(i) {
				p.log.Warn("piece on the disk is wrong", zap.String("task", m.Task), zap.Int("piece", i))
			}
		}
		return nil
	})
}
