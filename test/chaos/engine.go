//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// errWrong is a content that does not have its digest.
var errWrong = errors.New("wrong digest")

// What containerd does, in its versions from 2.3 on.
const (
	mirrorDial   = 200 * time.Millisecond // dial_timeout, as dfdaemon's own configuration for it says
	registryDial = 30 * time.Second
	headerLimit  = 30 * time.Second
	resumes      = 3 // of a body that breaks off, without a byte in between
	atOnce       = 3 // layers
)

// An engine pulls as containerd does: each request goes to the mirror, and to the
// registry where the mirror does not answer it with success; a body that breaks off
// is asked for again from where it is, of the mirror first. What it gets it compares
// with its digest, and keeps nothing.
type engine struct {
	hosts  []string // the mirror and the registry, or the registry alone
	client *http.Client
}

func newEngine(h *lab.Host, mirror, registry string) *engine {
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		limit := registryDial
		if strings.HasSuffix(mirror, address) {
			limit = mirrorDial
		}
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		return h.Dial(ctx, network, address)
	}
	return &engine{hosts: []string{mirror, registry}, client: &http.Client{
		Transport: &http.Transport{DialContext: dial, ResponseHeaderTimeout: headerLimit, DisableCompression: true, MaxIdleConnsPerHost: atOnce},
	}}
}

func (e *engine) close() { e.client.CloseIdleConnections() }

// pull brings all of p.
func (e *engine) pull(ctx context.Context, p picture) error {
	repo, tag, _ := strings.Cut(p.name, ":")
	if err := e.fetch(ctx, repo+"/manifests/"+tag, p.contents[0]); err != nil { // nobody moves the tag
		return err
	}
	var group errgroup.Group
	group.SetLimit(atOnce)
	for _, c := range p.contents[1:] {
		group.Go(func() error { return e.fetch(ctx, repo+"/blobs/"+c.Digest.String(), c) })
	}
	return group.Wait()
}

// fetch gets one content.
func (e *engine) fetch(ctx context.Context, path string, want v1.Descriptor) error {
	sum, off := sha256.New(), int64(0)
	for tries := 0; ; {
		body, err := e.open(ctx, path, off)
		if err != nil {
			return fmt.Errorf("%s at %d of %d: %w", path, off, want.Size, err)
		}
		n, err := io.Copy(sum, io.LimitReader(body, want.Size-off+1))
		_ = body.Close()
		if n > 0 {
			tries = 0
		}
		off += n
		switch {
		case off >= want.Size:
			if got := hex.EncodeToString(sum.Sum(nil)); got != want.Digest.Hex || off > want.Size {
				return fmt.Errorf("%s: %w %s", path, errWrong, got)
			}
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("%s at %d of %d: %w", path, off, want.Size, context.Cause(ctx))
		}
		if tries++; tries > resumes {
			return fmt.Errorf("%s breaks off at %d of %d: %w", path, off, want.Size, errors.Join(err, io.ErrUnexpectedEOF))
		}
	}
}

// open asks the mirror, and then the registry.
func (e *engine) open(ctx context.Context, path string, off int64) (io.ReadCloser, error) {
	var errs []error
	for _, host := range e.hosts {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, host+"/v2/"+path+"?ns="+programs.RegistryName, http.NoBody)
		if err != nil {
			return nil, err
		}
		r.Header.Set("Accept", "application/vnd.oci.image.manifest.v1+json, */*")
		status := http.StatusOK
		if off > 0 {
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-", off))
			status = http.StatusPartialContent
		}
		resp, err := e.client.Do(r)
		if err == nil && resp.StatusCode == status {
			return resp.Body, nil
		}
		if err == nil {
			text, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
			_ = resp.Body.Close()
			err = fmt.Errorf("%s answers %s: %s", host, resp.Status, text)
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}
