package supernode

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/pieces"
)

const (
	spansAtOnce = 8       // requests for ranges of one content under way
	spanBytes   = 4 << 20 // of one request, or one piece where that is more
	maxStale    = 1 << 12 // pieces in a queue, beyond as many as are wanted, that are wanted no longer
)

// errIdle ends a sparse fetch that nobody wants anything of any more.
var errIdle = errors.New("nobody wants it any more")

// demand is what is wanted of a sparse fetch: pieces by readers, and all of them
// once some host joins whole. Each piece is claimed once.
type demand struct {
	mu      sync.Mutex
	changed sync.Cond
	wanted  map[int]struct{}
	queue   []int      // the wanted in the order they were asked for, and some that are no longer
	claimed pieces.Set // on their way or there
	there   pieces.Set
	whole   bool  // all are wanted
	inOrder bool  // the origin gives no ranges
	err     error // why there is no more to claim
	src     source
}

func newDemand(src source) *demand {
	d := &demand{src: src, wanted: map[int]struct{}{}}
	d.changed.L = &d.mu
	return d
}

// begin says which pieces are there.
func (d *demand) begin(have pieces.Set) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.claimed, d.there = have.Clone(), have
}

// want asks for pieces, in this order.
func (d *demand) want(pieces ...int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, i := range pieces {
		if _, ok := d.wanted[i]; !ok && (d.claimed.Cap() == 0 || !d.claimed.Has(i)) {
			d.wanted[i] = struct{}{}
			d.queue = append(d.queue, i)
		}
	}
	d.changed.Broadcast()
}

// unwant takes back pieces that have not been claimed.
func (d *demand) unwant(pieces ...int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, i := range pieces {
		delete(d.wanted, i)
	}
	if len(d.queue) > 2*len(d.wanted)+maxStale {
		d.tidy()
	}
}

// tidy takes out of the queue what is no longer wanted, or stands there twice.
func (d *demand) tidy() {
	kept := make(map[int]struct{}, len(d.wanted))
	d.queue = slices.DeleteFunc(d.queue, func(i int) bool {
		_, wanted := d.wanted[i]
		_, twice := kept[i]
		kept[i] = struct{}{}
		return !wanted || twice
	})
}

// wantAll asks for all pieces, in order.
func (d *demand) wantAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.whole = true
	d.changed.Broadcast()
}

// end says that there is no more to claim. One of which all is wanted goes on
// when it is only idle.
func (d *demand) end(why error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil && (!d.whole || !errors.Is(why, errIdle)) {
		d.err = why
	}
	d.changed.Broadcast()
}

// idles tells whether all there is to do is what readers ask for.
func (d *demand) idles() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.whole
}

// renew notes whose credentials the next request goes with.
func (d *demand) renew(src source) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.src = src
}

func (d *demand) source() source {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.src
}

// next claims the run that was asked for first, with what is wanted right after
// it; it waits for one.
func (d *demand) next(l pieces.Layout) (first, n int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		switch {
		case d.err != nil:
			return 0, 0, d.err
		case d.inOrder:
			return 0, 0, io.EOF
		}
		for len(d.queue) > 0 {
			i := d.queue[0]
			d.queue = d.queue[1:]
			if _, ok := d.wanted[i]; ok && !d.claimed.Has(i) {
				for n == 0 || d.adjacent(l, i, n) {
					delete(d.wanted, i+n)
					d.claimed.Add(i + n)
					n++
				}
				return i, n, nil
			}
		}
		d.changed.Wait()
	}
}

// adjacent tells whether the piece after the n from i on goes with them.
func (d *demand) adjacent(l pieces.Layout, i, n int) bool {
	_, ok := d.wanted[i+n]
	return ok && i+n < l.Count() && !d.claimed.Has(i+n) && l.Offset(i+n+1)-l.Offset(i) <= spanBytes
}

// claim takes piece i for who brings all in order; false when it is there, for
// which it waits if it is on its way.
func (d *demand) claim(i int) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.err == nil && !d.there.Has(i) {
		if d.claimed.Add(i) {
			delete(d.wanted, i)
			return true, nil
		}
		d.changed.Wait()
	}
	if d.there.Has(i) {
		return false, nil
	}
	return false, d.err
}

// gap returns where the pieces from first on end that nobody has claimed, and
// false where the origin gives no ranges.
func (d *demand) gap(first, count int) (end int, ranges bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for first < count && !d.claimed.Has(first) {
		first++
	}
	return first, !d.inOrder
}

// got notes a piece that has come.
func (d *demand) got(i int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.there.Add(i)
	d.changed.Broadcast()
}

