package registryproxy

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/docker/distribution/registry/client/auth/challenge"
	"github.com/stretchr/testify/require"
)

func TestChallenges(t *testing.T) {
	hub := map[string]string{"realm": "https://auth.docker.io/token", "service": "registry.docker.io", "scope": "repository:library/alpine:pull,push"}
	tests := map[string]struct {
		lines  []string
		bearer map[string]string
		basic  bool
	}{
		"hub":                    {lines: []string{`Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/alpine:pull,push"`}, bearer: hub},
		"with spaces":            {lines: []string{`BEARER  realm="https://auth.docker.io/token" ,  service=registry.docker.io,	scope="repository:library/alpine:pull,push"`}, bearer: hub},
		"basic":                  {lines: []string{`Basic realm="x, y"`}, basic: true},
		"two lines":              {lines: []string{`Basic realm=x`, `Bearer realm=y`}, bearer: map[string]string{"realm": "y"}, basic: true},
		"one line":               {lines: []string{`Basic realm="a, Bearer realm=b", Bearer realm="y",service="z"`}, bearer: map[string]string{"realm": "y", "service": "z"}, basic: true},
		"one line, other order":  {lines: []string{`Bearer realm="y",service="z",Basic realm="x"`}, bearer: map[string]string{"realm": "y", "service": "z"}, basic: true},
		"a scheme alone":         {lines: []string{`Negotiate, NTLM,Basic realm="x"`}, basic: true},
		"a quote in a parameter": {lines: []string{`Bearer realm="a\", Basic b",service="c"`}, bearer: map[string]string{"realm": `a", Basic b`, "service": "c"}},
		"the first of two":       {lines: []string{`Bearer realm="a"`, `Bearer realm="b"`}, bearer: map[string]string{"realm": "a"}},
		"no realm":               {lines: []string{`Bearer service="a"`}},
		"none":                   {},
		"nonsense":               {lines: []string{`,,, "=`, ``, `"`, `Bearer`, `Bearer realm=`}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			bearer, basic := wanted(http.Header{"Www-Authenticate": tt.lines})
			require.Equal(t, tt.bearer, bearer)
			require.Equal(t, tt.basic, basic)
		})
	}
	many := slices.Repeat([]string{`Basic realm="x"`}, 1000)
	require.Len(t, Challenges(http.Header{"Www-Authenticate": many}), maxChallenges)
}

// Nothing is lost or made up in the cutting, and a line with one challenge is read
// as docker's own client reads it.
func FuzzChallenges(f *testing.F) {
	for _, s := range []string{
		`Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/alpine:pull"`,
		`Basic realm="a, Bearer realm=b", Bearer realm="y",service="z"`, `Negotiate, NTLM,Basic realm="x"`, `Bearer realm="a\", Basic b",service="c"`,
		`Digest realm="x", qop="auth, auth-int", nonce=abc==, Basic realm=y`, `a="`, `, ,b c`, "Basic\trealm=\"\\",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		parts := splitChallenges(line)
		kept := strings.NewReplacer(",", "", " ", "", "\t", "")
		if squeezed := kept.Replace(strings.Join(parts, "")); squeezed != kept.Replace(line) &&
			!strings.ContainsFunc(line, func(r rune) bool { return r > '~' || r < ' ' }) {
			t.Fatalf("%q has become %q", line, parts)
		}
		got := Challenges(http.Header{"Www-Authenticate": {line}})
		for _, ch := range got {
			if ch.Scheme == "" || ch.Scheme != strings.ToLower(ch.Scheme) {
				t.Fatalf("scheme %q", ch.Scheme)
			}
		}
		if len(parts) != 1 || strings.TrimSpace(line) != line {
			return
		}
		twin := challenge.ResponseChallenges(&http.Response{StatusCode: http.StatusUnauthorized, Header: http.Header{"Www-Authenticate": {line}}})
		if !slices.EqualFunc(got, twin, func(a, b challenge.Challenge) bool {
			return a.Scheme == b.Scheme && maps.Equal(a.Parameters, b.Parameters)
		}) {
			t.Fatalf("%q: %v, and by the library %v", line, got, twin)
		}
	})
}
