package registryproxy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// tokenRegistry is a registry at reg.test with a token server at auth.test.
// Repositories below "private/" are for alice.
type tokenRegistry struct {
	mu     sync.Mutex
	scope  map[string]string // what the token is for
	until  map[string]time.Time
	issued int
	asked  int // requests to the registry

	life   int              // seconds, as the token server says
	broken http.HandlerFunc // instead of the token server
	realm  string
}

func newTokenRegistry(n *network) *tokenRegistry {
	tr := &tokenRegistry{scope: map[string]string{}, until: map[string]time.Time{}, life: 300, realm: "https://auth.test/token?x=y"}
	n.handle("reg.test:443", tr.registry)
	n.handle("auth.test:443", tr.server)
	n.handle("auth.test:80", tr.server)
	return tr
}

func (tr *tokenRegistry) registry(w http.ResponseWriter, r *http.Request) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.asked++
	repo := strings.TrimPrefix(r.URL.Path, "/v2/")
	for _, verb := range []string{"/manifests/", "/blobs/", "/tags/"} {
		repo, _, _ = strings.Cut(repo, verb)
	}
	scope := "repository:" + repo + ":pull"
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if tr.scope[token] != scope || time.Now().After(tr.until[token]) {
		challenge := fmt.Sprintf(`Bearer realm=%q,service="reg.test",scope=%q`, tr.realm, scope)
		if token != "" {
			challenge += `,error="insufficient_scope"`
		}
		w.Header().Add("WWW-Authenticate", challenge)
		w.Header().Add("WWW-Authenticate", `Basic realm="reg.test"`)
		w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
		WriteError(w, &Error{401, "UNAUTHORIZED", "log in"})
		return
	}
	sourceOf("{}", "blob")(w, r)
}

func (tr *tokenRegistry) server(w http.ResponseWriter, r *http.Request) {
	tr.mu.Lock()
	tr.issued++
	tr.mu.Unlock()
	if tr.broken != nil {
		tr.broken(w, r) // without the mutex, on which no bubble can wait
		return
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	q := r.URL.Query()
	if r.Method != http.MethodGet || q.Get("x") != "y" || q.Get("service") != "reg.test" {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	token := fmt.Sprintf("token-%d", len(tr.scope))
	scope := q.Get("scope")
	if strings.HasPrefix(scope, "repository:private/") && r.Header.Get("Authorization") != alice {
		scope = "" // a token, though for nothing
	}
	tr.scope[token] = scope
	tr.until[token] = time.Now().Add(time.Duration(max(tr.life, 60)) * time.Second)
	answer := map[string]any{"access_token": token, "expires_in": tr.life}
	_ = json.NewEncoder(w).Encode(answer)
}

// counts returns what was asked since the last call.
func (tr *tokenRegistry) counts() (asked, issued int) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	asked, issued = tr.asked, tr.issued
	tr.asked, tr.issued = 0, 0
	return asked, issued
}

var public = Repository{"reg.test", "library/app"}

func TestAnonymousToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		tr := newTokenRegistry(net)
		c := net.client(Config{})
		read := func(repo Repository) {
			t.Helper()
			m, err := c.Manifest(t.Context(), false, repo, "latest", nil, Caller{})
			require.NoError(t, err)
			require.Equal(t, "{}", string(m.Body))
		}
		want := func(asked, issued int) {
			t.Helper()
			a, i := tr.counts()
			require.Equal(t, []int{asked, issued}, []int{a, i}, "requests to the registry and to the token server")
		}
		read(public)
		want(2, 1)
		b, err := c.Blob(t.Context(), public, digestOf("blob"), 1, Caller{})
		require.NoError(t, err)
		got, err := io.ReadAll(b)
		require.NoError(t, err)
		require.Equal(t, "lob", string(got))
		want(1, 0)
		read(Repository{"reg.test", "library/other"})
		want(2, 1)

		<-time.After(289 * time.Second)
		read(public)
		want(1, 0)
		<-time.After(2 * time.Second) // its last ten seconds are not used
		read(public)
		want(2, 1)

		tr.mu.Lock() // all tokens are revoked
		clear(tr.until)
		tr.mu.Unlock()
		read(public)
		want(3, 1)
		require.Zero(t, c.logs.Len())
		require.Equal(t, 4, c.count("token", resultOK))
	})
}

