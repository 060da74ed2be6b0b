package region_test

import (
	"cmp"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/docker/distribution/registry/client/auth/challenge"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/bcrypt"

	"damselfly.dev/registryproxy"
	"damselfly.dev/test/registry/token"
)

const user, password = "alice", "wonderland"

// pki is a certificate for loopback that vouches for itself, with its files.
type pki struct {
	key       *rsa.PrivateKey
	der       []byte
	cert, own string // files
	client    *http.Client
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "registry"}, NotAfter: time.Now().Add(time.Hour), NotBefore: time.Now().Add(-time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	p := &pki{key: key}
	p.der, err = x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	p.cert, p.own = filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	require.NoError(t, os.WriteFile(p.cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.der}), 0o600))
	require.NoError(t, os.WriteFile(p.own, pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), 0o600))
	leaf, err := x509.ParseCertificate(p.der)
	require.NoError(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	t.Cleanup(transport.CloseIdleConnections)
	p.client = &http.Client{Transport: transport}
	return p
}

// debian is Debian's docker-registry over TLS, which wants a login: by itself, or
// with tokens of a token server.
type debian struct {
	*pki
	address string
	tokens  *token.Server // nil where it wants a password
	realm   string        // of its challenge
	users   string        // the file with the passwords, where there are no tokens
	log     string        // its own, a file of JSON
}

