// Package check asks a host's mirror for an image as an engine would, and tells
// what came through the swarm.
package check

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

const (
	stepLimit   = 2 * time.Minute
	headerLimit = 30 * time.Second // what containerd waits for an answer to begin
	maxError    = 16 << 10         // bytes
	maxMetrics  = 4 << 20
)

// Config says what is asked, and where.
type Config struct {
	Mirror  string // host:port of the mirror
	Metrics string // host:port of dfdaemon's metrics, "" for none
	// Platform is os/architecture or os/architecture/variant, of an image of several.
	Platform string
	// Username and Password are what the engine would have for the registry, ""
	// for nothing.
	Username, Password string
}

// Image is what is asked for.
type Image struct {
	Registry, Name string
	Reference      string // a tag or a digest
}

// String returns the image as it is written.
func (i Image) String() string {
	if strings.Contains(i.Reference, ":") {
		return i.Registry + "/" + i.Name + "@" + i.Reference
	}
	return i.Registry + "/" + i.Name + ":" + i.Reference
}

// Outcome is how a step, or all of them, ended.
type Outcome string

// The outcomes, each worse than the one before.
const (
	Swarm   Outcome = "swarm"   // all went through the swarm
	Past    Outcome = "past"    // it works, past the swarm
	Refused Outcome = "refused" // by the registry, so that the engine cannot pull at all
	Failed  Outcome = "failed"  // dfdaemon does not do it; the engine turns to the registry
)

var outcomes = []Outcome{Swarm, Past, Refused, Failed}

func worse(a, b Outcome) Outcome {
	return outcomes[max(slices.Index(outcomes, a), slices.Index(outcomes, b))]
}

// Step is one thing that was tried.
type Step struct {
	Name    string           `json:"name"`
	Outcome Outcome          `json:"outcome"`
	Says    string           `json:"says"`
	Why     string           `json:"why,omitempty"` // it is not Swarm, and what to do
	Sources map[string]int64 `json:"sources,omitempty"`
	Millis  int64            `json:"milliseconds"`
}

// Report is all that was tried.
type Report struct {
	Image   string  `json:"image"`
	Outcome Outcome `json:"outcome"`
	Steps   []Step  `json:"steps"`
}

// check is one run.
type check struct {
	Config
	image  Image
	client *http.Client
	auth   string // the Authorization that the registry wants, once it has said so
	report *Report
	step   func(Step)
}

// Run tries step after step and calls each when it is done. It stops where there
// is nothing to go on with.
func Run(ctx context.Context, cfg Config, image Image, each func(Step)) *Report {
	transport := &http.Transport{ResponseHeaderTimeout: headerLimit, DisableCompression: true}
	defer transport.CloseIdleConnections()
	c := &check{
		Config: cfg, image: image, step: each, client: &http.Client{Transport: transport},
		report: &Report{Image: image.String(), Outcome: Swarm},
	}
	c.run(ctx)
	return c.report
}

func (c *check) run(ctx context.Context) {
	if !c.do(ctx, "dfdaemon", c.alive) {
		return
	}
	c.do(ctx, "session", c.session)
	var found descriptor
	if !c.do(ctx, "resolve", func(ctx context.Context, s *Step) { found = c.resolve(ctx, s) }) {
		return
	}
	m, ok := c.manifest(ctx, "manifest", found)
	if ok && len(m.Manifests) > 0 {
		if !c.do(ctx, "platform", func(_ context.Context, s *Step) { found = c.choose(m, s) }) {
			return
		}
		m, ok = c.manifest(ctx, "manifest of the platform", found)
	}
	if !ok {
		return
	}
	if m.Config.Digest != "" {
		c.do(ctx, "configuration", func(ctx context.Context, s *Step) { c.blob(ctx, m.Config, s) })
	}
	layers := slices.DeleteFunc(m.Layers, func(d descriptor) bool { return d.Size <= 0 })
	if len(layers) > 0 {
		smallest := slices.MinFunc(layers, func(a, b descriptor) int { return int(min(max(a.Size-b.Size, -1), 1)) })
		c.do(ctx, "smallest layer", func(ctx context.Context, s *Step) { c.blob(ctx, smallest, s) })
	}
}

