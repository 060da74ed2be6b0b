package supernode

import (
	"fmt"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"damselfly.dev/pieces"
)

// The results of a transfer.
const (
	resultOK        = "ok"
	resultBusy      = "busy"
	resultGone      = "gone"
	resultCorrupt   = "corrupt"
	resultLocal     = "local"
	resultCancelled = "cancelled"
)

type metrics struct {
	originBytes    prometheus.Counter
	uniqueBytes    prometheus.Counter
	sentBytes      prometheus.Counter
	crossingBytes  prometheus.Counter
	fetches        prometheus.Gauge
	hosts, tasks   prometheus.Gauge
	transfers      map[string]prometheus.Counter // by result
	verifyFailures prometheus.Counter
	staleTags      prometheus.Counter
	refused        prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, store *pieces.Store) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m := &metrics{
		originBytes:    counter("damselfly_origin_bytes_total", "Bytes of manifests and blobs read from origins."),
		uniqueBytes:    counter("damselfly_unique_bytes_total", "Bytes of contents that were brought from an origin, each content once."),
		sentBytes:      counter("damselfly_sent_bytes_total", "Bytes of content sent to hosts and clients."),
		crossingBytes:  counter("damselfly_zone_crossing_bytes_total", "Bytes of pieces that hosts got from outside of their zone."),
		fetches:        gauge("damselfly_origin_fetches_in_flight", "Fetches from origins under way."),
		hosts:          gauge("damselfly_hosts", "Hosts with a session."),
		tasks:          gauge("damselfly_tasks", "Tasks being distributed."),
		verifyFailures: counter("damselfly_verify_failures_total", "Pieces and contents whose bytes were found wrong."),
		staleTags:      counter("damselfly_stale_answers_total", "Manifests served as last known, with the registry out of reach."),
		refused:        counter("damselfly_connections_refused_total", "Connections closed at once: there were as many as may be."),
		transfers:      map[string]prometheus.Counter{},
	}
	transfers := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "damselfly_transfers_total",
		Help: "Transfers assigned that have ended, by how.",
	}, []string{"result"})
	for _, r := range []string{resultOK, resultBusy, resultGone, resultCorrupt, resultLocal, resultCancelled} {
		m.transfers[r] = transfers.WithLabelValues(r)
	}
	usage := func(name, help string, value func(pieces.Usage) int64) prometheus.Collector {
		read := func() float64 { return float64(value(store.Usage())) }
		if strings.HasSuffix(name, "_total") {
			return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, read)
		}
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read)
	}
	for _, c := range []prometheus.Collector{
		m.originBytes, m.uniqueBytes, m.sentBytes, m.crossingBytes, m.fetches, m.hosts, m.tasks, transfers, m.verifyFailures, m.staleTags, m.refused,
		usage("damselfly_cache_bytes", "Bytes of the contents kept, and of what is being written.", func(u pieces.Usage) int64 { return u.Reserved }),
		usage("damselfly_cache_limit_bytes", "Most bytes of content kept, 0 for no bound.", func(u pieces.Usage) int64 { return u.Quota }),
		usage("damselfly_cache_evictions_total", "Contents evicted to make room.", func(u pieces.Usage) int64 { return int64(u.Evicted) }),
		usage("damselfly_cache_full_total", "Writes for which the disk had no room.", func(u pieces.Usage) int64 { return int64(u.Full) }),
		usage("damselfly_cache_scrubbed_bytes_total", "Bytes of content looked at for rot in the background.", func(u pieces.Usage) int64 { return u.Scrubbed }),
		usage("damselfly_cache_rotten_total", "Pieces found wrong or unreadable on the disk.", func(u pieces.Usage) int64 { return int64(u.Rotten) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of the supernode: %w", err)
		}
	}
	return m, nil
}
