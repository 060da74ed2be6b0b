// Package upstream is the flags that say which registries there are.
package upstream

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"damselfly.dev/registryproxy"
)

// Flags binds --registry, --registries and --default-registry.
func Flags(fs *pflag.FlagSet, cfg *registryproxy.Config) {
	all := &registries{cfg: cfg}
	fs.Var((*short)(all), "registry",
		"a registry that is not at https://NAME, as NAME=URL such as docker.io=https://cache.corp/hub; may be repeated")
	fs.Var((*long)(all), "registries",
		"registries with mirrors, certificates, credentials or times of their own, as a list in YAML: see docs/operating.md")
	fs.StringVar(&cfg.Default, "default-registry", cfg.Default,
		"the registry of a request that names none; empty: such a request is refused")
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

// long is upstreams with all that can be said of them.
type long registries

// Type is what --help calls a value.
func (l *long) Type() string { return "YAML" }

// String is the default in --help.
func (l *long) String() string { return "" }

// Set takes a list in YAML.
func (l *long) Set(s string) error {
	var v any
	if err := yaml.Unmarshal([]byte(s), &v); err != nil {
		return fmt.Errorf("want a list in YAML: %w", err)
	}
	return l.SetTree(v)
}

// SetTree takes what a YAML file has there.
func (l *long) SetTree(v any) error {
	if v == nil {
		v = []any{}
	}
	if _, ok := v.([]any); !ok {
		return errors.New("want a list: - name: docker.io, then its other keys below")
	}
	var list []registryproxy.Upstream
	var read mapstructure.Metadata
	d, err := mapstructure.NewDecoder(&mapstructure.DecoderConfig{
		Result: &list, Metadata: &read, DecodeHook: mapstructure.StringToTimeDurationHookFunc(),
	})
	if err != nil {
		return err
	}
	if err := d.Decode(v); err != nil {
		return readable(err)
	}
	if len(read.Unused) > 0 {
		slices.Sort(read.Unused)
		return fmt.Errorf("registries%s: there is no such key: docs/operating.md lists them", read.Unused[0])
	}
	l.long = list
	(*registries)(l).set()
	return nil
}

// index is where mapstructure's errors name a key: "[0].mirrors[1].url".
var index = regexp.MustCompile(`'(\[[0-9]+\][^']*)'`)

// readable names keys as they are in the file, one error of several.
func readable(err error) error {
	if e, ok := errors.AsType[*mapstructure.DecodeError](err); ok {
		return fmt.Errorf("registries%s: %w", e.Name(), e.Unwrap())
	}
	return errors.New(index.ReplaceAllString(err.Error(), "registries$1"))
}
