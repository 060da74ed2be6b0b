package region_test

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"golang.org/x/crypto/bcrypt"

	"damselfly.dev/dfdaemon"
	"damselfly.dev/dfget"
	"damselfly.dev/registryproxy"
	"damselfly.dev/test/registry/token"
)

// logged counts what the registry says in its own log that it has answered with 2xx,
// as "GET /v2/…", since it was so long.
func (d *debian) logged(t *testing.T, since int64) map[string]int {
	t.Helper()
	f, err := os.Open(d.log)
	require.NoError(t, err)
	defer func() { _ = f.Close() }()
	_, err = f.Seek(since, io.SeekStart)
	require.NoError(t, err)
	counts := map[string]int{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var l struct {
			Message string `json:"msg"`
			Method  string `json:"http.request.method"`
			URI     string `json:"http.request.uri"`
			Status  int    `json:"http.response.status"`
		}
		if json.Unmarshal(lines.Bytes(), &l) == nil && l.Message == "response completed" && l.Status < 300 {
			counts[l.Method+" "+l.URI]++
		}
	}
	require.NoError(t, lines.Err())
	return counts
}

// logSize is how long the registry's log is.
func (d *debian) logSize(t *testing.T) int64 {
	t.Helper()
	info, err := os.Stat(d.log)
	require.NoError(t, err)
	return info.Size()
}

// addUser adds one with alice's password.
func (d *debian) addUser(t *testing.T, name string) {
	t.Helper()
	if d.tokens != nil {
		d.tokens.Users[name] = password
		return
	}
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	require.NoError(t, err)
	f, err := os.OpenFile(d.users, os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = fmt.Fprintf(f, "%s:%s\n", name, hash)
	require.NoError(t, errors.Join(err, f.Close()))
}

// pushImage puts an image of so many layers there, as org/app.
func (d *debian) pushImage(t *testing.T, layers int64) v1.Image {
	t.Helper()
	const repo = "org/app"
	img, err := random.Image(200_000, layers)
	require.NoError(t, err)
	d.put(t, repo, d.login(t, user, repo, "pull,push"), img)
	return img
}

// put puts an image there as v1.
func (d *debian) put(t *testing.T, repo, authorization string, img v1.Image) {
	t.Helper()
	ref, err := name.ParseReference(d.address + "/" + repo + ":v1")
	require.NoError(t, err)
	require.NoError(t, remote.Write(ref, img, remote.WithTransport(as{d.client.Transport, authorization})))
}

// login returns an Authorization by which a user reads a repository.
func (d *debian) login(t *testing.T, name, repo, actions string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, d.realm+"?service=registry.tests&scope=repository:"+repo+":"+actions, nil)
	require.NoError(t, err)
	r.SetBasicAuth(name, password)
	if d.tokens == nil {
		return r.Header.Get("Authorization")
	}
	got := d.token(t, r.URL.String(), r.Header.Get("Authorization"))
	require.NotEmpty(t, got)
	return got
}

// front is a way to a registry in plain HTTP, or over TLS as itself. It counts the
// HEADs of manifests: those that each caller's credentials have been accepted with,
// and with "" the others.
type front struct {
	*httptest.Server
	mu    sync.Mutex
	heads map[string]int
}

func newFront(t *testing.T, d *debian, secure bool) *front {
	t.Helper()
	to, err := url.Parse(d.url())
	require.NoError(t, err)
	f := &front{heads: map[string]int{}}
	f.Server = httptest.NewUnstartedServer(&httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(to); r.Out.Host = r.In.Host },
		Transport: d.client.Transport,
		ModifyResponse: func(a *http.Response) error {
			if a.Request.Method != http.MethodHead || !strings.Contains(a.Request.URL.Path, "/manifests/") {
				return nil
			}
			who := a.Request.Header.Get("Authorization")
			if a.StatusCode != http.StatusOK {
				who = ""
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			f.heads[who]++
			return nil
		},
	})
	if secure {
		f.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{d.der}, PrivateKey: d.key}}, MinVersion: tls.VersionTLS12}
		f.StartTLS()
	} else {
		f.Start()
	}
	t.Cleanup(f.Close)
	return f
}

// counts returns what has been counted.
func (f *front) counts() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.heads)
}

