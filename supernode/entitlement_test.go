package supernode

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// moved is a clock that is ahead of the real one by so much.
type moved struct{ atomic.Int64 }

func (m *moved) now() time.Time { return time.Now().Add(time.Duration(m.Load())) }

func (m *moved) to(d time.Duration) { m.Store(int64(d)) }

// away is a registry that is in trouble.
func away(w http.ResponseWriter, _ *http.Request) bool {
	w.WriteHeader(http.StatusBadGateway)
	return true
}

// A digest that is cached from one repository is not given out under another, also
// where its reader has written a manifest that names it: until the registry says
// that it is there, which it is asked once.
func TestBlobIsGivenOutOnlyUnderARepositoryThatHoldsIt(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	var there atomic.Bool
	manifest := fmt.Sprintf(`{"schemaVersion":2,"layers":[{"digest":%q,"size":%d}]}`, d, len(b))
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		thief := strings.HasPrefix(r.URL.Path, "/v2/thief/app/")
		want := "Basic owner"
		if thief {
			want = "Basic thief"
		}
		switch {
		case private(want)(w, r):
		case thief && strings.HasSuffix(r.URL.Path, "/manifests/v1"):
			w.Header().Set("Content-Type", manifestType)
			_, _ = w.Write([]byte(manifest))
		case thief && !there.Load():
			w.WriteHeader(http.StatusNotFound)
			_, _ = w.Write([]byte(noEntry))
		default:
			return false
		}
		return true
	})
	r := start(t, h, t.TempDir(), nil)
	owner, thief := dial(t, r, "owner"), dial(t, r, "thief")
	_, no := owner.join(d, from("Basic owner"))
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(owner.content(d)))
	require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete }, wait, poll)

	mine := from("Basic thief")
	mine.Repository = "thief/app"
	got := r.get(http.MethodGet, "/v2/thief/app/manifests/v1?ns=hub.test", "Authorization", "Basic thief")
	require.Equal(t, manifest, string(got.body))
	path := "/v2/thief/app/blobs/" + d + "?ns=hub.test"
	for range 2 {
		_, no = thief.join(d, mine)
		require.NotNil(t, no)
		require.Equal(t, http.StatusNotFound, no.Status)
		require.Equal(t, noEntry, string(no.Body))
		for _, span := range []string{"", "bytes=0-9", "bytes=-1"} {
			got := r.get(http.MethodGet, path, "Authorization", "Basic thief", "Range", span)
			require.Equal(t, http.StatusNotFound, got.status)
			require.Equal(t, noEntry, string(got.body))
		}
	}
	_, no = thief.join(d, from("Basic thief"))
	require.NotNil(t, no)
	require.Equal(t, http.StatusUnauthorized, no.Status)

	there.Store(true)
	require.Eventually(t, func() bool { // the no is remembered for five seconds
		return r.get(http.MethodHead, path, "Authorization", "Basic thief").status == http.StatusOK
	}, wait, 10*poll)
	asked := h.times("")
	_, no = thief.join(d, mine)
	require.Nil(t, no)
	require.Equal(t, hexOf(b), hexOf(thief.content(d)))
	require.Equal(t, hexOf(b), hexOf(r.get(http.MethodGet, path, "Authorization", "Basic thief").body))
	require.Equal(t, asked, h.times(""))
}

// Of a crowd that asks without credentials first, as engines do, the registry sees
// one in five seconds, also when there is nothing cached.
func TestANoIsRemembered(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(1000))
	md := h.manifest(t, []byte(`{"schemaVersion":2}`))
	h.misbehave(private("Basic good"))
	r := start(t, h, t.TempDir(), nil)
	for _, path := range []string{v2("blobs", d), v2("manifests", "v1"), v2("manifests", md)} {
		require.Equal(t, 401, r.get(http.MethodGet, path).status)
		asked := h.times("")
		for range 5 {
			got := r.get(http.MethodGet, path)
			require.Equal(t, 401, got.status)
			require.Equal(t, noEntry, string(got.body))
		}
		require.Equal(t, asked, h.times(""), path)
		require.Equal(t, 200, r.get(http.MethodGet, path, "Authorization", "Basic good").status)
	}
}

