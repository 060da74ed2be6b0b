package dfget

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// RangeError says that a range begins outside the content.
type RangeError struct {
	Off, Size int64 // where the range begins, and the content's length
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("a range from %d on lies outside the %d bytes of the content", e.Off, e.Size)
}

// Request asks for a content.
type Request struct {
	ID     pieces.TaskID
	Origin api.Origin // for the supernode; with the caller's own credentials
	Direct Origin     // asked when the region fails
}

// Stats is where the bytes came from. Peer and Supernode are those of the whole
// download, which other streams may share; Store and Origin are this stream's.
type Stats struct{ Peer, Supernode, Origin, Store int64 }

// Stream is the bytes of a range in order, as they come. Whatever fails in the
// region, the rest comes from the origin. Read and WriteTo are one goroutine's;
// Stats may be called by others.
type Stream struct {
	p       *Peer
	ctx     context.Context
	cancel  context.CancelFunc
	id      pieces.TaskID
	origin  api.Origin
	said    int64     // its size, as somebody has said; 0 is not
	since   time.Time // when the reader began to wait
	direct  *direct   // where the region's bytes end
	task    *task     // nil when the region has no part in it
	answer  chan answer
	refused error        // why the region does not serve it, where it has said so
	asking  atomic.Int64 // when the supernode last said that it waits for the origin, in Unix nanoseconds

	content  *pieces.Content // nil when the stream is direct
	own      bool            // content is pinned by this stream and not by its task
	stored   bool            // content was complete before
	run      *pieces.Reader  // of what is there from off on
	runEnd   int64
	size     int64 // of the content, -1 unknown
	off, end int64 // what is left of the range; end is -1 for an unknown end
	length   int64
	given    bool            // a byte has been
	lazy     bool            // it is a bounded range, for which no more need be got
	asked    int             // up to which piece it has asked for pieces
	excused  time.Time       // when the region was last seen to wait for the origin itself
	mixed    bool            // of the region, before the origin's
	sum      digest.Verifier // of the whole, as far as it was given, by the origin; nil where it cannot be known

	fromStore, fromOrigin atomic.Int64
}

// Open returns the n bytes from off on, fewer where the content ends, all with n
// negative; with 0 it tells the size. It returns when the first bytes are in
// hand and verified, or the origin is the one to give them, which it is found to
// be within seconds. The error is a *RefusedError, a *RangeError, ctx's cause,
// or what the origin failed with. The stream ends with ctx.
func (p *Peer) Open(ctx context.Context, req Request, off, n int64) (*Stream, error) {
	return p.OpenSince(ctx, time.Now(), req, off, n)
}

// OpenSince is Open for a reader that has been waiting since then.
func (p *Peer) OpenSince(ctx context.Context, since time.Time, req Request, off, n int64) (*Stream, error) {
	if off == 0 && n < 0 {
		if s := p.claim(ctx, req); s != nil {
			return s, nil
		}
	}
	return p.open(ctx, since, req, 0, off, n)
}

func (p *Peer) open(ctx context.Context, since time.Time, req Request, said, off, n int64) (*Stream, error) {
	s := &Stream{p: p, id: req.ID, origin: req.Origin, said: said, since: since, off: off, answer: make(chan answer, 1)}
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.direct = &direct{from: req.Direct}
	s.lazy = n >= 0 && p.cfg.Background != 0
	err := s.open(n) // it has s.ctx
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Stream) open(n int64) error {
	cause, err := s.join()
	if cause == "" && err == nil {
		if err = s.bound(s.content.Layout().Length, n); err != nil || s.off == s.end {
			return err
		}
		if s.lazy && s.length == s.size {
			s.p.wantAll(s.task)
		}
		cause, err = s.await(s.since)
	}
	if cause == causeNoSession {
		var done bool
		if done, err = s.alone(n); done || err != nil {
			return err
		}
	}
	if err != nil || cause == "" {
		return err
	}
	if err := s.fallBack(cause); err != nil {
		return err
	}
	if err := s.direct.open(s.ctx, s.off); err != nil {
		return err
	}
	if err = s.bound(s.direct.size, n); err != nil || s.off > 0 || s.end != s.size {
		s.sum = nil
		return err
	}
	_, err = s.compare(nil, nil) // it may be empty
	return err
}

// bound sets the range to n bytes from s.off on, of a content of that size.
func (s *Stream) bound(size, n int64) error {
	if size >= 0 && s.off > 0 && s.off >= size || s.off < 0 {
		return &RangeError{s.off, size}
	}
	s.size = size
	s.end = size
	if n >= 0 && (size < 0 || n < size-s.off) {
		s.end = s.off + n
	}
	s.length = s.end - s.off
	if size < 0 {
		s.length = -1
	}
	return nil
}

// Size returns the length of the whole content in bytes, -1 when it is not known.
func (s *Stream) Size() int64 { return s.size }

// Length returns how many bytes the stream has from its beginning to its end, -1
// when the size is not known.
func (s *Stream) Length() int64 { return s.length }

