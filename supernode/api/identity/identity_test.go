package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/test/certs"
)

func authority(t *testing.T, name string) *certs.Authority {
	t.Helper()
	a, err := certs.New(name)
	require.NoError(t, err)
	return a
}

// issued returns a directory with a certificate, and the Source of it.
func issued(t *testing.T, a *certs.Authority, n certs.Name, trusts ...*certs.Authority) (dir string, s *Source) {
	t.Helper()
	dir = t.TempDir()
	if len(trusts) == 0 {
		trusts = []*certs.Authority{a}
	}
	require.NoError(t, a.Write(dir, n, trusts...))
	s, err := FromDir(dir, zaptest.NewLogger(t))
	require.NoError(t, err)
	return dir, s
}

// serve answers with who asks, over TLS by s.
func serve(t *testing.T, s *Source, need bool) string {
	t.Helper()
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, err := Of(r.TLS)
		if err != nil {
			who = "nobody: " + err.Error()
		}
		if r.TLS.DidResume {
			w.Header().Set("Resumed", "yes")
		}
		_, _ = io.WriteString(w, who)
	})}
	go func() { _ = srv.Serve(tls.NewListener(ln, s.Server(need))) }()
	t.Cleanup(func() { _ = srv.Close() })
	return ln.Addr().String()
}

// ask asks a server as a peer does, by one connection.
func ask(t *testing.T, at string, cfg *tls.Config) (who string, resumed bool, err error) {
	t.Helper()
	transport := &http.Transport{DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return tls.Client(conn, cfg), nil
	}}
	defer transport.CloseIdleConnections()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+at, nil)
	require.NoError(t, err)
	resp, err := transport.RoundTrip(r)
	if err != nil {
		return "", false, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return string(b), resp.Header.Get("Resumed") != "", err
}

func peer(t *testing.T, s *Source) *tls.Config {
	t.Helper()
	cfg, err := s.Peer()
	require.NoError(t, err)
	return cfg
}

func TestMutual(t *testing.T) {
	a, other := authority(t, "region"), authority(t, "another")
	_, server := issued(t, a, certs.Name{DNS: "server"})
	needs, takes := serve(t, server, true), serve(t, server, false)
	_, one := issued(t, a, certs.Name{URI: "spiffe://corp/host/1", DNS: "one"})
	_, two := issued(t, a, certs.Name{DNS: "two", Common: "two's"})
	_, three := issued(t, a, certs.Name{Common: "three"})
	for want, s := range map[string]*Source{"spiffe://corp/host/1": one, "two": two, "three": three} {
		for _, at := range []string{needs, takes} {
			who, _, err := ask(t, at, peer(t, s))
			require.NoError(t, err)
			require.Equal(t, want, who)
		}
	}
	_, resumed, err := ask(t, needs, peer(t, one))
	require.NoError(t, err)
	require.True(t, resumed, "a handshake costs more than a resumption")

	_, stranger := issued(t, other, certs.Name{DNS: "one"}, a, other)
	for _, at := range []string{needs, takes} {
		_, _, err := ask(t, at, peer(t, stranger))
		require.ErrorContains(t, err, "certificate", "a stranger's")
	}
	nobody := peer(t, one)
	nobody.GetClientCertificate = nil
	nobody.ClientSessionCache = nil
	_, _, err = ask(t, needs, nobody)
	require.ErrorContains(t, err, "certificate required")
	who, _, err := ask(t, takes, nobody)
	require.NoError(t, err)
	require.Contains(t, who, "nobody: it shows no certificate")

	old := peer(t, one)
	old.MaxVersion = tls.VersionTLS12
	old.MinVersion = tls.VersionTLS12
	_, _, err = ask(t, takes, old)
	require.ErrorContains(t, err, "protocol version")

	_, far := issued(t, other, certs.Name{DNS: "far"}, other)
	_, _, err = ask(t, needs, peer(t, far))
	require.ErrorContains(t, err, "not of the region", "who asks knows strangers as well")
}

