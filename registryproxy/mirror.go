package registryproxy

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"time"
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
	io.Reader
	io.Closer
	x *exchange
}

func (x *exchange) check(resp *http.Response) io.ReadCloser {
	c := &checked{resp.Body, resp.Body, x}
	if resp.StatusCode == http.StatusOK {
		c.Reader = Verified(resp.Body, x.blob.Verifier(), errDamaged)
	}
	return c
}

// Read implements io.Reader.
func (c *checked) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) && c.x.caller.Err() == nil {
		c.x.endpoint.unhealthy.put(c.x.path, struct{}{}, unhealthyTime)
	}
	return n, err
}
