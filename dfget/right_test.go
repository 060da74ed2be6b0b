package dfget

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/httprange"
	"damselfly.dev/supernode/api"
)

// When the supernode takes a task back, its streams go on from the origin at once, and
// nothing of it is asked of others any more.
func TestATaskThatIsTakenBack(t *testing.T) {
	b := newBlob(3 << 17)
	synctest.Test(t, func(t *testing.T) {
		net, n, h := bubble(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				n.send(api.Down{Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{digestsOf(b)}, Assign: []api.Assign{
					{Transfer: 1, Task: 1, Count: 1, Parent: "parent:80"}, {Transfer: 2, Task: 1, First: 1, Count: 1, Parent: "slow:80"},
				}})
			}
		}, b)
		net.serve(t, "parent", content(b))
		ended := make(chan struct{})
		net.serve(t, "slow", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			close(ended)
		}))
		u := &upstream{bytes: b.bytes}
		s := open(t, h, Request{b.id, registryOrigin("Basic revoked"), u}, 0, -1)
		first := make([]byte, b.layout.PieceSize)
		_, err := io.ReadFull(s, first)
		require.NoError(t, err)
		n.send(api.Down{Task: []api.Task{{Task: string(b.id), Num: 1, Layout: b.layout}}})
		began := time.Now()
		rest, err := io.ReadAll(s)
		require.NoError(t, err)
		require.Equal(t, b.bytes, append(first, rest...))
		require.Less(t, time.Since(began), time.Second, "it does not wait for what does not come")
		require.Equal(t, []int64{b.layout.PieceSize}, u.opened())
		<-ended
		require.NoError(t, s.Close())
	})
}

// Tickets end by the supernode's clock, however wrong the host's is or becomes; and
// who takes its time over an answer is cut off soon after.
func TestTicketsEndByTheSupernodesClock(t *testing.T) {
	b := newBlob(100_000)
	for name, ahead := range map[string]time.Duration{"the same": 0, "ahead": 20 * time.Minute, "behind": -20 * time.Minute} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, n, h := bubble(t, PeerConfig{}, nil, nil)
				fill(t, h, b, 1)
				h.tickets.tells(time.Now().Add(ahead).UnixMilli())
				sign := func(life time.Duration) string {
					s, err := api.SignTicket(n.key, api.Ticket{Task: string(b.id), Expires: time.Now().Add(ahead + life).Unix()})
					require.NoError(t, err)
					return s
				}
				ask := func(ticket string) int {
					r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, api.ContentPath(b.id), nil)
					r.RemoteAddr = "127.0.0.1:1"
					r.Header.Set(api.TicketHeader, ticket)
					w := httptest.NewRecorder()
					h.Handler().ServeHTTP(w, r)
					return w.Code
				}
				good := sign(4 * time.Second)
				require.Equal(t, http.StatusOK, ask(good))
				require.Equal(t, http.StatusUnauthorized, ask(sign(-time.Second)))
				pause(t, 3*time.Second)
				require.Equal(t, http.StatusOK, ask(good))
				pause(t, 2*time.Second)
				require.Equal(t, http.StatusUnauthorized, ask(good), "replayed when it is old")

				c, err := h.store.Get(b.id)
				require.NoError(t, err)
				defer c.Release()
				w := &deadline{ResponseRecorder: httptest.NewRecorder()}
				h.sendRange(w, c, httprange.Range{Length: 1000}, time.Now().Add(5*time.Second))
				require.Equal(t, 5*time.Second, time.Until(w.latest))
			})
		})
	}
}

// deadline is a writer that notes by when it must have written.
type deadline struct {
	*httptest.ResponseRecorder
	latest time.Time
}

func (d *deadline) SetWriteDeadline(t time.Time) error {
	if t.After(d.latest) {
		d.latest = t
	}
	return nil
}
