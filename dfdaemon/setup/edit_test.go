package setup

import (
	"encoding/json"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func apply(t *testing.T, p *Plan, err error) {
	t.Helper()
	require.NoError(t, err)
	require.NoError(t, p.Apply())
}

func lay(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(root, name), []byte(content), 0o644)) //nolint:gosec // G306: as engines have it
	}
	return root
}

func at(root string, names ...string) Config {
	c := Config{Root: root, Mirror: mirrorAt}
	for _, n := range names {
		c.Registries = append(c.Registries, Registry{Name: n})
	}
	return c
}

// Each engine's entry is its own, in whatever order they come and go.
func TestAllEnginesOfAHost(t *testing.T) {
	files := map[string]string{
		"/etc/containerd/config.toml":     "version = 2\n",
		"/etc/docker/daemon.json":         "{\n  \"debug\": true\n}",
		"/etc/containers/registries.conf": "[[registry]]\nlocation = \"quay.io\"\n",
	}
	for _, order := range [][]Engine{{Containerd, Docker, CRIO, Podman}, {Podman, CRIO, Docker, Containerd}, {CRIO, Containerd, Podman, Docker}} {
		root := lay(t, files)
		before := picture(t, root)
		for _, e := range Engines {
			p, err := Setup(e, at(root))
			apply(t, p, err)
		}
		for i, e := range order {
			p, err := Unset(e, root)
			apply(t, p, err)
			b, err := os.ReadFile(filepath.Join(root, registriesConf))
			require.NoError(t, err)
			left := order[i+1:]
			needed := slices.Contains(left, CRIO) || slices.Contains(left, Podman)
			require.Equal(t, needed, strings.Contains(string(b), mirrorAt), "after %s", e)
		}
		require.Equal(t, before, picture(t, root))
	}
}

// Another mirror or other registries replace what an earlier setup has written.
func TestSetupAnew(t *testing.T) {
	root := lay(t, map[string]string{"/etc/containers/registries.conf": "[[registry]]\nlocation = \"quay.io\"\n"})
	before := picture(t, root)
	p, err := Setup(Podman, at(root, "quay.io", "ghcr.io"))
	apply(t, p, err)
	other := at(root, "docker.io")
	other.Mirror = "127.0.0.1:7000"
	p, err = Setup(Podman, other)
	apply(t, p, err)
	require.Len(t, p.Changes(), 2)
	b, err := os.ReadFile(filepath.Join(root, registriesConf))
	require.NoError(t, err)
	require.Equal(t, files(t, before, root+registriesConf), string(b))
	b, err = os.ReadFile(filepath.Join(root, dropIn))
	require.NoError(t, err)
	require.Contains(t, string(b), "127.0.0.1:7000/docker.io")
	require.NotContains(t, string(b), "ghcr.io")
	p, err = Unset(Podman, root)
	apply(t, p, err)
	require.Equal(t, before, picture(t, root))
}

func files(t *testing.T, picture map[string]string, name string) string {
	t.Helper()
	_, content, ok := strings.Cut(picture[name], "\n")
	require.True(t, ok)
	return content
}

// An entry that somebody has changed is not guessed at.
func TestUnsetOfAChangedEntry(t *testing.T) {
	root := lay(t, map[string]string{"/etc/containerd/config.toml": "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n"})
	before := picture(t, root)
	p, err := Setup(Containerd, at(root, "quay.io"))
	apply(t, p, err)
	name := filepath.Join(root, containerdCerts, "quay.io", hostsFile)
	b, err := os.ReadFile(name)
	require.NoError(t, err)
	changed := strings.Replace(string(b), dialTimeout, "1s", 1)
	require.NoError(t, os.WriteFile(name, []byte(changed), 0o600))
	now := picture(t, root)
	_, err = Unset(Containerd, root)
	require.ErrorContains(t, err, "take out by hand what has \"http://127.0.0.1:65001\"")
	require.Equal(t, now, picture(t, root))

	require.NoError(t, os.WriteFile(name, nil, 0o600)) // as told
	p, err = Unset(Containerd, root)
	apply(t, p, err)
	require.Equal(t, before, picture(t, root))
}

