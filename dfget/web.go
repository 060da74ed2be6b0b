package dfget

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"time"

	"damselfly.dev/httprange"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const (
	webTimeout   = 10 * time.Second // for an answer's header, and for each byte after it
	maxRedirects = 10
	maxRefusal   = 64 << 10 // bytes kept of a refusal's body
	maxURL       = 8 << 10  // bytes
)

// URLRequest returns the request for what a URL names. With a digest ("sha256:…",
// else "") the task is that content, wherever it comes from. header is sent to
// the URL's own host alone.
func URLRequest(raw, digest string, header http.Header) (Request, error) {
	u, err := url.Parse(raw)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" || len(raw) > maxURL {
		return Request{}, errors.New("the URL must begin with http:// or https:// and name a host")
	}
	kept := http.Header{}
	for k, v := range header {
		kept[textproto.CanonicalMIMEHeaderKey(k)] = slices.Clone(v)
	}
	for _, k := range []string{"Accept-Encoding", "Connection", "Content-Length", "Host", "If-Range", "Range", "Transfer-Encoding"} {
		if kept[k] != nil {
			return Request{}, fmt.Errorf("the header %s cannot be given", k)
		}
	}
	if user := u.User; user != nil {
		password, _ := user.Password()
		r := http.Request{Header: kept}
		r.SetBasicAuth(user.Username(), password)
	}
	normalise(u)
	id := pieces.URLTaskID(u.String())
	if digest != "" {
		if id, err = pieces.ParseTaskID(digest); err != nil || id.Content() == "" {
			return Request{}, fmt.Errorf("digest %.100q: want sha256:, sha384: or sha512: and the digest in hex", digest)
		}
	}
	return Request{ID: id, Origin: api.Origin{URL: u.String(), Header: kept}, Direct: newWeb(u, kept)}, nil
}

// SignedURLRequest is URLRequest for a URL whose signature is no part of what it
// names: what matches ignore, as pieces.SignedURLTaskID tells, is sent to the
// origin and left out of the task's id.
func SignedURLRequest(raw string, ignore []string, header http.Header) (Request, error) {
	r, err := URLRequest(raw, "", header)
	if err == nil {
		r.ID, r.Origin.Ignore = pieces.SignedURLTaskID(r.Origin.URL, ignore)
	}
	return r, err
}

// Over has the request's own origin asked over a transport.
func (r Request) Over(t http.RoundTripper) Request {
	if w, ok := r.Direct.(*web); ok {
		w.client = &http.Client{CheckRedirect: redirect, Transport: t}
	}
	return r
}

// normalise gives URLs of one content one form, as far as that is certain.
func normalise(u *url.URL) {
	u.User, u.Fragment, u.RawFragment = nil, "", ""
	u.Scheme, u.Host = strings.ToLower(u.Scheme), strings.ToLower(u.Host)
	if (u.Scheme == "http" && u.Port() == "80") || (u.Scheme == "https" && u.Port() == "443") {
		u.Host = strings.TrimSuffix(u.Host, ":"+u.Port())
	}
	if u.Path == "" {
		u.Path = "/"
	}
}

// web is a URL as an Origin, for one stream.
type web struct {
	client  *http.Client
	url     *url.URL
	header  http.Header
	version string // a validator of the first answer, "" for none
}

func newWeb(u *url.URL, header http.Header) *web {
	return &web{url: u, header: header, client: &http.Client{
		CheckRedirect: redirect,
		Transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: webTimeout}).DialContext,
			TLSHandshakeTimeout:   webTimeout,
			ResponseHeaderTimeout: webTimeout,
			DisableCompression:    true,
			DisableKeepAlives:     true,
		},
	}}
}

// redirect keeps the caller's header with the host it is for.
func redirect(to *http.Request, via []*http.Request) error {
	first, last := via[0].URL, via[len(via)-1].URL
	switch {
	case len(via) > maxRedirects:
		return errors.New("there are too many redirects")
	case last.Scheme == "https" && to.URL.Scheme != "https":
		return errors.New("a redirect leads from https to http")
	case to.URL.Host != first.Host || to.URL.Scheme != first.Scheme:
		kept := http.Header{}
		for _, k := range []string{"Accept-Encoding", "If-Range", "Range"} {
			if v := to.Header[k]; v != nil {
				kept[k] = v
			}
		}
		to.Header = kept
	}
	to.Header.Del("Referer") // it may be signed
	return nil
}

// Open asks the URL for its content from off on. One that has changed since the
// first answer is an error.
func (w *web) Open(ctx context.Context, off int64) (io.ReadCloser, int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	body, size, err := w.open(ctx, cancel, off)
	if err != nil {
		cancel(nil)
		if _, no := errors.AsType[*RefusedError](err); !no {
			err = fmt.Errorf("ask %s: %w", w.url.Host, err)
		}
		return nil, 0, err
	}
	return body, size, nil
}

func (w *web) open(ctx context.Context, cancel context.CancelCauseFunc, off int64) (io.ReadCloser, int64, error) {
	req := (&http.Request{Method: http.MethodGet, URL: w.url, Header: w.header.Clone()}).WithContext(ctx)
	req.Header.Set("Accept-Encoding", "identity")
	if off > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", off))
		if w.version != "" {
			req.Header.Set("If-Range", w.version)
		}
	}
	timer := time.AfterFunc(webTimeout, func() { cancel(errSilent) })
	resp, err := w.client.Do(req) //nolint:bodyclose // webBody closes it
	if err != nil {
		timer.Stop()
		return nil, 0, api.WithoutURL(causeOf(ctx, err))
	}
	timer.Reset(webTimeout)
	body := &webBody{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, timer: timer}
	size, err := w.accept(resp, body, off)
	if err != nil {
		_ = body.Close()
		return nil, 0, err
	}
	return body, size, nil
}

// accept checks an answer, moves body to off, and returns the size of the whole.
func (w *web) accept(resp *http.Response, body io.Reader, off int64) (size int64, err error) {
	version := resp.Header.Get("Etag")
	if version == "" || strings.HasPrefix(version, "W/") {
		version = resp.Header.Get("Last-Modified")
	}
	from := int64(0)
	size = resp.ContentLength
	switch code := resp.StatusCode; {
	case code == http.StatusPartialContent:
		part, whole, ok := httprange.ParseContent(resp.Header.Get("Content-Range"))
		if !ok {
			return 0, errors.New("its Content-Range is not one")
		}
		from, size = part.Offset, whole
	case code >= 400 && code < 500:
		b := make([]byte, maxRefusal)
		n, _ := io.ReadFull(body, b) // the status says what counts
		return 0, &RefusedError{Status: code, Header: resp.Header, Body: b[:n]}
	case code != http.StatusOK:
		return 0, fmt.Errorf("it answers with status %d", code)
	}
	if w.version != "" && version != w.version {
		return 0, errors.New("the content has changed meanwhile")
	}
	w.version = version
	if e := resp.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return 0, fmt.Errorf("the content is encoded: %.20q", e)
	}
	if from > off {
		return 0, errors.New("it answers with another range")
	}
	_, err = io.CopyN(io.Discard, body, off-from)
	return size, err
}

// webBody is a body that fails when no byte comes in time.
type webBody struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer // runs during a Read
}

func (b *webBody) Read(p []byte) (int, error) {
	b.timer.Reset(webTimeout)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) {
		err = causeOf(b.ctx, err)
	}
	return n, err
}

// Close ends the request.
func (b *webBody) Close() error {
	b.timer.Stop()
	b.cancel(nil)
	return b.ReadCloser.Close()
}
