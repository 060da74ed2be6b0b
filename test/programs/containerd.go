//go:build linux

package programs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"damselfly.dev/test/lab"
)

// stopLimit is how long an engine may take to end.
const stopLimit = 10 * time.Second

// Containerd says which containerd to run.
type Containerd struct {
	Daemon, Client string // paths of containerd and ctr
	// Chunk lets a containerd 2 get each layer in ranges of so many bytes, several
	// at once; 0 lets it get them whole.
	Chunk int
	Login string // user:password, "" for none
	Hosts string // a file that it has for /etc/hosts, "" for this machine's
}

// DebianContainerd is containerd 1.6.
func DebianContainerd() Containerd {
	return Containerd{Daemon: "/usr/bin/containerd", Client: "/usr/bin/ctr"}
}

// NewContainerd is containerd 2, built from the Go module proxy into cache.
func NewContainerd(cache string) Containerd {
	return Containerd{Daemon: filepath.Join(cache, "bin", "containerd"), Client: filepath.Join(cache, "bin", "ctr")}
}

// command runs a program that has c's hosts.
func (c Containerd) command(program string, args ...string) *exec.Cmd {
	if c.Hosts == "" {
		return exec.Command(program, args...)
	}
	args = append([]string{"-c", `mount --bind "$0" /etc/hosts && exec "$@"`, c.Hosts, program}, args...)
	return exec.Command("sh", args...) //nolint:gosec // G204: as above
}

// A ContainerdEngine is a containerd that runs.
type ContainerdEngine struct {
	host    *lab.Host
	program Containerd
	process *lab.Process
	dir     string
}

// Start starts a containerd with an empty store. It pulls from the registry
// through mirror, a URL, or straight where mirror is empty; where the mirror
// fails containerd turns to the registry by itself.
func (c Containerd) Start(ctx context.Context, h *lab.Host, mirror, registry string) (*ContainerdEngine, error) {
	dir, err := os.MkdirTemp(h.Dir(), "containerd-")
	if err != nil {
		return nil, fmt.Errorf("make containerd's directory: %w", err)
	}
	first := registry // containerd 1.6 refuses a file that names no host
	if mirror != "" {
		first = mirror
	}
	hosts := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", registry, first)
	err = errors.Join(
		os.MkdirAll(filepath.Join(dir, "hosts", RegistryName), 0o755),
		os.WriteFile(filepath.Join(dir, "hosts", RegistryName, "hosts.toml"), []byte(hosts), 0o644),
		os.WriteFile(filepath.Join(dir, "config.toml"), []byte(c.config(dir)), 0o644),
	)
	if err != nil {
		return nil, fmt.Errorf("configure containerd: %w", err)
	}
	e := &ContainerdEngine{host: h, program: c, dir: dir}
	e.process, err = h.Start(filepath.Base(dir), c.command(c.Daemon, "--config", filepath.Join(dir, "config.toml")))
	if err != nil {
		return nil, err
	}
	err = until(ctx, e.process.Done(), func(ctx context.Context) error { return e.ctr(ctx, "version") })
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start containerd on %s: %w; it said: %s", h.Name(), err, e.process.LastWords()), e.Close())
	}
	return e, nil
}

// config is for a containerd that shares nothing with another one and runs
// nothing: it pulls and unpacks.
func (c Containerd) config(dir string) string {
	text := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.restart", "io.containerd.monitor.v1.cgroups", "io.containerd.runtime.v1.linux",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = %q
[ttrpc]
  address = %q
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "sock"), filepath.Join(dir, "ttrpc"))
	if c.Chunk > 0 {
		text += fmt.Sprintf("[plugins.\"io.containerd.transfer.v1.local\"]\n  max_concurrent_downloads = 4\n  concurrent_layer_fetch_buffer = %d\n", c.Chunk)
	}
	return text
}

// ctr runs containerd's client; its output is appended to a log on the host.
func (e *ContainerdEngine) ctr(ctx context.Context, args ...string) error {
	args = append([]string{"--address", filepath.Join(e.dir, "sock")}, args...)
	return e.host.Run(ctx, filepath.Base(e.dir)+"-ctr", e.program.command(e.program.Client, args...))
}

// Fetch brings an image such as "demo/app:v1" into containerd's content store.
func (e *ContainerdEngine) Fetch(ctx context.Context, name string) error {
	return e.get(ctx, "content", "fetch", name)
}

// Pull is Fetch and the unpacking, which costs much more than the fetching.
func (e *ContainerdEngine) Pull(ctx context.Context, name string) error {
	return e.get(ctx, "images", "pull", name)
}

func (e *ContainerdEngine) get(ctx context.Context, noun, verb, name string) error {
	args := []string{noun, verb, "--hosts-dir", filepath.Join(e.dir, "hosts")}
	if e.program.Login != "" {
		args = append(args, "--user", e.program.Login)
	}
	return e.ctr(ctx, append(args, RegistryName+"/"+name)...)
}

// Verify checks every content in containerd's content store.
func (e *ContainerdEngine) Verify(contents []v1.Descriptor) error {
	return Verify(filepath.Join(e.dir, "root", "io.containerd.content.v1.content", "blobs", "sha256"), contents)
}

// Command is how a person pulls with this engine.
func (e *ContainerdEngine) Command(name string) string {
	return fmt.Sprintf("%s --address %s images pull --hosts-dir %s %s",
		e.program.Client, filepath.Join(e.dir, "sock"), filepath.Join(e.dir, "hosts"), RegistryName+"/"+name)
}

// Close ends containerd and removes its store.
func (e *ContainerdEngine) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	return errors.Join(e.process.Stop(ctx), os.RemoveAll(e.dir))
}
