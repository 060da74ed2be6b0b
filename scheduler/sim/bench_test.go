package sim

import (
	"fmt"
	"testing"
)

// BenchmarkCrowd simulates a flash crowd that wants 3 GiB over equal links; the
// largest takes minutes, and -short leaves it out.
func BenchmarkCrowd(b *testing.B) {
	for _, hosts := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprintf("hosts=%d", hosts), func(b *testing.B) {
			if testing.Short() && hosts > 1000 {
				b.Skip("takes minutes")
			}
			var r Result
			for b.Loop() {
				var err error
				if r, err = Run(b.Context(), Crowd(hosts, 3<<30, 1.25e8)); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(r.Efficiency(), "efficiency")
			b.ReportMetric(float64(r.Assigned)/b.Elapsed().Seconds()*float64(b.N), "transfers/s")
		})
	}
}
