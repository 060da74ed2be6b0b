package setup

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

var rewrite = flag.Bool("rewrite", false, "write what setup does into the files of testdata")

const mirrorAt = "127.0.0.1:65001"

// A testCase is a file of testdata: what is asked, a host's files, and behind
// "== setup" what setup says. A file begins with "-- PATH WORD…", where the words
// are a mode, "crlf", "noeol" (no newline at its end), "dir", or "-> LINK".
type testCase struct {
	head   string // all before "== setup"
	golden string
	mirror string
	asked  []Registry
	files  []testFile
}

type testFile struct {
	path, link string
	dir        bool
	mode       fs.FileMode
	content    string
}

func readCase(t *testing.T, name string) testCase {
	t.Helper()
	b, err := os.ReadFile(name)
	require.NoError(t, err)
	c := testCase{mirror: mirrorAt}
	var ok bool
	c.head, c.golden, ok = strings.Cut(string(b), "== setup\n")
	require.True(t, ok, name)
	parts := strings.Split("\n"+c.head, "\n-- ")
	for line := range strings.FieldsSeq(parts[0]) {
		if m, ok := strings.CutPrefix(line, "mirror="); ok {
			c.mirror = m
			continue
		}
		r, err := ParseRegistry(line)
		require.NoError(t, err)
		c.asked = append(c.asked, r)
	}
	for i, part := range parts[1:] {
		header, content, _ := strings.Cut(part, "\n")
		if content != "" && i < len(parts)-2 {
			content += "\n"
		}
		words := strings.Fields(header)
		f := testFile{path: words[0], mode: 0o644, content: content}
		for j, w := range words[1:] {
			switch w {
			case "crlf":
				f.content = strings.ReplaceAll(f.content, "\n", "\r\n")
			case "noeol":
				f.content = strings.TrimRight(f.content, "\r\n")
			case "dir":
				f.dir = true
			case "->":
				f.link = words[j+2]
			default:
				if mode, err := strconv.ParseUint(w, 8, 32); err == nil {
					f.mode = fs.FileMode(mode)
				}
			}
		}
		c.files = append(c.files, f)
	}
	return c
}

func (c testCase) lay(t *testing.T) (root string) {
	t.Helper()
	root = t.TempDir()
	for _, f := range c.files {
		at := filepath.Join(root, f.path)
		require.NoError(t, os.MkdirAll(filepath.Dir(at), 0o755))
		switch {
		case f.dir:
			require.NoError(t, os.Mkdir(at, 0o755))
		case f.link != "":
			require.NoError(t, os.Symlink(f.link, at))
		default:
			require.NoError(t, os.WriteFile(at, []byte(f.content), 0o600))
			require.NoError(t, os.Chmod(at, f.mode))
		}
	}
	return root
}

// picture is all that is below root: each path with its kind, mode, owner and bytes.
func picture(t *testing.T, root string) map[string]string {
	t.Helper()
	all := map[string]string{}
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		require.NoError(t, err)
		info, err := d.Info()
		require.NoError(t, err)
		s, ok := info.Sys().(*syscall.Stat_t)
		require.True(t, ok)
		text := fmt.Sprint(info.Mode(), s.Uid, s.Gid)
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			require.NoError(t, err)
			text += "\n" + string(b)
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			to, err := os.Readlink(path)
			require.NoError(t, err)
			text += " -> " + to
		}
		all[path] = text
		return nil
	}))
	return all
}

func says(p *Plan, err error) string {
	if err != nil {
		return "error: " + err.Error() + "\n"
	}
	var b strings.Builder
	b.WriteString(p.Diff())
	for _, n := range p.Notes {
		b.WriteString("note: " + n + "\n")
	}
	return b.String()
}

// TestCases lays each host of testdata, sets its engine up, twice, and undoes it.
func TestCases(t *testing.T) {
	for _, e := range Engines {
		names, err := filepath.Glob(filepath.Join("testdata", string(e), "*.txt"))
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(names), 10, e)
		for _, name := range names {
			t.Run(string(e)+"/"+strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
				testOneCase(t, e, name)
			})
		}
	}
}

