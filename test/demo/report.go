//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"text/tabwriter"
	"time"
)

// errNotHeld means that the demo ran and that something it claims has not held.
var errNotHeld = errors.New("not all of it held")

// A report is what a person reads: what goes on, tables, and verdicts.
type report struct {
	began time.Time

	mu       sync.Mutex // guards what follows
	out      io.Writer
	verdicts []string
	failed   bool
}

func newReport(out io.Writer) *report { return &report{began: time.Now(), out: out} }

// say prints a line with the time since the beginning.
func (r *report) say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.out, "%4.0f s  %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

// table prints rows of cells divided by tabs.
func (r *report) table(rows []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintln(r.out)
	w := tabwriter.NewWriter(r.out, 0, 0, 3, ' ', tabwriter.AlignRight)
	for _, row := range rows {
		fmt.Fprintln(w, row+"\t")
	}
	w.Flush()
	fmt.Fprintln(r.out)
}

// check notes a claim and whether it held.
func (r *report) check(held bool, format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	word := "ok  "
	if !held {
		word, r.failed = "FAIL", true
	}
	r.verdicts = append(r.verdicts, word+"  "+fmt.Sprintf(format, args...))
}

// verdict prints the claims and returns errNotHeld unless all have held.
func (r *report) verdict() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, line := range r.verdicts {
		fmt.Fprintln(r.out, line)
	}
	fmt.Fprintln(r.out)
	switch {
	case len(r.verdicts) == 0:
		return errors.New("nothing was checked")
	case r.failed:
		return errNotHeld
	}
	return nil
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
