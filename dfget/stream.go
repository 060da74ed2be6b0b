package dfget

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const (
	joinTimeout  = 8 * time.Second        // for the supernode's answer, which waits for the origin's
	firstTimeout = 8 * time.Second        // for the first piece after that
	wantAfter    = 300 * time.Millisecond // a reader that waits longer asks for its piece
	silentLimit  = 5 * time.Second        // nothing of the task has moved
	lostLimit    = time.Second            // no session, and nothing on its way
	lateLimit    = 8 * time.Second        // other pieces come
	movingLimit  = 30 * time.Second       // bytes come, but no whole piece for the reader
	lateFactor   = 4                      // times what a piece is expected to take

	maxHeader = 64 << 10 // bytes of a caller's header that a Join takes along
)

// Origin is where a content comes from when the region cannot give it.
type Origin interface {
	// Open returns the content from off on, and the length of the whole, -1 where
	// the origin does not say. A no of the origin's own is a *RefusedError.
	Open(ctx context.Context, off int64) (body io.ReadCloser, length int64, err error)
}

// RefusedError is the origin's own no, as it came.
type RefusedError struct {
	Status int
	Header http.Header
	Body   []byte
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("the origin answers with status %d", e.Status)
}

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
	p      *Peer
	ctx    context.Context
	cancel context.CancelFunc
	id     pieces.TaskID
	origin api.Origin
	direct *direct // where the region's bytes end
	task   *task   // nil when the region has no part in it
	answer chan answer

	content  *pieces.Content // nil when the stream is direct
	own      bool            // content is pinned by this stream and not by its task
	stored   bool            // content was complete before
	run      *pieces.Reader  // of what is there from off on
	runEnd   int64
	size     int64 // of the content, -1 unknown
	off, end int64 // what is left of the range; end is -1 for an unknown end
	length   int64
	given    bool // a byte has been
	lazy     bool // it is a bounded range, for which no more need be got
	asked    int  // up to which piece it has asked for pieces
	mixed    bool // of the region, before the origin's

	fromStore, fromOrigin atomic.Int64
}

// answer is a Join's: a content, pinned by the task, or why there is none.
type answer struct {
	content *pieces.Content
	stored  bool // it was complete before
	err     error
}

// errDropped ends a stream of which bytes have been given that may be wrong, or of
// another version than the origin's now.
var errDropped = errors.New("the content was dropped while it was read: ask again")

// Open returns the n bytes from off on, fewer where the content ends, all with n
// negative; with 0 it tells the size. It returns when the first bytes are in
// hand and verified, or the origin is the one to give them, which it is found to
// be within seconds. The error is a *RefusedError, a *RangeError, ctx's cause,
// or what the origin failed with. The stream ends with ctx.
func (p *Peer) Open(ctx context.Context, req Request, off, n int64) (*Stream, error) {
	if off == 0 && n < 0 {
		if s := p.claim(ctx, req); s != nil {
			return s, nil
		}
	}
	return p.open(ctx, req, off, n)
}

