package registryproxy

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// guarded is a registry with a public and a private repository, the private one
// for "Bearer good", and a switch to fail.
type guarded struct {
	asked atomic.Int64
	heads atomic.Int64
	down  atomic.Bool
	slow  atomic.Bool
}

func (g *guarded) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.asked.Add(1)
	if r.Method == http.MethodHead {
		g.heads.Add(1)
	}
	if g.slow.Load() {
		<-time.After(2 * time.Second)
	}
	switch {
	case g.down.Load():
		w.WriteHeader(http.StatusServiceUnavailable)
	case strings.HasPrefix(r.URL.Path, "/v2/private/") && r.Header.Get("Authorization") != "Bearer good":
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		WriteError(w, &Error{401, "UNAUTHORIZED", "the registry's own words"})
	default:
		sourceOf("{}", "blob")(w, r)
	}
}

func newGuarded(t *testing.T) (*guarded, *Access) {
	t.Helper()
	net := newNetwork(t)
	g := &guarded{}
	net.serve("reg.test:443", g)
	return g, NewAccess(net.client(Config{}).Client, time.Now)
}

func TestAccess(t *testing.T) {
	open, closed := Repository{"reg.test", "library/app"}, Repository{"reg.test", "private/app"}
	anyone, good, bad := Caller{}, Caller{"Bearer good"}, Caller{"Bearer bad"}
	blob := digestOf("blob")
	type step struct {
		wait   time.Duration // before it
		repo   Repository
		ref    string
		who    Caller
		asked  int64
		public bool
		status int
	}
	tests := map[string][]step{
		"public": {
			{repo: open, ref: blob, who: anyone, asked: 1, public: true},
			{repo: open, ref: blob, who: anyone, public: true},
			{repo: open, ref: blob, who: bad, public: true},
			{repo: open, ref: digestOf("{}"), who: anyone, asked: 1, public: true},
			{repo: closed, ref: blob, who: anyone, asked: 2, status: 401},
			{wait: 4 * time.Minute, repo: open, ref: blob, who: anyone, public: true},
			{wait: 2 * time.Minute, repo: open, ref: blob, who: anyone, asked: 1, public: true},
		},
		"public, asked with credentials": {
			{repo: open, ref: blob, who: bad, asked: 1},
			{repo: open, ref: blob, who: bad},
			{repo: open, ref: blob, who: good, asked: 1},
			{repo: open, ref: blob, who: anyone, asked: 1, public: true},
			{repo: open, ref: blob, who: bad, public: true},
		},
		"private": {
			{repo: closed, ref: blob, who: good, asked: 1},
			{repo: closed, ref: blob, who: good},
			{repo: closed, ref: blob, who: bad, asked: 2, status: 401},
			{repo: closed, ref: blob, who: anyone, asked: 2, status: 401},
			{repo: closed, ref: blob, who: bad, status: 401},
			{wait: 6 * time.Second, repo: closed, ref: blob, who: bad, asked: 2, status: 401},
			{wait: 5 * time.Minute, repo: closed, ref: blob, who: good, asked: 1},
		},
		"not there": {
			{repo: open, ref: sha256a, who: anyone, asked: 2, status: 404},
			{repo: open, ref: sha256a, who: anyone, status: 404},
			{repo: open, ref: sha256a, who: good, asked: 2, status: 404},
		},
	}
	for name, steps := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, a := newGuarded(t)
				for i, s := range steps {
					<-time.After(s.wait)
					before := g.asked.Load()
					public, err := a.Check(t.Context(), KindBlob, s.repo, s.ref, s.who)
					require.Equal(t, s.asked, g.asked.Load()-before, "requests in step %d", i)
					require.Equal(t, s.public, public, "step %d", i)
					if s.status == 0 {
						require.NoError(t, err, "step %d", i)
						continue
					}
					require.Equal(t, s.status, refusalOf(t, err).Status)
					require.NotEmpty(t, refusalOf(t, err).Body, "the registry's own words")
				}
			})
		})
	}
}

// A manifest's proof says nothing of a blob, nor a tag's of a digest.
func TestAccessIsExact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, a := newGuarded(t)
		repo, who := Repository{"reg.test", "private/app"}, Caller{"Bearer good"}
		for _, s := range []struct {
			kind Kind
			ref  string
		}{{KindManifest, "latest"}, {KindManifest, digestOf("{}")}, {KindBlob, digestOf("{}")}} {
			before := g.asked.Load()
			_, err := a.Check(t.Context(), s.kind, repo, s.ref, who)
			require.NoError(t, err)
			require.EqualValues(t, 1, g.asked.Load()-before)
		}
	})
}

func TestProved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, a := newGuarded(t)
		repo, blob := Repository{"reg.test", "private/app"}, digestOf("blob")
		a.Proved(KindBlob, repo, blob, Caller{"Bearer other"}, false)
		public, err := a.Check(t.Context(), KindBlob, repo, blob, Caller{"Bearer other"})
		require.NoError(t, err)
		require.False(t, public)
		require.Zero(t, g.asked.Load())
		_, err = a.Check(t.Context(), KindBlob, repo, blob, Caller{})
		_ = refusalOf(t, err)

		a.Proved(KindBlob, repo, blob, Caller{"Bearer other"}, true)
		for _, who := range []Caller{{}, {"Bearer x"}} {
			public, err = a.Check(t.Context(), KindBlob, repo, blob, who)
			require.NoError(t, err)
			require.True(t, public)
		}
	})
}

// A registry in trouble is no refusal, and nothing is remembered of it.
func TestAccessInTrouble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, a := newGuarded(t)
		g.down.Store(true)
		repo, blob := Repository{"reg.test", "library/app"}, digestOf("blob")
		_, err := a.Check(t.Context(), KindBlob, repo, blob, Caller{})
		require.True(t, IsTemporary(err))
		g.down.Store(false)
		_, err = a.Check(t.Context(), KindBlob, repo, blob, Caller{})
		require.NoError(t, err)
		_, err = a.Check(t.Context(), KindBlob, Repository{"nowhere.test", "app"}, blob, Caller{})
		require.True(t, IsTemporary(err))
		_, err = a.Check(t.Context(), KindTags, repo, "", Caller{"x"})
		_ = refusalOf(t, err)
	})
}

// Callers with the same credentials share a request; one that leaves takes it
// from nobody.
func TestAccessIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, a := newGuarded(t)
		g.slow.Store(true)
		repo, blob := Repository{"reg.test", "private/app"}, digestOf("blob")
		var wg sync.WaitGroup
		for i := range 30 {
			ctx := t.Context()
			if i%3 == 0 {
				short, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				ctx = short
			}
			wg.Go(func() {
				_, err := a.Check(ctx, KindBlob, repo, blob, Caller{"Bearer good"})
				if i%3 == 0 {
					require.ErrorIs(t, err, context.DeadlineExceeded)
				} else {
					require.NoError(t, err)
				}
			})
			synctest.Wait() // so that the one that leaves is the first
		}
		wg.Wait()
		require.EqualValues(t, 1, g.asked.Load())
	})
}

// A store that takes no HEAD for what was signed for a GET stands in nobody's
// way, and no blob is read for a check.
func TestAccessBehindSignedURLs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		net.handle("store.test:443", store)
		net.handle("reg.test:443", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://store.test/b/"+digestOf("blob")+"?signature=s3cr3t", http.StatusTemporaryRedirect)
		})
		c := net.client(Config{})
		public, err := NewAccess(c.Client, time.Now).Check(t.Context(), KindBlob, public, digestOf("blob"), Caller{})
		require.NoError(t, err)
		require.True(t, public)
		require.Zero(t, c.received(KindBlob))
	})
}

// However many callers there are, memory is bounded.
func TestAccessIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		net.handle("reg.test:443", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, strings.Repeat("x", 1000))
		})
		a := NewAccess(net.client(Config{}).Client, time.Now)
		for i := range maxProofs + 10 {
			a.Proved(KindBlob, public, sha256a, Caller{string(rune(i))}, false)
		}
		require.LessOrEqual(t, len(a.proofs.entries), maxProofs)
		for i := range maxRefusals + 10 {
			_, err := a.Check(t.Context(), KindBlob, public, "sha256:"+strings.Repeat("0", 64-8)+fmt.Sprintf("%08x", i), Caller{})
			require.Error(t, err)
		}
		require.LessOrEqual(t, len(a.refusals.entries), maxRefusals)
	})
}