// Whatever the moment at which a setup or an unset is killed, unset leaves nothing.
func TestKilledInBetween(t *testing.T) {
	host := map[string]string{
		"/etc/containerd/config.toml":                      "version = 2\n",
		"/etc/containerd/certs.d/docker.io/hosts.toml":     "server = \"https://docker.io\"\n",
		"/etc/containerd/certs.d/registry.corp/hosts.toml": "[host.\"https://cache.corp\"]\n",
	}
	for killed := range 14 {
		for _, undo := range []bool{false, true} {
			root := lay(t, host)
			before := picture(t, root)
			p, err := Setup(Containerd, at(root, "docker.io", "registry.corp", "quay.io"))
			require.NoError(t, err)
			if undo {
				require.NoError(t, p.Apply())
				p, err = Unset(Containerd, root)
				require.NoError(t, err)
			}
			killAfter(t, p, killed)
			if _, err := os.Stat(filepath.Join(root, stateFile)); undo && err == nil { // in the middle of a write
				for _, dir := range []string{"/etc/containerd/.config.toml", stateDir + "/.state.json"} {
					require.NoError(t, os.WriteFile(filepath.Join(root, dir+".damselfly"), []byte("ver"), 0o600))
				}
			}
			p, err = Unset(Containerd, root)
			apply(t, p, err)
			after := picture(t, root)
			if killed == 0 && !undo { // before the state could tell
				for _, dir := range []string{filepath.Dir(stateDir), "/var/lib", "/var"} {
					delete(after, root+dir)
				}
			}
			require.Equal(t, before, after, "killed after %d writes, undo %v", killed, undo)
		}
	}
}

// killAfter lets a plan make so many writes, and no more, not even to clean up.
func killAfter(t *testing.T, p *Plan, writes int) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil && r != "killed" {
			panic(r)
		}
	}()
	p.tree.writing = func() error {
		if writes--; writes < 0 {
			panic("killed")
		}
		return nil
	}
	require.NoError(t, p.Apply())
}

// Where one file cannot be written none is.
func TestAllOrNothing(t *testing.T) {
	root := lay(t, map[string]string{"/etc/containerd/config.toml": "version = 2\n"})
	before := picture(t, root)
	for n := range 4 {
		p, err := Setup(Containerd, at(root, "docker.io", "quay.io"))
		require.NoError(t, err)
		p.tree.writing = func() error {
			if n--; n == -1 {
				return fs.ErrPermission
			}
			return nil
		}
		require.ErrorIs(t, p.Apply(), fs.ErrPermission)
		require.Equal(t, before, picture(t, root))
	}
}

func TestChangedSincePlanned(t *testing.T) {
	root := lay(t, map[string]string{"/etc/docker/daemon.json": "{}"})
	p, err := Setup(Docker, at(root))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(root, dockerConfig), []byte("{ }"), 0o600))
	now := picture(t, root)
	require.ErrorContains(t, p.Apply(), "run this again")
	require.Equal(t, now, picture(t, root))
}

