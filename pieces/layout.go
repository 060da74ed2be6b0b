package pieces

import (
	"fmt"
	"math/bits"
)

const (
	// MinPieceSize is the least that NewLayout chooses, in bytes.
	MinPieceSize = 128 << 10
	// MaxPieceSize is the most that NewLayout chooses, in bytes, but for content
	// past MaxPieces pieces of it.
	MaxPieceSize = 4 << 20

	// LeastPieceSize is the least that any layout has: what NewRangedLayout chooses.
	LeastPieceSize = 32 << 10
	// rangedPieces is into how many pieces NewRangedLayout cuts what is large.
	rangedPieces = MaxPieces / 2

	// aimedPieces is how many pieces a blob is cut into where the bounds allow
	// it: the swarm's efficiency grows with their number.
	aimedPieces = 256

	// MaxPieces bounds the pieces of one task, and with it every set and every
	// list of digests that comes from the network.
	MaxPieces = 1 << 16
	// MaxLength bounds the content of one task, in bytes.
	MaxLength = 1 << 40

	// largestPieceSize is what content of MaxLength needs. It bounds the memory
	// that receiving a piece takes, whatever layout the network tells.
	largestPieceSize = MaxLength / MaxPieces
)

// Layout says how content of Length bytes is cut: every piece has PieceSize
// bytes but the last, which has what is left. The zero Layout is empty content.
type Layout struct {
	Length    int64
	PieceSize int64
}

// NewLayout returns the layout for content of the given length in bytes, which
// must be in [0, MaxLength]: the power of two nearest above length/256, within
// [MinPieceSize, MaxPieceSize], and larger only where there would be more than
// MaxPieces pieces.
func NewLayout(length int64) Layout {
	size := min(max(ceilPowerOfTwo(length/aimedPieces), MinPieceSize), MaxPieceSize)
	for length > size*MaxPieces {
		size *= 2
	}
	return Layout{Length: length, PieceSize: size}
}

// NewRangedLayout is NewLayout for content of which ranges are asked for: what a
// reader does not want comes along with what it does, so the pieces are as small
// as bookkeeping allows, the power of two nearest above length/32768, at
// least LeastPieceSize.
func NewRangedLayout(length int64) Layout {
	if length > MaxPieceSize*rangedPieces {
		return NewLayout(length)
	}
	return Layout{Length: length, PieceSize: max(ceilPowerOfTwo(length/rangedPieces), LeastPieceSize)}
}

func ceilPowerOfTwo(n int64) int64 {
	if n <= 1 {
		return 1
	}
	return 1 << bits.Len64(uint64(n-1))
}

// Validate returns an error for a layout that nobody following this package
// could have made; check it on every layout from the network or the disk.
func (l Layout) Validate() error {
	if l.Length < 0 || l.Length > MaxLength {
		return fmt.Errorf("length %d is outside 0 to %d", l.Length, int64(MaxLength))
	}
	if l.PieceSize < LeastPieceSize || l.PieceSize > largestPieceSize || l.PieceSize&(l.PieceSize-1) != 0 {
		return fmt.Errorf("piece size %d is not a power of two from %d to %d", l.PieceSize, LeastPieceSize, largestPieceSize)
	}
	if (l.Length+l.PieceSize-1)/l.PieceSize > MaxPieces {
		return fmt.Errorf("length %d in pieces of %d is more than %d pieces", l.Length, l.PieceSize, MaxPieces)
	}
	return nil
}

// Count returns the number of pieces. Empty content has none.
func (l Layout) Count() int {
	if l.Length == 0 {
		return 0
	}
	return int((l.Length + l.PieceSize - 1) / l.PieceSize)
}

// Offset returns where piece i begins, in bytes; Offset(Count()) is Length.
func (l Layout) Offset(i int) int64 { return min(int64(i)*l.PieceSize, l.Length) }

// Size returns the number of bytes of piece i.
func (l Layout) Size(i int) int64 { return l.Offset(i+1) - l.Offset(i) }

// At returns the piece that holds the byte at off, which must be in [0, Length).
func (l Layout) At(off int64) int { return int(off / l.PieceSize) }

// Span returns the run [first, end) of pieces that hold the n bytes from off.
// The bytes must lie inside the content; n may be 0.
func (l Layout) Span(off, n int64) (first, end int) {
	if n <= 0 {
		return 0, 0
	}
	return l.At(off), l.At(off+n-1) + 1
}
