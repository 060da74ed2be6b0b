package region_test

import (
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync/atomic"
	"testing"
	"time"
)

// fault stands before a host's peer listener and spoils what others get there.
type fault struct {
	*httptest.Server
	target atomic.Pointer[url.URL]
	asked  atomic.Int64 // requests for content
	spoil  func(body io.ReadCloser, r *http.Request) io.ReadCloser
}

func newFault(t *testing.T, spoil func(body io.ReadCloser, r *http.Request) io.ReadCloser) *fault {
	t.Helper()
	f := &fault{spoil: spoil}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(f.target.Load()) },
		ModifyResponse: func(resp *http.Response) error {
			if resp.StatusCode < 300 {
				resp.Body = f.spoil(resp.Body, resp.Request)
			}
			return nil
		},
		Transport:     secure().transport(),
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0),
		ErrorHandler:  func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.asked.Add(1)
		proxy.ServeHTTP(w, r)
	}))
	secure().begin(f.Server)
	t.Cleanup(f.Close)
	return f
}

// altered is a body of which each Read goes through read.
type altered struct {
	io.ReadCloser
	read func(p []byte) (int, error)
}

func (a altered) Read(p []byte) (int, error) { return a.read(p) }

// corrupt turns a bit in every stretch that it passes on.
func corrupt(body io.ReadCloser, _ *http.Request) io.ReadCloser {
	return altered{body, func(p []byte) (int, error) {
		n, err := body.Read(p)
		if n > 0 {
			p[n/2] ^= 1
		}
		return n, err
	}}
}

// vanish breaks off after some bytes.
func vanish(body io.ReadCloser, _ *http.Request) io.ReadCloser {
	left := 100_000
	return altered{body, func(p []byte) (int, error) {
		if left <= 0 {
			return 0, errors.New("gone")
		}
		n, err := body.Read(p[:min(len(p), left)])
		left -= n
		return n, err
	}}
}

// silent answers and then sends nothing.
func silent(body io.ReadCloser, r *http.Request) io.ReadCloser {
	return altered{body, func([]byte) (int, error) {
		<-r.Context().Done()
		return 0, r.Context().Err()
	}}
}

// slow sends some 200 KB a second.
func slow(body io.ReadCloser, r *http.Request) io.ReadCloser {
	return altered{body, func(p []byte) (int, error) {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-r.Context().Done():
			return 0, r.Context().Err()
		}
		return body.Read(p[:min(len(p), 4<<10)])
	}}
}
