package registryproxy

import (
	"context"
	"encoding/base64"
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

// ledger is a Ledger in memory.
type ledger struct {
	mu     sync.Mutex
	public map[Repository]bool
	said   int // calls of SetPublic
}

func (l *ledger) IsPublic(repo Repository) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.public[repo]
}

func (l *ledger) SetPublic(repo Repository, public bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.public == nil {
		l.public = map[Repository]bool{}
	}
	l.public[repo] = public
	l.said++
}

func newAccess(c *Client) *Access { return NewAccess(c, &ledger{}, time.Now) }

func newGuarded(t *testing.T, from ...Upstream) (*guarded, *Access) {
	t.Helper()
	net := newNetwork(t)
	g := &guarded{}
	net.serve("reg.test:443", g)
	return g, newAccess(net.client(Config{Upstreams: from}).Client)
}

// why is v without its end.
func why(v Verdict) Verdict {
	v.Until = time.Time{}
	return v
}

// jwt is a bearer token that nobody has signed, which ends at that time.
func jwt(end time.Time) string {
	claims := fmt.Sprintf(`{"sub":"alice","exp":%d}`, end.Unix())
	return "Bearer e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".c2ln"
}

func TestAccess(t *testing.T) {
	open, closed := Repository{"reg.test", "library/app"}, Repository{"reg.test", "private/app"}
	other := Repository{"reg.test", "private/other"}
	anyone, good, bad := Caller{}, Caller{"Bearer good"}, Caller{"Bearer bad"}
	blob, manifest := digestOf("blob"), digestOf("{}")
	type step struct {
		wait   time.Duration // before it
		repo   Repository
		ref    string
		who    Caller
		held   bool
		asked  int64
		public bool
		status int
	}
	tests := map[string][]step{
		"public": {
			{repo: open, ref: blob, who: anyone, asked: 1, public: true},
			{repo: open, ref: manifest, who: anyone, held: true, public: true},
			{repo: open, ref: manifest, who: bad, held: true, public: true},
			{repo: open, ref: manifest, who: anyone, asked: 1, public: true}, // if it has it is not known
			{repo: closed, ref: blob, who: anyone, held: true, asked: 2, status: 401},
			{wait: 4 * time.Minute, repo: open, ref: blob, who: anyone, held: true, asked: 0, public: true},
			{wait: 6 * time.Minute, repo: open, ref: blob, who: anyone, held: true, asked: 1, public: true},
		},
		"public, asked with credentials": {
			{repo: open, ref: blob, who: bad, asked: 1, public: true}, // without them
			{repo: open, ref: blob, who: bad, held: true, public: true},
			{repo: open, ref: blob, who: good, held: true, public: true},
			{repo: open, ref: blob, who: anyone, held: true, public: true},
		},
		"private": {
			{repo: closed, ref: blob, who: good, held: true, asked: 2 + 1}, // anyone may not; the caller may
			{repo: closed, ref: manifest, who: good, held: true},
			{repo: closed, ref: blob, who: bad, held: true, asked: 2, status: 401},
			{repo: closed, ref: blob, who: anyone, held: true, status: 401}, // as before
			{repo: closed, ref: blob, who: bad, held: true, status: 401},
			{repo: closed, ref: manifest, who: bad, held: true, asked: 2, status: 401},
			{wait: 6 * time.Second, repo: closed, ref: blob, who: bad, held: true, asked: 2, status: 401},
			{wait: 2 * time.Minute, repo: closed, ref: blob, who: good, held: true},
			{wait: 3 * time.Minute, repo: closed, ref: blob, who: good, held: true, asked: 2 + 1},
			{repo: other, ref: blob, who: good, held: true, asked: 2 + 1}, // another repository
		},
		"not held": {
			{repo: closed, ref: blob, who: good, held: true, asked: 2 + 1},
			{repo: closed, ref: manifest, who: good, asked: 1},
			{repo: closed, ref: sha256a, who: good, asked: 2, status: 404},
			{repo: closed, ref: sha256a, who: good, status: 404},
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
					v, err := a.Check(t.Context(), Route{KindBlob, s.repo, s.ref}, s.who, s.held)
					require.Equal(t, s.asked, g.asked.Load()-before, "requests in step %d", i)
					require.Equal(t, Verdict{Public: s.public}, why(v), "step %d", i)
					require.LessOrEqual(t, time.Until(v.Until), ProofLife, "step %d", i)
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

// Whoever the registry has let read needs no proof, for as long as that lasts.
func TestProved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, a := newGuarded(t)
		repo, blob := Repository{"reg.test", "private/app"}, digestOf("blob")
		a.Proved(repo, Caller{"Bearer other"})
		a.closed.put(repo, struct{}{}, ProofLife)
		v, err := a.Check(t.Context(), Route{KindBlob, repo, blob}, Caller{"Bearer other"}, true)
		require.NoError(t, err)
		require.Equal(t, Verdict{}, why(v))
		require.Equal(t, time.Now().Add(ProofLife), v.Until)
		require.Zero(t, g.asked.Load())
		_, err = a.Check(t.Context(), Route{KindBlob, repo, blob}, Caller{}, true)
		_ = refusalOf(t, err)
		_, err = a.Check(t.Context(), Route{KindBlob, repo, blob}, Caller{"Bearer other"}, false)
		require.Equal(t, 401, refusalOf(t, err).Status)
		before := g.asked.Load()
		_, err = a.Check(t.Context(), Route{KindBlob, repo, blob}, Caller{"Bearer other"}, true)
		_ = refusalOf(t, err)
		require.Equal(t, before, g.asked.Load(), "a no ends what was proved")

		a.Proved(repo, Caller{})
		for _, who := range []Caller{{}, {"Bearer x"}} {
			v, err = a.Check(t.Context(), Route{KindBlob, repo, blob}, who, true)
			require.NoError(t, err)
			require.True(t, v.Public)
		}
	})
}

