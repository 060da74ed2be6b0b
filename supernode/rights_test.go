package supernode

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// asked sends a request from an address, and returns what came.
func (r *testRegion) asked(method, path, from, token string) *httptest.ResponseRecorder {
	r.t.Helper()
	q := httptest.NewRequestWithContext(r.t.Context(), method, path, nil)
	q.RemoteAddr, q.Host = from, "127.0.0.1:8002"
	if token != "" {
		q.Header.Set("Authorization", "Bearer "+token)
	}
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, q)
	return w
}

const (
	near = "127.0.0.1:1000"
	afar = "10.0.0.9:1000"
)

// Who has no token may look from the machine itself, where there are no tokens;
// a token gives what its role says, as long as its line is there.
func TestRights(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, []byte("a blob"))
	shut := start(t, h, t.TempDir(), nil)
	for path, want := range map[string]int{"/v1/tasks": 200, "/v1/hosts": 200, "/metrics": 200, "/healthz": 200} {
		require.Equal(t, want, shut.asked("GET", path, near, "").Code, path)
	}
	for path, want := range map[string]int{"/v1/tasks": 403, "/v1/hosts": 403, "/metrics": 200, "/healthz": 200, "/readyz": 200} {
		require.Equal(t, want, shut.asked("GET", path, afar, "").Code, path)
	}
	page := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://rebound.test/v1/tasks", nil)
	page.RemoteAddr = near
	w := httptest.NewRecorder()
	shut.Handler().ServeHTTP(w, page)
	require.Equal(t, 403, w.Code, "of a web page whose name leads here")
	require.Equal(t, 403, shut.asked("DELETE", "/v1/tasks/"+d, near, "").Code)

	reader, readLine, err := NewToken("ci", RoleRead)
	require.NoError(t, err)
	admin, adminLine, err := NewToken("ops@corp", RoleAdmin)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "tokens")
	write := func(lines ...string) {
		require.NoError(t, os.WriteFile(file, []byte("# who may\n\n"+strings.Join(lines, "\n")+"\n"), 0o600))
	}
	write(readLine, adminLine)
	r := start(t, h, t.TempDir(), func(c *Config) { c.Tokens, c.ProtectMetrics = file, true })
	require.Equal(t, 200, r.get(http.MethodGet, v2("blobs", d)).status)
	require.Eventually(t, func() bool { return r.metric("damselfly_origin_fetches_in_flight") == 0 }, wait, poll)
	require.Eventually(t, func() bool { return r.origin.find(pieces.TaskID(d)) == nil }, wait, poll)
	for _, c := range []struct {
		method, path, token string
		want                int
		code                string
	}{
		{"GET", "/v1/tasks", "", 401, api.CodeUnauthorized},
		{"GET", "/v1/hosts", "", 401, api.CodeUnauthorized},
		{"GET", "/metrics", "", 401, api.CodeUnauthorized},
		{"GET", "/v1/tasks", "dmf_" + strings.Repeat("A", 43), 401, api.CodeUnauthorized},
		{"GET", "/v1/tasks", strings.Repeat("A", 1000), 401, api.CodeUnauthorized},
		{"GET", "/v1/tasks", strings.Fields(readLine)[2], 401, api.CodeUnauthorized},
		{"GET", "/v1/tasks", reader, 200, ""},
		{"GET", "/v1/tasks", admin, 200, ""},
		{"GET", "/metrics", reader, 200, ""},
		{"GET", "/healthz", "", 200, ""},
		{"DELETE", "/v1/tasks/" + d, "", 401, api.CodeUnauthorized},
		{"DELETE", "/v1/tasks/" + d, reader, 403, api.CodeForbidden},
		{"DELETE", "/v1/tasks/nonsense", admin, 400, api.CodeBadRequest},
		{"DELETE", "/v1/tasks/" + d, admin, 204, ""},
		{"DELETE", "/v1/tasks/" + d, admin, 404, api.CodeNotFound},
	} {
		w := r.asked(c.method, c.path, near, c.token)
		require.Equal(t, c.want, w.Code, c)
		require.Equal(t, c.code, w.Header().Get(api.ErrorHeader), c)
		require.Equal(t, c.want == 401, w.Header().Get("Www-Authenticate") != "", c)
		require.NotContains(t, w.Body.String(), "dmf_", c)
	}
	before := h.times("GET /v2/demo/app/blobs/")
	require.Equal(t, 200, r.get(http.MethodGet, v2("blobs", d)).status)
	require.Equal(t, before+1, h.times("GET /v2/demo/app/blobs/"), "it was not forgotten")

	write(adminLine)
	require.Equal(t, 401, r.asked("GET", "/v1/tasks", near, reader).Code, "its line is gone")
	require.NoError(t, os.WriteFile(file, []byte("half a li"), 0o600))
	require.Equal(t, 200, r.asked("GET", "/v1/tasks", near, admin).Code, "those of before count")
	require.NoError(t, os.Remove(file))
	require.Equal(t, 401, r.asked("GET", "/v1/tasks", near, admin).Code, "without the file nobody may")
}

func TestTokens(t *testing.T) {
	for _, name := range []string{"", "a b", "-a", "a\nb", strings.Repeat("a", 65)} {
		_, _, err := NewToken(name, RoleRead)
		require.Error(t, err, name)
	}
	_, _, err := NewToken("a", "root")
	require.ErrorContains(t, err, "want read or admin")
	_, err = openRights(filepath.Join(t.TempDir(), "none"), zap.NewNop())
	require.ErrorContains(t, err, "tokens: ")
	c := Default()
	c.ProtectMetrics = true
	require.ErrorContains(t, c.Validate(), "protect-metrics")
}

func FuzzTokens(f *testing.F) {
	_, line, err := NewToken("a", RoleAdmin)
	require.NoError(f, err)
	for _, s := range []string{"", "# x\n", line, line + "\n" + line + "\n", "a read", "a read zz", "a root " + strings.Repeat("0", 64)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseTokens(b)
		if err != nil {
			require.Nil(t, all)
			for word := range strings.FieldsSeq(string(b)) {
				if len(word) > 20 {
					require.NotContains(t, err.Error(), word)
				}
			}
			return
		}
		for _, h := range all {
			require.Regexp(t, holderForm, h.name)
			require.Contains(t, []Role{RoleRead, RoleAdmin}, h.role)
		}
	})
}

// A file of tokens that is gone is told of once, and again when that changes.
func TestLostTokensAreToldOfOnce(t *testing.T) {
	core, logs := observer.New(zap.ErrorLevel)
	_, line, err := NewToken("ci", RoleRead)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "tokens")
	write := func() { require.NoError(t, os.WriteFile(file, []byte(line+"\n"), 0o600)) }
	write()
	g, err := openRights(file, zap.New(core))
	require.NoError(t, err)
	for i := range 3 {
		require.NoError(t, os.Remove(file))
		for range 5 {
			_, ok := g.holder("x")
			require.False(t, ok)
		}
		require.Len(t, logs.All(), i+1)
		write()
		g.holder("x")
	}
}
