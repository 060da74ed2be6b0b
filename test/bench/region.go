//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// payload is the part of a link that TCP's payload can fill: frames of 9000
// bytes carry 8948, and 14 more are counted.
const payload = 8948.0 / 9014

// bytesIn is how long a link takes to carry so many bytes of payload, in seconds.
func bytesIn(n int64, link lab.Rate) float64 { return float64(n) * 8 / (float64(link) * payload) }

// layout is a region to be built. Rates are of links, the same both ways.
type layout struct {
	hosts      []lab.Rate
	supernode  lab.Rate
	origin     lab.Rate
	zones      []string // of the hosts; nil is none; supernode and origin stand where the first does
	zoneLink   lab.Rate // of each zone
	superFlags []string
	hostFlags  []string
	secure     bool // with TLS
}

// equal is a layout of n hosts, a supernode and an origin, all with one rate.
func equal(n int, rate lab.Rate) layout {
	l := layout{supernode: rate, origin: rate}
	for range n {
		l.hosts = append(l.hosts, rate)
	}
	return l
}

// bound is the time, in seconds, before which no order of transfers can bring
// so many bytes to all hosts: the origin's link, the supernode's, the slowest
// host's, or all uploads together.
func (l layout) bound(size int64) float64 {
	slowest, uploads := l.supernode, l.supernode
	for _, rate := range l.hosts {
		slowest, uploads = min(slowest, rate), uploads+rate
	}
	return max(bytesIn(size, l.origin), bytesIn(size, slowest), bytesIn(size*int64(len(l.hosts)), uploads))
}

// region is a layout that runs: an nginx with blobs, a supernode, and a
// dfdaemon on each host.
type region struct {
	layout
	lab    *lab.Lab
	origin *programs.Nginx
	super  *programs.Supernode
	hosts  []*programs.Daemon
}

func build(ctx context.Context, bin string, l layout) (_ *region, err error) {
	if l.zones == nil {
		l.zones = make([]string, len(l.hosts))
	}
	cfg := lab.Config{Dir: scratch(), ZoneLink: l.zoneLink, Hosts: []lab.HostConfig{
		{Name: "registry", Up: l.origin, Down: l.origin, Zone: l.zones[0]},
		{Name: "supernode", Up: l.supernode, Down: l.supernode, Zone: l.zones[0]},
	}}
	for i, rate := range l.hosts {
		cfg.Hosts = append(cfg.Hosts, lab.HostConfig{Name: "host" + strconv.Itoa(i+1), Up: rate, Down: rate, Zone: l.zones[i]})
	}
	r := &region{layout: l}
	if r.lab, err = lab.New(ctx, cfg); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.lab.Close())
		}
	}()
	if r.origin, err = programs.StartNginx(ctx, r.lab.Host("registry")); err != nil {
		return nil, err
	}
	if l.secure {
		ca, token, err := programs.Secured(ctx, bin, filepath.Join(r.lab.Dir(), "ca"))
		if err != nil {
			return nil, err
		}
		l.superFlags, l.hostFlags = append(slices.Clip(l.superFlags), ca), append(slices.Clip(l.hostFlags), token)
	}
	upstreams := map[string]string{programs.RegistryName: r.origin.URL()}
	if r.super, err = programs.StartSupernode(ctx, r.lab.Host("supernode"), bin, upstreams, l.superFlags...); err != nil {
		return nil, err
	}
	for _, h := range cfg.Hosts[2:] {
		d, err := programs.StartDaemon(ctx, r.lab.Host(h.Name), bin, r.super.URL(), upstreams, l.hostFlags...)
		if err != nil {
			return nil, err
		}
		r.hosts = append(r.hosts, d)
	}
	return r, nil
}

// scratch is where the region keeps its files: in memory where there is much of
// it, so that no disk is the limit.
func scratch() string {
	if _, err := os.Stat("/dev/shm"); err == nil {
		return "/dev/shm"
	}
	return ""
}

func (r *region) close() error { return r.lab.Close() }

// blob is a content that nobody has had yet.
type blob struct {
	digest string
	size   int64
}

// fresh makes a new blob at the origin. Bytes of a seed are the same again.
func (r *region) fresh(size int64) (blob, error) {
	digest, err := r.origin.Add(randomBytes(rand.Uint64(), size)) //nolint:gosec // no secret
	return blob{digest, size}, err
}

// randomBytes are bytes that do not compress, the same for a seed.
func randomBytes(seed uint64, size int64) io.Reader {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	return io.LimitReader(rand.NewChaCha8(key), size)
}

// cold has a crowd pull a blob that nobody has had, and takes the blob away from
// the origin.
func (r *region) cold(ctx context.Context, size int64, c crowd) (*pull, error) {
	b, err := r.fresh(size)
	if err != nil {
		return nil, err
	}
	p, err := r.pull(ctx, b, c)
	return p, errors.Join(err, r.origin.Remove(b.digest))
}

// A pull is what one crowd did.
type pull struct {
	started, ended []float64 // of each host, in seconds from the first's start; 0 for who was not there or doomed
	origin         float64   // copies that the origin has sent
	super          float64   // copies that the supernode has sent
	crossed        float64   // copies that have come into a zone
	cpu            float64   // seconds of all programs of the lab
	machine        float64   // seconds of the whole machine
	wall           float64
}

func (p *pull) took(i int) float64 { return p.ended[i] - p.started[i] }

// last is when the last of the hosts has ended.
func (p *pull) last() float64 { return slices.Max(p.ended) }

// busy is the part of the machine's processors that was in use.
func (p *pull) busy() float64 { return p.machine / p.wall / float64(runtime.NumCPU()) }

