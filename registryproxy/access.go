package registryproxy

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sync/singleflight"
)

// ProofLife is how long a yes of an origin is remembered at the most: so that all that
// follows from it, a ticket and the answer it lets begin, ends within five minutes.
const ProofLife = 4*time.Minute + 20*time.Second

const (
	refusalLife = 5 * time.Second
	maxReaders  = 1 << 18
	maxClosed   = 1 << 14
	maxRefusals = 256         // their bodies take at most 16 MiB
	proofTime   = time.Minute // for the requests of one check
	awayLife    = time.Minute // of what is allowed while the registry is away
	// awayAfter is how long a registry may think where there is an answer without it.
	awayAfter = 2 * time.Second
)

// Access remembers who may read what, so that what is cached goes only to
// callers that the registry accepts:
//
//   - A registry lets callers into repositories. Who has read anything of one, by a
//     fetch or by a HEAD, is its reader: for five minutes, and not past the end that
//     the caller's token names. Where anyone may read, all are its readers.
//   - What a repository holds its registry alone says: by having given it from there,
//     or by a HEAD. Not a manifest, which its author has written.
//
// It holds hashes of credentials, in bounded maps. It asks with the caller's own
// credentials, or with none; callers that need the same answer share a request.
type Access struct {
	client   *Client
	now      func() time.Time
	ledger   Ledger
	readers  *memo[proof, time.Time]     // until when they need no other proof
	closed   *memo[Repository, struct{}] // to who has no credentials
	refusals *memo[proof, *Refusal]
	flight   singleflight.Group
}

// Ledger keeps which repositories anyone could read when their registry last said
// so: they stay readable while it is away.
type Ledger interface {
	IsPublic(repo Repository) bool
	SetPublic(repo Repository, public bool)
}

// Verdict is why a caller may read.
type Verdict struct {
	Public bool      // no credentials are needed, also none of the configuration
	Away   bool      // the registry could not be asked, and what was so stays so
	Until  time.Time // when the registry is to be asked again
}

// proof is the SHA-256 of what is read and of the credentials.
type proof [sha256.Size]byte

// NewAccess returns an Access that knows nothing yet but the ledger, and asks
// through c.
func NewAccess(c *Client, ledger Ledger, now func() time.Time) *Access {
	return &Access{
		client: c, now: now, ledger: ledger,
		readers:  newMemo[proof, time.Time](maxReaders, now),
		closed:   newMemo[Repository, struct{}](maxClosed, now),
		refusals: newMemo[proof, *Refusal](maxRefusals, now),
	}
}

func proofOf(parts ...string) proof {
	h := sha256.New()
	for _, s := range parts {
		h.Write([]byte(s)) // none of them can hold a NUL
		h.Write([]byte{0})
	}
	return proof(h.Sum(nil))
}

func readerOf(repo Repository, who Caller) proof {
	return proofOf("reader", repo.Registry, repo.Name, who.Authorization)
}

// check is what is to be found out for one caller. held says that the repository
// is known to hold what is asked for.
type check struct {
	Route
	who  Caller
	held bool
}

func (c check) exact() proof {
	return proofOf(c.Kind.String(), c.Repo.Registry, c.Repo.Name, c.Reference, c.who.Authorization)
}

// Check returns nil if who may read a manifest or a blob; held says that the
// repository is known to hold it. The registry is asked only for what is not
// remembered. The error is the registry's *Refusal, remembered for five seconds if
// it is final, or what Client returns. While the registry cannot be asked, what
// anyone could read stays readable, and for as long as its configuration says what
// the caller could.
func (a *Access) Check(ctx context.Context, what Route, who Caller, held bool) (Verdict, error) {
	c := check{what, who, held}
	was, known := a.remembers(c)
	if known {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, awayAfter)
		defer cancel()
	}
	err := a.find(ctx, c)
	switch {
	case err == nil:
		public := a.reads(c.Repo, Caller{}) && a.client.IsPublic(c.Repo.Registry, Caller{})
		return Verdict{Public: public, Until: latest(a.until(c.Repo, c.who), a.now())}, nil
	case known && !IsNo(err):
		was.Until = a.now().Add(awayLife)
		return was, nil
	}
	return Verdict{}, err
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// remembers returns what holds while the registry is away, if anything does.
func (a *Access) remembers(c check) (Verdict, bool) {
	if !c.held {
		return Verdict{}, false
	}
	if a.reads(c.Repo, c.who) { // and nobody is asked
		return Verdict{}, false
	}
	if a.client.IsPublic(c.Repo.Registry, Caller{}) && a.ledger.IsPublic(c.Repo) {
		return Verdict{Public: true, Away: true}, true
	}
	_, anyone := a.readers.get(readerOf(c.Repo, Caller{}))
	_, caller := a.readers.get(readerOf(c.Repo, c.who))
	return Verdict{Away: true}, anyone || caller
}

// IsNo tells the registry's no, and a request that must not be sent, from trouble;
// that it is asked too much is trouble too.
func IsNo(err error) bool {
	_, malformed := errors.AsType[*Error](err)
	r, refused := errors.AsType[*Refusal](err)
	return malformed || refused && r.Final() && !r.Limited()
}

// reads tells whether who is known to be a reader.
func (a *Access) reads(repo Repository, who Caller) bool { return a.now().Before(a.until(repo, who)) }

// until returns how long who is known to be a reader: the past where it is not.
func (a *Access) until(repo Repository, who Caller) (end time.Time) {
	for _, who := range []Caller{{}, who} {
		if until, ok := a.readers.get(readerOf(repo, who)); ok {
			end = latest(end, until)
		}
	}
	return end
}

