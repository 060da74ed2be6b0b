package registryproxy

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// write puts a file there as an operator does, with a new time.
func write(t *testing.T, path, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path+".new", []byte(text), 0o600))
	require.NoError(t, os.Rename(path+".new", path))
}

func basicOf(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

func TestParseDockerConfig(t *testing.T) {
	cfg, err := parseDockerConfig([]byte(`{
		"auths": {
			"https://index.docker.io/v1/": {"auth": "aHViOmE6Yg=="},
			"Quay.io": {"username": "q", "password": "p"},
			"http://reg.test:5000/v2/": {"auth": "eDp5AA=="},
			"[fd00::1]:5000": {"auth": "eDp5"},
			"quay.io/org": {"auth": "bm86bm8="},
			"acr.test": {"auth": "MDAwMDo=", "identitytoken": "refresh"},
			"gitlab.test": {"registrytoken": "jwt"},
			"empty.test": {}, "not a host": {"auth": "eDp5"}
		},
		"credHelpers": {"gcr.io": "gcloud", "https://ecr.test": "ecr-login"},
		"credsStore": "pass", "HttpHeaders": {"a": "b"}, "currentContext": "x"}`))
	require.NoError(t, err)
	require.Equal(t, dockerConfig{
		logins: map[string]login{
			"docker.io": {user: "hub", password: "a:b"}, "quay.io": {user: "q", password: "p"},
			"reg.test:5000": {user: "x", password: "y"}, "[fd00::1]:5000": {user: "x", password: "y"},
			"acr.test": {user: "0000", identity: "refresh"}, "gitlab.test": {bearer: "jwt"},
		},
		helpers: map[string]string{"gcr.io": "gcloud", "ecr.test": "ecr-login"}, store: "pass",
	}, cfg)
	for _, wrong := range []string{"", "[]", `{"auths": []}`, `{"auths": {"a.b": {"auth": "%"}}}`} {
		_, err := parseDockerConfig([]byte(wrong))
		require.Error(t, err, wrong)
	}
}

func FuzzDockerConfig(f *testing.F) {
	f.Add([]byte(`{"auths": {"https://index.docker.io/v1/": {"auth": "aHViOmE6Yg=="}}, "credsStore": "x"}`))
	f.Add([]byte(`{"auths": {"a/b": {"identitytoken": "x"}}, "credHelpers": {"[::1]": "y"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		cfg, err := parseDockerConfig(b)
		for host := range cfg.logins {
			if canonical, ok := canonicalRegistry(host); err == nil && (!ok || canonical != host) {
				t.Fatalf("host %q", host)
			}
		}
	})
}

// locked is a registry that wants a user and a password, which it says in one way
// or another.
type locked struct {
	want atomic.Value // the Authorization
	seen sync.Map     // those it has seen
	n    atomic.Int64
}

func (l *locked) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.n.Add(1)
	l.seen.Store(r.Header.Get("Authorization"), true)
	if r.Header.Get("Authorization") != l.want.Load() {
		w.Header().Set("Www-Authenticate", `Basic realm="reg.test"`)
		WriteError(w, &Error{401, "UNAUTHORIZED", "the registry's own words"})
		return
	}
	sourceOf("{}", "blob")(w, r)
}

// Configured credentials are used where a caller has none, and are those that the
// file says now.
func TestConfiguredCredentials(t *testing.T) {
	dir := t.TempDir()
	password, docker := filepath.Join(dir, "password"), filepath.Join(dir, "config.json")
	dockerText := func(secret string) string {
		return fmt.Sprintf(`{"auths": {"reg.test": {"auth": %q}}}`, base64.StdEncoding.EncodeToString([]byte("bob:"+secret)))
	}
	for name, tt := range map[string]struct {
		path string
		text func(secret string) string
		cfg  Credentials
	}{
		"password": {password, func(s string) string { return s + "\n" }, Credentials{Username: "bob", PasswordFile: password}},
		"docker":   {docker, dockerText, Credentials{DockerConfig: docker}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				write(t, tt.path, tt.text("one"))
				net := newNetwork(t)
				l := &locked{}
				l.want.Store(basicOf("bob", "one"))
				net.serve("reg.test:443", l)
				net.serve("other.test:443", l)
				c := net.client(Config{Upstreams: []Upstream{{Name: "reg.test", Readers: ReadersRegion, Credentials: tt.cfg}}})
				ask := func(who Caller) error {
					_, err := c.Manifest(t.Context(), false, public, "latest", nil, who)
					return err
				}
				require.NoError(t, ask(Caller{}))
				require.EqualValues(t, 2, l.n.Load())
				require.NoError(t, ask(Caller{}))
				require.EqualValues(t, 3, l.n.Load(), "it is known what the registry wants")
				require.Equal(t, 401, refusalOf(t, ask(Caller{alice})).Status, "the caller's own go first, and alone")
				require.EqualValues(t, 4, l.n.Load())

				l.want.Store(basicOf("bob", "two"))
				require.Equal(t, `Basic realm="reg.test"`, refusalOf(t, ask(Caller{})).Header.Get("Www-Authenticate"))
				write(t, tt.path, tt.text("two"))
				require.NoError(t, ask(Caller{}))
				require.Zero(t, c.logs.Len())

				write(t, tt.path, "\n\n") // that of before does, and it is said
				require.NoError(t, ask(Caller{}))
				require.NoError(t, ask(Caller{}))
				require.Equal(t, 1, c.logs.FilterMessage("credentials cannot be read").Len())
				require.NoError(t, os.Remove(tt.path))
				require.Equal(t, 401, refusalOf(t, ask(Caller{})).Status)

				_, err := c.Manifest(t.Context(), false, Repository{"other.test", "app"}, "latest", nil, Caller{})
				require.Equal(t, 401, refusalOf(t, err).Status, "they are not for others")

				require.True(t, c.IsPublic("other.test", Caller{}))
				require.False(t, c.IsPublic("other.test", Caller{alice}))
				require.False(t, c.IsPublic("reg.test", Caller{}))
			})
		})
	}
}

// What is read by the region's credentials is not public, and its readers are
// those that the setting names.
func TestAccessByConfiguredCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "password")
		write(t, path, "one")
		net := newNetwork(t)
		l := &locked{}
		l.want.Store(basicOf("bob", "one"))
		net.serve("reg.test:443", l)
		c := net.client(Config{Upstreams: []Upstream{{Name: "reg.test", Readers: ReadersRegion, Credentials: Credentials{Username: "bob", PasswordFile: path}}}})
		a := newAccess(c.Client)
		for _, who := range []Caller{{alice}, {}} { // all the region reads
			v, err := a.Check(t.Context(), Route{KindManifest, public, digestOf("{}")}, who, true)
			require.NoError(t, err)
			require.Equal(t, Verdict{}, why(v))
		}
	})
}

// With a token server the credentials go there, and to the registry goes a token;
// where it does not take them there are anonymous ones.
func TestTokenByCredentials(t *testing.T) {
	private := Repository{"reg.test", "private/app"}
	for name, tt := range map[string]struct {
		text string
		fine bool
	}{
		"right":          {fmt.Sprintf(`{"auths": {"reg.test": {"auth": %q}}}`, strings.TrimPrefix(alice, "Basic ")), true},
		"wrong":          {`{"auths": {"reg.test": {"auth": "eDp5"}}}`, false},
		"refresh token":  {`{"auths": {"reg.test": {"identitytoken": "refresh"}}}`, true},
		"token itself":   {`{"auths": {"reg.test": {"registrytoken": "hers"}}}`, true},
		"another's":      {fmt.Sprintf(`{"auths": {"other.test": {"auth": %q}}}`, strings.TrimPrefix(alice, "Basic ")), false},
		"without a name": {`{}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "config.json")
				write(t, path, tt.text)
				net := newNetwork(t)
				tr := newTokenRegistry(net)
				tr.scope["hers"], tr.until["hers"] = "repository:private/app:pull", time.Now().Add(time.Hour)
				net.handle("auth.test:443", func(w http.ResponseWriter, r *http.Request) {
					if r.Header.Get("Authorization") == "Basic eDp5" {
						w.WriteHeader(http.StatusUnauthorized)
						return
					}
					if r.Method == http.MethodPost {
						assert.NoError(t, r.ParseForm())
						assert.Equal(t, "refresh_token refresh reg.test repository:private/app:pull damselfly", strings.Join([]string{
							r.Form.Get("grant_type"), r.Form.Get("refresh_token"), r.Form.Get("service"), r.Form.Get("scope"), r.Form.Get("client_id"),
						}, " "))
						_, _ = w.Write([]byte(`{"access_token":"hers"}`))
						return
					}
					tr.server(w, r)
				})
				c := net.client(Config{Upstreams: []Upstream{{Name: "reg.test", Readers: ReadersRegion, Credentials: Credentials{DockerConfig: path}}}})
				for range 2 {
					_, err := c.Manifest(t.Context(), false, private, "latest", nil, Caller{})
					if tt.fine {
						require.NoError(t, err)
					} else {
						require.Equal(t, 401, refusalOf(t, err).Status)
						require.Contains(t, refusalOf(t, err).Header.Get("Www-Authenticate"), `realm="https://auth.test/token?x=y"`)
					}
				}
				if tt.fine {
					return
				}
				_, err := c.Manifest(t.Context(), false, public, "latest", nil, Caller{})
				require.NoError(t, err, "what is public stays so")
			})
		})
	}
}

