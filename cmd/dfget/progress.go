package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"

	"damselfly.dev/dfget"
)

// progress shows how far a download is: as a bar on a terminal, else in one line
// at its end.
type progress struct {
	w        io.Writer
	began    time.Time
	daemon   bool // where bytes came from is the daemon's to know
	terminal bool
	bar      *progressbar.ProgressBar
	shown    time.Time
	done     int64
	from     dfget.Stats
}

// update is the Download's Progress.
func (p *progress) update(done, size int64, from dfget.Stats) {
	p.done, p.from = done, from
	if !p.terminal {
		return
	}
	if p.bar == nil || p.bar.GetMax64() != size { // another source may say another size
		p.bar = progressbar.NewOptions64(size, progressbar.OptionSetWriter(p.w), progressbar.OptionShowBytes(true),
			progressbar.OptionUseIECUnits(true), progressbar.OptionFullWidth(), progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionSetSpinnerChangeInterval(0)) // or it draws on its own, and never ends
	}
	if now := time.Now(); now.Sub(p.shown) > time.Second {
		p.shown = now
		p.bar.Describe(p.shares())
	}
	_ = p.bar.Set64(done) // a terminal that is gone
}

// finish ends the bar, and sums up.
func (p *progress) finish(name string, err error) {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
	if err != nil {
		return
	}
	took := time.Since(p.began)
	_, _ = fmt.Fprintf(p.w, "%s: %s in %.1f s, %s/s, %s\n", name, size(p.done), took.Seconds(),
		size(int64(float64(p.done)/max(took.Seconds(), 0.001))), p.shares())
}

// shares tells where the bytes came from.
func (p *progress) shares() string {
	f := p.from
	total := f.Peer + f.Supernode + f.Origin + f.Store
	if p.daemon && total == 0 {
		return "through dfdaemon"
	}
	var parts []string
	for _, s := range []struct {
		name string
		n    int64
	}{{"peers", f.Peer}, {"supernode", f.Supernode}, {"origin", f.Origin}, {"what was here", f.Store}} {
		if s.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %% %s", (100*s.n+total/2)/total, s.name))
		}
	}
	return strings.Join(parts, ", ")
}

func size(n int64) string {
	f, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for f >= 1024 && len(units) > 1 {
		f, units = f/1024, units[1:]
	}
	return fmt.Sprintf("%.1f %s", f, units[0])
}
