package pieces

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"sync"
	"time"
)

// hashStep is how many bytes are read before they are hashed, while they are
// still in the processor's cache.
const hashStep = 128 << 10

// fewPieces is of how many pieces a whole content may be whose digests stay in
// memory when nobody uses it: a manifest is used often, and for moments.
const fewPieces = 4

// DigestError says that bytes were not those of the piece they were sent as.
type DigestError struct {
	Task  TaskID
	Piece int
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("piece %d of %s: bytes do not match the digest", e.Piece, e.Task)
}

// Content is the content of one task, pinned: it is not evicted before Release.
// Its methods may be called by any number of goroutines.
type Content struct {
	*task
	releaseOnce sync.Once

	files    sync.Mutex // guards what follows
	content  *os.File   // opened on first use
	record   *os.File   // opened on first use
	released bool
}

func (s *Store) pinLocked(t *task) *Content {
	t.pins++
	t.lastUse = time.Now()
	return &Content{task: t}
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
	c.store.mu.Lock()
	made := c.made
	c.store.mu.Unlock()
	var err error
	switch {
	case made:
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
	for _, f := range []*os.File{c.content, c.record} {
		if f != nil {
			_ = f.Close()
		}
	}
	c.files.Unlock()

	t, s := c.task, c.store
	s.mu.Lock()
	defer s.mu.Unlock()
	t.pins--
	t.lastUse = time.Now()
	if t.pins == 0 {
		for _, f := range t.spare {
			_ = f.Close()
		}
		t.spare = nil
	}
	if t.pins > 0 || t.ended() != nil {
		return
	}
	if !t.made {
		s.forgetLocked(t)
		return
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

// Receive reads piece i from r, Layout().Size(i) bytes and no more, and keeps it
// when it has the known digest: ErrNoDigest when there is none, a *DigestError
// when the bytes are wrong. A piece already present is not read. After any error
// the content is as it was.
func (c *Content) Receive(i int, r io.Reader) error {
	if ok, err := c.verified(i); ok || err != nil {
		return err
	}
	if c.Digest(i).IsZero() {
		return c.pieceError(i, ErrNoDigest)
	}
	_, err := c.take(i, r)
	return err
}

// Make is Receive for who makes the digests: it keeps the bytes and returns their
// digest, which from then on is the known one. Where a digest is known already,
// other bytes are a *DigestError.
func (c *Content) Make(i int, r io.Reader) (Digest, error) {
	if ok, err := c.verified(i); ok || err != nil {
		return c.Digest(i), err
	}
	return c.take(i, r)
}

// claim makes d the known digest of piece i, before its bytes are written: of two
// who make the same piece of different bytes one is refused, and none overwrites
// the other.
func (c *Content) claim(i int, d Digest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.digests[i].IsZero() {
		c.digests[i] = d
	}
	if c.digests[i] != d {
		return &DigestError{Task: c.id, Piece: i}
	}
	return nil
}

// take reads piece i into memory, checks it, and keeps it.
func (c *Content) take(i int, r io.Reader) (Digest, error) {
	buf := c.store.buffer(c.layout.Size(i))
	defer c.store.free(buf)
	d, err := c.store.readHashed(r, *buf)
	if err != nil {
		return Digest{}, c.pieceError(i, err)
	}
	if err := c.claim(i, d); err != nil {
		return Digest{}, err
	}
	done, err := c.keepOnly(*buf, d, false)
	if err == nil && !done {
		err = c.keep(i, *buf, d)
	}
	if err != nil {
		return Digest{}, c.pieceError(i, err)
	}
	return d, nil
}

// readHashed fills b from r and returns the digest of what came.
func (s *Store) readHashed(r io.Reader, b []byte) (Digest, error) {
	h, _ := s.hashes.Get().(hash.Hash)
	if h == nil {
		h = NewHash()
	}
	defer s.hashes.Put(h)
	h.Reset()
	for len(b) > 0 {
		n, err := io.ReadFull(r, b[:min(hashStep, len(b))])
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return Digest{}, err
		}
		h.Write(b[:n])
		b = b[n:]
	}
	return DigestOf(h), nil
}

// keep writes piece i, whose bytes b have the known digest d, and records it.
func (c *Content) keep(i int, b []byte, d Digest) error {
	f, err := c.file(&c.content, contentName)
	if err != nil {
		return err
	}
	if c.goodRun(i, 1) == 1 { // somebody else was faster
		return nil
	}
	if _, err := f.WriteAt(b, c.layout.Offset(i)); err != nil {
		return err
	}
	c.disk.Lock()
	defer c.disk.Unlock()
	if c.goodRun(i, 1) == 1 {
		return nil
	}
	if err := c.writeEntry(i, false, d); err != nil {
		return err
	}
	c.arrived(i)
	return nil
}

// arrived notes that piece i is there, and tells who waits for it.
func (c *Content) arrived(i int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.have.Add(i)
	c.good.Add(i)
	if ch := c.waiters[i]; ch != nil {
		delete(c.waiters, i)
		close(ch)
	}
}

// writeEntry adds an entry to the record. c.disk is held.
func (c *Content) writeEntry(i int, lost bool, d Digest) error {
	if err := c.ended(); err != nil {
		return err
	}
	f, err := c.file(&c.record, recordName)
	if err != nil {
		return err
	}
	e := appendEntry(make([]byte, 0, entrySize), entrySeed(c.id, c.layout), i, lost, d)
	if _, err := f.WriteAt(e, c.recordEnd); err != nil {
		return err // what got there of the entry is overwritten by the next
	}
	c.recordEnd += entrySize
	c.mu.Lock()
	c.dirty = true
	c.mu.Unlock()
	return nil
}

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

func (c *Content) verify(i int) (bool, error) {
	f, err := c.file(&c.content, contentName)
	if err != nil {
		return false, err
	}
	c.disk.Lock()
	defer c.disk.Unlock()
	c.mu.Lock()
	good, have, want := c.good.Has(i), c.have.Has(i), c.digests[i]
	c.mu.Unlock()
	if good || !have {
		return good, nil
	}
	size := c.layout.Size(i)
	buf := c.store.buffer(size)
	defer c.store.free(buf)
	got, err := c.store.readHashed(io.NewSectionReader(f, c.layout.Offset(i), size), *buf)
	if errors.Is(err, os.ErrClosed) {
		return false, err
	}
	if err == nil && got == want {
		c.mu.Lock()
		c.good.Add(i)
		c.mu.Unlock()
		return true, nil
	}
	lostErr := c.writeEntry(i, true, want)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.have.Remove(i)
	c.suspect = c.suspect || lostErr != nil
	return false, nil
}

// goodRun returns how many pieces from first on, at most limit, are verified.
func (c *Content) goodRun(first, limit int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.good.Run(first, limit)
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
	c.files.Lock()
	defer c.files.Unlock()
	if c.released {
		return nil, os.ErrClosed
	}
	if *p == nil {
		f, err := c.open(name, os.O_RDWR)
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