// What a host tells a supernode it tells no other host.
func TestSupernodeIsOne(t *testing.T) {
	a := authority(t, "region")
	_, host := issued(t, a, certs.Name{DNS: "host"})
	asked := func(s *Source, name string) error {
		cfg, err := host.Supernode(name)
		require.NoError(t, err)
		_, _, err = ask(t, serve(t, s, false), cfg)
		return err
	}
	_, named := issued(t, a, certs.Name{DNS: "supernode.corp"})
	require.NoError(t, asked(named, "supernode.corp"))
	require.ErrorContains(t, asked(named, "10.0.0.1"), "no supernode's")
	_, marked := issued(t, a, certs.Name{URI: SupernodeURI})
	require.NoError(t, asked(marked, "10.0.0.1"))
	_, another := issued(t, a, certs.Name{DNS: "another", URI: "spiffe://corp/another"})
	require.ErrorContains(t, asked(another, "supernode.corp"), "no supernode's")
}

func TestReplaced(t *testing.T) {
	a, b := authority(t, "old"), authority(t, "new")
	serverDir, server := issued(t, a, certs.Name{DNS: "server"})
	clientDir, client := issued(t, a, certs.Name{DNS: "one"})
	at := serve(t, server, true)
	is := func(want string) {
		t.Helper()
		who, _, err := ask(t, at, peer(t, client))
		require.NoError(t, err)
		require.Equal(t, want, who)
	}
	is("one")
	require.NoError(t, a.Write(clientDir, certs.Name{DNS: "two"}, a))
	is("two")
	require.NoError(t, a.Write(serverDir, certs.Name{DNS: "server"}, a, b)) // both, first at who is asked
	require.NoError(t, a.Write(clientDir, certs.Name{DNS: "three"}, a, b))
	is("three")
	require.NoError(t, b.Write(clientDir, certs.Name{DNS: "four"}, a, b))
	is("four")
	require.NoError(t, b.Write(serverDir, certs.Name{DNS: "server"}, b))
	is("four")
	last := peer(t, client)
	require.NoError(t, a.Write(clientDir, certs.Name{DNS: "five"}, a, b))
	_, _, err := ask(t, at, peer(t, client))
	require.Error(t, err, "the old authority is gone")
	who, _, err := ask(t, at, last)
	require.NoError(t, err)
	require.Equal(t, "four", who)

	require.NoError(t, os.Remove(filepath.Join(clientDir, KeyFile))) // as between two writes
	require.NoError(t, b.Write(serverDir, certs.Name{DNS: "server"}, a, b))
	is("five")
	cert, key, err := b.Issue(certs.Name{DNS: "six"})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(clientDir, KeyFile), key, 0o600))
	is("five")
	require.NoError(t, os.WriteFile(filepath.Join(clientDir, CertFile), cert, 0o600))
	is("six")
}

// A session that goes on, goes on with who may still come alone.
func TestResumedIsJudgedAgain(t *testing.T) {
	a, b := authority(t, "old"), authority(t, "new")
	dir, server := issued(t, a, certs.Name{DNS: "server"})
	_, client := issued(t, a, certs.Name{DNS: "one"}, a, b)
	at := serve(t, server, true)
	cfg := peer(t, client)
	for range 2 {
		_, _, err := ask(t, at, cfg)
		require.NoError(t, err)
	}
	require.NoError(t, b.Write(dir, certs.Name{DNS: "server"}, b))
	_, _, err := ask(t, at, cfg)
	require.Error(t, err)
}

