package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
)

// The files of a certificate, as Kubernetes names them in a secret.
const (
	CertFile = "tls.crt" // the certificate, and those between it and the authority
	KeyFile  = "tls.key"
	RootFile = "ca.crt" // the authorities of the region, more than one while one replaces the other

	maxFile = 1 << 20 // bytes of one of them
)

// FromDir returns the identity that CertFile, KeyFile and RootFile in dir are. A
// handshake looks whether they have been replaced.
func FromDir(dir string, log *zap.Logger) (*Source, error) {
	s, err := newSource(log, func(old *material) (*material, error) { return fromDir(dir, old) })
	if err != nil {
		return nil, fmt.Errorf("certificate in %s: %w", dir, err)
	}
	return s, nil
}

// stamps tell one version of the files from another.
type stamps [3]os.FileInfo

func (a stamps) same(b stamps) bool {
	for i := range a {
		if !os.SameFile(a[i], b[i]) || a[i].Size() != b[i].Size() || !a[i].ModTime().Equal(b[i].ModTime()) {
			return false
		}
	}
	return true
}

func fromDir(dir string, old *material) (*material, error) {
	paths := [3]string{filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile), filepath.Join(dir, RootFile)}
	var now stamps
	var err error
	for i, p := range paths { // before they are read: what changes then is seen the next time
		if now[i], err = os.Stat(p); err != nil {
			return nil, err
		}
	}
	if old != nil && now.same(old.version.(stamps)) {
		return old, nil
	}
	var text [3][]byte
	for i, p := range paths {
		if text[i], err = readFile(p); err != nil {
			return nil, err
		}
	}
	m, err := parse(text[0], text[1], text[2])
	if err != nil {
		return nil, err
	}
	m.version = now
	return m, nil
}

// parse reads a certificate, its key and its authorities from PEM, and checks
// that they belong together and are fit for both ends of a connection.
func parse(cert, key, roots []byte) (*material, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", CertFile, KeyFile, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(roots) {
		return nil, fmt.Errorf("%s holds no certificate of an authority in PEM", RootFile)
	}
	m := newMaterial(&pair, pool)
	between := x509.NewCertPool()
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", CertFile, err)
		}
		between.AddCert(c)
	}
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		_, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{use}})
		invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
		switch {
		case ok && invalid.Reason == x509.Expired && time.Now().After(pair.Leaf.NotAfter):
			return nil, fmt.Errorf("%s has expired at %v: renew it", CertFile, pair.Leaf.NotAfter)
		case ok && invalid.Reason == x509.IncompatibleUsage:
			return nil, fmt.Errorf("%s must be good for client and for server authentication", CertFile)
		case err != nil:
			return nil, fmt.Errorf("%s is not of an authority in %s: %w", CertFile, RootFile, err)
		}
	}
	if _, err := Of(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{pair.Leaf}}); err != nil {
		return nil, fmt.Errorf("%s: %w", CertFile, err)
	}
	return m, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path) //nolint:gosec // the operator names it
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxFile)) //nolint:forbidigo // capped
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return b, nil
}
