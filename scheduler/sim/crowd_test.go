package sim

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
)

const (
	testLink   = 12.5e6 // bytes per second
	pieceTime  = pieces.MinPieceSize * time.Second / testLink
	testPieces = 256
)

// crowd is hosts with two lanes that want a content of small pieces at once.
// A message takes a hundredth of a piece's time.
func crowd(hosts int, change ...func(*Scenario)) Scenario {
	s := Crowd(hosts, testPieces*pieces.MinPieceSize, testLink)
	s.Control, s.Request = pieceTime/100, 0
	lanes(2)(&s)
	for _, f := range change {
		f(&s)
	}
	return s
}

func lanes(n int) func(*Scenario) {
	return func(s *Scenario) {
		s.Seeds[0].Up = n
		for i := range s.Hosts {
			s.Hosts[i].Up, s.Hosts[i].Down = n, n
		}
	}
}

// links gives host i so many times the link.
func links(scale func(i int) float64) func(*Scenario) {
	return func(s *Scenario) {
		for i := range s.Hosts {
			s.Hosts[i].Uplink *= scale(i)
			s.Hosts[i].Downlink *= scale(i)
		}
	}
}

func each(f func(i int, h *Host)) func(*Scenario) {
	return func(s *Scenario) {
		for i := range s.Hosts {
			f(i, &s.Hosts[i])
		}
	}
}

func length(pieceCount int) func(*Scenario) {
	return func(s *Scenario) { s.Layout.Length = int64(pieceCount) * s.Layout.PieceSize }
}

func run(t *testing.T, s Scenario) Result {
	t.Helper()
	r, err := Run(t.Context(), s)
	require.NoError(t, err)
	return r
}

// stretch is how many times longer than its own link demands the worst of the
// hosts took, from its start, among those the filter takes.
func stretch(s Scenario, r Result, filter func(i int) bool) float64 {
	worst := 0.0
	for i, h := range s.Hosts {
		if h.Dies == 0 && h.Hangs == 0 && (filter == nil || filter(i)) {
			took := (r.Hosts[i].Done - h.Arrives).Seconds()
			worst = max(worst, took/(float64(s.Layout.Length)/h.Downlink))
		}
	}
	return worst
}

func seedCopies(s Scenario, r Result) float64 { return float64(r.SeedBytes) / float64(s.Layout.Length) }

// expect fails unless got is in [low, high].
func expect(t *testing.T, what string, got, low, high float64) {
	t.Helper()
	t.Logf("%s %.3f", what, got)
	if !(got >= low && got <= high) {
		t.Errorf("%s is %.3f, want %.2f to %.2f", what, got, low, high)
	}
}

func TestFlashCrowd(t *testing.T) {
	for _, c := range []struct {
		hosts, lanes int
		control      time.Duration
		reading      bool
	}{
		{1, 2, pieceTime / 100, false},
		{2, 2, pieceTime / 100, false},
		{8, 2, pieceTime / 100, false},
		{16, 2, pieceTime / 100, false},
		{30, 2, pieceTime / 100, false},
		{300, 2, pieceTime / 100, false},
		{8, 4, pieceTime / 100, false},
		{16, 4, pieceTime / 100, false},
		{30, 4, pieceTime / 100, false},
		{30, 1, pieceTime / 100, false},
		{8, 2, pieceTime / 10, false},
		{16, 2, pieceTime / 10, false},
		{30, 2, pieceTime / 10, false},
		{30, 2, pieceTime / 100, true},
	} {
		t.Run(fmt.Sprintf("hosts=%d,lanes=%d,control=%v,reading=%v", c.hosts, c.lanes, c.control, c.reading), func(t *testing.T) {
			s := crowd(c.hosts, lanes(c.lanes))
			s.Control, s.Reading = c.control, c.reading
			r := run(t, s)
			expect(t, "efficiency", r.Efficiency(), 0.9, 1)
			expect(t, "seed copies", seedCopies(s, r), 1, 1.15)
			expect(t, "pieces wasted", float64(r.Wasted), 0, 0)
			expect(t, "second copies before all firsts", float64(r.Early), 0, 0)
		})
	}
}

func TestFewPieces(t *testing.T) {
	s := crowd(8, length(4))
	expect(t, "stretch", stretch(s, run(t, s), nil), 1, 3)
	s = crowd(8, length(1))
	expect(t, "stretch of one piece", stretch(s, run(t, s), nil), 1, 6)
}

func TestUnequalLinks(t *testing.T) {
	fast := func(i int) bool { return i%3 != 0 }
	slow := func(i int) bool { return !fast(i) }
	for _, n := range []int{2, 4} {
		s := crowd(15, lanes(n), links(func(i int) float64 {
			if fast(i) {
				return 1
			}
			return 0.25
		}))
		r := run(t, s)
		expect(t, "stretch of the fast", stretch(s, r, fast), 1, 1.25)
		expect(t, "stretch of the slow", stretch(s, r, slow), 1, 1.15)
		expect(t, "seed copies", seedCopies(s, r), 1, 1.15)
	}
}

// The others lose less than a tenth when one host is far slower than they are,
// or dies halfway.
func TestTrouble(t *testing.T) {
	s := crowd(15)
	calm := stretch(s, run(t, s), nil)
	sick := func(i int) bool { return i == 4 }
	healthy := func(i int) bool { return !sick(i) }
	const halfway = 2700 * time.Millisecond

	slow := crowd(16, links(func(i int) float64 {
		if sick(i) {
			return 0.01
		}
		return 1
	}))
	r := run(t, slow)
	expect(t, "stretch beside a slow host", stretch(slow, r, healthy)/calm, 0.9, 1.1)
	expect(t, "stretch of the slow host", stretch(slow, r, sick), 1, 1.15)
	dead := crowd(16, func(s *Scenario) { s.Hosts[4].Dies = halfway })
	expect(t, "stretch beside a dead host", stretch(dead, run(t, dead), nil)/calm, 0.9, 1.1)
	hung := crowd(16, func(s *Scenario) { s.Hosts[4].Hangs = halfway })
	expect(t, "stretch beside a host that hangs", stretch(hung, run(t, hung), nil)/calm, 0.9, 1.1)
}

func TestLateHosts(t *testing.T) {
	s := crowd(16, each(func(i int, h *Host) { h.Arrives = time.Duration(i) * time.Second }))
	r := run(t, s)
	expect(t, "stretch of late hosts", stretch(s, r, nil), 1, 1.15)
	expect(t, "seed copies", seedCopies(s, r), 1, 1.15)
	s = crowd(16, each(func(i int, h *Host) {
		if i > 0 {
			h.Arrives = 20 * time.Second
		}
	}))
	r = run(t, s)
	expect(t, "stretch after the first host", stretch(s, r, nil), 1, 1.15)
	expect(t, "seed copies", seedCopies(s, r), 1, 1.15)
}

func TestSeedOfAnotherSpeed(t *testing.T) {
	s := crowd(16, func(s *Scenario) { s.Seeds[0].Uplink, s.Seeds[0].Up, s.Origin = 125e6, 20, 125e6 })
	expect(t, "efficiency with a fast seed", run(t, s).Efficiency(), 0.95, 1)
	s = crowd(16, func(s *Scenario) { s.Origin /= 2 })
	r := run(t, s)
	expect(t, "efficiency with a slow origin", r.Efficiency(), 0.95, 1)
	expect(t, "seed copies", seedCopies(s, r), 1, 1.15)
}
