package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"damselfly.dev/supernode/api"
)

// counts are those of dfdaemon's metrics that tell where bytes come from.
type counts struct {
	session, sealed             bool
	direct, received, fallbacks map[string]int64 // by what is asked, source, cause
}

// metrics reads them.
func (c *check) metrics(ctx context.Context) (*counts, error) {
	if c.Metrics == "" {
		return nil, errors.New("no address of them is given")
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.Metrics+"/metrics", http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := c.send(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", c.Metrics, resp.Status)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(io.LimitReader(resp.Body, maxMetrics))
	if err != nil {
		return nil, err
	}
	if families["damselfly_session_up"] == nil {
		return nil, fmt.Errorf("what %s tells is not dfdaemon's", c.Metrics)
	}
	by := func(name string) map[string]int64 {
		m := map[string]int64{}
		for _, v := range families[name].GetMetric() {
			for _, l := range v.GetLabel() {
				m[l.GetValue()] += int64(v.GetCounter().GetValue())
			}
		}
		return m
	}
	sealed := families["damselfly_session_sealed"]
	return &counts{
		sealed:  sealed == nil || sealed.GetMetric()[0].GetGauge().GetValue() == 1,
		session: families["damselfly_session_up"].GetMetric()[0].GetGauge().GetValue() == 1,
		direct:  by("damselfly_mirror_direct_total"), received: by("damselfly_received_bytes_total"), fallbacks: by("damselfly_fallbacks_total"),
	}, nil
}

// since are the counts that have grown, and by how much.
func since(before, after map[string]int64) map[string]int64 {
	grown := map[string]int64{}
	for k, n := range after {
		if n > before[k] {
			grown[k] = n - before[k]
		}
	}
	return grown
}

// causes say what to do about a stream that turned to the registry.
var causes = map[string]string{
	"no_session":   "no session with a supernode stood",
	"no_answer":    "the supernode did not answer in time: is it overloaded?",
	"refused":      "the supernode has no way to serve it: its log tells, and its --registry must be dfdaemon's",
	"session_lost": "the session with the supernode broke off",
	"silent":       "nothing came from the swarm: do --advertise and the network let hosts reach each other?",
	"late":         "what was waited for did not come from the swarm",
	"clear":        "it is private, and TLS is off: see docs/security.md",
	"store":        "the store could not hold it: is the disk full, or --quota small?",
}

// judge says where an answer has come from, by what dfdaemon counts.
func (c *check) judge(ctx context.Context, before *counts, resp *http.Response, s *Step) {
	if stale := resp.Header.Get(api.StaleHeader); stale != "" {
		s.Why = "the registry cannot be reached; this is what was known last"
	}
	after, err := c.metrics(ctx)
	if err != nil || before == nil {
		s.end(Past, s.Says, "from where is not known: "+fmt.Sprint(err))
		return
	}
	s.Sources = since(before.received, after.received)
	if direct := since(before.direct, after.direct); len(direct) > 0 {
		s.end(Past, s.Says, "it went to the registry: "+after.reason(direct))
	}
	for _, cause := range slices.Sorted(maps.Keys(since(before.fallbacks, after.fallbacks))) {
		s.end(Past, s.Says, "it went to the registry: "+strings.TrimSpace(causes[cause]+" ("+cause+")"))
	}
	if s.Outcome == Swarm && s.Sources["origin"] > 0 {
		s.end(Past, s.Says, "it came from the registry")
	}
}

// reason says why the supernode was not asked.
func (c *counts) reason(direct map[string]int64) string {
	if direct["clear"] > 0 {
		return causes["clear"]
	}
	if !c.session {
		return "no session with a supernode stands"
	}
	return "the supernode gave no answer: its log tells why, or dfdaemon's; its --registry must be dfdaemon's"
}
