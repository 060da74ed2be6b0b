package registryproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
)

// Codes of the distribution specification that a mirror gives by itself.
const (
	CodeDigestInvalid   = "DIGEST_INVALID"
	CodeManifestUnknown = "MANIFEST_UNKNOWN"
	CodeNameInvalid     = "NAME_INVALID"
	CodeNameUnknown     = "NAME_UNKNOWN"
	CodeUnsupported     = "UNSUPPORTED"
)

// Error is an answer in the form that the distribution specification gives
// errors. Message is for people and holds nothing secret.
type Error struct {
	Status  int
	Code    string
	Message string
}

// Error returns the code and the message.
func (e *Error) Error() string { return e.Code + ": " + e.Message }

// WriteError answers with e. No cache may keep the answer.
func WriteError(w http.ResponseWriter, e *Error) {
	type item struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, _ := json.Marshal(map[string][]item{"errors": {{e.Code, e.Message}}}) // strings always marshal
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	if e.Status == http.StatusMethodNotAllowed {
		h.Set("Allow", "GET, HEAD")
	}
	w.WriteHeader(e.Status)
	_, _ = w.Write(body) // whoever went away needs no answer
}

// maxRefusal is how much of a refusal's body is kept.
const maxRefusal = 64 << 10

// refusalHeaders are what an engine needs to know of a refusal.
var refusalHeaders = []string{
	"Content-Range", "Content-Type", "Docker-Distribution-Api-Version", "Docker-Ratelimit-Source",
	"Ratelimit-Limit", "Ratelimit-Policy", "Ratelimit-Remaining", "Ratelimit-Reset", "Retry-After", "Www-Authenticate",
}

// Refusal is an answer of 400 and above, as the registry gave it: its status,
// the headers an engine needs and at most 64 KiB of its body.
type Refusal struct {
	Status int
	Header http.Header
	Body   []byte

	// redirected: it is not the registry that answered but whom it named.
	redirected bool
}

func newRefusal(status int, header http.Header, redirected bool) *Refusal {
	r := &Refusal{Status: status, Header: http.Header{}, redirected: redirected}
	for _, k := range refusalHeaders {
		if v := header[k]; len(v) > 0 {
			r.Header[k] = slices.Clone(v)
		}
	}
	if redirected { // an engine must not log in wherever a redirect leads
		r.Header.Del("Www-Authenticate")
	}
	return r
}

// Error returns the status, and nothing that the registry wrote.
func (r *Refusal) Error() string {
	return fmt.Sprintf("the registry answered %d %s", r.Status, http.StatusText(r.Status))
}

// Relay answers as the registry did.
func (r *Refusal) Relay(w http.ResponseWriter) {
	h := w.Header()
	for k, v := range r.Header {
		h[k] = slices.Clone(v)
	}
	h.Set("Content-Length", strconv.Itoa(len(r.Body)))
	w.WriteHeader(r.Status)
	_, _ = w.Write(r.Body) // whoever went away needs no answer
}

// Final tells the registry's own no, which is the caller's answer, from
// trouble: a server's failure, a time-out, or an object store that declines the
// URL which the registry has signed.
func (r *Refusal) Final() bool {
	if r.Status >= 500 {
		return r.Limited()
	}
	switch r.Status {
	case http.StatusNotFound, http.StatusGone, http.StatusTooManyRequests, http.StatusUnavailableForLegalReasons:
		return true
	case http.StatusProxyAuthRequired, http.StatusRequestTimeout, http.StatusMisdirectedRequest, http.StatusTooEarly:
		return false
	}
	return !r.redirected
}

// denies tells whether the registry wants other credentials.
func (r *Refusal) denies() bool {
	return !r.redirected && (r.Status == http.StatusUnauthorized || r.Status == http.StatusForbidden)
}

// UpstreamError is a request that got no usable answer. It never quotes a URL
// or a header. Temporary tells whether the same request may do better later.
type UpstreamError struct {
	Registry  string
	Temporary bool
	Err       error
}

// Error names the registry and what went wrong.
func (e *UpstreamError) Error() string { return "registry " + e.Registry + ": " + e.Err.Error() }

// Unwrap returns what went wrong.
func (e *UpstreamError) Unwrap() error { return e.Err }

// IsTemporary tells whether the request behind err may do better later: a
// broken connection, a stall, a truncated or damaged body, a server's failure.
func IsTemporary(err error) bool {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return !r.Final()
	}
	e, ok := errors.AsType[*UpstreamError](err)
	return ok && e.Temporary
}
