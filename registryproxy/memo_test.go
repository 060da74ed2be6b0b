package registryproxy

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestMemo(t *testing.T) {
	now := time.Unix(0, 0)
	m := newMemo[int, string](3, func() time.Time { return now })
	m.put(1, "a", time.Second)
	m.put(2, "b", time.Hour)
	m.put(3, "c", time.Hour)
	v, ok := m.get(1)
	require.True(t, ok)
	require.Equal(t, "a", v)
	m.put(2, "B", time.Hour) // in place: nothing has to go
	require.Len(t, m.entries, 3)

	now = now.Add(time.Second)
	m.put(4, "d", time.Hour) // what has expired goes first
	_, ok = m.get(1)
	require.False(t, ok)
	for k, want := range map[int]string{2: "B", 3: "c", 4: "d"} {
		v, ok = m.get(k)
		require.True(t, ok)
		require.Equal(t, want, v)
	}
	m.drop(2, func(s string) bool { return s == "b" })
	_, ok = m.get(2)
	require.True(t, ok)
	m.drop(2, func(s string) bool { return s == "B" })
	_, ok = m.get(2)
	require.False(t, ok)

	now = now.Add(time.Hour)
	_, ok = m.get(3)
	require.False(t, ok)
	require.NotContains(t, m.entries, 3)
}

// A memo never knows what a plain map does not, and never has too much.
func TestMemoAgainstMap(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	now := time.Unix(0, 0)
	const limit = 16
	m := newMemo[int, int](limit, func() time.Time { return now })
	type entry struct {
		value   int
		expires time.Time
	}
	twin := map[int]entry{}
	hits := 0
	for range 20_000 {
		k := rng.IntN(3 * limit)
		switch rng.IntN(4) {
		case 0:
			ttl := time.Duration(rng.IntN(50)) * time.Second
			v := rng.Int()
			m.put(k, v, ttl)
			twin[k] = entry{v, now.Add(ttl)}
			if got, ok := m.get(k); ok != (ttl > 0) || ok && got != v {
				t.Fatalf("just put %d, got %d %v", v, got, ok)
			}
		case 1:
			now = now.Add(time.Duration(rng.IntN(3)) * time.Second)
		default:
			if v, ok := m.get(k); ok {
				hits++
				if e := twin[k]; e.value != v || !now.Before(e.expires) {
					t.Fatalf("%d is %d, want %d", k, v, e.value)
				}
			}
		}
		if len(m.entries) > limit {
			t.Fatalf("%d entries", len(m.entries))
		}
	}
	require.Greater(t, hits, 1000)
}
