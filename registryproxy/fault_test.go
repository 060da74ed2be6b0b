package registryproxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

func reset(w http.ResponseWriter, _ *http.Request) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err == nil {
		_ = conn.Close()
	}
}

func stall(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// after sends half of a blob of 10 bytes, and then does as h. To a HEAD that is
// all of the answer.
func after(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "10")
		_, _ = io.WriteString(w, "01234")
		w.(http.Flusher).Flush()
		if r.Method != http.MethodHead {
			h(w, r)
		}
	}
}

func answers(status int, header http.Header, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		maps.Copy(w.Header(), header)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// Every fault is an error of its kind, and none takes longer than the time-outs.
func TestFaults(t *testing.T) {
	tests := map[string]struct {
		registry  string // reg.test
		answer    http.HandlerFunc
		err       string
		refusal   int
		temporary bool
		got       string        // what came before the error
		takes     time.Duration // beside the pause before a retry
	}{
		"no such host":       {registry: "unknown.test", err: "no such host"},
		"no connection":      {registry: "nowhere.test", err: "connection refused", temporary: true},
		"reset":              {answer: reset, err: "EOF", temporary: true},
		"no header":          {answer: stall, err: "no answer", temporary: true, takes: 10 * time.Second},
		"deaf":               {registry: "deaf.test", err: "no answer", temporary: true, takes: 10 * time.Second},
		"no HTTP":            {answer: raw("hello\r\n\r\n"), err: "malformed HTTP", temporary: true},
		"reset in the body":  {answer: after(reset), got: "01234", err: "unexpected EOF", temporary: true},
		"stall in the body":  {answer: after(stall), got: "01234", err: "stalled", temporary: true, takes: 3 * time.Second},
		"truncation":         {answer: after(func(http.ResponseWriter, *http.Request) {}), got: "01234", err: "unexpected EOF", temporary: true},
		"truncated chunks":   {answer: raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n"), got: "01234", err: "unexpected EOF", temporary: true},
		"drip":               {answer: after(slowly("56789")), got: "0123456789", takes: 10 * time.Second},
		"a redirect's page":  {answer: redirectWithEndlessPage, err: "stalled", temporary: true, takes: 3 * time.Second},
		"400":                {answer: answers(400, nil, ""), refusal: 400},
		"404":                {answer: answers(404, nil, ""), refusal: 404},
		"405":                {answer: answers(405, nil, ""), refusal: 405},
		"407":                {answer: answers(407, nil, ""), refusal: 407, temporary: true},
		"408":                {answer: answers(408, nil, ""), refusal: 408, temporary: true},
		"416":                {answer: answers(416, nil, ""), refusal: 416},
		"429":                {answer: answers(429, nil, ""), refusal: 429, takes: time.Second},
		"429 for a second":   {answer: answers(429, http.Header{"Retry-After": {"1"}}, ""), refusal: 429, takes: time.Second},
		"429 for a minute":   {answer: answers(429, http.Header{"Retry-After": {"60"}}, ""), refusal: 429},
		"451":                {answer: answers(451, nil, ""), refusal: 451},
		"500":                {answer: answers(500, nil, ""), refusal: 500, temporary: true},
		"503":                {answer: answers(503, nil, ""), refusal: 503, temporary: true},
		"503 for a minute":   {answer: answers(503, http.Header{"Retry-After": {"60"}}, ""), refusal: 503},
		"a refusal's page":   {answer: after404(stall), refusal: 404, takes: 3 * time.Second},
		"a dripping refusal": {answer: after404(drip), refusal: 404, takes: 3 * time.Second},
		"a refusal cut off":  {answer: after404(reset), refusal: 404},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := newNetwork(t)
				net.hosts["deaf.test:443"] = newDeafHost()
				if tt.answer != nil {
					tt.registry = "reg.test"
					net.handle("reg.test:443", tt.answer)
				}
				c := net.client(Config{StallTimeout: 3 * time.Second})
				start := time.Now()
				b, err := c.Blob(t.Context(), Repository{tt.registry, "app"}, sha256a, 0, Caller{})
				var got []byte
				if err == nil {
					got, err = io.ReadAll(b)
					_ = b.Close()
				}
				took := time.Since(start)
				require.GreaterOrEqual(t, took, tt.takes)
				require.Less(t, took, tt.takes+retryPause)
				require.Equal(t, tt.got, string(got))
				require.Equal(t, tt.temporary, IsTemporary(err))
				if tt.refusal != 0 {
					require.Equal(t, tt.refusal, refusalOf(t, err).Status)
					return
				}
				if tt.err == "" {
					require.NoError(t, err)
					return
				}
				require.ErrorContains(t, err, "registry "+tt.registry+": ")
				require.ErrorContains(t, err, tt.err)
			})
		})
	}
}

