package registryproxy

import (
	"context"
	"crypto/sha256"
	"errors"
	"net/http"
	"time"

	"golang.org/x/sync/singleflight"
)

const (
	proofLife   = 5 * time.Minute
	refusalLife = 5 * time.Second
	maxProofs   = 1 << 16
	maxRefusals = 256         // their bodies take at most 16 MiB
	proofTime   = time.Minute // for the requests of one check
)

// Access remembers who may read what, so that what is cached goes only to
// callers that the registry accepts. It holds hashes of credentials, in a
// bounded map, and asks again after five minutes.
type Access struct {
	client   *Client
	proofs   *memo[proof, struct{}]
	refusals *memo[proof, *Refusal]
	flight   singleflight.Group
}

// proof is the SHA-256 of what is read and of the credentials.
type proof [sha256.Size]byte

// NewAccess returns an Access that knows nothing yet and asks through c.
func NewAccess(c *Client, now func() time.Time) *Access {
	return &Access{
		client:   c,
		proofs:   newMemo[proof, struct{}](maxProofs, now),
		refusals: newMemo[proof, *Refusal](maxRefusals, now),
	}
}

func proofOf(kind Kind, repo Repository, reference string, who Caller) proof {
	h := sha256.New()
	for _, s := range []string{kind.String(), repo.Registry, repo.Name, reference, who.Authorization} {
		h.Write([]byte(s)) // none of them can hold a NUL
		h.Write([]byte{0})
	}
	return proof(h.Sum(nil))
}

// Check returns nil if who may read a manifest or a blob, which is public if
// no credentials are needed, also none of the configuration. The registry is asked only when nothing is
// remembered, with the caller's own credentials or, where it has none, without;
// callers with the same ones share the request. The error is the registry's
// *Refusal, remembered for five seconds if it is final, or what Client returns.
func (a *Access) Check(ctx context.Context, kind Kind, repo Repository, reference string, who Caller) (public bool, err error) {
	if _, ok := a.proofs.get(proofOf(kind, repo, reference, Caller{})); ok {
		return a.client.IsPublic(repo.Registry, Caller{}), nil
	}
	p := proofOf(kind, repo, reference, who)
	if _, ok := a.proofs.get(p); ok {
		return false, nil
	}
	if r, ok := a.refusals.get(p); ok {
		return false, r
	}
	done := a.flight.DoChan(string(p[:]), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), proofTime)
		defer cancel()
		err := a.prove(ctx, kind, repo, reference, who)
		if err == nil {
			a.proofs.put(p, struct{}{}, proofLife)
		} else if r, ok := errors.AsType[*Refusal](err); ok && r.Final() {
			a.refusals.put(p, r, refusalLife)
		}
		return nil, err
	})
	select {
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case r := <-done:
		return r.Err == nil && a.client.IsPublic(repo.Registry, who), r.Err
	}
}

// prove asks the registry by a HEAD. One that is refused is followed by a GET:
// only that has the registry's own words, and an object store may take no HEAD
// for a URL that was signed for a GET.
func (a *Access) prove(ctx context.Context, kind Kind, repo Repository, reference string, who Caller) error {
	q := question{Route: Route{kind, repo, reference}, method: http.MethodHead, who: who}
	q.header = http.Header{"Accept": manifestTypes}
	answer, err := a.client.ask(ctx, q)
	if _, ok := errors.AsType[*Refusal](err); ok {
		q.method = http.MethodGet
		answer, err = a.client.ask(ctx, q)
	}
	if err != nil {
		return err
	}
	defer answer.close()
	return answer.want(http.StatusOK)
}

// Proved remembers that a request with this caller's credentials, or without
// any if public, has just succeeded, and needs no proof for a while.
func (a *Access) Proved(kind Kind, repo Repository, reference string, who Caller, public bool) {
	if public {
		who = Caller{}
	}
	a.proofs.put(proofOf(kind, repo, reference, who), struct{}{}, proofLife)
}
