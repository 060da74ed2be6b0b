package supernode

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

func nullLogger() *log.Logger { return log.New(io.Discard, "", 0) }

const blobs = "GET /v2/demo/app/blobs/"

func TestBlobFlowsFromRegistryToHosts(t *testing.T) {
	h := newHub(t)
	b := newBytes(3<<20 + 100)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	one, two := dial(t, r, "one"), dial(t, r, "two")
	for _, host := range []*host{one, two} {
		task, no := host.join(d, from(""))
		require.Nil(t, no)
		require.True(t, task.Public)
		require.EqualValues(t, len(b), task.Layout.Length)
	}
	require.Equal(t, hexOf(b), hexOf(one.content(d)))
	require.Equal(t, hexOf(b), hexOf(two.content(d)))
	require.Equal(t, len(b), r.metric("damselfly_origin_bytes_total"))
	require.Equal(t, len(b), r.metric("damselfly_unique_bytes_total"))
	got := r.get(http.MethodGet, v2("blobs", d))
	require.Equal(t, http.StatusOK, got.status)
	require.Equal(t, hexOf(b), hexOf(got.body))
	require.Equal(t, 1, h.times(blobs))
}

func TestJoinsAtOneMomentShareOneFetch(t *testing.T) {
	h := newHub(t)
	b := newBytes(2 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), nil)
	var hosts []*host
	var seqs []uint64
	for i := range 10 {
		hosts = append(hosts, dial(t, r, fmt.Sprint("h", i)))
	}
	for range 10 {
		for _, host := range hosts {
			seqs = append(seqs, host.ask(d, from("")))
		}
	}
	for i, seq := range seqs {
		task, no := hosts[i%10].answer(seq)
		require.Nil(t, no)
		require.Equal(t, d, task.Task)
	}
	for _, host := range hosts {
		require.Equal(t, hexOf(b), hexOf(host.content(d)))
	}
	require.Equal(t, 1, h.times(blobs))
	require.Zero(t, h.times("HEAD"))
	require.Equal(t, len(b), r.metric("damselfly_origin_bytes_total"))
}

func TestSmallBlobComesWithTheAssignment(t *testing.T) {
	h := newHub(t)
	for _, n := range []int{0, 1, 1000, api.MaxInline, api.MaxInline + 1} {
		b := newBytes(n)
		d := h.blob(t, b)
		r := start(t, h, t.TempDir(), nil)
		host := dial(t, r, "one")
		_, no := host.join(d, from(""))
		require.Nil(t, no)
		require.Equal(t, hexOf(b), hexOf(host.content(d)))
		if n > 0 {
			require.Equal(t, n <= api.MaxInline, host.assigns[0].Data != nil)
			sent := func() bool { return r.metric("damselfly_sent_bytes_total") == n }
			require.Eventually(t, sent, wait, poll) // it is counted when it is out
		}
		got := r.get(http.MethodGet, v2("blobs", d))
		require.Equal(t, http.StatusOK, got.status)
		require.Len(t, got.body, n)
		r.stop()
	}
}

// broken serves the first n bytes of b, as the hub's blob, once for every
// element of kinds: cut off, stalled, or with a server's failure; then all.
func broken(b []byte, n int, kinds ...string) func(http.ResponseWriter, *http.Request) bool {
	var asked atomic.Int32
	return func(w http.ResponseWriter, r *http.Request) bool {
		i := int(asked.Add(1)) - 1
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") || i >= len(kinds) {
			return false
		}
		if kinds[i] == "fails" {
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		off := 0
		_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &off)
		w.Header().Set("Content-Length", fmt.Sprint(len(b)-off))
		if off > 0 {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, len(b)-1, len(b)))
			w.WriteHeader(http.StatusPartialContent)
		}
		_, _ = w.Write(b[off:min(off+n, len(b))])
		if kinds[i] == "stalls" {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
		panic(http.ErrAbortHandler)
	}
}

func TestFetchGoesOnWhereTheOriginStopped(t *testing.T) {
	h := newHub(t)
	b := newBytes(2<<20 + 7)
	d := h.blob(t, b)
	h.misbehave(broken(b, 500_001, "cut", "fails", "stalls", "fails", "fails", "cut"))
	r := start(t, h, t.TempDir(), nil)
	host := dial(t, r, "one")
	_, no := host.join(d, from(""))
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(host.content(d)))
	require.Equal(t, 7, h.times(blobs))
	require.Equal(t, len(b), r.metric("damselfly_origin_bytes_total"), "no byte twice")
}

