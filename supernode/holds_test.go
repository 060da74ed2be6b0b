package supernode

import (
	"fmt"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// digestOf is a piece's digest as it goes over the wire.
func digestOf(piece []byte) []byte { return pieces.AppendDigests(nil, pieces.Sum(piece)) }

// A host that says it holds a private content, and has no right to it, hears nothing
// by that: not who wants it, nor a digest, nor a byte. One that has it is believed, in
// a crowd after a restart, and where the supernode has lost all it had.
func TestWhoMerelySaysThatItHolds(t *testing.T) {
	h := newHub(t)
	b := newBytes(8 << 20)
	d := h.blob(t, b)
	h.misbehave(private("Basic good"))
	layout := pieces.NewLayout(int64(len(b)))
	full, none := pieces.FullSet(layout.Count()), pieces.NewSet(layout.Count())
	dirs := map[string]string{"nothing is cached": t.TempDir(), "all is cached": t.TempDir()}
	r := start(t, h, dirs["all is cached"], nil)
	require.Equal(t, hexOf(b), hexOf(r.get(http.MethodGet, v2("blobs", d), "Authorization", "Basic good").body))
	require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)
	r.stop()
	for name, dir := range dirs {
		t.Run(name, func(t *testing.T) {
			r := start(t, h, dir, func(c *Config) { c.UpLanes = 1 })
			says := func(name string, proof []byte) *host {
				p := dial(t, r, name)
				k := &hostTask{Task: api.Task{Task: d, Layout: layout}, have: map[int][]byte{}}
				for i := range full.All() {
					k.have[i] = b[layout.Offset(i):layout.Offset(i+1)]
				}
				p.mu.Lock()
				p.byID[d] = k
				p.mu.Unlock()
				p.send(api.Up{Hold: []api.Hold{{Task: d, Layout: layout, Have: full.Bytes(), Digest: proof}}})
				return p
			}
			liars := []*host{says("mute", nil), says("wrong", digestOf([]byte("x"))), says("long", append(digestOf(b), digestOf(b)...)), says("another", digestOf(b[1<<20:2<<20]))}
			holder := says("holder", digestOf(b[:layout.PieceSize]))
			require.Eventually(t, func() (heard bool) {
				return r.region.ask(t.Context(), func() {
					heard = len(r.region.hosts) == len(liars)+1
					for _, s := range r.region.hosts {
						heard = heard && s.holds[pieces.TaskID(d)] != nil
					}
				}) && heard
			}, wait, poll)
			for i := range 2 {
				late := dial(t, r, fmt.Sprint("late", i))
				_, no := late.join(d, from("Basic good"))
				require.Nil(t, no)
				for _, l := range liars { // again, with the crowd there; and by another's number
					l.send(api.Up{Hold: []api.Hold{{Task: d, Layout: layout, Have: full.Bytes()}}})
					l.send(api.Up{Hold: []api.Hold{{Task: d, Layout: layout, Have: none.Bytes()}}, Want: []api.Want{{Task: 1, Count: layout.Count()}}})
				}
				require.Equal(t, hexOf(b), hexOf(late.content(d)))
				require.True(t, r.region.ask(t.Context(), func() {
					for _, s := range r.region.hosts {
						require.Equal(t, s.name == "holder" || s.name[:4] == "late", s.holds[pieces.TaskID(d)].proved, s.name)
					}
				}))
				parents := map[string]int{}
				for _, a := range late.assigns {
					parents[a.Parent] += a.Count
				}
				for _, l := range liars {
					require.NotContains(t, parents, l.peer.Listener.Addr().String())
				}
				if i == 0 && name == "all is cached" {
					require.Positive(t, parents[holder.peer.Listener.Addr().String()])
				}
			}
			for _, l := range liars {
				_, no := l.join(d, from("Basic bad")) // the answer comes after all else
				require.NotNil(t, no)
				require.Equal(t, http.StatusUnauthorized, no.Status)
				require.Empty(t, l.assigns)
				require.Empty(t, l.granted)
				require.Empty(t, l.tasks)
				require.Empty(t, l.verify)
				require.Empty(t, l.told)
			}
		})
	}
}
