//go:build linux

package programs

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"damselfly.dev/test/image"
	"damselfly.dev/test/lab"
)

// RegistryName is what images call the registry, wherever it is.
const RegistryName = "registry.demo"

// A Registry is docker/distribution on a host: Debian's, or else the library's.
type Registry struct {
	*server
	accessLog
}

// StartRegistry starts an empty registry; bin is where Build has put one.
func StartRegistry(ctx context.Context, h *lab.Host, bin string) (*Registry, error) {
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		program = filepath.Join(bin, "registry")
	}
	dir := filepath.Join(h.Dir(), "registry")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the registry's directory: %w", err)
	}
	config := filepath.Join(dir, "config.yml")
	at := netip.AddrPortFrom(h.IP(), registryPort)
	text := fmt.Sprintf(`version: 0.1
log: {level: warn, accesslog: {disabled: false}}
storage: {filesystem: {rootdirectory: %q}}
http: {addr: %q, secret: of no use with one registry}
`, filepath.Join(dir, "data"), at)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, fmt.Errorf("write the registry's configuration: %w", err)
	}
	cmd := exec.Command(program, "serve", config) //nolint:gosec // G204: found above
	s, err := serve(ctx, h, "registry", cmd, "http://"+at.String()+"/v2/", "")
	if err != nil {
		return nil, err
	}
	return &Registry{server: s, accessLog: accessLog{path: s.Process.Log()}}, nil
}

// URL is where the registry answers.
func (r *Registry) URL() string { return url(r.Host.IP(), registryPort, "") }

// Push uploads an image under a name such as "demo/app:v1".
func (r *Registry) Push(ctx context.Context, img v1.Image, name string) error {
	at := netip.AddrPortFrom(r.Host.IP(), registryPort)
	if err := image.Push(ctx, img, at.String()+"/"+name, r.client.Transport); err != nil {
		return err
	}
	return r.Forget()
}
