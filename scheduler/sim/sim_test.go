package sim

import (
	"context"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
)

// turmoil is a scenario with all that can happen.
func turmoil() Scenario {
	s := crowd(40, lanes(3), links(func(i int) float64 { return []float64{1, 1, 0.25, 3}[i%4] }), each(func(i int, h *Host) {
		h.Arrives = time.Duration(i%5) * 300 * time.Millisecond
		h.Zone = []string{"a", "b"}[i%2]
	}))
	s.Hosts[7].Dies, s.Hosts[8].Hangs = 2*time.Second, 2*time.Second
	s.Seeds[0].Zone = "a"
	s.Seeds = append(s.Seeds, s.Seeds[0])
	s.ZoneLink = 4 * testLink
	s.Request = 3 * time.Millisecond
	s.Layout.Length -= 1000 // so that the last piece is a short one
	return s
}

func TestSameScenarioSameResult(t *testing.T) {
	s := turmoil()
	r := run(t, s)
	require.Equal(t, r, run(t, s))
	s.Random++
	require.NotEqual(t, r, run(t, s))
}

// What is received has been sent, and is the content once for each host that
// lives, but for what is said to be wasted.
func TestNothingIsLostOrMadeUp(t *testing.T) {
	for name, s := range map[string]Scenario{"calm": crowd(20, lanes(4)), "turmoil": turmoil()} {
		t.Run(name, func(t *testing.T) {
			r := run(t, s)
			sent, received, living := r.SeedBytes, int64(0), int64(0)
			for i, h := range r.Hosts {
				sent, received = sent+h.Sent, received+h.Received
				if s.Hosts[i].Dies > 0 || s.Hosts[i].Hangs > 0 {
					require.Less(t, h.Received, s.Layout.Length)
					received -= h.Received
					sent -= h.Received
					continue
				}
				living++
				require.Positive(t, h.Done)
				require.GreaterOrEqual(t, h.Done-s.Hosts[i].Arrives, seconds(float64(s.Layout.Length)/s.Hosts[i].Downlink))
			}
			require.Equal(t, sent, received)
			extra := received - living*s.Layout.Length
			require.GreaterOrEqual(t, extra, int64(0))
			require.LessOrEqual(t, extra, int64(r.Wasted)*s.Layout.PieceSize)
			if name == "calm" {
				require.Zero(t, r.Wasted, "nobody lags, so nobody needs a second parent")
			}
			require.GreaterOrEqual(t, r.SeedBytes, s.Layout.Length)
			require.LessOrEqual(t, r.Efficiency(), 1.0)
		})
	}
}

// Whatever the seed of chance, no host has anything sooner than its bound.
func TestBound(t *testing.T) {
	const length = testPieces * pieces.MinPieceSize
	one := seconds(length / testLink)
	for _, c := range []struct {
		change func(*Scenario)
		bound  time.Duration
		limit  Limit
	}{
		{func(*Scenario) {}, one, LimitOrigin},
		{func(s *Scenario) { s.Origin /= 3 }, 3 * one, LimitOrigin},
		{func(s *Scenario) { s.Origin *= 3 }, one, LimitSeed},
		{func(s *Scenario) { s.Origin *= 3; s.Seeds[0].Uplink *= 3 }, one, LimitDownlink},
		{func(s *Scenario) { s.Hosts[2].Downlink /= 5 }, 5 * one, LimitDownlink},
		{func(s *Scenario) { s.Hosts[2].Downlink /= 5; s.Hosts[2].Dies = time.Second }, one, LimitOrigin},
		{func(s *Scenario) { s.Hosts[2].Arrives = 2 * one }, 3 * one, LimitDownlink},
		{each(func(_ int, h *Host) { h.Uplink /= 10 }), seconds(9 * length / (1.9 * testLink)), LimitUplinks},
		{func(s *Scenario) { s.Hosts[0].Zone = "far"; s.ZoneLink = testLink / 4 }, 4 * one, LimitZone},
	} {
		s := crowd(9, c.change)
		r := run(t, s)
		require.Equal(t, c.limit, r.Limit)
		require.InDelta(t, c.bound, r.Bound, 10)
		require.GreaterOrEqual(t, r.Last, r.Bound)
	}
}

// A scheduler that makes few decisions a second holds up everybody, for just as
// long as they take.
func TestSlowScheduler(t *testing.T) {
	s := crowd(30, lanes(4))
	r := run(t, s)
	s.Decisions = float64(r.Assigned) / (2 * r.Bound.Seconds())
	slow := run(t, s)
	expect(t, "time over the decisions'", slow.Last.Seconds()/(float64(slow.Assigned)/s.Decisions), 1, 1.1)
	s.Decisions *= 20
	expect(t, "time when there are enough", run(t, s).Last.Seconds()/r.Last.Seconds(), 0.97, 1.03)
}

// A transfer waits for its first byte, and meanwhile the others have its share.
func TestRequests(t *testing.T) {
	s := crowd(1, lanes(1), length(1))
	s.Request = time.Second
	r := run(t, s)
	// From the origin, to the seed; the decision's way; the wait; the piece.
	require.InDelta(t, pieceTime+s.Control+s.Request+pieceTime, r.Last, 10)
}

func TestZoneLinkIsShared(t *testing.T) {
	s := crowd(8, lanes(4), each(func(_ int, h *Host) { h.Zone = "far" }))
	s.Seeds[0].Zone, s.ZoneLink = "near", testLink/2
	r := run(t, s)
	require.Equal(t, map[string]int64{"far": r.SeedBytes}, r.Into)
	require.Equal(t, LimitZone, r.Limit)
	expect(t, "efficiency", r.Efficiency(), 0.85, 1)
}

func TestRunRefuses(t *testing.T) {
	for says, change := range map[string]func(*Scenario){
		"no hosts":    func(s *Scenario) { s.Hosts = nil },
		"no content":  func(s *Scenario) { s.Layout.Length = 0 },
		"piece size":  func(s *Scenario) { s.Layout.PieceSize = 3 },
		"no supernod": func(s *Scenario) { s.Seeds = nil },
		"the origin":  func(s *Scenario) { s.Origin = 0 },
		"a supernode": func(s *Scenario) { s.Seeds[0].Uplink = math.NaN() },
		"host 1":      func(s *Scenario) { s.Hosts[1].Downlink = 0 },
	} {
		_, err := Run(t.Context(), crowd(3, change))
		require.ErrorContains(t, err, says)
	}
}

func TestRunEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := crowd(10)
	var parts []float64
	s.Progress = func(_ time.Duration, part float64) {
		if parts = append(parts, part); part > 0.5 {
			cancel()
		}
	}
	_, err := Run(ctx, s)
	require.ErrorIs(t, err, context.Canceled)
	require.True(t, slices.IsSorted(parts))
	require.Less(t, parts[len(parts)-1], 0.7)
}
