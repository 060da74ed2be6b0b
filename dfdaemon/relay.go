package dfdaemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
)

const (
	regionDial = 2 * time.Second
	// regionWhole is until the supernode's answer has ended: a registry then has what
	// is left of ten seconds.
	regionWhole = 5 * time.Second
	maxAnswer   = registryproxy.MaxManifestSize
)

var (
	errNoSession = errors.New("no session with a supernode")
	errClear     = errors.New("it wants a login, and credentials do not go on in clear: see docs/security.md")
)

// relay asks the supernode for what travels whole: manifests, tags, referrers
// and the lengths of blobs.
type relay struct {
	supernode func() (base string, sealed, ok bool)
	client    *http.Client
}

// newRelay returns one that asks over TLS with the host's identity, if it has one.
func newRelay(supernode func() (base string, sealed, ok bool), own *identity.Source) *relay {
	transport := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: regionDial}).DialContext,
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     90 * time.Second,
		DisableCompression:  true,
	}
	if own != nil {
		transport.DialTLSContext = own.DialSupernode(transport.DialContext)
	}
	return &relay{supernode, &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// answer is one that has arrived whole, its body checked where it has a digest.
// That of a HEAD has no body, and its length.
type answer struct {
	header http.Header // Content-Length among it
	body   []byte
}

// ask sends r on, whose route it is. The error is a *registryproxy.Refusal where
// the registry has said no; any other means that the registry must be asked.
func (y *relay) ask(r *http.Request, route registryproxy.Route) (*answer, error) {
	base, sealed, ok := y.supernode()
	if !ok {
		return nil, errNoSession
	}
	ctx, cancel := context.WithTimeout(r.Context(), regionWhole)
	defer cancel()
	q := r.URL.Query()
	q.Set("ns", route.Repo.Registry)
	out, err := http.NewRequestWithContext(ctx, r.Method, strings.TrimSuffix(base, "/")+route.Path()+"?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	for _, k := range []string{"Accept", "Authorization"} {
		if v := r.Header[k]; len(v) > 0 {
			out.Header[k] = v
		}
	}
	hidden := !sealed && out.Header["Authorization"] != nil
	if hidden {
		out.Header.Del("Authorization")
	}
	resp, err := y.client.Do(out)
	if err != nil {
		return nil, fmt.Errorf("ask the supernode: %w", api.WithoutURL(err))
	}
	defer func() { _ = resp.Body.Close() }()
	a, err := read(resp, route)
	_, refused := errors.AsType[*registryproxy.Refusal](err)
	if refused && hidden {
		return nil, errClear
	}
	if err != nil && !refused {
		return nil, fmt.Errorf("the supernode's answer: %w", err)
	}
	return a, err
}

// read takes in what the supernode answers.
func read(resp *http.Response, route registryproxy.Route) (*answer, error) {
	if code := resp.Header.Get(api.ErrorHeader); code == api.CodeClear {
		return nil, errClear
	} else if code != "" {
		return nil, fmt.Errorf("it cannot say: %s", code)
	}
	if resp.StatusCode >= http.StatusBadRequest && resp.Header.Get(namespaceHeader) == "" {
		return nil, fmt.Errorf("status %d comes from something before it: a supernode says for which registry it speaks", resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1)) //nolint:forbidigo // capped
	switch {
	case err != nil:
		return nil, err
	case len(body) > maxAnswer:
		return nil, errors.New("it is larger than 4 MiB")
	}
	header := resp.Header.Clone()
	for _, k := range []string{"Connection", "Content-Length", "Date", "Keep-Alive", namespaceHeader} {
		header.Del(k)
	}
	if resp.StatusCode != http.StatusOK {
		no := &registryproxy.Refusal{Status: resp.StatusCode, Header: header, Body: body}
		if resp.StatusCode < http.StatusBadRequest || !no.Final() {
			return nil, fmt.Errorf("it has the status %d", resp.StatusCode)
		}
		return nil, no
	}
	a := &answer{header, body}
	if resp.Request.Method == http.MethodHead {
		a.body = nil
	}
	return a, a.check(route, resp.ContentLength)
}

// check tells whether the answer is what route asks for, and completes its
// header. length is that of the content, -1 if not known.
func (a *answer) check(route registryproxy.Route, length int64) error {
	if a.body != nil {
		length = int64(len(a.body))
	}
	if length < 0 {
		return errors.New("it has no length")
	}
	a.header.Set("Content-Length", strconv.FormatInt(length, 10))
	if a.header.Get("Content-Encoding") != "" {
		return errors.New("it is encoded")
	}
	if route.Kind != registryproxy.KindManifest && route.Kind != registryproxy.KindBlob {
		return nil
	}
	want := registryproxy.DigestOf(route.Reference, a.header)
	if want == "" {
		return errors.New("it names no digest")
	}
	if a.body != nil && want.Algorithm().FromBytes(a.body) != want {
		return errors.New("its bytes have another digest")
	}
	a.header.Set(digestHeader, want.String())
	return nil
}

// newAnswer returns one without a body; what is "" or below 0 is not known.
func newAnswer(mediaType, dgst string, length int64) *answer {
	h := http.Header{"Content-Type": {mediaType}}
	if dgst != "" {
		h.Set(digestHeader, dgst)
		h.Set("Etag", strconv.Quote(dgst))
	}
	if length >= 0 {
		h.Set("Content-Length", strconv.FormatInt(length, 10))
	}
	return &answer{header: h}
}

// write answers r with a.
func (a *answer) write(w http.ResponseWriter, r *http.Request) error {
	h := w.Header()
	maps.Copy(h, a.header)
	setNextPage(h, r, a.header["Link"])
	if registryproxy.NotModified(r.Header, a.header.Get("Etag")) {
		h.Del("Content-Length")
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	w.WriteHeader(http.StatusOK)
	_, err := w.Write(a.body)
	return err
}

// setNextPage makes the links of a registry's answer to r the one that leads on
// here.
func setNextPage(h http.Header, r *http.Request, links []string) {
	h.Del("Link")
	if next := registryproxy.NextPage(r, links); next != "" {
		h.Set("Link", next)
	}
}
