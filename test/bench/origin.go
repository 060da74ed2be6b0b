//go:build linux

package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync/atomic"
)

// madeBlob is a blob that is made from a seed whenever it is read.
type madeBlob struct {
	seed   uint64
	digest string
}

// origin is a registry of blobs whose bytes are computed as they are sent, so
// that it takes neither memory nor disk. It knows GET and HEAD of blobs alone.
type origin struct {
	blobs []madeBlob
	size  int64
	sent  atomic.Int64 // bytes of bodies
}

func newOrigin(n int, size int64) *origin {
	o := &origin{size: size}
	for i := range n {
		b := madeBlob{seed: uint64(i + 1)}
		h := sha256.New()
		io.Copy(h, randomBytes(b.seed, size)) // neither end can fail
		b.digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
		o.blobs = append(o.blobs, b)
	}
	return o
}

func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	for _, b := range o.blobs {
		if path.Base(r.URL.Path) == b.digest {
			o.serve(w, r, b)
			return
		}
	}
	http.NotFound(w, r)
}

func (o *origin) serve(w http.ResponseWriter, r *http.Request, b madeBlob) {
	body := randomBytes(b.seed, o.size)
	off := int64(0)
	if from, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
		first, last, _ := strings.Cut(from, "-")
		n, err := strconv.ParseInt(first, 10, 64)
		if err != nil || last != "" || n >= o.size {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		off = n
		io.CopyN(io.Discard, body, off) // in range
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, o.size-1, o.size))
	}
	w.Header().Set("Content-Length", strconv.FormatInt(o.size-off, 10))
	w.Header().Set("Docker-Content-Digest", b.digest)
	if off > 0 {
		w.WriteHeader(http.StatusPartialContent)
	}
	if r.Method == http.MethodHead {
		return
	}
	n, _ := io.Copy(w, body)
	o.sent.Add(n)
}
