//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"damselfly.dev/test/image"
	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// short is a scenario with a small image, on links that make it take seconds.
func short(t *testing.T, scenario string, hosts int) config {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "demo") //nolint:usetesting // the names of sockets must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return config{scenario: scenario, hosts: hosts, rate: 50 * lab.Mbit, dir: dir, make: image.Small, untimed: true}
}

// play runs a scenario and fails the test unless all that it claims has held.
func play(t *testing.T, cfg config) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var out bytes.Buffer
	err := run(ctx, cfg, &out)
	t.Log("\n" + out.String())
	if err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(cfg.dir); err != nil || len(left) > 0 {
		t.Error("the demo left ", left, err)
	}
}

func TestScenarios(t *testing.T) {
	need(t)
	hosts := map[string]int{"region": 6, "single": 1, "second-pull": 2, "late-host": 3, "kill-supernode": 4, "kill-daemon": 5}
	for scenario := range maps.Keys(scenarios) {
		t.Run(scenario, func(t *testing.T) {
			play(t, short(t, scenario, hosts[scenario]))
		})
	}
}

func need(t *testing.T) {
	t.Helper()
	err := lab.Check()
	containerd := programs.DebianContainerd()
	for _, program := range []string{containerd.Daemon, containerd.Client, "docker-registry"} {
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

func TestOnLoopback(t *testing.T) {
	cfg := short(t, "second-pull", 2)
	cfg.loopback = true
	play(t, cfg)
}

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		env  map[string]string
		want string // of the error
	}{
		"defaults":         {},
		"environment":      {env: map[string]string{"HOSTS": "9", "KEEP": "1", "SCENARIO": "single"}},
		"flags":            {args: []string{"-hosts", "3", "-rate", "12.5", "-keep", "-scenario", "late-host"}},
		"unknown flag":     {args: []string{"-what"}, want: "not defined: -what"},
		"argument":         {args: []string{"what"}, want: `unexpected argument "what"`},
		"unknown scenario": {args: []string{"-scenario", "what"}, want: `no scenario "what"`},
		"few hosts":        {args: []string{"-hosts", "1"}, want: "takes 2 to 200 hosts"},
		"many hosts":       {args: []string{"-hosts", "201"}, want: "takes 2 to 200 hosts"},
		"no rate":          {args: []string{"-rate", "0"}, want: "1 to 10000 Mbit/s"},
		"bad HOSTS":        {env: map[string]string{"HOSTS": "many"}, want: "are numbers"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parse(c.args, func(key string) string { return c.env[key] }, io.Discard)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestVerdicts(t *testing.T) {
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
	if text := out.String(); !strings.Contains(text, "ok    this\n") || !strings.Contains(text, "FAIL  that\n") {
		t.Errorf("the report is %q", text)
	}
}
