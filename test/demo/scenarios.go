//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// region: all hosts pull at once, then again straight from the registry.
func (s *stage) region(ctx context.Context) error {
	swarm, err := s.first(ctx, "All hosts pull through Damselfly.")
	if err != nil {
		return err
	}
	s.out.say("The same hosts pull straight from the registry, into empty stores.")
	direct, err := s.pull(ctx, s.members, true, nil)
	if err != nil {
		return err
	}
	s.compare(swarm, direct)
	if s.cfg.hosts < 6 {
		return nil // the bounds are for six hosts
	}
	sum := swarm.total()
	share := float64(sum.peer) / float64(sum.received())
	s.out.check(share >= 0.6, "%.0f %% of the bytes that hosts received came from peers (at least 60 %%)", share*100)
	if s.cfg.loopback {
		return nil
	}
	factor := direct.slowest().Seconds() / swarm.slowest().Seconds()
	s.checkTime(factor >= 3, "the slowest host took %s, straight from the registry %s: %.1f times as fast (at least 3)",
		seconds(swarm.slowest()), seconds(direct.slowest()), factor)
	return nil
}

// first says what comes, has all hosts pull through Damselfly, and checks that the
// registry sent each byte once.
func (s *stage) first(ctx context.Context, says string) (*round, error) {
	s.out.say("%s", says)
	r, err := s.pull(ctx, s.members, false, nil)
	if err != nil {
		return nil, err
	}
	return r, s.checkOrigin(ctx, r)
}

// single: one host with everything cold.
func (s *stage) single(ctx context.Context) error {
	swarm, err := s.first(ctx, "The host pulls through Damselfly, which has nothing yet.")
	if err != nil {
		return err
	}
	s.out.say("The host pulls straight from the registry.")
	direct, err := s.pull(ctx, s.members, true, nil)
	if err != nil {
		return err
	}
	s.compare(swarm, direct)
	if s.cfg.loopback {
		return nil
	}
	ratio := swarm.slowest().Seconds() / direct.slowest().Seconds()
	s.checkTime(ratio <= 1.10, "alone and cold, the pull took %.2f times a direct one (at most 1.10)", ratio)
	return nil
}

func (s *stage) killSupernode(ctx context.Context) error {
	s.out.say("All hosts pull through Damselfly.")
	r, err := s.pull(ctx, s.members, false, func(ctx context.Context) error {
		if err := s.reach(ctx, 0.4); err != nil {
			return err
		}
		s.supernode.Process.Kill()
		s.out.say("The supernode is killed.")
		return nil
	})
	if err != nil {
		return err
	}
	s.show(r)
	s.checkTries(r.results)
	if err := s.supernode.Restart(ctx); err != nil {
		return err
	}
	late, err := s.lateMember(ctx)
	if err != nil {
		return err
	}
	s.out.say("The supernode is back, and a new host pulls.")
	again, err := s.pull(ctx, late, false, nil)
	if err != nil {
		return err
	}
	s.show(again)
	s.checkTries(again.results)
	return nil
}

func (s *stage) killDaemon(ctx context.Context) error {
	back, gone := s.members[0], s.members[1]
	// Two engines will turn to the registry: its link shall not be what others wait for.
	if err := s.registry.Host.SetRate(ctx, 4*s.cfg.rate, 4*s.cfg.rate); err != nil {
		return err
	}
	s.out.say("All hosts pull through Damselfly; the registry's link has %v.", 4*s.cfg.rate)
	r, err := s.pull(ctx, s.members, false, func(ctx context.Context) error {
		if err := s.reach(ctx, 0.4); err != nil {
			return err
		}
		back.daemon.Process.Kill()
		gone.daemon.Process.Kill()
		s.out.say("dfdaemon is killed on %s, where it comes back, and on %s, where it does not.", back.host.Name(), gone.host.Name())
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Second):
		}
		return back.daemon.Restart(ctx)
	})
	if err != nil {
		return err
	}
	s.show(r)
	others := round{results: r.results[2:]}
	s.checkTries(others.results)
	for _, x := range others.results {
		s.out.check(x.registry == 0, "%s had %s from the registry (none)", x.member.host.Name(), megabytes(x.registry))
	}
	least := time.Duration(float64(s.size*8) / float64(s.cfg.rate) * float64(time.Second))
	s.checkTime(others.slowest() < least*2, "the slowest of the others took %s, where its link needs %s (less than twice)",
		seconds(others.slowest()), seconds(least))
	return nil
}

func (s *stage) secondPull(ctx context.Context) error {
	if _, err := s.first(ctx, "All hosts pull through Damselfly."); err != nil {
		return err
	}
	s.out.say("They pull again, into empty stores of their engines.")
	second, err := s.pull(ctx, s.members, false, nil)
	if err != nil {
		return err
	}
	s.show(second)
	sum := second.total()
	s.out.check(sum.registry+second.others == 0, "the second time the registry sent %s (none)", megabytes(sum.registry+second.others))
	small := s.size / 100 // manifests may be asked for again
	for _, x := range second.results {
		s.out.check(x.received() <= small && x.store >= s.size-small, "%s served %s from its own store and received %s",
			x.member.host.Name(), megabytes(x.store), megabytes(x.received()))
	}
	return nil
}

