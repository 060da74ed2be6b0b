package dfdaemon

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/gin-gonic/gin"
	"go.uber.org/zap"

	"damselfly.dev/dfget"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// URLConfig is what may be told of contents that are asked for by their whole
// URL, at the mirror's address.
type URLConfig struct {
	// Prefix is the path that such a URL follows, "" for none: then nothing is
	// answered so.
	Prefix string
	// Ignore are parameters of a URL's query that sign it and say nothing of what it
	// is: the origin gets them, and one content has one name without them. Hosts
	// with different ones do not share what they take from signed URLs.
	Ignore []string
}

// signatures are the parameters of the object stores in use that change from one
// signature of a URL to the next. Each name is one that says nothing of a content
// elsewhere either.
var signatures = []string{
	"X-Amz-*", "AWSAccessKeyId", "Signature", "Expires", "Key-Pair-Id", "Policy", // S3, CloudFront
	"X-Goog-*", "GoogleAccessId", // Google
	"se", "sig", "ske", "skt", // Azure
	"OSSAccessKeyId", "x-oss-*", "security-token", // Alibaba
	"q-sign-*", "q-ak", "q-key-time", "q-signature", "x-cos-security-token", // Tencent
}

var prefixForm = regexp.MustCompile(`^(/[A-Za-z0-9._~-]+)+/$`)

func (c URLConfig) validate() error {
	switch {
	case c.Prefix == "":
	case !prefixForm.MatchString(c.Prefix) || strings.HasPrefix(c.Prefix, "/v2/"):
		return fmt.Errorf("url-prefix %q: want a path such as /p2p/, other than /v2/", c.Prefix)
	}
	for _, name := range c.Ignore {
		if strings.Trim(name, "*") == "" {
			return fmt.Errorf("url-ignore %q: want the name of a parameter, or how names begin and *", name)
		}
	}
	return nil
}

// behind returns the URL that a request names after the prefix, nil where it has
// another path.
func (c URLConfig) behind(r *http.Request) (*url.URL, error) {
	raw, ok := strings.CutPrefix(r.URL.EscapedPath(), c.Prefix)
	if !ok || c.Prefix == "" {
		return nil, nil
	}
	for _, scheme := range []string{"http:/", "https:/"} { // some make one slash of two
		if rest, ok := strings.CutPrefix(raw, scheme); ok && !strings.HasPrefix(rest, "/") {
			raw = scheme + "/" + rest
		}
	}
	if r.URL.RawQuery != "" {
		raw += "?" + r.URL.RawQuery
	}
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil { // never quoted: it may be signed
		return nil, &registryproxy.Error{
			Status: http.StatusBadRequest, Code: registryproxy.CodeUnsupported,
			Message: "after " + c.Prefix + " comes a whole URL without credentials, such as " + c.Prefix + "https://host/path",
		}
	}
	return u, nil
}

// named answers a request for a whole URL; false when it is for something else.
func (m *mirror) named(c *gin.Context) bool {
	u, err := m.urls.behind(c.Request)
	if u == nil && err == nil {
		return false
	}
	w, r := newReply(c), c.Request
	defer w.extend(0)
	if err == nil {
		err = m.read(w, r, u)
	}
	if ours, ok := errors.AsType[*registryproxy.Error](err); ok {
		registryproxy.WriteError(w, ours)
	} else if err != nil {
		badGateway(w, err)
	}
	return true
}

// read answers with what u names: a blob or a manifest of a registry as such, so
// that all who pull it share it, and anything else by its URL. An error is one of
// which nothing has been answered.
func (m *mirror) read(w *reply, r *http.Request, u *url.URL) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return &registryproxy.Error{Status: http.StatusMethodNotAllowed, Code: registryproxy.CodeUnsupported, Message: "what a URL names is only read here"}
	}
	if m.pull(w, r, u) {
		return nil
	}
	if !api.OfThisHost(r) { // wherever the mirror listens, it is no open relay
		return &registryproxy.Error{Status: http.StatusForbidden, Code: "DENIED", Message: "whole URLs are read for programs of this host alone"}
	}
	if !mayReach(m.ports, hostOf(u.Host, u.Scheme)) {
		return &registryproxy.Error{Status: http.StatusForbidden, Code: "DENIED", Message: "this port is not one of proxy-ports"}
	}
	request, err := urlRequest(r, u, m.urls.Ignore)
	if err != nil {
		return &registryproxy.Error{Status: http.StatusBadRequest, Code: registryproxy.CodeUnsupported, Message: err.Error()}
	}
	return m.url(w, r, request, r.Header)
}

// pull answers with the blob or manifest of a registry that u names; false when it
// names none, would be asked for less safely, or may be signed by its query, and
// nothing has been answered.
func (m *mirror) pull(w *reply, r *http.Request, u *url.URL) bool {
	path, ok := strings.CutPrefix(u.Path, "/v2/")
	if !ok || u.RawQuery != "" || !m.registry.Reaches(u) {
		return false
	}
	route, err := registryproxy.ParseRoute(r.Method, path, u.Host, "")
	if err != nil || route.Kind != registryproxy.KindBlob && route.Kind != registryproxy.KindManifest {
		return false
	}
	m.handle(w, r, route, nil)
	return true
}

// url answers with what a URL names. An error is one of which nothing has been
// answered.
func (m *mirror) url(w *reply, r *http.Request, request dfget.Request, asked http.Header) error {
	if u, err := url.Parse(request.Origin.URL); err == nil {
		request = request.Over(m.registry.TransportTo(u))
	}
	d := delivery{peer: m.peer, request: request, asked: asked, header: http.Header{"Content-Type": {octets}}, head: r.Method == http.MethodHead}
	err := d.serve(r.Context(), w)
	switch {
	case err == nil:
	case r.Context().Err() != nil || w.started():
		panic(http.ErrAbortHandler) // a part must not be taken for the whole
	case refusal(err) != nil: // without api.ErrorHeader: these are the origin's words
		refusal(err).Relay(w)
	default:
		m.log.Warn("neither the region nor the origin answers", zap.Error(err))
		return err
	}
	return nil
}

// ownHeaders are of the caller's connection, or of how the answer is to come:
// not of what is asked for.
var ownHeaders = []string{
	"Accept-Encoding", "Connection", "Content-Length", "Expect", "Host", "If-Match", "If-Modified-Since", "If-None-Match",
	"If-Range", "If-Unmodified-Since", "Keep-Alive", "Proxy-Authorization", "Proxy-Connection", "Range", "Te", "Trailer",
	"Transfer-Encoding", "Upgrade", "Via",
}

// urlRequest asks for what u names with the caller's header: any of it may be
// what lets the caller in.
func urlRequest(r *http.Request, u *url.URL, ignore []string) (dfget.Request, error) {
	header := r.Header.Clone()
	for k := range strings.SplitSeq(strings.Join(r.Header["Connection"], ","), ",") {
		header.Del(strings.TrimSpace(k))
	}
	for _, k := range ownHeaders {
		header.Del(k)
	}
	return dfget.SignedURLRequest(u.String(), ignore, header)
}
