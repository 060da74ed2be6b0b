package supernode

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/singleflight"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
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
	ctx      context.Context // of all fetches
	store    *pieces.Store
	root     *os.Root
	quota    int64
	keepFree int64        // bytes of the file system
	spooling atomic.Int64 // bytes of contents whose length nobody tells
	told     follower
	metrics  *metrics
	log      *zap.Logger
	now      func() time.Time
	slots    chan struct{}
	wg       sync.WaitGroup // of the fetches

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

// bring returns a content for the caller of src, which may be still on its way:
// a fetch is begun when there is neither a whole content nor a fetch. A lazy
// caller will ask for what it wants by the lease's fetch, where that is sparse.
func (o *origin) bring(ctx context.Context, id pieces.TaskID, src source, j api.Join) (*lease, error) {
	for {
		l := &lease{src: src, right: right{until: o.now().Add(registryproxy.ProofLife)}, drops: o.drops.Load()}
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
			l.fetch = o.begin(id, src, j)
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
		if !mine || id.Content() != "" { // who asked first has its proof as long as that lasts
			if err := l.admit(ctx, src); err != nil {
				return l.or(err)
			}
		}
		if !mine {
			l.fetch.spare(src)
		}
		l.fetch.use(src, j.Lazy)
		return l, nil
	}
}

// vouch makes sure that the origin of src has itself given the bytes of c: any
// server can say that it has a digest, and that the caller may read it. One that
// has not is asked for all of them once, and they are compared.
func (o *origin) vouch(ctx context.Context, c *pieces.Content, src source) error {
	if gave(src, c) {
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
func (o *origin) begin(id pieces.TaskID, src source, j api.Join) *fetch {
	o.mu.Lock()
	defer o.mu.Unlock()
	if f := o.running[id]; f != nil || o.ctx.Err() != nil {
		return f
	}
	f := &fetch{id: id, from: src.from(), key: src.key(), ready: make(chan struct{}), whole: make(chan struct{}), done: make(chan struct{})}
	if j.Lazy {
		f.demand, f.small = newDemand(src), 0 < j.Size && j.Size <= pieces.MinPieceSize
	}
	f.broken, f.fail = context.WithCancelCause(context.Background())
	o.running[id] = f
	o.wg.Go(func() { o.run(f, src) })
	return f
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

// count notes that a content has come whole.
func (o *origin) count(id pieces.TaskID, length int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, known := o.counted[id]; !known {
		o.counted[id] = struct{}{}
		o.metrics.uniqueBytes.Add(float64(length - o.inherited[id]))
	}
}
