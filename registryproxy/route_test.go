package registryproxy

import (
	"cmp"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	sha256a = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	sha512a = "sha512:" +
		"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" +
		"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
)

func TestParseRoute(t *testing.T) {
	repo := func(registry, name string) Repository { return Repository{registry, name} }
	nginx := repo("docker.io", "library/nginx")
	tests := map[string]struct {
		method, path, ns, def string // method "" is GET, def "" is docker.io, "-" none
		want                  Route
		status                int // of the error
		code                  string
	}{
		"ping":                        {path: "", want: Route{Kind: KindPing, Repo: repo("docker.io", "")}},
		"ping with a slash":           {path: "/", want: Route{Kind: KindPing, Repo: repo("docker.io", "")}},
		"ping by ns":                  {path: "", ns: "quay.io", want: Route{Kind: KindPing, Repo: repo("quay.io", "")}},
		"ping of nobody":              {path: "", def: "-", want: Route{Kind: KindPing}},
		"ping by hostile ns":          {path: "", ns: "a/../b", status: 400, code: CodeNameInvalid},
		"tag":                         {path: "library/nginx/manifests/latest", want: Route{KindManifest, nginx, "latest"}},
		"HEAD":                        {method: "HEAD", path: "library/nginx/manifests/latest", want: Route{KindManifest, nginx, "latest"}},
		"leading slash":               {path: "/library/nginx/manifests/latest", want: Route{KindManifest, nginx, "latest"}},
		"two leading slashes":         {path: "//library/nginx/manifests/latest", status: 400, code: CodeNameInvalid},
		"digest":                      {path: "library/nginx/manifests/" + sha256a, want: Route{KindManifest, nginx, sha256a}},
		"sha512":                      {path: "library/nginx/blobs/" + sha512a, want: Route{KindBlob, nginx, sha512a}},
		"blob":                        {path: "library/nginx/blobs/" + sha256a, want: Route{KindBlob, nginx, sha256a}},
		"tags":                        {path: "library/nginx/tags/list", want: Route{KindTags, nginx, ""}},
		"referrers":                   {path: "library/nginx/referrers/" + sha256a, want: Route{KindReferrers, nginx, sha256a}},
		"ns":                          {path: "org/app/manifests/v1", ns: "quay.io", want: Route{KindManifest, repo("quay.io", "org/app"), "v1"}},
		"ns with port":                {path: "app/manifests/v1", ns: "reg:5000", want: Route{KindManifest, repo("reg:5000", "app"), "v1"}},
		"ns without a dot":            {path: "app/manifests/v1", ns: "reg", want: Route{KindManifest, repo("reg", "app"), "v1"}},
		"ns in capitals":              {path: "app/manifests/v1", ns: "Quay.IO", want: Route{KindManifest, repo("quay.io", "app"), "v1"}},
		"ns of IPv6":                  {path: "app/manifests/v1", ns: "[::1]:5000", want: Route{KindManifest, repo("[::1]:5000", "app"), "v1"}},
		"ns before path":              {path: "my.org/app/manifests/v1", ns: "quay.io", want: Route{KindManifest, repo("quay.io", "my.org/app"), "v1"}},
		"Docker Hub's other name":     {path: "library/nginx/manifests/latest", ns: "registry-1.docker.io", want: Route{KindManifest, nginx, "latest"}},
		"path":                        {path: "quay.io/org/app/manifests/v1", want: Route{KindManifest, repo("quay.io", "org/app"), "v1"}},
		"path without default":        {path: "quay.io/app/blobs/" + sha256a, def: "-", want: Route{KindBlob, repo("quay.io", "app"), sha256a}},
		"path with port":              {path: "reg:5000/app/manifests/v1", want: Route{KindManifest, repo("reg:5000", "app"), "v1"}},
		"path of IPv6":                {path: "[fe80::1]:5000/app/manifests/v1", want: Route{KindManifest, repo("[fe80::1]:5000", "app"), "v1"}},
		"path of localhost":           {path: "localhost/app/manifests/v1", want: Route{KindManifest, repo("localhost", "app"), "v1"}},
		"a dot in the only element":   {path: "my.app/manifests/v1", want: Route{KindManifest, repo("docker.io", "my.app"), "v1"}},
		"no dot in the first element": {path: "org/app/manifests/v1", want: Route{KindManifest, repo("docker.io", "org/app"), "v1"}},
		"a name of route words":       {path: "manifests/blobs/tags/manifests/list", want: Route{KindManifest, repo("docker.io", "manifests/blobs/tags"), "list"}},
		"no registry":                 {path: "app/manifests/v1", def: "-", status: 404, code: CodeNameUnknown},

		"not the protocol":    {path: "_catalog", status: 404, code: CodeUnsupported},
		"no name":             {path: "manifests/latest", status: 404, code: CodeUnsupported},
		"no list":             {path: "app/tags/other", status: 404, code: CodeUnsupported},
		"no reference":        {path: "app/manifests/", status: 404, code: CodeManifestUnknown},
		"bad digest":          {path: "app/blobs/sha256:totallywrong", status: 400, code: CodeDigestInvalid},
		"bad manifest digest": {path: "app/manifests/sha256:totallywrong", status: 400, code: CodeDigestInvalid},
		"unknown algorithm":   {path: "app/blobs/md5:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", status: 400, code: CodeDigestInvalid},
		"digest in capitals":  {path: "app/blobs/" + strings.ReplaceAll(sha256a, ":a", ":A"), status: 400, code: CodeDigestInvalid},
		"tag for a blob":      {path: "app/blobs/latest", status: 400, code: CodeDigestInvalid},
		"tag for referrers":   {path: "app/referrers/latest", status: 400, code: CodeDigestInvalid},
		"long tag":            {path: "app/manifests/" + strings.Repeat("t", 129), status: 404, code: CodeManifestUnknown},
		"dots":                {path: "app/../../etc/manifests/v1", status: 400, code: CodeNameInvalid},
		"dots for a tag":      {path: "app/manifests/..", status: 404, code: CodeManifestUnknown},
		"empty element":       {path: "app//b/manifests/v1", status: 400, code: CodeNameInvalid},
		"capitals":            {path: "App/manifests/v1", status: 400, code: CodeNameInvalid},
		"question mark":       {path: "app?x/manifests/v1", status: 400, code: CodeNameInvalid},
		"percent":             {path: "app%2fx/manifests/v1", status: 400, code: CodeNameInvalid},
		"NUL":                 {path: "app\x00/manifests/v1", status: 400, code: CodeNameInvalid},
		"line feed":           {path: "app/manifests/v1\n", status: 404, code: CodeManifestUnknown},
		"long name":           {path: strings.Repeat("a", 256) + "/manifests/v1", status: 400, code: CodeNameInvalid},
		"long path":           {path: strings.Repeat("a/", 600) + "manifests/v1", status: 400, code: CodeNameInvalid},
		"credentials in ns":   {path: "app/manifests/v1", ns: "user:pw@reg", status: 400, code: CodeNameInvalid},
		"query in ns":         {path: "app/manifests/v1", ns: "reg?x=y", status: 400, code: CodeNameInvalid},
		"bad port in ns":      {path: "app/manifests/v1", ns: "reg:99999", status: 400, code: CodeNameInvalid},
		"zone in ns":          {path: "app/manifests/v1", ns: "[fe80::1%eth0]", status: 400, code: CodeNameInvalid},
		"bare IPv6 in ns":     {path: "app/manifests/v1", ns: "fe80::1", status: 400, code: CodeNameInvalid},
		"host ends in a dot":  {path: "quay.io./app/manifests/v1", status: 400, code: CodeNameInvalid},

		"push of a manifest":  {method: "PUT", path: "app/manifests/v1", want: Route{Kind: KindWrite}},
		"delete":              {method: "DELETE", path: "app/blobs/" + sha256a, want: Route{Kind: KindWrite}},
		"start of an upload":  {method: "POST", path: "app/blobs/uploads/", want: Route{Kind: KindWrite}},
		"part of an upload":   {method: "PATCH", path: "app/blobs/uploads/1", want: Route{Kind: KindWrite}},
		"status of an upload": {method: "GET", path: "app/blobs/uploads/1", want: Route{Kind: KindWrite}},
		"other method":        {method: "OPTIONS", path: "app/manifests/v1", status: 405, code: CodeUnsupported},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			method, def := cmp.Or(tt.method, http.MethodGet), cmp.Or(tt.def, "docker.io")
			if def == "-" {
				def = ""
			}
			got, err := ParseRoute(method, tt.path, tt.ns, def)
			if tt.status == 0 {
				require.NoError(t, err)
				require.Equal(t, tt.want, got)
				return
			}
			e, ok := errors.AsType[*Error](err)
			require.True(t, ok, "error is %v", err)
			require.Equal(t, tt.status, e.Status)
			require.Equal(t, tt.code, e.Code)
		})
	}
}

