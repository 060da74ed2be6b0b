package dfdaemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"damselfly.dev/address"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

const (
	tunnelDial = 10 * time.Second
	// viaName is what this proxy adds to requests, by which it knows its own.
	viaName = "damselfly"
	tooMany = "there are too many connections through this proxy"
)

// ProxyConfig is what the forward proxy may be told.
type ProxyConfig struct {
	// Listen is host:port, "" for no proxy. Beyond loopback it needs Users.
	Listen string
	// Rules say what becomes of a request, in their order.
	Rules []registryproxy.Rule
	// Ports are those that may be asked for, of any host.
	Ports []int
	// Intercept are the hosts whose HTTPS is opened, with certificates of the
	// authority in CA and CAKey, which clients must trust. All other is passed
	// on as it is.
	Intercept registryproxy.Hosts
	CA, CAKey string
	// Users is a file of those who may use the proxy, as htpasswd -B writes it,
	// "" for all who reach it.
	Users string
}

// proxyListen is the setting of the proxy's address.
const proxyListen = "proxy-listen"

func (c ProxyConfig) validate() error {
	if err := c.validateListen(); err != nil {
		return err
	}
	if _, err := registryproxy.NewRules(c.Rules); err != nil {
		return fmt.Errorf("proxy-rules%w", err)
	}
	if err := c.Intercept.Validate(); err != nil {
		return fmt.Errorf("proxy-intercept: %w", err)
	}
	switch {
	case len(c.Intercept) > 0 && (c.CA == "" || c.CAKey == ""):
		return errors.New("proxy-intercept needs proxy-ca and proxy-ca-key: make them with dfdaemon ca")
	case (c.CA == "") != (c.CAKey == ""):
		return errors.New("proxy-ca and proxy-ca-key: name both files, or neither")
	}
	for _, p := range c.Ports {
		if p < 1 || p > 65535 {
			return fmt.Errorf("proxy-ports %d: want 1 to 65535", p)
		}
	}
	return nil
}

func (c ProxyConfig) validateListen() error {
	if c.Listen == "" {
		return nil
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("%s %q: want host:port", proxyListen, c.Listen)
	}
	if !address.IsLoopback(c.Listen) && c.Users == "" {
		return fmt.Errorf("%s %q: a proxy that others reach needs proxy-users, or anyone could use it: or listen on 127.0.0.1", proxyListen, c.Listen)
	}
	return nil
}

// proxy is the forward proxy of the host's programs.
type proxy struct {
	mirror    *mirror
	rules     registryproxy.Rules
	ports     []int
	intercept registryproxy.Hosts
	authority *registryproxy.Authority // nil without intercept
	users     *registryproxy.Users     // nil for all
	inner     *intercepted
	tunnels   *tunnels
	forward   *httputil.ReverseProxy
	requests  *prometheus.CounterVec
	log       *zap.Logger
}

// What became of a request, beside the actions of rules.
const (
	proxyTunnel    = "tunnel"
	proxyIntercept = "intercept"
)

func newProxy(cfg ProxyConfig, m *mirror, reg prometheus.Registerer) (p *proxy, err error) {
	p = &proxy{
		mirror: m, ports: cfg.Ports, intercept: cfg.Intercept, log: m.log,
		inner: newIntercepted(), tunnels: newTunnels(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "damselfly_proxy_requests_total",
			Help: "Requests to the forward proxy, by what became of them.",
		}, []string{"action"}),
	}
	for _, a := range []registryproxy.Action{
		registryproxy.ActionSwarm, registryproxy.ActionDirect, registryproxy.ActionRedirect, registryproxy.ActionRefuse, proxyTunnel, proxyIntercept,
	} {
		p.requests.WithLabelValues(string(a))
	}
	if p.rules, err = registryproxy.NewRules(cfg.Rules); err != nil {
		return nil, err
	}
	for _, r := range cfg.Rules {
		m.registry.Trust(r.To)
	}
	if cfg.CA != "" {
		if p.authority, err = registryproxy.LoadAuthority(cfg.CA, cfg.CAKey); err != nil {
			return nil, fmt.Errorf("proxy-ca: %w", err)
		}
	}
	if cfg.Users != "" {
		if p.users, err = registryproxy.LoadUsers(cfg.Users); err != nil {
			return nil, fmt.Errorf("proxy-users: %w", err)
		}
	}
	errorLog, err := zap.NewStdLogAt(m.log, zap.DebugLevel)
	if err != nil {
		return nil, err
	}
	p.forward = &httputil.ReverseProxy{
		Rewrite: p.rewrite, Transport: p, FlushInterval: -1, ErrorLog: errorLog,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) { badGateway(w, err) },
	}
	return p, reg.Register(p.requests)
}

// badGateway answers where nobody gives what was asked for.
func badGateway(w http.ResponseWriter, err error) {
	http.Error(w, "damselfly: "+api.WithoutURL(err).Error(), http.StatusBadGateway)
}