// Many who ask at the same moment share one token.
func TestTokenIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		tr := newTokenRegistry(net)
		c := net.client(Config{})
		gone, leave := context.WithCancel(t.Context())
		tr.broken = func(w http.ResponseWriter, _ *http.Request) {
			leave()
			<-time.After(time.Second)
			tr.mu.Lock()
			tr.scope["late"], tr.until["late"] = "repository:library/app:pull", time.Now().Add(time.Hour)
			tr.mu.Unlock()
			_, _ = io.WriteString(w, `{"token":"late"}`)
		}
		var wg sync.WaitGroup
		for i := range 20 {
			ctx := t.Context()
			if i == 0 {
				ctx = gone
			} else {
				synctest.Wait() // the first has left
			}
			wg.Go(func() {
				_, err := c.HeadBlob(ctx, public, digestOf("blob"), Caller{})
				if i == 0 {
					require.ErrorIs(t, err, context.Canceled)
					require.False(t, IsTemporary(err))
				} else {
					require.NoError(t, err)
				}
			})
		}
		wg.Wait()
		_, issued := tr.counts()
		require.Equal(t, 1, issued)
	})
}

// Who asked for a token while another was getting it takes that.
func TestTokenOfAMomentAgo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		tr := newTokenRegistry(net)
		first := true
		net.handle("reg.test:443", func(w http.ResponseWriter, r *http.Request) {
			if first {
				first = false
				<-time.After(time.Second)
			}
			tr.registry(w, r)
		})
		c := net.client(Config{})
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				_, err := c.HeadBlob(t.Context(), public, digestOf("blob"), Caller{})
				require.NoError(t, err)
			})
			synctest.Wait()
		}
		wg.Wait()
		asked, issued := tr.counts()
		require.Equal(t, []int{4, 1}, []int{asked, issued})
	})
}

// An object store's no to a signed URL says nothing against the token.
func TestTokenAndRedirect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		tr := newTokenRegistry(net)
		net.handle("store.test:443", store)
		net.handle("reg.test:443", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") == "" {
				tr.registry(w, r)
				return
			}
			http.Redirect(w, r, "https://store.test/?signature=old", http.StatusTemporaryRedirect)
		})
		c := net.client(Config{})
		for range 2 {
			_, err := c.Blob(t.Context(), public, digestOf("blob"), 0, Caller{})
			require.Equal(t, 403, refusalOf(t, err).Status)
			require.True(t, IsTemporary(err))
		}
		asked, issued := tr.counts()
		require.Equal(t, []int{1, 1}, []int{asked, issued})
	})
}

// When an anonymous token cannot be had or does not do, the registry's first
// answer is the answer: with its challenge an engine can log in by itself.
func TestOriginalChallenge(t *testing.T) {
	private := Repository{"reg.test", "private/app"}
	body := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, s) }
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	tests := map[string]struct {
		repo   Repository
		realm  string
		broken http.HandlerFunc
		quiet  bool // nothing to be logged
	}{
		"token for nothing":    {repo: private, quiet: true},
		"token server refuses": {repo: public, broken: status(403)},
		"token server is ill":  {repo: public, broken: status(500)},
		"token server stalls":  {repo: public, broken: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }},
		"no token":             {repo: public, broken: body(`{}`)},
		"no JSON":              {repo: public, broken: body(`<html>`)},
		"endless answer":       {repo: public, broken: body(`{"token":"` + strings.Repeat("x", 1<<20) + `"}`)},
		"header in the token":  {repo: public, broken: body(`{"token":"x\r\nHost: evil"}`)},
		"token server drips":   {repo: public, broken: drip},
		"realm on plain HTTP":  {repo: public, realm: "http://auth.test/token?x=y"},
		"realm leads to plain": {repo: public, broken: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://auth.test/", http.StatusFound)
		}},
		"realm is no URL":   {repo: public, realm: "::"},
		"realm is relative": {repo: public, realm: "/token"},
		"realm is nowhere":  {repo: public, realm: "https://nowhere.test/token"},
		"realm is missing":  {repo: public, realm: "-", quiet: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := newNetwork(t)
				tr := newTokenRegistry(net)
				tr.broken = tt.broken
				switch tt.realm {
				case "":
				case "-":
					tr.realm = ""
				default:
					tr.realm = tt.realm
				}
				c := net.client(Config{})
				_, err := c.Manifest(t.Context(), false, tt.repo, "latest", nil, Caller{})
				r := refusalOf(t, err)
				require.True(t, r.Final())
				require.Equal(t, 401, r.Status)
				require.Equal(t, []string{
					fmt.Sprintf(`Bearer realm=%q,service="reg.test",scope="repository:%s:pull"`, tr.realm, tt.repo.Name),
					`Basic realm="reg.test"`,
				}, r.Header["Www-Authenticate"])
				require.Equal(t, "registry/2.0", r.Header.Get("Docker-Distribution-Api-Version"))
				require.JSONEq(t, `{"errors":[{"code":"UNAUTHORIZED","message":"log in"}]}`, string(r.Body))
				require.Equal(t, tt.quiet, c.logs.Len() == 0)

				asked, _ := tr.counts()
				_, err = c.Manifest(t.Context(), false, tt.repo, "latest", nil, Caller{})
				require.Equal(t, r, err)
				again, _ := tr.counts()
				require.Equal(t, asked, again, "what did not do the first time is not tried again")
			})
		})
	}
}

