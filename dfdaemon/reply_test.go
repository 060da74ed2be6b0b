package dfdaemon

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/stretchr/testify/require"
)

// sendfiles counts what connections are given in the form they send with
// sendfile.
type sendfiles struct {
	net.Listener
	bytes *atomic.Int64
}

func (l sendfiles) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return conn{c, l.bytes}, err
}

type conn struct {
	net.Conn
	bytes *atomic.Int64
}

func (c conn) ReadFrom(r io.Reader) (int64, error) {
	n, err := c.Conn.(io.ReaderFrom).ReadFrom(r)
	if limited, ok := r.(*io.LimitedReader); ok {
		if _, ok := limited.R.(*os.File); ok {
			c.bytes.Add(n)
		}
	}
	return n, err
}

func TestFilesAreSentWithSendfile(t *testing.T) {
	gin.SetMode(gin.TestMode)
	name := filepath.Join(t.TempDir(), "content")
	const size = 5<<20 + 17
	require.NoError(t, os.WriteFile(name, make([]byte, size), 0o600))
	e := gin.New()
	e.GET("/", func(c *gin.Context) {
		f, err := os.Open(name)
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = f.Close() }()
		w := newReply(c)
		w.Header().Set("Content-Length", "5242897")
		w.Header().Set("Content-Type", octets)
		w.WriteHeader(http.StatusOK)
		n, err := io.Copy(w, &io.LimitedReader{R: f, N: size})
		if err != nil || n != size {
			t.Errorf("copied %d bytes: %v", n, err)
		}
	})
	var sent atomic.Int64
	srv := httptest.NewUnstartedServer(e)
	srv.Listener = sendfiles{srv.Listener, &sent}
	srv.Start()
	defer srv.Close()
	_, b := get(t, srv.URL)
	require.Len(t, b, size)
	require.EqualValues(t, size-512, sent.Load()) // net/http sends the first 512 itself
}

// A reader that takes nothing is cut off, however long the answer has run.
func TestStalledReadersAreCutOff(t *testing.T) {
	gin.SetMode(gin.TestMode)
	synctest.Test(t, func(t *testing.T) {
		server, client := net.Pipe()
		accept := make(chan net.Conn, 1)
		accept <- server
		failed := make(chan error, 1)
		e := gin.New()
		e.GET("/", func(c *gin.Context) {
			w := newReply(c)
			var err error
			for err == nil {
				_, err = w.Write(make([]byte, 64<<10))
			}
			failed <- err
			panic(http.ErrAbortHandler)
		})
		srv := &http.Server{Handler: e}
		go func() { _ = srv.Serve(pipes(accept)) }()
		_, err := io.WriteString(client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		require.NoError(t, err)
		for range 5 { // slow, and slower in all than one stretch may be
			_, err = io.CopyN(io.Discard, client, 1<<20)
			require.NoError(t, err)
			<-time.After(stalledAfter - time.Minute)
		}
		require.Empty(t, failed)
		require.ErrorIs(t, <-failed, os.ErrDeadlineExceeded)
		require.NoError(t, srv.Close())
	})
}

// pipes is a listener on which given connections arrive.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, ok := <-p; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (p pipes) Close() error   { close(p); return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }
