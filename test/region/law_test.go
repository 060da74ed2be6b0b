// Package region_test runs a region in one process: a registry, a supernode,
// agents, and clients as engines; and tries to break what holds always.
package region_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"damselfly.dev/supernode"
	"damselfly.dev/supernode/api"
)

const (
	layers    = 3
	layerSize = 3 << 20
)

// requireOnce checks that each path went out of the registry at most once, and
// that the supernode's own count says so.
func requireOnce(t *testing.T, o *origin, centre *node) {
	t.Helper()
	gets, sent := o.counts()
	require.NotEmpty(t, gets)
	for path, n := range gets {
		if path != "/v2/" {
			require.Equal(t, 1, n, path)
		}
	}
	require.InDelta(t, sent, centre.value(t, "damselfly_origin_bytes_total", ""), 0)
	require.InDelta(t, sent, centre.value(t, "damselfly_unique_bytes_total", ""), 0)
}

func TestARegionAsksTheRegistryOnce(t *testing.T) {
	o := newOrigin(t)
	image := push(t, o)
	dir := t.TempDir()
	centre := startSupernode(t, o, dir, "")
	hosts := make([]*node, 6)
	for i := range hosts {
		hosts[i] = startHost(t, o, centre, nil)
	}
	pullAll(t, hosts, image)
	requireOnce(t, o, centre)
	var peers, direct float64
	for _, h := range hosts {
		peers += h.value(t, "damselfly_received_bytes_total", "peer")
		direct += h.value(t, "damselfly_received_bytes_total", "origin")
	}
	require.Zero(t, direct)
	require.Greater(t, peers, 0.3*float64(len(hosts)*layers*layerSize))

	t.Run("a second pull is served from the host's own store", func(t *testing.T) {
		before := hosts[0].value(t, "damselfly_received_bytes_total", "peer") + hosts[0].value(t, "damselfly_received_bytes_total", "supernode")
		require.NoError(t, pull(t.Context(), hosts[0], image))
		after := hosts[0].value(t, "damselfly_received_bytes_total", "peer") + hosts[0].value(t, "damselfly_received_bytes_total", "supernode")
		require.InDelta(t, before, after, 0)
		require.Eventually(t, func() bool { // once it is noted as complete, the store is named as the source
			return pull(t.Context(), hosts[0], image) == nil &&
				hosts[0].value(t, "damselfly_received_bytes_total", "store") >= layers*layerSize
		}, waitLimit, waitTick)
		requireOnce(t, o, centre)
	})
	t.Run("a host that comes later takes no byte from the registry", func(t *testing.T) {
		require.NoError(t, pull(t.Context(), startHost(t, o, centre, nil), image))
		requireOnce(t, o, centre)
	})
	t.Run("nor does one after a restart of the supernode", func(t *testing.T) {
		_, before := o.counts()
		centre.end()
		again := startSupernode(t, o, dir, centre.address)
		late := startHost(t, o, again, nil)
		require.NoError(t, pull(t.Context(), late, image))
		_, after := o.counts()
		require.Equal(t, before, after)
	})
}

func TestFaultyPeersSpoilNothing(t *testing.T) {
	for name, spoil := range map[string]func(io.ReadCloser, *http.Request) io.ReadCloser{
		"corrupt": corrupt, "vanish": vanish, "silent": silent, "slow": slow,
	} {
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t)
			image := push(t, o)
			centre := startSupernode(t, o, t.TempDir(), "")
			f := newFault(t, spoil)
			// It has the image before the others come, so that they turn to it.
			bad := startHost(t, o, centre, f)
			require.NoError(t, pull(t.Context(), bad, image))
			hosts := make([]*node, 4)
			for i := range hosts {
				hosts[i] = startHost(t, o, centre, nil)
			}
			pullAll(t, hosts, image)
			require.Positive(t, f.asked.Load())
			requireOnce(t, o, centre)
			if name == "corrupt" {
				asked := f.asked.Load()
				require.NoError(t, pull(t.Context(), startHost(t, o, centre, nil), image))
				require.Equal(t, asked, f.asked.Load(), "a host that sends wrong bytes is still named")
			}
		})
	}
}

func TestTheSupernodeEndsInThePull(t *testing.T) {
	o := newOrigin(t)
	image := push(t, o)
	centre := startSupernode(t, o, t.TempDir(), "")
	hosts := make([]*node, 4)
	for i := range hosts {
		hosts[i] = startHost(t, o, centre, nil)
	}
	o.set(func() { o.pause = 20e6 }) // a chunk each 20 ms: a second for a layer
	errs := make(chan error, len(hosts))
	for _, h := range hosts {
		go func() { errs <- pull(t.Context(), h, image) }()
	}
	require.Eventually(t, func() bool { _, sent := o.counts(); return sent > layerSize }, waitLimit, waitTick)
	centre.end()
	for range hosts {
		require.NoError(t, <-errs)
	}
}

func TestAHostEndsInThePull(t *testing.T) {
	o := newOrigin(t)
	image := push(t, o)
	centre := startSupernode(t, o, t.TempDir(), "")
	hosts := make([]*node, 4)
	for i := range hosts {
		hosts[i] = startHost(t, o, centre, nil)
	}
	o.set(func() { o.pause = 20e6 })
	errs := make(chan error, len(hosts)-1)
	go func() { _ = pull(t.Context(), hosts[0], image) }() // its own engine has lost its mirror
	for _, h := range hosts[1:] {
		go func() { errs <- pull(t.Context(), h, image) }()
	}
	require.Eventually(t, func() bool { _, sent := o.counts(); return sent > layerSize }, waitLimit, waitTick)
	hosts[0].end()
	for range hosts[1:] {
		require.NoError(t, <-errs)
	}
	requireOnce(t, o, centre)
}

func TestWithoutASupernode(t *testing.T) {
	o := newOrigin(t)
	image := push(t, o)
	require.NoError(t, pull(t.Context(), startHost(t, o, nil, nil), image))
	require.NoError(t, pull(t.Context(), startHost(t, o, &node{address: "127.0.0.1:1"}, nil), image))
}

// answer is one of HTTP, read to its end.
type answer struct {
	status    int
	challenge string
	stale     string // Damselfly-Stale
	body      string
}

// get asks base for a path with an Authorization, "" for none.
func get(t *testing.T, base, path, authorization string) answer {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+path+"?ns="+registryName, nil)
	require.NoError(t, err)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	resp, err := secure().client(base).Do(r)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return answer{resp.StatusCode, resp.Header.Get("Www-Authenticate"), resp.Header.Get(api.StaleHeader), string(b)}
}

// What one caller may read, another gets the registry's own refusal of, also
// when host and supernode have it.
func TestRefusalsAreRelayed(t *testing.T) {
	o := newOrigin(t)
	push(t, o)
	const secret = "Basic dXNlcjpwYXNz"
	o.set(func() { o.secret = secret })
	centre := startSupernode(t, o, t.TempDir(), "")
	first, second := startHost(t, o, centre, nil), startHost(t, o, centre, nil)
	paths := []string{"/v2/org/app/manifests/v1"}
	for field := range strings.SplitSeq(get(t, first.url(), paths[0], secret).body, `"`) {
		if strings.HasPrefix(field, "sha256:") {
			paths = append(paths, "/v2/org/app/blobs/"+field)
		}
	}
	require.Len(t, paths, 2+layers)
	for _, path := range paths {
		require.Equal(t, http.StatusOK, get(t, first.url(), path, secret).status, path)
		for _, host := range []*node{first, second, centre} {
			for _, other := range []string{"", "Basic eDp5"} {
				want := answer{http.StatusUnauthorized, `Basic realm="reg.test"`, "", refusal}
				require.Equal(t, want, get(t, host.url(), path, other), path)
			}
		}
	}
	for _, path := range paths { // and who may, may also on the other host, for nothing
		require.Equal(t, http.StatusOK, get(t, second.url(), path, secret).status, path)
	}
	requireOnce(t, o, centre)
	blob := strings.TrimPrefix(paths[1], "/v2/org/app/")
	for _, path := range []string{"/v2/org/app/manifests/v2", "/v2/org/none/manifests/v1", "/v2/org/none/" + blob} {
		require.Equal(t, get(t, o.URL, path, secret), get(t, first.url(), path, secret), path)
	}
}

// With the registry stopped, what was pulled before comes to a host that never
// had it, by tag and by digest, and the answer says that it is as last known.
func TestTheRegistryIsAway(t *testing.T) {
	o := newOrigin(t)
	image := push(t, o)
	dir := t.TempDir()
	centre := startSupernode(t, o, dir, "")
	require.NoError(t, pull(t.Context(), startHost(t, o, centre, nil), image))
	require.Eventually(t, func() bool { // a digest is noted as right once the last byte is out
		tasks := get(t, centre.url(), "/v1/tasks", "").body
		return strings.Count(tasks, `"complete":true`) == 2+layers
	}, waitLimit, waitTick)
	centre.end()
	o.Close()

	// It has to ask again at once, and remembers nothing of who may read what.
	centre = startSupernode(t, o, dir, centre.address, func(c *supernode.Config) { c.TagFreshness = 0 })
	host := startHost(t, o, centre, nil)
	tagged := get(t, host.url(), "/v2/org/app/manifests/v1", "")
	require.Equal(t, http.StatusOK, tagged.status, tagged.body)
	require.NotEmpty(t, tagged.stale)
	require.NotEqual(t, "0", tagged.stale)
	sum := digest.FromString(tagged.body)
	again := get(t, host.url(), "/v2/org/app/manifests/"+sum.String(), "")
	require.Equal(t, http.StatusOK, again.status, again.body)
	require.Equal(t, tagged.body, again.body)
	require.Equal(t, "0", again.stale)
	require.InDelta(t, 2, centre.value(t, "damselfly_stale_answers_total", ""), 0)

	require.NoError(t, pull(t.Context(), host, image))
	require.NoError(t, pull(t.Context(), startHost(t, o, centre, nil), "org/app@"+sum.String()))
	require.Zero(t, host.value(t, "damselfly_fallbacks_total", ""))
	require.Equal(t, http.StatusBadGateway, get(t, host.url(), "/v2/org/app/manifests/other", "").status, "nobody knows this one")
}