// RoundTrip implements http.RoundTripper, for forward.
func (p *proxy) RoundTrip(r *http.Request) (*http.Response, error) {
	return p.mirror.registry.TransportTo(r.URL).RoundTrip(r)
}

// handler answers what comes to the proxy's address.
func (p *proxy) handler() http.Handler {
	e := gin.New()
	e.NoRoute(func(c *gin.Context) { p.serve(c, "") })
	return e
}

// inside answers what comes on intercepted connections.
func (p *proxy) inside() http.Handler {
	e := gin.New()
	e.NoRoute(func(c *gin.Context) {
		authority, _ := c.Request.Context().Value(authorityKey{}).(string)
		p.serve(c, authority)
	})
	return e
}

// refuse answers with an error of the proxy's own.
func (p *proxy) refuse(w http.ResponseWriter, status int, why string) {
	p.requests.WithLabelValues(string(registryproxy.ActionRefuse)).Inc()
	http.Error(w, "damselfly: "+why, status)
}

// serve answers a request, that came on a connection intercepted for authority,
// or to the proxy itself when that is "".
func (p *proxy) serve(c *gin.Context, authority string) {
	w, r := newReply(c), c.Request
	defer w.extend(0)
	if authority == "" && !p.allowed(r) {
		w.Header().Set("Proxy-Authenticate", `Basic realm="damselfly"`)
		p.refuse(w, http.StatusProxyAuthRequired, "this proxy is for its users: give a name and a password")
		return
	}
	if passedHere(r.Header) {
		p.refuse(w, http.StatusLoopDetected, "the request has been here before: the proxy is told to use itself")
		return
	}
	if r.Method == http.MethodConnect {
		p.connect(c, r)
		return
	}
	u := *r.URL
	switch {
	case authority != "":
		u.Scheme, u.Host = "https", strings.TrimSuffix(authority, ":443")
		if host := hostOf(r.Host, "https"); host != authority {
			p.refuse(w, http.StatusMisdirectedRequest, "the request is for another host than the connection")
			return
		}
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		p.refuse(w, http.StatusBadRequest, "this is a forward proxy: want a whole URL, as with HTTP_PROXY set")
		return
	}
	u.User, u.Fragment = nil, ""
	p.route(w, r, &u)
}

// passedHere tells whether a proxy of this name is one of those that a request
// has come by; others may have written theirs into the same line.
func passedHere(h http.Header) bool {
	for via := range strings.SplitSeq(strings.Join(h.Values("Via"), ","), ",") {
		if by := strings.Fields(via); len(by) > 1 && by[1] == viaName {
			return true
		}
	}
	return false
}

