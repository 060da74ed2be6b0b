package supernode

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// kernel is a writer as net/http's: what it reads from a file it could send
// with sendfile.
type kernel struct {
	*httptest.ResponseRecorder
	fromFiles int64
}

func (k *kernel) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(k.ResponseRecorder, r)
	if l, ok := r.(*io.LimitedReader); ok {
		if _, ok := l.R.(*os.File); ok {
			k.fromFiles += n
		}
	}
	return n, err
}

func TestContentIsSentFromFiles(t *testing.T) {
	h := newHub(t)
	b := newBytes(5 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	require.Len(t, r.get(http.MethodGet, v2("blobs", d)).body, len(b))
	require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)
	ticket, err := r.keys.sign(api.Ticket{Task: d, Host: "one", Expires: 1 << 40})
	require.NoError(t, err)
	for _, path := range []string{v2("blobs", d), api.ContentPath(pieces.TaskID(d))} {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
		req.Header.Set(api.TicketHeader, ticket)
		req.Header.Set("Range", "bytes=100-")
		req.RemoteAddr = "127.0.0.1:1"
		w := &kernel{ResponseRecorder: httptest.NewRecorder()}
		r.Handler().ServeHTTP(w, req)
		require.Equal(t, http.StatusPartialContent, w.Code)
		require.Equal(t, hexOf(b[100:]), hexOf(w.Body.Bytes()))
		require.EqualValues(t, len(b)-100, w.fromFiles, path)
	}
}

// A host that asks for contents and takes nothing of them has its own places taken
// up by that, and nobody else's.
func TestStalledUploadsAreTheirHosts(t *testing.T) {
	h := newHub(t)
	b := newBytes(32 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	require.Len(t, r.get(http.MethodGet, v2("blobs", d)).body, len(b))
	require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)
	ticketOf := func(host string) string {
		ticket, err := r.keys.sign(api.Ticket{Task: d, Host: host, Expires: 1 << 40})
		require.NoError(t, err)
		return ticket
	}
	path := api.ContentPath(pieces.TaskID(d))
	own := uploadsOfOne * r.cfg.UpLanes
	for range own {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", strings.TrimPrefix(r.url, "http://"))
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		_, err = io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: a\r\n"+api.TicketHeader+": "+ticketOf("stalls")+"\r\n\r\n")
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool { return r.uploads.Len() == own }, wait, poll)
	more := r.get(http.MethodGet, path, api.TicketHeader, ticketOf("stalls"))
	require.Equal(t, http.StatusServiceUnavailable, more.status)
	require.Equal(t, api.CodeBusy, more.header.Get(api.ErrorHeader))
	require.NotEmpty(t, more.header.Get(api.RetryHeader))
	require.Equal(t, hexOf(b), hexOf(r.get(http.MethodGet, path, api.TicketHeader, ticketOf("honest")).body))
	require.Equal(t, own, r.uploads.Len())
}