func (p *Peer) open(ctx context.Context, req Request, off, n int64) (*Stream, error) {
	s := &Stream{p: p, id: req.ID, origin: req.Origin, off: off, answer: make(chan answer, 1)}
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
		cause, err = s.await(time.Now().Add(firstTimeout))
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
	return s.bound(s.direct.size, n)
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

// join becomes one of the task's streams and asks the supernode for it. The
// cause is why the origin must be asked instead.
func (s *Stream) join() (cause string, err error) {
	p := s.p
	p.mu.Lock()
	session := p.session
	if session == nil || headerSize(s.origin.Header) > maxHeader {
		p.mu.Unlock()
		return causeNoSession, nil
	}
	t := p.tasks[s.id]
	if t == nil {
		t = &task{id: s.id, over: make(chan struct{}), streams: make(map[*Stream]struct{}), lazy: s.lazy}
		p.tasks[s.id] = t
	}
	t.streams[s] = struct{}{}
	s.task = t
	p.joinLocked(session, s)
	p.mu.Unlock()
	timeout := time.NewTimer(joinTimeout)
	defer timeout.Stop()
	var got answer
	select {
	case got = <-s.answer:
	case <-timeout.C:
		return causeNoAnswer, nil
	case <-s.ctx.Done():
		return "", context.Cause(s.ctx)
	}
	switch _, no := errors.AsType[*RefusedError](got.err); {
	case no:
		return "", got.err
	case got.err == nil:
		s.content, s.stored = got.content, got.stored
		return "", nil
	case errors.Is(got.err, errNoSession):
		return causeNoSession, nil
	case errors.Is(got.err, errNotNow):
		if c := p.log.Check(zap.InfoLevel, "the region does not serve the task"); c != nil {
			c.Write(zap.String("task", string(s.id)), zap.Error(got.err))
		}
		return causeRefused, nil
	}
	return causeStore, nil
}

func headerSize(h map[string][]string) (size int) {
	for k, vs := range h {
		for _, v := range vs {
			size += len(k) + len(v)
		}
	}
	return size
}

// alone serves a complete content from the store without the region, when it is
// public where this caller wants it from. What else it may be the caller's, only
// the supernode knows: any server can say that it has a digest.
func (s *Stream) alone(n int64) (done bool, err error) {
	c, err := s.p.store.Get(s.id)
	if err != nil {
		return false, nil //nolint:nilerr // not in the store: the origin has it
	}
	m := c.Meta()
	if !m.Complete || !slices.Contains(m.Public, publicName(s.origin)) {
		c.Release()
		return false, nil
	}
	s.content, s.own, s.stored = c, true, true
	if err := s.bound(m.Layout.Length, n); err != nil || s.off == s.end {
		return true, err
	}
	cause, err := s.await(time.Now().Add(firstTimeout))
	return cause == "", err
}

// await returns when the piece at s.off is there, or why the origin is to be
// asked for it. The limit, if there is one, is for a first piece.
func (s *Stream) await(limit time.Time) (cause string, err error) {
	l := s.content.Layout()
	first, end := l.Span(s.off, s.end-s.off)
	if s.content.Has(first) {
		return "", nil
	}
	if s.own {
		return causeStore, nil
	}
	switch {
	case s.lazy:
		end = min(end, first+lazyRun)
	case s.end < s.size:
		end = min(end, first+wantRun)
	default:
		end = first + 1
	}
	if !limit.IsZero() || s.lazy {
		s.p.ask(s, first, end)
	}
	for began := time.Now(); ; {
		ctx, cancel := context.WithTimeout(s.ctx, wantAfter)
		err := s.content.Wait(ctx, first)
		cancel()
		switch {
		case err == nil:
			return "", nil
		case s.ctx.Err() != nil:
			return "", context.Cause(s.ctx)
		case !errors.Is(err, context.DeadlineExceeded):
			return causeStore, nil
		case !limit.IsZero() && time.Now().After(limit):
			return causeLate, nil
		}
		if cause := s.p.stalled(s.task, l, first, began); cause != "" {
			return cause, nil
		}
		s.p.ask(s, first, end)
	}
}

// stalled tells why a reader that has waited for a piece since began should wait
// no longer, "" when it should.
func (p *Peer) stalled(t *task, l pieces.Layout, piece int, began time.Time) (cause string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	waited := now.Sub(began)
	since := func(nanos int64) time.Duration { return min(waited, now.Sub(time.Unix(0, nanos))) }
	switch {
	case t.isOver():
		return causeStore
	case p.session == nil && t.coming == 0 && min(waited, now.Sub(p.lost)) >= lostLimit:
		return causeSessionLost
	case since(t.moved.Load()) >= silentLimit:
		return causeSilent
	}
	if t.fetched < l.Offset(piece+1) && now.Sub(t.progress) < silentLimit {
		return "" // it is on its way from the origin: to ask there again would not help
	}
	late := since(t.come.Load()) < waited && waited >= max(lateLimit, lateFactor*p.expected(l.Size(piece)))
	if late || waited >= movingLimit {
		return causeLate
	}
	return ""
}

// fallBack makes the stream one of the origin from s.off on.
func (s *Stream) fallBack(cause string) error {
	if cause == causeStore && s.given && s.id.Content() == "" || s.given && s.isWrong() {
		return errDropped // nobody could tell the mixture of two versions
	}
	s.mixed = s.given
	s.p.metrics.fallbacks.WithLabelValues(cause).Inc()
	if c := s.p.log.Check(zap.WarnLevel, "asking the origin"); c != nil && cause != causeNoSession {
		c.Write(zap.String("task", string(s.id)), zap.String("cause", cause), zap.Int64("offset", s.off))
	}
	s.leave()
	return nil
}

// isWrong tells whether the region has taken back what it gave.
func (s *Stream) isWrong() bool { return s.task != nil && s.task.wrong.Load() }

// leave ends the stream's part in the region's download, which goes on.
func (s *Stream) leave() {
	if s.own {
		s.content.Release()
	}
	s.content, s.own, s.run = nil, false, nil
	if s.task == nil {
		return
	}
	t := s.task
	s.p.mu.Lock()
	delete(t.streams, s)
	if delete(t.wants, s); t.lazy {
		s.p.wantLocked(t)
		if len(t.streams) == 0 && s.p.cfg.Background < 0 {
			if t.later != nil {
				t.later.Stop()
			}
			t.later = time.AfterFunc(restAfter, func() { s.p.rest(t) })
		}
	}
	idle := s.p.settleLocked(t)
	s.p.mu.Unlock()
	release(idle)
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
	cause, err := s.await(time.Time{})
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
	if s.lazy && s.asked < end && i+lazyRun/2 >= s.asked { // before its reader waits for them
		s.p.ask(s, i, min(end, i+lazyRun))
	}
	s.runEnd = min(l.Offset(i), s.end)
	s.run = s.content.NewReader(s.ctx, s.off, s.runEnd-s.off)
	return nil
}

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
		if err == nil {
			continue
		}
		if s.readable() {
			return total, err // then it is w that fails
		}
		s.p.log.Error("store cannot be read", zap.String("task", string(s.id)), zap.Error(err))
		if err := s.fallBack(causeStore); err != nil {
			return total, err
		}
	}
	return total, nil
}

// readable tells whether the store gives the byte at s.off.
func (s *Stream) readable() bool {
	_, err := s.content.CopyRange(io.Discard, s.off, 1)
	return err == nil
}
