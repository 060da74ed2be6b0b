package dfdaemon

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/supernode/api"
)

func TestSocketModes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "d.sock")
	ln, err := listenSocket(path, "", false)
	require.NoError(t, err)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.ModeSocket|0o600, info.Mode())
	require.NoError(t, ln.Close())
	require.NoFileExists(t, path)

	own, err := user.LookupGroupId(strconv.Itoa(os.Getgid()))
	require.NoError(t, err)
	for _, group := range []string{own.Name, own.Gid} {
		ln, err = listenSocket(path, group, false)
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
	ln, err := listenSocket(path, "", false)
	require.NoError(t, err)
	defer func() { _ = ln.Close() }()
	c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", path)
	require.NoError(t, err)
	require.NoError(t, c.Close())

	_, err = listenSocket(path, "", false)
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
		_, err := listenSocket(path, "", false)
		require.ErrorContains(t, err, says)
		require.ErrorContains(t, err, path)
	}
	_, err := listenSocket(filepath.Join(dir, "d.sock"), "no-such-group", false)
	require.ErrorContains(t, err, "no-such-group")
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "precious", string(b))
}

// Root and the agent's own user may use the socket, and who is named; the kernel
// says who asks.
func TestSocketIsForItsUsers(t *testing.T) {
	c := testConfig(t)
	c.SocketUsers = []string{"nobody", "4711"}
	run(t, c)
	info, err := os.Stat(c.Socket)
	require.NoError(t, err)
	require.Equal(t, os.ModeSocket|0o666, info.Mode())
	status, _, _ := overSocket(t, c.Socket, http.MethodGet, "/v1/status", "")
	require.Equal(t, http.StatusOK, status)

	fine := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	users, err := userIDs(c.SocketUsers)
	require.NoError(t, err)
	require.Contains(t, users, uint32(4711))
	for _, ask := range []struct {
		who   any
		group bool
		want  int
	}{
		{uint32(0), false, 204},
		{uint32(os.Geteuid()), false, 204},
		{uint32(4711), false, 204},
		{users[0], false, 204},
		{uint32(4712), false, 403},
		{nil, false, 403},
		{uint32(4712), true, 204},
	} {
		r := httptest.NewRequestWithContext(context.WithValue(t.Context(), peerKey{}, ask.who), http.MethodGet, "/", nil)
		w := httptest.NewRecorder()
		forUsers(users, ask.group, fine).ServeHTTP(w, r)
		require.Equal(t, ask.want, w.Code, ask)
		if ask.want == 403 {
			require.Equal(t, api.CodeForbidden, w.Header().Get(api.ErrorHeader))
			require.Contains(t, w.Body.String(), "--socket-users")
		}
	}
	_, err = userIDs([]string{"no-such-user"})
	require.ErrorContains(t, err, "there is no such user")
	c.SocketGroup = "root"
	require.ErrorContains(t, c.Validate(), "name either")
}

// Another user of the machine is refused by what the kernel says of it.
func TestSocketRefusesStrangers(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("only root can be somebody else")
		}
		t.Skip("only root can be somebody else")
	}
	c := testConfig(t)
	dir, err := os.MkdirTemp("", "damselfly") //nolint:usetesting // others must come through it
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755)) //nolint:gosec // so that others reach the socket
	c.Socket, c.SocketUsers = filepath.Join(dir, "d.sock"), []string{"4711"}
	run(t, c)
	for id, want := range map[uint32]string{4711: "200", 4712: "403"} {
		cmd := exec.CommandContext(t.Context(), "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket", c.Socket, "http://dfdaemon/v1/status") //nolint:gosec // our own
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
		got, err := cmd.Output()
		require.NoError(t, err)
		require.Equal(t, want, string(got), id)
	}
}