func TestRepositoryString(t *testing.T) {
	require.Equal(t, "docker.io/library/nginx", Repository{"docker.io", "library/nginx"}.String())
	require.Equal(t, "docker.io", Repository{"docker.io", ""}.String())
}

// What is accepted is safe to be made a URL, and is one and the same request
// when asked again with its registry in ns or in the path.
func FuzzParseRoute(f *testing.F) {
	f.Add("GET", "library/nginx/manifests/latest", "", "docker.io")
	f.Add("HEAD", "quay.io/org/app/blobs/"+sha256a, "", "")
	f.Add("GET", "/app/referrers/"+sha512a, "[::1]:5000", "x")
	f.Add("GET", "a/../b/tags/list", "reg:1", "docker.io")
	f.Add("PUT", "app/blobs/uploads/", "", "")
	f.Fuzz(func(t *testing.T, method, path, ns, def string) {
		r, err := ParseRoute(method, path, ns, def)
		if err != nil {
			e, ok := errors.AsType[*Error](err)
			if !ok || e.Status < 400 || e.Status > 499 || e.Code == "" {
				t.Fatalf("error %#v", err)
			}
			return
		}
		if r.Kind == KindWrite || r.Repo.Registry == "" {
			if r.Kind != KindWrite && r.Kind != KindPing {
				t.Fatalf("%v without a registry", r)
			}
			return
		}
		for _, s := range []string{r.Repo.Registry, r.Repo.Name, r.Reference} {
			if strings.ContainsAny(s, "\x00\n\r ?#%@\\") || strings.Contains(s, "..") || strings.Contains(s, "//") {
				t.Fatalf("%q passed", s)
			}
		}
		again, err := ParseRoute(http.MethodGet, strings.TrimPrefix(r.Path(), "/v2/"), r.Repo.Registry, "")
		if err != nil || again != r {
			t.Fatalf("%v became %v, %v", r, again, err)
		}
		if r.Kind == KindPing || !strings.ContainsAny(r.Repo.Registry, ".:") {
			return
		}
		again, err = ParseRoute(http.MethodGet, strings.Replace(r.Path(), "/v2/", r.Repo.Registry+"/", 1), "", "")
		if err != nil || again != r {
			t.Fatalf("%v became %v, %v", r, again, err)
		}
	})
}
