package sim

import (
	"testing"
	"time"
)

// Slow hosts cost the fast ones little, whichever pieces chance gives them first.
func TestFastHostsBesideSlowOnes(t *testing.T) {
	third := func(i int) bool { return i%3 == 0 }
	others := func(i int) bool { return !third(i) }
	for _, hosts := range []int{15, 30} {
		for _, n := range []int{2, 4} {
			for seed := range uint64(5) {
				s := crowd(hosts, lanes(n), lab, links(func(i int) float64 {
					if third(i) {
						return 0.25
					}
					return 1
				}))
				s.Random = seed
				r := run(t, s)
				expect(t, "stretch of the fast", stretch(s, r, others), 1, 1.25)
				expect(t, "stretch of the slow", stretch(s, r, third), 1, 1.05)
				expect(t, "seed copies", seedCopies(s, r), 1, 1.1)
			}
		}
	}
	for seed := range uint64(5) {
		s := crowd(15, lanes(4), lab, links(func(i int) float64 {
			if third(i) {
				return 10
			}
			return 1
		}), func(s *Scenario) { s.Seeds[0].Uplink, s.Origin = 10*testLink, 10*testLink })
		s.Random = seed
		r := run(t, s)
		expect(t, "stretch of those ten times as fast", stretch(s, r, third), 1, 1.8)
		expect(t, "stretch of the others", stretch(s, r, others), 1, 1.05)
	}
}

// What the lab can do: a message takes a twentieth of a piece's time.
func TestCrowdOnTheLab(t *testing.T) {
	for _, c := range []struct {
		hosts, lanes int
		least        float64
	}{{8, 2, 0.95}, {8, 4, 0.94}, {16, 2, 0.94}, {16, 4, 0.92}, {30, 2, 0.93}, {30, 4, 0.92}} {
		for seed := range uint64(3) {
			s := crowd(c.hosts, lanes(c.lanes), lab)
			s.Random = seed
			r := run(t, s)
			t.Logf("%d hosts with %d lanes", c.hosts, c.lanes)
			expect(t, "efficiency", r.Efficiency(), c.least, 1)
			expect(t, "seed copies", seedCopies(s, r), 1, 1.1)
		}
	}
	fast := func(s *Scenario) { s.Seeds[0].Uplink, s.Origin = 10*testLink, 10*testLink }
	s := crowd(16, lanes(4), lab, fast)
	expect(t, "efficiency of a fast supernode", run(t, s).Efficiency(), 0.92, 1)
	s = crowd(16, lanes(4), lab, each(func(i int, h *Host) { h.Arrives = time.Duration(i) * 300 * time.Millisecond }))
	expect(t, "stretch of late hosts", stretch(s, run(t, s), nil), 1, 1.15)
}
