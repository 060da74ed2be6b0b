package supernode

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"golang.org/x/sync/singleflight"

	"damselfly.dev/pieces"
)

const (
	// maxFetches bounds the fetches that run at one moment, and with them memory:
	// each holds one piece.
	maxFetches = 64
	// maxSpares bounds whose credentials a fetch may go on with.
	maxSpares = 8
	spoolDir  = "spool"
	always    = -1 // for drop
)

// follower is told what becomes of the contents that origin brings.
type follower interface {
	// published says that piece i has a digest that may be given to anyone.
	published(id pieces.TaskID, i int, d pieces.Digest)
	// dropped says that what there is of a content is not to be used any more.
	dropped(id pieces.TaskID, reason string)
}

// origin brings contents from where they come from into the store, each once
// however many ask.
type origin struct {
	ctx     context.Context // of all fetches
	store   *pieces.Store
	root    *os.Root
	quota   int64
	told    follower
	metrics *metrics
	log     *zap.Logger
	slots   chan struct{}
	wg      sync.WaitGroup // of the fetches

	// drops counts the contents that have been dropped, before they are: who got
	// a content and then finds another count may hold one that is dropped.
	drops    atomic.Int64
	dropping sync.Mutex // held while a content is dropped

	vouching singleflight.Group

	mu        sync.Mutex // guards what follows
	running   map[pieces.TaskID]*fetch
	inherited map[pieces.TaskID]int64 // bytes of it that were there at the start
	counted   map[pieces.TaskID]struct{}
}

// fetch is one content on its way from its origin.
type fetch struct {
	id      pieces.TaskID
	from    string        // the origin
	key     proof         // of who asked first
	ready   chan struct{} // closed when the content is in the store, or broken has ended
	whole   chan struct{} // closed when all of the content is there and right
	done    chan struct{} // closed when origin has forgotten the fetch
	broken  context.Context
	fail    context.CancelCauseFunc // ends broken
	fetched atomic.Int64            // how far it has come, in bytes

	sparse  atomic.Bool // it brings what is asked for, as demand says
	demand  *demand     // nil for one that brings all from the beginning
	length  int64       // of a sparse one
	version string      // of what it reads

	mu     sync.Mutex // guards spares
	spares []source   // others who may read it
}

// lease is a content in use by one who may read it.
type lease struct {
	*pieces.Content        // pinned, to be released by the holder
	fetch           *fetch // that fills it; nil when it is whole
	public          bool   // anyone may read it
	drops           int64  // origin.drops, when it was got
}

// whole tells whether the last piece may be given away.
func (l *lease) whole() bool {
	if l.fetch == nil {
		return true
	}
	select {
	case <-l.fetch.whole:
		return true
	default:
		return false
	}
}

// sparse tells whether also the last piece is given away before the whole is there.
func (l *lease) sparse() bool { return l.fetch != nil && l.fetch.sparse.Load() }

