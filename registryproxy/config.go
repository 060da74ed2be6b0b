package registryproxy

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"
)

// Config says which registries there are.
type Config struct {
	// Upstreams are the registries of which something is to be said. Any other
	// is reached as https://<its name>, and docker.io where Docker Hub is.
	Upstreams []Upstream

	// Default is the registry of a request that names none, "" for none.
	Default string

	// Allow lists the hosts that are asked though Upstreams does not name them: exact,
	// *.corp, or * for all at public addresses. What is listed otherwise than by * is
	// asked in private networks, too, and may lead there. Empty stands for *.
	Allow Hosts
	// AllowAddresses are asked though they are not public. This machine's own and
	// those where clouds keep secrets must be named one by one; of loopback
	// 127.0.0.0/8 will do. Upstreams are asked wherever they are.
	AllowAddresses Networks

	// StallTimeout is how long a body may give no byte before its request
	// fails; 0 stands for 3.5 s: with more, hosts may turn to the registry before
	// its supernode does so again. Raise it for registries that pause.
	StallTimeout time.Duration
}

// Upstream says how to reach a registry. The tags are its keys in a file.
type Upstream struct {
	// Name is its host as engines name it ("docker.io").
	Name string `mapstructure:"name"`
	// URL is where it is: scheme, host, port and a path prefix if it has one
	// ("https://registry.corp/hub"); "" stands for https://<Name>. Plain HTTP is
	// spoken only where URL begins with http://.
	URL         string      `mapstructure:"url"`
	TLS         TLS         `mapstructure:",squash"`
	Credentials Credentials `mapstructure:"credentials"`
	// Mirrors are asked before it, in this order; each no sooner than the one
	// before has not got what is asked for.
	Mirrors []Mirror `mapstructure:"mirrors"`
	// Readers says who may read what Credentials can.
	Readers Readers `mapstructure:"readers"`
	// ReadersWhenAway is for how long after the registry last let a caller read a
	// repository that caller may go on while the registry cannot be asked; 0: not
	// past the five minutes in which it need not be. What anyone could read stays
	// readable in any case.
	ReadersWhenAway time.Duration `mapstructure:"readers-when-away"`

	// ConnectTimeout (0: 3 s) bounds the making of a connection, HeaderTimeout
	// (0: 10 s, for mirrors 3.5 s) all until an answer's header is there. Lower
	// ones turn elsewhere sooner, higher ones wait for slow registries.
	ConnectTimeout time.Duration `mapstructure:"connect-timeout"`
	HeaderTimeout  time.Duration `mapstructure:"header-timeout"`
	// Retries is how often a request is sent again that broke off before its
	// answer or was answered with 500, 502, 503 or 504; nil stands for 1. After a
	// mirror the next one is asked instead.
	Retries *int `mapstructure:"retries"`
}

// Mirror is another place that has what a registry has.
type Mirror struct {
	URL         string      `mapstructure:"url"`
	TLS         TLS         `mapstructure:",squash"`
	Credentials Credentials `mapstructure:"credentials"`
	// CallerCredentials says that callers' own credentials are good here too, and
	// may be sent. A request with such credentials else goes past the mirror.
	CallerCredentials bool `mapstructure:"caller-credentials"`
}

// TLS names files in PEM.
type TLS struct {
	// CA is of certificates that are believed beside the system's.
	CA string `mapstructure:"ca"`
	// ClientCert and ClientKey are shown to this host, and to none that it
	// redirects to. They are read again when they change.
	ClientCert string `mapstructure:"client-cert"`
	ClientKey  string `mapstructure:"client-key"`
}

// Credentials say as whom a host is asked on behalf of callers that have no
// credentials of their own: a user and a password, a configuration of docker's
// (which may name credential helpers), or docker-credential-<Helper>. What they
// name is read again when it changes.
type Credentials struct {
	Username     string `mapstructure:"username"`
	PasswordFile string `mapstructure:"password-file"`
	DockerConfig string `mapstructure:"docker-config"`
	Helper       string `mapstructure:"helper"`
}

// Readers says who may read what configured credentials can.
type Readers string

// The values of Readers; "" is ReadersCallers.
const (
	// ReadersCallers: only a caller whose own credentials the registry accepts,
	// so that there is no use for configured ones.
	ReadersCallers Readers = "callers"
	// ReadersRegion: whoever reaches the region's mirrors.
	ReadersRegion Readers = "region"
)

// maxAway bounds for how long a caller may be one whose access has been revoked.
const maxAway = 24 * time.Hour

