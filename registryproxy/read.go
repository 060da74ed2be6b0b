package registryproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"damselfly.dev/httprange"
)

// MaxManifestSize is the size in bytes of the largest manifest that is read.
const MaxManifestSize = 4 << 20

// manifestTypes are asked for where a caller says nothing of what it takes.
var manifestTypes = []string{
	"application/vnd.oci.image.index.v1+json",
	"application/vnd.oci.image.manifest.v1+json",
	"application/vnd.docker.distribution.manifest.list.v2+json",
	"application/vnd.docker.distribution.manifest.v2+json",
	"*/*",
}

// Manifest is a manifest as the registry gives it. Of a GET, Body holds all of
// it, and Digest and Size are its own. Of a HEAD, Body is nil, Digest is "" and
// Size -1 where the registry does not say. MediaType has no parameters.
type Manifest struct {
	MediaType string
	Digest    digest.Digest
	Size      int64
	Body      []byte
}

// Manifest asks for a manifest by tag or digest, with a HEAD or a GET. The
// bytes of a GET have the digest that reference is or that the registry names,
// and are at most MaxManifestSize.
func (c *Client) Manifest(ctx context.Context, head bool, repo Repository, reference string, accept []string, who Caller) (*Manifest, error) {
	if len(accept) == 0 {
		accept = manifestTypes
	}
	q := question{
		Route:  Route{KindManifest, repo, reference},
		method: method(head),
		header: http.Header{"Accept": slices.Clone(accept)},
		who:    who,
	}
	a, err := c.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	m, err := c.manifest(a, q, hurry)
	if err == nil || ctx.Err() != nil || !IsTemporary(err) {
		return m, err
	}
	if a, err = c.ask(ctx, q); err != nil { // once more, at leisure
		return nil, err
	}
	return c.manifest(a, q, 0)
}

// manifest reads an answer to q, which must come within limit, if there is one.
func (c *Client) manifest(a *answer, q question, limit time.Duration) (*Manifest, error) {
	defer a.close()
	if err := a.want(http.StatusOK); err != nil {
		return nil, err
	}
	m, err := newManifest(q.Reference, a.header, a.length)
	if err != nil {
		return nil, a.body.failed(err)
	}
	if q.method == http.MethodHead {
		return m, nil
	}
	if limit > 0 {
		defer time.AfterFunc(limit, func() { a.body.cancel(errStalled) }).Stop()
	}
	a.body.count = c.bytes.WithLabelValues(KindManifest.String())
	if err := m.read(a.body); err != nil {
		return nil, err
	}
	return m, nil
}

// DigestOf returns the digest of what was asked for by reference: that itself, for
// a tag the one that the answer's header names, else "".
func DigestOf(reference string, h http.Header) digest.Digest {
	for _, s := range []string{reference, h.Get("Docker-Content-Digest")} {
		if d := digest.Digest(s); d.Validate() == nil {
			return d
		}
	}
	return ""
}

// newManifest reads the header of an answer to who asked for reference.
func newManifest(reference string, h http.Header, length int64) (*Manifest, error) {
	named := DigestOf("", h)
	if d := digest.Digest(reference); d.Validate() == nil {
		if named != "" && named != d && named.Algorithm() == d.Algorithm() {
			return nil, fmt.Errorf("asked for manifest %s, it answers with %s", d, named)
		}
		named = d
	}
	return &Manifest{MediaType: mediaType(h), Digest: named, Size: length}, nil
}

// read fills m from a body and checks it.
func (m *Manifest) read(body *watched) error {
	if m.Size > MaxManifestSize {
		return body.failed(permanent("the manifest is larger than 4 MiB"))
	}
	b, err := body.upTo(MaxManifestSize + 1)
	switch {
	case err != nil:
		return err
	case len(b) > MaxManifestSize:
		return body.failed(permanent("the manifest is larger than 4 MiB"))
	}
	algorithm := digest.Canonical
	if m.Digest != "" {
		algorithm = m.Digest.Algorithm()
	}
	sum := algorithm.FromBytes(b)
	if m.Digest != "" && m.Digest != sum {
		return body.failed(fmt.Errorf("manifest %s: the bytes have the digest %s", m.Digest, sum))
	}
	m.Digest, m.Size, m.Body = sum, int64(len(b)), b
	return nil
}

