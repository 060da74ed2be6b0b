package setup

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

const (
	registriesConf = "/etc/containers/registries.conf"
	registriesDir  = "/etc/containers/registries.conf.d"
	dropIn         = registriesDir + "/damselfly.conf"
)

// commonRegistries are those that podman and CRI-O get where none is named: they
// know no entry for all.
var commonRegistries = []Registry{{Name: "docker.io"}, {Name: "ghcr.io"}, {Name: "quay.io"}, {Name: "registry.k8s.io"}}

// registryEntry is a [[registry]] of a registries.conf.
type registryEntry struct {
	*file
	doc    map[string]any
	es     []expression
	index  int // among those of its file
	fields map[string]any
}

func (r registryEntry) text(key string) string {
	s, _ := r.fields[key].(string)
	return strings.TrimRight(s, "/")
}

// prefix is what an entry is for.
func (r registryEntry) prefix() string {
	if p := r.text("prefix"); p != "" {
		return p
	}
	return r.text("location")
}

// setupRegistries gives each registry a mirror: in an entry that is there, for a
// second one in another file would replace it whole, else in a file of our own.
func (t *tree) setupRegistries(c Config) error {
	c, err := t.named(c)
	if err != nil {
		return err
	}
	asked := slices.Clone(c.Registries)
	for _, r := range commonRegistries {
		if c.common && !slices.Contains(asked, r) {
			asked = append(asked, r)
		}
	}
	var own strings.Builder
	var edits []Edit
	for i, r := range asked {
		entries, err := t.registryEntries()
		if err != nil {
			return err
		}
		if e, ok := entryFor(entries, r.Name); ok {
			err := t.setupEntry(e, r, c)
			switch {
			case errors.Is(err, errStays) && i >= len(c.Registries):
				t.note("%s: %v", e.path, err)
			case errors.Is(err, errStays):
				return fmt.Errorf("%s: %w: change that, or leave %s out of --registry", e.path, err, r.Name)
			case err != nil:
				return fmt.Errorf("%s: %w", e.path, err)
			}
			continue
		}
		at, err := mirrorPath(c, r, r.Name)
		if err != nil {
			return err
		}
		block := fmt.Sprintf("\n[[registry]]\nlocation = %q\n[[registry.mirror]]\nlocation = %q\ninsecure = true\n", r.Name, at)
		own.WriteString(block)
		edits = append(edits, Edit{New: block, Mark: fmt.Sprintf("%q", at)})
		for prefix, e := range entries {
			if strings.HasPrefix(prefix, r.Name+"/") {
				t.note("%s has an entry of its own in %s and is not pulled through dfdaemon by this", prefix, e.path)
			}
		}
	}
	if own.Len() == 0 {
		return nil
	}
	f, err := t.open(dropIn)
	if err != nil {
		return err
	}
	if f.stays {
		return fmt.Errorf("%s is there, by another hand: move it away", f.path)
	}
	head := ours + ": the host's dfdaemon first, then the registry itself\n"
	return t.edit(f, []byte(head+own.String()), append([]Edit{{New: head, Mark: head}}, edits...))
}

// entryFor returns the entry that counts for a registry: its own, or the longest
// of those that are for all names below one.
func entryFor(entries map[string]registryEntry, registry string) (best registryEntry, ok bool) {
	if e, ok := entries[registry]; ok {
		return e, true
	}
	for prefix, e := range entries {
		below, wild := strings.CutPrefix(prefix, "*")
		if wild && strings.HasSuffix(registry, below) && (!ok || len(prefix) > len(best.prefix())) {
			best, ok = e, true
		}
	}
	return best, ok
}

// errStays is an entry's that keeps a registry from having a mirror.
var errStays = errors.New("dfdaemon's entry has no place there")

