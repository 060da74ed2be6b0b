package dfget

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
)

// trickle answers with a body that comes in many small packets.
func trickle(body []byte, packet int, pause time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		for b := range chunks(body, packet) {
			_, _ = w.Write(b)
			_ = http.NewResponseController(w).Flush()
			if pause > 0 {
				<-time.After(pause)
			}
		}
	}
}

func chunks(b []byte, n int) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(b) > 0 && yield(b[:min(n, len(b))]) {
			b = b[min(n, len(b)):]
		}
	}
}

// bodyOf asks for a URL; the body is closed with the test.
func bodyOf(t *testing.T, client *http.Client, url string) io.ReadCloser {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	require.NoError(t, err)
	resp, err := client.Do(req)
	require.NoError(t, err)
	t.Cleanup(func() { _ = resp.Body.Close() })
	return resp.Body
}

// counted counts the reads that return.
type counted struct {
	io.Reader
	n int
}

func (c *counted) Read(p []byte) (int, error) { c.n++; return c.Reader.Read(p) }

// Whatever the reader asks for, it gets all there is and waits for nothing that
// does not come: small reads, a body shorter than what is waited for, an end
// without a length, a connection that breaks.
func TestReceiverWaitsForNothingThatDoesNotCome(t *testing.T) {
	client := newTransfers(1)
	client.Timeout = 10 * time.Second
	for _, n := range []int{0, 1, headerBuffer - 1, headerBuffer, headerBuffer + 1, 3 * headerBuffer, maxWait - 1, maxWait + 1, 5*maxWait + 7} {
		body := bytes.Repeat([]byte{byte(n)}, n)
		s := httptest.NewServer(trickle(body, 5000, 0))
		for _, read := range []func(io.Reader) io.Reader{
			func(r io.Reader) io.Reader { return r }, iotest.OneByteReader, iotest.HalfReader,
		} {
			resp := bodyOf(t, client, s.URL)
			got, err := io.ReadAll(read(resp))
			require.NoError(t, err)
			require.Len(t, got, len(body))
		}
		s.Close()
	}
	for _, answer := range []string{
		"HTTP/1.1 200 OK\r\n\r\n" + string(make([]byte, 10_000)),                           // until the end
		"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + string(make([]byte, 10_000)), // broken
	} {
		ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
		require.NoError(t, err)
		go func() {
			conn, err := ln.Accept()
			if err == nil {
				_, _ = conn.Read(make([]byte, 4096))
				_, _ = io.WriteString(conn, answer)
				_ = conn.Close()
			}
		}()
		resp := bodyOf(t, client, "http://"+ln.Addr().String())
		buf := make([]byte, 200_000)
		n, err := io.ReadFull(resp, buf)
		require.Equal(t, 10_000, n)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		_ = resp.Close()
		_ = ln.Close()
	}
}

// A slow sender's bytes are seen often enough to tell it from a silent one.
func TestReceiverOfFewBytesIsWokenOften(t *testing.T) {
	body := make([]byte, 40_000)
	s := httptest.NewServer(trickle(body, 2000, 30*time.Millisecond))
	defer s.Close()
	resp := bodyOf(t, newTransfers(1), s.URL)
	reads := &counted{Reader: resp}
	_, err := io.ReadFull(reads, make([]byte, len(body)))
	require.NoError(t, err)
	require.Greater(t, reads.n, 3)
}