// do runs a step and tells whether there is something to go on with.
func (c *check) do(ctx context.Context, name string, f func(context.Context, *Step)) bool {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	s := Step{Name: name, Outcome: Swarm}
	began := time.Now()
	f(ctx, &s)
	s.Millis = time.Since(began).Milliseconds()
	c.report.Steps = append(c.report.Steps, s)
	c.report.Outcome = worse(c.report.Outcome, s.Outcome)
	c.step(s)
	return s.Outcome == Swarm || s.Outcome == Past
}

func (s *Step) end(o Outcome, says, why string) { s.Outcome, s.Says, s.Why = o, says, why }

// alive tells whether a mirror answers.
func (c *check) alive(ctx context.Context, s *Step) {
	resp, err := c.get(ctx, http.MethodGet, "/v2/", nil)
	if err != nil {
		s.end(Failed, "nothing answers at "+c.Mirror, "is dfdaemon running, and is this its --mirror-listen? "+err.Error())
		return
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		s.end(Failed, fmt.Sprintf("%s answers %s", c.Mirror, resp.Status), "is it dfdaemon that listens there?")
		return
	}
	s.Says = "the mirror answers at " + c.Mirror
}

// session tells whether the host is part of a region.
func (c *check) session(ctx context.Context, s *Step) {
	m, err := c.metrics(ctx)
	switch {
	case err != nil:
		s.end(Past, "not known", "dfdaemon's metrics cannot be read: "+err.Error()+": name its --metrics-listen with --metrics")
	case m.session && !m.sealed:
		s.Says = "a session with a supernode stands; TLS is off, so private images are pulled past the region: see docs/security.md"
	case m.session:
		s.Says = "a session with a supernode stands"
	default:
		s.end(Past, "no session with a supernode", "is one named by dfdaemon's --supernode, and reached from here? dfdaemon's log tells")
	}
}

// descriptor is what a manifest tells of a content.
type descriptor struct {
	MediaType string        `json:"mediaType"`
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"`
	Platform  struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
		Variant      string `json:"variant"`
	} `json:"platform"`
}

// manifest is one of an image or, with Manifests, an index.
type manifest struct {
	Config    descriptor   `json:"config"`
	Layers    []descriptor `json:"layers"`
	Manifests []descriptor `json:"manifests"`
}

var accept = []string{
	"application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json, " +
		"application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*",
}

// resolve asks what the image is, as containerd does first.
func (c *check) resolve(ctx context.Context, s *Step) (d descriptor) {
	before, _ := c.metrics(ctx)
	resp, ok := c.ask(ctx, http.MethodHead, "manifests/"+c.image.Reference, s)
	if !ok {
		return d
	}
	_ = resp.Body.Close()
	d = descriptor{MediaType: resp.Header.Get("Content-Type"), Digest: digest.Digest(resp.Header.Get("Docker-Content-Digest")), Size: resp.ContentLength}
	if d.Digest.Validate() != nil || d.Size < 0 {
		s.end(Failed, "the answer names no digest or no length", "a fault of dfdaemon's")
		return d
	}
	s.Says = fmt.Sprintf("%s is %s, %s", c.image, d.Digest, d.MediaType)
	c.judge(ctx, before, resp, s)
	return d
}

