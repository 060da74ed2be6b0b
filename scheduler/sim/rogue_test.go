package sim

import (
	"fmt"
	"testing"

	"damselfly.dev/scheduler"
)

// Whatever one hostile host of thirty does, however many lanes it claims, the others
// lose less than a tenth; ten of thirty cost them as much again at most: nobody knows for
// two seconds then how long a piece takes.
func TestRogueHosts(t *testing.T) {
	const hosts = 30
	last := func(change ...func(*Scenario)) float64 {
		return run(t, crowd(hosts, append([]func(*Scenario){lanes(3), lab}, change...)...)).Last.Seconds()
	}
	for _, c := range []struct {
		rogues, claimed int
		most            float64
	}{{1, 3, 1.1}, {1, scheduler.MaxLanes, 1.1}, {10, scheduler.MaxLanes, 2}} {
		calm := last(func(s *Scenario) { s.Hosts = s.Hosts[c.rogues:] })
		for _, does := range Rogues {
			t.Run(fmt.Sprintf("%d,%s,lanes=%d", c.rogues, does, c.claimed), func(t *testing.T) {
				took := last(each(func(i int, h *Host) {
					if i < c.rogues { // the first to come
						h.Rogue, h.Up, h.Down = does, c.claimed, c.claimed
					}
				}))
				expect(t, "time over calm", took/calm, 0.9, c.most)
			})
		}
	}
}
