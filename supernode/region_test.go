package supernode

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/scheduler"
	"damselfly.dev/supernode/api"
)

func TestHostsServeEachOther(t *testing.T) {
	h := newHub(t)
	b := newBytes(16 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	var hosts []*host
	for i := range 6 {
		hosts = append(hosts, dial(t, r, fmt.Sprint("h", i)))
	}
	for _, host := range hosts {
		_, no := host.join(d, from(""))
		require.Nil(t, no)
	}
	for _, host := range hosts {
		require.Equal(t, hexOf(b), hexOf(host.content(d)))
	}
	require.Less(t, r.metric("damselfly_sent_bytes_total"), 3*len(b), "of six copies most came from hosts")
	require.Equal(t, 6, r.metric("damselfly_hosts"))
	require.Equal(t, 1, r.metric("damselfly_tasks"))
}

func TestSmallContentComesWithTheAnswer(t *testing.T) {
	h := newHub(t)
	b := newBytes(20_000)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	for i := range 2 { // one that nobody has had; one that is there
		host := dial(t, r, fmt.Sprint("h", i))
		host.send(api.Up{Join: []api.Join{{Seq: 1, Task: d, Origin: from(""), Small: true}}})
		k, no := host.answer(1)
		require.Nil(t, no)
		require.Equal(t, hexOf(b), hexOf(k.Data))
		require.Equal(t, pieces.AppendDigests(nil, pieces.Sum(b)), k.Digest)
		require.Empty(t, k.Ticket)
		require.Empty(t, host.assigns)
		all := pieces.FullSet(1)
		host.send(api.Up{Hold: []api.Hold{{Task: d, Layout: k.Layout, Have: all.Bytes(), Digest: k.Digest}}})
		s := r.session(host.name)
		require.Eventually(t, func() (given bool) { // what it says then is no mere word
			return r.region.ask(t.Context(), func() {
				of := s.holds[pieces.TaskID(d)]
				given = of.given && of.digest == pieces.Sum(b)
			}) && given
		}, wait, poll)
	}
	require.Equal(t, 1, h.times("GET /v2/demo/app/blobs/"+d))
	old := dial(t, r, "old") // knows nothing of it
	k, no := old.join(d, from(""))
	require.Nil(t, no)
	require.Empty(t, k.Data)
	require.NotEmpty(t, k.Ticket)
	require.Equal(t, hexOf(b), hexOf(old.content(d)))
}

func TestSmallContentComesWithTheAnswerWhereItMay(t *testing.T) {
	id := pieces.TaskID("sha256:" + strings.Repeat("ab", 32))
	tk := &task{id: id, layout: pieces.NewLayout(maxGiven / 4)}
	fresh := func() *session { return &session{holds: map[pieces.TaskID]*holding{}} }
	r := &region{}
	require.True(t, r.gives(fresh(), tk, maxGiven/4))
	far := fresh()
	far.far = true
	require.False(t, r.gives(far, tk, maxGiven/4))
	holder := fresh()
	require.True(t, r.gives(holder, tk, maxGiven/4))
	require.False(t, r.gives(holder, tk, maxGiven/4), "it has it")
	require.False(t, r.gives(fresh(), &task{id: pieces.URLTaskID("http://a.test/"), layout: tk.layout}, 1))
	require.True(t, r.gives(fresh(), tk, maxGiven/2))
	require.False(t, r.gives(fresh(), tk, 1), "a crowd is the scheduler's")
}

// A host knows the digests of what it is not told to get too: of what it has
// of an earlier time it must hear that it is wrong.
func TestHostIsToldAllDigests(t *testing.T) {
	h := newHub(t)
	b := newBytes(8 << 20)
	d := h.blob(t, b)
	joined := make(chan struct{})
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		w.(http.Flusher).Flush()
		<-joined
		_, _ = w.Write(b)
		return true
	})
	r := start(t, h, t.TempDir(), nil)
	host := dial(t, r, "one")
	host.lazy = true
	k, no := host.join(d, from(""))
	close(joined)
	require.Nil(t, no)
	host.await("all digests", func() bool { return len(host.byID[d].digests) == k.Layout.Count() })
	require.Less(t, len(host.assigns), k.Layout.Count())
}

