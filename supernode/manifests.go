package supernode

import (
	"context"
	"errors"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

// tagTimeout bounds asking a registry what a tag stands for, when there is a
// last known answer.
const tagTimeout = 3 * time.Second

// tag is what a tag stands for.
type tag struct {
	digest string
	age    time.Duration           // since the registry said so; 0 unless it cannot be reached
	got    *registryproxy.Manifest // where the registry gave it with the answer, else nil
}

var errNotKept = errors.New("the manifest last known is no longer kept")

// serveManifest gives a manifest from the cache, bringing it there before.
//
// A tag has one answer for all, the registry's to a client that takes every
// type. A client that takes others gets an answer of its own, past the cache.
func (n *Supernode) serveManifest(w http.ResponseWriter, r *http.Request, route registryproxy.Route, who registryproxy.Caller) {
	ctx, cancel := context.WithTimeoutCause(r.Context(), firstByte, errStalled)
	defer cancel()
	src, t := n.source(route, who), tag{digest: route.Reference}
	if digest.Digest(route.Reference).Validate() != nil {
		var err error
		if t, err = n.resolve(ctx, src); err != nil {
			n.fail(w, err)
			return
		}
		src = n.source(route, who)
		src.named = true
	}
	l, err := n.bringManifest(ctx, pieces.TaskID(t.digest), t, src)
	if err != nil {
		n.notCached(w, r, route, who, err)
		return
	}
	defer l.Release()
	if err := l.wait(ctx); err != nil {
		n.notCached(w, r, route, who, err)
		return
	}
	mediaType := l.Meta().MediaType
	if mediaType == "" || !accepts(r.Header.Values("Accept"), mediaType) {
		n.direct(w, r, route, who)
		return
	}
	if t.age > 0 || src.away {
		n.metrics.staleTags.Inc()
		n.log.Warn("manifest served as last known", zap.Stringer("repository", route.Repo),
			zap.String("reference", route.Reference), zap.Duration("age", t.age))
		w.Header().Set(api.StaleHeader, strconv.Itoa(int(t.age.Seconds())))
	}
	n.writeManifest(w, r, l, mediaType)
}

// bringManifest returns the manifest that a tag stands for.
func (n *Supernode) bringManifest(ctx context.Context, id pieces.TaskID, t tag, src *registrySource) (*lease, error) {
	if t.age > 0 { // the caller may read it, and the registry cannot be asked again
		c := n.origin.cached(id)
		if c == nil {
			return nil, passing{errNotKept}
		}
		if !gave(src, c) { // the tag may be of another's digest
			c.Release()
			return nil, errOthers
		}
		return &lease{Content: c}, nil
	}
	src.digest, src.got = t.digest, t.got
	return n.origin.bring(ctx, id, src, api.Join{})
}

func (n *Supernode) writeManifest(w http.ResponseWriter, r *http.Request, l *lease, mediaType string) {
	if unchanged(w, r, string(l.ID())) {
		return
	}
	w.Header().Set("Content-Type", mediaType)
	size := l.Layout().Length
	registryproxy.Selection{Size: size}.WriteHeader(w)
	if r.Method == http.MethodHead {
		return
	}
	sent, err := l.CopyRange(w, 0, size)
	n.metrics.sentBytes.Add(float64(sent))
	if err != nil {
		panic(http.ErrAbortHandler)
	}
}

// directManifest answers as the registry does to this caller's own request.
func (n *Supernode) directManifest(w http.ResponseWriter, r *http.Request, route registryproxy.Route, who registryproxy.Caller) {
	accept, head := r.Header.Values("Accept"), r.Method == http.MethodHead
	var m *registryproxy.Manifest
	var err error
	if head {
		m, err = n.client.Manifest(r.Context(), true, route.Repo, route.Reference, accept, who)
	}
	if !head || err == nil && (m.Digest == "" || m.Size < 0) { // a HEAD need not say it all
		m, err = n.manifest(r.Context(), route.Repo, route.Reference, accept, who)
	}
	if err != nil {
		n.fail(w, err)
		return
	}
	if unchanged(w, r, m.Digest.String()) {
		return
	}
	w.Header().Set("Content-Type", m.MediaType)
	registryproxy.Selection{Size: m.Size}.WriteHeader(w)
	if !head {
		_, _ = w.Write(m.Body) // whoever went away needs no answer
	}
}

// accepts tells whether a client takes a media type.
func accepts(accept []string, mediaType string) bool {
	if len(accept) == 0 {
		return true
	}
	for _, line := range accept {
		for item := range strings.SplitSeq(line, ",") {
			t, _, err := mime.ParseMediaType(item)
			if err == nil && (t == mediaType || t == "*/*" || t == "application/*") {
				return true
			}
		}
	}
	return false
}

// resolve returns what the tag src.digest stands for, to a caller that the
// registry lets read it.
func (n *Supernode) resolve(ctx context.Context, src *registrySource) (tag, error) {
	name := src.repo.String() + ":" + src.digest
	last, known := n.tags.get(name)
	age := time.Since(last.Checked)
	known = known && age < n.cfg.StaleFor
	if known && age < n.cfg.TagFreshness {
		if _, err := src.check(ctx, true); err != nil {
			return tag{}, err
		}
		return tag{digest: last.Digest}, nil
	}
	if err := src.access.Denied(src.route(), src.who); err != nil {
		return tag{}, err
	}
	if known {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, tagTimeout)
		defer cancel()
	}
	key := src.key()
	done := n.resolver.DoChan(string(key[:]), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), firstByte)
		defer cancel()
		return n.lookup(ctx, name, src)
	})
	var t tag
	var err error
	select {
	case r := <-done:
		t, _ = r.Val.(tag)
		err = r.Err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err == nil || registryproxy.IsNo(err) || !known {
		return t, err
	}
	if _, denied := src.check(ctx, true); denied != nil {
		return tag{}, err
	}
	n.log.Info("registry does not say what a tag is", zap.String("tag", name), zap.Error(err))
	return tag{digest: last.Digest, age: max(age, time.Second)}, nil
}

// lookup asks the registry with the caller's credentials, by a HEAD. Where that
// does not say it all, or says no, of which only a GET has the words, by a GET.
func (n *Supernode) lookup(ctx context.Context, name string, src *registrySource) (tag, error) {
	m, err := n.client.Manifest(ctx, true, src.repo, src.digest, nil, src.who)
	if _, no := errors.AsType[*registryproxy.Refusal](err); no || err == nil && m.Digest == "" {
		m, err = n.manifest(ctx, src.repo, src.digest, nil, src.who)
	}
	if err != nil {
		src.access.Deny(src.route(), src.who, err)
		return tag{}, err
	}
	src.proved()
	v := note{Name: name, Digest: m.Digest.String(), Checked: time.Now()}
	if err := n.tags.put(v); err != nil {
		n.log.Warn("tag is not kept", zap.String("tag", name), zap.Error(err))
	}
	t := tag{digest: v.Digest}
	if m.Body != nil {
		t.got = m
	}
	return t, nil
}
