package supernode

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// firstByte is how long a blob's first bytes are waited for.
const firstByte = 20 * time.Second

// serveV2 is the pull-through mirror: path is what follows /v2.
func (n *Supernode) serveV2(w http.ResponseWriter, r *http.Request, path string) {
	h := w.Header()
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	ns := r.URL.Query().Get("ns")
	h.Set("OCI-Namespace", ns)
	route, err := registryproxy.ParseRoute(r.Method, path, ns, n.cfg.Registries.Default)
	if err != nil {
		n.fail(w, err)
		return
	}
	who := registryproxy.Caller{Authorization: r.Header.Get("Authorization")}
	h.Set("OCI-Namespace", cmp.Or(ns, route.Repo.Registry))
	if route.Kind != registryproxy.KindPing && route.Kind != registryproxy.KindWrite && !n.guard.Sealed(r) && !n.client.IsPublic(route.Repo.Registry, who) {
		n.fail(w, api.ErrClear)
		return
	}
	switch route.Kind {
	case registryproxy.KindPing:
		h.Set("Content-Type", "application/json")
		h.Set("Content-Length", "2")
		_, _ = io.WriteString(w, "{}") // whoever went away needs no answer
	case registryproxy.KindWrite:
		n.fail(w, &registryproxy.Error{
			Status: http.StatusMethodNotAllowed, Code: registryproxy.CodeUnsupported, Message: "the mirror is for reading; push to the registry",
		})
	case registryproxy.KindBlob:
		n.serveBlob(w, r, route, who)
	case registryproxy.KindManifest:
		n.serveManifest(w, r, route, who)
	default:
		n.serveList(w, r, route, who)
	}
}

// fail answers with the registry's own words where it was the registry that
// said no, and with an error marked as Damselfly's where it was not.
func (n *Supernode) fail(w http.ResponseWriter, err error) {
	if refusal, ok := errors.AsType[*registryproxy.Refusal](err); ok {
		w.Header().Del("Docker-Distribution-Api-Version")
		refusal.Relay(w)
		return
	}
	if e, ok := errors.AsType[*registryproxy.Error](err); ok {
		registryproxy.WriteError(w, e)
		return
	}
	code := api.CodeUnavailable
	if errors.Is(err, api.ErrClear) {
		code = api.CodeClear
	}
	w.Header().Set(api.ErrorHeader, code)
	registryproxy.WriteError(w, &registryproxy.Error{Status: http.StatusBadGateway, Code: "UNAVAILABLE", Message: err.Error()})
}

// forward passes on a read that is not cached.
func (n *Supernode) forward(w http.ResponseWriter, r *http.Request, route registryproxy.Route, who registryproxy.Caller) {
	resp, err := n.client.Forward(r.Context(), r.Method, route, r.URL.Query(), r.Header, who)
	if err != nil {
		n.fail(w, err)
		return
	}
	defer func() { _ = resp.Body.Close() }()
	relayHeader(w, r, resp.Header)
	w.WriteHeader(resp.StatusCode)
	out := newSteady(w)
	defer out.done()
	var body io.Reader = resp.Body
	if route.Kind == registryproxy.KindBlob && r.Method == http.MethodGet && resp.StatusCode == http.StatusOK {
		body = registryproxy.Verified(body, digest.Digest(route.Reference).Verifier(), errWrong)
	}
	if _, err := io.Copy(out, body); err != nil {
		panic(http.ErrAbortHandler) // so that what is cut does not look whole
	}
}

// relayHeader writes what an engine may need of a registry's header.
func relayHeader(w http.ResponseWriter, r *http.Request, from http.Header) {
	for _, k := range []string{"Content-Type", "Content-Length", "Oci-Filters-Applied", "Etag", "Last-Modified"} {
		if v := from.Values(k); len(v) > 0 {
			w.Header()[k] = v
		}
	}
	if next := registryproxy.NextPage(r, from.Values("Link")); next != "" {
		w.Header().Set("Link", next)
	}
}

// source is the content that a route names, for its caller.
func (n *Supernode) source(route registryproxy.Route, who registryproxy.Caller) *registrySource {
	return &registrySource{registries: n.registries, kind: route.Kind, repo: route.Repo, digest: route.Reference, who: who}
}

