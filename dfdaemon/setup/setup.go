// Package setup writes dfdaemon into the configuration of a host's engines, and
// takes it out again.
package setup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Engine is a container engine that can be set up.
type Engine string

// The engines. Podman and CRIO read the same files.
const (
	Containerd Engine = "containerd"
	Docker     Engine = "docker"
	CRIO       Engine = "crio"
	Podman     Engine = "podman"
)

// Engines are all of them.
var Engines = []Engine{Containerd, Docker, CRIO, Podman}

func (e Engine) validate() error {
	if !slices.Contains(Engines, e) {
		return fmt.Errorf("engine %.100q: want containerd, docker, crio or podman", string(e))
	}
	return nil
}

// family is under what name an engine's state is kept.
func (e Engine) family() string {
	if e == CRIO || e == Podman {
		return "registries.conf"
	}
	return string(e)
}

// Registry is one that an engine is to pull through dfdaemon.
type Registry struct {
	Name string `json:"name"` // as engines name it: docker.io, registry.corp:5000
	// As is dfdaemon's own name for it, without a port, for engines that
	// write it into a path; "" for Name.
	As string `json:"as,omitempty"`
}

// ParseRegistry reads NAME or NAME=AS.
func ParseRegistry(s string) (Registry, error) {
	name, as, aliased := strings.Cut(s, "=")
	r := Registry{strings.ToLower(name), strings.ToLower(as)}
	if !registryForm.MatchString(r.Name) || aliased && (!registryForm.MatchString(r.As) || strings.Contains(r.As, ":") || !strings.Contains(r.As, ".")) {
		return Registry{}, fmt.Errorf("registry %.100q: want a host such as quay.io or registry.corp:5000, or HOST:PORT=NAME with a name that has a dot and no port", s)
	}
	if r.Name == "index.docker.io" || r.Name == "registry-1.docker.io" {
		r.Name = dockerHub
	}
	return r, nil
}

var registryForm = regexp.MustCompile(`^(\[[0-9a-f:]+\]|[a-z0-9]([a-z0-9._-]*[a-z0-9])?)(:[1-9][0-9]{0,4})?$`)

// Config is what a setup is to do.
type Config struct {
	// Root is where the host's file system is.
	Root string
	// Mirror is where dfdaemon's mirror listens, as host:port.
	Mirror string
	// Registries are those to pull through it; with none containerd pulls all,
	// docker docker.io, and podman and CRI-O those that are used most.
	Registries []Registry

	common bool // podman and CRI-O: also what is used most
}

func (c Config) url() string { return "http://" + c.Mirror }

// Validate tells what is wrong with c for an engine.
func (c Config) Validate(e Engine) error {
	if err := e.validate(); err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(c.Mirror)
	n, portErr := strconv.ParseUint(port, 10, 16)
	addr, addrErr := netip.ParseAddr(host)
	switch {
	case err != nil || portErr != nil || n == 0 || addrErr != nil && (strings.Contains(host, ":") || !registryForm.MatchString(strings.ToLower(host))):
		return fmt.Errorf("mirror %.100q: want host:port, such as 127.0.0.1:65001 or [::1]:65001", c.Mirror)
	case addrErr == nil && (addr.IsUnspecified() || addr.Zone() != ""):
		return fmt.Errorf("mirror %q: want an address that engines can ask, such as 127.0.0.1:%s", c.Mirror, port)
	}
	return nil
}

// Change is what happens to a file.
type Change struct {
	Path   string // on the host
	Action string // "create", "change" or "remove"
}

// Plan is what is to be done. Until Apply nothing is.
type Plan struct {
	Notes []string // what the user should know or do, a sentence each
	tree  *tree
	after *state
	copy  map[string][]byte // the backups of after
}

// Setup plans to have an engine pull through dfdaemon. Where it does already the
// plan is empty; what an earlier setup of this engine has done and this one does
// not ask for goes.
func Setup(e Engine, c Config) (*Plan, error) {
	if err := c.Validate(e); err != nil {
		return nil, err
	}
	return plan(e, c.Root, &asked{c.Mirror, append([]Registry(nil), c.Registries...)})
}

// Unset plans to undo what Setup has done for an engine.
func Unset(e Engine, root string) (*Plan, error) {
	if err := e.validate(); err != nil {
		return nil, err
	}
	return plan(e, root, nil)
}