// startDebian starts an empty registry on a loopback host.
func startDebian(t *testing.T, host string, bearer bool) *debian {
	t.Helper()
	program, err := exec.LookPath("docker-registry")
	if err == nil {
		var probe net.Listener
		if probe, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(host, "0")); err == nil {
			host = probe.Addr().String()
			err = probe.Close()
		}
	}
	switch {
	case err != nil && os.Getenv("CI") == "true":
		t.Fatal(err)
	case err != nil:
		t.Skip("skipped: ", err)
	}
	d := &debian{pki: newPKI(t), address: host}
	dir := t.TempDir()
	auth := ""
	if bearer {
		d.tokens = &token.Server{Issuer: "tests", Service: "registry.tests", Users: map[string]string{user: password}, Key: d.key, Chain: [][]byte{d.der}}
		s := httptest.NewUnstartedServer(d.tokens)
		require.NoError(t, s.Listener.Close())
		h, _, err := net.SplitHostPort(host)
		require.NoError(t, err)
		s.Listener, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(h, "0"))
		require.NoError(t, err)
		s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{d.der}, PrivateKey: d.key}}, MinVersion: tls.VersionTLS12}
		s.StartTLS()
		t.Cleanup(s.Close)
		d.realm = s.URL + "/token"
		auth = fmt.Sprintf("token: {realm: %q, service: registry.tests, issuer: tests, rootcertbundle: %q}", d.realm, d.cert)
	} else {
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
		require.NoError(t, err)
		d.users = filepath.Join(dir, "htpasswd")
		require.NoError(t, os.WriteFile(d.users, []byte(user+":"+string(hash)+"\n"), 0o600))
		d.realm = "tests"
		auth = fmt.Sprintf("htpasswd: {realm: tests, path: %q}", d.users)
	}
	config := filepath.Join(dir, "config.yml")
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
log: {level: info, formatter: json, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %q}}
http: {addr: %q, secret: of no use with one registry, tls: {certificate: %q, key: %q}}
validation: {manifests: {urls: {allow: ["^https://"]}}}
auth: {%s}
`, filepath.Join(dir, "data"), d.address, d.cert, d.own, auth), 0o600))
	cmd := exec.CommandContext(t.Context(), program, "serve", config)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	d.log = filepath.Join(dir, "log")
	log, err := os.Create(d.log)
	require.NoError(t, err)
	defer func() { _ = log.Close() }()
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	require.Eventually(t, func() bool {
		return ask(t, d.client, d.url()+"/v2/", "").status == http.StatusUnauthorized
	}, waitLimit, waitTick)
	return d
}

func (d *debian) url() string { return "https://" + d.address }

// push puts an image there, as a client that logs in.
func (d *debian) push(t *testing.T, repo string) {
	t.Helper()
	img, err := random.Image(200_000, 2)
	require.NoError(t, err)
	ref, err := name.ParseReference(d.address + "/" + repo + ":v1")
	require.NoError(t, err)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, d.realm+"?service=registry.tests&scope=repository:"+repo+":pull,push", nil)
	require.NoError(t, err)
	r.SetBasicAuth(user, password)
	authorization := r.Header.Get("Authorization")
	if d.tokens != nil {
		authorization = d.token(t, r.URL.String(), authorization)
	}
	require.NoError(t, remote.Write(ref, img, remote.WithTransport(as{d.client.Transport, authorization})))
}

// token gets a token, "" for none.
func (d *debian) token(t *testing.T, at, authorization string) string {
	t.Helper()
	a := ask(t, d.client, at, authorization)
	if a.status != http.StatusOK {
		return ""
	}
	var token struct{ Token string }
	require.NoError(t, json.Unmarshal(a.body, &token))
	return "Bearer " + token.Token
}

// as sends all requests with an Authorization.
type as struct {
	http.RoundTripper
	authorization string
}

func (a as) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", a.authorization)
	return a.RoundTripper.RoundTrip(r)
}

// said is an answer, status 0 where there is none.
type said struct {
	status int
	header http.Header
	body   []byte
}

// ask sends a GET with an Authorization, "" for none.
func ask(t *testing.T, c *http.Client, at, authorization string) said {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, at, nil)
	require.NoError(t, err)
	r.Header.Set("Accept", "*/*")
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	resp, err := c.Do(r)
	if err != nil {
		return said{}
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return said{}
	}
	return said{resp.StatusCode, resp.Header, b}
}

// engine pulls as containerd does: it asks without a login, and logs in where the
// challenge says.
type engine struct {
	d              *debian
	user, password string // "" for no login
	authorization  string // what it has come by
	registry       string // as it is named, "" for registryName
}

// get asks a mirror, and logs in when it has to.
func (e *engine) get(t *testing.T, at string) said {
	t.Helper()
	a := ask(t, http.DefaultClient, at, e.authorization)
	if a.status != http.StatusUnauthorized || e.authorization != "" {
		return a
	}
	resp := &http.Response{StatusCode: a.status, Header: a.header}
	for _, ch := range challenge.ResponseChallenges(resp) {
		require.Equal(t, e.d.realm, ch.Parameters["realm"], "the realm is the registry's own")
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, e.d.url(), nil)
		require.NoError(t, err)
		if e.user != "" {
			r.SetBasicAuth(e.user, e.password)
		}
		if ch.Scheme == "basic" {
			e.authorization = r.Header.Get("Authorization")
			break
		}
		q := url.Values{"service": {ch.Parameters["service"]}, "scope": {ch.Parameters["scope"]}}
		e.authorization = e.d.token(t, ch.Parameters["realm"]+"?"+q.Encode(), r.Header.Get("Authorization"))
	}
	if e.authorization == "" {
		return a
	}
	return ask(t, http.DefaultClient, at, e.authorization)
}

// pull returns the status of a pull through a host: of the first refusal, or 200.
func (e *engine) pull(t *testing.T, host *node, repo string) int {
	t.Helper()
	at := host.url() + "/v2/" + repo
	ns := "?ns=" + cmp.Or(e.registry, registryName)
	m := e.get(t, at+"/manifests/v1"+ns)
	if m.status != http.StatusOK {
		return m.status
	}
	require.Equal(t, digest.FromBytes(m.body).String(), m.header.Get("Docker-Content-Digest"))
	var manifest struct {
		Config struct{ Digest digest.Digest }
		Layers []struct{ Digest digest.Digest }
	}
	require.NoError(t, json.Unmarshal(m.body, &manifest))
	blobs := []digest.Digest{manifest.Config.Digest}
	for _, l := range manifest.Layers {
		blobs = append(blobs, l.Digest)
	}
	for _, d := range blobs {
		b := e.get(t, at+"/blobs/"+d.String()+ns)
		if b.status != http.StatusOK {
			return b.status
		}
		require.Equal(t, d, digest.FromBytes(b.body))
	}
	return http.StatusOK
}

// Who may pull from a registry that wants a login may pull through the region,
// and nobody else, also what the region has; unless the region reads for all.
func TestLogins(t *testing.T) {
	for name, row := range map[string]struct {
		host   string
		bearer bool
	}{
		"a password": {"127.0.0.1", false}, "a token": {"127.0.0.1", true}, "a token, on IPv6": {"::1", true},
	} {
		t.Run(name, func(t *testing.T) {
			d := startDebian(t, row.host, row.bearer)
			d.push(t, "org/app")
			if row.bearer {
				d.push(t, "public/app")
			}
			t.Run("of the caller", func(t *testing.T) {
				from := registryproxy.Upstream{Name: registryName, URL: d.url(), TLS: registryproxy.TLS{CA: d.cert}}
				d.pullAs(t, from, row.host, "org/app", [3]int{200, 401, 401})
				if row.bearer {
					d.pullAs(t, from, row.host, "public/app", [3]int{200, 200, 200})
				}
			})
			for secret, want := range map[string][3]int{password: {200, 200, 200}, "wrong": {200, 401, 401}} {
				t.Run("of the region, "+secret, func(t *testing.T) {
					file := filepath.Join(t.TempDir(), "password")
					require.NoError(t, os.WriteFile(file, []byte(secret+"\n"), 0o600))
					d.pullAs(t, registryproxy.Upstream{
						Name: registryName, URL: d.url(), TLS: registryproxy.TLS{CA: d.cert}, Readers: registryproxy.ReadersRegion,
						Credentials: registryproxy.Credentials{Username: user, PasswordFile: file},
					}, row.host, "org/app", want)
				})
			}
		})
	}
}

// pullAs pulls on a new region's two hosts, one after the other: with the right
// password, with a wrong one, and without any; all on the first host, then all on
// the other.
func (d *debian) pullAs(t *testing.T, from registryproxy.Upstream, host, repo string, want [3]int) {
	t.Helper()
	cfg := reachable(registryproxy.Config{Upstreams: []registryproxy.Upstream{from}})
	centre := startSupernodeFor(t, cfg, t.TempDir(), net.JoinHostPort(host, "0"))
	logins := [3]engine{{d: d, user: user, password: password}, {d: d, user: user, password: "wrong"}, {d: d}}
	for range 2 {
		h := startHostFor(t, cfg, centre, nil)
		for i, e := range logins {
			require.Equal(t, want[i], e.pull(t, h, repo), "login %d through %s", i, repo)
		}
		if want[2] == http.StatusUnauthorized { // the registry's own words
			path := "/v2/" + repo + "/manifests/v1"
			direct, relayed := ask(t, d.client, d.url()+path, ""), ask(t, http.DefaultClient, h.url()+path+"?ns="+registryName, "")
			require.Equal(t, direct.header["Www-Authenticate"], relayed.header["Www-Authenticate"])
			require.JSONEq(t, string(direct.body), string(relayed.body))
		}
	}
	total, unique := centre.value(t, "damselfly_origin_bytes_total", ""), centre.value(t, "damselfly_unique_bytes_total", "")
	require.Positive(t, unique)
	require.InDelta(t, unique, total, 0, "the registry is asked once")
}