func (s *stage) lateHost(ctx context.Context) error {
	if _, err := s.first(ctx, "All hosts pull through Damselfly."); err != nil {
		return err
	}
	late, err := s.lateMember(ctx)
	if err != nil {
		return err
	}
	s.out.say("A new host pulls.")
	second, err := s.pull(ctx, late, false, nil)
	if err != nil {
		return err
	}
	s.show(second)
	sum := second.total()
	s.out.check(sum.registry+second.others == 0 && sum.origin == 0, "for the new host the registry sent %s (none)", megabytes(sum.registry+second.others))
	return nil
}

// lateMember adds a host to the region, as the only one in the result.
func (s *stage) lateMember(ctx context.Context) ([]*member, error) {
	late, err := s.lab.AddHost(ctx, s.hostConfig("late"))
	if err != nil {
		return nil, err
	}
	if err := s.join(ctx, late); err != nil {
		return nil, err
	}
	return s.members[len(s.members)-1:], nil
}

// reach waits until the members have received that part of all they need.
func (s *stage) reach(ctx context.Context, part float64) error {
	want := int64(part * float64(s.size) * float64(len(s.members)))
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		var got int64
		for _, m := range s.members {
			received, err := m.daemon.Received(ctx)
			if err != nil {
				return err
			}
			got += received["peer"] + received["supernode"] + received["origin"]
		}
		if got >= want {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(errors.New("the pull ended too soon"), context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// checkOrigin holds what the registry sent, by its own log and by the
// supernode's metric, against the size of what was pulled.
func (s *stage) checkOrigin(ctx context.Context, r *round) error {
	sent := r.total().registry + r.others
	ratio := float64(sent) / float64(s.size)
	s.out.check(fmt.Sprintf("%.2f", ratio) == "1.00", "origin bytes / unique bytes is %.2f by the registry's log (%d / %d; manifest and config counted)",
		ratio, sent, s.size)
	origin, unique, err := s.supernode.Origin(ctx)
	if err != nil {
		return err
	}
	metric := float64(origin) / float64(unique)
	difference := max(origin-r.others, r.others-origin)
	s.out.check(fmt.Sprintf("%.2f", metric) == "1.00" && difference <= s.size/1000,
		"origin bytes / unique bytes is %.2f by the supernode's metrics (%d / %d)", metric, origin, unique)
	return nil
}

// checkTime is check for what takes time: where the machine may be busy with
// other things, it is only told.
func (s *stage) checkTime(held bool, format string, args ...any) {
	if s.cfg.untimed {
		s.out.say(format, args...)
		return
	}
	s.out.check(held, format, args...)
}

// checkTries holds that no engine had to begin a pull again.
func (s *stage) checkTries(results []result) {
	for _, x := range results {
		s.out.check(x.tries == 1, "the engine on %s pulled once (%d times)", x.member.host.Name(), x.tries)
	}
}

// show prints a table of one round.
func (s *stage) show(r *round) {
	rows := []string{"host\tseconds\tfrom peers\tfrom the supernode\tfrom the registry\tfrom its own store"}
	for _, x := range r.results {
		rows = append(rows, fmt.Sprintf("%s\t%.1f\t%s\t%s\t%s\t%s", x.member.host.Name(), x.took.Seconds(),
			megabytes(x.peer), megabytes(x.supernode), megabytes(x.registry), megabytes(x.store)))
	}
	s.out.table(rows)
}

// compare prints a table of the same pull with and without Damselfly.
func (s *stage) compare(swarm, direct *round) {
	rows := []string{"\tDamselfly:\tfrom\tfrom the\tfrom the\tdirect:\tfrom the", "host\tseconds\tpeers\tsupernode\tregistry\tseconds\tregistry"}
	for i, x := range swarm.results {
		d := direct.results[i]
		rows = append(rows, fmt.Sprintf("%s\t%.1f\t%s\t%s\t%s\t%.1f\t%s", x.member.host.Name(), x.took.Seconds(),
			megabytes(x.peer), megabytes(x.supernode), megabytes(x.registry), d.took.Seconds(), megabytes(d.registry)))
	}
	sum, dsum := swarm.total(), direct.total()
	rows = append(rows, fmt.Sprintf("all\t%.1f\t%s\t%s\t%s\t%.1f\t%s", swarm.slowest().Seconds(),
		megabytes(sum.peer), megabytes(sum.supernode), megabytes(sum.registry), direct.slowest().Seconds(), megabytes(dsum.registry)),
		fmt.Sprintf("supernode\t\t\t\t%s\t\t%s", megabytes(swarm.others), megabytes(direct.others)))
	s.out.table(rows)
	if s.cfg.loopback {
		return
	}
	what := "the fetching, without the unpacking (UNPACK=1 has it too)"
	if s.cfg.unpack {
		what = "fetching and unpacking"
	}
	s.out.say("Seconds are for %s. Processors in use: %s with Damselfly, %s direct.", what, swarm.busy, direct.busy)
}
