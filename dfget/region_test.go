package dfget

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
	"damselfly.dev/test/meter"
)

// blob is a content with its digests.
type blob struct {
	id      pieces.TaskID
	bytes   []byte
	layout  pieces.Layout
	digests []pieces.Digest
}

func newBlob(n int) *blob {
	b := &blob{bytes: make([]byte, n), layout: pieces.Layout{Length: int64(n), PieceSize: 256 << 10}}
	r := rand.NewChaCha8([32]byte{byte(n)})
	_, _ = r.Read(b.bytes)
	b.id = pieces.TaskID(fmt.Sprintf("sha256:%x", sha256.Sum256(b.bytes)))
	for i := range b.layout.Count() {
		b.digests = append(b.digests, pieces.Sum(b.piece(i)))
	}
	return b
}

func (b *blob) piece(i int) []byte {
	return b.bytes[b.layout.Offset(i):b.layout.Offset(i+1)]
}

// memNet is a network of names, for bubbles in which time is virtual.
type memNet struct {
	mu        sync.Mutex
	listeners map[string]*memListener
	conns     map[string][]net.Conn // by the name dialled
}

type memListener struct {
	name  string
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *memListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *memListener) Addr() net.Addr { return memAddr(l.name) }

type memAddr string

func (memAddr) Network() string  { return "mem" }
func (a memAddr) String() string { return string(a) }

func (n *memNet) listen(name string) net.Listener {
	l := &memListener{name: name, conns: make(chan net.Conn), done: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners == nil {
		n.listeners, n.conns = map[string]*memListener{}, map[string][]net.Conn{}
	}
	n.listeners[name] = l
	return l
}

func (n *memNet) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	name, _, _ := net.SplitHostPort(addr)
	n.mu.Lock()
	l := n.listeners[name]
	n.mu.Unlock()
	if l == nil {
		return nil, errors.New("no route to " + addr)
	}
	a, b := net.Pipe()
	n.mu.Lock()
	n.conns[name] = append(n.conns[name], a, b)
	n.mu.Unlock()
	select {
	case l.conns <- b:
		return a, nil
	case <-l.done:
		return nil, errors.New("refused by " + addr)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// kill ends a server as kill -9 does: at once, and nobody listens any more.
func (n *memNet) kill(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	_ = n.listeners[name].Close()
	delete(n.listeners, name)
	for _, c := range n.conns[name] {
		_ = c.Close()
	}
}

// serve starts a server for the test's time.
func (n *memNet) serve(t *testing.T, name string, h http.Handler) {
	t.Helper()
	srv := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	ln := n.listen(name)
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close() })
}

// bubble starts a supernode named "node" and a host in a memNet, to which nobody
// can listen, for a test in a synctest bubble.
func bubble(t *testing.T, cfg PeerConfig, on func(*fakeNode, api.Up), b *blob) (*memNet, *fakeNode, *host) {
	t.Helper()
	cfg.ClearPrivate = true
	return inClear(t, cfg, on, b)
}

// inClear is bubble with a memNet to which others may listen.
func inClear(t *testing.T, cfg PeerConfig, on func(*fakeNode, api.Up), b *blob) (*memNet, *fakeNode, *host) {
	t.Helper()
	net := &memNet{}
	n := newFakeNode(t, on)
	if b != nil {
		n.routes.HandleFunc(api.ContentPath(b.id), content(b))
	}
	net.serve(t, "node", n.routes)
	cfg.Supernodes = []string{"http://node:80"}
	h := newHost(t, t.TempDir(), cfg, 0, net.dial)
	require.NoError(t, h.Ready(t.Context()))
	return net, n, h
}

// fakeNode is a supernode that speaks the real session and does what its test
// says.
type fakeNode struct {
	t      *testing.T
	key    ed25519.PrivateKey
	on     func(n *fakeNode, up api.Up) // every batch but the first
	mu     sync.Mutex
	ups    []api.Up
	conn   *api.Conn[api.Up, api.Down]
	routes *http.ServeMux
}

func newFakeNode(t *testing.T, on func(n *fakeNode, up api.Up)) *fakeNode {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	n := &fakeNode{t: t, key: key, on: on, routes: http.NewServeMux()}
	n.routes.HandleFunc(api.SessionPath, n.session)
	return n
}

