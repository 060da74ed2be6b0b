// Package identity is who a supernode or a host is to the others of its region:
// its certificate, the authorities it trusts, and how both come and are renewed.
package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

// SupernodeURI is the name (URI SAN) of a certificate that is a supernode's
// wherever it is found. One without it is a supernode's only where its names
// are those of the address that is asked.
const SupernodeURI = "damselfly://supernode"

// maxName bounds an identity, in bytes.
const maxName = 256

// ErrNone is why nothing connects before the first certificate has come; why it
// does not come the Source says itself.
var ErrNone = errors.New("no certificate of the region yet")

var errShown = errors.New("it shows no certificate")

// Source has the certificate and the authorities of the moment. All connections
// made from it are of TLS 1.3 at least.
type Source struct {
	// load returns what is there now, old (nil at first) where nothing is new.
	load  func(old *material) (*material, error)
	renew func(ctx context.Context) // of Run; nil for nothing to do
	log   *zap.Logger

	mu   sync.Mutex // guards what follows
	now  *material
	last string // the last error of load, logged once
}

// material is what connections are made with. It does not change.
type material struct {
	cert     *tls.Certificate // with its Leaf
	pool     *x509.CertPool
	version  any                    // of what load has read
	sessions tls.ClientSessionCache // none outlives the certificate it began with
}

func newMaterial(cert *tls.Certificate, pool *x509.CertPool) *material {
	return &material{cert: cert, pool: pool, sessions: tls.NewLRUClientSessionCache(256)}
}

// newSource returns one that has what load gives now, if anything.
func newSource(log *zap.Logger, load func(*material) (*material, error)) (*Source, error) {
	s := &Source{load: load, log: log}
	m, err := load(nil)
	s.now = m
	return s, err
}

// Run renews what has to be, until ctx ends.
func (s *Source) Run(ctx context.Context) error {
	if s.renew != nil {
		s.renew(ctx)
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// current returns what is there now. What cannot be read, as half of two files
// that are being replaced, leaves what was there before.
func (s *Source) current() (*material, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.load(s.now)
	switch {
	case err != nil && err.Error() != s.last:
		s.log.Warn("the certificate cannot be taken up, the one before stays", zap.Error(err))
		s.last = err.Error()
	case err == nil && m != s.now:
		s.now, s.last = m, ""
		s.log.Info("certificate taken up", zap.String("identity", nameOf(m.cert.Leaf)), zap.Time("until", m.cert.Leaf.NotAfter))
	}
	if s.now == nil {
		return nil, ErrNone
	}
	return s.now, nil
}

// Server returns the configuration of a listener: who shows a certificate shows
// one of the region, and with need nobody comes without.
func (s *Source) Server(need bool) *tls.Config {
	auth := tls.VerifyClientCertIfGiven
	if need {
		auth = tls.RequireAndVerifyClientCert
	}
	base := func() *tls.Config {
		return &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}, DynamicRecordSizingDisabled: true}
	}
	cfg := base()
	cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		m, err := s.current()
		if err != nil {
			return nil, err
		}
		c := base()
		c.Certificates, c.ClientCAs, c.ClientAuth = []tls.Certificate{*m.cert}, m.pool, auth
		c.VerifyConnection = func(cs tls.ConnectionState) error { // also where a session goes on
			if len(cs.PeerCertificates) == 0 {
				return nil // ClientAuth has decided
			}
			_, err := m.verify(cs, x509.ExtKeyUsageClientAuth)
			return err
		}
		return c, nil
	}
	return cfg
}

// Peer returns the configuration for connections to other hosts of the region:
// any of them will do, as what it sends is checked, and a ticket of another's is
// of no use to it.
func (s *Source) Peer() (*tls.Config, error) {
	m, err := s.current()
	if err != nil {
		return nil, err
	}
	return m.client("", func(cs tls.ConnectionState) error {
		_, err := m.verify(cs, x509.ExtKeyUsageServerAuth)
		return err
	}), nil
}

// Supernode returns the configuration for connections to the supernode at host,
// a name or an IP address.
func (s *Source) Supernode(host string) (*tls.Config, error) {
	m, err := s.current()
	if err != nil {
		return nil, err
	}
	return m.client(host, func(cs tls.ConnectionState) error {
		leaf, err := m.verify(cs, x509.ExtKeyUsageServerAuth)
		if err == nil && !isSupernode(leaf) && leaf.VerifyHostname(host) != nil {
			err = fmt.Errorf("the certificate at %s is one of the region's, but no supernode's: it needs that name or the URI %s", host, SupernodeURI)
		}
		return err
	}), nil
}

// DialSupernode returns what http.Transport takes as DialTLSContext.
func (s *Source) DialSupernode(dial func(ctx context.Context, network, addr string) (net.Conn, error)) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		cfg, err := s.Supernode(host)
		if err != nil {
			return nil, err
		}
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		secure := tls.Client(conn, cfg)
		if err := secure.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			return nil, err
		}
		return secure, nil
	}
}

// client returns a configuration of which check judges the other end.
func (m *material) client(name string, check func(tls.ConnectionState) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: name, NextProtos: []string{"http/1.1"},
		InsecureSkipVerify:          true, //nolint:gosec // VerifyConnection does
		VerifyConnection:            check,
		ClientSessionCache:          m.sessions,
		DynamicRecordSizingDisabled: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return m.cert, nil // also to who might not know its authority, and then says so
		},
	}
}

// verify returns the certificate of the other end, when an authority of now
// vouches for it.
func (m *material) verify(cs tls.ConnectionState, usage x509.ExtKeyUsage) (*x509.Certificate, error) {
	if len(cs.PeerCertificates) == 0 {
		return nil, errShown
	}
	between := x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		between.AddCert(c)
	}
	leaf := cs.PeerCertificates[0]
	_, err := leaf.Verify(x509.VerifyOptions{Roots: m.pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}})
	if err != nil {
		return nil, fmt.Errorf("a certificate that is not of the region: %w", err)
	}
	return leaf, nil
}

func isSupernode(c *x509.Certificate) bool {
	return slices.ContainsFunc(c.URIs, func(u *url.URL) bool { return u.String() == SupernodeURI })
}

// Of returns who the other end of a connection is, and has been found to be
// when it began: the first URI of its certificate, else the first DNS name,
// else the common name. It is an error where there is none, or no longer.
func Of(cs *tls.ConnectionState) (string, error) {
	if cs == nil || len(cs.PeerCertificates) == 0 {
		return "", errShown
	}
	leaf := cs.PeerCertificates[0]
	if time.Now().After(leaf.NotAfter) {
		return "", errors.New("its certificate has expired since it connected")
	}
	name := nameOf(leaf)
	if name == "" || len(name) > maxName || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("its certificate names nobody: want a URI, a DNS name or a common name of at most %d visible ASCII characters", maxName)
	}
	return name, nil
}

func nameOf(c *x509.Certificate) string {
	switch {
	case len(c.URIs) > 0:
		return c.URIs[0].String()
	case len(c.DNSNames) > 0:
		return c.DNSNames[0]
	}
	return c.Subject.CommonName
}