// mirrorPath is a mirror's location for what is at location.
func mirrorPath(c Config, r Registry, location string) (string, error) {
	if r.As != "" {
		location = r.As
	}
	if host, _, _ := strings.Cut(location, "/"); strings.Contains(host, ":") {
		return "", fmt.Errorf("%s: podman and CRI-O name the registry in the mirror's path, where no port can be: give dfdaemon a name for it without one (--registry NAME=http://%s) and run this with --registry %s=NAME",
			location, host, r.Name)
	}
	return c.Mirror + "/" + location, nil
}

// registryEntries returns the entry that counts for each prefix: the first of a
// file, and of files the last.
func (t *tree) registryEntries() (map[string]registryEntry, error) {
	names, err := t.files(registriesDir)
	if err != nil {
		return nil, err
	}
	paths := []string{registriesConf}
	for _, name := range names {
		if strings.HasSuffix(name, ".conf") {
			paths = append(paths, path.Join(registriesDir, name))
		}
	}
	entries := map[string]registryEntry{}
	for _, name := range paths {
		f, err := t.open(name)
		if err != nil {
			return nil, err
		}
		doc, es, err := parseTOML(f.now)
		if err != nil {
			return nil, fmt.Errorf("%s: %w; mend it first", f.path, err)
		}
		list, _ := doc["registry"].([]any)
		for i, v := range slices.Backward(list) {
			fields, _ := v.(map[string]any)
			e := registryEntry{f, doc, es, i, fields}
			entries[e.prefix()] = e
		}
		for _, kind := range []string{"insecure", "block"} { // of the first version of the file
			list, _ := lookup(doc, "registries", kind, "registries").([]any)
			for _, v := range list {
				s, _ := v.(string)
				entries[s] = registryEntry{f, doc, es, -1, nil}
			}
		}
	}
	return entries, nil
}

// setupEntry puts the mirror before those of an entry.
func (t *tree) setupEntry(e registryEntry, r Registry, c Config) error {
	if e.index < 0 {
		return fmt.Errorf("it is of version 1 and says more of %s, which a second entry would end: write it as [[registry]] tables, and run this again", r.Name)
	}
	switch {
	case e.fields["blocked"] == true:
		return fmt.Errorf("%s is blocked, and %w", r.Name, errStays)
	case e.prefix() != r.Name:
		return fmt.Errorf("%s falls under %s, and %w", r.Name, e.prefix(), errStays)
	}
	location := e.text("location")
	at, err := mirrorPath(c, r, location)
	if err != nil {
		return err
	}
	after, edits, err := editEntry(e, at)
	if err != nil {
		return err
	}
	if edits == nil {
		t.note("%s has the mirror %s already, by another hand: it stays", e.path, at)
		return nil
	}
	return t.edit(e.file, after, edits)
}

// editEntry makes at the first mirror of an entry, and no edits where it is one.
func editEntry(e registryEntry, at string) ([]byte, []Edit, error) {
	mirrors, _ := e.fields["mirror"].([]any)
	for _, m := range mirrors {
		if lookup(map[string]any{"m": m}, "m", "location") == at {
			return e.now, nil, nil
		}
	}
	n, off := -1, len(e.now)
	for _, x := range e.es {
		if x.kind == unstable.ArrayTable && slices.Equal(x.table, []string{"registry"}) {
			n++
			if n == e.index {
				continue
			}
		}
		if n > e.index || n == e.index && x.kind != unstable.KeyValue { // the entry's own keys have ended
			off = aboveComments(e.now, x.at)
			break
		}
	}
	lines := fmt.Sprintf("[[registry.mirror]] %s\nlocation = %q\ninsecure = true\n", ours, at)
	after, edit := insert(e.now, off, lines, fmt.Sprintf("%q", at))
	e.fields["mirror"] = append([]any{map[string]any{"location": at, "insecure": true}}, mirrors...)
	if n < e.index || !means(after, e.doc) {
		return nil, nil, fmt.Errorf("no mirror fits into its entry for %s: write its mirrors as [[registry.mirror]] tables, and run this again", e.prefix())
	}
	return after, []Edit{edit}, nil
}
