package cli

import (
	"context"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestProcsFor(t *testing.T) {
	for _, c := range []struct {
		busy        float64
		procs, most int
		want        int
	}{
		{0, 1, 64, 1},
		{0.5, 1, 64, 1},
		{0.8, 1, 64, 2},
		{1.5, 2, 64, 4},
		{2.9, 4, 64, 8},
		{60, 64, 64, 64},
		{0.8, 1, 1, 1},
		{2.5, 3, 3, 3},
		{1.9, 2, 3, 3}, // no more than there are
		{0.6, 4, 64, 2},
		{0.8, 4, 64, 4},
		{0.1, 3, 3, 1},
		{0, 64, 64, 32}, // one step back at a time
	} {
		assert.Equal(t, c.want, procsFor(c.busy, c.procs, c.most), "%.1f busy of %d", c.busy, c.procs)
	}
}

func TestProcessorsFollowTheLoad(t *testing.T) {
	most := runtime.GOMAXPROCS(0)
	if most == 1 {
		if os.Getenv("CI") == "true" {
			t.Fatal("CI must have two processors")
		}
		t.Skip("one processor: there is nothing to follow")
	}
	t.Setenv("GOMAXPROCS", "")
	synctest.Test(t, func(t *testing.T) {
		var busy atomic.Int64 // processors
		var used time.Duration
		last := time.Now()
		cpu := func() time.Duration {
			used += time.Duration(busy.Load()) * time.Since(last)
			last = time.Now()
			return used
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); followLoad(ctx, cpu) }()
		for _, c := range []struct{ busy, want int }{{0, 1}, {most, most}, {0, 1}} {
			busy.Store(int64(c.busy))
			<-time.After(time.Minute)
			assert.Equal(t, c.want, runtime.GOMAXPROCS(0), "%d busy", c.busy)
		}
		cancel()
		<-ended
		assert.Equal(t, most, runtime.GOMAXPROCS(0))
	})
}

func TestCPUTimeGrows(t *testing.T) {
	began := cpuTime()
	assert.Positive(t, began)
	for cpuTime() == began {
	}
}