func method(head bool) string {
	if head {
		return http.MethodHead
	}
	return http.MethodGet
}

func mediaType(h http.Header) string {
	t, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return t
}

// want checks an answer's status, and that its bytes are those that are stored.
func (a *answer) want(status ...int) error {
	if !slices.Contains(status, a.status) {
		return a.body.failed(permanent(fmt.Sprintf("the answer has the status %d", a.status)))
	}
	if e := a.header.Get("Content-Encoding"); e != "" && e != "identity" {
		return a.body.failed(permanent("the answer has a content encoding, though none was asked for"))
	}
	return nil
}

// BlobBody is the bytes of a blob as they come from the registry, to be closed
// by whoever asked; nothing has checked them. A Read fails when they stall or
// end too early, and with the context of the request.
type BlobBody struct {
	io.ReadCloser
	Length int64 // of the whole blob, -1 if the registry does not say
}

// Blob asks for a blob's bytes from off on, 0 ≤ off < its length.
func (c *Client) Blob(ctx context.Context, repo Repository, dgst string, off int64, who Caller) (*BlobBody, error) {
	a, err := c.askBlob(ctx, Route{KindBlob, repo, dgst}, ByteRange{Offset: off, Length: -1}, who)
	if err != nil {
		return nil, err
	}
	return a.blob(off, -1)
}

// BlobRange asks for the r.Length > 0 bytes of a blob from r.Offset on, fewer only
// where the blob ends; 0 ≤ r.Offset < its length.
func (c *Client) BlobRange(ctx context.Context, repo Repository, dgst string, r ByteRange, who Caller) (*BlobBody, error) {
	a, err := c.askBlob(ctx, Route{KindBlob, repo, dgst}, r, who)
	if err != nil {
		return nil, err
	}
	return a.blob(r.Offset, r.Length)
}

// ErrNoRange is what a registry that knows no ranges is found by.
var ErrNoRange = errors.New("the registry answers a range with the whole")

// BlobPart is BlobRange, but for a registry that answers with the whole: then it is
// ErrNoRange.
func (c *Client) BlobPart(ctx context.Context, repo Repository, dgst string, r ByteRange, who Caller) (*BlobBody, error) {
	a, err := c.askBlob(ctx, Route{KindBlob, repo, dgst}, r, who)
	if err != nil {
		return nil, err
	}
	if a.status == http.StatusOK {
		a.close()
		return nil, ErrNoRange
	}
	return a.blob(r.Offset, r.Length)
}

