package registryproxy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	mintedLife    = 7 * 24 * time.Hour
	mintAgain     = 24 * time.Hour // before its end
	maxMinted     = 1024
	clockSkew     = time.Hour
)

// Hosts are host names as certificates have them: exact, "*.corp" for all below
// corp, "*" for all.
type Hosts []string

// Validate tells what is wrong with h.
func (h Hosts) Validate() error {
	for _, name := range h {
		plain := strings.TrimPrefix(name, "*.")
		if _, ok := canonicalRegistry(bracketed(plain)); name != "*" && (!ok || strings.Contains(plain, ":") && net.ParseIP(plain) == nil) {
			return fmt.Errorf("host %q: want a host name without a port, *.NAME for all below it, or * for all", name)
		}
	}
	return nil
}

// bracketed is a host as it stands in a URL.
func bracketed(host string) string {
	if strings.Contains(host, ":") {
		return "[" + host + "]"
	}
	return host
}

// Has tells whether a host is one of h.
func (h Hosts) Has(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	for _, name := range h {
		name = strings.ToLower(name)
		if suffix, ok := strings.CutPrefix(name, "*"); ok && (suffix == "" || strings.HasSuffix(host, suffix)) || name == host {
			return true
		}
	}
	return false
}

// CreateAuthority makes a certificate authority and its key, in PEM, that can
// vouch for these hosts and no others.
func CreateAuthority(hosts Hosts) (cert, key []byte, err error) {
	if len(hosts) == 0 {
		return nil, nil, errors.New("name the hosts that it may vouch for, or * for all")
	}
	if err := hosts.Validate(); err != nil {
		return nil, nil, err
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "Damselfly forward proxy"},
		NotBefore: now.Add(-clockSkew), NotAfter: now.Add(authorityLife),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, MaxPathLenZero: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	constrain(template, hosts)
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded}), nil
}

// constrain has whoever trusts the authority trust it for these hosts alone.
func constrain(template *x509.Certificate, hosts Hosts) {
	if slices.Contains(hosts, "*") {
		return
	}
	template.PermittedDNSDomainsCritical = true
	for _, name := range hosts {
		if ip := net.ParseIP(name); ip != nil {
			if four := ip.To4(); four != nil {
				ip = four
			}
			template.PermittedIPRanges = append(template.PermittedIPRanges, &net.IPNet{IP: ip, Mask: net.CIDRMask(8*len(ip), 8*len(ip))})
			continue
		}
		template.PermittedDNSDomains = append(template.PermittedDNSDomains, strings.TrimPrefix(name, "*"))
	}
	if template.PermittedIPRanges == nil { // or it could vouch for all addresses
		template.ExcludedIPRanges = []*net.IPNet{{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}}
	}
	if template.PermittedDNSDomains == nil {
		template.PermittedDNSDomains = []string{"invalid"} // which no host is
	}
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil { // rand.Reader never fails
		panic(err)
	}
	return n
}

// Authority vouches for hosts whose connections a forward proxy opens.
type Authority struct {
	cert *x509.Certificate
	pair tls.Certificate
	key  *ecdsa.PrivateKey // of all certificates that it mints
	now  func() time.Time

	mu     sync.Mutex // guards minted
	minted map[string]*tls.Certificate
}

// LoadAuthority reads the files that CreateAuthority's results were written to.
func LoadAuthority(certFile, keyFile string) (*Authority, error) {
	cert, err := readFile(certFile)
	if err != nil {
		return nil, err
	}
	key, err := readFile(keyFile)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s are not a certificate and its key, both in PEM", certFile, keyFile)
	}
	if !pair.Leaf.IsCA {
		return nil, fmt.Errorf("%s is not the certificate of an authority: make one with dfdaemon ca", certFile)
	}
	if now := time.Now(); now.After(pair.Leaf.NotAfter) {
		return nil, fmt.Errorf("%s was valid until %s: make another with dfdaemon ca", certFile, pair.Leaf.NotAfter.Format(time.DateOnly))
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return &Authority{cert: pair.Leaf, pair: pair, key: private, now: time.Now, minted: map[string]*tls.Certificate{}}, nil
}

// Certificate returns one for the host, which the proxy has been asked to reach.
func (a *Authority) Certificate(host string) (*tls.Certificate, error) {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	if c := a.minted[host]; c != nil && now.Before(c.Leaf.NotAfter.Add(-mintAgain)) {
		return c, nil
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: host},
		NotBefore: now.Add(-clockSkew), NotAfter: now.Add(mintedLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, a.key.Public(), a.pair.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("mint a certificate for %s: %w", host, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("mint a certificate for %s: %w", host, err)
	}
	for old := range a.minted { // any: it is minted again
		if len(a.minted) < maxMinted {
			break
		}
		delete(a.minted, old)
	}
	c := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: a.key, Leaf: leaf}
	a.minted[host] = c
	return c, nil
}