func TestFetchOutlivesWhoAskedForIt(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	goOn := make(chan struct{})
	h.misbehave(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet {
			<-goOn
		}
		return false
	})
	r := start(t, h, t.TempDir(), nil)
	one := dial(t, r, "one")
	one.ask(d, from(""))
	require.Eventually(t, func() bool { return h.times(blobs) == 1 }, wait, poll)
	one.die()
	close(goOn)
	two := dial(t, r, "two")
	_, no := two.join(d, from(""))
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(two.content(d)))
	require.Equal(t, 1, h.times(blobs))
}

func TestWrongContentIsGivenToNobody(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := digest.FromString("something else").String()
	goOn := make(chan struct{})
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		if r.Method == http.MethodGet {
			_, _ = w.Write(b[:len(b)-1])
			w.(http.Flusher).Flush()
			<-goOn
			_, _ = w.Write(b[len(b)-1:])
		}
		return true
	})
	dir := t.TempDir()
	r := start(t, h, dir, nil)
	host := dial(t, r, "one")
	task, no := host.join(d, from(""))
	require.Nil(t, no)
	last := task.Layout.Count() - 1
	host.await("all but the last piece", func() bool { return len(host.byID[d].have) == last })
	got := r.get(http.MethodGet, api.ContentPath(pieces.TaskID(d)), api.TicketHeader, task.Ticket,
		"Range", fmt.Sprintf("bytes=%d-", task.Layout.Offset(last)))
	require.Equal(t, http.StatusNotFound, got.status)
	resp, err := http.Get(r.url + v2("blobs", d)) //nolint:noctx // a test's end ends it
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	require.Equal(t, http.StatusOK, resp.StatusCode)
	close(goOn)
	host.await("the order to drop it", func() bool { return len(host.invalid) == 1 && host.invalid[0].Task == d })
	require.Len(t, host.byID[d].digests, last, "the last digest was held")
	mirrored, err := io.ReadAll(resp.Body)
	require.Error(t, err)
	require.Len(t, mirrored, len(b)-int(task.Layout.Size(last)))
	require.Empty(t, r.store.Tasks())
	require.Equal(t, 1, r.metric("damselfly_verify_failures_total"))
	require.Zero(t, r.metric("damselfly_unique_bytes_total"))

	_, no = host.join(d, from(""))
	if no == nil { // granted before it was found wrong, and taken back
		host.await("the second order", func() bool { return len(host.invalid) == 2 })
	} else {
		require.False(t, no.Final)
	}
}

func TestRestartGoesOnWithWhatItHas(t *testing.T) {
	for name, unclean := range map[string]bool{"clean": false, "killed": true} {
		t.Run(name, func(t *testing.T) {
			h := newHub(t)
			b := newBytes(2 << 20)
			d := h.blob(t, b)
			dir := t.TempDir()
			h.misbehave(broken(b, len(b)/2+10, "stalls", "fails", "fails", "fails", "fails", "fails", "fails"))
			r := start(t, h, dir, nil)
			host := dial(t, r, "one")
			_, no := host.join(d, from(""))
			require.Nil(t, no)
			host.await("half of it", func() bool { return len(host.byID[d].have) == len(b)/2/pieces.MinPieceSize })
			r.stop()
			h.misbehave(nil)
			if unclean {
				require.NoError(t, os.Remove(filepath.Join(dir, "store", "clean")))
			}

			r = start(t, h, dir, nil)
			again := dial(t, r, "one")
			_, no = again.join(d, from(""))
			require.Nil(t, no)
			require.Equal(t, hexOf(b), hexOf(again.content(d)))
			require.Equal(t, len(b)/2, r.metric("damselfly_origin_bytes_total"))
			require.Equal(t, len(b)/2, r.metric("damselfly_unique_bytes_total"))
			require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)
			r.stop()
			if unclean {
				require.NoError(t, os.Remove(filepath.Join(dir, "store", "clean")))
			}

			gets := h.times("GET")
			r = start(t, h, dir, nil)
			last := dial(t, r, "two")
			_, no = last.join(d, from(""))
			require.Nil(t, no)
			require.Equal(t, hexOf(b), hexOf(last.content(d)))
			require.Equal(t, gets, h.times("GET"))
			require.Equal(t, 1, h.times("HEAD"), "the new caller is checked")
		})
	}
}