// Stats returns where the bytes came from so far.
func (s *Stream) Stats() Stats {
	st := Stats{Store: s.fromStore.Load(), Origin: s.fromOrigin.Load()}
	if s.task != nil {
		st.Peer, st.Supernode = s.task.fromPeers.Load(), s.task.fromSupernode.Load()
	}
	return st
}

// Close ends the stream. A download that others may use goes on.
func (s *Stream) Close() error {
	s.cancel()
	s.direct.close()
	s.leave()
	return nil
}

// next makes the next bytes ready: with nil, s.content holds those from s.off to
// s.runEnd, or, when it is nil, the origin gives the rest.
func (s *Stream) next() error {
	switch {
	case s.content == nil && s.mixed && s.isWrong():
		return errDropped
	case s.content == nil:
		return nil
	case !s.own && s.task.isOver():
		return s.fallBack(causeStore)
	case s.off < s.runEnd:
		return nil
	}
	cause, err := s.await(time.Now())
	if err != nil {
		return err
	}
	if cause != "" {
		return s.fallBack(cause)
	}
	l := s.content.Layout()
	first, end := l.Span(s.off, s.end-s.off)
	i := first + 1
	for i < end && i-first < wantRun && s.content.Has(i) {
		i++
	}
	if !s.own && s.content.IsWindow() {
		ahead := s.p.ahead(s)
		i = min(i, first+ahead)
		if s.asked < end && i+ahead/2 >= s.asked {
			s.p.ask(s, first, min(end, first+ahead))
		}
	} else if s.lazy && s.asked < end && i+lazyRun/2 >= s.asked { // before its reader waits for them
		s.p.ask(s, i, min(end, i+lazyRun))
	}
	s.runEnd = min(l.Offset(i), s.end)
	s.run = s.content.NewReader(present, s.off, s.runEnd-s.off)
	return nil
}

// present is of readers that wait for nothing: what is not there is missing.
var present = func() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(pieces.ErrMissing)
	return ctx
}()

// gave counts n bytes given to the reader.
func (s *Stream) gave(n int64) {
	s.off += n
	s.given = s.given || n > 0
	switch {
	case s.content == nil:
		s.fromOrigin.Add(n)
		s.p.metrics.received.WithLabelValues(sourceOrigin).Add(float64(n))
	case s.stored:
		s.fromStore.Add(n)
		s.p.metrics.received.WithLabelValues(sourceStore).Add(float64(n))
	}
}

// Read reads the next bytes. io.EOF comes only when all have been read.
func (s *Stream) Read(b []byte) (int, error) {
	if s.off == s.end {
		return 0, io.EOF
	}
	if len(b) == 0 {
		return 0, nil
	}
	if s.end >= 0 {
		b = b[:min(int64(len(b)), s.end-s.off)]
	}
	for {
		if err := s.next(); err != nil {
			return 0, err
		}
		if s.content == nil {
			n, err := s.direct.read(s.ctx, b, s.off, s.size)
			n, err = s.compare(b[:n], err)
			s.gave(int64(n))
			return n, err
		}
		n, err := s.run.Read(b)
		s.gave(int64(n))
		if n > 0 {
			return n, nil
		}
		if s.ctx.Err() != nil {
			return 0, context.Cause(s.ctx)
		}
		if s.comesAgain(err) {
			continue
		}
		s.p.log.Error("store cannot be read", zap.String("task", string(s.id)), zap.Error(err))
		if err := s.fallBack(causeStore); err != nil {
			return 0, err
		}
	}
}

// WriteTo writes what is left to w: what is in the store by runs of pieces, as
// Content.CopyRange does, so that a connection gets them by sendfile.
func (s *Stream) WriteTo(w io.Writer) (total int64, err error) {
	for s.off != s.end {
		if err := s.next(); err != nil {
			return total, err
		}
		if s.content == nil {
			n, err := io.Copy(w, struct{ io.Reader }{s})
			return total + n, err
		}
		n, err := s.content.CopyRange(w, s.off, s.runEnd-s.off)
		s.gave(n)
		total += n
		if err == nil || s.comesAgain(err) {
			continue
		}
		damage := s.damage()
		if damage == nil {
			return total, err // then it is w that fails
		}
		if s.comesAgain(damage) {
			continue
		}
		s.p.log.Error("store cannot be read", zap.String("task", string(s.id)), zap.Error(err))
		if err := s.fallBack(causeStore); err != nil {
			return total, err
		}
	}
	return total, nil
}

// damage tells why the store does not give the byte at s.off, nil when it does.
func (s *Stream) damage() error {
	_, err := s.content.CopyRange(io.Discard, s.off, 1)
	return err
}

// comesAgain tells whether what was there, and is there no more, will be got anew
// from the region: it was found wrong, or dropped to make room.
func (s *Stream) comesAgain(err error) bool {
	if s.own || !errors.Is(err, pieces.ErrMissing) {
		return false
	}
	s.runEnd = s.off
	return true
}