func raw(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
			_, _ = io.WriteString(conn, s)
			_ = conn.Close()
		}
	}
}

func slowly(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for _, b := range []byte(s) {
			<-time.After(2 * time.Second)
			_, _ = w.Write([]byte{b})
			w.(http.Flusher).Flush()
		}
	}
}

func after404(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, "no such")
		w.(http.Flusher).Flush()
		h(w, r)
	}
}

func redirectWithEndlessPage(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Location", "/elsewhere")
	w.WriteHeader(http.StatusTemporaryRedirect)
	w.(http.Flusher).Flush()
	stall(w, r)
}

// A refusal of any size is relayed up to its first 64 KiB.
func TestLongRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		header := http.Header{"Retry-After": {"60"}, "Ratelimit-Remaining": {"0;w=21600"}, "Set-Cookie": {"a=b"}, "Content-Type": {"text/html"}}
		net.handle("reg.test:443", answers(429, header, strings.Repeat("no", 100_000)))
		c := net.client(Config{})
		_, err := c.HeadBlob(t.Context(), public, sha256a, Caller{})
		require.Empty(t, refusalOf(t, err).Body)
		_, err = c.Blob(t.Context(), public, sha256a, 0, Caller{})
		_ = refusalOf(t, err)

		w := httptest.NewRecorder()
		refusalOf(t, err).Relay(w)
		delete(header, "Set-Cookie")
		header.Set("Content-Length", "65536")
		require.Equal(t, 429, w.Code)
		require.Equal(t, header, w.Header())
		require.Equal(t, strings.Repeat("no", 1<<15), w.Body.String())
	})
}

// A blob that drips is given up where its rest can be asked for, and only there.
func TestDrip(t *testing.T) {
	blob := strings.Repeat("0123456789", 40_000)
	for name, tt := range map[string]struct {
		rate   int // bytes a second
		ranges bool
		gives  error
		takes  time.Duration
	}{
		"slow":              {rate: 1000, ranges: true, gives: errSlow, takes: 5 * time.Second},
		"slow, for good":    {rate: 10_000, takes: 40 * time.Second},
		"not quite as slow": {rate: 25_000, ranges: true, gives: errSlow, takes: 5 * time.Second},
		"fast enough":       {rate: 40_000, ranges: true, takes: 9 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := newNetwork(t)
				net.handle("reg.test:443", func(w http.ResponseWriter, r *http.Request) {
					if tt.ranges {
						w.Header().Set("Accept-Ranges", "bytes")
					}
					w.Header().Set("Content-Length", "400000")
					for rest := blob; rest != ""; {
						n := min(tt.rate, len(rest))
						_, _ = io.WriteString(w, rest[:n])
						w.(http.Flusher).Flush()
						rest = rest[n:]
						select {
						case <-r.Context().Done():
							return
						case <-time.After(time.Second):
						}
					}
				})
				start := time.Now()
				b, err := net.client(Config{}).Blob(t.Context(), public, digestOf(blob), 0, Caller{})
				require.NoError(t, err)
				defer func() { _ = b.Close() }()
				_, err = io.ReadAll(b)
				require.ErrorIs(t, err, tt.gives)
				require.Equal(t, tt.gives != nil, IsTemporary(err))
				require.InDelta(t, tt.takes, time.Since(start), float64(time.Second))
			})
		})
	}
}

