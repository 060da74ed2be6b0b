package setup

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"slices"
)

const (
	dockerConfig = "/etc/docker/daemon.json"
	dockerHub    = "docker.io"
)

// dockerFlags are where dockerd's flags are set.
var dockerFlags = []string{
	"/etc/default/docker", "/etc/sysconfig/docker", "/etc/systemd/system/docker.service.d/*.conf",
	"/etc/systemd/system/docker.service", "/usr/lib/systemd/system/docker.service", "/lib/systemd/system/docker.service",
}

// setupDocker gives Docker Hub a mirror in daemon.json, and any other registry a
// hosts.toml, which dockerd reads where containerd holds its images.
func (t *tree) setupDocker(c Config) error {
	asked := c.Registries
	if len(asked) == 0 {
		asked = []Registry{{Name: dockerHub}}
	}
	for _, r := range asked {
		if r.Name == dockerHub {
			if err := t.setupHub(c); err != nil {
				return err
			}
			continue
		}
		if err := t.dockerInsecure(r.Name); err != nil {
			return err
		}
		dir := t.hostDir(dockerCerts, r.Name)
		if dir == "" {
			dir = r.Name // the one name that all of dockerd reads
		}
		named, err := t.named(c)
		if err != nil {
			return err
		}
		if err := t.setupHosts(path.Join(dockerCerts, dir), named.url()); err != nil {
			return err
		}
		t.note("docker pulls %s through dfdaemon where containerd holds its images (docker info says driver-type: io.containerd.snapshotter.v1); else it knows mirrors for docker.io alone", r.Name)
	}
	return nil
}

func (t *tree) setupHub(c Config) error {
	if err := t.dockerFlagged(); err != nil {
		return err
	}
	f, err := t.open(dockerConfig)
	if err != nil {
		return err
	}
	after, edits, err := editDaemon(f.now, c.url())
	if err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	if edits == nil {
		t.note("%s has the mirror %s already, by another hand: it stays", f.path, c.url())
		return nil
	}
	for _, dir := range []string{dockerHub, defaultDir} {
		if names, _ := t.files(path.Join(dockerCerts, dir)); slices.Contains(names, hostsFile) {
			t.note("where containerd holds docker's images, %s counts in place of daemon.json", path.Join(dockerCerts, dir, hostsFile))
		}
	}
	return t.edit(f, after, edits)
}

// dockerFlagged refuses where a flag sets mirrors: dockerd does not start when both do.
func (t *tree) dockerFlagged() error {
	for _, pattern := range dockerFlags {
		names, err := t.glob(pattern)
		if err != nil {
			return err
		}
		for _, name := range names {
			f, err := t.open(name)
			if err != nil {
				return err
			}
			for line := range bytes.Lines(f.now) {
				if line = bytes.TrimSpace(line); bytes.Contains(line, []byte("--registry-mirror")) && line[0] != '#' {
					return fmt.Errorf("%s gives dockerd --registry-mirror, and it starts with no mirrors in %s beside: move the flag's value to %q there, and run this again",
						f.path, dockerConfig, mirrorsKey)
				}
			}
		}
	}
	return nil
}

// dockerInsecure refuses where a registry is reached by a setting that does not
// count beside a hosts.toml.
func (t *tree) dockerInsecure(registry string) error {
	f, err := t.open(dockerConfig)
	if err != nil {
		return err
	}
	var doc struct {
		Insecure []string `json:"insecure-registries"`
	}
	_ = json.Unmarshal(f.now, &doc) // what cannot be read says nothing
	if slices.Contains(doc.Insecure, registry) {
		return fmt.Errorf("%s has %s in insecure-registries, which counts no more beside a %s: write one by hand that names http://%s as its server",
			f.path, registry, path.Join(dockerCerts, registry, hostsFile), registry)
	}
	return nil
}
