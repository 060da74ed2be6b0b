package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/dfget"
)

// bin is where TestMain has put the command.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "damselfly-dfget-")
		if err != nil {
			panic(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		bin = filepath.Join(dir, "dfget")
		if out, err := exec.CommandContext(context.Background(), "go", "build", "-tags", "nomsgpack", "-o", bin, ".").CombinedOutput(); err != nil {
			panic(fmt.Sprint(err, ": ", string(out)))
		}
		return m.Run()
	}())
}

// start returns the command, which writes to out in a directory of its own.
func start(t *testing.T, args ...string) (cmd *exec.Cmd, out string, said *bytes.Buffer) {
	t.Helper()
	dir := t.TempDir()
	out, said = filepath.Join(dir, "out"), new(bytes.Buffer)
	cmd = exec.CommandContext(t.Context(), bin, append([]string{"--data-dir", filepath.Join(dir, "data"), "-o", out}, args...)...)
	cmd.Env = append(os.Environ(), "DFGET_SOCKET="+noSocket) // whatever runs on this machine
	cmd.Stdout, cmd.Stderr = said, said
	return cmd, out, said
}

// only tells what is in out's directory beside a peer's pieces.
func only(t *testing.T, out string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(out))
	require.NoError(t, err)
	var names []string
	for _, e := range entries {
		if e.Name() != "data" {
			names = append(names, e.Name())
		}
	}
	require.Equal(t, want, names)
}

func TestCommand(t *testing.T) {
	body := bytes.Repeat([]byte("damselfly "), 100_000)
	sum := fmt.Sprintf("sha256:%x", sha256.Sum256(body))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/f" || r.Header.Get("X-A") == "no" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	}))
	t.Cleanup(srv.Close) // after the parallel ones
	gone := httptest.NewServer(nil)
	gone.Close()
	config := filepath.Join(t.TempDir(), "dfget.yaml")
	require.NoError(t, os.WriteFile(config, []byte("digets: x\n"), 0o600))
	url := srv.URL + "/f"
	for name, c := range map[string]struct {
		args []string
		code int
		says string
	}{
		"plain":                  {[]string{url}, 0, "976.6 KiB in "},
		"digest":                 {[]string{"--digest", sum, url}, 0, "100 % origin"},
		"unreachable supernode":  {[]string{"--supernode", gone.URL, url}, 0, "no supernode can be reached"},
		"unreachable socket":     {[]string{"--socket", "/nowhere/s", url}, 0, "asking the origin itself"},
		"wrong digest":           {[]string{"--digest", fmt.Sprintf("sha256:%064d", 0), url}, exitMismatch, "do not have the digest"},
		"refused":                {[]string{srv.URL + "/none", "--header", "X-B: yes"}, exitRefused, "403"},
		"refused for the header": {[]string{url, "--header", "X-A: no"}, exitRefused, "403"},
		"no such directory":      {[]string{"-o", "/nowhere/out", url}, exitOutput, "/nowhere"},
		"output is a device":     {[]string{"-o", "/dev/null", url}, exitOutput, "regular"},
		"nobody there":           {[]string{gone.URL}, 1, "connection refused"},
		"malformed digest":       {[]string{"--digest", "sha256:totallywrong", url}, 2, "totallywrong"},
		"malformed header":       {[]string{"--header", "secret", url}, 2, "Name: value"},
		"malformed URL":          {[]string{"file:///etc/passwd"}, 2, "http://"},
		"malformed supernode":    {[]string{"--supernode", "10.0.0.1", url}, 2, "supernode"},
		"no URL":                 {nil, 2, "want one URL"},
		"no output":              {[]string{"-o", "", url}, 2, "-o"},
		"standard output":        {[]string{"-o", "-", url}, 2, "the output is a file"},
		"unknown flag":           {[]string{"--digets", sum, url}, 2, "--digets"},
		"unknown key":            {[]string{"--config", config, url}, 2, `"digest"`},
		"both ways":              {[]string{"--socket", "/s", "--supernode", gone.URL, url}, 2, "exclude"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd, out, said := start(t, c.args...)
			err := cmd.Run()
			require.Contains(t, said.String(), c.says)
			if c.code == 0 {
				require.NoError(t, err, said.String())
				got, err := os.ReadFile(out)
				require.NoError(t, err)
				require.True(t, bytes.Equal(body, got))
				only(t, out, "out")
				return
			}
			exit, ok := errors.AsType[*exec.ExitError](err)
			require.True(t, ok)
			require.Equal(t, c.code, exit.ExitCode(), said.String())
			only(t, out)
		})
	}
}

func TestInterrupt(t *testing.T) {
	begun := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(make([]byte, 1<<20))
		_ = http.NewResponseController(w).Flush()
		close(begun)
		<-r.Context().Done()
	}))
	defer srv.Close()
	cmd, out, said := start(t, srv.URL)
	require.NoError(t, cmd.Start())
	<-begun
	require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
	exit, ok := errors.AsType[*exec.ExitError](cmd.Wait())
	require.True(t, ok)
	require.Equal(t, 1, exit.ExitCode())
	require.Contains(t, said.String(), "interrupted")
	only(t, out)
}

func TestProgress(t *testing.T) {
	var w bytes.Buffer
	p := &progress{w: &w, began: time.Now(), terminal: true}
	p.update(1<<20, -1, dfget.Stats{})
	p.update(1<<20, 4<<20, dfget.Stats{Peer: 1 << 20})
	p.update(4<<20, 4<<20, dfget.Stats{Peer: 3 << 20, Supernode: 1 << 20})
	p.finish("file", nil)
	require.Contains(t, w.String(), "25%")
	require.Regexp(t, `file: 4\.0 MiB in 0\.\d s, .*/s, 75 % peers, 25 % supernode\n$`, w.String())
	w.Reset()
	p = &progress{w: &w, began: time.Now(), daemon: true}
	p.update(10, 10, dfget.Stats{})
	require.Empty(t, w.String())
	p.finish("file", errors.New("failed"))
	require.Empty(t, w.String())
	p.finish("file", nil)
	require.Contains(t, w.String(), "through dfdaemon")
}