// crowd says who pulls a blob and when.
type crowd struct {
	hosts  []int                           // indexes; nil is all
	start  func(i int) float64             // seconds to wait first; nil is at once
	direct bool                            // straight from the origin
	login  func(i int) string              // as whom host i asks for it as a private blob; nil is as nobody
	during func(ctx context.Context) error // runs beside it
	doomed func(i int) bool                // who need not end, and is stopped when all others have
}

// lives says whether host i is to end.
func (c crowd) lives(i int) bool { return c.doomed == nil || !c.doomed(i) }

// pull has a crowd get the blob, each host into a file of its own, with curl as
// the engine, and checks every file.
func (r *region) pull(ctx context.Context, b blob, c crowd) (*pull, error) {
	if c.hosts == nil {
		for i := range r.hosts {
			c.hosts = append(c.hosts, i)
		}
	}
	if err := r.origin.Forget(); err != nil {
		return nil, err
	}
	before, err := r.counts(ctx, b)
	if err != nil {
		return nil, err
	}
	p := &pull{started: make([]float64, len(r.hosts)), ended: make([]float64, len(r.hosts))}
	cpu, machine, began := r.cpu(), machineTime(), time.Now()
	if err := r.together(ctx, b, c, p, began); err != nil {
		return nil, err
	}
	p.wall = time.Since(began).Seconds()
	p.cpu, p.machine = r.cpu()-cpu, machineTime()-machine
	after, err := r.counts(ctx, b)
	if err != nil {
		return nil, err
	}
	p.origin, p.super, p.crossed = after[0], after[1]-before[1], after[2]-before[2]
	return p, r.check(b, c)
}

// together runs the engines of a crowd.
func (r *region) together(ctx context.Context, b blob, c crowd, p *pull, began time.Time) error {
	g, gctx := errgroup.WithContext(ctx)
	ending, stop := context.WithCancel(ctx)
	var doomed sync.WaitGroup
	for _, i := range c.hosts {
		if !c.lives(i) {
			doomed.Go(func() { r.curl(ending, i, b, c) })
			continue
		}
		g.Go(func() error {
			if c.start != nil {
				if err := wait(gctx, c.start(i)); err != nil {
					return err
				}
			}
			p.started[i] = time.Since(began).Seconds()
			err := r.curl(gctx, i, b, c)
			p.ended[i] = time.Since(began).Seconds()
			return err
		})
	}
	if c.during != nil {
		g.Go(func() error { return c.during(gctx) })
	}
	err := g.Wait()
	stop()
	doomed.Wait()
	return err
}

// wait returns after so many seconds, or with ctx's error.
func wait(ctx context.Context, seconds float64) error {
	select {
	case <-time.After(time.Duration(seconds * float64(time.Second))):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// counts are copies of the blob: those the origin has sent of it since it was
// told to forget, those the supernode has sent in all, and those that have come
// into zones in all.
func (r *region) counts(ctx context.Context, b blob) (copies [3]float64, err error) {
	requests, err := r.origin.Requests()
	if err != nil {
		return copies, err
	}
	var bytes [3]int64
	for _, q := range requests {
		if q.Content() && strings.HasSuffix(q.Path, b.digest) {
			bytes[0] += q.Bytes
		}
	}
	if bytes[1], err = r.super.Sent(ctx); err != nil {
		return copies, err
	}
	if bytes[2], err = r.super.Crossed(ctx); err != nil {
		return copies, err
	}
	for k := range bytes {
		copies[k] = float64(bytes[k]) / float64(b.size)
	}
	return copies, nil
}

// file is where host i's engine puts what it pulls.
func (r *region) file(i int) string { return filepath.Join(r.hosts[i].Host.Dir(), "pulled") }

// curl pulls the blob on host i.
func (r *region) curl(ctx context.Context, i int, b blob, c crowd) error {
	d := r.hosts[i]
	path, args := programs.BlobPath(b.digest), []string{"--fail", "--silent", "--show-error", "--output", r.file(i)}
	if c.login != nil {
		path, args = programs.PrivateBlobPath(b.digest), append(args, "--user", c.login(i))
	}
	url := d.Mirror() + path + "?ns=" + programs.RegistryName
	if c.direct {
		url = r.origin.URL() + path
	}
	cmd := exec.Command("curl", append(args, url)...) //nolint:gosec // G204: our own
	return d.Host.Run(ctx, "curl", cmd)
}

// check verifies what the crowd has pulled, and takes it away.
func (r *region) check(b blob, c crowd) error {
	for _, i := range c.hosts {
		if !c.lives(i) {
			continue
		}
		file, err := os.Open(r.file(i))
		if err != nil {
			return err
		}
		h := sha256.New()
		_, err = io.Copy(h, file)
		file.Close()
		if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); err != nil || got != b.digest {
			return fmt.Errorf("host %d has pulled %s, want %s: %w", i+1, got, b.digest, err)
		}
		if err := os.Remove(r.file(i)); err != nil {
			return err
		}
	}
	return nil
}

// cpu is the processor time of the lab's programs so far, in seconds.
func (r *region) cpu() float64 {
	sum := 0.0
	hosts := []*lab.Host{r.origin.Host, r.super.Host}
	for _, d := range r.hosts {
		hosts = append(hosts, d.Host)
	}
	for _, h := range hosts {
		used, _ := h.CPU()
		sum += used.Seconds()
	}
	return sum
}

// machineTime is the processor time that the whole machine has used so far, in
// seconds: with what the kernel does for the network beside the programs.
func machineTime() float64 {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(stat), "\n")
	ticks := 0.0
	for k, f := range strings.Fields(line) {
		v, _ := strconv.ParseFloat(f, 64)
		if k > 0 && k != 4 && k != 5 { // idle, waiting for the disk
			ticks += v
		}
	}
	return ticks / 100
}