func TestFromDirSaysWhatIsWrong(t *testing.T) {
	a, b := authority(t, "region"), authority(t, "another")
	for says, break_ := range map[string]func(dir string) error{
		"no such file": func(dir string) error { return os.Remove(filepath.Join(dir, RootFile)) },
		"has expired at": func(dir string) error {
			return a.Write(dir, certs.Name{DNS: "x", Until: time.Now().Add(-time.Minute)}, a)
		},
		"not of an authority in ca.crt": func(dir string) error { return a.Write(dir, certs.Name{DNS: "x"}, b) },
		"holds no certificate":          func(dir string) error { return os.WriteFile(filepath.Join(dir, RootFile), []byte("x"), 0o600) },
		"tls.crt and tls.key":           func(dir string) error { return os.WriteFile(filepath.Join(dir, KeyFile), []byte("x"), 0o600) },
		"names nobody":                  func(dir string) error { return a.Write(dir, certs.Name{}, a) },
		"client and for server authenti": func(dir string) error {
			return a.Write(dir, certs.Name{DNS: "x", Usage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, a)
		},
	} {
		dir := t.TempDir()
		require.NoError(t, a.Write(dir, certs.Name{DNS: "x"}, a))
		require.NoError(t, break_(dir))
		_, err := FromDir(dir, zaptest.NewLogger(t))
		require.ErrorContains(t, err, says)
	}
}

func TestGuard(t *testing.T) {
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	sealed := func(g Guard, remote string) bool {
		r.RemoteAddr = remote
		who, sealed, err := g.Of(r)
		require.NoError(t, err)
		require.Empty(t, who)
		return sealed
	}
	require.False(t, sealed(Guard{}, "10.0.0.1:1"))
	require.True(t, sealed(Guard{ClearPrivate: true}, "10.0.0.1:1"))
	for _, at := range []string{"127.0.0.1:1", "127.8.0.1:1", "[::1]:1", "[::ffff:127.0.0.1]:1"} {
		require.True(t, sealed(Guard{}, at), at)
	}
	for _, at := range []string{"", "@", "pipe", "[fe80::1%eth0]:1", "[2001:db8::1]:9"} {
		require.False(t, sealed(Guard{}, at), at)
	}
	_, s := issued(t, authority(t, "region"), certs.Name{DNS: "x"})
	_, _, err := (Guard{Source: s}).Of(r)
	require.Error(t, err, "with TLS nobody comes without")
}

func TestExpiredSinceItConnected(t *testing.T) {
	cert := &x509.Certificate{DNSNames: []string{"x"}, NotAfter: time.Now().Add(-time.Second)}
	_, err := Of(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}})
	require.ErrorContains(t, err, "expired")
	cert.NotAfter = time.Now().Add(time.Hour)
	for _, name := range []string{"a b", "a\x00", "ä"} {
		cert.DNSNames[0] = name
		_, err := Of(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}})
		require.ErrorContains(t, err, "names nobody", name)
	}
}

// region is a supernode that hosts join.
func region(t *testing.T) (dir string, ca *CA, base string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "ca")
	ca, err := CreateCA(dir)
	require.NoError(t, err)
	s, err := ca.Source([]string{"localhost"}, zaptest.NewLogger(t))
	require.NoError(t, err)
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, ca)
	})}
	go func() { _ = srv.Serve(tls.NewListener(ln, s.Server(false))) }()
	t.Cleanup(func() { _ = srv.Close() })
	return dir, ca, "http://" + ln.Addr().String()
}

func TestJoin(t *testing.T) {
	dir, ca, base := region(t)
	info, err := os.Stat(filepath.Join(dir, caKeyFile))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode())
	token, err := ca.AddToken(time.Hour)
	require.NoError(t, err)
	kept, err := os.ReadFile(filepath.Join(dir, TokenFile))
	require.NoError(t, err)
	require.NotContains(t, string(kept), token.key()[13:])

	file, data := filepath.Join(t.TempDir(), "token"), filepath.Join(t.TempDir(), "identity")
	require.NoError(t, os.WriteFile(file, []byte(token.Text()+"\n"), 0o600))
	joined := func(data string) (*Source, *joiner) {
		s, err := FromToken(file, data, []string{base}, zaptest.NewLogger(t))
		require.NoError(t, err)
		j := &joiner{tokenFile: file, dir: data, supernodes: []string{Secure(base)}, log: zaptest.NewLogger(t)}
		require.NoError(t, j.loadKey())
		j.keep(token)
		return s, j
	}
	s, _ := joined(data)
	_, err = s.Peer()
	require.ErrorIs(t, err, ErrNone)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.Run(ctx) }()
	require.Eventually(t, func() bool { _, err := s.Peer(); return err == nil }, 10*time.Second, 10*time.Millisecond)
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
	for _, name := range []string{CertFile, KeyFile, RootFile} {
		info, err := os.Stat(filepath.Join(data, name))
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode())
	}

	again, j := joined(data) // it is there at once, and renewed by itself
	who, _, err := ask(t, serve(t, s, true), peer(t, again))
	require.NoError(t, err)
	require.Regexp(t, "^damselfly://host/[0-9a-f]{32}$", who)
	third, k := joined(filepath.Join(t.TempDir(), "another"))
	require.NoError(t, k.join(t.Context()))
	require.NotNil(t, third)
	m := k.got.Load()
	require.NotEqual(t, who, nameOf(m.cert.Leaf), "another key is another host")
	require.InDelta(t, Life, time.Until(m.cert.Leaf.NotAfter), float64(time.Minute))

	require.NoError(t, ca.writeTokens([]TokenInfo{{ID: token.ID, Hash: hashOf(token.secret), Expires: time.Now().Add(-time.Minute)}}))
	require.NoError(t, j.join(t.Context()), "who is in stays in")
	_, late := joined(filepath.Join(t.TempDir(), "late"))
	require.ErrorContains(t, late.join(t.Context()), "the join token has expired")
	require.NoError(t, ca.Revoke(token.ID))
	require.ErrorContains(t, j.join(t.Context()), "unknown or revoked")
	require.Error(t, ca.Revoke(token.ID))

	next, err := ca.AddToken(0)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file, []byte(next.Text()), 0o600))
	require.NoError(t, j.join(t.Context()), "the new token is read")
	require.Equal(t, []string{next.ID}, j.got.Load().cert.Leaf.Subject.OrganizationalUnit)
}

