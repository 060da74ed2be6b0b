package dfget

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/supernode/api"
)

const (
	aheadAtOnce = 8   // contents of one Ahead under way
	maxAhead    = 256 // contents that wait to be asked for
	aheadLife   = 10 * time.Second
	aheadWait   = time.Second // an Open waits for what is under way, before it joins itself
)

// Likely is a content that is likely to be asked for next.
type Likely struct {
	Request
	Size int64 // what somebody, such as a manifest, says that it is, in bytes
}

// early is a stream opened before it is asked for.
type early struct {
	req  Likely
	key  [sha256.Size]byte
	done chan struct{} // closed when s is set or has failed
	s    *Stream

	// Guarded by Peer.mu.
	begun, taken bool
}

// errEarly is the answer of the origin for what nobody has asked for.
var errEarly = errors.New("nobody has asked for it yet")

// nowhere is no origin.
type nowhere struct{}

func (nowhere) Open(context.Context, int64) (io.ReadCloser, int64, error) { return nil, 0, errEarly }

// key is the same for requests of the same content on behalf of the same caller.
func (r *Request) key() [sha256.Size]byte {
	o := r.Origin
	return sha256.Sum256(fmt.Appendf(nil, "%q %q %q %q %q", r.ID, o.Registry, o.Repository, o.URL, o.Header))
}

// Ahead opens contents that are likely to be asked for next, by the same caller:
// the next Open of one, within seconds, has it at once. Only the region is asked,
// for what the store does not have.
func (p *Peer) Ahead(reqs []Likely) {
	var wanted []Likely
	for _, r := range reqs {
		if c, err := p.store.Get(r.ID); err == nil {
			c.Release()
			continue
		}
		wanted = append(wanted, r)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session == nil || len(wanted) == 0 || len(p.early)+len(wanted) > maxAhead {
		return
	}
	var es []*early
	for _, r := range wanted {
		e := &early{req: r, key: r.key(), done: make(chan struct{})}
		e.req.Direct = nowhere{}
		if p.early[e.key] == nil {
			p.early[e.key] = e
			es = append(es, e)
		}
	}
	life := p.session.life
	p.group.Go(func() error {
		p.openAhead(life, es)
		return nil
	})
}

// openAhead opens some, and closes those that nobody has taken in time.
func (p *Peer) openAhead(ctx context.Context, es []*early) {
	var g errgroup.Group
	g.SetLimit(aheadAtOnce)
	for _, e := range es {
		g.Go(func() error {
			defer close(e.done)
			p.mu.Lock()
			e.begun = p.early[e.key] == e // else it is asked for already
			p.mu.Unlock()
			if e.begun {
				e.s, _ = p.open(ctx, time.Now(), e.req.Request, e.req.Size, 0, api.MaxInline) // no more, whatever it was said to have; who asks for it learns what is wrong
			}
			return nil
		})
	}
	_ = g.Wait()
	over := time.NewTimer(aheadLife)
	defer over.Stop()
	select {
	case <-over.C:
	case <-ctx.Done():
	}
	for _, e := range es {
		p.mu.Lock()
		if p.early[e.key] == e {
			delete(p.early, e.key)
		}
		idle := !e.taken && e.s != nil
		e.taken = true
		p.mu.Unlock()
		if idle {
			_ = e.s.Close()
		}
	}
}

// claim returns what Ahead has opened for req, nil when there is none.
func (p *Peer) claim(ctx context.Context, req Request) *Stream {
	p.mu.Lock()
	if len(p.early) == 0 {
		p.mu.Unlock()
		return nil
	}
	key := req.key()
	e := p.early[key]
	if e != nil && !e.begun {
		delete(p.early, key)
		e = nil
	}
	p.mu.Unlock()
	if e == nil {
		return nil
	}
	late := time.NewTimer(aheadWait)
	defer late.Stop()
	select {
	case <-e.done:
	case <-late.C:
		return nil
	case <-ctx.Done():
		return nil
	}
	p.mu.Lock()
	mine := !e.taken && e.s != nil && e.s.end == e.s.size
	e.taken = e.taken || mine
	if p.early[key] == e {
		delete(p.early, key)
	}
	p.mu.Unlock()
	if !mine {
		return nil
	}
	e.s.direct.from = req.Direct
	context.AfterFunc(ctx, e.s.cancel)
	return e.s
}
