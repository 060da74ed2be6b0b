//go:build linux

package engines

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
	"golang.org/x/crypto/bcrypt"

	"damselfly.dev/test/image"
	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
	"damselfly.dev/test/registry/token"
)

const (
	user, password = "alice", "wonderland"

	// regionName is the registry, too, where the region reads it for all.
	regionName = "region.demo"

	storePort = 15003
	tokenPort = 15004
)

// A site is a region of one host, with a registry of one kind, on which all
// engines pull, each what is its own.
type site struct {
	lab       *lab.Lab
	host      *lab.Host // the engines'
	supernode *programs.Supernode
	daemon    *programs.Daemon
	registry  origin
	mirror    string // as images' names have it
	private   bool   // the registry wants a login
	hosts     string // for /etc/hosts, "" for this machine's
	authFile  string // logins at the mirror, as docker keeps them
}

// An origin is a registry as a test knows it.
type origin struct {
	url      string
	ca       string // a file, "" for none
	client   http.RoundTripper
	requests func() ([]programs.Request, error)
}

// address is where the registry is, as host and port.
func (o origin) address() string {
	_, at, _ := strings.Cut(o.url, "://")
	at, _, _ = strings.Cut(at, "/")
	return at
}

// registryKinds start a registry on the host of that name. Beside it there is a
// host for a store.
var registryKinds = map[string]func(ctx context.Context, l *lab.Lab, bin string) (origin, error){
	"public": debian(nil),
	"basic": debian(func(h *lab.Host, c *programs.RegistryConfig) error {
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
		if err != nil {
			return err
		}
		file := filepath.Join(h.Dir(), "htpasswd")
		c.Auth = fmt.Sprintf("htpasswd: {realm: tests, path: %q}", file)
		return os.WriteFile(file, []byte(user+":"+string(hash)+"\n"), 0o600)
	}),
	"bearer": withTokens,
	"TLS": debian(func(h *lab.Host, c *programs.RegistryConfig) error {
		p, err := newPKI(h)
		c.Cert, c.Key = p.cert, p.own
		return err
	}),
	"prefix": debian(func(_ *lab.Host, c *programs.RegistryConfig) error {
		c.Prefix = "/hub/of/many"
		return nil
	}),
	"redirect": redirecting,
}

// pki is a certificate of a host that vouches for itself, with its files.
type pki struct {
	key       *rsa.PrivateKey
	der       []byte
	cert, own string
}

func newPKI(h *lab.Host) (p pki, err error) {
	if p.key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		return p, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "registry"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{h.IP().AsSlice()}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	if p.der, err = x509.CreateCertificate(rand.Reader, template, template, p.key.Public(), p.key); err != nil {
		return p, err
	}
	p.cert, p.own = filepath.Join(h.Dir(), "cert.pem"), filepath.Join(h.Dir(), "key.pem")
	return p, errors.Join(
		os.WriteFile(p.cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.der}), 0o600),
		os.WriteFile(p.own, pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(p.key)}), 0o600),
	)
}

// debian starts Debian's registry, with what edit changes.
func debian(edit func(*lab.Host, *programs.RegistryConfig) error) func(context.Context, *lab.Lab, string) (origin, error) {
	return func(ctx context.Context, l *lab.Lab, bin string) (o origin, err error) {
		var c programs.RegistryConfig
		h := l.Host("registry")
		if edit != nil {
			if err := edit(h, &c); err != nil {
				return o, err
			}
		}
		r, err := c.Start(ctx, h, bin)
		if err != nil {
			return o, err
		}
		transport := &http.Transport{DialContext: h.Dial}
		if c.Cert != "" {
			text, err := os.ReadFile(c.Cert)
			if err != nil {
				return o, err
			}
			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM(text)
			transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
		}
		return origin{url: r.URL(), ca: c.Cert, client: below{transport, c.Prefix}, requests: r.Requests}, nil
	}
}

// below asks for all paths below a prefix.
type below struct {
	http.RoundTripper
	prefix string
}

func (b below) RoundTrip(r *http.Request) (*http.Response, error) {
	if b.prefix != "" && !strings.HasPrefix(r.URL.Path, b.prefix) {
		r = r.Clone(r.Context())
		r.URL.Path = b.prefix + r.URL.Path
	}
	return b.RoundTripper.RoundTrip(r)
}

