//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// memory pulls all blobs at once through two hosts, the second beginning when
// the first is under way so that both receive and send, and reads the peak
// resident memory of each process.
func memory(ctx context.Context, e *env) error {
	dir, err := os.MkdirTemp("", "damselfly-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	bin, blobs, size := e.bin, 10, int64(256<<20)
	if e.short {
		blobs, size = 4, 16<<20
	}
	origin := newOrigin(blobs, size)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: origin, ReadHeaderTimeout: time.Minute}
	go srv.Serve(ln)
	defer srv.Close()

	ports, err := freePorts(7)
	if err != nil {
		return err
	}
	registry := "bench.example=http://" + ln.Addr().String()
	super, err := start(ctx, dir, "supernode", bin, "--listen", ports[0], "--data-dir", filepath.Join(dir, "s"), "--registry", registry)
	if err != nil {
		return err
	}
	defer super.stop()
	if err := ready(ctx, "http://"+ports[0]+"/healthz"); err != nil {
		return err
	}
	daemons := make([]*process, 2)
	for i := range daemons {
		p := ports[1+3*i:]
		daemons[i], err = start(ctx, dir, "dfdaemon", bin, "--supernode", "http://"+ports[0], "--advertise", "127.0.0.1",
			"--data-dir", filepath.Join(dir, strconv.Itoa(i)), "--mirror-listen", p[0], "--peer-listen", p[1], "--metrics-listen", p[2],
			"--socket", filepath.Join(dir, strconv.Itoa(i)+".sock"), "--registry", registry)
		if err != nil {
			return err
		}
		defer daemons[i].stop()
		if err := ready(ctx, "http://"+p[2]+"/healthz"); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	for i := range daemons {
		for b := range origin.blobs {
			g.Go(func() error { return pullMade(gctx, ports[1+3*i], origin.blobs[b]) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	what := fmt.Sprintf(", %d blobs of %d MiB at once", blobs, size>>20)
	for i, d := range daemons {
		e.atMost(fmt.Sprintf("dfdaemon %d peak memory%s", i+1, what), "MiB", 100, peakMiB(d.cmd.Process.Pid))
	}
	e.atMost("supernode peak memory"+what, "MiB", 200, peakMiB(super.cmd.Process.Pid))
	e.atMost("origin copies"+what, "", 1.004, float64(origin.sent.Load())/float64(int64(blobs)*size))
	return nil
}

func pullMade(ctx context.Context, mirror string, b madeBlob) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+mirror+"/v2/bench/blobs/blobs/"+b.digest+"?ns=bench.example", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("pull %s: %s", b.digest, resp.Status)
	}
	h := sha256.New()
	if _, err := io.Copy(h, resp.Body); err != nil {
		return fmt.Errorf("pull %s: %w", b.digest, err)
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != b.digest {
		return fmt.Errorf("pull %s: got %s", b.digest, got)
	}
	return nil
}

// process is one of ours, started for the measurement.
type process struct {
	cmd *exec.Cmd
	log string
}

func start(ctx context.Context, dir, name, bin string, args ...string) (*process, error) {
	f, err := os.CreateTemp(dir, name+"-*.log")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, name), args...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &process{cmd: cmd, log: f.Name()}, nil
}

func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	_ = p.cmd.Wait()
}

// peakMiB is the most resident memory a process has had, 0 when unknown.
func peakMiB(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, _ := strconv.ParseFloat(strings.Fields(v)[0], 64)
			return kb / 1024
		}
	}
	return 0
}

func freePorts(n int) ([]string, error) {
	var addrs []string
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer ln.Close()
		addrs = append(addrs, ln.Addr().String())
	}
	return addrs, nil
}

func ready(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return errors.New("not ready within 20 s: " + url)
		case <-t.C:
		}
	}
}