// Whoever reads slowly makes no stall of it.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		blob := strings.Repeat("0123456789", 1000)
		net.handle("reg.test:443", sourceOf(blob)) // with ranges
		c := net.client(Config{})
		b, err := c.Blob(t.Context(), public, digestOf(blob), 0, Caller{})
		require.NoError(t, err)
		defer func() { _ = b.Close() }()
		var got bytes.Buffer
		for range 10 {
			<-time.After(time.Hour)
			_, err := io.CopyN(&got, b, 1000)
			require.NoError(t, err)
		}
		require.Equal(t, blob, got.String())
	})
}

// A caller that goes away ends its request with its own reason, at once.
func TestCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		ended := make(chan struct{}, 2)
		net.handle("reg.test:443", func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "blobs") {
				after(stall)(w, r)
			} else {
				stall(w, r)
			}
			ended <- struct{}{}
		})
		c := net.client(Config{})
		why := errors.New("the engine hung up")
		leave := func(after time.Duration) context.Context {
			ctx, cancel := context.WithCancelCause(t.Context())
			time.AfterFunc(after, func() { cancel(why) })
			return ctx
		}
		start := time.Now()
		_, err := c.Manifest(leave(time.Second), false, public, "latest", nil, Caller{})
		require.ErrorIs(t, err, why)
		require.False(t, IsTemporary(err))
		<-ended
		b, err := c.Blob(leave(time.Second), public, sha256a, 0, Caller{})
		require.NoError(t, err)
		_, err = io.ReadAll(b)
		require.ErrorIs(t, err, why)
		require.False(t, IsTemporary(err))
		_ = b.Close()
		<-ended
		require.Equal(t, 2*time.Second, time.Since(start))
		require.Equal(t, 1, c.count("manifest", resultCanceled))
		require.Equal(t, 1, c.count("blob", resultOK))
	})
}

// Closing a body ends its request at the registry.
func TestCloseEndsRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		ended := make(chan struct{})
		net.handle("reg.test:443", func(w http.ResponseWriter, r *http.Request) {
			after(stall)(w, r)
			close(ended)
		})
		b, err := net.client(Config{}).Blob(t.Context(), public, sha256a, 0, Caller{})
		require.NoError(t, err)
		require.NoError(t, b.Close())
		<-ended
	})
}

// Connections are used again, also after redirects, refusals and ranges.
func TestKeepAlive(t *testing.T) {
	connections := map[string]bool{}
	source := sourceOf("{}", "0123456789")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		connections[r.RemoteAddr] = true
		if strings.Contains(r.URL.Path, "moved") {
			http.Redirect(w, r, strings.Replace(r.URL.Path, "moved", "app", 1), http.StatusFound)
			return
		}
		source(w, r)
	}))
	defer server.Close()
	c := newTestClient(t, Config{Upstreams: []Upstream{{Name: "reg.test", URL: server.URL}}})
	for range 3 {
		_, err := c.Manifest(t.Context(), false, Repository{"reg.test", "moved"}, "latest", nil, Caller{})
		require.NoError(t, err)
		_, err = c.Manifest(t.Context(), true, Repository{"reg.test", "moved"}, "other", nil, Caller{})
		_ = refusalOf(t, err)
		_, err = c.Blob(t.Context(), Repository{"reg.test", "moved"}, sha256a, 0, Caller{})
		_ = refusalOf(t, err)
		b, err := c.BlobRange(t.Context(), Repository{"reg.test", "app"}, digestOf("0123456789"), ByteRange{Offset: 2, Length: 3}, Caller{})
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, b)
		require.NoError(t, err)
		_ = b.Close()
	}
	require.Len(t, connections, 1)
}

// A certificate that nobody vouches for is a failure that stays one.
func TestTLS(t *testing.T) {
	server := httptest.NewUnstartedServer(sourceOf("{}"))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	c := newTestClient(t, Config{Upstreams: []Upstream{{Name: "reg.test", URL: server.URL}}})
	_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
	require.ErrorContains(t, err, "registry reg.test: tls: failed to verify certificate")
	require.False(t, IsTemporary(err))

	c.near.TLSClientConfig = server.Client().Transport.(*http.Transport).TLSClientConfig
	m, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
	require.NoError(t, err)
	require.Equal(t, "{}", string(m.Body))
}