// withTokens starts one that wants tokens of a token server beside it.
func withTokens(ctx context.Context, l *lab.Lab, bin string) (origin, error) {
	const service = "registry.tests"
	h := l.Host("registry")
	p, err := newPKI(h)
	if err != nil {
		return origin{}, err
	}
	tokens := &token.Server{Issuer: "tests", Service: service, Users: map[string]string{user: password}, Key: p.key, Chain: [][]byte{p.der}}
	at, err := answer(h, tokenPort, tokens)
	if err != nil {
		return origin{}, err
	}
	o, err := debian(func(_ *lab.Host, c *programs.RegistryConfig) error {
		c.Auth = fmt.Sprintf("token: {realm: %q, service: %s, issuer: tests, rootcertbundle: %q}", at+"/token", service, p.cert)
		return nil
	})(ctx, l, bin)
	o.client = withToken{o.client, tokens}
	return o, err
}

// withToken sends each request with a token for its repository.
type withToken struct {
	http.RoundTripper
	tokens *token.Server
}

func (w withToken) RoundTrip(r *http.Request) (*http.Response, error) {
	repo := strings.TrimPrefix(r.URL.Path, "/v2/")
	for _, end := range []string{"/blobs/", "/manifests/"} {
		repo, _, _ = strings.Cut(repo, end)
	}
	scope := url.Values{"service": {w.tokens.Service}, "scope": {"repository:" + repo + ":pull,push"}}
	ask := httptest.NewRequestWithContext(r.Context(), http.MethodGet, "/token?"+scope.Encode(), nil)
	ask.SetBasicAuth(user, password)
	said := httptest.NewRecorder()
	w.tokens.ServeHTTP(said, ask)
	var answer struct{ Token string }
	if err := json.Unmarshal(said.Body.Bytes(), &answer); err != nil {
		return nil, err
	}
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+answer.Token)
	return w.RoundTripper.RoundTrip(r)
}

// answer serves HTTP on a host until the process ends, and returns where.
func answer(h *lab.Host, port uint16, handler http.Handler) (string, error) {
	at := netip.AddrPortFrom(h.IP(), port).String()
	listener, err := h.Listen(context.Background(), "tcp", at)
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(os.Stderr, "", 0)}
	go func() { _ = server.Serve(listener) }()
	return "http://" + at, nil
}

// redirecting starts a registry with all of the distribution specification,
// whose blobs are in a store on another host: that wants a signed URL, and
// refuses credentials.
func redirecting(_ context.Context, l *lab.Lab, _ string) (o origin, err error) {
	const signature = "X-Amz-Signature=0123456789"
	yes := true
	cfg := config.Config{Storage: config.ConfigStorage{StoreType: config.StoreMem}}
	cfg.API.Referrer.Enabled = &yes
	inner := olareg.New(cfg)
	notes := new(notebook)
	store, err := answer(l.Host("store"), storePort, notes.of(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != signature || r.Header.Get("Authorization") != "" {
			http.Error(w, "<Error><Code>AccessDenied</Code></Error>", http.StatusForbidden)
			return
		}
		inner.ServeHTTP(w, r)
	})))
	if err != nil {
		return o, err
	}
	at, err := answer(l.Host("registry"), storePort, notes.of(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, store+r.URL.Path+"?"+signature, http.StatusTemporaryRedirect)
			return
		}
		inner.ServeHTTP(w, r)
	})))
	return origin{url: at, client: &http.Transport{DialContext: l.Host("registry").Dial}, requests: notes.all}, err
}

// A notebook has what servers were asked.
type notebook struct {
	mu       sync.Mutex
	requests []programs.Request
}

func (n *notebook) all() ([]programs.Request, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]programs.Request{}, n.requests...), nil
}

// of notes what a handler answers.
func (n *notebook) of(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		noted := &noted{ResponseWriter: w, status: http.StatusOK}
		handler.ServeHTTP(noted, r)
		from, _ := netip.ParseAddrPort(r.RemoteAddr)
		n.mu.Lock()
		defer n.mu.Unlock()
		n.requests = append(n.requests, programs.Request{
			Client: from.Addr().Unmap(), Method: r.Method, Path: r.URL.Path, Status: noted.status, Bytes: noted.bytes,
		})
	})
}