// lost notes a piece that is no longer there, and may be wanted again.
func (d *demand) lost(i int, wanted bool) {
	d.mu.Lock()
	d.there.Remove(i)
	d.claimed.Remove(i)
	d.mu.Unlock()
	if wanted {
		d.want(i)
	}
}

// refused takes back the claim of a run, because the origin gives no ranges: from
// then on all is brought in order.
func (d *demand) refused(first, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := first; i < first+n; i++ {
		if !d.there.Has(i) {
			d.claimed.Remove(i)
		}
	}
	d.whole, d.inOrder = true, true
	d.changed.Broadcast()
}

// untilWhole waits until all is wanted, or all is there.
func (d *demand) untilWhole() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.err == nil && !d.whole && !d.there.Full() {
		d.changed.Wait()
	}
	return d.err
}

// scatter makes f a fetch of what is asked for of a content, which it returns; nil when the origin
// does not say enough for that, or the content is too small to be worth it.
func (o *origin) scatter(f *fetch, src source) (*pieces.Content, error) {
	b, err := src.measure(o.ctx)
	switch {
	case err != nil, b.length <= pieces.MinPieceSize, b.length > pieces.MaxLength:
		return nil, nil //nolint:nilerr // it is asked for all, and says what is wrong
	case f.id.Content() == "" && b.version == "":
		return nil, nil // nobody could tell a mixture of two versions
	}
	c, err := o.store.Get(f.id)
	if err == nil && (!gave(src, c) || c.Layout().Length != b.length || !src.continues(b)) {
		c.Release()
		o.drop(f.id, errChanged.Error(), always)
		c = nil
	}
	src.opened(b)
	m := pieces.Meta{ID: f.id, Layout: pieces.NewRangedLayout(b.length), Origins: origins(src)}
	if err != nil || c == nil {
		if c, err = o.store.Create(m); err != nil {
			return nil, err
		}
	}
	have := pieces.NewSet(c.Layout().Count())
	for i := range c.Layout().Count() {
		if c.Has(i) {
			have.Add(i)
		}
	}
	f.length, f.version = b.length, b.version
	f.demand.begin(have)
	f.sparse.Store(true)
	return c, nil
}

// fetchSparse brings the pieces of c that are asked for, and once all are wanted
// the others in order. It returns nil when the whole is there and right.
func (o *origin) fetchSparse(f *fetch, c *pieces.Content) error {
	group, ctx := errgroup.WithContext(o.ctx)
	defer context.AfterFunc(ctx, func() { f.demand.end(context.Cause(ctx)) })()
	for range spansAtOnce {
		group.Go(func() error { return o.fetchSpans(ctx, f, c) })
	}
	group.Go(func() error {
		if err := f.demand.untilWhole(); err != nil {
			return err
		}
		in := o.spans(ctx, f)
		defer in.close()
		if err := o.fill(f, c, in); err != nil {
			return err
		}
		f.demand.end(io.EOF)
		return nil
	})
	return group.Wait()
}

// spans returns a stream for ranges of a sparse fetch.
func (o *origin) spans(ctx context.Context, f *fetch) *stream {
	return &stream{
		origin: o, ctx: ctx, fetch: f, src: f.demand.source(), length: f.length, version: f.version, began: true, tries: triesAmid,
	}
}

// fetchSpans brings runs that are asked for, one after the other.
func (o *origin) fetchSpans(ctx context.Context, f *fetch, c *pieces.Content) error {
	for {
		first, n, err := f.demand.next(c.Layout())
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = o.fetchSpan(ctx, f, c, first, n)
		}
		if errors.Is(err, errWhole) {
			f.demand.refused(first, n)
		} else if err != nil {
			return err
		}
	}
}

// fetchSpan brings a run of pieces by one request.
func (o *origin) fetchSpan(ctx context.Context, f *fetch, c *pieces.Content, first, n int) error {
	select {
	case o.slots <- struct{}{}:
		defer func() { <-o.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	l := c.Layout()
	in := o.spans(ctx, f)
	defer in.close()
	in.seek(l.Offset(first), l.Offset(first+n))
	for i := first; i < first+n; i++ {
		d, err := c.Make(i, in)
		if err != nil {
			return err
		}
		o.arrived(f, i, l.Size(i), d)
	}
	return nil
}

// arrived notes a piece of a sparse fetch that has come.
func (o *origin) arrived(f *fetch, i int, size int64, d pieces.Digest) {
	o.mu.Lock()
	if _, known := o.counted[f.id]; !known {
		o.inherited[f.id] += size // it is not counted again with the whole
		o.metrics.uniqueBytes.Add(float64(size))
	}
	o.mu.Unlock()
	f.demand.got(i)
	o.told.published(f.id, i, d)
}
