package scheduler

import "math/bits"

// bitset is a set of small integers with a fixed room, as words.
type bitset []uint64

func newBitset(n int) bitset { return make(bitset, (n+63)/64) }

func (b bitset) has(i int) bool { return b[i>>6]&(1<<(i&63)) != 0 }
func (b bitset) set(i int)      { b[i>>6] |= 1 << (i & 63) }
func (b bitset) clear(i int)    { b[i>>6] &^= 1 << (i & 63) }

// since returns the mask of a word's bits from that of i on.
func since(i int) uint64 { return ^uint64(0) << (i & 63) }

// firstBoth returns the first member of a and b at or after start, going round
// at the end, or -1. Both have the same room, and start may stand one past it.
func firstBoth(a, b bitset, start int) int { return first(a, b, 0, start) }

// firstOnly is firstBoth for the members of a that are not in b.
func firstOnly(a, b bitset, start int) int { return first(a, b, ^uint64(0), start) }

// firstBut is firstBoth for those that are not in but; nil is none.
func firstBut(a, b, but bitset, start int) int {
	if but == nil || len(a) == 0 {
		return firstBoth(a, b, start)
	}
	w := start >> 6
	if w >= len(a) {
		start, w = 0, 0
	}
	mask := since(start)
	for range len(a) + 1 {
		if word := a[w] & b[w] &^ but[w] & mask; word != 0 {
			return w<<6 + bits.TrailingZeros64(word)
		}
		mask = ^uint64(0)
		if w++; w == len(a) {
			w = 0
		}
	}
	return -1
}

// firstOfAll returns the first member of a, b and c at or after start, or -1.
func firstOfAll(a, b, c bitset, start int) int {
	for w, mask := start>>6, since(start); w < len(a); w, mask = w+1, ^uint64(0) {
		if word := a[w] & b[w] & c[w] & mask; word != 0 {
			return w<<6 + bits.TrailingZeros64(word)
		}
	}
	return -1
}

// first is firstBoth with the bits of b flipped where they are set in flip.
func first(a, b bitset, flip uint64, start int) int {
	if len(a) == 0 {
		return -1
	}
	b = b[:len(a)]
	w := start >> 6
	if w >= len(a) {
		start, w = 0, 0
	}
	if word := a[w] & (b[w] ^ flip) & since(start); word != 0 {
		return w<<6 + bits.TrailingZeros64(word)
	}
	for i := w + 1; i < len(a); i++ {
		if word := a[i] & (b[i] ^ flip); word != 0 {
			return i<<6 + bits.TrailingZeros64(word)
		}
	}
	for i := range w + 1 {
		if word := a[i] & (b[i] ^ flip); word != 0 {
			return i<<6 + bits.TrailingZeros64(word)
		}
	}
	return -1
}

// next returns the first member at or after i, or -1.
func (b bitset) next(i int) int {
	for w, mask := i>>6, since(i); w < len(b); w, mask = w+1, ^uint64(0) {
		if word := b[w] & mask; word != 0 {
			return w<<6 + bits.TrailingZeros64(word)
		}
	}
	return -1
}

// A roster is a bitset that knows how many it holds, and is quickly gone through
// when they are few.
type roster struct {
	bitset
	full bitset // the words that are not 0
	n    int
}

func (r *roster) add(i int) {
	if !r.has(i) {
		r.set(i)
		r.full.set(i >> 6)
		r.n++
	}
}

func (r *roster) remove(i int) {
	if r.has(i) {
		r.clear(i)
		if r.bitset[i>>6] == 0 {
			r.full.clear(i >> 6)
		}
		r.n--
	}
}

func (r *roster) grow(words int) {
	wider := func(b bitset, n int) bitset { return append(make(bitset, 0, n), b...)[:n] }
	r.bitset, r.full = wider(r.bitset, words), wider(r.full, (words+63)/64)
}

// first returns the first member of r that is in a and b too, at or after
// start, going round at the end, or -1. All have the same room.
func (r *roster) first(a, b bitset, start int) int {
	if r.n == 0 {
		return -1
	}
	w := start >> 6
	if w >= len(r.bitset) {
		start, w = 0, 0
	}
	mask := since(start)
	for i := w; i >= 0; i = r.full.next(i + 1) {
		if word := r.bitset[i] & a[i] & b[i] & mask; word != 0 {
			return i<<6 + bits.TrailingZeros64(word)
		}
		mask = ^uint64(0)
	}
	for i := r.full.next(0); i >= 0 && i <= w; i = r.full.next(i + 1) {
		if word := r.bitset[i] & a[i] & b[i]; word != 0 {
			return i<<6 + bits.TrailingZeros64(word)
		}
	}
	return -1
}
