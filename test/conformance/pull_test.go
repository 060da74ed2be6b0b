package conformance_test

import (
	"bytes"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strings"

	"github.com/stretchr/testify/require"
)

const (
	manifests = "Pulling manifests"
	blobs     = "Pulling blobs"
	heads     = "Checking if content exists in the registry"

	nowhere = "sha256:5555555555555555555555555555555555555555555555555555555555555555"
)

var invalid = []string{"sha256:totallywrong", "sha256:", "sha512:" + nowhere[7:], "none:" + nowhere[7:], nowhere + "0"}

// missing checks that each path is answered with 404.
func missing(c client, method string, paths ...string) {
	for _, path := range paths {
		require.Equal(c, http.StatusNotFound, c.do(method, modern, path).status, path)
	}
}

// refused checks that what can be no reference is answered with 400 or 404.
func refused(c client, path func(string) string) {
	for _, reference := range invalid {
		require.Contains(c, []int{400, 404}, c.get(path(reference)).status, reference)
	}
}

var pulling = []rule{
	{manifests, "MUST", "a manifest is given by tag", func(c client) { c.is(c.get(manifest("v1")), c.image) }},
	{manifests, "MUST", "a manifest is given by digest", func(c client) { c.is(c.get(manifest(c.image.digest.String())), c.image) }},
	{manifests, "MUST", "an index is given by tag and digest", func(c client) {
		c.is(c.get(manifest("multi")), c.index)
		c.is(c.get(manifest(c.index.digest.String())), c.index)
	}},
	{manifests, "draft MUST", "a manifest is given by its sha512", func(c client) { c.is(c.get(manifest(c.image512.digest.String())), c.image512) }},
	{manifests, "SHOULD", "the type is that which was pushed, to whom takes it and to whom does not say", func(c client) {
		for _, accept := range []string{indexType + ", " + manifestType, manifestType + ";q=0.5"} {
			c.is(c.get(manifest("v1"), "Accept: "+accept), c.image)
		}
	}},
	{manifests, "MUST", "what is not there is 404", func(c client) {
		missing(c, http.MethodGet, manifest("none"), manifest(nowhere), "/v2/conf/none/manifests/v1", manifest(c.layer.digest.String()))
	}},
	{manifests, "MUST", "the registry's own error says so", func(c client) {
		require.Equal(c, "MANIFEST_UNKNOWN", c.isError(c.get(manifest("none"))))
	}},
	{manifests, "MUST NOT", "what is neither tag nor digest is no reference", func(c client) {
		refused(c, manifest)
		for _, tag := range []string{".v1", "-v1", "v1!", strings.Repeat("t", 129)} {
			require.Contains(c, []int{400, 404}, c.get(manifest(tag)).status, tag)
		}
	}},
	{manifests, "MUST", "a name keeps to its form", func(c client) {
		for _, name := range []string{"conf/App", "conf/-app", "conf/a..b", "conf/a___b"} {
			require.Contains(c, []int{400, 404}, c.get("/v2/"+name+"/manifests/v1").status, name)
		}
	}},
	{blobs, "MUST", "a blob is given", func(c client) {
		c.is(c.get(blob(c.layer.digest.String())), c.layer)
		c.is(c.get(blob(c.small.digest.String())), c.small)
	}},
	{blobs, "draft MUST", "an empty blob is given", func(c client) { c.is(c.get(blob(c.empty.digest.String())), c.empty) }},
	{blobs, "draft MUST", "a blob is given by its sha384 and sha512", func(c client) {
		c.is(c.get(blob(c.layer384.digest.String())), c.layer384)
		c.is(c.get(blob(c.layer512.digest.String())), c.layer512)
	}},
	{blobs, "MUST", "what is not there is 404", func(c client) {
		missing(c, http.MethodGet, blob(nowhere), "/v2/conf/none/blobs/"+c.small.digest.String(), blob("sha512:"+nowhere[7:]+nowhere[7:]))
	}},
	{blobs, "MUST", "the registry's own error says so", func(c client) {
		require.Equal(c, "BLOB_UNKNOWN", c.isError(c.get(blob(nowhere))))
	}},
	{blobs, "draft MUST", "an invalid digest is 400 or 404", func(c client) { refused(c, blob) }},
	{blobs, "SHOULD", "a range is given as RFC 9110 wants it", func(c client) {
		for _, d := range []document{c.layer, c.small, c.layer512} {
			n := len(d.body)
			for span, want := range map[string][2]int{
				"0-0": {0, 1}, "500-1499": {500, 1500}, "500-": {500, n}, "-500": {n - 500, n}, "0-": {0, n},
				fmt.Sprintf("2000-%d", n+5000): {2000, n},
				fmt.Sprintf("-%d", n+1):        {0, n},
				fmt.Sprintf("%d-%d", n-1, n):   {n - 1, n},
			} {
				a := c.get(blob(d.digest.String()), "Range: bytes="+span)
				require.Equal(c, http.StatusPartialContent, a.status, span)
				require.Equal(c, fmt.Sprintf("bytes %d-%d/%d", want[0], want[1]-1, n), a.header.Get("Content-Range"), span)
				require.EqualValues(c, want[1]-want[0], a.length, span)
				require.True(c, bytes.Equal(d.body[want[0]:want[1]], a.body), span)
			}
		}
	}},
	{blobs, "SHOULD", "a range outside is 416 and says the length", func(c client) {
		for _, d := range []document{c.layer, c.small} {
			for _, span := range []string{fmt.Sprintf("%d-", len(d.body)), fmt.Sprintf("%d-%d", len(d.body)+5000, len(d.body)+9000)} {
				a := c.get(blob(d.digest.String()), "Range: bytes="+span)
				require.Equal(c, http.StatusRequestedRangeNotSatisfiable, a.status, span)
				require.Equal(c, fmt.Sprintf("bytes */%d", len(d.body)), a.header.Get("Content-Range"), span)
			}
		}
	}},
	{blobs, "SHOULD", "a range that ends before it begins is 416", func(c client) {
		require.Equal(c, http.StatusRequestedRangeNotSatisfiable, c.get(blob(c.small.digest.String()), "Range: bytes=500-0").status)
	}},
	{blobs, "SHOULD", "several ranges come as multipart/byteranges", func(c client) {
		a := c.get(blob(c.layer.digest.String()), "Range: bytes=-10,100-199,700000-900000,99999999-")
		require.Equal(c, http.StatusPartialContent, a.status)
		require.EqualValues(c, len(a.body), a.length)
		kind, params, err := mime.ParseMediaType(a.header.Get("Content-Type"))
		require.NoError(c, err)
		require.Equal(c, "multipart/byteranges", kind)
		n := len(c.layer.body)
		parts := multipart.NewReader(bytes.NewReader(a.body), params["boundary"])
		for _, want := range [][2]int{{n - 10, n}, {100, 200}, {700_000, 900_001}} {
			p, err := parts.NextPart()
			require.NoError(c, err)
			require.Equal(c, fmt.Sprintf("bytes %d-%d/%d", want[0], want[1]-1, n), p.Header.Get("Content-Range"))
			b, err := io.ReadAll(p)
			require.NoError(c, err)
			require.True(c, bytes.Equal(c.layer.body[want[0]:want[1]], b), want)
		}
		_, err = parts.NextPart()
		require.ErrorIs(c, err, io.EOF)
	}},
	{blobs, "SHOULD", "a range of another content is ignored", func(c client) {
		c.is(c.get(blob(c.small.digest.String()), "Range: bytes=1-2", `If-Range: "sha256:other"`), c.small)
	}},
	{blobs, "SHOULD", "other units are ignored, and numbers have no bound", mirrors(func(c client) { // net/http says 416
		c.is(c.get(blob(c.small.digest.String()), "Range: lines=1-2"), c.small)
		a := c.get(blob(c.small.digest.String()), "Range: bytes=7-999999999999999999999999999999999")
		require.Equal(c, "bytes 7-2999/3000", a.header.Get("Content-Range"))
	})},
	{blobs, "SHOULD", "ranges of an empty blob are ignored", func(c client) {
		c.is(c.get(blob(c.empty.digest.String()), "Range: bytes=0-"), c.empty)
	}},
	{blobs, "SHOULD", "whoever has it need not get it again", mirrors(func(c client) {
		for _, d := range []document{c.layer, c.layer512} {
			a := c.get(blob(d.digest.String()), `If-None-Match: "`+d.digest.String()+`"`)
			require.Equal(c, http.StatusNotModified, a.status)
			require.Empty(c, a.body)
		}
		require.Equal(c, http.StatusNotModified, c.get(manifest("v1"), `If-None-Match: "`+c.image.digest.String()+`"`).status)
		c.is(c.get(manifest("v1"), `If-None-Match: "other"`), c.image)
	})},
}

var existing = []rule{
	{heads, "MUST", "a manifest's header is given by tag and digest", func(c client) {
		for _, d := range []document{c.image, c.index, c.image512} {
			c.names(c.head(manifest(d.digest.String())), d)
		}
		c.names(c.head(manifest("v1")), c.image)
		c.names(c.head(manifest("multi")), c.index)
	}},
	{heads, "MUST", "a blob's header is given", func(c client) {
		for _, d := range []document{c.layer, c.small, c.empty, c.layer384, c.layer512} {
			c.names(c.head(blob(d.digest.String())), d)
		}
	}},
	{heads, "MUST", "what is not there is 404", func(c client) {
		missing(c, http.MethodHead, manifest("none"), manifest(nowhere), blob(nowhere), "/v2/conf/none/manifests/v1")
	}},
}
