package registryproxy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
	"golang.org/x/sync/singleflight"
)

const (
	helperTime    = 5 * time.Second
	helperLife    = time.Minute     // of what a helper has said
	helperFailure = 5 * time.Second // of its failure to say anything
	maxHelper     = 64 << 10        // bytes of its answer
	maxHelpers    = 16              // servers that one helper is remembered for
	tokenUser     = "<token>"       // the user name that stands for an identity token
)

// login is as whom a host is asked; the zero one is nobody. It goes to that host
// and the token server that it names, and is printed nowhere.
type login struct {
	user, password string
	identity       string // a refresh token for the token server, instead of a password
	bearer         string // a token for the registry itself
}

// String tells whether it is anybody, and not who.
func (l login) String() string {
	if l == (login{}) {
		return "anonymous"
	}
	return "credentials (redacted)"
}

// GoString is String, for %#v.
func (l login) GoString() string { return l.String() }

// hash tells logins apart.
func (l login) hash() [sha256.Size]byte {
	return sha256.Sum256([]byte(l.user + "\x00" + l.password + "\x00" + l.identity + "\x00" + l.bearer))
}

// basic is l as an Authorization header, "" for one without a password.
func (l login) basic() string {
	if l.user == "" || l.password == "" {
		return ""
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(l.user+":"+l.password))
}

// logins is what a configuration says of one host; nil says nothing.
type logins struct {
	host     string // a canonical registry name
	user     string
	password *File[string]
	docker   *File[dockerConfig]
	helper   string        // of the configuration itself
	patience time.Duration // with a helper

	flight singleflight.Group // of helpers
	said   *memo[string, helped]
}

// helped is how a helper has ended.
type helped struct {
	login login
	err   error
}

// newLogins reads what c names once, so that a wrong name is known at the start.
func newLogins(host string, c Credentials) (l *logins, err error) {
	if c == (Credentials{}) {
		return nil, nil //nolint:nilnil // nothing is configured
	}
	l = &logins{host: host, user: c.Username, helper: c.Helper, patience: helperTime, said: newMemo[string, helped](maxHelpers, time.Now)}
	switch {
	case c.PasswordFile != "":
		if l.password, err = OpenFile(c.PasswordFile, parsePassword); err != nil {
			return nil, fmt.Errorf("password-file: %w", err)
		}
	case c.DockerConfig != "":
		if l.docker, err = OpenFile(c.DockerConfig, parseDockerConfig); err != nil {
			return nil, fmt.Errorf("docker-config: %w", err)
		}
	default:
		if _, err := exec.LookPath(helperPrefix + c.Helper); err != nil {
			return nil, fmt.Errorf("helper: there is no program %s%s in PATH: install it, or name another", helperPrefix, c.Helper)
		}
	}
	return l, nil
}

func parsePassword(b []byte) (string, error) {
	s := strings.TrimRight(string(b), "\r\n")
	if s == "" || strings.ContainsAny(s, "\r\n\x00") {
		return "", errors.New("want one line with the password")
	}
	return s, nil
}

// get returns as whom the host is to be asked. With an error it may be that of
// before, or nobody.
func (l *logins) get(ctx context.Context) (login, error) {
	switch {
	case l == nil:
		return login{}, nil
	case l.password != nil:
		password, err := l.password.Get()
		if password == "" {
			return login{}, err
		}
		return login{user: l.user, password: password}, err
	case l.docker == nil:
		return l.ask(ctx, l.helper)
	}
	cfg, err := l.docker.Get()
	if helper := cmp.Or(cfg.helpers[l.host], cfg.store); helper != "" {
		who, helperErr := l.ask(ctx, helper)
		if who != (login{}) || helperErr != nil {
			return who, errors.Join(err, helperErr)
		}
	}
	return cfg.logins[l.host], err
}

// dockerConfig is what a docker config.json says, by canonical registry names.
type dockerConfig struct {
	logins  map[string]login
	helpers map[string]string
	store   string
}