func TestWrongSettings(t *testing.T) {
	for _, c := range []struct {
		engine Engine
		mirror string
		says   string
	}{
		{"rkt", mirrorAt, "want containerd, docker, crio or podman"},
		{Docker, "127.0.0.1", "want host:port"},
		{Docker, "::1:65001", "want host:port"},
		{Docker, "127.0.0.1:0", "want host:port"},
		{Docker, "a b:1", "want host:port"},
		{Docker, "0.0.0.0:65001", "such as 127.0.0.1:65001"},
		{Docker, "[::]:65001", "such as 127.0.0.1:65001"},
	} {
		_, err := Setup(c.engine, Config{Root: t.TempDir(), Mirror: c.mirror})
		require.ErrorContains(t, err, c.says)
	}
	for _, s := range []string{"", "a/b", "https://quay.io", "quay.io:", "quay.io:port", "a=b", "registry.corp:5000=x.y:1", "a\n.b", `a"b`, "..", "."} {
		_, err := ParseRegistry(s)
		require.Error(t, err, s)
	}
	for s, want := range map[string]Registry{
		"Quay.IO": {Name: "quay.io"}, "registry-1.docker.io": {Name: "docker.io"}, "[fd00::1]:5000": {Name: "[fd00::1]:5000"},
		"r:5000=reg.corp": {"r:5000", "reg.corp"},
	} {
		got, err := ParseRegistry(s)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
}

func TestStateOfAnotherVersion(t *testing.T) {
	root := lay(t, map[string]string{stateFile: `{"version": 2, "families": {}}`})
	_, err := Setup(Docker, at(root))
	require.ErrorContains(t, err, "unset with the one that wrote it")
}

// hostFiles are the contents of the files that the cases of some engines lay.
func hostFiles(f *testing.F, engines ...Engine) (contents []string) {
	f.Helper()
	for _, e := range engines {
		names, err := filepath.Glob(filepath.Join("testdata", string(e), "*.txt"))
		require.NoError(f, err)
		require.NotEmpty(f, names)
		for _, name := range names {
			b, err := os.ReadFile(name)
			require.NoError(f, err)
			for part := range strings.SplitSeq(strings.Split(string(b), "== setup")[0], "\n-- ") {
				_, content, _ := strings.Cut(part, "\n")
				contents = append(contents, content)
			}
		}
	}
	return contents
}

// FuzzTOML: whatever the file, an edit either is refused or takes nothing away,
// and is taken out again to the byte, also when lines were added around it.
func FuzzTOML(f *testing.F) {
	for _, content := range hostFiles(f, Containerd, Podman) {
		f.Add([]byte(content))
		f.Add([]byte(strings.ReplaceAll(content, "\n", "\r\n")))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		doc, es, err := parseTOML(b)
		if err != nil {
			return
		}
		if after, edits, err := editHosts(b, "http://"+mirrorAt, certificates{}); err == nil {
			takenOut(t, b, after, edits)
		}
		for _, table := range []string{"cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"} {
			doc, es, _ := parseTOML(b)
			after, edit, err := editConfigPath(b, doc, es, []string{"plugins", table, "registry"}, containerdCerts)
			if err == nil {
				takenOut(t, b, after, []Edit{edit})
			}
		}
		list, _ := doc["registry"].([]any)
		for i := range list {
			fields, ok := list[i].(map[string]any)
			if !ok {
				continue
			}
			after, edits, err := editEntry(registryEntry{&file{now: b}, doc, es, i, fields}, mirrorAt+"/quay.io")
			if err == nil {
				takenOut(t, b, after, edits)
			}
			break // doc has changed
		}
	})
}

func takenOut(t *testing.T, b, after []byte, edits []Edit) {
	t.Helper()
	if len(edits) == 0 {
		require.Equal(t, string(b), string(after))
		return
	}
	if strings.Contains(string(b), ours) {
		return // what is ours is told by its text
	}
	_, _, err := parseTOML(after)
	require.NoError(t, err)
	got, missing := takeOut(after, edits)
	require.Empty(t, missing)
	require.Equal(t, string(b), string(got))
	got, missing = takeOut(append([]byte("# more\n"), after...), edits)
	require.Empty(t, missing)
	require.Equal(t, "# more\n"+string(b), string(got))
}

// FuzzJSON: the same for dockerd's file.
func FuzzJSON(f *testing.F) {
	for _, content := range hostFiles(f, Docker) {
		f.Add([]byte(content))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		const mirror = "http://" + mirrorAt
		after, edits, err := editDaemon(b, mirror)
		if err != nil || edits == nil {
			return
		}
		var was, is map[string]any
		if json.Unmarshal(b, &was) != nil {
			was = map[string]any{}
		}
		require.NoError(t, json.Unmarshal(after, &is), string(after))
		list, _ := was[mirrorsKey].([]any)
		want := maps.Clone(was)
		want[mirrorsKey] = append([]any{mirror}, list...)
		require.Equal(t, want, is)

		_, had := was[mirrorsKey]
		back, err := takeOutMirror(after, mirror, !had)
		require.NoError(t, err)
		is = nil
		require.NoError(t, json.Unmarshal(back, &is), string(back))
		if len(was) == 0 {
			require.Empty(t, is)
		} else {
			require.Equal(t, was, is)
		}
	})
}

