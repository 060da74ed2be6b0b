// Package upstream is the flags that say which registries there are.
package upstream

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"damselfly.dev/registryproxy"
)

// Flags binds --registry and --default-registry.
func Flags(fs *pflag.FlagSet, cfg *registryproxy.Config) {
	fs.Var((*list)(&cfg.Upstreams), "registry",
		"a registry that is not at https://NAME, as NAME=URL such as docker.io=https://cache.corp/hub; may be repeated")
	fs.StringVar(&cfg.Default, "default-registry", cfg.Default,
		"the registry of a request that names none; empty: such a request is refused")
}

// list is upstreams as the value of a flag.
type list []registryproxy.Upstream

// Type is what --help calls a value.
func (l *list) Type() string { return "NAME=URL" }

// String is the default in --help.
func (l *list) String() string { return strings.Join(l.GetSlice(), ",") }

// Set adds to the list; commas separate several.
func (l *list) Set(s string) error {
	for item := range strings.SplitSeq(s, ",") {
		if err := l.Append(item); err != nil {
			return err
		}
	}
	return nil
}

// Append adds one.
func (l *list) Append(s string) error {
	name, url, ok := strings.Cut(s, "=")
	if !ok || name == "" || url == "" {
		return fmt.Errorf("registry %q: want NAME=URL", name) // the URL may hold a password
	}
	*l = append(*l, registryproxy.Upstream{Name: name, URL: url})
	return nil
}

// Replace sets the whole list.
func (l *list) Replace(items []string) error {
	*l = nil
	for _, s := range items {
		if err := l.Append(s); err != nil {
			return err
		}
	}
	return nil
}

// GetSlice returns the list in the form of Replace.
func (l *list) GetSlice() []string {
	items := make([]string, len(*l))
	for i, u := range *l {
		items[i] = u.Name + "=" + u.URL
	}
	return items
}
