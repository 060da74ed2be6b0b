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

// maxRanges is how many ranges are answered at once. A header of 8 KiB holds
// more, and each costs a seek: who asks for more gets the whole.
const maxRanges = 256

// ParseRange reads a Range header for a content of size bytes, size ≥ 0, where
// one range is answered and several are not: for those r is the whole, as 200.
// For the rest see ParseRanges; partial tells whether r is to be answered with
// 206.
func ParseRange(header string, size int64) (r ByteRange, partial bool, err error) {
	if strings.Contains(header, ",") {
		return ByteRange{0, size}, false, nil
	}
	rs, err := ParseRanges(header, size)
	switch {
	case err != nil:
		return ByteRange{}, false, err
	case len(rs) == 0:
		return ByteRange{0, size}, false, nil
	}
	return rs[0], true, nil
}

// ParseRanges reads a Range header for a content of size bytes, size ≥ 0, and
// returns what is to be answered with 206, in the order asked for; nothing when
// the whole is, with 200. A range is bounded ("bytes=0-99"), open ("bytes=100-")
// or a suffix ("bytes=-100"); what reaches past the end is cut, and of several
// those that lie outside are left out. The answer is the whole where there is no
// header, for another unit than bytes, for empty content, for more ranges than
// maxRanges, and for several with more bytes than the content: they overlap.
// Where no range is inside, or one is none, the error is ErrRange.
func ParseRanges(header string, size int64) ([]ByteRange, error) {
	unit, list, _ := strings.Cut(header, "=")
	if !strings.EqualFold(strings.TrimSpace(unit), "bytes") || size == 0 || strings.Count(list, ",") >= maxRanges {
		return nil, nil
	}
	var rs []ByteRange
	left := size
	for spec := range strings.SplitSeq(list, ",") {
		if spec = strings.TrimSpace(spec); spec == "" {
			continue
		}
		r, ok := parseSpec(spec, size)
		if !ok {
			return nil, ErrRange
		}
		if r.Length > 0 {
			rs = append(rs, r)
			left = max(left-r.Length, -1)
		}
	}
	switch {
	case len(rs) == 0:
		return nil, ErrRange
	case left < 0:
		return nil, nil
	}
	return rs, nil
}

// parseSpec reads one range; Length is 0 where it lies outside.
func parseSpec(s string, size int64) (r ByteRange, ok bool) {
	first, last, found := strings.Cut(s, "-")
	if !found {
		return ByteRange{}, false
	}
	if first == "" {
		n, ok := parseOffset(last)
		n = min(n, size)
		return ByteRange{size - n, n}, ok
	}
	from, ok := parseOffset(first)
	to := int64(math.MaxInt64)
	if ok && last != "" {
		to, ok = parseOffset(last)
	}
	if !ok || to < from {
		return ByteRange{}, false
	}
	if from >= size {
		return ByteRange{}, true
	}
	return ByteRange{from, min(to, size-1) - from + 1}, true
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
	WriteError(w, &Error{http.StatusRequestedRangeNotSatisfiable, CodeUnsupported, ErrRange.Error()})
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
