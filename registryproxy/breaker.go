package registryproxy

import (
	"errors"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sony/gobreaker/v2"
	"go.uber.org/zap"
)

// After so many failures in a row a host counts as down, and is not asked for a
// while; then one request finds out whether it is back. A mirror is given up
// sooner and for longer: there is the registry behind it.
const (
	registryFailures = 5
	registryPause    = 2 * time.Second
	mirrorFailures   = 3
	mirrorPause      = 30 * time.Second
)

var errDown = errors.New("it is down, by the requests of the last seconds, and is asked again in a moment")

// elsewhere is a failure at a host that a registry has redirected to.
type elsewhere struct{ error }

func (e elsewhere) Unwrap() error { return e.error }

func newBreaker(failures uint32, pause time.Duration) *gobreaker.CircuitBreaker[*answer] {
	return gobreaker.NewCircuitBreaker[*answer](gobreaker.Settings{
		Timeout:      pause,
		ReadyToTrip:  func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= failures },
		IsSuccessful: func(err error) bool { return !isDown(err) },
		IsExcluded:   func(err error) bool { return err != nil && !isDown(err) && !answered(err) },
	})
}

// tell logs when a host goes down, for what, and when it is back: each once.
func (e *endpoint) tell(log *zap.Logger, registry string, err error) {
	names := []zap.Field{zap.String("registry", registry), zap.String("host", e.name)}
	switch {
	case isDown(err):
		if e.breaker.State() == gobreaker.StateOpen && e.down.CompareAndSwap(false, true) {
			log.Warn("host is down, it is asked again in a moment", append(names, zap.Error(err))...)
		}
	case err == nil || answered(err):
		if e.breaker.State() == gobreaker.StateClosed && e.down.CompareAndSwap(true, false) {
			log.Info("host answers again", names...)
		}
	}
}

// isDown tells a host that is down from one that answers, whatever it says.
func isDown(err error) bool {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return !r.redirected && !r.Limited() &&
			(r.Status == http.StatusBadGateway || r.Status == http.StatusServiceUnavailable || r.Status == http.StatusGatewayTimeout)
	}
	_, others := errors.AsType[elsewhere](err)
	e, ok := errors.AsType[*UpstreamError](err)
	return ok && e.Temporary && !others
}

// answered tells whether err is a host's answer.
func answered(err error) bool {
	_, ok := errors.AsType[*Refusal](err)
	_, others := errors.AsType[elsewhere](err)
	return ok || others
}

var breakerStates = []gobreaker.State{gobreaker.StateClosed, gobreaker.StateHalfOpen, gobreaker.StateOpen}

var breakersDesc = prometheus.NewDesc("damselfly_upstream_endpoints",
	"Registries and their mirrors by the state of their circuit breaker: an open one is not asked. "+
		`Registries that the configuration does not name are together "(other)".`,
	[]string{"registry", "state"}, nil)

// Describe is prometheus.Collector's.
func (s *upstreams) Describe(ch chan<- *prometheus.Desc) { ch <- breakersDesc }

// Collect counts the endpoints by registry and state.
func (s *upstreams) Collect(ch chan<- prometheus.Metric) {
	send := func(registry string, of ...*upstream) {
		n := map[gobreaker.State]int{}
		for _, u := range of {
			for _, e := range u.endpoints {
				n[e.breaker.State()]++
			}
		}
		for _, state := range breakerStates {
			ch <- prometheus.MustNewConstMetric(breakersDesc, prometheus.GaugeValue, float64(n[state]), registry, state.String())
		}
	}
	for name, u := range s.named {
		send(name, u)
	}
	s.mu.Lock()
	others := make([]*upstream, 0, len(s.unnamed))
	for _, u := range s.unnamed {
		others = append(others, u)
	}
	s.mu.Unlock()
	send("(other)", others...) // no registry can have that name
}
