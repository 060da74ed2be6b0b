//go:build linux

package programs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
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
	skip int64 // bytes of the log that belong to the pushes
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
	return &Registry{server: s}, nil
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

// Forget makes Requests begin anew.
func (r *Registry) Forget() error {
	info, err := os.Stat(r.Process.Log())
	if err != nil {
		return fmt.Errorf("read the registry's log: %w", err)
	}
	r.skip = info.Size()
	return nil
}

// A Request is a line of the registry's own log.
type Request struct {
	Client       netip.Addr
	Method, Path string
	Status       int
	Bytes        int64 // of the body as sent
}

// Content says whether the request brought bytes of an image.
func (q Request) Content() bool {
	return q.Method == http.MethodGet && q.Status/100 == 2 && (strings.Contains(q.Path, "/blobs/") || strings.Contains(q.Path, "/manifests/"))
}

// accessLine is the combined log format.
var accessLine = regexp.MustCompile(`^(\S+) \S+ \S+ \[[^\]]*\] "(\S+) (\S+) [^"]*" (\d+) (\d+) `)

// Requests are what the registry has answered since the last push or Forget.
// It writes them down when the answer has ended.
func (r *Registry) Requests() ([]Request, error) {
	log, err := os.Open(r.Process.Log())
	if err != nil {
		return nil, fmt.Errorf("read the registry's log: %w", err)
	}
	defer log.Close()
	if _, err := log.Seek(r.skip, 0); err != nil {
		return nil, fmt.Errorf("read the registry's log: %w", err)
	}
	var requests []Request
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		if q, ok := parse(lines.Text()); ok {
			requests = append(requests, q)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the registry's log: %w", err)
	}
	return requests, nil
}

// parse reads a line of the combined log; the program's own messages are none.
func parse(line string) (Request, bool) {
	m := accessLine.FindStringSubmatch(line)
	if m == nil {
		return Request{}, false
	}
	client, errClient := netip.ParseAddr(m[1])
	status, errStatus := strconv.Atoi(m[4])
	n, errBytes := strconv.ParseInt(m[5], 10, 64)
	path, _, _ := strings.Cut(m[3], "?")
	return Request{Client: client, Method: m[2], Path: path, Status: status, Bytes: n}, errors.Join(errClient, errStatus, errBytes) == nil
}
