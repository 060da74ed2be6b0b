//go:build linux

package programs

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

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
	config RegistryConfig
}

// RegistryConfig says how a registry differs from one in plain HTTP that is open to all.
type RegistryConfig struct {
	Prefix    string // of all its paths, such as "/hub"
	Auth      string // its auth section, in YAML
	Cert, Key string // files; without them it speaks plain HTTP
}

// StartRegistry starts an empty registry; bin is where Build has put one.
func StartRegistry(ctx context.Context, h *lab.Host, bin string) (*Registry, error) {
	return RegistryConfig{}.Start(ctx, h, bin)
}

// Start is StartRegistry for a registry of this kind.
func (c RegistryConfig) Start(ctx context.Context, h *lab.Host, bin string) (*Registry, error) {
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		program = filepath.Join(bin, "registry")
	}
	dir := filepath.Join(h.Dir(), "registry")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the registry's directory: %w", err)
	}
	file := filepath.Join(dir, "config.yml")
	at := netip.AddrPortFrom(h.IP(), registryPort)
	text := fmt.Sprintf(`version: 0.1
log: {level: warn, accesslog: {disabled: false}}
storage: {filesystem: {rootdirectory: %q}}
http: {addr: %q, secret: of no use with one registry`, filepath.Join(dir, "data"), at)
	health := url(h.IP(), registryPort, "/v2/")
	if c != (RegistryConfig{}) {
		text += fmt.Sprintf(`, prefix: %q, debug: {addr: %q}`, c.Prefix+"/", netip.AddrPortFrom(h.IP(), registryDebugPort))
		health = url(h.IP(), registryDebugPort, "/debug/health")
	}
	if c.Cert != "" {
		text += fmt.Sprintf(", tls: {certificate: %q, key: %q}", c.Cert, c.Key)
	}
	text += "}\n"
	if c.Auth != "" {
		text += "auth: {" + c.Auth + "}\n"
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, fmt.Errorf("write the registry's configuration: %w", err)
	}
	cmd := exec.Command(program, "serve", file) //nolint:gosec // G204: found above
	s, err := serve(ctx, h, "registry", cmd, health, "")
	if err != nil {
		return nil, err
	}
	return &Registry{server: s, accessLog: accessLog{path: s.Process.Log()}, config: c}, nil
}

// URL is where the registry answers.
func (r *Registry) URL() string {
	at := url(r.Host.IP(), registryPort, r.config.Prefix)
	if r.config.Cert != "" {
		at = "https" + strings.TrimPrefix(at, "http")
	}
	return at
}

// Push uploads an image under a name such as "demo/app:v1".
func (r *Registry) Push(ctx context.Context, img v1.Image, name string) error {
	at := netip.AddrPortFrom(r.Host.IP(), registryPort)
	if err := image.Push(ctx, img, at.String()+"/"+name, r.client.Transport); err != nil {
		return err
	}
	return r.Forget()
}
