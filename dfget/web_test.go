package dfget

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

func TestURLRequest(t *testing.T) {
	b := newBlob(1)
	for raw, want := range map[string]string{
		"http://Example.COM":             "http://example.com/",
		"HTTPS://example.com:443/a#frag": "https://example.com/a",
		"http://example.com:80/A?b=2&a":  "http://example.com/A?b=2&a",
		"http://example.com:443/":        "http://example.com:443/",
		"https://u:p@example.com/x%2Fy":  "https://example.com/x%2Fy",
	} {
		r, err := URLRequest(raw, "", http.Header{"x-a": {"1"}})
		require.NoError(t, err, raw)
		require.Equal(t, want, r.Origin.URL)
		require.Equal(t, pieces.URLTaskID(want), r.ID)
		require.Equal(t, []string{"1"}, r.Origin.Header["X-A"])
	}
	r, err := URLRequest("http://u:p@h/", string(b.id), nil)
	require.NoError(t, err)
	require.Equal(t, b.id, r.ID)
	require.Equal(t, []string{"Basic dTpw"}, r.Origin.Header["Authorization"])
	for _, c := range []struct{ raw, digest, header, says string }{
		{"ftp://h/", "", "", "http://"},
		{"/local", "", "", "http://"},
		{"http:///x", "", "", "http://"},
		{"http://h/\x00", "", "", "http://"},
		{"http://h/" + strings.Repeat("x", maxURL), "", "", "http://"},
		{"http://h/", "sha256:totallywrong", "", "totallywrong"},
		{"http://h/", string(pieces.URLTaskID("x")), "", "sha256"},
		{"http://h/", "", "range", "Range"},
		{"http://h/", "", "HOST", "Host"},
	} {
		_, err := URLRequest(c.raw, c.digest, http.Header{c.header: {"1"}})
		require.ErrorContains(t, err, c.says)
	}
}

func FuzzURLRequest(f *testing.F) {
	for _, s := range []string{"http://a/b?c", "HTTPS://u@H:443", "http://[::1]:80/%zz", "http://a:/", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		r, err := URLRequest(raw, "", nil)
		if err != nil {
			return
		}
		again, err := URLRequest(r.Origin.URL, "", nil)
		if err != nil {
			return // a form that is refused has no other
		}
		require.Equal(t, r.ID, again.ID)
		require.NotContains(t, r.Origin.URL, "#")
	})
}

// origin serves b as a web server with validators and ranges, through change.
func origin(t *testing.T, b []byte, change func(w http.ResponseWriter, r *http.Request) bool) (srv *httptest.Server, asked *atomic.Int32) {
	t.Helper()
	asked = new(atomic.Int32)
	srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		w.Header().Set("Etag", `"one"`)
		if change == nil || !change(w, r) {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
		}
	}))
	t.Cleanup(srv.Close)
	return srv, asked
}

func webOf(t *testing.T, srv *httptest.Server, header http.Header) *web {
	t.Helper()
	u, err := url.Parse(srv.URL + "/file?secret=s3cret")
	require.NoError(t, err)
	return newWeb(u, header)
}

func TestWeb(t *testing.T) {
	b := newBlob(1 << 20).bytes
	for name, c := range map[string]struct {
		change func(w http.ResponseWriter, r *http.Request) bool
		says   string // the error of the second answer
		status int
	}{
		"ranges": {},
		"no ranges": {change: func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Length", itoa(len(b)))
			_, _ = w.Write(b)
			return true
		}},
		"changed": {change: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") != "" {
				w.Header().Set("Etag", `"two"`)
			}
			return false
		}, says: "changed"},
		"another range": {change: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") == "" {
				return false
			}
			w.Header().Set("Content-Range", contentRange(77_777, 1, int64(len(b))))
			w.WriteHeader(http.StatusPartialContent)
			return true
		}, says: "another range"},
		"garbled range": {change: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") == "" {
				return false
			}
			w.WriteHeader(http.StatusPartialContent)
			return true
		}, says: "Content-Range"},
		"compressed": {change: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") != "" {
				w.Header().Set("Content-Encoding", "gzip")
			}
			return false
		}, says: "encoded"},
		"trouble": {change: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusBadGateway)
			}
			return r.Header.Get("Range") != ""
		}, says: "502"},
		"refusal": {change: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusGone)
				_, _ = w.Write([]byte("no more"))
			}
			return r.Header.Get("Range") != ""
		}, says: "410", status: 410},
	} {
		t.Run(name, func(t *testing.T) {
			srv, _ := origin(t, b, c.change)
			w := webOf(t, srv, http.Header{})
			body, size, err := w.Open(t.Context(), 0)
			require.NoError(t, err)
			require.EqualValues(t, len(b), size)
			got, err := io.ReadAll(body)
			require.NoError(t, err)
			require.True(t, bytes.Equal(b, got))
			require.NoError(t, body.Close())
			body, size, err = w.Open(t.Context(), 12345)
			if c.says != "" {
				require.ErrorContains(t, err, c.says)
				require.NotContains(t, err.Error(), "s3cret")
				refused, no := errors.AsType[*RefusedError](err)
				require.Equal(t, c.status != 0, no)
				if no {
					require.Equal(t, "no more", string(refused.Body))
				}
				return
			}
			require.NoError(t, err)
			defer func() { require.NoError(t, body.Close()) }()
			require.EqualValues(t, len(b), size)
			got, err = io.ReadAll(body)
			require.NoError(t, err)
			require.True(t, bytes.Equal(b[12345:], got))
		})
	}
}

