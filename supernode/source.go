package supernode

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"slices"
	"strings"
	"time"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
)

// source is where a task's bytes come from, on behalf of one caller.
type source interface {
	// open returns the bytes from off on, of length in all or -1 if that is not
	// known. A *registryproxy.Refusal is the origin's no; isPassing tells what may
	// do better later.
	open(ctx context.Context, off, length int64) (*body, error)
	// part returns the bytes from off to end, errWhole where the origin gives only
	// all of them.
	part(ctx context.Context, off, end int64) (*body, error)
	// measure asks for the length, without the bytes.
	measure(ctx context.Context) (*body, error)
	// allowed returns nil when the caller may read c, which is cached;
	// errChanged when c is no longer what the origin has.
	allowed(ctx context.Context, c *pieces.Content) (right, error)
	// lapsed tells that the credentials have ended as they said they would, or may
	// have: the origin's no to them is none to the caller.
	lapsed() bool
	// opened notes that open has succeeded, so that the caller needs no other
	// proof.
	opened(b *body)
	// continues tells whether b is more of what the task's bytes so far are of.
	continues(b *body) bool
	// name is the repository under which a content is asked for, "" for none.
	name() string
	// from names the registry or server that is asked. Its word on who may read a
	// content counts only when it has itself given that content's bytes.
	from() string
	// key is the same for two sources that ask the same with the same credentials.
	key() proof
}

// right is that a caller may read a content.
type right struct {
	public bool      // and anyone
	until  time.Time // when the origin is to be asked again
}

// body is an origin's answer.
type body struct {
	io.ReadCloser
	from      int64  // the offset of its first byte
	length    int64  // of the whole content, -1 if not known
	mediaType string // of a manifest
	version   string // of what a URL gives, "" where it does not say
	partial   bool   // of what a URL gives, a range
	counted   bool   // its bytes have been counted as read from the origin
}

var (
	errChanged = errors.New("the origin has other content by now")
	errWrong   = errors.New("the content does not have its digest")
	errWhole   = errors.New("the origin gives no ranges")
	errLarge   = errors.New("the content is not as small as it was said to be")
	errOthers  = errors.New("the content is another origin's")
)

// passing is a failure that may be over the next time.
type passing struct{ error }

func (p passing) Unwrap() error { return p.error }

func isPassing(err error) bool {
	_, ok := errors.AsType[passing](err)
	return ok || registryproxy.IsTemporary(err)
}

// refused returns the origin's own no in err, if it is one.
func refused(err error) (*registryproxy.Refusal, bool) {
	r, ok := errors.AsType[*registryproxy.Refusal](err)
	return r, ok && r.Final()
}

// registrySource is a blob or a manifest of a registry, by digest.
type registrySource struct {
	registries
	kind   registryproxy.Kind
	repo   registryproxy.Repository
	digest string
	who    registryproxy.Caller
	got    *registryproxy.Manifest // what the registry has already given, or nil
	named  bool                    // the digest is the registry's own answer for a tag of the repository
	away   bool                    // the registry could not be asked, and who could read may go on
}

// registries is what is needed to ask registries.
type registries struct {
	client  *registryproxy.Client
	access  *registryproxy.Access
	metrics *metrics
	now     func() time.Time
}

func (s *registrySource) open(ctx context.Context, off, length int64) (*body, error) {
	if off > 0 {
		return s.read(ctx, off, length)
	}
	err := s.access.Denied(s.route(), s.who)
	if err != nil {
		return nil, err
	}
	b, err := s.read(ctx, off, length)
	s.access.Deny(s.route(), s.who, err)
	return b, err
}

func (s *registrySource) route() registryproxy.Route {
	return registryproxy.Route{Kind: s.kind, Repo: s.repo, Reference: s.digest}
}

