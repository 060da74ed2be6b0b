package pieces

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
)

func BenchmarkReceive(b *testing.B) {
	for _, size := range []int64{MinPieceSize, MaxPieceSize} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			const n = 16
			data, m := blob(90, n*int(size))
			m.Layout.PieceSize = size
			ds := digestsOf(m.Layout, data)
			s := open(b, b.TempDir(), StoreConfig{})
			var c *Content
			b.SetBytes(size)
			b.ReportAllocs()
			i := n
			for b.Loop() {
				if i == n {
					b.StopTimer()
					if c != nil {
						if err := s.Remove(m.ID); err != nil {
							b.Fatal(err)
						}
						c.Release()
					}
					c = create(b, s, m)
					if err := c.SetDigests(0, ds); err != nil {
						b.Fatal(err)
					}
					i = 0
					b.StartTimer()
				}
				if err := c.Receive(i, bytes.NewReader(piece(m.Layout, data, i))); err != nil {
					b.Fatal(err)
				}
				i++
			}
		})
	}
}

// BenchmarkCopyRange sends over a TCP connection of loopback what is fresh, and
// what is verified each time before it is sent.
func BenchmarkCopyRange(b *testing.B) {
	for _, n := range []int64{64 << 10, 1 << 20, 16 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) { benchmarkCopy(b, n, false) })
		b.Run(fmt.Sprintf("%d/verified", n), func(b *testing.B) { benchmarkCopy(b, n, true) })
	}
}

func benchmarkCopy(b *testing.B, n int64, verified bool) {
	b.Helper()
	data, m := blob(91, 16<<20)
	s := open(b, b.TempDir(), StoreConfig{})
	put(b, s, m, data)
	c := get(b, s, m.ID)
	l, err := new(net.ListenConfig).Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan error)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			_, err = io.Copy(io.Discard, conn)
		}
		done <- err
	}()
	conn, err := new(net.Dialer).DialContext(b.Context(), "tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(n)
	b.ReportAllocs()
	for b.Loop() {
		if verified {
			c.doubt()
		}
		if _, err := c.CopyRange(conn, 0, n); err != nil {
			b.Fatal(err)
		}
	}
	if err := conn.Close(); err != nil {
		b.Fatal(err)
	}
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}

// BenchmarkGet is what a request for a piece costs beside its bytes.
func BenchmarkGet(b *testing.B) {
	data, m := blob(92, 1<<20)
	s := open(b, b.TempDir(), StoreConfig{})
	put(b, s, m, data)
	b.ReportAllocs()
	for b.Loop() {
		c, err := s.Get(m.ID)
		if err != nil {
			b.Fatal(err)
		}
		c.Release()
	}
}
