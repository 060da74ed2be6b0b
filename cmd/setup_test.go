package cmd_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// tell runs a command of dfdaemon and returns its exit code and what it says.
func tell(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dfdaemon"), args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), o.String(), e.String()
	}
	require.NoError(t, err)
	return 0, o.String(), e.String()
}

func TestSetupAndUnset(t *testing.T) {
	root := t.TempDir()
	name := filepath.Join(root, "etc", "docker", "daemon.json")
	before := "{\n  \"debug\": true\n}"
	require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o755))
	require.NoError(t, os.WriteFile(name, []byte(before), 0o600))

	code, out, says := tell(t, "setup", "docker", "--root", root, "--dry-run")
	require.Zero(t, code, says)
	require.Contains(t, out, "+  \"registry-mirrors\": [\"http://127.0.0.1:65001\"],\n")
	b, err := os.ReadFile(name)
	require.NoError(t, err)
	require.Equal(t, before, string(b))

	code, out, says = tell(t, "setup", "docker", "--root", root)
	require.Zero(t, code, says)
	require.Contains(t, out, "change /etc/docker/daemon.json\nnote: docker")
	code, out, _ = tell(t, "setup", "docker", "--root", root)
	require.Zero(t, code)
	require.Equal(t, "nothing to change\n", out)
	code, out, _ = tell(t, "unset", "docker", "--root", root)
	require.Zero(t, code)
	require.Contains(t, out, "change /etc/docker/daemon.json\n")
	b, err = os.ReadFile(name)
	require.NoError(t, err)
	require.Equal(t, before, string(b))
	require.NoDirExists(t, filepath.Join(root, "var"))

	require.NoError(t, os.WriteFile(name, []byte("{ // no"), 0o600))
	code, _, says = tell(t, "setup", "docker", "--root", root)
	require.Equal(t, 1, code)
	require.Contains(t, says, "nothing is changed: /etc/docker/daemon.json: dockerd cannot read it: line 1")
	for _, args := range [][]string{
		{"setup"},
		{"setup", "rkt"},
		{"setup", "docker", "podman"},
		{"setup", "docker", "--mirror", "here"},
		{"setup", "docker", "--registry", "https://quay.io"},
		{"unset", "docker", "--mirror", "127.0.0.1:1"},
		{"setup", "docker", "--root", ""},
	} {
		code, _, says = tell(t, args...)
		require.Equal(t, 2, code, says)
	}
}
