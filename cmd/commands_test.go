// Package cmd_test runs the daemons' commands as their users do.
package cmd_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// bin is where TestMain has put the commands.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "damselfly-cmd-")
		if err != nil {
			panic(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		if err := os.Chmod(dir, 0o755); err != nil { // also for another user
			panic(err)
		}
		bin = dir
		build := exec.CommandContext(context.Background(), "go", "build", "-tags", "nomsgpack", "-o", dir+"/", "./supernode", "./dfdaemon")
		if out, err := build.CombinedOutput(); err != nil {
			panic(fmt.Sprint(err, ": ", string(out)))
		}
		return m.Run()
	}())
}

// fail runs a command that is to fail, and returns its exit code and what it says.
func fail(t *testing.T, as *syscall.Credential, name string, args ...string) (code int, says string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, name), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as, Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	require.NoError(t, cmd.Start())
	limit := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	exit, ok := errors.AsType[*exec.ExitError](cmd.Wait())
	require.True(t, ok, "it has not failed")
	return exit.ExitCode(), stderr.String()
}

// daemon is a command that serves.
type daemon struct {
	*exec.Cmd
	address string // of the listener that its log names
}

// start runs a command until the test ends, and waits until it serves.
func start(t *testing.T, name, field string, args ...string) *daemon {
	t.Helper()
	d := &daemon{Cmd: exec.CommandContext(t.Context(), filepath.Join(bin, name), args...)}
	d.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	pipe, err := d.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, d.Start())
	t.Cleanup(func() { _ = d.Process.Kill(); _ = d.Wait() })
	lines := bufio.NewScanner(pipe)
	for lines.Scan() {
		line := map[string]any{}
		require.NoError(t, json.Unmarshal(lines.Bytes(), &line), lines.Text())
		if line["msg"] == "serving" {
			d.address, _ = line[field].(string)
			go func() { _, _ = io.Copy(io.Discard, pipe) }()
			return d
		}
	}
	t.Fatalf("%s does not serve: %v", name, d.Wait())
	return nil
}

// end sends a signal and returns how the command ends.
func (d *daemon) end(t *testing.T, sig syscall.Signal) error {
	t.Helper()
	require.NoError(t, d.Process.Signal(sig))
	return d.Wait()
}

func agent(dir string, more ...string) []string {
	return append([]string{
		"--data-dir", filepath.Join(dir, "data"), "--socket", filepath.Join(dir, "d.sock"),
		"--mirror-listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
	}, more...)
}

func centre(dir string, more ...string) []string {
	return append([]string{"--data-dir", filepath.Join(dir, "data"), "--listen", "127.0.0.1:0"}, more...)
}

func TestWrongUsage(t *testing.T) {
	file := filepath.Join(t.TempDir(), "settings.yaml")
	require.NoError(t, os.WriteFile(file, []byte("data-dri: /tmp\n"), 0o600))
	for _, name := range []string{"supernode", "dfdaemon"} {
		for _, c := range []struct {
			args []string
			says string
		}{
			{[]string{"--lisen", "x"}, "unknown flag: --lisen"},
			{[]string{"start"}, "start"},
			{[]string{"--config", file}, `unknown key "data-dri", the nearest one is "data-dir"`},
			{[]string{"--config", "/nowhere.yaml"}, "/nowhere.yaml"},
			{[]string{"--registry", "docker.io"}, "want NAME=URL"},
			{[]string{"--registry", "docker.io=ftp://a"}, "must begin with https:// or http://"},
			{[]string{"--quota", "many"}, "want bytes"},
			{[]string{"--data-dir", ""}, "data"},
			{[]string{"--up-lanes", "0"}, "lanes"},
		} {
			code, says := fail(t, nil, name, c.args...)
			require.Equal(t, 2, code, says)
			require.Contains(t, says, c.says)
			require.Contains(t, says, "See "+name+" --help.")
		}
	}
	code, says := fail(t, nil, "dfdaemon", "--supernode", "10.0.0.1:8002")
	require.Equal(t, 2, code)
	require.Contains(t, says, "want a URL like http://")
}

