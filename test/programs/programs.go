//go:build linux

// Package programs starts real programs on the hosts of a lab: the registry, the
// parts of Damselfly, and the engines that pull through it.
package programs

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"damselfly.dev/test/lab"
)

const (
	registryPort      = 15000
	registryDebugPort = 15001
	apiPort           = 18002
	mirrorPort        = 16501

	// PeerPort is where every dfdaemon gives pieces.
	PeerPort = 16502
	// MetricsPort is where it tells of itself.
	MetricsPort = 16503

	// startLimit is how long a program may take until it answers.
	startLimit = 30 * time.Second
	maxMetrics = 4 << 20
)

// Build builds Damselfly's commands, and a registry for machines without
// Debian's, into dir. It must run inside the module.
func Build(ctx context.Context, dir string) error {
	root, err := Root(ctx)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-tags", "nomsgpack", "-o", dir+"/", "./cmd/...", "./test/registry")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the commands: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Root is the directory of the module that the process runs in.
func Root(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Cache is where downloads, built tools and images stay between runs.
func Cache() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache directory: %w", err)
	}
	return filepath.Join(dir, "damselfly"), nil
}

// A server is a program that answers HTTP on its host.
type server struct {
	Process *lab.Process
	Host    *lab.Host
	client  *http.Client
	health  string // the URL that answers 200 when the server is ready
	metrics string
}

// serve starts cmd and waits until its health is good.
func serve(ctx context.Context, h *lab.Host, name string, cmd *exec.Cmd, health, metrics string) (*server, error) {
	p, err := h.Start(name, cmd)
	if err != nil {
		return nil, err
	}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext:     h.Dial,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // G402: it is asked whether it lives
	}}
	s := &server{Process: p, Host: h, client: client, health: health, metrics: metrics}
	if err := until(ctx, p.Done(), s.healthy); err != nil {
		p.Kill()
		return nil, fmt.Errorf("start %s on %s: %w; it said: %s", name, h.Name(), err, p.LastWords())
	}
	return s, nil
}

// until waits for ready to give no error, and ended not to be closed meanwhile.
func until(ctx context.Context, ended <-chan struct{}, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return errors.New("it ended")
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func (s *server) healthy(ctx context.Context) error {
	body, err := s.get(ctx, s.health)
	if err != nil {
		return err
	}
	return body.Close()
}

func (s *server) get(ctx context.Context, url string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("%s answers %s", url, resp.Status)
	}
	return resp.Body, nil
}

// values reads one metric: the value under each value of label, or the sum
// under the empty string where label is empty.
func (s *server) values(ctx context.Context, metric, label string) (map[string]int64, error) {
	body, err := s.get(ctx, s.metrics)
	if err != nil {
		return nil, fmt.Errorf("read the metrics of %s: %w", s.Host.Name(), err)
	}
	defer body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(io.LimitReader(body, maxMetrics))
	if err != nil {
		return nil, fmt.Errorf("read the metrics of %s: %w", s.Host.Name(), err)
	}
	values := map[string]int64{}
	for _, m := range families[metric].GetMetric() {
		key := ""
		for _, pair := range m.GetLabel() {
			if pair.GetName() == label {
				key = pair.GetValue()
			}
		}
		values[key] += int64(m.GetCounter().GetValue() + m.GetGauge().GetValue() + m.GetUntyped().GetValue())
	}
	return values, nil
}

func (s *server) value(ctx context.Context, metric string) (int64, error) {
	values, err := s.values(ctx, metric, "")
	return values[""], err
}

func url(at netip.Addr, port uint16, path string) string {
	return "http://" + netip.AddrPortFrom(at, port).String() + path
}
