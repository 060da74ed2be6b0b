package registryproxy

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

// A registry that is down is left alone, and found again by one request.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		var down atomic.Bool
		var asked atomic.Int64
		net.handle("reg.test:443", func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			if down.Load() {
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			sourceOf("{}")(w, r)
		})
		none := 0
		c := net.client(Config{Upstreams: []Upstream{{Name: "reg.test", Retries: &none}}})
		ask := func() error {
			_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
			return err
		}
		state := func() string { return c.named["reg.test"].endpoints[0].breaker.State().String() }
		require.NoError(t, ask())
		down.Store(true)
		for range registryFailures {
			require.Equal(t, "closed", state())
			require.Equal(t, 502, refusalOf(t, ask()).Status)
		}
		require.Equal(t, "open", state())
		before := asked.Load()
		for range 10 {
			err := ask()
			require.ErrorIs(t, err, errDown)
			require.True(t, IsTemporary(err))
		}
		require.Equal(t, before, asked.Load())
		require.InDelta(t, 10, testutil.ToFloat64(c.spared.WithLabelValues(sparedDown)), 0)
		require.NoError(t, testutil.CollectAndCompare(c.upstreams, strings.NewReader(`
			# HELP damselfly_upstream_endpoints Registries and their mirrors by the state of their circuit breaker: an open one is not asked. Registries that the configuration does not name are together "(other)".
			# TYPE damselfly_upstream_endpoints gauge
			damselfly_upstream_endpoints{registry="(other)",state="closed"} 0
			damselfly_upstream_endpoints{registry="(other)",state="half-open"} 0
			damselfly_upstream_endpoints{registry="(other)",state="open"} 0
			damselfly_upstream_endpoints{registry="reg.test",state="closed"} 0
			damselfly_upstream_endpoints{registry="reg.test",state="half-open"} 0
			damselfly_upstream_endpoints{registry="reg.test",state="open"} 1
		`)))

		<-time.After(registryPause + time.Millisecond)
		require.Equal(t, "half-open", state())
		require.Equal(t, 502, refusalOf(t, ask()).Status)
		require.Equal(t, "open", state())
		said := c.logs.FilterMessage("host is down, it is asked again in a moment").All()
		require.Len(t, said, 1)
		require.Equal(t, "reg.test", said[0].ContextMap()["registry"])
		require.Contains(t, said[0].ContextMap()["error"], "502")
		require.Zero(t, c.logs.FilterMessage("host answers again").Len())

		down.Store(false)
		<-time.After(registryPause + time.Millisecond)
		require.NoError(t, ask())
		require.Equal(t, "closed", state())
		require.Equal(t, 1, c.logs.FilterMessage("host answers again").Len())
	})
}

// What says nothing of the registry's health opens nothing.
func TestWhatIsNotDown(t *testing.T) {
	tests := map[string]http.HandlerFunc{
		"404": answers(404, nil, ""), "401": answers(401, nil, ""), "403": answers(403, nil, ""), "500": answers(500, nil, ""),
		"429": limited(429, "1"), "503 for a while": limited(503, "1"),
		"a store that is down": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://nowhere.test/", http.StatusFound)
		},
		"a broken body": after(reset),
	}
	for name, h := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := newNetwork(t)
				net.handle("reg.test:443", h)
				c := net.client(Config{})
				for range 3 * registryFailures {
					_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
					require.Error(t, err)
					require.NotErrorIs(t, err, errDown)
				}
			})
		})
	}
	t.Run("a caller who leaves, or sends what no header holds", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			net := newNetwork(t)
			net.handle("reg.test:443", stall)
			c := net.client(Config{})
			for range 3 * registryFailures {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				_, err := c.Manifest(ctx, false, public, "latest", nil, Caller{})
				cancel()
				require.NotErrorIs(t, err, errDown)
				_, err = c.Manifest(t.Context(), false, public, "latest", nil, Caller{"a\r\nb: c"})
				require.Error(t, err)
				require.False(t, IsTemporary(err))
			}
		})
	})
}

// A failure that is over in a moment does not reach whoever asks.
func TestRetries(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"reset": reset, "500": answers(500, nil, ""), "502": answers(502, nil, ""), "503": answers(503, nil, ""), "504": answers(504, nil, ""),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, c := newBusy(t, h, sourceOf("{}"))
				_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
				require.NoError(t, err)
				require.Len(t, b.times(), 2)
				require.Less(t, time.Since(b.start), retryPause)
			})
		})
	}
	for name, h := range map[string]http.HandlerFunc{
		"404": answers(404, nil, ""), "401": answers(401, nil, ""), "416": answers(416, nil, ""),
	} {
		t.Run("none for "+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, c := newBusy(t, h)
				_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
				require.Error(t, err)
				require.Len(t, b.times(), 1)
			})
		})
	}
}

// The registries that nobody has named are few, however many are asked for.
func TestUnnamedRegistriesAreBounded(t *testing.T) {
	c := newTestClient(t, Config{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range maxUnnamed {
				require.NotNil(t, c.get(strings.Repeat("a", i+1)+strings.Repeat(".b", j%100)+".test"))
			}
		})
	}
	wg.Wait()
	for i := range 2 * maxUnnamed {
		require.NotNil(t, c.get("r"+strings.Repeat("x", i%60)+strings.Repeat(".y", i/60)+".test"))
	}
	require.LessOrEqual(t, len(c.unnamed), maxUnnamed)
	one := c.get("one.test")
	require.Same(t, one, c.get("one.test"))
}
