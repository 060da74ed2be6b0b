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

// errNotHeld means that all ran and that something that is claimed has not held.
var errNotHeld = errors.New("not all of it held")

// A report is what a person reads.
type report struct {
	began    time.Time
	scenario string // that runs

	mu     sync.Mutex // guards what follows
	out    io.Writer
	rows   []string
	failed bool
}

func newReport(out io.Writer) *report { return &report{began: time.Now(), out: out} }

// say prints a line with the time since the beginning.
func (r *report) say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.out, "%6.1f s  %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

// check notes a claim and whether it held.
func (r *report) check(held bool, format string, args ...any) {
	word := "ok"
	if !held {
		word = "FAIL"
	}
	text := fmt.Sprintf(format, args...)
	r.say("%s  %s", word, text)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = r.failed || !held
	r.rows = append(r.rows, r.scenario+"\t"+word+"\t"+text)
}

// verdict prints the claims and returns errNotHeld unless all have held.
func (r *report) verdict() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintln(r.out)
	w := tabwriter.NewWriter(r.out, 0, 0, 3, ' ', 0)
	for _, row := range r.rows {
		fmt.Fprintln(w, row)
	}
	w.Flush()
	switch {
	case len(r.rows) == 0:
		return errors.New("nothing was checked")
	case r.failed:
		return errNotHeld
	}
	return nil
}
