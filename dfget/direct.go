package dfget

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"time"
)

const (
	directTries    = 10 // without a byte in between
	directRefusals = 2  // of them, by an origin that has said yes before
	directBackOff  = 200 * time.Millisecond
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

// direct reads a content from its origin and goes on where it breaks off. It is
// one goroutine's.
type direct struct {
	from  Origin
	body  io.ReadCloser // nil while nothing is open
	size  int64         // by the origin, -1 when it does not say
	tries int           // since the last byte
	noes  int           // of them
}

func (d *direct) open(ctx context.Context, off int64) (err error) {
	d.body, d.size, err = d.from.Open(ctx, off)
	return err
}

func (d *direct) close() {
	if d.body != nil {
		_ = d.body.Close()
		d.body = nil
	}
}

// read reads at off, of a content of that size, -1 when it is not known. It
// returns io.EOF only there, with n 0.
func (d *direct) read(ctx context.Context, b []byte, off, size int64) (n int, err error) {
	for {
		if d.body == nil {
			if err = d.reopen(ctx, off, size); err != nil {
				return 0, err
			}
		}
		n, err = d.body.Read(b)
		if n > 0 {
			d.tries, d.noes = 0, 0
			return n, nil
		}
		if err == nil {
			continue
		}
		if errors.Is(err, io.EOF) && size < 0 {
			return 0, io.EOF
		}
		d.close()
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if d.tries++; d.tries > directTries {
			return 0, fmt.Errorf("the origin breaks off at %d: %w", off, err)
		}
	}
}

// reopen asks the origin for the rest, a few times if need be.
func (d *direct) reopen(ctx context.Context, off, size int64) error {
	for {
		if d.tries > 0 {
			pause := min(directBackOff<<(d.tries-1), maxBackOff)
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(pause/2 + rand.N(pause/2)): //nolint:gosec // no secret: hosts should not come all at once
			}
		}
		err := d.open(ctx, off)
		if err == nil && size >= 0 && d.size >= 0 && d.size != size {
			d.close()
			return fmt.Errorf("the origin's content has %d bytes now, not %d", d.size, size)
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
		if _, no := errors.AsType[*RefusedError](err); no {
			if d.noes++; d.noes > directRefusals {
				return err
			}
		}
		if d.tries++; d.tries > directTries {
			return fmt.Errorf("the origin does not give the rest from %d on: %w", off, err)
		}
	}
}
