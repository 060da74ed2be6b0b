package dfdaemon

import (
	"fmt"
	"strings"

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

// Why a request went past the region.
const (
	causeNoSession = "no_session"
	causeClear     = "clear"  // it is private, and TLS is off
	causeFailed    = "failed" // the supernode does not answer
)

const unknownKind = "unknown"

// metrics are those of the mirror.
type metrics struct {
	requests *prometheus.CounterVec
	direct   *prometheus.CounterVec
	first    *prometheus.HistogramVec
	refused  prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, used func() pieces.Usage) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_mirror_requests_total",
			Help: "Requests of engines, by what was asked and how it ended.",
		}, []string{"kind", "result"}),
		direct: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_mirror_direct_total",
			Help: "Requests but for blobs that went past the region to the registry, by what was asked and why.",
		}, []string{"kind", "cause"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "damselfly_connections_refused_total",
			Help: "Connections closed at once: there were as many as may be.",
		}),
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
	usage := func(name, help string, value func(pieces.Usage) int64) prometheus.Collector {
		read := func() float64 { return float64(value(used())) }
		if strings.HasSuffix(name, "_total") {
			return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, read)
		}
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read)
	}
	for _, c := range []prometheus.Collector{
		m.requests, m.direct, m.first, m.refused,
		usage("damselfly_cache_bytes", "Bytes of content the store has room for set aside.",
			func(u pieces.Usage) int64 { return u.Reserved }),
		usage("damselfly_cache_limit_bytes", "Most bytes of content the store may keep, 0 for no bound.",
			func(u pieces.Usage) int64 { return u.Quota }),
		usage("damselfly_cache_evictions_total", "Contents evicted to make room.", func(u pieces.Usage) int64 { return int64(u.Evicted) }),
		usage("damselfly_cache_dropped_total", "Pieces dropped of contents too large for the room there is.",
			func(u pieces.Usage) int64 { return int64(u.Dropped) }),
		usage("damselfly_cache_full_total", "Writes for which the disk had no room.", func(u pieces.Usage) int64 { return int64(u.Full) }),
		usage("damselfly_cache_scrubbed_bytes_total", "Bytes of content looked at for rot in the background.", func(u pieces.Usage) int64 { return u.Scrubbed }),
		usage("damselfly_cache_rotten_total", "Pieces found wrong or unreadable on the disk.", func(u pieces.Usage) int64 { return int64(u.Rotten) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of the mirror: %w", err)
		}
	}
	return m, nil
}
