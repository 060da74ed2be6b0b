//go:build linux

package engines

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"damselfly.dev/test/image"
	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

const (
	podman    = "/usr/bin/podman"
	loopback6 = "[::1]:16501"
	ip6Hosts  = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n"
)

// A setUp is an engine on a host whose own files dfdaemon setup has written.
type setUp struct {
	engine   string   // as dfdaemon setup calls it
	registry []string // the flags
	mirror   string   // where dfdaemon's mirror listens, "" for the usual address
	needs    []string // programs
	// files are the host's before setup, below its root. REGISTRY and DIR in them
	// are the registry's address and a directory of the engine's own.
	files map[string]string
	// pull starts the engine with these files and nothing in store, pulls app and
	// returns an error unless it then holds the right bytes.
	pull func(ctx context.Context, h *lab.Host, root, dir string, img v1.Image) error
	// falls tells that the registry itself is reached without dfdaemon too.
	falls bool
}

const containerd2Config = `version = 3
root = "DIR/root"
state = "DIR/state"

[grpc]
  address = "DIR/sock"

[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = ''
`

// criConfig lets containerd 1.6 pull as Kubernetes does.
const criConfig = `version = 2 # of the host's
root = "DIR/root"
state = "DIR/state"
disabled_plugins = ["io.containerd.internal.v1.restart", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]

[grpc]
  address = "DIR/sock"
[ttrpc]
  address = "DIR/ttrpc"

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    disable_apparmor = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"`

const hostsToml = "# the host's own\nserver = \"http://REGISTRY\"\n"

const registriesConf = `unqualified-search-registries = ["registry.demo"]

[[registry]]
prefix = "registry.demo"
location = "REGISTRY"
insecure = true
`

func setUps(cache string) map[string]setUp {
	debian, proxy := programs.DebianContainerd(), programs.NewContainerd(cache)
	named := []string{"--registry", programs.RegistryName}
	aliased := []string{"--registry", programs.RegistryName + "=" + programs.RegistryName} // its location has a port
	hosts := "/etc/containerd/certs.d/" + programs.RegistryName + "/hosts.toml"
	return map[string]setUp{
		"containerd-1.6-cri": {
			engine: "containerd", registry: named, needs: []string{debian.Daemon}, pull: pullCRI, falls: true,
			files: map[string]string{"/etc/containerd/config.toml": criConfig, hosts: hostsToml},
		},
		"containerd-2": {
			engine: "containerd", registry: named, needs: []string{proxy.Daemon, proxy.Client}, pull: pullHostsDir(proxy), falls: true,
			files: map[string]string{"/etc/containerd/config.toml": containerd2Config, hosts: hostsToml},
		},
		"containerd-1.6-all": {
			engine: "containerd", needs: []string{debian.Daemon}, pull: pullCRI, mirror: loopback6,
			files: map[string]string{"/etc/containerd/config.toml": criConfig, "/etc/hosts": ip6Hosts},
		},
		"dockerd": {
			engine: "docker", needs: []string{dockerd}, pull: pullConfigured, mirror: loopback6,
			files: map[string]string{"/etc/docker/daemon.json": "{\n  \"deprecated-key-path\": \"DIR/key.json\"\n}"},
		},
		"podman": {
			engine: "podman", registry: aliased, needs: []string{podman}, pull: pullPodman, falls: true,
			files: map[string]string{"/etc/containers/registries.conf": registriesConf, "/etc/containers/policy.json": policy},
		},
		"podman-drop-in": {
			engine: "podman", registry: named, needs: []string{podman}, pull: pullPodman, mirror: loopback6,
			files: map[string]string{"/etc/containers/policy.json": policy, "/etc/hosts": ip6Hosts},
		},
		"crio-by-skopeo": { // CRI-O reads its registries with the same library
			engine: "crio", registry: aliased, needs: []string{"/usr/bin/skopeo"}, pull: pullNamed, falls: true,
			files: map[string]string{"/etc/containers/registries.conf": registriesConf, "/etc/containers/policy.json": policy},
		},
	}
}

const policy = `{"default": [{"type": "insecureAcceptAnything"}]}`

