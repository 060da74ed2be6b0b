package cli

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
)

const configFlag = "config"

// isSetting tells flags that have a place in a file from those that do not.
func isSetting(name string) bool {
	return !slices.Contains([]string{configFlag, "help", "version"}, name)
}

// load sets the flags that the command line has not set, from the environment
// and the file. Every value goes through its flag's parser.
func load(fs *pflag.FlagSet, env string) error {
	v := viper.New()
	v.SetEnvPrefix(env)
	v.SetEnvKeyReplacer(strings.NewReplacer("-", "_"))
	v.AutomaticEnv()
	file := fs.Lookup(configFlag).Value.String()
	if file == "" {
		file = v.GetString(configFlag)
	}
	if file != "" {
		v.SetConfigFile(file)
		v.SetConfigType("yaml")
		if err := v.ReadInConfig(); err != nil {
			return fmt.Errorf("read settings from %s: %w", file, err)
		}
	}
	for _, key := range v.AllKeys() {
		if top, _, below := strings.Cut(key, "."); below && fs.Lookup(top) != nil && isSetting(top) {
			return fmt.Errorf("read settings from %s: unknown key %q: %s has a plain value, or a list whose items begin with a dash", file, key, top)
		}
		if fs.Lookup(key) == nil || !isSetting(key) {
			return fmt.Errorf("read settings from %s: unknown key %q, the nearest one is %q", file, key, nearest(fs, key))
		}
	}
	var first error
	fs.VisitAll(func(f *pflag.Flag) {
		if first != nil || f.Changed || !isSetting(f.Name) {
			return
		}
		if value := v.Get(f.Name); value != nil {
			if err := set(f.Value, value); err != nil {
				first = fmt.Errorf("setting %s: %w", f.Name, err)
			}
		}
	})
	return first
}

// serviceVariable is one that Kubernetes gives a pod for a Service, whose name may
// begin like a command's; *_SERVICE_HOST is always among them.
var serviceVariable = regexp.MustCompile(`^(.+?)_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$`)

// unknown returns those of environ, as os.Environ has it, that begin with env and
// name no setting, but for variables of the commands under this one and of
// Kubernetes.
func unknown(fs *pflag.FlagSet, env string, environ []string, under []Command) []string {
	var names []string
	for _, v := range environ {
		name, value, _ := strings.Cut(v, "=")
		key, ours := settingOf(name, env)
		service := serviceVariable.FindStringSubmatch(name)
		switch {
		case !ours || value == "", fs.Lookup(key) != nil && (isSetting(key) || key == configFlag):
		case slices.ContainsFunc(under, func(c Command) bool { return strings.HasPrefix(key, c.name()+"-") }):
		case service != nil && slices.ContainsFunc(environ, func(v string) bool { return strings.HasPrefix(v, service[1]+"_SERVICE_HOST=") }):
		default:
			names = append(names, name)
		}
	}
	return names
}

// settingOf returns the setting that a variable would be of.
func settingOf(variable, env string) (key string, ours bool) {
	key, ours = strings.CutPrefix(variable, env+"_")
	return strings.ReplaceAll(strings.ToLower(key), "_", "-"), ours
}

// tree is a flag that takes more than a plain value, or a list of them.
type tree interface{ SetTree(value any) error }

// set gives a flag a value from a file, which may be a list, or a variable.
func set(v pflag.Value, value any) error {
	if t, ok := v.(tree); ok {
		if _, text := value.(string); !text {
			return t.SetTree(value)
		}
	}
	many, takesMany := v.(pflag.SliceValue)
	list, isList := value.([]any)
	if !takesMany || !isList {
		s, err := plain(value)
		if err != nil {
			return err
		}
		return v.Set(s)
	}
	items := make([]string, len(list))
	for i, item := range list {
		var err error
		if items[i], err = plain(item); err != nil {
			return err
		}
	}
	return many.Replace(items)
}

func plain(value any) (string, error) {
	switch value.(type) {
	case string, bool, int, int64, uint64, float64:
		return fmt.Sprint(value), nil
	}
	return "", errors.New("want a plain value")
}

// nearest returns the setting whose name takes the fewest edits to be key.
func nearest(fs *pflag.FlagSet, key string) string {
	best, found := math.MaxInt, ""
	fs.VisitAll(func(f *pflag.Flag) {
		if d := edits(key, f.Name); isSetting(f.Name) && d < best {
			best, found = d, f.Name
		}
	})
	return found
}

// edits is the Levenshtein distance.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			swap := diagonal
			if a[i] != b[j] {
				swap++
			}
			diagonal, row[j+1] = row[j+1], min(swap, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
