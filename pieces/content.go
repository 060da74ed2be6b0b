package pieces

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// fewPieces is of how many pieces a whole content may be whose digests stay in
// memory when nobody uses it: a manifest is used often, and for moments.
const fewPieces = 4

// Content is the content of one task, pinned: it is not evicted before Release.
// Its methods may be called by any number of goroutines.
type Content struct {
	*task
	releaseOnce sync.Once
	looks       bool // that is no use

	files    sync.Mutex // guards what follows
	content  *os.File   // opened on first use
	record   *os.File   // opened on first use
	reader   *os.File   // the content, where it cannot be opened for writing
	released bool
}

func (s *Store) pinLocked(t *task) *Content {
	t.pins++
	t.lastUse = time.Now()
	return &Content{task: t}
}

// lookLocked pins t for who takes care of the store.
func (s *Store) lookLocked(t *task) *Content {
	t.pins++
	return &Content{task: t, looks: true}
}

// ready sees to it that the task's digests are in memory and its directory exists,
// which that of a single piece need not, or else releases c.
func (c *Content) ready() error {
	if c.isReady() {
		return nil
	}
	c.disk.Lock()
	defer c.disk.Unlock()
	if c.isReady() {
		return nil
	}
	var err error
	switch {
	case c.isMade():
		err = c.loadDigests()
	case c.layout.Count() == 1:
		c.mu.Lock()
		c.digests, err = make([]Digest, 1), c.why
		c.mu.Unlock()
	default:
		err = c.create(c.Meta(), nil, Digest{})
	}
	if err != nil {
		c.Release()
	}
	return err
}

func (c *Content) isReady() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.digests != nil
}

// Release ends the use of c. Calls after the first do nothing.
func (c *Content) Release() { c.releaseOnce.Do(c.release) }

func (c *Content) release() {
	c.files.Lock()
	c.released = true
	for _, f := range []*os.File{c.content, c.record, c.reader} {
		if f != nil {
			_ = f.Close()
		}
	}
	c.files.Unlock()

	c.store.mu.Lock()
	trash := c.store.unpinLocked(c)
	c.store.mu.Unlock()
	c.store.discard(trash)
}

// unpinLocked takes back a pin. A task of which nothing has come is not kept.
func (s *Store) unpinLocked(c *Content) (trash []string) {
	t := c.task
	t.pins--
	if !c.looks {
		t.lastUse = time.Now()
	}
	if t.pins == 0 {
		for _, f := range t.spare {
			_ = f.Close()
		}
		t.spare = nil
	}
	if t.pins > 0 || t.ended() != nil {
		return nil
	}
	if !t.made || t.layout.Length > 0 && t.held() == 0 {
		temp, _ := s.dropLocked(t) // what could not be renamed is out of the map all the same
		return []string{temp}
	}
	t.mu.Lock()
	if t.layout.Count() > fewPieces || !t.have.Full() {
		t.digests = nil
	}
	t.mu.Unlock()
	if t.lastUse.Sub(t.stamped) >= stampAfter {
		t.stamped = t.lastUse
		_ = s.root.Chtimes(t.dir, t.lastUse, t.lastUse) // the order of eviction is not worth an error
	}
	return nil
}

// ID returns the task's id.
func (c *Content) ID() TaskID { return c.id }

// Layout returns how the content is cut.
func (c *Content) Layout() Layout { return c.layout }

// Complete tells whether all pieces are present and SetComplete said so.
func (c *Content) Complete() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.meta.Complete && c.have.Full()
}

// Has tells whether piece i is present and right. A piece in doubt is verified
// first, which reads it from the disk.
func (c *Content) Has(i int) bool {
	ok, err := c.verified(i)
	return ok && err == nil
}

// InDoubt tells whether some piece that is present has to be verified before its
// first use.
func (c *Content) InDoubt() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.good.Len() != c.have.Len()
}

// Digest returns the digest of piece i, zero when it is not known.
func (c *Content) Digest(i int) Digest {
	c.mu.Lock()
	defer c.mu.Unlock()
	if uint(i) >= uint(len(c.digests)) {
		return Digest{}
	}
	return c.digests[i]
}

