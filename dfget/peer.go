// Package dfget is the peer: it gets contents by pieces from others and serves
// them onward. It also holds what the dfget command needs besides.
package dfget

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
)

const (
	defaultLanes = 3
	dialTimeout  = 2 * time.Second
)

// PeerConfig is what a peer may be told.
type PeerConfig struct {
	// Supernodes are base URLs of the region's supernodes, tried in turn; one
	// session stands at a time. With none, all bytes come from the origin.
	Supernodes []string
	// Host is the host's own id, at most 64 bytes. "" is a random one, made once
	// and kept in the store's directory.
	Host string
	// Advertise is the host:port at which other peers reach Handler; an empty host
	// is the address the supernode sees. "" is a peer that only takes.
	Advertise string
	// Zone and Rack say where the host stands; hosts near by are preferred.
	Zone, Rack string
	// UpLanes and DownLanes are how many transfers share the host's bandwidth each
	// way; 0 is 3. They should be equal: downloads that outnumber uploads starve
	// each other. More lanes make each slower and take a piece of memory each.
	UpLanes, DownLanes int
	// Background is how long after the first range of a content the rest is got as
	// well, 0 for at once; negative is never: then of a content of which only
	// bounded ranges are read only their pieces are.
	Background time.Duration
	// Identity, where set, is what the host shows to supernodes and other hosts, over
	// TLS, and asks of them; Handler is then to be served with its Server. Run
	// renews it. Without, nothing goes to others but what is public, unless
	// ClearPrivate says that the network itself is encrypted.
	Identity     *identity.Source
	ClearPrivate bool
}

// Validate tells what is wrong with c.
func (c PeerConfig) Validate() error {
	for _, base := range c.Supernodes {
		u, err := url.Parse(base)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" {
			return fmt.Errorf("supernode %q: want a URL such as http://10.0.0.1:8002", base)
		}
	}
	if c.Advertise != "" {
		if _, _, err := net.SplitHostPort(c.Advertise); err != nil {
			return fmt.Errorf("advertised address %q: want host:port", c.Advertise)
		}
	}
	if len(c.Host) > maxHost {
		return fmt.Errorf("host id of %d bytes: want at most %d", len(c.Host), maxHost)
	}
	for _, lanes := range []int{c.UpLanes, c.DownLanes} {
		if lanes < 0 || lanes > api.MaxLanes {
			return fmt.Errorf("%d lanes: want 1 to %d, or 0 for %d", lanes, api.MaxLanes, defaultLanes)
		}
	}
	return nil
}

// Peer takes part in the swarm of a region for one host. Its store stays the
// caller's, who closes it after Run has returned and the last Stream is closed.
type Peer struct {
	cfg       PeerConfig
	store     *pieces.Store
	log       *zap.Logger
	metrics   *metrics
	client    *http.Client // of sessions
	transfers *transport
	scheme    string // of other peers' URLs, with its slashes
	guard     identity.Guard
	slots     chan struct{} // taken by each upload
	tickets   tickets
	group     *errgroup.Group // of Run, for what runs in it to add to
	rate      atomic.Int64    // bytes a second of one transfer, as measured lately; 0 is unknown
	answers   atomic.Int64    // nanoseconds from a request to the head of its answer, as measured lately; 0 is unknown

	// mu guards what follows, the fields of tasks that say so, and no I/O.
	mu      sync.Mutex
	session *session // nil while none stands
	up      chan struct{}
	lost    time.Time // when the last session ended
	tasks   map[pieces.TaskID]*task
	early   map[[sha256.Size]byte]*early // opened before they are asked for
	coming  int                          // transfers assigned and not ended
}

// NewPeer returns a peer that keeps its pieces in store. It does nothing in the
// swarm before Run; until then, as without any supernode, Open asks the origin.
func NewPeer(cfg PeerConfig, store *pieces.Store, log *zap.Logger, reg prometheus.Registerer) (*Peer, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.UpLanes, cfg.DownLanes = cmp.Or(cfg.UpLanes, defaultLanes), cmp.Or(cfg.DownLanes, defaultLanes)
	if cfg.Host == "" {
		var err error
		if cfg.Host, err = hostID(store.Dir()); err != nil {
			return nil, err
		}
	}
	m, err := newMetrics(reg)
	if err != nil {
		return nil, err
	}
	p := &Peer{
		cfg: cfg, store: store, log: log, metrics: m,
		client:    newClient(),
		transfers: newTransport(2 * cfg.DownLanes),
		scheme:    "http://",
		guard:     identity.Guard{Source: cfg.Identity, ClearPrivate: cfg.ClearPrivate},
		slots:     make(chan struct{}, 3*cfg.UpLanes),
		up:        make(chan struct{}),
		tasks:     make(map[pieces.TaskID]*task),
		early:     make(map[[sha256.Size]byte]*early),
	}
	if cfg.Identity != nil {
		p.secure()
	}
	return p, nil
}

// secure has all connections made over TLS, with the host's identity.
func (p *Peer) secure() {
	p.scheme = "https://"
	p.transfers.tls = p.cfg.Identity.Peer
	p.client.Transport = &http.Transport{
		DialTLSContext: p.cfg.Identity.DialSupernode((&net.Dialer{Timeout: dialTimeout}).DialContext),
	}
	p.cfg.Supernodes = slices.Clone(p.cfg.Supernodes)
	for i, base := range p.cfg.Supernodes {
		p.cfg.Supernodes[i] = identity.Secure(base)
	}
}

// newClient returns the client of sessions.
func newClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSHandshakeTimeout: dialTimeout,
		},
		CheckRedirect: noRedirect,
	}
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// Run keeps a session with a supernode and makes the transfers it assigns, until
// ctx ends. It returns when all that it began has ended. It may be called once.
func (p *Peer) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	p.group = group
	group.Go(func() error { return p.keepSession(ctx) })
	if p.cfg.Identity != nil {
		group.Go(func() error { return p.cfg.Identity.Run(ctx) })
	}
	err := group.Wait()
	p.client.CloseIdleConnections()
	p.transfers.CloseIdleConnections()
	return err
}

// Supernode returns the base URL of the supernode with which a session stands
// now, if any does.
func (p *Peer) Supernode() (base string, ok bool) {
	base, _, ok = p.Centre()
	return base, ok
}

// Centre is Supernode, and tells whether nobody can listen to what it is told.
func (p *Peer) Centre() (base string, sealed, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session == nil {
		return "", false, false
	}
	return p.session.base, p.session.sealed, true
}

// Ready returns when a session stands, or the cause of ctx's end.
func (p *Peer) Ready(ctx context.Context) error {
	p.mu.Lock()
	up := p.up
	p.mu.Unlock()
	select {
	case <-up:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Evicted tells the region that the store has evicted a task; it is what the
// owner of the store has OnEvict call.
func (p *Peer) Evicted(id pieces.TaskID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.session
	switch {
	case s == nil:
	case p.tasks[id] != nil: // it is coming again, from the beginning
		s.send(holdMessage(p.store, id))
	default:
		s.send(leaveMessage(id))
	}
}

// Lost tells the region that pieces of a task are no longer there; it is what the
// owner of the store has OnLost call.
func (p *Peer) Lost(id pieces.TaskID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := p.tasks[id]; t != nil && t.content != nil {
		t.complete = t.content.Complete()
	}
	if p.session != nil {
		p.session.send(holdMessage(p.store, id))
	}
}

// Errors of a Peer that has no answer of the region's to give.
var (
	errNoSession = errors.New("no session with a supernode")
	errNotNow    = errors.New("the region cannot serve the task")
)
