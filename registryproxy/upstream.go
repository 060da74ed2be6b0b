package registryproxy

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
)

const (
	mirrorHeaderTimeout = hurry // a mirror is not waited for as long
	defaultRetries      = 1
	maxRetries          = 5
	maxUnnamed          = 1024 // registries that the configuration does not name
)

// upstream is a registry with its mirrors.
type upstream struct {
	endpoints []*endpoint // the mirrors in order, last the registry itself
	shared    bool        // who has no credentials reads with configured ones
	barred    error       // why it is not asked

	away time.Duration // for how long a reader stays one while it cannot be asked
}

// endpoint is a host that is asked for a registry's contents.
type endpoint struct {
	name      string // for logs: a host, with its port where it has one
	base      *url.URL
	mirror    bool
	callers   bool              // callers' own credentials may be sent
	own       http.RoundTripper // to base's host
	others    http.RoundTripper // to those it redirects to: without its client certificate
	logins    *logins
	tokens    *tokens
	breaker   *gobreaker.CircuitBreaker[*answer]
	down      atomic.Bool   // the log says so
	header    time.Duration // until an answer's header
	retries   int
	unhealthy *memo[string, struct{}] // paths of which it has given damaged bytes
}

// transportTo is what a request to u goes by.
func (e *endpoint) transportTo(u *url.URL) http.RoundTripper {
	if u.Scheme == e.base.Scheme && strings.EqualFold(u.Host, e.base.Host) {
		return e.own
	}
	return e.others
}

// upstreams are the registries: those of the configuration, and others as they
// are asked for.
type upstreams struct {
	reach *reach
	// The transports for whom nothing special is said: near is for what is trusted
	// to lead into private networks, and reaches whom the configuration names.
	near, far *http.Transport
	named     map[string]*upstream

	mu      sync.Mutex // guards unnamed
	unnamed map[string]*upstream
}

func newUpstreams(cfg Config) (*upstreams, error) {
	r := newReach(cfg)
	s := &upstreams{
		reach: r, near: newTransport(r, true, dialTimeout), far: newTransport(r, false, dialTimeout),
		named: map[string]*upstream{}, unnamed: map[string]*upstream{},
	}
	for _, u := range cfg.Upstreams {
		name, _ := canonicalRegistry(u.Name) // Validate has seen it
		up, err := s.build(name, u, s.near)
		if err != nil {
			return nil, fmt.Errorf("registry %q: %w", u.Name, err)
		}
		s.named[name] = up
	}
	return s, nil
}

// get returns a registry by its canonical name.
func (s *upstreams) get(registry string) *upstream {
	if u, ok := s.named[registry]; ok {
		return u
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if u, ok := s.unnamed[registry]; ok {
		return u
	}
	for old := range s.unnamed { // any: what is forgotten is a token and a breaker's state
		if len(s.unnamed) < maxUnnamed {
			break
		}
		delete(s.unnamed, old)
	}
	transport := s.far
	near, barred := s.reach.name((&url.URL{Host: registry}).Hostname(), registryHost(registry))
	if near {
		transport = s.near
	}
	u, _ := s.build(registry, Upstream{Name: registry}, transport) // it has no file that could fail
	u.barred = barred
	s.unnamed[registry] = u
	return u
}

func (s *upstreams) build(name string, u Upstream, t *http.Transport) (*upstream, error) {
	up := &upstream{shared: u.Readers == ReadersRegion, away: u.ReadersWhenAway}
	for i, m := range u.Mirrors {
		e, err := s.endpoint(u, m, "", t)
		if err != nil {
			return nil, fmt.Errorf("mirrors[%d].%w", i, err)
		}
		e.mirror, e.retries = true, 0 // the next one is asked instead
		e.header = cmp.Or(u.HeaderTimeout, mirrorHeaderTimeout)
		e.breaker = newBreaker(mirrorFailures, mirrorPause)
		up.endpoints = append(up.endpoints, e)
	}
	m := Mirror{URL: u.URL, TLS: u.TLS, Credentials: u.Credentials, CallerCredentials: true}
	if m.URL == "" {
		m.URL = "https://" + registryHost(name)
	}
	e, err := s.endpoint(u, m, name, t)
	if err != nil {
		return nil, err
	}
	e.header = cmp.Or(u.HeaderTimeout, headerTimeout)
	e.breaker = newBreaker(registryFailures, registryPause)
	up.endpoints = append(up.endpoints, e)
	return up, nil
}

// registryHost is where a registry is when nobody says otherwise.
func registryHost(name string) string {
	if name == "docker.io" {
		return "registry-1.docker.io"
	}
	return name
}

// endpoint makes what is the same for a registry and a mirror. Its credentials are
// those of the name, or with "" of the host that is asked.
func (s *upstreams) endpoint(u Upstream, m Mirror, name string, t *http.Transport) (*endpoint, error) {
	base, err := parseBase(m.URL)
	if err != nil {
		return nil, fmt.Errorf("url: %w", err)
	}
	e := &endpoint{
		name: hostPort(base), base: base, callers: m.CallerCredentials, own: t, others: t,
		tokens: newTokens(), retries: defaultRetries, unhealthy: newMemo[string, struct{}](maxUnhealthy, time.Now),
	}
	if e.logins, err = newLogins(cmp.Or(name, e.name), m.Credentials); err != nil {
		return nil, fmt.Errorf("credentials.%w", err)
	}
	if u.Retries != nil {
		e.retries = *u.Retries
	}
	if m.TLS == (TLS{}) && u.ConnectTimeout == 0 {
		return e, nil
	}
	own := newTransport(s.reach, true, cmp.Or(u.ConnectTimeout, dialTimeout))
	if own.TLSClientConfig, err = m.TLS.config(); err != nil {
		return nil, err
	}
	e.own, e.others = own, own
	if own.TLSClientConfig.GetClientCertificate != nil {
		others := own.Clone()
		others.TLSClientConfig.GetClientCertificate = nil
		e.others = others
	}
	return e, nil
}

// config reads the files of t.
func (t TLS) config() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.CA != "" {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		pem, err := readFile(t.CA)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca: %s holds no certificate: it must be in PEM, with BEGIN CERTIFICATE", t.CA)
		}
		cfg.RootCAs = pool
	}
	if t.ClientCert == "" {
		return cfg, nil
	}
	pair, err := OpenFile(t.ClientCert, func(cert []byte) (*tls.Certificate, error) {
		key, err := readFile(t.ClientKey)
		if err != nil {
			return nil, err
		}
		c, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, errors.New("they are not a certificate and its key, both in PEM")
		}
		return &c, nil
	})
	if err != nil {
		return nil, fmt.Errorf("client-cert and client-key: %w", err)
	}
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		c, err := pair.Get()
		if c != nil {
			return c, nil // that of before, where the new one cannot be read
		}
		return nil, err
	}
	return cfg, nil
}

// Reaches tells whether the registry that u names is asked as safely as by u
// itself: over plain HTTP only where both say so.
func (c *Client) Reaches(u *url.URL) bool {
	name, ok := canonicalRegistry(u.Host)
	if !ok {
		return false
	}
	up := c.named[name]
	if up == nil {
		return u.Scheme == "https"
	}
	return up.endpoints[len(up.endpoints)-1].base.Scheme == "https" || u.Scheme == "http"
}
