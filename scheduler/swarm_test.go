package scheduler

import "testing"

func TestSwarmFinishes(t *testing.T) {
	r := simulate(simSpec{hosts: 8, pieces: 64, lanes: 2, link: 12.5e6, latency: 0.01, seed: 1})
	if !r.done() {
		t.Fatal("a host did not finish")
	}
}
