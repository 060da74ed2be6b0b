package pieces

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// twin is a Set as anyone would write it without a thought of speed.
type twin map[int]bool

func compare(tb testing.TB, s *Set, w twin) {
	tb.Helper()
	if s.Len() != len(w) || s.Full() != (len(w) == s.Cap()) {
		tb.Fatalf("%d pieces, full %v; want %d of %d", s.Len(), s.Full(), len(w), s.Cap())
	}
	for i := -2; i < s.Cap()+70; i++ {
		if s.Has(i) != w[i] {
			tb.Fatalf("piece %d: %v, want %v", i, s.Has(i), w[i])
		}
	}
	if got, want := slices.Collect(s.All()), slices.Sorted(maps.Keys(w)); !slices.Equal(got, want) {
		tb.Fatalf("pieces %v, want %v", got, want)
	}
}

func TestSetAgainstTwin(t *testing.T) {
	rnd := rand.New(rand.NewPCG(6, 7))
	for _, n := range []int{0, 1, 7, 8, 63, 64, 65, 200} {
		s, w := NewSet(n), twin{}
		for range 4 * n {
			i := rnd.IntN(n)
			if rnd.IntN(3) > 0 {
				if s.Add(i) == w[i] {
					t.Fatalf("adding %d of %d: told the contrary", i, n)
				}
				w[i] = true
			} else {
				if s.Remove(i) != w[i] {
					t.Fatalf("removing %d of %d: told the contrary", i, n)
				}
				delete(w, i)
			}
			first, limit := rnd.IntN(n+1), rnd.IntN(n+1)
			run := 0
			for run < limit && w[first+run] {
				run++
			}
			if got := s.Run(first, limit); got != run {
				t.Fatalf("run from %d: %d, want %d", first, got, run)
			}
		}
		if s.Remove(n) || s.Remove(-1) {
			t.Errorf("a piece outside the %d is removed", n)
		}
		compare(t, &s, w)
		back, err := ParseSet(n, s.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		compare(t, &back, w)

		c := s.Clone()
		for i := range n {
			c.Remove(i)
		}
		compare(t, &s, w)
		full := FullSet(n)
		if !full.Full() || full.Len() != n || full.Cap() != n || c.Len() != 0 {
			t.Errorf("full set of %d has %d", n, full.Len())
		}
	}
}

func TestAllStops(t *testing.T) {
	s := FullSet(100)
	var got []int
	for i := range s.All() {
		if got = append(got, i); i == 65 {
			break
		}
	}
	if len(got) != 66 {
		t.Errorf("%d pieces before the stop", len(got))
	}
}

func FuzzParseSet(f *testing.F) {
	f.Add(0, []byte{})
	f.Add(9, []byte{0xff, 0x01})
	f.Add(9, []byte{0xff, 0x02})
	f.Add(64, bytes.Repeat([]byte{0xff}, 8))
	f.Add(-1, []byte{})
	f.Add(MaxPieces+1, make([]byte, MaxPieces/8+1))
	f.Fuzz(func(t *testing.T, n int, b []byte) {
		s, err := ParseSet(n, b)
		if err != nil {
			return
		}
		if s.Cap() != n || !bytes.Equal(s.Bytes(), b) {
			t.Fatalf("%d pieces from %x come back as %x of %d", n, b, s.Bytes(), s.Cap())
		}
		w := twin{}
		for i := range n {
			if b[i/8]>>(i%8)&1 == 1 {
				w[i] = true
			}
		}
		compare(t, &s, w)
	})
}
