package registryproxy

import (
	"context"
	"errors"
	"time"
)

// hurry is how long an answer is waited for before the same is asked once more,
// by another connection: one of many may be dead, and whoever waits for the
// answer turns elsewhere in 5 s.
const hurry = 3500 * time.Millisecond

// ended is a request that has, the nth.
type ended struct {
	n      int
	answer *answer
	err    error
}

// hedge sends a request, and once more in hurry if it may wait for longer. The
// first answer is taken, also one that says no, and the other request given up.
func hedge(ctx context.Context, limit time.Duration, send func(context.Context) (*answer, error)) (*answer, error) {
	if limit <= hurry {
		return send(ctx)
	}
	results := make(chan ended, 2)
	begin := func(n int) context.CancelFunc {
		ctx, cancel := context.WithCancel(ctx)
		go func() {
			a, err := send(ctx)
			results <- ended{n, a, err}
		}()
		return cancel
	}
	cancel := [2]context.CancelFunc{begin(0), func() {}}
	late := time.NewTimer(hurry)
	defer late.Stop()
	for under := 1; ; { // way
		select {
		case <-late.C:
			cancel[1] = begin(1)
			under++
		case r := <-results:
			if under--; under > 0 && r.err != nil && !answered(r.err) && !errors.Is(r.err, errNoAnswer) {
				continue // the other may do better
			}
			cancel[1-r.n]()
			if under > 0 {
				go drop(results)
			}
			if r.err != nil {
				cancel[r.n]()
				return nil, r.err
			}
			r.answer.body.done = cancel[r.n]
			return r.answer, nil
		}
	}
}

// drop closes what comes after all.
func drop(results <-chan ended) {
	if r := <-results; r.err == nil {
		r.answer.close()
	}
}
