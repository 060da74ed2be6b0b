package pieces

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// CopyRange writes the n bytes from off on to w, and returns how many it wrote.
// All pieces that hold them must be present (ErrMissing before the first byte).
// More than a few KiB w is given as an *io.LimitedReader of an *os.File by
// io.Copy, which is what net/http sends with sendfile.
func (c *Content) CopyRange(w io.Writer, off, n int64) (int64, error) {
	if err := c.checkRange(off, n); err != nil {
		return 0, err
	}
	for first, end := c.layout.Span(off, n); first < end; first++ {
		if ok, err := c.verified(first); err != nil {
			return 0, err
		} else if !ok {
			return 0, c.pieceError(first, ErrMissing)
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
	return c.copyN(w, f, n)
}

// maxSpare is how many open files a task keeps beside those in use.
const maxSpare = 4

// smallCopy is how many bytes cost less to copy than to open the file for.
const smallCopy = 64 << 10

func (c *Content) copySmall(w io.Writer, off, n int64) (int64, error) {
	f, err := c.file(&c.content, contentName)
	if err == nil {
		err = c.ended()
	}
	if err != nil {
		return 0, fmt.Errorf("copy from %s: %w", c.id, c.missed(err))
	}
	buf := c.store.buffer(n)
	defer c.store.free(buf)
	got, short := f.ReadAt(*buf, off)
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

// copyN copies n bytes from where f stands.
func (c *Content) copyN(w io.Writer, f *os.File, n int64) (int64, error) {
	done, err := io.Copy(w, &io.LimitedReader{R: f, N: n})
	if err == nil && done < n {
		err = io.ErrUnexpectedEOF
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
	_, _ = c.file(&c.content, contentName)
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
	f, err := r.c.file(&r.c.content, contentName)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", r.c.id, err)
	}
	p = p[:min(int64(len(p)), n)]
	done, err := f.ReadAt(p, r.off)
	r.off += int64(done)
	if done == len(p) {
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
		done, err := r.c.copyN(w, f, n)
		r.off += done
		total += done
		if err != nil {
			return total, err
		}
	}
	return total, nil
}