// Who is refused by the registry from some moment on is refused by the region five
// minutes later, whatever is asked for; and who reads meanwhile goes on.
func TestRevokedCredentialsEndWithinFiveMinutes(t *testing.T) {
	h := newHub(t)
	b := newBytes(1 << 20)
	d := h.blob(t, b)
	md := h.manifest(t, []byte(`{"schemaVersion":2}`))
	var revoked atomic.Bool
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "Basic revoked" && !revoked.Load() {
			return false
		}
		return private("Basic other")(w, r)
	})
	var by moved
	r := start(t, h, t.TempDir(), func(c *Config) { c.Now = by.now })
	paths := []string{v2("blobs", d), v2("manifests", "v1"), v2("manifests", md)}
	statuses := func(who string) (all []int) {
		for _, path := range paths {
			all = append(all, r.get(http.MethodGet, path, "Authorization", who).status)
		}
		_, no := dial(t, r, fmt.Sprint(who, by.Load())).join(d, from(who))
		if no == nil {
			return append(all, http.StatusOK)
		}
		return append(all, no.Status)
	}
	yes, no := []int{200, 200, 200, 200}, []int{401, 401, 401, 401}
	require.Equal(t, yes, statuses("Basic revoked"))
	require.Equal(t, yes, statuses("Basic other"))
	revoked.Store(true)
	asked := h.times("")
	by.to(4 * time.Minute)
	require.Equal(t, yes, statuses("Basic revoked"))
	require.Equal(t, asked, h.times(""), "until then the registry is not asked")
	by.to(registryproxy.ProofLife + time.Second)
	require.Equal(t, no, statuses("Basic revoked"))
	require.Equal(t, yes, statuses("Basic other"))
}

// A token that names its end is good for no longer, for a URL and a list as for a blob.
func TestATokensEndIsTheEnd(t *testing.T) {
	h := newHub(t)
	d := h.blob(t, newBytes(1<<20))
	h.manifest(t, []byte(`{"schemaVersion":2}`))
	end := time.Now().Add(3 * time.Second).Truncate(time.Second)
	token := "Bearer e30." + base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp":%d}`, end.Unix())) + ".x"
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		return time.Now().After(end) && private("Basic other")(w, r) || private(token)(w, r)
	})
	r := start(t, h, t.TempDir(), nil)
	host := dial(t, r, "one")
	header := map[string][]string{"Authorization": {token}}
	plain := api.Origin{URL: h.URL + "/v2/demo/app/blobs/" + d, Header: header}
	asks := map[string]func() int{
		"blob":     func() int { return r.get(http.MethodGet, v2("blobs", d), "Authorization", token).status },
		"manifest": func() int { return r.get(http.MethodGet, v2("manifests", "v1"), "Authorization", token).status },
		"tags":     func() int { return r.get(http.MethodGet, v2("tags", "list"), "Authorization", token).status },
		"URL": func() int {
			if _, no := host.join(d, plain); no != nil {
				return no.Status
			}
			return 200
		},
	}
	for name, ask := range asks {
		require.Equal(t, 200, ask(), name)
	}
	for name, ask := range asks {
		require.Eventually(t, func() bool { return ask() == 401 }, wait, 10*poll, name)
	}
}

// While the registry is away, who may read goes on as configured; and what it has
// last said of anyone is known after a restart.
func TestReadersWhenTheRegistryIsAway(t *testing.T) {
	for name, life := range map[string]time.Duration{"refuse": 0, "for 30m": 30 * time.Minute} {
		t.Run(name, func(t *testing.T) {
			h := newHub(t)
			b := newBytes(1 << 20)
			d := h.blob(t, b)
			h.manifest(t, []byte(`{"schemaVersion":2}`))
			var by moved
			configure := func(c *Config) { c.Registries.Upstreams[0].ReadersWhenAway, c.Now = life, by.now }
			dir := t.TempDir()
			r := start(t, h, dir, configure)
			get := func(who string) int {
				tag := r.get(http.MethodGet, v2("manifests", "v1"), "Authorization", who)
				blob := r.get(http.MethodGet, v2("blobs", d), "Authorization", who)
				require.Equal(t, tag.status, blob.status)
				return blob.status
			}
			require.Equal(t, 200, get(""))
			require.Eventually(t, func() bool { return r.store.Tasks()[0].Complete && r.store.Tasks()[1].Complete }, wait, poll)
			r.stop()

			h.misbehave(away)
			r = start(t, h, dir, configure)
			require.Equal(t, 200, get(""), "anyone could")
			r.stop()

			h.misbehave(private("Basic good"))
			r = start(t, h, dir, configure)
			require.Equal(t, 401, get(""))
			r.stop()

			h.misbehave(away)
			r = start(t, h, dir, configure)
			require.Equal(t, 502, get(""), "it is no longer for anyone")
			require.Equal(t, 502, get("Basic good"), "nobody knows this one yet")
			r.stop()

			h.misbehave(private("Basic good"))
			r = start(t, h, dir, configure)
			require.Equal(t, 200, get("Basic good"))
			h.misbehave(away)
			by.to(20 * time.Minute)
			want := map[time.Duration]int{0: 502, 30 * time.Minute: 200}[life]
			require.Equal(t, want, get("Basic good"))
			require.Equal(t, 502, get(""))
			require.Equal(t, 502, get("Basic bad"))
			by.to(31 * time.Minute)
			require.Equal(t, 502, get("Basic good"))
		})
	}
}
