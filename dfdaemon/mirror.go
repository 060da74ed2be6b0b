package dfdaemon

import (
	"errors"
	"io"
	"net/http"
	"slices"

	"github.com/gin-gonic/gin"
	"go.uber.org/zap"

	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

const (
	digestHeader    = "Docker-Content-Digest"
	namespaceHeader = "Oci-Namespace"
	octets          = "application/octet-stream"
)

// mirror is the registry that engines pull through.
type mirror struct {
	peer     *dfget.Peer
	store    *pieces.Store
	relay    *relay
	heir     *heir
	registry *registryproxy.Client
	def      string // the registry of a request that names none
	urls     URLConfig
	ports    []int // at which whole URLs may be asked for
	metrics  *metrics
	log      *zap.Logger
}

// handler returns the mirror's routes.
func (m *mirror) handler() http.Handler {
	e := gin.New()
	e.Any("/v2", m.serve)
	e.Any("/v2/*path", m.serve)
	e.NoRoute(func(c *gin.Context) {
		if m.named(c) {
			return
		}
		registryproxy.WriteError(c.Writer, &registryproxy.Error{
			Status: http.StatusNotFound, Code: registryproxy.CodeUnsupported, Message: "a registry's paths begin with /v2/",
		})
	})
	return e
}

// serve answers one request of an engine.
func (m *mirror) serve(c *gin.Context) {
	w, r := newReply(c), c.Request
	defer w.extend(0)
	ns := r.URL.Query().Get("ns")
	w.Header().Set(namespaceHeader, ns)
	route, err := registryproxy.ParseRoute(r.Method, c.Param("path"), ns, m.def)
	m.handle(w, r, route, err)
}

// handle answers a request by its route, or by what is wrong with that.
func (m *mirror) handle(w *reply, r *http.Request, route registryproxy.Route, err error) {
	kind := unknownKind
	if err == nil {
		kind = route.Kind.String()
		w.first = m.metrics.first.WithLabelValues(kind)
		err = m.answer(w, r, route)
	}
	begun, result := w.started(), resultOK
	if err != nil {
		result = m.fail(w, r, kind, err)
	}
	m.metrics.requests.WithLabelValues(kind, result).Inc()
	if result == resultGone || begun && err != nil {
		panic(http.ErrAbortHandler) // an engine must never take a part for the whole
	}
}

func (m *mirror) answer(w *reply, r *http.Request, route registryproxy.Route) error {
	if w.Header().Get(namespaceHeader) == "" {
		w.Header().Set(namespaceHeader, route.Repo.Registry)
	}
	switch {
	case route.Kind == registryproxy.KindPing:
		return ping(w)
	case route.Kind == registryproxy.KindWrite:
		return &registryproxy.Error{
			Status: http.StatusMethodNotAllowed, Code: registryproxy.CodeUnsupported,
			Message: "this is a mirror: push to the registry itself",
		}
	case route.Kind == registryproxy.KindBlob && r.Method == http.MethodGet:
		return m.blob(w, r, route)
	}
	return m.small(w, r, route)
}

func ping(w http.ResponseWriter) error {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	_, err := io.WriteString(w, "{}")
	return err
}

// fail answers with an error where no answer has begun, and returns how the
// request ended.
func (m *mirror) fail(w *reply, r *http.Request, kind string, err error) (result string) {
	no := refusal(err)
	ours, isOurs := errors.AsType[*registryproxy.Error](err)
	switch {
	case r.Context().Err() != nil || w.failed != nil: // engines read ahead and hang up
		return resultGone
	case w.started():
		m.log.Error("answer broke off", zap.String("kind", kind), zap.Error(err))
		return resultFailed
	case no != nil:
		no.Relay(w)
		return resultRefused
	case isOurs:
		registryproxy.WriteError(w, ours)
		return resultRefused
	}
	m.log.Warn("neither the region nor the registry answers", zap.String("kind", kind), zap.Error(err))
	w.Header().Set(api.ErrorHeader, api.CodeUnavailable)
	registryproxy.WriteError(w, &registryproxy.Error{Status: http.StatusBadGateway, Code: "UNAVAILABLE", Message: err.Error()})
	return resultFailed
}

// small answers what is no blob's bytes: from the region, and where that cannot
// from the registry.
func (m *mirror) small(w http.ResponseWriter, r *http.Request, route registryproxy.Route) error {
	a, err := m.region(r, route)
	if a != nil && r.Method == http.MethodGet && route.Kind == registryproxy.KindManifest {
		m.ahead(route, r.Header.Get("Authorization"), a.body)
	}
	if a == nil && err == nil {
		if route.Kind != registryproxy.KindManifest && route.Kind != registryproxy.KindBlob {
			return m.forward(w, r, route)
		}
		a, err = m.direct(r, route)
	}
	if err != nil {
		return err
	}
	return a.write(w, r)
}

// region gets the answer of the region, nil when it has none. The error is the
// registry's no, or the end of r.
func (m *mirror) region(r *http.Request, route registryproxy.Route) (*answer, error) {
	a, err := m.relay.ask(r, route)
	if _, refused := errors.AsType[*registryproxy.Refusal](err); err == nil || refused {
		return a, err
	}
	if r.Context().Err() != nil {
		return nil, err
	}
	kind := route.Kind.String()
	cause := causeFailed
	switch {
	case errors.Is(err, errNoSession):
		cause = causeNoSession
	case errors.Is(err, errClear): // said once, at the start
		cause = causeClear
	default:
		m.log.Warn("the region does not answer, asking the registry", zap.String("kind", kind), zap.Error(err))
	}
	m.metrics.direct.WithLabelValues(kind, cause).Inc()
	return nil, nil
}

// direct asks the registry for a manifest, or the header of one or of a blob.
func (m *mirror) direct(r *http.Request, route registryproxy.Route) (*answer, error) {
	who := registryproxy.Caller{Authorization: r.Header.Get("Authorization")}
	if route.Kind == registryproxy.KindBlob {
		if a := m.stored(route); a != nil {
			return a, nil
		}
		size, err := m.registry.HeadBlob(r.Context(), route.Repo, route.Reference, who)
		if err != nil {
			return nil, err
		}
		return newAnswer(octets, route.Reference, size), nil
	}
	head := r.Method == http.MethodHead
	got, err := m.registry.Manifest(r.Context(), head, route.Repo, route.Reference, r.Header.Values("Accept"), who)
	if err != nil {
		return nil, err
	}
	a := newAnswer(got.MediaType, got.Digest.String(), got.Size)
	a.body = got.Body
	return a, nil
}

// forward answers as the registry does, while it does.
func (m *mirror) forward(w http.ResponseWriter, r *http.Request, route registryproxy.Route) error {
	who := registryproxy.Caller{Authorization: r.Header.Get("Authorization")}
	resp, err := m.registry.Forward(r.Context(), r.Method, route, r.URL.Query(), r.Header, who)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	h := w.Header()
	for _, k := range []string{"Content-Length", "Content-Type", "Etag", "Oci-Filters-Applied"} {
		if v := resp.Header[k]; len(v) > 0 {
			h[k] = v
		}
	}
	setNextPage(h, r, resp.Header["Link"])
	w.WriteHeader(resp.StatusCode)
	_, err = io.Copy(w, resp.Body)
	return err
}

// stored answers the HEAD of a blob that is whole in the store and that anyone
// may read under this name.
func (m *mirror) stored(route registryproxy.Route) *answer {
	content, err := m.store.Get(pieces.TaskID(route.Reference))
	if err != nil {
		return nil
	}
	defer content.Release()
	if meta := content.Meta(); !meta.Complete || !slices.Contains(meta.Public, route.Repo.String()) {
		return nil
	}
	return newAnswer(octets, route.Reference, content.Layout().Length)
}
