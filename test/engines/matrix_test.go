//go:build linux

package engines

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"damselfly.dev/test/image"
	"damselfly.dev/test/programs"
)

// A column of the matrix is an image in a registry.
type column struct {
	name, registry, image string
	ipv6                  bool
}

var columns = []column{
	{name: "public", registry: "public", image: "plain"},
	{name: "index", registry: "public", image: "index"},
	{name: "zstd", registry: "public", image: "zstd"},
	{name: "100 layers", registry: "public", image: "100 layers"},
	{name: "empty layer", registry: "public", image: "empty layer"},
	{name: "0 bytes", registry: "public", image: "no bytes"},
	{name: "basic", registry: "basic", image: "plain"},
	{name: "bearer", registry: "bearer", image: "plain"},
	{name: "TLS", registry: "TLS", image: "plain"},
	{name: "redirect", registry: "redirect", image: "plain"},
	{name: "artifact", registry: "redirect", image: "artifact"},
	{name: "prefix", registry: "prefix", image: "plain"},
	{name: "IPv6", registry: "public", image: "plain", ipv6: true},
}

func clients(cache string) []client {
	debian, proxy := programs.DebianContainerd(), programs.NewContainerd(cache)
	chunked := proxy
	chunked.Chunk = 64 << 10
	crane, oras, regctl := filepath.Join(cache, "bin", "crane"), filepath.Join(cache, "bin", "oras"), filepath.Join(cache, "bin", "regctl")
	const (
		noImage   = "It pulls images alone."
		noBytes   = "It refuses a layer of 0 bytes."
		noZstd    = "It unpacks no zstd, and turns to the registry for the same bytes."
		pingFirst = "It logs in only where `/v2/` asks for it. The mirror's does not, as it stands for all registries: " +
			"the region reads the registry with its own login (`readers: region`); else the engine turns to the registry."
		noToken = "Where `/v2/` asks for no login it sends the password itself: here, too, the region reads the registry with its own login."
	)
	platform, all := image.Sample.Platform, image.Sample.All
	pings := map[string]string{"basic": pingFirst, "bearer": pingFirst}
	return []client{
		{
			name: "containerd 1.6", needs: []string{debian.Daemon, debian.Client}, start: startContainerdOn(debian), brings: platform,
			cannot: map[string]string{"0 bytes": noBytes},
		},
		{
			name: "containerd 2", needs: []string{proxy.Daemon, proxy.Client}, start: startContainerdOn(proxy), brings: image.Sample.Metadata,
			cannot: map[string]string{"0 bytes": noBytes},
		},
		{
			name: "containerd 2, layers in ranges", needs: []string{proxy.Daemon, proxy.Client}, start: startContainerdOn(chunked), brings: image.Sample.Metadata,
			cannot: map[string]string{"0 bytes": noBytes},
		},
		{
			name: "dockerd 20.10", needs: []string{dockerd}, start: startDockerd, brings: platform,
			byRegion: pings, cannot: map[string]string{"artifact": noImage, "zstd": noZstd},
		},
		{
			name: "podman 4.3", needs: []string{podman}, start: startPodman, brings: platform,
			byRegion: pings, cannot: map[string]string{"artifact": noImage},
		},
		{
			name: "skopeo 1.9", needs: []string{"/usr/bin/skopeo"}, start: layoutOf("skopeo", skopeoCopy), brings: platform,
			byRegion: pings,
		},
		{name: "crane", needs: []string{crane}, start: layoutOf("crane", cranePull(crane)), brings: all, byRegion: map[string]string{"bearer": noToken}},
		{name: "oras", needs: []string{oras}, start: layoutOf("oras", orasCopy(oras)), brings: all, referrers: true},
		{name: "regctl", needs: []string{regctl}, start: layoutOf("regctl", regctlCopy(regctl)), brings: all, referrers: true, byAddress: true},
	}
}

