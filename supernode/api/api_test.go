package api

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
)

// pair returns the two ends of a session over memory, and the host's connection
// below its end. What the supernode's end writes goes through wrap.
func pair(t *testing.T, wrap func(net.Conn) net.Conn) (host *Conn[Down, Up], node *Conn[Up, Down], below net.Conn) {
	t.Helper()
	here, there := net.Pipe()
	if wrap != nil {
		there = wrap(there)
	}
	l := pipe{conns: make(chan net.Conn, 1)}
	l.conns <- there
	accepted := make(chan *Conn[Up, Down], 1)
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := Accept(w, r)
		if err != nil {
			close(accepted)
			return
		}
		accepted <- c
	})}
	go func() { _ = srv.Serve(l) }()
	host, err := Dial(t.Context(), &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return here, nil },
	}}, "http://supernode/")
	require.NoError(t, err)
	node = <-accepted
	t.Cleanup(func() {
		host.CloseNow()
		node.CloseNow()
		close(l.conns)
		_ = srv.Close()
		<-time.After(2 * time.Hour) // what still writes ends
	})
	return host, node, here
}

// pipe is a listener of one connection in memory.
type pipe struct {
	net.Listener
	conns chan net.Conn
}

func (p pipe) Accept() (net.Conn, error) {
	if c, ok := <-p.conns; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}

func (p pipe) Addr() net.Addr { return &net.IPAddr{} }
func (p pipe) Close() error   { return nil }

// beats returns what writes an empty batch at a KeepAlive's word.
func beats[In, Out any](c *Conn[In, Out]) func() {
	return func() {
		var nothing Out
		go func() { _ = c.Write(context.Background(), nothing) }()
	}
}

// drain reads until the session ends.
func drain[In, Out any](c *Conn[In, Out]) {
	for {
		if _, err := c.Read(context.Background()); err != nil {
			return
		}
	}
}

func TestSessionCarriesBatchesBothWays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, node, _ := pair(t, nil)
		for _, n := range []int{1, 100, 5000, 60_000} { // frames that a reader's buffer holds, and that it does not
			soon := make([]uint64, n)
			for i := range soon {
				soon[i] = uint64(i)
			}
			go func() { _ = host.Write(t.Context(), Up{Soon: soon}) }()
			up, err := node.Read(t.Context())
			require.NoError(t, err)
			require.Equal(t, Up{Soon: soon}, up)
			go func() { _ = node.Write(t.Context(), Down{Cancel: soon}) }()
			down, err := host.Read(t.Context())
			require.NoError(t, err)
			require.Equal(t, Down{Cancel: soon}, down)
		}
	})
}

func TestSessionEndsWithAReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, node, _ := pair(t, nil)
		go node.Close("replaced by another")
		_, err := host.Read(context.Background())
		require.ErrorContains(t, err, "replaced by another")
		_, err = host.Read(context.Background())
		require.ErrorIs(t, err, io.EOF)
	})
}

func TestSessionThatTakesNothingIsClosedAllTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, node, _ := pair(t, nil)
		failed := make(chan error, 1)
		go func() { failed <- node.Write(context.Background(), Down{Cancel: make([]uint64, 1000)}) }()
		synctest.Wait()
		began := time.Now()
		node.Close("too slow")
		require.LessOrEqual(t, time.Since(began), farewell)
		require.Error(t, <-failed)
		_, err := host.Read(context.Background())
		require.Error(t, err)
	})
}

func TestReadAndWriteEndWithTheirContext(t *testing.T) {
	for name, use := range map[string]func(context.Context, *Conn[Down, Up]) error{
		"read":  func(ctx context.Context, c *Conn[Down, Up]) error { _, err := c.Read(ctx); return err },
		"write": func(ctx context.Context, c *Conn[Down, Up]) error { return c.Write(ctx, Up{}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host, _, _ := pair(t, nil)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				require.ErrorIs(t, use(ctx, host), context.DeadlineExceeded)
			})
		})
	}
}

