package dfdaemon

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
)

// How a request of an engine ended.
const (
	resultOK      = "ok"
	resultRefused = "refused" // by the registry, or because no mirror can do it
	resultGone    = "gone"    // the engine hung up
	resultFailed  = "failed"  // neither the region nor the registry had it
)

const unknownKind = "unknown"

// metrics are those of the mirror.
type metrics struct {
	requests *prometheus.CounterVec
	direct   *prometheus.CounterVec
	first    *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer, store *pieces.Store) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_mirror_requests_total",
			Help: "Requests of engines, by what was asked and how it ended.",
		}, []string{"kind", "result"}),
		direct: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_mirror_direct_total",
			Help: "Requests but for blobs that went past the region to the registry.",
		}, []string{"kind"}),
		first: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "damselfly_first_byte_seconds",
			Help:    "Time from a request of an engine to the first byte of its answer.",
			Buckets: []float64{.005, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20},
		}, []string{"kind"}),
	}
	kinds := []string{unknownKind}
	for k := registryproxy.KindPing; k <= registryproxy.KindWrite; k++ {
		kinds = append(kinds, k.String())
	}
	for _, k := range kinds {
		for _, r := range []string{resultOK, resultRefused, resultGone, resultFailed} {
			m.requests.WithLabelValues(k, r)
		}
	}
	usage := func(name, help string, f func(pieces.Usage) int64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(f(store.Usage())) })
	}
	for _, c := range []prometheus.Collector{
		m.requests, m.direct, m.first,
		usage("damselfly_cache_bytes", "Bytes of content the store has room for set aside.",
			func(u pieces.Usage) int64 { return u.Reserved }),
		usage("damselfly_cache_limit_bytes", "Most bytes of content the store may keep, 0 for no bound.",
			func(u pieces.Usage) int64 { return u.Quota }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "damselfly_cache_evictions_total", Help: "Contents evicted to make room.",
		}, func() float64 { return float64(store.Usage().Evicted) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of the mirror: %w", err)
		}
	}
	return m, nil
}
