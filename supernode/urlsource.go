package supernode

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"damselfly.dev/httprange"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

const (
	urlTimeout   = 10 * time.Second // for an answer's header, redirects included
	maxRedirects = 10
	maxRefusal   = 64 << 10 // bytes kept of a refusal's body
	maxURLHeader = 64 << 10 // bytes of a caller's header
	maxIgnore    = 256      // names of parameters
	maxProofs    = 1 << 16
)

// web reads plain URLs.
type web struct {
	client *registryproxy.Client
	stall  time.Duration
	fresh  time.Duration // how long a URL's content is not checked again
	seen   *notes
	log    *zap.Logger
	now    func() time.Time

	mu     sync.Mutex // guards proofs
	proofs map[proof]proved
}

// proved says when a request has succeeded, and of which content: what a URL
// without a digest stands for is told apart by note.Checked, when it was brought.
type proved struct{ at, content time.Time }

func newWeb(of registries, stall, fresh time.Duration, seen *notes, log *zap.Logger) *web {
	return &web{client: of.client, stall: stall, fresh: fresh, seen: seen, log: log, now: of.now, proofs: map[proof]proved{}}
}

// redirect keeps the caller's header with the host it is for.
func redirect(to *http.Request, via []*http.Request) error {
	from := via[len(via)-1].URL
	switch {
	case len(via) > maxRedirects:
		return errors.New("there are too many redirects")
	case to.URL.Scheme != "https" && to.URL.Scheme != from.Scheme:
		return errors.New("a redirect leads from " + from.Scheme + " to " + to.URL.Scheme)
	case to.URL.Host != via[0].URL.Host || to.URL.Scheme != via[0].URL.Scheme:
		kept := http.Header{}
		for _, k := range []string{"Range", "Accept-Encoding"} {
			if v := to.Header.Get(k); v != "" {
				kept.Set(k, v)
			}
		}
		to.Header = kept
	}
	to.Header.Del("Referer") // it may be signed
	return nil
}

// prove notes that a request has just succeeded.
func (w *web) prove(p proof, content time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.now()
	if len(w.proofs) >= maxProofs {
		maps.DeleteFunc(w.proofs, func(_ proof, of proved) bool { return now.Sub(of.at) > registryproxy.ProofLife })
		if len(w.proofs) >= maxProofs {
			clear(w.proofs)
		}
	}
	w.proofs[p] = proved{now, content}
}

// proved returns when a request has succeeded, if that was within the time given
// and of that content.
func (w *web) proved(p proof, content time.Time, within time.Duration) (at time.Time, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	of, ok := w.proofs[p]
	return of.at, ok && of.content.Equal(content) && w.now().Sub(of.at) < within
}

// urlSource is the content of a URL.
type urlSource struct {
	*web
	id     pieces.TaskID
	url    *url.URL
	header http.Header
	proof  proof
	own    bool // the request, or its signature, says who asks: others may be given something else
	signed bool
}

// hopHeaders of a caller's request are not the origin's business.
var hopHeaders = []string{
	"Accept-Encoding", "Connection", "Content-Length", "Expect", "Host", "If-Match", "If-Modified-Since", "If-None-Match",
	"If-Range", "If-Unmodified-Since", "Keep-Alive", "Proxy-Authorization", "Proxy-Connection", "Range", "Te", "Trailer",
	"Transfer-Encoding", "Upgrade",
}

// source checks what a host asks for.
func (w *web) source(id pieces.TaskID, o api.Origin) (*urlSource, error) {
	raw, header := o.URL, http.Header(o.Header)
	u, err := url.Parse(raw)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" || len(raw) > 8<<10 {
		return nil, errors.New("the URL must begin with http:// or https:// and name a host")
	}
	named, without := pieces.SignedURLTaskID(raw, o.Ignore)
	if id.Content() == "" && named != id {
		return nil, errors.New("the task's id is not that of the URL")
	}
	s := &urlSource{web: w, id: id, url: u, header: http.Header{}, own: len(without) > 0, signed: len(without) > 0}
	parts, size := []string{"url", string(id), raw}, 0
	for _, k := range slices.Sorted(maps.Keys(header)) {
		name := textproto.CanonicalMIMEHeaderKey(k)
		if slices.Contains(hopHeaders, name) {
			continue
		}
		s.own = s.own || name != "Accept" && name != "User-Agent"
		for _, v := range header[k] {
			parts, size = append(parts, name, v), size+len(k)+len(v)
			s.header.Add(name, v)
		}
	}
	if size > maxURLHeader {
		return nil, errors.New("the header for the URL is too long")
	}
	s.proof = proofOf(parts...)
	return s, nil
}

