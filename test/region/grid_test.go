package region_test

import (
	"bytes"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// The grid of faults: each kind of them at each place of an answer of the registry, of
// the supernode or of a peer. What the cells have in common is here; those
// of the registry are in registryfault_test.go, the others in trap_test.go.

var (
	faults = []string{"reset", "stall", "truncation", "wrong", "drip", "401", "403", "404", "429", "500", "503"}
	places = []string{"header", "first", "middle", "last"}
)

// Not every kind can happen at every place as it does elsewhere. This is what stands
// for it there; no cell is left out.
//
//	truncation, header     half of a header, and the end
//	wrong,      header     bytes that are no HTTP
//	drip,       header     two bytes of it a second
//	drip,       last       the last byte is late; nothing is left to drip
//	a status,   not header the answer breaks off, and who asks for the rest gets the status
//	a peer's session or manifests: a peer has neither
//	wrong,      session    a bit of its stream, which then cannot be read

// hangLimit is how long a pull may stand still, by the pulse.
const hangLimit = 10 * time.Second

// pulse counts tenths of a second, with a request in between such as pulls are made of:
// where the machine is busy with other things it counts fewer than a clock.
var pulse = sync.OnceValue(func() *atomic.Int64 {
	var n atomic.Int64
	s := httptest.NewServer(http.NotFoundHandler()) // for as long as the tests run
	go func() {
		for {
			<-time.After(100 * time.Millisecond)
			if resp, err := s.Client().Get(s.URL); err == nil {
				_ = resp.Body.Close()
			}
			n.Add(1)
		}
	}()
	return &n
})

func beats() time.Duration { return time.Duration(pulse().Load()) * 100 * time.Millisecond }

// layerOfGrid is the length of the one layer: more than a dozen pieces.
const layerOfGrid = 3 << 19

// pushed is a registry with the image that all cells pull.
type pushed struct {
	http.Handler
	digest digest.Digest // of the manifest
	layer  string        // the layer's
}

var theImage = sync.OnceValues(func() (pushed, error) {
	p := pushed{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	img, err := random.Image(layerOfGrid, 1)
	if err != nil {
		return p, err
	}
	hash, err := img.Digest()
	if err != nil {
		return p, err
	}
	p.digest = digest.Digest(hash.String())
	layers, err := img.Layers()
	if err != nil {
		return p, err
	}
	if hash, err = layers[0].Digest(); err != nil {
		return p, err
	}
	p.layer = hash.String()
	return p, p.put(img)
})

func (p pushed) put(img v1.Image) error {
	s := httptest.NewServer(p)
	defer s.Close()
	ref, err := name.ParseReference(strings.TrimPrefix(s.URL, "http://")+"/org/app:v1", name.Insecure)
	if err != nil {
		return err
	}
	return remote.Write(ref, img)
}

func gridImage(t *testing.T) pushed {
	t.Helper()
	p, err := theImage()
	require.NoError(t, err)
	return p
}

// cell is one of the grid.
type cell struct {
	row, fault string
	run        func(t *testing.T, started func()) wait // returns the longest
}

// Most of the time a cell waits, so many run at once. What costs is to start what it is
// made of: few do that at once, lest others wait for the machine.
var (
	running  = make(chan struct{}, 24)
	starting = make(chan struct{}, 2)
)

// runGrid runs cells and tells the longest wait of each row. With -short it takes a fair part of them: every third, another one each time
// that the fault, the place or the kind changes.
func runGrid(t *testing.T, cells []cell) {
	t.Helper()
	var mu sync.Mutex
	longest, count := map[string]wait{}, map[string]int{}
	var all sync.WaitGroup
	for i, c := range cells {
		if testing.Short() && i%3 != 0 {
			continue
		}
		all.Go(func() {
			running <- struct{}{}
			defer func() { <-running }()
			t.Run(c.row+", "+c.fault, func(t *testing.T) {
				starting <- struct{}{}
				started := sync.OnceFunc(func() { <-starting })
				defer started()
				gap := c.run(t, started)
				mu.Lock()
				defer mu.Unlock()
				count[c.row]++
				longest[c.row] = longest[c.row].or(gap)
			})
		})
	}
	all.Wait()
	rows := make([]string, 0, len(count))
	for row := range count {
		rows = append(rows, row)
	}
	slices.Sort(rows)
	for _, row := range rows {
		t.Logf("%-36s %3d cells, longest wait %4.1f s (%.1f s by the pulse)", row, count[row], longest[row].clock.Seconds(), longest[row].pulse.Seconds())
	}
}

// spoilHeader answers with a fault in the place of a header, and tells whether fault is
// such a one.
func spoilHeader(w http.ResponseWriter, r *http.Request, fault string) {
	if status, _ := strconv.Atoi(fault); status != 0 {
		refuse(w, status)
		return
	}
	if fault == "stall" {
		<-r.Context().Done()
		return
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	good := []byte("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n")
	switch fault {
	case "reset":
		_ = conn.(*net.TCPConn).SetLinger(0)
	case "truncation":
		_, _ = conn.Write(good[:len(good)/2])
	case "wrong":
		_, _ = conn.Write([]byte("\x16\x03\x01 this is not HTTP\r\n\r\n"))
	case "drip":
		for rest := range slices.Chunk(bytes.Repeat(good, 4), 1) {
			if _, err := conn.Write(rest); err != nil {
				return
			}
			<-time.After(500 * time.Millisecond)
		}
	}
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

// dripped is how many bytes come every 50 ms of a body of that length that drips: at most
// 10 KB a second, and none is through in less than ten.
func dripped(length int64) int64 { return min(500, max(1, length/200)) }
