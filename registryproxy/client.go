package registryproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

const (
	dialTimeout   = 3 * time.Second
	headerTimeout = 10 * time.Second // from the dialling to the answer's header
	stallTimeout  = 10 * time.Second
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

// Client asks registries. Its methods may be called from many goroutines.
// Their errors are a *Refusal for every answer of 400 and above, an *Error for
// a request that must not be sent, the context's own when that ended, and an
// *UpstreamError for all else.
type Client struct {
	upstreams map[string]*url.URL // by canonical name
	transport http.RoundTripper
	stall     time.Duration
	tokens    *tokens
	log       *zap.Logger
	requests  *prometheus.CounterVec
	bytes     *prometheus.CounterVec
}

// New returns a client for the registries of cfg, with its metrics on reg.
func New(cfg Config, log *zap.Logger, reg prometheus.Registerer) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	c := &Client{
		upstreams: map[string]*url.URL{},
		transport: newTransport(),
		stall:     cfg.StallTimeout,
		tokens:    newTokens(),
		log:       log,
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_upstream_requests_total",
			Help: "Requests sent to registries and token servers, by what was asked and how it ended.",
		}, []string{"kind", "result"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_upstream_bytes_total",
			Help: "Bytes of manifests and blobs received from registries.",
		}, []string{"kind"}),
	}
	if c.stall == 0 {
		c.stall = stallTimeout
	}
	for _, u := range cfg.Upstreams {
		name, _ := canonicalRegistry(u.Name)
		c.upstreams[name], _ = parseBase(u.URL) // Validate has seen both
	}
	for _, kind := range append(kindNames[:KindWrite:KindWrite], tokenKind) {
		for _, result := range []string{resultOK, resultRefused, resultFailed, resultCanceled} {
			c.requests.WithLabelValues(kind, result)
		}
	}
	c.bytes.WithLabelValues(KindManifest.String())
	c.bytes.WithLabelValues(KindBlob.String())
	for _, m := range []prometheus.Collector{c.requests, c.bytes} {
		if err := reg.Register(m); err != nil {
			return nil, fmt.Errorf("register the metrics of registries: %w", err)
		}
	}
	return c, nil
}

// newTransport speaks HTTP/1.1 only: a layer then has a connection and a
// window of its own, and one that dies takes no other transfer with it.
func newTransport() *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		Proxy: func(r *http.Request) (*url.URL, error) {
			u, err := http.ProxyFromEnvironment(r)
			if err != nil { // it would quote the proxy's password
				return nil, errors.New("the proxy that the environment names is not a URL")
			}
			return u, nil
		},
		DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     90 * time.Second,
		Protocols:           &protocols,
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

// ask sends q with the caller's credentials, or without any: then a registry
// that wants a token gets an anonymous one. When that does not satisfy it, its
// answer to the bare request is the answer.
func (c *Client) ask(ctx context.Context, q question) (*answer, error) {
	if e := q.check(); e != nil {
		return nil, e
	}
	if q.who.Authorization != "" {
		return c.send(ctx, q, q.who.Authorization)
	}
	if token, ok := c.tokens.get(q.Repo); ok {
		a, err := c.send(ctx, q, token)
		if r, ok := errors.AsType[*Refusal](err); !ok || !r.denies() {
			return a, err
		}
		c.tokens.forget(q.Repo, token)
	}
	a, err := c.send(ctx, q, "")
	bare, ok := errors.AsType[*Refusal](err)
	if !ok || bare.Status != http.StatusUnauthorized {
		return a, err
	}
	token, tokenErr := c.token(ctx, q.Repo, bare.Header)
	if tokenErr != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !errors.Is(tokenErr, errNoBearer) {
			c.log.Warn("no anonymous token", zap.String("registry", q.Repo.Registry), zap.Error(tokenErr))
		}
		return nil, bare
	}
	a, err = c.send(ctx, q, token)
	if r, ok := errors.AsType[*Refusal](err); ok && r.denies() {
		c.tokens.forget(q.Repo, token)
		return nil, bare
	}
	return a, err
}

// The results of a request.
const (
	resultOK       = "ok"
	resultRefused  = "refused"
	resultFailed   = "failed"
	resultCanceled = "canceled"
)