func (s *urlSource) name() string { return "" }

// from is the host where the task's id says what is asked for there. A digest
// does not: who may read one path of a host may not read all others.
func (s *urlSource) from() string {
	host := s.url.Scheme + "://" + s.url.Host
	if s.id.Content() == "" {
		return host
	}
	sum := sha256.Sum256([]byte(s.url.EscapedPath())) // it is written down, and may be a secret
	return host + " " + hex.EncodeToString(sum[:])
}

func (s *urlSource) key() proof { return s.proof }

func (s *urlSource) continues(b *body) bool {
	v, ok := s.seen.get(string(s.id))
	return s.id.Content() != "" || ok && v.Version != "" && v.Version == b.version
}

// opened notes what the URL stands for now. A restart knows it as well.
func (s *urlSource) opened(b *body) {
	if s.id.Content() != "" {
		s.prove(s.proof, time.Time{})
		return
	}
	now := note{Name: string(s.id), Version: b.version, Own: s.own, Checked: s.now()}
	s.prove(s.proof, now.Checked)
	if err := s.seen.put(now); err != nil {
		s.log.Warn("version of a URL is not kept", zap.Error(err))
	}
}

// allowed asks the origin whether the caller may read the URL and, where the
// id does not say what the content is, whether it is still the same. A URL
// without validators is fetched again when what there is of it is old, or may
// be meant for who asked for it.
func (s *urlSource) allowed(ctx context.Context, c *pieces.Content) (right, error) {
	named := s.id.Content() != ""
	within := registryproxy.ProofLife
	var v note
	known := named
	if !named {
		within = min(s.fresh, registryproxy.ProofLife)
		v, known = s.seen.get(string(s.id))
	}
	caller := registryproxy.Caller{Authorization: s.header.Get("Authorization")}
	now := s.now()
	life := caller.Life(now)
	if at, ok := s.proved(s.proof, v.Checked, within); ok && life > 0 {
		return right{until: earlier(at.Add(registryproxy.ProofLife), now.Add(life))}, nil
	}
	b, err := s.measure(ctx)
	if err != nil {
		return right{}, err
	}
	other := b.length >= 0 && b.length != c.Layout().Length
	switch {
	case named && other:
		return right{}, errOthers
	case !known || !named && (other || v.Version != b.version || b.version == "" && !s.lasts(v)):
		return right{}, errChanged
	}
	s.prove(s.proof, v.Checked)
	return right{until: now.Add(life)}, nil
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// lapsed is also true of a URL that is signed: it ends some time, and does not say
// when in one way.
func (s *urlSource) lapsed() bool {
	return s.signed || registryproxy.Caller{Authorization: s.header.Get("Authorization")}.Lapsed(s.now())
}

// lasts tells whether what a URL without validators gave is what it gives this
// caller.
func (s *urlSource) lasts(v note) bool {
	_, proved := s.proved(s.proof, v.Checked, registryproxy.ProofLife)
	return s.now().Sub(v.Checked) <= registryproxy.ProofLife && (!v.Own && !s.own || proved)
}

func (s *urlSource) measure(ctx context.Context) (*body, error) {
	b, err := s.ask(ctx, http.MethodHead, "")
	if r, ok := errors.AsType[*registryproxy.Refusal](err); ok && r.Status != http.StatusTooManyRequests {
		b, err = s.ask(ctx, http.MethodGet, "bytes=0-0") // its words, and some take no HEAD
	}
	if err == nil {
		_ = b.Close()
	}
	return b, err
}

func (s *urlSource) part(ctx context.Context, off, end int64) (*body, error) {
	b, err := s.ask(ctx, http.MethodGet, fmt.Sprintf("bytes=%d-%d", off, end-1))
	if err == nil && (!b.partial || b.from != off) {
		_ = b.Close()
		return nil, errWhole
	}
	return b, err
}

func (s *urlSource) open(ctx context.Context, off, _ int64) (*body, error) {
	span := ""
	if off > 0 {
		span = fmt.Sprintf("bytes=%d-", off)
	}
	b, err := s.ask(ctx, http.MethodGet, span)
	if err != nil {
		return nil, err
	}
	if b.from > off {
		_ = b.Close()
		return nil, fmt.Errorf("read URL at %s: the answer is not the range that was asked for", s.url.Host)
	}
	if _, err := io.CopyN(io.Discard, b, off-b.from); err != nil {
		_ = b.Close()
		return nil, passing{err}
	}
	b.from = off
	return b, nil
}

// ask sends one request and follows redirects.
func (s *urlSource) ask(ctx context.Context, method, span string) (*body, error) {
	inner, cancel := context.WithCancelCause(ctx)
	req := (&http.Request{Method: method, URL: s.url, Host: s.url.Host, Header: s.header.Clone()}).WithContext(inner)
	req.Header.Set("Accept-Encoding", "identity")
	if span != "" {
		req.Header.Set("Range", span)
	}
	late := time.AfterFunc(urlTimeout, func() { cancel(errStalled) })
	client := &http.Client{Transport: s.client.TransportTo(s.url), CheckRedirect: redirect}
	resp, err := client.Do(req) //nolint:bodyclose // watched closes it
	late.Stop()
	if err != nil {
		cancel(nil)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		err = api.WithoutURL(err)
		if _, barred := errors.AsType[*registryproxy.ReachError](err); barred {
			return nil, fmt.Errorf("ask %s: %w", s.url.Host, err)
		}
		return nil, passing{fmt.Errorf("ask %s: %w", s.url.Host, err)}
	}
	w := &watched{body: resp.Body, cancel: cancel, stall: s.stall}
	w.timer = time.AfterFunc(s.stall, func() { cancel(errStalled) })
	if resp.StatusCode >= 400 {
		defer func() { _ = w.Close() }()
		return nil, refusal(resp.StatusCode, resp.Header, w)
	}
	b := &body{ReadCloser: w, length: resp.ContentLength, version: version(resp.Header)}
	if b.partial = resp.StatusCode == http.StatusPartialContent; b.partial {
		part, size, ok := httprange.ParseContent(resp.Header.Get("Content-Range"))
		if !ok {
			_ = w.Close()
			return nil, fmt.Errorf("ask %s: the answer's range cannot be read", s.url.Host)
		}
		b.from, b.length = part.Offset, size
	}
	encoding := resp.Header.Get("Content-Encoding")
	if resp.StatusCode > 206 || resp.StatusCode < 200 || (encoding != "" && encoding != "identity") {
		_ = w.Close()
		return nil, fmt.Errorf("ask %s: no plain answer: status %d, encoding %q", s.url.Host, resp.StatusCode, encoding)
	}
	return b, nil
}

// version is what tells one content of a URL from the next.
func version(h http.Header) string {
	v := h.Get("Etag") + "\n" + h.Get("Last-Modified")
	if v == "\n" || len(v) > 1024 {
		return ""
	}
	return v
}

// refusal makes an answer of 400 or above what a caller can be told.
func refusal(status int, h http.Header, r io.Reader) *registryproxy.Refusal {
	no := &registryproxy.Refusal{Status: status, Header: http.Header{}}
	for _, k := range []string{"Content-Type", "Retry-After", "Www-Authenticate"} {
		if v := h.Values(k); len(v) > 0 {
			no.Header[k] = slices.Clone(v)
		}
	}
	b := make([]byte, maxRefusal)
	n, _ := io.ReadFull(r, b) // the status says what counts
	no.Body = b[:n]
	return no
}

var errStalled = errors.New("the connection has stalled")

// watched is a body of which a Read that gets no byte in time fails.
type watched struct {
	body   io.ReadCloser
	cancel context.CancelCauseFunc
	stall  time.Duration
	timer  *time.Timer // ends the request; runs during a Read
}

func (w *watched) Read(p []byte) (int, error) {
	w.timer.Reset(w.stall)
	n, err := w.body.Read(p)
	w.timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) {
		err = passing{err}
	}
	return n, err
}

func (w *watched) Close() error {
	w.timer.Stop()
	w.cancel(nil)
	return w.body.Close()
}
