package supernode

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// site serves one content, as a web server does.
type site struct {
	*httptest.Server

	mu      sync.Mutex
	asked   []string
	content []byte
	etag    string
	chunked bool // says nothing of its length
	cutAt   int  // breaks off there, once
	noHead  bool
	secret  string // what X-Secret must be
}

func newSite(t *testing.T, content []byte, etag string) *site {
	t.Helper()
	s := &site{content: content, etag: etag}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *site) set(edit func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	edit()
}

func (s *site) gets() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, a := range s.asked {
		if strings.HasPrefix(a, http.MethodGet) {
			n++
		}
	}
	return n
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.asked = append(s.asked, r.Method+" "+r.Header.Get("Range"))
	content, etag, chunked, cutAt, noHead, secret := s.content, s.etag, s.chunked, s.cutAt, s.noHead, s.secret
	s.cutAt = 0
	s.mu.Unlock()
	if r.Header.Get("X-Secret") != secret || noHead && r.Method == http.MethodHead {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusForbidden)
		_, _ = w.Write([]byte("no entry"))
		return
	}
	if etag != "" {
		w.Header().Set("Etag", etag)
	}
	switch {
	case r.Method == http.MethodHead:
		if !chunked {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		}
	case chunked:
		for len(content) > 0 {
			n := min(len(content), 100_000)
			_, _ = w.Write(content[:n])
			w.(http.Flusher).Flush()
			content = content[n:]
		}
	case cutAt > 0:
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		_, _ = w.Write(content[:cutAt])
		panic(http.ErrAbortHandler)
	default:
		off, end := 0, len(content)-1
		if span := r.Header.Get("Range"); span != "" {
			_, _ = fmt.Sscanf(span, "bytes=%d-%d", &off, &end)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, end, len(content)))
			w.Header().Set("Content-Length", fmt.Sprint(end+1-off))
			w.WriteHeader(http.StatusPartialContent)
		} else {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		}
		_, _ = w.Write(content[off : end+1])
	}
}

func (s *site) origin(secret string) (string, api.Origin) {
	u := s.URL + "/file?sig=1"
	return string(pieces.URLTaskID(u)), api.Origin{URL: u, Header: map[string][]string{"X-Secret": {secret}}}
}

func always0(c *Config) { c.TagFreshness = 0 }

func TestURLIsFetchedOnceAndChecked(t *testing.T) {
	for name, edit := range map[string]func(*site){
		"plain":          func(*site) {},
		"takes no HEAD":  func(s *site) { s.noHead = true },
		"unknown length": func(s *site) { s.chunked = true },
		"breaks off":     func(s *site) { s.cutAt = 300_001 },
		"only for some":  func(s *site) { s.secret = "x" },
	} {
		t.Run(name, func(t *testing.T) {
			old, next := newBytes(1<<20), newBytes(1<<20+1)
			s := newSite(t, old, `"1"`)
			edit(s)
			r := start(t, nil, t.TempDir(), always0)
			one, two := dial(t, r, "one"), dial(t, r, "two")
			id, o := s.origin(s.secret)
			for _, host := range []*host{one, two} {
				_, no := host.join(id, o)
				require.Nil(t, no)
				require.Equal(t, hexOf(old), hexOf(host.content(id)))
			}
			require.Equal(t, len(old), r.metric("damselfly_origin_bytes_total"))
			require.Equal(t, len(old), r.metric("damselfly_unique_bytes_total"))
			if s.secret != "" {
				_, no := two.join(id, api.Origin{URL: o.URL})
				require.Equal(t, http.StatusForbidden, no.Status)
				require.True(t, no.Final)
				require.Equal(t, "no entry", string(no.Body))
			}
			require.Eventually(t, func() bool { return r.origin.find(pieces.TaskID(id)) == nil }, wait, poll)

			s.set(func() { s.content, s.etag = next, `"2"` })
			three := dial(t, r, "three")
			_, no := three.join(id, o)
			require.Nil(t, no)
			require.Equal(t, hexOf(next), hexOf(three.content(id)))
			one.await("the order to drop the old one", func() bool { return len(one.invalid) == 1 })
		})
	}
}

func TestURLWithoutChangesIsNotReadAgain(t *testing.T) {
	b := newBytes(1 << 20)
	s := newSite(t, b, `"1"`)
	dir := t.TempDir()
	id, o := s.origin("")
	for range 2 { // the second time after a restart
		r := start(t, nil, dir, always0)
		for i := range 2 {
			host := dial(t, r, fmt.Sprint("h", i))
			_, no := host.join(id, o)
			require.Nil(t, no)
			require.Equal(t, hexOf(b), hexOf(host.content(id)))
			require.Eventually(t, func() bool { return r.origin.find(pieces.TaskID(id)) == nil }, wait, poll)
		}
		r.stop()
	}
	require.Equal(t, 1, s.gets())
}