func TestPieceCrossesIntoAZoneOnce(t *testing.T) {
	h := newHub(t)
	b := newBytes(16 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), func(c *Config) { c.Zone, c.CrossOnce = "near", true })
	var hosts []*host
	for i, zone := range []string{"near", "far", "near", "far", "far"} {
		hosts = append(hosts, dialFrom(t, r, fmt.Sprint("h", i), zone))
	}
	for _, host := range hosts {
		_, no := host.join(d, from(""))
		require.Nil(t, no)
	}
	for _, host := range hosts {
		require.Equal(t, hexOf(b), hexOf(host.content(d)))
	}
	require.Eventually(t, func() bool { return r.metric("damselfly_zone_crossing_bytes_total") >= len(b) }, wait, poll)
	require.Less(t, r.metric("damselfly_zone_crossing_bytes_total"), len(b)*11/10)
}

func TestTransfersOfADeadHostAreGivenToOthers(t *testing.T) {
	h := newHub(t)
	b := newBytes(8 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), func(c *Config) { c.UpLanes = 1 })
	dead := dial(t, r, "dead")
	dead.lazy = true
	_, no := dead.join(d, from(""))
	require.Nil(t, no)
	dead.await("what only it is told to get", func() bool { return len(dead.assigns) > 0 })
	one := dial(t, r, "one")
	_, no = one.join(d, from(""))
	require.Nil(t, no)
	dead.die()
	require.Equal(t, hexOf(b), hexOf(one.content(d)))
	require.Eventually(t, func() bool { return r.metric("damselfly_hosts") == 1 }, wait, poll)
}

func TestHostThatSendsWrongBytesIsNamedNoMore(t *testing.T) {
	h := newHub(t)
	b := newBytes(8 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), func(c *Config) { c.UpLanes = 1 })
	liar := dial(t, r, "liar")
	liar.lies = func(b []byte) { b[len(b)/2] ^= 1 }
	_, no := liar.join(d, from(""))
	require.Nil(t, no)
	liar.content(d)
	addr := liar.peer.Listener.Addr().String()
	var hosts []*host
	for i := range 4 {
		host := dial(t, r, fmt.Sprint("h", i))
		hosts = append(hosts, host)
		_, no := host.join(d, from(""))
		require.Nil(t, no)
	}
	for _, host := range hosts {
		require.Equal(t, hexOf(b), hexOf(host.content(d)))
	}
	require.Eventually(t, func() bool {
		return strings.Contains(string(r.get(http.MethodGet, "/v1/hosts").body), `"banned":true`)
	}, wait, poll)
	require.Positive(t, r.metric("damselfly_verify_failures_total"))
	liar.await("to be told to look at what it has", func() bool {
		return len(liar.verify) > 0 && liar.verify[0].Task == d && liar.verify[0].Count == 1
	})

	late := dial(t, r, "late")
	_, no = late.join(d, from(""))
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(late.content(d)))
	for _, a := range late.assigns {
		require.NotEqual(t, addr, a.Parent)
	}
}

