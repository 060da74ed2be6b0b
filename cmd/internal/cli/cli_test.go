package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

type settings struct {
	Name  string
	Size  int64
	Wait  time.Duration
	Lanes int
	Hosts []string
}

func (s *settings) Flags(fs *pflag.FlagSet) {
	fs.StringVar(&s.Name, "name", s.Name, "a name")
	fs.Var(Size(&s.Size), "size", "a size")
	fs.DurationVar(&s.Wait, "wait", s.Wait, "a time")
	fs.IntVar(&s.Lanes, "up-lanes", s.Lanes, "a number")
	fs.StringSliceVar(&s.Hosts, "host", s.Hosts, "some names")
}

func (s *settings) Validate() error {
	if s.Lanes < 0 {
		return errors.New("up-lanes is negative")
	}
	return nil
}

// execute runs a command named tool; its result is what --help promises.
func execute(t *testing.T, run func(*settings) error, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	s := &settings{Name: "default", Size: 10 << 30, Hosts: []string{"a"}}
	var o, e bytes.Buffer
	code = Command{Use: "tool", Short: "A tool.", Config: s, Run: func(_ context.Context, log *zap.Logger, _ []string) error {
		log.Info("running")
		return run(s)
	}}.Execute(t.Context(), args, &o, &e)
	return code, o.String(), e.String()
}

func file(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "tool.yaml")
	require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
	return name
}

func TestPrecedence(t *testing.T) {
	f := file(t, "name: file\nsize: 2KiB\nwait: 5s\nup-lanes: 3\nhost: [x, y]\n")
	t.Setenv("TOOL_NAME", "variable")
	t.Setenv("TOOL_UP_LANES", "4")
	t.Setenv("TOOL_HOST", "v,w")
	t.Setenv("TOOL_CONFIG", f)
	var got settings
	keep := func(s *settings) error { got = *s; return nil }
	code, _, stderr := execute(t, keep, "--name", "flag")
	require.Zero(t, code, stderr)
	require.Equal(t, settings{"flag", 2048, 5 * time.Second, 4, []string{"v", "w"}}, got)

	t.Setenv("TOOL_HOST", "")
	code, _, stderr = execute(t, keep)
	require.Zero(t, code, stderr)
	require.Equal(t, settings{"variable", 2048, 5 * time.Second, 4, []string{"x", "y"}}, got)

	code, _, stderr = execute(t, keep, "--host=1", "--host=2", "--config", file(t, ""))
	require.Zero(t, code, stderr)
	require.Equal(t, settings{"variable", 10 << 30, 0, 4, []string{"1", "2"}}, got)
}

// What Kubernetes sets for Services, and what is of another command, is no mistake.
func TestMisspeltVariables(t *testing.T) {
	for _, name := range []string{
		"TOOL_NAME", "TOOL_LOG_LEVEL", "TOOL_SERVICE_HOST", "TOOL_SERVICE_PORT", "TOOL_SERVICE_PORT_HTTP", "TOOL_PORT", "TOOL_PORT_8002_TCP",
		"TOOL_PORT_8002_TCP_ADDR", "TOOL_PEERS_SERVICE_HOST", "TOOL_PEERS_PORT_53_UDP_PROTO", "TOOLS_NAM", "OTHER_TOOL_NAM",
	} {
		t.Setenv(name, "info")
	}
	run := func(*settings) error { return nil }
	code, _, stderr := execute(t, run)
	require.Zero(t, code)
	require.NotContains(t, stderr, "names no setting")
	t.Setenv("TOOL_UP_LANE", "s3cret")
	code, _, stderr = execute(t, run)
	require.Zero(t, code)
	require.Contains(t, stderr, `"variable":"TOOL_UP_LANE","nearest":"up-lanes"`)
	require.NotContains(t, stderr, "s3cret")

	fs := pflag.NewFlagSet("tool", pflag.ContinueOnError)
	(&settings{}).Flags(fs)
	environ := []string{"TOOL_MEASURE_NAME=x", "TOOL_MEASURED=x", "TOOL_HELP=x", "TOOL_NAM=", "TOOL_HOST=x", "TOOL_UP_PORT=1"}
	require.Equal(t, []string{"TOOL_MEASURED", "TOOL_HELP", "TOOL_UP_PORT"}, unknown(fs, "TOOL", environ, []Command{{Use: "measure WHAT"}}))
}