// serveBlob gives a blob from the cache, bringing it there on the way.
func (n *Supernode) serveBlob(w http.ResponseWriter, r *http.Request, route registryproxy.Route, who registryproxy.Caller) {
	id := pieces.TaskID(route.Reference) // the route is checked
	if r.Method == http.MethodHead {
		n.headBlob(w, r, id, route, who)
		return
	}
	ctx, cancel := context.WithTimeoutCause(r.Context(), firstByte, errStalled)
	defer cancel()
	l, err := n.origin.bring(ctx, id, n.source(route, who), api.Join{})
	if err != nil {
		n.notCached(w, r, route, who, err)
		return
	}
	defer l.Release()
	wanted, done := n.begin(w, r, route.Reference, l.Layout().Length)
	if done {
		return
	}
	if err := l.await(ctx, wanted.Spans()[0]); err != nil {
		n.notCached(w, r, route, who, err)
		return
	}
	n.send(w, r, wanted, func(out *steady, span registryproxy.ByteRange) error {
		whole, to := span.Length == l.Layout().Length, io.Writer(out)
		var sum digest.Verifier
		if whole && !l.whole() { // what is sent now may not be there when the rest comes from elsewhere
			sum = id.Content().Verifier()
			to = io.MultiWriter(sum, out)
		}
		sent, err := l.stream(r.Context(), to, span)
		n.metrics.sentBytes.Add(float64(sent))
		if err == nil || r.Context().Err() != nil || errors.Is(err, errWrong) {
			return err
		}
		if whole && sum == nil {
			sum = id.Content().Verifier()
			if _, err := l.CopyRange(sum, 0, sent); sent > 0 && err != nil {
				sum = nil // what was given was right, the rest is the registry's word
			}
		}
		rest := registryproxy.ByteRange{Offset: span.Offset + sent, Length: span.Length - sent}
		return n.continueBlob(r.Context(), out, route, rest, sum, who)
	})
}

// begin names the blob in the answer, and returns what r wants of it, or has
// answered where that is nothing.
func (n *Supernode) begin(w http.ResponseWriter, r *http.Request, digest string, size int64) (s registryproxy.Selection, done bool) {
	if unchanged(w, r, digest) {
		return s, true
	}
	s, err := registryproxy.Select(r.Header, w.Header().Get("Etag"), size)
	if err != nil {
		registryproxy.WriteRangeNotSatisfiable(w, size)
	}
	return s, err != nil
}

// send answers with what is wanted of a blob, each range by span.
func (n *Supernode) send(w http.ResponseWriter, r *http.Request, wanted registryproxy.Selection, span func(*steady, registryproxy.ByteRange) error) {
	wanted.WriteHeader(w)
	out := newSteady(w)
	defer out.done()
	if err := wanted.Send(out, func(s registryproxy.ByteRange) error { return span(out, s) }); err != nil {
		n.log.Debug("blob not sent to its end", zap.String("path", r.URL.Path), zap.Error(err))
		panic(http.ErrAbortHandler)
	}
}

// unchanged names the content in the answer, and tells whether r's caller has it
// already, which then is the answer.
func unchanged(w http.ResponseWriter, r *http.Request, digest string) bool {
	etag := strconv.Quote(digest)
	w.Header().Set("Docker-Content-Digest", digest)
	w.Header().Set("Etag", etag)
	if !registryproxy.NotModified(r.Header, etag) {
		return false
	}
	w.WriteHeader(http.StatusNotModified)
	return true
}

// headBlob tells of a blob what the cache knows, else what the registry says.
func (n *Supernode) headBlob(w http.ResponseWriter, r *http.Request, id pieces.TaskID, route registryproxy.Route, who registryproxy.Caller) {
	src := n.source(route, who)
	var size int64
	var err error
	if c := n.origin.cached(id); c != nil {
		size = c.Layout().Length
		_, err = src.allowed(r.Context(), c)
		c.Release()
	} else {
		size, err = n.client.HeadBlob(r.Context(), route.Repo, route.Reference, who)
		if err == nil {
			src.proved()
		}
	}
	if err != nil {
		n.fail(w, err)
		return
	}
	if unchanged(w, r, route.Reference) {
		return
	}
	if size >= 0 {
		registryproxy.Selection{Size: size}.WriteHeader(w)
	}
}

// last returns where the last piece begins, which waits for the whole.
func (l *lease) last() int64 {
	return l.Layout().Offset(max(l.Layout().Count()-1, 0))
}