func TestNewcomerGetsPiecesFromThoseWhoFinishedBefore(t *testing.T) {
	h := newHub(t)
	b := newBytes(8 << 20)
	d := h.blob(t, b)
	dir := t.TempDir()
	r := start(t, h, dir, nil)
	_, no := dial(t, r, "first").join(d, from(""))
	require.Nil(t, no)
	require.Eventually(t, func() bool { return len(r.store.Tasks()) == 1 && r.store.Tasks()[0].Complete }, wait, poll)
	r.stop()

	// After a restart the supernode knows of pieces only what hosts say.
	r = start(t, h, dir, func(c *Config) { c.UpLanes = 1 })
	full := pieces.FullSet(pieces.NewLayout(int64(len(b))).Count())
	var parents []string
	for i := range 4 {
		p := dial(t, r, fmt.Sprint("h", i))
		parents = append(parents, p.peer.Listener.Addr().String())
		k := &hostTask{Task: api.Task{Task: d, Layout: pieces.NewLayout(int64(len(b)))}, have: map[int][]byte{}}
		for j := range full.All() {
			k.have[j] = b[k.Layout.Offset(j):k.Layout.Offset(j+1)]
		}
		p.mu.Lock()
		p.byID[d] = k
		p.mu.Unlock()
		other := pieces.NewLayout(int64(len(b)) + 1)
		none := pieces.FullSet(other.Count())
		p.send(api.Up{Hold: []api.Hold{
			{Task: d, Layout: k.Layout, Have: full.Bytes(), Digest: digestOf(k.have[0])},
			{Task: "sha256:nonsense", Layout: k.Layout, Have: full.Bytes()},
			{Task: digest.FromString("x").String(), Layout: pieces.Layout{Length: 1, PieceSize: 3}, Have: []byte{1}},
			{Task: digest.FromString("y").String(), Layout: other, Have: none.Bytes()[1:]},
		}})
	}
	late := dial(t, r, "late")
	_, no = late.join(d, from(""))
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(late.content(d)))
	fromPeers := 0
	for _, a := range late.assigns {
		if a.Parent != "" {
			require.Contains(t, parents, a.Parent)
			fromPeers += a.Count
		}
	}
	require.Positive(t, fromPeers)
	require.Equal(t, 1, h.times(blobs))
}

func TestSecondSessionOfAHostReplacesTheFirst(t *testing.T) {
	r := start(t, newHub(t), t.TempDir(), nil)
	first := dial(t, r, "one")
	second := dial(t, r, "one")
	<-first.gone
	require.NotNil(t, r.session("one"))
	second.die()
	require.Eventually(t, func() bool { return r.metric("damselfly_hosts") == 0 }, wait, poll)
}

func TestSessionsThatDoNotKeepToTheProtocolEnd(t *testing.T) {
	h := newHub(t)
	r := start(t, h, t.TempDir(), func(c *Config) { c.MaxHosts = 2 })
	for name, up := range map[string]api.Up{
		"no hello":      {Leave: []api.Leave{{Task: "x"}}},
		"other version": {Hello: &api.Hello{Version: 99, Host: "a"}},
		"no name":       {Hello: &api.Hello{Version: api.Version}},
		"long name":     {Hello: &api.Hello{Version: api.Version, Host: strings.Repeat("a", 65)}},
		"bad address":   {Hello: &api.Hello{Version: api.Version, Host: "a", Addr: "nonsense"}},
		"bad port":      {Hello: &api.Hello{Version: api.Version, Host: "a", Addr: "10.0.0.1:99999"}},
		"no address":    {Hello: &api.Hello{Version: api.Version, Host: "a", Addr: "0.0.0.0:80"}},
		"cloud's":       {Hello: &api.Hello{Version: api.Version, Host: "a", Addr: "[::ffff:169.254.169.254]:80"}},
		"bad lanes":     {Hello: &api.Hello{Version: api.Version, Host: "a", Up: -1}},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := api.Dial(t.Context(), http.DefaultClient, r.url)
			require.NoError(t, err)
			require.NoError(t, conn.Write(t.Context(), up))
			_, err = conn.Read(t.Context())
			require.Error(t, err)
		})
	}
	require.Eventually(t, func() bool { return r.sessions.Len() == 0 }, wait, poll)
	dial(t, r, "one")
	dial(t, r, "two")
	_, err := api.Dial(t.Context(), http.DefaultClient, r.url)
	require.Error(t, err)
	require.Equal(t, http.StatusServiceUnavailable, r.get(http.MethodGet, api.SessionPath).status)
}

func TestAdvertisedAddresses(t *testing.T) {
	for addr, want := range map[string][2]bool{ // told from another machine, and from this one
		"10.0.0.1": {true, true}, "fd00::1": {true, true}, "127.0.0.1": {false, true}, "::1": {false, true},
		"169.254.169.254": {false, false}, "fe80::1": {false, false}, "224.0.0.1": {false, false}, "::": {false, false},
		"::ffff:127.0.0.1": {false, true}, "localhost": {false, true}, "a.LOCALHOST.": {false, true}, "node.example": {true, true},
	} {
		require.Equal(t, want, [2]bool{reachable(addr, "10.0.0.9:1"), reachable(addr, "127.0.0.1:1")}, addr)
	}
}

