//go:build linux

package region_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/bcrypt"

	"damselfly.dev/supernode"
	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
	"damselfly.dev/test/programs"
)

// recorder is a listener before another one, which keeps all that goes through, both ways.
type recorder struct {
	net.Listener
	to   string
	ways sync.WaitGroup // that are not yet in the file
	mu   sync.Mutex     // guards file
	file *os.File
}

func record(t *testing.T, to, file string) *recorder {
	t.Helper()
	r := &recorder{to: to}
	var err error
	r.Listener, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	r.file, err = os.Create(file)
	require.NoError(t, err)
	t.Cleanup(func() { _ = r.Close(); _ = r.file.Close() })
	go func() {
		for {
			c, err := r.Accept()
			if err != nil {
				return
			}
			go r.relay(c)
		}
	}()
	return r
}

func (r *recorder) relay(c net.Conn) {
	defer func() { _ = c.Close() }()
	other, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", r.to)
	if err != nil {
		return
	}
	defer func() { _ = other.Close() }()
	done := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{c, other}, {other, c}} {
		r.ways.Go(func() {
			var one bytes.Buffer // each way for itself, so that no other splits what is looked for
			_, _ = io.Copy(way[0], io.TeeReader(way[1], &one))
			r.mu.Lock()
			defer r.mu.Unlock()
			_, _ = r.file.Write(one.Bytes())
			done <- struct{}{}
		})
	}
	<-done
}

// forms are the ways in which a secret may be written: as it is, in hex, in a URL,
// and in base64 wherever in it the secret stands.
func forms(secret string) map[string]string {
	all := map[string]string{
		"itself": secret, "hex": hex.EncodeToString([]byte(secret)), "HEX": strings.ToUpper(hex.EncodeToString([]byte(secret))),
		"escaped": url.QueryEscape(secret), "escaped in a path": url.PathEscape(secret),
	}
	for shift := range 3 {
		for name, enc := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
			text := enc.EncodeToString([]byte(strings.Repeat("x", shift) + secret))
			all[fmt.Sprint(name, shift)] = text[(8*shift+5)/6 : 8*(shift+len(secret))/6] // but for what has bits of others
		}
	}
	return all
}

// leaks returns where below a directory there is a secret, but in the files named.
func leaks(t *testing.T, dir string, secrets map[string]string, own map[string][]string) (found []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
	secret:
		for name, s := range secrets {
			for _, suffix := range own[name] {
				if strings.HasSuffix(path, suffix) {
					continue secret
				}
			}
			for form, written := range forms(s) {
				if bytes.Contains(text, []byte(written)) {
					found = append(found, fmt.Sprintf("%s, %s, in %s", name, form, path))
				}
			}
		}
		return nil
	}))
	return found
}

func TestLeaksAreFound(t *testing.T) {
	const secret = "öffne, Sesam/+?"
	dir := t.TempDir()
	for form, written := range map[string]string{
		"itself": secret, "hex": hex.EncodeToString([]byte(secret)), "query": "https://a/?k=" + url.QueryEscape(secret),
		"basic 0": base64.StdEncoding.EncodeToString([]byte("ali:" + secret)), "basic 1": base64.StdEncoding.EncodeToString([]byte("alice:" + secret + "1")),
		"basic 2": base64.URLEncoding.EncodeToString([]byte("al:" + secret + "12")), "own": secret,
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, form), []byte("before "+written+" after"), 0o600))
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "none"), []byte("öffne, Simsim"), 0o600))
	found := strings.Join(leaks(t, dir, map[string]string{"word": secret}, map[string][]string{"word": {"/own"}}), "\n")
	for _, form := range []string{"/itself", "/hex", "/query", "/basic 0", "/basic 1", "/basic 2"} {
		require.Contains(t, found, form)
	}
	require.NotContains(t, found, "/own")
	require.NotContains(t, found, "/none")
}

// site is a region of real processes that log all they can. Below dir are their logs,
// their disks and what went between them; what they are told is elsewhere.
type site struct {
	t           *testing.T
	bin, dir    string
	settings    string // a directory
	centre      string // the supernode's URL
	supernode   *exec.Cmd
	daemons     [2]*exec.Cmd
	hosts       [2]*node
	sockets     [2]string
	metrics     [2]string
	joins       []string // of dfget
	client      *http.Client
	secrets     map[string]string
	own         map[string][]string // the files where one is kept
	proxyHeader string
	recorders   []*recorder
}

