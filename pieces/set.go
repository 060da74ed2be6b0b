package pieces

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math/bits"
)

// Set is a set of the pieces [0, n) of one task. The zero Set is the set of a
// task without pieces. Copies share their elements; see Clone. A Set is not
// safe for concurrent use.
type Set struct {
	words []uint64
	n     int
	len   int
}

// NewSet returns the empty set of a task with n pieces, n in [0, MaxPieces].
func NewSet(n int) Set { return Set{words: make([]uint64, (n+63)/64), n: n} }

// FullSet returns the set of all n pieces.
func FullSet(n int) Set {
	s := NewSet(n)
	for i := range n {
		s.Add(i)
	}
	return s
}

// Cap returns n, the number of pieces the task has.
func (s *Set) Cap() int { return s.n }

// Len returns how many pieces are in the set.
func (s *Set) Len() int { return s.len }

// Full tells whether all pieces are in the set.
func (s *Set) Full() bool { return s.len == s.n }

// Has tells whether piece i is in the set; false for i outside [0, Cap).
func (s *Set) Has(i int) bool {
	return uint(i) < uint(s.n) && s.words[i>>6]&(1<<(i&63)) != 0
}

// Add puts piece i, in [0, Cap), into the set and tells whether it was not there.
func (s *Set) Add(i int) bool {
	if s.Has(i) {
		return false
	}
	s.words[i>>6] |= 1 << (i & 63)
	s.len++
	return true
}

// Remove takes piece i out of the set and tells whether it was there.
func (s *Set) Remove(i int) bool {
	if !s.Has(i) {
		return false
	}
	s.words[i>>6] &^= 1 << (i & 63)
	s.len--
	return true
}

// All yields the pieces in the set in ascending order. The set must not change
// meanwhile.
func (s *Set) All() iter.Seq[int] {
	return func(yield func(int) bool) {
		for w, word := range s.words {
			for ; word != 0; word &= word - 1 {
				if !yield(w<<6 + bits.TrailingZeros64(word)) {
					return
				}
			}
		}
	}
}

// Run returns how many contiguous pieces from first on are in the set, at most limit.
func (s *Set) Run(first, limit int) int {
	n := 0
	for n < limit && s.Has(first+n) {
		n++
	}
	return n
}

// Clone returns a set with the same pieces that shares nothing with s.
func (s *Set) Clone() Set {
	c := *s
	c.words = append([]uint64(nil), s.words...)
	return c
}

// Bytes returns the set as a bit map, lowest piece in the lowest bit of the
// first byte, (Cap+7)/8 bytes long.
func (s *Set) Bytes() []byte {
	b := make([]byte, 0, len(s.words)*8)
	for _, w := range s.words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b[:(s.n+7)/8]
}

// ParseSet reads the form that Bytes writes, of a task with n pieces.
func ParseSet(n int, b []byte) (Set, error) {
	if n < 0 || n > MaxPieces || len(b) != (n+7)/8 {
		return Set{}, fmt.Errorf("%d bytes are not a set of %d pieces", len(b), n)
	}
	if n%8 != 0 && b[len(b)-1]>>(n%8) != 0 {
		return Set{}, fmt.Errorf("set names pieces past the last of %d", n)
	}
	s := NewSet(n)
	for i, c := range b {
		s.words[i>>3] |= uint64(c) << (8 * (i & 7))
		s.len += bits.OnesCount8(c)
	}
	return s, nil
}
