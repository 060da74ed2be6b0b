package pieces

import (
	"crypto/sha256"
	_ "crypto/sha512" // the algorithms behind sha384 and sha512 task ids
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// TaskID names one content: the content's own digest where it is known
// ("sha256:…", "sha384:…", "sha512:…"), else "url:" and the SHA-256 of the
// normalised URL in hex. A TaskID from ParseTaskID or URLTaskID is safe as a file name.
type TaskID string

const urlPrefix = "url:"

// ParseTaskID checks that s has one of the forms of a TaskID.
func ParseTaskID(s string) (TaskID, error) {
	if sum, ok := strings.CutPrefix(s, urlPrefix); ok {
		if b, err := hex.DecodeString(sum); err != nil || len(b) != sha256.Size || sum != strings.ToLower(sum) {
			return "", fmt.Errorf("task id %q: want url: and 64 lower-case hex digits", clip(s))
		}
		return TaskID(s), nil
	}
	if _, err := digest.Parse(s); err != nil {
		return "", fmt.Errorf("task id %q: want sha256:, sha384: or sha512: and a digest in hex", clip(s))
	}
	return TaskID(s), nil
}

// URLTaskID returns the id of the content behind a URL whose digest is not
// known. The caller has normalised the URL; equal strings are equal tasks.
func URLTaskID(normalised string) TaskID {
	sum := sha256.Sum256([]byte(normalised))
	return TaskID(urlPrefix + hex.EncodeToString(sum[:]))
}

// SignedURLTaskID is URLTaskID for a URL that may carry a signature: parameters of
// its query whose names match one of ignore are left out of the id. Names are
// compared without case, and "X-Amz-*" matches all that begin so. It returns also
// the names that were left out, which are part of the id: nobody can make an id
// that leaves out what others do not.
func SignedURLTaskID(normalised string, ignore []string) (id TaskID, without []string) {
	base, query, ok := strings.Cut(normalised, "?")
	if !ok {
		return URLTaskID(normalised), nil
	}
	var kept []string
	for param := range strings.SplitSeq(query, "&") {
		name, _, _ := strings.Cut(param, "=")
		name = strings.ToLower(name)
		switch {
		case !slices.ContainsFunc(ignore, func(pattern string) bool { return matches(name, strings.ToLower(pattern)) }):
			kept = append(kept, param)
		case !slices.Contains(without, name):
			without = append(without, name)
		}
	}
	if without == nil {
		return URLTaskID(normalised), nil
	}
	slices.Sort(without)
	return URLTaskID(base + "?" + strings.Join(kept, "&") + "#" + strings.Join(without, "&")), without
}

// matches tells whether a name is the pattern, or begins with it up to its "*".
func matches(name, pattern string) bool {
	prefix, open := strings.CutSuffix(pattern, "*")
	return name == pattern || open && strings.HasPrefix(name, prefix)
}

// Content returns the digest the whole content must have, or "" for the id of
// a URL, which says nothing about the bytes.
func (id TaskID) Content() digest.Digest {
	if strings.HasPrefix(string(id), urlPrefix) {
		return ""
	}
	return digest.Digest(id)
}

func clip(s string) string {
	if len(s) > 100 {
		return s[:100] + "…"
	}
	return s
}
