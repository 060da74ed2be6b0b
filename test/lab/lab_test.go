//go:build linux

package lab

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// need skips a test that this machine cannot run; CI can run all of them.
func need(t *testing.T) {
	t.Helper()
	err := Check()
	switch {
	case err != nil && os.Getenv("CI") == "true":
		t.Fatal("CI must have what the lab needs: ", err)
	case err != nil:
		t.Skip("no lab on this machine: ", err)
	}
}

func newLab(t *testing.T, cfg Config) *Lab {
	t.Helper()
	if !cfg.Loopback {
		need(t)
	}
	l, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if left := leftBehind(t, cfg.Dir); len(left) > 0 {
			t.Error("the lab left ", left)
		}
	})
	return l
}

// leftBehind lists what labs of this process and of dead ones have in the
// kernel and on disk.
func leftBehind(t *testing.T, dir string) []string {
	t.Helper()
	var left []string
	for _, in := range []string{"/run/netns", groups(), dir} {
		if in == "" {
			continue
		}
		for _, id := range append(orphans(in), prefix+strconv.Itoa(os.Getpid())) {
			found, err := filepath.Glob(filepath.Join(in, id+"*"))
			if err != nil {
				t.Fatal(err)
			}
			left = append(left, found...)
		}
	}
	return left
}

// send moves n bytes from one host to another and says how long it took.
func send(t *testing.T, from, to *Host, n int64) time.Duration {
	t.Helper()
	listener, err := to.Listen(t.Context(), "tcp", netip.AddrPortFrom(to.IP(), 9000).String())
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := from.Dial(t.Context(), "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if host, _, _ := net.SplitHostPort(peer.RemoteAddr().String()); host != from.IP().String() {
		t.Fatalf("the bytes of %s come from %s", from.IP(), host)
	}
	began := time.Now()
	result := make(chan error, 1)
	go func() {
		_, err := io.CopyN(conn, rand.Reader, n)
		result <- errors.Join(err, conn.Close())
	}()
	got, err := io.Copy(io.Discard, peer)
	if err := errors.Join(err, <-result); err != nil || got != n {
		t.Fatalf("moved %d of %d bytes: %v", got, n, err)
	}
	return time.Since(began)
}

// checkRate fails unless the way between two hosts carries as much as it should,
// and the link counts it.
func checkRate(t *testing.T, what string, from, to *Host, want Rate) {
	t.Helper()
	n := int64(want) / 8 // a second's worth
	share := 0.0
	for range 20 { // a busy machine slows a link down; nothing makes it faster
		before, err := to.Counters()
		if err != nil {
			t.Fatal(err)
		}
		took := send(t, from, to, n)
		after, err := to.Counters()
		if err != nil {
			t.Fatal(err)
		}
		if got := after.Received - before.Received; got < n || float64(got) > 1.03*float64(n) {
			t.Errorf("%s: the link counted %d bytes of %d", what, got, n)
		}
		if share = float64(n-burst) / took.Seconds() * 8 / float64(want); share >= 0.93 {
			break
		}
	}
	if share < 0.93 || share > 1.02 {
		t.Errorf("%s: %.2f of %v", what, share, want)
	}
}

func TestShaping(t *testing.T) {
	l := newLab(t, Config{Dir: t.TempDir(), Hosts: []HostConfig{
		{Name: "fast", Up: 80 * Mbit, Down: 80 * Mbit},
		{Name: "slow", Up: 20 * Mbit, Down: 40 * Mbit},
	}})
	fast, slow := l.Host("fast"), l.Host("slow")
	checkRate(t, "download", fast, slow, 40*Mbit)
	checkRate(t, "upload", slow, fast, 20*Mbit)
	if err := slow.SetRate(t.Context(), 60*Mbit, 0); err != nil {
		t.Fatal(err)
	}
	checkRate(t, "upload, changed", slow, fast, 60*Mbit)
	checkRate(t, "download, unshaped", fast, slow, 80*Mbit)
}

