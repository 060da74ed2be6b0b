package dfget

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"damselfly.dev/httprange"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const (
	minPatience = 2 * time.Second  // without a byte, at least
	maxPatience = 10 * time.Second // and at most
	defaultBusy = 200 * time.Millisecond
	maxBusy     = 5 * time.Second

	// assignedPerLane bounds the transfers assigned and not ended, a multiple of
	// the lanes: those under way, those about to end, and those that lag.
	assignedPerLane = 4
)

var (
	errCancelled = errors.New("the supernode has cancelled it")
	errSilent    = errors.New("no byte in time")
)

// transfer is one Assign until its last piece has come or it has failed.
type transfer struct {
	id           uint64
	task         *task
	content      *pieces.Content
	first, count int
	parent       string // base URL
	source       string // for the metrics
	ticket       string
	session      *session
	ctx          context.Context
	cancel       context.CancelCauseFunc
	left         atomic.Int64 // bytes that have not come
	told         bool         // that it ends soon

	// Guarded by Peer.mu: when a reader was seen to wait for it, and left then.
	seen     time.Time
	leftThen int64
}

// failure is why a transfer ended early.
type failure struct {
	why   api.Failure
	retry time.Duration // when busy
	err   error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// assigned begins a transfer. The lanes are the supernode's to count; what it
// assigns beyond all measure is Busy.
func (p *Peer) assigned(s *session, a api.Assign) {
	tr := &transfer{
		id: a.Transfer, first: a.First, count: a.Count, parent: s.base, source: sourceSupernode, session: s,
	}
	if a.Parent != "" {
		tr.parent, tr.source = p.scheme+a.Parent, sourcePeer
	}
	p.mu.Lock()
	t := s.nums[a.Task]
	if t == nil || a.First < 0 || a.Count < 1 || a.First > t.content.Layout().Count()-a.Count {
		s.failedLocked(a.Transfer, api.Local, 0)
		p.mu.Unlock()
		return
	}
	if p.coming >= assignedPerLane*p.cfg.DownLanes {
		s.failedLocked(a.Transfer, api.Busy, defaultBusy)
		p.mu.Unlock()
		return
	}
	tr.task, tr.content, tr.ticket = t, t.content, t.ticket
	tr.left.Store(t.content.Layout().Offset(a.First+a.Count) - t.content.Layout().Offset(a.First))
	tr.ctx, tr.cancel = context.WithCancelCause(s.life)
	p.coming++
	t.coming++
	s.running[a.Transfer] = tr
	p.mu.Unlock()
	if a.Data != nil {
		p.ended(tr, p.inline(tr, a.Data))
		return
	}
	p.group.Go(func() error {
		p.run(tr)
		return nil
	})
}

func (s *session) failedLocked(id uint64, why api.Failure, retry time.Duration) {
	s.send(message{size: 32, add: func(u *api.Up) {
		u.Failed = append(u.Failed, api.Failed{Transfer: id, Why: why, RetryMS: retry.Milliseconds()})
	}})
}

// inline takes the pieces of a transfer that came with it.
func (p *Peer) inline(tr *transfer, data []byte) error {
	r := bytes.NewReader(data)
	p.came(tr, len(data))
	for i := tr.first; i < tr.first+tr.count; i++ {
		if err := p.receive(tr, i, r); err != nil {
			return err
		}
	}
	return nil
}

// run makes a transfer: it asks the parent for each run of pieces that are not there.
func (p *Peer) run(tr *transfer) {
	var err error
	for i, end := tr.first, tr.first+tr.count; i < end && err == nil; {
		n := 0
		for i+n < end && !tr.content.Has(i+n) {
			n++
		}
		if n == 0 {
			p.done(tr, i)
			tr.left.Add(-tr.content.Layout().Size(i))
			i++
			continue
		}
		err = p.fetch(tr, i, n)
		i += n
	}
	p.ended(tr, err)
}

// fetch gets n pieces from the parent by one request.
func (p *Peer) fetch(tr *transfer, first, n int) error {
	l := tr.content.Layout()
	off, end := l.Offset(first), l.Offset(first+n)
	ctx, cancel := context.WithCancelCause(tr.ctx)
	defer cancel(nil)
	dial := ctx
	if tr.source == sourcePeer {
		dial = context.WithValue(ctx, nearKey{}, tr.session.near)
	}
	req, err := http.NewRequestWithContext(dial, http.MethodGet, tr.parent+api.ContentPath(tr.task.id), nil)
	if err != nil {
		return &failure{why: api.Gone, err: err}
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, end-1))
	req.Header.Set(api.TicketHeader, tr.ticket)
	patience := p.patience(l.PieceSize)
	timer := time.AfterFunc(patience, func() { cancel(errSilent) })
	defer timer.Stop()
	began := time.Now()
	resp, err := p.transfers.RoundTrip(req)
	if err != nil {
		return &failure{why: api.Gone, err: causeOf(ctx, err)}
	}
	defer func() { _ = resp.Body.Close() }()
	if err := accepted(resp, off, end); err != nil {
		return err
	}
	p.answered(max(time.Since(began)-held(resp), 0))
	lead := min(tr.left.Load()/2, max(p.lead(), maxWait))
	body := &watched{r: resp.Body, got: func(n int) {
		timer.Reset(patience)
		p.came(tr, n)
		if tr.left.Load() <= lead && !tr.told {
			p.soon(tr)
		}
	}}
	for i := first; i < first+n; i++ {
		if err := p.receive(tr, i, body); err != nil {
			if f, ok := errors.AsType[*failure](err); ok && f.why == api.Gone {
				f.err = causeOf(ctx, f.err)
			}
			return err
		}
	}
	p.measured(end-off, time.Since(began))
	return nil
}

