package pieces

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// sink stands for a connection with sendfile: it takes what io.Copy hands it.
type sink struct {
	bytes.Buffer
	files, others int
}

func (s *sink) ReadFrom(r io.Reader) (int64, error) {
	if lr, ok := r.(*io.LimitedReader); ok {
		if _, ok := lr.R.(*os.File); ok {
			s.files++
			return s.Buffer.ReadFrom(r)
		}
	}
	s.others++
	return s.Buffer.ReadFrom(r)
}

func TestCopyRange(t *testing.T) {
	b, m := blob(40, 3*MinPieceSize+11)
	c := create(t, open(t, t.TempDir(), StoreConfig{}), m)
	l := m.Layout
	keep := func(i int) {
		if _, err := c.Make(i, bytes.NewReader(piece(l, b, i))); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		keep(i)
	}
	const p = MinPieceSize
	for _, tt := range []struct {
		off, n int64
		ok     bool
		want   error // nil for any
	}{
		{0, 0, true, nil},
		{0, 1, true, nil},
		{p - 1, 2, true, nil},
		{5, 3*p - 5, true, nil},
		{3 * p, 0, true, nil},
		{3*p - 1, 2, false, ErrMissing},
		{0, 3*p + 11, false, ErrMissing},
		{0, 3*p + 12, false, nil},
		{-1, 2, false, nil},
		{1, -1, false, nil},
		{1 << 62, 1 << 62, false, nil},
	} {
		var w sink
		n, err := c.CopyRange(&w, tt.off, tt.n)
		if !tt.ok {
			if err == nil || n != 0 || w.Len() != 0 || (tt.want != nil && !errors.Is(err, tt.want)) {
				t.Errorf("%d bytes from %d: %d bytes, %v, want %v", tt.n, tt.off, n, err, tt.want)
			}
			continue
		}
		if err != nil || n != tt.n || !bytes.Equal(w.Bytes(), b[tt.off:tt.off+tt.n]) {
			t.Errorf("%d bytes from %d: %d bytes, %v", tt.n, tt.off, n, err)
		}
		if w.files != 0 || w.others != 0 {
			t.Errorf("%d bytes from %d reach the connection as a file, which may yet be punched", tt.n, tt.off)
		}
	}
	keep(3)
	for _, n := range []int64{smallCopy, smallCopy + 1, m.Layout.Length} {
		var w sink
		if _, err := c.CopyRange(&w, 0, n); err != nil || !bytes.Equal(w.Bytes(), b[:n]) {
			t.Errorf("%d bytes of all: %v", n, err)
		}
		if file := n > smallCopy; (w.files == 1) != file || w.others != 0 {
			t.Errorf("%d bytes of all reach the connection as a file: %v", n, !file)
		}
	}
}

// TestReaders has many readers of random ranges, by Read and by WriteTo, while
// pieces come in random order.
func TestReaders(t *testing.T) {
	b, m := blob(41, 40*MinPieceSize-3)
	c := create(t, open(t, t.TempDir(), StoreConfig{}), m)
	if err := c.SetDigests(0, digestsOf(m.Layout, b)); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	var wg sync.WaitGroup
	for i := range 32 {
		off := rnd.Int64N(m.Layout.Length)
		n := rnd.Int64N(m.Layout.Length - off + 1)
		wg.Go(func() {
			r := c.NewReader(t.Context(), off, n)
			var w sink
			var err error
			if i%2 == 0 {
				_, err = r.WriteTo(&w)
			} else {
				_, err = io.CopyBuffer(&w.Buffer, struct{ io.Reader }{r}, make([]byte, 50_000))
			}
			if err != nil || !bytes.Equal(w.Bytes(), b[off:off+n]) {
				t.Errorf("reader of %d from %d: %d bytes, %v", n, off, w.Len(), err)
			}
			if w.others > 0 {
				t.Error("a reader's bytes reach the connection as no file")
			}
			if k, err := r.Read(make([]byte, 1)); k != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("after its end a reader gives %d bytes, %v", k, err)
			}
		})
	}
	for _, i := range rnd.Perm(m.Layout.Count()) {
		wg.Go(func() {
			if err := c.Receive(i, bytes.NewReader(piece(m.Layout, b, i))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(c.waiters) != 0 {
		t.Errorf("%d waiters left", len(c.waiters))
	}
}

func TestReaderEnds(t *testing.T) {
	b, m := blob(42, 2*MinPieceSize)
	s := open(t, t.TempDir(), StoreConfig{})
	c := create(t, s, m)
	if _, err := c.Make(0, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	why := errors.New("engine hung up")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	var w sink
	n, err := c.NewReader(ctx, 10, m.Layout.Length-10).WriteTo(&w)
	wantErr(t, err, why)
	if n != MinPieceSize-10 || !bytes.Equal(w.Bytes(), b[10:MinPieceSize]) {
		t.Errorf("%d bytes before the end", n)
	}
	got, err := io.ReadAll(c.NewReader(ctx, 10, m.Layout.Length-10))
	wantErr(t, err, why)
	if !bytes.Equal(got, b[10:MinPieceSize]) {
		t.Errorf("%d bytes read before the end", len(got))
	}
	for _, tt := range [][2]int64{{-1, 1}, {0, m.Layout.Length + 1}, {m.Layout.Length + 1, 0}} {
		r := c.NewReader(t.Context(), tt[0], tt[1])
		if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, io.EOF) {
			t.Errorf("range %v: %d bytes, %v", tt, n, err)
		}
		if n, err := r.WriteTo(&w); n != 0 || err == nil {
			t.Errorf("range %v: wrote %d bytes, %v", tt, n, err)
		}
	}
	r := c.NewReader(t.Context(), m.Layout.Length, 0)
	if n, err := r.Read(nil); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("empty range: %d bytes, %v", n, err)
	}
	c.Release()
	if _, err := io.ReadAll(c.NewReader(t.Context(), 0, 1)); err == nil {
		t.Error("a released content is read")
	}
}

// TestContentCutShort: bytes that are gone from under a content are found out
// before any of their piece is given, by every way to them.
func TestContentCutShort(t *testing.T) {
	for _, size := range []int{1000, smallCopy + 1000} {
		for name, copyTo := range map[string]func(c *Content, w io.Writer) error{
			"CopyRange": func(c *Content, w io.Writer) error { _, err := c.CopyRange(w, 0, int64(size)); return err },
			"WriteTo": func(c *Content, w io.Writer) error {
				_, err := c.NewReader(t.Context(), 0, int64(size)).WriteTo(w)
				return err
			},
			"Read": func(c *Content, w io.Writer) error {
				_, err := io.Copy(w, struct{ io.Reader }{c.NewReader(t.Context(), 0, int64(size))})
				return err
			},
		} {
			t.Run(fmt.Sprint(name, size), func(t *testing.T) {
				b, m := blob(43, size)
				dir := t.TempDir()
				s := open(t, dir, StoreConfig{})
				put(t, s, m, b)
				if err := os.Truncate(filepath.Join(dir, taskDir(m.ID), contentName), 700); err != nil {
					t.Fatal(err)
				}
				c := get(t, s, m.ID)
				var got bytes.Buffer
				wantErr(t, copyTo(c, &got), ErrMissing)
				if got.Len() > 0 || c.Has(0) || c.Complete() {
					t.Errorf("%d bytes are given, has %v", got.Len(), c.Has(0))
				}
				fill(t, c, b)
				if !bytes.Equal(read(t, c), b) {
					t.Error("wrong bytes once it is mended")
				}
			})
		}
	}
}
