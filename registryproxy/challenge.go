package registryproxy

import (
	"net/http"
	"strings"

	"github.com/docker/distribution/registry/client/auth/challenge"
)

// maxChallenges is how many of them are looked at.
const maxChallenges = 16

// Challenges reads what a registry's 401 asks for. A line may hold several
// challenges, which the library takes for one.
func Challenges(header http.Header) []challenge.Challenge {
	var lines []string
	for _, line := range header["Www-Authenticate"] {
		lines = append(lines, splitChallenges(line)...)
	}
	return challenge.ResponseChallenges(&http.Response{
		StatusCode: http.StatusUnauthorized,
		Header:     http.Header{"Www-Authenticate": lines[:min(len(lines), maxChallenges)]},
	})
}

// splitChallenges cuts a line before each word that is a scheme: one that follows
// a comma, and is not a parameter's name.
func splitChallenges(line string) []string {
	var parts []string
	start, quoted := 0, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case c == ',' && !quoted && startsScheme(line[i+1:]):
			parts = append(parts, strings.TrimSpace(line[start:i]))
			start = i + 1
		}
	}
	return append(parts, strings.TrimSpace(line[start:]))
}

// startsScheme tells `Basic realm="x"` and `Negotiate` from `realm="x"`.
func startsScheme(s string) bool {
	s = strings.TrimLeft(s, " \t")
	end := strings.IndexAny(s, " \t=,\"")
	switch {
	case end < 0:
		return s != ""
	case end == 0 || s[end] == '=' || s[end] == '"':
		return false
	}
	rest := strings.TrimLeft(s[end:], " \t")
	return rest == "" || rest[0] != '='
}
