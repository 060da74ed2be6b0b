// Package httprange reads the headers Range and Content-Range.
package httprange

import (
	"errors"
	"math"
	"strconv"
	"strings"
)

// Range is Length bytes from Offset on.
type Range struct{ Offset, Length int64 }

// ErrOutside is a Range header that asks for nothing a content has.
var ErrOutside = errors.New("the range lies outside the content")

// maxRanges is how many ranges are answered at once. A header of 8 KiB holds
// more, and each costs a seek: who asks for more gets the whole.
const maxRanges = 256

// Parse reads a Range header for a content of size bytes, size ≥ 0, where
// one range is answered and several are not: for those r is the whole, as 200.
// For the rest see ParseAll; partial tells whether r is to be answered with
// 206.
func Parse(header string, size int64) (r Range, partial bool, err error) {
	if strings.Contains(header, ",") {
		return Range{0, size}, false, nil
	}
	rs, err := ParseAll(header, size)
	switch {
	case err != nil:
		return Range{}, false, err
	case len(rs) == 0:
		return Range{0, size}, false, nil
	}
	return rs[0], true, nil
}

// ParseAll reads a Range header for a content of size bytes, size ≥ 0, and
// returns what is to be answered with 206, in the order asked for; nothing when
// the whole is, with 200. A range is bounded ("bytes=0-99"), open ("bytes=100-")
// or a suffix ("bytes=-100"); what reaches past the end is cut, and of several
// those that lie outside are left out. The answer is the whole where there is no
// header, for another unit than bytes, for empty content, for more ranges than
// maxRanges, and for several with more bytes than the content: they overlap.
// Where no range is inside, or one is none, the error is ErrOutside.
func ParseAll(header string, size int64) ([]Range, error) {
	unit, list, _ := strings.Cut(header, "=")
	if !strings.EqualFold(strings.TrimSpace(unit), "bytes") || size == 0 || strings.Count(list, ",") >= maxRanges {
		return nil, nil
	}
	var rs []Range
	left := size
	for spec := range strings.SplitSeq(list, ",") {
		if spec = strings.TrimSpace(spec); spec == "" {
			continue
		}
		r, ok := parseSpec(spec, size)
		if !ok {
			return nil, ErrOutside
		}
		if r.Length > 0 {
			rs = append(rs, r)
			left = max(left-r.Length, -1)
		}
	}
	switch {
	case len(rs) == 0:
		return nil, ErrOutside
	case left < 0:
		return nil, nil
	}
	return rs, nil
}

// parseSpec reads one range; Length is 0 where it lies outside.
func parseSpec(s string, size int64) (r Range, ok bool) {
	first, last, found := strings.Cut(s, "-")
	if !found {
		return Range{}, false
	}
	if first == "" {
		n, ok := parseOffset(last)
		n = min(n, size)
		return Range{size - n, n}, ok
	}
	from, ok := parseOffset(first)
	to := int64(math.MaxInt64)
	if ok && last != "" {
		to, ok = parseOffset(last)
	}
	if !ok || to < from {
		return Range{}, false
	}
	if from >= size {
		return Range{}, true
	}
	return Range{from, min(to, size-1) - from + 1}, true
}

// parseOffset reads decimal digits; what is too large for an int64 is the
// largest one.
func parseOffset(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil || errors.Is(err, strconv.ErrRange)
}

// ParseContent reads "bytes 5-9/20" or "bytes 5-9/*", whose size is -1.
func ParseContent(s string) (r Range, size int64, ok bool) {
	s, found := strings.CutPrefix(s, "bytes ")
	span, total, slash := strings.Cut(s, "/")
	first, last, dash := strings.Cut(span, "-")
	from, ok1 := parseOffset(first)
	to, ok2 := parseOffset(last)
	if !found || !slash || !dash || !ok1 || !ok2 || to < from || to == math.MaxInt64 {
		return Range{}, 0, false
	}
	r = Range{from, to - from + 1}
	if total == "*" {
		return r, -1, true
	}
	size, ok = parseOffset(total)
	return r, size, ok && to < size
}
