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
// at the end, or -1 when they have none in common. Both have the same room, and
// start may stand one past it.
func firstBoth(a, b bitset, start int) int {
	if len(a) == 0 {
		return -1
	}
	b = b[:len(a)]
	w := start >> 6
	if w >= len(a) {
		start, w = 0, 0
	}
	if word := a[w] & b[w] & since(start); word != 0 {
		return w<<6 + bits.TrailingZeros64(word)
	}
	for i := w + 1; i < len(a); i++ {
		if word := a[i] & b[i]; word != 0 {
			return i<<6 + bits.TrailingZeros64(word)
		}
	}
	for i := 0; i <= w; i++ {
		if word := a[i] & b[i]; word != 0 {
			return i<<6 + bits.TrailingZeros64(word)
		}
	}
	return -1
}

// firstOnly is firstBoth for the members of a that are not in b.
func firstOnly(a, b bitset, start int) int {
	if len(a) == 0 {
		return -1
	}
	b = b[:len(a)]
	w := start >> 6
	if w >= len(a) {
		start, w = 0, 0
	}
	if word := a[w] &^ b[w] & since(start); word != 0 {
		return w<<6 + bits.TrailingZeros64(word)
	}
	for i := w + 1; i < len(a); i++ {
		if word := a[i] &^ b[i]; word != 0 {
			return i<<6 + bits.TrailingZeros64(word)
		}
	}
	for i := 0; i <= w; i++ {
		if word := a[i] &^ b[i]; word != 0 {
			return i<<6 + bits.TrailingZeros64(word)
		}
	}
	return -1
}

// A roster is a bitset that knows how many it holds.
type roster struct {
	bitset
	n int
}

func (r *roster) add(i int) {
	if !r.has(i) {
		r.set(i)
		r.n++
	}
}

func (r *roster) remove(i int) {
	if r.has(i) {
		r.clear(i)
		r.n--
	}
}
