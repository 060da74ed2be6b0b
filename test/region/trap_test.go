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

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

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
	status, _ := strconv.Atoi(p.fault)
	p.mu.Lock()
	next := p.next
	p.next = 0
	p.mu.Unlock()
	switch {
	case next != 0:
		refuse(w, next)
		return true
	case p.at != "header":
		return false
	case status != 0:
		p.sprung.Add(1)
		refuse(w, status)
		return true
	case p.fault == "stall":
		p.sprung.Add(1)
		<-r.Context().Done()
		return true
	case p.fault == "reset" || p.fault == "truncation":
		p.sprung.Add(1)
		p.breakOff(r)
	}
	return false
}

// breakOff ends the answer with its connection.
func (p *trap) breakOff(r *http.Request) {
	if c, ok := r.Context().Value(connKey{}).(*net.TCPConn); ok && p.fault == "reset" {
		_ = c.SetLinger(0)
	}
	panic(http.ErrAbortHandler)
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
	b := &spoilt{ReadCloser: resp.Body, trap: p, r: resp.Request, left: at, closed: make(chan struct{})}
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
	case "drip": // 20 KB a second
		if b.pause(50 * time.Millisecond) {
			return b.ReadCloser.Read(p[:min(len(p), 1000)])
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

var faults = []string{"reset", "stall", "truncation", "wrong", "drip", "401", "403", "404", "429", "500", "503"}

// speaksForTheRegistry says of a fault that it cannot be told from the registry's
// own answer, relayed by its supernode.
func speaksForTheRegistry(kind, fault string) bool {
	return kind == mirrored && (fault == "401" || fault == "403" || fault == "404" || fault == "429")
}

// happens tells whether a fault is of its own there: an answer without a body has
// no wrong bytes, and what broke off is refused in one place.
func happens(fault, at string) bool {
	status, _ := strconv.Atoi(fault)
	if at == "header" {
		return fault != "wrong" && fault != "drip"
	}
	return status == 0 || at == "middle" && (status == 401 || status == 503)
}

// Whatever goes wrong with all answers of the supernode, no engine notices: there
// is the registry. Nor with those of a peer, where nobody has to
// ask the registry for it.
func TestTroubleInTheRegion(t *testing.T) {
	atOnce := make(chan struct{}, 8) // most of the time they wait
	var all sync.WaitGroup
	for _, who := range []string{"supernode", "peer"} {
		for _, kind := range []string{content, mirrored, session} {
			for _, at := range []string{"header", "first", "middle", "last"} {
				for _, fault := range faults {
					if who == "peer" && kind != content || speaksForTheRegistry(kind, fault) || !happens(fault, at) {
						continue
					}
					all.Go(func() {
						atOnce <- struct{}{}
						defer func() { <-atOnce }()
						t.Run(who+", "+kind+", "+at+", "+fault, func(t *testing.T) {
							troubleInTheRegion(t, newTrap(t, kind, fault, at), who == "peer")
						})
					})
				}
			}
		}
	}
	all.Wait()
}

func troubleInTheRegion(t *testing.T, p *trap, peer bool) {
	t.Helper()
	o := newOrigin(t)
	img, err := random.Image(3<<19, 1)
	require.NoError(t, err)
	u, err := url.Parse(o.URL)
	require.NoError(t, err)
	ref, err := name.ParseReference(u.Host+"/org/app:v1", name.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.Write(ref, img))
	o.set(func() { clear(o.gets); o.sent = 0 })
	hash, err := img.Digest()
	require.NoError(t, err)
	want := digest.Digest(hash.String())

	centre := startSupernode(t, o, t.TempDir(), "")
	seen := centre
	if peer {
		f := &fault{Server: p.Server}
		has := startHost(t, o, centre, f)
		p.target.Store(f.target.Load())
		require.NoError(t, (&watch{last: time.Now()}).pull(t.Context(), has, want))
	} else {
		at, err := url.Parse(centre.url())
		require.NoError(t, err)
		p.target.Store(at)
		seen = &node{address: strings.TrimPrefix(p.URL, "http://")}
		if p.kind != session || p.at == "middle" || p.at == "last" {
			seen.metrics = centre.metrics // its session comes
		}
	}
	hosts := []*node{startHost(t, o, seen, nil), startHost(t, o, seen, nil)}
	errs := make(chan error, len(hosts))
	gaps := make(chan time.Duration, len(hosts))
	for _, h := range hosts {
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			w := &watch{last: time.Now()}
			errs <- w.pull(ctx, h, want)
			gaps <- w.gap
		}()
	}
	for range hosts {
		require.NoError(t, <-errs, "an engine sees it")
	}
	gap := max(<-gaps, <-gaps)
	t.Logf("longest wait %v; %d answers gone wrong", gap.Round(10*time.Millisecond), p.sprung.Load())
	require.Less(t, gap, 2*hangLimit) // eight of them share the machine
	require.Positive(t, p.sprung.Load())
	if peer {
		requireOnce(t, o, centre)
	}
}
