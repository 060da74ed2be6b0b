//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"damselfly.dev/test/programs"
)

// centre is what test/load measures.
func centre(ctx context.Context, e *env) error {
	dir, err := os.MkdirTemp("", "damselfly-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	command, out := filepath.Join(dir, "load"), filepath.Join(dir, "rows.json")
	if _, err := e.tool(ctx, "build", "-o", command, "./test/load"); err != nil {
		return err
	}
	flags := []string{"-supernode", filepath.Join(e.bin, "supernode"), "-sessions", "10000", "-json", out}
	if e.short {
		flags = append(flags, "-short")
	}
	load := exec.CommandContext(ctx, command, flags...)
	load.Stdout, load.Stderr = os.Stderr, os.Stderr
	failed := load.Run() // also when a row does not hold
	text, err := os.ReadFile(out)
	if err != nil {
		return errors.Join(failed, err)
	}
	var rows []struct {
		Name, Unit    string
		Figure, Limit float64
		OK            bool
	}
	if err := json.Unmarshal(text, &rows); err != nil {
		return fmt.Errorf("read what test/load wrote: %w", err)
	}
	for _, r := range rows {
		bound := ""
		switch {
		case r.Limit == 0:
		case r.Unit == "/s":
			bound = "at least"
		default:
			bound = "at most"
		}
		e.rows = append(e.rows, row{Name: r.Name, Figure: r.Figure, Unit: r.Unit, Bound: bound, Limit: r.Limit, OK: r.OK, Values: []float64{r.Figure}})
	}
	return nil
}

// decisions is the scheduler's own benchmark, on one core.
func decisions(ctx context.Context, e *env) error {
	flags := []string{"-run", "^$", "-bench", "Decisions", "-cpu", "1", "-count", strconv.Itoa(e.runs)}
	if e.short {
		flags = append(flags, "-benchtime", "10000x")
	}
	out, err := e.tool(ctx, "test", append(flags, "./scheduler")...)
	if err != nil {
		return err
	}
	names, values := decisionRates(out)
	if len(names) == 0 {
		return fmt.Errorf("the benchmark told no decisions/s: %s", out)
	}
	for _, name := range names {
		e.atLeast("decisions of the scheduler on one core, "+name, "/s", 1_000_000, values[name]...)
	}
	return nil
}

var decisionLine = regexp.MustCompile(`(?m)^BenchmarkDecisions/(\S+)\s.*\s(\S+) decisions/s`)

// decisionRates reads what the benchmark printed: its cases in order, and each
// one's decisions a second.
func decisionRates(out string) (names []string, values map[string][]float64) {
	values = map[string][]float64{}
	for _, m := range decisionLine.FindAllStringSubmatch(out, -1) {
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			continue
		}
		name := strings.ReplaceAll(m[1], "=", " ")
		if values[name] == nil {
			names = append(names, name)
		}
		values[name] = append(values[name], v)
	}
	return names, values
}

// tool runs the go command at the module's root and returns what it printed.
func (e *env) tool(ctx context.Context, verb string, args ...string) (string, error) {
	root, err := programs.Root(ctx)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "go", append([]string{verb, "-tags", "nomsgpack"}, args...)...)
	cmd.Dir = root
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s: %w: %s%s", verb, err, out, &errs)
	}
	return string(out), nil
}
