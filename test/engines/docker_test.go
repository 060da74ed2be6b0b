//go:build linux

package engines

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"damselfly.dev/test/lab"
)

const dockerd = "/usr/sbin/dockerd"

// A docker is a dockerd that shares nothing with another one.
type docker struct {
	process *lab.Process
	client  *http.Client
}

func startDocker(ctx context.Context, h *lab.Host, mirror, hosts string) (*docker, error) {
	dir := filepath.Join(h.Dir(), "docker")
	config := fmt.Sprintf(`{"deprecated-key-path": %q}`, filepath.Join(dir, "key.json")) // else it is made in /etc
	err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "daemon.json"), []byte(config), 0o600))
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "sock")
	p, err := h.Start("dockerd", private(hosts, dockerd, "--config-file", filepath.Join(dir, "daemon.json"),
		"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		"--host", "unix://"+socket, "--storage-driver", "overlay2", "--bridge", "none", "--iptables=false", "--ip6tables=false",
		"--registry-mirror", mirror))
	if err != nil {
		return nil, err
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	d := &docker{process: p, client: &http.Client{Transport: &http.Transport{DialContext: dial}}}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		body, err := d.call(ctx, http.MethodGet, "/_ping")
		if err == nil {
			return d, body.Close()
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, context.Cause(ctx))
		case <-p.Done():
			return nil, fmt.Errorf("dockerd has ended; it said: %s", p.LastWords())
		case <-tick.C:
		}
	}
}

func (d *docker) call(ctx context.Context, method, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, fmt.Errorf("dockerd answers %s: %s", resp.Status, said)
	}
	return resp.Body, nil
}

// pullDocker pulls app, which dockerd takes for an image of docker.io, the only
// registry it has mirrors for.
func pullDocker(ctx context.Context, h *lab.Host, mirror, _ string, img v1.Image) error {
	d, err := startDocker(ctx, h, mirror, "")
	if err != nil {
		return err
	}
	defer d.process.Kill() // it takes ten seconds to stop by itself
	name, tag, _ := strings.Cut(app, ":")
	if err := d.pull(ctx, name, tag); err != nil {
		return err
	}
	return d.verify(ctx, app, img)
}

func (d *docker) pull(ctx context.Context, name, tag string) error {
	body, err := d.call(ctx, http.MethodPost, "/images/create?"+url.Values{"fromImage": {name}, "tag": {tag}}.Encode())
	if err != nil {
		return err
	}
	defer body.Close()
	for events := json.NewDecoder(body); ; {
		var event struct{ Error string }
		if err := events.Decode(&event); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if event.Error != "" {
			return fmt.Errorf("dockerd says %s", event.Error)
		}
	}
}

// verify holds dockerd's image, as it would be exported, against img.
func (d *docker) verify(ctx context.Context, name string, img v1.Image) error {
	body, err := d.call(ctx, http.MethodGet, "/images/"+name+"/get")
	if err != nil {
		return err
	}
	defer body.Close()
	return exported(body, img)
}
