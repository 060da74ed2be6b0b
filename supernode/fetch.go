package supernode

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"damselfly.dev/pieces"
)

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
	small   bool        // it was said to be, and is asked for whole before it is measured; run's alone
	length  int64       // of a sparse one
	version string      // of what it reads

	mu     sync.Mutex // guards spares
	spares []source   // others who may read it
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
	o.metrics.fetches.Inc()
	defer o.metrics.fetches.Dec()
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

// fetch brings what the store lacks of a content, and verifies it as a whole.
func (o *origin) fetch(f *fetch, src source) error {
	if f.small {
		if err := o.fetchWhole(f, src); !errors.Is(err, errLarge) {
			return err
		}
	}
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
	f.small = false
	return o.fetchWhole(f, src)
}

// fetchWhole is fetch for all of a content, in order; errLarge when it was to be
// small and is not, of which nothing has been taken then.
func (o *origin) fetchWhole(f *fetch, src source) error {
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
		if f.small {
			c.Release()
			return nil, errLarge // or in part there, which is as rare
		}
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
	if f.small && (in.length < 0 || in.length > pieces.MinPieceSize) {
		return nil, errLarge
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
	m := pieces.Meta{ID: f.id, Layout: pieces.NewLayout(in.length), MediaType: first.mediaType, Origins: origins(in.src)}
	in.src.opened(&first)
	return o.store.Create(m)
}

// resume opens the origin where c has its first gap.
func (o *origin) resume(c *pieces.Content, in *stream) error {
	if !gave(in.src, c) {
		return errChanged // until the whole is verified, one origin's bytes are not another's
	}
	l := c.Layout()
	gap := 0
	for gap < l.Count() && c.Has(gap) {
		gap++
	}
	if gap == l.Count() { // all but the proof is there
		in.off, in.length = l.Length, l.Length
		_, err := in.src.allowed(o.ctx, c)
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
	in.src.opened(b)
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
				if errors.Is(err, pieces.ErrMissing) && !sparse { // it has rotted: not a byte of it is in sum
					d, err = o.take(c, i, in, sum)
				}
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