func plan(e Engine, root string, want *asked) (*Plan, error) {
	t, err := newTree(root)
	if err != nil {
		return nil, err
	}
	old := t.state.Families[e.family()]
	all := map[Engine]asked{}
	if old != nil {
		if err := t.undo(old); err != nil {
			return nil, err
		}
		maps.Copy(all, old.Asked)
	}
	_, isSetUp := all[e]
	delete(all, e)
	if want != nil {
		all[e] = *want
	}
	p := &Plan{tree: t, after: &state{Version: 1, Families: maps.Clone(t.state.Families)}}
	for _, dir := range t.state.Dirs {
		if _, err := os.Lstat(filepath.Join(t.root, dir)); err == nil {
			p.after.Dirs = append(p.after.Dirs, dir)
		}
	}
	delete(p.after.Families, e.family())
	if want == nil && !isSetUp {
		t.note("%s is not set up: nothing to undo", e)
	}
	if len(all) > 0 {
		if err := t.setup(e, merge(e, root, all)); err != nil {
			return nil, err
		}
		fam := &family{Asked: all}
		if fam.Files, p.copy = t.records(); len(fam.Files) > 0 { // else all is there by another hand
			p.after.Families[e.family()] = fam
		}
	}
	p.Notes = t.notes
	if _, cri := all[CRIO]; cri && e == Podman {
		p.restart(CRIO)
	} else {
		p.restart(e)
	}
	if len(t.changed()) == 0 && len(all) > 0 {
		p.shared(e, want != nil, isSetUp, all)
	}
	return p, nil
}

// merge is what the engines of a family ask for together; e's mirror counts.
func merge(e Engine, root string, all map[Engine]asked) Config {
	c := Config{Root: root}
	for _, engine := range slices.Sorted(maps.Keys(all)) {
		a := all[engine]
		if c.Mirror == "" || engine == e {
			c.Mirror = a.Mirror
		}
		c.common = c.common || len(a.Registries) == 0
		for _, r := range a.Registries {
			if !slices.ContainsFunc(c.Registries, func(o Registry) bool { return o.Name == r.Name }) {
				c.Registries = append(c.Registries, r)
			}
		}
	}
	return c
}

func (t *tree) setup(e Engine, c Config) error {
	switch e {
	case Containerd:
		return t.setupContainerd(c)
	case Docker:
		return t.setupDocker(c)
	default:
		return t.setupRegistries(c)
	}
}

// shared explains why nothing changes: the other engine of the family has, or
// still needs, what this one asks for or gives up.
func (p *Plan) shared(e Engine, want, wasSetUp bool, all map[Engine]asked) {
	switch {
	case want && !wasSetUp && e == CRIO && len(all) > 1:
		p.Notes = append(p.Notes, restartCRIO)
	case !want && wasSetUp:
		for other := range all {
			p.Notes = append(p.Notes, fmt.Sprintf("%s is set up by the same files: they stay until dfdaemon unset %s", other, other))
		}
	}
}

const restartCRIO = "CRI-O reads its registries when it starts: restart it (systemctl restart crio; containers go on running)"

// restart adds what the engine needs to take the changes up.
func (p *Plan) restart(e Engine) {
	var note string
	for _, f := range p.tree.changed() {
		switch {
		case filepath.Base(f.path) == hostsFile:
		case e == Containerd:
			note = "containerd reads its configuration when it starts: restart it (systemctl restart containerd; containers go on running)"
		case e == Docker:
			note = "docker reads daemon.json when it is told to: reload it (systemctl reload docker)"
		case e == CRIO:
			note = restartCRIO
		}
	}
	if note != "" {
		p.Notes = append(p.Notes, note)
	}
}

// Changes are what happens to the engine's files.
func (p *Plan) Changes() []Change {
	var list []Change
	for _, f := range p.tree.changed() {
		action := "change"
		switch {
		case !f.there:
			action = "create"
		case !f.stays:
			action = "remove"
		}
		list = append(list, Change{f.path, action})
	}
	return list
}

// Diff is what happens to the engine's files, as patch takes it.
func (p *Plan) Diff() string {
	var b strings.Builder
	for _, f := range p.tree.changed() {
		b.WriteString(diff(f))
	}
	return b.String()
}