func TestPieceThatRottedIsFetchedAgain(t *testing.T) {
	h := newHub(t)
	b := newBytes(2 << 20)
	d := h.blob(t, b)
	dir := t.TempDir()
	r := start(t, h, dir, nil)
	require.Len(t, r.get(http.MethodGet, v2("blobs", d)).body, len(b))
	require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)
	r.stop()
	require.NoError(t, os.Remove(filepath.Join(dir, "store", "clean")))
	f, err := os.OpenFile(filepath.Join(dir, "store", strings.Replace(d, ":", "-", 1), "content"), os.O_RDWR, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("rot"), 700_000)
	require.NoError(t, err)
	require.NoError(t, f.Close())

	r = start(t, h, dir, nil)
	host := dial(t, r, "one")
	_, no := host.join(d, from(""))
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(host.content(d)))
	require.LessOrEqual(t, r.metric("damselfly_origin_bytes_total"), 2<<18, "no more than what is read ahead")
}

func TestOriginsNoIsTheCallersAnswer(t *testing.T) {
	h := newHub(t)
	missing := digest.FromString("missing").String()
	r := start(t, h, t.TempDir(), nil)
	host := dial(t, r, "one")

	_, no := host.join(missing, from(""))
	require.Equal(t, http.StatusNotFound, no.Status)
	require.True(t, no.Final)
	direct := ask(t, h.URL+"/v2/demo/app/blobs/"+missing)
	require.Equal(t, string(direct.body), string(no.Body))
	got := r.get(http.MethodGet, v2("blobs", missing))
	require.Equal(t, direct.status, got.status)
	require.Equal(t, string(direct.body), string(got.body))
	require.Empty(t, got.header.Get(api.ErrorHeader))

	for _, status := range []int{401, 403, 429} {
		h.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Www-Authenticate", `Bearer realm="http://127.0.0.1:1/token"`)
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, noEntry)
			return true
		})
		_, no = host.join(missing, from(fmt.Sprint("Bearer x", status))) // a no to one is remembered
		require.Equal(t, status, no.Status)
		require.True(t, no.Final)
		require.Equal(t, noEntry, string(no.Body))
		require.Equal(t, "7", http.Header(no.Header).Get("Retry-After"))
		for _, path := range []string{v2("blobs", missing), v2("manifests", "v1"), v2("manifests", missing), v2("tags", "list")} {
			got = r.get(http.MethodGet, path, "Authorization", fmt.Sprint("Bearer x", status))
			require.Equal(t, status, got.status, path)
			require.Equal(t, noEntry, string(got.body), path)
			require.Contains(t, got.header.Get("Www-Authenticate"), "Bearer realm", path)
			require.Empty(t, got.header.Get(api.ErrorHeader), path)
		}
	}

	h.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusInternalServerError)
		return true
	})
	_, no = host.join(missing, from(""))
	require.False(t, no.Final, "trouble is no answer")
}

func TestPrivateBlobGoesOnlyToWhomTheRegistryAccepts(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	h.misbehave(private("Basic good"))
	r := start(t, h, t.TempDir(), nil)
	one, two := dial(t, r, "one"), dial(t, r, "two")
	task, no := one.join(d, from("Basic good"))
	require.Nil(t, no)
	require.False(t, task.Public)
	require.Equal(t, hexOf(b), hexOf(one.content(d)))

	for _, who := range []string{"", "Basic bad"} {
		_, no = two.join(d, from(who))
		require.NotNil(t, no, who)
		require.Equal(t, http.StatusUnauthorized, no.Status)
		require.True(t, no.Final)
		require.Equal(t, noEntry, string(no.Body))
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			got := r.get(method, v2("blobs", d), "Authorization", who)
			require.Equal(t, http.StatusUnauthorized, got.status)
			require.Contains(t, got.header.Get("Www-Authenticate"), "hub")
		}
	}
	path := api.ContentPath(pieces.TaskID(d))
	other, err := r.keys.sign(api.Ticket{Task: digest.FromString("x").String(), Host: "two", Expires: 1 << 40})
	require.NoError(t, err)
	for _, ticket := range []string{"", "x.y", other} {
		require.Equal(t, http.StatusUnauthorized, r.get(http.MethodGet, path, api.TicketHeader, ticket).status)
	}
	require.Equal(t, hexOf(b), hexOf(r.get(http.MethodGet, path, api.TicketHeader, task.Ticket).body))
	require.Equal(t, hexOf(b), hexOf(r.get(http.MethodGet, v2("blobs", d), "Authorization", "Basic good").body))
	require.Equal(t, 1, h.times(blobs)-strayGets(h, d), "one fetch")
	require.Equal(t, len(b), r.metric("damselfly_origin_bytes_total"))
}

// strayGets counts the GETs that were refused.
func strayGets(h *hub, d string) int { return h.times(blobs+d) - 1 }

