//go:build linux

package main

import (
	"math/rand/v2"
	"time"
)

const (
	slot  = 2 * time.Millisecond
	slots = 1 << 12 // what is due later goes round
)

// wheel keeps what is due for hosts.
type wheel struct {
	began time.Time
	turn  int64 // slots done
	slots [slots][]due
	rnd   *rand.Rand
}

// due is a piece that has come, or that tr ends soon; with a nil tr the host's
// first join.
type due struct {
	at   int64
	h    *host
	tr   *transfer
	soon bool
	late bool
}

func newWheel(seed uint64) *wheel {
	return &wheel{began: time.Now(), rnd: rand.New(rand.NewPCG(seed, 1))}
}

// after has what due d from now, give or take a fifth.
func (w *wheel) after(now time.Time, d time.Duration, what due) {
	at := int64(now.Sub(w.began) / slot)
	what.at = max(at, w.turn) + max(1, int64(float64(d/slot)*(0.8+0.4*w.rnd.Float64())))
	w.slots[what.at%slots] = append(w.slots[what.at%slots], what)
}

// take appends what is due by now.
func (w *wheel) take(now time.Time, to []due) []due {
	for at := int64(now.Sub(w.began) / slot); w.turn < at; {
		w.turn++
		s := &w.slots[w.turn%slots]
		later := (*s)[:0]
		for _, d := range *s {
			if d.at <= w.turn {
				to = append(to, d)
			} else {
				later = append(later, d)
			}
		}
		clear((*s)[len(later):])
		*s = later
	}
	return to
}
