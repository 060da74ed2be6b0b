package dfget

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"damselfly.dev/pieces"
)

// readyTimeout is how long a download waits for a session before it asks the
// origin.
const readyTimeout = 3 * time.Second

// Download gets what a URL names into one file: through a dfdaemon, as a peer of
// its own, or straight from the origin, which is also where it turns when the
// others fail.
type Download struct {
	URL, Digest string // as in URLRequest
	Header      http.Header
	Output      string     // the file; it appears when it is whole
	Socket      string     // of a dfdaemon, "" for none
	Peer        PeerConfig // of its own, where it names supernodes; Advertise needs no port
	DataDir     string     // where a killed download of a peer's own is found again
	Log         *zap.Logger
	// Progress, where set, is told of every bit of the way: bytes written, the
	// size of the whole, -1 unknown, and where bytes came from, as far as known.
	Progress func(done, size int64, from Stats)
}

// MismatchError says that what came does not have the digest.
type MismatchError struct{ Digest digest.Digest }

func (e *MismatchError) Error() string {
	return fmt.Sprintf("the bytes do not have the digest %s: nothing is kept of them", e.Digest)
}

// OutputError says that the file cannot be written.
type OutputError struct{ err error }

func (e *OutputError) Error() string { return "write the output: " + e.err.Error() }
func (e *OutputError) Unwrap() error { return e.err }

// Run downloads. Besides others its errors are a *RefusedError, a *MismatchError
// and an *OutputError; after any of them there is no new file.
func (d *Download) Run(ctx context.Context) error {
	req, err := URLRequest(d.URL, d.Digest, d.Header)
	if err != nil {
		return err
	}
	out, err := newOutput(d.Output)
	if err != nil {
		return &OutputError{err}
	}
	defer out.discard()
	err = d.fill(ctx, req, out)
	if out.err != nil {
		err = &OutputError{out.err}
	}
	if err != nil {
		return err
	}
	if err := out.commit(); err != nil {
		return &OutputError{err}
	}
	return nil
}

// fill writes the content to out from the first source that gives it.
func (d *Download) fill(ctx context.Context, req Request, out *output) error {
	var err error
	switch {
	case d.Socket != "":
		err = d.throughDaemon(ctx, req, out)
	case len(d.Peer.Supernodes) > 0:
		err = d.asPeer(ctx, req, out)
	default:
		return d.straight(ctx, req, out)
	}
	_, refused := errors.AsType[*RefusedError](err)
	_, wrong := errors.AsType[*MismatchError](err)
	if err == nil || refused || wrong || out.err != nil || ctx.Err() != nil {
		return err
	}
	d.Log.Warn("asking the origin itself", zap.Error(err))
	if err := out.restart(); err != nil {
		return &OutputError{err}
	}
	return d.straight(ctx, req, out)
}

func (d *Download) throughDaemon(ctx context.Context, req Request, out *output) error {
	body, size, err := SocketContent(ctx, d.Socket, ContentRequest{URL: d.URL, Digest: d.Digest, Headers: d.Header})
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	return d.copy(req, out, body, size, func() Stats { return Stats{} })
}

func (d *Download) straight(ctx context.Context, req Request, out *output) error {
	r := &originReader{ctx: ctx, direct: direct{from: req.Direct}}
	if err := r.direct.open(ctx, 0); err != nil {
		return err
	}
	defer func() { r.direct.close() }()
	r.size = r.direct.size
	return d.copy(req, out, r, r.size, func() Stats { return Stats{Origin: r.off} })
}

// originReader reads a whole content from its origin.
type originReader struct {
	ctx       context.Context
	direct    direct
	off, size int64
}

func (r *originReader) Read(b []byte) (int, error) {
	if r.off == r.size {
		return 0, io.EOF
	}
	n, err := r.direct.read(r.ctx, b, r.off, r.size)
	r.off += int64(n)
	return n, err
}

// copy writes all of r, checks its size and its digest, and tells of the progress.
func (d *Download) copy(req Request, out *output, r io.Reader, size int64, from func() Stats) error {
	w := io.Writer(out)
	var verifier digest.Verifier
	if want := req.ID.Content(); want != "" {
		verifier = want.Verifier()
		w = io.MultiWriter(out, verifier)
	}
	var done int64
	w = io.MultiWriter(w, writerFunc(func(p []byte) {
		done += int64(len(p))
		if d.Progress != nil {
			d.Progress(done, size, from())
		}
	}))
	if _, err := io.Copy(w, r); err != nil {
		return err
	}
	if size >= 0 && done != size {
		return fmt.Errorf("%d bytes came of %d", done, size)
	}
	if verifier != nil && !verifier.Verified() {
		return &MismatchError{req.ID.Content()}
	}
	return nil
}

type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) { f(p); return len(p), nil }

// asPeer downloads in the swarm. What is there of the content stays for the next
// attempt unless this one succeeds, or finds it wrong.
func (d *Download) asPeer(ctx context.Context, req Request, out *output) (err error) {
	dir := filepath.Join(d.DataDir, strings.Replace(string(req.ID), ":", "-", 1))
	store, err := pieces.OpenStore(dir, pieces.StoreConfig{})
	if err != nil {
		return err
	}
	defer func() {
		_, wrong := errors.AsType[*MismatchError](err)
		useful := slices.ContainsFunc(store.Tasks(), func(h pieces.Held) bool { return h.Have.Len() > 0 })
		if err := store.Close(); err != nil {
			d.Log.Warn("store does not close", zap.Error(err))
		}
		if err == nil || wrong || !useful {
			if err := os.RemoveAll(dir); err != nil {
				d.Log.Warn("store is not removed", zap.Error(err))
			}
		}
	}()
	ln, err := d.listen(ctx)
	if err != nil {
		return err
	}
	cfg := d.Peer
	host, _, _ := net.SplitHostPort(cfg.Advertise) // listen has read it
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	cfg.Advertise = net.JoinHostPort(host, port)
	if cfg.Identity != nil {
		ln = tls.NewListener(ln, cfg.Identity.Server(true))
	}
	peer, err := NewPeer(cfg, store, d.Log, prometheus.NewRegistry())
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	server := &http.Server{Handler: peer.Handler(), ReadHeaderTimeout: webTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader}
	running, stop := context.WithCancel(ctx)
	var group errgroup.Group
	group.Go(func() error { return peer.Run(running) })
	group.Go(func() error { return server.Serve(ln) })
	defer func() {
		stop()
		_ = server.Close()
		_ = group.Wait() // both end because they are told to
	}()
	return d.stream(ctx, peer, req, out)
}

// listen listens where other peers are to find this one.
func (d *Download) listen(ctx context.Context) (net.Listener, error) {
	if _, _, err := net.SplitHostPort(d.Peer.Advertise); err != nil {
		d.Peer.Advertise = net.JoinHostPort(strings.Trim(d.Peer.Advertise, "[]"), "0")
	}
	return (&net.ListenConfig{}).Listen(ctx, "tcp", d.Peer.Advertise)
}

func (d *Download) stream(ctx context.Context, peer *Peer, req Request, out *output) error {
	wait, cancel := context.WithTimeout(ctx, readyTimeout)
	err := peer.Ready(wait)
	cancel()
	if err != nil && ctx.Err() == nil {
		d.Log.Warn("no supernode can be reached, asking the origin itself", zap.Strings("supernodes", d.Peer.Supernodes))
	}
	s, err := peer.Open(ctx, req, 0, -1)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	return d.copy(req, out, s, s.Size(), s.Stats)
}
