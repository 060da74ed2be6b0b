package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/cmd/internal/cli"
)

func TestToken(t *testing.T) {
	var out bytes.Buffer
	require.Equal(t, cli.ExitOK, tokenCommand(&out).Execute(t.Context(), []string{"ops", "--role", "admin"}, io.Discard, io.Discard))
	words := strings.Fields(out.String())
	token := words[3]
	require.True(t, strings.HasPrefix(token, "dmf_"), out.String())
	require.Equal(t, []string{"ops", "admin", fmt.Sprintf("%x", sha256.Sum256([]byte(token)))}, words[len(words)-3:])

	first := out.String()
	out.Reset()
	require.Equal(t, cli.ExitOK, tokenCommand(&out).Execute(t.Context(), []string{"ops"}, io.Discard, io.Discard))
	require.NotEqual(t, first, out.String())
	require.Contains(t, out.String(), "ops read ")
	for _, wrong := range [][]string{{}, {"a b"}, {"a", "--role", "root"}} {
		require.Equal(t, cli.ExitUsage, tokenCommand(io.Discard).Execute(t.Context(), wrong, io.Discard, io.Discard), wrong)
	}
}
