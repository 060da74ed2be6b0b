package supernode

import (
	"errors"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"damselfly.dev/supernode/api"
)

const (
	maxOver   = 1000             // joins beyond the rate, less those within it since, until a session ends for them
	maxStrays = 10_000           // reports of no transfer of its, likewise
	barredFor = 10 * time.Second // how long an address opens no session after one of its ended so
	maxBarred = 4096             // addresses
)

// joinRate bounds the joins of a session.
type joinRate struct {
	within *rate.Limiter
	over   int
}

func newJoinRate() *joinRate {
	return &joinRate{within: rate.NewLimiter(joinsPerSecond, joinsAtOnce)}
}

// allows tells whether one more join is to be answered; errFlood when there are so many
// that the session is to end.
func (j *joinRate) allows(now time.Time) (bool, error) {
	if j.within.AllowN(now, 1) {
		j.over = max(j.over-1, 0)
		return true, nil
	}
	if j.over++; j.over > maxOver {
		return false, errFlood
	}
	return false, nil
}

// floods remembers from where sessions came that ended as floods, for a new one would
// begin with all that a host may say at once, or with what is no frame. The zero value is
// ready.
type floods struct {
	mu    sync.Mutex
	until map[string]time.Time
}

// after notes from where a session came that ended so, if it is to be barred. Nobody on
// this machine is.
func (f *floods) after(remote string, end error) {
	if from := api.Neighbour(remote); from != "" && (errors.Is(end, errFlood) || errors.Is(end, api.ErrFrame)) {
		f.note(from, time.Now())
	}
}

func (f *floods) note(from string, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for a, t := range f.until {
		if now.After(t) {
			delete(f.until, a)
		}
	}
	if f.until == nil {
		f.until = map[string]time.Time{}
	}
	if len(f.until) < maxBarred {
		f.until[from] = now.Add(barredFor)
	}
}

func (f *floods) bars(from string, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return now.Before(f.until[from])
}
