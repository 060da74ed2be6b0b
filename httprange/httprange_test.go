package httprange

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	const max = math.MaxInt64
	tests := []struct {
		header  string
		size    int64
		want    Range
		partial bool
		err     error
	}{
		{"", 100, Range{0, 100}, false, nil},
		{"bytes=0-", 100, Range{0, 100}, true, nil},
		{"bytes=0-0", 100, Range{0, 1}, true, nil},
		{"bytes=0-99", 100, Range{0, 100}, true, nil},
		{"bytes=0-100", 100, Range{0, 100}, true, nil}, // one past the end, as regctl asks
		{"bytes=10-19", 100, Range{10, 10}, true, nil},
		{"bytes=99-", 100, Range{99, 1}, true, nil},
		{"bytes=90-5000", 100, Range{90, 10}, true, nil},
		{"bytes=-10", 100, Range{90, 10}, true, nil},
		{"bytes=-500", 100, Range{0, 100}, true, nil},
		{"Bytes=5-6", 100, Range{5, 2}, true, nil},
		{"bytes=5-99999999999999999999999999", 100, Range{5, 95}, true, nil},
		{"bytes=0-1,5-9", 100, Range{0, 100}, false, nil},
		{"pages=1-2", 100, Range{0, 100}, false, nil},
		{"bytes=0-", 0, Range{0, 0}, false, nil},
		{"bytes=7-", 0, Range{0, 0}, false, nil},
		{"bytes=5-", max, Range{5, max - 5}, true, nil},
		{"bytes=100-", 100, Range{}, false, ErrOutside},
		{"bytes=500-0", 100, Range{}, false, ErrOutside},
		{"bytes=5000-10000", 100, Range{}, false, ErrOutside},
		{"bytes=99999999999999999999999999-", 100, Range{}, false, ErrOutside},
		{"bytes=-0", 100, Range{}, false, ErrOutside},
		{"bytes=-", 100, Range{}, false, ErrOutside},
		{"bytes=", 100, Range{}, false, ErrOutside},
		{"bytes=5", 100, Range{}, false, ErrOutside},
		{"bytes=a-b", 100, Range{}, false, ErrOutside},
		{"bytes=+1-2", 100, Range{}, false, ErrOutside},
		{"bytes=--5", 100, Range{}, false, ErrOutside},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s of %d", tt.header, tt.size), func(t *testing.T) {
			got, partial, err := Parse(tt.header, tt.size)
			require.Equal(t, tt.err, err)
			require.Equal(t, tt.partial, partial)
			require.Equal(t, tt.want, got)
		})
	}
}

func TestParseAll(t *testing.T) {
	many := "bytes=0-0" + strings.Repeat(",0-0", maxRanges-1)
	tests := []struct {
		header string
		size   int64
		want   []Range
		err    error
	}{
		{"", 100, nil, nil},
		{"bytes=0-0,99-99", 100, []Range{{0, 1}, {99, 1}}, nil},
		{"bytes=90-, 5-9,-2", 100, []Range{{90, 10}, {5, 5}, {98, 2}}, nil},
		{"bytes=,5-9,, 1-2 ,", 100, []Range{{5, 5}, {1, 2}}, nil},
		{"bytes=200-300,5-9,-0", 100, []Range{{5, 5}}, nil},
		{"bytes=200-300,100-", 100, nil, ErrOutside},
		{"bytes=,", 100, nil, ErrOutside},
		{"bytes=5-9,9-5", 100, nil, ErrOutside},
		{"bytes=5-9,x", 100, nil, ErrOutside},
		{"bytes=0-49,50-", 100, []Range{{0, 50}, {50, 50}}, nil},
		{"bytes=0-50,50-", 100, nil, nil},
		{"bytes=0-,0-,0-", math.MaxInt64, nil, nil},
		{"bytes=0-1,3-4", 0, nil, nil},
		{"pages=0-1,3-4", 9, nil, nil},
		{many, maxRanges, slices.Repeat([]Range{{0, 1}}, maxRanges), nil},
		{many + ",0-0", 2 * maxRanges, nil, nil},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%.40s of %d", tt.header, tt.size), func(t *testing.T) {
			got, err := ParseAll(tt.header, tt.size)
			require.Equal(t, tt.err, err)
			require.Equal(t, tt.want, got)
		})
	}
}

