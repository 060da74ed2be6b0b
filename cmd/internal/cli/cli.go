// Package cli is what the commands share: settings from flags, variables and a
// file, the log, signals and exit codes.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Exit codes of every command; a command's own begin at 3.
const (
	ExitOK      = 0
	ExitFailure = 1
	ExitUsage   = 2
)

// Version is what was built; the linker sets it.
var Version = "dev"

// Config is a command's settings.
type Config interface {
	// Flags makes each setting a flag with its present value as the default.
	// The flag's name is the setting's key in a file, and, in upper case with
	// '_' for '-' after the command's name, its environment variable.
	Flags(fs *pflag.FlagSet)
	// Validate tells what is wrong with the settings, all of which are set.
	Validate() error
}

// Command is one of Damselfly's programs.
type Command struct {
	Use    string // the command's name, then its arguments for --help
	Short  string // one line for --help
	Long   string // more lines; exit codes other than ours belong here
	Args   cobra.PositionalArgs
	Config Config
	Level  zapcore.Level // of the log unless --log-level says another
	Plain  bool          // the log is for people: lines, not JSON
	// Run does the work until it is done or ctx ends by SIGINT or SIGTERM. Its
	// error is printed and makes the exit code ExitFailure, or that of WithCode.
	Run func(ctx context.Context, log *zap.Logger, args []string) error
	// Commands are those under this one. Their variables begin with both names.
	Commands []Command
}

const shared = `
Every setting is a flag, a key of the YAML file that --config names, and a
variable: --log-level is "log-level:" there and %[1]s_LOG_LEVEL here. A flag
wins over a variable, a variable over the file. A variable that begins so and
names no setting is warned of. Sizes are bytes or have a unit
(512MiB, 10GiB, 10GB), times have one (5s, 10m).

Exit codes: 0 all is well, 1 failure, 2 wrong usage or settings.`

// slack is how much more garbage than usual gathers before it is collected, in
// bytes: while a heap has a few MiB, to collect it as often costs more than they do.
const slack = 16 << 20

// Main runs the command with the process's arguments, and ends the process.
func (c Command) Main() {
	ballast := make([]byte, slack) // counted as heap, and no memory as nobody touches it
	ctx, cancel := context.WithCancel(context.Background())
	var load sync.WaitGroup
	load.Go(func() { followLoad(ctx, cpuTime) })
	code := c.Execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	cancel()
	load.Wait()
	runtime.KeepAlive(ballast)
	os.Exit(code)
}

// Execute runs the command and returns its exit code.
func (c Command) Execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // the second signal ends the process at once

	ran := new(bool)
	root := c.cobra(ctx, "", ran)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteC()
	if err == nil {
		return ExitOK
	}
	cmd.PrintErrf("%s: %v\n", cmd.CommandPath(), err)
	if e, ok := errors.AsType[*codeError](err); ok {
		return e.code
	}
	if *ran {
		return ExitFailure
	}
	cmd.PrintErrf("See %s --help.\n", cmd.CommandPath())
	return ExitUsage
}

// One takes exactly one argument, what.
func One(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("want one %s", what)
		}
		return nil
	}
}

// name is what users type.
func (c Command) name() string {
	name, _, _ := strings.Cut(c.Use, " ")
	return name
}

// cobra returns the command, whose variables begin with prefix and its name. It
// sets ran when Run begins.
func (c Command) cobra(ctx context.Context, prefix string, ran *bool) *cobra.Command {
	name := c.name()
	env := prefix + strings.ToUpper(name)
	level := c.Level.String()
	cmd := &cobra.Command{
		Use: c.Use, Short: c.Short, Args: c.Args, Version: build(),
		Long:         strings.TrimSpace(c.Short+"\n\n"+strings.TrimSpace(c.Long)) + "\n" + fmt.Sprintf(shared, env),
		SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := load(cmd.Flags(), env); err != nil {
				return err
			}
			log, err := newLog(level, c.Plain, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			for _, v := range unknown(cmd.Flags(), env, os.Environ(), c.Commands) { // another program's, perhaps: no error
				key, _ := settingOf(v, env)
				log.Warn("a variable names no setting, and is not used", zap.String("variable", v), zap.String("nearest", nearest(cmd.Flags(), key)))
			}
			if err := c.Config.Validate(); err != nil {
				return err
			}
			*ran = true
			return c.Run(ctx, log, args)
		},
	}
	if cmd.Args == nil {
		cmd.Args = cobra.NoArgs
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if e, ok := errors.AsType[*pflag.NotExistError](err); ok && e.GetSpecifiedShortnames() == "" {
			return fmt.Errorf("%w, the nearest one is --%s", err, nearest(cmd.Flags(), e.GetSpecifiedName()))
		}
		return err
	})
	cmd.CompletionOptions.HiddenDefaultCmd = true
	cmd.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	cmd.Flags().SortFlags = false
	c.Config.Flags(cmd.Flags())
	cmd.Flags().StringVar(&level, "log-level", level, "what is logged: debug, info, warn or error")
	cmd.Flags().String(configFlag, "", "YAML `file` of settings")
	if prefix == "" {
		cmd.AddCommand(&cobra.Command{
			Use: "version", Short: "Print what was built", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), name, build())
				return err
			},
		})
	}
	for _, sub := range c.Commands {
		cmd.AddCommand(sub.cobra(ctx, env+"_", ran))
	}
	return cmd
}

func build() string {
	return fmt.Sprintf("%s (%s %s/%s)", Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// newLog returns the log, written to w.
func newLog(level string, plain bool, w io.Writer) (*zap.Logger, error) {
	l, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, fmt.Errorf("log level %q: want debug, info, warn or error", level)
	}
	cfg := zap.NewProductionEncoderConfig()
	cfg.TimeKey, cfg.EncodeTime = "time", zapcore.RFC3339NanoTimeEncoder
	enc := zapcore.NewJSONEncoder(cfg)
	if plain {
		cfg.TimeKey = ""
		enc = zapcore.NewConsoleEncoder(cfg)
	}
	return zap.New(zapcore.NewCore(enc, zapcore.Lock(zapcore.AddSync(w)), l)), nil
}

// Metrics returns a registry with the metrics of the process and of the build.
func Metrics() *prometheus.Registry {
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "damselfly_build_info", Help: "1, with what was built as labels.",
		ConstLabels: prometheus.Labels{"version": Version, "go": runtime.Version()},
	})
	info.Set(1)
	reg := prometheus.NewRegistry()
	reg.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

// codeError is an error with an exit code of its own.
type codeError struct {
	code int
	err  error
}

func (e *codeError) Error() string { return e.err.Error() }
func (e *codeError) Unwrap() error { return e.err }

// WithCode gives a Run's error an exit code of its own.
func WithCode(code int, err error) error { return &codeError{code, err} }
