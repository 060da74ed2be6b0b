package sim

import (
	"testing"
	"time"
)

// zones puts the hosts into zones of so many, the supernode into the first, with
// a link of a part of a host's into each, and the rule on.
func zones(hosts int, link float64) func(*Scenario) {
	return func(s *Scenario) {
		s.ZoneLink, s.Policy.CrossOnce = link*testLink, true
		s.Seeds[0].Zone = "a"
		for i := range s.Hosts {
			s.Hosts[i].Zone = string(rune('a' + i/hosts))
		}
	}
}

// crossed is how many copies came into a zone.
func crossed(s Scenario, r Result, zone string) float64 {
	return float64(r.Into[zone]) / float64(s.Layout.Length)
}

// far is how many times as long as its bound the last of the hosts from first on
// took.
func far(s Scenario, r Result, first int) float64 {
	var last time.Duration
	for _, h := range r.Hosts[first:] {
		last = max(last, h.Done)
	}
	return last.Seconds() / (float64(s.Layout.Length) / min(s.ZoneLink, testLink))
}

// Messages and requests take what they take on the lab: a twentieth of a piece's time.
func lab(s *Scenario) { s.Control, s.Request = pieceTime/20, pieceTime/40 }

func TestManyZones(t *testing.T) {
	for _, link := range []float64{0.25, 1} {
		s := crowd(32, lanes(4), lab, zones(8, link))
		r := run(t, s)
		t.Logf("link %v", link)
		expect(t, "stretch of the far", far(s, r, 8), 1, 1.4)
		for _, z := range []string{"b", "c", "d"} {
			expect(t, "copies across", crossed(s, r, z), 1, 1.1)
		}
	}
	// A zone for each host, and for the supernode: all that moves crosses. Pairs
	// can neither swarm alone nor take all from outside: the rule costs them most.
	for _, n := range []int{2, 4} {
		s := crowd(8, lanes(n), lab, zones(1, 100), func(s *Scenario) { s.Seeds[0].Zone = "z" })
		r := run(t, s)
		expect(t, "efficiency of zones of one host", r.Efficiency(), 0.85, 1)
		s = crowd(16, lanes(n), lab, zones(2, 100), func(s *Scenario) { s.Seeds[0].Zone = "z" })
		expect(t, "efficiency of zones of two hosts", run(t, s).Efficiency(), 0.6, 1)
	}
}

// Hosts without a zone get from anyone, and so do others from them.
func TestHostsWithoutAZone(t *testing.T) {
	s := crowd(16, lanes(4), lab, zones(8, 1), func(s *Scenario) { s.Seeds[0].Zone = "" })
	for i := range 8 {
		s.Hosts[i].Zone = ""
	}
	r := run(t, s)
	expect(t, "stretch", stretch(s, r, nil), 1, 1.2)
	expect(t, "copies across", crossed(s, r, "b"), 1, 1.1)
}

// What brings a piece across may be slow, hang or die.
func TestTroubleInAZone(t *testing.T) {
	for name, change := range map[string]func(*Scenario){
		"a far host dies":   func(s *Scenario) { s.Hosts[12].Dies = 3 * time.Second },
		"a far host hangs":  func(s *Scenario) { s.Hosts[12].Hangs = 3 * time.Second },
		"a near host hangs": func(s *Scenario) { s.Hosts[4].Hangs = 3 * time.Second },
		"a near host dies":  func(s *Scenario) { s.Hosts[4].Dies = 3 * time.Second },
		"a far host is slow": func(s *Scenario) {
			s.Hosts[12].Uplink /= 100
			s.Hosts[12].Downlink /= 100
		},
		"a near host is slow": func(s *Scenario) {
			s.Hosts[4].Uplink /= 100
			s.Hosts[4].Downlink /= 100
		},
	} {
		for _, link := range []float64{0.25, 1} {
			s := crowd(16, lanes(4), lab, zones(8, link), change)
			r := run(t, s)
			t.Log(name, link)
			sick := func(i int) bool { return i == 12 || i == 4 }
			var last time.Duration
			for i, h := range r.Hosts {
				if !sick(i) {
					last = max(last, h.Done)
				}
			}
			expect(t, "stretch of the others", last.Seconds()/(float64(s.Layout.Length)/min(s.ZoneLink, testLink)), 1, 1.4)
			expect(t, "copies across", crossed(s, r, "b"), 1, 1.1)
		}
	}
}