// accepted tells whether a parent's answer is the range [off, end).
func accepted(resp *http.Response, off, end int64) error {
	if resp.StatusCode == http.StatusPartialContent {
		part, _, ok := httprange.ParseContent(resp.Header.Get("Content-Range"))
		if !ok || part.Offset != off || resp.ContentLength != end-off {
			return &failure{why: api.Gone, err: errors.New("it answers with another range")}
		}
		return nil
	}
	_, _ = io.CopyN(io.Discard, resp.Body, 4<<10) // so that the connection can be used again
	err := fmt.Errorf("it answers with status %d", resp.StatusCode)
	if resp.StatusCode != http.StatusServiceUnavailable {
		return &failure{why: api.Gone, err: err}
	}
	retry := defaultBusy
	if ms, err := strconv.ParseInt(resp.Header.Get(api.RetryHeader), 10, 64); err == nil && ms >= 0 {
		retry = time.Duration(min(ms, maxBusy.Milliseconds())) * time.Millisecond
	}
	return &failure{why: api.Busy, retry: retry, err: err}
}

// held returns for how long the parent waited for a piece before it answered.
func held(resp *http.Response) time.Duration {
	ms, err := strconv.ParseInt(resp.Header.Get(api.HeldHeader), 10, 64)
	if err != nil {
		return 0
	}
	return time.Duration(min(max(ms, 0), maxHeld.Milliseconds())) * time.Millisecond
}

// watched tells of every byte that is read.
type watched struct {
	r   io.Reader
	got func(n int)
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if n > 0 {
		w.got(n)
	}
	return n, err
}

// receive takes piece i from r, all of its bytes even if it is there already. Its
// errors are failures.
func (p *Peer) receive(tr *transfer, i int, r io.Reader) error {
	part := &io.LimitedReader{R: r, N: tr.content.Layout().Size(i)}
	err := tr.content.Receive(i, part)
	if err == nil {
		_, err = io.Copy(io.Discard, part)
	}
	if err == nil && part.N > 0 {
		err = io.ErrUnexpectedEOF
	}
	switch _, wrong := errors.AsType[*pieces.DigestError](err); {
	case err == nil:
		p.done(tr, i)
		return nil
	case wrong:
		p.metrics.verifyFailures.Inc()
		return &failure{why: api.Corrupt, err: err}
	case part.N == 0 || isLocal(err):
		return &failure{why: api.Local, err: err}
	}
	return &failure{why: api.Gone, err: err}
}

