// Package dfdaemon is a host's agent: the mirror that engines pull through, the
// forward proxy and the control socket, on top of the peer.
package dfdaemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
)

// The settings of addresses.
const (
	mirrorListen  = "mirror-listen"
	peerListen    = "peer-listen"
	metricsListen = "metrics-listen"
	socketListen  = "socket"
)

// regionLimit is how long one that has taken over waits for a session before it answers:
// without one it would ask the registry for what the region has.
const regionLimit = 3 * time.Second

// Daemon is an agent. It holds its store and its listeners from New on until
// Run returns.
type Daemon struct {
	log       *zap.Logger
	store     *pieces.Store
	scrubRate int64
	peer      *dfget.Peer
	identity  *identity.Source  // what the host shows to the region, nil without TLS
	addr      map[string]string // host:port of the TCP listeners, by setting
	servers   []*server
	refused   prometheus.Counter // connections
	tunnels   *tunnels           // nil without a forward proxy
	ready     atomic.Bool        // Run serves and is not about to end
	drainTime time.Duration

	before    *net.UnixConn           // to the one whose place this is to be, until it has left; nil for none
	inherited map[string]net.Listener // of that one, by setting, until they are used
	handover  *net.UnixListener       // nil where there can be none
	claimed   map[string]string       // where this one listens, as claim says
	socket    *socket                 // nil for none
	heir      *heir
	successor bool // of one in whose region it has to be before it answers
}

// New opens the store and the listeners, or takes them over from the one that runs;
// Run must be called, and closes them. The error says which setting is in the way.
func New(cfg Config, log *zap.Logger, reg *prometheus.Registry) (*Daemon, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	gin.SetMode(gin.ReleaseMode) // gin's debug mode writes to the standard output
	d := &Daemon{log: log, scrubRate: cfg.ScrubRate, drainTime: cfg.DrainTimeout, addr: map[string]string{}, heir: newHeir()}
	d.claim(cfg)
	var err error
	if d.before == nil {
		err = d.openStore(cfg)
	}
	if err == nil {
		err = d.open(cfg, reg)
	}
	closeAll(d.inherited)
	if err == nil {
		if d.socket != nil {
			d.socket.kept.Store(false)
		}
		d.listenHandover(cfg)
		return d, nil
	}
	if d.before != nil {
		_ = d.before.Close() // it goes on
	}
	for _, s := range d.servers {
		_ = s.ln.Close()
	}
	if d.store != nil {
		_ = d.store.Close()
	}
	return nil, err
}

func (d *Daemon) openStore(cfg Config) (err error) {
	d.store, err = pieces.OpenStore(cfg.DataDir, pieces.StoreConfig{
		Quota: cfg.Quota, KeepFree: cfg.KeepFree,
		OnEvict: func(id pieces.TaskID) { d.peer.Evicted(id) },
		OnLost:  func(id pieces.TaskID, _ []int) { d.peer.Lost(id) },
	})
	if errors.Is(err, pieces.ErrLocked) {
		return fmt.Errorf("%w: give each dfdaemon a --data-dir of its own; one that is to take another's place needs its --%s, too", err, mirrorListen)
	}
	return err
}

// open makes the parts and the listeners. What a setting can be wrong about comes before
// another one's place is taken, and what has the store after it.
func (d *Daemon) open(cfg Config, reg *prometheus.Registry) error {
	m := &mirror{heir: d.heir, def: cfg.Registries.Default, urls: cfg.URLs, ports: cfg.Proxy.Ports, log: d.log}
	var err error
	if m.registry, err = registryproxy.New(cfg.Registries, d.log, reg); err != nil {
		return err
	}
	if m.metrics, err = newMetrics(reg, func() pieces.Usage { return d.store.Usage() }); err != nil {
		return err
	}
	d.refused = m.metrics.refused
	peer, own, err := d.listenPeer(cfg)
	if err != nil {
		return err
	}
	s, err := d.listen(cfg.MirrorListen, mirrorListen)
	if err != nil {
		return err
	}
	s.Handler = api.Bounded(cfg.forThisHost(m.handler()))
	if cfg.Proxy.Listen != "" {
		if err = d.openProxy(cfg.Proxy, m, reg); err != nil {
			return err
		}
	}
	if cfg.MetricsListen != "" {
		if s, err = d.listen(cfg.MetricsListen, metricsListen); err != nil {
			return err
		}
		s.Handler = api.Bounded(d.health(reg))
	}
	if cfg.Socket != "" {
		if err = d.openSocket(cfg, m); err != nil {
			return err
		}
	}
	if d.store == nil {
		d.takeOver()
		d.successor = len(cfg.Supernodes) > 0
		if err = d.openStore(cfg); err != nil {
			return err
		}
	}
	if d.peer, err = dfget.NewPeer(peer, d.store, d.log, reg); err != nil {
		return err
	}
	if own != nil {
		own.Handler = api.Bounded(d.peer.Handler())
	}
	m.store, m.peer, m.relay = d.store, d.peer, newRelay(d.peer.Centre, d.identity)
	return nil
}

