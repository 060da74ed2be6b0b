//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/test/programs"
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

	ports, err := programs.Free(7)
	if err != nil {
		return err
	}
	registry := "bench.example=http://" + ln.Addr().String()
	super, err := programs.StartLocal(ctx, dir, "http://"+ports[0]+"/healthz", filepath.Join(bin, "supernode"),
		"--listen", ports[0], "--data-dir", filepath.Join(dir, "s"), "--registry", registry)
	if err != nil {
		return err
	}
	defer super.Stop()
	daemons := make([]*programs.Local, 2)
	for i := range daemons {
		p := ports[1+3*i:]
		daemons[i], err = programs.StartLocal(ctx, dir, "http://"+p[2]+"/healthz", filepath.Join(bin, "dfdaemon"), "--supernode", "http://"+ports[0], "--advertise", "127.0.0.1",
			"--data-dir", filepath.Join(dir, strconv.Itoa(i)), "--mirror-listen", p[0], "--peer-listen", p[1], "--metrics-listen", p[2],
			"--socket", filepath.Join(dir, strconv.Itoa(i)+".sock"), "--registry", registry)
		if err != nil {
			return err
		}
		defer daemons[i].Stop()
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
		e.atMost(fmt.Sprintf("dfdaemon %d peak memory%s", i+1, what), "MiB", 100, programs.Peak(d.PID()))
	}
	e.atMost("supernode peak memory"+what, "MiB", 200, programs.Peak(super.PID()))
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
