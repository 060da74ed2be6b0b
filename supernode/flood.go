package supernode

import (
	"sync"
	"time"
)

const (
	maxOver   = 1000             // joins beyond the rate, until a session ends for them
	maxStrays = 10_000           // reports of no transfer of its, likewise
	barredFor = 10 * time.Second // how long an address opens no session after one of its ended so
	maxBarred = 4096             // addresses
)

// floods remembers from where sessions came that ended as floods: a new one would begin
// with all that a host may say at once. The zero value is ready.
type floods struct {
	mu    sync.Mutex
	until map[string]time.Time
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