// openProxy makes the forward proxy, with a listener of its own and one for the
// connections that it intercepts.
func (d *Daemon) openProxy(cfg ProxyConfig, m *mirror, reg prometheus.Registerer) error {
	p, err := newProxy(cfg, m, reg)
	if err != nil {
		return err
	}
	s, err := d.listen(cfg.Listen, proxyListen)
	if err != nil {
		return err
	}
	s.Handler = p.handler()
	d.tunnels = p.tunnels
	inner := d.add(p.inner)
	inner.Handler = p.inside()
	inner.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		of, _ := c.(*interceptedConn)
		return context.WithValue(ctx, authorityKey{}, of.authority)
	}
	return nil
}

// listenPeer returns the peer's settings, and its server if it is to have one.
func (d *Daemon) listenPeer(cfg Config) (peer dfget.PeerConfig, s *server, err error) {
	if len(cfg.Supernodes) == 0 {
		d.log.Warn("no supernode is named: all comes from the registries")
	}
	peer = dfget.PeerConfig{
		Supernodes: cfg.Supernodes, Zone: cfg.Zone, Rack: cfg.Rack, UpLanes: cfg.UpLanes, DownLanes: cfg.DownLanes,
	}
	if peer.Background, err = cfg.background(); err != nil {
		return peer, nil, err
	}
	if d.identity, err = identity.ForHost(cfg.TLS, cfg.JoinToken, filepath.Join(cfg.DataDir, "identity"), cfg.Supernodes, d.log); err != nil {
		return peer, nil, err
	}
	peer.Identity, peer.ClearPrivate = d.identity, cfg.ClearPrivate
	if d.identity == nil && !cfg.ClearPrivate && len(cfg.Supernodes) > 0 {
		d.log.Warn("TLS is off: private images are pulled past the region; see docs/security.md")
	}
	if cfg.PeerListen != "" {
		if s, err = d.listen(cfg.PeerListen, peerListen); err != nil {
			return peer, nil, err
		}
		if peer.Advertise, err = cfg.advertised(s.ln.Addr().String()); err != nil {
			return peer, nil, err
		}
		if d.identity != nil {
			s.tls = d.identity.Server(true)
		}
	}
	return peer, s, peer.Validate()
}

// openSocket makes the server of the control socket.
func (d *Daemon) openSocket(cfg Config, m *mirror) error {
	users, err := userIDs(cfg.SocketUsers)
	if err != nil {
		return err
	}
	s, err := d.listenSocket(cfg, len(users) > 0)
	if err != nil {
		return err
	}
	s.ConnContext = withUser
	s.Handler = api.Bounded(forUsers(users, cfg.SocketGroup != "", (&control{d, m}).handler()))
	return nil
}

// listen adds a server, yet without a handler, on a TCP address, which the named
// setting holds.
func (d *Daemon) listen(addr, setting string) (*server, error) {
	ln, err := d.inherit(setting), error(nil)
	if ln == nil {
		ln, err = net.Listen("tcp", addr) //nolint:noctx // at once: the address is this host's
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%w: another process has it, choose another with --%s", err, setting)
	case err != nil:
		return nil, fmt.Errorf("%w: choose another address with --%s", err, setting)
	}
	d.addr[setting] = ln.Addr().String()
	s := d.add(ln)
	s.setting = setting
	return s, nil
}

// listenSocket is listen for the control socket.
func (d *Daemon) listenSocket(cfg Config, all bool) (*server, error) {
	if ln, ok := d.inherit(socketListen).(*net.UnixListener); ok {
		d.socket = &socket{UnixListener: ln, path: cfg.Socket}
		d.socket.kept.Store(true) // it is the other one's yet
		mode, gid, err := socketMode(cfg.SocketGroup, all)
		if err == nil {
			err = permit(cfg.Socket, mode, gid)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("control socket %s: %w", cfg.Socket, err), ln.Close())
		}
	} else {
		var err error
		if d.socket, err = listenSocket(cfg.Socket, cfg.SocketGroup, all); err != nil {
			return nil, err
		}
	}
	s := d.add(d.socket)
	s.setting = socketListen
	return s, nil
}