// A host that asks for more contents than anybody pulls, which nobody has, is
// refused; the others get theirs meanwhile.
func TestFloodOfJoins(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	flood, honest := dial(t, r, "flood"), dial(t, r, "honest")
	joins := 0
	batch := make([]api.Join, 500)
	more := func() error {
		for i := range batch {
			joins++
			batch[i] = api.Join{Seq: 1<<32 + uint64(joins), Task: digest.FromString(fmt.Sprint(joins)).String(), Origin: from("")}
		}
		return flood.conn.Write(context.Background(), api.Up{Join: batch})
	}
	for joins < joinsAtOnce+maxOver {
		require.NoError(t, more())
	}
	flood.await("a no", func() bool { return flood.hearsLocked(errTooMany) })
	_, no := honest.join(d, from(""))
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(honest.content(d)))
	require.Less(t, h.times(""), joins)
	for more() == nil { // until it has no session any more
	}
	<-flood.gone
}

// Who reports ever more of transfers that are none of its loses its session; one that
// says so of a few does not.
func TestFloodOfReports(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(1<<20))
	r := start(t, h, t.TempDir(), nil)
	flood, honest := dial(t, r, "flood"), dial(t, r, "honest")
	say := func(n int) error {
		return flood.conn.Write(context.Background(), api.Up{Soon: make([]uint64, n), Done: make([]api.Done, n), Failed: make([]api.Failed, n)})
	}
	require.NoError(t, say(100))
	_, no := flood.join(d, from(""))
	require.Nil(t, no)
	require.NotEmpty(t, flood.content(d))
	require.NoError(t, say(maxStrays))
	<-flood.gone
	_, no = honest.join(d, from(""))
	require.Nil(t, no)
	require.NotEmpty(t, honest.content(d))
}

// Who joins too much now and then keeps its session, however long it stands.
func TestBurstsOfJoinsAreNoFlood(t *testing.T) {
	j, now := newJoinRate(), time.Now()
	for range 20 {
		refused := 0
		for range joinsAtOnce + maxOver/2 {
			ok, err := j.allows(now)
			require.NoError(t, err)
			if !ok {
				refused++
			}
		}
		require.Equal(t, maxOver/2, refused)
		now = now.Add(joinsAtOnce * time.Second / joinsPerSecond)
	}
	err := error(nil)
	for range joinsAtOnce + maxOver + 1 {
		require.NoError(t, err)
		_, err = j.allows(now)
	}
	require.ErrorIs(t, err, errFlood)
}

func TestFloodsAreBarredForAWhile(t *testing.T) {
	var f floods
	now := time.Now()
	for _, why := range []error{errFlood, fmt.Errorf("read session: %w", api.ErrFrame)} {
		var f floods
		f.after("127.0.0.1:1", why)
		f.after("10.0.0.1:1", errSlow)
		require.False(t, f.bars("10.0.0.1", now))
		f.after("10.0.0.1:2", why)
		require.True(t, f.bars("10.0.0.1", now))
		require.Len(t, f.until, 1)
	}
	require.False(t, f.bars("10.0.0.1", now))
	f.note("10.0.0.1", now)
	require.True(t, f.bars("10.0.0.1", now.Add(barredFor-1)))
	require.False(t, f.bars("10.0.0.2", now))
	require.False(t, f.bars("10.0.0.1", now.Add(barredFor)))
	for i := range 2 * maxBarred {
		f.note(fmt.Sprint(i), now)
	}
	require.Len(t, f.until, maxBarred)
	f.note("a", now.Add(2*barredFor))
	require.Len(t, f.until, 1)
}

// hearsLocked tells whether some join has been refused for now, for that reason.
func (h *host) hearsLocked(why error) bool {
	for _, no := range h.refused {
		if !no.Final && strings.Contains(no.Reason, why.Error()) {
			return true
		}
	}
	return false
}

