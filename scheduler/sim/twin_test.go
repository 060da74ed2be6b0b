package sim

import (
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// exact gives every flow of the network its max-min fair share, the dumb way:
// all rates grow together, and when a link is full its flows stay where they are.
func exact(n *network) map[*flow]float64 {
	rates := map[*flow]float64{}
	type room struct {
		left float64
		open int
	}
	rooms := map[*link]*room{}
	var links []*link
	for _, x := range n.nodes {
		for _, f := range x.flows {
			for _, l := range f.links[:f.crossed] {
				if f.flowing && rooms[l] == nil {
					links, rooms[l] = append(links, l), &room{l.rate, len(l.flows)}
				}
			}
		}
	}
	for {
		var full *link
		least := 0.0
		for _, l := range links {
			if r := rooms[l]; r.open > 0 && (full == nil || r.left/float64(r.open) < least) {
				full, least = l, r.left/float64(r.open)
			}
		}
		if full == nil {
			return rates
		}
		for _, f := range full.flows {
			if _, ok := rates[f]; ok {
				continue
			}
			rates[f] = least
			for _, l := range f.links[:f.crossed] {
				rooms[l].left -= least
				rooms[l].open--
			}
		}
	}
}

// twins are scenarios small enough for the dumb twin.
func twins() map[string]func() Scenario {
	thin := func(s *Scenario) {
		s.ZoneLink = testLink
		s.Seeds[0].Zone = "a"
		for i := range s.Hosts {
			s.Hosts[i].Zone = []string{"a", "b"}[i%2]
		}
	}
	unequal := links(func(i int) float64 { return []float64{1, 0.25, 4}[i%3] })
	slow := func(s *Scenario) { s.Request = 20 * time.Millisecond }
	fast := func(s *Scenario) { s.Seeds[0].Uplink, s.Seeds[0].Up = 10*testLink, 40 }
	dies := func(s *Scenario) { s.Hosts[3].Dies = 500 * time.Millisecond }
	of := func(hosts int, change ...func(*Scenario)) func() Scenario {
		return func() Scenario { return crowd(hosts, append([]func(*Scenario){length(64)}, change...)...) }
	}
	return map[string]func() Scenario{
		"equal":         of(20, lanes(4)),
		"two lanes":     of(16),
		"slow requests": of(16, lanes(4), slow),
		"unequal":       of(15, lanes(4), unequal),
		"thin link":     of(16, lanes(4), thin),
		"many flows":    of(60, lanes(4), length(16), thin, func(s *Scenario) { s.ZoneLink *= 10 }),
		"fast seed":     of(16, lanes(4), fast),
		"a death":       of(16, dies),
	}
}

// The rates differ from the exact ones by less than one part in a thousand of
// all that flows, over the whole run, and no link carries more than it can.
func TestRatesAreFair(t *testing.T) {
	for name, scenario := range twins() {
		t.Run(name, func(t *testing.T) {
			n := newNetwork(scenario())
			was, off, all, over := 0.0, 0.0, 0.0, 0.0
			offNow, allNow := 0.0, 0.0
			n.fair = func(f *flow) {
				off, all, was = off+offNow*(n.now-was), all+allNow*(n.now-was), n.now
				n.local(f)
				offNow, allNow = 0, 0
				carries := map[*link]float64{}
				for g, rate := range exact(n) {
					offNow += math.Abs(g.rate - rate)
					allNow += rate
					for _, l := range g.links[:g.crossed] {
						carries[l] += g.rate
					}
				}
				for l, rate := range carries {
					over = max(over, rate/l.rate)
				}
			}
			_, err := n.run(t.Context())
			require.NoError(t, err)
			expect(t, "part of the rates that is wrong", off/all, 0, 0.001)
			expect(t, "fullest link", over, 0.5, 1.1)
		})
	}
}

// With exact rates the same crowds take as long, within one part in a hundred.
// The slightest difference makes chance choose otherwise, so it is the mean of
// some runs that counts, as far as they agree among themselves.
func TestTwinTakesAsLong(t *testing.T) {
	const runs = 3
	for name, scenario := range twins() {
		t.Run(name, func(t *testing.T) {
			var ratios []float64
			for seed := range uint64(runs) {
				s := scenario()
				s.Random = seed
				n := newNetwork(s)
				n.fair = func(*flow) {
					for f, rate := range exact(n) {
						n.setRate(f, rate)
					}
				}
				twin, err := n.run(t.Context())
				require.NoError(t, err)
				ratios = append(ratios, run(t, s).Last.Seconds()/twin.Last.Seconds())
			}
			mean, spread := 0.0, 0.0
			for _, r := range ratios {
				mean += r / runs
			}
			for _, r := range ratios {
				spread += (r - mean) * (r - mean) / (runs - 1)
			}
			within := min(0.01+4*math.Sqrt(spread/runs), 0.06)
			expect(t, "time over the twin's", mean, 1-within, 1+within)
		})
	}
}