// isLocal tells whether the store does not take the piece, for no fault of the disk.
func isLocal(err error) bool {
	for _, e := range []error{pieces.ErrGone, pieces.ErrClosed, pieces.ErrNoDigest} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// causeOf returns why ctx ended when it has, else err.
func causeOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// came counts bytes that have just come.
func (p *Peer) came(tr *transfer, n int) {
	tr.left.Add(-int64(n))
	tr.task.touch(time.Now())
	p.metrics.received.WithLabelValues(tr.source).Add(float64(n))
	if tr.source == sourcePeer {
		tr.task.fromPeers.Add(int64(n))
	} else {
		tr.task.fromSupernode.Add(int64(n))
	}
}

// done reports a piece, and has the content completed when it was the last one.
func (p *Peer) done(tr *transfer, i int) {
	now := time.Now()
	tr.task.touch(now)
	have := tr.content.Have()
	p.mu.Lock()
	defer p.mu.Unlock()
	tr.session.send(message{size: 24, waits: tr.told, add: func(u *api.Up) {
		u.Done = append(u.Done, api.Done{Transfer: tr.id, Piece: i, AgoMS: time.Since(now).Milliseconds()})
	}})
	if have.Full() && !tr.task.complete {
		p.checkLocked(tr.session.life, tr.task)
	}
}

// ended takes a transfer off the tables and, where it failed, says so.
func (p *Peer) ended(tr *transfer, err error) {
	cancelled := context.Cause(tr.ctx) == errCancelled //nolint:errorlint // it is that very one or none
	tr.cancel(nil)
	result, broken := resultOK, false
	fail, failed := errors.AsType[*failure](err)
	if failed {
		result = resultOf(fail.why)
		broken = fail.why == api.Local && !isLocal(err) && !p.narrowed(tr.task, tr.content, err)
	}
	if failed && cancelled {
		result = resultCancelled
	}
	p.metrics.transfers.WithLabelValues(result).Inc()
	p.mu.Lock()
	delete(tr.session.running, tr.id)
	p.coming--
	if failed && !cancelled {
		tr.session.failedLocked(tr.id, fail.why, fail.retry)
	}
	if broken { // the disk takes no more: the host is one that only has
		tr.session.send(leaveMessage(tr.task.id))
		tr.session.send(holdMessage(p.store, tr.task.id))
	}
	tr.task.coming--
	idle := p.settleLocked(tr.task)
	p.mu.Unlock()
	release(idle)
	if broken {
		p.giveUp(tr.task)
	}
	if !failed || cancelled || fail.why == api.Busy || tr.session.life.Err() != nil {
		return
	}
	level := zap.WarnLevel
	if fail.why == api.Gone { // hosts come and go
		level = zap.InfoLevel
	}
	p.log.Log(level, "transfer failed", zap.String("task", string(tr.task.id)), zap.String("parent", tr.parent), zap.Error(err))
}

// measured learns how fast a transfer is.
func (p *Peer) measured(n int64, took time.Duration) {
	if n < pieces.MinPieceSize || took <= 0 {
		return
	}
	now := int64(float64(n) / took.Seconds())
	if old := p.rate.Load(); old > 0 {
		now = (3*old + now) / 4
	}
	p.rate.Store(max(now, 1))
}

// answered learns how long a parent takes to answer.
func (p *Peer) answered(took time.Duration) {
	if old := time.Duration(p.answers.Load()); old > 0 {
		took = (7*old + took) / 8
	}
	p.answers.Store(int64(took))
}

// lead returns how many bytes before its end a transfer is told to end soon. The
// word goes to the supernode, its next assignment comes back, and then a request
// goes to a parent: twice the way there and back, through the same queues.
func (p *Peer) lead() int64 {
	return int64(2 * time.Duration(p.answers.Load()).Seconds() * float64(p.rate.Load()))
}

// soon tells that a transfer ends soon: its pieces may be asked for from now on.
func (p *Peer) soon(tr *transfer) {
	tr.told = true
	p.report(tr.session, message{size: 16, add: func(u *api.Up) { u.Soon = append(u.Soon, tr.id) }})
}

// expected returns how long n bytes take one transfer, 0 when not known.
func (p *Peer) expected(n int64) time.Duration {
	rate := p.rate.Load()
	if rate == 0 {
		return 0
	}
	return time.Duration(float64(n) / float64(rate) * float64(time.Second))
}

// patience returns how long a parent may send nothing.
func (p *Peer) patience(n int64) time.Duration {
	return min(minPatience+p.expected(n), maxPatience)
}