// What a host may say is counted by what it takes to act on it.
func TestFloodOfWants(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(2<<20))
	r := start(t, h, t.TempDir(), nil)
	host, other := dial(t, r, "flood"), dial(t, r, "other")
	k, no := host.join(d, from(""))
	require.Nil(t, no)
	wants := make([]api.Want, 1000)
	for i := range wants {
		wants[i] = api.Want{Task: k.Num, Count: api.MaxWanted}
	}
	require.Greater(t, items(&api.Up{Want: wants}), itemsAtOnce)
	require.Less(t, items(&api.Up{Want: wants[:100]}), itemsAtOnce)
	require.NoError(t, host.conn.Write(t.Context(), api.Up{Want: wants[:100]}))
	require.NotEmpty(t, host.content(d), "that much is no flood")
	require.NoError(t, host.conn.Write(t.Context(), api.Up{Want: wants}))
	<-host.gone
	_, no = other.join(d, from(""))
	require.Nil(t, no)
	require.NotEmpty(t, other.content(d))
}

func TestQuietHostIsTalkedToAndASilentOneGivenUp(t *testing.T) {
	r := start(t, newHub(t), t.TempDir(), nil)
	conn, err := api.Dial(t.Context(), http.DefaultClient, r.url)
	require.NoError(t, err)
	defer conn.CloseNow()
	require.NoError(t, conn.Write(t.Context(), api.Up{Hello: &api.Hello{Version: api.Version, Host: "silent"}}))
	down, err := conn.Read(t.Context())
	require.NoError(t, err)
	require.NotNil(t, down.Welcome)
	pass := func(d time.Duration) {
		for range d / api.TickEvery {
			require.True(t, r.region.ask(t.Context(), r.region.keepAlive))
		}
	}
	pass(api.BeatEvery + api.TickEvery)
	down, err = conn.Read(t.Context())
	require.NoError(t, err)
	require.Equal(t, api.Down{}, down)
	require.NotNil(t, r.session("silent"))
	pass(api.SilenceLimit)
	for err == nil {
		_, err = conn.Read(t.Context())
	}
	require.Eventually(t, func() bool { return r.metric("damselfly_hosts") == 0 }, wait, poll)
}

func TestReaderThatFallsBehindLosesItsSession(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	s := &session{end: cancel, writing: true} // for ever
	for range maxQueued / api.MaxInline {
		s.send(message{size: api.MaxInline})
	}
	require.ErrorIs(t, context.Cause(ctx), errSlow)
}

func TestFramesStayBelowTheirBound(t *testing.T) {
	h := newHub(t)
	b := newBytes(1000)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	host := dial(t, r, "one")
	_, no := host.join(d, from(""))
	require.Nil(t, no)
	host.content(d)
	s := r.session("one")
	layout := pieces.Layout{Length: pieces.MaxLength, PieceSize: pieces.MaxLength / pieces.MaxPieces}
	body := make([]byte, 60<<10)
	for i := range uint64(100) {
		s.send(message{size: len(body), add: func(b *api.Down) {
			b.Refused = append(b.Refused, api.Refused{Seq: 1000 + i, Body: body})
		}})
	}
	done := r.region.ask(t.Context(), func() {
		t := r.region.tasks[pieces.TaskID(d)]
		all := *t
		all.layout, all.num = layout, 7
		s.send(message{size: 500, add: func(b *api.Down) {
			b.Task = append(b.Task, api.Task{Seq: 9999, Num: 7, Task: "x", Layout: layout})
		}})
		for i := 0; i < layout.Count(); i += digestRun {
			s.sendDigests(&all, i, digestRun)
		}
	})
	require.True(t, done)
	host.await("all of it, in frames that can be read", func() bool {
		return len(host.refused) == 100 && host.tasks[7] != nil && len(host.tasks[7].digests) == layout.Count()
	})
}

