//go:build linux

package main

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	slot  = 2 * time.Millisecond
	slots = 1 << 12 // what is due later goes round
)

// wheel is a share of the hosts and what is due for them. One goroutine, that
// of run, calls what is due and then writes what has come of it, host by host.
type wheel struct {
	began time.Time

	mu    sync.Mutex // guards what follows
	turn  int64      // slots done
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
}

func newWheel(seed uint64) *wheel {
	return &wheel{began: time.Now(), rnd: rand.New(rand.NewPCG(seed, 1))}
}

// after has what due d from now, give or take a fifth.
func (w *wheel) after(d time.Duration, what due) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := int64(time.Since(w.began) / slot)
	what.at = max(now, w.turn) + max(1, int64(float64(d/slot)*(0.8+0.4*w.rnd.Float64())))
	w.slots[what.at%slots] = append(w.slots[what.at%slots], what)
}

// take returns what is due by now.
func (w *wheel) take(to []due) []due {
	w.mu.Lock()
	defer w.mu.Unlock()
	for now := int64(time.Since(w.began) / slot); w.turn < now; {
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
		*s = later
	}
	return to
}

func (w *wheel) run(ctx context.Context) error {
	tick := time.NewTicker(slot)
	defer tick.Stop()
	var work []due
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		work = w.take(work[:0])
		for _, d := range work {
			d.h.due(d)
		}
		for i, d := range work {
			work[i] = due{}
			if err := d.h.flush(); err != nil {
				return err
			}
		}
	}
}
