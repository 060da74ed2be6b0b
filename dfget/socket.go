package dfget

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"damselfly.dev/supernode/api"
)

// SocketContentPath is where dfdaemon's control socket takes a ContentRequest by
// POST. It answers with 200 and the bytes; with an error of its own, marked by
// api.ErrorHeader, as an api.Error; else with the origin's refusal as it came.
const SocketContentPath = "/v1/content"

const (
	socketTimeout = 40 * time.Second // past what the daemon gives its own sources
	maxError      = 4 << 10          // bytes of an api.Error
)

// ContentRequest asks a dfdaemon for what a URL names.
type ContentRequest struct {
	URL     string      `json:"url"`
	Digest  string      `json:"digest,omitempty"`  // "sha256:…" where it is known
	Headers http.Header `json:"headers,omitempty"` // for the URL's own host
}

// SocketContent gets a content through the dfdaemon that listens on a unix
// socket. The length is -1 when it is not known. The origin's own no is a
// *RefusedError.
func SocketContent(ctx context.Context, socket string, want ContentRequest) (body io.ReadCloser, length int64, err error) {
	b, err := json.Marshal(want)
	if err != nil {
		return nil, 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://dfdaemon"+SocketContentPath, bytes.NewReader(b))
	if err != nil {
		return nil, 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", socket)
		},
		ResponseHeaderTimeout: socketTimeout,
		DisableCompression:    true,
		DisableKeepAlives:     true,
	}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, 0, fmt.Errorf("dfdaemon at %s: %w", socket, api.WithoutURL(err))
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, resp.ContentLength, nil
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.Header.Get(api.ErrorHeader) == "" && resp.StatusCode >= 400 {
		b, err := io.ReadAll(io.LimitReader(resp.Body, maxRefusal)) //nolint:forbidigo // capped
		if err != nil {
			return nil, 0, fmt.Errorf("dfdaemon at %s: %w", socket, err)
		}
		return nil, 0, &RefusedError{Status: resp.StatusCode, Header: resp.Header, Body: b}
	}
	var no api.Error
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxError)).Decode(&no); err != nil || no.Message == "" {
		no.Message = fmt.Sprintf("it answers with status %d", resp.StatusCode)
	}
	return nil, 0, fmt.Errorf("dfdaemon at %s: %s", socket, no.Message)
}
