package conformance_test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/stretchr/testify/require"
)

const (
	tags      = "Listing Tags"
	referrers = "Listing Referrers"
	fallback  = "Unavailable Referrers API"

	list = "/v2/" + app + "/tags/list"
)

var linkForm = regexp.MustCompile(`^<([^>]*)>; *rel="?next"?$`)

// next returns the path of the next page, "" where there is none. It leads to
// where the page before came from.
func (c client) next(a answer, from string) string {
	c.Helper()
	if a.header.Get("Link") == "" {
		return ""
	}
	m := linkForm.FindStringSubmatch(a.header.Get("Link"))
	require.NotNil(c, m, a.header.Get("Link"))
	to, err := url.Parse(m[1])
	require.NoError(c, err)
	require.Empty(c, to.Host, "it leads away")
	path, _, _ := strings.Cut(from, "?")
	require.Equal(c, path, to.Path)
	q := to.Query()
	if c.mirror {
		require.Equal(c, modern, q.Get("ns"))
		q.Del("ns") // the target adds it
	}
	return to.Path + "?" + q.Encode()
}

func (c client) tagsOf(a answer) []string {
	c.Helper()
	require.Equal(c, http.StatusOK, a.status, "%s", a.body)
	var v struct {
		Name string
		Tags []string
	}
	require.NoError(c, json.Unmarshal(a.body, &v))
	require.Equal(c, app, v.Name)
	require.NotNil(c, v.Tags)
	return v.Tags
}

type descriptor struct {
	MediaType, Digest, ArtifactType string
	Annotations                     map[string]string
}

// refer reads a list of referrers to its last page.
func (c client) refer(path string) (all []descriptor, pages int) {
	c.Helper()
	for path != "" {
		a := c.get(path)
		require.Equal(c, http.StatusOK, a.status, "%s", a.body)
		require.Equal(c, indexType, a.header.Get("Content-Type"))
		var v struct {
			MediaType string
			Manifests []descriptor
		}
		require.NoError(c, json.Unmarshal(a.body, &v))
		require.Equal(c, indexType, v.MediaType)
		all, pages = append(all, v.Manifests...), pages+1
		path = c.next(a, path)
	}
	return all, pages
}

func referrersOf(d document) string { return "/v2/" + app + "/referrers/" + d.digest.String() }

var discovery = []rule{
	{tags, "MUST", "all tags are given in order", func(c client) {
		require.Equal(c, c.tags, c.tagsOf(c.get(list)))
		require.Contains(c, c.get(list).header.Get("Content-Type"), "json")
	}},
	{tags, "MUST", "n bounds them, and a link or a shorter list ends them", func(c client) {
		for _, n := range []string{"1", "2", "5"} {
			var all []string
			for path := list + "?n=" + n; path != ""; {
				a := c.get(path)
				page := c.tagsOf(a)
				require.LessOrEqual(c, len(page), int(n[0]-'0'))
				all = append(all, page...)
				path = c.next(a, path)
				require.True(c, path != "" || len(all) == len(c.tags))
			}
			require.Equal(c, c.tags, all, n)
		}
	}},
	{tags, "MUST", "n of zero is an empty list without a link", func(c client) {
		a := c.get(list + "?n=0")
		require.Empty(c, c.tagsOf(a))
		require.Empty(c, a.header.Get("Link"))
	}},
	{tags, "MUST", "n of more than there are is all", func(c client) {
		a := c.get(list + "?n=100")
		require.Equal(c, c.tags, c.tagsOf(a))
		require.Empty(c, a.header.Get("Link"))
	}},
	{tags, "MUST", "the list goes on after last, which need not exist", func(c client) {
		for query, want := range map[string][]string{
			"last=a1": c.tags[2:], "last=a1&n=2": c.tags[2:4], "n=1&last=multi": c.tags[5:6],
			"last=a0&n=1": c.tags[1:2], "last=v1.0": {}, "last=" + url.QueryEscape("a1.~"): c.tags[2:],
		} {
			require.Equal(c, want, c.tagsOf(c.get(list+"?"+query)), query)
		}
	}},
	{referrers, "MUST", "all are given with type, artifact type and annotations", func(c client) {
		all, _ := c.refer(referrersOf(c.image))
		slices.SortFunc(all, func(a, b descriptor) int { return strings.Compare(a.Annotations["note"], b.Annotations["note"]) })
		require.Equal(c, []descriptor{
			{manifestType, c.sbom.digest.String(), "application/vnd.test.sbom", map[string]string{"note": "one"}},
			{indexType, c.child.digest.String(), "", map[string]string{"note": "three"}},
			{manifestType, c.signature.digest.String(), configType, map[string]string{"note": "two"}},
		}, all)
	}},
	{referrers, "MUST", "more than fit into one answer come by links", func(c client) {
		all, pages := c.refer(referrersOf(c.index))
		require.Greater(c, pages, 1)
		require.Len(c, all, c.crowd)
		for _, d := range all {
			require.Equal(c, d.Digest, c.head(manifest(d.Digest)).header.Get("Docker-Content-Digest"))
		}
	}},
	{referrers, "MUST", "none is an empty list", func(c client) {
		all, pages := c.refer(referrersOf(c.sbom))
		require.Empty(c, all)
		require.Equal(c, 1, pages)
	}},
	{referrers, "SHOULD", "a filter is applied, and named", func(c client) {
		path := referrersOf(c.image) + "?artifactType=" + url.QueryEscape("application/vnd.test.sbom")
		require.Equal(c, "artifactType", c.get(path).header.Get("OCI-Filters-Applied"))
		all, _ := c.refer(path)
		require.Len(c, all, 1)
		require.Equal(c, c.sbom.digest.String(), all[0].Digest)
		require.Empty(c, c.get(referrersOf(c.image)).header.Get("OCI-Filters-Applied"))
	}},
	{referrers, "MUST", "an invalid digest is 400", mirrors(func(c client) { // olareg has an empty list for it
		for _, d := range invalid {
			require.Equal(c, http.StatusBadRequest, c.get("/v2/"+app+"/referrers/"+d).status, d)
		}
	})},
	{fallback, "MUST", "404 sends the client to the tag of the digest", func(c client) {
		require.Equal(c, http.StatusNotFound, c.do(http.MethodGet, old, referrersOf(c.image)).status)
		c.is(c.do(http.MethodGet, old, manifest(strings.Replace(c.image.digest.String(), ":", "-", 1))), c.list)
	}},
}

var around = []rule{
	{"Determining Support", "MUST", "the API is there", func(c client) {
		require.Equal(c, http.StatusOK, c.get("/v2/").status)
		require.Equal(c, http.StatusOK, c.head("/v2/").status)
	}},
	{"Error Codes", "MUST", "what a mirror does not do it refuses in the form of the specification", mirrors(func(c client) {
		for _, r := range []string{
			"POST /v2/" + app + "/blobs/uploads/", "PUT " + manifest("v1"), "DELETE " + manifest("v1"), "DELETE " + blob(nowhere),
			"PATCH /v2/" + app + "/blobs/uploads/1", "GET /v2/" + app + "/blobs/uploads/1",
		} {
			method, path, _ := strings.Cut(r, " ")
			a := c.do(method, "", path)
			require.Equal(c, http.StatusMethodNotAllowed, a.status, r)
			require.Equal(c, "UNSUPPORTED", c.isError(a), r)
			require.Equal(c, "GET, HEAD", a.header.Get("Allow"), r)
		}
	})},
}