func TestWebErrorsTellNoSecret(t *testing.T) {
	srv, _ := origin(t, nil, nil)
	srv.Close()
	_, _, err := webOf(t, srv, http.Header{}).Open(t.Context(), 0)
	require.Error(t, err)
	require.NotContains(t, err.Error(), "s3cret")
}

func TestRedirectsCarryNoCredentials(t *testing.T) {
	var seen http.Header
	store, _ := origin(t, []byte("bytes"), func(_ http.ResponseWriter, r *http.Request) bool {
		seen = r.Header.Clone()
		return false
	})
	srv, _ := origin(t, nil, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("X-Token") != "me" {
			return true // the host itself must be told
		}
		if r.URL.Path == "/file" {
			http.Redirect(w, r, "/here", http.StatusFound)
		} else {
			http.Redirect(w, r, store.URL, http.StatusFound)
		}
		return true
	})
	body, _, err := webOf(t, srv, http.Header{"X-Token": {"me"}, "Authorization": {"Basic me"}}).Open(t.Context(), 2)
	require.NoError(t, err)
	require.NoError(t, body.Close())
	require.Equal(t, "bytes=2-", seen.Get("Range"))
	for _, k := range []string{"X-Token", "Authorization", "Referer"} {
		require.Empty(t, seen.Get(k))
	}
	loop, _ := origin(t, nil, func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, "/again", http.StatusFound)
		return true
	})
	_, _, err = webOf(t, loop, http.Header{}).Open(t.Context(), 0)
	require.ErrorContains(t, err, "too many redirects")
}

// daemon is the socket of a dfdaemon with one answer.
func daemon(t *testing.T, answer http.HandlerFunc) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+SocketContentPath, answer)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close() })
	return path
}

// outcome is what a Download has left.
func outcome(t *testing.T, d *Download) (got []byte, logs *observer.ObservedLogs, err error) {
	t.Helper()
	core, logs := observer.New(zap.WarnLevel)
	dir := t.TempDir()
	if d.Output == "" {
		d.Output = filepath.Join(dir, "out")
	}
	d.DataDir, d.Log = filepath.Join(dir, "data"), zap.New(core)
	err = d.Run(t.Context())
	names, globErr := filepath.Glob(filepath.Join(filepath.Dir(d.Output), ".dfget-*"))
	require.NoError(t, globErr)
	require.Empty(t, names, "no temporary file is left")
	if err != nil {
		require.NoFileExists(t, d.Output)
		return nil, logs, err
	}
	got, err = os.ReadFile(d.Output)
	require.NoError(t, err)
	return got, logs, nil
}

