package region_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// What of a supernode or a peer goes wrong.
const (
	content  = "content"  // pieces
	mirrored = "mirrored" // what a supernode says in the registry's place
	session  = "session"  // the session's stream
)

// trap stands before a supernode or a peer, and all of its answers of one kind go
// wrong.
type trap struct {
	*httptest.Server
	target          atomic.Pointer[url.URL]
	kind, fault, at string
	sprung          atomic.Int64 // answers gone wrong

	mu   sync.Mutex
	next int // the status of the next answer, 0 for none
}

type connKey struct{}

func newTrap(t *testing.T, kind, fault, at string) *trap {
	t.Helper()
	p := &trap{kind: kind, fault: fault, at: at}
	proxy := &httputil.ReverseProxy{
		Rewrite:        func(r *httputil.ProxyRequest) { r.SetURL(p.target.Load()) },
		ModifyResponse: p.spoil,
		Transport:      secure().transport(),
		FlushInterval:  -1,
		ErrorLog:       log.New(io.Discard, "", 0),
		ErrorHandler:   func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	p.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p.of(r) && p.refuses(w, r) {
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	p.Config.ErrorLog = log.New(io.Discard, "", 0)
	p.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if s, ok := c.(*tls.Conn); ok {
			c = s.NetConn()
		}
		return context.WithValue(ctx, connKey{}, c)
	}
	secure().begin(p.Server)
	t.Cleanup(p.CloseClientConnections)
	t.Cleanup(p.Close)
	return p
}

// of tells whether the answer to r is of the kind that goes wrong.
func (p *trap) of(r *http.Request) bool {
	switch p.kind {
	case content:
		return strings.HasSuffix(r.URL.Path, "/content")
	case session:
		return r.URL.Path == api.SessionPath
	}
	return strings.HasPrefix(r.URL.Path, "/v2/")
}

// refuses answers with the fault, if that is a status and its time has come; or
// with nothing, where not even a header is to come.
func (p *trap) refuses(w http.ResponseWriter, r *http.Request) bool {
	p.mu.Lock()
	next := p.next
	p.next = 0
	p.mu.Unlock()
	switch {
	case next != 0:
		refuse(w, next)
		return true
	case p.at == "header":
		p.sprung.Add(1)
		spoilHeader(w, r, p.fault)
		return true
	}
	return false
}

// spoil makes an answer's body go wrong in its course.
func (p *trap) spoil(resp *http.Response) error {
	if !p.of(resp.Request) || resp.StatusCode >= 300 {
		return nil
	}
	p.sprung.Add(1)
	length := resp.ContentLength
	if p.kind == session {
		length = 1500
	}
	at := map[string]int64{"first": min(10, length-1), "middle": length / 2, "last": length - 1}[p.at]
	b := &spoilt{ReadCloser: resp.Body, trap: p, r: resp.Request, left: at, drip: dripped(length), closed: make(chan struct{})}
	resp.Body = b
	if w, ok := b.ReadCloser.(io.Writer); ok { // a session's stream
		resp.Body = struct {
			*spoilt
			io.Writer
		}{b, w}
	}
	return nil
}

// spoilt is a body that is right until left is 0.
type spoilt struct {
	io.ReadCloser
	trap   *trap
	r      *http.Request
	left   int64
	drip   int64 // bytes every 50 ms
	after  bool
	once   sync.Once
	closed chan struct{}
}

func (b *spoilt) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.ReadCloser.Close()
}

func (b *spoilt) Read(p []byte) (int, error) {
	if b.left > 0 {
		n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
		b.left -= int64(n)
		return n, err
	}
	status, _ := strconv.Atoi(b.trap.fault)
	switch b.trap.fault {
	case "wrong":
		n, err := b.ReadCloser.Read(p)
		if n > 0 && !b.after {
			p[0] ^= 1
			b.after = true
		}
		return n, err
	case "drip":
		if b.pause(50 * time.Millisecond) {
			return b.ReadCloser.Read(p[:min(int64(len(p)), b.drip)])
		}
	case "stall":
		b.pause(time.Hour)
	case "reset":
		if c, ok := b.r.Context().Value(connKey{}).(*net.TCPConn); ok {
			_ = c.SetLinger(0)
		}
	default:
		b.trap.mu.Lock()
		b.trap.next = status
		b.trap.mu.Unlock()
	}
	return 0, errors.New("gone")
}

// pause waits, and tells whether the answer is still wanted.
func (b *spoilt) pause(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-b.closed:
	case <-b.r.Context().Done():
	}
	return false
}