// What a caller has proved lasts no longer than its token, and never more than five
// minutes: then a revoked one is refused.
func TestProofsEnd(t *testing.T) {
	repo, blob := Repository{"reg.test", "private/app"}, digestOf("blob")
	for name, tt := range map[string]struct {
		token func() string
		last  time.Duration
	}{
		"basic":          {func() string { return alice }, ProofLife},
		"opaque":         {func() string { return "Bearer a.b.c" }, ProofLife},
		"of an hour":     {func() string { return jwt(time.Now().Add(time.Hour)) }, ProofLife},
		"of two minutes": {func() string { return jwt(time.Now().Add(2 * time.Minute)) }, 2 * time.Minute},
		"expired":        {func() string { return jwt(time.Now().Add(-time.Minute)) }, 0},
		"of the year 10^30": {func() string {
			return "bearer e30." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":1e30}`)) + ".x"
		}, ProofLife},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, a := newGuarded(t)
				who := Caller{tt.token()}
				a.Proved(repo, who)
				a.closed.put(repo, struct{}{}, time.Hour)
				require.InDelta(t, tt.last, who.Life(time.Now()), float64(time.Second))
				check := func() error {
					_, err := a.Check(t.Context(), Route{KindBlob, repo, blob}, who, true)
					return err
				}
				if tt.last > 0 {
					<-time.After(tt.last - 2*time.Second)
					require.NoError(t, check())
				}
				<-time.After(3 * time.Second)
				require.Equal(t, 401, refusalOf(t, check()).Status)
			})
		})
	}
}

