package registryproxy

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// Upstream says how to reach a registry. Name is its host as engines name it
// ("docker.io"); URL is where it is: scheme, host, port and a path prefix if it
// has one ("https://cache.corp/hub"). Plain HTTP is spoken only where URL
// begins with http://.
type Upstream struct{ Name, URL string }

// Config says which registries there are.
type Config struct {
	// Upstreams are the registries with a URL of their own. Any other is
	// reached as https://<its name>, and docker.io where Docker Hub is.
	Upstreams []Upstream

	// Default is the registry of a request that names none, "" for none.
	Default string

	// StallTimeout is how long a body may give no byte before its request
	// fails; 0 stands for 10 s. Raise it for registries that pause, lower it
	// to turn elsewhere sooner.
	StallTimeout time.Duration
}

// Validate tells what is wrong with c.
func (c Config) Validate() error {
	seen := map[string]bool{}
	for _, u := range c.Upstreams {
		name, ok := canonicalRegistry(u.Name)
		if !ok {
			return fmt.Errorf("upstream %q: the name is not a host or host:port", u.Name)
		}
		if seen[name] {
			return fmt.Errorf("upstream %q is listed twice", u.Name)
		}
		seen[name] = true
		if _, err := parseBase(u.URL); err != nil {
			return fmt.Errorf("upstream %q: %w", u.Name, err)
		}
	}
	if _, ok := canonicalRegistry(c.Default); !ok && c.Default != "" {
		return fmt.Errorf("default registry %q is not a host or host:port", c.Default)
	}
	if c.StallTimeout < 0 {
		return fmt.Errorf("stall timeout %v is negative", c.StallTimeout)
	}
	return nil
}

// parseBase reads the URL of an upstream. Its errors do not quote it: somebody
// may have put a password there.
func parseBase(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, errors.New("the URL cannot be read")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("the URL must begin with https:// or http://")
	case u.User != nil:
		return nil, errors.New("the URL must not hold credentials")
	case u.Hostname() == "":
		return nil, errors.New("the URL names no host")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return nil, errors.New("the URL must end with its path")
	}
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), ""
	return u, nil
}

// base returns where a registry is.
func (c *Client) base(registry string) *url.URL {
	if u, ok := c.upstreams[registry]; ok {
		return u
	}
	if registry == "docker.io" {
		registry = "registry-1.docker.io"
	}
	return &url.URL{Scheme: "https", Host: registry}
}
