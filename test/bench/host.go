//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

// timing is what curl says of one pull, in seconds.
type timing struct{ first, total float64 }

// timed has curl on host i read a URL into a file, and tells how long that took.
func (r *region) timed(ctx context.Context, i int, url, file string) (t timing, err error) {
	var out bytes.Buffer
	cmd := exec.Command("curl", "--fail", "--silent", "--show-error", "--output", file, //nolint:gosec // G204: our own
		"--write-out", "%{time_starttransfer} %{time_total}", url)
	cmd.Stdout = &out
	if err := r.hosts[i].Host.Run(ctx, "curl", cmd); err != nil {
		return t, err
	}
	_, err = fmt.Sscan(out.String(), &t.first, &t.total)
	return t, err
}

// mirrored is a blob's URL at host i's mirror.
func (r *region) mirrored(i int, b blob) string {
	return r.hosts[i].Mirror() + programs.BlobPath(b.digest) + "?ns=" + programs.RegistryName
}

// pair measures two ways beside each other, each time in the other order, so
// that what else the machine does falls on both.
func pair(run int, one, other func() error) error {
	if run%2 == 1 {
		one, other = other, one
	}
	return errors.Join(one(), other())
}

// ratios divides the values in pairs.
func ratios(over, under []float64) []float64 {
	out := make([]float64, 0, len(over))
	for i := range over {
		out = append(out, over[i]/under[i])
	}
	return out
}

// single is one host that pulls a large blob that nobody has had.
func single(ctx context.Context, e *env) error {
	rate, size := 200*lab.Mbit, int64(256<<20)
	if e.short {
		size = 16 << 20
	}
	r, err := build(ctx, e.bin, equal(1, rate))
	if err != nil {
		return err
	}
	defer r.close()
	var total, first, cpu [2][]float64
	for run := range e.runs {
		b, err := r.fresh(size)
		if err != nil {
			return err
		}
		way := func(k int, url string) func() error {
			return func() error {
				used := r.cpu()
				t, err := r.timed(ctx, 0, url, r.file(0))
				if err != nil {
					return err
				}
				total[k], first[k] = append(total[k], t.total), append(first[k], t.first*1000)
				cpu[k] = append(cpu[k], (r.cpu()-used)/float64(size)*(1<<30))
				return r.check(b, crowd{hosts: []int{0}})
			}
		}
		if err := pair(run, way(0, r.mirrored(0, b)), way(1, r.origin.URL()+programs.BlobPath(b.digest))); err != nil {
			return err
		}
		e.say("  %.2f s, direct %.2f s; first byte %.1f ms, direct %.1f ms; CPU %.2f s/GiB, direct %.2f",
			last(total[0]), last(total[1]), last(first[0]), last(first[1]), last(cpu[0]), last(cpu[1]))
		if err := r.origin.Remove(b.digest); err != nil {
			return err
		}
	}
	name := fmt.Sprintf("one host @ %v, %d MiB, cold: ", rate, size>>20)
	e.atMost(name+"time over direct", "", 1.05, ratios(total[0], total[1])...)
	e.tell(name+"first byte", "ms", first[0]...)
	e.tell(name+"first byte, direct", "ms", first[1]...)
	e.tell(name+"CPU", "s/GiB", cpu[0]...)
	e.tell(name+"CPU, direct", "s/GiB", cpu[1]...)
	return nil
}

// stored is a blob that the host's own store has, over loopback, beside nginx
// that sends the very same file.
func stored(ctx context.Context, e *env) error {
	size, pulls := int64(1<<30), 5*e.runs
	if e.short {
		size = 16 << 20
	}
	r, err := build(ctx, e.bin, equal(1, 0))
	if err != nil {
		return err
	}
	defer r.close()
	h := r.hosts[0].Host
	beside, err := programs.StartNginx(ctx, h)
	if err != nil {
		return err
	}
	b, err := r.fresh(size)
	if err != nil {
		return err
	}
	if _, err := r.timed(ctx, 0, r.mirrored(0, b), os.DevNull); err != nil {
		return err
	}
	if err := share(h.Dir(), beside, b); err != nil {
		return err
	}
	var rate, first, cpu [2][]float64
	for run := range pulls {
		way := func(k int, url string) func() error {
			return func() error {
				used, _ := h.CPU()
				t, err := r.timed(ctx, 0, url, os.DevNull)
				if err != nil {
					return err
				}
				now, _ := h.CPU()
				rate[k], first[k] = append(rate[k], float64(size)/(1<<30)/t.total), append(first[k], t.first*1000)
				cpu[k] = append(cpu[k], (now-used).Seconds()/float64(size)*(1<<30))
				return nil
			}
		}
		if err := pair(run, way(0, r.mirrored(0, b)), way(1, beside.URL()+programs.BlobPath(b.digest))); err != nil {
			return err
		}
		e.say("  %.2f GiB/s, nginx %.2f; first byte %.2f ms, nginx %.2f; CPU %.2f s/GiB, nginx %.2f",
			last(rate[0]), last(rate[1]), last(first[0]), last(first[1]), last(cpu[0]), last(cpu[1]))
	}
	name := fmt.Sprintf("from the host's own store, %d MiB: ", size>>20)
	e.atLeast(name+"speed over nginx's", "", 0.9, ratios(rate[0], rate[1])...)
	e.tell(name+"speed", "GiB/s", rate[0]...)
	e.tell(name+"speed, nginx", "GiB/s", rate[1]...)
	e.tell(name+"first byte", "ms", first[0]...)
	e.tell(name+"first byte, nginx", "ms", first[1]...)
	e.tell(name+"CPU", "s/GiB", cpu[0]...)
	e.tell(name+"CPU, nginx", "s/GiB", cpu[1]...)
	return nil
}

