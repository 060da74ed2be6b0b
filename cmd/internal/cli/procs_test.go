package cli

import (
	"context"
	"os"
	"runtime"
	"testing"
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
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); followLoad(ctx) }()
	assert.Eventually(t, func() bool { return runtime.GOMAXPROCS(0) == 1 }, 10*time.Second, time.Millisecond)
	for range most {
		go func() {
			for ctx.Err() == nil {
			}
		}()
	}
	assert.Eventually(t, func() bool { return runtime.GOMAXPROCS(0) > 1 }, time.Minute, 10*time.Millisecond)
	cancel()
	<-ended
	assert.Equal(t, most, runtime.GOMAXPROCS(0))
}
