package registryproxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sony/gobreaker/v2"
	"go.uber.org/zap"
)

const (
	dialTimeout   = 3 * time.Second
	headerTimeout = 10 * time.Second // from the dialling to the answer's header
	stallTimeout  = hurry
	maxRedirects  = 10
)

// Caller is what the asker sent along: its Authorization header, "" for none.
// It goes to the registry and nowhere else.
type Caller struct{ Authorization string }

// String tells whether there are credentials, and not which.
func (c Caller) String() string {
	if c.Authorization == "" {
		return "anonymous"
	}
	return "credentials (redacted)"
}

// GoString is String, for %#v.
func (c Caller) GoString() string { return c.String() }

// Client asks registries, each after its mirrors. Its methods may be called from many goroutines.
// Their errors are a *Refusal for every answer of 400 and above, an *Error for
// a request that must not be sent, the context's own when that ended, and an
// *UpstreamError for all else.
type Client struct {
	*upstreams
	limits   *limits
	stall    time.Duration
	log      *zap.Logger
	requests *prometheus.CounterVec
	spared   *prometheus.CounterVec
	bytes    *prometheus.CounterVec
}

// New returns a client for the registries of cfg, with its metrics on reg.
func New(cfg Config, log *zap.Logger, reg prometheus.Registerer) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	registries, err := newUpstreams(cfg)
	if err != nil {
		return nil, err
	}
	c := &Client{
		upstreams: registries,
		limits:    &limits{known: map[limitKey]*limit{}},
		stall:     cmp.Or(cfg.StallTimeout, stallTimeout),
		log:       log,
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_upstream_requests_total",
			Help: "Requests sent to registries and token servers, by what was asked and how it ended.",
		}, []string{"kind", "result"}),
		spared: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_upstream_spared_total",
			Help: "Requests not sent because the host has asked for fewer (limited) or is down.",
		}, []string{"reason"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_upstream_bytes_total",
			Help: "Bytes of manifests and blobs received from registries.",
		}, []string{"kind"}),
	}
	for _, kind := range append(kindNames[:KindWrite:KindWrite], tokenKind) {
		for _, result := range []string{resultOK, resultRefused, resultFailed, resultCanceled} {
			c.requests.WithLabelValues(kind, result)
		}
	}
	c.spared.WithLabelValues(sparedLimited)
	c.spared.WithLabelValues(sparedDown)
	c.bytes.WithLabelValues(KindManifest.String())
	c.bytes.WithLabelValues(KindBlob.String())
	for _, m := range []prometheus.Collector{c.requests, c.spared, c.bytes, c.upstreams} {
		if err := reg.Register(m); err != nil {
			return nil, fmt.Errorf("register the metrics of registries: %w", err)
		}
	}
	return c, nil
}

// newTransport speaks HTTP/1.1 only: a layer then has a connection and a
// window of its own, and one that dies takes no other transfer with it.
func newTransport(r *reach, near bool, timeout time.Duration) *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		Proxy:               r.proxy(near),
		DialContext:         r.dial(near, timeout),
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     90 * time.Second,

		MaxResponseHeaderBytes: 256 << 10,
		Protocols:              &protocols,
	}
}

// question is one read of a registry.
type question struct {
	Route
	method string
	query  string      // raw
	header http.Header // beside those of every request; owned by the question
	who    Caller
}

// answer is what came below 400. Its body must be closed.
type answer struct {
	status int
	header http.Header
	length int64 // of the body, -1 if not known
	body   *watched
}

// close ends the request, of which nothing more is wanted.
func (a *answer) close() { _ = a.body.Close() }