// While the registry is away, what anyone could read stays readable, and for as long
// as the configuration says what the caller could; nothing for who has proved nothing.
func TestAccessWhileAway(t *testing.T) {
	open, closed := Repository{"reg.test", "library/app"}, Repository{"reg.test", "private/app"}
	blob, good := digestOf("blob"), Caller{"Bearer good"}
	for name, away := range map[string]time.Duration{"refuse": 0, "for 30m": 30 * time.Minute} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, a := newGuarded(t, Upstream{Name: "reg.test", ReadersWhenAway: away})
				check := func(repo Repository, who Caller, held bool) (Verdict, error) {
					return a.Check(t.Context(), Route{KindBlob, repo, blob}, who, held)
				}
				soon := Caller{jwt(time.Now().Add(10 * time.Minute))}
				a.Proved(closed, soon)
				for repo, who := range map[Repository]Caller{open: {}, closed: good} {
					_, err := check(repo, who, false)
					require.NoError(t, err)
				}
				g.down.Store(true)
				<-time.After(6 * time.Minute)
				for _, who := range []Caller{{}, good, {"Bearer bad"}} {
					v, err := check(open, who, true)
					require.NoError(t, err)
					require.Equal(t, Verdict{Public: true, Away: true}, why(v))
					require.Equal(t, time.Now().Add(awayLife), v.Until)
					_, err = check(open, who, false)
					require.Error(t, err, "it may not have it")
				}
				for _, who := range []Caller{{}, {"Bearer bad"}} {
					_, err := check(closed, who, true)
					require.Error(t, err)
				}
				v, err := check(closed, good, true)
				_, soonErr := check(closed, soon, true)
				if away == 0 {
					require.True(t, IsTemporary(err), "%v", err)
					require.Error(t, soonErr)
					return
				}
				require.NoError(t, err)
				require.NoError(t, soonErr)
				require.Equal(t, Verdict{Away: true}, why(v))
				<-time.After(5 * time.Minute)
				_, err = check(closed, soon, true)
				require.Error(t, err, "its token has ended")
				<-time.After(away - 11*time.Minute - time.Second)
				_, err = check(closed, good, true)
				require.NoError(t, err)
				<-time.After(2 * time.Second)
				_, err = check(closed, good, true)
				require.Error(t, err)
			})
		})
	}
}

// A registry that does not answer is not waited for where there is an answer; and
// what is no longer public is not while it is away.
func TestAccessKeepsTheLastWord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, a := newGuarded(t)
		repo, blob := Repository{"reg.test", "private/app"}, digestOf("blob")
		a.ledger.SetPublic(repo, true) // as it was
		g.slow.Store(true)
		start := time.Now()
		v, err := a.Check(t.Context(), Route{KindBlob, repo, blob}, Caller{}, true)
		require.NoError(t, err)
		require.True(t, v.Away)
		require.LessOrEqual(t, time.Since(start), awayAfter)
		g.slow.Store(false)
		_, err = a.Check(t.Context(), Route{KindBlob, repo, blob}, Caller{"Bearer good"}, true)
		require.NoError(t, err)
		g.down.Store(true)
		<-time.After(6 * time.Minute)
		_, err = a.Check(t.Context(), Route{KindBlob, repo, blob}, Caller{}, true)
		require.Error(t, err)
	})
}

// A registry in trouble is no refusal, and nothing is remembered of it.
func TestAccessInTrouble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, a := newGuarded(t)
		g.down.Store(true)
		repo, blob := Repository{"reg.test", "library/app"}, digestOf("blob")
		_, err := a.Check(t.Context(), Route{KindBlob, repo, blob}, Caller{}, true)
		require.True(t, IsTemporary(err))
		g.down.Store(false)
		_, err = a.Check(t.Context(), Route{KindBlob, repo, blob}, Caller{}, true)
		require.NoError(t, err)
		_, err = a.Check(t.Context(), Route{KindBlob, Repository{"nowhere.test", "app"}, blob}, Caller{}, true)
		require.True(t, IsTemporary(err))
		_, err = a.Check(t.Context(), Route{KindTags, Repository{"reg.test", "private/app"}, ""}, Caller{"x"}, true)
		_ = refusalOf(t, err)
	})
}

