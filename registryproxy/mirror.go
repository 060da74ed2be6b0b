package registryproxy

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	maxUnhealthy  = 1024
	unhealthyTime = 10 * time.Minute // for which a mirror is not asked for what it has damaged
)

var errDamaged = errors.New("the mirror's bytes do not have their digest")

// hold reads all of a mirror's manifest, so that one that is damaged or cut off
// is known while there are others to ask.
func (a *answer) hold(reference string) error {
	defer func(body io.Closer) { _ = body.Close() }(a.body)
	b, err := a.body.upTo(MaxManifestSize + 1)
	if err != nil {
		return err
	}
	if want := DigestOf(reference, a.header); want != "" && want.Algorithm().FromBytes(b) != want {
		return errDamaged
	}
	held := io.NopCloser(bytes.NewReader(b))
	a.body = watch(held, a.body.stall, func(error) {}, a.body.failed)
	return nil
}

// checked is a mirror's blob. A mirror that breaks off, or whose bytes are not
// the blob's, is not asked for that blob for a while.
type checked struct {
	io.ReadCloser
	x    *exchange
	sum  digest.Verifier // nil where not all of the blob is read
	left int64
}

func (x *exchange) check(resp *http.Response) io.ReadCloser {
	c := &checked{ReadCloser: resp.Body, x: x, left: resp.ContentLength}
	if resp.StatusCode == http.StatusOK && c.left > 0 {
		c.sum = x.blob.Verifier()
	}
	return c
}

// Read gives the last bytes only when all are right.
func (c *checked) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.left -= int64(n)
	if c.sum != nil {
		_, _ = c.sum.Write(p[:n]) // a hash takes all
		if c.left == 0 && n > 0 && !c.sum.Verified() {
			n, err = 0, errDamaged
		}
	}
	if err != nil && err != io.EOF && c.x.caller.Err() == nil {
		c.x.endpoint.unhealthy.put(c.x.path, struct{}{}, unhealthyTime)
	}
	return n, err
}