// inherit returns the listener that came from the one whose place this is, nil where
// none did.
func (d *Daemon) inherit(setting string) net.Listener {
	ln := d.inherited[setting]
	delete(d.inherited, setting)
	return ln
}

func (d *Daemon) add(ln net.Listener) *server {
	s := newServer(ln, d.refused.Inc)
	s.ErrorLog, _ = zap.NewStdLogAt(d.log, zap.ErrorLevel) // panics come here; the level is a valid one
	d.servers = append(d.servers, s)
	return s
}

// MirrorAddr returns host:port that engines pull from.
func (d *Daemon) MirrorAddr() string { return d.addr[mirrorListen] }

// PeerAddr returns host:port where other hosts get pieces, "" for none.
func (d *Daemon) PeerAddr() string { return d.addr[peerListen] }

// ProxyAddr returns host:port of the forward proxy, "" for none.
func (d *Daemon) ProxyAddr() string { return d.addr[proxyListen] }

// Run serves until ctx ends, or another one has taken this one's place; then it lets
// running answers come to their end, as far as the time allows, and closes everything.
func (d *Daemon) Run(ctx context.Context) error {
	d.log.Info("serving", zap.String("mirror", d.MirrorAddr()), zap.String("peer", d.PeerAddr()))
	d.ready.Store(true)
	group, ctx := errgroup.WithContext(ctx)
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	var users sync.WaitGroup // of the store
	users.Add(2)
	group.Go(func() error {
		defer users.Done()
		if err := d.peer.Run(work); work.Err() == nil {
			return fmt.Errorf("peer: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		defer users.Done()
		_ = d.store.Tend(work, d.scrubRate) // its only end is that of work
		return nil
	})
	release := sync.OnceValue(func() error {
		stop()
		users.Wait()
		return d.store.Close()
	})
	for _, s := range d.servers {
		group.Go(func() error {
			d.awaitRegion(ctx, s)
			return s.serve()
		})
	}
	handed := make(chan struct{})
	if d.handover != nil {
		group.Go(func() error { d.handOver(handed, release); return nil })
	}
	group.Go(func() error {
		d.drain(ctx, handed)
		err := release()
		if d.handover != nil {
			_ = d.handover.Close() // with the store free, whoever finds it gone can go on
		}
		return err
	})
	return group.Wait()
}

// awaitRegion waits until s is to answer: programs of the host wait for a session, where
// this one has taken over; other hosts do not.
func (d *Daemon) awaitRegion(ctx context.Context, s *server) {
	if !d.successor || s.setting == peerListen || s.setting == metricsListen {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, regionLimit)
	defer cancel()
	_ = d.peer.Ready(ctx) // without one it answers, too
}

// drain waits for ctx's end, or for handed, and then ends all servers, and what has
// been taken over from them.
func (d *Daemon) drain(ctx context.Context, handed <-chan struct{}) {
	select {
	case <-ctx.Done():
		d.log.Info("draining", zap.Duration("limit", d.drainTime))
	case <-handed:
	}
	d.ready.Store(false)
	wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), answersLimit)
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(d.drainTime, cancel)
		context.AfterFunc(wait, func() { timer.Stop() })
	})()
	var group errgroup.Group
	for _, s := range d.servers {
		group.Go(func() error { return s.drain(wait) })
	}
	if err := group.Wait(); err != nil {
		d.log.Warn("servers did not end well", zap.Error(err))
	}
	if d.tunnels != nil {
		d.tunnels.close(wait)
	}
}

// health serves what is watched from outside.
func (d *Daemon) health(reg *prometheus.Registry) http.Handler {
	e := gin.New()
	e.HandleMethodNotAllowed = true
	e.GET("/metrics", gin.WrapH(promhttp.HandlerFor(reg, promhttp.HandlerOpts{})))
	e.GET("/healthz", func(c *gin.Context) { c.String(http.StatusOK, "alive\n") })
	e.GET("/readyz", func(c *gin.Context) {
		if !d.ready.Load() {
			c.String(http.StatusServiceUnavailable, "not serving\n")
			return
		}
		c.String(http.StatusOK, "ready\n")
	})
	return e
}
