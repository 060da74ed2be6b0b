package region_test

import (
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"

	"go.uber.org/zap"

	"damselfly.dev/supernode/api/identity"
	"damselfly.dev/test/certs"
)

// secure is a certificate that all parts of a region share, as do the proxies that
// spoil what goes between them; nil unless DAMSELFLY_TEST_TLS is set, which has
// all tests here run over TLS.
var secure = sync.OnceValue(func() *shared {
	if os.Getenv("DAMSELFLY_TEST_TLS") == "" {
		return nil
	}
	s := &shared{}
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	var err error
	s.dir, err = os.MkdirTemp("", "damselfly-region-")
	must(err)
	a, err := certs.New("region")
	must(err)
	must(a.Write(s.dir, certs.Name{DNS: "region.test"}, a))
	s.Source, err = identity.FromDir(s.dir, zap.NewNop())
	must(err)
	s.inside = &http.Client{Transport: s.transport()}
	return s
})

type shared struct {
	*identity.Source
	dir    string
	inside *http.Client
}

func TestMain(m *testing.M) {
	code := m.Run()
	if s := secure(); s != nil {
		_ = os.RemoveAll(s.dir)
	}
	os.Exit(code)
}

// settings are what parts are told that are told nothing of TLS.
func (s *shared) settings() string {
	if s == nil {
		return ""
	}
	return s.dir
}

// scheme is that of URLs within the region.
func (s *shared) scheme() string {
	if s == nil {
		return "http"
	}
	return "https"
}

// begin starts a server within the region. Its URL has http all the same.
func (s *shared) begin(srv *httptest.Server) {
	if s != nil {
		srv.Listener = tls.NewListener(srv.Listener, s.Server(true))
	}
	srv.Start()
}

// transport asks within the region.
func (s *shared) transport() *http.Transport {
	t := &http.Transport{}
	if s != nil {
		t.DialTLSContext = s.DialSupernode((&net.Dialer{}).DialContext)
	}
	return t
}

// client asks what is at base.
func (s *shared) client(base string) *http.Client {
	if s != nil && strings.HasPrefix(base, "https://") {
		return s.inside
	}
	return http.DefaultClient
}

// target is where a proxy within the region sends requests on.
func (s *shared) target(address string) *url.URL {
	return &url.URL{Scheme: s.scheme(), Host: address}
}
