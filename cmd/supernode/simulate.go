package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/scheduler/sim"
)

// simulation is the settings of supernode simulate.
type simulation struct {
	sim.Plan
	svg    string
	stdout io.Writer
	stderr io.Writer
}

// simulateCommand returns the command that plans a region.
func simulateCommand(stdout, stderr io.Writer) cli.Command {
	s := &simulation{Plan: sim.DefaultPlan(), stdout: stdout, stderr: stderr}
	return cli.Command{
		Use:   "simulate",
		Short: "Tell how long an image takes to all hosts of a region, before it does",
		Long: `It runs the scheduler that the supernode runs, on modelled links, for hosts that
all want one content that nobody in the region has yet. It prints how long they
take, which link is the limit and how near to it they come, what the registry has
to send, and what a second supernode would bring: one that has half the layers.

Links are what they carry of content each way: with frames of 1500 bytes 95 % of
their nominal rate. Rates have a unit (100Mbit, 10Gbit). Disks and processors
are not modelled but for --assignments. Ten thousand hosts and 3GiB take minutes.`,
		Config: s,
		Level:  zapcore.WarnLevel,
		Plain:  true,
		Run:    s.run,
	}
}

// Flags binds the settings.
func (s *simulation) Flags(fs *pflag.FlagSet) {
	fs.IntVar(&s.Hosts, "hosts", s.Hosts, "how many want it")
	fs.Var(cli.Size(&s.Size), "size", "bytes of content that each of them wants")
	fs.Var(cli.Rate(&s.HostLink), "host-link", "each host's link")
	fs.Var(cli.Rate(&s.SupernodeUp), "supernode-link", "the supernode's link to the hosts")
	fs.Var(cli.Rate(&s.RegistryLink), "registry-link", "the registry's link to the supernode; 0: as the supernode's")
	fs.IntVar(&s.Lanes, "lanes", s.Lanes, "transfers at once of a host, each way")
	fs.IntVar(&s.UpLanes, "up-lanes", s.UpLanes, "transfers at once from the supernode")
	fs.IntVar(&s.Zones, "zones", s.Zones, "zones among which the hosts are dealt; the supernode is in the first")
	fs.Var(cli.Rate(&s.ZoneLink), "zone-link", "the link between each zone and all others; 0: no bound")
	fs.BoolVar(&s.CrossOnce, "cross-once", s.CrossOnce, "each piece comes into a zone once, and spreads there")
	fs.DurationVar(&s.ArriveOver, "arrive-over", s.ArriveOver, "time over which the hosts begin, evenly; 0: all at once")
	fs.DurationVar(&s.RoundTrip, "round-trip", s.RoundTrip, "time to another host and back")
	fs.IntVar(&s.Assignments, "assignments", s.Assignments, "most transfers a second that the supernode assigns; 0: no bound")
	fs.Uint64Var(&s.Random, "seed", s.Random, "of chance: the same gives the same result")
	fs.StringVar(&s.svg, "svg", s.svg, "`file` to write the curve of hosts done to, as a picture")
}

func (s *simulation) run(ctx context.Context, _ *zap.Logger, _ []string) error {
	if s.svg == "" {
		_, err := s.simulate(ctx)
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(s.svg), ".simulate-") // first, as it is known now whether it can be
	if err != nil {
		return fmt.Errorf("%w: name another file with --svg", err)
	}
	defer os.Remove(f.Name()) //nolint:errcheck // it is there no more when all went well
	r, err := s.simulate(ctx)
	if err == nil {
		err = r.SVG(f)
	}
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), s.svg)
}

// simulate prints what the plan comes to, and meanwhile how far it is.
func (s *simulation) simulate(ctx context.Context) (sim.Report, error) {
	told := time.Now()
	r, err := s.Run(ctx, func(now time.Duration, part float64) {
		if time.Since(told) > tellEvery {
			told = time.Now()
			_, _ = fmt.Fprintf(s.stderr, "after %v: %.0f %% of all bytes\n", now.Round(10*time.Millisecond), 100*part)
		}
	})
	if err != nil {
		return r, fmt.Errorf("simulate: %w", err)
	}
	return r, r.Text(s.stdout)
}

// tellEvery is how often it is told how far a long simulation is.
const tellEvery = 5 * time.Second