// TestSetUp has dfdaemon set engines up, lets them pull through it and, where the
// registry can be reached, without it, and undoes it.
func TestSetUp(t *testing.T) {
	cache, bin := built(t)
	img, err := image.Small(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range setUps(cache) {
		t.Run(name, func(t *testing.T) {
			need(t, s.needs)
			testSetUp(t, s, img, bin)
		})
	}
}

func testSetUp(t *testing.T, s setUp, img v1.Image, bin string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*pullLimit)
	defer cancel()
	l, err := lab.New(ctx, lab.Config{Hosts: []lab.HostConfig{{Name: "registry"}, {Name: "supernode"}, {Name: "host"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	registry, err := programs.StartRegistry(ctx, l.Host("registry"), bin)
	if err != nil {
		t.Fatal(err)
	}
	if err := registry.Push(ctx, img, app); err != nil {
		t.Fatal(err)
	}
	upstreams := map[string]string{programs.RegistryName: registry.URL(), "docker.io": registry.URL()}
	supernode, err := programs.StartSupernode(ctx, l.Host("supernode"), bin, upstreams)
	if err != nil {
		t.Fatal(err)
	}
	h := l.Host("host")
	var flags []string
	if s.mirror != "" {
		if err := h.Inside(haveIPv6); err != nil {
			t.Fatal(err)
		}
		flags = []string{"--mirror-listen", s.mirror}
	}
	daemon, err := programs.StartDaemon(ctx, h, bin, supernode.URL(), upstreams, flags...)
	if err != nil {
		t.Fatal(err)
	}
	mirror := cmp.Or(s.mirror, strings.TrimPrefix(daemon.Mirror(), "http://"))

	root, dir := filepath.Join(h.Dir(), "root"), filepath.Join(h.Dir(), "engine")
	layHost(t, s, root, dir, registry.URL())
	before := tree(t, root)
	runDaemon(t, bin, append([]string{"setup", s.engine, "--root", root, "--mirror", mirror}, s.registry...)...)
	if err := s.pull(ctx, h, root, dir, img); err != nil {
		t.Fatal(err)
	}
	asked(t, registry, supernode, img)
	throughSwarm(ctx, t, daemon, img)
	if s.falls {
		daemon.Process.Kill()
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := s.pull(ctx, h, root, dir, img); err != nil {
			t.Fatal("without dfdaemon: ", err)
		}
	}
	runDaemon(t, bin, "unset", s.engine, "--root", root)
	if after := tree(t, root); !slices.Equal(after, before) {
		t.Errorf("unset leaves %q in place of %q", after, before)
	}
}

// haveIPv6 gives the loopback of the host that it runs on its IPv6 address: a lab
// has none.
func haveIPv6() error {
	return os.WriteFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6", []byte("0"), 0)
}

func layHost(t *testing.T, s setUp, root, dir, registry string) {
	t.Helper()
	fill := strings.NewReplacer("REGISTRY", strings.TrimPrefix(registry, "http://"), "DIR", dir)
	for name, text := range s.files {
		at := filepath.Join(root, name)
		err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, []byte(fill.Replace(text)), 0o640))
		if err != nil {
			t.Fatal(err)
		}
	}
}

// tree is all that is below root.
func tree(t *testing.T, root string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var text []byte
		if info.Mode().IsRegular() {
			text, err = os.ReadFile(path)
		}
		all = append(all, fmt.Sprintf("%s %s %q", path, info.Mode(), text))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func runDaemon(t *testing.T, bin string, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), filepath.Join(bin, "dfdaemon"), args...).CombinedOutput() //nolint:gosec // G204: built by Build
	if err != nil {
		t.Fatalf("dfdaemon %v: %v: %s", args, err, out)
	}
	t.Logf("dfdaemon %v:\n%s", args, out)
}

// throughSwarm holds the daemon's own count against the image's blobs.
func throughSwarm(ctx context.Context, t *testing.T, daemon *programs.Daemon, img v1.Image) {
	t.Helper()
	got, err := daemon.Received(ctx)
	if err != nil {
		t.Fatal(err)
	}
	contents, err := image.Contents(img)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := img.Size()
	if err != nil {
		t.Fatal(err)
	}
	if want := image.Size(contents) - manifest; got["supernode"] != want || got["origin"] != 0 {
		t.Errorf("by its metrics dfdaemon has %v, of %d bytes", got, want)
	}
}

// onHost is a command that finds root's dir of /etc, and its /etc/hosts if it
// has one, in place of this machine's.
func onHost(root, etc, program string, args ...string) *exec.Cmd {
	const script = `mount --bind "$1$2" "$2" || exit
[ ! -e "$1/etc/hosts" ] || mount --bind "$1/etc/hosts" /etc/hosts || exit; shift 2
for dir in /opt /run /var/lib; do mount -t tmpfs lab $dir || exit; done; exec "$@"`
	return exec.Command("sh", append([]string{"-c", script, "sh", root, etc, program}, args...)...) //nolint:gosec // G204: programs of this file
}

// startContainerd starts one with the host's own configuration.
func startContainerd(ctx context.Context, h *lab.Host, root, dir, program string) (*lab.Process, error) {
	p, err := h.Start("containerd", onHost(root, "/etc/containerd", program))
	if err != nil {
		return nil, err
	}
	return p, answers(ctx, p, filepath.Join(dir, "sock"))
}

// answers waits until somebody listens on a socket.
func answers(ctx context.Context, p *lab.Process, socket string) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-p.Done():
			return fmt.Errorf("it has ended; it said: %s", p.LastWords())
		case <-tick.C:
		}
	}
}

func stored(dir string, img v1.Image) error {
	contents, err := image.Contents(img)
	if err != nil {
		return err
	}
	return programs.Verify(filepath.Join(dir, "root", "io.containerd.content.v1.content", "blobs", "sha256"), contents)
}

