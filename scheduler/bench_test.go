package scheduler

import (
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
)

// BenchmarkDecisions measures one report of a piece and what is decided for it,
// in a swarm where everything told is done in order, at once. A second is one of
// processor time: a core of its own, whatever else the machine does.
func BenchmarkDecisions(b *testing.B) {
	for _, hosts := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprintf("hosts=%d", hosts), func(b *testing.B) { benchmarkDecisions(b, hosts, 768) })
	}
}

func benchmarkDecisions(b *testing.B, hosts, n int) {
	b.Helper()
	b.ReportAllocs()
	now := time.Now() // of the monotonic clock, as the supernode's
	var s *Scheduler
	var queue []Decision
	start := func() {
		s = New(DefaultConfig(), rand.New(rand.NewPCG(1, 1)))
		l := pieces.Layout{Length: int64(n) * pieces.MinPieceSize, PieceSize: pieces.MinPieceSize}
		s.TaskAdd(now, 1, l)
		s.HostUp(now, 0, Host{Up: 4, Seed: true})
		s.Join(now, 0, 1, pieces.FullSet(n))
		for i := range hosts {
			s.HostUp(now, HostID(i+1), Host{Up: 2, Down: 2})
			s.Join(now, HostID(i+1), 1, pieces.NewSet(n))
		}
		queue = append(queue[:0], s.Decisions()...)
	}
	decided, ended := 0, 0
	start()
	began := cpuTime(b)
	b.ResetTimer()
	for range b.N {
		if ended == len(queue) {
			b.StopTimer()
			stopped := cpuTime(b)
			start()
			ended = 0
			began += cpuTime(b) - stopped
			b.StartTimer()
		}
		d := queue[ended]
		ended++
		now = now.Add(time.Microsecond)
		for i := range d.Count {
			s.Done(now, d.Host, d.Transfer, d.First+i, 0)
		}
		told := s.Decisions()
		decided += len(told)
		queue = append(queue, told...)
		if ended > 1<<16 {
			queue = append(queue[:0], queue[ended:]...)
			ended = 0
		}
	}
	b.ReportMetric(float64(decided)/(cpuTime(b)-began).Seconds(), "decisions/s")
}

// cpuTime is the processor time that this process has used.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
