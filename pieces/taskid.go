package pieces

import (
	"crypto/sha256"
	_ "crypto/sha512" // the algorithms behind sha384 and sha512 task ids
	"encoding/hex"
	"fmt"
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