// Thirty hosts pull a private image at once, each with a token of its own: the
// registry gives each blob and the manifest once, and is asked about each host once.
func TestFlashCrowdOfAPrivateImage(t *testing.T) {
	const hosts, layers = 30, 12
	d := startDebian(t, "127.0.0.1", true)
	d.pushImage(t, layers)
	f := newFront(t, d, true)
	cfg := registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: registryName, URL: f.URL, TLS: registryproxy.TLS{CA: d.cert}}}}
	dir := t.TempDir()
	centre := startSupernodeFor(t, cfg, dir, "")
	crowd := make([]*node, hosts)
	for i := range crowd {
		crowd[i] = startHostFor(t, cfg, centre, nil)
		d.addUser(t, fmt.Sprint("user", i))
	}
	since := d.logSize(t)
	var wg sync.WaitGroup
	status := make([]int, hosts)
	for i, h := range crowd {
		wg.Go(func() {
			e := engine{d: d, user: fmt.Sprint("user", i), password: password}
			status[i] = e.pull(t, h, "org/app")
		})
	}
	wg.Wait()
	for i := range crowd {
		require.Equal(t, http.StatusOK, status[i], "host %d", i)
		require.Zero(t, crowd[i].value(t, "damselfly_fallbacks_total", ""))
	}
	counts := d.logged(t, since)
	gets, heads, sizes := 0, 0, 0
	for what, n := range counts {
		switch {
		case strings.HasPrefix(what, "HEAD") && strings.Contains(what, "/blobs/"):
			sizes += n
		case strings.HasPrefix(what, "HEAD"):
			heads += n
		default:
			require.Equal(t, 1, n, what)
			gets++
		}
	}
	accepted := f.counts()
	anonymous := accepted[""]
	delete(accepted, "")
	t.Logf("%d hosts: %d GETs, %d HEADs of manifests and %d of blobs; %d HEADs refused", hosts, gets, heads, sizes, anonymous)
	require.Equal(t, 1+1+layers, gets, "manifest, config and layers: %v", counts)
	require.LessOrEqual(t, heads, hosts)
	for _, n := range accepted {
		require.Equal(t, 1, n, "HEADs of one host")
	}
	require.LessOrEqual(t, sizes, 1, "the length of what is small and opened ahead")
	require.LessOrEqual(t, anonymous, 8, "what has no credentials is asked for once in five seconds")

	// After a restart nobody is known as a reader; what the repository holds is.
	centre.end()
	again := startSupernodeFor(t, cfg, dir, centre.address)
	late, since := startHostFor(t, cfg, again, nil), d.logSize(t)
	require.Equal(t, http.StatusOK, (&engine{d: d, user: user, password: password}).pull(t, late, "org/app"))
	require.Equal(t, map[string]int{"HEAD /v2/org/app/manifests/v1": 1}, d.logged(t, since))
}

// attacker is one without the right to read, with what it has.
type attacker struct {
	name, authorization string
}

// attackers are those that a registry of d's kind knows.
func (d *debian) attackers(t *testing.T) []attacker {
	t.Helper()
	basic := func(name, password string) string {
		r := &http.Request{Header: http.Header{}}
		r.SetBasicAuth(name, password)
		return r.Header.Get("Authorization")
	}
	all := []attacker{{"none", ""}}
	if d.tokens == nil {
		d.addUser(t, "revoked")
		revoked := basic("revoked", password)
		at := d.url() + "/v2/org/app/manifests/v1"
		require.Equal(t, http.StatusOK, ask(t, d.client, at, revoked).status)
		users, err := os.ReadFile(d.users)
		require.NoError(t, err)
		before, _, _ := strings.Cut(string(users), "revoked:")
		require.Eventually(t, func() bool { // it looks at the file's time of change
			require.NoError(t, os.WriteFile(d.users, []byte(before), 0o600))
			return ask(t, d.client, at, revoked).status == http.StatusUnauthorized
		}, waitLimit, 10*waitTick)
		return append(all, attacker{"wrong", basic(user, "wrong")}, attacker{"unknown", basic("mallory", password)}, attacker{"revoked", revoked})
	}
	d.tokens.Users["mallory"] = password
	d.tokens.Below = map[string]string{"mallory": "mallory/"}
	expired := &token.Server{Issuer: d.tokens.Issuer, Service: d.tokens.Service, Users: d.tokens.Users, Key: d.key, Chain: d.tokens.Chain, Life: -2 * time.Minute}
	s := httptest.NewServer(expired)
	t.Cleanup(s.Close)
	stranger := newPKI(t)
	forged := &token.Server{Issuer: d.tokens.Issuer, Service: d.tokens.Service, Users: d.tokens.Users, Key: stranger.key, Chain: [][]byte{stranger.der}}
	f := httptest.NewServer(forged)
	t.Cleanup(f.Close)
	scope := "?service=registry.tests&scope=repository:org/app:pull"
	return append(all,
		attacker{"expired", d.token(t, s.URL+scope, basic(user, password))},
		attacker{"forged", d.token(t, f.URL+scope, basic(user, password))},
		attacker{"of another", d.login(t, "mallory", "org/app", "pull")},
		attacker{"for another repository", d.login(t, "mallory", "mallory/app", "pull")},
		attacker{"wrong", "Bearer wrong"}, attacker{"a password", basic(user, password)},
	)
}

