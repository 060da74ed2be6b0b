package setup

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	securejoin "github.com/cyphar/filepath-securejoin"
)

const maxFile = 4 << 20 // bytes; no engine's configuration is larger

// tree is a host's file system below root, and what becomes of it. Nothing is
// written before Plan.Apply.
type tree struct {
	root  string
	dir   string // stateDir with its links resolved
	state *state
	seen  map[string]*file // by path
	order []*file          // as they were opened
	edits map[*file][]Edit // of this setup
	notes []string

	writing func() error // before each write, for tests of what fails in between
}

// file is a configuration file, or the place of one.
type file struct {
	path     string // on the host, links resolved
	was, now []byte
	base     []byte // without any entry of ours
	// Whether it exists: on disk, without ours, and in the end.
	there, bare, stays bool
	mode               fs.FileMode
	uid, gid           int
}

func (t *tree) note(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(t.notes, s) {
		t.notes = append(t.notes, s)
	}
}

// real returns where a path of the host is, with each link followed inside root.
func (t *tree) real(name string) (string, error) {
	full, err := securejoin.SecureJoin(t.root, name)
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	return full, nil
}

// onHost is the path on the host of what real has returned.
func (t *tree) onHost(full string) string {
	return path.Clean("/" + strings.TrimPrefix(full, strings.TrimSuffix(t.root, "/")))
}

// open returns a file; one that does not exist is empty and has stays false.
func (t *tree) open(name string) (*file, error) {
	full, err := t.real(name)
	if err != nil {
		return nil, err
	}
	f := &file{path: t.onHost(full)}
	if known := t.seen[f.path]; known != nil {
		return known, nil
	}
	if err := f.read(full); err != nil {
		return nil, err
	}
	f.now, f.base, f.bare, f.stays = f.was, f.was, f.there, f.there
	t.seen[f.path] = f
	t.order = append(t.order, f)
	return f, nil
}

// read takes in what is on disk.
func (f *file) read(full string) error {
	f.mode, f.uid, f.gid = 0o644, -1, -1
	info, err := os.Stat(full)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no plain file: move it away", f.path)
	}
	in, err := os.Open(full)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	f.was, err = io.ReadAll(io.LimitReader(in, maxFile+1)) //nolint:forbidigo // capped
	if err == nil && len(f.was) > maxFile {
		err = fmt.Errorf("%s is larger than 4 MiB", f.path)
	}
	f.there, f.mode = true, info.Mode()
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		f.uid, f.gid = int(s.Uid), int(s.Gid)
	}
	return err
}

// edit gives a file new content, which edits have made.
func (t *tree) edit(f *file, after []byte, edits []Edit) error {
	if f.there && f.mode.Perm()&0o200 == 0 {
		return fmt.Errorf("%s is read-only: let what writes it add dfdaemon's entry, or make it writable (chmod u+w) and run this again", f.path)
	}
	f.now, f.stays = after, true
	t.edits[f] = append(t.edits[f], edits...)
	return nil
}

// changed are the files that are to be others than they are.
func (t *tree) changed() []*file {
	return slices.DeleteFunc(slices.Clone(t.order), func(f *file) bool {
		return f.there == f.stays && bytes.Equal(f.was, f.now)
	})
}

// files returns the names of what is no directory in a directory, in order, as
// they will be.
func (t *tree) files(dir string) ([]string, error) {
	full, err := t.real(dir)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(full)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if f := t.seen[path.Join(t.onHost(full), e.Name())]; !e.IsDir() && (f == nil || f.stays) {
			names = append(names, e.Name())
		}
	}
	for _, f := range t.order {
		if f.stays && !f.there && path.Dir(f.path) == t.onHost(full) {
			names = append(names, path.Base(f.path))
		}
	}
	slices.Sort(names)
	return names, nil
}

// isDir tells whether a directory is there and not only for a file of ours.
func (t *tree) isDir(dir string) bool {
	full, err := t.real(dir)
	if err != nil {
		return false
	}
	info, err := os.Stat(full)
	if err != nil || !info.IsDir() {
		return false
	}
	if !slices.Contains(t.state.Dirs, t.onHost(full)) {
		return true
	}
	names, err := t.files(dir)
	return err != nil || len(names) > 0 || len(t.dirs(dir)) > 0
}

// dirs returns the names of the directories in one.
func (t *tree) dirs(dir string) []string {
	full, err := t.real(dir)
	if err != nil {
		return nil
	}
	entries, _ := os.ReadDir(full) // one that cannot be read has none
	var names []string
	for _, e := range entries {
		if t.isDir(path.Join(dir, e.Name())) {
			names = append(names, e.Name())
		}
	}
	return names
}

// glob returns the files on the host that match, in order.
func (t *tree) glob(pattern string) ([]string, error) {
	dir, err := t.real(path.Dir(pattern))
	if err != nil {
		return nil, err
	}
	matches, err := filepath.Glob(filepath.Join(dir, path.Base(pattern)))
	if err != nil {
		return nil, fmt.Errorf("%q: %w", pattern, err)
	}
	for i, m := range matches {
		matches[i] = t.onHost(m)
	}
	return matches, nil
}

// missingDirs are those to be made for a path of the host, the outermost first.
func (t *tree) missingDirs(name string) []string {
	var dirs []string
	for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
		if _, err := os.Lstat(filepath.Join(t.root, dir)); err == nil {
			break
		}
		dirs = append(dirs, dir)
	}
	slices.Reverse(dirs)
	return dirs
}

// write makes a file have content, or no file where it is not to stay. It is
// replaced in one step and keeps mode and owner.
func (t *tree) write(f *file, content []byte, stays bool) error {
	if err := t.writing(); err != nil {
		return err
	}
	full := filepath.Join(t.root, f.path) // f.path has no links
	if !stays {
		if err := os.Remove(full); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	temp := t.temp(f)
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a process that was killed
		return err
	}
	out, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = out.Write(content)
	if f.uid >= 0 && err == nil {
		err = out.Chown(f.uid, f.gid)
	}
	err = errors.Join(err, out.Chmod(f.mode), out.Sync(), out.Close())
	if err == nil {
		err = os.Rename(temp, full)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return syncDir(filepath.Dir(full))
}

// temp is where a file is written before it gets its name.
func (t *tree) temp(f *file) string {
	return filepath.Join(t.root, path.Dir(f.path), "."+path.Base(f.path)+".damselfly")
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
