package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
)

const (
	// Life is how long a certificate of a CA is good; two thirds of it have
	// passed when it is renewed.
	Life = 24 * time.Hour

	caKeyFile = "ca.key"
	caLife    = 10 * 365 * 24 * time.Hour
	skew      = 5 * time.Minute // that clocks may differ
	hostURI   = "damselfly://host/"
)

// CA is an authority of a region, for those that have none: RootFile and its key
// in a directory that the supernodes of the region share, with TokenFile.
type CA struct {
	dir   string
	key   crypto.Signer
	cert  *x509.Certificate
	roots []byte // of RootFile
}

// CreateCA makes an authority in dir, which holds none yet.
func CreateCA(dir string) (*CA, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make a directory for the authority: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the authority's key: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "damselfly region"},
		NotBefore: now.Add(-skew), NotAfter: now.Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	cert, err := sign(template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	text, err := keyPEM(key)
	if err != nil {
		return nil, err
	}
	if err := writeNew(filepath.Join(dir, caKeyFile), text, 0o600); err != nil {
		return nil, err
	}
	if err := writeNew(filepath.Join(dir, RootFile), certPEM(cert.Raw), 0o644); err != nil {
		return nil, err
	}
	return OpenCA(dir)
}

// OpenCA reads the authority in dir; the error wraps fs.ErrNotExist where there is none.
func OpenCA(dir string) (*CA, error) {
	c := &CA{dir: dir}
	text, err := readFile(filepath.Join(dir, caKeyFile))
	if err != nil {
		return nil, fmt.Errorf("the authority's key: %w", err)
	}
	if c.roots, err = readFile(filepath.Join(dir, RootFile)); err != nil {
		return nil, fmt.Errorf("the authority's certificate: %w", err)
	}
	if c.key, err = parseKey(text); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, caKeyFile), err)
	}
	for _, cert := range parseCerts(c.roots) {
		if public, ok := c.key.Public().(*ecdsa.PublicKey); ok && public.Equal(cert.PublicKey) {
			c.cert = cert
			return c, nil
		}
	}
	return nil, fmt.Errorf("%s holds no certificate of the key in %s", filepath.Join(dir, RootFile), caKeyFile)
}

// Source returns the identity of a supernode that has the authority; names, DNS
// names and IP addresses, are for clients that know the authority alone.
func (c *CA) Source(names []string, log *zap.Logger) (*Source, error) {
	return newSource(log, func(old *material) (*material, error) {
		if old != nil && time.Until(old.cert.Leaf.NotAfter) > Life/3 {
			return old, nil
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("make a key: %w", err)
		}
		own := &url.URL{Scheme: "damselfly", Host: "supernode"}
		template := &x509.Certificate{Subject: pkix.Name{CommonName: "supernode"}, URIs: []*url.URL{own}}
		for _, name := range names {
			if ip := net.ParseIP(name); ip != nil {
				template.IPAddresses = append(template.IPAddresses, ip)
			} else if name != "" {
				template.DNSNames = append(template.DNSNames, name)
			}
		}
		leaf, err := c.issue(template, key.Public())
		if err != nil {
			return nil, err
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(c.roots)
		chain := [][]byte{leaf.Raw, c.cert.Raw} // the authority too: who has but its hash looks for it
		return newMaterial(&tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf}, pool), nil
	})
}

// issue signs a certificate of one of the region.
func (c *CA) issue(template *x509.Certificate, public crypto.PublicKey) (*x509.Certificate, error) {
	now := time.Now()
	template.NotBefore, template.NotAfter = now.Add(-skew), now.Add(Life)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	template.BasicConstraintsValid = true
	return sign(template, c.cert, public, c.key)
}

// Refused is why a host may not join, for its operator.
type Refused struct{ why string }

func (r *Refused) Error() string { return r.why }

// Join answers a host that wants a certificate. shown are the certificates of its
// connection, which have been verified: with one for the same key it renews,
// also when its token has expired meanwhile, unless that is revoked. The host's
// name is made of its key, so none can have another's. The error is a *Refused
// when the host is to blame.
func (c *CA) Join(req JoinRequest, shown []*x509.Certificate) (JoinAnswer, error) {
	csr, err := x509.ParseCertificateRequest(req.CSR)
	if err != nil || csr.CheckSignature() != nil {
		return JoinAnswer{}, &Refused{"the request for a certificate is malformed"}
	}
	public, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return JoinAnswer{}, &Refused{"want a key on the curve P-256"}
	}
	tokens, err := ReadTokens(c.dir)
	if err != nil {
		return JoinAnswer{}, err
	}
	id := renews(shown, public)
	if id == "" || !slices.ContainsFunc(tokens, func(t TokenInfo) bool { return t.ID == id }) {
		if id, err = check(tokens, req.Token, time.Now()); err != nil {
			return JoinAnswer{}, err
		}
	}
	sum := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	cert, err := c.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: visible(csr.Subject.CommonName), OrganizationalUnit: []string{id}},
		URIs:    []*url.URL{{Scheme: "damselfly", Host: "host", Path: "/" + hex.EncodeToString(sum[:16])}},
	}, public)
	if err != nil {
		return JoinAnswer{}, err
	}
	return JoinAnswer{Certificate: string(certPEM(cert.Raw)), Roots: string(c.roots)}, nil
}

// renews returns the token with which a host got the certificate that it shows,
// "" when it shows none for that key.
func renews(shown []*x509.Certificate, public *ecdsa.PublicKey) string {
	if len(shown) == 0 {
		return ""
	}
	leaf := shown[0]
	if !public.Equal(leaf.PublicKey) || !strings.HasPrefix(nameOf(leaf), hostURI) || len(leaf.Subject.OrganizationalUnit) != 1 {
		return ""
	}
	return leaf.Subject.OrganizationalUnit[0]
}

// visible returns what is fit for a name that people read.
func visible(s string) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
	return s[:min(len(s), 64)]
}

func sign(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	var err error
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return nil, fmt.Errorf("sign a certificate: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, fmt.Errorf("sign a certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func parseKey(text []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("it holds no key in PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("it holds no key in PKCS #8") // without a word of what it holds
	}
	own, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("its key is not on the curve P-256")
	}
	return own, nil
}

// parseCerts returns the certificates in text, without what is none.
func parseCerts(text []byte) (certs []*x509.Certificate) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return certs
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			certs = append(certs, c)
		}
	}
}

// writeNew writes a file that is not there yet.
func writeNew(path string, text []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode) //nolint:gosec // the operator names it
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Sync(), f.Close())
}

// replace writes a file at once or not at all.
func replace(path string, text []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
