package registryproxy

import (
	"mime"
	"net/http"
	"net/url"
	"strings"
)

// NextPage returns the Link that leads from r, which asked a mirror for a page of
// a list, to the next one there; "" where the registry, in links, names none. Of
// the registry's own target only the query is used, since engines come back
// through the mirror, in the namespace they have named.
func NextPage(r *http.Request, links []string) string {
	target, ok := nextLink(links)
	if !ok {
		return ""
	}
	u, err := url.Parse(target)
	if err != nil {
		return ""
	}
	q := u.Query()
	q.Del("ns")
	if ns := r.URL.Query().Get("ns"); ns != "" {
		q.Set("ns", ns)
	}
	here := url.URL{Path: r.URL.Path, RawQuery: q.Encode()}
	return "<" + here.String() + `>; rel="next"`
}

// nextLink returns the target of the first link whose relation is "next".
func nextLink(lines []string) (target string, ok bool) {
	for _, line := range lines {
		for {
			_, rest, found := strings.Cut(line, "<")
			target, rest, closed := strings.Cut(rest, ">")
			if !found || !closed {
				break
			}
			var params string
			params, line = cutParams(rest)
			if _, p, err := mime.ParseMediaType("link" + params); err == nil {
				for rel := range strings.FieldsSeq(p["rel"]) {
					if strings.EqualFold(rel, "next") {
						return target, true
					}
				}
			}
		}
	}
	return "", false
}

// cutParams cuts a link's parameters from the links after it, at the first comma
// that is not quoted.
func cutParams(s string) (params, rest string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && quoted:
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ',' && !quoted:
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}
