package region_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/registryproxy"
)

// trouble is a registry of which one answer goes wrong.
type trouble struct {
	*httptest.Server
	backend http.Handler
	kind    string // "manifests" or "blobs": what goes wrong
	fault   string // a status, or a name below
	at      string // header, first, middle, last
	only    string // of blobs, the layer: nobody waits for the configuration

	mu     sync.Mutex // guards what follows
	armed  bool
	next   int // the status of the next answer, 0 for none
	served map[string]int
}

func newTrouble(t *testing.T, kind, fault, at string) *trouble {
	t.Helper()
	o := &trouble{backend: gridImage(t), kind: kind, fault: fault, at: at, armed: true, served: map[string]int{}}
	if kind == "blobs" {
		o.only = gridImage(t).layer
	}
	o.Server = httptest.NewUnstartedServer(o)
	o.Config.ErrorLog = log.New(io.Discard, "", 0)
	o.Start()
	t.Cleanup(o.Close)
	return o
}

func (o *trouble) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	mine := r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/"+o.kind+"/"+o.only)
	o.mu.Lock()
	status := 0
	first := mine && o.armed
	switch {
	case mine && o.next != 0:
		status, o.next = o.next, 0
	case first:
		o.armed = false
	}
	if r.Method == http.MethodGet {
		o.served[r.URL.Path]++
	}
	o.mu.Unlock()
	if status != 0 {
		refuse(w, status)
		return
	}
	switch {
	case !first:
		o.backend.ServeHTTP(w, r)
		return
	case o.at == "header":
		spoilHeader(w, r, o.fault)
		return
	}
	rec := httptest.NewRecorder() // the answer as it should be
	o.backend.ServeHTTP(rec, r)
	maps.Copy(w.Header(), rec.Header())
	body := rec.Body.Bytes()
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Header().Set("Accept-Ranges", "bytes")
	o.spoil(w, r, body)
}

// spoil answers, and goes wrong where it is to.
func (o *trouble) spoil(w http.ResponseWriter, r *http.Request, body []byte) {
	at := map[string]int{"first": 10, "middle": len(body) / 2, "last": len(body) - 1}[o.at]
	status, _ := strconv.Atoi(o.fault)
	_, _ = w.Write(body[:at])
	_ = http.NewResponseController(w).Flush()
	switch o.fault {
	case "wrong":
		body[at] ^= 1
		_, _ = w.Write(body[at:])
	case "drip", "wrong slowly":
		step := int(dripped(int64(len(body))))
		if o.fault != "drip" {
			body[at] ^= 1
			step = 30_000
		}
		for len(body[at:]) > 0 {
			select {
			case <-r.Context().Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
			n := min(step, len(body[at:]))
			if _, err := w.Write(body[at : at+n]); err != nil {
				return
			}
			_ = http.NewResponseController(w).Flush()
			at += n
		}
	case "stall":
		<-r.Context().Done()
	case "reset":
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
			_ = conn.(*net.TCPConn).SetLinger(0)
			_ = conn.Close()
		}
	default: // truncation; and a status for whoever asks for the rest
		o.mu.Lock()
		o.next = status
		o.mu.Unlock()
		panic(http.ErrAbortHandler)
	}
}

// wait is a time without a byte, by the pulse and by the clock.
type wait struct{ pulse, clock time.Duration }

func (a wait) or(b wait) wait { return wait{max(a.pulse, b.pulse), max(a.clock, b.clock)} }

// watch is a pull that notes its longest wait.
type watch struct {
	last  time.Duration
	since time.Time
	gap   wait
}

func newWatch() *watch { return &watch{last: beats(), since: time.Now()} }

func (p *watch) moved() {
	now := beats()
	p.gap = p.gap.or(wait{now - p.last, time.Since(p.since)})
	p.last, p.since = now, time.Now()
}

// get reads an answer to its end. What the registry refuses is a *refused.
func (p *watch) get(ctx context.Context, at string) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, at+"?ns="+registryName, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(r)
	p.moved()
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	var all []byte
	buf := make([]byte, 32<<10)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			p.moved()
		}
		all = append(all, buf[:n]...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			p.moved()
			return nil, fmt.Errorf("after %d bytes: %w", len(all), err)
		}
	}
	if resp.StatusCode != http.StatusOK {
		return nil, &refused{resp.StatusCode, string(all)}
	}
	return all, nil
}

