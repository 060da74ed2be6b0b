package dfdaemon

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestConfig(t *testing.T) {
	require.NoError(t, Default().Validate())
	for says, change := range map[string]func(*Config){
		"supernode number 2":         func(c *Config) { c.Supernodes = []string{"http://a:1", "10.0.0.1:8002"} },
		"without path or credential": func(c *Config) { c.Supernodes = []string{"http://user:secret@a:1"} },
		"advertise":                  func(c *Config) { c.Advertise = "10.0.0.5:port" },
		"data-dir":                   func(c *Config) { c.DataDir = "" },
		"mirror-listen is empty":     func(c *Config) { c.MirrorListen = "" },
		`peer-listen "65002"`:        func(c *Config) { c.PeerListen = "65002" },
		"quota":                      func(c *Config) { c.Quota = -1 },
		"keep-free -1":               func(c *Config) { c.KeepFree = -1 },
		"scrub-rate -1":              func(c *Config) { c.ScrubRate = -1 },
		"up-lanes 0":                 func(c *Config) { c.UpLanes = 0 },
		"down-lanes 257":             func(c *Config) { c.DownLanes = 257 },
		"zone":                       func(c *Config) { c.Zone = string(make([]byte, 65)) },
		"default registry":           func(c *Config) { c.Registries.Default = "a/b" },
	} {
		c := Default()
		change(&c)
		err := c.Validate()
		require.ErrorContains(t, err, says)
		require.NotContains(t, err.Error(), "secret")
	}
}

func TestAdvertised(t *testing.T) {
	for advertise, want := range map[string]string{
		"":                ":65002",
		"10.0.0.5":        "10.0.0.5:65002",
		"10.0.0.5:9":      "10.0.0.5:9",
		"host.corp":       "host.corp:65002",
		"host.corp:9":     "host.corp:9",
		"fd00::1":         "[fd00::1]:65002",
		"[fd00::1]:9":     "[fd00::1]:9",
		"fd00::1%eth0":    "",
		"10.0.0.5/24":     "",
		"two words":       "",
		"http://10.0.0.5": "",
		"10.0.0.5:":       "",
		":9":              "",
	} {
		got, err := Config{Advertise: advertise}.advertised("0.0.0.0:65002")
		if want == "" {
			require.ErrorContains(t, err, "want a host, or host:port", advertise)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
}
