package registryproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// network is an Internet in memory, whose waits a synctest bubble understands.
// A handler is reached by its host and port. There is no TLS, whose mutexes a
// bubble cannot see through: what goes to port 443 is taken for encrypted.
type network struct {
	t     *testing.T
	hosts map[string]chan net.Conn
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	return &network{t: t, hosts: map[string]chan net.Conn{}}
}

// serve answers at addr with h until the test ends.
func (n *network) serve(addr string, h http.Handler) {
	conns := make(chan net.Conn)
	n.hosts[addr] = conns
	l := &pipeListener{conns: conns, closed: make(chan struct{})}
	s := &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(l) })
	n.t.Cleanup(func() { _ = s.Close(); wg.Wait() })
}

func (n *network) handle(addr string, h http.HandlerFunc) { n.serve(addr, h) }

func (n *network) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	conns, ok := n.hosts[addr]
	if addr == "unknown.test:443" {
		return nil, &net.DNSError{Err: "no such host", Name: addr, IsNotFound: true}
	}
	if !ok {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", fmt.Errorf("connection refused"))}
	}
	here, there := net.Pipe()
	select {
	case conns <- there:
		return here, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// client returns a client on this network.
func (n *network) client(cfg Config) *testClient {
	c := newTestClient(n.t, cfg)
	for _, t := range []*http.Transport{c.near, c.far} {
		t.DialContext, t.DialTLSContext = n.dial, n.dial
	}
	return c
}

// testClient is a Client whose log and metrics can be looked at.
type testClient struct {
	*Client
	logs *observer.ObservedLogs
}

func newTestClient(t *testing.T, cfg Config) *testClient {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	c, err := New(cfg, zap.New(core), prometheus.NewRegistry())
	require.NoError(t, err)
	t.Cleanup(func() { c.near.CloseIdleConnections(); c.far.CloseIdleConnections() })
	return &testClient{c, logs}
}

func (c *testClient) count(kind, result string) int {
	return int(testutil.ToFloat64(c.requests.WithLabelValues(kind, result)))
}

func (c *testClient) received(kind Kind) int {
	return int(testutil.ToFloat64(c.bytes.WithLabelValues(kind.String())))
}

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// sourceOf returns a small registry's handler: the contents are its blobs and
// manifests, whatever the repository; the tag "latest" is the first of them.
func sourceOf(contents ...string) http.HandlerFunc {
	byRef := map[string]string{"latest": contents[0]}
	for _, c := range contents {
		byRef[digest.FromString(c).String()] = c
		byRef[digest.SHA512.FromString(c).String()] = c
	}
	return func(w http.ResponseWriter, r *http.Request) {
		elems := strings.Split(r.URL.Path, "/")
		c, ok := byRef[elems[len(elems)-1]]
		if !ok {
			WriteError(w, &Error{404, "MANIFEST_UNKNOWN", "the source has no such thing"})
			return
		}
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json; charset=utf-8")
		if elems[len(elems)-2] == "manifests" {
			w.Header().Set("Docker-Content-Digest", digest.FromString(c).String())
		}
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(c))
	}
}

func digestOf(s string) string { return digest.FromString(s).String() }

// newDeafHost takes connections and then does nothing with them.
func newDeafHost() chan net.Conn { return make(chan net.Conn, 2) }

// refusalOf returns the registry's no that err has to be.
func refusalOf(t *testing.T, err error) *Refusal {
	t.Helper()
	r, ok := errors.AsType[*Refusal](err)
	require.True(t, ok, "the error is %v", err)
	return r
}