// noted is an answer of which it is known what it was.
type noted struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (n *noted) WriteHeader(status int) {
	n.status = status
	n.ResponseWriter.WriteHeader(status)
}

func (n *noted) Write(p []byte) (int, error) {
	written, err := n.ResponseWriter.Write(p)
	n.bytes += int64(written)
	return written, err
}

// startSite starts a region with a registry of that kind, on IPv6 alone if so.
func startSite(ctx context.Context, t *testing.T, bin, kind string, ipv6 bool) *site {
	t.Helper()
	l, err := lab.New(ctx, lab.Config{IPv6: ipv6, Hosts: []lab.HostConfig{
		{Name: "registry"}, {Name: "store"}, {Name: "supernode"}, {Name: "host"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &site{lab: l, host: l.Host("host"), private: kind == "basic" || kind == "bearer"}
	if s.registry, err = registryKinds[kind](ctx, l, bin); err != nil {
		t.Fatal(err)
	}
	flag, err := s.registries()
	if err != nil {
		t.Fatal(err)
	}
	centre, daemon := []string{flag}, []string{flag}
	if s.private { // what is private goes to no host in clear
		ca, token, err := programs.Secured(ctx, bin, filepath.Join(l.Dir(), "ca"))
		if err != nil {
			t.Fatal(err)
		}
		centre, daemon = append(centre, ca), append(daemon, token)
	}
	if s.supernode, err = programs.StartSupernode(ctx, l.Host("supernode"), bin, nil, centre...); err != nil {
		t.Fatal(err)
	}
	if s.daemon, err = programs.StartDaemon(ctx, s.host, bin, s.supernode.URL(), nil, daemon...); err != nil {
		t.Fatal(err)
	}
	s.mirror = strings.TrimPrefix(s.daemon.Mirror(), "http://")
	if ipv6 { // as dfdaemon setup writes it
		s.mirror = "ip6-localhost" + strings.TrimPrefix(s.mirror, "[::1]")
		s.hosts = filepath.Join(s.host.Dir(), "hosts")
		err = os.WriteFile(s.hosts, []byte(ip6Hosts), 0o644)
	}
	if s.private {
		s.authFile = filepath.Join(s.host.Dir(), "auth", "config.json")
		login := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
		err = errors.Join(os.Mkdir(filepath.Dir(s.authFile), 0o700),
			os.WriteFile(s.authFile, fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, s.mirror, login), 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// registries is the setting of both daemons: the registry by its name, and by
// those for whose engines the region logs in.
func (s *site) registries() (flag string, err error) {
	at := fmt.Sprintf("url: %q", s.registry.url)
	if s.registry.ca != "" {
		at += fmt.Sprintf(", ca: %q", s.registry.ca)
	}
	region := at
	if s.private {
		file := filepath.Join(s.lab.Dir(), "password")
		region += fmt.Sprintf(", readers: region, credentials: {username: %s, password-file: %q}", user, file)
		err = os.WriteFile(file, []byte(password), 0o600)
	}
	return fmt.Sprintf("--registries=[{name: %s, %s}, {name: %q, %s}, {name: %s, %s}, {name: docker.io, %s}]",
		programs.RegistryName, at, s.registry.address(), at, regionName, region, region), err
}

// push puts a sample into a repository of the registry.
func (s *site) push(ctx context.Context, repo string, sample image.Sample) error {
	var opts []name.Option
	if s.registry.ca == "" {
		opts = append(opts, name.Insecure)
	}
	login := authn.Anonymous
	if s.private { // where tokens are wanted, they are sent in its place
		login = &authn.Basic{Username: user, Password: password}
	}
	return sample.Push(ctx, s.registry.address()+"/"+repo, login, s.registry.client, opts...)
}

// sent tells what bytes of a repository's contents the registry has sent, and who asked.
func (s *site) sent(repo string) (sum int64, by map[netip.Addr]bool, err error) {
	requests, err := s.registry.requests()
	by = map[netip.Addr]bool{}
	for _, q := range requests {
		if q.Content() && strings.Contains(q.Path, "/v2/"+repo+"/") {
			sum += q.Bytes
			by[q.Client] = true
		}
	}
	return sum, by, err
}
