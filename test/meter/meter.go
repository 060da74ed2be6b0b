// Package meter reads in tests what a process counts.
package meter

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

// Value returns the sum of a counter or gauge over those of its series that have
// the label value, all with "". A metric that is not there fails the test.
func Value(t *testing.T, from prometheus.Gatherer, name, label string) (sum float64) {
	t.Helper()
	families, err := from.Gather()
	require.NoError(t, err)
	found := false
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		found = true
		for _, m := range f.GetMetric() {
			counts := label == ""
			for _, l := range m.GetLabel() {
				counts = counts || l.GetValue() == label
			}
			if counts {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	require.True(t, found, "there is no metric %s", name)
	return sum
}
