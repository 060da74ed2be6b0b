package dfget

import (
	"net/http"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"damselfly.dev/supernode/api"
)

// Over a session that others may listen to the supernode hears of no caller's
// credentials; what then cannot be had comes from the origin, with them.
func TestInClear(t *testing.T) {
	b := newBlob(300_000)
	refuse := func(r api.Refused) func(*fakeNode, api.Up) {
		return func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				r.Seq = j.Seq
				n.send(api.Down{Refused: []api.Refused{r}})
			}
		}
	}
	no := api.Refused{Status: http.StatusUnauthorized, Final: true}
	login := map[string][]string{"Authorization": {"Basic secret"}}
	registry := func(header map[string][]string) api.Origin {
		return api.Origin{Registry: "r.example", Repository: "a/b", Header: header}
	}
	url := api.Origin{URL: "http://web.example/a"}
	signed, asking, personal, plain := url, url, url, url
	signed.Ignore = []string{"X-Sig"}
	asking.URL += "?token=secret"
	personal.Header = map[string][]string{"Cookie": {"secret"}}
	plain.Header = map[string][]string{"User-Agent": {"test"}}
	for name, c := range map[string]struct {
		origin  api.Origin
		on      func(*fakeNode, api.Up)
		joins   int
		causes  int
		refused bool
		header  bool // some reaches the supernode
	}{
		"public image, and a login":        {registry(login), serving(b, ""), 1, 0, false, false},
		"private image, and a login":       {registry(login), refuse(no), 1, 1, false, false},
		"private image, and no login":      {registry(nil), refuse(no), 1, 0, true, false},
		"image of the region, and a login": {registry(login), refuse(api.Refused{Clear: true}), 1, 1, false, false},
		"image of the region":              {registry(nil), refuse(api.Refused{Clear: true}), 1, 1, false, false},
		"plain URL":                        {plain, serving(b, ""), 1, 0, false, true},
		"signed URL":                       {signed, serving(b, ""), 0, 1, false, false},
		"URL with a query":                 {asking, serving(b, ""), 0, 1, false, false},
		"URL with a cookie":                {personal, serving(b, ""), 0, 1, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, n, h := inClear(t, PeerConfig{}, c.on, b)
				got, err := get(t, h, Request{b.id, c.origin, &upstream{bytes: b.bytes}}, 0, -1)
				if c.refused {
					require.ErrorContains(t, err, "401")
				} else {
					require.NoError(t, err)
					require.Equal(t, b.bytes, got)
				}
				require.Equal(t, c.causes, h.metric(t, "damselfly_fallbacks_total", causeClear))
				asked := heard(n, joins)
				require.Len(t, asked, c.joins)
				for _, j := range asked {
					require.Equal(t, c.header, len(j.Origin.Header) > 0)
				}
			})
		})
	}
}

// Where nobody can listen all is as the caller said.
func TestSealed(t *testing.T) {
	o := api.Origin{Header: map[string][]string{"Authorization": {"Basic secret"}}}
	require.Equal(t, o, (&session{sealed: true}).tells(o))
	require.False(t, (&session{sealed: true}).hides(o))
	require.Empty(t, (&session{}).tells(o).Header)
	require.NotEmpty(t, o.Header)
}
