package cli

import (
	"context"
	"os"
	"runtime"
	"syscall"
	"time"
)

const (
	lookOften  = 100 * time.Millisecond // while there is work: 0.2 % of a processor, at 0.2 ms a look
	lookSeldom = time.Second
	fullShare  = 0.7 // of a processor in use, above which one more is good
)

// followLoad keeps GOMAXPROCS at what the work takes, from 1 up to what it was,
// until ctx ends; cpuTime tells what it has taken. With more than that every message wakes threads that look for
// work and find none, which takes a sixth of what a host's pull costs in all.
// Where GOMAXPROCS is set by its variable it stays.
func followLoad(ctx context.Context, cpuTime func() time.Duration) {
	if os.Getenv("GOMAXPROCS") != "" {
		return
	}
	procs, most := 1, runtime.GOMAXPROCS(1)
	defer runtime.GOMAXPROCS(most)
	used, at := cpuTime(), time.Now()
	timer := time.NewTimer(lookOften)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		nowUsed, now := cpuTime(), time.Now()
		busy := (nowUsed - used).Seconds() / now.Sub(at).Seconds()
		used, at = nowUsed, now
		if n := procsFor(busy, procs, most); n != procs {
			procs = n
			runtime.GOMAXPROCS(procs)
		}
		if busy > fullShare/4 {
			timer.Reset(lookOften)
		} else {
			timer.Reset(lookSeldom)
		}
	}
}

// procsFor returns how many processors are good for work that has kept so many
// busy while it had procs, at most the most.
func procsFor(busy float64, procs, most int) int {
	switch {
	case busy > fullShare*float64(procs):
		return min(2*procs, most)
	case busy < fullShare*float64(procs)/4:
		return max(procs/2, 1)
	}
	return procs
}

// cpuTime is the processor time that this process has used.
func cpuTime() time.Duration {
	var r syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &r) != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
