package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"damselfly.dev/pieces"
	"damselfly.dev/scheduler"
)

// Plan is a region as its operator describes it. Links are bits of content per
// second, each way.
type Plan struct {
	Hosts        int
	Size         int64 // bytes that each host wants
	HostLink     int64
	SupernodeUp  int64 // the supernode's link to the hosts
	RegistryLink int64 // of the registry to the supernode; 0 is as fast as the supernode's
	Lanes        int   // of a host, each way
	UpLanes      int   // of the supernode
	Zones        int   // among which the hosts are dealt; the supernode is in the first
	ZoneLink     int64 // between a zone and all others; 0 is no bound
	CrossOnce    bool  // the zone rule
	ArriveOver   time.Duration
	RoundTrip    time.Duration
	Assignments  int // the most that the supernode makes a second; 0 is no bound
	Random       uint64
}

// DefaultPlan returns a region with one zone and the daemons as installed.
func DefaultPlan() Plan {
	return Plan{
		Hosts: 1000, Size: 1 << 30, HostLink: 10e9, SupernodeUp: 10e9,
		Lanes: DefaultLanes, UpLanes: DefaultLanes, Zones: 1, RoundTrip: DefaultRequest, Random: 1,
	}
}

const (
	leastLink   = 1e6 // bits per second
	mostHosts   = 100_000
	mostCopies  = 1e8 // pieces that come to all hosts together
	longest     = 24 * time.Hour
	slowestTrip = 10 * time.Second
	// handling is what a message takes besides its way.
	handling = DefaultControl - DefaultRequest/2
)

// Validate tells which of the flags that describe the plan cannot be, and what
// to say instead.
func (p Plan) Validate() error {
	for _, l := range []struct {
		flag string
		rate int64
		free bool // may be 0
	}{
		{"host-link", p.HostLink, false},
		{"supernode-link", p.SupernodeUp, false},
		{"registry-link", p.RegistryLink, true},
		{"zone-link", p.ZoneLink, true},
	} {
		if l.rate < leastLink && (l.rate != 0 || !l.free) {
			return fmt.Errorf("--%s of %d bit/s: want at least 1Mbit", l.flag, l.rate)
		}
	}
	switch {
	case p.Hosts < 1 || p.Hosts > mostHosts:
		return fmt.Errorf("--hosts %d: want 1 to %d", p.Hosts, mostHosts)
	case p.Size < 1 || p.Size > pieces.MaxLength:
		return fmt.Errorf("--size of %d bytes: want 1B to 1TiB, as in 3GiB", p.Size)
	case float64(p.Hosts)*float64(pieces.NewLayout(p.Size).Count()) > mostCopies:
		return fmt.Errorf("--hosts %d and --size %s would take hours: want fewer hosts, the times hardly depend on how many there are",
			p.Hosts, bytesText(p.Size))
	case !lanesFit(p.Lanes) || !lanesFit(p.UpLanes):
		return fmt.Errorf("--lanes %d, --up-lanes %d: want 1 to %d", p.Lanes, p.UpLanes, scheduler.MaxLanes)
	case p.Zones < 1 || p.Zones > p.Hosts:
		return fmt.Errorf("--zones %d: want 1 to the number of hosts", p.Zones)
	case p.Zones == 1 && (p.ZoneLink != 0 || p.CrossOnce):
		return errors.New("--zone-link and --cross-once are between zones: say how many there are with --zones")
	case p.ArriveOver < 0 || p.ArriveOver > longest:
		return fmt.Errorf("--arrive-over %v: want 0s to %v", p.ArriveOver, longest)
	case p.RoundTrip < 0 || p.RoundTrip > slowestTrip:
		return fmt.Errorf("--round-trip %v: want 0s to %v", p.RoundTrip, slowestTrip)
	case p.Assignments < 0:
		return fmt.Errorf("--assignments %d: want how many a second, or 0 for no bound", p.Assignments)
	}
	return nil
}

func lanesFit(n int) bool { return n >= 1 && n <= scheduler.MaxLanes }

// registry returns the rate of the registry's link in bits per second.
func (p Plan) registry() int64 {
	if p.RegistryLink == 0 {
		return p.SupernodeUp
	}
	return p.RegistryLink
}

// Scenario returns the plan as one, with so many supernodes.
func (p Plan) Scenario(supernodes int) Scenario {
	s := Crowd(p.Hosts, p.Size, float64(p.HostLink)/8)
	s.Origin, s.ZoneLink = float64(p.registry())/8, float64(p.ZoneLink)/8
	s.Control, s.Request = handling+p.RoundTrip/2, p.RoundTrip
	s.Decisions, s.Random = float64(p.Assignments), p.Random
	s.Policy.CrossOnce = p.CrossOnce
	seed := s.Seeds[0]
	seed.Up, seed.Uplink, seed.Zone = p.UpLanes, float64(p.SupernodeUp)/8, p.zone(0)
	s.Seeds = slices.Repeat([]Host{seed}, supernodes)
	for i := range s.Hosts {
		h := &s.Hosts[i]
		h.Up, h.Down, h.Zone = p.Lanes, p.Lanes, p.zone(i)
		h.Arrives = time.Duration(float64(p.ArriveOver) * float64(i) / float64(max(p.Hosts-1, 1)))
	}
	return s
}

// zone names the ith host's, "" when there is but one.
func (p Plan) zone(i int) string {
	if p.Zones == 1 {
		return ""
	}
	return strconv.Itoa(i%p.Zones + 1)
}

// Run simulates the plan with one supernode and, beside it, with two. It calls
// progress, if there is one, as Scenario does for the first.
func (p Plan) Run(ctx context.Context, progress func(now time.Duration, part float64)) (Report, error) {
	if err := p.Validate(); err != nil {
		return Report{}, err
	}
	one, two := p.Scenario(1), p.Scenario(2)
	one.Progress = progress
	type answer struct {
		Result
		error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	second := make(chan answer, 1)
	go func() {
		r, err := Run(ctx, two)
		second <- answer{r, err}
	}()
	r, err := Run(ctx, one)
	if err != nil {
		cancel()
	}
	other := <-second
	if err == nil {
		err = other.error
	}
	return Report{Plan: p, Scenario: one, Result: r, Second: other.Result}, err
}
