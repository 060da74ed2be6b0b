package registryproxy

import (
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/httprange"
)

// sent answers with a selection of content.
func sent(t *testing.T, s Selection, content string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	s.WriteHeader(w)
	require.NoError(t, s.Send(w, func(r ByteRange) error {
		_, err := io.WriteString(w, content[r.Offset:r.Offset+r.Length])
		return err
	}))
	require.Equal(t, strconv.Itoa(w.Body.Len()), w.Header().Get("Content-Length"))
	require.Equal(t, "bytes", w.Header().Get("Accept-Ranges"))
	return w
}

func TestSelection(t *testing.T) {
	const content, etag = "0123456789", `"sha256:aa"`
	for _, tt := range []struct {
		span, ifRange string
		status        int
		header, body  string
	}{
		{"", "", 200, "", content},
		{"bytes=2-3", "", 206, "bytes 2-3/10", "23"},
		{"bytes=2-3", etag, 206, "bytes 2-3/10", "23"},
		{"bytes=2-3", `"sha256:bb"`, 200, "", content},
		{"bytes=2-3", "Sat, 21 Nov 2026 15:00:00 GMT", 200, "", content},
		{"bytes=2-3,50-", "", 206, "bytes 2-3/10", "23"},
	} {
		s, err := Select(http.Header{"Range": {tt.span}, "If-Range": {tt.ifRange}}, etag, 10)
		require.NoError(t, err)
		w := sent(t, s, content)
		require.Equal(t, tt.status, w.Code)
		require.Equal(t, tt.header, w.Header().Get("Content-Range"))
		require.Equal(t, tt.body, w.Body.String())
		require.Equal(t, "application/octet-stream", w.Header().Get("Content-Type"))
	}
	_, err := Select(http.Header{"Range": {"bytes=10-"}}, etag, 10)
	require.ErrorIs(t, err, httprange.ErrOutside)
}

func TestSelectionOfSeveralRanges(t *testing.T) {
	const content = "0123456789"
	s, err := Select(http.Header{"Range": {"bytes=-2,0-0,3-5,44-"}}, "", 10)
	require.NoError(t, err)
	w := sent(t, s, content)
	require.Equal(t, 206, w.Code)
	require.Empty(t, w.Header().Get("Content-Range"))
	kind, params, err := mime.ParseMediaType(w.Header().Get("Content-Type"))
	require.NoError(t, err)
	require.Equal(t, "multipart/byteranges", kind)
	parts := multipart.NewReader(w.Body, params["boundary"])
	for _, want := range [][2]string{{"bytes 8-9/10", "89"}, {"bytes 0-0/10", "0"}, {"bytes 3-5/10", "345"}} {
		p, err := parts.NextPart()
		require.NoError(t, err)
		require.Equal(t, want[0], p.Header.Get("Content-Range"))
		require.Equal(t, "application/octet-stream", p.Header.Get("Content-Type"))
		b, err := io.ReadAll(p)
		require.NoError(t, err)
		require.Equal(t, want[1], string(b))
	}
	_, err = parts.NextPart()
	require.ErrorIs(t, err, io.EOF)

	again, err := Select(http.Header{"Range": {"bytes=0-0,3-5"}}, "", 10)
	require.NoError(t, err)
	require.NotEqual(t, s.boundary, again.boundary, "who made the content could know it")

	broken := errors.New("broken")
	require.ErrorIs(t, s.Send(io.Discard, func(ByteRange) error { return broken }), broken)
}

func TestNotModified(t *testing.T) {
	for header, want := range map[string]bool{
		"": false, `"a"`: true, `"b"`: false, `W/"a"`: true, `"b", "a"`: true, "*": true, "a": false,
	} {
		require.Equal(t, want, NotModified(http.Header{"If-None-Match": {header}}, `"a"`), header)
	}
	require.False(t, NotModified(http.Header{"If-None-Match": {`""`, ""}}, ""), "no etag is the same as none")
}

func TestNextPage(t *testing.T) {
	ask := func(target string) *http.Request {
		return httptest.NewRequestWithContext(t.Context(), http.MethodGet, target, nil)
	}
	for _, tt := range []struct {
		at    string
		links []string
		want  string
	}{
		{"/v2/a/tags/list?n=2", nil, ""},
		{"/v2/a/tags/list?n=2", []string{`</v2/a/tags/list?last=b&n=2>; rel="next"`}, `</v2/a/tags/list?last=b&n=2>; rel="next"`},
		{"/v2/a/tags/list", []string{`<https://r.test:5000/v2/a/tags/list?last=b>; rel=next`}, `</v2/a/tags/list?last=b>; rel="next"`},
		{"/v2/r.test/a/tags/list", []string{`</v2/a/tags/list?last=b&ns=evil.test>; rel="next"`}, `</v2/r.test/a/tags/list?last=b>; rel="next"`},
		{"/v2/a/tags/list?ns=r.test", []string{`<?last=b>;rel="prev next"`}, `</v2/a/tags/list?last=b&ns=r.test>; rel="next"`},
		{"/v2/a/tags/list", []string{`<?last=a>; rel="first"; title="x, y", <?last=b>; rel="next"`}, `</v2/a/tags/list?last=b>; rel="next"`},
		{"/v2/a/tags/list", []string{`<?last=a>; rel="first"`, `<?last=b>; REL=Next`}, `</v2/a/tags/list?last=b>; rel="next"`},
		{"/v2/a/tags/list", []string{`<?last=a>; rel="first"`}, ""},
		{"/v2/a/tags/list", []string{`<?last=a>`}, ""},
		{"/v2/a/tags/list", []string{`?last=a; rel="next"`}, ""},
		{"/v2/a/tags/list", []string{`<:>; rel="next"`}, ""},
	} {
		require.Equal(t, tt.want, NextPage(ask(tt.at), tt.links), "%v", tt.links)
	}
}

func FuzzNextPage(f *testing.F) {
	f.Add("/v2/org/app/tags/list?n=2", `</v2/org/app/tags/list?last=b&n=2>; rel="next"`)
	f.Add("/v2/org/app/tags/list?ns=a.test", `<https://b.test/x?last=%zz&ns=c>; rel="next"`)
	f.Add("/v2/%2F%3F/tags/list", `<?a;b>; rel="first"; t="\",<", <?c>;rel=next`)
	f.Add("/v2/a", `>`)
	f.Fuzz(func(t *testing.T, target, link string) {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		u, err := r.URL.Parse(target)
		if err != nil || u.Host != "" || u.Opaque != "" || !strings.HasPrefix(u.Path, "/v2/") {
			return
		}
		r.URL = u
		next := NextPage(r, []string{link})
		if next == "" {
			return
		}
		inside, ok := strings.CutSuffix(strings.TrimPrefix(next, "<"), `>; rel="next"`)
		require.True(t, ok)
		require.NotContains(t, inside, ">")
		back, err := u.Parse(inside)
		require.NoError(t, err)
		require.Empty(t, back.Host)
		require.Equal(t, u.Path, back.Path)
		require.Equal(t, u.Query().Get("ns"), back.Query().Get("ns"))
		twice := NextPage(r, []string{next}) // as a host does with what its supernode says
		require.Equal(t, next, twice)
	})
}

func TestWriteRangeNotSatisfiable(t *testing.T) {
	w := httptest.NewRecorder()
	WriteRangeNotSatisfiable(w, 77)
	require.Equal(t, 416, w.Code)
	require.Equal(t, "bytes */77", w.Header().Get("Content-Range"))
	require.JSONEq(t, `{"errors":[{"code":"UNSUPPORTED","message":"the range lies outside the content"}]}`, w.Body.String())
}