// wait waits until the content is whole, at most until ctx ends.
func (l *lease) wait(ctx context.Context) error {
	if l.whole() {
		return nil
	}
	select {
	case <-l.fetch.whole:
		return nil
	case <-l.fetch.broken.Done():
		return l.fetch.err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// verify looks at what the store has of the content, so that no look at a piece
// of it takes long from then on.
func (l *lease) verify() {
	if !l.InDoubt() {
		return
	}
	have := l.Have()
	for i := range have.All() {
		l.Has(i)
	}
}

// bring returns a content for the caller of src, which may be still on its way:
// a fetch is begun when there is neither a whole content nor a fetch. A lazy
// caller will ask for what it wants by the lease's fetch, where that is sparse.
func (o *origin) bring(ctx context.Context, id pieces.TaskID, src source, lazy bool) (*lease, error) {
	for {
		l := &lease{drops: o.drops.Load()}
		l.fetch = o.find(id)
		if l.fetch == nil {
			if l.Content = o.cached(id); l.Content != nil {
				err := o.vouch(ctx, l.Content, src)
				if err == nil {
					err = l.admit(ctx, src)
				}
				if !errors.Is(err, errChanged) {
					return l.or(err)
				}
				l.Release()
				o.drop(id, err.Error(), l.drops)
				continue
			}
			l.fetch = o.begin(id, src, lazy)
		}
		if l.fetch == nil {
			return nil, errStopping
		}
		if l.fetch.from != src.from() {
			if l.fetch.sparse.Load() {
				return nil, errOthers // it may last for as long as anybody reads
			}
			select {
			case <-l.fetch.done:
				continue
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		select {
		case <-l.fetch.ready:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		mine := l.fetch.key == src.key()
		if err := l.fetch.err(); err != nil {
			if _, no := refused(err); no && !mine || errors.Is(err, errIdle) {
				<-l.fetch.done
				continue // that was the answer to somebody else, or there is none
			}
			return nil, err
		}
		var err error
		l.drops = o.drops.Load()
		if l.Content, err = o.store.Get(id); err != nil {
			return nil, err
		}
		if mine {
			l.public = slices.Contains(l.Meta().Public, src.name())
			l.fetch.use(src, lazy)
			return l, nil
		}
		if err := l.admit(ctx, src); err != nil {
			return l.or(err)
		}
		l.fetch.spare(src)
		l.fetch.use(src, lazy)
		return l, nil
	}
}

// vouch makes sure that the origin of src has itself given the bytes of c: any
// server can say that it has a digest, and that the caller may read it. One that
// has not is asked for all of them once, and they are compared.
func (o *origin) vouch(ctx context.Context, c *pieces.Content, src source) error {
	if slices.Contains(c.Meta().Origins, src.from()) {
		return nil
	}
	key := src.key()
	done := o.vouching.DoChan(fmt.Sprintf("%s %x", c.ID(), key[:]), func() (any, error) {
		again := o.cached(c.ID()) // pinned for as long as this takes, whoever waits
		if again == nil {
			return nil, errOthers
		}
		defer again.Release()
		return nil, o.compare(again, src)
	})
	select {
	case r := <-done:
		return r.Err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// compare reads all that src has and notes its origin when it is what c is.
func (o *origin) compare(c *pieces.Content, src source) error {
	d := c.ID().Content()
	if d == "" {
		return errOthers
	}
	select {
	case o.slots <- struct{}{}:
		defer func() { <-o.slots }()
	case <-o.ctx.Done():
		return context.Cause(o.ctx)
	}
	in := &stream{origin: o, ctx: o.ctx, fetch: &fetch{}, src: src, length: -1, tries: triesBefore}
	defer in.close()
	if _, err := in.open(); err != nil {
		return err
	}
	if in.length >= 0 && in.length != c.Layout().Length {
		return errOthers
	}
	sum := d.Verifier()
	n, err := io.Copy(sum, io.LimitReader(in, c.Layout().Length+1))
	if err != nil {
		return err
	}
	if n != c.Layout().Length || !sum.Verified() {
		return errOthers
	}
	return c.AddOrigin(src.from())
}

// admit finds out whether the caller of src may read the content.
func (l *lease) admit(ctx context.Context, src source) (err error) {
	if l.public, err = src.allowed(ctx, l.Content); err == nil && l.public {
		_ = l.AddPublic(src.name()) // missed only when the origin is away
	}
	return err
}

// or is l, or the error and no l.
func (l *lease) or(err error) (*lease, error) {
	if err != nil {
		l.Release()
		return nil, err
	}
	return l, nil
}

// find returns the fetch of a task that is under way, or nil.
func (o *origin) find(id pieces.TaskID) *fetch {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.running[id]
}

// cached returns a content that is whole, pinned, or nil.
func (o *origin) cached(id pieces.TaskID) *pieces.Content {
	c, err := o.store.Get(id)
	if err != nil {
		return nil
	}
	for i := 0; c.Complete(); i++ {
		if i == c.Layout().Count() {
			return c
		}
		c.Has(i) // one that has rotted makes c incomplete
	}
	c.Release()
	return nil
}

// begin returns a new fetch, or one that somebody else has just begun; nil when
// there are to be no more.
func (o *origin) begin(id pieces.TaskID, src source, lazy bool) *fetch {
	o.mu.Lock()
	defer o.mu.Unlock()
	if f := o.running[id]; f != nil || o.ctx.Err() != nil {
		return f
	}
	f := &fetch{id: id, from: src.from(), key: src.key(), ready: make(chan struct{}), whole: make(chan struct{}), done: make(chan struct{})}
	if lazy {
		f.demand = newDemand(src)
	}
	f.broken, f.fail = context.WithCancelCause(context.Background())
	o.running[id] = f
	o.wg.Go(func() { o.run(f, src) })
	return f
}

// use notes one who may read it and uses it, to go on with, and to bring all for
// unless it is lazy.
func (f *fetch) use(src source, lazy bool) {
	if !f.sparse.Load() {
		return
	}
	f.demand.renew(src)
	if !lazy {
		f.demand.wantAll()
	}
}

// idles tells whether there is nothing to bring until somebody asks for it.
func (f *fetch) idles() bool { return f.sparse.Load() && f.demand.idles() }

// err returns why the fetch has failed, nil as long as it has not.
func (f *fetch) err() error { return context.Cause(f.broken) }

// spare notes one more source that f may go on with.
func (f *fetch) spare(src source) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.spares) < maxSpares {
		f.spares = append(f.spares, src)
	}
}

// other returns a spare source, or nil.
func (f *fetch) other() source {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.spares) == 0 {
		return nil
	}
	src := f.spares[0]
	f.spares = f.spares[1:]
	return src
}

func (o *origin) run(f *fetch, src source) {
	err := o.fetch(f, src)
	if err != nil {
		f.fail(err)
		if _, no := refused(err); !no && o.ctx.Err() == nil && !errors.Is(err, errIdle) {
			o.log.Warn("fetch from the origin failed", zap.String("task", string(f.id)), zap.Error(err))
		}
		if errors.Is(err, errWrong) || errors.Is(err, errChanged) {
			o.drop(f.id, err.Error(), always)
		}
	}
	o.mu.Lock()
	delete(o.running, f.id)
	o.mu.Unlock()
	close(f.done)
	select {
	case <-f.ready:
	default:
		close(f.ready)
	}
}

// drop takes a content out of use, unless something has been dropped since drops
// was seen: then it may be another content by now.
func (o *origin) drop(id pieces.TaskID, reason string, seen int64) {
	o.dropping.Lock()
	defer o.dropping.Unlock()
	if seen != always && o.drops.Load() != seen {
		return
	}
	o.drops.Add(1)
	if err := o.store.Remove(id); err != nil && !errors.Is(err, pieces.ErrNotFound) {
		o.log.Error("content cannot be removed", zap.String("task", string(id)), zap.Error(err))
	}
	o.told.dropped(id, reason)
}

// fetch brings what the store lacks of a content, and verifies it as a whole.
func (o *origin) fetch(f *fetch, src source) error {
	o.metrics.fetches.Inc()
	defer o.metrics.fetches.Dec()
	if f.demand != nil {
		c, err := o.scatter(f, src)
		if err != nil {
			return err
		}
		if c != nil {
			defer c.Release()
			close(f.ready)
			if err := o.fetchSparse(f, c); err != nil {
				return err
			}
			o.finish(f, c)
			return nil
		}
	}
	select {
	case o.slots <- struct{}{}:
		defer func() { <-o.slots }()
	case <-o.ctx.Done():
		return context.Cause(o.ctx)
	}
	in := &stream{origin: o, ctx: o.ctx, fetch: f, src: src, length: -1, tries: triesBefore}
	defer in.close()
	c, err := o.prepare(f, in)
	if err != nil {
		return err
	}
	defer c.Release()
	in.tries = triesAmid
	close(f.ready)
	if err := o.fill(f, c, in); err != nil {
		return err
	}
	o.finish(f, c)
	return nil
}

// finish makes a content that is there and right known as whole.
func (o *origin) finish(f *fetch, c *pieces.Content) {
	o.count(f.id, c.Layout().Length)
	close(f.whole)
	if last := c.Layout().Count() - 1; last >= 0 {
		o.told.published(f.id, last, c.Digest(last))
	}
	if c.Complete() {
		return
	}
	if err := c.SetComplete(); err != nil {
		o.log.Error("content is not kept", zap.String("task", string(f.id)), zap.Error(err))
	}
}

// prepare opens the origin and returns the content that is to be filled: that
// which an earlier fetch has left, or a new one.
func (o *origin) prepare(f *fetch, in *stream) (*pieces.Content, error) {
	if c, err := o.store.Get(f.id); err == nil {
		err := o.resume(c, in)
		if err == nil {
			return c, nil
		}
		c.Release()
		if !errors.Is(err, errChanged) {
			return nil, err
		}
		o.drop(f.id, err.Error(), always)
		in.restart()
	}
	b, err := in.open()
	if err != nil {
		return nil, err
	}
	first := *b
	if in.length < 0 {
		if err := in.spool(); err != nil {
			return nil, err
		}
	}
	if in.length > pieces.MaxLength {
		return nil, fmt.Errorf("content of %d bytes is too long", in.length)
	}
	m := pieces.Meta{ID: f.id, Layout: pieces.NewLayout(in.length), MediaType: first.mediaType, Origins: []string{f.from}}
	if in.src.opened(&first) {
		m.Public = []string{in.src.name()}
	}
	return o.store.Create(m)
}

// resume opens the origin where c has its first gap.
func (o *origin) resume(c *pieces.Content, in *stream) error {
	if !slices.Contains(c.Meta().Origins, in.src.from()) {
		return errChanged // until the whole is verified, one origin's bytes are not another's
	}
	l := c.Layout()
	gap := 0
	for gap < l.Count() && c.Has(gap) {
		gap++
	}
	if gap == l.Count() { // all but the proof is there
		in.off, in.length = l.Length, l.Length
		public, err := in.src.allowed(o.ctx, c)
		if err == nil && public {
			_ = c.AddPublic(in.src.name()) // missed only when the origin is away
		}
		return err
	}
	in.off, in.length = l.Offset(gap), l.Length
	b, err := in.open()
	if err != nil {
		return err
	}
	if b.length >= 0 && b.length != l.Length || !in.src.continues(b) {
		return errChanged
	}
	in.length = l.Length
	if in.src.opened(b) {
		_ = c.AddPublic(in.src.name()) // missed only when the origin is away
	}
	return nil
}

// fill brings the pieces that c lacks and compares the whole with the task's id.
// Every piece but the last is published as it comes, of a sparse fetch each.
func (o *origin) fill(f *fetch, c *pieces.Content, in *stream) error {
	l := c.Layout()
	if d := f.id.Content(); d != "" && l.Count() == 1 && !c.Has(0) {
		return o.fillAtOnce(d, c, in)
	}
	var sum hash.Hash
	if d := f.id.Content(); d != "" {
		sum = d.Algorithm().Hash()
	}
	for i := range l.Count() {
		var err error
		var d pieces.Digest
		sparse, there := f.sparse.Load(), c.Has(i)
		if sparse {
			var mine bool
			if mine, err = f.demand.claim(i); err != nil {
				return err
			}
			there = !mine
		}
		if there {
			if d = c.Digest(i); sum != nil {
				_, err = c.CopyRange(sum, l.Offset(i), l.Size(i))
			}
		} else {
			d, err = o.take(c, i, in, sum)
		}
		switch {
		case err != nil:
			return err
		case sparse && !there:
			o.arrived(f, i, l.Size(i), d)
			continue
		case sparse:
			continue
		}
		f.fetched.Store(l.Offset(i + 1))
		if i < l.Count()-1 {
			o.told.published(f.id, i, d)
		}
	}
	if sum != nil && digest.NewDigest(f.id.Content().Algorithm(), sum) != f.id.Content() {
		o.metrics.verifyFailures.Inc()
		return errWrong
	}
	return nil
}

// fillAtOnce brings a content of one piece, which has the digest d.
func (o *origin) fillAtOnce(d digest.Digest, c *pieces.Content, in *stream) error {
	b := make([]byte, c.Layout().Length)
	in.seek(0, 0)
	if _, err := io.ReadFull(in, b); err != nil {
		return err
	}
	if d.Algorithm().FromBytes(b) != d {
		o.metrics.verifyFailures.Inc()
		return errWrong
	}
	return c.Put(b)
}

// take brings piece i.
func (o *origin) take(c *pieces.Content, i int, in *stream, sum hash.Hash) (pieces.Digest, error) {
	l, end := c.Layout(), int64(0)
	if in.fetch.sparse.Load() {
		if next, ranges := in.fetch.demand.gap(i+1, l.Count()); ranges {
			end = l.Offset(next)
		}
	}
	if in.off != l.Offset(i) || in.off >= in.end {
		in.seek(l.Offset(i), end)
	}
	var r io.Reader = in
	if sum != nil {
		r = io.TeeReader(in, sum)
	}
	d, err := c.Make(i, r)
	if errors.Is(err, errWhole) {
		in.fetch.demand.refused(i, 0)
		in.seek(l.Offset(i), 0)
		d, err = c.Make(i, r)
	}
	return d, err
}

// count notes that a content has come whole.
func (o *origin) count(id pieces.TaskID, length int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, known := o.counted[id]; !known {
		o.counted[id] = struct{}{}
		o.metrics.uniqueBytes.Add(float64(length - o.inherited[id]))
	}
}
