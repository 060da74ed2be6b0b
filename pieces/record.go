package pieces

import (
	"bufio"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// The record of a task's pieces is a row of entries of entrySize bytes, in the
// order in which pieces came, little-endian:
//
//	0..3    piece, with entryLost set when it turned out not to be there
//	4..35   its digest
//	36..39  CRC-32C of the task's id, its layout and the bytes above
//
// The last entry for a piece counts. An entry whose checksum is wrong is passed
// over; a torn one at the end is overwritten by the next.
const (
	entrySize = 4 + DigestSize + 4
	entryLost = 1 << 31
)

// record is what a record says.
type record struct {
	have    Set
	digests []Digest // of the pieces in have, and of those lost
	end     int64    // where the next entry goes
}

// entrySeed ties entries to their task, so that none of another is believed.
func entrySeed(id TaskID, l Layout) uint32 {
	b := binary.LittleEndian.AppendUint64([]byte(id), uint64(l.Length))
	b = binary.LittleEndian.AppendUint64(b, uint64(l.PieceSize))
	return crc32.Checksum(b, castagnoli())
}

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

func appendEntry(b []byte, seed uint32, i int, lost bool, d Digest) []byte {
	key := uint32(i)
	if lost {
		key |= entryLost
	}
	start := len(b)
	b = binary.LittleEndian.AppendUint32(b, key)
	b = append(b, d[:]...)
	return binary.LittleEndian.AppendUint32(b, crc32.Update(seed, castagnoli(), b[start:]))
}

// readRecord reads a record to its end; its only errors are those of r.
func readRecord(r io.Reader, id TaskID, l Layout) (record, error) {
	n := l.Count()
	rec := record{have: NewSet(n), digests: make([]Digest, n)}
	seed := entrySeed(id, l)
	br := bufio.NewReader(r)
	var e [entrySize]byte
	for {
		if _, err := io.ReadFull(br, e[:]); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return rec, nil
			}
			return record{}, err
		}
		rec.end += entrySize
		body, sum := e[:entrySize-4], binary.LittleEndian.Uint32(e[entrySize-4:])
		key := binary.LittleEndian.Uint32(body)
		i, d := int(key&^entryLost), Digest(body[4:])
		if crc32.Update(seed, castagnoli(), body) != sum || i >= n || d.IsZero() {
			continue
		}
		rec.digests[i] = d
		if key&entryLost == 0 {
			rec.have.Add(i)
		} else {
			rec.have.Remove(i)
		}
	}
}
