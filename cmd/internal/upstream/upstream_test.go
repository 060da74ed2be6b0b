package upstream

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/registryproxy"
)

type settings struct{ registryproxy.Config }

func (s *settings) Flags(fs *pflag.FlagSet) { Flags(fs, &s.Config) }

func load(t *testing.T, args ...string) (int, registryproxy.Config) {
	t.Helper()
	s := &settings{registryproxy.Config{Default: "docker.io"}}
	code := cli.Command{
		Use: "tool", Config: s, Run: func(context.Context, *zap.Logger, []string) error { return nil },
	}.Execute(t.Context(), args, io.Discard, io.Discard)
	return code, s.Config
}

func TestFlags(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tool.yaml")
	require.NoError(t, os.WriteFile(file, []byte("default-registry: ''\nregistry: ['a.test=http://a', 'b.test:5000=https://b/c=d']\n"), 0o600))
	want := registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: "a.test", URL: "http://a"}, {Name: "b.test:5000", URL: "https://b/c=d"}}}

	code, got := load(t, "--config", file)
	require.Zero(t, code)
	require.Equal(t, want, got)

	want.Default = "docker.io"
	code, got = load(t, "--registry", "a.test=http://a", "--registry", "b.test:5000=https://b/c=d")
	require.Zero(t, code)
	require.Equal(t, want, got)

	t.Setenv("TOOL_REGISTRY", "a.test=http://a,b.test:5000=https://b/c=d")
	code, got = load(t)
	require.Zero(t, code)
	require.Equal(t, want, got)

	for _, wrong := range []string{"", "a.test", "=http://a", "a.test=", "a.test=http://a,a.test=http://b", "a.test=ftp://a"} {
		code, _ = load(t, "--registry", wrong)
		require.Equal(t, cli.ExitUsage, code, wrong)
	}
}