// manifest gets one by its digest.
func (c *check) manifest(ctx context.Context, step string, d descriptor) (m manifest, ok bool) {
	ok = c.do(ctx, step, func(ctx context.Context, s *Step) {
		before, _ := c.metrics(ctx)
		resp, ok := c.ask(ctx, http.MethodGet, "manifests/"+d.Digest.String(), s)
		if !ok {
			return
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := whole(resp, d, registryproxy.MaxManifestSize)
		if err == nil {
			err = json.Unmarshal(b, &m)
		}
		if err != nil {
			s.end(Failed, err.Error(), "a fault of dfdaemon's, or of what is behind it")
			return
		}
		s.Says = fmt.Sprintf("%s, %d bytes", d.Digest, len(b))
		c.judge(ctx, before, resp, s)
	})
	return m, ok
}

// choose picks the platform's manifest of an index.
func (c *check) choose(m manifest, s *Step) descriptor {
	want := strings.SplitN(c.Platform, "/", 3)
	var all []string
	for _, d := range m.Manifests {
		p := d.Platform
		all = append(all, strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/"))
		if p.OS == want[0] && len(want) > 1 && p.Architecture == want[1] && (len(want) < 3 || p.Variant == want[2]) {
			s.Says = fmt.Sprintf("%s of %d", all[len(all)-1], len(m.Manifests))
			return d
		}
	}
	s.end(Refused, "the image is not for "+c.Platform, "it is for "+strings.Join(all, ", ")+": choose with --platform")
	return descriptor{}
}

// blob gets a whole blob and verifies it.
func (c *check) blob(ctx context.Context, d descriptor, s *Step) {
	before, _ := c.metrics(ctx)
	resp, ok := c.ask(ctx, http.MethodGet, "blobs/"+d.Digest.String(), s)
	if !ok {
		return
	}
	defer func() { _ = resp.Body.Close() }()
	if err := verify(resp, d); err != nil {
		s.end(Failed, err.Error(), "a fault of dfdaemon's, or of what is behind it")
		return
	}
	s.Says = fmt.Sprintf("%s, %d bytes", d.Digest, d.Size)
	c.judge(ctx, before, resp, s)
}

// whole reads and verifies an answer of at most so many bytes.
func whole(resp *http.Response, d descriptor, most int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(resp.Body, most+1)) //nolint:forbidigo // capped
	switch {
	case err != nil:
		return nil, fmt.Errorf("the answer broke off: %w", err)
	case int64(len(b)) > most:
		return nil, fmt.Errorf("the answer is larger than %d bytes", most)
	case d.Digest.Validate() != nil || d.Digest.Algorithm().FromBytes(b) != d.Digest:
		return nil, errors.New("the bytes are not those of the digest")
	}
	return b, nil
}

// verify reads an answer and keeps nothing of it.
func verify(resp *http.Response, d descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return err
	}
	v := d.Digest.Verifier()
	n, err := io.Copy(v, io.LimitReader(resp.Body, d.Size+1))
	switch {
	case err != nil:
		return fmt.Errorf("the answer broke off after %d bytes of %d: %w", n, d.Size, err)
	case n != d.Size || !v.Verified():
		return errors.New("the bytes are not those of the digest")
	}
	return nil
}

// ask sends a request of an engine; what is no 200 ends the step.
func (c *check) ask(ctx context.Context, method, path string, s *Step) (*http.Response, bool) {
	path = "/v2/" + c.image.Name + "/" + path
	q := url.Values{"ns": {c.image.Registry}}
	resp, err := c.get(ctx, method, path+"?"+q.Encode(), accept)
	if err == nil && resp.StatusCode == http.StatusUnauthorized && c.auth == "" && c.Username != "" {
		_ = resp.Body.Close()
		if c.auth, err = c.login(ctx, resp); err != nil {
			s.end(Refused, "the registry wants credentials", err.Error())
			return nil, false
		}
		resp, err = c.get(ctx, method, path+"?"+q.Encode(), accept)
	}
	if err != nil {
		s.end(Failed, "no answer", err.Error())
		return nil, false
	}
	if resp.StatusCode == http.StatusOK {
		return resp, true
	}
	defer func() { _ = resp.Body.Close() }()
	s.refused(resp)
	return nil, false
}

// refused says what the answer says that is no 200.
func (s *Step) refused(resp *http.Response) {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxError)) //nolint:forbidigo // capped
	var body struct {
		Errors []struct{ Code, Message string }
	}
	_ = json.Unmarshal(b, &body) // a HEAD's answer has none
	said := resp.Status
	if len(body.Errors) > 0 {
		said += ": " + strings.TrimSpace(body.Errors[0].Code+" "+body.Errors[0].Message)
	}
	switch {
	case resp.Header.Get(api.ErrorHeader) != "" || resp.StatusCode >= http.StatusInternalServerError:
		s.end(Failed, said, "neither the region nor the registry answers dfdaemon, whose log says why: is the registry reached from here, and where dfdaemon's --registry says (plain HTTP only by http://)?")
	case resp.StatusCode == http.StatusUnauthorized:
		s.end(Refused, said, "the registry wants other credentials, or some: give the engine's with --username and --password-stdin")
	default:
		s.end(Refused, said, "so the registry says")
	}
}

func (c *check) get(ctx context.Context, method, path string, accept []string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://"+c.Mirror+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	r.Header["Accept"] = accept
	r.Header.Set("User-Agent", "dfdaemon-check")
	if c.auth != "" {
		r.Header.Set("Authorization", c.auth)
	}
	return c.send(r)
}

// send sends a request. Its errors do not quote the URL, whose query is another's.
func (c *check) send(r *http.Request) (*http.Response, error) {
	resp, err := c.client.Do(r)
	return resp, api.WithoutURL(err)
}
