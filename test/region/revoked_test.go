package region_test

import (
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
)

// revoke takes a user out of the registry, which knows that when it returns.
func (d *debian) revoke(t *testing.T, name string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, d.url()+"/v2/org/app/manifests/v1", nil)
	require.NoError(t, err)
	r.SetBasicAuth(name, password)
	users, err := os.ReadFile(d.users)
	require.NoError(t, err)
	before, _, _ := strings.Cut(string(users), name+":")
	require.Eventually(t, func() bool { // it looks at the file's time of change
		require.NoError(t, os.WriteFile(d.users, []byte(before), 0o600))
		return ask(t, d.client, r.URL.String(), r.Header.Get("Authorization")).status == http.StatusUnauthorized
	}, waitLimit, 10*waitTick)
}

// taker is a host that has joined a blob and takes none of it, as one does that wants
// its right to go on for ever.
type taker struct {
	who     *identity.Source
	tickets chan string // as they come; "" is that there are no more
	last    string
	over    bool
}

func (r *sealed) take(t *testing.T, who *identity.Source, d, authorization string) *taker {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialTLSContext: who.DialSupernode((&net.Dialer{}).DialContext)}}
	conn, err := api.Dial(t.Context(), client, r.centre.url())
	require.NoError(t, err)
	t.Cleanup(conn.CloseNow)
	require.NoError(t, conn.Write(t.Context(), api.Up{Hello: &api.Hello{Version: api.Version, Host: "taker"}}))
	require.NoError(t, conn.Write(t.Context(), api.Up{Join: []api.Join{{Seq: 1, Task: d, Origin: api.Origin{
		Registry: registryName, Repository: "org/app", Header: map[string][]string{"Authorization": {authorization}},
	}}}}))
	k := &taker{who: who, tickets: make(chan string, 100)}
	go func() {
		for {
			down, err := conn.Read(t.Context())
			if err != nil {
				return
			}
			for _, g := range down.Task {
				k.tickets <- g.Ticket
			}
		}
	}()
	go func() {
		_ = conn.KeepAlive(t.Context(), func() { go func() { _ = conn.Write(t.Context(), api.Up{}) }() })
	}()
	k.last = <-k.tickets
	return k
}

// gets tells whether the host gets bytes at an address, with the best ticket it has.
func (k *taker) gets(t *testing.T, at, d string) bool {
	t.Helper()
	for len(k.tickets) > 0 {
		if s := <-k.tickets; s != "" {
			k.last = s
		} else {
			k.over = true
		}
	}
	status, err := piece(t, at, d, k.who, k.last)
	require.NoError(t, err)
	return status == http.StatusPartialContent
}

// From when a user is taken out of the registry on it is measured for how long the
// region gives out what was that user's: the manifest, the blob, and pieces to a host
// that is in the middle of it. By the supernode's clock, which is moved; with
// DAMSELFLY_TEST_REVOCATION set by the real one, which takes five minutes and has
// other hosts asked, too.
func TestRevocation(t *testing.T) {
	const step = 10 * time.Second
	real := os.Getenv("DAMSELFLY_TEST_REVOCATION") != ""
	d := startDebian(t, "127.0.0.1", false)
	img := d.pushImage(t, 1)
	d.addUser(t, "carol")
	var clock moved
	r := newSealed(t, d, &clock, 3)
	v := newVictim(t, img)
	carol, alice := d.login(t, "carol", "org/app", ""), d.login(t, user, "org/app", "")
	require.Equal(t, http.StatusOK, (&engine{d: d, user: "carol", password: password}).pull(t, r.hosts[0], "org/app"))
	taking := map[string]*taker{carol: r.take(t, r.ids[1], v.layer, carol), alice: r.take(t, r.ids[2], v.layer, alice)}

	client := &http.Client{Transport: insecure(r.ids[0])}
	path := func(of string) string { return "/v2/org/app/" + of + "?ns=" + registryName }
	at := func(base, of string) func(string) bool {
		return func(who string) bool {
			return request(t, client, http.MethodGet, base+path(of), who, "").status == http.StatusOK
		}
	}
	gets := func(to string) func(string) bool {
		return func(who string) bool { return taking[who].gets(t, to, v.layer) }
	}
	ways := map[string]func(string) bool{
		"manifest by tag, host":         at(r.hosts[0].url(), "manifests/v1"),
		"manifest by digest, supernode": at(r.centre.url(), "manifests/"+v.manifest),
		"blob, host":                    at(r.hosts[0].url(), "blobs/"+v.layer),
		"blob, supernode":               at(r.centre.url(), "blobs/"+v.layer),
		"running task, supernode":       gets(r.centre.address),
	}
	if real {
		ways["running task, peer"] = gets(r.hosts[0].peer)
	}
	for name, way := range ways {
		require.True(t, way(carol), name)
		require.True(t, way(alice), name)
	}
	d.revoke(t, "carol")
	began := clock.now()
	end := map[string]time.Duration{}
	for clock.now().Sub(began) < 5*time.Minute+api.TicketGrace+2*step {
		if real {
			wait := time.NewTimer(step)
			<-wait.C
		} else {
			clock.Add(int64(step))
		}
		for name, way := range ways {
			require.Eventually(t, func() bool { return way(alice) }, waitLimit, waitTick, "%s: who may, may", name)
			if way(carol) {
				end[name] = clock.now().Sub(began)
			}
		}
	}
	for name, got := range end {
		t.Logf("%s: the last yes after %v", name, got.Round(time.Second))
		require.LessOrEqual(t, got, 5*time.Minute, name)
	}
	require.Len(t, end, len(ways), "each way was open for a while")
	require.Eventually(t, func() bool { return !ways["running task, supernode"](carol) && taking[carol].over }, waitLimit, waitTick)
	require.False(t, taking[alice].over)
}
