package registryproxy

import (
	"crypto/rand"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"

	"damselfly.dev/httprange"
)

// octets is the type of a blob.
const octets = "application/octet-stream"

// ByteRange is what of a content is asked for.
type ByteRange = httprange.Range

// Selection is what an answer gives of a content of Size bytes: all of it, or
// the ranges that were asked for, several as multipart/byteranges.
type Selection struct {
	Size   int64
	Ranges []ByteRange // none for all

	boundary string // between several; nobody can have put it into the content
}

// Select reads what a request wants of a content: its Range, unless its If-Range
// names another etag. The error is httprange.ErrOutside.
func Select(h http.Header, etag string, size int64) (Selection, error) {
	s := Selection{Size: size}
	var err error
	if s.Ranges, err = httprange.ParseAll(WantedRange(h, etag), size); len(s.Ranges) > 1 {
		s.boundary = rand.Text()
	}
	return s, err
}

// WantedRange returns a request's Range header, "" where an If-Range names
// another etag.
func WantedRange(h http.Header, etag string) string {
	if v := h.Get("If-Range"); v != "" && v != etag {
		return ""
	}
	return h.Get("Range")
}

// Spans returns what is to be sent, at least one range.
func (s Selection) Spans() []ByteRange {
	if len(s.Ranges) == 0 {
		return []ByteRange{{Length: s.Size}}
	}
	return s.Ranges
}

// WriteHeader writes the header of the answer.
func (s Selection) WriteHeader(w http.ResponseWriter) {
	h := w.Header()
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", octets)
	}
	h.Set("Accept-Ranges", "bytes")
	status, length := http.StatusPartialContent, s.Spans()[0].Length
	switch len(s.Ranges) {
	case 0:
		status = http.StatusOK
	case 1:
		h.Set("Content-Range", s.contentRange(s.Ranges[0]))
	default:
		h.Set("Content-Type", "multipart/byteranges; boundary="+s.boundary)
		length = s.length()
	}
	h.Set("Content-Length", strconv.FormatInt(length, 10))
	w.WriteHeader(status)
}

// Send writes the body of the answer to w: send writes one range there.
func (s Selection) Send(w io.Writer, send func(ByteRange) error) error {
	if len(s.Ranges) < 2 {
		return send(s.Spans()[0])
	}
	parts := multipart.NewWriter(w)
	if err := parts.SetBoundary(s.boundary); err != nil {
		return err
	}
	for _, r := range s.Ranges {
		h := textproto.MIMEHeader{"Content-Type": {octets}, "Content-Range": {s.contentRange(r)}}
		if _, err := parts.CreatePart(h); err != nil {
			return err
		}
		if err := send(r); err != nil {
			return err
		}
	}
	return parts.Close()
}

// length is that of the body of several ranges.
func (s Selection) length() int64 {
	var n counter
	_ = s.Send(&n, func(r ByteRange) error { n += counter(r.Length); return nil }) // a counter takes all
	return int64(n)
}

func (s Selection) contentRange(r ByteRange) string {
	return fmt.Sprintf("bytes %d-%d/%d", r.Offset, r.Offset+r.Length-1, s.Size)
}

// counter counts what is written to it.
type counter int64

func (n *counter) Write(p []byte) (int, error) {
	*n += counter(len(p))
	return len(p), nil
}

// NotModified tells whether a request's If-None-Match names the content that has
// the etag, so that 304 is the answer to whoever may read it.
func NotModified(h http.Header, etag string) bool {
	for _, line := range h.Values("If-None-Match") {
		for tag := range strings.SplitSeq(line, ",") {
			if tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/"); tag == etag && etag != "" || tag == "*" {
				return true
			}
		}
	}
	return false
}

// WriteRangeNotSatisfiable answers 416 for a content of size bytes.
func WriteRangeNotSatisfiable(w http.ResponseWriter, size int64) {
	w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
	WriteError(w, &Error{http.StatusRequestedRangeNotSatisfiable, CodeUnsupported, httprange.ErrOutside.Error()})
}
