package supernode

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/singleflight"

	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
)

const (
	stopTimeout  = 5 * time.Second // for answers under way when downloads have ended
	keepVersions = 7 * 24 * time.Hour
	stallTimeout = 10 * time.Second

	maxConnections = 1 << 16 // of HTTP: those of sessions are counted apart
)

// Supernode is a region's centre.
type Supernode struct {
	registries
	cfg      Config
	log      *zap.Logger
	metrics  *metrics
	keys     *ticketKeys
	guard    identity.Guard
	ca       *identity.CA // nil where hosts come with certificates of their own
	root     *os.Root     // the data directory
	store    *pieces.Store
	tags     *notes
	lists    *lists
	resolver singleflight.Group // of tags; who has the same credentials shares a request
	web      *web
	origin   *origin
	region   *region
	rights   *rights
	uploads  api.Gate // those to hosts, by the host's id
	sessions api.Gate
	floods   floods
	draining atomic.Bool // no new work is taken
	engine   *gin.Engine
	ctx      context.Context // of fetches and sessions
	stop     context.CancelCauseFunc
}

// Registry is where metrics are registered and gathered for /metrics.
type Registry interface {
	prometheus.Registerer
	prometheus.Gatherer
}

// New opens the data directory of a supernode, which Run then runs and closes.
func New(cfg Config, log *zap.Logger, reg Registry) (*Supernode, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	n := &Supernode{cfg: cfg, log: log}
	n.sessions.All, n.sessions.Each = cfg.MaxHosts, cfg.AddressConnections
	var err error
	n.store, err = pieces.OpenStore(filepath.Join(cfg.DataDir, "store"), pieces.StoreConfig{
		Quota: cfg.Quota, KeepFree: cfg.KeepFree,
		OnLost: func(id pieces.TaskID, lost []int) { n.region.lost(id, lost...) },
	})
	if errors.Is(err, pieces.ErrLocked) {
		err = fmt.Errorf("%w: give each supernode a --data-dir of its own", err)
	}
	if err != nil {
		return nil, err
	}
	n.ctx, n.stop = context.WithCancelCause(context.Background())
	if err := n.open(reg); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

func (n *Supernode) open(reg Registry) (err error) {
	if n.root, err = os.OpenRoot(n.cfg.DataDir); err != nil {
		return fmt.Errorf("open data directory: %w", err)
	}
	if n.keys, err = loadKeys(n.root, n.log); err != nil {
		return err
	}
	if err = n.openIdentity(); err != nil {
		return err
	}
	if n.tags, err = openNotes(n.root, "tags", n.cfg.StaleFor+time.Hour); err != nil {
		return err
	}
	n.lists = newLists(n.cfg.TagFreshness)
	versions, err := openNotes(n.root, "urls", keepVersions)
	if err != nil {
		return err
	}
	if err := n.root.RemoveAll(spoolDir); err != nil {
		return fmt.Errorf("sweep %s: %w", spoolDir, err)
	}
	if err := n.root.Mkdir(spoolDir, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if n.metrics, err = newMetrics(reg, n.store); err != nil {
		return err
	}
	client, err := registryproxy.New(n.cfg.Registries, n.log, reg)
	if err != nil {
		return err
	}
	public, err := openNotes(n.root, "public", keepVersions)
	if err != nil {
		return err
	}
	n.registries = registries{client, registryproxy.NewAccess(client, ledger{public, n.log}, n.cfg.Now), n.metrics, n.cfg.Now}
	stall := n.cfg.Registries.StallTimeout
	if stall == 0 {
		stall = stallTimeout
	}
	n.web = newWeb(n.registries, stall, n.cfg.TagFreshness, versions, n.log)
	n.uploads.All, n.uploads.Each = uploadsAtOnce*n.cfg.UpLanes, uploadsOfOne*n.cfg.UpLanes
	n.region = newRegion(n.cfg, n.log, n.metrics)
	n.origin = n.newOrigin()
	n.region.origin = n.origin
	if n.rights, err = openRights(n.cfg.Tokens, n.log); err != nil {
		return err
	}
	n.engine = n.routes(reg)
	return nil
}

func (n *Supernode) newOrigin() *origin {
	o := &origin{
		ctx: n.ctx, store: n.store, root: n.root, quota: n.cfg.Quota, keepFree: n.cfg.KeepFree, told: n.region, metrics: n.metrics, log: n.log, now: n.now,
		slots:     make(chan struct{}, maxFetches),
		running:   map[pieces.TaskID]*fetch{},
		inherited: map[pieces.TaskID]int64{},
		counted:   map[pieces.TaskID]struct{}{},
	}
	for _, t := range n.store.Tasks() {
		for i := range t.Have.All() {
			o.inherited[t.ID] += t.Layout.Size(i)
		}
	}
	return o
}

// Handler serves all of the supernode's HTTP. It needs Run to be running.
func (n *Supernode) Handler() http.Handler { return n.engine }

// Run serves on ln until ctx ends, then drains, and closes the data directory. With
// a nil ln only Handler serves. It can be called once.
func (n *Supernode) Run(ctx context.Context, ln net.Listener) error {
	regionCtx, endRegion := context.WithCancel(context.WithoutCancel(ctx))
	defer endRegion()
	go n.region.run(regionCtx)
	var tended sync.WaitGroup // ends with n.ctx
	tended.Go(func() { _ = n.store.Tend(n.ctx, n.cfg.ScrubRate) })
	tended.Go(func() {
		n.keys.run(n.ctx, func() {
			keys := n.keys.wire()
			n.region.do(func() { n.region.tellKeys(keys) })
		})
	})
	served := make(chan error, 1)
	errorLog, err := zap.NewStdLogAt(n.log, zap.DebugLevel)
	if err != nil {
		return errors.Join(err, n.close())
	}
	srv := &http.Server{
		Handler:  api.Bounded(n.engine),
		ErrorLog: errorLog, // what clients do to their connections
	}
	(&api.Gate{All: maxConnections, Each: n.cfg.AddressConnections}).Guard(srv, n.metrics.refused.Inc)
	if ln != nil && n.guard.Source != nil {
		ln = tls.NewListener(ln, n.guard.Source.Server(false))
	}
	if ln != nil {
		n.log.Info("serving", zap.String("address", ln.Addr().String()), zap.String("advertised", n.cfg.Advertise))
		go func() { served <- srv.Serve(ln) }()
	}
	select {
	case <-ctx.Done():
		n.drain(context.WithoutCancel(ctx), srv)
	case err = <-served:
		err = fmt.Errorf("serve: %w", err)
	}
	n.stop(errStopping)
	_ = srv.Close() // whoever still reads takes too long
	n.origin.wg.Wait()
	tended.Wait()
	endRegion()
	<-n.region.ended
	return errors.Join(err, n.close())
}

// drain lets what hosts have begun come to its end, as far as the time allows, and
// then the answers under way. Who begins something is sent elsewhere.
func (n *Supernode) drain(ctx context.Context, srv *http.Server) {
	n.draining.Store(true)
	n.log.Info("draining", zap.Duration("limit", n.cfg.DrainTimeout))
	wait, cancel := context.WithTimeout(ctx, n.cfg.DrainTimeout)
	defer cancel()
	idle := make(chan struct{})
	n.region.do(func() { n.region.drain(idle) })
	select {
	case <-idle:
	case <-wait.Done():
		n.log.Info("the drain's time is up")
		n.stop(errStopping) // answers that wait for a fetch wait no longer
	}
	stop, cancelStop := context.WithTimeout(ctx, stopTimeout)
	defer cancelStop()
	_ = srv.Shutdown(stop) // its only error is that of stop
}

func (n *Supernode) close() error {
	n.stop(errStopping)
	err := n.store.Close()
	if n.root != nil {
		err = errors.Join(err, n.root.Close())
	}
	if err != nil {
		return fmt.Errorf("close data directory: %w", err)
	}
	return nil
}
