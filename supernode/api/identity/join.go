package identity

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

const (
	// JoinPath is where a supernode with a CA takes a JoinRequest by POST.
	JoinPath = "/v1/join"
	// MaxJoin bounds a JoinRequest, in bytes.
	MaxJoin = 8 << 10

	maxAnswer   = 256 << 10
	joinTimeout = 10 * time.Second
	minPause    = 200 * time.Millisecond // after a failed attempt
	maxPause    = time.Minute
)

// JoinRequest asks for a certificate. Token is a secret.
type JoinRequest struct {
	Token string `json:"token,omitempty"` // ID.SECRET
	CSR   []byte `json:"csr"`             // for a key of the host's own
}

// JoinAnswer is what a host that joins gets, in PEM.
type JoinAnswer struct {
	Certificate string `json:"certificate"`
	Roots       string `json:"roots"`
}

// joiner gets a host's certificate, and keeps it with its key in dir.
type joiner struct {
	tokenFile   string
	dir         string
	supernodes  []string // base URLs, with https
	key         *ecdsa.PrivateKey
	log         *zap.Logger
	got         atomic.Pointer[material]
	lastWarning string
}

// FromToken returns the identity that a host gets from a supernode for a join
// token. Its key is the host's own and stays in dir, with the certificate; Run
// gets that and renews it.
func FromToken(tokenFile, dir string, supernodes []string, log *zap.Logger) (*Source, error) {
	j := &joiner{tokenFile: tokenFile, dir: dir, log: log}
	for _, base := range supernodes {
		j.supernodes = append(j.supernodes, Secure(base))
	}
	token, err := j.token()
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(tokenFile); err == nil && info.Mode().Perm()&0o007 != 0 {
		log.Warn("everybody on this host may have the join token: chmod o= it", zap.String("file", tokenFile))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make a directory for the certificate: %w", err)
	}
	if err := j.loadKey(); err != nil {
		return nil, err
	}
	j.keep(token)
	s, err := newSource(log, func(*material) (*material, error) { return j.got.Load(), nil })
	if err != nil {
		return nil, err
	}
	s.renew = func(ctx context.Context) { j.run(ctx, s) }
	return s, nil
}

// ForHost returns what a host shows to its region: what is in dir, or what it gets
// for a join token and keeps in keep, or nil where neither is named.
func ForHost(dir, tokenFile, keep string, supernodes []string, log *zap.Logger) (*Source, error) {
	switch {
	case dir != "" && tokenFile != "":
		return nil, errors.New("tls and join-token exclude each other: a certificate of your own authority, or one that the supernode gives")
	case dir != "":
		return FromDir(dir, log)
	case tokenFile != "":
		return FromToken(tokenFile, keep, supernodes, log)
	}
	return nil, nil
}

func (j *joiner) token() (Token, error) {
	text, err := readFile(j.tokenFile)
	if err != nil {
		return Token{}, fmt.Errorf("join token: %w", err)
	}
	t, err := ParseToken(string(text))
	if err != nil {
		return Token{}, fmt.Errorf("%s: %w", j.tokenFile, err)
	}
	return t, nil
}