// Validate tells what is wrong with c.
func (c Config) Validate() error {
	seen := map[string]bool{}
	for i, u := range c.Upstreams {
		name, ok := canonicalRegistry(u.Name)
		if !ok {
			return fmt.Errorf("registries[%d].name %q is not a host or host:port: write it as in images' names, such as docker.io", i, u.Name)
		}
		if seen[name] {
			return fmt.Errorf("registry %q is listed twice: keep one", u.Name)
		}
		seen[name] = true
		if err := u.validate(); err != nil {
			return fmt.Errorf("registry %q: %w", u.Name, err)
		}
	}
	if _, ok := canonicalRegistry(c.Default); !ok && c.Default != "" {
		return fmt.Errorf("default registry %q is not a host or host:port", c.Default)
	}
	if err := c.Allow.Validate(); err != nil {
		return fmt.Errorf("allow: %w", err)
	}
	if _, err := c.AllowAddresses.parse(); err != nil {
		return fmt.Errorf("allow-address: %w", err)
	}
	if c.StallTimeout < 0 {
		return fmt.Errorf("stall timeout %v is negative", c.StallTimeout)
	}
	return nil
}

func (u Upstream) validate() error {
	own := Mirror{URL: u.URL, TLS: u.TLS, Credentials: u.Credentials}
	if own.URL == "" {
		own.URL = "https://" + u.Name
	}
	if err := own.validate(u.Readers); err != nil {
		return err
	}
	for i, m := range u.Mirrors {
		if err := m.validate(u.Readers); err != nil {
			return fmt.Errorf("mirrors[%d].%w", i, err)
		}
	}
	switch {
	case u.Readers != "" && u.Readers != ReadersCallers && u.Readers != ReadersRegion:
		return fmt.Errorf("readers %q: want callers or region", u.Readers)
	case u.ReadersWhenAway < 0 || u.ReadersWhenAway > maxAway:
		return fmt.Errorf("readers-when-away %v: want 0s to %v", u.ReadersWhenAway, maxAway)
	case u.ConnectTimeout < 0 || u.HeaderTimeout < 0:
		return errors.New("connect-timeout and header-timeout: want times above 0, or leave them out")
	case u.Retries != nil && (*u.Retries < 0 || *u.Retries > maxRetries):
		return fmt.Errorf("retries %d: want 0 to %d", *u.Retries, maxRetries)
	}
	return nil
}

// validate returns an error that begins with the key.
func (m Mirror) validate(readers Readers) error {
	base, err := parseBase(m.URL)
	if err != nil {
		return fmt.Errorf("url: %w", err)
	}
	t, c := m.TLS, m.Credentials
	switch {
	case (t.ClientCert == "") != (t.ClientKey == ""):
		return errors.New("client-cert and client-key: name both files, or neither")
	case base.Scheme == "http" && t != TLS{}:
		return errors.New("url: a ca or a client-cert is of use only where the URL begins with https://")
	case c == Credentials{}:
		return nil
	case (c.Username == "") != (c.PasswordFile == ""):
		return errors.New("credentials: username and password-file: give both, or neither")
	case one(c.Username != "", c.DockerConfig != "", c.Helper != "") != 1:
		return errors.New("credentials: give one of username with password-file, docker-config, and helper")
	case strings.ContainsAny(c.Helper, `/\`):
		return fmt.Errorf("credentials.helper %q: want what follows docker-credential- in the program's name, such as ecr-login", c.Helper)
	case strings.ContainsAny(c.Username, ":\r\n"):
		return errors.New("credentials.username: it cannot hold a colon")
	case readers != ReadersRegion:
		return errors.New("credentials: with them, whoever reaches the region reads what they can: say so by readers: region, or leave them out")
	}
	return nil
}

// one counts what is true.
func one(of ...bool) (n int) {
	for _, b := range of {
		if b {
			n++
		}
	}
	return n
}

// parseBase reads the URL of an upstream. Its errors do not quote it: somebody
// may have put a password there.
func parseBase(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, errors.New("the URL cannot be read: want one like https://registry.corp:5000")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("the URL must begin with https:// or http://")
	case u.User != nil:
		return nil, errors.New("the URL must not hold credentials: there is credentials: for them")
	case u.Hostname() == "":
		return nil, errors.New("the URL names no host")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return nil, errors.New("the URL must end with its path")
	}
	if _, ok := canonicalRegistry(hostPort(u)); !ok {
		return nil, errors.New("the URL's host is not a host name, an IPv4 address or an IPv6 address in brackets, with a port of 1 to 65535 or none")
	}
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), ""
	return u, nil
}

// hostPort is a URL's host, with its port where it names one.
func hostPort(u *url.URL) string {
	if u.Port() == "" {
		return strings.TrimSuffix(u.Host, ":")
	}
	return net.JoinHostPort(u.Hostname(), u.Port())
}