func TestTaskAfterAnInvalidateIsNotDroppedWithIt(t *testing.T) {
	h := newHub(t)
	r := start(t, h, t.TempDir(), nil)
	dial(t, r, "one")
	s := r.session("one")
	frames := make(chan api.Down, 10)
	s.mu.Lock() // so that all is taken at once
	note := func(first bool, add func(*api.Down)) {
		s.queue = append(s.queue, message{size: 10, first: first, add: func(b *api.Down) { add(b); frames <- *b }})
	}
	note(true, func(b *api.Down) { b.Task = append(b.Task, api.Task{Task: "old", Num: 1}) })
	note(false, func(b *api.Down) { b.Invalidate = append(b.Invalidate, api.Invalidate{Task: "old"}) })
	note(true, func(b *api.Down) { b.Task = append(b.Task, api.Task{Task: "new", Num: 2}) })
	s.mu.Unlock()
	s.send(message{add: func(*api.Down) {}})
	<-frames
	require.Len(t, (<-frames).Invalidate, 1)
	last := <-frames
	require.Empty(t, last.Invalidate)
	require.Len(t, last.Task, 1)
}

func TestJoinsOfNonsenseAreRefused(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(100))
	r := start(t, h, t.TempDir(), nil)
	host := dial(t, r, "one")
	for _, j := range []api.Join{
		{Task: "nonsense", Origin: from("")},
		{Task: d, Origin: api.Origin{}},
		{Task: d, Origin: api.Origin{Registry: "hub.test", Repository: "../../x"}},
		{Task: d, Origin: api.Origin{Registry: "HUB TEST", Repository: "x"}},
		{Task: d, Origin: api.Origin{URL: "ftp://x/y"}},
		{Task: d, Origin: api.Origin{URL: "http:///y"}},
		{Task: string(pieces.URLTaskID("http://a/")), Origin: from("")},
		{Task: string(pieces.URLTaskID("http://a/")), Origin: api.Origin{URL: "http://b/"}},
	} {
		_, no := host.join(j.Task, j.Origin)
		require.NotNil(t, no, j.Task)
		require.False(t, no.Final)
		require.NotEmpty(t, no.Reason)
	}
	_, no := host.join(d, from(""))
	require.Nil(t, no, "and the session goes on")
	require.Empty(t, h.times("GET /v2/x"))
}

