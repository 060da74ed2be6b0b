// Package rogue is a registry that has every blob, and lies about it.
package rogue

import (
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
)

// Registry answers each request with its lie.
type Registry struct {
	Lie  string       // one of Lies
	Self string       // the URL of the supernode that asks
	Name string       // of the true registry
	Size int64        // of the blob that it lies about
	Room int64        // the supernode's quota
	Sent atomic.Int64 // bytes of bodies
}

// Lies are what a Registry knows: bytes and lengths, and where it leads.
func Lies() []string {
	return []string{
		"other", "shorter", "longer", "endless", "huge", "too-huge", "all-the-room",
		"cloud", "cloud-by-six", "supernode", "supernode-v2", "localhost", "file",
	}
}

// ServeHTTP implements http.Handler.
func (g *Registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	to := map[string]string{
		"cloud":        "http://169.254.169.254/latest/meta-data",
		"cloud-by-six": "http://[::ffff:169.254.169.254]/latest/meta-data",
		"supernode":    g.Self + "/v1/tasks",
		"supernode-v2": g.Self + strings.Replace(r.URL.Path, "/v2/", "/v2/"+g.Name+"/", 1),
		"localhost":    "http://localhost" + g.Self[strings.LastIndex(g.Self, ":"):] + "/metrics",
		"file":         "file:///etc/passwd",
	}[g.Lie]
	if to != "" {
		w.Header().Set("Location", to)
		w.WriteHeader(http.StatusTemporaryRedirect)
		return
	}
	length := map[string]int64{
		"other": g.Size, "shorter": g.Size - 1, "longer": g.Size + 1, "huge": 1 << 39, "too-huge": 1 << 62, "all-the-room": g.Room,
	}[g.Lie]
	if length > 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(length, 10))
	}
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return
	}
	end := length
	if g.Lie == "all-the-room" { // it breaks off
		end = g.Size
	}
	b, n := make([]byte, 64<<10), int64(0)
	for end == 0 || n < end {
		part := b
		if end > 0 {
			part = b[:min(int64(len(b)), end-n)]
		}
		k, err := w.Write(part)
		n += int64(k)
		g.Sent.Add(int64(k))
		if err != nil {
			return
		}
	}
}
