package pieces

import (
	"bytes"
	"io"
	"net"
	"testing"
)

// What a connection has been given, and not yet passed on, stays what it was when the
// window drops the piece: here the last one, whose bytes are part of a page.
func TestDroppedPieceIsNotTakenFromConnections(t *testing.T) {
	b, m := blob(50, 64*MinPieceSize+3000)
	m.Window = true
	l := m.Layout
	c := create(t, open(t, t.TempDir(), StoreConfig{Quota: 48 * MinPieceSize}), m)
	keep := func(i int) {
		t.Helper()
		if _, err := c.Make(i, bytes.NewReader(piece(l, b, i))); err != nil {
			t.Fatal(err)
		}
	}
	last := l.Count() - 1
	keep(last - 1)
	keep(last)
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	to, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	from, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = from.Close() }()
	off := l.Offset(last - 1)
	if n, err := c.CopyRange(to, off, l.Length-off); err != nil {
		t.Fatalf("%d bytes sent: %v", n, err)
	}
	_ = to.Close() // it sends what it has been given
	for i := 0; c.Has(last); i++ {
		keep(i % (last - 1))
	}
	got, err := io.ReadAll(from)
	if err != nil || !bytes.Equal(got, b[off:]) {
		t.Errorf("%d bytes arrive, the last of them %x: %v", len(got), got[max(0, len(got)-4):], err)
	}
}

// A file that connections may be reading never becomes a window.
func TestLentContentIsNotNarrowed(t *testing.T) {
	b, m := blob(51, 64*MinPieceSize)
	c := create(t, open(t, t.TempDir(), StoreConfig{}), m)
	fill(t, c, b)
	var w sink
	if _, err := c.CopyRange(&w, 0, m.Layout.Length); err != nil || w.files == 0 {
		t.Fatalf("sent from files %d times: %v", w.files, err)
	}
	wantErr(t, c.Narrow(), ErrQuota)
	if c.IsWindow() || c.unlessNeeded(0) {
		t.Error("what has been lent may be dropped")
	}
}
