package dfdaemon

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func FuzzSetNextPage(f *testing.F) {
	f.Add("/v2/org/app/tags/list?n=2", `</v2/org/app/tags/list?last=b&n=2>; rel="next"`)
	f.Add("/v2/org/app/tags/list?ns=a.test", `<https://b.test/x?last=%zz&ns=c>; rel="next"`)
	f.Add("/v2/%2F%3F/tags/list", `<?a;b>`)
	f.Add("/v2/a", `>`)
	f.Fuzz(func(t *testing.T, target, link string) {
		u, err := url.Parse(target)
		if err != nil || u.Host != "" || u.Opaque != "" || !strings.HasPrefix(u.Path, "/v2/") {
			return
		}
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		r.URL = u
		h := http.Header{"Link": {link}}
		setNextPage(h, r, link)
		next := h.Get("Link")
		if next == "" {
			return
		}
		inside, _, ok := strings.Cut(strings.TrimPrefix(next, "<"), ">")
		require.True(t, ok)
		back, err := url.Parse(inside)
		require.NoError(t, err)
		require.Empty(t, back.Host)
		require.Equal(t, u.Path, back.Path)
		require.Equal(t, u.Query().Get("ns"), back.Query().Get("ns"))
	})
}
