package api

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestGate(t *testing.T) {
	g := &Gate{All: 5, Each: 2}
	enter := func(remote string) bool { return g.Enter(Neighbour(remote)) }
	require.True(t, enter("10.0.0.1:1"))
	require.True(t, enter("[::ffff:10.0.0.1]:2"))
	require.False(t, enter("10.0.0.1:3"), "two of that address")
	for _, near := range []string{"127.0.0.1:1", "[::1]:1", "@"} {
		require.True(t, enter(near), "this machine has no bound of its own")
	}
	require.False(t, enter("10.0.0.2:1"), "five in all")
	g.Leave("10.0.0.1")
	require.True(t, enter("10.0.0.2:1"))
	require.Equal(t, 5, g.Len())
	for _, who := range []string{"10.0.0.1", "10.0.0.2", "", "", ""} {
		g.Leave(who)
	}
	require.Zero(t, g.Len())
	require.Empty(t, g.by)
}

// pipes is a listener of connections in memory.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	c, ok := <-p
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (p pipes) Close() error   { return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

// Who sends nothing, half a header, half a body, or reads nothing is cut off in
// time; who is one too many at once; and the connections are counted to the end.
func TestSlowConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := 0
		g := &Gate{All: 4}
		s := &http.Server{Handler: Bounded(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { //nolint:gosec // Guard sets its times
			n, err := io.Copy(io.Discard, r.Body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			if n > maxBody {
				t.Error("too much of a body")
			}
			_, _ = w.Write(make([]byte, 1<<20))
		}))}
		g.Guard(s, func() { refused++ })
		ln := make(pipes)
		defer func() { close(ln); _ = s.Close() }()
		go func() { _ = s.Serve(ln) }()
		dial := func() net.Conn {
			here, there := net.Pipe()
			ln <- there
			return here
		}
		for what, c := range map[string]struct {
			send string
			cut  time.Duration
		}{
			"nothing":       {"", headerTime},
			"half a header": {"GET / HTTP/1.1\r\nHost: a\r\n", headerTime},
			"half a body":   {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf", bodyTime},
			"no reading":    {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", answerTime},
		} {
			conn := dial()
			begin := time.Now()
			_, err := io.WriteString(conn, c.send)
			require.NoError(t, err)
			if what == "no reading" {
				<-time.After(c.cut + time.Second)
			}
			b, _ := io.ReadAll(conn)
			require.Less(t, len(b), 1<<20, what)
			require.LessOrEqual(t, time.Since(begin), c.cut+2*time.Second, what)
			require.NoError(t, conn.Close())
		}
		synctest.Wait()
		require.Zero(t, g.Len())

		conn := dial()
		_, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
		require.NoError(t, err)
		go func() { _, _ = conn.Write([]byte(strings.Repeat("x", 1000000))) }()
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, http.StatusBadRequest, resp.StatusCode)
		require.NoError(t, conn.Close())
		<-time.After(time.Second) // the server's own pause after such an answer
		synctest.Wait()

		var held []net.Conn
		for range 4 {
			held = append(held, dial())
		}
		one := dial()
		_, err = one.Read(make([]byte, 1))
		require.Error(t, err)
		require.Equal(t, 1, refused)
		for _, c := range held {
			require.NoError(t, c.Close())
		}
		synctest.Wait()
		require.Zero(t, g.Len())
	})
}

func TestNamesThisHost(t *testing.T) {
	for host, want := range map[string]bool{
		"127.0.0.1:65001": true, "[::1]:65001": true, "10.0.0.5": true, "localhost:65001": true, "ip6-localhost": true, "a.localhost": true,
		"node7": true, "node7.corp:65001": true, "Node7.corp.": true, "": true,
		"evil.test:65001": false, "evil.test": false, "127.0.0.1.nip.io": false, "localhost.evil.test": false, "node7.corp.evil.test": false,
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		r.Host = host
		require.Equal(t, want, NamesThisHost(r, "node7.corp"), host)
	}
}
