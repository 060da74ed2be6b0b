package sim

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Report is what a plan comes to.
type Report struct {
	Plan
	Scenario
	Result
	Second Result // with a second supernode
}

// done returns when the hosts had everything, in order; or how long that took
// each of them.
func (r Report) done(each bool) []time.Duration {
	times := make([]time.Duration, len(r.Result.Hosts))
	for i, h := range r.Result.Hosts {
		times[i] = h.Done
		if each {
			times[i] -= r.Scenario.Hosts[i].Arrives
		}
	}
	slices.Sort(times)
	return times
}

// quantile returns the time within which the part q of all is.
func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// Text writes the report for people to read.
func (r Report) Text(w io.Writer) error {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-19s  %s\n", name, fmt.Sprintf(format, args...))
	}
	p, l := r.Plan, r.Layout
	line("hosts", "%d, each %s", p.Hosts, rateText(p.HostLink))
	if p.Zones > 1 {
		line("zones", "%d, between them %s", p.Zones, rateText(p.ZoneLink))
	}
	line("supernode", "%s, registry %s", rateText(p.SupernodeUp), rateText(p.registry()))
	line("content", "%s in %d pieces of %s", bytesText(p.Size), l.Count(), bytesText(l.PieceSize))
	b.WriteByte('\n')

	times := r.done(false)
	line("first host done", "%s", timeText(times[0]))
	line("median", "%s", timeText(quantile(times, 0.5)))
	line("99 %", "%s", timeText(quantile(times, 0.99)))
	line("last", "%s", timeText(r.Last))
	if p.ArriveOver > 0 {
		each := r.done(true)
		line("from its own start", "median %s, 99 %% %s, longest %s",
			timeText(quantile(each, 0.5)), timeText(quantile(each, 0.99)), timeText(each[len(each)-1]))
	}
	line("bound", "%s: %s is the limit", timeText(r.Bound), r.Limit)
	line("efficiency", "%.2f", r.Efficiency())
	line("a second supernode", "%s", r.second())
	b.WriteByte('\n')

	all := int64(p.Hosts) * p.Size
	wire := float64(p.registry()) / 8
	line("the registry sends", "%s, once", bytesText(p.Size))
	line("direct pulls", "%s, at least %s over the registry's link", bytesText(all), timeText(seconds(float64(all)/wire)))
	line("the supernode sends", "%s, %.2f copies", bytesText(r.SeedBytes), float64(r.SeedBytes)/float64(p.Size))
	line("it assigns", "%d transfers, %d in the busiest second", r.Assigned, r.Busiest)
	if p.Assignments == 0 && r.Busiest > capable {
		line("", "at %d a second that takes it %s: see --assignments", capable, timeText(seconds(float64(r.Assigned)/capable)))
	}
	for i := range p.Zones {
		if z := p.zone(i); z != "" && i < 8 {
			line("into zone "+z, "%s, %.2f copies", bytesText(r.Into[z]), float64(r.Into[z])/float64(p.Size))
		}
	}
	curve(&b, times)
	_, err := io.WriteString(w, b.String())
	return err
}

// second says what a second supernode changes.
func (r Report) second() string {
	was, now := r.Last.Seconds(), r.Second.Last.Seconds()
	if change := 100 * (was - now) / was; change >= 1 {
		return fmt.Sprintf("last after %s, %.0f %% sooner", timeText(r.Second.Last), change)
	}
	return fmt.Sprintf("brings nothing: last after %s", timeText(r.Second.Last))
}

// capable is how many transfers a second a supernode on a small machine assigns
// to real sessions at least.
const capable = 50_000

const (
	curveLines = 12
	curveWidth = 50
)

// curve writes how many hosts are done at which time, from the first to the last.
func curve(b *strings.Builder, times []time.Duration) {
	b.WriteString("\nhosts done\n")
	first, last := times[0], times[len(times)-1]
	for i := range curveLines {
		at := first + (last-first)*time.Duration(i)/(curveLines-1)
		n := countBy(times, at)
		fmt.Fprintf(b, "%10.3f s  %-*s %d\n", at.Seconds(), curveWidth, strings.Repeat("#", n*curveWidth/len(times)), n)
		if first == last {
			break
		}
	}
}

// countBy returns how many of the sorted times are not after at.
func countBy(times []time.Duration, at time.Duration) int {
	n, _ := slices.BinarySearch(times, at+1)
	return n
}

// SVG writes the curve of hosts done over time as a picture.
func (r Report) SVG(w io.Writer) error {
	const width, height, left, right, top, bottom = 720, 400, 70, 20, 40, 50
	times := r.done(false)
	span := max(r.Last, r.Bound)
	x := func(t time.Duration) float64 {
		return left + float64(t)/float64(span)*(width-left-right)
	}
	y := func(n int) float64 {
		return height - bottom - float64(n)/float64(len(times))*(height-top-bottom)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	fmt.Fprintf(&b, `<text x="%d" y="22" font-size="14">%d hosts, %s: efficiency %.2f</text>`+"\n", left, len(times), bytesText(r.Size), r.Efficiency())
	for i := range 5 {
		t, n := span*time.Duration(i)/4, len(times)*i/4
		fmt.Fprintf(&b, `<path d="M%d %.1fH%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%d</text>`+"\n", left, y(n), width-right, left-8, y(n)+4, n)
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", x(t), height-bottom+20, timeText(t))
	}
	fmt.Fprintf(&b, `<path d="M%.1f %dV%d" stroke="#c00" stroke-dasharray="4"/><text x="%.1f" y="%d" text-anchor="end" fill="#c00">bound</text>`+"\n",
		x(r.Bound), top, height-bottom, x(r.Bound)-6, top+12)
	fmt.Fprintf(&b, `<path fill="none" stroke="#06c" stroke-width="2" d="M%d %d`, left, height-bottom)
	const steps = 400
	for i := range steps + 1 {
		at := span * time.Duration(i) / steps
		fmt.Fprintf(&b, "L%.1f %.1f", x(at), y(countBy(times, at)))
	}
	fmt.Fprintf(&b, "\"/>\n"+`<text x="%d" y="%d" text-anchor="middle">hosts done, by time</text>`+"\n</svg>\n", (left+width-right)/2, height-8)
	_, err := io.WriteString(w, b.String())
	return err
}

func timeText(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%.0f ms", d.Seconds()*1e3)
	case d < 2*time.Minute:
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

func bytesText(n int64) string {
	const unit = 1 << 10
	f, i := float64(n), 0
	for ; f >= unit && i < 5; i++ {
		f /= unit
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}[i]
}

func rateText(bits int64) string {
	if bits == 0 {
		return "without bound"
	}
	f, i := float64(bits)/1e6, 0
	for ; f >= 1000 && i < 2; i++ {
		f /= 1000
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + []string{"Mbit/s", "Gbit/s", "Tbit/s"}[i]
}