// parseDockerConfig reads a config.json. What it says of a part of a registry
// ("quay.io/org", as podman writes it) is left out: it is not for the whole.
func parseDockerConfig(b []byte) (dockerConfig, error) {
	var raw struct {
		Auths map[string]struct {
			Auth, Username, Password, IdentityToken, RegistryToken string
		} `json:"auths"`
		CredHelpers map[string]string `json:"credHelpers"`
		CredsStore  string            `json:"credsStore"`
	}
	if json.Unmarshal(b, &raw) != nil {
		return dockerConfig{}, errors.New(`it is no configuration of docker's: want JSON with "auths", "credHelpers" or "credsStore"`)
	}
	cfg := dockerConfig{logins: map[string]login{}, helpers: map[string]string{}, store: raw.CredsStore}
	for key, a := range raw.Auths {
		host, ok := dockerHost(key)
		if !ok {
			continue
		}
		who := login{user: a.Username, password: a.Password, identity: a.IdentityToken, bearer: a.RegistryToken}
		if a.Auth != "" {
			plain, err := base64.StdEncoding.DecodeString(a.Auth)
			if err != nil {
				return dockerConfig{}, errors.New("an auth in it is not in base64")
			}
			who.user, who.password, _ = strings.Cut(strings.TrimRight(string(plain), "\x00"), ":")
		}
		if who != (login{}) {
			cfg.logins[host] = who
		}
	}
	for key, helper := range raw.CredHelpers {
		if host, ok := dockerHost(key); ok {
			cfg.helpers[host] = helper
		}
	}
	return cfg, nil
}

// dockerHost reads a key of a config.json, such as https://index.docker.io/v1/.
func dockerHost(key string) (string, bool) {
	_, rest, found := strings.Cut(key, "://")
	if !found {
		rest = key
	}
	host, path, _ := strings.Cut(rest, "/")
	switch strings.TrimSuffix(path, "/") {
	case "", "v1", "v2":
		return canonicalRegistry(host)
	}
	return "", false
}

const helperPrefix = "docker-credential-"

// ask asks a helper. Its answer is good for a minute, and askers at the same
// moment share one run.
func (l *logins) ask(ctx context.Context, helper string) (login, error) {
	if h, ok := l.said.get(helper); ok {
		return h.login, h.err
	}
	done := l.flight.DoChan(helper, func() (any, error) {
		h := helped{}
		h.login, h.err = l.runHelper(context.WithoutCancel(ctx), helper)
		life := helperLife
		if h.err != nil {
			life = helperFailure
		}
		l.said.put(helper, h, life)
		return h, nil
	})
	select {
	case r := <-done:
		h := r.Val.(helped)
		return h.login, h.err
	case <-ctx.Done():
		return login{}, context.Cause(ctx)
	}
}

// runHelper runs docker-credential-<name> for the host, which it may know
// nothing of. Errors quote nothing of what it says.
func (l *logins) runHelper(ctx context.Context, name string) (login, error) {
	if strings.ContainsAny(name, `/\\`) {
		return login{}, errors.New("a credential helper's name holds a slash: want what follows docker-credential- in the program's name")
	}
	ctx, cancel := context.WithTimeout(ctx, l.patience)
	defer cancel()
	running, end := context.WithCancel(ctx)
	defer end()
	server := l.host
	if server == "docker.io" {
		server = "https://index.docker.io/v1/"
	}
	got, err := client.Get(func(args ...string) client.Program {
		cmd := exec.CommandContext(running, helperPrefix+name, args...) //nolint:gosec // G204: the configuration names it
		cmd.WaitDelay = time.Second
		return &program{cmd, end}
	}, server)
	switch {
	case credentials.IsErrCredentialsNotFound(err):
		return login{}, nil
	case ctx.Err() != nil:
		return login{}, fmt.Errorf("%s%s has not answered in %v", helperPrefix, name, l.patience)
	case err != nil:
		return login{}, fmt.Errorf("%s%s has failed: run it by hand with get, and the registry on its input", helperPrefix, name)
	case got.Username == tokenUser:
		return login{identity: got.Secret}, nil
	}
	return login{user: got.Username, password: got.Secret}, nil
}

// program is a helper, of whose answer there is a limit.
type program struct {
	cmd *exec.Cmd
	end func() // kills it
}

// Input is what it is asked.
func (p *program) Input(in io.Reader) { p.cmd.Stdin = in }

// Output runs it.
func (p *program) Output() ([]byte, error) {
	out := capped{full: p.end}
	p.cmd.Stdout = &out
	err := p.cmd.Run()
	return out.b, err
}

// capped takes maxHelper bytes, and then ends the helper.
type capped struct {
	b    []byte
	full func()
}

func (c *capped) Write(p []byte) (int, error) {
	if len(c.b)+len(p) > maxHelper {
		c.full()
		return 0, errors.New("the answer is longer than 64 KiB")
	}
	c.b = append(c.b, p...)
	return len(p), nil
}
