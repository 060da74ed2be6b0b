package registryproxy

import (
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRules(t *testing.T) {
	rules, err := NewRules(append([]Rule{
		{Match: `^https://private\.corp/`, Action: ActionDirect},
		{Match: `^http://old\.corp/`, Action: ActionRedirect, To: "https://new.corp:5000/hub"},
		{Match: `\.exe$`, Action: ActionRefuse},
	}, DefaultRules()...))
	require.NoError(t, err)
	for raw, want := range map[string]struct {
		action Action
		to     string
	}{
		"https://a.test/v2/org/app/blobs/sha256:00":        {ActionSwarm, ""},
		"https://a.test/v2/org/app/manifests/v1":           {ActionSwarm, ""},
		"http://[::1]:5000/v2/app/blobs/sha256:00":         {ActionSwarm, ""},
		"https://a.test/v2/":                               {ActionDirect, ""},
		"https://a.test/v2/org/app/tags/list":              {ActionDirect, ""},
		"https://a.test/token?u=/v2/app/blobs/x":           {ActionDirect, ""}, // the query has no say
		"https://private.corp/v2/app/blobs/sha256:00":      {ActionDirect, ""}, // the first rule counts
		"https://private.corp.evil.test/v2/a/b/blobs/x":    {ActionSwarm, ""},
		"http://old.corp/v2/app/blobs/sha256:00?a=b":       {ActionRedirect, "https://new.corp:5000/hub/v2/app/blobs/sha256:00?a=b"},
		"http://old.corp/a%2Fb":                            {ActionRedirect, "https://new.corp:5000/hub/a%2Fb"},
		"http://user:password@old.corp/x":                  {ActionRedirect, "https://new.corp:5000/hub/x"},
		"https://a.test/v2/org/app/blobs/sha256:00/x.exe":  {ActionRefuse, ""},
		"https://a.test/download/x.exe?v2/app/blobs/sha=1": {ActionRefuse, ""},
		"https://a.test/download/x%2eexe":                  {ActionRefuse, ""},
		"https://a.test/download/x.exe/":                   {ActionRefuse, ""},
		"https://a.test/download//../x.exe/.":              {ActionRefuse, ""},
		"https://Private.Corp.:443/v2/app/blobs/sha256:00": {ActionDirect, ""},
		"https://[::1]:443/v2/app/blobs/sha256:00":         {ActionSwarm, ""},
	} {
		u, err := url.Parse(raw)
		require.NoError(t, err)
		action, to := rules.Decide(u)
		require.Equal(t, want.action, action, raw)
		if want.to == "" {
			want.to = raw
		}
		require.Equal(t, want.to, to.String())
	}
}