// run starts a program, whose log is below dir.
func (s *site) run(program string, args ...string) *exec.Cmd {
	s.t.Helper()
	log, err := os.CreateTemp(filepath.Join(s.dir, "logs"), program+"-")
	require.NoError(s.t, err)
	defer func() { _ = log.Close() }()
	cmd := exec.CommandContext(s.t.Context(), filepath.Join(s.bin, program), append([]string{"--log-level", "debug"}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(s.t, cmd.Start())
	s.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

func (s *site) file(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.settings, name)
	require.NoError(s.t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// answers keeps what is answered at a URL, and returns the status, 0 for none.
func (s *site) answers(c *http.Client, name, at string, header http.Header) int {
	s.t.Helper()
	r, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, at, nil)
	require.NoError(s.t, err)
	r.Header = header
	resp, err := c.Do(r)
	if err != nil {
		return 0
	}
	defer func() { _ = resp.Body.Close() }()
	f, err := os.CreateTemp(filepath.Join(s.dir, "answers"), name+"-")
	require.NoError(s.t, err)
	defer func() { _ = f.Close() }()
	require.NoError(s.t, resp.Header.Write(f))
	_, _ = io.Copy(f, resp.Body)
	return resp.StatusCode
}

func (s *site) awaits(c *http.Client, at string) {
	s.t.Helper()
	require.Eventually(s.t, func() bool { return s.answers(c, "ready", at, nil) == http.StatusOK }, waitLimit, 10*waitTick, at)
}

// newSite starts a supernode and two hosts for a registry that wants tokens and one
// that wants a password, which the region has one of, too; web may be asked by their
// proxies.
func newSite(t *testing.T, bin string, bearer, basic *debian, web *httptest.Server, sealed bool) *site {
	t.Helper()
	s := &site{t: t, bin: bin, dir: t.TempDir(), settings: t.TempDir(), secrets: map[string]string{}, own: map[string][]string{}}
	for _, d := range []string{"logs", "disks", "traffic", "answers"} {
		require.NoError(t, os.Mkdir(filepath.Join(s.dir, d), 0o700))
	}
	s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}}} //nolint:gosec // it looks only

	token, line, err := supernode.NewToken("ops", supernode.RoleAdmin)
	require.NoError(t, err)
	s.secrets["API token"], s.secrets["password"], s.secrets["proxy password"] = token, password, "Pr0xy/pass word"
	hash, err := bcrypt.GenerateFromPassword([]byte(s.secrets["proxy password"]), bcrypt.MinCost)
	require.NoError(t, err)
	users := s.file("users", "carol:"+string(hash)+"\n")
	s.proxyHeader = "Basic " + base64.StdEncoding.EncodeToString([]byte("carol:"+s.secrets["proxy password"]))
	registries := s.file("registries.yaml", fmt.Sprintf(`allow-address: [127.0.0.0/8]
registries:
  - {name: bearer.test, url: %q, ca: %q}
  - {name: basic.test, url: %q, ca: %q}
  - {name: region.test, url: %q, ca: %q, readers: region, credentials: {username: alice, password-file: %q}}
  - {name: away.test, url: "https://127.0.0.1:1"}
`, bearer.url(), bearer.cert, basic.url(), basic.cert, basic.url(), basic.cert, s.file("password", password)))
	free, err := programs.Free(9)
	require.NoError(t, err)
	scheme, flags := "http", []string(nil)
	if sealed {
		scheme = "https"
		dir := filepath.Join(s.settings, "ca")
		ca, err := identity.CreateCA(dir)
		require.NoError(t, err)
		join, err := ca.AddToken(0)
		require.NoError(t, err)
		s.secrets["join token"] = strings.TrimSpace(join.Text())
		s.joins = []string{"--join-token", s.file("token", join.Text())}
		flags = []string{"--ca", dir}
	}
	disk := func(name string) string { return filepath.Join(s.dir, "disks", name) }
	s.supernode = s.run("supernode", append(flags, "--config", registries, "--listen", free[0], "--data-dir", disk("supernode"),
		"--tokens", s.file("tokens", line+"\n"))...)
	s.centre = scheme + "://" + free[0]
	s.awaits(s.client, s.centre+"/readyz")
	region := s.centre
	if sealed { // on loopback in clear it is told credentials
		s.recorders = append(s.recorders, record(t, free[0], filepath.Join(s.dir, "traffic", "supernode")))
		region = scheme + "://" + s.recorders[0].Addr().String()
	}
	for i := range s.hosts {
		at := free[1+4*i:]
		peer := record(t, at[1], filepath.Join(s.dir, "traffic", fmt.Sprint("peer", i)))
		s.recorders = append(s.recorders, peer)
		s.hosts[i], s.metrics[i] = &node{address: at[0], proxy: at[3]}, "http://"+at[2]
		s.sockets[i] = filepath.Join(s.settings, fmt.Sprint("socket", i))
		_, port, _ := net.SplitHostPort(web.Listener.Addr().String())
		s.daemons[i] = s.run("dfdaemon", append(s.joins, "--config", registries, "--supernode", region, "--advertise", peer.Addr().String(),
			"--mirror-listen", at[0], "--peer-listen", at[1], "--metrics-listen", at[2], "--proxy-listen", at[3], "--proxy-users", users,
			"--proxy-ports", port, "--socket", s.sockets[i], "--data-dir", disk(fmt.Sprint("host", i)))...)
		s.awaits(http.DefaultClient, s.metrics[i]+"/readyz")
		require.Eventually(t, func() bool {
			return strings.Contains(string(ask(t, http.DefaultClient, s.metrics[i]+"/metrics", "").body), "damselfly_session_up 1")
		}, waitLimit, 10*waitTick)
	}
	return s
}

