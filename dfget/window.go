package dfget

import (
	"go.uber.org/zap"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// Of a content for which there is no room the store keeps a window: the host gets
// what its readers are about to need, as of a lazy task, and gives to others what
// it happens to have.

// narrowLocked has the region bring of t only what is asked for from now on.
func (p *Peer) narrowLocked(t *task) {
	t.lazy = true
	if t.later != nil {
		t.later.Stop()
		t.later = nil
	}
	t.protectLocked()
	if t.session == nil {
		return
	}
	t.want = nil
	t.session.send(wantMessage(api.Want{Task: t.num, Only: true}, nil))
	p.wantLocked(t)
}

// narrowed makes t one of which a window is kept, when that may help against err.
func (p *Peer) narrowed(t *task, c *pieces.Content, err error) bool {
	if !pieces.IsFull(err) || pieces.Window(c.Layout()) == c.Layout().Length {
		return false
	}
	if c.IsWindow() {
		return true
	}
	if err := c.Narrow(); err != nil {
		p.log.Warn("no window is kept", zap.String("task", string(t.id)), zap.Error(err))
	}
	if !c.IsWindow() {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.narrowLocked(t)
	return true
}

// protectLocked has the store keep what t's readers are about to need.
func (t *task) protectLocked() {
	if t.content == nil || !t.content.IsWindow() {
		return
	}
	near := pieces.NewSet(t.content.Layout().Count())
	for _, runs := range t.wants {
		for _, r := range runs {
			for i := r.First; i < r.First+r.Count && i < near.Cap(); i++ {
				near.Add(i)
			}
		}
	}
	t.content.Protect(near)
}

// ahead returns how many pieces a reader of a window asks for: they all have their
// part of three quarters of it.
func (p *Peer) ahead(s *Stream) int {
	l := s.content.Layout()
	p.mu.Lock()
	readers := len(s.task.streams)
	p.mu.Unlock()
	return max(1, min(lazyRun, int(s.content.Room()/l.PieceSize)*3/4/max(1, readers)))
}
