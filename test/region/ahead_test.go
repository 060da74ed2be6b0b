package region_test

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// An engine that has read a manifest asks for what it names: what is small of
// that is on the host by then, for this caller and for nobody else.
func TestSmallBlobsComeAheadOfTheEngine(t *testing.T) {
	o := newOrigin(t)
	push(t, o)
	const secret = "Basic dXNlcjpwYXNz"
	o.set(func() { o.secret = secret })
	centre := startSupernode(t, o, t.TempDir(), "")
	host := startHost(t, o, centre, nil)
	var manifest struct {
		Config struct{ Digest string }
		Layers []struct{ Digest string }
	}
	require.NoError(t, json.Unmarshal([]byte(get(t, host.url(), "/v2/org/app/manifests/v1", secret).body), &manifest))
	config := "/v2/org/app/blobs/" + manifest.Config.Digest
	require.Eventually(t, func() bool {
		gets, _ := o.counts()
		return gets[config] == 1
	}, waitLimit, waitTick)
	require.Equal(t, http.StatusUnauthorized, get(t, host.url(), config, "").status)
	a := get(t, host.url(), config, secret)
	require.Equal(t, http.StatusOK, a.status)
	require.Equal(t, manifest.Config.Digest, fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(a.body))))
	gets, _ := o.counts()
	require.Equal(t, 1, gets[config])
	for _, l := range manifest.Layers {
		require.Zero(t, gets["/v2/org/app/blobs/"+l.Digest], "large layers wait until they are asked for")
	}
}
