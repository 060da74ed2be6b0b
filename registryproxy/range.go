package registryproxy

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"strings"
)

// ByteRange is Length bytes from Offset on.
type ByteRange struct{ Offset, Length int64 }

// ErrRange is a Range header that asks for nothing a content has.
var ErrRange = errors.New("the range lies outside the content")

// ParseRange reads a Range header for a content of size bytes, size ≥ 0.
// partial tells whether r is to be answered with 206. One range is bounded
// ("bytes=0-99"), open ("bytes=100-") or a suffix ("bytes=-100"); what reaches
// past the end is cut. Without a header, for another unit than bytes, for
// several ranges at once and for empty content the answer is the whole as 200,
// as the protocol allows. Else, also for what is no range at all, the error is
// ErrRange.
func ParseRange(header string, size int64) (r ByteRange, partial bool, err error) {
	whole := ByteRange{0, size}
	unit, spec, _ := strings.Cut(header, "=")
	if !strings.EqualFold(strings.TrimSpace(unit), "bytes") || strings.Contains(spec, ",") || size == 0 {
		return whole, false, nil
	}
	first, last, found := strings.Cut(strings.TrimSpace(spec), "-")
	if !found {
		return ByteRange{}, false, ErrRange
	}
	if first == "" {
		n, ok := parseOffset(last)
		if !ok || n == 0 {
			return ByteRange{}, false, ErrRange
		}
		n = min(n, size)
		return ByteRange{size - n, n}, true, nil
	}
	from, ok := parseOffset(first)
	to := int64(math.MaxInt64)
	if ok && last != "" {
		to, ok = parseOffset(last)
	}
	if !ok || to < from || from >= size {
		return ByteRange{}, false, ErrRange
	}
	return ByteRange{from, min(to, size-1) - from + 1}, true, nil
}

// parseOffset reads decimal digits; what is too large for an int64 is the
// largest one.
func parseOffset(s string) (int64, bool) {
	if s == "" {
		return 0, false
	}
	var n int64
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, false
		}
		if d := int64(c - '0'); n > (math.MaxInt64-d)/10 {
			n = math.MaxInt64
		} else {
			n = 10*n + d
		}
	}
	return n, true
}

// WriteRangeNotSatisfiable answers 416 for a content of size bytes.
func WriteRangeNotSatisfiable(w http.ResponseWriter, size int64) {
	w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
	WriteError(w, &Error{http.StatusRequestedRangeNotSatisfiable, CodeRangeInvalid, ErrRange.Error()})
}

// parseContentRange reads "bytes 5-9/20" or "bytes 5-9/*", whose size is -1.
func parseContentRange(s string) (r ByteRange, size int64, ok bool) {
	s, found := strings.CutPrefix(s, "bytes ")
	span, total, slash := strings.Cut(s, "/")
	first, last, dash := strings.Cut(span, "-")
	from, ok1 := parseOffset(first)
	to, ok2 := parseOffset(last)
	if !found || !slash || !dash || !ok1 || !ok2 || to < from || to == math.MaxInt64 {
		return ByteRange{}, 0, false
	}
	r = ByteRange{from, to - from + 1}
	if total == "*" {
		return r, -1, true
	}
	size, ok = parseOffset(total)
	return r, size, ok && to < size
}
