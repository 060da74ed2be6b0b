package pieces

import (
	"encoding/hex"
	"fmt"
	"hash"

	"github.com/zeebo/blake3"
)

// DigestSize is the length of a piece digest in bytes.
const DigestSize = 32

// Digest is the BLAKE3-256 digest of one piece. The zero Digest stands for
// "not known" and matches no bytes.
type Digest [DigestSize]byte

// Sum returns the digest of b.
func Sum(b []byte) Digest { return blake3.Sum256(b) }

// NewHash returns a hash whose Sum is DigestSize bytes, for DigestOf.
func NewHash() hash.Hash { return blake3.New() }

// DigestOf returns the digest of what was written to h, a hash from NewHash.
func DigestOf(h hash.Hash) Digest {
	var d Digest
	h.Sum(d[:0])
	return d
}

// IsZero tells whether d is the zero Digest.
func (d Digest) IsZero() bool { return d == Digest{} }

// String returns d in lower-case hex.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// ParseDigests splits b into digests; its length must be a multiple of
// DigestSize and hold at most MaxPieces digests.
func ParseDigests(b []byte) ([]Digest, error) {
	if len(b)%DigestSize != 0 || len(b) > MaxPieces*DigestSize {
		return nil, fmt.Errorf("%d bytes are not a list of piece digests", len(b))
	}
	ds := make([]Digest, len(b)/DigestSize)
	for i := range ds {
		copy(ds[i][:], b[i*DigestSize:])
	}
	return ds, nil
}

// AppendDigests appends the bytes of ds to b, the form ParseDigests reads.
func AppendDigests(b []byte, ds ...Digest) []byte {
	for i := range ds {
		b = append(b, ds[i][:]...)
	}
	return b
}
