//go:build linux

package programs

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A Local is a program on this machine itself, not on a host of a lab.
type Local struct{ cmd *exec.Cmd }

// StartLocal starts a program, whose output goes to a file in dir, and waits until
// health, a URL, answers 200.
func StartLocal(ctx context.Context, dir, health, program string, args ...string) (*Local, error) {
	f, err := os.CreateTemp(dir, filepath.Base(program)+"-*.log")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{client: http.DefaultClient, health: health}
	if err := until(ctx, nil, s.healthy); err != nil {
		(&Local{cmd}).Stop()
		return nil, fmt.Errorf("start %s: %w", program, err)
	}
	return &Local{cmd}, nil
}

// PID is the program's process.
func (p *Local) PID() int { return p.cmd.Process.Pid }

// Stop ends the program and waits for it.
func (p *Local) Stop() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.cmd.Wait()
}

// Free returns n addresses on loopback that nobody listens at. Their ports are below
// those that the kernel gives to whoever asks for any: nobody gets one before it is used.
func Free(n int) (addrs []string, err error) {
	for tries := 0; len(addrs) < n; tries++ {
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(20_000)))
		switch {
		case err == nil:
			defer ln.Close()
			addrs = append(addrs, ln.Addr().String())
		case tries > 100*n:
			return nil, err
		}
	}
	return addrs, nil
}

// Memory is what of a process is resident now, Peak the most that ever was, both
// in MiB, 0 when not known.
func Memory(pid int) float64 { return status(pid, "VmRSS:") }

// Peak is the most that Memory has been.
func Peak(pid int) float64 { return status(pid, "VmHWM:") }

func status(pid int, key string) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key); ok {
			kib, _ := strconv.ParseFloat(strings.Fields(v)[0], 64)
			return kib / 1024
		}
	}
	return 0
}

// CPU is the processor time that a process has taken, in seconds.
func CPU(pid int) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(b), ") ") // the name may hold spaces
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100 // USER_HZ
}
