package supernode

import (
	"context"
	"errors"
	"slices"
	"time"

	"go.uber.org/zap"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// lapseLife is how long after its last join a host goes on with a task when the
// credentials of it have ended by themselves. The registry, too, brings to its end
// what it has begun to send.
const lapseLife = time.Hour

// renew renews the ticket of a host with a running task: of what anyone may read in
// time, else when the origin has said again that a caller of the host may.
func (r *region) renew(now time.Time, t *task, m *member) {
	switch {
	case m.open:
		if now.Sub(m.ticketed) > api.TicketLife/2 {
			m.ticketed = now
			m.send(m.message(t, 0))
		}
	case !m.asking && r.cfg.Now().After(m.until) && r.origin.ctx.Err() == nil:
		m.asking = true
		callers, lapses := slices.Clone(m.callers), now.Sub(m.joined) < lapseLife
		r.origin.wg.Go(func() {
			may, err := r.origin.askAgain(t.id, callers, lapses)
			r.do(func() { r.answered(t, m, may, err) })
		})
	}
}

// askAgain finds out whether any of a host's callers may still read a content, the
// latest first. Where all are refused, one whose credentials have ended may, if
// lapses says so.
func (o *origin) askAgain(id pieces.TaskID, callers []source, lapses bool) (may right, err error) {
	ctx, cancel := context.WithTimeout(o.ctx, api.TicketGrace)
	defer cancel()
	c, err := o.store.Get(id)
	if err != nil {
		return may, err
	}
	defer c.Release()
	ended := false
	err = errNobody
	for _, src := range slices.Backward(callers) {
		if src.lapsed() {
			ended = true
			continue
		}
		may, err = src.allowed(ctx, c)
		if errors.Is(err, errChanged) { // what has begun is of the version of then
			may.until, err = o.now().Add(registryproxy.ProofLife), nil
		}
		if err == nil {
			return may, nil
		}
	}
	if ended && lapses {
		return right{until: o.now().Add(registryproxy.ProofLife)}, nil
	}
	return may, err
}

var errNobody = errors.New("nobody there has asked for it lately")

// answered acts on what the origin says of a host's callers. When that is no, or has
// not come within the grace, the host gets nothing more of the task, and its readers
// turn to the origin.
func (r *region) answered(t *task, m *member, may right, err error) {
	m.asking = false
	if r.tasks[t.id] != t || t.members[m.id] != m || r.hosts[m.id] != m.session {
		return
	}
	now := r.cfg.Now()
	no := registryproxy.IsNo(err) // too many questions are trouble
	switch {
	case err == nil:
		m.until = may.until
		m.send(m.message(t, 0))
		return
	case now.Before(m.until):
		return // a caller has joined meanwhile
	case !no && !errors.Is(err, errNobody) && now.Before(m.until.Add(api.TicketGrace)):
		return // the next review asks again
	}
	r.log.Info("right to a task is over", zap.String("host", m.name), zap.String("task", string(t.id)), zap.Error(err))
	r.expel(t, m)
}

// expel makes a host no member of a task that it has not all of. What it has it may
// give to others.
func (r *region) expel(t *task, m *member) {
	over := api.Task{Task: string(t.id), Num: int32(t.num), Layout: t.layout}
	m.send(message{size: 256, add: func(b *api.Down) { b.Task = append(b.Task, over) }})
	t.forget(m.id)
	now := time.Now()
	r.sched.Leave(now, m.id, t.num)
	if h := m.holds[t.id]; h != nil && h.layout == t.layout && h.have.Len() > 0 {
		r.sched.Hold(now, m.id, t.num, h.have)
	}
}
