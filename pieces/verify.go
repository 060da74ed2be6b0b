package pieces

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// freshFor is how long a piece that was received or verified is given to anyone
// without another look at its bytes, as long as nobody has written to the file.
const freshFor = time.Hour

// verified tells whether piece i is present and right; one in doubt is verified
// now, and taken out when it is not what was recorded. An error says that it
// could not be looked at, or that there is no such piece.
func (c *Content) verified(i int) (bool, error) {
	if uint(i) >= uint(c.layout.Count()) {
		return false, c.pieceError(i, fmt.Errorf("only %d pieces", c.layout.Count()))
	}
	c.mu.Lock()
	good, have := c.good.Has(i), c.have.Has(i)
	c.mu.Unlock()
	if good || !have {
		return good, nil
	}
	ok, err := c.verify(i)
	if err != nil {
		return false, c.pieceError(i, err)
	}
	return ok, nil
}

// verify looks at piece i on the disk, and takes it out when it is not what was
// recorded, or cannot be read. An error says that it could not be looked at.
func (c *Content) verify(i int) (bool, error) {
	f, err := c.toRead()
	if err != nil {
		return false, err
	}
	right, _ := c.matches(f, i)
	if !right {
		c.disk.Lock() // nothing else is done to it now
		defer c.disk.Unlock()
		right, err = c.matches(f, i)
	}
	switch {
	case right:
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.have.Has(i) { // else it was dropped meanwhile
			c.good.Add(i)
			c.fresh.Add(i)
		}
		return c.have.Has(i), nil
	case errors.Is(err, os.ErrClosed):
		return false, err
	}
	c.mu.Lock()
	wasGood := c.good.Has(i)
	lost := c.have.Remove(i)
	c.good.Remove(i)
	c.fresh.Remove(i)
	c.mu.Unlock()
	if !lost {
		return false, nil
	}
	c.unsure(c.writeEntry(i, true, c.Digest(i)))
	c.store.lose(c.id, i)
	if wasGood {
		c.store.count(func(u *Usage) { u.Rotten++ })
	}
	return false, nil
}

// unsure notes that the record may say wrong things, where err has kept it from
// being written.
func (t *task) unsure(err error) {
	if err == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.suspect = true
}

// matches reads piece i and tells whether it is there as recorded.
func (c *Content) matches(f *os.File, i int) (bool, error) {
	c.mu.Lock()
	have, want := c.have.Has(i), c.digests[i]
	c.mu.Unlock()
	if !have {
		return false, nil
	}
	off, size := c.layout.Offset(i), c.layout.Size(i)
	if err := c.store.may(op{kind: opRead, file: f, off: off, n: size}); err != nil {
		return false, err
	}
	buf := c.store.buffer(size)
	defer c.store.free(buf)
	got, err := c.store.readHashed(io.NewSectionReader(f, off, size), *buf)
	return err == nil && got == want, err
}

// Recheck looks at piece i on the disk, whenever that was done last, and tells
// whether it is there and right; when it is not, it is there no more.
func (c *Content) Recheck(i int) bool {
	if uint(i) >= uint(c.layout.Count()) {
		return false
	}
	defer c.store.deliver()
	ok, err := c.verify(i)
	return ok && err == nil
}

// freshRun returns how many pieces from first on, at most limit, may be given away
// as they are; where there is none, piece first is verified. All of them that are
// there have been found good once.
func (c *Content) freshRun(first, limit int) (int, error) {
	c.mu.Lock()
	c.ageLocked()
	n := min(c.fresh.Run(first, limit), c.good.Run(first, limit))
	good := c.good.Has(first)
	c.mu.Unlock()
	if n > 0 || !good {
		return n, nil
	}
	defer c.store.deliver()
	ok, err := c.verify(first)
	if ok {
		n = 1
	}
	return n, err
}

// doubt has all pieces looked at before they are given to anyone again.
func (t *task) doubt() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fresh = NewSet(t.layout.Count())
}

// seen compares what the file system says of the content with what it said when
// somebody last looked. When it was written to since and all was there by then,
// that was not the store: every piece is in doubt.
func (t *task) seen(f *os.File) {
	t.mu.Lock()
	partial := !t.have.Full() && t.stamp == (stamp{})
	t.mu.Unlock()
	if partial {
		return // nothing is compared before all of it is there
	}
	info, err := f.Stat()
	if err != nil {
		return
	}
	now := stamp{info.ModTime(), info.Size()}
	t.mu.Lock()
	before := t.stamp
	t.stamp = stamp{}
	if t.have.Full() {
		t.stamp = now
	}
	t.mu.Unlock()
	if before != (stamp{}) && before != now {
		t.doubt()
	}
}

// stamp is what tells that a file was written to.
type stamp struct {
	modified time.Time
	size     int64
}

// goodRun returns how many pieces from first on, at most limit, are verified.
func (c *Content) goodRun(first, limit int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.good.Run(first, limit)
}