func TestZones(t *testing.T) {
	l := newLab(t, Config{Dir: t.TempDir(), ZoneLink: 20 * Mbit, Hosts: []HostConfig{
		{Name: "a1", Up: 80 * Mbit, Down: 80 * Mbit, Zone: "a"},
		{Name: "a2", Up: 80 * Mbit, Down: 80 * Mbit, Zone: "a"},
		{Name: "b1", Up: 80 * Mbit, Down: 80 * Mbit, Zone: "b"},
		{Name: "none", Up: 80 * Mbit, Down: 80 * Mbit},
	}})
	a1, a2, b1, none := l.Host("a1"), l.Host("a2"), l.Host("b1"), l.Host("none")
	checkRate(t, "inside a zone", a1, a2, 80*Mbit)
	checkRate(t, "from zone to zone", a1, b1, 20*Mbit)
	checkRate(t, "and back", b1, a2, 20*Mbit)
	checkRate(t, "out of a zone", a1, none, 20*Mbit)
	checkRate(t, "into a zone", none, b1, 20*Mbit)
}

func TestIPv6(t *testing.T) {
	l := newLab(t, Config{Dir: t.TempDir(), IPv6: true, Hosts: []HostConfig{{Name: "a"}, {Name: "b"}}})
	a, b := l.Host("a"), l.Host("b")
	send(t, a, b, 1000)
	send(t, b, a, 1000)
	if listener, err := a.Listen(t.Context(), "tcp", "127.0.0.1:0"); err == nil {
		listener.Close()
		t.Error("the host has an address of IPv4")
	}
}

