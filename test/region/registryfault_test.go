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

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/registryproxy"
)

// hangLimit is how long a pull may stand still: 10 s by the design, and half as
// much for a machine that is busy with other tests.
const hangLimit = 15 * time.Second

// trouble is a registry of which one answer goes wrong.
type trouble struct {
	*httptest.Server
	backend http.Handler
	kind    string // "manifests" or "blobs": what goes wrong
	fault   string // a status, or a name below
	at      string // header, first, middle, last

	mu     sync.Mutex // guards what follows
	armed  bool
	next   int // the status of the next answer, 0 for none
	served map[string]int
}

func newTrouble(t *testing.T, kind, fault, at string) *trouble {
	t.Helper()
	o := &trouble{backend: registry.New(registry.Logger(log.New(io.Discard, "", 0))), kind: kind, fault: fault, at: at, served: map[string]int{}}
	o.Server = httptest.NewUnstartedServer(o)
	o.Config.ErrorLog = log.New(io.Discard, "", 0)
	o.Start()
	t.Cleanup(o.Close)
	return o
}

func (o *trouble) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	mine := r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/"+o.kind+"/")
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
	if !first {
		o.backend.ServeHTTP(w, r)
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

const registrysNo = `{"errors":[{"code":"DENIED","message":"the registry's own words"}]}`

func refuse(w http.ResponseWriter, status int) {
	w.Header().Set("Content-Type", "application/json")
	if status == http.StatusUnauthorized {
		w.Header().Set("Www-Authenticate", `Basic realm="tests"`)
	}
	w.WriteHeader(status)
	_, _ = io.WriteString(w, registrysNo)
}

// spoil answers, and goes wrong where it is to.
func (o *trouble) spoil(w http.ResponseWriter, r *http.Request, body []byte) {
	at := map[string]int{"header": 0, "first": 10, "middle": len(body) / 2, "last": len(body) - 1}[o.at]
	status, _ := strconv.Atoi(o.fault)
	if status != 0 && o.at == "header" {
		w.Header().Del("Content-Length")
		refuse(w, status)
		return
	}
	if o.at != "header" {
		_, _ = w.Write(body[:at])
		_ = http.NewResponseController(w).Flush()
	}
	switch o.fault {
	case "wrong":
		body[at] ^= 1
		_, _ = w.Write(body[at:])
	case "drip", "wrong, slowly":
		step := 1000 // 20 KB a second
		if o.fault != "drip" {
			body[at] ^= 1
			step = 30_000
		}
		for len(body[at:]) > 0 {
			n := min(step, len(body[at:]))
			if _, err := w.Write(body[at : at+n]); err != nil {
				return
			}
			_ = http.NewResponseController(w).Flush()
			at += n
			select {
			case <-r.Context().Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
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

// watch is a pull that notes its longest time without a byte.
type watch struct {
	last time.Time
	gap  time.Duration
}

func (p *watch) moved() {
	p.gap = max(p.gap, time.Since(p.last))
	p.last = time.Now()
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

// Whatever goes wrong with an answer of the registry, no engine notices, unless it
// is the registry's own no; none waits for long, and none gets wrong bytes for
// right ones. Wrong bytes in a blob are noticed at its end, when an engine has some
// of them: its answer breaks off, and the next is right.
func TestTroubleAtTheRegistry(t *testing.T) {
	for kind, places := range map[string][]string{"manifests": {"header", "middle"}, "blobs": {"header", "first", "middle", "last"}} {
		for _, at := range places {
			for _, fault := range []string{"reset", "stall", "truncation", "wrong", "wrong, slowly", "drip", "401", "403", "404", "429", "500", "503"} {
				t.Run(kind+", "+at+", "+fault, func(t *testing.T) {
					t.Parallel()
					troubleAtTheRegistry(t, newTrouble(t, kind, fault, at))
				})
			}
		}
	}
}

func troubleAtTheRegistry(t *testing.T, o *trouble) {
	t.Helper()
	img, err := random.Image(1<<20, 1)
	require.NoError(t, err)
	write(t, o.URL, img)
	hash, err := img.Digest()
	require.NoError(t, err)
	want := digest.Digest(hash.String())

	cfg := reachable(registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: registryName, URL: o.URL}}})
	centre := startSupernodeFor(t, cfg, t.TempDir(), "")
	hosts := []*node{startHostFor(t, cfg, centre, nil), startHostFor(t, cfg, centre, nil)}
	o.mu.Lock()
	o.armed = true
	clear(o.served)
	o.mu.Unlock()

	errs := make(chan error, len(hosts))
	gaps := make(chan time.Duration, len(hosts))
	for _, h := range hosts {
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			p := &watch{last: time.Now()}
			errs <- p.pull(ctx, h, want)
			gaps <- p.gap
		}()
	}
	status, _ := strconv.Atoi(o.fault)
	broken := false
	for range hosts {
		err := <-errs
		no, isNo := errors.AsType[*refused](err)
		switch {
		case err == nil:
		case isNo && no.status == status && status < 500 && no.body == registrysNo:
		case strings.HasPrefix(o.fault, "wrong") && o.kind == "blobs" && !isNo && !errors.Is(err, errWrongBytes):
			broken = true
		default:
			t.Errorf("an engine sees: %v", err)
		}
	}
	gap := max(<-gaps, <-gaps)
	o.mu.Lock()
	served, armed := fmt.Sprint(o.served), o.armed
	o.mu.Unlock()
	require.False(t, armed, "nothing has gone wrong: the registry was not asked")
	t.Logf("longest wait %v; broken off: %v; registry asked %s", gap.Round(10*time.Millisecond), broken, served)
	require.Less(t, gap, hangLimit)
	p := &watch{last: time.Now()}
	require.Eventually(t, func() bool { return p.pull(t.Context(), hosts[0], want) == nil }, waitLimit, time.Second, "the next pull")
}
