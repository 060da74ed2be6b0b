package dfdaemon

import (
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSocketModes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "d.sock")
	ln, err := listenSocket(path, "")
	require.NoError(t, err)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.ModeSocket|0o600, info.Mode())
	require.NoError(t, ln.Close())
	require.NoFileExists(t, path)

	own, err := user.LookupGroupId(strconv.Itoa(os.Getgid()))
	require.NoError(t, err)
	for _, group := range []string{own.Name, own.Gid} {
		ln, err = listenSocket(path, group)
		require.NoError(t, err)
		info, err = os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, os.ModeSocket|0o660, info.Mode())
		require.NoError(t, ln.Close())
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Empty(t, entries)
}

func TestSocketOfAKilledProcessIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.sock")
	for _, left := range []string{path, path + ".new"} {
		old, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: left})
		require.NoError(t, err)
		old.SetUnlinkOnClose(false)
		require.NoError(t, old.Close())
		require.FileExists(t, left)
	}
	ln, err := listenSocket(path, "")
	require.NoError(t, err)
	defer func() { _ = ln.Close() }()
	c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", path)
	require.NoError(t, err)
	require.NoError(t, c.Close())

	_, err = listenSocket(path, "")
	require.ErrorContains(t, err, "another process answers there")
	require.FileExists(t, path)
}

func TestSocketIsRefused(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, []byte("precious"), 0o600))
	for path, says := range map[string]string{
		file:                          "no socket",
		filepath.Join(file, "d.sock"): "not a directory",
		filepath.Join(dir, strings.Repeat("x", 110)): "longer than",
	} {
		_, err := listenSocket(path, "")
		require.ErrorContains(t, err, says)
		require.ErrorContains(t, err, path)
	}
	_, err := listenSocket(filepath.Join(dir, "d.sock"), "no-such-group")
	require.ErrorContains(t, err, "no-such-group")
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "precious", string(b))
}