func TestURLThatChangesMidwayIsNotMixed(t *testing.T) {
	old, next := newBytes(1<<20), make([]byte, 1<<20)
	_, err := rand.Read(next)
	require.NoError(t, err)
	s := newSite(t, old, `"1"`)
	hold := make(chan struct{})
	inner := s.Config.Handler
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != "" {
			<-hold
		}
		inner.ServeHTTP(w, r)
	})
	s.cutAt = 700_000
	r := start(t, nil, t.TempDir(), always0)
	host := dial(t, r, "one")
	id, o := s.origin("")
	_, no := host.join(id, o)
	require.Nil(t, no)
	host.await("the first pieces", func() bool { return len(host.byID[id].have) == 700_000/pieces.MinPieceSize })
	s.set(func() { s.content, s.etag = next, `"2"` })
	close(hold)
	host.await("the order to drop them", func() bool { return len(host.invalid) == 1 })
	require.Eventually(t, func() bool { return r.origin.find(pieces.TaskID(id)) == nil }, wait, poll)
	two := dial(t, r, "two")
	_, no = two.join(id, o)
	require.Nil(t, no)
	require.Equal(t, hexOf(next), hexOf(two.content(id)))
}

func TestURLWithADigestIsHeldToIt(t *testing.T) {
	b := newBytes(1 << 20)
	s := newSite(t, b, "")
	r := start(t, nil, t.TempDir(), nil)
	host := dial(t, r, "one")
	_, o := s.origin("")
	right, wrong := digest.FromBytes(b).String(), digest.FromString("x").String()
	_, no := host.join(right, o)
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(host.content(right)))
	_, no = host.join(wrong, o)
	if no == nil {
		host.await("the order to drop it", func() bool { return len(host.invalid) == 1 })
	} else {
		require.False(t, no.Final)
	}
	require.Eventually(t, func() bool { return len(r.store.Tasks()) == 1 }, wait, poll)
}

func TestSpoolIsBounded(t *testing.T) {
	s := newSite(t, newBytes(1<<20), `"1"`)
	s.chunked = true
	r := start(t, nil, t.TempDir(), func(c *Config) { c.Quota = 300_000 })
	host := dial(t, r, "one")
	id, o := s.origin("")
	_, no := host.join(id, o)
	require.NotNil(t, no)
	require.False(t, no.Final)
	require.Less(t, r.metric("damselfly_origin_bytes_total"), 1<<20)
}

func TestCallersHeaderStaysWithItsHost(t *testing.T) {
	b := newBytes(1000)
	got := make(chan http.Header, 2)
	far := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Clone()
		_, _ = w.Write(b)
	}))
	defer far.Close()
	near := httptest.NewServer(http.RedirectHandler(strings.Replace(far.URL, "127.0.0.1", "localhost", 1)+"/x", http.StatusFound))
	defer near.Close()
	r := start(t, nil, t.TempDir(), nil)
	host := dial(t, r, "one")
	u := near.URL + "/file"
	_, no := host.join(string(pieces.URLTaskID(u)), api.Origin{URL: u, Header: map[string][]string{
		"Authorization": {"Basic s3cr3t"}, "X-Token": {"s3cr3t"}, "Range": {"bytes=5-"}, "host": {"evil"},
	}})
	require.Nil(t, no)
	h := <-got
	require.NotContains(t, fmt.Sprint(h), "s3cr3t")
	require.Empty(t, h.Get("Range"))
	require.Equal(t, hexOf(b), hexOf(host.content(string(pieces.URLTaskID(u)))))
}

// Hosts learn nothing of what the supernode's machine alone may ask, by whichever
// name or redirect.
func TestWhatIsNotAskedForHosts(t *testing.T) {
	open := start(t, nil, t.TempDir(), nil)
	shut := start(t, nil, t.TempDir(), func(c *Config) {
		c.Registries.AllowAddresses = nil
		c.Registries.Allow = []string{"*", "near.test"}
	})
	moved := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", r.URL.Query().Get("to"))
		w.WriteHeader(http.StatusFound)
	}))
	t.Cleanup(moved.Close)
	for _, c := range []struct {
		r       *testRegion
		url, no string
	}{
		{open, "http://169.254.169.254/latest/meta-data", "secrets"},
		{open, "http://169.254.1.1/", "link-local"},
		{open, "http://[fe80::1]/", "link-local"},
		{open, "http://[::1]/", "this machine"},
		{open, moved.URL + "/?to=http://[::ffff:169.254.169.254]/latest", "secrets"},
		{open, moved.URL + "/?to=http://10.1.2.3/", "private network"},
		{open, moved.URL + "/?to=file:///etc/passwd", "from http to file"},
		{shut, moved.URL, "this machine"},
		{shut, "http://localhost:1/", "this machine"},
		{shut, "http://10.1.2.3/", "private network"},
		{shut, "http://[64:ff9b::a01:203]/", "private network"},
		{shut, "http://[2002:a9fe:a9fe::1]/", "secrets"},
		{shut, "http://0.0.0.0:80/", "no host's"},
	} {
		_, no := dial(t, c.r, "one").join(string(pieces.URLTaskID(c.url)), api.Origin{URL: c.url})
		require.NotNil(t, no, c.url)
		require.False(t, no.Final)
		require.Contains(t, no.Reason, c.no, c.url)
	}
}

