package scheduler

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

func TestTrace(t *testing.T) {
	n, _ := strconv.Atoi(os.Getenv("N"))
	lanes, _ := strconv.Atoi(os.Getenv("LANES"))
	probe = func(n *simNet) {
		var step func()
		step = func() {
			var tot float64
			idle, full, zero := 0, 0, 0
			upidle := 0
			for id, h := range n.hosts {
				var r float64
				for _, f := range h.down.flows {
					r += f.rate
				}
				tot += r
				if id != 0 {
					if len(h.down.flows) < lanes && !h.have.Full() {
						idle++
					}
					if len(h.down.flows) == 0 && !h.have.Full() {
						zero++
					}
				}
				if len(h.up.flows) == 0 {
					upidle++
				}
				if h.have.Full() {
					full++
				}
			}
			s := n.hosts[0]
			var sr float64
			for _, f := range s.up.flows {
				sr += f.rate
			}
			tk := n.s.tasks[1]
			hl, hz := 0, 0
			for _, h := range n.s.list {
				if h.in < h.down {
					hl++
				}
				if h.out < h.up {
					hz++
				}
			}
			miss, missPair, open := 0, 0, 0
			for _, c := range tk.peers {
				if c == nil || c.host.in >= c.host.down || c.needs == 0 {
					continue
				}
				open++
				a, b := 0, 0
				for _, p := range tk.peers {
					if p == nil || p.host.seed || p.host.out >= p.host.lent || firstBoth(c.need, p.have, 0) < 0 {
						continue
					}
					if c.host.gets(p.host) {
						b++
					} else {
						a++
					}
				}
				if a > 0 {
					miss++
				} else if b > 0 {
					missPair++
				}
			}
			cp, one := 0, 0
			for _, x := range tk.copies {
				if x > 0 {
					cp++
				}
				if x == 1 {
					one++
				}
			}
			sh := 0
			for _, q := range tk.seeds {
				sh = q.has
			}
			minh := 999
			for _, h := range n.hosts {
				minh = min(minh, h.have.Len())
			}
			fmt.Printf("seed has %d copied %d single %d sent %d minhave %d;", sh, cp, one, n.sent[0], minh)
			fmt.Printf("open %d miss %d pair %d ", open, miss, missPair)
			fmt.Printf("t=%.2f util %.2f seed %.2f (%d flows) hosts idle-lane %d zero %d upidle %d full %d | sched hungry %d room %d in<down %d out<up %d\n", n.now, tot/12.5e6/float64(len(n.hosts)-1), sr/12.5e6, len(s.up.flows), idle, zero, upidle, full, tk.hungry.n, tk.room.n, hl, hz)
			n.after(0.1, step)
		}
		n.after(0, step)
	}
	defer func() { probe = nil }()
	r := simulate(simSpec{hosts: n, pieces: 256, lanes: lanes, link: 12.5e6, latency: 0.01, seed: 1, sameParent: true})
	t.Logf("eff %.3f", r.efficiency())
	_ = time.Now
}
