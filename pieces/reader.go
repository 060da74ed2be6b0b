package pieces

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// CopyRange writes the n bytes from off on to w, and returns how many it wrote.
// It ends with ErrMissing at a piece that is not there, or turns out not to be
// right; before the first byte when that is so already. Of a content that is all
// there w is given more than a few KiB as an *io.LimitedReader of an *os.File by
// io.Copy, which is what net/http sends with sendfile.
func (c *Content) CopyRange(w io.Writer, off, n int64) (int64, error) {
	if err := c.checkRange(off, n); err != nil {
		return 0, err
	}
	first, end := c.layout.Span(off, n)
	for i := first; i < end; i++ {
		if ok, err := c.verified(i); err != nil {
			return 0, err
		} else if !ok {
			return 0, c.pieceError(i, ErrMissing)
		}
	}
	if n <= smallCopy {
		return c.copySmall(w, off, n)
	}
	f, err := c.openAt(off)
	if err != nil {
		return 0, fmt.Errorf("copy from %s: %w", c.id, err)
	}
	defer c.putBack(f)
	var total int64
	for total < n {
		done, err := c.copySome(w, f, off+total, n-total)
		if total += done; err != nil {
			return total, err
		}
	}
	return total, nil
}

// copySome copies from f, which stands at off, as much of n bytes as is there and
// fresh, at least some of the first piece.
func (c *Content) copySome(w io.Writer, f *os.File, off, n int64) (int64, error) {
	first, end := c.layout.Span(off, n)
	pinned, err := c.pinFresh(f, first, end)
	if err != nil {
		return 0, err
	}
	defer c.unpin(first, pinned)
	return c.copyN(w, f, min(n, c.layout.Offset(first+pinned)-off))
}

// maxSpare is how many open files a task keeps beside those in use.
const maxSpare = 4

// smallCopy is how many bytes cost less to copy than to open the file for.
const smallCopy = 64 << 10

func (c *Content) copySmall(w io.Writer, off, n int64) (int64, error) {
	f, err := c.toRead()
	if err == nil {
		err = c.ended()
	}
	if err != nil {
		return 0, fmt.Errorf("copy from %s: %w", c.id, c.missed(err))
	}
	buf := c.store.buffer(n)
	defer c.store.free(buf)
	got, short := c.readSmall(f, *buf, off)
	if errors.Is(short, io.EOF) {
		short = io.ErrUnexpectedEOF
	}
	done, err := w.Write((*buf)[:got])
	if err == nil {
		err = short
	}
	if err != nil {
		err = fmt.Errorf("copy from %s: %w", c.id, err)
	}
	return int64(done), err
}

// readSmall reads from f what there is of b at off.
func (c *Content) readSmall(f *os.File, b []byte, off int64) (done int, err error) {
	for done < len(b) && err == nil {
		var n int
		n, err = c.readSome(f, b[done:], off+int64(done))
		done += n
	}
	return done, err
}

// readSome reads from f as much of b at off as is there and fresh, at least some
// of the first piece.
func (c *Content) readSome(f *os.File, b []byte, off int64) (int, error) {
	first, end := c.layout.Span(off, int64(len(b)))
	pinned, err := c.pinFresh(f, first, end)
	if err != nil {
		return 0, err
	}
	defer c.unpin(first, pinned)
	n, err := f.ReadAt(b[:min(int64(len(b)), c.layout.Offset(first+pinned)-off)], off)
	if err != nil {
		c.doubt()
	}
	return n, err
}

// pinFresh pins the pieces from first on, before end, that may be given away as
// they are, and returns how many: at least one, which is verified for that where
// need be, or ErrMissing.
func (c *Content) pinFresh(f *os.File, first, end int) (int, error) {
	c.seen(f)
	n, err := c.freshRun(first, end-first)
	if err == nil && n > 0 {
		n = c.pin(first, first+n)
	}
	if err == nil && n == 0 {
		err = ErrMissing
	}
	if err != nil {
		return 0, c.pieceError(first, err)
	}
	return n, nil
}