// Whatever goes wrong with all answers of the supernode, no engine notices: there
// is the registry. Nor with those of a peer, where nobody has to ask the registry for
// it. A no in the registry's name, which only the registry can say, is none of these.
func TestTroubleInTheRegion(t *testing.T) {
	var cells []cell
	for _, who := range []string{"supernode", "peer"} {
		for _, kind := range []string{content, mirrored, session} {
			for _, at := range places {
				for _, fault := range faults {
					if who == "peer" && kind != content {
						continue
					}
					cells = append(cells, cell{
						who + ", " + kind + ", " + at, fault,
						func(t *testing.T, started func()) wait {
							t.Helper()
							return troubleInTheRegion(t, newTrap(t, kind, fault, at), who == "peer", started)
						},
					})
				}
			}
		}
	}
	runGrid(t, cells)
}

func troubleInTheRegion(t *testing.T, p *trap, peer bool, started func()) wait {
	t.Helper()
	image := gridImage(t)
	o := newOriginOf(t, image)
	centre := startSupernode(t, o, t.TempDir(), "")
	seen := centre
	if peer {
		f := &fault{Server: p.Server}
		has := startHost(t, o, centre, f)
		p.target.Store(f.target.Load())
		require.NoError(t, newWatch().pull(t.Context(), has, image.digest))
	} else {
		seen = p.before(t, centre)
	}
	hosts := []*node{startHost(t, o, seen, nil), startHost(t, o, seen, nil)}
	started()
	errs := make(chan error, len(hosts))
	gaps := make(chan wait, len(hosts))
	for _, h := range hosts {
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			w := newWatch()
			errs <- w.pull(ctx, h, image.digest)
			gaps <- w.gap
		}()
	}
	for range hosts {
		require.NoError(t, <-errs, "an engine sees it")
	}
	gap := (<-gaps).or(<-gaps)
	t.Logf("longest wait %v; %d answers gone wrong", gap.clock, p.sprung.Load())
	require.LessOrEqual(t, gap.pulse, hangLimit)
	require.Positive(t, p.sprung.Load())
	if peer && gap.clock < 4*time.Second { // in five a host turns to the registry, as it should
		requireOnce(t, o, centre)
	}
	return gap
}

// before makes p stand before a supernode, and returns it as hosts see it.
func (p *trap) before(t *testing.T, centre *node) *node {
	t.Helper()
	at, err := url.Parse(centre.url())
	require.NoError(t, err)
	p.target.Store(at)
	seen := &node{address: strings.TrimPrefix(p.URL, "http://")}
	if p.kind != session || p.at == "middle" || p.at == "last" {
		seen.metrics = centre.metrics // its session comes
	}
	return seen
}

// Where the region and the registry are both in trouble, it takes no longer than the
// registry's one connection.
func TestTwoTroubles(t *testing.T) {
	var cells []cell
	for _, first := range []struct{ kind, at, fault string }{
		{session, "middle", "stall"},
		{content, "header", "stall"},
		{content, "first", "wrong"},
		{content, "first", "drip"},
		{content, "middle", "drip"},
		{content, "header", "503"},
		{mirrored, "header", "stall"},
		{mirrored, "middle", "drip"},
	} {
		kind := "blobs"
		if first.kind == mirrored {
			kind = "manifests"
		}
		for _, at := range places {
			for _, fault := range []string{"reset", "stall", "drip", "503"} {
				cells = append(cells, cell{
					first.kind + ", " + first.at + ", " + first.fault, kind + ", " + at + ", " + fault,
					func(t *testing.T, started func()) wait {
						t.Helper()
						return twoTroubles(t, newTrap(t, first.kind, first.fault, first.at), newTrouble(t, kind, fault, at), started)
					},
				})
			}
		}
	}
	runGrid(t, cells)
}

func twoTroubles(t *testing.T, p *trap, registry *trouble, started func()) wait {
	t.Helper()
	image := gridImage(t)
	centre := startSupernode(t, newOriginOf(t, image), t.TempDir(), "")
	cfg := reachable(registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: registryName, URL: registry.URL}}})
	host := startHostFor(t, cfg, p.before(t, centre), nil)
	started()
	w := newWatch()
	require.NoError(t, w.pull(t.Context(), host, image.digest))
	require.Positive(t, p.sprung.Load())
	require.LessOrEqual(t, w.gap.pulse, hangLimit)
	return w.gap
}