// crowd has hosts pull org/app again and again until the end of the test, as users
// who may.
func (d *debian) crowd(t *testing.T, hosts []*node) (stop func()) {
	t.Helper()
	done := make(chan struct{})
	var wg sync.WaitGroup
	for i, h := range hosts {
		d.addUser(t, fmt.Sprint("user", i))
		wg.Go(func() {
			for pulls := 0; ; pulls++ {
				select {
				case <-done:
					if pulls > 0 {
						return
					}
				default:
				}
				e := engine{d: d, user: fmt.Sprint("user", i), password: password}
				if got := e.pull(t, h, "org/app"); got != http.StatusOK {
					t.Errorf("entitled host %d: status %d", i, got)
					return
				}
			}
		})
	}
	return sync.OnceFunc(func() { close(done); wg.Wait() })
}

// Whoever may not read gets the registry's own no from the region, however asked for,
// while a crowd of others pulls the same.
func TestNobodyElseReadsAPrivateImage(t *testing.T) {
	for kind, bearer := range map[string]bool{"a password": false, "a token": true} {
		t.Run(kind, func(t *testing.T) {
			d := startDebian(t, "127.0.0.1", bearer)
			img := d.pushImage(t, 3)
			f, evil := newFront(t, d, false), newClaimer(t)
			at, err := url.Parse(f.URL)
			require.NoError(t, err)
			cfg := registryproxy.Config{Upstreams: []registryproxy.Upstream{
				{Name: registryName, URL: d.url(), TLS: registryproxy.TLS{CA: d.cert}},
				{Name: at.Host, URL: f.URL}, // the same, as whole URLs name it
				{Name: "evil.test", URL: evil.URL},
			}}
			centre := startSupernodeFor(t, cfg, t.TempDir(), "")
			socket := filepath.Join(t.TempDir(), "dfdaemon.sock")
			target := startHostFor(t, cfg, centre, nil, func(c *dfdaemon.Config) { c.Socket = socket })
			hosts := []*node{target, startHostFor(t, cfg, centre, nil), startHostFor(t, cfg, centre, nil)}
			attackers := d.attackers(t)
			stop := d.crowd(t, hosts)
			defer stop()
			e := engine{d: d, user: user, password: password}
			require.Equal(t, http.StatusOK, e.pull(t, target, "org/app"))

			v := newVictim(t, img)
			for _, a := range attackers {
				t.Run(a.name, func(t *testing.T) {
					v.byMirrors(t, d, a, target, centre)
					v.byURL(t, f, a, target)
					v.byDfget(t, f, a, centre, socket)
					v.byOwnRegistry(t, a, target, centre, evil)
				})
			}
			if bearer {
				t.Run("who wrote a manifest that names it", func(t *testing.T) { v.byOwnManifest(t, d, target, centre) })
			}
		})
	}
}

// victim is a private image.
type victim struct {
	manifest, layer string // digests
}

func newVictim(t *testing.T, img v1.Image) *victim {
	t.Helper()
	m, err := img.Digest()
	require.NoError(t, err)
	layers, err := img.Layers()
	require.NoError(t, err)
	l, err := layers[0].Digest()
	require.NoError(t, err)
	return &victim{m.String(), l.String()}
}

