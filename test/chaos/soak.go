//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"damselfly.dev/test/lab"
)

const (
	hangLimit = 150 * time.Second // of a pull: more than all that may go wrong at once
	calm      = 5 * time.Second   // at the end
	quota     = 64 * mebi
	diskSize  = 128 * mebi
)

// soak: must-show line 4.
func soak(ctx context.Context, r *region) error {
	err := r.build(ctx, shape{
		hosts: r.size(6, 3), rate: 100 * lab.Mbit, disk: diskSize,
		daemon: []string{"--quota", fmt.Sprint(quota), "--keep-free", fmt.Sprint(8 * mebi), "--drain-timeout", "10s"},
	})
	if err != nil {
		return err
	}
	s := &soaking{region: r, down: map[string]span{}}
	if err := s.more(ctx, r.size(6, 4)); err != nil {
		return err
	}
	for _, p := range s.pictures { // all is warm when it begins
		if failed, _ := r.together(ctx, r.hosts, p); failed > 0 {
			return errors.New("a pull failed before anything was done")
		}
	}
	w := &watch{soaking: s}
	if err := w.settle(ctx); err != nil {
		return err
	}
	before := w.sample(ctx)
	w.judgeFrom(before)

	pulling, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	for i := range r.hosts {
		wg.Go(func() { s.pull(ctx, pulling, i) })
	}
	wg.Go(func() { w.run(pulling) })
	wg.Go(func() { s.grow(pulling) })
	faults := r.faults()
	r.out.say("%d faults in %v.", len(faults), r.cfg.duration)
	err = s.play(ctx, faults)
	s.calm(time.Now())
	if err == nil {
		err = wait(ctx, calm)
	}
	stop()
	wg.Wait()
	if err != nil {
		return err
	}
	s.report()
	last, err := w.last(ctx)
	if err == nil {
		w.report(last)
	}
	return err
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// span is when a link was down.
type span struct{ from, to time.Time }

// soaking is what goes on in a soak.
type soaking struct {
	*region

	mu       sync.Mutex // guards what follows
	pictures []picture
	down     map[string]span // the last time that a host's link was, to in the future while it is
	calmed   time.Time       // when the last fault had ended

	pulls, slow, excused, failed, wrong, hung int
	slowest                                   time.Duration
}

func (s *soaking) calm(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calmed = at
	s.out.say("All is well again for %v.", calm)
}

// more pushes n more images.
func (s *soaking) more(ctx context.Context, n int) error {
	for range n {
		s.mu.Lock()
		k := len(s.pictures)
		s.mu.Unlock()
		rng := rand.New(rand.NewPCG(s.cfg.seed, uint64(k))) //nolint:gosec // it is to be replayed
		p, err := s.push(ctx, fmt.Sprintf("soak/app%d", k), 1+rng.IntN(16*mebi), 1+rng.IntN(4*mebi), 1+rng.IntN(100_000))
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.pictures = append(s.pictures, p)
		s.mu.Unlock()
	}
	return nil
}

// grow adds an image now and then.
func (s *soaking) grow(ctx context.Context) {
	for wait(ctx, 15*time.Second) == nil {
		if err := s.more(ctx, 1); err != nil && ctx.Err() == nil {
			s.out.say("no more images: %v", err)
			return
		}
	}
}

// pull has host i pull random images until pulling ends.
func (s *soaking) pull(ctx, pulling context.Context, i int) {
	h := s.hosts[i]
	rng := rand.New(rand.NewPCG(s.cfg.seed, 1000+uint64(i))) //nolint:gosec // it is to be replayed
	e := newEngine(h.Host, h.daemon.Mirror(), s.registry.URL())
	defer e.close()
	for pulling.Err() == nil {
		s.mu.Lock()
		recent := min(len(s.pictures), 12)
		p := s.pictures[len(s.pictures)-1-rng.IntN(recent)]
		s.mu.Unlock()
		limited, cancel := context.WithTimeoutCause(ctx, hangLimit, errHung)
		began := time.Now()
		err := e.pull(limited, p)
		cancel()
		s.note(h, p, began, err)
		if wait(pulling, time.Duration(rng.IntN(1000))*time.Millisecond) != nil {
			return
		}
	}
}

var errHung = errors.New("it hangs")

// note judges a pull.
func (s *soaking) note(h *host, p picture, began time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	took := time.Since(began)
	s.pulls++
	if took > 20*time.Second {
		s.slow++
	}
	s.slowest = max(s.slowest, took)
	if err == nil {
		return
	}
	cut := s.down[h.Name()]
	switch {
	case errors.Is(err, errWrong):
		s.wrong++
	case errors.Is(err, errHung):
		s.hung++
	case cut.to.After(began.Add(-time.Second)) && cut.from.Before(time.Now()): // without its link no direct pull goes on
		s.excused++
		s.out.say("(excused: its link was cut) %s: %s after %.1f s: %v", h.Name(), p.name, took.Seconds(), err)
		return
	default:
		s.failed++
	}
	s.out.say("%s: %s failed after %.1f s: %v", h.Name(), p.name, took.Seconds(), err)
}

func (s *soaking) report() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out.check(s.failed == 0 && s.pulls > 0, "%d pulls, %d failed (%d more while the host's own link was cut)", s.pulls, s.failed, s.excused)
	s.out.check(s.wrong == 0, "%d pulls had a wrong digest", s.wrong)
	s.out.check(s.hung == 0, "%d pulls hung; the slowest took %.1f s, %d more than 20 s", s.hung, s.slowest.Seconds(), s.slow)
}
