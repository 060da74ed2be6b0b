package identity

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestAnOpenJoinTokenIsToldOf(t *testing.T) {
	ca, err := CreateCA(filepath.Join(t.TempDir(), "ca"))
	require.NoError(t, err)
	token, err := ca.AddToken(time.Hour)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte(token.Text()), 0o600))
	for mode, told := range map[os.FileMode]int{0o600: 0, 0o640: 0, 0o644: 1, 0o660: 0, 0o606: 1} {
		require.NoError(t, os.Chmod(file, mode))
		core, logs := observer.New(zap.WarnLevel)
		_, err := FromToken(file, t.TempDir(), []string{"https://node:1"}, zap.New(core))
		require.NoError(t, err)
		require.Equal(t, told, logs.FilterMessageSnippet("join token").Len(), mode)
		for _, l := range logs.All() {
			require.NotContains(t, l.Message, token.Text())
		}
	}
}