// await waits until the range's first bytes may be given.
func (l *lease) await(ctx context.Context, span registryproxy.ByteRange) error {
	if l.whole() {
		return nil
	}
	if span.Length == 0 || span.Offset >= l.last() {
		return l.wait(ctx)
	}
	ctx, cancel := l.guard(ctx)
	defer cancel()
	return l.Wait(ctx, l.Layout().At(span.Offset))
}

// guard ends ctx also when the fetch that fills l breaks.
func (l *lease) guard(ctx context.Context) (context.Context, context.CancelFunc) {
	if l.fetch == nil {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(l.fetch.broken, func() { cancel(l.fetch.err()) })
	return ctx, func() { stop(); cancel(nil) }
}

// stream writes a range in order as it comes, the last piece only when all of
// the content is right.
func (l *lease) stream(ctx context.Context, w io.Writer, span registryproxy.ByteRange) (int64, error) {
	if l.whole() { // what turns out not to be there any more does not come by itself
		return l.CopyRange(w, span.Offset, span.Length)
	}
	ctx, cancel := l.guard(ctx)
	defer cancel()
	end := span.Offset + span.Length
	free := span.Length
	if !l.whole() {
		free = min(max(l.last()-span.Offset, 0), free)
	}
	sent, err := l.NewReader(ctx, span.Offset, free).WriteTo(w)
	if err != nil || sent == span.Length {
		return sent, err
	}
	if err := l.wait(ctx); err != nil {
		return sent, err
	}
	more, err := l.NewReader(ctx, span.Offset+sent, end-span.Offset-sent).WriteTo(w)
	return sent + more, err
}

// notCached answers for a blob that the cache cannot give: by the registry's
// no, or straight from the registry when the trouble is ours.
func (n *Supernode) notCached(w http.ResponseWriter, r *http.Request, route registryproxy.Route, who registryproxy.Caller, err error) {
	_, answered := errors.AsType[*registryproxy.Refusal](err)
	_, malformed := errors.AsType[*registryproxy.Error](err)
	_, away := errors.AsType[*registryproxy.UpstreamError](err)
	hopeless := errors.Is(err, errStalled) || errors.Is(err, errWrong) || errors.Is(err, errStopping) || r.Context().Err() != nil
	if answered || malformed || away || hopeless {
		n.fail(w, err)
		return
	}
	n.log.Warn("served past the cache", zap.String("task", route.Reference), zap.Error(err))
	n.direct(w, r, route, who)
}

// direct gives a blob or manifest as the registry has it, past the cache.
func (n *Supernode) direct(w http.ResponseWriter, r *http.Request, route registryproxy.Route, who registryproxy.Caller) {
	if route.Kind == registryproxy.KindManifest {
		n.directManifest(w, r, route, who)
		return
	}
	size, err := n.client.HeadBlob(r.Context(), route.Repo, route.Reference, who)
	if err != nil || size < 0 {
		n.forward(w, r, route, who) // it has the registry's own words
		return
	}
	wanted, done := n.begin(w, r, route.Reference, size)
	if done {
		return
	}
	n.send(w, r, wanted, func(out *steady, span registryproxy.ByteRange) error {
		var sum digest.Verifier
		if span.Length == size {
			sum = digest.Digest(route.Reference).Verifier()
		}
		return n.continueBlob(r.Context(), out, route, span, sum, who)
	})
}

// continueBlob writes a range of a blob straight from the registry. With sum, which has had
// what comes before, it ends the blob: its last bytes are written only if all are right.
func (n *Supernode) continueBlob(
	ctx context.Context, w io.Writer, route registryproxy.Route, span registryproxy.ByteRange, sum digest.Verifier, who registryproxy.Caller,
) error {
	if span.Length == 0 {
		return nil
	}
	b, err := n.client.BlobRange(ctx, route.Repo, route.Reference, span, who)
	if err != nil {
		return err
	}
	defer func() { _ = b.Close() }()
	var in io.Reader = b
	if sum != nil {
		in = registryproxy.Verified(in, sum, errWrong)
	}
	got, err := io.Copy(w, in)
	n.metrics.originBytes.Add(float64(got))
	n.metrics.sentBytes.Add(float64(got))
	if err == nil && got < span.Length {
		err = io.ErrUnexpectedEOF
	}
	return err
}