// askBlob asks for a range of a blob, with a length of -1 for all from its offset on.
func (c *Client) askBlob(ctx context.Context, route Route, r ByteRange, who Caller) (*answer, error) {
	q := question{Route: route, method: http.MethodGet, header: http.Header{}, who: who}
	switch {
	case r.Offset < 0 || r.Length == 0 || r.Length < -1:
		return nil, fmt.Errorf("range of %d bytes from %d on of blob %s", r.Length, r.Offset, route.Reference)
	case r.Length > 0:
		q.header.Set("Range", fmt.Sprintf("bytes=%d-%d", r.Offset, r.Offset+min(r.Length, math.MaxInt64-r.Offset)-1))
	case r.Offset > 0:
		q.header.Set("Range", fmt.Sprintf("bytes=%d-", r.Offset))
	}
	a, err := c.ask(ctx, q)
	if no, ok := errors.AsType[*Refusal](err); ok && no.Status == http.StatusRequestedRangeNotSatisfiable && q.header.Get("Range") != "" {
		q.header.Del("Range") // some know only bounded ranges, some none
		if a, _ = c.ask(ctx, q); a == nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	a.body.count = c.bytes.WithLabelValues(KindBlob.String())
	return a, nil
}

// blob makes the answer to a request for n bytes from off on, -1 for all there
// are, exactly those bytes. With an error it is closed.
func (a *answer) blob(off, n int64) (b *BlobBody, err error) {
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	if err := a.want(http.StatusOK, http.StatusPartialContent); err != nil {
		return nil, err
	}
	b = &BlobBody{ReadCloser: a.body, Length: a.length}
	left := a.length // -1 if not known
	if a.status == http.StatusPartialContent {
		r, size, ok := httprange.ParseContent(a.header.Get("Content-Range"))
		if !ok || r.Offset != off || (n < 0 && size >= 0 && off+r.Length != size) ||
			(n >= 0 && r.Length != n && (r.Length > n || off+r.Length != size)) ||
			(a.length >= 0 && a.length != r.Length) {
			return nil, a.body.failed(permanent("the answer is not the range that was asked for"))
		}
		b.Length, left = size, r.Length
	} else if off > 0 || n >= 0 {
		switch _, err := io.CopyN(io.Discard, a.body, off); {
		case errors.Is(err, io.EOF):
			return nil, a.body.failed(io.ErrUnexpectedEOF)
		case err != nil:
			return nil, err
		}
		if left >= 0 {
			left -= off
		}
		if n >= 0 && (left < 0 || left > n) {
			left = n
		}
	}
	if left >= 0 {
		b.ReadCloser = &exact{a.body, left, a.body.failed(io.ErrUnexpectedEOF)}
	}
	return b, nil
}

// verified gives what in does, the last of it only when all has the digest of sum.
type verified struct {
	in  *bufio.Reader
	sum digest.Verifier
	no  error
}

// Verified reads from in, but fails with no in the place of the last bytes where all of
// them together, with what sum has had before, do not have its digest.
func Verified(in io.Reader, sum digest.Verifier, no error) io.Reader {
	return &verified{bufio.NewReaderSize(in, 32<<10), sum, no} // as much as io.Copy takes at once
}

// Read implements io.Reader.
func (v *verified) Read(p []byte) (int, error) {
	n, err := v.in.Read(p)
	_, _ = v.sum.Write(p[:n]) // a hash takes all
	if err == nil {
		_, err = v.in.Peek(1) // there is more, or this is the end
	}
	if errors.Is(err, io.EOF) && !v.sum.Verified() {
		return 0, v.no
	}
	return n, err
}

// HeadBlob asks for a blob's length, -1 if the registry does not say.
func (c *Client) HeadBlob(ctx context.Context, repo Repository, dgst string, who Caller) (int64, error) {
	a, err := c.ask(ctx, question{Route: Route{KindBlob, repo, dgst}, method: http.MethodHead, who: who})
	if err != nil {
		return 0, err
	}
	defer a.close()
	return a.length, a.want(http.StatusOK)
}

// forwardedHeaders of a caller's request mean something to a registry.
var forwardedHeaders = []string{"Accept", "If-Modified-Since", "If-None-Match"}

// Forward asks for what route names with a GET or HEAD, and with the caller's
// query but for ns, and returns the answer, of status 200 or 304, as it comes,
// its body unlimited and to be closed.
func (c *Client) Forward(ctx context.Context, method string, route Route, query url.Values, header http.Header, who Caller) (*http.Response, error) {
	if method != http.MethodGet && method != http.MethodHead {
		return nil, &Error{http.StatusMethodNotAllowed, CodeUnsupported, "only reads are forwarded"}
	}
	q := question{Route: route, method: method, header: http.Header{}, who: who}
	query = maps.Clone(query)
	delete(query, "ns")
	q.query = query.Encode()
	for _, k := range forwardedHeaders {
		if v := header.Values(k); len(v) > 0 {
			q.header[k] = slices.Clone(v)
		}
	}
	a, err := c.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	if err := a.want(http.StatusOK, http.StatusNotModified); err != nil {
		a.close()
		return nil, err
	}
	return &http.Response{
		StatusCode: a.status, Status: http.StatusText(a.status),
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: a.header, ContentLength: a.length, Body: a.body,
	}, nil
}
