//go:build linux

package main

import (
	"fmt"
	"os"
	"strings"
)

// bar is a way to bring 64 MiB to hosts at once, and its least and greatest
// efficiency.
type bar struct {
	name        string
	least, most float64
	ours        bool
}

// draw writes the efficiency of this run's flash crowds, beside direct pulls,
// into a file.
func (e *env) draw(file string) error {
	if file == "" {
		return nil
	}
	ours, direct := bar{name: "Damselfly, cold", ours: true}, bar{name: "every host from the registry"}
	for _, r := range e.rows {
		switch {
		case r.Scenario != "flash":
		case strings.HasSuffix(r.Name, ": efficiency"):
			ours.add(r.Figure)
		case strings.HasSuffix(r.Name, ": efficiency, direct"):
			direct.add(r.Figure)
		}
	}
	if ours.most == 0 || direct.most == 0 {
		return fmt.Errorf("draw %s: no flash crowd was measured", file)
	}
	return os.WriteFile(file, []byte(chart([]bar{ours, direct})), 0o644)
}

func (b *bar) add(efficiency float64) {
	if b.most == 0 || efficiency < b.least {
		b.least = efficiency
	}
	b.most = max(b.most, efficiency)
}

// chart draws bars from 0 to 1: full up to the least, light from there to the most.
func chart(bars []bar) string {
	const left, width, line, top = 300, 360, 26, 44
	var b strings.Builder
	height := top + line*len(bars) + 30
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %[1]d %[2]d" width="%[1]d" height="%[2]d" font-family="sans-serif" font-size="13">
<rect width="%[1]d" height="%[2]d" fill="#fff"/>
<text x="12" y="22" font-weight="bold" fill="#222">Efficiency, 64 MiB to 8 and more hosts at once: the bound over the last host's time</text>
`, left+width+90, height)
	for tick := range 5 {
		x := left + width*tick/4
		fmt.Fprintf(&b, `<path d="M%[1]d %[2]dV%[3]d" stroke="#ddd"/><text x="%[1]d" y="%[4]d" text-anchor="middle" font-size="11" fill="#666">%.2[5]f</text>`+"\n",
			x, top-6, height-26, height-10, float64(tick)/4)
	}
	for i, v := range bars {
		y, full, light := top+line*i, "#8a94a6", "#d0d4dc"
		if v.ours {
			full, light = "#0b7a75", "#9dcac8"
		}
		text := fmt.Sprintf("%.2f to %.2f", v.least, v.most)
		if v.most-v.least < 0.005 {
			text = fmt.Sprintf("%.2f", v.most)
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end" fill="#222">%s</text>`, left-10, y+14, v.name)
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.0f" height="18" fill="%s"/>`, left, y, width*v.most, light)
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.0f" height="18" fill="%s"/>`, left, y, width*v.least, full)
		fmt.Fprintf(&b, `<text x="%.0f" y="%d" fill="#222">%s</text>`+"\n", left+width*v.most+6, y+14, text)
	}
	b.WriteString("</svg>\n")
	return b.String()
}