func TestSessionRefusesWhatIsTooLargeOrMalformed(t *testing.T) {
	framed := func(body string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	}
	for name, frame := range map[string][]byte{
		"too large":          {0, 0x10, 0, 1},
		"far too large":      {0x7f, 0xff, 0xff, 0xff},
		"empty":              framed(""),
		"not CBOR":           framed("\xff\xff\xff"),
		"list past the cap":  framed("\xa1\x06\x9a\x00\x01\x00\x01" + strings.Repeat("\x00", 1<<16+1)),
		"indefinite lengths": framed("\xbf\xff"),
		"another type":       framed("\x83\x01\x02\x03"),
		"more than a batch":  framed("\xa0\xa0"),
		"another protocol":   []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, node, below := pair(t, nil)
				go func() { _, _ = below.Write(frame) }()
				_, err := node.Read(t.Context())
				require.ErrorIs(t, err, ErrFrame)
			})
		})
	}
}

func TestSessionThatBreaksWithinAFrame(t *testing.T) {
	whole := binary.BigEndian.AppendUint32(nil, 8000)
	whole = append(whole, make([]byte, 8000)...)
	for _, n := range []int{0, 1, 4, 5, 4096, 8003} {
		synctest.Test(t, func(t *testing.T) {
			_, node, below := pair(t, nil)
			go func() {
				_, _ = below.Write(whole[:n])
				_ = below.Close()
			}()
			_, err := node.Read(t.Context())
			require.ErrorIs(t, err, io.EOF)
		})
	}
}

func TestOnlyAHostOpensASession(t *testing.T) {
	refused := make(chan error, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := Accept(w, r)
		refused <- err
	}))
	defer srv.Close()
	for connection, upgrade := range map[string]string{
		"Upgrade": "websocket",
		"close":   "damselfly", // somebody between them would take what follows for other requests
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL, http.NoBody)
		require.NoError(t, err)
		req.Header.Set("Connection", connection)
		req.Header.Set("Upgrade", upgrade)
		resp, err := srv.Client().Do(req)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, http.StatusUpgradeRequired, resp.StatusCode, upgrade)
		require.Error(t, <-refused)
	}

	srv.Config.Handler = http.NotFoundHandler()
	_, err := Dial(t.Context(), srv.Client(), srv.URL)
	require.ErrorContains(t, err, "404")
}

// Where one side alone has TLS the host says what to do.
func TestDialAdvises(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	client := &http.Client{Transport: &http.Transport{}}
	for base, says := range map[string]string{
		strings.Replace(plain.URL, "http", "https", 1):  "give the supernode --tls or --ca",
		strings.Replace(secure.URL, "https", "http", 1): "give --tls or --join-token here",
		secure.URL: "--tls or --join-token must name",
	} {
		_, err := Dial(t.Context(), client, base)
		require.ErrorContains(t, err, says)
	}
}

func TestKeepAliveNoticesSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, _, _ := pair(t, nil) // the supernode says nothing
		go drain(host)
		began := time.Now()
		require.ErrorContains(t, host.KeepAlive(t.Context(), beats(host)), "silent")
		require.Equal(t, SilenceLimit+TickEvery, time.Since(began), "it had waited for less than a tick at the first")
	})
}

func TestKeepAliveForgivesAnEndThatIsTooBusyToRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, node, _ := pair(t, nil)
		ctx, cancel := context.WithTimeout(t.Context(), StuckLimit-TickEvery)
		defer cancel()
		go drain(host)
		busy := make(chan error, 1)
		go func() { busy <- node.KeepAlive(ctx, beats(node)) }() // and no Read
		require.ErrorIs(t, host.KeepAlive(ctx, beats(host)), context.DeadlineExceeded, "the busy end beats")
		require.ErrorIs(t, <-busy, context.DeadlineExceeded, "nor does it take this end for dead")
	})
}

// halting writes nothing in the last 4 of each 13.3 seconds, nor once dead.
type halting struct {
	net.Conn
	began time.Time
	dead  chan struct{}
}

func (h halting) Write(b []byte) (int, error) {
	const period, stands = 13300 * time.Millisecond, 4 * time.Second
	if at := time.Since(h.began) % period; at > period-stands {
		<-time.After(period - at)
	}
	select {
	case <-h.dead:
		return len(b), nil
	default:
		return h.Conn.Write(b)
	}
}

