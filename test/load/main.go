//go:build linux

// Command load holds thousands of sessions against one supernode process and
// prints what they took beside what they may take. Its hosts join tasks, report
// pieces at link speed without moving a byte, and leave.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"

	"damselfly.dev/test/programs"
)

// config is what a run is told.
type config struct {
	bin       string // the supernode's command
	sessions  int
	tasks     int
	pieces    int           // of each task
	lanes     int           // of each host, each way
	rate      float64       // assignments a second to be sustained
	overload  float64       // what is asked for at overload, a multiple of rate
	floods    int           // sessions that say useless things as fast as they can, at overload
	settle    time.Duration // before what is timed
	duration  time.Duration // of each of the phases
	keep      bool          // the logs
	supernode []string      // more flags for it
}

// row is one line of the table. OK tells whether the figure is within the limit,
// which for speeds is the least and for all else the most; 0 is none.
type row struct {
	Name   string  `json:"name"`
	Figure float64 `json:"figure"`
	Limit  float64 `json:"limit"`
	Unit   string  `json:"unit"`
	OK     bool    `json:"ok"`
}

func atMost(name string, figure, limit float64, unit string) row {
	return row{name, figure, limit, unit, limit == 0 || figure <= limit}
}

func atLeast(name string, figure, limit float64, unit string) row {
	return row{name, figure, limit, unit, figure >= limit}
}

