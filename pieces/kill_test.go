package pieces

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

const killDir = "PIECES_TEST_KILL_DIR"

// TestKilled kills a process in the middle of filling a store, again and again:
// the next opens it at once and has every piece the killed one had reported.
func TestKilled(t *testing.T) {
	b, m := blob(95, 40*MinPieceSize-9)
	if dir := os.Getenv(killDir); dir != "" {
		fillAloud(t, dir, m, b)
		return
	}
	dir := t.TempDir()
	reported := 0
	for round := range 4 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), killDir+"="+dir)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err == nil {
			_, err = in.Write(make([]byte, 9)) // two more than are waited for: it is killed at work
		}
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; n < 7 && lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "piece ") {
				n++
				reported++
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("the killed process ended well")
		}
		if round < 2 {
			continue // what the next process finds is what the killed one left
		}
		s := open(t, dir, StoreConfig{})
		if n := checkTruth(t, s, m, b); n < reported {
			t.Errorf("%d pieces are left of %d reported", n, reported)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if reported != 4*7 {
		t.Errorf("%d pieces reported", reported)
	}
}

// fillAloud makes a piece for each byte of the standard input, and says so.
func fillAloud(tb testing.TB, dir string, m Meta, b []byte) {
	tb.Helper()
	c := create(tb, open(tb, dir, StoreConfig{}), m)
	for i := range m.Layout.Count() {
		if c.Has(i) {
			continue
		}
		if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
			tb.Fatal(err)
		}
		if _, err := c.Make(i, bytes.NewReader(piece(m.Layout, b, i))); err != nil {
			tb.Fatal(err)
		}
		if _, err := fmt.Fprintf(os.Stdout, "piece %d\n", i); err != nil {
			tb.Fatal(err)
		}
	}
	tb.Fatal("it was never killed")
}