// request is one that an attacker makes.
func request(t *testing.T, c *http.Client, method, at, authorization, span string) said {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, at, nil)
	require.NoError(t, err)
	r.Header.Set("Accept", "*/*")
	for k, s := range map[string]string{"Authorization": authorization, "Range": span} {
		if s != "" {
			r.Header.Set(k, s)
		}
	}
	resp, err := c.Do(r)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return said{resp.StatusCode, resp.Header, b}
}

// byMirrors asks both mirrors for everything, and wants what the registry says.
func (v *victim) byMirrors(t *testing.T, d *debian, a attacker, host, centre *node) {
	t.Helper()
	for _, repo := range []string{"org/app", "org/other", "mallory/app"} {
		for _, path := range []string{"/manifests/v1", "/manifests/" + v.manifest, "/blobs/" + v.layer} {
			path = "/v2/" + repo + path
			own := request(t, d.client, http.MethodGet, d.url()+path, a.authorization, "")
			require.Contains(t, []int{401, 403, 404}, own.status, path)
			for _, at := range []string{host.url(), centre.url()} {
				for _, method := range []string{http.MethodGet, http.MethodHead} {
					for _, span := range []string{"", "bytes=0-99", "bytes=-5"} {
						got := request(t, secure().client(at), method, at+path+"?ns="+registryName, a.authorization, span)
						require.Equal(t, own.status, got.status, "%s %s %s", method, at+path, span)
						require.Equal(t, own.header["Www-Authenticate"], got.header["Www-Authenticate"], "%s %s", method, at+path)
						if method == http.MethodGet {
							require.Equal(t, string(own.body), string(got.body), path)
						}
					}
				}
			}
		}
	}
}

// byURL asks as overlaybd does, by the whole URL.
func (v *victim) byURL(t *testing.T, f *front, a attacker, host *node) {
	t.Helper()
	for _, path := range []string{"/v2/org/app/blobs/" + v.layer, "/v2/org/app/manifests/" + v.manifest} {
		own := request(t, http.DefaultClient, http.MethodGet, f.URL+path, a.authorization, "")
		got := request(t, http.DefaultClient, http.MethodGet, host.url()+"/p2p/"+f.URL+path, a.authorization, "bytes=0-99")
		require.Equal(t, own.status, got.status, path)
		require.Equal(t, string(own.body), string(got.body), path)
	}
}

// byDfget asks as a peer of its own, and through the host's agent; by the digest, too.
func (v *victim) byDfget(t *testing.T, f *front, a attacker, centre *node, socket string) {
	t.Helper()
	header := http.Header{}
	if a.authorization != "" {
		header.Set("Authorization", a.authorization)
	}
	for i, d := range []dfget.Download{
		{Peer: dfget.PeerConfig{Supernodes: []string{centre.url()}, Advertise: "127.0.0.1"}}, {Socket: socket},
	} {
		for _, of := range []string{"", v.layer} {
			d.URL, d.Digest, d.Header = f.URL+"/v2/org/app/blobs/"+v.layer, of, header
			d.Output, d.DataDir, d.Log = filepath.Join(t.TempDir(), "out"), t.TempDir(), zap.NewNop()
			err := d.Run(t.Context())
			no, ok := errors.AsType[*dfget.RefusedError](err)
			require.True(t, ok, "%d %q: %v", i, of, err)
			require.Equal(t, http.StatusUnauthorized, no.Status)
			require.NoFileExists(t, d.Output)
		}
	}
}

// claimer is an attacker's registry, which says that it has whatever it is asked for.
type claimer struct{ *httptest.Server }

const claimed = "the attacker's own bytes"

func newClaimer(t *testing.T) *claimer {
	t.Helper()
	c := &claimer{httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Docker-Content-Digest", r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:])
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		_, _ = io.WriteString(w, claimed)
	}))}
	t.Cleanup(c.Close)
	return c
}

