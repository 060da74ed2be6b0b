package region_test

import (
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// origin is a registry that counts, and that a test may slow down or lock.
type origin struct {
	*httptest.Server
	backend http.Handler

	mu     sync.Mutex
	gets   map[string]int // answered with 2xx, by path
	sent   int64          // bytes of their bodies
	pause  time.Duration  // before each chunk of a body
	secret string         // the Authorization it wants, "" for none
}

const chunk = 64 << 10 // bytes

func newOrigin(t *testing.T) *origin {
	t.Helper()
	return newOriginOf(t, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
}

func newOriginOf(t *testing.T, backend http.Handler) *origin {
	t.Helper()
	o := &origin{backend: backend, gets: map[string]int{}}
	o.Server = httptest.NewServer(o)
	t.Cleanup(o.Close)
	return o
}

const refusal = `{"errors":[{"code":"UNAUTHORIZED","message":"in the registry's own words"}]}`

func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.mu.Lock()
	secret := o.secret
	o.mu.Unlock()
	if secret != "" && r.Header.Get("Authorization") != secret {
		w.Header().Set("Www-Authenticate", `Basic realm="reg.test"`)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = io.WriteString(w, refusal)
		return
	}
	if r.Method == http.MethodGet {
		w = &counted{ResponseWriter: w, o: o, r: r}
	}
	o.backend.ServeHTTP(w, r)
}

// set changes how the registry behaves.
func (o *origin) set(change func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	change()
}

// counts returns how often each path was got, and how many bytes went out.
func (o *origin) counts() (gets map[string]int, sent int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.gets), o.sent
}

// counted is the answer to a GET.
type counted struct {
	http.ResponseWriter
	o      *origin
	r      *http.Request
	status int
}

func (c *counted) WriteHeader(status int) {
	if c.status = status; status < 300 {
		c.o.set(func() { c.o.gets[c.r.URL.Path]++ })
	}
	c.ResponseWriter.WriteHeader(status)
}

func (c *counted) Write(p []byte) (total int, err error) {
	if c.status == 0 {
		c.WriteHeader(http.StatusOK)
	}
	for len(p) > 0 && err == nil {
		var pause time.Duration
		c.o.set(func() { pause = c.o.pause })
		if pause > 0 {
			select {
			case <-time.After(pause):
			case <-c.r.Context().Done():
				return total, c.r.Context().Err()
			}
		}
		var n int
		n, err = c.ResponseWriter.Write(p[:min(len(p), chunk)])
		if c.status < 300 {
			c.o.set(func() { c.o.sent += int64(n) })
		}
		total, p = total+n, p[n:]
	}
	return total, err
}
