//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// A result is one host's pull.
type result struct {
	member                            *member
	took                              time.Duration
	tries                             int
	peer, supernode, origin, registry int64 // bytes by source; registry is the registry's own count
	store                             int64 // bytes served without a transfer
}

func (r result) received() int64 { return r.peer + r.supernode + r.origin }

// A round is a pull on several hosts at once.
type round struct {
	results []result
	others  int64 // bytes that the registry sent to others than the hosts
	busy    string
}

// slowest is the time of the last host.
func (r *round) slowest() time.Duration {
	var most time.Duration
	for _, x := range r.results {
		most = max(most, x.took)
	}
	return most
}

// total is the sum of all hosts' bytes.
func (r *round) total() result {
	var sum result
	for _, x := range r.results {
		sum.peer += x.peer
		sum.supernode += x.supernode
		sum.origin += x.origin
		sum.registry += x.registry
		sum.store += x.store
	}
	return sum
}

// maxTries is how often a host pulls again when its engine gives up, as a kubelet does.
const maxTries = 3

// pull lets every member pull into an empty store at once, through its daemon
// or straight from the registry, and verifies every store. While the pull runs
// it calls meanwhile, if there is one.
func (s *stage) pull(ctx context.Context, members []*member, direct bool, meanwhile func(context.Context) error) (*round, error) {
	engines := make([]engine, len(members))
	before := make([]map[string]int64, len(members))
	for i, m := range members {
		mirror := m.daemon.Mirror()
		if direct {
			mirror = ""
		}
		var err error
		if engines[i], err = s.newEngine(ctx, m.host, mirror); err != nil {
			return nil, err
		}
		if before[i], err = m.daemon.Received(ctx); err != nil {
			return nil, err
		}
	}
	if err := s.registry.Forget(); err != nil {
		return nil, err
	}
	r := &round{results: make([]result, len(members))}
	began, cpu := time.Now(), s.cpu()
	progressing, stop := context.WithCancel(ctx)
	var progress sync.WaitGroup
	progress.Go(func() { s.progress(progressing, int64(len(members))*s.size) })
	group, pulling := errgroup.WithContext(ctx)
	for i, m := range members {
		group.Go(func() error {
			r.results[i].member = m
			err := fetch(pulling, engines[i], &r.results[i])
			if err != nil {
				return fmt.Errorf("pull on %s: %w", m.host.Name(), err)
			}
			return nil
		})
	}
	if meanwhile != nil {
		group.Go(func() error { return meanwhile(pulling) })
	}
	err := group.Wait()
	stop()
	progress.Wait()
	if err != nil {
		return nil, err
	}
	r.busy = busy(s.cpu()-cpu, time.Since(began))
	if err := s.verify(members, engines, direct); err != nil {
		return nil, err
	}
	return r, s.count(ctx, r, before, direct)
}

func fetch(ctx context.Context, e engine, r *result) error {
	began := time.Now()
	for {
		r.tries++
		err := e.Fetch(ctx, app)
		r.took = time.Since(began)
		if err == nil || ctx.Err() != nil || r.tries == maxTries {
			return err
		}
	}
}

// progress says every few seconds how far a pull has come.
func (s *stage) progress(ctx context.Context, of int64) {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	start := s.crossed()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if s.cfg.loopback {
			s.out.say("  pulling")
			continue
		}
		s.out.say("  pulling: %s of %s have reached the hosts", megabytes(s.crossed()-start), megabytes(of))
	}
}

// count fills in where every host's bytes came from. A daemon that is dead by
// now cannot tell.
func (s *stage) count(ctx context.Context, r *round, before []map[string]int64, direct bool) error {
	byMember, others, err := s.fromRegistry()
	if err != nil {
		return err
	}
	r.others = others
	for i := range r.results {
		x := &r.results[i]
		x.registry = byMember[x.member]
		if direct || x.member.daemon.Dead() {
			continue
		}
		now, err := x.member.daemon.Received(ctx)
		if err != nil {
			return err
		}
		since := func(source string) int64 { return now[source] - before[i][source] }
		x.peer, x.supernode, x.origin, x.store = since("peer"), since("supernode"), since("origin"), since("store")
		if s.cfg.loopback { // there the registry's log does not tell a daemon from the supernode
			x.registry, r.others = x.origin, r.others-x.origin
		}
	}
	return nil
}

// verify checks every store. Engines that pulled through a daemon stay if all
// is to be kept; the others end.
func (s *stage) verify(members []*member, engines []engine, direct bool) error {
	var errs []error
	for i, m := range members {
		if err := engines[i].Verify(s.contents); err != nil {
			errs = append(errs, fmt.Errorf("on %s: %w", m.host.Name(), err))
		}
		if s.cfg.keep && !direct {
			m.engine = engines[i]
			continue
		}
		if err := engines[i].Close(); err != nil {
			return err
		}
	}
	what := "through Damselfly"
	if direct {
		what = "straight from the registry"
	}
	s.out.check(len(errs) == 0, "%d hosts pulled %s: all %d contents on each have their size and sha256%s",
		len(members), what, len(s.contents), because(errors.Join(errs...)))
	return nil
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}