func TestDownload(t *testing.T) {
	b := newBlob(1<<20 + 3)
	half := b.bytes[:len(b.bytes)/2]
	srv, asked := origin(t, b.bytes, func(w http.ResponseWriter, r *http.Request) bool {
		switch r.URL.Path {
		case "/missing":
			http.NotFound(w, r)
		case "/breaks":
			if r.Header.Get("Range") == "" {
				w.Header().Set("Content-Length", itoa(len(b.bytes)))
				_, _ = w.Write(half)
				panic(http.ErrAbortHandler)
			}
			return false
		default:
			return false
		}
		return true
	})
	gone := httptest.NewServer(nil)
	gone.Close()
	dead := filepath.Join(t.TempDir(), "dead")
	other := newBlob(5)
	for name, c := range map[string]struct {
		path, digest string
		socket       func(t *testing.T) string
		supernodes   []string
		asked        int32
		warns        bool
		err          func(t *testing.T, err error)
	}{
		"straight":            {asked: 1},
		"straight and broken": {path: "/breaks", asked: 2, digest: string(b.id)},
		"digest":              {digest: string(b.id), asked: 1},
		"digest does not match": {digest: string(other.id), asked: 1, err: func(t *testing.T, err error) {
			t.Helper()
			wrong, ok := errors.AsType[*MismatchError](err)
			require.True(t, ok, "%v", err)
			require.EqualValues(t, other.id, wrong.Digest)
		}},
		"refused": {path: "/missing", asked: 1, err: func(t *testing.T, err error) {
			t.Helper()
			refused, ok := errors.AsType[*RefusedError](err)
			require.True(t, ok, "%v", err)
			require.Equal(t, 404, refused.Status)
		}},
		"no supernode, and refused": {path: "/missing", supernodes: []string{gone.URL}, asked: 1, warns: true, err: func(t *testing.T, err error) {
			t.Helper()
			_, ok := errors.AsType[*RefusedError](err)
			require.True(t, ok, "%v", err)
		}},
		"no supernode": {supernodes: []string{gone.URL}, asked: 1, warns: true},
		"no daemon":    {socket: func(*testing.T) string { return dead }, asked: 1, warns: true},
		"daemon": {socket: func(t *testing.T) string {
			t.Helper()
			return daemon(t, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				if !strings.Contains(string(body), `"headers":{"X-A":["1"]}`) {
					w.WriteHeader(http.StatusBadRequest)
					return
				}
				_, _ = w.Write(b.bytes)
			})
		}},
		"daemon breaks off": {socket: func(t *testing.T) string {
			t.Helper()
			return daemon(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Length", itoa(len(b.bytes)))
				_, _ = w.Write(half)
			})
		}, asked: 1, warns: true, digest: string(b.id)},
		"daemon cannot": {socket: func(t *testing.T) string {
			t.Helper()
			return daemon(t, func(w http.ResponseWriter, _ *http.Request) {
				(&refused{http.StatusBadGateway, api.Error{Code: api.CodeUnavailable, Message: "neither here nor there"}}).write(w)
			})
		}, asked: 1, warns: true},
		"daemon relays a refusal": {socket: func(t *testing.T) string {
			t.Helper()
			return daemon(t, func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(http.StatusForbidden)
				_, _ = w.Write([]byte("not you"))
			})
		}, err: func(t *testing.T, err error) {
			t.Helper()
			refused, ok := errors.AsType[*RefusedError](err)
			require.True(t, ok, "%v", err)
			require.Equal(t, "not you", string(refused.Body))
		}},
		"daemon has other bytes": {digest: string(b.id), socket: func(t *testing.T) string {
			t.Helper()
			return daemon(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(half) })
		}, err: func(t *testing.T, err error) {
			t.Helper()
			_, ok := errors.AsType[*MismatchError](err)
			require.True(t, ok, "%v", err)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			asked.Store(0)
			d := &Download{URL: srv.URL + c.path, Digest: c.digest, Header: http.Header{"X-A": {"1"}}}
			d.Peer.Supernodes = c.supernodes
			if c.socket != nil {
				d.Socket = c.socket(t)
			}
			var last int64
			d.Progress = func(done, size int64, _ Stats) {
				require.True(t, size == -1 || done <= size)
				last = done
			}
			got, logs, err := outcome(t, d)
			left, _ := os.ReadDir(d.DataDir) // it may not be there
			require.Empty(t, left, "a store without a piece is not kept")
			require.Equal(t, c.asked, asked.Load())
			require.Equal(t, c.warns, logs.Len() > 0, "%v", logs.All())
			if c.err != nil {
				c.err(t, err)
				return
			}
			require.NoError(t, err)
			require.True(t, bytes.Equal(b.bytes, got))
			require.EqualValues(t, len(b.bytes), last)
		})
	}
}

func TestDownloadAsPeer(t *testing.T) {
	b := newBlob(1<<20 + 3)
	byURL := *b
	n := newFakeNode(t, nil)
	srv := httptest.NewServer(n.routes)
	defer srv.Close()
	web, asked := origin(t, b.bytes, nil)
	byURL.id = pieces.URLTaskID(web.URL + "/")
	n.does(serving(&byURL, ""))
	n.routes.HandleFunc(api.ContentPath(byURL.id), content(b))
	d := &Download{URL: web.URL, Peer: PeerConfig{Supernodes: []string{srv.URL}, Advertise: "127.0.0.1"}}
	var from Stats
	d.Progress = func(_, _ int64, s Stats) { from = s }
	got, _, err := outcome(t, d)
	require.NoError(t, err)
	require.True(t, bytes.Equal(b.bytes, got))
	require.Zero(t, asked.Load())
	require.EqualValues(t, len(b.bytes), from.Supernode)
	left, err := os.ReadDir(d.DataDir)
	require.NoError(t, err)
	require.Empty(t, left, "the store is not kept")
	require.Regexp(t, `^127\.0\.0\.1:[1-9]`, heard(n, hellos)[0].Addr)
}

func TestOutput(t *testing.T) {
	b := newBlob(1000)
	srv, _ := origin(t, b.bytes, nil)
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	require.NoError(t, os.WriteFile(file, []byte("old"), 0o600))
	require.NoError(t, os.Symlink(file, link))
	d := &Download{URL: srv.URL, Output: link, Log: zaptest.NewLogger(t)}
	require.NoError(t, d.Run(t.Context()))
	got, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, b.bytes, got, "what a link leads to is replaced, not the link")
	for _, bad := range []string{dir, "/dev/null", filepath.Join(dir, "none", "file"), filepath.Join(file, "below")} {
		d.Output = bad
		_, ok := errors.AsType[*OutputError](d.Run(t.Context()))
		require.True(t, ok, bad)
	}
	full := &output{path: file}
	full.temp, err = os.OpenFile("/dev/full", os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = io.Copy(full, bytes.NewReader(b.bytes))
	require.Error(t, err)
	require.ErrorIs(t, full.err, err)
	require.NoError(t, full.temp.Close())
}