type refused struct {
	status int
	body   string
}

func (r *refused) Error() string { return fmt.Sprintf("status %d: %s", r.status, r.body) }

var errWrongBytes = errors.New("wrong bytes, taken for the whole")

// pull gets a manifest by its tag and what it names, and trusts nobody.
func (p *watch) pull(ctx context.Context, host *node, want digest.Digest) error {
	at := host.url() + "/v2/org/app"
	m, err := p.get(ctx, at+"/manifests/v1")
	if err != nil {
		return err
	}
	if digest.FromBytes(m) != want {
		return errWrongBytes
	}
	var manifest struct {
		Layers []struct{ Digest digest.Digest }
	}
	if err := json.Unmarshal(m, &manifest); err != nil {
		return err
	}
	for _, l := range manifest.Layers {
		b, err := p.get(ctx, at+"/blobs/"+l.Digest.String())
		if err != nil {
			return err
		}
		if digest.FromBytes(b) != l.Digest {
			return errWrongBytes
		}
	}
	return nil
}

// Whatever goes wrong with an answer of the registry, to the supernode or to a host on
// its own, no engine notices, unless it is the registry's own no; none waits for long, and
// none gets wrong bytes for right ones. Wrong bytes in a blob are noticed at its end, when
// an engine has some of them: its answer breaks off, and the next is right.
func TestTroubleAtTheRegistry(t *testing.T) {
	var cells []cell
	for _, asker := range []string{"supernode", "host alone"} {
		for _, kind := range []string{"manifests", "blobs"} {
			for _, at := range places {
				for _, fault := range append(faults, "wrong slowly") {
					if at == "header" && fault == "wrong slowly" {
						continue // its bytes are slow, not its header
					}
					cells = append(cells, cell{
						asker + ", " + kind + ", " + at, fault,
						func(t *testing.T, started func()) wait {
							t.Helper()
							return troubleAtTheRegistry(t, newTrouble(t, kind, fault, at), asker, started)
						},
					})
				}
			}
		}
	}
	runGrid(t, cells)
}

func troubleAtTheRegistry(t *testing.T, o *trouble, asker string, started func()) wait {
	t.Helper()
	want := gridImage(t).digest
	cfg := reachable(registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: registryName, URL: o.URL}}})
	var hosts []*node
	if asker == "supernode" {
		centre := startSupernodeFor(t, cfg, t.TempDir(), "")
		hosts = []*node{startHostFor(t, cfg, centre, nil), startHostFor(t, cfg, centre, nil)}
	} else {
		hosts = []*node{startHostFor(t, cfg, nil, nil)}
	}
	started()
	errs := make(chan error, len(hosts))
	gaps := make(chan wait, len(hosts))
	for _, h := range hosts {
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			p := newWatch()
			errs <- p.pull(ctx, h, want)
			gaps <- p.gap
		}()
	}
	status, _ := strconv.Atoi(o.fault)
	broken, gap := false, wait{}
	for range hosts {
		err := <-errs
		gap = gap.or(<-gaps)
		no, isNo := errors.AsType[*refused](err)
		switch {
		case err == nil:
		case isNo && no.status == status && status < 500 && no.body == registrysNo:
		case strings.HasPrefix(o.fault, "wrong") && o.at != "header" && o.kind == "blobs" && !isNo && !errors.Is(err, errWrongBytes):
			broken = true
		default:
			t.Errorf("an engine sees: %v", err)
		}
	}
	o.mu.Lock()
	served, armed := fmt.Sprint(o.served), o.armed
	o.mu.Unlock()
	require.False(t, armed, "nothing has gone wrong: the registry was not asked")
	t.Logf("longest wait %v; broken off: %v; registry asked %s", gap.clock, broken, served)
	require.LessOrEqual(t, gap.pulse, hangLimit)
	require.Eventually(t, func() bool { return newWatch().pull(t.Context(), hosts[0], want) == nil }, waitLimit, time.Second, "the next pull")
	return gap
}