// ask asks a registry's mirrors, and then itself. Only its own no is an answer:
// after a mirror's the next one is asked. A mirror sees callers' credentials only
// where it is configured so, and is else passed by, for what it gives to anyone
// says nothing of them.
func (c *Client) ask(ctx context.Context, q question) (*answer, error) {
	if e := q.check(); e != nil {
		return nil, e
	}
	u := c.get(q.Repo.Registry)
	if u.barred != nil {
		return nil, &UpstreamError{q.Repo.Registry, false, u.barred}
	}
	last := len(u.endpoints) - 1
	for _, e := range u.endpoints[:last] {
		if q.who.Authorization != "" && !e.callers {
			continue
		}
		if _, bad := e.unhealthy.get(q.Path()); bad {
			continue
		}
		a, err := c.askAt(ctx, e, q)
		if err == nil && q.Kind == KindManifest && q.method == http.MethodGet {
			err = a.hold(q.Reference)
		}
		if err == nil || ctx.Err() != nil {
			return a, err
		}
		c.log.Debug("mirror passed by", zap.String("registry", q.Repo.Registry), zap.String("mirror", e.name), zap.Error(err))
	}
	return c.askAt(ctx, u.endpoints[last], q)
}

// askAt sends q with the caller's credentials; or as whom the configuration says;
// or, when that is nobody or not accepted, without any: then a host that wants a
// token gets an anonymous one. When nothing satisfies it, its answer to the bare
// request is the answer: by its challenge an engine can log in.
func (c *Client) askAt(ctx context.Context, e *endpoint, q question) (*answer, error) {
	if q.who.Authorization != "" {
		return c.try(ctx, e, q, q.who.Authorization)
	}
	tries := []login{{}}
	who, err := e.logins.get(ctx)
	if err != nil {
		c.log.Warn("credentials cannot be read", zap.String("registry", q.Repo.Registry), zap.String("host", e.name), zap.Error(err))
	}
	if who != (login{}) {
		tries = []login{who, {}}
	}
	for _, who := range tries {
		key := tokenKey{q.Repo, who.hash()}
		if token, ok := e.tokens.get(key); ok {
			a, err := c.try(ctx, e, q, token)
			if r, ok := errors.AsType[*Refusal](err); !ok || !r.denies() {
				return a, err
			}
			e.tokens.forget(key, token)
		}
	}
	a, err := c.try(ctx, e, q, "")
	bare, ok := errors.AsType[*Refusal](err)
	if !ok || bare.Status != http.StatusUnauthorized || bare.redirected {
		return a, err
	}
	for _, who := range tries {
		a, err := c.askAs(ctx, e, q, who, bare.Header)
		if !errors.Is(err, errDenied) {
			return a, err
		}
	}
	return nil, bare
}

var errDenied = errors.New("no credentials are accepted")

// askAs sends q with an Authorization got by the challenge in header. The error is
// errDenied where there is none to be had, or it is not accepted.
func (c *Client) askAs(ctx context.Context, e *endpoint, q question, who login, header http.Header) (*answer, error) {
	token, err := c.authorization(ctx, e, q.Repo, who, header)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if r, ok := errors.AsType[*Refusal](err); ok && r.Limited() {
			return nil, r
		}
		if !errors.Is(err, errNoWay) {
			c.log.Warn("no token", zap.String("registry", q.Repo.Registry), zap.Stringer("for", who), zap.Error(err))
		}
		return nil, errDenied
	}
	a, err := c.try(ctx, e, q, token)
	if r, ok := errors.AsType[*Refusal](err); ok && r.denies() {
		e.tokens.forget(tokenKey{q.Repo, who.hash()}, token)
		return nil, errDenied
	}
	return a, err
}

// IsPublic tells whether a success of who's request means that anyone may read
// what was asked for: not where it came by credentials, anybody's.
func (c *Client) IsPublic(registry string, who Caller) bool {
	return who.Authorization == "" && !c.get(registry).shared
}

