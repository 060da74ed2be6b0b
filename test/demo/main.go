//go:build linux

// Command demo lets real engines on several hosts pull one image at once, with
// and without Damselfly, and prints what it took.
//
// As root the hosts are network namespaces on shaped links, and the engine is
// containerd; else they are loopback addresses, and the engine is a library.
// It exits with 0 when all that it claims has held.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"damselfly.dev/test/image"
	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// scenarios are what the demo can show; each ends with its verdicts.
var scenarios = map[string]struct {
	about string
	hosts int // at least
	run   func(*stage, context.Context) error
}{
	"region":         {"all hosts pull at once, then again straight from the registry", 2, (*stage).region},
	"single":         {"one host and a cold supernode, against a direct pull", 1, (*stage).single},
	"kill-supernode": {"kill -9 of the supernode in the middle of the pull; a new host when it is back", 2, (*stage).killSupernode},
	"kill-daemon":    {"kill -9 of two hosts' dfdaemon in the middle of the pull; one comes back", 3, (*stage).killDaemon},
	"second-pull":    {"the same image once more, by an engine with an empty store", 1, (*stage).secondPull},
	"late-host":      {"a new host pulls after all others have finished", 1, (*stage).lateHost},
}

// config is what a person can choose.
type config struct {
	scenario string
	hosts    int
	rate     lab.Rate // of every link, up and down
	unpack   bool     // measure whole pulls, not only the fetching
	keep     bool
	loopback bool
	untimed  bool   // times are told and not judged
	install  bool   // what is missing on this machine
	dir      string // where the lab keeps its files
	make     func(ctx context.Context, cache string) (v1.Image, error)
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	cfg, err := parse(os.Args[1:], os.Getenv, os.Stderr)
	if err == nil {
		err = run(ctx, cfg, os.Stdout)
	}
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errNotHeld):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}
}

// parse reads flags; HOSTS, RATE, SCENARIO, UNPACK and KEEP of the environment
// are their defaults. What is wrong with the flags goes to usage, too.
func parse(args []string, env func(string) string, usage io.Writer) (config, error) {
	or := func(key, otherwise string) string {
		if value := env(key); value != "" {
			return value
		}
		return otherwise
	}
	hosts, errHosts := strconv.Atoi(or("HOSTS", "6"))
	rate, errRate := strconv.ParseFloat(or("RATE", "100"), 64)
	if err := errors.Join(errHosts, errRate); err != nil {
		return config{}, fmt.Errorf("HOSTS and RATE are numbers: %w", err)
	}
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(usage)
	cfg := config{loopback: os.Geteuid() != 0}
	flags.IntVar(&cfg.hosts, "hosts", hosts, "how many hosts pull (HOSTS)")
	flags.Float64Var(&rate, "rate", rate, "rate of every link in Mbit/s, as root (RATE)")
	flags.StringVar(&cfg.scenario, "scenario", or("SCENARIO", "region"), "what to show (SCENARIO):\n"+list())
	flags.BoolVar(&cfg.unpack, "unpack", or("UNPACK", "0") != "0",
		"containerd unpacks too (UNPACK=1): all hosts share this machine's processors, so they\nmay well be the limit in place of the network")
	flags.BoolVar(&cfg.keep, "keep", or("KEEP", "0") != "0", "leave all running at the end, until Ctrl-C (KEEP=1)")
	if err := flags.Parse(args); err != nil {
		return config{}, err
	}
	cfg.rate = lab.Rate(rate * float64(lab.Mbit))
	scenario, ok := scenarios[cfg.scenario]
	switch {
	case flags.NArg() > 0:
		return config{}, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case !ok:
		return config{}, fmt.Errorf("no scenario %q; there are:\n%s", cfg.scenario, list())
	case cfg.hosts < scenario.hosts || cfg.hosts > 200:
		return config{}, fmt.Errorf("%s takes %d to 200 hosts", cfg.scenario, scenario.hosts)
	case cfg.loopback && cfg.scenario == "kill-daemon":
		return config{}, errors.New("kill-daemon needs root: the library, unlike containerd, turns to no registry by itself")
	case cfg.rate < lab.Mbit || cfg.rate > 10_000*lab.Mbit:
		return config{}, errors.New("links have 1 to 10000 Mbit/s")
	}
	if cfg.scenario == "single" {
		cfg.hosts = 1
	}
	cfg.install, cfg.make = !cfg.loopback, image.Debian
	if cfg.loopback {
		cfg.make = image.GoTree
	}
	return cfg, nil
}

func list() string {
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(scenarios)) {
		fmt.Fprintf(&text, "  %-15s %s\n", name, scenarios[name].about)
	}
	return text.String()
}

// run installs, builds and starts what the scenario needs, and runs it.
func run(ctx context.Context, cfg config, stdout io.Writer) (err error) {
	out := newReport(stdout)
	if cfg.loopback {
		out.say("Without root: hosts on loopback, no shaped links, a library in place of containerd.")
		out.say("No link is the bottleneck then, so times prove nothing; all else is checked as ever.")
	}
	if cfg.install {
		if err := install(ctx, stdout); err != nil {
			return err
		}
	}
	s, err := setUp(ctx, cfg, out)
	if err != nil {
		return err
	}
	defer func() {
		out.say("Taking all of it away again.")
		err = errors.Join(err, s.lab.Close())
	}()
	out.say("%s: %s.", cfg.scenario, scenarios[cfg.scenario].about)
	if err := scenarios[cfg.scenario].run(s, ctx); err != nil {
		return err
	}
	err = out.verdict()
	if cfg.keep {
		s.addresses()
		<-ctx.Done()
	}
	return err
}

// install runs the project's own installer, which says nothing where all is there.
func install(ctx context.Context, stdout io.Writer) error {
	root, err := programs.Root(ctx)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "test", "install.sh"), "packages") //nolint:gosec // G204: of this checkout
	cmd.Stdout, cmd.Stderr = stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("install what the demo needs: %w", err)
	}
	return nil
}
