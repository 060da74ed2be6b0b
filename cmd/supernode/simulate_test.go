package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func simulate(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var o, e bytes.Buffer
	code = simulateCommand(&o, &e).Execute(t.Context(), args, &o, &e)
	return code, o.String(), e.String()
}

func TestSimulate(t *testing.T) {
	svg := filepath.Join(t.TempDir(), "curve.svg")
	args := []string{"--hosts", "5", "--size", "20MiB", "--host-link", "100Mbit", "--supernode-link", "1Gbit", "--svg", svg}
	code, stdout, stderr := simulate(t, args...)
	require.Zero(t, code, stderr)
	require.Empty(t, stderr)
	for _, says := range []string{
		"5, each 100 Mbit/s", "1 Gbit/s, registry 1 Gbit/s", "20 MiB in 160 pieces of 128 KiB",
		"the slowest host's download link is the limit", "100 MiB, at least 839 ms over the registry's link",
	} {
		require.Contains(t, stdout, says)
	}
	_, again, _ := simulate(t, args...)
	require.Equal(t, stdout, again)
	b, err := os.ReadFile(svg)
	require.NoError(t, err)
	require.Contains(t, string(b), "</svg>")
}

func TestSimulateRefuses(t *testing.T) {
	for _, c := range []struct {
		code int
		says string
		args []string
	}{
		{2, "--hosts 0: want 1 to", []string{"--hosts", "0"}},
		{2, "want bytes, or a whole number", []string{"--size", "3G"}},
		{2, "want a whole number and Kbit", []string{"--host-link", "10"}},
		{2, "want a whole number and Kbit", []string{"--supernode-link", "10GiB"}},
		{2, "say how many there are with --zones", []string{"--zone-link", "1Gbit"}},
		{2, "unknown command", []string{"10000"}},
		{1, "name another file with --svg", []string{"--svg", "/nowhere/curve.svg"}},
	} {
		code, stdout, stderr := simulate(t, c.args...)
		require.Equal(t, c.code, code)
		require.Empty(t, stdout)
		require.Contains(t, stderr, c.says)
	}
}
