package dfget

import (
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/supernode/api"
)

// A request for a piece that is on its way waits for it, and the answer says how
// long; one for a piece that does not come in time, or is not to come, is refused.
func TestRequestWaitsForAPieceOnItsWay(t *testing.T) {
	b := newBlob(3 << 17)
	for name, c := range map[string]struct {
		lasts  time.Duration // until the rest of piece 0 comes
		first  int           // of the pieces asked for
		status int
		after  time.Duration
	}{
		"in time":        {200 * time.Millisecond, 0, http.StatusPartialContent, 200 * time.Millisecond},
		"too late":       {maxHeld + 100*time.Millisecond, 0, http.StatusNotFound, maxHeld},
		"nothing brings": {200 * time.Millisecond, 1, http.StatusNotFound, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net, n, h := bubble(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
					for _, j := range up.Join {
						n.send(api.Down{
							Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{digestsOf(b)},
							Assign: []api.Assign{{Transfer: 1, Task: 1, Count: 1, Parent: "parent:80"}},
						})
					}
				}, b)
				net.serve(t, "parent", parent(b, func(w http.ResponseWriter, r *http.Request, body []byte) {
					header(w, r, b, len(body))
					_, _ = w.Write(body[:len(body)*3/4])
					_ = http.NewResponseController(w).Flush()
					pause(t, c.lasts)
					_, _ = w.Write(body[len(body)*3/4:])
				}))
				opened := make(chan error)
				go func() { // which waits for the piece
					s, err := h.Open(t.Context(), Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}, 0, b.layout.PieceSize)
					if err == nil {
						err = s.Close()
					}
					opened <- err
				}()
				synctest.Wait()
				r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, api.ContentPath(b.id), nil)
				r.Header.Set(api.TicketHeader, n.ticket(b.id))
				off := b.layout.Offset(c.first)
				r.Header.Set("Range", "bytes="+itoa(int(off))+"-"+itoa(int(off+b.layout.PieceSize)-1))
				w, began := httptest.NewRecorder(), time.Now()
				h.Handler().ServeHTTP(w, r)
				require.Equal(t, c.status, w.Code)
				require.Equal(t, c.after, time.Since(began))
				require.NoError(t, <-opened)
				if c.status == http.StatusPartialContent {
					require.Equal(t, strconv.FormatInt(c.after.Milliseconds(), 10), w.Header().Get(api.HeldHeader))
					require.Equal(t, b.bytes[off:off+b.layout.PieceSize], w.Body.Bytes())
				}
			})
		})
	}
}