func testOneCase(t *testing.T, e Engine, name string) {
	t.Helper()
	c := readCase(t, name)
	root := c.lay(t)
	before := picture(t, root)
	cfg := Config{Root: root, Mirror: c.mirror, Registries: c.asked}
	p, err := Setup(e, cfg)
	said := strings.ReplaceAll(says(p, err), "\r", "^M")
	if *rewrite {
		require.NoError(t, os.WriteFile(name, []byte(c.head+"== setup\n"+said), 0o600))
	} else {
		require.Equal(t, c.golden, said)
	}
	require.Equal(t, before, picture(t, root), "a plan has changed something")
	if err != nil {
		return
	}
	require.NoError(t, p.Apply())
	for _, change := range p.Changes() {
		require.NotEqual(t, "remove", change.Action)
	}
	once := picture(t, root)

	again, err := Setup(e, cfg)
	require.NoError(t, err)
	require.Empty(t, again.Changes())
	require.NoError(t, again.Apply())
	require.Equal(t, once, picture(t, root))

	back, err := Unset(e, root)
	require.NoError(t, err)
	require.NoError(t, back.Apply())
	require.Equal(t, before, picture(t, root))

	none, err := Unset(e, root)
	require.NoError(t, err)
	require.Empty(t, none.Changes())
	require.NoError(t, none.Apply())
	require.Equal(t, before, picture(t, root))
}

// Podman and CRI-O share their files: whose turn changes none says what is to be done.
func TestSharedFilesAreExplained(t *testing.T) {
	root := t.TempDir()
	notes := func(p *Plan, err error) string {
		t.Helper()
		require.NoError(t, err)
		require.NoError(t, p.Apply())
		return strings.Join(p.Notes, "\n")
	}
	c := Config{Root: root, Mirror: "127.0.0.1:65001"}
	require.Empty(t, notes(Setup(Podman, c)))
	require.Equal(t, restartCRIO, notes(Setup(CRIO, c)))
	require.Empty(t, notes(Setup(CRIO, c)))
	c.Registries = []Registry{{Name: "quay.test"}}
	require.Equal(t, restartCRIO, notes(Setup(Podman, c)))
	c.Registries = nil
	require.Equal(t, restartCRIO, notes(Setup(Podman, c)))
	require.Contains(t, notes(Unset(Podman, root)), "they stay until dfdaemon unset crio")
	require.Equal(t, restartCRIO, notes(Unset(CRIO, root)))
	require.NoDirExists(t, filepath.Join(root, "etc"))
}

// What others write around our entry stays, and the entry goes.
func TestUnsetAfterOthersHaveWritten(t *testing.T) {
	for _, e := range Engines {
		names, err := filepath.Glob(filepath.Join("testdata", string(e), "*.txt"))
		require.NoError(t, err)
		for _, name := range names {
			t.Run(string(e)+"/"+filepath.Base(name), func(t *testing.T) {
				c := readCase(t, name)
				root := c.lay(t)
				p, err := Setup(e, Config{Root: root, Mirror: c.mirror, Registries: c.asked})
				if strings.HasPrefix(c.golden, "error: ") {
					require.Error(t, err)
					return
				}
				require.NoError(t, err)
				require.NoError(t, p.Apply())
				for _, change := range p.Changes() {
					writeAround(t, filepath.Join(root, change.Path))
				}
				back, err := Unset(e, root)
				require.NoError(t, err)
				require.NoError(t, back.Apply())
				for _, change := range p.Changes() {
					b, err := os.ReadFile(filepath.Join(root, change.Path))
					require.NoError(t, err)
					require.NotContains(t, string(b), ":65001")
					require.NotContains(t, string(b), ours)
					require.Contains(t, string(b), "another")
					if strings.HasSuffix(change.Path, ".json") {
						_, err = readMirrors(b)
					} else {
						_, _, err = parseTOML(b)
					}
					require.NoError(t, err, string(b))
				}
				require.NoDirExists(t, filepath.Join(root, stateDir))
			})
		}
	}
}

// writeAround changes a file as its owner might.
func writeAround(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(name)
	require.NoError(t, err)
	if strings.HasSuffix(name, ".json") {
		b = bytes.Replace(b, []byte("{"), []byte(`{ "labels": ["another"], `), 1)
	} else {
		b = append([]byte("another_key = 1\n"), b...)
		if b[len(b)-1] == '\n' {
			b = append(b, "# another hand\n"...)
		}
	}
	require.NoError(t, os.WriteFile(name, b, 0o600))
}
