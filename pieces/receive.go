package pieces

import (
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
)

// hashStep is how many bytes are read before they are hashed, while they are
// still in the processor's cache.
const hashStep = 128 << 10

// DigestError says that bytes were not those of the piece they were sent as.
type DigestError struct {
	Task  TaskID
	Piece int
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("piece %d of %s: bytes do not match the digest", e.Piece, e.Task)
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
	defer c.store.deliver()
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
	if c.IsWindow() {
		return c.keepInWindow(f, i, b, d)
	}
	if c.goodRun(i, 1) == 1 { // somebody else was faster
		return nil
	}
	if err := c.reserve(int64(len(b))); err != nil {
		return err
	}
	defer c.written(int64(len(b)))
	write := func() error { return c.store.writeAt(f, b, c.layout.Offset(i)) }
	if err := c.store.retried(int64(len(b)), write); err != nil {
		return err
	}
	c.disk.Lock()
	defer c.disk.Unlock()
	return c.noteKept(f, i, d)
}

// noteKept records piece i, which is written to f. c.disk is held.
func (c *Content) noteKept(f *os.File, i int, d Digest) error {
	if c.goodRun(i, 1) == 1 {
		return nil
	}
	if err := c.store.retried(entrySize, func() error { return c.writeEntry(i, false, d) }); err != nil {
		return err
	}
	c.arrived(i)
	c.seen(f)
	return nil
}

// arrived notes that piece i is there, and tells who waits for it.
func (c *Content) arrived(i int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.have.Add(i)
	c.good.Add(i)
	c.fresh.Add(i)
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
	if err := c.store.writeAt(f, e, c.recordEnd); err != nil {
		return err // what got there of the entry is overwritten by the next
	}
	c.recordEnd += entrySize
	c.mu.Lock()
	c.dirty = true
	c.mu.Unlock()
	return nil
}
