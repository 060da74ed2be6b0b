package main

import (
	"bytes"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/supernode/api/identity"
)

func TestCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	run := func(c caConfig) string {
		var out bytes.Buffer
		require.NoError(t, c.run(&out, zaptest.NewLogger(t), dir))
		return out.String()
	}
	require.Error(t, (&caConfig{list: true}).run(&bytes.Buffer{}, zaptest.NewLogger(t), dir), "there is none")
	first, err := identity.ParseToken(run(caConfig{}))
	require.NoError(t, err)
	second, err := identity.ParseToken(run(caConfig{expires: time.Hour}))
	require.NoError(t, err)
	require.NotEqual(t, first.ID, second.ID)
	said := run(caConfig{list: true})
	require.Regexp(t, first.ID+`.*good until revoked\n`+second.ID+`.*good until 20`, said)
	require.Empty(t, run(caConfig{revoke: first.ID}))
	require.NotContains(t, run(caConfig{list: true}), first.ID)
	require.ErrorContains(t, (&caConfig{revoke: first.ID}).run(&bytes.Buffer{}, zaptest.NewLogger(t), dir), "--list shows them")
	require.Error(t, (&caConfig{list: true, revoke: "x"}).Validate())
	require.Error(t, (&caConfig{expires: -1}).Validate())
}