func TestDataDirWithoutPermission(t *testing.T) {
	dir := filepath.Join(bin, t.Name())
	require.NoError(t, os.Mkdir(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	var as *syscall.Credential
	if os.Geteuid() == 0 {
		as = &syscall.Credential{Uid: 65534, Gid: 65534}
	} else {
		require.NoError(t, os.Chmod(dir, 0o500))
	}
	for name, args := range map[string][]string{"supernode": centre(dir), "dfdaemon": agent(dir)} {
		code, says := fail(t, as, name, args...)
		require.Equal(t, 1, code, says)
		require.Contains(t, says, dir)
		require.Contains(t, says, "permission denied")
		require.Contains(t, says, "choose another directory")
	}
	code, says := fail(t, as, "dfdaemon", agent(dir, "--data-dir", filepath.Join(t.TempDir(), "x"), "--socket", filepath.Join(dir, "s"))...)
	require.Equal(t, 1, code, says)
	require.Contains(t, says, "permission denied")
}

func TestPortInUse(t *testing.T) {
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = ln.Close() }()
	for _, setting := range []string{"mirror-listen", "peer-listen", "metrics-listen"} {
		code, says := fail(t, nil, "dfdaemon", agent(t.TempDir(), "--"+setting, ln.Addr().String())...)
		require.Equal(t, 1, code, says)
		require.Contains(t, says, "address already in use")
		require.Contains(t, says, "choose another with --"+setting)
	}
	code, says := fail(t, nil, "supernode", centre(t.TempDir(), "--listen", ln.Addr().String())...)
	require.Equal(t, 1, code, says)
	require.Contains(t, says, "address already in use")
	require.Contains(t, says, "--listen")
}

// A second process on one's data directory is refused, unless it is a dfdaemon that
// takes the place of the first.
func TestSecondProcess(t *testing.T) {
	dir := t.TempDir()
	first := start(t, "dfdaemon", "mirror", agent(dir)...)
	code, says := fail(t, nil, "dfdaemon", agent(dir, "--mirror-listen", "127.0.0.2:0")...)
	require.Equal(t, 1, code, says)
	require.Contains(t, says, "in use by another process")
	code, says = fail(t, nil, "dfdaemon", agent(dir, "--data-dir", filepath.Join(dir, "other"))...)
	require.Equal(t, 1, code, says)
	require.Contains(t, says, "another process answers there")
	second := start(t, "dfdaemon", "mirror", agent(dir)...)
	require.NoError(t, first.Wait())
	require.Equal(t, first.address, second.address)

	dir = t.TempDir()
	start(t, "supernode", "address", centre(dir)...)
	code, says = fail(t, nil, "supernode", centre(dir)...)
	require.Equal(t, 1, code, says)
	require.Contains(t, says, "in use by another process: give each supernode a --data-dir")
}

func TestNoAuthority(t *testing.T) {
	code, says := fail(t, nil, "supernode", centre(t.TempDir(), "--ca", t.TempDir())...)
	require.Equal(t, 1, code, says)
	require.Contains(t, says, "make an authority there by `supernode ca`")
}

func TestEnds(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		require.NoError(t, start(t, "supernode", "address", centre(t.TempDir())...).end(t, sig))
		dir := t.TempDir()
		require.NoError(t, start(t, "dfdaemon", "mirror", agent(dir)...).end(t, sig))
		require.NoFileExists(t, filepath.Join(dir, "d.sock"))
	}
}

// A host alone, killed and started again, serves from the registry all the same.
func TestAgentWithoutASupernode(t *testing.T) {
	blob := bytes.Repeat([]byte("damselfly"), 1000)
	path := "/v2/org/app/blobs/" + digest.FromBytes(blob).String()
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != path {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
	}))
	defer registry.Close()
	args := agent(t.TempDir(), "--supernode", "http://127.0.0.1:1", "--registry", "reg.test="+registry.URL)
	for range 2 {
		d := start(t, "dfdaemon", "mirror", args...)
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+d.address+path+"?ns=reg.test", nil)
		require.NoError(t, err)
		resp, err := http.DefaultClient.Do(r)
		require.NoError(t, err)
		b, err := io.ReadAll(resp.Body)
		require.NoError(t, resp.Body.Close())
		require.NoError(t, err)
		require.Equal(t, blob, b)
		require.Error(t, d.end(t, syscall.SIGKILL))
	}
}