// keys makes secrets of the keys on the disks.
func (s *site) keys() {
	s.t.Helper()
	for name, path := range map[string]string{
		"key of the authority": filepath.Join(s.settings, "ca", "ca.key"),
		"key of host 0":        filepath.Join(s.dir, "disks", "host0", "identity", "tls.key"),
		"key of host 1":        filepath.Join(s.dir, "disks", "host1", "identity", "tls.key"),
	} {
		text, err := os.ReadFile(path)
		if err != nil && s.joins == nil {
			continue
		}
		require.NoError(s.t, err)
		block, _ := pem.Decode(text)
		require.NotNil(s.t, block, path)
		s.secrets[name], s.own[name] = string(block.Bytes), []string{strings.TrimPrefix(path, s.dir)}
	}
	seeds, err := os.ReadFile(filepath.Join(s.dir, "disks", "supernode", "ticket.key"))
	require.NoError(s.t, err)
	for i := range 3 {
		name := fmt.Sprint("key of tickets ", i)
		s.secrets[name], s.own[name] = string(seeds[32*i:32*(i+1)]), []string{"/supernode/ticket.key"}
	}
}

// pulls has engines pull on both hosts, with a right and a wrong login.
func (s *site) pulls(of map[string]*debian) {
	s.t.Helper()
	for i, h := range s.hosts {
		for name, d := range of {
			e := &engine{d: d, registry: name, user: user, password: password}
			require.Equal(s.t, http.StatusOK, e.pull(s.t, h, "org/app"), name)
			bad := &engine{d: d, registry: name, user: user, password: "Wr0ng/pass word"}
			if name != "region.test" {
				require.Equal(s.t, http.StatusUnauthorized, bad.pull(s.t, h, "org/app"), name)
				s.secrets[fmt.Sprintf("authorization at %s, %d", name, i)] = strings.TrimPrefix(e.authorization, "Bearer ")
			}
			s.secrets["wrong password"] = bad.password
		}
		s.secrets["token for a registry that is away"] = "aw4y-t0ken-of-alice"
		for _, base := range []string{h.url(), s.centre} {
			s.answers(s.client, "away", base+"/v2/org/app/manifests/v1?ns=away.test", http.Header{"Authorization": {"Bearer aw4y-t0ken-of-alice"}})
		}
	}
}

// reads has URLs read that are secrets, or with some, by dfget in both ways, by the
// route for overlaybd and through the proxy.
func (s *site) reads(web *httptest.Server) {
	s.t.Helper()
	s.secrets["signature of a URL"], s.secrets["header for a URL"], s.secrets["cookie for a URL"] = "s1gn+ature/of=alice", "T0ken-for-a-url", "c00kie-for-a-url"
	query := "?X-Amz-Credential=alice&X-Amz-Signature=" + url.QueryEscape(s.secrets["signature of a URL"])
	headers := []string{"--header", "Authorization: Bearer " + s.secrets["header for a URL"], "--header", "Cookie: c=" + s.secrets["cookie for a URL"]}
	for i := range s.hosts {
		for name, way := range map[string][]string{
			"agent": {"--socket", s.sockets[i]},
			"alone": append([]string{"--supernode", s.centre, "--data-dir", filepath.Join(s.dir, "disks", fmt.Sprint("dfget", i))}, s.joins...),
		} {
			for path, want := range map[string]int{"/file": 0, "/no": 4} {
				out := filepath.Join(s.dir, "disks", fmt.Sprint(name, i))
				cmd := s.run("dfget", append(append(way, headers...), "-o", out, web.URL+path+query)...)
				_ = cmd.Wait()
				require.Equal(s.t, want, cmd.ProcessState.ExitCode(), "%s %s", name, path)
			}
		}
		header := http.Header{"Authorization": {"Bearer " + s.secrets["header for a URL"]}}
		require.Equal(s.t, http.StatusOK, s.answers(http.DefaultClient, "p2p", s.hosts[i].url()+"/p2p/"+web.URL+"/file"+query, header))
		for auth, want := range map[string]int{s.proxyHeader: http.StatusOK, "Basic d3Jvbmc6d3Jvbmc=": http.StatusProxyAuthRequired} {
			proxied := &http.Client{Transport: &http.Transport{
				Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: s.hosts[i].proxy}), ProxyConnectHeader: http.Header{"Proxy-Authorization": {auth}},
			}}
			require.Equal(s.t, want, s.answers(proxied, "proxy", web.URL+"/file"+query, http.Header{"Proxy-Authorization": {auth}}))
		}
	}
}