// try sends q to a host, and once more where the first has broken off at once or
// the host is ill. A host that is down, or wants to be asked less, is spared.
func (c *Client) try(ctx context.Context, e *endpoint, q question, authorization string) (*answer, error) {
	key := limitKeyOf(e.base.Host, q.Kind.String(), q.method, authorization)
	for n := 0; ; n++ {
		a, spared, err := c.limits.do(ctx, key, func() (*answer, error) {
			a, err := e.breaker.Execute(func() (*answer, error) {
				return hedge(ctx, e.header, func(ctx context.Context) (*answer, error) { return c.send(ctx, e, q, authorization) })
			})
			e.tell(c.log, q.Repo.Registry, err)
			return a, err
		})
		switch {
		case spared:
			c.spared.WithLabelValues(sparedLimited).Inc()
			return nil, err
		case errors.Is(err, gobreaker.ErrOpenState) || errors.Is(err, gobreaker.ErrTooManyRequests):
			c.spared.WithLabelValues(sparedDown).Inc()
			return nil, &UpstreamError{q.Repo.Registry, true, errDown}
		case err == nil || n >= e.retries || !isBrief(err):
			return a, err
		}
		if r, ok := errors.AsType[*Refusal](err); ok && r.Limited() {
			continue // it waits there
		}
		t := time.NewTimer(rand.N(retryPause << n)) //nolint:gosec // G404: no secret
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, context.Cause(ctx)
		}
	}
}

// retryPause is at most how long the first retry is waited for.
const retryPause = 200 * time.Millisecond

// isBrief tells failures that may be over in a moment, and have cost no more.
func isBrief(err error) bool {
	if r, ok := errors.AsType[*Refusal](err); ok {
		switch r.Status {
		case http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusTooManyRequests:
			wait, known := retryAfter(r.Header, time.Now())
			return !known || wait <= patience
		}
		return false
	}
	e, ok := errors.AsType[*UpstreamError](err)
	return ok && e.Temporary && !errors.Is(err, errNoAnswer) && !errors.Is(err, errStalled)
}

// The results of a request.
const (
	resultOK       = "ok"
	resultRefused  = "refused"
	resultFailed   = "failed"
	resultCanceled = "canceled"
)

// The reasons for which a request is not sent.
const (
	sparedLimited = "limited"
	sparedDown    = "down"
)

// send asks once and follows redirects.
func (c *Client) send(ctx context.Context, e *endpoint, q question, authorization string) (*answer, error) {
	u := *e.base
	u.Path, u.RawQuery = u.Path+q.Path(), q.query
	header := q.header.Clone()
	if header == nil {
		header = http.Header{}
	}
	if authorization != "" {
		if strings.ContainsFunc(authorization, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
			return nil, &UpstreamError{q.Repo.Registry, false, permanent("the Authorization is not one that a header can hold")}
		}
		header.Set("Authorization", authorization)
	}
	x := c.exchange(ctx, e, q.Repo.Registry, q.Kind.String())
	if e.mirror && q.Kind == KindBlob {
		x.path, x.blob = q.Path(), digest.Digest(q.Reference)
	}
	return x.do(request{method: q.method, url: &u, header: header})
}

// request is one of HTTP; the exchange owns its header.
type request struct {
	method string
	url    *url.URL
	header http.Header
	body   string // of a POST
}

// exchange is one request on its way, with its redirects. do ends it, or the
// closing of the answer's body.
type exchange struct {
	*Client
	ctx        context.Context
	caller     context.Context // what ctx is made of
	cancel     context.CancelCauseFunc
	endpoint   *endpoint
	registry   string
	kind       string
	redirected bool          // to another host
	path       string        // of a mirror's blob
	blob       digest.Digest // that a mirror is asked for, or ""
}

func (c *Client) exchange(ctx context.Context, e *endpoint, registry, kind string) *exchange {
	inner, cancel := context.WithCancelCause(ctx)
	return &exchange{Client: c, ctx: inner, caller: ctx, cancel: cancel, endpoint: e, registry: registry, kind: kind}
}

// do sends a request.
func (x *exchange) do(r request) (*answer, error) {
	resp, err := x.follow(r)
	if err != nil {
		x.cancel(nil)
		if x.caller.Err() != nil {
			x.requests.WithLabelValues(x.kind, resultCanceled).Inc()
		} else {
			x.requests.WithLabelValues(x.kind, resultFailed).Inc()
		}
		return nil, x.failed(err)
	}
	if x.blob != "" && resp.StatusCode < 400 && r.method == http.MethodGet {
		resp.Body = x.check(resp)
	}
	a := &answer{resp.StatusCode, resp.Header, resp.ContentLength, x.watch(resp)}
	if resp.StatusCode < 400 {
		x.requests.WithLabelValues(x.kind, resultOK).Inc()
		a.body.resumable = x.kind == KindBlob.String() &&
			(resp.StatusCode == http.StatusPartialContent || resp.Header.Get("Accept-Ranges") == "bytes")
		return a, nil
	}
	defer a.close()
	no := newRefusal(resp.StatusCode, resp.Header, x.redirected)
	no.Body, _ = a.body.small(maxRefusal) // the status says what counts
	if no.Final() {
		x.requests.WithLabelValues(x.kind, resultRefused).Inc()
	} else {
		x.requests.WithLabelValues(x.kind, resultFailed).Inc()
	}
	return nil, no
}