// helper puts docker-credential-<name> into PATH.
func helper(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, helperPrefix+name), []byte("#!/bin/sh\n"+script), 0o755)) //nolint:gosec // G306: a program
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// A helper is run once for many, with the registry's name as docker says it, and
// what goes wrong with it is no more than credentials that are not there.
func TestHelper(t *testing.T) {
	runs := filepath.Join(t.TempDir(), "runs")
	script := func(s string) string {
		return "read server; echo \"$1 $server\" >>" + runs + "\n" + s
	}
	for name, tt := range map[string]struct {
		script string
		want   login
		fails  bool
	}{
		"password":   {script: `echo '{"ServerURL":"x","Username":"bob","Secret":"one"}'`, want: login{user: "bob", password: "one"}},
		"identity":   {script: `echo '{"Username":"<token>","Secret":"refresh"}'`, want: login{identity: "refresh"}},
		"not known":  {script: `echo credentials not found in native keychain; exit 1`},
		"failure":    {script: `echo s3cr3t; exit 3`, fails: true},
		"nonsense":   {script: `echo s3cr3t`, fails: true},
		"no end":     {script: `while :; do echo s3cr3ts3cr3ts3cr3ts3cr3t; done`, fails: true},
		"its own no": {script: `echo no credentials server URL; exit 1`, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			_ = os.Remove(runs)
			helper(t, "test", script(tt.script))
			l, err := newLogins("docker.io", Credentials{Helper: "test"})
			require.NoError(t, err)
			l.patience = time.Minute // what says too much is ended before
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					got, err := l.get(t.Context())
					require.Equal(t, tt.want, got)
					require.Equal(t, tt.fails, err != nil)
					if err != nil {
						require.NotContains(t, err.Error(), "s3cr3t")
						require.Contains(t, err.Error(), "docker-credential-test")
					}
				})
			}
			wg.Wait()
			b, err := os.ReadFile(runs)
			require.NoError(t, err)
			require.Equal(t, "get https://index.docker.io/v1/\n", string(b))
		})
	}
}

