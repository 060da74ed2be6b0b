package supernode

import (
	"context"

	"damselfly.dev/pieces"
)

// lease is a content in use by one who may read it.
type lease struct {
	*pieces.Content        // pinned, to be released by the holder
	fetch           *fetch // that fills it; nil when it is whole
	src             source
	right
	open  bool  // public, or had for a caller who did not say who it is
	drops int64 // origin.drops, when it was got
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

// admit finds out whether the caller of src may read the content.
func (l *lease) admit(ctx context.Context, src source) (err error) {
	l.right, err = src.allowed(ctx, l.Content)
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
