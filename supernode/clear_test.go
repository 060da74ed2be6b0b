package supernode

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// To whom others may listen the supernode gives what is public alone, and takes
// no credentials.
func TestInClear(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	ask := func(remote, path, authorization, ticket string) *httptest.ResponseRecorder {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
		req.RemoteAddr = remote
		req.Header.Set(api.TicketHeader, ticket)
		if authorization != "" {
			req.Header.Set("Authorization", authorization)
		}
		w := httptest.NewRecorder()
		r.Handler().ServeHTTP(w, req)
		return w
	}
	const near, far = "127.0.0.1:1", "192.0.2.1:1"
	for _, at := range []string{near, far} {
		require.Equal(t, http.StatusOK, ask(at, v2("blobs", d), "", "").Code, "public, at %s", at)
	}
	w := ask(far, v2("blobs", d), "Basic c2VjcmV0", "")
	require.Equal(t, http.StatusBadGateway, w.Code)
	require.Equal(t, api.CodeClear, w.Header().Get(api.ErrorHeader))
	require.Equal(t, http.StatusOK, ask(far, "/v2/", "Basic c2VjcmV0", "").Code)

	for _, c := range []struct {
		public bool
		remote string
		want   int
	}{{true, far, http.StatusOK}, {false, far, http.StatusUnauthorized}, {false, near, http.StatusOK}} {
		ticket, err := r.keys.sign(api.Ticket{Task: d, Host: "one", Expires: 1 << 40, Public: c.public})
		require.NoError(t, err)
		require.Equal(t, c.want, ask(c.remote, api.ContentPath(pieces.TaskID(d)), "", ticket).Code, c)
	}
}

// The keys of tickets move on, and no ticket is refused for it.
func TestTicketKeysRotate(t *testing.T) {
	r := start(t, newHub(t), t.TempDir(), nil)
	id := pieces.URLTaskID("a")
	ticket := func() string {
		signed, err := r.keys.sign(api.Ticket{Task: string(id), Expires: 1 << 40})
		require.NoError(t, err)
		return signed
	}
	known := r.keys.public() // by a host, before
	first := ticket()
	require.NoError(t, r.keys.rotate(1))
	second := ticket()
	require.NotEqual(t, first, second)
	for _, signed := range []string{first, second} {
		_, err := r.keys.verify(signed, id, time.Now())
		require.NoError(t, err)
		_, err = api.VerifyTicket(known, signed, id, time.Now())
		require.NoError(t, err)
	}
	again, err := loadKeys(r.root, r.log)
	require.NoError(t, err)
	require.Equal(t, r.keys.keys, again.keys)
	require.NoError(t, r.keys.rotate(1))
	_, err = r.keys.verify(first, id, time.Now())
	require.ErrorIs(t, err, api.ErrTicket)

	h := dial(t, r, "host")
	require.Len(t, h.keys, someKeys)
}
