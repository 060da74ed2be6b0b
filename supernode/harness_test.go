package supernode

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/httprange"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
	"damselfly.dev/test/meter"
)

// hub is a registry that counts what it is asked and can be made to misbehave.
type hub struct {
	*httptest.Server
	inner http.Handler

	mu    sync.Mutex
	asked []string // "GET /v2/…"
	// fault answers a request in the registry's place when it returns true.
	fault func(w http.ResponseWriter, r *http.Request) bool
}

func newHub(t *testing.T) *hub {
	t.Helper()
	h := &hub{inner: registry.New(registry.Logger(nullLogger()))}
	h.Server = httptest.NewServer(h)
	t.Cleanup(h.Close)
	return h
}

func (h *hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	h.asked = append(h.asked, r.Method+" "+r.URL.Path)
	fault := h.fault
	h.mu.Unlock()
	if fault == nil || !fault(w, r) {
		h.inner.ServeHTTP(w, r)
	}
}

func (h *hub) misbehave(fault func(w http.ResponseWriter, r *http.Request) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fault = fault
}

// times counts the requests so far that begin so.
func (h *hub) times(prefix string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, a := range h.asked {
		if strings.HasPrefix(a, prefix) {
			n++
		}
	}
	return n
}

// blob puts a blob into demo/app and returns its digest.
func (h *hub) blob(t *testing.T, b []byte) string {
	t.Helper()
	d := digest.FromBytes(b).String()
	req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v2/demo/app/blobs/uploads/?digest="+d, bytes.NewReader(b))
	w := httptest.NewRecorder()
	h.inner.ServeHTTP(w, req)
	require.Equal(t, http.StatusCreated, w.Code)
	return d
}

// manifest puts a manifest into demo/app under the tag v1.
func (h *hub) manifest(t *testing.T, b []byte) string {
	t.Helper()
	req := httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/v2/demo/app/manifests/v1", bytes.NewReader(b))
	req.Header.Set("Content-Type", manifestType)
	w := httptest.NewRecorder()
	h.inner.ServeHTTP(w, req)
	require.Equal(t, http.StatusCreated, w.Code)
	return digest.FromBytes(b).String()
}

const manifestType = "application/vnd.oci.image.manifest.v1+json"

// private makes a fault that lets only one credential in, with a body of its own.
func private(authorization string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == authorization {
			return false
		}
		w.Header().Set("Www-Authenticate", `Basic realm="hub"`)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = io.WriteString(w, noEntry)
		return true
	}
}

const noEntry = "no entry: who are you?\n"

// testRegion is a supernode in this process.
type testRegion struct {
	*Supernode
	t    *testing.T
	url  string
	reg  *prometheus.Registry
	stop func()
}

// start runs a supernode for the registry "hub.test" at h.
func start(t *testing.T, h *hub, dir string, edit func(*Config)) *testRegion {
	t.Helper()
	cfg := Default()
	cfg.DataDir = dir
	cfg.TagFreshness, cfg.DrainTimeout = time.Hour, 0
	cfg.Registries = registryproxy.Config{StallTimeout: 500 * time.Millisecond, AllowAddresses: []string{"127.0.0.0/8"}}
	if h != nil {
		cfg.Registries.Upstreams = []registryproxy.Upstream{{Name: "hub.test", URL: h.URL}}
	}
	if edit != nil {
		edit(&cfg)
	}
	reg := prometheus.NewRegistry()
	n, err := New(cfg, zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel)), reg)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx, nil) }()
	srv := httptest.NewServer(n.Handler())
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			require.NoError(t, <-ended)
			srv.CloseClientConnections()
			srv.Close()
		})
	}
	t.Cleanup(stop)
	return &testRegion{Supernode: n, t: t, url: srv.URL, reg: reg, stop: stop}
}

// metric returns the sum of a metric over its labels.
func (r *testRegion) metric(name string) int {
	r.t.Helper()
	return int(meter.Value(r.t, r.reg, name, ""))
}

// session returns the session of a host.
func (r *testRegion) session(name string) (s *session) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		require.True(r.t, r.region.ask(r.t.Context(), func() { s = r.region.names[name] }))
		return s != nil
	}, wait, poll)
	return s
}

// reply is an answer of the supernode.
type reply struct {
	status int
	header http.Header
	body   []byte
	err    error // of reading the body
}

// get asks the supernode by HTTP.
func (r *testRegion) get(method, path string, header ...string) reply {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.url+path, nil)
	require.NoError(r.t, err)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	require.NoError(r.t, err)
	b, err := io.ReadAll(resp.Body)
	require.NoError(r.t, resp.Body.Close())
	return reply{resp.StatusCode, resp.Header, b, err}
}

// How long a test waits for what must come, and how often it looks.
const (
	wait = time.Minute
	poll = 5 * time.Millisecond
)

// ask is a plain GET of anything.
func ask(t *testing.T, url string) reply {
	t.Helper()
	return (&testRegion{t: t, url: url}).get(http.MethodGet, "")
}

func v2(kind, reference string) string {
	return "/v2/demo/app/" + kind + "/" + reference + "?ns=hub.test"
}

// host speaks the session as a dfdaemon does, and gets what it is told to.
type host struct {
	t    *testing.T
	name string
	url  string
	conn *api.Conn[api.Down, api.Up]
	keys []ed25519.PublicKey
	peer *httptest.Server
	gone chan struct{} // closed when the session has ended

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at every change
	seq     uint64
	tasks   map[int32]*hostTask
	byID    map[string]*hostTask
	refused map[uint64]api.Refused
	granted map[uint64]api.Task
	assigns []api.Assign
	cancels []uint64
	invalid []api.Invalidate
	verify  []api.Verify
	told    []api.Progress
	drained bool              // the supernode is about to end
	lazy    bool              // looks at assignments and does nothing
	lies    func([]byte)      // changes what is served to peers
	blame   map[string]string // what became of transfers, by parent
}

type hostTask struct {
	api.Task
	digests map[int]pieces.Digest
	have    map[int][]byte
}

func dial(t *testing.T, r *testRegion, name string) *host {
	t.Helper()
	return dialFrom(t, r, name, "")
}

// dialFrom is dial for a host in a zone.
func dialFrom(t *testing.T, r *testRegion, name, zone string) *host {
	t.Helper()
	conn, err := api.Dial(t.Context(), http.DefaultClient, r.url)
	require.NoError(t, err)
	h := &host{
		t: t, name: name, url: r.url, conn: conn,
		gone: make(chan struct{}), changed: make(chan struct{}),
		tasks: map[int32]*hostTask{}, byID: map[string]*hostTask{},
		refused: map[uint64]api.Refused{}, granted: map[uint64]api.Task{}, blame: map[string]string{},
	}
	hello := api.Hello{Version: api.Version, Host: name, Zone: zone, Up: 2, Down: 2}
	h.peer = httptest.NewServer(http.HandlerFunc(h.serve))
	t.Cleanup(h.peer.Close)
	hello.Addr = h.peer.Listener.Addr().String()
	h.send(api.Up{Hello: &hello})
	down, err := conn.Read(t.Context())
	require.NoError(t, err)
	require.NotNil(t, down.Welcome)
	h.keys = api.TicketKeys(down.Welcome.Keys)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go h.read(ctx)
	go func() { // slow as the machine may be, it is there
		_ = conn.KeepAlive(ctx, func() { go func() { _ = conn.Write(ctx, api.Up{}) }() })
	}()
	return h
}

func (h *host) send(up api.Up) {
	h.t.Helper()
	require.NoError(h.t, h.conn.Write(context.Background(), up))
}

// die ends the host without a word.
func (h *host) die() {
	h.conn.CloseNow()
	h.peer.CloseClientConnections()
	<-h.gone
}

func (h *host) read(ctx context.Context) {
	defer close(h.gone)
	for {
		down, err := h.conn.Read(ctx)
		if err != nil {
			return
		}
		h.mu.Lock()
		h.act(down) // transfers outlive a batch
		close(h.changed)
		h.changed = make(chan struct{})
		h.mu.Unlock()
	}
}

func (h *host) act(down api.Down) {
	for _, k := range down.Task {
		h.granted[k.Seq] = k
		if h.tasks[k.Num] == nil {
			h.tasks[k.Num] = &hostTask{Task: k, digests: map[int]pieces.Digest{}, have: map[int][]byte{}}
			h.byID[k.Task] = h.tasks[k.Num]
		}
	}
	for _, f := range down.Refused {
		h.refused[f.Seq] = f
	}
	for _, d := range down.Digests {
		ds, err := pieces.ParseDigests(d.Digests)
		if err != nil {
			panic(err)
		}
		for i, p := range ds {
			h.tasks[d.Task].digests[d.First+i] = p
		}
	}
	for _, a := range down.Assign {
		h.assigns = append(h.assigns, a)
		if !h.lazy {
			go h.follow(a, h.tasks[a.Task])
		}
	}
	h.cancels = append(h.cancels, down.Cancel...)
	h.invalid = append(h.invalid, down.Invalidate...)
	h.verify = append(h.verify, down.Verify...)
	h.told = append(h.told, down.Progress...)
	h.drained = h.drained || down.Drain
}