func TestWrongUsage(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		says []string
	}{
		"unknown flag":     {[]string{"--nam", "x"}, []string{"--nam", "nearest one is --name", "tool --help"}},
		"argument":         {[]string{"serve"}, []string{"serve"}},
		"malformed flag":   {[]string{"--wait", "5"}, []string{"wait"}},
		"size":             {[]string{"--size", "10 potatoes"}, []string{"size", "GiB"}},
		"invalid":          {[]string{"--up-lanes", "-1"}, []string{"up-lanes is negative"}},
		"log level":        {[]string{"--log-level", "loud"}, []string{"loud", "debug"}},
		"no such file":     {[]string{"--config", "/nowhere/tool.yaml"}, []string{"/nowhere/tool.yaml"}},
		"unknown key":      {[]string{"--config", file(t, "up-lane: 3")}, []string{`"up-lane"`, `"up-lanes"`}},
		"nested key":       {[]string{"--config", file(t, "name: {is: x}")}, []string{`"name.is"`}},
		"key of no file":   {[]string{"--config", file(t, "config: x")}, []string{`"config"`}},
		"no YAML":          {[]string{"--config", file(t, "name: [")}, []string{"yaml"}},
		"list for one":     {[]string{"--config", file(t, "name: [a]")}, []string{"setting name", "plain value"}},
		"list of lists":    {[]string{"--config", file(t, "host: [[a]]")}, []string{"setting host", "plain value"}},
		"malformed value":  {[]string{"--config", file(t, "wait: soon")}, []string{"setting wait", "soon"}},
		"key given twice":  {[]string{"--config", file(t, "name: a\nname: b")}, []string{"name"}},
		"flag of no value": {[]string{"--name"}, []string{"--name"}},
	} {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := execute(t, func(*settings) error { return nil }, c.args...)
			require.Equal(t, ExitUsage, code)
			require.Empty(t, stdout)
			for _, s := range c.says {
				require.Contains(t, stderr, s)
			}
		})
	}
}

func TestExitCodes(t *testing.T) {
	for want, err := range map[int]error{0: nil, 1: errors.New("broke"), 7: fmt.Errorf("broke: %w", WithCode(7, errors.New("so")))} {
		code, _, stderr := execute(t, func(*settings) error { return err })
		require.Equal(t, want, code)
		require.Contains(t, stderr, `"msg":"running"`)
		if err != nil {
			require.Contains(t, stderr, "tool: broke")
			require.NotContains(t, stderr, "--help")
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	code, stdout, _ := execute(t, nil, "--help")
	require.Zero(t, code)
	for _, s := range []string{"A tool.", "TOOL_LOG_LEVEL", "Exit codes: 0", "--size size", "(default 10GiB)", "--config file"} {
		require.Contains(t, stdout, s)
	}
	for _, arg := range []string{"version", "--version"} {
		code, stdout, _ = execute(t, nil, arg)
		require.Zero(t, code)
		require.True(t, strings.HasPrefix(stdout, "tool "+Version+" (go"), stdout)
	}
}

func TestMetricsSayWhatWasBuilt(t *testing.T) {
	families, err := Metrics().Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == "damselfly_build_info" {
			require.Equal(t, "version", f.GetMetric()[0].GetLabel()[1].GetName())
			return
		}
	}
	t.Fatal("no damselfly_build_info")
}

func FuzzSize(f *testing.F) {
	for _, s := range []string{"0", "4096", "512MiB", "10 GB", "-1", "9223372036854775807B", "9223372036854775807KiB", "1.5GiB", "GiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var n, again int64
		if Size(&n).Set(text) != nil {
			return
		}
		require.GreaterOrEqual(t, n, int64(0))
		require.NoError(t, Size(&again).Set(Size(&n).String()))
		require.Equal(t, n, again)
	})
}

func TestSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "4096": 4096, "4096B": 4096, "512MiB": 512 << 20, "10 GB": 10e9, "2TiB": 2 << 40,
		"9223372036854775807": math.MaxInt64,
	} {
		var n int64
		require.NoError(t, Size(&n).Set(text))
		require.Equal(t, want, n)
	}
	for _, text := range []string{"", "-1", "1.5GiB", "GiB", "10G", "9223372036854775807KiB", "1 2"} {
		var n int64
		require.ErrorContains(t, Size(&n).Set(text), "want bytes", text)
	}
}

func TestRate(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "100Mbit": 1e8, "10 Gbit": 1e10, "25Gbit": 25e9, "64Kbit": 64e3, "5bit": 5, "1Tbit": 1e12} {
		var n, again int64
		require.NoError(t, Rate(&n).Set(text))
		require.Equal(t, want, n)
		require.NoError(t, Rate(&again).Set(Rate(&n).String()))
		require.Equal(t, n, again)
	}
	for _, text := range []string{"", "10", "-1Gbit", "1.5Gbit", "Gbit", "10G", "10GB", "9223372036854775807Kbit"} {
		var n int64
		require.ErrorContains(t, Rate(&n).Set(text), "want a whole number", text)
	}
}

func TestCommandsUnderOne(t *testing.T) {
	outer, inner := &settings{}, &settings{Name: "default"}
	var o, e bytes.Buffer
	c := Command{
		Use: "tool", Config: outer, Run: func(context.Context, *zap.Logger, []string) error { return errors.New("the wrong one") },
		Commands: []Command{{Use: "measure", Config: inner, Run: func(context.Context, *zap.Logger, []string) error { return errors.New("broke") }}},
	}
	t.Setenv("TOOL_MEASURE_NAME", "variable")
	require.Equal(t, ExitFailure, c.Execute(t.Context(), []string{"measure", "--size", "1KiB"}, &o, &e))
	require.Equal(t, "tool measure: broke\n", e.String())
	require.Equal(t, settings{Name: "variable", Size: 1024}, *inner)
	e.Reset()
	require.Equal(t, ExitUsage, c.Execute(t.Context(), []string{"measure", "--up-lanes", "-1"}, &o, &e))
	require.Contains(t, e.String(), "See tool measure --help.")
}
