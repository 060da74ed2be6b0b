package address

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestIsAHost(t *testing.T) {
	for s, want := range map[string]struct{ far, near bool }{
		"10.0.0.1":                 {true, true},
		"2001:db8::1":              {true, true},
		"::ffff:10.0.0.1":          {true, true},
		"127.0.0.1":                {false, true},
		"::1":                      {false, true},
		"::ffff:127.0.0.1":         {false, true},
		"64:ff9b::7f00:1":          {false, true},
		"0.0.0.0":                  {},
		"::":                       {},
		"169.254.1.1":              {},
		"169.254.169.254":          {},
		"::ffff:169.254.169.254":   {},
		"64:ff9b::169.254.169.254": {},
		"2002:a9fe:a9fe::1":        {},
		"fe80::1":                  {},
		"fe80::1%eth0":             {},
		"224.0.0.1":                {},
		"100.100.100.200":          {},
		"fd00:ec2::254":            {},
	} {
		a := netip.MustParseAddr(s)
		require.Equal(t, want.far, IsAHost(a, false), s)
		require.Equal(t, want.near, IsAHost(a, true), s)
	}
	require.False(t, IsAHost(netip.Addr{}, true))
}

func TestIsLoopback(t *testing.T) {
	for s, want := range map[string]bool{
		"127.0.0.1:1": true, "127.77.0.1:80": true, "[::1]:2": true, "[::ffff:127.0.0.1]:3": true,
		"10.0.0.1:1": false, "localhost:1": true, ":1": false, "localhost.example:1": false, "127.0.0.1": false, "@": false, "": false,
	} {
		require.Equal(t, want, IsLoopback(s), s)
	}
}
