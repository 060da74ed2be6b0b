//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"

	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

func need(t *testing.T) {
	t.Helper()
	err := lab.Check()
	containerd := programs.DebianContainerd()
	for _, program := range []string{containerd.Daemon, containerd.Client, "docker-registry", "nsenter"} {
		if _, missing := exec.LookPath(program); missing != nil {
			err = errors.Join(err, missing)
		}
	}
	switch {
	case err != nil && os.Getenv("CI") == "true":
		t.Fatal("CI must have what test/install.sh installs: ", err)
	case err != nil:
		t.Skip("not on this machine (test/install.sh installs the parts): ", err)
	}
}

// The short form of all that holds; other seeds are for `make chaos`.
func TestShort(t *testing.T) {
	need(t)
	dir, err := os.MkdirTemp("/var/tmp", "chaos") //nolint:usetesting // the names of sockets must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	cfg, err := parse([]string{"-short", "-seed", "1", "-dir", dir}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = play(ctx, cfg, &out)
	t.Log("\n" + out.String())
	if err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Error("it left ", left, err)
	}
}

// The seed alone says what goes wrong.
func TestSeeds(t *testing.T) {
	of := func(seed uint64) []fault {
		r := &region{cfg: config{seed: seed, duration: 10 * time.Minute}, hosts: make([]*host, 6)}
		return r.faults()
	}
	first := of(1)
	if len(first) < 100 || !reflect.DeepEqual(first, of(1)) || reflect.DeepEqual(first, of(2)) {
		t.Error("the same seed gives other faults, or another one the same")
	}
	seen := map[kind]bool{}
	for i, f := range first {
		seen[f.what] = true
		for _, other := range first[:i] {
			if other.host == f.host && f.at < other.at+other.lasts {
				t.Errorf("%v while %v", f, other)
			}
		}
	}
	if len(seen) != 9 {
		t.Errorf("only %v go wrong", seen)
	}
}

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want string // of the error
	}{
		"defaults":         {},
		"one":              {args: []string{"-only", "soak,upgrade", "-seed", "7", "-duration", "1m"}},
		"unknown scenario": {args: []string{"-only", "what"}, want: `no scenario "what"`},
		"argument":         {args: []string{"what"}, want: `unexpected argument "what"`},
		"bad seed":         {args: []string{"-seed", "x"}, want: "invalid value"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parse(c.args, io.Discard)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestVerdict(t *testing.T) {
	var out bytes.Buffer
	r := newReport(&out)
	if err := r.verdict(); err == nil || errors.Is(err, errNotHeld) {
		t.Error("a report without claims gave ", err)
	}
	r.check(true, "this")
	if err := r.verdict(); err != nil {
		t.Error("a claim that held gave ", err)
	}
	r.check(false, "that")
	if err := r.verdict(); !errors.Is(err, errNotHeld) {
		t.Error("a claim that did not hold gave ", err)
	}
}