// looks asks for all that the parts say of themselves.
func (s *site) looks() {
	s.t.Helper()
	s.secrets["wrong API token"] = "dmf_wr0ngwr0ngwr0ng"
	for _, token := range []string{s.secrets["API token"], s.secrets["wrong API token"], ""} {
		for _, path := range []string{"/v1/tasks", "/v1/hosts", "/metrics", "/healthz", "/readyz", "/debug/pprof/", "/debug/vars", "/"} {
			s.answers(s.client, "supernode", s.centre+path, http.Header{"Authorization": {"Bearer " + token}})
		}
	}
	for i := range s.hosts {
		unix := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", s.sockets[i])
		}}}
		for _, path := range []string{"/metrics", "/healthz", "/debug/pprof/", "/debug/vars", "/", "/v1/tasks"} {
			s.answers(http.DefaultClient, "host", s.metrics[i]+path, nil)
			s.answers(http.DefaultClient, "mirror", s.hosts[i].url()+path, nil)
			s.answers(unix, "socket", "http://socket"+path, nil)
		}
	}
}

// crash ends all by signals at which the runtime says what it is at.
func (s *site) crash() {
	s.t.Helper()
	for i, cmd := range []*exec.Cmd{s.supernode, s.daemons[0], s.daemons[1]} {
		require.NoError(s.t, cmd.Process.Signal([]os.Signal{syscall.SIGQUIT, syscall.SIGQUIT, syscall.SIGABRT}[i]))
		_ = cmd.Wait()
		require.Equal(s.t, 2, cmd.ProcessState.ExitCode())
	}
	for _, r := range s.recorders {
		r.ways.Wait() // all connections have ended
	}
}

// A run with secrets of every kind, failures and a crash at its end leaves none of
// them in a log, a metric, an answer, on a disk, or on the wire.
func TestNoSecretIsLeftAnywhere(t *testing.T) {
	bearer, basic := startDebian(t, "127.0.0.1", true), startDebian(t, "127.0.0.1", false)
	bearer.push(t, "org/app")
	basic.push(t, "org/app")
	bin := t.TempDir()
	require.NoError(t, programs.Build(t.Context(), bin))
	content := bytes.Repeat([]byte("what a URL gives "), 20_000)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/file" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		http.ServeContent(w, r, "", time.Unix(1e9, 0), bytes.NewReader(content))
	}))
	t.Cleanup(web.Close)
	for name, sealed := range map[string]bool{"with TLS": true, "on loopback": false} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, bin, bearer, basic, web, sealed)
			s.pulls(map[string]*debian{"bearer.test": bearer, "basic.test": basic, "region.test": basic})
			s.reads(web)
			s.looks()
			s.keys()
			if !sealed { // whether or not the scheduler has sent one host to the other
				s.answers(http.DefaultClient, "peer", "http://"+s.recorders[0].Addr().String()+api.TasksPath+"/a/content", http.Header{api.TicketHeader: {"none"}})
			}
			s.crash()
			require.Greater(t, len(s.secrets), 12)
			for _, l := range leaks(t, s.dir, s.secrets, s.own) {
				t.Error("leaked: ", l)
			}

			seen := strings.Join(leaks(t, s.dir, map[string]string{"goroutines": "goroutine 1 ", "debug": `"debug"`, "header": "Damselfly-Ticket: "}, nil), "\n")
			for _, where := range []string{"goroutines, itself, in " + s.dir + "/logs/supernode", "goroutines, itself, in " + s.dir + "/logs/dfdaemon", "debug, itself"} {
				require.Contains(t, seen, where, "it was looked at")
			}
			require.Equal(t, !sealed, strings.Contains(seen, "header, itself, in "+s.dir+"/traffic/peer"))
			if sealed {
				info, err := os.Stat(filepath.Join(s.dir, "traffic", "supernode"))
				require.NoError(t, err)
				require.Greater(t, info.Size(), int64(100_000))
			}
		})
	}
}
