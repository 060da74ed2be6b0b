package setup

import (
	"bytes"
	"fmt"
	"net/url"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

const (
	containerdConfig = "/etc/containerd/config.toml"
	containerdCerts  = "/etc/containerd/certs.d"
	dockerCerts      = "/etc/docker/certs.d"
	hostsFile        = "hosts.toml"
	defaultDir       = "_default"
)

// setupContainerd gives each registry, or with none all of them, a hosts.toml,
// and sees to it that containerd reads them.
func (t *tree) setupContainerd(c Config) error {
	roots, version, err := t.configPath()
	if err != nil {
		return err
	}
	if version < 3 { // that of containerd 2 alone, which reads any
		if c, err = t.named(c); err != nil {
			return err
		}
	}
	if len(roots) > 1 {
		t.note("containerd 2.1 and later read no list of directories (config_path = %q) unless use_local_image_pull is set: name one", strings.Join(roots, ":"))
	}
	if len(c.Registries) == 0 {
		return t.setupDefault(roots, c)
	}
	for _, r := range c.Registries {
		root, dir := roots[0], ""
		for _, at := range roots {
			if dir = t.hostDir(at, r.Name); dir != "" {
				root = at
				break
			}
		}
		if dir == "" {
			dir = hostDirs(r.Name)[0]
		}
		if err := t.setupHosts(path.Join(root, dir), c.url()); err != nil {
			return err
		}
	}
	return nil
}

// hostDir returns the name of a registry's own directory in root, "" for none.
func (t *tree) hostDir(root, registry string) string {
	for _, name := range hostDirs(registry) {
		if t.isDir(path.Join(root, name)) {
			return name
		}
	}
	return ""
}

// setupDefault writes the hosts.toml of the registries that have none. It hides
// all directories in the roots behind its own, so that it goes into the last in use.
func (t *tree) setupDefault(roots []string, c Config) error {
	at := roots[0]
	for _, root := range roots {
		names := t.dirs(root)
		if len(names) > 0 {
			at = root
		}
		if slices.Contains(names, defaultDir) {
			break
		}
	}
	for _, root := range roots {
		for _, name := range t.dirs(root) {
			if name != defaultDir {
				t.note("%s has a directory of its own in %s and is not pulled through dfdaemon by this: name it with --registry where it should be", name, root)
			}
		}
	}
	return t.setupHosts(path.Join(at, defaultDir), c.url())
}

// setupHosts puts the mirror into the hosts.toml of a directory.
func (t *tree) setupHosts(dir, mirror string) error {
	name := path.Join(dir, hostsFile)
	f, err := t.open(name)
	if err != nil {
		return err
	}
	names, err := t.files(dir)
	if err != nil {
		return err
	}
	after, edits, err := editHosts(f.now, mirror, certificatesOf(names))
	if err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	if edits == nil {
		t.note("%s has %s already, by another hand: it stays", f.path, mirror)
		return nil
	}
	if server, ok := serverOf(f.now); ok && path.Base(dir) != defaultDir && server != "https://"+path.Base(dir) && server != "https://registry-1.docker.io" {
		t.note("%s names another server, %s: let dfdaemon ask it too, with --registry %s=%s", f.path, server, path.Base(dir), server)
	}
	return t.edit(f, after, edits)
}

// serverOf returns the server that a hosts.toml names, without credentials.
func serverOf(b []byte) (string, bool) {
	doc, _, err := parseTOML(b)
	if err != nil {
		return "", false
	}
	s, _ := doc["server"].(string)
	u, err := url.Parse(s)
	if s == "" || err != nil {
		return "", false
	}
	u.User, u.RawQuery = nil, ""
	return u.String(), true
}

// config is one file of containerd's configuration.
type config struct {
	*file
	doc map[string]any
	es  []expression
}

// cri is the table of the plugin that pulls for Kubernetes, by the version of
// the file.
func (c config) cri() []string {
	switch v, _ := c.doc["version"].(int64); {
	case v <= 1:
		return []string{"plugins", "cri"}
	case v == 2:
		return []string{"plugins", "io.containerd.grpc.v1.cri"}
	default:
		return []string{"plugins", "io.containerd.cri.v1.images"}
	}
}

func (c config) registry(key string) any {
	return lookup(c.doc, append(c.cri(), "registry", key)...)
}

// configPath returns the directories in which containerd looks for hosts.toml,
// and sets one where none is set; version is that of its configuration.
func (t *tree) configPath() (roots []string, version int64, err error) {
	files, err := t.containerdFiles()
	if err != nil {
		return nil, 0, err
	}
	version, _ = files[0].doc["version"].(int64)
	target, set := files[0], ""
	for _, c := range files {
		if err := c.conflict(); err != nil {
			return nil, 0, fmt.Errorf("%s: %w", c.path, err)
		}
		if c.disabled() {
			t.note("%s turns CRI off: Kubernetes cannot pull with this containerd; nerdctl reads %s by itself, ctr with --hosts-dir", c.path, containerdCerts)
			return []string{containerdCerts}, version, nil
		}
		if lookup(c.doc, c.cri()...) != nil { // containerd 1 takes the last such table whole
			target = c
		}
		if s, _ := c.registry("config_path").(string); s != "" {
			set = s
		}
	}
	if s, _ := target.registry("config_path").(string); s == "" {
		if err := t.setConfigPath(target, set); err != nil {
			return nil, 0, err
		}
	}
	if set == "" {
		set = containerdCerts
	}
	roots = slices.DeleteFunc(filepath.SplitList(set), func(s string) bool { return s == "" })
	for _, root := range roots {
		if !path.IsAbs(root) {
			return nil, 0, fmt.Errorf("config_path %q in %s is not absolute: make it so", set, target.path)
		}
	}
	return roots, version, nil
}

func (t *tree) setConfigPath(c config, dir string) error {
	if dir == "" {
		dir = containerdCerts
		if names := t.dirs(dockerCerts); len(names) > 0 {
			t.note("containerd 2.0, which reads %s where nothing else is set, does so no longer: copy %s to %s where it needs them", dockerCerts, strings.Join(names, ", "), dir)
		}
	}
	after, edit, err := editConfigPath(c.now, c.doc, c.es, append(c.cri(), "registry"), dir)
	if err != nil {
		return fmt.Errorf("%s: %w", c.path, err)
	}
	return t.edit(c.file, after, []Edit{edit})
}

// containerdFiles returns config.toml and what it imports, in the order in which
// containerd reads them.
func (t *tree) containerdFiles() ([]config, error) {
	var files []config
	pending := []string{containerdConfig}
	for seen := map[string]bool{}; len(pending) > 0; pending = pending[1:] {
		name := pending[0]
		if seen[name] {
			continue
		}
		seen[name] = true
		f, err := t.open(name)
		if err != nil {
			return nil, err
		}
		if len(files) == 0 && len(bytes.TrimSpace(f.now)) == 0 { // becomes one of version 2, which containerd 1 and 2 read
			return []config{{f, map[string]any{"version": int64(2)}, nil}}, nil
		}
		doc, es, err := parseTOML(f.now)
		if err != nil {
			return nil, fmt.Errorf("%s: %w; mend it first", f.path, err)
		}
		files = append(files, config{f, doc, es})
		imports, _ := doc["imports"].([]any)
		for _, v := range imports {
			pattern, _ := v.(string)
			if !path.IsAbs(pattern) {
				pattern = path.Join(path.Dir(name), pattern)
			}
			names, err := t.glob(pattern)
			if err != nil {
				return nil, err
			}
			pending = append(pending, names...)
		}
	}
	return files, nil
}

// conflict tells what containerd does not take beside config_path.
func (c config) conflict() error {
	table := tableName(append(c.cri(), "registry"))
	if m, _ := c.registry("mirrors").(map[string]any); len(m) > 0 {
		return fmt.Errorf("containerd refuses [%s.mirrors] beside config_path, which dfdaemon's entry needs: write each mirror to %s/HOST/%s, take the table out, and run this again",
			table, containerdCerts, hostsFile)
	}
	m, _ := c.registry("configs").(map[string]any)
	for host := range m {
		if lookup(m, host, "tls") != nil {
			return fmt.Errorf("containerd refuses [%s.configs.%q.tls] beside config_path, which dfdaemon's entry needs: write it to %s/%s/%s, take the table out, and run this again",
				table, host, containerdCerts, host, hostsFile)
		}
	}
	return nil
}

func (c config) disabled() bool {
	list, _ := c.doc["disabled_plugins"].([]any)
	return slices.ContainsFunc(list, func(v any) bool {
		return v == "cri" || v == "io.containerd.grpc.v1.cri" || v == "io.containerd.cri.v1.images"
	})
}

// editConfigPath sets config_path in a table of a text.
func editConfigPath(b []byte, doc map[string]any, es []expression, table []string, dir string) (after []byte, edit Edit, err error) {
	line := fmt.Sprintf("config_path = %q %s\n", dir, ours)
	header, key := -1, -1
	for i, e := range es {
		if e.kind == unstable.Table && slices.Equal(e.table, table) {
			header = i
		}
		if e.kind == unstable.KeyValue && slices.Equal(slices.Concat(e.table, e.key), append(table, "config_path")) {
			key = i
		}
	}
	switch {
	case key >= 0:
		after, edit = replaceValue(b, es[key], fmt.Sprintf("%q %s", dir, ours))
	case header >= 0:
		at := es[header].at
		indent := b[at : at+len(b[at:])-len(bytes.TrimLeft(b[at:], " \t"))]
		at = lineEnd(b, at)
		after, edit = insert(b, at, string(indent)+"  "+line, "config_path = ")
	case len(bytes.TrimSpace(b)) == 0:
		after, edit = insert(b, 0, fmt.Sprintf("%s\nversion = 2\n[%s]\n  %s", ours, tableName(table), line), "config_path = ")
	default:
		after, edit = insert(b, len(b), fmt.Sprintf("\n[%s] %s\n  %s", tableName(table), ours, line), "config_path = ")
	}
	edit.Mark = strings.TrimSuffix(line, "\n")
	put(doc, dir, append(table, "config_path")...)
	if !means(after, doc) {
		return nil, Edit{}, fmt.Errorf("it is written so that no line fits in: set config_path = %q in [%s] by hand, and run this again", dir, tableName(table))
	}
	return after, edit, nil
}

// replaceValue puts text where the value of a key stands.
func replaceValue(b []byte, e expression, text string) ([]byte, Edit) {
	end := lineEnd(b, e.value[1])
	old := string(b[e.at:end])
	line := string(b[e.at:e.value[0]]) + text + string(b[e.value[1]:end])
	return splice(b, e.at, end, line), Edit{Old: old, New: line}
}

// lineEnd returns where the line at off has ended.
func lineEnd(b []byte, off int) int {
	if i := bytes.IndexByte(b[off:], '\n'); i >= 0 {
		return off + i + 1
	}
	return len(b)
}

// tableName writes a path as TOML does.
func tableName(path []string) string {
	elems := make([]string, len(path))
	for i, e := range path {
		elems[i] = e
		if strings.Contains(e, ".") {
			elems[i] = fmt.Sprintf("%q", e)
		}
	}
	return strings.Join(elems, ".")
}
