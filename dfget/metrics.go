package dfget

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"damselfly.dev/supernode/api"
)

// Sources of bytes.
const (
	sourcePeer      = "peer"
	sourceSupernode = "supernode"
	sourceOrigin    = "origin" // straight, for want of the region
	sourceStore     = "store"  // complete before it was asked for
)

// Results of transfers.
const (
	resultOK        = "ok"
	resultCancelled = "cancelled"
)

// resultOf returns the label of a failure.
func resultOf(why api.Failure) string {
	switch why {
	case api.Busy:
		return "busy"
	case api.Gone:
		return "gone"
	case api.Corrupt:
		return "corrupt"
	}
	return "local"
}

// Causes of turning to the origin.
const (
	causeNoSession   = "no_session"   // none stood when the content was asked for
	causeNoAnswer    = "no_answer"    // to the Join
	causeRefused     = "refused"      // the region has no way to serve it
	causeSessionLost = "session_lost" // and nothing was on its way
	causeSilent      = "silent"       // nothing of the task moved
	causeLate        = "late"         // things moved, but not what was waited for
	causeClear       = "clear"        // it is private, and TLS is off
	causeStore       = "store"        // the content was dropped or the disk fails
)

type metrics struct {
	received, transfers, fallbacks *prometheus.CounterVec
	sent, verifyFailures           prometheus.Counter
	session, sealed                prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Name: "damselfly_" + name, Help: help}
	}
	m := &metrics{
		received: prometheus.NewCounterVec(counter("received_bytes_total",
			"Bytes of content received, by source; store is what was there before it was asked for."), []string{"source"}),
		transfers: prometheus.NewCounterVec(counter("transfers_total",
			"Transfers that have ended, by result."), []string{"result"}),
		fallbacks: prometheus.NewCounterVec(counter("fallbacks_total",
			"Streams that turned to the origin, by cause."), []string{"cause"}),
		sent:           prometheus.NewCounter(counter("sent_bytes_total", "Bytes of content sent to other peers.")),
		verifyFailures: prometheus.NewCounter(counter("verify_failures_total", "Pieces received that were not what they should be.")),
		session:        prometheus.NewGauge(prometheus.GaugeOpts{Name: "damselfly_session_up", Help: "1 while a session with a supernode stands."}),
	}
	m.sealed = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "damselfly_session_sealed", Help: "1 while nobody can listen to the session: TLS is on, or it stays on the host.",
	})
	for _, s := range []string{sourcePeer, sourceSupernode, sourceOrigin, sourceStore} {
		m.received.WithLabelValues(s)
	}
	m.transfers.WithLabelValues(resultOK)
	m.transfers.WithLabelValues(resultCancelled)
	for why := api.Busy; why <= api.Local; why++ {
		m.transfers.WithLabelValues(resultOf(why))
	}
	for _, c := range []string{causeNoSession, causeNoAnswer, causeRefused, causeSessionLost, causeSilent, causeLate, causeClear, causeStore} {
		m.fallbacks.WithLabelValues(c)
	}
	for _, c := range []prometheus.Collector{m.received, m.transfers, m.fallbacks, m.sent, m.verifyFailures, m.session, m.sealed} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("metrics of the peer: %w", err)
		}
	}
	return m, nil
}