func TestFetchGoesOnWithAnothersCredentials(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	var expired atomic.Bool
	goOn := make(chan struct{})
	cut := broken(b, 300_000, "cut")
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		who := r.Header.Get("Authorization")
		if who != "Basic two" && (who != "Basic one" || expired.Load()) {
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if r.Method == http.MethodGet && who == "Basic one" {
			defer func() { <-goOn; expired.Store(true) }()
			return cut(w, r)
		}
		return false
	})
	r := start(t, h, t.TempDir(), nil)
	one, two := dial(t, r, "one"), dial(t, r, "two")
	_, no := one.join(d, from("Basic one"))
	require.Nil(t, no)
	_, no = two.join(d, from("Basic two"))
	require.Nil(t, no)
	close(goOn)
	require.Equal(t, hexOf(b), hexOf(one.content(d)))
	require.Equal(t, hexOf(b), hexOf(two.content(d)))
	require.Equal(t, len(b), r.metric("damselfly_origin_bytes_total"))
}

func TestRefusalOfOneIsNotTheAnswerToAnother(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	goOn := make(chan struct{})
	deny := private("Basic good")
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "Basic bad" {
			<-goOn
		}
		return deny(w, r)
	})
	r := start(t, h, t.TempDir(), nil)
	bad, good := dial(t, r, "bad"), dial(t, r, "good")
	first := bad.ask(d, from("Basic bad"))
	require.Eventually(t, func() bool { return h.times(blobs) == 1 }, wait, poll)
	second := good.ask(d, from("Basic good"))
	close(goOn)
	_, no := bad.answer(first)
	require.Equal(t, http.StatusUnauthorized, no.Status)
	_, no = good.answer(second)
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(good.content(d)))
}

func TestPublicBlobIsGivenWhileTheRegistryIsAway(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	dir := t.TempDir()
	r := start(t, h, dir, nil)
	require.Len(t, r.get(http.MethodGet, v2("blobs", d)).body, len(b))
	require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)
	r.stop()
	h.CloseClientConnections()
	h.Close()
	r = start(t, h, dir, nil)
	host := dial(t, r, "one")
	_, no := host.join(d, from(""))
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(host.content(d)))
	other := from("")
	other.Repository = "demo/other"
	_, no = host.join(d, other)
	require.NotNil(t, no, "public is a blob of a repository")
	require.False(t, no.Final)
}

func TestWhatDoesNotFitGoesPastTheCache(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	r := start(t, h, t.TempDir(), func(c *Config) { c.Quota = 1000 })
	host := dial(t, r, "one")
	_, no := host.join(d, from(""))
	require.NotNil(t, no)
	require.False(t, no.Final)
	require.Equal(t, hexOf(b), hexOf(r.get(http.MethodGet, v2("blobs", d)).body))
	got := r.get(http.MethodGet, v2("blobs", d), "Range", "bytes=100-199")
	require.Equal(t, http.StatusPartialContent, got.status)
	require.Equal(t, hexOf(b[100:200]), hexOf(got.body))
}

// Where the store breaks midway the registry gives the rest; what was given before, and
// turns out to be wrong, does not end as if it were whole.
func TestStoreThatBreaksMidwayDoesNotCutABlob(t *testing.T) {
	for _, wrong := range []bool{false, true} {
		t.Run(fmt.Sprint("wrong at first ", wrong), func(t *testing.T) {
			h := newHub(t)
			b := newBytes(1 << 20)
			d := h.blob(t, b)
			goOn := make(chan struct{})
			var first atomic.Bool
			h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodGet || first.Swap(true) {
					return false
				}
				sends := slices.Clone(b)
				if wrong {
					sends[1000] ^= 1
				}
				w.Header().Set("Content-Length", fmt.Sprint(len(b)))
				_, _ = w.Write(sends[:600_000])
				w.(http.Flusher).Flush()
				<-goOn
				_, _ = w.Write(sends[600_000:])
				return true
			})
			r := start(t, h, t.TempDir(), nil)
			resp, err := http.Get(r.url + v2("blobs", d)) //nolint:noctx // a test's end ends it
			require.NoError(t, err)
			defer func() { _ = resp.Body.Close() }()
			got := make([]byte, pieces.MinPieceSize)
			_, err = io.ReadFull(resp.Body, got)
			require.NoError(t, err)
			require.NoError(t, r.store.Remove(pieces.TaskID(d)))
			close(goOn)
			rest, err := io.ReadAll(resp.Body)
			if wrong {
				require.Error(t, err)
				require.Less(t, len(got)+len(rest), len(b))
				return
			}
			require.NoError(t, err)
			require.Equal(t, hexOf(b), hexOf(append(got, rest...)))
		})
	}
}