// A helper that hangs holds nobody up for long. (Its clock is the real one.)
func TestHelperThatHangs(t *testing.T) {
	helper(t, "hangs", "exec sleep 60")
	l, err := newLogins("reg.test", Credentials{Helper: "hangs"})
	require.NoError(t, err)
	require.Equal(t, helperTime, l.patience)
	l.patience = 10 * time.Millisecond
	_, err = l.get(t.Context())
	require.ErrorContains(t, err, "docker-credential-hangs has not answered in 10ms")
	_, err = l.runHelper(t.Context(), "../x")
	require.ErrorContains(t, err, "holds a slash")
}

// A config.json's helper comes before its auths, which are for what it does not know.
func TestHelpersOfDockerConfig(t *testing.T) {
	helper(t, "store", `read s; case $s in a.test) echo '{"Username":"store","Secret":"x"}';; *) echo credentials not found in native keychain; exit 1; esac`)
	helper(t, "own", `echo '{"Username":"own","Secret":"x"}'`)
	path := filepath.Join(t.TempDir(), "config.json")
	write(t, path, `{"credsStore": "store", "credHelpers": {"b.test": "own", "d.test": "missing"}, "auths": {"a.test": {"auth": "eDp5"}, "b.test": {}, "c.test": {"auth": "eDp5"}}}`)
	for host, want := range map[string]login{
		"a.test": {user: "store", password: "x"}, "b.test": {user: "own", password: "x"}, "c.test": {user: "x", password: "y"}, "e.test": {},
	} {
		l, err := newLogins(host, Credentials{DockerConfig: path})
		require.NoError(t, err)
		got, err := l.get(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, got, host)
	}
	l, err := newLogins("d.test", Credentials{DockerConfig: path})
	require.NoError(t, err)
	_, err = l.get(t.Context())
	require.ErrorContains(t, err, "docker-credential-missing has failed")
}

// Nothing prints a login.
func TestLoginIsNotPrinted(t *testing.T) {
	who := login{user: "us3r", password: "s3cr3t", identity: "s3cr3t", bearer: "s3cr3t"}
	core, logs := observer.New(zap.DebugLevel)
	zap.New(core).Info("x", zap.Any("who", who), zap.Stringer("who", who))
	require.NotContains(t, fmt.Sprintf("%v %+v %#v %s %q %v", who, who, who, who, who, logs.All()), "s3cr3t")
	require.Equal(t, "anonymous", login{}.String())
}