func main() {
	var c config
	flag.StringVar(&c.bin, "supernode", "bin/supernode", "the built `command`")
	flag.IntVar(&c.sessions, "sessions", 10_000, "hosts")
	flag.IntVar(&c.tasks, "tasks", 4, "contents that they go through, 3 or more")
	flag.IntVar(&c.pieces, "pieces", 256, "pieces of a content")
	flag.IntVar(&c.lanes, "lanes", 3, "lanes of a host, each way")
	flag.Float64Var(&c.rate, "rate", 50_000, "assignments a second to be sustained")
	flag.Float64Var(&c.overload, "overload", 8, "at overload, how many times that is asked for")
	flag.IntVar(&c.floods, "floods", 20, "sessions at overload that say useless things as fast as they can")
	flag.DurationVar(&c.settle, "settle", 10*time.Second, "how long the joins are spread over, and before each figure")
	flag.DurationVar(&c.duration, "duration", 20*time.Second, "how long each figure is taken over")
	flag.BoolVar(&c.keep, "keep", false, "keep the supernode's log")
	out := flag.String("json", "", "write the rows to this `file` too")
	short := flag.Bool("short", false, "a small run that shows that it works")
	flag.Parse()
	c.supernode = flag.Args()
	if *short {
		c.shorten()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	rows, err := run(ctx, c, os.Stdout)
	stop()
	if err == nil {
		err = report(rows, os.Stdout, *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

// shorten makes the run a small one.
func (c *config) shorten() {
	c.sessions, c.tasks, c.rate, c.floods = 1000, 3, 8000, 2
	c.settle, c.duration = time.Second, 2*time.Second
}

// report prints the rows and writes them to file; one that does not hold is an
// error.
func report(rows []row, w io.Writer, file string) error {
	tw := tabwriter.NewWriter(w, 2, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "what\tmeasured\tlimit\t")
	missed := 0
	for _, r := range rows {
		limit, verdict := "", ""
		if r.Limit != 0 {
			limit, verdict = fmt.Sprintf("%.5g %s", r.Limit, r.Unit), "holds"
		}
		if !r.OK {
			verdict = "DOES NOT HOLD"
			missed++
		}
		fmt.Fprintf(tw, "%s\t%.5g %s\t%s\t%s\n", r.Name, r.Figure, r.Unit, limit, verdict)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if file != "" {
		b, err := json.MarshalIndent(rows, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(file, append(b, '\n'), 0o644); err != nil {
			return err
		}
	}
	if missed > 0 {
		return fmt.Errorf("%d of %d rows do not hold", missed, len(rows))
	}
	return nil
}

// run starts a supernode, takes it through the phases and returns what came of it.
func run(ctx context.Context, c config, log io.Writer) ([]row, error) {
	dir, err := os.MkdirTemp("", "damselfly-load-")
	if err != nil {
		return nil, err
	}
	if c.keep {
		fmt.Fprintln(log, "kept:", dir)
	} else {
		defer os.RemoveAll(dir)
	}
	origin := newOrigin(c.tasks, c.pieces)
	defer origin.Close()
	super, err := start(ctx, c.bin, dir, origin.name(), c.supernode)
	if err != nil {
		return nil, err
	}
	defer super.Stop()
	if err := fetch(ctx, super, origin); err != nil {
		return nil, err
	}
	empty := programs.Memory(super.PID())

	s, err := newSwarm(c, origin, super.url)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	s.fail = cancel
	defer s.close()
	defer cancel(nil) // and then the sessions end
	began := time.Now()
	if err := s.connect(ctx); err != nil {
		return nil, err
	}
	held := programs.Memory(super.PID())
	fmt.Fprintf(log, "%d sessions in %.1f s\n", c.sessions, time.Since(began).Seconds())
	rows := []row{
		atMost("memory of a session without a task", (held-empty)*1024/float64(c.sessions), 0, "KiB"),
	}
	s.setRate(c.rate / 2)
	s.begin(ctx)
	if err := wait(ctx, 2*c.settle); err != nil {
		return nil, err
	}
	joined := programs.Memory(super.PID())
	rows = append(rows,
		atMost("memory of a host at work", (joined-empty)*1024/float64(c.sessions), 0, "KiB"),
		atMost("memory of a task, all hosts in it", (joined-held)/float64(c.tasks), 0, "MiB"))

	for _, p := range c.phases() {
		more, err := s.phase(ctx, super, p, log)
		if err != nil {
			return nil, err
		}
		rows = append(rows, more...)
	}
	return append(rows, atMost(fmt.Sprintf("supernode peak memory, %d sessions", c.sessions), programs.Peak(super.PID()), 1024, "MiB")), nil
}

// phase is a load to be put on the supernode, and what must hold of it.
type phase struct {
	name   string
	rate   float64 // assignments a second that the hosts' links take
	floods int
	speed  float64       // least assignments a second
	p99    time.Duration // most from report to assignment
}

func (c *config) phases() []phase {
	return []phase{
		{name: "half load", rate: c.rate / 2, p99: 100 * time.Millisecond},
		{name: "full load", rate: 1.15 * c.rate, speed: c.rate}, // some lanes are idle at any time
		{name: "overload", rate: c.overload * c.rate, floods: c.floods},
		{name: "half load again", rate: c.rate / 2, p99: 100 * time.Millisecond},
	}
}

// phase puts a load on the supernode and measures it.
func (s *swarm) phase(ctx context.Context, super *process, p phase, log io.Writer) ([]row, error) {
	s.setRate(p.rate)
	pctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := s.flood(pctx, p.floods); err != nil {
		return nil, err
	}
	if err := wait(ctx, s.cfg.settle); err != nil {
		return nil, err
	}
	s.stats.Store(&stats{})
	before, cpu, own, began := programs.Memory(super.PID()), programs.CPU(super.PID()), ownCPU(), time.Now()
	if err := wait(ctx, s.cfg.duration); err != nil {
		return nil, err
	}
	took := time.Since(began).Seconds()
	got := s.stats.Load()
	speed := float64(got.assigned.Load()) / took
	cores, ownCores := (programs.CPU(super.PID())-cpu)/took, (ownCPU()-own)/took
	stalled := s.stalled()
	fmt.Fprintf(log, "%s: %.0f/s of %.0f, supernode %.2f cores (%.1f us each), generator %.2f cores (%.1f us each), %d joins, memory %.0f to %.0f MiB\n",
		p.name, speed, p.rate, cores, cores/speed*1e6, ownCores, ownCores/speed*1e6, got.joins.count(), before, programs.Memory(super.PID()))
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	return []row{
		atLeast(p.name+": assignments", speed, p.speed, "/s"),
		atMost(p.name+": supernode CPU", cores, 0, "cores"),
		atMost(p.name+": generator CPU", ownCores, 0, "cores"),
		atMost(p.name+": supernode CPU of an assignment", cores/speed*1e6, 0, "us"),
		atMost(p.name+": generator CPU of an assignment", ownCores/speed*1e6, 0, "us"),
		atMost(p.name+": report to assignment, p50", ms(got.answers.quantile(0.5)), 0, "ms"),
		atMost(p.name+": report to assignment, p99", ms(got.answers.quantile(0.99)), ms(p.p99), "ms"),
		atMost(p.name+": transfers that end with none at hand", float64(got.idle.count())/float64(max(1, got.assigned.Load())), 0, "of assignments"),
		atMost(p.name+": their wait, p50", ms(got.idle.quantile(0.5)), 0, "ms"),
		atMost(p.name+": join to answer, p50", ms(got.joins.quantile(0.5)), 0, "ms"),
		atMost(p.name+": join to answer, p99", ms(got.joins.quantile(0.99)), 0, "ms"),
		{p.name + ": hosts that got nothing", float64(stalled), 0, "", stalled == 0},
	}, nil
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
			return err
		}
		return errors.New("interrupted")
	}
}