// Apply does it. After an error all is as it was, as far as that can be.
func (p *Plan) Apply() error {
	t := p.tree
	changed := t.changed()
	if len(changed) == 0 && reflect.DeepEqual(t.state, p.after) && !t.littered() {
		return nil
	}
	dirs := t.missingDirs(t.stateFile())
	unlock, err := t.lock(dirs)
	if err != nil {
		return errors.Join(err, t.prune(dirs))
	}
	defer unlock()
	for _, f := range t.order { // what a process that was killed has left
		if err := os.Remove(t.temp(f)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return err
		}
	}
	for _, f := range changed {
		now := &file{path: f.path}
		if err = now.read(filepath.Join(t.root, f.path)); err == nil && (now.there != f.there || !bytes.Equal(now.was, f.was)) {
			err = fmt.Errorf("%s has just been changed by another hand: run this again", f.path)
		}
		if err != nil {
			return errors.Join(err, t.sweepState(t.state), t.prune(dirs))
		}
		if f.stays {
			dirs = append(dirs, t.missingDirs(f.path)...)
		}
	}
	for _, dir := range dirs {
		if dir != t.dir && !slices.Contains(p.after.Dirs, dir) {
			p.after.Dirs = append(p.after.Dirs, dir)
		}
	}
	if err := p.run(changed, dirs); err != nil {
		return errors.Join(err, p.revert(changed), t.prune(dirs))
	}
	return errors.Join(t.sweepState(p.after), t.prune(p.after.Dirs))
}

// littered tells whether a process that was killed has left something.
func (t *tree) littered() bool {
	for _, f := range t.order {
		if _, err := os.Lstat(t.temp(f)); err == nil {
			return true
		}
	}
	entries, err := os.ReadDir(filepath.Join(t.root, t.dir))
	keep := t.state.names()
	return err == nil && (len(t.state.Families) == 0 ||
		slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return !keep[e.Name()] }))
}

// lock makes the directories up to the state's, and holds that for this process alone.
func (t *tree) lock(dirs []string) (unlock func(), err error) {
	if err := t.mkdirs(dirs); err != nil {
		return nil, err
	}
	d, err := os.Open(filepath.Join(t.root, t.dir))
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("another setup or unset is at work: %w", err), d.Close())
	}
	return func() { _ = d.Close() }, nil
}

// mkdirs makes directories, whatever the umask.
func (t *tree) mkdirs(dirs []string) error {
	for _, dir := range dirs {
		full := filepath.Join(t.root, dir)
		err := os.Mkdir(full, 0o755)
		if err == nil {
			err = os.Chmod(full, 0o755) //nolint:gosec // G302: engines of any user read these
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// run first takes out what was there of ours, then says in the state what it will
// do, then does it: whenever it is killed, unset finds what the state tells.
func (p *Plan) run(changed []*file, dirs []string) error {
	t := p.tree
	if err := t.writeState(&state{Version: 1, Families: t.state.Families, Dirs: p.after.Dirs}, nil, true); err != nil {
		return err
	}
	if err := t.mkdirs(dirs); err != nil {
		return err
	}
	for _, f := range changed {
		if f.there != f.bare || !bytes.Equal(f.was, f.base) {
			if err := t.write(f, f.base, f.bare); err != nil {
				return err
			}
		}
	}
	if err := t.writeState(p.after, p.copy, len(p.after.Families) > 0); err != nil {
		return err
	}
	for _, f := range changed {
		if f.stays != f.bare || !bytes.Equal(f.now, f.base) {
			if err := t.write(f, f.now, f.stays); err != nil {
				return err
			}
		}
	}
	return nil
}

// revert puts back what was there before run.
func (p *Plan) revert(changed []*file) error {
	t := p.tree
	var err error
	for _, f := range changed {
		now := &file{path: f.path}
		if now.read(filepath.Join(t.root, f.path)) == nil && now.there == f.there && bytes.Equal(now.was, f.was) {
			continue
		}
		err = errors.Join(err, t.write(f, f.was, f.there))
	}
	return errors.Join(err, t.writeState(t.state, nil, len(t.state.Families) > 0), t.sweepState(t.state))
}

// prune removes those of the directories that are empty, the innermost first.
func (t *tree) prune(dirs []string) error {
	dirs = slices.Clone(dirs)
	slices.SortFunc(dirs, func(a, b string) int { return len(b) - len(a) })
	for _, dir := range dirs {
		err := os.Remove(filepath.Join(t.root, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return nil
}
