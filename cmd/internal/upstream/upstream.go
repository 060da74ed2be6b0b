// Package upstream is the flags that say which registries there are.
package upstream

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/registryproxy"
)

// Flags binds --registry, --registries and --default-registry.
func Flags(fs *pflag.FlagSet, cfg *registryproxy.Config) {
	all := &registries{cfg: cfg}
	fs.Var((*short)(all), "registry",
		"a registry that is not at https://NAME, as NAME=URL such as docker.io=https://cache.corp/hub; may be repeated")
	cli.ListVar(fs, "registries",
		"registries with mirrors, certificates, credentials or times of their own, as a list in YAML: see docs/operating.md",
		func(long []registryproxy.Upstream) {
			all.long = long
			all.set()
		})
	fs.StringVar(&cfg.Default, "default-registry", cfg.Default,
		"the registry of a request that names none; empty: such a request is refused")
	fs.StringSliceVar((*[]string)(&cfg.Allow), "allow", cfg.Allow,
		"`host`s that are asked on behalf of others beside the registries named here, exact or *.corp, also in private networks; *: all that are public, and the default")
	fs.StringSliceVar((*[]string)(&cfg.AllowAddresses), "allow-address", cfg.AllowAddresses,
		"`network`s that are asked on behalf of others though they are not public, such as 10.0.0.0/8; may be repeated")
}

// registries is what both flags say, together in cfg.
type registries struct {
	cfg         *registryproxy.Config
	short, long []registryproxy.Upstream
}

func (r *registries) set() { r.cfg.Upstreams = slices.Concat(r.long, r.short) }

// short is upstreams as NAME=URL.
type short registries

// Type is what --help calls a value.
func (l *short) Type() string { return "NAME=URL" }

// String is the default in --help.
func (l *short) String() string { return strings.Join(l.GetSlice(), ",") }

// Set adds to the list; commas separate several.
func (l *short) Set(s string) error {
	for item := range strings.SplitSeq(s, ",") {
		if err := l.Append(item); err != nil {
			return err
		}
	}
	return nil
}

// Append adds one.
func (l *short) Append(s string) error {
	name, url, ok := strings.Cut(s, "=")
	if !ok || name == "" || url == "" {
		return fmt.Errorf("registry %q: want NAME=URL", name) // the URL may hold a password
	}
	l.short = append(l.short, registryproxy.Upstream{Name: name, URL: url})
	(*registries)(l).set()
	return nil
}

// Replace sets the whole list.
func (l *short) Replace(items []string) error {
	l.short = nil
	(*registries)(l).set()
	for _, s := range items {
		if err := l.Append(s); err != nil {
			return err
		}
	}
	return nil
}

// GetSlice returns the list in the form of Replace.
func (l *short) GetSlice() []string {
	items := make([]string, len(l.short))
	for i, u := range l.short {
		items[i] = u.Name + "=" + u.URL
	}
	return items
}
