// Package certs makes certificates for tests, as a PKI of one's own would.
package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// Authority signs certificates.
type Authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// Name is who a certificate is for, and until when.
type Name struct {
	URI, DNS, Common string
	Until            time.Time // an hour from now when it is zero
	Usage            []x509.ExtKeyUsage
}

// New makes an authority.
func New(name string) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	a := &Authority{key: key}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	a.cert, err = x509.ParseCertificate(der)
	return a, err
}

// PEM is the authority's own certificate.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// Issue makes a certificate and its key, in PEM, for loopback too.
func (a *Authority) Issue(n Name) (cert, key []byte, err error) {
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: n.Common},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: n.Until, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: n.Usage,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	if n.Until.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	if n.Usage == nil {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	}
	if n.DNS != "" {
		template.DNSNames = []string{n.DNS}
	}
	if n.URI != "" {
		u, err := url.Parse(n.URI)
		if err != nil {
			return nil, nil, err
		}
		template.URIs = []*url.URL{u}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, own.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	text, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: text}), nil
}

// Write puts a certificate for n into dir, with the authorities that it trusts, by
// one swap of a link, as Kubernetes does: dir/..data, to which the files lead.
func (a *Authority) Write(dir string, n Name, trusts ...*Authority) error {
	cert, key, err := a.Issue(n)
	if err != nil {
		return err
	}
	var roots []byte
	for _, t := range trusts {
		roots = append(roots, t.PEM()...)
	}
	version := fmt.Sprintf("..%d", time.Now().UnixNano())
	if err := os.MkdirAll(filepath.Join(dir, version), 0o700); err != nil {
		return err
	}
	for name, text := range map[string][]byte{"tls.crt": cert, "tls.key": key, "ca.crt": roots} {
		if err := os.WriteFile(filepath.Join(dir, version, name), text, 0o600); err != nil {
			return err
		}
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil && !os.IsExist(err) {
			return err
		}
	}
	if err := os.Symlink(version, filepath.Join(dir, "..new")); err != nil {
		return err
	}
	return os.Rename(filepath.Join(dir, "..new"), filepath.Join(dir, "..data"))
}
