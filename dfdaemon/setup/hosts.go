package setup

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// dialTimeout is how long containerd 2 waits for a dfdaemon that is not there
// before it asks the registry; containerd 1 knows no such setting.
const dialTimeout = "200ms"

// certificates are those that a directory of a registry holds in Docker's
// manner. They count only where there is no hosts.toml, so ours must name them.
type certificates struct {
	ca    []string
	pairs [][2]string // certificate and key, which may be ""
}

// certificatesOf picks them from the names of a directory's files.
func certificatesOf(names []string) (c certificates) {
	for _, name := range names {
		switch path.Ext(name) {
		case ".crt":
			c.ca = append(c.ca, name)
		case ".cert":
			key := strings.TrimSuffix(name, ".cert") + ".key"
			if !slices.Contains(names, key) {
				key = ""
			}
			c.pairs = append(c.pairs, [2]string{name, key})
		}
	}
	return c
}

// lines are those that make a hosts.toml say the same.
func (c certificates) lines() string {
	var b strings.Builder
	if len(c.ca) > 0 {
		fmt.Fprintf(&b, "ca = [%s]\n", quoted(c.ca))
	}
	pairs := make([]string, len(c.pairs))
	for i, p := range c.pairs {
		pairs[i] = fmt.Sprintf("[%s]", quoted(p[:]))
		if p[1] == "" {
			pairs[i] = fmt.Sprintf("%q", p[0])
		}
	}
	if len(pairs) > 0 {
		fmt.Fprintf(&b, "client = [%s]\n", strings.Join(pairs, ", "))
	}
	return b.String()
}

func quoted(list []string) string {
	q := make([]string, len(list))
	for i, s := range list {
		q[i] = fmt.Sprintf("%q", s)
	}
	return strings.Join(q, ", ")
}

// editHosts makes mirror, a URL, the first host of a hosts.toml. No server is
// named: the registry itself stays the last to be asked, as without the file.
// There are no edits where the mirror was there already.
func editHosts(b []byte, mirror string, certs certificates) ([]byte, []Edit, error) {
	doc, es, err := parseTOML(b)
	if err != nil {
		return nil, nil, fmt.Errorf("%w; mend it, or move it away", err)
	}
	if lookup(doc, "host", mirror) != nil || lookup(doc, "host", mirror+"/") != nil {
		return b, nil, nil
	}
	at := len(b)
	for _, e := range es {
		if e.kind == unstable.KeyValue && len(e.table) == 0 && e.key[0] == "host" {
			return nil, nil, errors.New("its hosts are not tables of their own: write each as [host.\"URL\"], or move the file away")
		}
		if e.kind != unstable.KeyValue && e.table[0] == "host" {
			at = aboveComments(b, e.at)
			break
		}
	}
	block := fmt.Sprintf("%s\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = %q\n", ours, mirror, dialTimeout)
	switch {
	case len(b) == 0: // containerd reads an empty file as if there were none
		block = certs.lines() + block
	case at < len(b):
		block += "\n"
	}
	put(doc, map[string]any{"capabilities": []any{"pull", "resolve"}, "dial_timeout": dialTimeout}, "host", mirror)
	after, edit := insert(b, at, block, fmt.Sprintf("%q", mirror))
	if len(b) > 0 && !means(after, doc) {
		return nil, nil, errors.New("no table fits in: write each host as [host.\"URL\"], or move the file away")
	}
	return after, []Edit{edit}, nil
}

// hostDirs are the names under which containerd looks for a registry's
// directory, in its order, but for _default.
func hostDirs(registry string) []string {
	if i := strings.LastIndexByte(registry, ':'); i > 0 {
		return []string{registry[:i] + "_" + registry[i+1:] + "_", registry}
	}
	return []string{registry}
}