func TestUnplug(t *testing.T) {
	l := newLab(t, Config{Dir: t.TempDir(), Hosts: []HostConfig{{Name: "a"}}})
	b, err := l.AddHost(t.Context(), HostConfig{Name: "b"})
	if err != nil {
		t.Fatal(err)
	}
	a := l.Host("a")
	send(t, a, b, 1000)
	if err := b.Unplug(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if conn, err := a.Dial(ctx, "tcp", netip.AddrPortFrom(b.IP(), 9000).String()); err == nil {
		conn.Close()
		t.Error("an unplugged host was reached")
	}
	if err := b.Plug(t.Context()); err != nil {
		t.Fatal(err)
	}
	send(t, a, b, 1000)
}

func TestProcesses(t *testing.T) {
	for name, cfg := range map[string]Config{
		"namespaces": {Hosts: []HostConfig{{Name: "a"}, {Name: "b"}}},
		"loopback":   {Hosts: []HostConfig{{Name: "a"}, {Name: "b"}}, Loopback: true},
	} {
		t.Run(name, func(t *testing.T) {
			cfg.Dir = t.TempDir()
			testProcesses(t, newLab(t, cfg))
		})
	}
}

func testProcesses(t *testing.T, l *Lab) {
	t.Helper()
	a := l.Host("a")
	if err := a.Run(t.Context(), "good", exec.Command("sh", "-c", "echo out; echo err >&2")); err != nil {
		t.Error(err)
	}
	if log, err := os.ReadFile(filepath.Join(a.Dir(), "good.log")); string(log) != "out\nerr\n" {
		t.Errorf("the log holds %q, %v", log, err)
	}
	err := a.Run(t.Context(), "bad", exec.Command("sh", "-c", "exit 3"))
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 3 {
		t.Errorf("an exit with 3 gave %v", err)
	}
	if _, err := a.Start("missing", exec.Command("/does/not/exist")); err == nil {
		t.Error("a program that is not there was started")
	}
	start := func() *Process {
		t.Helper()
		p, err := a.Start("sleeper", exec.Command("sleep", "1000"))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := start()
	if err := errors.Join(p.Pause(), p.Resume(), p.Stop(t.Context())); err != nil {
		t.Error(err)
	}
	p = start()
	p.Kill()
	<-p.Done()
	short, cancel := context.WithCancel(t.Context())
	cancel()
	p = start() // Close ends it
	if err := p.Wait(short); !errors.Is(err, context.Canceled) {
		t.Errorf("a wait given up gave %v", err)
	}
	if l.cfg.Loopback {
		return
	}
	if err := a.Run(t.Context(), "work", exec.Command("sh", "-c", "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done")); err != nil {
		t.Error(err)
	}
	if cpu, counted := a.CPU(); counted && cpu <= 0 {
		t.Error("work took no processor time")
	} else if idle, _ := l.Host("b").CPU(); counted && idle != 0 {
		t.Error("an idle host used its processor for ", idle)
	}
}

func TestConfigRefused(t *testing.T) {
	for name, cfg := range map[string]Config{
		"mtu":       {MTU: 100, Loopback: true},
		"bad name":  {Hosts: []HostConfig{{Name: "../x"}}, Loopback: true},
		"same name": {Hosts: []HostConfig{{Name: "a"}, {Name: "a"}}, Loopback: true},
		"directory": {Dir: "/does/not/exist", Loopback: true},
	} {
		if cfg.Dir == "" {
			cfg.Dir = t.TempDir()
		}
		if l, err := New(t.Context(), cfg); err == nil {
			t.Errorf("%s: accepted", name)
			l.Close()
		}
	}
}

func TestLabsTakeTurns(t *testing.T) {
	first := newLab(t, Config{Dir: t.TempDir(), Loopback: true})
	ctx, cancel := context.WithTimeout(t.Context(), 3*retry)
	defer cancel()
	if second, err := New(ctx, Config{Dir: t.TempDir(), Loopback: true}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second lab got %v beside the first", err)
		second.Close()
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	newLab(t, Config{Dir: t.TempDir(), Loopback: true})
}

// TestKilledOwner kills a process that owns a lab, and looks for what is left.
func TestKilledOwner(t *testing.T) {
	if dir := os.Getenv("LAB_OWNER_DIR"); dir != "" {
		ownLab(t, dir)
		return
	}
	need(t)
	allowed := readAllowed(t)
	dir := t.TempDir()
	owner := exec.Command(os.Args[0], "-test.run=^TestKilledOwner$", "-test.v") //nolint:gosec // G204: this test itself
	owner.Env = append(os.Environ(), "LAB_OWNER_DIR="+dir)
	owner.Stderr = os.Stderr
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	var child int
	for line := make([]byte, 1<<10); child == 0; {
		n, err := out.Read(line)
		if err != nil {
			t.Fatal("the owner ended early: ", err)
		}
		if _, text, ok := strings.Cut(string(line[:n]), "child "); ok {
			if child, err = strconv.Atoi(strings.Fields(text)[0]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, out)
	if err := owner.Wait(); err == nil {
		t.Fatal("a killed owner exited with 0")
	}
	err = eventually(t.Context(), func() (bool, error) {
		return errors.Is(syscall.Kill(child, 0), syscall.ESRCH), nil
	})
	if err != nil {
		t.Error("the owner's process lives on: ", err)
	}
	if left := leftBehind(t, dir); len(left) == 0 {
		t.Error("a killed lab left nothing: this test proves nothing")
	}
	newLab(t, Config{Dir: dir, Hosts: []HostConfig{{Name: "a", Up: Mbit, Down: Mbit}}}) // its end looks for what is left
	if now := readAllowed(t); now != allowed {
		t.Errorf("the machine's congestion controls were %q and are %q", allowed, now)
	}
}

func readAllowed(t *testing.T) string {
	t.Helper()
	list, err := os.ReadFile(allowedControls)
	if err != nil {
		t.Fatal(err)
	}
	return string(list)
}

// ownLab owns a lab until it is killed.
func ownLab(t *testing.T, dir string) {
	t.Helper()
	l, err := New(t.Context(), Config{Dir: dir, Hosts: []HostConfig{{Name: "a", Up: Mbit, Down: Mbit}}})
	if err != nil {
		t.Fatal(err)
	}
	p, err := l.Host("a").Start("sleeper", exec.Command("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	os.Stdout.WriteString("child " + strconv.Itoa(p.PID()) + "\n")
	<-p.Done()
}
