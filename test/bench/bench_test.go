//go:build linux

package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

func need(t *testing.T) {
	t.Helper()
	err := lab.Check()
	for _, program := range []string{"nginx", "curl"} {
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

// The scenarios work, and what they count is right: their times mean nothing here.
func TestScenarios(t *testing.T) {
	need(t)
	dir := t.TempDir()
	require.NoError(t, programs.Build(t.Context(), dir))
	e := env{bin: dir, short: true}
	out := filepath.Join(dir, "rows.json")
	require.NoError(t, e.measure(t.Context(), "flash|killed|zones|private", out))
	require.FileExists(t, out)

	seen := map[string]float64{} // by scenario and the end of the name
	for _, r := range e.rows {
		_, what, _ := strings.Cut(r.Name, ": ")
		seen[r.Scenario+" "+what] = r.Figure
		if strings.HasSuffix(what, "origin copies") {
			require.True(t, r.OK, "%s: %v", r.Name, r.Values)
		}
		require.Positive(t, r.Figure, r.Name)
	}
	for name, limits := range map[string][2]float64{ // least and most
		"flash efficiency":                     {0.01, 1.05},
		"flash efficiency, direct":             {0.01, 0.13}, // an eighth
		"flash supernode copies":               {1, 8},
		"flash peak memory, dfdaemon":          {1, 200},
		"killed last of the others":            {0.5, 60}, // half of the link time
		"killed origin copies":                 {1, 1},
		"private HEADs for one host, at most":  {1, 1},
		"private origin copies":                {1, 1},
		"zones copies that cross":              {1, 1.1},
		"zones no rule, copies that cross":     {1, 8},
		"zones far zone over its bound":        {0.9, 100},
		"zones no rule, last of the near zone": {0.5, 60},
	} {
		require.Contains(t, seen, name)
		require.GreaterOrEqual(t, seen[name], limits[0], name)
		require.LessOrEqual(t, seen[name], limits[1], name)
	}
}

func TestPicture(t *testing.T) {
	e := env{rows: []row{
		{Scenario: "flash", Name: "8 hosts: efficiency", Figure: 0.95},
		{Scenario: "flash", Name: "8 hosts: efficiency, direct", Figure: 0.12},
		{Scenario: "flash", Name: "16 hosts: efficiency", Figure: 0.91},
		{Scenario: "flash", Name: "16 hosts: efficiency, direct", Figure: 0.06},
		{Scenario: "rich", Name: "16 hosts: efficiency", Figure: 0.99},
	}}
	file := filepath.Join(t.TempDir(), "picture.svg")
	require.NoError(t, e.draw(file))
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	picture := string(text)
	wellFormed(t, picture)
	require.NotContains(t, picture, "%!")
	require.Contains(t, picture, ">0.91 to 0.95<")
	require.Contains(t, picture, ">0.06 to 0.12<")
	require.Error(t, new(env).draw(file), "nothing was measured")
}

func wellFormed(t *testing.T, text string) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(text))
	for {
		_, err := d.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		require.NoError(t, err)
	}
}

func TestBound(t *testing.T) {
	rate := float64(lab.Mbit) * payload / 8
	second := int64(rate) // what a link of 1 Mbit/s carries in a second
	l := equal(8, lab.Mbit)
	require.InDelta(t, 1, l.bound(second), 0.001, "one link is the limit")
	l.hosts[3] /= 4
	require.InDelta(t, 4, l.bound(second), 0.001, "the slowest host")
	l = equal(8, lab.Mbit)
	l.origin /= 5
	require.InDelta(t, 5, l.bound(second), 0.001, "the origin")
	l = equal(8, lab.Mbit)
	l.supernode /= 2
	require.InDelta(t, 2, l.bound(second), 0.001, "the supernode")
}

func TestRows(t *testing.T) {
	var e env
	e.atMost("", "", 1, 3, 1, 2)
	e.atMost("", "", 2, 3, 1, 2)
	e.atMost("nothing was measured", "", 2)
	e.atLeast("", "", 2, 3, 1, 2)
	e.atLeast("", "", 3, 3, 1, 2)
	e.once("", 1, 1.0001)
	e.once("", 1, 1, 1.001)
	e.once("nothing was measured")
	held := make([]bool, 0, len(e.rows))
	for _, r := range e.rows {
		held = append(held, r.OK)
	}
	require.Equal(t, []bool{false, true, false, true, false, true, false, false}, held)
	require.EqualError(t, e.print(), "5 of 8 rows do not hold")
}

func TestDecisionRates(t *testing.T) {
	names, values := decisionRates(`goos: linux
BenchmarkDecisions/hosts=100         	  500000	       812.4 ns/op	   1230000 decisions/s	      41 B/op	       0 allocs/op
BenchmarkDecisions/hosts=1000        	  500000	       999.0 ns/op	   9.5e+05 decisions/s	      41 B/op	       0 allocs/op
BenchmarkDecisions/hosts=100         	  500000	       800.0 ns/op	   1250000 decisions/s	      41 B/op	       0 allocs/op
BenchmarkOther/hosts=100         	  500000	       800.0 ns/op	   7 decisions/s
PASS
`)
	require.Equal(t, []string{"hosts 100", "hosts 1000"}, names)
	require.Equal(t, map[string][]float64{"hosts 100": {1230000, 1250000}, "hosts 1000": {950000}}, values)
}