func TestKeepAliveForgivesAnEndThatStandsStillForSeconds(t *testing.T) {
	for name, writes := range map[string]time.Duration{"idle": time.Hour, "with now and then a word": 3700 * time.Millisecond} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { standsStill(t, writes) }) })
	}
}

func standsStill(t *testing.T, writes time.Duration) {
	t.Helper()
	dead := make(chan struct{})
	host, node, _ := pair(t, func(c net.Conn) net.Conn { return halting{c, time.Now(), dead} })
	go drain(node)
	go drain(host)
	go func() {
		<-time.After(1700 * time.Millisecond) // the ends tick apart
		go func() { _ = node.KeepAlive(t.Context(), beats(node)) }()
		for t.Context().Err() == nil && node.Write(context.Background(), Down{}) == nil {
			<-time.After(writes)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	require.ErrorIs(t, host.KeepAlive(ctx, beats(host)), context.DeadlineExceeded)

	close(dead)
	began := time.Now()
	require.ErrorContains(t, host.KeepAlive(t.Context(), beats(host)), "silent")
	require.LessOrEqual(t, time.Since(began), 8*time.Second, "who is dead is noticed")
}

// An end that shows that it is there and never reads is not waited for for ever.
func TestKeepAliveEndsWithWhoTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, node, _ := pair(t, nil)
		go func() { _ = node.KeepAlive(t.Context(), beats(node)) }() // and no Read
		go drain(host)
		go func() {
			for host.Write(context.Background(), Up{Soon: make([]uint64, 10_000)}) == nil {
			}
		}()
		began := time.Now()
		require.ErrorContains(t, host.KeepAlive(t.Context(), beats(host)), "taken nothing")
		require.InDelta(t, StuckLimit.Seconds(), time.Since(began).Seconds(), 2)
	})
}

// An end whose frame never ends is not kept, with what there is of it, for ever.
func TestKeepAliveEndsWithWhoNeverEndsAFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, node, below := pair(t, nil)
		go drain(node)
		go func() {
			_, err := below.Write(binary.BigEndian.AppendUint32(nil, MaxFrame))
			for ; err == nil; _, err = below.Write(make([]byte, 100)) {
				<-time.After(time.Second)
			}
		}()
		began := time.Now()
		require.ErrorContains(t, node.KeepAlive(t.Context(), func() {}), "has not ended a frame")
		require.InDelta(t, StuckLimit.Seconds(), time.Since(began).Seconds(), 2)
	})
}

func TestOriginIsNeverPrinted(t *testing.T) {
	o := Origin{URL: "https://example.com/?sig=secret", Header: map[string][]string{"Authorization": {"Basic secret"}}}
	up := Up{Join: []Join{{Origin: o}}}
	for _, f := range []string{"%v", "%+v", "%s", "%#v"} {
		require.NotContains(t, fmt.Sprintf(f, o), "secret")
		require.NotContains(t, fmt.Sprintf(f, up), "secret")
	}
}

func TestPeerAddr(t *testing.T) {
	for _, c := range []struct{ adv, remote, want, err string }{
		{"10.0.0.5:65002", "10.0.0.9:1", "10.0.0.5:65002", ""},
		{":65002", "10.0.0.9:1", "10.0.0.9:65002", ""},
		{":65002", "[fd00::1]:1", "[fd00::1]:65002", ""},
		{"", "10.0.0.9:1", "", ""},
		{"10.0.0.5", "10.0.0.9:1", "", "host:port"},
		{"[fd00::1]:65002", "10.0.0.9:1", "[fd00::1]:65002", ""},
		{"node-1.corp:65002", "10.0.0.9:1", "node-1.corp:65002", ""},
		{"10.0.0.5/delete?:80", "10.0.0.9:1", "", "host:port"}, // would have other hosts ask for that
		{"10.0.0.5#:80", "10.0.0.9:1", "", "host:port"},
		{"user@10.0.0.5:80", "10.0.0.9:1", "", "host:port"},
		{"10.0.0.5:80?", "10.0.0.9:1", "", "host:port"},
		{"10.0.0.5\r\n:80", "10.0.0.9:1", "", "host:port"},
	} {
		got, err := PeerAddr(c.adv, c.remote)
		if c.err != "" {
			require.ErrorContains(t, err, c.err)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, c.want, got)
	}
}