// hostOf is host:port of what a request names.
func hostOf(host, scheme string) string {
	port := "80"
	if scheme == "https" {
		port = "443"
	}
	u := url.URL{Host: host}
	if u.Port() != "" {
		port = u.Port()
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// allowed tells whether who asks is a user of the proxy.
func (p *proxy) allowed(r *http.Request) bool {
	if p.users == nil {
		return true
	}
	basic := http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}
	name, password, ok := basic.BasicAuth()
	return ok && p.users.Allow(name, password)
}

// mayReach tells whether the port of host:port is one of those that may be asked for.
func mayReach(ports []int, hostPort string) bool {
	_, port, err := net.SplitHostPort(hostPort)
	n, atoi := strconv.Atoi(port)
	return err == nil && atoi == nil && slices.Contains(ports, n)
}

// route does with a request for u what the rules say.
func (p *proxy) route(w *reply, r *http.Request, u *url.URL) {
	action, to := p.rules.Decide(u)
	if action == registryproxy.ActionSwarm && (r.Method != http.MethodGet && r.Method != http.MethodHead || r.Header.Get("Upgrade") != "") {
		action = registryproxy.ActionDirect
	}
	if action != registryproxy.ActionRedirect && !mayReach(p.ports, hostOf(u.Host, u.Scheme)) {
		p.refuse(w, http.StatusForbidden, "this port is not one of proxy-ports")
		return
	}
	switch action {
	case registryproxy.ActionRefuse:
		p.refuse(w, http.StatusForbidden, "a rule refuses this URL")
		return
	case registryproxy.ActionSwarm:
		if p.swarm(w, r, u) {
			p.requests.WithLabelValues(string(action)).Inc()
			return
		}
		action = registryproxy.ActionDirect
	case registryproxy.ActionRedirect:
		r = r.Clone(r.Context())
		if to.Host != u.Host || to.Scheme == "http" && u.Scheme == "https" {
			r.Header.Del("Authorization")
			r.Header.Del("Cookie")
			r.Host = to.Host
		}
	}
	ctx := r.Context()
	if r.Header.Get("Upgrade") != "" {
		within, leave, ok := p.tunnels.enter(ctx)
		if !ok {
			p.refuse(w, http.StatusServiceUnavailable, tooMany)
			return
		}
		defer leave()
		ctx = within
	}
	p.requests.WithLabelValues(string(action)).Inc()
	p.forward.ServeHTTP(w.gin, r.WithContext(context.WithValue(ctx, targetKey{}, to)))
}

type (
	targetKey    struct{} // of the URL that a request is sent to
	authorityKey struct{} // of host:port that an intercepted connection was to
)

// rewrite makes the request that is sent on.
func (p *proxy) rewrite(out *httputil.ProxyRequest) {
	to, _ := out.In.Context().Value(targetKey{}).(*url.URL)
	out.Out.URL = to
	out.Out.Host = out.In.Host
	out.Out.Header.Add("Via", fmt.Sprintf("%d.%d %s", out.In.ProtoMajor, out.In.ProtoMinor, viaName))
	if _, ok := out.In.Header["User-Agent"]; !ok {
		out.Out.Header.Set("User-Agent", "") // or net/http puts its own
	}
}

// swarm answers with the region's help; false when this is nothing for it, and
// nothing has been answered.
func (p *proxy) swarm(w *reply, r *http.Request, u *url.URL) bool {
	if strings.HasPrefix(u.Path, "/v2/") {
		return p.mirror.pull(w, r, u) // to all else the registry knows best what to say
	}
	if r.Method != http.MethodGet {
		return false
	}
	request, err := urlRequest(r, u, nil)
	if err != nil {
		return false
	}
	if err := p.mirror.url(w, r, request, r.Header); err != nil {
		badGateway(w, err)
	}
	return true
}

// connect answers CONNECT.
func (p *proxy) connect(c *gin.Context, r *http.Request) {
	authority := hostOf(r.Host, "https")
	host, _, _ := net.SplitHostPort(authority)
	intercept := p.authority != nil && p.intercept.Has(host)
	action, _ := p.rules.Decide(&url.URL{Scheme: "https", Host: strings.TrimSuffix(authority, ":443"), Path: "/"})
	switch {
	case !mayReach(p.ports, authority):
		p.refuseConnect(c, http.StatusForbidden, "this port is not one of proxy-ports")
		return
	case !intercept && action == registryproxy.ActionRefuse:
		p.refuseConnect(c, http.StatusForbidden, "a rule refuses this host")
		return
	}
	ctx, leave, ok := p.tunnels.enter(context.WithoutCancel(r.Context()))
	if !ok {
		p.refuseConnect(c, http.StatusServiceUnavailable, tooMany)
		return
	}
	if intercept {
		p.open(ctx, c, authority, leave)
		return
	}
	defer leave()
	dialing, cancel := context.WithTimeout(ctx, tunnelDial)
	to, err := p.mirror.registry.Dial(dialing, "tcp", authority)
	cancel()
	if err != nil {
		p.refuseConnect(c, http.StatusBadGateway, err.Error())
		return
	}
	from, err := established(c)
	if err != nil {
		_ = to.Close()
		return
	}
	p.requests.WithLabelValues(proxyTunnel).Inc()
	p.tunnels.join(ctx, from, to)
}

// open has what comes on the client's connection served in the place of
// authority, until it ends or ctx does.
func (p *proxy) open(ctx context.Context, c *gin.Context, authority string, leave func()) {
	from, err := established(c)
	if err != nil {
		leave()
		return
	}
	context.AfterFunc(ctx, func() { _ = from.Close() })
	p.requests.WithLabelValues(proxyIntercept).Inc()
	host, _, _ := net.SplitHostPort(authority)
	p.inner.add(&interceptedConn{authority: authority, leave: leave, Conn: tls.Server(from, &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.authority.Certificate(host) },
	})})
}

// established takes the connection of a CONNECT over, and tells its client.
func established(c *gin.Context) (net.Conn, error) {
	conn, buf, err := c.Writer.Hijack()
	if err != nil { // it is of HTTP/1, which can
		return nil, err
	}
	_ = conn.SetDeadline(time.Time{})
	if _, err := io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &buffered{conn, buf.Reader}, nil
}

// refuseConnect is refuse for CONNECT, of whose answer most clients show no more
// than the reason in its first line.
func (p *proxy) refuseConnect(c *gin.Context, status int, why string) {
	p.requests.WithLabelValues(string(registryproxy.ActionRefuse)).Inc()
	conn, _, err := c.Writer.Hijack()
	if err != nil { // it is of HTTP/1, which can
		return
	}
	defer func() { _ = conn.Close() }()
	why = "damselfly: " + why
	answer := http.Response{
		StatusCode: status, Status: strconv.Itoa(status) + " " + why, ProtoMajor: 1, ProtoMinor: 1, Close: true,
		Header: http.Header{"Content-Type": {"text/plain; charset=utf-8"}},
		Body:   io.NopCloser(strings.NewReader(why + "\n")), ContentLength: int64(len(why)) + 1,
	}
	_ = answer.Write(conn) // whoever went away needs no answer
}
