package upstream

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/registryproxy"
)

const all = `
registries:
  - name: docker.io
    url: https://registry.corp:5000/hub
    ca: /etc/ca.pem
    client-cert: /etc/cert.pem
    client-key: /etc/key.pem
    connect-timeout: 1s
    header-timeout: 20s
    retries: 0
    readers: region
    readers-when-away: 30m
    credentials:
      username: robot
      password-file: /etc/password
    mirrors:
      - url: http://[fd00::1]:5000
        caller-credentials: true
      - url: https://mirror.corp
        ca: /etc/other.pem
        credentials: {helper: ecr-login}
  - name: "[fd00::2]:5000"
    readers: region
    credentials: {docker-config: /root/.docker/config.json}
registry: [a.test=http://a]
`

func parsed() []registryproxy.Upstream {
	return []registryproxy.Upstream{{
		Name: "docker.io", URL: "https://registry.corp:5000/hub",
		TLS:            registryproxy.TLS{CA: "/etc/ca.pem", ClientCert: "/etc/cert.pem", ClientKey: "/etc/key.pem"},
		ConnectTimeout: time.Second, HeaderTimeout: 20 * time.Second, Retries: new(int),
		Readers: registryproxy.ReadersRegion, ReadersWhenAway: 30 * time.Minute,
		Credentials: registryproxy.Credentials{Username: "robot", PasswordFile: "/etc/password"},
		Mirrors: []registryproxy.Mirror{
			{URL: "http://[fd00::1]:5000", CallerCredentials: true},
			{URL: "https://mirror.corp", TLS: registryproxy.TLS{CA: "/etc/other.pem"}, Credentials: registryproxy.Credentials{Helper: "ecr-login"}},
		},
	}, {
		Name: "[fd00::2]:5000", Readers: registryproxy.ReadersRegion,
		Credentials: registryproxy.Credentials{DockerConfig: "/root/.docker/config.json"},
	}, {Name: "a.test", URL: "http://a"}}
}

func TestRegistries(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tool.yaml")
	require.NoError(t, os.WriteFile(file, []byte(all), 0o600))
	code, got := load(t, "--config", file)
	require.Zero(t, code)
	require.Equal(t, parsed(), got.Upstreams)

	list, _, _ := strings.Cut(strings.TrimPrefix(all, "\nregistries:\n"), "registry:")
	t.Setenv("TOOL_REGISTRIES", list)
	code, got = load(t)
	require.Zero(t, code)
	require.Equal(t, parsed()[:2], got.Upstreams)

	code, got = load(t, "--registries", "[{name: b.test}]", "--registry", "a.test=http://a", "--config", file)
	require.Zero(t, code)
	require.Equal(t, []registryproxy.Upstream{{Name: "b.test"}, {Name: "a.test", URL: "http://a"}}, got.Upstreams)
}

// What is wrong is named by its key.
func TestWrongRegistries(t *testing.T) {
	for text, says := range map[string]string{
		"registries: docker.io":                                     "setting registries: want a list",
		"registries: {docker.io: {url: https://x}}":                 "registries",
		"registries: [docker.io]":                                   "registries[0]",
		"registries: [{name: a.b, mirors: []}]":                     "registries[0].mirors: there is no such key",
		"registries: [{name: a.b}, {name: c, mirrors: [{uri: x}]}]": "registries[1].mirrors[0].uri: there is no such key",
		"registries: [{name: a.b, credentials: {user: x}}]":         "registries[0].credentials.user: there is no such key",
		"registries: [{name: a.b, header-timeout: soon}]":           "registries[0].header-timeout",
		"registries: [{name: a.b, connect-timeout: 3}]":             "registries[0].connect-timeout: 3: want a time with a unit, such as 3s",
		"registries: {name: a.b}":                                   `unknown key "registries.name": registries has a plain value, or a list`,
		"registries: [{name: a.b, retries: many}]":                  "registries[0].retries",
		"registries: [{name: a.b, mirrors: [{url: [1]}]}]":          "registries[0].mirrors[0].url",
		"registries: [{url: https://x}]":                            `registries[0].name "" is not a host`,
		"registries: [{name: a.b, mirrors: [{url: ftp://x}]}]":      `registry "a.b": mirrors[0].url: the URL must begin with`,
		"registries: [{name: a.b}]\nregistry: [a.b=https://x]":      `registry "a.b" is listed twice`,
	} {
		file := filepath.Join(t.TempDir(), "tool.yaml")
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		var stderr bytes.Buffer
		code := cli.Command{
			Use: "tool", Config: &settings{}, Run: func(context.Context, *zap.Logger, []string) error { return nil },
		}.Execute(t.Context(), []string{"--config", file}, io.Discard, &stderr)
		require.Equal(t, cli.ExitUsage, code, text)
		require.Contains(t, stderr.String(), says, text)
		t.Log(stderr.String())
	}
}