// A diff's hunk has as many lines as it says.
func TestDiff(t *testing.T) {
	for want, c := range map[string][2]string{
		"@@ -0,0 +1,1 @@\n+a\n":                                   {"", "a\n"},
		"@@ -1,1 +0,0 @@\n-a\n":                                   {"a\n", ""},
		"@@ -2,0 +3,1 @@\n+x\n":                                   {"a\nb\nc\n", "a\nb\nx\nc\n"},
		"@@ -1,1 +1,1 @@\n-a\n\\ No newline at end of file\n+a\n": {"a", "a\n"},
		"@@ -2,2 +2,1 @@\n-b\n-c\n+x\n":                           {"a\nb\nc\nd\n", "a\nx\nd\n"},
	} {
		text := diff(&file{path: "/f", was: []byte(c[0]), now: []byte(c[1]), there: true, stays: true})
		require.Equal(t, "--- /f\n+++ /f\n"+want, text)
	}
}

// What a diff shows of a host's file holds no secret.
func TestDiffKeepsSecrets(t *testing.T) {
	for _, line := range []string{
		`{"proxies": {"http-proxy": "http://joe:hush@proxy.corp:3128"}, "auths": {"a": {"auth": "hush"}}}`,
		`password = "hush"`, `password='hush'`, `Authorization = ["Basic hush"]`, `{"identitytoken":"hush"}`, `x-api-key = "hush"`, `token: hush`,
		`"key": "hush and hush"`,
	} {
		text := diff(&file{path: "/f", was: []byte("k = 1\n" + line), now: []byte("k = 1\n" + line + "\nmore"), there: true, stays: true})
		require.NotContains(t, text, "hush")
		require.Contains(t, text, "***")
		require.NotContains(t, text, "k = 1")
	}
}

// A file keeps its owner.
func TestOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("CI must be root: only root gives files away")
		}
		t.Skip("only root gives files away")
	}
	root := lay(t, map[string]string{"/etc/docker/daemon.json": "{}"})
	require.NoError(t, os.Chown(filepath.Join(root, dockerConfig), 1234, 567))
	before := picture(t, root)
	p, err := Setup(Docker, at(root))
	apply(t, p, err)
	info, err := os.Stat(filepath.Join(root, dockerConfig))
	require.NoError(t, err)
	s, ok := info.Sys().(*syscall.Stat_t)
	require.True(t, ok)
	require.Equal(t, []uint32{1234, 567}, []uint32{s.Uid, s.Gid})
	p, err = Unset(Docker, root)
	apply(t, p, err)
	require.Equal(t, before, picture(t, root))
}

// The links of a host lead to places of that host, also where dfdaemon keeps what
// it has done.
func TestStateStaysBelowRoot(t *testing.T) {
	for _, link := range []string{filepath.Dir(stateDir), stateDir, "/var"} {
		t.Run(link, func(t *testing.T) {
			root := lay(t, map[string]string{"/etc/docker/daemon.json": "{}\n"})
			outside := filepath.Join(t.TempDir(), "data")
			require.NoError(t, os.MkdirAll(outside, 0o755))
			require.NoError(t, os.MkdirAll(filepath.Join(root, filepath.Dir(link)), 0o755))
			require.NoError(t, os.MkdirAll(filepath.Join(root, outside), 0o755))
			require.NoError(t, os.Symlink(outside, filepath.Join(root, link)))
			before := picture(t, root)
			p, err := Setup(Docker, at(root))
			apply(t, p, err)
			left, err := os.ReadDir(outside)
			require.NoError(t, err)
			require.Empty(t, left, "written outside of the root")
			p, err = Setup(Docker, at(root))
			require.NoError(t, err)
			require.Empty(t, p.Changes(), "it does not know what it has done")
			p, err = Unset(Docker, root)
			apply(t, p, err)
			if link != stateDir { // where the link leads is emptied and goes
				require.Equal(t, before, picture(t, root))
			}
			require.Equal(t, "{}\n", files(t, picture(t, root), filepath.Join(root, "/etc/docker/daemon.json")))
		})
	}
}
