//go:build linux

// Command chaos kills, pauses, cuts off, fills up, corrupts and replaces the parts of
// a region while its hosts pull, and tells what came of it.
//
// It needs root: hosts are network namespaces on shaped links, and run real processes.
// It exits with 0 when all that it claims has held.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"damselfly.dev/test/programs"
)

// A scenario is one thing that goes wrong, in a region of its own.
type scenario struct {
	name, about string
	short       bool // it holds today, and is part of the short form
	run         func(context.Context, *region) error
}

var scenarios = []scenario{
	{"supernode-gone", "kill -9 of the only supernode at half of the pull, for good", false, supernodeGone},
	{"supernode-back", "the same, and it is back after 3 s", false, supernodeBack},
	{"partition", "the hosts fall into two halves, the supernode is in one; then they are joined again", true, partition},
	{"upgrade", "each dfdaemon is replaced by a new one, then the supernode, while containerds pull in a loop", true, upgrade},
	{"small-disk", "an image that is larger than the disk", true, smallDisk},
	{"soak", "something random goes wrong every few seconds while hosts pull random images", true, soak},
}

// config is what a person can choose.
type config struct {
	only     []string
	seed     uint64
	duration time.Duration // of the soak
	short    bool
	dir      string // where the lab keeps its files
	bin      string // the programs
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	cfg, err := parse(os.Args[1:], os.Stderr)
	if err == nil {
		err = play(ctx, cfg, os.Stdout)
	}
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errNotHeld):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(2)
	}
}

func parse(args []string, usage io.Writer) (config, error) {
	flags := flag.NewFlagSet("chaos", flag.ContinueOnError)
	flags.SetOutput(usage)
	var cfg config
	only := flags.String("only", "", "scenarios, with commas; empty: all of\n"+list())
	flags.Uint64Var(&cfg.seed, "seed", uint64(time.Now().UnixNano()), "of what goes wrong in the soak, and of the images") //nolint:gosec // a time is positive
	flags.DurationVar(&cfg.duration, "duration", 0, "of the soak (default 1h, or 18s with -short)")
	flags.BoolVar(&cfg.short, "short", false, "small images and few hosts, and only what is quick")
	flags.StringVar(&cfg.dir, "dir", "", "where the hosts' files are for as long as it runs (default /var/tmp)")
	flags.StringVar(&cfg.bin, "bin", "", "directory of supernode, dfdaemon and registry; empty: built from this tree")
	if err := flags.Parse(args); err != nil {
		return config{}, err
	}
	if flags.NArg() > 0 {
		return config{}, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	for name := range strings.SplitSeq(*only, ",") {
		known := slices.ContainsFunc(scenarios, func(s scenario) bool { return s.name == name })
		if name != "" && !known {
			return config{}, fmt.Errorf("no scenario %q; there are:\n%s", name, list())
		}
		if known {
			cfg.only = append(cfg.only, name)
		}
	}
	if cfg.duration == 0 {
		cfg.duration = time.Hour
		if cfg.short {
			cfg.duration = 18 * time.Second
		}
	}
	return cfg, nil
}

func list() string {
	var text strings.Builder
	for _, s := range scenarios {
		fmt.Fprintf(&text, "  %-15s %s\n", s.name, s.about)
	}
	return text.String()
}

// play runs the scenarios one after the other, and prints what held.
func play(ctx context.Context, cfg config, stdout io.Writer) (err error) {
	out := newReport(stdout)
	if cfg.bin == "" {
		if cfg.bin, err = os.MkdirTemp("", "chaos-bin-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(cfg.bin)) }()
		out.say("Building the programs.")
		if err := programs.Build(ctx, cfg.bin); err != nil {
			return err
		}
	}
	for _, s := range scenarios {
		if len(cfg.only) > 0 && !slices.Contains(cfg.only, s.name) || cfg.short && !s.short && len(cfg.only) == 0 {
			continue
		}
		out.scenario = s.name
		out.say("%s: %s. Seed %d: go run ./test/chaos -only %s -seed %d%s", s.name, s.about, cfg.seed, s.name, cfg.seed, again(cfg))
		if err := in(ctx, cfg, out, s.run); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return out.verdict()
}

// again are the other flags that a second run needs.
func again(cfg config) (flags string) {
	if cfg.short {
		flags = " -short"
	}
	return flags + " -duration " + cfg.duration.String()
}

// in runs f in a new region.
func in(ctx context.Context, cfg config, out *report, f func(context.Context, *region) error) (err error) {
	r := &region{cfg: cfg, out: out}
	defer func() {
		if r.lab != nil {
			err = errors.Join(err, r.lab.Close())
		}
	}()
	return f(ctx, r)
}