// send asks once and follows redirects.
func (c *Client) send(ctx context.Context, q question, authorization string) (*answer, error) {
	base := c.base(q.Repo.Registry)
	u := *base
	u.Path, u.RawQuery = base.Path+q.Path(), q.query
	header := q.header.Clone()
	if header == nil {
		header = http.Header{}
	}
	if authorization != "" {
		header.Set("Authorization", authorization)
	}
	x := c.exchange(ctx, q.Repo.Registry, q.Kind.String())
	return x.do(q.method, &u, header)
}

// exchange is one request on its way, with its redirects. do ends it, or the
// closing of the answer's body.
type exchange struct {
	*Client
	ctx      context.Context
	caller   context.Context // what ctx is made of
	cancel   context.CancelCauseFunc
	registry string
	kind     string
}

func (c *Client) exchange(ctx context.Context, registry, kind string) *exchange {
	inner, cancel := context.WithCancelCause(ctx)
	return &exchange{Client: c, ctx: inner, caller: ctx, cancel: cancel, registry: registry, kind: kind}
}

// do sends a request with the header, which it owns.
func (x *exchange) do(method string, u *url.URL, header http.Header) (*answer, error) {
	resp, redirected, err := x.follow(method, u, header) //nolint:bodyclose // whoever has the answer closes it
	if err != nil {
		x.cancel(nil)
		if x.caller.Err() != nil {
			x.requests.WithLabelValues(x.kind, resultCanceled).Inc()
		} else {
			x.requests.WithLabelValues(x.kind, resultFailed).Inc()
		}
		return nil, x.failed(err)
	}
	a := &answer{resp.StatusCode, resp.Header, resp.ContentLength, x.watch(resp)}
	if resp.StatusCode < 400 {
		x.requests.WithLabelValues(x.kind, resultOK).Inc()
		return a, nil
	}
	defer a.close()
	r := newRefusal(resp.StatusCode, resp.Header, redirected)
	r.Body, _ = a.body.small(maxRefusal) // the status says what counts
	if r.Final() {
		x.requests.WithLabelValues(x.kind, resultRefused).Inc()
	} else {
		x.requests.WithLabelValues(x.kind, resultFailed).Inc()
	}
	return nil, r
}

// follow sends the request to wherever redirects lead. The credentials stay
// with the host they are for.
func (x *exchange) follow(method string, u *url.URL, header http.Header) (_ *http.Response, redirected bool, _ error) {
	header.Set("Accept-Encoding", "identity") // a digest is of the bytes as they are stored
	header.Set("User-Agent", "damselfly")
	for range maxRedirects + 1 {
		req := (&http.Request{Method: method, URL: u, Host: u.Host, Header: header}).WithContext(x.ctx)
		t := time.AfterFunc(headerTimeout, func() { x.cancel(errNoAnswer) })
		resp, err := x.transport.RoundTrip(req)
		t.Stop()
		if err != nil {
			return nil, redirected, err
		}
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
			http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return resp, redirected, nil
		}
		_, _ = x.watch(resp).small(maxRedirectBody) // so that the connection can be used again
		_ = resp.Body.Close()                       // nothing of it matters
		next, err := redirect(u, resp.Header.Get("Location"))
		if err != nil {
			return nil, redirected, err
		}
		if !strings.EqualFold(next.Host, u.Host) {
			header = header.Clone() // the transport may still hold the old one
			header.Del("Authorization")
			redirected = true
		}
		u = next
	}
	return nil, redirected, permanent("there are too many redirects")
}

var errNoAnswer = errors.New("no answer in 10 s")

// maxRedirectBody is how much of a redirect's page is read.
const maxRedirectBody = 4 << 10

// redirect returns where a Location leads. Its errors do not quote it: the URL
// may be signed.
func redirect(from *url.URL, location string) (*url.URL, error) {
	to, err := from.Parse(location)
	switch {
	case location == "" || err != nil || to.Host == "":
		return nil, permanent("a redirect leads nowhere")
	case to.Scheme != "https" && to.Scheme != from.Scheme:
		return nil, permanent("a redirect leads from https to " + to.Scheme)
	}
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
	if cause := context.Cause(x.ctx); errors.Is(cause, errStalled) || errors.Is(cause, errNoAnswer) {
		err = cause
	}
	return &UpstreamError{x.registry, isPassing(err), err}
}

// isPassing tells what may be gone the next time from what will not.
func isPassing(err error) bool {
	if _, ok := errors.AsType[permanent](err); ok {
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