// pullCRI asks containerd as the kubelet does.
func pullCRI(ctx context.Context, h *lab.Host, root, dir string, img v1.Image) error {
	p, err := startContainerd(ctx, h, root, dir, programs.DebianContainerd().Daemon)
	if err != nil {
		return err
	}
	defer p.Kill()
	ref := programs.RegistryName + "/" + app
	spec := append([]byte{0x0a, byte(len(ref))}, ref...)      // ImageSpec.image
	request := append([]byte{0x0a, byte(len(spec))}, spec...) // PullImageRequest.image
	if err := call(ctx, filepath.Join(dir, "sock"), "/runtime.v1.ImageService/PullImage", request); err != nil {
		return fmt.Errorf("%w; containerd said: %s", err, p.LastWords())
	}
	return stored(dir, img)
}

// call makes one gRPC call and looks at its status alone.
func call(ctx context.Context, socket, method string, message []byte) error {
	transport := &http.Transport{
		Protocols: new(http.Protocols),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))) //nolint:gosec // G115: some bytes
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost"+method, bytes.NewReader(append(frame, message...)))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/grpc")
	r.Header.Set("Te", "trailers")
	resp, err := transport.RoundTrip(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	for _, from := range []http.Header{resp.Trailer, resp.Header} {
		if status := from.Get("Grpc-Status"); status != "" && status != "0" {
			return fmt.Errorf("%s: status %s: %s", method, status, from.Get("Grpc-Message"))
		}
	}
	return nil
}

// pullHostsDir lets ctr of a containerd without CRI read what setup has written.
func pullHostsDir(c programs.Containerd) func(context.Context, *lab.Host, string, string, v1.Image) error {
	return func(ctx context.Context, h *lab.Host, root, dir string, img v1.Image) error {
		p, err := startContainerd(ctx, h, root, dir, c.Daemon)
		if err != nil {
			return err
		}
		defer p.Kill()
		err = h.Run(ctx, "ctr", exec.Command(c.Client, "--address", filepath.Join(dir, "sock"), "images", "pull", //nolint:gosec // G204: built by install.sh
			"--hosts-dir", filepath.Join(root, "/etc/containerd/certs.d"), programs.RegistryName+"/"+app))
		return errors.Join(err, stored(dir, img))
	}
}

// pullConfigured pulls with a dockerd that reads the host's daemon.json.
func pullConfigured(ctx context.Context, h *lab.Host, root, dir string, img v1.Image) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	socket := filepath.Join(dir, "sock")
	p, err := h.Start("dockerd", onHost(root, "/etc/docker", dockerd, "--data-root", filepath.Join(dir, "data"),
		"--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"), "--host", "unix://"+socket,
		"--storage-driver", "overlay2", "--bridge", "none", "--iptables=false", "--ip6tables=false"))
	if err != nil {
		return err
	}
	defer p.Kill()
	if err := answers(ctx, p, socket); err != nil {
		return err
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	d := &docker{process: p, client: &http.Client{Transport: &http.Transport{DialContext: dial}}}
	name, tag, _ := strings.Cut(app, ":")
	if err := d.pull(ctx, name, tag); err != nil {
		return err
	}
	return d.verify(ctx, app, img)
}

// pullPodman pulls with the host's registries.conf; podman verifies each digest,
// so that its image is told by its parts.
func pullPodman(ctx context.Context, h *lab.Host, root, dir string, img v1.Image) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	script := `"$0" "$@" pull ` + programs.RegistryName + "/" + app + ` && "$0" "$@" image inspect ` + programs.RegistryName + "/" + app
	said := new(bytes.Buffer)
	cmd := onHost(root, "/etc/containers", "sh", "-c", script, podman, "--root", filepath.Join(dir, "root"), "--runroot", "/run/containers",
		"--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none", "--tmpdir", "/run/libpod")
	cmd.Stdout = said
	cmd.Env = append(os.Environ(), "HOME="+h.Dir(), "TMPDIR="+h.Dir())
	if err := h.Run(ctx, "podman", cmd); err != nil {
		return err
	}
	_, text, _ := strings.Cut(said.String(), "[")
	return inspected([]byte("["+text), img)
}

// inspected holds what podman says of an image against it.
func inspected(text []byte, img v1.Image) error {
	var images []struct {
		ID     string `json:"Id"`
		RootFS struct{ Layers []v1.Hash }
	}
	if err := json.Unmarshal(text, &images); err != nil || len(images) != 1 {
		return fmt.Errorf("podman says %s: %w", text, errors.Join(err, errors.ErrUnsupported))
	}
	config, err := img.ConfigName()
	if err != nil {
		return err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return err
	}
	if images[0].ID != config.Hex || !slices.Equal(images[0].RootFS.Layers, file.RootFS.DiffIDs) {
		return fmt.Errorf("podman holds %v in place of %s with %v", images[0], config, file.RootFS.DiffIDs)
	}
	return nil
}

// pullNamed has skopeo copy the image by its name.
func pullNamed(ctx context.Context, h *lab.Host, root, dir string, img v1.Image) error {
	return tool(ctx, h, dir, img, onHost(root, "/etc/containers", "/usr/bin/skopeo", "copy", "--preserve-digests",
		"docker://"+programs.RegistryName+"/"+app, "oci:"+dir+":v1"))
}
