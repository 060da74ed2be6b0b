package registryproxy

import (
	"sync"
	"time"
)

// memo is a map of at most limit entries that expire.
type memo[K comparable, V any] struct {
	now   func() time.Time
	limit int

	mu      sync.Mutex // guards entries
	entries map[K]memoEntry[V]
}

type memoEntry[V any] struct {
	value   V
	expires time.Time
}

func newMemo[K comparable, V any](limit int, now func() time.Time) *memo[K, V] {
	return &memo[K, V]{now: now, limit: limit, entries: map[K]memoEntry[V]{}}
}

func (m *memo[K, V]) get(k K) (V, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[k]
	if !ok || !m.now().Before(e.expires) {
		delete(m.entries, k)
		var none V
		return none, false
	}
	return e.value, true
}

// put remembers v for ttl. In a full map what has expired makes room, else any
// eighth of it, so that the search for room is rare.
func (m *memo[K, V]) put(k K, v V, ttl time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	if _, ok := m.entries[k]; !ok && len(m.entries) >= m.limit {
		for old, e := range m.entries {
			if !now.Before(e.expires) {
				delete(m.entries, old)
			}
		}
		for old := range m.entries {
			if len(m.entries) <= m.limit-m.limit/8-1 {
				break
			}
			delete(m.entries, old)
		}
	}
	m.entries[k] = memoEntry[V]{v, now.Add(ttl)}
}

// drop forgets k if same says so of its value.
func (m *memo[K, V]) drop(k K, same func(V) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.entries[k]; ok && same(e.value) {
		delete(m.entries, k)
	}
}
