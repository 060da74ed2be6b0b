package dfget

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
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
	client := &http.Client{Transport: newTransport(1), Timeout: time.Minute}
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
	resp := bodyOf(t, &http.Client{Transport: newTransport(1)}, s.URL)
	reads := &counted{Reader: resp}
	_, err := io.ReadFull(reads, make([]byte, len(body)))
	require.NoError(t, err)
	require.Greater(t, reads.n, 3)
}

// server answers each request on a connection with what its test says, and
// counts both.
type server struct {
	net.Listener
	conns, requests atomic.Int32
}

func newServer(t *testing.T, answer func(conn net.Conn, request int)) *server {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &server{Listener: ln}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			s.conns.Add(1)
			go func() {
				defer func() { _ = conn.Close() }()
				for r := bufio.NewReader(conn); ; {
					if _, err := http.ReadRequest(r); err != nil {
						return
					}
					answer(conn, int(s.requests.Add(1)))
				}
			}()
		}
	}()
	return s
}

func (s *server) get(t *testing.T, tr *transport) (string, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.Addr().String()+"/", nil)
	require.NoError(t, err)
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer func() { require.NoError(t, resp.Body.Close()) }()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

const okay = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

func TestTransportUsesConnectionsAgain(t *testing.T) {
	s := newServer(t, func(conn net.Conn, _ int) { _, _ = io.WriteString(conn, okay) })
	tr := newTransport(1)
	for range 5 {
		got, err := s.get(t, tr)
		require.NoError(t, err)
		require.Equal(t, "ok", got)
	}
	require.EqualValues(t, 1, s.conns.Load())
	tr.CloseIdleConnections()
	require.Empty(t, tr.idle)
	_, err := s.get(t, tr)
	require.NoError(t, err)
	require.EqualValues(t, 2, s.conns.Load())
	require.Empty(t, tr.idle, "kept after it was closed")
}

func TestTransportTriesAgainWhereTheOtherEndHasHungUp(t *testing.T) {
	s := newServer(t, func(conn net.Conn, _ int) {
		_, _ = io.WriteString(conn, okay)
		_ = conn.Close()
	})
	tr := newTransport(1)
	for range 3 {
		got, err := s.get(t, tr)
		require.NoError(t, err)
		require.Equal(t, "ok", got)
	}
}

func TestTransportGivesUpWhereNothingComes(t *testing.T) {
	s := newServer(t, func(conn net.Conn, _ int) { _ = conn.Close() })
	_, err := s.get(t, newTransport(1))
	require.Error(t, err)
	require.EqualValues(t, 1, s.requests.Load(), "asked again on a connection that was new")
}

func TestTransportUsesNoConnectionAgainThatIsNotAtItsEnd(t *testing.T) {
	for name, answer := range map[string]string{
		"more than the answer": okay + "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad",
		"said to be the last":  "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, func(conn net.Conn, _ int) { _, _ = io.WriteString(conn, answer) })
			tr := newTransport(1)
			for i := range 3 {
				got, err := s.get(t, tr)
				require.NoError(t, err)
				require.Equal(t, "ok", got)
				require.EqualValues(t, i+1, s.conns.Load())
			}
		})
	}
	s := newServer(t, func(conn net.Conn, _ int) { _, _ = io.WriteString(conn, okay) })
	tr := newTransport(1)
	for i := range 3 { // bodies that nobody reads
		resp, err := tr.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.Addr().String(), nil))
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.EqualValues(t, i+1, s.conns.Load())
	}
}

func TestTransportBoundsHeads(t *testing.T) {
	s := newServer(t, func(conn net.Conn, _ int) {
		_, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
		for err == nil {
			_, err = io.WriteString(conn, "X: "+strings.Repeat("x", 1000)+"\r\n")
		}
	})
	_, err := s.get(t, newTransport(1))
	require.ErrorIs(t, err, errHead)
}

func TestTransportBoundsWhatIsIdle(t *testing.T) {
	s := newServer(t, func(conn net.Conn, _ int) { _, _ = io.WriteString(conn, okay) })
	tr := newTransport(2)
	var bodies []io.ReadCloser
	for range 5 {
		bodies = append(bodies, bodyOf(t, &http.Client{Transport: tr}, "http://"+s.Addr().String()))
	}
	for _, b := range bodies {
		_, err := io.ReadAll(b)
		require.NoError(t, err)
		require.NoError(t, b.Close())
		require.NoError(t, b.Close())
	}
	require.Len(t, tr.idle, 2)
	for _, l := range slices.Clone(tr.idle) {
		tr.expire(l)
	}
	require.Empty(t, tr.idle)
}

func TestTransportEndsWithItsContext(t *testing.T) {
	s := newServer(t, func(conn net.Conn, _ int) {
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	resp, err := newTransport(1).RoundTrip(httptest.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.Addr().String(), nil))
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	_, err = io.ReadFull(resp.Body, make([]byte, 1))
	require.NoError(t, err)
	cancel()
	_, err = io.ReadAll(resp.Body)
	require.Error(t, err)
}