// loadKey reads the host's key, or makes one.
func (j *joiner) loadKey() error {
	path := filepath.Join(j.dir, KeyFile)
	text, err := readFile(path)
	if err == nil {
		j.key, err = parseKey(text)
		if err == nil {
			return nil
		}
		j.log.Warn("damaged key of the host replaced", zap.String("file", path))
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if j.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	if text, err = keyPEM(j.key); err != nil {
		return err
	}
	return replace(path, text, 0o600)
}

// keep takes up the certificate of an earlier process, if it is good still and of
// the token's authority.
func (j *joiner) keep(t Token) {
	cert, err1 := readFile(filepath.Join(j.dir, CertFile))
	roots, err2 := readFile(filepath.Join(j.dir, RootFile))
	if errors.Join(err1, err2) != nil {
		return
	}
	if m, err := j.parse(t, cert, roots); err == nil {
		j.got.Store(m)
	}
}

// parse reads what a supernode has given for a token.
func (j *joiner) parse(t Token, cert, roots []byte) (*material, error) {
	key, err := keyPEM(j.key)
	if err != nil {
		return nil, err
	}
	m, err := parse(cert, key, roots)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(parseCerts(roots), t.vouches) {
		return nil, errors.New("it is not of the join token's authority")
	}
	return m, nil
}

// vouches tells whether a token was made by the authority c.
func (t Token) vouches(c *x509.Certificate) bool {
	return c.IsCA && sha256.Sum256(c.RawSubjectPublicKeyInfo) == t.root
}

// run gets and renews the certificate.
func (j *joiner) run(ctx context.Context, s *Source) {
	pause := minPause
	for {
		wait := time.Duration(0)
		if m := j.got.Load(); m != nil {
			wait = time.Until(m.cert.Leaf.NotAfter) - Life/3
		}
		if wait <= 0 {
			err := j.join(ctx)
			switch {
			case ctx.Err() != nil:
				return
			case err == nil:
				j.lastWarning, pause = "", minPause
				_, _ = s.current() // it says so
				continue
			case err.Error() != j.lastWarning: // not for every attempt
				j.log.Warn("no certificate for the join token", zap.Error(err))
				j.lastWarning = err.Error()
			}
			wait = pause
			pause = min(2*pause, maxPause)
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// join asks one supernode after the other.
func (j *joiner) join(ctx context.Context) error {
	token, err := j.token() // it may be a new one
	if err != nil {
		return err
	}
	err = errors.New("no supernode is named")
	for _, base := range j.supernodes {
		var m *material
		if m, err = j.ask(ctx, token, base); err == nil {
			j.got.Store(m)
			return nil
		}
		err = fmt.Errorf("join at %s: %w", base, err)
	}
	return err
}

// ask has a supernode sign, and keeps what it gives.
func (j *joiner) ask(ctx context.Context, token Token, base string) (*material, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	name, _ := os.Hostname() // for people
	csr, err := j.request(name)
	if err != nil {
		return nil, fmt.Errorf("ask for a certificate: %w", err)
	}
	body, err := json.Marshal(JoinRequest{token.key(), csr})
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(base, "/")+JoinPath, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	transport := &http.Transport{TLSClientConfig: j.pinned(token), DialContext: (&net.Dialer{Timeout: joinTimeout}).DialContext}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if _, plain := errors.AsType[tls.RecordHeaderError](err); plain {
		err = fmt.Errorf("%w: give the supernode --ca, too", err)
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer)) //nolint:forbidigo // capped
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answers %s: %s", resp.Status, messageOf(text))
	}
	var a JoinAnswer
	if err := json.Unmarshal(text, &a); err != nil {
		return nil, fmt.Errorf("its answer: %w", err)
	}
	m, err := j.parse(token, []byte(a.Certificate), []byte(a.Roots))
	if err != nil {
		return nil, fmt.Errorf("its answer: %w", err)
	}
	for name, text := range map[string]string{CertFile: a.Certificate, RootFile: a.Roots} {
		if err := replace(filepath.Join(j.dir, name), []byte(text), 0o600); err != nil {
			j.log.Warn("the certificate is not kept", zap.Error(err)) // and had again after a restart
		}
	}
	return m, nil
}

func (j *joiner) request(name string) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, j.key)
}

// key is what of the token goes to the supernode.
func (t Token) key() string {
	_, rest, _ := strings.Cut(t.Text(), ".")
	return rest[:strings.LastIndexByte(rest, '.')]
}

// messageOf is what an answer of the API says to people.
func messageOf(text []byte) string {
	var e struct{ Message string }
	if json.Unmarshal(text, &e) != nil || e.Message == "" {
		return "(no reason given)"
	}
	return fmt.Sprintf("%.300q", e.Message)
}

// pinned is the configuration for asking a supernode of which only the hash of
// its authority is known. A certificate that there is already is shown.
func (j *joiner) pinned(t Token) *tls.Config {
	cfg := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection does
		VerifyConnection: func(cs tls.ConnectionState) error {
			pool := x509.NewCertPool()
			for _, c := range cs.PeerCertificates {
				if t.vouches(c) {
					pool.AddCert(c)
				}
			}
			leaf, err := (&material{pool: pool}).verify(cs, x509.ExtKeyUsageServerAuth)
			if err == nil && !isSupernode(leaf) {
				err = errors.New("it is no supernode")
			}
			if err != nil {
				return fmt.Errorf("not a supernode of the join token's authority: %w", err)
			}
			return nil
		},
	}
	if m := j.got.Load(); m != nil && time.Now().Before(m.cert.Leaf.NotAfter) {
		cfg.Certificates = []tls.Certificate{*m.cert}
	}
	return cfg
}

// Secure returns base, a supernode's URL, as it is asked over TLS.
func Secure(base string) string {
	if u, err := url.Parse(base); err == nil && u.Scheme == "http" {
		u.Scheme = "https"
		return u.String()
	}
	return base
}
