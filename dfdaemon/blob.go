package dfdaemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"strconv"
	"strings"

	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
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

// blob streams a blob, or a range of it, from the swarm.
func (m *mirror) blob(w *reply, r *http.Request, route registryproxy.Route) error {
	id, err := pieces.ParseTaskID(route.Reference)
	if err != nil {
		return &registryproxy.Error{
			Status: http.StatusNotFound, Code: registryproxy.CodeUnsupported, Message: "no blobs of such digests here: ask the registry",
		}
	}
	who := registryproxy.Caller{Authorization: r.Header.Get("Authorization")}
	request := dfget.Request{
		ID:     id,
		Origin: api.Origin{Registry: route.Repo.Registry, Repository: route.Repo.Name},
		Direct: registryBlob{m.registry, route, who},
	}
	if who.Authorization != "" {
		request.Origin.Header = map[string][]string{"Authorization": {who.Authorization}}
	}
	etag := `"` + route.Reference + `"`
	d := delivery{
		peer: m.peer, request: request, wanted: r.Header.Get("Range"),
		header: http.Header{"Content-Type": {octets}, digestHeader: {route.Reference}, "Etag": {etag}},
	}
	if v := r.Header.Get("If-Range"); v != "" && v != etag {
		d.wanted = ""
	}
	return d.serve(r.Context(), w)
}

// delivery is a content of the swarm on its way to one reader.
type delivery struct {
	peer    *dfget.Peer
	request dfget.Request
	wanted  string      // the reader's Range header
	header  http.Header // of the answer, beside its length and range
}

// serve answers w. No header is out before the first bytes are in hand.
func (d delivery) serve(ctx context.Context, w http.ResponseWriter) error {
	s, span, partial, err := d.open(ctx)
	if outside, ok := errors.AsType[*dfget.RangeError](err); ok {
		registryproxy.WriteRangeNotSatisfiable(w, outside.Size)
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	h, status := w.Header(), http.StatusOK
	maps.Copy(h, d.header)
	if s.Length() >= 0 {
		h.Set("Accept-Ranges", "bytes")
		h.Set("Content-Length", strconv.FormatInt(s.Length(), 10))
	}
	if partial {
		status = http.StatusPartialContent
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", span.Offset, span.Offset+s.Length()-1, s.Size()))
	}
	w.WriteHeader(status)
	_, err = s.WriteTo(w)
	return err
}

// open opens the range that is wanted, of which only the offset is sure to be
// right, or the whole.
func (d delivery) open(ctx context.Context) (s *dfget.Stream, span registryproxy.ByteRange, partial bool, err error) {
	span, partial, err = registryproxy.ParseRange(d.wanted, math.MaxInt64)
	if err != nil || strings.Contains(d.wanted, "=-") { // nothing, or the last bytes: which, depends on the size
		if s, err = d.peer.Open(ctx, d.request, 0, 0); err != nil {
			return nil, span, false, err
		}
		size := s.Size()
		_ = s.Close()
		if span, partial, err = registryproxy.ParseRange(d.wanted, max(size, 0)); err != nil {
			return nil, span, false, &dfget.RangeError{Size: size}
		}
	}
	n := span.Length
	if !partial || n == math.MaxInt64-span.Offset {
		n = -1
	}
	s, err = d.peer.Open(ctx, d.request, span.Offset, n)
	if err != nil || !partial || s.Size() >= 0 {
		return s, span, partial, err
	}
	_ = s.Close() // of what has no known length nobody can say which part this is
	s, err = d.peer.Open(ctx, d.request, 0, -1)
	return s, registryproxy.ByteRange{}, false, err
}
