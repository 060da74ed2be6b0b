//go:build linux

package programs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"damselfly.dev/test/lab"
)

const (
	// ManifestType is that of all manifests of an Nginx.
	ManifestType = "application/vnd.oci.image.manifest.v1+json"

	// Repository is that of an Nginx, blobsPath where all its blobs are, and
	// privatePath where they are for who has a name and a password.
	Repository  = "bench/blobs"
	repoPath    = "/v2/" + Repository + "/"
	blobsPath   = repoPath + "blobs/"
	privatePath = "/v2/bench/private/blobs/"
)

// An Nginx is the cheapest registry there is: nginx, its blobs files that it
// answers with sendfile.
type Nginx struct {
	*server
	accessLog
	blobs string // their folder
}

// StartNginx starts an nginx without blobs.
func StartNginx(ctx context.Context, h *lab.Host) (*Nginx, error) {
	dir := filepath.Join(h.Dir(), "nginx")
	blobs := filepath.Join(dir, "root", filepath.FromSlash(blobsPath))
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return nil, fmt.Errorf("make nginx's directory: %w", err)
	}
	at := netip.AddrPortFrom(h.IP(), registryPort)
	text := fmt.Sprintf(`daemon off; worker_processes 1; pid %[1]s/pid; error_log stderr; user root;
events { worker_connections 4096; }
http {
  access_log %[1]s/access.log combined; sendfile on; tcp_nopush on; keepalive_requests 1000000;
  client_body_temp_path %[1]s/t1; proxy_temp_path %[1]s/t2; fastcgi_temp_path %[1]s/t3; uwsgi_temp_path %[1]s/t4; scgi_temp_path %[1]s/t5;
  map $http_authorization $stranger { default 1; "~^Basic ." 0; }
  map $stranger $challenge { 1 'Basic realm="bench"'; default ''; }
  server {
    listen %[2]s; root %[1]s/root;
    location %[5]s { alias %[1]s/root%[4]s; add_header WWW-Authenticate $challenge always; if ($stranger) { return 401; } }
    location = /v2/ { return 200 "{}"; }
    location ~ /manifests/(sha256:|of-)([0-9a-f]+)$ {
      types { } default_type %[3]s; add_header Docker-Content-Digest sha256:$2; try_files %[4]ssha256:$2 =404;
    }
  }
}
`, dir, at, ManifestType, blobsPath, privatePath)
	config := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, fmt.Errorf("write nginx's configuration: %w", err)
	}
	cmd := exec.Command("/usr/sbin/nginx", "-e", "stderr", "-c", config) //nolint:gosec // G204: our own file
	s, err := serve(ctx, h, "nginx", cmd, "http://"+at.String()+"/v2/", "")
	if err != nil {
		return nil, err
	}
	return &Nginx{server: s, accessLog: accessLog{path: filepath.Join(dir, "access.log")}, blobs: blobs}, nil
}

// URL is where the registry answers.
func (n *Nginx) URL() string { return url(n.Host.IP(), registryPort, "") }

// Add makes all of r a blob and returns its digest.
func (n *Nginx) Add(r io.Reader) (digest string, err error) {
	file, err := os.CreateTemp(n.blobs, "new-")
	if err != nil {
		return "", fmt.Errorf("add a blob: %w", err)
	}
	defer file.Close()
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(file, h), r); err != nil {
		return "", fmt.Errorf("add a blob: %w", err)
	}
	digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
	if err := file.Chmod(0o644); err != nil {
		return "", fmt.Errorf("add a blob: %w", err)
	}
	return digest, os.Rename(file.Name(), filepath.Join(n.blobs, digest))
}

// Link makes a file, of the same file system, a blob.
func (n *Nginx) Link(path, digest string) error {
	return errors.Join(os.Chmod(path, 0o644), os.Link(path, filepath.Join(n.blobs, digest)))
}

// Remove takes a blob away.
func (n *Nginx) Remove(digest string) error { return os.Remove(filepath.Join(n.blobs, digest)) }

// BlobPath is the path of a blob's URL, at the registry and at a mirror that
// takes it for the namespace RegistryName.
func BlobPath(digest string) string { return blobsPath + digest }

// PrivateBlobPath is BlobPath in a repository that is not for everyone.
func PrivateBlobPath(digest string) string { return privatePath + digest }

// ManifestPath is the path of a blob that is a manifest, when it is asked for as one.
func ManifestPath(digest string) string { return repoPath + "manifests/" + digest }

// TagPath is ManifestPath by a tag.
func TagPath(digest string) string {
	return repoPath + "manifests/of-" + strings.TrimPrefix(digest, "sha256:")
}