// follow sends the request to wherever redirects lead. The credentials, a client
// certificate among them, stay with the host they are for.
func (x *exchange) follow(r request) (*http.Response, error) {
	r.header.Set("Accept-Encoding", "identity") // a digest is of the bytes as they are stored
	r.header.Set("User-Agent", "damselfly")
	for range maxRedirects + 1 {
		req := (&http.Request{Method: r.method, URL: r.url, Host: r.url.Host, Header: r.header}).WithContext(x.ctx)
		if r.body != "" {
			req.Body, req.ContentLength = io.NopCloser(strings.NewReader(r.body)), int64(len(r.body))
		}
		t := time.AfterFunc(x.endpoint.header, func() { x.cancel(errNoAnswer) })
		resp, err := x.endpoint.transportTo(r.url).RoundTrip(req)
		t.Stop()
		if err != nil {
			return nil, err
		}
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
			http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return resp, nil
		}
		_, _ = x.watch(resp).small(maxRedirectBody) // so that the connection can be used again
		_ = resp.Body.Close()                       // nothing of it matters
		if r.body != "" {
			return nil, permanent("it redirects what holds a secret")
		}
		next, err := redirect(r.url, resp.Header.Get("Location"))
		if err != nil {
			return nil, err
		}
		if !strings.EqualFold(next.Host, r.url.Host) {
			r.header = r.header.Clone() // the transport may still hold the old one
			r.header.Del("Authorization")
			r.header.Del("Cookie")
			x.redirected = true
		}
		r.url = next
	}
	return nil, permanent("there are too many redirects")
}

var errNoAnswer = errors.New("no answer in time")

// maxRedirectBody is how much of a redirect's page is read.
const maxRedirectBody = 4 << 10

// redirect returns where a Location leads. Its errors do not quote it: the URL
// may be signed.
func redirect(from *url.URL, location string) (*url.URL, error) {
	to, err := from.Parse(location)
	switch {
	case location == "" || err != nil:
		return nil, permanent("a redirect leads nowhere")
	case to.Scheme != "https" && to.Scheme != from.Scheme:
		return nil, permanent(fmt.Sprintf("a redirect leads from %s to %.20s", from.Scheme, to.Scheme))
	case to.Host == "":
		return nil, permanent("a redirect leads nowhere")
	}
	to.User = nil
	return to, nil
}

func (x *exchange) watch(resp *http.Response) *watched {
	return watch(resp.Body, x.stall, x.cancel, x.failed)
}

// permanent is a failure that will come again.
type permanent string

func (p permanent) Error() string { return string(p) }

// failed makes what went wrong in the exchange the caller's error.
func (x *exchange) failed(err error) error {
	if x.caller.Err() != nil {
		return fmt.Errorf("registry %s: %w", x.registry, context.Cause(x.caller))
	}
	if cause := context.Cause(x.ctx); errors.Is(cause, errStalled) || errors.Is(cause, errNoAnswer) || errors.Is(cause, errSlow) {
		err = cause
	}
	passing := isPassing(err)
	if x.redirected {
		err = elsewhere{err}
	}
	return &UpstreamError{x.registry, passing, err}
}

// isPassing tells what may be gone the next time from what will not.
func isPassing(err error) bool {
	if _, ok := errors.AsType[permanent](err); ok {
		return false
	}
	if _, ok := errors.AsType[*ReachError](err); ok {
		return false
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return false
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return !dns.IsNotFound
	}
	return true
}
