package pieces

import (
	"fmt"
	"os"
)

// Of a content that is larger than the room there is, a window is kept: pieces
// come and go, and those that readers are about to need stay (Protect). It has the
// room of some pieces set aside, takes what else is free, and gives that back when
// another task wants it.
const (
	windowPieces = 8
	windowBytes  = 16 << 20
	leastPieces  = 4 // where there is no room for more
)

// Room returns how many bytes readers may count on being kept for them.
func (c *Content) Room() int64 {
	c.store.mu.Lock()
	defer c.store.mu.Unlock()
	return min(c.room, Window(c.layout))
}

// Window returns how many bytes a window of content with layout l has, if it may.
func Window(l Layout) int64 { return min(l.Length, max(windowPieces*l.PieceSize, windowBytes)) }

// lend tells whether the file itself may be given to a connection, which goes on
// reading it when sendfile has long returned: a piece that is punched before that goes
// out as zeros. So that is no part of a window, nor ever will be.
func (t *task) lend() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lent = t.lent || t.have.Full() && !t.meta.Window
	return t.lent
}

// reading is a run of pieces that are on their way to somebody: they are not
// dropped.
type reading struct{ first, end int }

// IsWindow tells whether only a window of the content is kept.
func (t *task) IsWindow() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.meta.Window
}

// held returns the bytes of the pieces that are there.
func (t *task) held() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := int64(t.have.Len()) * t.layout.PieceSize
	if last := t.layout.Count() - 1; last >= 0 && t.have.Has(last) {
		n -= t.layout.PieceSize - t.layout.Size(last)
	}
	return n
}

// windowLocked makes room for a window of content with layout l that has some, and
// returns how much it then has; ErrQuota where that would not be of use.
func (s *Store) windowLocked(l Layout, has int64) (room int64, trash []string, err error) {
	for room = Window(l); room > has; room /= 2 {
		if trash, err = s.makeRoomLocked(room-has, true); err == nil || room/2 < leastPieces*l.PieceSize {
			return room, trash, err
		}
	}
	return has, nil, nil
}

// Narrow makes the content one of which a window is kept, because there is no room for
// all of it, and ErrQuota where there is none for that.
func (c *Content) Narrow() error {
	s := c.store
	s.mu.Lock()
	if c.IsWindow() || c.ended() != nil {
		s.mu.Unlock()
		return c.ended()
	}
	room, trash, err := s.windowLocked(c.layout, c.held()+c.coming)
	if err == nil && !c.narrow() {
		err = ErrQuota
	}
	if err == nil {
		s.resizeLocked(c.task, room)
	}
	s.mu.Unlock()
	s.discard(trash)
	if err != nil {
		return fmt.Errorf("keep a window of %s: %w", c.id, err)
	}
	_ = c.change(func(*Meta) {}, false) // where that cannot be written, the next start finds a content in part
	return nil
}

// narrow makes t a window, and tells whether it may be one.
func (t *task) narrow() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.meta.Window = !t.lent
	return t.meta.Window
}

// wholeLocked makes t, of which a window is kept, one that is kept whole, unless
// that is all that is asked for. ErrQuota when there is no room.
func (s *Store) wholeLocked(t *task, window bool) error {
	if window || !t.IsWindow() {
		return nil
	}
	t.pins++ // not to make room for itself
	_, err := s.shortLocked(t.layout.Length-t.room, false)
	t.pins--
	if err != nil {
		return err
	}
	t.mu.Lock()
	t.meta.Window = false
	t.mu.Unlock()
	return nil
}

// Protect names the pieces that readers are about to need: those are not dropped.
// It replaces what was named before.
func (c *Content) Protect(near Set) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.near = near
}