// byOwnRegistry asks for the digests under a registry of the attacker's.
func (v *victim) byOwnRegistry(t *testing.T, a attacker, host, centre *node, evil *claimer) {
	t.Helper()
	for _, path := range []string{"/manifests/" + v.manifest, "/blobs/" + v.layer} {
		for _, at := range []string{host.url(), centre.url()} {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, at+"/v2/org/app"+path+"?ns=evil.test", nil)
			require.NoError(t, err)
			r.Header.Set("Authorization", a.authorization)
			resp, err := secure().client(at).Do(r)
			if err != nil {
				continue
			}
			b, _ := io.ReadAll(resp.Body) // what breaks off is no leak
			_ = resp.Body.Close()
			require.NotContains(t, []string{v.manifest, v.layer}, digest.FromBytes(b).String())
			require.LessOrEqual(t, len(b), 1000)
		}
	}
	out := filepath.Join(t.TempDir(), "out")
	d := dfget.Download{
		URL: evil.URL + "/v2/org/app/blobs/" + v.layer, Digest: v.layer, Output: out, DataDir: t.TempDir(), Log: zap.NewNop(),
		Peer: dfget.PeerConfig{Supernodes: []string{centre.url()}, Advertise: "127.0.0.1"},
	}
	require.Error(t, d.Run(t.Context()))
	require.NoFileExists(t, out)
}

// byOwnManifest has mallory write a manifest that names the layer, which the registry
// takes for a layer that is elsewhere, and ask for it in mallory's own repository.
func (v *victim) byOwnManifest(t *testing.T, d *debian, host, centre *node) {
	t.Helper()
	may := d.login(t, "mallory", "mallory/app", "pull,push")
	img, err := random.Image(1000, 1)
	require.NoError(t, err)
	d.put(t, "mallory/app", may, img)
	raw, err := img.RawManifest()
	require.NoError(t, err)
	var m map[string]any
	require.NoError(t, json.Unmarshal(raw, &m))
	m["layers"] = append(m["layers"].([]any), map[string]any{
		"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "size": 200_000, "digest": v.layer,
		"urls": []string{"https://example.com/layer"},
	})
	b, err := json.Marshal(m)
	require.NoError(t, err)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, d.url()+"/v2/mallory/app/manifests/stolen", strings.NewReader(string(b)))
	require.NoError(t, err)
	r.Header.Set("Authorization", may)
	r.Header.Set("Content-Type", m["mediaType"].(string))
	resp, err := d.client.Do(r)
	require.NoError(t, err)
	_ = resp.Body.Close()
	require.Equal(t, http.StatusCreated, resp.StatusCode)
	for _, at := range []string{host.url(), centre.url()} {
		got := request(t, secure().client(at), http.MethodGet, at+"/v2/mallory/app/manifests/stolen?ns="+registryName, may, "")
		require.Equal(t, http.StatusOK, got.status)
		require.Contains(t, string(got.body), v.layer)
		for _, span := range []string{"", "bytes=0-99"} {
			got = request(t, secure().client(at), http.MethodGet, at+"/v2/mallory/app/blobs/"+v.layer+"?ns="+registryName, may, span)
			require.Equal(t, http.StatusNotFound, got.status)
			require.Contains(t, string(got.body), "BLOB_UNKNOWN", "the registry's own words")
		}
	}
}

// A token that ends is refused by the region as soon as by the registry, which gives
// it a minute more than it says.
func TestATokenEnds(t *testing.T) {
	d := startDebian(t, "127.0.0.1", true)
	img := d.pushImage(t, 2)
	cfg := registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: registryName, URL: d.url(), TLS: registryproxy.TLS{CA: d.cert}}}}
	centre := startSupernodeFor(t, cfg, t.TempDir(), "")
	host := startHostFor(t, cfg, centre, nil)
	d.tokens.Life = 4*time.Second - time.Minute
	short := d.login(t, user, "org/app", "pull")
	d.tokens.Life = 0
	long := d.login(t, user, "org/app", "pull")
	v := newVictim(t, img)
	paths := []string{"/v2/org/app/manifests/v1", "/v2/org/app/manifests/" + v.manifest, "/v2/org/app/blobs/" + v.layer}
	status := func(base, who string) (all [3]int) {
		for i, path := range paths {
			all[i] = request(t, secure().client(base), http.MethodGet, base+path+"?ns="+registryName, who, "").status
		}
		return all
	}
	for _, at := range []string{host.url(), centre.url()} {
		require.Equal(t, [3]int{200, 200, 200}, status(at, short))
	}
	for _, at := range []string{host.url(), centre.url()} {
		require.Eventually(t, func() bool { return status(at, short) == [3]int{401, 401, 401} }, waitLimit, 10*waitTick)
		require.Equal(t, [3]int{200, 200, 200}, status(at, long))
	}
}