// find finds out what is not known: whether anyone may read, else whether the
// caller may, and whether it is there.
func (a *Access) find(ctx context.Context, c check) error {
	if c.who.Authorization != "" && a.try(ctx, c) {
		return nil
	}
	if !a.reads(c.Repo, c.who) {
		same, err := a.share(ctx, readerOf(c.Repo, c.who), c)
		if err != nil || same {
			return err
		}
	}
	if c.held {
		return nil
	}
	_, err := a.share(ctx, proofOf("holds", c.Kind.String(), c.Repo.Registry, c.Repo.Name, c.Reference), c)
	return err
}

// try finds out whether anyone may read, where that is not known, for a caller
// that has credentials to ask with else. It is true when that has settled it all.
func (a *Access) try(ctx context.Context, c check) bool {
	if _, closed := a.closed.get(c.Repo); closed || a.reads(c.Repo, Caller{}) {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, awayAfter)
	defer cancel()
	c.who = Caller{}
	same, err := a.share(ctx, readerOf(c.Repo, c.who), c)
	if err != nil && !IsNo(err) {
		a.closed.put(c.Repo, struct{}{}, refusalLife)
	}
	return same && err == nil
}

// share asks for c, or waits for who asks for key already. What comes of that is
// an answer to all, but for a no: that is one only to who asks for the very same.
// It tells whether c itself was asked for.
func (a *Access) share(ctx context.Context, key proof, c check) (same bool, err error) {
	mine := c.exact()
	for _, key := range []proof{key, mine} {
		if no, ok := a.refusals.get(mine); ok {
			return true, no
		}
		done := a.flight.DoChan(string(key[:]), func() (any, error) {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), proofTime)
			defer cancel()
			return mine, a.ask(ctx, c)
		})
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case r := <-done:
			_, no := errors.AsType[*Refusal](r.Err)
			if same, err = r.Val.(proof) == mine, r.Err; same || !no {
				return same, err
			}
		}
	}
	return same, err
}

// ask asks the registry, and remembers what it says.
func (a *Access) ask(ctx context.Context, c check) error {
	err := a.prove(ctx, c)
	if err == nil {
		a.Proved(c.Repo, c.who)
		return nil
	}
	if no, refused := errors.AsType[*Refusal](err); refused && no.Final() {
		a.refused(c, no)
	}
	return err
}

// refused remembers a no.
func (a *Access) refused(c check, no *Refusal) {
	a.refusals.put(c.exact(), no, refusalLife)
	if no.denies() {
		a.readers.drop(readerOf(c.Repo, c.who), func(time.Time) bool { return true })
	}
	if c.who == (Caller{}) && !no.Limited() {
		a.closed.put(c.Repo, struct{}{}, ProofLife)
		if no.denies() {
			a.ledger.SetPublic(c.Repo, false)
		}
	}
}

// Denied returns the registry's own no to who, if it has just wanted other
// credentials for the same manifest or blob.
func (a *Access) Denied(what Route, who Caller) error {
	if no, ok := a.refusals.get(check{Route: what, who: who}.exact()); ok && no.denies() {
		return no
	}
	return nil
}

// Deny remembers err where it is that.
func (a *Access) Deny(what Route, who Caller, err error) {
	if no, ok := errors.AsType[*Refusal](err); ok && no.denies() {
		a.refused(check{Route: what, who: who}, no)
	}
}

// prove asks the registry by a HEAD. One that is refused is followed by a GET:
// only that has the registry's own words, and an object store may take no HEAD
// for a URL that was signed for a GET.
func (a *Access) prove(ctx context.Context, c check) error {
	q := question{Route: c.Route, method: http.MethodHead, who: c.who}
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

// Proved remembers that the registry has just let a caller read something of a
// repository, and needs no proof for a while.
func (a *Access) Proved(repo Repository, who Caller) {
	now := a.now()
	if who == (Caller{}) && !a.reads(repo, who) && a.client.IsPublic(repo.Registry, who) {
		a.ledger.SetPublic(repo, true)
	}
	left := who.left(now)
	life := min(left, ProofLife)
	a.readers.put(readerOf(repo, who), now.Add(life), min(left, max(life, a.client.get(repo.Registry).away)))
}

// Life is how long what an origin has said to c may be remembered.
func (c Caller) Life(now time.Time) time.Duration { return min(c.left(now), ProofLife) }

// Lapsed tells that the caller's token has come to the end that it names itself: what
// a registry says to it from then on is no word about its owner.
func (c Caller) Lapsed(now time.Time) bool { return c.left(now) == 0 }

// left is how long the caller's token says that it is good for: a JSON Web Token
// names its end, and of others nobody knows more than whom they are for.
func (c Caller) left(now time.Time) time.Duration {
	const long = 365 * 24 * time.Hour
	scheme, token, _ := strings.Cut(c.Authorization, " ")
	parts := strings.Split(token, ".")
	if !strings.EqualFold(scheme, "bearer") || len(parts) != 3 {
		return long
	}
	var claims struct {
		End *float64 `json:"exp"` // seconds since 1970
	}
	text, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(parts[1], "="))
	if err != nil || json.Unmarshal(text, &claims) != nil || claims.End == nil {
		return long
	}
	left := *claims.End - float64(now.UnixMilli())/1000
	return time.Duration(max(0, min(left, long.Seconds())) * float64(time.Second))
}
