package registryproxy

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestHosts(t *testing.T) {
	hosts := Hosts{"a.test", "*.Corp", "10.0.0.1", "::1"}
	require.NoError(t, hosts.Validate())
	for host, want := range map[string]bool{
		"a.test": true, "A.Test": true, "a.test.": true, "b.a.test": false, "x.corp": true, "x.y.corp": true, "corp": false,
		"evilcorp": false, "10.0.0.1": true, "10.0.0.10": false, "::1": true, "": false,
	} {
		require.Equal(t, want, hosts.Has(host), host)
	}
	require.True(t, Hosts{"*"}.Has("any.test"))
	for _, bad := range []string{"", "a b", "a.test:443", "http://a", "*a", "a.*", "*.", "[::1]"} {
		require.ErrorContains(t, Hosts{bad}.Validate(), "want a host name", bad)
	}
}

func newAuthority(t *testing.T, hosts ...string) (*Authority, *x509.CertPool) {
	t.Helper()
	dir := t.TempDir()
	cert, key, err := CreateAuthority(hosts)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "crt"), cert, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "key"), key, 0o600))
	a, err := LoadAuthority(filepath.Join(dir, "crt"), filepath.Join(dir, "key"))
	require.NoError(t, err)
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(cert))
	return a, roots
}

// Who trusts an authority trusts it for its hosts and no others.
func TestAuthorityIsBounded(t *testing.T) {
	for _, c := range []struct{ hosts, good, bad []string }{
		{[]string{"a.test"}, []string{"a.test", "A.test", "a.test."}, []string{"b.test", "10.0.0.1", "::1"}},
		{[]string{"*.corp"}, []string{"x.corp", "x.y.corp"}, []string{"evilcorp", "x.test"}},
		{[]string{"10.0.0.1"}, []string{"10.0.0.1"}, []string{"10.0.0.2", "a.test"}},
		{[]string{"::1", "a.test"}, []string{"::1", "a.test"}, []string{"::2", "b.test"}},
		{[]string{"*"}, []string{"a.test", "10.0.0.1", "::1"}, nil},
	} {
		a, roots := newAuthority(t, c.hosts...)
		verify := func(host string) error {
			cert, err := a.Certificate(host)
			require.NoError(t, err)
			name := host
			if len(name) > 0 && name[len(name)-1] == '.' {
				name = name[:len(name)-1]
			}
			_, err = cert.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots})
			return err
		}
		for _, host := range c.good {
			require.NoError(t, verify(host), "%v for %v", host, c.hosts)
		}
		for _, host := range c.bad {
			require.Error(t, verify(host), "%v for %v", host, c.hosts)
		}
	}
}

func TestAuthorityMintsAgainInTime(t *testing.T) {
	a, _ := newAuthority(t, "*")
	now := time.Now()
	a.now = func() time.Time { return now }
	first, err := a.Certificate("a.test")
	require.NoError(t, err)
	again, err := a.Certificate("A.test.")
	require.NoError(t, err)
	require.Same(t, first, again)
	now = now.Add(mintedLife - mintAgain + time.Minute)
	second, err := a.Certificate("a.test")
	require.NoError(t, err)
	require.NotSame(t, first, second)
	require.True(t, second.Leaf.NotAfter.After(now.Add(mintAgain)))
	for i := range maxMinted + 10 {
		a.minted[strconv.Itoa(i)] = first
	}
	_, err = a.Certificate("b.test")
	require.NoError(t, err)
	require.LessOrEqual(t, len(a.minted), maxMinted)
}

func TestWrongAuthority(t *testing.T) {
	_, _, err := CreateAuthority(nil)
	require.ErrorContains(t, err, "name the hosts")
	_, _, err = CreateAuthority(Hosts{"a b"})
	require.ErrorContains(t, err, "want a host name")
	dir := t.TempDir()
	cert, key, err := CreateAuthority(Hosts{"a.test"})
	require.NoError(t, err)
	_, otherKey, err := CreateAuthority(Hosts{"a.test"})
	require.NoError(t, err)
	for name, data := range map[string][]byte{"crt": cert, "key": key, "other": otherKey, "text": []byte("text")} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	for _, pair := range [][2]string{{"crt", "other"}, {"text", "key"}, {"crt", "text"}, {"none", "key"}, {"crt", "none"}} {
		_, err := LoadAuthority(filepath.Join(dir, pair[0]), filepath.Join(dir, pair[1]))
		require.Error(t, err, pair)
		require.NotContains(t, err.Error(), "PRIVATE")
	}
}