// TestLiesCostOnlyTheLiar has a host send whatever numbers there are, while
// others get a blob.
func TestLiesCostOnlyTheLiar(t *testing.T) {
	h := newHub(t)
	b := newBytes(8 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	liar := dial(t, r, "liar")
	liar.lazy = true
	_, no := liar.join(d, from(""))
	require.Nil(t, no)
	one, two := dial(t, r, "one"), dial(t, r, "two")
	rnd := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // a test repeats itself
	odd := func() int {
		return []int{-1, 0, 1, 2, 31, 32, 1 << 20, 1 << 40, -1 << 62}[rnd.IntN(9)]
	}
	for i := range 300 {
		if i == 100 {
			for _, host := range []*host{one, two} {
				_, no = host.join(d, from(""))
				require.Nil(t, no)
			}
		}
		var up api.Up
		for range 10 {
			id := uint64(rnd.IntN(200))
			up.Done = append(up.Done, api.Done{Transfer: id, Piece: odd()})
			up.Failed = append(up.Failed, api.Failed{Transfer: id, Why: api.Failure(odd()), RetryMS: int64(odd())})
			up.Want = append(up.Want, api.Want{Task: int32(rnd.IntN(3)), First: odd(), Count: odd()})
			up.Leave = append(up.Leave, api.Leave{Task: "nonsense"})
			up.Hold = append(up.Hold, api.Hold{
				Task: d, Layout: pieces.Layout{Length: int64(odd()), PieceSize: int64(odd())}, Have: make([]byte, rnd.IntN(9)),
			})
		}
		liar.send(up)
	}
	require.Equal(t, hexOf(b), hexOf(one.content(d)))
	require.Equal(t, hexOf(b), hexOf(two.content(d)))
	require.True(t, r.region.ask(t.Context(), func() {
		for _, s := range r.region.hosts {
			require.False(t, r.region.sched.Banned(s.id))
		}
	}))
}

func TestHostMayHoldOnlySoMuch(t *testing.T) {
	r := newRegion(Default(), nil, nil)
	s := &session{holds: map[pieces.TaskID]*holding{}}
	layout := pieces.Layout{Length: pieces.MaxLength, PieceSize: pieces.MaxLength / pieces.MaxPieces}
	set := pieces.FullSet(layout.Count())
	hold := func(i int, l pieces.Layout, have pieces.Set) {
		r.hold(time.Now(), s, api.Hold{Task: digest.FromString(fmt.Sprint(i)).String(), Layout: l, Have: have.Bytes()})
	}
	for i := range 1000 {
		hold(i, layout, set)
	}
	require.LessOrEqual(t, s.heldBytes, maxHeldBytes)
	require.Len(t, s.holds, maxHeldBytes/(layout.Count()/8))
	for i := range 1000 {
		s.holding(pieces.TaskID(digest.FromString(fmt.Sprint(i))), nil)
	}
	require.Zero(t, s.heldBytes)
	for i := range maxHeld + 10 {
		hold(i, pieces.NewLayout(1), pieces.FullSet(1))
	}
	require.Len(t, s.holds, maxHeld)
}

func TestTaskThatNobodyNeedsIsPutAway(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	one := dial(t, r, "one")
	_, no := one.join(d, from(""))
	require.Nil(t, no)
	one.content(d)
	lazy := dial(t, r, "lazy")
	lazy.lazy = true
	task, no := lazy.join(d, from(""))
	require.Nil(t, no)
	review := func(in time.Duration) {
		require.True(t, r.region.ask(t.Context(), func() { r.region.review(time.Now().Add(in)) }))
	}
	require.Eventually(t, func() bool { return r.origin.find(pieces.TaskID(d)) == nil }, wait, poll)
	review(2 * idleAfter)
	require.Equal(t, 1, r.metric("damselfly_tasks"), "somebody wants it")
	review(api.TicketLife)
	lazy.await("a new ticket", func() bool { return lazy.granted[0].Task == d })
	require.Equal(t, task.Num, lazy.granted[0].Num)
	lazy.die()
	require.Eventually(t, func() bool { return r.metric("damselfly_hosts") == 1 }, wait, poll)
	review(3 * api.TicketLife)
	require.Eventually(t, func() bool { return r.metric("damselfly_tasks") == 0 }, wait, poll)

	two := dial(t, r, "two")
	again, no := two.join(d, from(""))
	require.Nil(t, no)
	require.NotEqual(t, task.Num, again.Num)
	require.Equal(t, hexOf(b), hexOf(two.content(d)))
}

func TestSlowOriginIsReported(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	goOn := make(chan struct{})
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:100_000])
			w.(http.Flusher).Flush()
			<-goOn
			_, _ = w.Write(b[100_000:])
		}
		return r.Method == http.MethodGet
	})
	r := start(t, h, t.TempDir(), func(c *Config) { c.Registries.StallTimeout = wait })
	host := dial(t, r, "one")
	_, no := host.join(d, from(""))
	require.Nil(t, no)
	host.await("news of the fetch", func() bool { return len(host.told) > 0 && host.told[0].Fetched == 100_000 })
	close(goOn)
	require.Equal(t, hexOf(b), hexOf(host.content(d)))
}

func TestUploadsAreBounded(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(8<<20))
	r := start(t, h, t.TempDir(), func(c *Config) { c.UpLanes = 1 })
	host := dial(t, r, "one")
	task, no := host.join(d, from(""))
	require.Nil(t, no)
	host.content(d)
	var open []io.Closer
	busy := 0
	for range 4 {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url+api.ContentPath(pieces.TaskID(d)), nil)
		require.NoError(t, err)
		req.Header.Set(api.TicketHeader, task.Ticket)
		resp, err := http.DefaultTransport.RoundTrip(req) //nolint:bodyclose // closed below, all at once
		require.NoError(t, err)
		open = append(open, resp.Body)
		if resp.StatusCode == http.StatusServiceUnavailable {
			busy++
			require.NotEmpty(t, resp.Header.Get(api.RetryHeader))
		}
	}
	require.Equal(t, 1, busy)
	for _, c := range open {
		require.NoError(t, c.Close())
	}
}

func TestSchedulerKnowsEveryFailure(t *testing.T) {
	for f := api.Busy; f <= api.Local; f++ {
		require.NotZero(t, failures[f].why)
	}
	require.Equal(t, scheduler.Corrupt, failures[api.Corrupt].why)
}