// drip gives a byte every second, without an end.
func drip(w http.ResponseWriter, r *http.Request) {
	for {
		_, _ = io.WriteString(w, " ")
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
			return
		case <-time.After(time.Second):
		}
	}
}

// A caller's own token opens what is its own, and none is got for it.
func TestCallersToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		tr := newTokenRegistry(net)
		c := net.client(Config{})
		private := Repository{"reg.test", "private/app"}
		tr.scope["hers"], tr.until["hers"] = "repository:private/app:pull", time.Now().Add(time.Hour)
		_, err := c.Manifest(t.Context(), false, private, "latest", nil, Caller{"Bearer hers"})
		require.NoError(t, err)
		_, err = c.Manifest(t.Context(), false, private, "latest", nil, Caller{"Bearer his"})
		require.Contains(t, refusalOf(t, err).Header.Get("Www-Authenticate"), "insufficient_scope")
		asked, issued := tr.counts()
		require.Equal(t, []int{2, 0}, []int{asked, issued})
	})
}

func TestReadToken(t *testing.T) {
	tests := map[string]struct {
		body string
		want string
		life time.Duration
	}{
		"token":        {`{"token":"a"}`, "Bearer a", 50 * time.Second},
		"access token": {`{"access_token":"b","expires_in":300}`, "Bearer b", 290 * time.Second},
		"both":         {`{"token":"a","access_token":"b","expires_in":100.5}`, "Bearer a", 90500 * time.Millisecond},
		"short life":   {`{"token":"a","expires_in":1}`, "Bearer a", 50 * time.Second},
		"no life":      {`{"token":"a","expires_in":-1}`, "Bearer a", 50 * time.Second},
		"long life":    {`{"token":"a","expires_in":1e300}`, "Bearer a", time.Hour - 10*time.Second},
		"none":         {`{}`, "", 0},
		"empty":        {``, "", 0},
		"a space":      {`{"token":"a b"}`, "", 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, life, err := readToken([]byte(tt.body))
			require.Equal(t, tt.want == "", err != nil)
			require.Equal(t, tt.want, got)
			require.Equal(t, tt.life, life)
		})
	}
}

func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.test/token",service="s",scope="repository:a:pull"`, `{"token":"x","expires_in":60}`)
	f.Add(`Basic realm="x"`, `{"access_token":"x"}`)
	f.Add(`Bearer realm="\"`, `{"token":1}`)
	f.Fuzz(func(t *testing.T, header, body string) {
		if params, _ := wanted(http.Header{"Www-Authenticate": {header}}); params != nil && params["realm"] == "" {
			t.Fatal("a challenge without a realm")
		}
		token, life, err := readToken([]byte(body))
		if err == nil && (len(token) < len("Bearer x") || life < time.Second || life > time.Hour || strings.ContainsAny(token[7:], " \r\n\x00")) {
			t.Fatalf("token %q for %v", token, life)
		}
	})
}

// store is an object store at store.test which takes only its own signed URLs
// and nobody's credentials.
func store(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Header.Get("Authorization") != "" || r.Header.Get("Referer") != "":
		http.Error(w, "one credential too many", http.StatusBadRequest)
	case r.URL.Query().Get("signature") != "s3cr3t" || r.Method != http.MethodGet:
		w.Header().Set("WWW-Authenticate", `Bearer realm="https://evil.test/"`)
		http.Error(w, "the signature does not match", http.StatusForbidden)
	default:
		sourceOf("{}", "blob")(w, r)
	}
}

