//go:build linux

// Command bench measures real programs and prints what they took beside what
// they may take, and beside what nginx and curl alone take in the same run.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
)

// scenarios are what can be measured, in the order it is.
var scenarios = []scenario{
	{"flash", "all hosts at once, a cold supernode, equal links: 8, 16, 30 hosts; direct beside it", flash},
	{"rich", "a supernode and an origin with ten times a host's link", rich},
	{"unequal", "every third host with a quarter of the others' link", unequal},
	{"staggered", "hosts that come one after the other when eight have it", staggered},
	{"first", "one host, then all others at once", oneFirst},
	{"killed", "one host's dfdaemon killed halfway: what the others lose", killed},
	{"slowest", "one host at a hundredth of the others' rate: what the others lose", slowest},
	{"hostile", "one of 16 hosts does all the harm it can: what the others lose, in each way", hostileHost},
	{"flooded", "2000 slow connections on each kind of listener beside a crowd of 16: what it loses", flooded},
	{"zones", "two zones with a thin link between, with the zone rule and without", zones},
	{"private", "30 hosts with credentials of their own: a private blob, beside the same as a public one", private},
	{"cpu", "processor time of all parts together, beside nginx and curl", cpu},
	{"tls", "a crowd with TLS between all parts, and the same without: efficiency, CPU", overTLS},
	{"single", "one host pulls a blob that nobody has had: time, first byte, CPU", single},
	{"layers", "an image of 40 layers of 20 KB: cold, and when the supernode has it", layers},
	{"small", "a blob of 1 MiB to eight hosts at once", small},
	{"ranges", "readers of small ranges at random places: cold, warm, and straight from the registry", ranges},
	{"stored", "a blob of the host's own store, beside nginx with the same file", stored},
	{"memory", "peak memory with many large blobs at once", memory},
	{"centre", "10 000 sessions on one supernode: test/load", centre},
	{"decisions", "the scheduler's own benchmark, on one core", decisions},
	{"sim", "the simulator beside the lab, and at sizes no lab has; takes minutes", simulated},
}

// A scenario measures something and adds its rows to the table.
type scenario struct {
	name, about string
	run         func(context.Context, *env) error
}

// env is what a scenario works with.
type env struct {
	bin   string // folder of the built commands
	runs  int    // how often a figure is measured; its median counts
	short bool   // only see that the scenario works
	rows  []row
}

// row is one line of the table: the median of a figure's values.
type row struct {
	Scenario string    `json:"scenario"`
	Name     string    `json:"name"`
	Figure   float64   `json:"figure"`
	Unit     string    `json:"unit,omitempty"`
	Bound    string    `json:"bound,omitempty"` // "at most", "at least", "exactly", or nothing where there is none
	Limit    float64   `json:"limit,omitempty"`
	OK       bool      `json:"ok"`
	Values   []float64 `json:"values"`
}

// say tells of progress.
func (e *env) say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// atMost adds a row that holds when the median is at most the limit.
func (e *env) atMost(name, unit string, limit float64, values ...float64) {
	m := median(values)
	e.rows = append(e.rows, row{Name: name, Figure: m, Unit: unit, Bound: "at most", Limit: limit, OK: m > 0 && m <= limit, Values: values})
}

// atLeast adds a row that holds when the median is at least the limit.
func (e *env) atLeast(name, unit string, limit float64, values ...float64) {
	m := median(values)
	e.rows = append(e.rows, row{Name: name, Figure: m, Unit: unit, Bound: "at least", Limit: limit, OK: m >= limit, Values: values})
}

// once adds a row that holds when every value is 1, rounded to thousandths.
func (e *env) once(name string, values ...float64) {
	ok := len(values) > 0 && !slices.ContainsFunc(values, func(v float64) bool { return math.Round(1000*v) != 1000 })
	e.rows = append(e.rows, row{Name: name, Figure: median(values), Bound: "exactly", Limit: 1, OK: ok, Values: values})
}

// tell adds a row that only informs.
func (e *env) tell(name, unit string, values ...float64) {
	e.rows = append(e.rows, row{Name: name, Figure: median(values), Unit: unit, OK: true, Values: values})
}

// size is that of the blobs of a scenario.
func (e *env) size(full int64) int64 {
	if e.short {
		return 4 << 20
	}
	return full
}

// median is the middle of some values, the lower of two; 0 for none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(values))[(len(values)-1)/2]
}

func main() {
	var e env
	flag.StringVar(&e.bin, "bin", "bin", "folder of the built commands")
	flag.IntVar(&e.runs, "runs", 3, "how often each figure is measured")
	flag.BoolVar(&e.short, "short", false, "small and once, to see that it works: its figures mean nothing")
	only := flag.String("only", "", "regular expression of the scenarios to measure; all without")
	out := flag.String("json", "bin/bench.json", "write the rows to this `file` too; empty: to none")
	picture := flag.String("svg", "", "draw the efficiency of the flash crowds into this `file`; empty: into none")
	flag.Usage = usage
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := errors.Join(e.measure(ctx, *only, *out), e.draw(*picture))
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: bench [flags]\n\nscenarios:")
	for _, s := range scenarios {
		fmt.Fprintf(os.Stderr, "  %-10s %s\n", s.name, s.about)
	}
	fmt.Fprintln(os.Stderr, "\nflags:")
	flag.PrintDefaults()
}

// measure runs the scenarios, prints the table even when one of them fails, and
// returns what went wrong or does not hold.
func (e *env) measure(ctx context.Context, only, out string) error {
	pattern, err := regexp.Compile("^(?:" + only + ")$")
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if e.bin, err = filepath.Abs(e.bin); err != nil {
		return err
	}
	if e.runs < 1 || e.short {
		e.runs = 1
	}
	var errs []error
	chosen := 0
	for _, s := range scenarios {
		if only != "" && !pattern.MatchString(s.name) || ctx.Err() != nil {
			continue
		}
		chosen++
		e.say("%s: %s", s.name, s.about)
		had := len(e.rows)
		if err := s.run(ctx, e); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.name, err))
		}
		for i := had; i < len(e.rows); i++ {
			e.rows[i].Scenario = s.name
		}
	}
	if chosen == 0 {
		return fmt.Errorf("no scenario is called %q; -h lists them", only)
	}
	return errors.Join(append(errs, e.print(), e.write(out))...)
}

// print prints the table; its error is that some rows do not hold.
func (e *env) print() error {
	tw := tabwriter.NewWriter(os.Stdout, 2, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "what\tmeasured\twanted\t\truns")
	missed := 0
	for _, r := range e.rows {
		wanted, verdict := "", ""
		if r.Bound != "" {
			wanted, verdict = strings.TrimSpace(fmt.Sprintf("%s %.4g %s", r.Bound, r.Limit, r.Unit)), "holds"
		}
		if !r.OK {
			verdict = "DOES NOT HOLD"
			missed++
		}
		if e.short {
			verdict = ""
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", r.Name, strings.TrimSpace(fmt.Sprintf("%.4g %s", r.Figure, r.Unit)), wanted, verdict, spread(r.Values))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if missed > 0 && !e.short {
		return fmt.Errorf("%d of %d rows do not hold", missed, len(e.rows))
	}
	return nil
}

// spread shows the least and the most of several values.
func spread(values []float64) string {
	if len(values) < 2 {
		return ""
	}
	return fmt.Sprintf("%d: %.4g to %.4g", len(values), slices.Min(values), slices.Max(values))
}

func (e *env) write(out string) error {
	if out == "" {
		return nil
	}
	b, err := json.MarshalIndent(e.rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(out, append(b, '\n'), 0o644)
}
