//go:build linux

// Package engines lets real engines pull an image through dfdaemon from a real registry.
package engines

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"damselfly.dev/test/image"
	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// app is the image that all engines pull.
const app = "demo/app:v1"

// pullLimit is how long one engine may take for one pull.
const pullLimit = 2 * time.Minute

// An engine pulls app on a host through a mirror and returns an error unless
// it then holds the right bytes. Whatever it starts ends with the lab.
type engine struct {
	needs []string // programs
	pull  func(ctx context.Context, h *lab.Host, mirror, registry string, img v1.Image) error
}

func engines(cache string) map[string]engine {
	debian, proxy := programs.DebianContainerd(), programs.NewContainerd(cache)
	crane := filepath.Join(cache, "bin", "crane")
	return map[string]engine{
		"containerd-1.6": {[]string{debian.Daemon, debian.Client}, containerd(debian)},
		"containerd-2":   {[]string{proxy.Daemon, proxy.Client}, containerd(proxy)},
		"dockerd":        {[]string{dockerd}, pullDocker},
		"skopeo":         {[]string{"/usr/bin/skopeo"}, pullSkopeo},
		"crane":          {[]string{crane}, craneAt(crane)},
	}
}

// need skips, saying why, where the machine lacks a part; CI lacks none.
func need(t *testing.T, programs []string) {
	t.Helper()
	err := lab.Check()
	for _, program := range append(programs, "/usr/bin/docker-registry") {
		if _, missing := exec.LookPath(program); missing != nil {
			err = errors.Join(err, missing)
		}
	}
	switch {
	case err != nil && os.Getenv("CI") == "true":
		t.Fatal("CI must have what test/install.sh installs: ", err)
	case err != nil:
		t.Skip("not on this machine (test/install.sh installs the parts): ", err)
	}
}

// built returns where engines are kept and where our own programs have been built.
func built(t *testing.T) (cache, bin string) {
	t.Helper()
	cache, err := programs.Cache()
	if err != nil {
		t.Fatal(err)
	}
	bin = filepath.Join(t.TempDir(), "bin")
	if err := programs.Build(t.Context(), bin); err != nil {
		t.Fatal(err)
	}
	return cache, bin
}

// TestEngines lets each engine pull on two hosts of a fresh region, one after
// the other, and holds what each has, and what the registry was asked, against
// the image.
func TestEngines(t *testing.T) {
	cache, bin := built(t)
	img, err := image.Small(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range engines(cache) {
		t.Run(name, func(t *testing.T) {
			need(t, e.needs)
			testEngine(t, e, img, bin)
		})
	}
}

func testEngine(t *testing.T, e engine, img v1.Image, bin string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*pullLimit)
	defer cancel()
	hosts := []lab.HostConfig{{Name: "registry"}, {Name: "supernode"}, {Name: "first"}, {Name: "second"}}
	l, err := lab.New(ctx, lab.Config{Hosts: hosts})
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
	for i, name := range []string{"first", "second"} {
		h := l.Host(name)
		daemon, err := programs.StartDaemon(ctx, h, bin, supernode.URL(), upstreams)
		if err != nil {
			t.Fatal(err)
		}
		if err := joined(ctx, supernode, int64(i+1)); err != nil { // a pull before that goes past the region, as it must
			t.Fatal(err)
		}
		if err := e.pull(ctx, h, daemon.Mirror(), registry.URL(), img); err != nil {
			t.Fatalf("on %s: %v", name, err)
		}
	}
	asked(t, registry, supernode, img)
}

// joined waits until so many hosts have a session.
func joined(ctx context.Context, s *programs.Supernode, hosts int64) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		n, err := s.Hosts(ctx)
		if err != nil || n >= hosts {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// asked holds the registry's own log against the image: every content was
// sent once, whole, and to the supernode.
func asked(t *testing.T, registry *programs.Registry, supernode *programs.Supernode, img v1.Image) {
	t.Helper()
	requests, err := registry.Requests()
	if err != nil {
		t.Fatal(err)
	}
	contents, err := image.Contents(img)
	if err != nil {
		t.Fatal(err)
	}
	var sent int64
	for _, q := range requests {
		if !q.Content() {
			continue
		}
		sent += q.Bytes
		if q.Client != supernode.Host.IP() {
			t.Errorf("%s asked the registry for %s", q.Client, q.Path)
		}
	}
	if size := image.Size(contents); sent != size {
		t.Errorf("the registry sent %d bytes of an image of %d: %v", sent, size, requests)
	}
}

func containerd(c programs.Containerd) func(context.Context, *lab.Host, string, string, v1.Image) error {
	return func(ctx context.Context, h *lab.Host, mirror, registry string, img v1.Image) error {
		e, err := c.Start(ctx, h, mirror, registry)
		if err != nil {
			return err
		}
		if err := e.Pull(ctx, app); err != nil {
			return err
		}
		contents, err := image.Contents(img)
		if err != nil {
			return err
		}
		return errors.Join(e.Verify(contents), e.Close())
	}
}

func pullSkopeo(ctx context.Context, h *lab.Host, mirror, _ string, img v1.Image) error {
	to := filepath.Join(h.Dir(), "skopeo")
	return tool(ctx, h, to, img, private("", "/usr/bin/skopeo", "copy", "--insecure-policy", "--preserve-digests",
		"--src-tls-verify=false", "docker://"+byPath(mirror), "oci:"+to+":v1"))
}

func craneAt(crane string) func(context.Context, *lab.Host, string, string, v1.Image) error {
	return func(ctx context.Context, h *lab.Host, mirror, _ string, img v1.Image) error {
		to := filepath.Join(h.Dir(), "crane")
		return tool(ctx, h, to, img, private("", crane, "pull", "--insecure", "--format=oci", byPath(mirror), to))
	}
}

// private is a command for a host that sees none of this machine's /opt, /run
// and /var/lib, where some programs leave things whatever they are told, and has
// the file hosts, unless that is "", for /etc/hosts. A process of a lab has
// mounts of its own.
func private(hosts, program string, args ...string) *exec.Cmd {
	const script = `[ -z "$0" ] || mount --bind "$0" /etc/hosts || exit
for dir in /opt /run /var/lib; do mount -t tmpfs lab $dir || exit; done; exec "$@"`
	return exec.Command("sh", append([]string{"-c", script, hosts, program}, args...)...) //nolint:gosec // G204: programs of this file
}

// byPath is app's name for clients that know no mirrors.
func byPath(mirror string) string {
	return fmt.Sprintf("%s/%s/%s", mirror[len("http://"):], programs.RegistryName, app)
}

// tool runs a command that writes an OCI layout, and verifies what it wrote.
func tool(ctx context.Context, h *lab.Host, to string, img v1.Image, cmd *exec.Cmd) error {
	cmd.Env = append(os.Environ(), "HOME="+h.Dir(), "TMPDIR="+h.Dir(), "REGISTRY_AUTH_FILE="+filepath.Join(h.Dir(), "auth.json"))
	if err := h.Run(ctx, filepath.Base(to), cmd); err != nil {
		return err
	}
	contents, err := image.Contents(img)
	if err != nil {
		return err
	}
	return programs.Verify(filepath.Join(to, "blobs", "sha256"), contents)
}
