// Package registryproxy speaks the OCI distribution protocol at both its ends:
// it reads what engines ask of a mirror, and asks registries on their behalf.
package registryproxy

import (
	_ "crypto/sha512" // the algorithm behind sha512 digests
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Repository is where content lives: Registry is the host as engines name it
// ("docker.io", "localhost:5000"), Name the path below it ("library/nginx").
type Repository struct{ Registry, Name string }

// String returns "docker.io/library/nginx".
func (r Repository) String() string {
	if r.Name == "" {
		return r.Registry
	}
	return r.Registry + "/" + r.Name
}

// Kind is what a request asks for.
type Kind int

// The kinds of request. KindWrite is anything that would change the registry, or
// belongs to such a change.
const (
	KindPing Kind = iota
	KindManifest
	KindBlob
	KindTags
	KindReferrers
	KindWrite
)

var kindNames = [...]string{"ping", "manifest", "blob", "tags", "referrers", "write"}

// String returns the kind in lower case.
func (k Kind) String() string {
	if k < 0 || int(k) >= len(kindNames) {
		return "unknown"
	}
	return kindNames[k]
}

// Route is one request of the distribution protocol. Reference is the tag or
// digest of a manifest, and the digest of a blob or of referrers. A ping has no
// more than Repo.Registry, which is "" when nothing names one; a write has
// nothing but its kind.
type Route struct {
	Kind      Kind
	Repo      Repository
	Reference string
}

const maxName = 255 // bytes, for a registry or a repository name

var (
	nameElement = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$`)
	tagForm     = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	hostLabel   = regexp.MustCompile(`^[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?$`)
)

// ParseRoute reads a request: its method, its decoded path below /v2/ (one
// leading slash is allowed) and the value of its ns query parameter. Nothing
// of it needs to be clean. The registry is the one that ns names, else a first
// path element that looks like a host (it has a dot or a colon, or is
// localhost), else def. The error is an *Error.
func ParseRoute(method, path, ns, def string) (Route, error) {
	switch method {
	case http.MethodGet, http.MethodHead:
	case http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete:
		return Route{Kind: KindWrite}, nil
	default:
		return Route{}, &Error{http.StatusMethodNotAllowed, CodeUnsupported, "the method is not one of the distribution protocol"}
	}
	path = strings.TrimPrefix(path, "/")
	if path == "" {
		registry, err := pickRegistry(nil, ns, def)
		return Route{Kind: KindPing, Repo: Repository{Registry: registry}}, err
	}
	elems := strings.Split(path, "/")
	kind, name, ref := cutReference(elems)
	switch {
	case kind == KindWrite:
		return Route{Kind: KindWrite}, nil
	case name == nil:
		return Route{}, &Error{http.StatusNotFound, CodeUnsupported, "the path is not one of the distribution protocol"}
	}
	registry, err := pickRegistry(name, ns, def)
	if err != nil {
		return Route{}, err
	}
	if ns == "" && looksLikeHost(name) {
		name = name[1:]
	}
	r := Route{Kind: kind, Repo: Repository{Registry: registry, Name: strings.Join(name, "/")}, Reference: ref}
	if e := r.check(); e != nil {
		return Route{}, e
	}
	return r, nil
}

// cutReference splits a path into what it asks for, the elements of the
// repository's name (nil when it asks for nothing known) and the reference.
func cutReference(elems []string) (kind Kind, name []string, ref string) {
	n := len(elems)
	if n < 3 {
		return 0, nil, ""
	}
	if n > 3 && elems[n-3] == "blobs" && elems[n-2] == "uploads" {
		return KindWrite, nil, ""
	}
	name, ref = elems[:n-2], elems[n-1]
	switch elems[n-2] {
	case "manifests":
		return KindManifest, name, ref
	case "blobs":
		return KindBlob, name, ref
	case "referrers":
		return KindReferrers, name, ref
	case "tags":
		if ref == "list" {
			return KindTags, name, ""
		}
	}
	return 0, nil, ""
}

// pickRegistry returns the registry that a request is for; only a ping may be
// for none.
func pickRegistry(name []string, ns, def string) (string, error) {
	host := def
	switch {
	case ns != "":
		host = ns
	case looksLikeHost(name):
		host = name[0]
	}
	if host == "" && name == nil {
		return "", nil
	}
	if host == "" {
		return "", &Error{http.StatusNotFound, CodeNameUnknown, "the request names no registry, and there is no default one"}
	}
	registry, ok := canonicalRegistry(host)
	if !ok {
		return "", &Error{http.StatusBadRequest, CodeNameInvalid, "the registry's name is not a host or host:port"}
	}
	return registry, nil
}

// looksLikeHost tells whether a path begins with a registry. The last element
// is always part of the repository's name.
func looksLikeHost(name []string) bool {
	return len(name) > 1 && (strings.ContainsAny(name[0], ".:") || name[0] == "localhost")
}

// canonicalRegistry checks that s is a host name, an IPv4 address or an IPv6
// address in brackets, with or without a port, and returns the one form of its
// name: lower case, and docker.io for all that mean Docker Hub.
func canonicalRegistry(s string) (string, bool) {
	if len(s) > maxName {
		return "", false
	}
	s = strings.ToLower(s)
	host, port := s, ""
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.HasSuffix(s, "]") {
		host, port = s[:i], s[i+1:]
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
			return "", false
		}
	}
	if v6, ok := strings.CutPrefix(host, "["); ok {
		addr, err := netip.ParseAddr(strings.TrimSuffix(v6, "]"))
		return s, err == nil && addr.Is6() && addr.Zone() == "" && strings.HasSuffix(v6, "]")
	}
	for label := range strings.SplitSeq(host, ".") {
		if !hostLabel.MatchString(label) {
			return "", false
		}
	}
	switch s {
	case "index.docker.io", "registry-1.docker.io":
		s = "docker.io"
	}
	return s, true
}

// check tells what is wrong with a route that came from outside; nil if it is
// safe to be made a URL.
func (r Route) check() *Error {
	if canonical, ok := canonicalRegistry(r.Repo.Registry); !ok || canonical != r.Repo.Registry {
		return &Error{http.StatusBadRequest, CodeNameInvalid, "the registry's name is not a host or host:port"}
	}
	if r.Kind == KindPing {
		return nil
	}
	if !validName(r.Repo.Name) {
		return &Error{http.StatusBadRequest, CodeNameInvalid, "the repository's name is not valid"}
	}
	switch r.Kind {
	case KindManifest:
		if !strings.Contains(r.Reference, ":") {
			if !tagForm.MatchString(r.Reference) {
				return &Error{http.StatusNotFound, CodeManifestUnknown, "no manifest can have this tag"}
			}
			return nil
		}
	case KindBlob, KindReferrers:
	case KindTags:
		return nil
	default:
		return &Error{http.StatusMethodNotAllowed, CodeUnsupported, "a " + r.Kind.String() + " request is not a read"}
	}
	if digest.Digest(r.Reference).Validate() != nil {
		return &Error{http.StatusBadRequest, CodeDigestInvalid, "the digest is not valid"}
	}
	return nil
}

func validName(name string) bool {
	if len(name) > maxName {
		return false
	}
	for element := range strings.SplitSeq(name, "/") {
		if !nameElement.MatchString(element) {
			return false
		}
	}
	return true
}

// Path returns the path of a route from ParseRoute below a registry's root.
func (r Route) Path() string {
	switch r.Kind {
	case KindPing:
		return "/v2/"
	case KindTags:
		return "/v2/" + r.Repo.Name + "/tags/list"
	case KindManifest:
		return "/v2/" + r.Repo.Name + "/manifests/" + r.Reference
	case KindBlob:
		return "/v2/" + r.Repo.Name + "/blobs/" + r.Reference
	default:
		return "/v2/" + r.Repo.Name + "/referrers/" + r.Reference
	}
}
