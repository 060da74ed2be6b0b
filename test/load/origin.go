//go:build linux

package main

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path"
	"strconv"
	"strings"

	"damselfly.dev/pieces"
)

const (
	registry   = "load.example"
	repository = "load/blobs"
)

// origin is a registry of blobs whose bytes are computed as they are sent.
type origin struct {
	*httptest.Server
	blobs  []pieces.TaskID
	layout pieces.Layout // of each
}

// newOrigin returns a registry of n blobs of so many pieces: the number alone
// matters here, so they are as small as can be.
func newOrigin(n, count int) *origin {
	o := &origin{layout: pieces.NewLayout(int64(count) * pieces.MinPieceSize)}
	for i := range n {
		h := sha256.New()
		io.Copy(h, o.content(i)) // neither end can fail
		o.blobs = append(o.blobs, pieces.TaskID("sha256:"+hex.EncodeToString(h.Sum(nil))))
	}
	o.Server = httptest.NewServer(o)
	return o
}

func (o *origin) content(i int) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{byte(i), byte(i >> 8)}), o.layout.Length)
}

// name is how a supernode is told of it.
func (o *origin) name() string { return registry + "=" + o.URL }

// ServeHTTP knows GET and HEAD of whole blobs alone.
func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	for i, b := range o.blobs {
		if path.Base(r.URL.Path) != string(b) || !strings.Contains(r.URL.Path, repository) {
			continue
		}
		w.Header().Set("Content-Length", strconv.FormatInt(o.layout.Length, 10))
		w.Header().Set("Docker-Content-Digest", string(b))
		if r.Method != http.MethodHead {
			io.Copy(w, o.content(i))
		}
		return
	}
	http.NotFound(w, r)
}