func TestTicket(t *testing.T) {
	pub, priv, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	_, other, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	now := time.Unix(1000, 0)
	id := pieces.URLTaskID("a")
	sign := func(k ed25519.PrivateKey, tk Ticket) string {
		s, err := SignTicket(k, tk)
		require.NoError(t, err)
		return s
	}
	good := sign(priv, Ticket{Task: string(id), Host: "h", Expires: 1001})
	before, _, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	got, err := VerifyTicket([]ed25519.PublicKey{nil, before, pub}, good, id, now)
	require.NoError(t, err)
	require.Equal(t, "h", got.Host)
	body, sig, _ := strings.Cut(good, ".")
	for name, s := range map[string]string{
		"none":         "",
		"another task": sign(priv, Ticket{Task: string(pieces.URLTaskID("b")), Expires: 1001}),
		"expired":      sign(priv, Ticket{Task: string(id), Expires: 1000}),
		"another key":  sign(other, Ticket{Task: string(id), Expires: 1001}),
		"no signature": body + ".",
		"swapped":      sig + "." + body,
		"body of another": func() string {
			b, _, _ := strings.Cut(sign(other, Ticket{Task: string(id), Expires: 9999}), ".")
			return b + "." + sig
		}(),
	} {
		_, err := VerifyTicket([]ed25519.PublicKey{pub}, s, id, now)
		require.ErrorIs(t, err, ErrTicket, name)
	}
	_, err = VerifyTicket(nil, good, id, now)
	require.ErrorIs(t, err, ErrTicket)
}

func TestTicketPermits(t *testing.T) {
	private, public := Ticket{Host: "a"}, Ticket{Host: "a", Public: true}
	require.NoError(t, private.Permits("a", true))
	require.NoError(t, private.Permits("", true), "nobody shows a certificate where TLS is off")
	require.ErrorIs(t, private.Permits("b", true), ErrTicket)
	require.ErrorIs(t, public.Permits("b", true), ErrTicket)
	require.ErrorIs(t, private.Permits("", false), ErrClear)
	require.NoError(t, public.Permits("", false))
}

func TestTicketKeys(t *testing.T) {
	key := make([]byte, ed25519.PublicKeySize)
	require.Len(t, TicketKeys([][]byte{key, nil, key[1:], key}), 2)
	require.Len(t, TicketKeys(slices.Repeat([][]byte{key}, 1000)), MaxKeys)
}

func FuzzUp(f *testing.F) {
	b, err := cbor.Marshal(Up{Hello: &Hello{Host: "h"}, Done: []Done{{Transfer: 1, Piece: 2}}})
	require.NoError(f, err)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
		size, err := FrameSize(frame)
		require.NoError(t, err)
		require.Len(t, frame, size)
		var up, twin Up
		if ParseFrame(frame, &up) != nil {
			return
		}
		var again, more bytes.Buffer
		require.NoError(t, AppendFrame(&again, up))
		require.NoError(t, ParseFrame(again.Bytes(), &twin))
		require.NoError(t, AppendFrame(&more, twin))
		require.Equal(t, again.Bytes(), more.Bytes(), "something is lost on the way")
	})
}

func FuzzVerifyTicket(f *testing.F) {
	pub, priv, err := ed25519.GenerateKey(nil)
	require.NoError(f, err)
	id := pieces.URLTaskID("a")
	good, err := SignTicket(priv, Ticket{Task: string(id), Expires: 2000})
	require.NoError(f, err)
	f.Add(good)
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := VerifyTicket([]ed25519.PublicKey{pub}, s, id, time.Unix(1000, 0)); err == nil && s != good {
			// base64 without padding has spare bits at its end; the bytes are the same.
			require.Len(t, s, len(good))
		}
	})
}
