package dfdaemon

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"

	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
)

// registryBlob is a blob at its registry, read with one caller's credentials.
type registryBlob struct {
	registry *registryproxy.Client
	heir     *heir
	route    registryproxy.Route
	who      registryproxy.Caller
	end      int64 // of what is read, 0 for all
}

// Open asks the registry for the blob from off on, or who has taken this agent's place.
func (b registryBlob) Open(ctx context.Context, off int64) (io.ReadCloser, int64, error) {
	if body, size, err := b.heir.open(ctx, b, off); err == nil {
		return body, size, nil
	}
	var body *registryproxy.BlobBody
	var err error
	if b.end > 0 {
		body, err = b.registry.BlobRange(ctx, b.route.Repo, b.route.Reference, registryproxy.ByteRange{Offset: off, Length: b.end - off}, b.who)
	} else {
		body, err = b.registry.Blob(ctx, b.route.Repo, b.route.Reference, off, b.who)
	}
	if no, ok := errors.AsType[*registryproxy.Refusal](err); ok && no.Final() {
		return nil, 0, &dfget.RefusedError{Status: no.Status, Header: no.Header, Body: no.Body}
	}
	if err != nil {
		return nil, 0, err
	}
	return body, body.Length, nil
}

// refusal is the registry's or the origin's own no, nil where err is none.
func refusal(err error) *registryproxy.Refusal {
	if no, ok := errors.AsType[*dfget.RefusedError](err); ok {
		return &registryproxy.Refusal{Status: no.Status, Header: no.Header, Body: no.Body}
	}
	no, _ := errors.AsType[*registryproxy.Refusal](err)
	return no
}

// blob streams a blob, or ranges of it, from the swarm.
func (m *mirror) blob(w *reply, r *http.Request, route registryproxy.Route) error {
	who := registryproxy.Caller{Authorization: r.Header.Get("Authorization")}
	request := dfget.Request{
		ID:     pieces.TaskID(route.Reference), // the route is checked
		Origin: origin(route, who.Authorization),
		Direct: registryBlob{registry: m.registry, heir: m.heir, route: route, who: who},
	}
	etag := strconv.Quote(route.Reference)
	d := delivery{
		peer: m.peer, request: request, asked: r.Header, etag: etag,
		header: http.Header{"Content-Type": {octets}, digestHeader: {route.Reference}, "Etag": {etag}},
	}
	return d.serve(r.Context(), w)
}
