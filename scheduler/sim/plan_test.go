package sim

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var rewrite = flag.Bool("rewrite", false, "write what the plans in testdata give into them")

func smallPlan() Plan {
	p := DefaultPlan()
	p.Hosts, p.Size, p.HostLink, p.SupernodeUp = 6, 64<<20, 100e6, 50e6
	return p
}

func planned(t *testing.T, p Plan) Report {
	t.Helper()
	r, err := p.Run(t.Context(), nil)
	require.NoError(t, err)
	return r
}

func TestReport(t *testing.T) {
	zoned := smallPlan()
	zoned.Zones, zoned.ZoneLink, zoned.ArriveOver, zoned.CrossOnce = 2, 200e6, 2*time.Second, true
	for name, p := range map[string]Plan{"small": smallPlan(), "zones": zoned} {
		r := planned(t, p)
		var got bytes.Buffer
		require.NoError(t, r.Text(&got))
		file := "testdata/" + name + ".txt"
		if *rewrite {
			require.NoError(t, os.WriteFile(file, got.Bytes(), 0o600))
		}
		want, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Equal(t, string(want), got.String(), "see -rewrite")
	}
}

func TestSVGIsXML(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, planned(t, smallPlan()).SVG(&b))
	require.NotContains(t, b.String(), "NaN")
	d := xml.NewDecoder(&b)
	for {
		_, err := d.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		require.NoError(t, err)
	}
}

// What no supernode is known to do is not promised in silence.
func TestReportWarnsOfManyAssignments(t *testing.T) {
	p := smallPlan()
	p.Hosts, p.HostLink, p.SupernodeUp = 400, 10e9, 10e9
	says := func() string {
		var b bytes.Buffer
		require.NoError(t, planned(t, p).Text(&b))
		return b.String()
	}
	require.Contains(t, says(), "see --assignments")
	p.Assignments = 50000
	require.NotContains(t, says(), "see --assignments")
}

// A second supernode helps where the first one's link is the limit, and nowhere else.
func TestSecondSupernode(t *testing.T) {
	p := smallPlan()
	p.RegistryLink = 200e6
	r := planned(t, p)
	require.Equal(t, LimitSeed, r.Limit)
	expect(t, "time with the second", r.Second.Last.Seconds()/r.Last.Seconds(), 0.5, 0.65)
	p.RegistryLink = 20e6
	r = planned(t, p)
	require.Equal(t, LimitOrigin, r.Limit)
	expect(t, "time with the second", r.Second.Last.Seconds()/r.Last.Seconds(), 0.97, 1.03)
}

func TestPlanRefuses(t *testing.T) {
	for says, change := range map[string]func(*Plan){
		"--hosts 0":       func(p *Plan) { p.Hosts = 0 },
		"--hosts 100001":  func(p *Plan) { p.Hosts = 100001 },
		"--size":          func(p *Plan) { p.Size = 0 },
		"fewer hosts":     func(p *Plan) { p.Hosts, p.Size = 100000, 1<<40 },
		"--host-link":     func(p *Plan) { p.HostLink = 0 },
		"--zone-link":     func(p *Plan) { p.Zones, p.ZoneLink = 2, 1 },
		"with --zones":    func(p *Plan) { p.ZoneLink = 1e9 },
		"--zones 7":       func(p *Plan) { p.Zones = 7 },
		"--lanes 0":       func(p *Plan) { p.Lanes = 0 },
		"--up-lanes 257":  func(p *Plan) { p.UpLanes = 257 },
		"--arrive-over":   func(p *Plan) { p.ArriveOver = -1 },
		"--round-trip":    func(p *Plan) { p.RoundTrip = time.Minute },
		"--assignments":   func(p *Plan) { p.Assignments = -1 },
		"--registry-link": func(p *Plan) { p.RegistryLink = -1 },
	} {
		p := smallPlan()
		change(&p)
		_, err := p.Run(t.Context(), nil)
		require.ErrorContains(t, err, says)
		require.Regexp(t, "want|say", err.Error())
	}
}

func TestTexts(t *testing.T) {
	require.Equal(t, "900 ms", timeText(900*time.Millisecond))
	require.Equal(t, "2.67 s", timeText(2670*time.Millisecond))
	require.Equal(t, "17m11s", timeText(1031*time.Second))
	require.Equal(t, "3 GiB", bytesText(3<<30))
	require.Equal(t, "1.5 KiB", bytesText(1536))
	require.Equal(t, "29.3 TiB", bytesText(10000*3<<30))
	require.Equal(t, "2.5 Gbit/s", rateText(2.5e9))
	require.Equal(t, "100 Mbit/s", rateText(1e8))
}
