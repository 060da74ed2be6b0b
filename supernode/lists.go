package supernode

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"damselfly.dev/registryproxy"
)

const (
	maxList  = registryproxy.MaxManifestSize // bytes of a list that is kept
	maxLists = 32 << 20                      // bytes of all
)

var errLong = errors.New("the list is larger than 4 MiB")

// lists keeps what registries answer for tags and referrers for as long as a tag
// is fresh. Who asks the same with the same credentials shares one request.
type lists struct {
	fresh  time.Duration
	flight singleflight.Group

	mu    sync.Mutex // guards what follows
	known map[proof]list
	size  int // of all bodies
}

// list is a registry's answer, or that it has none.
type list struct {
	header http.Header
	body   []byte
	no     error
	until  time.Time
}

func newLists(fresh time.Duration) *lists { return &lists{fresh: fresh, known: map[proof]list{}} }

// get returns what is known of key, which who's credentials are part of, or what ask says.
func (s *lists) get(ctx context.Context, key proof, who registryproxy.Caller, ask func(context.Context) (list, error)) (list, error) {
	s.mu.Lock()
	l, ok := s.known[key]
	s.mu.Unlock()
	if ok && time.Now().Before(l.until) {
		return l, l.no
	}
	done := s.flight.DoChan(string(key[:]), func() (any, error) {
		ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), firstByte, errStalled)
		defer cancel()
		l, err := ask(ctx)
		if r, no := refused(err); no && r.Status == http.StatusNotFound { // as for referrers where they are not known
			l.no = err
		}
		now := time.Now()
		l.until = now.Add(min(s.fresh, who.Life(now)))
		if err == nil || l.no != nil {
			s.put(key, l)
		}
		return l, err
	})
	select {
	case r := <-done:
		l, _ := r.Val.(list)
		return l, r.Err
	case <-ctx.Done():
		return list{}, context.Cause(ctx)
	}
}

// put keeps l, and forgets all others where they are too much.
func (s *lists) put(key proof, l list) {
	const each = 1 << 10 // for what is not body
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.known[key]; ok {
		s.size -= len(old.body) + each
	}
	if s.size += len(l.body) + each; s.size > maxLists {
		clear(s.known)
		s.size = len(l.body) + each
	}
	s.known[key] = l
}

// serveList answers with tags or referrers.
func (n *Supernode) serveList(w http.ResponseWriter, r *http.Request, route registryproxy.Route, who registryproxy.Caller) {
	query, accept := r.URL.Query(), r.Header.Values("Accept")
	query.Del("ns")
	key := proofOf("list", r.Method, route.Repo.Registry, route.Path(), query.Encode(), strings.Join(accept, ","), who.Authorization)
	l, err := n.lists.get(r.Context(), key, who, func(ctx context.Context) (l list, err error) {
		resp, err := n.client.Forward(ctx, r.Method, route, query, http.Header{"Accept": accept}, who)
		if err != nil {
			return l, err
		}
		defer func() { _ = resp.Body.Close() }()
		var b bytes.Buffer
		if _, err := b.ReadFrom(io.LimitReader(resp.Body, maxList+1)); err != nil {
			return l, err
		}
		if b.Len() > maxList {
			return l, errLong
		}
		return list{header: resp.Header, body: b.Bytes()}, nil
	})
	if errors.Is(err, errLong) {
		n.forward(w, r, route, who)
		return
	}
	if err != nil {
		n.fail(w, err)
		return
	}
	relayHeader(w, r, l.header)
	if registryproxy.NotModified(r.Header, l.header.Get("Etag")) {
		w.Header().Del("Content-Length")
		w.WriteHeader(http.StatusNotModified)
		return
	}
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(l.body) // whoever went away needs no answer
}
