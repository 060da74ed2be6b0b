//go:build linux

package engines

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"damselfly.dev/test/image"
	"damselfly.dev/test/programs"
)

// A cell is one pull of the matrix: what an engine has to get, by which name.
type cell struct {
	registry, repo, tag string
	sample              image.Sample
	contents            []v1.Descriptor // that the pull brings
	artifact            bool            // it is no image
	zstd                bool            // its layers are compressed so
}

func (c cell) name() string { return c.registry + "/" + c.repo + ":" + c.tag }

// dir is a new directory's name, in which the pull may leave its output.
func (c cell) dir(s *site, engine string) string {
	return filepath.Join(s.host.Dir(), engine+"-"+strings.ReplaceAll(c.repo, "/", "-"))
}

// A ready engine runs on a site. pull returns an error unless the engine then
// holds the right bytes of all contents.
type ready struct {
	pull func(ctx context.Context, c cell) error
	end  func() error
}

// A client is a row of the matrix.
type client struct {
	name  string
	needs []string // programs
	start func(ctx context.Context, s *site) (ready, error)

	// brings is what of an image it gets: that of the host's platform, or more.
	brings    func(image.Sample) ([]v1.Descriptor, error)
	referrers bool // it brings artifacts that refer to an image, too
	byAddress bool // it tells mirrors the registry's address in place of its name
	// byRegion says why a registry of that kind is read by the region's own login,
	// as this engine's login does not come through a mirror.
	byRegion map[string]string
	// cannot says why this engine does not pull that by itself.
	cannot map[string]string
}

func nothing() error { return nil }

func startContainerdOn(c programs.Containerd) func(context.Context, *site) (ready, error) {
	return func(ctx context.Context, s *site) (ready, error) {
		if s.private {
			c.Login = user + ":" + password
		}
		c.Hosts = s.hosts
		e, err := c.Start(ctx, s.host, "http://"+s.mirror, s.registry.url)
		if err != nil {
			return ready{}, err
		}
		pull := func(ctx context.Context, p cell) error {
			name, pull := p.repo+":"+p.tag, e.Pull
			if p.artifact { // nothing to unpack
				pull = e.Fetch
			}
			before, err := s.daemon.Requests(ctx)
			if err != nil {
				return err
			}
			if err := pull(ctx, name); err != nil {
				return err
			}
			after, err := s.daemon.Requests(ctx)
			if err != nil {
				return err
			}
			if c.Chunk > 0 && !p.artifact {
				err = inChunks(after["blob"]-before["blob"], c.Chunk, p)
			}
			return errors.Join(err, e.Verify(p.contents))
		}
		return ready{pull, e.Close}, nil
	}
}

// inChunks says whether as many requests for blobs as there were make chunks of
// all layers.
func inChunks(asked int64, chunk int, p cell) error {
	least := int64(0)
	for _, c := range p.contents {
		if c.MediaType.IsLayer() {
			least += c.Size / int64(chunk)
		}
	}
	if asked < least {
		return fmt.Errorf("asked for blobs %d times, %d are the least in chunks of %d bytes", asked, least, chunk)
	}
	return nil
}

func startDockerd(ctx context.Context, s *site) (ready, error) {
	d, err := startDocker(ctx, s.host, "http://"+s.mirror, s.hosts)
	if err != nil {
		return ready{}, err
	}
	pull := func(ctx context.Context, c cell) error {
		if err := d.pull(ctx, c.repo, c.tag); err != nil {
			return err
		}
		return d.verify(ctx, c.repo+":"+c.tag, c.sample.Image)
	}
	return ready{pull, func() error { d.process.Kill(); return nil }}, nil
}

// startPodman writes what podman reads of registries.
func startPodman(_ context.Context, s *site) (ready, error) {
	root, conf := filepath.Join(s.host.Dir(), "podman-root"), ""
	for _, registry := range []string{programs.RegistryName, regionName} {
		conf += fmt.Sprintf("[[registry]]\nlocation = %q\n[[registry.mirror]]\nlocation = %q\ninsecure = true\n",
			registry, s.mirror+"/"+registry)
	}
	etc := filepath.Join(root, "etc", "containers")
	err := errors.Join(os.MkdirAll(etc, 0o755),
		os.WriteFile(filepath.Join(etc, "policy.json"), []byte(policy), 0o600),
		os.WriteFile(filepath.Join(etc, "registries.conf"), []byte(conf), 0o600))
	if s.hosts != "" {
		err = errors.Join(err, os.WriteFile(filepath.Join(root, "etc", "hosts"), []byte(ip6Hosts), 0o600))
	}
	if err != nil {
		return ready{}, err
	}
	return ready{func(ctx context.Context, c cell) error {
		dir := c.dir(s, "podman")
		saved := dir + ".tar"
		script := `"$0" "$@" pull ` + c.name() + ` && "$0" "$@" save --quiet --output ` + saved + " " + c.name()
		if c.zstd { // it does not save what came so
			script = `"$0" "$@" pull ` + c.name() + ` && "$0" "$@" image inspect ` + c.name() + " >" + saved
		}
		cmd := onHost(root, "/etc/containers", "sh", "-c", script, podman, "--root", filepath.Join(dir, "root"), "--runroot", "/run/containers",
			"--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none", "--tmpdir", "/run/libpod")
		if err := errors.Join(os.Mkdir(dir, 0o755), runTool(ctx, s, c, "podman", cmd)); err != nil {
			return err
		}
		if c.zstd {
			text, err := os.ReadFile(saved)
			return errors.Join(err, inspected(text, c.sample.Image))
		}
		file, err := os.Open(saved)
		if err != nil {
			return err
		}
		defer file.Close()
		return exported(file, c.sample.Image)
	}, nothing}, nil
}

