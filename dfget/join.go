package dfget

import (
	"context"
	"errors"
	"slices"
	"time"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const maxHeader = 64 << 10 // bytes of a caller's header that a Join takes along

// answer is a Join's: a content, pinned by the task, or why there is none.
type answer struct {
	content *pieces.Content
	stored  bool // it was complete before
	err     error
}

// join becomes one of the task's streams and asks the supernode for it. The
// cause is why the origin must be asked instead.
func (s *Stream) join() (cause string, err error) {
	p := s.p
	p.mu.Lock()
	session := p.session
	if session == nil || session.drains || headerSize(s.origin.Header) > maxHeader {
		p.mu.Unlock()
		return causeNoSession, nil
	}
	hides := session.hides(s.origin)
	if hides && s.origin.URL != "" { // what it is may depend on who asks
		p.mu.Unlock()
		return causeClear, nil
	}
	t := p.tasks[s.id]
	if t == nil {
		t = &task{id: s.id, over: make(chan struct{}), streams: make(map[*Stream]struct{}), lazy: s.lazy}
		p.tasks[s.id] = t
	}
	t.streams[s] = struct{}{}
	s.task = t
	p.joinLocked(session, s)
	p.mu.Unlock()
	got, cause, err := s.answered()
	if cause != "" || err != nil {
		return cause, err
	}
	switch _, no := errors.AsType[*RefusedError](got.err); {
	case no && hides, errors.Is(got.err, api.ErrClear):
		return causeClear, nil
	case no:
		return "", got.err
	case got.err == nil:
		s.content, s.stored = got.content, got.stored
		return "", nil
	case errors.Is(got.err, errNoSession):
		return causeNoSession, nil
	case errors.Is(got.err, errNotNow):
		s.refused = got.err
		return causeRefused, nil
	}
	return causeStore, nil
}

// answered waits for the answer to a Join: for as long as the supernode is not
// silent, and not for longer than hopeLimit.
func (s *Stream) answered() (got answer, cause string, err error) {
	timeout := time.NewTimer(time.Until(s.since.Add(turnAfter)))
	defer timeout.Stop()
	for {
		select {
		case got = <-s.answer:
			return got, "", nil
		case now := <-timeout.C:
			wake := time.Unix(0, s.asking.Load()).Add(askingLimit)
			if limit := s.since.Add(hopeLimit); wake.After(limit) {
				wake = limit
			}
			if !wake.After(now) {
				return got, causeNoAnswer, nil
			}
			timeout.Reset(wake.Sub(now))
		case <-s.ctx.Done():
			return got, "", context.Cause(s.ctx)
		}
	}
}

// headerSize is an estimate of how many bytes of a message h takes.
func headerSize(h map[string][]string) (size int) {
	for k, vs := range h {
		for _, v := range vs {
			size += len(k) + len(v) + 8
		}
	}
	return size
}

// alone serves a complete content from the store without the region, when it is
// public where this caller wants it from. What else it may be the caller's, only
// the supernode knows: any server can say that it has a digest.
func (s *Stream) alone(n int64) (done bool, err error) {
	c, err := s.p.store.Get(s.id)
	if err != nil {
		return false, nil //nolint:nilerr // not in the store: the origin has it
	}
	m := c.Meta()
	if !m.Complete || !slices.Contains(m.Public, publicName(s.origin)) {
		c.Release()
		return false, nil
	}
	s.content, s.own, s.stored = c, true, true
	if err := s.bound(m.Layout.Length, n); err != nil || s.off == s.end {
		return true, err
	}
	cause, err := s.await(s.since)
	return cause == "", err
}

// leave ends the stream's part in the region's download, which goes on.
func (s *Stream) leave() {
	if s.own {
		s.content.Release()
	}
	s.content, s.own, s.run = nil, false, nil
	if s.task == nil {
		return
	}
	t := s.task
	s.p.mu.Lock()
	delete(t.streams, s)
	if delete(t.wants, s); t.lazy {
		s.p.wantLocked(t)
		t.protectLocked()
		if len(t.streams) == 0 && (s.p.cfg.Background < 0 || t.content != nil && t.content.IsWindow()) {
			if t.later != nil {
				t.later.Stop()
			}
			t.later = time.AfterFunc(restAfter, func() { s.p.rest(t) })
		}
	}
	idle := s.p.settleLocked(t)
	s.p.mu.Unlock()
	release(idle)
}
