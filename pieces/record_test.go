package pieces

import (
	"bytes"
	"encoding/json"
	"testing"
)

// FuzzRecord: whatever a record holds, only entries of its own task count, and
// what is read says the same when it is written again.
func FuzzRecord(f *testing.F) {
	l := Layout{Length: 9*MinPieceSize + 1, PieceSize: MinPieceSize}
	id := URLTaskID("https://example.com/")
	seed := entrySeed(id, l)
	d := Sum([]byte("x"))
	whole := appendEntry(appendEntry(appendEntry(nil, seed, 3, false, d), seed, 9, false, d), seed, 3, true, d)
	f.Add([]byte{})
	f.Add(whole)
	f.Add(whole[:len(whole)-1])
	f.Add(append(make([]byte, entrySize), whole...))
	f.Add(appendEntry(nil, seed, 10, false, d))
	f.Add(appendEntry(nil, seed, 0, false, Digest{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, err := readRecord(bytes.NewReader(b), id, l)
		if err != nil {
			t.Fatal(err)
		}
		if rec.end != int64(len(b)/entrySize*entrySize) || rec.have.Cap() != l.Count() || len(rec.digests) != l.Count() {
			t.Fatalf("%d bytes: next entry at %d, %d digests", len(b), rec.end, len(rec.digests))
		}
		var again []byte
		for i, d := range rec.digests {
			if d.IsZero() && rec.have.Has(i) {
				t.Fatalf("piece %d is present without a digest", i)
			}
			if !d.IsZero() {
				again = appendEntry(again, seed, i, !rec.have.Has(i), d)
			}
		}
		rec2, err := readRecord(bytes.NewReader(again), id, l)
		if err != nil || !bytes.Equal(rec2.have.Bytes(), rec.have.Bytes()) {
			t.Fatalf("written again it says something else: %v", err)
		}
		// The same bytes tell nothing of another task, or of another layout.
		for _, alien := range []struct {
			id TaskID
			l  Layout
		}{{URLTaskID("https://example.com/2"), l}, {id, NewLayout(l.Length + 1)}} {
			if rec, _ := readRecord(bytes.NewReader(again), alien.id, alien.l); rec.have.Len() != 0 {
				t.Fatalf("%d pieces by the record of another task", rec.have.Len())
			}
		}
	})
}

func TestRecordSkipsDamage(t *testing.T) {
	l := Layout{Length: 4 * MinPieceSize, PieceSize: MinPieceSize}
	id := URLTaskID("https://example.com/")
	seed := entrySeed(id, l)
	var b []byte
	for i := range 4 {
		b = appendEntry(b, seed, i, false, Sum([]byte{byte(i)}))
	}
	for at := range b {
		broken := bytes.Clone(b)
		broken[at] ^= 0x40
		rec, err := readRecord(bytes.NewReader(broken), id, l)
		if err != nil || rec.have.Len() != 3 || rec.have.Has(at/entrySize) {
			t.Fatalf("byte %d broken: %d pieces, %v", at, rec.have.Len(), err)
		}
		for i := range rec.have.All() {
			if rec.digests[i] != Sum([]byte{byte(i)}) {
				t.Fatalf("byte %d broken: another digest for piece %d", at, i)
			}
		}
	}
}

// FuzzMeta: what is accepted is within bounds and comes back the same.
func FuzzMeta(f *testing.F) {
	_, m := blob(1, 1000)
	m.Public = []string{"docker.io/library/a"}
	b, err := json.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Add([]byte(`{"id":"sha256:../x","layout":{"Length":-1}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMeta(b)
		if err != nil {
			return
		}
		if _, err := ParseTaskID(string(m.ID)); err != nil {
			t.Fatal(err)
		}
		if err := m.Layout.Validate(); err != nil || len(m.Public) > maxNames {
			t.Fatalf("%+v: %v", m, err)
		}
		again, err := json.Marshal(m)
		if err != nil || len(again) > maxSmallFile {
			t.Fatalf("%d bytes, %v", len(again), err)
		}
		if m2, err := parseMeta(again); err != nil || m2.ID != m.ID || m2.Layout != m.Layout {
			t.Fatalf("%+v comes back as %+v: %v", m, m2, err)
		}
	})
}