// read asks the registry.
func (s *registrySource) read(ctx context.Context, off, length int64) (*body, error) {
	if s.kind == registryproxy.KindBlob {
		var b *registryproxy.BlobBody
		var err error
		if off > 0 && off < length { // some registries know bounded ranges alone
			b, err = s.client.BlobRange(ctx, s.repo, s.digest, registryproxy.ByteRange{Offset: off, Length: length - off}, s.who)
		} else {
			b, err = s.client.Blob(ctx, s.repo, s.digest, off, s.who)
		}
		if err != nil {
			return nil, err
		}
		return &body{ReadCloser: b.ReadCloser, from: off, length: b.Length}, nil
	}
	m := s.got
	if m == nil {
		var err error
		if m, err = s.manifest(ctx, s.repo, s.digest, nil, s.who); err != nil {
			return nil, err
		}
	}
	rest := io.NopCloser(bytes.NewReader(m.Body[min(off, m.Size):]))
	return &body{ReadCloser: rest, from: off, length: m.Size, mediaType: m.MediaType, counted: true}, nil
}

func (s *registrySource) part(ctx context.Context, off, end int64) (*body, error) {
	b, err := s.client.BlobPart(ctx, s.repo, s.digest, registryproxy.ByteRange{Offset: off, Length: end - off}, s.who)
	if errors.Is(err, registryproxy.ErrNoRange) {
		return nil, errWhole
	}
	if err != nil {
		return nil, err
	}
	return &body{ReadCloser: b.ReadCloser, from: off, length: b.Length}, nil
}

func (s *registrySource) measure(ctx context.Context) (*body, error) {
	size, err := s.client.HeadBlob(ctx, s.repo, s.digest, s.who)
	return &body{length: size}, err
}

// manifest gets a manifest from its registry, and counts it.
func (r registries) manifest(ctx context.Context, repo registryproxy.Repository, reference string, accept []string, who registryproxy.Caller) (*registryproxy.Manifest, error) {
	m, err := r.client.Manifest(ctx, false, repo, reference, accept, who)
	if err == nil {
		r.metrics.originBytes.Add(float64(len(m.Body)))
	}
	return m, err
}

// allowed asks the registry for what is not known: whether the caller may read the
// repository, and whether that holds c.
func (s *registrySource) allowed(ctx context.Context, c *pieces.Content) (right, error) {
	held := slices.Contains(c.Meta().Origins, s.name())
	may, err := s.check(ctx, held || s.named)
	if err == nil && !held {
		_ = c.AddOrigin(s.name()) // else it is asked again
	}
	return may, err
}

// check asks the registry whether the caller may read it, which the repository is
// known to hold or not.
func (s *registrySource) check(ctx context.Context, held bool) (right, error) {
	v, err := s.access.Check(ctx, s.route(), s.who, held)
	s.away = s.away || v.Away
	return right{v.Public, v.Until}, err
}

func (s *registrySource) lapsed() bool { return s.who.Lapsed(s.now()) }

func (s *registrySource) opened(*body) { s.proved() }

// proved notes that the registry has just let the caller read the repository.
func (s *registrySource) proved() { s.access.Proved(s.repo, s.who) }

// continues is true: the digest decides.
func (s *registrySource) continues(*body) bool { return true }

func (s *registrySource) name() string { return s.repo.String() }

func (s *registrySource) from() string { return s.repo.Registry }

func (s *registrySource) key() proof {
	return proofOf("registry", s.kind.String(), s.repo.Registry, s.repo.Name, s.digest, s.who.Authorization)
}

// origins are who has given a content, when src has: its registry or server, and its
// name there.
func origins(src source) []string {
	if src.name() == "" {
		return []string{src.from()}
	}
	return []string{src.from(), src.name()}
}

// gave tells whether the origin of src has itself given the bytes of c. It has
// where only the name of one of its repositories is still known.
func gave(src source, c *pieces.Content) bool {
	return slices.ContainsFunc(c.Meta().Origins, func(o string) bool {
		return o == src.from() || strings.HasPrefix(o, src.from()+"/")
	})
}

// proof is the SHA-256 of what is read and of the credentials.
type proof [sha256.Size]byte

func proofOf(parts ...string) proof {
	h := sha256.New()
	for _, p := range parts {
		sum := sha256.Sum256([]byte(p)) // so that no part runs into the next
		h.Write(sum[:])
	}
	return proof(h.Sum(nil))
}
