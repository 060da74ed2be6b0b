// Package sim runs the scheduler under a modelled network, to plan and to test
// at sizes that no lab has.
//
// The network is a fluid one: a transfer flows at its max-min fair share of the
// links it crosses, and what a host has to wait for besides is said in the
// Scenario. Computing, disks and losses on the way cost nothing here.
package sim

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"damselfly.dev/pieces"
	"damselfly.dev/scheduler"
)

// Scenario is hosts that want one content of a cold supernode. Rates are bytes
// of content per second. The same scenario always gives the same result.
type Scenario struct {
	Layout pieces.Layout
	Hosts  []Host
	// Seeds are the supernodes. Each gets from the origin, and sends, its share
	// of the pieces: replicas divide the layers of an image so.
	Seeds []Host
	// Origin is the rate at which the origin sends, from time 0 on, to all
	// seeds together.
	Origin float64
	// ZoneLink is the rate each way of the link between a zone and all others;
	// 0 is no bound.
	ZoneLink float64
	// Control is how long a message takes from a host to the scheduler, or back.
	Control time.Duration
	// Request is how long a transfer has to wait for its first byte.
	Request time.Duration
	// Decisions is how many of them a second the scheduler can make; 0 is no bound.
	Decisions float64
	// Reading has the hosts say all the time which piece their reader waits for.
	Reading bool
	Policy  scheduler.Config
	// Random chooses among the runs that chance allows.
	Random uint64
	// Progress, if there is one, is told ten times a second of the scenario's
	// own time what part of the bytes has come.
	Progress func(now time.Duration, part float64)
}

// Host is a host of a scenario, or a supernode, of which only the lanes, the
// place and the uplink count.
type Host struct {
	scheduler.Host
	Uplink, Downlink float64
	Arrives          time.Duration // when it joins
	Dies             time.Duration // at once and noticed by its peers; 0 is never
	Hangs            time.Duration // its links stand still, and nobody is told; 0 is never
	Rogue            Rogue         // what it does to harm the others, who alone are waited for
}

// Result is what became of a scenario.
type Result struct {
	Hosts  []HostResult
	Bound  time.Duration // before which no order of transfers could have ended
	Limit  Limit         // what makes the bound
	Last   time.Duration // when the last of the hosts that live had everything
	Wasted int           // pieces that came to a host that had them
	// Early is how often a seed was to send a piece again while it had one that
	// it had sent to nobody.
	Early     int
	SeedBytes int64            // sent by seeds
	Into      map[string]int64 // bytes that came into a zone from another
	Assigned  int              // transfers
	Busiest   int              // assigned in the busiest second
}

// HostResult is what became of a host.
type HostResult struct {
	Done     time.Duration // when it had everything; 0 when it never had
	Sent     int64         // bytes of whole pieces
	Received int64
}

// Efficiency is the bound over the time of the last host.
func (r Result) Efficiency() float64 { return float64(r.Bound) / float64(r.Last) }

// Limit names what no policy can be faster than.
type Limit string

// The limits.
const (
	LimitOrigin   Limit = "the registry's link"
	LimitSeed     Limit = "the supernode's link"
	LimitDownlink Limit = "the slowest host's download link"
	LimitUplinks  Limit = "all upload links together"
	LimitZone     Limit = "the link between the zones"
)

// Lanes and delays of Crowd: those of the daemons as installed, in a datacenter.
const (
	DefaultLanes   = 3
	DefaultControl = time.Millisecond
	DefaultRequest = 500 * time.Microsecond
)

// Crowd returns a scenario of hosts that all come at once, with links of one
// rate, also for the supernode and the origin.
func Crowd(hosts int, length int64, link float64) Scenario {
	s := Scenario{
		Layout: pieces.NewLayout(length), Origin: link,
		Seeds:   []Host{{Host: scheduler.Host{Up: DefaultLanes}, Uplink: link}},
		Control: DefaultControl, Request: DefaultRequest, Policy: scheduler.DefaultConfig(),
	}
	for range hosts {
		s.Hosts = append(s.Hosts, Host{Host: scheduler.Host{Up: DefaultLanes, Down: DefaultLanes}, Uplink: link, Downlink: link})
	}
	return s
}

func (s Scenario) validate() error {
	if err := s.Layout.Validate(); err != nil {
		return err
	}
	switch {
	case s.Layout.Count() == 0:
		return errors.New("no content")
	case len(s.Hosts) == 0:
		return errors.New("no hosts")
	case len(s.Seeds) == 0:
		return errors.New("no supernode")
	case !(s.Origin > 0):
		return errors.New("the origin has no link")
	}
	for _, h := range s.Seeds {
		if !(h.Uplink > 0) || h.Up < 1 {
			return errors.New("a supernode has no link or no lanes")
		}
	}
	for i, h := range s.Hosts {
		if !(h.Uplink > 0) || !(h.Downlink > 0) || h.Down < 1 {
			return fmt.Errorf("host %d has no link or no lanes", i)
		}
	}
	return nil
}

// bound returns when the last living host can have everything at the earliest,
// if nothing but the links took time, and what makes it so.
func (s Scenario) bound() (time.Duration, Limit) {
	size := float64(s.Layout.Length)
	var seeds, uplinks float64
	for _, h := range s.Seeds {
		seeds += h.Uplink
	}
	zones := map[string]bool{}
	at, limit, living := 0.0, LimitOrigin, 0
	atLeast := func(t float64, l Limit) {
		if t > at {
			at, limit = t, l
		}
	}
	atLeast(size/s.Origin, LimitOrigin)
	atLeast(size/seeds, LimitSeed)
	for _, h := range s.Hosts {
		uplinks += h.Uplink
		if h.Dies == 0 && h.Hangs == 0 && h.Rogue == "" {
			living++
			atLeast(h.Arrives.Seconds()+size/h.Downlink, LimitDownlink)
			zones[h.Zone] = true
		}
	}
	atLeast(float64(living)*size/(seeds+uplinks), LimitUplinks)
	if s.ZoneLink > 0 {
		for z := range zones {
			if !slices.ContainsFunc(s.Seeds, func(h Host) bool { return h.Zone == z }) {
				atLeast(size/s.ZoneLink, LimitZone)
			}
		}
	}
	return seconds(at), limit
}

// seconds makes a duration of them, the longest there is of too many.
func seconds(s float64) time.Duration {
	if s >= math.MaxInt64/1e9 {
		return math.MaxInt64
	}
	return time.Duration(s * 1e9)
}

// Run simulates the scenario until every host that lives has everything. It is
// an error when that does not happen in a hundred times the bound and a minute.
func Run(ctx context.Context, s Scenario) (Result, error) {
	if err := s.validate(); err != nil {
		return Result{}, fmt.Errorf("scenario: %w", err)
	}
	return newNetwork(s).run(ctx)
}
