package cli

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// ListVar binds a setting whose value is a list of things with keys, those of T's
// tags: in a file as it stands there, in a flag or a variable as YAML. set gets
// the list, whole each time.
func ListVar[T any](fs *pflag.FlagSet, name, usage string, set func([]T)) {
	fs.Var(&list[T]{name, set}, name, usage)
}

type list[T any] struct {
	name string // of the setting
	set  func([]T)
}

// Type is what --help calls a value.
func (l *list[T]) Type() string { return "YAML" }

// String is the default in --help.
func (l *list[T]) String() string { return "" }

// Set takes a list in YAML.
func (l *list[T]) Set(s string) error {
	var v any
	if err := yaml.Unmarshal([]byte(s), &v); err != nil {
		return fmt.Errorf("want a list in YAML: %w", err)
	}
	return l.SetTree(v)
}

// SetTree takes what a YAML file has there.
func (l *list[T]) SetTree(v any) error {
	if v == nil {
		v = []any{}
	}
	if _, ok := v.([]any); !ok {
		return errors.New("want a list: each of its items begins with a dash, with its keys below")
	}
	var read mapstructure.Metadata
	var items []T
	d, err := mapstructure.NewDecoder(&mapstructure.DecoderConfig{
		Result: &items, Metadata: &read, DecodeHook: duration,
	})
	if err != nil {
		return err
	}
	if err := d.Decode(v); err != nil {
		return l.readable(err)
	}
	if len(read.Unused) > 0 {
		slices.Sort(read.Unused)
		return fmt.Errorf("%s%s: there is no such key: docs/operating.md lists them", l.name, read.Unused[0])
	}
	l.set(items)
	return nil
}

// duration takes a time with a unit. A bare number would be nanoseconds.
func duration(_, to reflect.Type, data any) (any, error) {
	if to != reflect.TypeFor[time.Duration]() {
		return data, nil
	}
	text := fmt.Sprint(data)
	d, err := time.ParseDuration(text)
	if err != nil {
		return nil, fmt.Errorf("%.100s: want a time with a unit, such as 3s", text)
	}
	return d, nil
}

// index is where mapstructure's errors name a key: "[0].mirrors[1].url".
var index = regexp.MustCompile(`'(\[[0-9]+\][^']*)'`)

// readable names keys as they are in the file, one error of several.
func (l *list[T]) readable(err error) error {
	if e, ok := errors.AsType[*mapstructure.DecodeError](err); ok {
		return fmt.Errorf("%s%s: %w", l.name, e.Name(), e.Unwrap())
	}
	return errors.New(index.ReplaceAllString(err.Error(), l.name+"$1"))
}