// share gives an nginx the file that the store of the dfdaemon in dir has of a blob.
func share(dir string, n *programs.Nginx, b blob) error {
	return filepath.WalkDir(filepath.Join(dir, "dfdaemon"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Name() != "content" {
			return err
		}
		return n.Link(path, b.digest)
	})
}

// image is a manifest at the origin, and what it names.
type image struct {
	manifest, config string // digests
	layers           []string
}

// freshImage makes an image of n layers.
func (r *region) freshImage(n int, size int64) (m image, err error) {
	text := `{"schemaVersion":2,"mediaType":"` + programs.ManifestType + `","layers":[`
	for range n {
		b, err := r.fresh(size)
		if err != nil {
			return m, err
		}
		m.layers = append(m.layers, b.digest)
		text += fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":%q,"size":%d},`, b.digest, b.size)
	}
	config, err := r.fresh(2 << 10)
	if err != nil {
		return m, err
	}
	m.config = config.digest
	text = strings.TrimSuffix(text, ",") + fmt.Sprintf(`],"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d}}`,
		config.digest, config.size)
	m.manifest, err = r.origin.Add(strings.NewReader(text))
	return m, err
}

// engine pulls images as containerd does: what the tag is, the manifest, the
// config, and then three layers at a time, over connections that it keeps as
// containerd does. It returns how long that took, in seconds.
func (r *region) engine(ctx context.Context, i int, base string, m image) (float64, error) {
	t := &http.Transport{DialContext: r.hosts[i].Host.Dial, MaxIdleConns: 10, DisableCompression: true}
	defer t.CloseIdleConnections()
	client := &http.Client{Transport: t}
	get := func(ctx context.Context, method, path string) error {
		req, err := http.NewRequestWithContext(ctx, method, base+path+"?ns="+programs.RegistryName, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		h := sha256.New()
		if _, err = io.Copy(h, resp.Body); err != nil {
			return err
		}
		if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); resp.StatusCode != http.StatusOK || method == http.MethodGet && got != path[strings.LastIndexByte(path, '/')+1:] {
			return fmt.Errorf("%s: %s and %s", path, resp.Status, got)
		}
		return nil
	}
	began := time.Now()
	if err := errors.Join(
		get(ctx, http.MethodHead, programs.TagPath(m.manifest)),
		get(ctx, http.MethodGet, programs.ManifestPath(m.manifest)),
		get(ctx, http.MethodGet, programs.BlobPath(m.config)),
	); err != nil {
		return 0, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(3)
	for _, digest := range m.layers {
		g.Go(func() error { return get(gctx, http.MethodGet, programs.BlobPath(digest)) })
	}
	err := g.Wait()
	return time.Since(began).Seconds(), err
}

// layers is an image of many small layers: one that nobody has had, and then on
// another host when the supernode has it.
func layers(ctx context.Context, e *env) error {
	const rate, n, size = 100 * lab.Mbit, 40, 20_000
	images := 10 * e.runs // they are small
	if e.short {
		images = 1
	}
	r, err := build(ctx, e.bin, equal(2, rate))
	if err != nil {
		return err
	}
	defer r.close()
	var took [2][2][]float64 // by host; through Damselfly and direct
	for run := range images {
		m, err := r.freshImage(n, size)
		if err != nil {
			return err
		}
		for i := range took {
			way := func(k int, base string) func() error {
				return func() error {
					t, err := r.engine(ctx, i, base, m)
					took[i][k] = append(took[i][k], t*1000)
					return err
				}
			}
			if err := pair(run, way(0, r.hosts[i].Mirror()), way(1, r.origin.URL())); err != nil {
				return err
			}
		}
		e.say("  cold %.1f ms, direct %.1f ms; the supernode has it %.1f ms, direct %.1f ms",
			last(took[0][0]), last(took[0][1]), last(took[1][0]), last(took[1][1]))
	}
	name := fmt.Sprintf("image of %d layers of %d KB @ %v, ", n, size/1000, rate)
	e.atMost(name+"cold: time over direct", "", 1.2, ratios(took[0][0], took[0][1])...)
	e.atMost(name+"the supernode has it: time over direct", "", 1, ratios(took[1][0], took[1][1])...)
	e.tell(name+"cold", "ms", took[0][0]...)
	e.tell(name+"the supernode has it", "ms", took[1][0]...)
	e.tell(name+"direct", "ms", append(took[0][1], took[1][1]...)...)
	return nil
}

// small is a blob of a few pieces that all hosts want at once and nobody has had.
func small(ctx context.Context, e *env) error {
	const rate, size, n = 100 * lab.Mbit, 1 << 20, 8
	blobs := 5 * e.runs
	if e.short {
		blobs = 1
	}
	r, err := build(ctx, e.bin, equal(n, rate))
	if err != nil {
		return err
	}
	defer r.close()
	var took, direct []float64
	for range blobs {
		b, err := r.fresh(size)
		if err != nil {
			return err
		}
		p, err := r.pull(ctx, b, crowd{})
		if err != nil {
			return err
		}
		d, err := r.pull(ctx, b, crowd{direct: true})
		if err != nil {
			return err
		}
		took, direct = append(took, 1000*p.last()), append(direct, 1000*d.last())
		e.say("  %.0f ms, direct %.0f ms", last(took), last(direct))
	}
	name := fmt.Sprintf("a blob of 1 MiB, %d hosts @ %v at once, cold: last host", n, rate)
	e.atMost(name, "ms", 3*1000*bytesIn(size, rate)+50, took...)
	e.tell(name+", direct", "ms", direct...)
	return nil
}
