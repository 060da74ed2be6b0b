package registryproxy

import (
	"context"
	"crypto/sha256"
	"errors"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// patience is how long an asker waits for a registry that is asked too much,
	// before it gets that answer: whoever it asks for waits 5 s.
	patience      = 3 * time.Second
	maxRetryAfter = time.Hour
	maxPause      = 32 * time.Second // of a registry that does not say how long
	maxLimits     = 1024
)

// retryAfter reads a Retry-After: seconds, or a date. It is at least 0 and at
// most an hour; ok is false where there is none that can be read.
func retryAfter(h http.Header, now time.Time) (wait time.Duration, ok bool) {
	s := strings.TrimSpace(h.Get("Retry-After"))
	if n, err := strconv.ParseUint(s, 10, 63); err == nil || errors.Is(err, strconv.ErrRange) {
		return time.Duration(min(n, uint64(maxRetryAfter/time.Second))) * time.Second, true
	}
	at, err := http.ParseTime(s)
	if err != nil {
		return 0, false
	}
	return min(max(at.Sub(now), 0), maxRetryAfter), true
}

// Limited tells a registry that is asked too much, and says so: everybody gets
// that answer until it wants to be asked again.
func (r *Refusal) Limited() bool {
	if r.Status != http.StatusServiceUnavailable || r.redirected {
		return r.Status == http.StatusTooManyRequests
	}
	_, ok := retryAfter(r.Header, time.Now())
	return ok
}

// limits remembers who has said "too many requests" to what, so that the answer
// to one is the answer to all until the registry wants to be asked again, and
// then one asks first.
type limits struct {
	mu sync.Mutex // guards known and what it holds
	// known is bounded: what is past its time is forgotten when there are many.
	known map[limitKey]*limit
}

// limitKey is the SHA-256 of what a registry limits together: a host, a kind of
// request and the credentials.
type limitKey [sha256.Size]byte

type limit struct {
	refusal *Refusal
	until   time.Time
	times   int           // in a row
	probe   chan struct{} // closed when who asks again has an answer; nil when nobody does
}

func limitKeyOf(host, kind, method, authorization string) limitKey {
	h := sha256.New()
	for _, s := range []string{host, kind, method, authorization} {
		h.Write([]byte(s)) // none of them can hold a NUL
		h.Write([]byte{0})
	}
	return limitKey(h.Sum(nil))
}

// do sends a request, unless its like are not wanted for now: it waits up to
// patience for them to be, and else returns the refusal of before, with the time
// that is left. spared tells that nothing was sent.
func (l *limits) do(ctx context.Context, key limitKey, send func() (*answer, error)) (a *answer, spared bool, err error) {
	probe, err := l.enter(ctx, key)
	if err != nil {
		return nil, true, err
	}
	a, err = send()
	l.leave(key, probe, err)
	return a, false, err
}

// enter waits until a request may be sent. With probe it finds out for others.
func (l *limits) enter(ctx context.Context, key limitKey) (probe bool, err error) {
	end := time.Now().Add(patience)
	for {
		l.mu.Lock()
		k := l.known[key]
		if k == nil {
			l.mu.Unlock()
			return false, nil
		}
		now := time.Now()
		if !now.Before(k.until) && k.probe == nil {
			k.probe = make(chan struct{})
			l.mu.Unlock()
			return true, nil
		}
		wake, asking, refusal := k.until, k.probe, k.refusal.after(k.until.Sub(now))
		l.mu.Unlock()
		if asking != nil {
			wake = end
		}
		if wake.After(end) || !now.Before(end) {
			return false, refusal
		}
		t := time.NewTimer(wake.Sub(now))
		select {
		case <-asking:
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return false, context.Cause(ctx)
		}
		t.Stop()
	}
}

// leave notes how a request ended.
func (l *limits) leave(key limitKey, probe bool, err error) {
	r, limited := errors.AsType[*Refusal](err)
	limited = limited && r.Limited()
	if !probe && !limited {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.known[key]
	if probe {
		close(k.probe)
		k.probe = nil
		if !limited {
			delete(l.known, key)
			return
		}
	}
	if k == nil {
		if len(l.known) >= maxLimits {
			l.makeRoomLocked()
		}
		k = &limit{}
		l.known[key] = k
	}
	now := time.Now()
	wait, ok := retryAfter(r.Header, now)
	if !ok || wait == 0 {
		wait = min(time.Second<<min(k.times, 5), maxPause)
	}
	if k.times == 0 || probe || now.Add(wait).After(k.until) {
		k.until, k.refusal = now.Add(wait), r
	}
	if probe || k.times == 0 {
		k.times++
	}
}

// makeRoomLocked forgets what is past its time, else anything; never what is
// being asked.
func (l *limits) makeRoomLocked() {
	now := time.Now()
	for key, k := range l.known {
		if k.probe == nil && !now.Before(k.until) {
			delete(l.known, key)
		}
	}
	for key, k := range l.known {
		if len(l.known) < maxLimits {
			return
		}
		if k.probe == nil {
			delete(l.known, key)
		}
	}
}

// after is r with the time that is left, where it told one.
func (r *Refusal) after(left time.Duration) *Refusal {
	if r.Header.Get("Retry-After") == "" {
		return r
	}
	again := *r
	again.Header = r.Header.Clone()
	again.Header.Set("Retry-After", strconv.Itoa(max(int(math.Ceil(left.Seconds())), 1)))
	return &again
}