// No error and no log line holds a credential, a token or a signature, whatever
// goes wrong.
func TestNothingLeaks(t *testing.T) {
	const secret = "s3cr3t"
	redirects := func(to string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Location"] = []string{to}
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
	}
	challenge := func(realm string) http.HandlerFunc {
		return answers(401, http.Header{"Www-Authenticate": {fmt.Sprintf(`Bearer realm=%q`, realm)}}, "")
	}
	handlers := map[string]http.HandlerFunc{
		"reset.test:443":    reset,
		"stall.test:443":    stall,
		"half.test:443":     after(stall),
		"raw.test:443":      raw("HTTP/1.1 200 OK\r\n\r\n"),
		"denied.test:443":   answers(403, nil, secret),
		"moved.test:443":    redirects("https://reset.test/?signature=" + secret),
		"lost.test:443":     redirects("https://nowhere.test/?signature=" + secret),
		"wrong.test:443":    redirects("https://[" + secret),
		"port.test:443":     redirects("https://x.test:" + secret + "/"),
		"plain.test:443":    redirects("http://u:" + secret + "@x.test/"),
		"loop.test:443":     redirects("/?signature=" + secret),
		"realm.test:443":    challenge("https://u:" + secret + "@nowhere.test/" + secret),
		"realm2.test:443":   challenge("https://[" + secret),
		"realm3.test:443":   challenge("https://token.test/" + secret),
		"realm4.test:443":   challenge("https://badtoken.test/" + secret),
		"realm5.test:443":   challenge("https://denied.test/" + secret),
		"token.test:443":    answers(200, nil, `{"token":"`+secret),
		"badtoken.test:443": answers(200, nil, `{"token":"`+secret+` \n"}`),
	}
	synctest.Test(t, func(t *testing.T) {
		net := newNetwork(t)
		var said bytes.Buffer
		core := zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewDevelopmentEncoderConfig()), zapcore.AddSync(&said), zap.DebugLevel)
		for addr, h := range handlers {
			net.handle(addr, h)
		}
		for addr := range handlers {
			repo := Repository{strings.TrimSuffix(addr, ":443"), "app"}
			for _, who := range []Caller{{}, {"Bearer " + secret}, {"Bearer " + secret + "\r\nX: y"}} {
				c := net.client(Config{}) // a new one, for which nothing is down
				c.log = zap.New(core)
				var errs []error
				_, err := c.Manifest(t.Context(), false, repo, "latest", nil, who)
				errs = append(errs, err)
				_, err = c.Manifest(t.Context(), true, repo, sha256a, nil, who)
				errs = append(errs, err)
				if b, err := c.Blob(t.Context(), repo, sha256a, 5, who); err != nil {
					errs = append(errs, err)
				} else {
					_, err = io.ReadAll(b)
					errs = append(errs, err)
					_ = b.Close()
				}
				_, err = newAccess(c.Client).Check(t.Context(), Route{KindBlob, repo, sha256a}, who, false)
				errs = append(errs, err)
				for _, err := range errs {
					fmt.Fprintf(&said, "%v %+v %q\n", err, err, err)
				}
				fmt.Fprintf(&said, "%v %+v %#v %s %q\n", who, who, who, who, who)
				c.log.Info("caller", zap.Any("who", who), zap.Stringer("who", who))
			}
		}
		<-time.After(proofTime) // what goes on without its asker
		require.NotContains(t, said.String(), secret)
		require.Contains(t, said.String(), "no token")
		require.Contains(t, said.String(), "credentials (redacted)")
		for _, s := range []string{"stalled", "too many redirects", "from https to http", "leads nowhere", "403"} {
			require.Contains(t, said.String(), s)
		}
	})
	for _, url := range []string{"https://u:" + secret + "@reg.test", "https://[" + secret, "ftp://" + secret, "https://reg.test?" + secret} {
		err := Config{Upstreams: []Upstream{{Name: "reg.test", URL: url}}}.Validate()
		require.Error(t, err)
		require.NotContains(t, err.Error(), secret)
	}
}