func (n *fakeNode) session(w http.ResponseWriter, r *http.Request) {
	c, err := api.Accept(w, r)
	if err != nil {
		return
	}
	defer c.CloseNow()
	up, err := c.Read(r.Context())
	if err != nil || up.Hello == nil {
		return
	}
	n.note(up)
	n.mu.Lock()
	n.conn = c
	n.mu.Unlock()
	welcome := &api.Welcome{Version: api.Version, Keys: [][]byte{n.key.Public().(ed25519.PublicKey)}}
	if c.Write(r.Context(), api.Down{Welcome: welcome}) != nil {
		return
	}
	for {
		up, err := c.Read(r.Context())
		if err != nil {
			return
		}
		if on := n.note(up); on != nil {
			on(n, up)
		}
	}
}

// note keeps a batch, and returns what is to be done with it.
func (n *fakeNode) note(up api.Up) func(*fakeNode, api.Up) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ups = append(n.ups, up)
	return n.on
}

// does changes what the node does.
func (n *fakeNode) does(on func(*fakeNode, api.Up)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.on = on
}

// send tells the peer something.
func (n *fakeNode) send(d api.Down) {
	n.mu.Lock()
	c := n.conn
	n.mu.Unlock()
	_ = c.Write(context.Background(), d) // a session that has ended hears nothing
}

// hang ends the session.
func (n *fakeNode) hang() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conn.CloseNow()
}

// heard returns what every batch so far has of one kind.
func heard[T any](n *fakeNode, of func(api.Up) []T) (all []T) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, up := range n.ups {
		all = append(all, of(up)...)
	}
	return all
}

func hellos(u api.Up) []*api.Hello  { return []*api.Hello{u.Hello} }
func joins(u api.Up) []api.Join     { return u.Join }
func wants(u api.Up) []api.Want     { return u.Want }
func soons(u api.Up) []uint64       { return u.Soon }
func dones(u api.Up) []api.Done     { return u.Done }
func faileds(u api.Up) []api.Failed { return u.Failed }
func holds(u api.Up) []api.Hold     { return u.Hold }
func leaves(u api.Up) []api.Leave   { return u.Leave }

func (n *fakeNode) ticket(id pieces.TaskID) string {
	s, err := api.SignTicket(n.key, api.Ticket{Task: string(id), Host: "h", Expires: time.Now().Add(time.Hour).Unix()})
	require.NoError(n.t, err)
	return s
}

// grant is the answer to a Join.
func (n *fakeNode) grant(j api.Join, b *blob) api.Task {
	return api.Task{Seq: j.Seq, Task: string(b.id), Num: 1, Layout: b.layout, Ticket: n.ticket(b.id), Public: j.Origin.Header == nil}
}

func digestsOf(b *blob) api.Digests {
	return api.Digests{Task: 1, Digests: pieces.AppendDigests(nil, b.digests...)}
}

// serving makes a supernode's side that grants every Join of b and assigns all
// pieces, a run at a time, from the parents in turn; what fails it sends itself.
func serving(b *blob, parents ...string) func(*fakeNode, api.Up) {
	var mu sync.Mutex
	next, told := uint64(0), map[uint64]api.Assign{}
	assign := func(first, count int, parent string) api.Assign {
		next++
		told[next] = api.Assign{Transfer: next, Task: 1, First: first, Count: count, Parent: parent}
		return told[next]
	}
	have := map[int]bool{}
	asked := false
	return func(n *fakeNode, up api.Up) {
		mu.Lock()
		defer mu.Unlock()
		for _, h := range up.Hold {
			set, err := pieces.ParseSet(b.layout.Count(), h.Have)
			require.NoError(n.t, err)
			for i := range set.All() {
				have[i] = true
			}
		}
		var d api.Down
		for _, j := range up.Join {
			d.Task = append(d.Task, n.grant(j, b))
			d.Digests = append(d.Digests, digestsOf(b))
			for i := 0; i < b.layout.Count() && !asked; i++ {
				if !have[i] && len(parents) > 0 {
					d.Assign = append(d.Assign, assign(i, 1, parents[i%len(parents)]))
				}
			}
			asked = true
		}
		if len(up.Failed) > 0 {
			pause(n.t, 20*time.Millisecond)
		}
		for _, f := range up.Failed {
			a := told[f.Transfer]
			a = assign(a.First, a.Count, a.Parent)
			if f.Why != api.Busy {
				a.Parent = ""
			}
			d.Assign = append(d.Assign, a)
		}
		n.send(d)
	}
}