// TestMatrix has every engine pull every kind of image from every kind of
// registry, each through the swarm, or says why that engine does not.
func TestMatrix(t *testing.T) {
	cache, bin := built(t)
	type at struct {
		registry string
		ipv6     bool
	}
	var order []at
	sites := map[at][]column{}
	for _, c := range columns {
		place := at{c.registry, c.ipv6}
		if sites[place] == nil {
			order = append(order, place)
		}
		sites[place] = append(sites[place], c)
	}
	for _, place := range order {
		name := place.registry
		if place.ipv6 {
			name += " on IPv6 alone"
		}
		t.Run(name, func(t *testing.T) {
			need(t, nil)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			s := startSite(ctx, t, bin, place.registry, place.ipv6)
			for _, e := range clients(cache) {
				t.Run(e.name, func(t *testing.T) {
					need(t, e.needs)
					ready, err := e.start(ctx, s)
					if err != nil {
						t.Fatal(err)
					}
					for _, c := range sites[place] {
						t.Run(c.name, func(t *testing.T) { testCell(ctx, t, s, e, ready, c) })
					}
					if err := ready.end(); err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
}

func testCell(ctx context.Context, t *testing.T, s *site, e client, ready ready, c column) {
	t.Helper()
	if why := e.cannot[c.name]; why != "" {
		t.Logf("not pulled: %s", why)
		return
	}
	repo := "demo/" + strings.NewReplacer(" ", "-", ",", "").Replace(e.name+"/"+strings.ToLower(c.name))
	sample, err := image.SampleKinds[c.image](repo)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.push(ctx, repo, sample); err != nil {
		t.Fatal(err)
	}
	p := cell{registry: programs.RegistryName, repo: repo, tag: image.Tag, sample: sample, artifact: sample.Artifact != nil, zstd: c.image == "zstd"}
	if e.byRegion[c.registry] != "" {
		p.registry = regionName
	}
	if e.byAddress {
		p.registry = s.registry.address()
	}
	if !p.artifact || e.referrers {
		p.contents = brought(t, e.brings, sample)
	} else {
		p.tag = image.ArtifactTag
	}
	if p.artifact {
		p.contents = append(p.contents, brought(t, func(s image.Sample) ([]v1.Descriptor, error) { return image.Contents(s.Artifact) }, sample)...)
	}
	before, err := s.daemon.Received(ctx)
	if err != nil {
		t.Fatal(err)
	}
	limited, cancel := context.WithTimeout(ctx, pullLimit)
	defer cancel()
	if err := ready.pull(limited, p); err != nil {
		t.Fatal(err)
	}
	s.swarmed(ctx, t, p, before)
}

func brought(t *testing.T, of func(image.Sample) ([]v1.Descriptor, error), s image.Sample) []v1.Descriptor {
	t.Helper()
	contents, err := of(s)
	if err != nil {
		t.Fatal(err)
	}
	return contents
}

// swarmed holds the registry's own log and the metrics of both daemons against
// what a pull brought: all of it came through the region, once. Of the other
// platforms of an index dfdaemon may have joined small blobs by itself.
func (s *site) swarmed(ctx context.Context, t *testing.T, p cell, before map[string]int64) {
	t.Helper()
	contents, blobs := sizes(p.contents)
	spare := int64(0)
	if p.sample.Index != nil {
		all, _ := sizes(brought(t, image.Sample.All, p.sample))
		spare = all - contents
	}
	after, err := s.daemon.Received(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got := func(source string) int64 { return after[source] - before[source] }
	if swarm := got("supernode") + got("peer"); swarm < blobs || swarm > blobs+spare || got("origin") != 0 {
		t.Errorf("by its metrics dfdaemon had %d bytes of supernode and peers, of %d, and %d past them", swarm, blobs, got("origin"))
	}
	if direct, err := s.daemon.Direct(ctx); err != nil || direct > 0 {
		t.Errorf("%d requests went past the region: %v", direct, err)
	}
	total, unique, err := s.supernode.Origin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if total != unique {
		t.Errorf("the supernode had %d bytes from the registry, of %d different ones", total, unique)
	}
	sum, by := s.written(ctx, t, p.repo, contents)
	if only := s.supernode.Host.IP(); sum < contents || sum > contents+spare || len(by) != 1 || !by[only] {
		t.Errorf("the registry sent %d bytes, of %d, to %v in place of %s", sum, contents, slices.Collect(maps.Keys(by)), only)
	}
}

// written is sent, once the registry has written down so many bytes: it does so
// after it has answered.
func (s *site) written(ctx context.Context, t *testing.T, repo string, least int64) (int64, map[netip.Addr]bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		sum, by, err := s.sent(repo)
		if err != nil {
			t.Fatal(err)
		}
		if sum >= least {
			return sum, by
		}
		select {
		case <-ctx.Done():
			return sum, by
		case <-tick.C:
		}
	}
}

// sizes sums up contents, and the blobs among them.
func sizes(contents []v1.Descriptor) (all, blobs int64) {
	for _, c := range contents {
		all += c.Size
		if !c.MediaType.IsImage() && !c.MediaType.IsIndex() {
			blobs += c.Size
		}
	}
	return all, blobs
}

var rewrite = flag.Bool("rewrite", false, "write the matrix into the documentation")

// TestDocumented holds the documentation's table against the matrix.
func TestDocumented(t *testing.T) {
	root, err := programs.Root(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(root, "docs", "engines.md")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	const from, to = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
	head, rest, ok := strings.Cut(string(text), from)
	was, tail, ends := strings.Cut(rest, to)
	if !ok || !ends {
		t.Fatalf("%s has no place for the matrix", file)
	}
	is := table(clients(""))
	switch {
	case was == is:
	case *rewrite:
		if err := os.WriteFile(file, []byte(head+from+is+to+tail), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s does not say what is tried: go test ./test/engines -run TestDocumented -rewrite", file)
	}
}

// table is the matrix in Markdown.
func table(clients []client) string {
	out, notes := new(strings.Builder), []string{}
	note := func(text string) string {
		i := slices.Index(notes, text)
		if i < 0 {
			i = len(notes)
			notes = append(notes, text)
		}
		return fmt.Sprintf(" (%c)", 'a'+i)
	}
	fmt.Fprint(out, "| |")
	for _, c := range columns {
		fmt.Fprintf(out, " %s |", c.name)
	}
	fmt.Fprintf(out, "\n|---|%s\n", strings.Repeat("---|", len(columns)))
	for _, e := range clients {
		fmt.Fprintf(out, "| %s |", e.name)
		for _, c := range columns {
			cannot, byRegion := e.cannot[c.name], e.byRegion[c.registry]
			switch {
			case cannot != "":
				fmt.Fprintf(out, " –%s |", note(cannot))
			case byRegion != "":
				fmt.Fprintf(out, " ✓%s |", note(byRegion))
			default:
				fmt.Fprint(out, " ✓ |")
			}
		}
		fmt.Fprintln(out)
	}
	for i, text := range notes {
		fmt.Fprintf(out, "\n(%c) %s\n", 'a'+i, text)
	}
	return out.String()
}
