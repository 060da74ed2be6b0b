package dfdaemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"damselfly.dev/httprange"
)

// heirLimit is how long the one that has taken this one's place may take to answer.
const heirLimit = 5 * time.Second

var errNoHeir = errors.New("no other dfdaemon has taken over")

// heir is the mirror of the dfdaemon that has taken this one's place, which has the
// store and the session.
type heir struct {
	mirror atomic.Pointer[string] // host:port, nil while there is none
	client http.Client
}

func newHeir() *heir {
	return &heir{client: http.Client{Transport: &http.Transport{
		ResponseHeaderTimeout: heirLimit, DisableCompression: true, DisableKeepAlives: true,
	}}}
}

// open asks it for a blob from off on. Any error means that the registry is to be
// asked: also for its no.
func (h *heir) open(ctx context.Context, b registryBlob, off int64) (io.ReadCloser, int64, error) {
	if h == nil || h.mirror.Load() == nil {
		return nil, 0, errNoHeir
	}
	at := "http://" + *h.mirror.Load() + b.route.Path() + "?" + url.Values{"ns": {b.route.Repo.Registry}}.Encode()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, at, http.NoBody)
	if err != nil {
		return nil, 0, err
	}
	wanted := fmt.Sprintf("bytes=%d-", off)
	if b.end > 0 {
		wanted += fmt.Sprint(b.end - 1)
	}
	r.Header.Set("Range", wanted)
	if b.who.Authorization != "" {
		r.Header.Set("Authorization", b.who.Authorization)
	}
	resp, err := h.client.Do(r)
	if err != nil {
		return nil, 0, err
	}
	got, size, ok := httprange.ParseContent(resp.Header.Get("Content-Range"))
	if resp.StatusCode != http.StatusPartialContent || !ok || got.Offset != off {
		_ = resp.Body.Close()
		return nil, 0, fmt.Errorf("it answers %s", resp.Status)
	}
	return resp.Body, size, nil
}
