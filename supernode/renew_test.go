package supernode

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// reviewed has the region look at rights, and waits for what the origin says.
func (r *testRegion) reviewed() {
	r.t.Helper()
	look := func(f func(*member) bool) (some bool) {
		require.True(r.t, r.region.ask(r.t.Context(), func() {
			for _, t := range r.region.tasks {
				for _, m := range t.members {
					some = f(m) || some
				}
			}
		}))
		return some
	}
	require.True(r.t, r.region.ask(r.t.Context(), func() { r.region.review(time.Now()) }))
	require.Eventually(r.t, func() bool { return !look(func(m *member) bool { return m.asking }) }, wait, poll)
}

// idler is a host that joins and takes nothing, so that its task goes on.
func idler(t *testing.T, r *testRegion, name, d string, o api.Origin) (*host, *api.Task) {
	t.Helper()
	h := dial(t, r, name)
	h.mu.Lock()
	h.lazy = true
	h.mu.Unlock()
	task, no := h.join(d, o)
	require.Nil(t, no)
	return h, task
}

// renewal is the last one a host was sent, and whether there was any.
func (h *host) renewal() (api.Task, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, ok := h.granted[0]
	return k, ok
}

func jwt(end time.Time) string {
	return "Bearer e30." + base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp":%d}`, end.Unix())) + ".x"
}

// A host whose caller's credentials are revoked while it gets a content gets no
// more of it when the remembered right is over; nor is its ticket good for longer
// than the grace. Others go on, and the registry hears of each once in five minutes.
func TestARunningTaskEndsWithTheRightToIt(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(3<<20))
	var revoked atomic.Bool
	var by moved
	var heads atomic.Int64
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		if who := r.Header.Get("Authorization"); who == "Basic b3RoZXI=" || who == "Basic Z29uZQ==" && !revoked.Load() {
			if r.Method == http.MethodHead {
				heads.Add(1)
			}
			return false
		}
		return private("nobody")(w, r)
	})
	r := start(t, h, t.TempDir(), func(c *Config) { c.Now = by.now })
	began := time.Now()
	gone, had := idler(t, r, "gone", d, from("Basic Z29uZQ=="))
	other, _ := idler(t, r, "other", d, from("Basic b3RoZXI="))
	web, _ := idler(t, r, "web", d, api.Origin{URL: h.URL + "/v2/demo/app/blobs/" + d, Header: from("Basic Z29uZQ==").Header})
	status := func(ticket string) int {
		return r.get(http.MethodGet, api.ContentPath(pieces.TaskID(d)), api.TicketHeader, ticket, "Range", "bytes=0-9").status
	}
	revoked.Store(true)
	asked := heads.Load()
	by.to(4 * time.Minute)
	r.reviewed()
	require.Equal(t, asked, heads.Load(), "until then the registry is not asked")
	_, again := gone.renewal()
	require.False(t, again)
	require.Equal(t, http.StatusPartialContent, status(had.Ticket))

	by.to(registryproxy.ProofLife + 2*time.Second)
	r.reviewed()
	for _, host := range []*host{gone, web} {
		host.await("the end", func() bool { k, ok := host.granted[0]; return ok && k.Ticket == "" })
	}
	other.await("a new ticket", func() bool { return other.granted[0].Ticket != "" })
	renewed, _ := other.renewal()
	require.True(t, r.region.ask(t.Context(), func() { require.Len(t, r.region.tasks[pieces.TaskID(d)].members, 1) }))
	require.Equal(t, asked+1, heads.Load(), "the registry is asked for who goes on once")
	_, no := gone.join(d, from("Basic Z29uZQ=="))
	require.NotNil(t, no)
	require.Equal(t, http.StatusUnauthorized, no.Status)

	ticket, err := api.VerifyTicket(gone.keys, had.Ticket, pieces.TaskID(d), began)
	require.NoError(t, err)
	require.LessOrEqual(t, time.Unix(ticket.Expires, 0).Sub(began), registryproxy.ProofLife+api.TicketGrace+2*time.Second)
	by.to(registryproxy.ProofLife + api.TicketGrace + 2*time.Second)
	require.Equal(t, http.StatusUnauthorized, status(had.Ticket), "an old one, replayed")
	require.Equal(t, http.StatusPartialContent, status(renewed.Ticket))

	asked = heads.Load()
	for m := 6; m < 36; m++ {
		by.to(time.Duration(m) * time.Minute)
		r.reviewed()
	}
	require.LessOrEqual(t, heads.Load()-asked, int64(6))
	require.Positive(t, heads.Load()-asked)
}

// What ends by itself, as tokens do, is not taken for revoked: as a registry brings
// to its end what it has begun to send, so does the region, for an hour.
func TestARunningTaskOutlivesAToken(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(3<<20))
	var by moved
	token := jwt(time.Now().Add(2 * time.Minute))
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		return by.Load() > int64(2*time.Minute) && private("nobody")(w, r) || private(token)(w, r)
	})
	r := start(t, h, t.TempDir(), func(c *Config) { c.Now = by.now })
	host, had := idler(t, r, "one", d, from(token))
	require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)
	by.to(3 * time.Minute)
	_, err := r.keys.verify(had.Ticket, pieces.TaskID(d), by.now())
	require.ErrorIs(t, err, api.ErrTicket, "the first ticket ends with the token")
	asked := h.times("")
	r.reviewed()
	host.await("a new ticket", func() bool { return host.granted[0].Ticket != "" })
	require.Equal(t, asked, h.times(""), "the registry cannot say anything of it")
	_, no := host.join(d, from(token))
	require.NotNil(t, no, "it is good for nothing new")

	require.True(t, r.region.ask(t.Context(), func() {
		for _, m := range r.region.tasks[pieces.TaskID(d)].members {
			m.joined = m.joined.Add(-lapseLife)
		}
	}))
	by.to(10 * time.Minute)
	r.reviewed()
	host.await("the end", func() bool { k, ok := host.granted[0]; return ok && k.Ticket == "" })
}

// While the registry is in trouble, nobody is told that a right is over at once; when
// the grace is over without an answer, it is.
func TestARunningTaskAndARegistryInTrouble(t *testing.T) {
	busy := func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	for name, in := range map[string]struct {
		trouble func(http.ResponseWriter, *http.Request) bool
		life    time.Duration
	}{"refuse": {away, 0}, "for 30m": {away, 30 * time.Minute}, "busy": {busy, 0}} {
		t.Run(name, func(t *testing.T) {
			h := newHub(t)
			d := h.blob(t, newBytes(3<<20))
			var by moved
			h.misbehave(private("Basic good"))
			r := start(t, h, t.TempDir(), func(c *Config) { c.Registries.Upstreams[0].ReadersWhenAway, c.Now = in.life, by.now })
			host, _ := idler(t, r, "one", d, from("Basic good"))
			require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)
			h.misbehave(in.trouble)
			by.to(registryproxy.ProofLife + time.Second)
			r.reviewed()
			if in.life > 0 {
				host.await("a new ticket", func() bool { return host.granted[0].Ticket != "" })
				return
			}
			_, told := host.renewal()
			require.False(t, told)
			by.to(registryproxy.ProofLife + api.TicketGrace + 2*time.Second)
			r.reviewed()
			host.await("the end", func() bool { k, ok := host.granted[0]; return ok && k.Ticket == "" })
		})
	}
}
