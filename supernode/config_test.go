package supernode

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestConfigIsRefused(t *testing.T) {
	require.NoError(t, Default().Validate())
	for says, change := range map[string]func(*Config){
		"listen":     func(c *Config) { c.Listen = "8002" },
		"advertised": func(c *Config) { c.Advertise = "http://10.0.0.1:80" },
		"data":       func(c *Config) { c.DataDir = "" },
		"quota":      func(c *Config) { c.Quota = -1 },
		"keep-free":  func(c *Config) { c.KeepFree = -1 },
		"scrub-rate": func(c *Config) { c.ScrubRate = -1 },
		"lanes":      func(c *Config) { c.UpLanes = 257 },
		"at most 0":  func(c *Config) { c.MaxHosts = 0 },
	} {
		c := Default()
		change(&c)
		require.ErrorContains(t, c.Validate(), says)
	}
}