func TestRedirects(t *testing.T) {
	blob := digestOf("blob")
	to := func(url string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Location"] = []string{url}
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
	}
	tests := map[string]struct {
		routes map[string]http.HandlerFunc // by the path at reg.test, "" for all others
		err    string
		status int
		final  bool
	}{
		"to a store":       {routes: map[string]http.HandlerFunc{"": to("https://store.test/b/" + blob + "?signature=s3cr3t")}},
		"with credentials": {routes: map[string]http.HandlerFunc{"": to("https://user:pw@store.test/b/" + blob + "?signature=s3cr3t#x")}},
		"relative, then away": {routes: map[string]http.HandlerFunc{
			"":      to("/step?a=b"),
			"/step": to("//store.test/b/" + blob + "?signature=s3cr3t"),
		}},
		"away and back": {routes: map[string]http.HandlerFunc{
			"": to("https://hop.test/back"),
			"/back": func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Authorization") != "" {
					w.WriteHeader(http.StatusBadRequest)
					return
				}
				to("https://store.test/b/"+blob+"?signature=s3cr3t")(w, r)
			},
		}},
		"to another port":   {routes: map[string]http.HandlerFunc{"": to("https://reg.test:8443/x")}},
		"bad signature":     {routes: map[string]http.HandlerFunc{"": to("https://store.test/b/" + blob + "?signature=old")}, status: 403},
		"nothing there":     {routes: map[string]http.HandlerFunc{"": to("https://store.test/b/" + sha256a + "?signature=s3cr3t")}, status: 404, final: true},
		"in circles":        {routes: map[string]http.HandlerFunc{"": to("/again?token=s3cr3t")}, err: "too many redirects"},
		"to plain HTTP":     {routes: map[string]http.HandlerFunc{"": to("http://store.test/?signature=s3cr3t")}, err: "from https to http"},
		"to a file":         {routes: map[string]http.HandlerFunc{"": to("file:///etc/passwd?s3cr3t")}, err: "a redirect leads"},
		"to a host of file": {routes: map[string]http.HandlerFunc{"": to("file://host/etc/passwd?s3cr3t")}, err: "a redirect leads from https to file"},
		"to nowhere":        {routes: map[string]http.HandlerFunc{"": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusFound) }}, err: "leads nowhere"},
		"to nonsense":       {routes: map[string]http.HandlerFunc{"": to("https://[s3cr3t")}, err: "leads nowhere"},
		"not a redirect":    {routes: map[string]http.HandlerFunc{"": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotModified) }}, err: "status 304"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := newNetwork(t)
				serve := func(w http.ResponseWriter, r *http.Request) {
					if h, ok := tt.routes[r.URL.Path]; ok {
						h(w, r)
						return
					}
					if r.Header.Get("Authorization") != alice {
						t.Errorf("%s without the caller's credentials", r.URL.Path)
					}
					tt.routes[""](w, r)
				}
				net.handle("reg.test:443", serve)
				net.handle("store.test:443", store)
				net.handle("reg.test:8443", func(w http.ResponseWriter, r *http.Request) {
					if r.Header.Get("Authorization") != "" {
						t.Error("credentials at another port")
					}
					to("https://store.test/b/"+blob+"?signature=s3cr3t")(w, r)
				})
				net.handle("hop.test:443", func(w http.ResponseWriter, r *http.Request) {
					if r.Header.Get("Authorization") != "" {
						t.Error("credentials at another host")
					}
					to("https://reg.test"+r.URL.Path)(w, r)
				})
				c := net.client(Config{})
				b, err := c.Blob(t.Context(), public, blob, 1, Caller{alice})
				switch {
				case tt.status != 0:
					r := refusalOf(t, err)
					require.Equal(t, tt.status, r.Status)
					require.Equal(t, tt.final, r.Final())
					require.Equal(t, !tt.final, IsTemporary(err))
					require.Empty(t, r.Header.Values("Www-Authenticate"), "a challenge of another host")
				case tt.err != "":
					require.ErrorContains(t, err, tt.err)
					require.NotContains(t, err.Error(), "s3cr3t")
				default:
					require.NoError(t, err)
					got, err := io.ReadAll(b)
					require.NoError(t, err)
					require.NoError(t, b.Close())
					require.Equal(t, "lob", string(got))
				}
			})
		})
	}
}
