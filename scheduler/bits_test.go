package scheduler

import (
	"math/rand/v2"
	"testing"
)

// firstSlow is the dumb twin of all searches: it looks at one member after the
// other.
func firstSlow(n, start int, in func(i int) bool) int {
	for k := range n {
		if i := (start + k) % n; in(i) {
			return i
		}
	}
	return -1
}

func TestSearches(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		words := 1 + rnd.IntN(70)
		n := words * 64
		a, b, c := newBitset(n), newBitset(n), newBitset(n)
		var r roster
		r.grow(words)
		for range rnd.IntN(6) {
			a.set(rnd.IntN(n))
		}
		for range rnd.IntN(1 + rnd.IntN(2*n)) {
			b.set(rnd.IntN(n))
			c.set(rnd.IntN(n))
		}
		for range rnd.IntN(10) {
			i := rnd.IntN(n)
			r.add(i)
			if rnd.IntN(3) == 0 {
				r.remove(i)
			}
		}
		start := rnd.IntN(n + 1)
		for _, x := range []struct {
			name      string
			got, want int
		}{
			{"firstBoth", firstBoth(a, b, start), firstSlow(n, start, func(i int) bool { return a.has(i) && b.has(i) })},
			{"firstOnly", firstOnly(b, a, start), firstSlow(n, start, func(i int) bool { return b.has(i) && !a.has(i) })},
			{"firstBut", firstBut(c, b, a, start), firstSlow(n, start, func(i int) bool { return c.has(i) && b.has(i) && !a.has(i) })},
			{"roster.first", r.first(b, c, start), firstSlow(n, start, func(i int) bool { return r.has(i) && b.has(i) && c.has(i) })},
			{"roster of all", r.first(r.bitset, r.bitset, start), firstSlow(n, start, r.has)},
			{"next", b.next(start), firstSlow(n, 0, func(i int) bool { return i >= start && b.has(i) })},
		} {
			if x.got != x.want {
				t.Fatalf("%s from %d of %d gives %d, want %d", x.name, start, n, x.got, x.want)
			}
		}
	}
	if firstBoth(nil, nil, 0) != -1 || firstOnly(nil, nil, 0) != -1 || firstBut(nil, nil, nil, 0) != -1 {
		t.Error("empty sets have a member")
	}
}
