package dfget

import (
	"context"
	"errors"
	"time"

	"damselfly.dev/pieces"
)

// How long a reader waits for the region. Its time runs from its request, over the
// answer to the Join and the first piece, and later from the last byte it has: one
// deadline for whatever is amiss. An origin that answers, after one connection of
// it has died, does so in what is left of ten seconds.
const (
	// turnAfter is when it turns to the origin,
	turnAfter = 5 * time.Second
	// hopeLimit is until when it stays where what it waits for can be seen to come
	// by then: the first piece because the supernode is getting on with the origin, any
	// because of a transfer's pace. A later piece that is slow to come from the
	// origin is waited for as long as the supernode gets on: with that, each host's own request would
	// be slower still.
	hopeLimit = 8 * time.Second
	// askingLimit is for how long the supernode's word counts that it waits for the
	// origin; it is said once a second.
	askingLimit = 2 * time.Second

	wantAfter = 300 * time.Millisecond // a reader that waits longer asks for its piece
	lostLimit = time.Second            // no session, and nothing on its way
)

// await returns when the piece at s.off is there, or why the origin is to be
// asked for it by a reader that waits since began.
func (s *Stream) await(began time.Time) (cause string, err error) {
	l := s.content.Layout()
	first, end := l.Span(s.off, s.end-s.off)
	if s.content.Has(first) {
		return "", nil
	}
	if s.own {
		return causeStore, nil
	}
	window := s.content.IsWindow()
	switch {
	case window:
		end = min(end, first+s.p.ahead(s))
	case s.lazy:
		end = min(end, first+lazyRun)
	case s.end < s.size:
		end = min(end, first+wantRun)
	default:
		end = first + 1
	}
	if !s.given || (s.lazy || window) && s.asked <= first {
		s.p.ask(s, first, end)
	}
	for {
		wait := wantAfter
		if left := time.Until(began.Add(turnAfter)); left > 0 {
			wait = min(wait, left)
		}
		ctx, cancel := context.WithTimeout(s.ctx, wait)
		err := s.content.Wait(ctx, first)
		cancel()
		switch {
		case err == nil:
			return "", nil
		case s.ctx.Err() != nil:
			return "", context.Cause(s.ctx)
		case !errors.Is(err, context.DeadlineExceeded):
			return causeStore, nil
		}
		if cause := s.p.stalled(s, first, began); cause != "" {
			return cause, nil
		}
		s.p.ask(s, first, end)
	}
}

// stalled tells why s, which has waited for a piece since began, should wait no
// longer, "" when it should.
func (p *Peer) stalled(s *Stream, piece int, began time.Time) (cause string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t, l, now := s.task, s.content.Layout(), time.Now()
	comes := t.comesInLocked(l, piece, began, now)
	if t.fetched < l.Offset(piece+1) && !t.sparse {
		s.excused = t.progress // it is on its way from the origin: to ask there again would not help
	}
	if s.excused.After(began) {
		began = s.excused
	}
	waited := now.Sub(began)
	since := func(at time.Time) time.Duration { return min(waited, now.Sub(at)) }
	switch {
	case t.isOver():
		return causeStore
	case p.session == nil && t.coming == 0 && since(p.lost) >= lostLimit:
		return causeSessionLost
	case since(time.Unix(0, t.moved.Load())) >= turnAfter:
		return causeSilent
	case !s.given && now.Sub(s.since) >= hopeLimit:
		return causeLate
	case waited < turnAfter:
		return ""
	case waited+comes > hopeLimit:
		return causeLate
	}
	return ""
}

// comesInLocked tells how long the piece will take to come, by the pace of the
// transfer that brings it since a reader that has waited since began was first seen
// to; without one it is long.
func (t *task) comesInLocked(l pieces.Layout, piece int, began, now time.Time) time.Duration {
	if t.session == nil {
		return time.Hour
	}
	wait := time.Hour.Seconds()
	for _, tr := range t.session.running {
		if tr.task != t || piece < tr.first || piece >= tr.first+tr.count {
			continue
		}
		left := tr.left.Load()
		if tr.seen.Before(began) {
			tr.seen, tr.leftThen = now, left
		}
		if came := tr.leftThen - left; came > 0 {
			missing := max(left-(l.Offset(tr.first+tr.count)-l.Offset(piece+1)), 0)
			wait = min(wait, float64(missing)/float64(came)*now.Sub(tr.seen).Seconds())
		}
	}
	return time.Duration(wait * float64(time.Second))
}
