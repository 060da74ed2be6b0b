//go:build linux

package main

import (
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestShortRun takes a real supernode through all phases. How fast is not judged.
func TestShortRun(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "supernode")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-tags", "nomsgpack", "-o", bin, "../../cmd/supernode").CombinedOutput()
	require.NoError(t, err, string(out))
	c := config{bin: bin, pieces: 64, lanes: 4, overload: 4}
	c.shorten()
	rows, err := run(t.Context(), c, t.Output())
	require.NoError(t, err)
	figure := map[string]float64{}
	for _, r := range rows {
		figure[r.Name] = r.Figure
	}
	for _, p := range c.phases() {
		require.Positive(t, figure[p.name+": assignments"], p.name)
		require.Positive(t, figure[p.name+": report to assignment, p50"], p.name)
	}
	require.Positive(t, figure["overload: join to answer, p50"], "hosts finish a task and join the next")
	require.Positive(t, figure["supernode peak memory, 1000 sessions"])
}

func TestHistogramTellsQuantiles(t *testing.T) {
	var h histogram
	require.Zero(t, h.quantile(0.5))
	for i := range 100 {
		h.add(time.Duration(i+1) * time.Millisecond)
	}
	for _, q := range []float64{0.01, 0.5, 0.99, 1} {
		want := time.Duration(q*100) * time.Millisecond
		require.GreaterOrEqual(t, h.quantile(q), want)
		require.LessOrEqual(t, h.quantile(q), want+want/7)
	}
}
