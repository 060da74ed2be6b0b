package dfdaemon

import (
	"context"
	"errors"
	"io"
	"maps"
	"math"
	"net/http"
	"strings"
	"time"

	"damselfly.dev/dfget"
	"damselfly.dev/httprange"
	"damselfly.dev/registryproxy"
)

// maxGap is how many bytes between two ranges are read and left out rather than
// have the origin asked for once more.
const maxGap = 256 << 10

// delivery is a content of the swarm on its way to one reader.
type delivery struct {
	peer    *dfget.Peer
	request dfget.Request
	asked   http.Header // the reader's: its ranges and conditions
	etag    string      // of the content, "" for none
	header  http.Header // of the answer, beside its length and ranges
	head    bool        // the header is all that is asked for

	since time.Time     // when the reader began to wait
	s     *dfget.Stream // of what is sent next
	off   int64         // where s is
	end   int64         // of s
	probe *dfget.Stream // where several ranges come from the region: it has all of them brought
}

// serve answers w. No header is out before the first bytes are in hand.
func (d *delivery) serve(ctx context.Context, w http.ResponseWriter) error {
	defer d.close()
	d.since = time.Now()
	wanted, err := d.open(ctx)
	if outside, ok := errors.AsType[*dfget.RangeError](err); ok {
		registryproxy.WriteRangeNotSatisfiable(w, outside.Size)
		return nil
	}
	if err != nil {
		return err
	}
	maps.Copy(w.Header(), d.header)
	switch {
	case registryproxy.NotModified(d.asked, d.etag):
		w.WriteHeader(http.StatusNotModified)
		return nil
	case d.s.Size() < 0:
		w.WriteHeader(http.StatusOK)
		_, err = d.s.WriteTo(w)
		return err
	}
	wanted.WriteHeader(w)
	if d.head {
		return nil
	}
	if len(wanted.Ranges) < 2 {
		_, err := d.s.WriteTo(w)
		return err
	}
	sent := 0
	return wanted.Send(w, func(httprange.Range) error {
		rest := wanted.Ranges[sent:]
		sent++
		return d.send(ctx, w, rest)
	})
}

func (d *delivery) close() {
	for _, s := range []*dfget.Stream{d.s, d.probe} {
		if s != nil {
			_ = s.Close()
		}
	}
}

// open returns what is wanted, and makes d.s a stream of its first range. Nobody
// can say which part is which of what has no known length: that is given whole.
func (d *delivery) open(ctx context.Context) (wanted registryproxy.Selection, err error) {
	if d.head {
		if err = d.stream(ctx, 0, 0); err == nil {
			wanted.Size = d.s.Size()
		}
		return wanted, err
	}
	header := registryproxy.WantedRange(d.asked, d.etag)
	span, partial, err := httprange.Parse(header, math.MaxInt64)
	if err != nil || strings.Contains(header, "=-") || strings.Contains(header, ",") {
		return d.measure(ctx)
	}
	n := span.Length
	if !partial || n == math.MaxInt64-span.Offset {
		n = -1
	}
	err = d.stream(ctx, span.Offset, n)
	if _, no := errors.AsType[*dfget.RefusedError](err); err != nil && span.Offset > 0 && !no {
		return d.measure(ctx) // what lies outside fails in as many ways as there are registries
	}
	switch {
	case err != nil || !partial || d.s.Size() == 0:
	case d.s.Size() < 0:
		err = d.stream(ctx, 0, -1)
	default:
		wanted.Ranges = []httprange.Range{{Offset: span.Offset, Length: d.s.Length()}}
	}
	if err == nil {
		wanted.Size = d.s.Size()
	}
	return wanted, err
}

// measure is open for what depends on the size.
func (d *delivery) measure(ctx context.Context) (wanted registryproxy.Selection, err error) {
	if err = d.stream(ctx, 0, 0); err != nil {
		return wanted, err
	}
	size := d.s.Size()
	if wanted, err = registryproxy.Select(d.asked, d.etag, max(size, 0)); err != nil {
		return wanted, &dfget.RangeError{Size: size}
	}
	switch len(wanted.Ranges) {
	case 0:
		return wanted, d.stream(ctx, 0, -1)
	case 1:
		return wanted, d.stream(ctx, wanted.Ranges[0].Offset, wanted.Ranges[0].Length)
	}
	if d.s.Want(nil) {
		d.probe, d.s = d.s, nil
	}
	return wanted, d.seek(ctx, wanted.Ranges)
}

// stream makes d.s one of n bytes from off on, all with n negative.
func (d *delivery) stream(ctx context.Context, off, n int64) error {
	request := d.request
	if b, ok := request.Direct.(registryBlob); ok && n >= 0 {
		b.end = off + max(n, 1) // where none is wanted, the length is
		request.Direct = b
	}
	s, err := d.peer.OpenSince(ctx, d.since, request, off, n)
	if err != nil {
		return err
	}
	if d.s != nil {
		_ = d.s.Close()
	}
	d.s, d.off, d.end = s, off, off+n
	return nil
}

// seek makes d.s one of the first of several ranges, and, where the origin is asked
// for it, of those that lie close behind.
func (d *delivery) seek(ctx context.Context, ranges []httprange.Range) error {
	first := ranges[0]
	if d.probe == nil {
		return d.stream(ctx, first.Offset, together(ranges)-first.Offset)
	}
	d.probe.Want(ranges)
	return d.stream(ctx, first.Offset, first.Length)
}

// together returns the end of the ranges that lie close behind the first one.
func together(ranges []httprange.Range) int64 {
	end := ranges[0].Offset + ranges[0].Length
	for _, r := range ranges[1:] {
		if r.Offset < end || r.Offset-end > maxGap {
			break
		}
		end = r.Offset + r.Length
	}
	return end
}

// send writes the first of several ranges.
func (d *delivery) send(ctx context.Context, w io.Writer, ranges []httprange.Range) error {
	r := ranges[0]
	if r.Offset < d.off || r.Offset+r.Length > d.end {
		d.since = time.Now()
		if err := d.seek(ctx, ranges); err != nil {
			return err
		}
	}
	if r.Offset == d.off && r.Offset+r.Length == d.end { // by sendfile, where the store has it
		_, err := d.s.WriteTo(w)
		d.off = d.end
		return err
	}
	if _, err := io.CopyN(io.Discard, d.s, r.Offset-d.off); err != nil {
		return err
	}
	n, err := io.CopyN(w, d.s, r.Length)
	d.off = r.Offset + n
	return err
}