// keepInWindow is keep for a window.
func (c *Content) keepInWindow(f *os.File, i int, b []byte, d Digest) error {
	c.disk.Lock()
	defer c.disk.Unlock()
	if c.goodRun(i, 1) == 1 {
		return nil
	}
	if n := c.widen(int64(len(b))); n > 0 && !c.give(f, n) {
		return fmt.Errorf("%w: all pieces of the window are about to be read", ErrQuota)
	}
	write := func() error { return c.store.writeAt(f, b, c.layout.Offset(i)) }
	err := c.store.retried(int64(len(b)), write)
	if isFull(err) && c.give(f, int64(len(b))) {
		err = write()
	}
	if err != nil {
		return err
	}
	return c.noteKept(f, i, d)
}

// widen takes free room for n more bytes of a window, and returns how many are
// missing.
func (c *Content) widen(n int64) int64 {
	s := c.store
	s.mu.Lock()
	defer s.mu.Unlock()
	missing := c.held() + n - c.room
	if missing <= 0 || c.ended() != nil || s.missingLocked(missing, true).any() {
		return max(0, missing)
	}
	s.resizeLocked(c.task, c.room+missing)
	return 0
}

// give drops pieces of a window until n bytes are free, and tells whether there
// were enough. It takes those that nobody needs now at random: so hosts that have
// little room keep different ones for each other. c.disk is held.
func (c *Content) give(f *os.File, n int64) bool {
	var dropped []int
	low := n + c.held()/slackShare
	for _, i := range c.store.cfg.perm(c.layout.Count()) {
		if low <= 0 {
			break
		}
		if !c.unlessNeeded(i) {
			continue
		}
		size := c.layout.Size(i)
		dropped = append(dropped, i)
		// A record that still has it is right after a punch that did not happen, and
		// found wrong after one that did.
		err := c.store.punch(f, c.layout.Offset(i), size)
		if err == nil {
			err = c.writeEntry(i, true, c.Digest(i))
		}
		c.unsure(err)
		n, low = n-size, low-size
	}
	if len(dropped) > 0 {
		c.store.lose(c.id, dropped...)
		c.store.count(func(u *Usage) { u.Dropped += len(dropped) })
	}
	return n <= 0
}

// unlessNeeded takes piece i out if it is there and nobody needs it now.
func (c *Content) unlessNeeded(i int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.have.Has(i) || c.near.Has(i) || c.lent {
		return false
	}
	for _, r := range c.readings {
		if r.first <= i && i < r.end {
			return false
		}
	}
	c.good.Remove(i)
	c.fresh.Remove(i)
	return c.have.Remove(i)
}

// pin keeps the pieces of a run that are there from being dropped until unpin,
// and returns how many from first on those are.
func (t *task) pin(first, end int) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.good.Run(first, end-first)
	if n > 0 {
		t.readings = append(t.readings, reading{first, first + n})
	}
	return n
}

func (t *task) unpin(first, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.readings = without(t.readings, reading{first, first + n})
}

// without returns list without the first that is x; the order is not kept.
func without(list []reading, x reading) []reading {
	for i := range list {
		if list[i] == x {
			list[i] = list[len(list)-1]
			return list[:len(list)-1]
		}
	}
	return list
}

// shrink has windows that are in use give back the room they need not have, and
// tells whether that was any.
func (s *Store) shrink() bool {
	s.mu.Lock()
	var wide []*Content
	for _, t := range s.tasks {
		if t.pins > 0 && t.made && t.IsWindow() && t.room > Window(t.layout) {
			wide = append(wide, s.lookLocked(t))
		}
	}
	s.mu.Unlock()
	gave := false
	for _, c := range wide {
		gave = c.shrink() || gave
		c.Release()
	}
	return gave
}

func (c *Content) shrink() bool {
	if c.ready() != nil {
		return false
	}
	f, err := c.file(&c.content, contentName)
	if err != nil {
		return false
	}
	c.disk.Lock()
	defer c.disk.Unlock()
	c.give(f, c.held()-Window(c.layout))
	s := c.store
	s.mu.Lock()
	defer s.mu.Unlock()
	room := max(Window(c.layout), c.held())
	if room >= c.room || c.ended() != nil || !c.IsWindow() {
		return false
	}
	s.resizeLocked(c.task, room)
	return true
}