// A token's host tells its secret to nobody but a supernode of the token's authority.
func TestJoinIsPinned(t *testing.T) {
	_, _, base := region(t)
	_, other, _ := region(t)
	token, err := other.AddToken(0)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte(token.Text()), 0o600))
	_, ca, _ := region(t)
	host, err := ca.AddToken(0)
	require.NoError(t, err)
	j := &joiner{tokenFile: file, dir: t.TempDir(), supernodes: []string{Secure(base)}, log: zaptest.NewLogger(t)}
	require.NoError(t, j.loadKey())
	require.ErrorContains(t, j.join(t.Context()), "not a supernode of the join token's authority")
	require.NotEqual(t, host.ID, token.ID)

	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	j.supernodes = []string{Secure(plain.URL)}
	require.ErrorContains(t, j.join(t.Context()), "give the supernode --ca")
}

func TestParseToken(t *testing.T) {
	_, ca, _ := region(t)
	token, err := ca.AddToken(0)
	require.NoError(t, err)
	got, err := ParseToken(token.Text())
	require.NoError(t, err)
	require.Equal(t, token, got)
	require.NotContains(t, token.String(), token.Text()[20:30])
	for _, text := range []string{"", "x", token.Text() + "A", token.Text()[:60], "dfly1.zz.aa.bb"} {
		_, err := ParseToken(text)
		require.Error(t, err, text)
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add("dfly1.0102030405ff.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Fuzz(func(t *testing.T, text string) {
		if token, err := ParseToken(text); err == nil {
			again, err := ParseToken(token.Text())
			require.NoError(t, err)
			require.Equal(t, token, again)
		}
	})
}

// Whatever a host sends, it gets no certificate without a token, and with one
// none but a host's.
func FuzzJoin(f *testing.F) {
	ca, err := CreateCA(filepath.Join(f.TempDir(), "ca"))
	require.NoError(f, err)
	token, err := ca.AddToken(0)
	require.NoError(f, err)
	j := &joiner{dir: f.TempDir()}
	require.NoError(f, j.loadKey())
	csr, err := j.request("host")
	require.NoError(f, err)
	f.Add(csr, true)
	f.Add(csr, false)
	f.Fuzz(func(t *testing.T, csr []byte, entitled bool) {
		req := JoinRequest{CSR: csr, Token: token.ID + ".AAAA"}
		if entitled {
			req.Token = token.key()
		}
		a, err := ca.Join(req, nil)
		if err != nil {
			_, ok := errors.AsType[*Refused](err)
			require.True(t, ok, "%v", err)
			return
		}
		require.True(t, entitled)
		cert := parseCerts([]byte(a.Certificate))[0]
		require.Regexp(t, "^damselfly://host/[0-9a-f]{32}$", nameOf(cert))
		require.False(t, cert.IsCA)
		require.False(t, isSupernode(cert))
		require.Empty(t, cert.DNSNames)
		require.Len(t, cert.URIs, 1)
	})
}

// answer is a supernode's part in joining.
func answer(w http.ResponseWriter, r *http.Request, ca *CA) {
	var req JoinRequest
	if json.NewDecoder(r.Body).Decode(&req) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	a, err := ca.Join(req, r.TLS.PeerCertificates)
	if err != nil {
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(map[string]string{"message": err.Error()})
		return
	}
	_ = json.NewEncoder(w).Encode(a)
}