// copyN copies n bytes from where f stands.
func (c *Content) copyN(w io.Writer, f *os.File, n int64) (done int64, err error) {
	from := &io.LimitedReader{R: f, N: n}
	if c.lend() {
		done, err = io.Copy(w, from)
	} else {
		buf := c.store.buffer(min(n, hashStep))
		done, err = io.CopyBuffer(struct{ io.Writer }{w}, from, *buf)
		c.store.free(buf)
	}
	if err == nil && done < n {
		err = io.ErrUnexpectedEOF
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.EIO) {
		c.doubt() // the file may have been cut short, or not be readable
	}
	if err != nil {
		return done, fmt.Errorf("copy from %s: %w", c.id, err)
	}
	return done, nil
}

// openAt returns the content for the caller alone, standing at off, until putBack.
func (c *Content) openAt(off int64) (*os.File, error) {
	f := c.takeSpare()
	err := c.ended()
	if f == nil && err == nil {
		f, err = c.open(contentName, os.O_RDONLY)
	}
	if err != nil {
		if f != nil {
			_ = f.Close()
		}
		return nil, c.missed(err)
	}
	if _, err := f.Seek(off, io.SeekStart); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// missed returns err, having removed the task where it says that somebody has
// taken its content away.
func (c *Content) missed(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		_ = c.store.Remove(c.id)
		return ErrGone
	}
	return err
}

// takeSpare returns a file that was put back, nil when there is none.
func (c *Content) takeSpare() *os.File {
	c.store.mu.Lock()
	defer c.store.mu.Unlock()
	n := len(c.spare)
	if n == 0 {
		return nil
	}
	f := c.spare[n-1]
	c.spare = c.spare[:n-1]
	return f
}

// putBack keeps a file of openAt for the next one, while the task is pinned: to
// open it again costs as much as to send a good part of a piece.
func (c *Content) putBack(f *os.File) {
	c.store.mu.Lock()
	keep := c.pins > 0 && len(c.spare) < maxSpare
	if keep {
		c.spare = append(c.spare, f)
	}
	c.store.mu.Unlock()
	if !keep {
		_ = f.Close()
	}
}

func (c *Content) checkRange(off, n int64) error {
	if off < 0 || n < 0 || off > c.layout.Length || n > c.layout.Length-off {
		return fmt.Errorf("%d bytes from %d on lie outside the %d of %s", n, off, c.layout.Length, c.id)
	}
	return nil
}

// Reader reads a range of a content in order, each piece as soon as it is there.
// It is for one goroutine, and needs its Content pinned.
type Reader struct {
	c   *Content
	ctx context.Context
	off int64
	end int64
	err error // of the range it was made with
}

// NewReader returns a reader of the n bytes from off on. It waits for each piece
// until ctx ends or the task is removed, and comes to io.EOF only after n bytes.
func (c *Content) NewReader(ctx context.Context, off, n int64) *Reader {
	r := &Reader{c: c, ctx: ctx, off: off, end: off + n, err: c.checkRange(off, n)}
	// Opened here so that what is present stays readable after Remove; an error
	// comes again with the first Read.
	_, _ = c.toRead()
	return r
}

// wait waits for the piece at r.off and returns how many bytes from there on are
// present, at most to the end.
func (r *Reader) wait() (int64, error) {
	if r.err != nil {
		return 0, r.err
	}
	l := r.c.layout
	first, end := l.Span(r.off, r.end-r.off)
	if err := r.c.Wait(r.ctx, first); err != nil {
		return 0, err
	}
	present := l.Offset(first + r.c.goodRun(first, end-first))
	return min(present, r.end) - r.off, nil
}

// Read reads what is present of the range, waiting when that is nothing.
func (r *Reader) Read(p []byte) (int, error) {
	if r.err == nil && r.off == r.end {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, r.err
	}
	n, err := r.wait()
	if err != nil {
		return 0, err
	}
	f, err := r.c.toRead()
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", r.c.id, err)
	}
	done, err := r.c.readSome(f, p[:min(int64(len(p)), n)], r.off)
	r.off += int64(done)
	if err == nil {
		return done, nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return done, fmt.Errorf("read %s: %w", r.c.id, err)
}

// WriteTo writes the rest of the range to w, run by run as pieces come, each as
// CopyRange does.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	if r.err != nil || r.off == r.end {
		return 0, r.err
	}
	f, err := r.c.openAt(r.off)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", r.c.id, err)
	}
	defer r.c.putBack(f)
	var total int64
	for r.off < r.end {
		n, err := r.wait()
		if err != nil {
			return total, err
		}
		done, err := r.c.copySome(w, f, r.off, n)
		r.off += done
		total += done
		if err != nil {
			return total, err
		}
	}
	return total, nil
}