var (
	bounded = regexp.MustCompile(`^bytes=([0-9]+)-([0-9]*)$`)
	suffix  = regexp.MustCompile(`^bytes=-([0-9]+)$`)
)

// rangeTwin is Parse for the plain forms, in numbers of any size.
func rangeTwin(header string, size int64) (r Range, ok bool) {
	number := func(s string) *big.Int { n, _ := new(big.Int).SetString(s, 10); return n }
	from, to, end := new(big.Int), big.NewInt(size-1), big.NewInt(size-1)
	if m := suffix.FindStringSubmatch(header); m != nil {
		if from.Sub(big.NewInt(size), number(m[1])); from.Sign() < 0 {
			from.SetInt64(0)
		}
	} else if m := bounded.FindStringSubmatch(header); m != nil {
		from = number(m[1])
		if m[2] != "" {
			if to = number(m[2]); to.Cmp(from) < 0 {
				return Range{}, false
			}
		}
		if to.Cmp(end) > 0 {
			to = end
		}
	} else {
		return Range{}, false
	}
	if from.Cmp(end) > 0 {
		return Range{}, false
	}
	return Range{from.Int64(), to.Int64() - from.Int64() + 1}, true
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", "bytes=0-", "bytes=5-9", "bytes=-3", "bytes=9-5", "bytes=0-1,3-4", "bytes=99999999999999999999-", "octets=1-2"} {
		f.Add(s, int64(10))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		if size < 0 {
			return
		}
		r, partial, err := Parse(header, size)
		switch {
		case err != nil:
			if !errors.Is(err, ErrOutside) || partial || size == 0 {
				t.Fatalf("error %v, partial %v of %d", err, partial, size)
			}
		case !partial:
			if r != (Range{0, size}) {
				t.Fatalf("whole is %v", r)
			}
		case r.Offset < 0 || r.Length < 1 || r.Offset > size-r.Length:
			t.Fatalf("%v of %d", r, size)
		}
		if (bounded.MatchString(header) || suffix.MatchString(header)) && size > 0 {
			if want, ok := rangeTwin(header, size); ok != partial || ok && want != r {
				t.Fatalf("%q of %d is %v %v, want %v %v", header, size, r, partial, want, ok)
			}
		}
	})
}

func FuzzParseAll(f *testing.F) {
	for _, s := range []string{"bytes=0-1,3-4", "bytes=-3,5-,2-9", "bytes=0-1,9-5", "bytes=,,1-", "bytes=99999999999999999999-,0-"} {
		f.Add(s, int64(10))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		if size < 0 {
			return
		}
		rs, err := ParseAll(header, size)
		if len(rs) > maxRanges || err != nil && len(rs) > 0 {
			t.Fatalf("%d ranges, error %v", len(rs), err)
		}
		left := size
		for _, r := range rs {
			if r.Offset < 0 || r.Length < 1 || r.Offset > size-r.Length || r.Length > left {
				t.Fatalf("%v of %d", rs, size)
			}
			left -= r.Length
		}
		unit, list, _ := strings.Cut(header, "=")
		if len(rs) == 0 || unit != "bytes" {
			return
		}
		var want []Range // each as if it were alone
		for spec := range strings.SplitSeq(list, ",") {
			if r, partial, err := Parse("bytes="+spec, size); err == nil && partial {
				want = append(want, r)
			}
		}
		if !slices.Equal(rs, want) {
			t.Fatalf("%q of %d is %v, want %v", header, size, rs, want)
		}
	})
}

func FuzzParseContent(f *testing.F) {
	f.Add("bytes 5-9/20")
	f.Add("bytes 0-0/*")
	f.Add("bytes 5-99999999999999999999/5")
	f.Add("bytes */5")
	f.Fuzz(func(t *testing.T, s string) {
		r, size, ok := ParseContent(s)
		if !ok {
			return
		}
		if r.Offset < 0 || r.Length < 1 || size < -1 || size >= 0 && r.Offset+r.Length > size {
			t.Fatalf("%q is %v of %d", s, r, size)
		}
	})
}
