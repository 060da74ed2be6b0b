package pieces

import "testing"

func TestNewLayout(t *testing.T) {
	const kib, mib, gib = 1 << 10, 1 << 20, 1 << 30
	for _, tt := range []struct {
		length, size int64
		count        int
	}{
		{0, 128 * kib, 0},
		{1, 128 * kib, 1},
		{128 * kib, 128 * kib, 1},
		{128*kib + 1, 128 * kib, 2},
		{32 * mib, 128 * kib, 256},
		{32*mib + 256, 256 * kib, 129},
		{64 * mib, 256 * kib, 256},
		{64*mib + 256, 512 * kib, 129},
		{256 * mib, mib, 256},
		{gib, 4 * mib, 256},
		{16 * gib, 4 * mib, 4096},
		{256 * gib, 4 * mib, MaxPieces},
		{256*gib + 1, 8 * mib, MaxPieces/2 + 1},
		{MaxLength, 16 * mib, MaxPieces},
	} {
		l := NewLayout(tt.length)
		if l.Length != tt.length || l.PieceSize != tt.size || l.Count() != tt.count {
			t.Errorf("%d bytes: pieces of %d, %d of them; want %d, %d", tt.length, l.PieceSize, l.Count(), tt.size, tt.count)
		}
		if err := l.Validate(); err != nil {
			t.Errorf("%d bytes: %v", tt.length, err)
		}
	}
}

func TestLayoutValidate(t *testing.T) {
	for name, l := range map[string]Layout{
		"zero":                    {},
		"negative length":         {-1, MinPieceSize},
		"length past the most":    {MaxLength + 1, largestPieceSize},
		"length near overflow":    {1<<63 - 1, 1 << 62},
		"small pieces":            {100, LeastPieceSize / 2},
		"large pieces":            {100, largestPieceSize * 2},
		"negative pieces":         {100, -MinPieceSize},
		"no power of two":         {100, 3 * MinPieceSize},
		"one piece too many":      {MinPieceSize*MaxPieces + 1, MinPieceSize},
		"most negative":           {100, -1 << 63},
		"most negative as length": {-1 << 63, MinPieceSize},
	} {
		if l.Validate() == nil {
			t.Errorf("%s: %+v is valid", name, l)
		}
	}
}

// FuzzLayout: in a valid layout the pieces cover the content without gap or
// overlap, none is too large for memory, and ranges find their pieces.
func FuzzLayout(f *testing.F) {
	f.Add(int64(0), int64(MinPieceSize), int64(0), int64(0))
	f.Add(int64(1<<30+7), int64(MaxPieceSize), int64(5), int64(1<<29))
	f.Add(int64(MaxLength), int64(largestPieceSize), int64(MaxLength-1), int64(1))
	f.Add(int64(1<<63-1), int64(-1<<63), int64(-1), int64(-1))
	f.Fuzz(func(t *testing.T, length, size, off, n int64) {
		l := Layout{length, size}
		if l.Validate() != nil {
			return
		}
		count := l.Count()
		if count > MaxPieces || l.Offset(0) != 0 || l.Offset(count) != length {
			t.Fatalf("%+v: %d pieces from %d to %d", l, count, l.Offset(0), l.Offset(count))
		}
		for _, i := range []int{0, 1, count / 2, count - 2, count - 1} {
			if i < 0 || i >= count {
				continue
			}
			s := l.Size(i)
			if s <= 0 || s > largestPieceSize || (i < count-1 && s != size) || l.Offset(i)+s != l.Offset(i+1) {
				t.Fatalf("%+v: piece %d from %d has %d bytes", l, i, l.Offset(i), s)
			}
			if l.At(l.Offset(i)) != i || l.At(l.Offset(i+1)-1) != i {
				t.Fatalf("%+v: ends of piece %d lie in %d and %d", l, i, l.At(l.Offset(i)), l.At(l.Offset(i+1)-1))
			}
		}
		if off < 0 || n <= 0 || off > length || n > length-off {
			return
		}
		first, end := l.Span(off, n)
		if first < 0 || end > count || l.Offset(first) > off || l.Offset(first+1) <= off || l.Offset(end-1) >= off+n || l.Offset(end) < off+n {
			t.Fatalf("%+v: %d bytes from %d in pieces %d to %d", l, n, off, first, end)
		}
	})
}

func TestSpanOfNothing(t *testing.T) {
	l := NewLayout(10 * MinPieceSize)
	if first, end := l.Span(5*MinPieceSize, 0); first != end {
		t.Errorf("no bytes lie in pieces %d to %d", first, end)
	}
}
