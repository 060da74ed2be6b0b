//go:build linux

package main

import (
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

// stats is what happened in a phase.
type stats struct {
	assigned atomic.Int64
	answers  histogram // from the word that a transfer ends soon, or ends, to an assignment
	idle     histogram // from the end of a transfer with none at hand to an assignment
	joins    histogram // from a join to its answer
}

// histogram counts times in classes an eighth of a power of two wide.
type histogram [64 * 8]atomic.Int64

func (h *histogram) add(d time.Duration) {
	n := uint64(max(d, 8))
	top := bits.Len64(n) - 1
	h[top*8+int(n>>(top-3)&7)].Add(1)
}

func (h *histogram) count() (n int64) {
	for i := range h {
		n += h[i].Load()
	}
	return n
}

// quantile returns the upper end of the class in which that share of the times
// is reached.
func (h *histogram) quantile(q float64) time.Duration {
	left := int64(math.Ceil(q * float64(h.count())))
	if left == 0 {
		return 0
	}
	for i := range h {
		if left -= h[i].Load(); left <= 0 {
			return time.Duration(uint64(9+i%8) << (i / 8) / 8)
		}
	}
	return 0
}
