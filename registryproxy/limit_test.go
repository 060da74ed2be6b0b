package registryproxy

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for s, want := range map[string]time.Duration{
		"0": 0, "1": time.Second, " 120 ": 2 * time.Minute, "3600": time.Hour, "99999999999999999999": time.Hour,
		"Fri, 02 Jan 2026 03:05:05 GMT":    time.Minute,
		"Friday, 02-Jan-26 03:05:05 GMT":   time.Minute,
		"Fri Jan  2 03:05:05 2026":         time.Minute,
		"Fri, 02 Jan 2026 03:04:00 GMT":    0,
		"Fri, 02 Jan 2099 03:04:00 GMT":    time.Hour,
		"":                                 -1,
		"-1":                               -1,
		"1.5":                              -1,
		"soon":                             -1,
		"Fri, 32 Jan 2026 03:05:05 GMT":    -1,
		"Fri, 02 Jan 2026 03:05:05 +00:00": -1,
	} {
		got, ok := retryAfter(http.Header{"Retry-After": {s}}, now)
		if !ok {
			got = -1
		}
		require.Equal(t, want, got, s)
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"", "1", "-1", "007", "1e3", "99999999999999999999", "Fri, 02 Jan 2026 03:05:05 GMT", "Fri Jan  2 03:05:05 2026", "Thu, 01 Jan 0000 00:00:00 GMT"} {
		f.Add(s, int64(1_767_323_045))
	}
	f.Fuzz(func(t *testing.T, s string, at int64) {
		now := time.Unix(at%1e11, 0)
		got, ok := retryAfter(http.Header{"Retry-After": {s}}, now)
		if got < 0 || got > maxRetryAfter || !ok && got != 0 {
			t.Fatalf("%v, %v of %q", got, ok, s)
		}
		digits := strings.Trim(strings.TrimSpace(s), "0123456789") == "" && strings.TrimSpace(s) != ""
		if digits != ok {
			if _, err := http.ParseTime(strings.TrimSpace(s)); ok != (err == nil) {
				t.Fatalf("%q read: %v", s, ok)
			}
		}
	})
}

// busy is a registry that answers after calls of its answers have been given out
// in turn, the last one for ever.
type busy struct {
	mu      sync.Mutex
	asked   []time.Duration // since the start
	start   time.Time
	answers []http.HandlerFunc
}

func (b *busy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	b.asked = append(b.asked, time.Since(b.start).Truncate(time.Second))
	h := b.answers[0]
	if len(b.answers) > 1 {
		b.answers = b.answers[1:]
	}
	b.mu.Unlock()
	h(w, r)
}

// times is when it was asked.
func (b *busy) times() []time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.asked)
}

func limited(status int, after string) http.HandlerFunc {
	h := http.Header{"Content-Type": {"application/json"}}
	if after != "" {
		h.Set("Retry-After", after)
	}
	return answers(status, h, `{"errors":[{"code":"TOOMANYREQUESTS"}]}`)
}

func newBusy(t *testing.T, answers ...http.HandlerFunc) (*busy, *testClient) {
	t.Helper()
	net := newNetwork(t)
	b := &busy{start: time.Now(), answers: answers}
	net.serve("reg.test:443", b)
	return b, net.client(Config{})
}

// A hundred askers are one to a registry that has said when to come back; who
// cannot wait for that gets its answer, with the time that is left.
func TestLimitIsSharedByAll(t *testing.T) {
	for _, status := range []int{429, 503} {
		synctest.Test(t, func(t *testing.T) {
			b, c := newBusy(t, limited(status, "60"), sourceOf("{}"))
			ask := func() error {
				_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
				return err
			}
			r := refusalOf(t, ask())
			require.Equal(t, "60", r.Header.Get("Retry-After"))
			<-time.After(10 * time.Second)
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() {
					r := refusalOf(t, ask())
					require.Equal(t, status, r.Status)
					require.Equal(t, "50", r.Header.Get("Retry-After"))
					require.Contains(t, string(r.Body), "TOOMANYREQUESTS")
					require.True(t, r.Final())
					require.False(t, IsTemporary(r))
				})
			}
			wg.Wait()
			require.Equal(t, 10*time.Second, time.Since(b.start), "nobody waits for so long a time")
			require.Len(t, b.times(), 1)
			require.InDelta(t, 100, testutil.ToFloat64(c.spared.WithLabelValues(sparedLimited)), 0)

			// What is limited apart from it is asked for.
			_, err := c.Manifest(t.Context(), true, public, "latest", nil, Caller{})
			require.NoError(t, err)
			_, err = c.Manifest(t.Context(), false, public, "latest", nil, Caller{alice})
			require.NoError(t, err)

			<-time.After(48 * time.Second) // two are left: they wait
			for range 20 {
				wg.Go(func() { require.NoError(t, ask()) })
			}
			wg.Wait()
			require.Equal(t, time.Minute, time.Since(b.start))
			require.Len(t, b.times(), 3+20)
		})
	}
}

// When the time has come, one asks first.
func TestOneProbesALimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(w http.ResponseWriter, r *http.Request) {
			<-time.After(time.Second)
			limited(429, "")(w, r)
		}
		b, c := newBusy(t, limited(429, "1"), slow, limited(429, "90"), sourceOf("{}"))
		ask := func() error {
			_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
			return err
		}
		var wg sync.WaitGroup
		var refused atomic.Int64
		for i := range 50 {
			if i == 1 {
				synctest.Wait() // the first has its answer
			}
			wg.Go(func() {
				require.Equal(t, 429, refusalOf(t, ask()).Status)
				refused.Add(1)
			})
		}
		wg.Wait()
		require.EqualValues(t, 50, refused.Load())
		require.LessOrEqual(t, len(b.times()), 3, "asked at %v", b.times())
	})
}

// A short pause is waited for once, and does not reach the engine.
func TestShortLimit(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"429 for a second": limited(429, "1"), "429": limited(429, ""), "429 for no time": limited(429, "0"), "503": limited(503, "1"),
		"a date": func(w http.ResponseWriter, r *http.Request) {
			limited(429, time.Now().Add(2*time.Second).UTC().Format(http.TimeFormat))(w, r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, c := newBusy(t, h, sourceOf("{}"))
				_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
				require.NoError(t, err)
				require.Len(t, b.times(), 2)
				require.GreaterOrEqual(t, b.times()[1], time.Second)
				_, err = c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
				require.NoError(t, err)
			})
		})
	}
}

// A registry that never says how long is asked ever less often.
func TestLimitWithoutATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, c := newBusy(t, limited(429, ""))
		for range 1000 {
			_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
			_ = refusalOf(t, err)
			<-time.After(100 * time.Millisecond)
		}
		took := time.Since(b.start)
		require.Less(t, len(b.times()), 6+2+int(took/maxPause), "in %v", took)
		require.Greater(t, len(b.times()), 5)
	})
}

// Who waits goes away with its own reason.
func TestCallerLeavesALimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, c := newBusy(t, limited(429, "2"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := c.Manifest(ctx, false, public, "latest", nil, Caller{})
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

// However many are limited, few are remembered.
func TestLimitsAreBounded(t *testing.T) {
	l := &limits{known: map[limitKey]*limit{}}
	for i := range 3 * maxLimits {
		key := limitKeyOf("h", "k", "GET", strings.Repeat("x", i))
		l.leave(key, false, &Refusal{Status: 429, Header: http.Header{"Retry-After": {"60"}}})
		require.LessOrEqual(t, len(l.known), maxLimits)
	}
}