// follow makes a transfer.
func (h *host) follow(a api.Assign, k *hostTask) {
	data, err := a.Data, error(nil)
	off := k.Layout.Offset(a.First)
	n := k.Layout.Offset(a.First+a.Count) - off
	if data == nil {
		data, err = h.fetch(a, k.Task, off, n)
	}
	why := api.Gone
	if err == nil {
		why = 0
		for i := a.First; i < a.First+a.Count && why == 0; i++ {
			b := data[k.Layout.Offset(i)-off:][:k.Layout.Size(i)]
			h.mu.Lock()
			if pieces.Sum(b) == k.digests[i] {
				k.have[i] = b
				close(h.changed)
				h.changed = make(chan struct{})
			} else {
				why = api.Corrupt
			}
			h.mu.Unlock()
			if why == 0 {
				_ = h.conn.Write(context.Background(), api.Up{Done: []api.Done{{Transfer: a.Transfer, Piece: i}}})
			}
		}
	}
	if why != 0 {
		h.mu.Lock()
		h.blame[a.Parent] = fmt.Sprint(why, err)
		h.mu.Unlock()
		_ = h.conn.Write(context.Background(), api.Up{Failed: []api.Failed{{Transfer: a.Transfer, Why: why}}})
	}
}

func (h *host) fetch(a api.Assign, k api.Task, off, n int64) ([]byte, error) {
	base := h.url
	if a.Parent != "" {
		base = "http://" + a.Parent
	}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, base+api.ContentPath(pieces.TaskID(k.Task)), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	req.Header.Set(api.TicketHeader, k.Ticket)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusPartialContent {
		return nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	b, err := io.ReadAll(resp.Body)
	if err == nil && int64(len(b)) != n {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

// serve gives pieces to other hosts.
func (h *host) serve(w http.ResponseWriter, r *http.Request) {
	id := strings.Split(r.URL.Path, "/")[3]
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, err := api.VerifyTicket(h.keys, r.Header.Get(api.TicketHeader), pieces.TaskID(id), time.Now()); err != nil {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	k := h.byID[id]
	span, _, err := httprange.Parse(r.Header.Get("Range"), k.Layout.Length)
	if err != nil {
		panic(err)
	}
	var b []byte
	for first, end := k.Layout.Span(span.Offset, span.Length); first < end; first++ {
		b = append(b, k.have[first]...)
	}
	b = slices.Clone(b)
	if h.lies != nil {
		h.lies(b)
	}
	w.WriteHeader(http.StatusPartialContent)
	_, _ = w.Write(b)
}

// ask sends a join and returns its number.
func (h *host) ask(id string, o api.Origin) uint64 {
	h.t.Helper()
	h.mu.Lock()
	h.seq++
	seq := h.seq
	h.mu.Unlock()
	h.send(api.Up{Join: []api.Join{{Seq: seq, Task: id, Origin: o}}})
	return seq
}

// await waits until ok, called with h.mu held, returns true.
func (h *host) await(what string, ok func() bool) {
	h.t.Helper()
	limit := time.After(wait)
	for {
		h.mu.Lock()
		done, changed := ok(), h.changed
		h.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-limit:
			h.t.Fatalf("%s: waited in vain for %s", h.name, what)
		}
	}
}

// join asks for a task and returns what the supernode says.
func (h *host) join(id string, o api.Origin) (*api.Task, *api.Refused) {
	h.t.Helper()
	return h.answer(h.ask(id, o))
}

func (h *host) answer(seq uint64) (*api.Task, *api.Refused) {
	h.t.Helper()
	var task *api.Task
	var no *api.Refused
	h.await(fmt.Sprintf("the answer to join %d", seq), func() bool {
		if k, ok := h.granted[seq]; ok {
			task = &k
		}
		if f, ok := h.refused[seq]; ok {
			no = &f
		}
		return task != nil || no != nil
	})
	return task, no
}

// content waits until the host has all of a task, and returns it.
func (h *host) content(id string) []byte {
	h.t.Helper()
	var b []byte
	h.await("all of "+id, func() bool {
		k := h.byID[id]
		return k != nil && len(k.have) == k.Layout.Count()
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	k := h.byID[id]
	for i := range k.Layout.Count() {
		b = append(b, k.have[i]...)
	}
	return b
}

// from is the hub's repository demo/app, for a caller.
func from(authorization string) api.Origin {
	o := api.Origin{Registry: "hub.test", Repository: "demo/app"}
	if authorization != "" {
		o.Header = map[string][]string{"Authorization": {authorization}}
	}
	return o
}

func newBytes(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8(sha256.Sum256([]byte(fmt.Sprint(n))))
	_, _ = r.Read(b)
	return b
}

func hexOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
