package api

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
)

func TestSessionCarriesBatchesBothWays(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := Accept(w, r)
		if err != nil {
			return
		}
		defer c.CloseNow()
		up, err := c.Read(r.Context())
		if err != nil || up.Hello == nil {
			return
		}
		_ = c.Write(r.Context(), Down{Welcome: &Welcome{Version: up.Hello.Version, TicketKey: []byte(up.Hello.Host)}})
	}))
	defer srv.Close()
	c, err := Dial(t.Context(), srv.Client(), srv.URL+"/")
	require.NoError(t, err)
	defer c.CloseNow()
	require.NoError(t, c.Write(t.Context(), Up{Hello: &Hello{Version: Version, Host: "h1"}}))
	down, err := c.Read(t.Context())
	require.NoError(t, err)
	require.Equal(t, "h1", string(down.Welcome.TicketKey))
}

func TestSessionRefusesWhatIsTooLargeOrMalformed(t *testing.T) {
	for name, frame := range map[string][]byte{
		"too large":          make([]byte, MaxFrame+1),
		"not CBOR":           []byte("\xff\xff\xff"),
		"list past the cap":  append([]byte{0xa1, 0x06, 0x9a, 0, 1, 0, 1}, make([]byte, 1<<16+1)...),
		"indefinite lengths": {0xbf, 0xff},
		"another type":       {0x83, 1, 2, 3},
	} {
		t.Run(name, func(t *testing.T) {
			got := make(chan error, 1)
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				c, err := Accept(w, r)
				if err == nil {
					_, err = c.Read(r.Context())
					c.CloseNow()
				}
				got <- err
			}))
			defer srv.Close()
			c, err := Dial(t.Context(), srv.Client(), srv.URL)
			require.NoError(t, err)
			defer c.CloseNow()
			_ = c.ws.Write(t.Context(), 2, frame)
			require.Error(t, <-got)
		})
	}
}

func TestKeepAliveNoticesSilence(t *testing.T) {
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := Accept(w, r)
		if err != nil {
			return
		}
		defer c.CloseNow()
		<-release // alive for TCP, and never says a word
	}))
	defer srv.Close()
	defer close(release)
	c, err := Dial(t.Context(), srv.Client(), srv.URL)
	require.NoError(t, err)
	defer c.CloseNow()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { _, _ = c.Read(ctx) }()
	require.ErrorContains(t, c.KeepAlive(ctx), "silent")
}

func TestKeepAliveForgivesAnEndThatIsTooBusyToRead(t *testing.T) {
	busy := make(chan error, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := Accept(w, r)
		if err != nil {
			busy <- err
			return
		}
		defer c.CloseNow()
		busy <- c.KeepAlive(r.Context()) // and no Read
	}))
	defer srv.Close()
	c, err := Dial(t.Context(), srv.Client(), srv.URL)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), SilenceLimit+2*BeatEvery)
	defer cancel()
	go func() { _, _ = c.Read(context.Background()) }()
	require.ErrorIs(t, c.KeepAlive(ctx), context.DeadlineExceeded, "the busy end beats")
	require.Empty(t, busy, "nor does it take this end for dead")
	c.CloseNow()
	require.Error(t, <-busy)
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

// An end that shows that it is there and never reads is not waited for for ever.
func TestKeepAliveEndsWithWhoTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		l := pipe{conns: make(chan net.Conn, 1)}
		l.conns <- there
		srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if c, err := Accept(w, r); err == nil {
				_ = c.KeepAlive(r.Context()) // and no Read
				c.CloseNow()
			}
		})}
		go func() { _ = srv.Serve(l) }()
		c, err := Dial(t.Context(), &http.Client{Transport: &http.Transport{
			DialContext: func(context.Context, string, string) (net.Conn, error) { return here, nil },
		}}, "http://supernode")
		require.NoError(t, err)
		go func() {
			_, err := c.Read(context.Background())
			for err == nil {
				_, err = c.Read(context.Background())
			}
		}()
		go func() {
			for c.Write(context.Background(), Up{Soon: make([]uint64, 10_000)}) == nil {
			}
		}()
		began := time.Now()
		require.ErrorContains(t, c.KeepAlive(t.Context()), "taken nothing")
		require.InDelta(t, StuckLimit.Seconds(), time.Since(began).Seconds(), 2)
		c.CloseNow()
		close(l.conns)
		_ = srv.Close()
		<-time.After(time.Hour) // what still writes ends
	})
}

func standsStill(t *testing.T, writes time.Duration) {
	t.Helper()
	here, there := net.Pipe()
	l := pipe{conns: make(chan net.Conn, 1)}
	dead := make(chan struct{})
	l.conns <- halting{there, time.Now(), dead}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := Accept(w, r)
		if err != nil {
			return
		}
		defer c.CloseNow()
		<-time.After(1700 * time.Millisecond) // the ends tick apart
		go func() { _ = c.KeepAlive(r.Context()) }()
		go func() {
			for c.Write(context.Background(), Down{}) == nil {
				<-time.After(writes)
			}
		}()
		_, _ = c.Read(context.Background())
	})}
	go func() { _ = srv.Serve(l) }()
	defer func() {
		close(l.conns)
		_ = srv.Close()
		<-time.After(time.Hour) // what still writes ends
	}()
	c, err := Dial(t.Context(), &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return here, nil },
	}}, "http://supernode")
	require.NoError(t, err)
	defer c.CloseNow()
	go func() {
		for {
			if _, err := c.Read(context.Background()); err != nil {
				return
			}
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	require.ErrorIs(t, c.KeepAlive(ctx), context.DeadlineExceeded)

	close(dead)
	began := time.Now()
	require.ErrorContains(t, c.KeepAlive(t.Context()), "silent")
	require.LessOrEqual(t, time.Since(began), 8*time.Second, "who is dead is noticed")
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
	got, err := VerifyTicket(pub, good, id, now)
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
		_, err := VerifyTicket(pub, s, id, now)
		require.ErrorIs(t, err, ErrTicket, name)
	}
	_, err = VerifyTicket(nil, good, id, now)
	require.ErrorIs(t, err, ErrTicket)
}

func FuzzUp(f *testing.F) {
	b, err := cbor.Marshal(Up{Hello: &Hello{Host: "h"}, Done: []Done{{Transfer: 1, Piece: 2}}})
	require.NoError(f, err)
	f.Add(b)
	dec, err := decMode()
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, b []byte) {
		var up Up
		if dec.Unmarshal(b, &up) != nil {
			return
		}
		again, err := cbor.Marshal(up)
		require.NoError(t, err)
		var twin Up
		require.NoError(t, dec.Unmarshal(again, &twin))
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
		if _, err := VerifyTicket(pub, s, id, time.Unix(1000, 0)); err == nil && s != good {
			// base64 without padding has spare bits at its end; the bytes are the same.
			require.Len(t, s, len(good))
		}
	})
}