// personal serves each caller, told by a header, something of its own.
func personal(t *testing.T, contents map[string][]byte, validators bool) (string, func(who string) api.Origin) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := r.Header.Get("Cookie") + r.URL.Query().Get("sig")
		if validators {
			w.Header().Set("Etag", fmt.Sprintf("%q", who))
		}
		if r.Method == http.MethodGet {
			_, _ = w.Write(contents[who])
		}
	}))
	t.Cleanup(s.Close)
	u := s.URL + "/me"
	return string(pieces.URLTaskID(u)), func(who string) api.Origin {
		return api.Origin{URL: u, Header: map[string][]string{"Cookie": {who}}}
	}
}

// A URL may stand for something else for each who asks.
func TestURLGivesEachCallerItsOwn(t *testing.T) {
	contents := map[string][]byte{"alice": newBytes(300_000), "bob": newBytes(300_001), "": newBytes(300_002)}
	for _, validators := range []bool{true, false} {
		t.Run(fmt.Sprint("validators=", validators), func(t *testing.T) {
			id, as := personal(t, contents, validators)
			r := start(t, nil, t.TempDir(), nil) // where what is fresh is not asked for again for long
			for i, who := range []string{"alice", "bob", "alice", "", "bob"} {
				h := dial(t, r, fmt.Sprint("h", i))
				_, no := h.join(id, as(who))
				require.Nil(t, no)
				require.Equal(t, hexOf(contents[who]), hexOf(h.content(id)), "%d: %q gets what is another's", i, who)
				require.Eventually(t, func() bool { return r.origin.find(pieces.TaskID(id)) == nil }, wait, poll)
			}
		})
	}
}

// A signature that is left out of the name may say who asks.
func TestSignedURLWithoutValidatorsGivesEachCallerItsOwn(t *testing.T) {
	contents := map[string][]byte{"alice": newBytes(300_000), "bob": newBytes(300_001)}
	_, as := personal(t, contents, false)
	r := start(t, nil, t.TempDir(), nil)
	for i, who := range []string{"alice", "bob", "alice"} {
		u := as("").URL + "?sig=" + who
		name, ignore := pieces.SignedURLTaskID(u, []string{"sig"})
		id := string(name)
		h := dial(t, r, fmt.Sprint("h", i))
		_, no := h.join(id, api.Origin{URL: u, Ignore: ignore})
		require.Nil(t, no)
		require.Equal(t, hexOf(contents[who]), hexOf(h.content(id)), "%d: %q gets what is another's", i, who)
		require.Eventually(t, func() bool { return r.origin.find(pieces.TaskID(id)) == nil }, wait, poll)
	}
}

// Who may read one thing on a host may not read all there is.
func TestAnotherURLOfAHostProvesNothing(t *testing.T) {
	secret := newBytes(300_000)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/public" || r.URL.RawQuery == "public":
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(newBytes(300_001)))
		case r.Header.Get("Authorization") != "alice":
			w.WriteHeader(http.StatusForbidden)
		default:
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(secret))
		}
	}))
	t.Cleanup(s.Close)
	r := start(t, nil, t.TempDir(), nil)
	id := digest.FromBytes(secret).String()
	alice, eve := dial(t, r, "alice"), dial(t, r, "eve")
	_, no := alice.join(id, api.Origin{URL: s.URL + "/secret", Header: map[string][]string{"Authorization": {"alice"}}})
	require.Nil(t, no)
	require.Equal(t, hexOf(secret), hexOf(alice.content(id)))
	require.Eventually(t, func() bool { return r.origin.find(pieces.TaskID(id)) == nil }, wait, poll)
	_, no = eve.join(id, api.Origin{URL: s.URL + "/secret"})
	require.NotNil(t, no)
	_, no = eve.join(id, api.Origin{URL: s.URL + "/public"})
	require.NotNil(t, no, "another's content for a URL that does not have it")
	own := s.URL + "/secret?public"
	_, no = eve.join(digest.FromBytes(newBytes(300_001)).String(), api.Origin{URL: own})
	require.Nil(t, no)
	_, no = eve.join(id, api.Origin{URL: own})
	require.NotNil(t, no, "another's content for a URL of another length")
}