// exported holds the files of an exported image against it.
func exported(from io.Reader, img v1.Image) error {
	config, err := img.ConfigName()
	if err != nil {
		return err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return err
	}
	got := map[string]bool{}
	for export := tar.NewReader(from); ; {
		header, err := export.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		hash := sha256.New()
		if _, err := io.Copy(hash, export); err != nil {
			return err
		}
		got[hex.EncodeToString(hash.Sum(nil))] = true
	}
	for _, want := range append([]v1.Hash{config}, file.RootFS.DiffIDs...) {
		if !got[want.Hex] {
			return fmt.Errorf("the export lacks %s", want)
		}
	}
	return nil
}

// byPathOf is a name for clients that know no mirrors.
func byPathOf(s *site, c cell) string { return s.mirror + "/" + c.name() }

// runTool runs a command on the site's host, with its logins unless the region
// has one.
func runTool(ctx context.Context, s *site, c cell, name string, cmd *exec.Cmd) error {
	cmd.Env = append(append(os.Environ(), "HOME="+s.host.Dir(), "TMPDIR="+s.host.Dir()), cmd.Env...)
	if s.authFile != "" && c.registry != regionName {
		cmd.Env = append(cmd.Env, "REGISTRY_AUTH_FILE="+s.authFile, "DOCKER_CONFIG="+filepath.Dir(s.authFile))
	}
	return s.host.Run(ctx, name, cmd)
}

// layoutOf is a client that writes an OCI layout, by a command line.
func layoutOf(name string, command func(s *site, c cell, to string) *exec.Cmd) func(context.Context, *site) (ready, error) {
	return func(_ context.Context, s *site) (ready, error) {
		return ready{func(ctx context.Context, c cell) error {
			to := c.dir(s, name)
			if err := runTool(ctx, s, c, name, command(s, c, to)); err != nil {
				return err
			}
			contents := c.contents
			if name == "skopeo" { // it writes the platform's image alone
				contents = slices.DeleteFunc(slices.Clone(contents), func(d v1.Descriptor) bool { return d.MediaType.IsIndex() })
			}
			return programs.Verify(filepath.Join(to, "blobs", "sha256"), contents)
		}, nothing}, nil
	}
}

func skopeoCopy(s *site, c cell, to string) *exec.Cmd {
	return private(s.hosts, "/usr/bin/skopeo", "copy", "--insecure-policy", "--preserve-digests", "--src-tls-verify=false",
		"docker://"+byPathOf(s, c), "oci:"+to+":"+c.tag)
}

func cranePull(crane string) func(*site, cell, string) *exec.Cmd {
	return func(s *site, c cell, to string) *exec.Cmd {
		return private(s.hosts, crane, "pull", "--insecure", "--format=oci", byPathOf(s, c), to)
	}
}

func orasCopy(oras string) func(*site, cell, string) *exec.Cmd {
	return func(s *site, c cell, to string) *exec.Cmd {
		args := []string{"copy", "--from-plain-http", "--to-oci-layout"}
		if c.artifact {
			args = append(args, "--recursive")
		}
		return private(s.hosts, oras, append(args, byPathOf(s, c), to+":"+c.tag)...)
	}
}

// regctlCopy has regctl know the mirror as one of the registry's.
func regctlCopy(regctl string) func(*site, cell, string) *exec.Cmd {
	return func(s *site, c cell, to string) *exec.Cmd {
		mirror := map[string]string{"tls": "disabled", "hostname": s.mirror}
		if s.private {
			mirror["user"], mirror["pass"] = user, password
		}
		text, _ := json.Marshal(map[string]any{"hosts": map[string]any{
			c.registry: map[string]any{"tls": "disabled", "mirrors": []string{s.mirror}},
			s.mirror:   mirror,
		}})
		file := to + ".json"
		args := []string{"image", "copy"}
		if c.artifact {
			args = append(args, "--referrers")
		}
		cmd := private(s.hosts, regctl, append(args, c.name(), "ocidir://"+to+":"+c.tag)...)
		cmd.Env = []string{"REGCTL_CONFIG=" + file}
		if err := os.WriteFile(file, text, 0o600); err != nil {
			return exec.Command("false")
		}
		return cmd
	}
}
