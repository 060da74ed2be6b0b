package region_test

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"damselfly.dev/dfdaemon"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode"
	"damselfly.dev/test/meter"
	"damselfly.dev/test/region"
)

// registryName is the registry as engines name it.
const registryName = "reg.test"

const (
	waitLimit = time.Minute
	waitTick  = 10 * time.Millisecond
)

// node is a supernode or an agent that runs.
type node struct {
	metrics *prometheus.Registry
	address string // that clients use
	proxy   string // of a host: its forward proxy
	peer    string // of a host: where others get pieces
	scheme  string // of its URLs, "" for http
	end     func() // ends it and waits; at the latest with the test
}

func (n *node) url() string { return cmp.Or(n.scheme, "http") + "://" + n.address }

// value returns the sum of a metric over those of its series that have the label
// value, all with "".
func (n *node) value(t *testing.T, metric, label string) float64 {
	t.Helper()
	return meter.Value(t, n.metrics, metric, label)
}

func registries(o *origin) registryproxy.Config {
	return reachable(registryproxy.Config{Upstreams: []registryproxy.Upstream{{Name: registryName, URL: o.URL}}})
}

// reachable has what tests serve asked, also where it is not configured.
func reachable(c registryproxy.Config) registryproxy.Config {
	c.AllowAddresses = []string{"127.0.0.0/8", "::1"}
	return c
}

// startSupernode runs a supernode on address, "" for any.
func startSupernode(t *testing.T, o *origin, dir, address string, edit ...func(*supernode.Config)) *node {
	t.Helper()
	return startSupernodeFor(t, registries(o), dir, address, edit...)
}

func startSupernodeFor(t *testing.T, from registryproxy.Config, dir, address string, edit ...func(*supernode.Config)) *node {
	t.Helper()
	if address == "" {
		address = "127.0.0.1:0"
	}
	cfg := supernode.Default()
	cfg.DrainTimeout = 0           // most tests end it to have it gone
	cfg.TagFreshness = time.Minute // a busy machine takes its time, and tags are asked for once
	cfg.DataDir, cfg.Listen, cfg.Registries = dir, address, from
	cfg.TLS = secure().settings()
	for _, e := range edit {
		e(&cfg)
	}
	n := &node{scheme: "http"}
	if cfg.TLS != "" || cfg.CA != "" {
		n.scheme = "https"
	}
	n.address, n.metrics, n.end = region.StartSupernode(t, cfg, infoLog(t))
	return n
}

func infoLog(t *testing.T) *zap.Logger {
	t.Helper()
	return zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel))
}

// startHost runs an agent with an empty store, and waits for its session. Other
// hosts reach it through f unless that is nil.
func startHost(t *testing.T, o *origin, centre *node, f *fault) *node {
	t.Helper()
	return startHostFor(t, registries(o), centre, f)
}

func startHostFor(t *testing.T, from registryproxy.Config, centre *node, f *fault, changes ...func(*dfdaemon.Config)) *node {
	t.Helper()
	cfg := region.Host(t)
	if centre != nil && strings.HasPrefix(centre.address, "[::1]:") {
		cfg.MirrorListen, cfg.PeerListen = "[::1]:0", "[::1]:0"
	}
	cfg.Registries, cfg.TLS = from, secure().settings()
	for _, change := range changes {
		change(&cfg)
	}
	if centre != nil {
		cfg.Supernodes = []string{centre.url()}
	}
	if f != nil {
		u, err := url.Parse(f.URL)
		require.NoError(t, err)
		cfg.Advertise = u.Host
	}
	d, metrics, end := region.StartHost(t, cfg, infoLog(t))
	n := &node{metrics: metrics, address: d.MirrorAddr(), proxy: d.ProxyAddr(), peer: d.PeerAddr(), end: end}
	if f != nil {
		f.target.Store(secure().target(d.PeerAddr()))
	}
	if centre != nil && centre.metrics != nil {
		require.Eventually(t, func() bool { return n.value(t, "damselfly_session_up", "") == 1 }, waitLimit, waitTick)
	}
	return n
}

// push makes an image and puts it into the registry. It returns its name there.
func push(t *testing.T, o *origin) string {
	t.Helper()
	img, err := random.Image(layerSize, layers)
	require.NoError(t, err)
	write(t, o.URL, img)
	o.set(func() { clear(o.gets); o.sent = 0 })
	return "org/app:v1"
}

// write puts an image into the registry at base, as org/app:v1.
func write(t *testing.T, base string, img v1.Image) {
	t.Helper()
	ref, err := name.ParseReference(strings.TrimPrefix(base, "http://")+"/org/app:v1", name.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.Write(ref, img))
}

// pull is an engine's pull through a host: every byte of the image is checked.
func pull(ctx context.Context, host *node, image string) error {
	ref, err := name.ParseReference(host.address+"/"+registryName+"/"+image, name.Insecure)
	if err != nil {
		return err
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	img, err := remote.Image(ref, remote.WithContext(ctx), remote.WithTransport(transport))
	if err != nil {
		return err
	}
	if _, err := img.RawConfigFile(); err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	parts := make(chan error, len(layers))
	for _, l := range layers {
		go func() { parts <- check(l) }()
	}
	for range layers {
		err = errors.Join(err, <-parts)
	}
	return err
}

// check reads a layer and compares it with its digest.
func check(l v1.Layer) error {
	want, err := l.Digest()
	if err != nil {
		return err
	}
	body, err := l.Compressed()
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	sum := sha256.New()
	if _, err := io.Copy(sum, body); err != nil {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want.Hex {
		return fmt.Errorf("layer %s has the digest %s", want, got)
	}
	return nil
}

// pullAll pulls on all hosts at once.
func pullAll(t *testing.T, hosts []*node, image string) {
	t.Helper()
	errs := make(chan error, len(hosts))
	for _, h := range hosts {
		go func() { errs <- pull(t.Context(), h, image) }()
	}
	for range hosts {
		require.NoError(t, <-errs)
	}
}
