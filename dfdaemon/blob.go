package dfdaemon

import (
	"context"
	"errors"
	"io"
	"maps"
	"math"
	"net/http"
	"strconv"
	"strings"

	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
)

// registryBlob is a blob at its registry, read with one caller's credentials.
type registryBlob struct {
	registry *registryproxy.Client
	route    registryproxy.Route
	who      registryproxy.Caller
}

// Open asks the registry for the blob from off on.
func (b registryBlob) Open(ctx context.Context, off int64) (io.ReadCloser, int64, error) {
	body, err := b.registry.Blob(ctx, b.route.Repo, b.route.Reference, off, b.who)
	if no, ok := errors.AsType[*registryproxy.Refusal](err); ok && no.Final() {
		return nil, 0, &dfget.RefusedError{Status: no.Status, Header: no.Header, Body: no.Body}
	}
	if err != nil {
		return nil, 0, err
	}
	return body, body.Length, nil
}

// blob streams a blob, or ranges of it, from the swarm.
func (m *mirror) blob(w *reply, r *http.Request, route registryproxy.Route) error {
	who := registryproxy.Caller{Authorization: r.Header.Get("Authorization")}
	request := dfget.Request{
		ID:     pieces.TaskID(route.Reference), // the route is checked
		Origin: origin(route, who.Authorization),
		Direct: registryBlob{m.registry, route, who},
	}
	etag := strconv.Quote(route.Reference)
	d := delivery{
		peer: m.peer, request: request, asked: r.Header, etag: etag,
		header: http.Header{"Content-Type": {octets}, digestHeader: {route.Reference}, "Etag": {etag}},
	}
	return d.serve(r.Context(), w)
}

// delivery is a content of the swarm on its way to one reader.
type delivery struct {
	peer    *dfget.Peer
	request dfget.Request
	asked   http.Header // the reader's: its ranges and conditions
	etag    string      // of the content, "" for none
	header  http.Header // of the answer, beside its length and ranges
	head    bool        // the header is all that is asked for
}

// serve answers w. No header is out before the first bytes are in hand.
func (d delivery) serve(ctx context.Context, w http.ResponseWriter) error {
	s, wanted, err := d.open(ctx)
	if outside, ok := errors.AsType[*dfget.RangeError](err); ok {
		registryproxy.WriteRangeNotSatisfiable(w, outside.Size)
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	maps.Copy(w.Header(), d.header)
	switch {
	case registryproxy.NotModified(d.asked, d.etag):
		w.WriteHeader(http.StatusNotModified)
		return nil
	case s.Size() < 0:
		w.WriteHeader(http.StatusOK)
		_, err = s.WriteTo(w)
		return err
	}
	wanted.WriteHeader(w)
	if d.head {
		return nil
	}
	opened := true // the first range is
	return wanted.Send(w, func(r registryproxy.ByteRange) error {
		if !opened {
			next, err := d.peer.Open(ctx, d.request, r.Offset, r.Length)
			if err != nil {
				return err
			}
			_ = s.Close()
			s = next
		}
		opened = false
		_, err := s.WriteTo(w)
		return err
	})
}

// open returns what is wanted, and a stream of its first range. Nobody can say
// which part is which of what has no known length: that is given whole.
func (d delivery) open(ctx context.Context) (s *dfget.Stream, wanted registryproxy.Selection, err error) {
	if d.head {
		if s, err = d.peer.Open(ctx, d.request, 0, 0); err == nil {
			wanted.Size = s.Size()
		}
		return s, wanted, err
	}
	header := registryproxy.WantedRange(d.asked, d.etag)
	span, partial, err := registryproxy.ParseRange(header, math.MaxInt64)
	if err != nil || strings.Contains(header, "=-") || strings.Contains(header, ",") {
		return d.measure(ctx)
	}
	n := span.Length
	if !partial || n == math.MaxInt64-span.Offset {
		n = -1
	}
	s, err = d.peer.Open(ctx, d.request, span.Offset, n)
	if _, no := errors.AsType[*dfget.RefusedError](err); err != nil && span.Offset > 0 && !no {
		return d.measure(ctx) // what lies outside fails in as many ways as there are registries
	}
	switch {
	case err != nil || !partial || s.Size() == 0:
	case s.Size() < 0:
		_ = s.Close()
		s, err = d.peer.Open(ctx, d.request, 0, -1)
	default:
		wanted.Ranges = []registryproxy.ByteRange{{Offset: span.Offset, Length: s.Length()}}
	}
	if err == nil {
		wanted.Size = s.Size()
	}
	return s, wanted, err
}

// measure is open for what depends on the size.
func (d delivery) measure(ctx context.Context) (s *dfget.Stream, wanted registryproxy.Selection, err error) {
	if s, err = d.peer.Open(ctx, d.request, 0, 0); err != nil {
		return nil, wanted, err
	}
	defer func(probe *dfget.Stream) { _ = probe.Close() }(s)
	size := s.Size()
	if wanted, err = registryproxy.Select(d.asked, d.etag, max(size, 0)); err != nil {
		return nil, wanted, &dfget.RangeError{Size: size}
	}
	first, n := wanted.Spans()[0], int64(-1)
	if len(wanted.Ranges) > 0 {
		n = first.Length
	}
	s, err = d.peer.Open(ctx, d.request, first.Offset, n)
	return s, wanted, err
}