// Callers with the same credentials share a request, whatever they ask for; who
// leaves takes it from nobody.
func TestAccessIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, a := newGuarded(t)
		g.slow.Store(true)
		repo := Repository{"reg.test", "private/app"}
		a.closed.put(repo, struct{}{}, ProofLife)
		refs := []string{sha256a, digestOf("blob"), digestOf("{}")} // the first is not there, which is a no to that alone
		var wg sync.WaitGroup
		for i := range 30 {
			ctx := t.Context()
			if i%3 == 0 {
				short, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				ctx = short
			}
			wg.Go(func() {
				_, err := a.Check(ctx, Route{KindBlob, repo, refs[i%3]}, Caller{"Bearer good"}, true)
				if i%3 == 0 {
					require.ErrorIs(t, err, context.DeadlineExceeded)
				} else {
					require.NoError(t, err)
				}
			})
			synctest.Wait() // so that the one that leaves is the first
		}
		wg.Wait()
		require.EqualValues(t, 2+2, g.asked.Load(), "the no, in its words, and one for each of the others")
	})
}

// A crowd of callers with credentials of their own: one try without, and a HEAD for
// each; one more for a blob of which nobody knows if it is there. Who is refused, or
// asks for what is not there, leaves the others what they may.
func TestAccessOfACrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		var heads sync.Map
		var probes atomic.Int64
		net.handle("reg.test:443", func(w http.ResponseWriter, r *http.Request) {
			<-time.After(100 * time.Millisecond)
			who := r.Header.Get("Authorization")
			if !strings.HasPrefix(who, "Bearer good") {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			if strings.Contains(r.URL.Path, sha256a) {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			n, _ := heads.LoadOrStore(who, new(atomic.Int64))
			n.(*atomic.Int64).Add(1)
			if strings.Contains(r.URL.Path, digestOf("shared")) {
				probes.Add(1)
			}
		})
		a := newAccess(net.client(Config{}).Client)
		repo := Repository{"reg.test", "private/app"}
		crowd := func(held bool, refs ...string) {
			var wg sync.WaitGroup
			for i := range 30 {
				who, status := Caller{fmt.Sprintf("Bearer good %d", i)}, 0
				if i%10 == 0 {
					who, status = Caller{fmt.Sprintf("Bearer bad %d", i)}, 401
				}
				for _, ref := range refs {
					wg.Go(func() {
						_, err := a.Check(t.Context(), Route{KindBlob, repo, ref}, who, held)
						if status == 0 && ref != sha256a {
							require.NoError(t, err)
						} else {
							_ = refusalOf(t, err)
						}
					})
				}
			}
			wg.Wait()
		}
		crowd(true, digestOf("one"), digestOf("two"), digestOf("three"))
		count := func() (n, most int64) {
			heads.Range(func(_, v any) bool { n++; most = max(most, v.(*atomic.Int64).Load()); return true })
			return n, most
		}
		n, most := count()
		require.EqualValues(t, 27, n)
		require.EqualValues(t, 1, most, "of each caller")
		crowd(false, digestOf("shared"))
		require.EqualValues(t, 1, probes.Load())
		crowd(false, sha256a)
		_, most = count()
		require.LessOrEqual(t, most, int64(2))
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
		v, err := newAccess(c.Client).Check(t.Context(), Route{KindBlob, public, digestOf("blob")}, Caller{}, false)
		require.NoError(t, err)
		require.True(t, v.Public)
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
		a := newAccess(net.client(Config{}).Client)
		for i := range maxReaders + 10 {
			a.Proved(public, Caller{fmt.Sprint(i)})
		}
		require.LessOrEqual(t, len(a.readers.entries), maxReaders)
		for i := range maxRefusals + 10 {
			_, err := a.Check(t.Context(), Route{KindBlob, public, "sha256:" + strings.Repeat("0", 64-8) + fmt.Sprintf("%08x", i)}, Caller{}, false)
			require.Error(t, err)
		}
		require.LessOrEqual(t, len(a.refusals.entries), maxRefusals)
	})
}