// content serves b to whoever asks, as a supernode or a good peer does.
func content(b *blob) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b.bytes))
	}
}

// upstream is an origin in memory.
type upstream struct {
	bytes   []byte
	err     error
	breakAt int64 // each body ends with an error after so many bytes, 0 for never

	mu   sync.Mutex
	offs []int64
}

func (u *upstream) Open(_ context.Context, off int64) (io.ReadCloser, int64, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.offs = append(u.offs, off)
	if u.err != nil {
		return nil, 0, u.err
	}
	var r io.Reader = bytes.NewReader(u.bytes[off:])
	if u.breakAt > 0 && int64(len(u.bytes))-off > u.breakAt {
		r = io.LimitReader(r, u.breakAt)
	}
	return io.NopCloser(r), int64(len(u.bytes)), nil
}

func (u *upstream) opened() []int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.offs)
}

// host is a peer under test with its own store.
type host struct {
	*Peer
	store *pieces.Store
	reg   *prometheus.Registry
	stop  func()
}

func newHost(t *testing.T, dir string, cfg PeerConfig, quota int64, dial func(context.Context, string, string) (net.Conn, error)) *host {
	t.Helper()
	h := &host{reg: prometheus.NewRegistry()}
	var err error
	h.store, err = pieces.OpenStore(dir, pieces.StoreConfig{
		Quota:   quota,
		OnEvict: func(id pieces.TaskID) { h.Evicted(id) },
		OnLost:  func(id pieces.TaskID, _ []int) { h.Lost(id) },
	})
	require.NoError(t, err)
	h.Peer, err = NewPeer(cfg, h.store, zaptest.NewLogger(t), h.reg)
	require.NoError(t, err)
	if dial != nil {
		h.client.Transport.(*http.Transport).DialContext, h.transfers.dial = dial, dial
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = h.Run(ctx) }()
	h.stop = sync.OnceFunc(func() {
		cancel()
		<-ended
		require.NoError(t, h.store.Close())
	})
	t.Cleanup(h.stop)
	return h
}

// metric returns the value of a counter or gauge, by its name and label.
func (h *host) metric(t *testing.T, name, label string) int {
	t.Helper()
	return int(meter.Value(t, h.reg, name, label))
}

func registryOrigin(header ...string) api.Origin {
	o := api.Origin{Registry: "r.example", Repository: "a/b"}
	if len(header) > 0 {
		o.Header = map[string][]string{"Authorization": header}
	}
	return o
}

// get reads a whole stream.
func get(t *testing.T, h *host, r Request, off, n int64) ([]byte, error) {
	t.Helper()
	s, err := h.Open(t.Context(), r, off, n)
	if err != nil {
		return nil, err
	}
	defer func() { require.NoError(t, s.Close()) }()
	return io.ReadAll(s)
}

// open opens a stream for the test's time.
func open(t *testing.T, h *host, r Request, off, n int64) *Stream {
	t.Helper()
	s, err := h.Open(t.Context(), r, off, n)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

const (
	waitFor = time.Minute
	tick    = 10 * time.Millisecond
)

func addr(s *httptest.Server) string { return strings.TrimPrefix(s.URL, "http://") }

// loopback starts a supernode and a host on loopback.
func loopback(t *testing.T, cfg PeerConfig, on func(*fakeNode, api.Up), b *blob) (*fakeNode, *host) {
	t.Helper()
	n := newFakeNode(t, on)
	if b != nil {
		n.routes.HandleFunc(api.ContentPath(b.id), content(b))
	}
	srv := httptest.NewServer(n.routes)
	t.Cleanup(srv.Close)
	cfg.Supernodes = []string{srv.URL}
	h := newHost(t, t.TempDir(), cfg, 0, nil)
	require.NoError(t, h.Ready(t.Context()))
	return n, h
}

func contentRange(off, n, size int64) string {
	return fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, size)
}
func itoa(n int) string { return strconv.Itoa(n) }

// pause waits, at most until the test ends.
func pause(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}