// SetDigests learns the digests of the pieces from first on; a zero one says
// nothing. Those of pieces that do not come are forgotten with the last Release.
// When one contradicts what is known the error is ErrConflict and
// nothing changes.
func (c *Content) SetDigests(first int, ds []Digest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if first < 0 || first > len(c.digests) || len(ds) > len(c.digests)-first {
		return fmt.Errorf("%d digests from piece %d of %s on: only %d pieces", len(ds), first, c.id, len(c.digests))
	}
	known := c.digests[first : first+len(ds)]
	for i, d := range ds {
		if !d.IsZero() && !known[i].IsZero() && known[i] != d {
			return fmt.Errorf("digest of piece %d of %s: %w", first+i, c.id, ErrConflict)
		}
	}
	for i, d := range ds {
		if !d.IsZero() {
			known[i] = d
		}
	}
	return nil
}

// Wait returns when piece i is present; before that the cause of ctx's end, or
// ErrGone when the task is removed.
func (c *Content) Wait(ctx context.Context, i int) error {
	if ok, err := c.verified(i); ok || err != nil {
		return err
	}
	c.mu.Lock()
	if c.good.Has(i) {
		c.mu.Unlock()
		return nil
	}
	ch := c.waiters[i]
	if ch == nil {
		ch = make(chan struct{})
		if c.waiters == nil {
			c.waiters = make(map[int]chan struct{})
		}
		c.waiters[i] = ch
	}
	c.mu.Unlock()
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		return c.pieceError(i, context.Cause(ctx))
	case <-c.gone:
		return c.pieceError(i, c.ended())
	}
}

// SetComplete says that the whole content has been verified. All pieces must be
// present (ErrMissing). It returns when all of it is on the disk, which takes as
// long as the disk takes.
func (c *Content) SetComplete() error {
	for i := range c.layout.Count() {
		if ok, err := c.verified(i); err != nil {
			return err
		} else if !ok {
			return c.pieceError(i, ErrMissing)
		}
	}
	return c.change(func(m *Meta) { m.Complete = true }, true)
}

// AddPublic adds a "registry/repository" name under which anyone may read the
// content. Past 256 names the oldest is forgotten.
func (c *Content) AddPublic(name string) error {
	c.mu.Lock()
	known := slices.Contains(c.meta.Public, name)
	c.mu.Unlock()
	if known {
		return nil
	}
	return c.change(func(m *Meta) { m.Public = withName(m.Public, name) }, false)
}

// AddOrigin adds to Meta.Origins one who has given these very bytes. Past 256
// the oldest is forgotten.
func (c *Content) AddOrigin(name string) error {
	return c.change(func(m *Meta) { m.Origins = withName(m.Origins, name) }, false)
}

// change edits the metadata, and where asked makes all of the task durable.
func (c *Content) change(edit func(*Meta), durable bool) error {
	defer c.store.deliver()
	c.disk.Lock()
	defer c.disk.Unlock()
	m := c.Meta()
	edit(&m)
	err := m.validate()
	if err == nil && durable {
		err = c.sync()
	}
	if err == nil {
		err = c.writeMeta(m, durable)
	}
	if err == nil {
		return nil
	}
	if ended := c.ended(); ended != nil { // the files went from under us
		err = ended
	}
	return fmt.Errorf("write the metadata of %s: %w", c.id, err)
}

// file returns c's own file behind p, c.content or c.record, opening it when it
// is not yet open.
func (c *Content) file(p **os.File, name string) (*os.File, error) {
	return c.openFor(p, name, os.O_RDWR)
}

// toRead is the content's file for who only reads it.
func (c *Content) toRead() (*os.File, error) {
	f, err := c.file(&c.content, contentName)
	if errors.Is(err, syscall.EROFS) {
		return c.openFor(&c.reader, contentName, os.O_RDONLY)
	}
	return f, err
}

func (c *Content) openFor(p **os.File, name string, flag int) (*os.File, error) {
	c.files.Lock()
	defer c.files.Unlock()
	if c.released {
		return nil, os.ErrClosed
	}
	if *p == nil {
		f, err := c.open(name, flag)
		if err != nil {
			return nil, err
		}
		*p = f
	}
	return *p, nil
}

func (c *Content) pieceError(i int, err error) error {
	return fmt.Errorf("piece %d of %s: %w", i, c.id, err)
}
