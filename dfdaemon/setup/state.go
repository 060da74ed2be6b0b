package setup

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// stateDir is where a host keeps what unset needs: state.json, and beside it a
// copy of each file as it was.
const (
	stateDir  = "/var/lib/damselfly/setup"
	stateFile = stateDir + "/state.json"
)

// state is what all setups of a host have done.
type state struct {
	Version int      `json:"version"`
	Dirs    []string `json:"dirs,omitempty"` // that were made, and go when they are empty
	// Families by name: engines that share their configuration share one.
	Families map[string]*family `json:"families"`
}

// family is what was done for some engines.
type family struct {
	Asked map[Engine]asked `json:"asked"`
	Files []record         `json:"files"`
}

// asked is what was asked for one engine.
type asked struct {
	Mirror     string     `json:"mirror"`
	Registries []Registry `json:"registries,omitempty"`
}

// record is what was done to a file.
type record struct {
	Path    string `json:"path"`
	Created bool   `json:"created,omitempty"`
	Backup  string `json:"backup,omitempty"` // its name beside the state
	Before  string `json:"before,omitempty"` // digests
	After   string `json:"after"`
	Edits   []Edit `json:"edits"`
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func newTree(root string) (*tree, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if root, err = filepath.EvalSymlinks(root); err != nil {
		return nil, fmt.Errorf("root: %w", err)
	}
	t := &tree{root: root, seen: map[string]*file{}, edits: map[*file][]Edit{}, writing: func() error { return nil }}
	t.state = &state{Version: 1, Families: map[string]*family{}}
	full, err := t.real(stateDir)
	if err != nil {
		return nil, err
	}
	t.dir = t.onHost(full)
	b, err := t.readState(t.stateFile())
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(t.state); err != nil || t.state.Version != 1 || t.state.Families == nil {
		return nil, fmt.Errorf("%s is not of this version of dfdaemon: unset with the one that wrote it", t.stateFile())
	}
	return t, nil
}

func (t *tree) stateFile() string { return path.Join(t.dir, path.Base(stateFile)) }

// readState reads a file of the state's directory.
func (t *tree) readState(name string) ([]byte, error) {
	full, err := t.real(name)
	if err != nil {
		return nil, err
	}
	f := &file{path: name}
	if err := f.read(full); err != nil {
		return nil, err
	}
	if !f.there {
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return f.was, nil
}

// undo takes out what a family's setup has put in, without a word on disk.
func (t *tree) undo(fam *family) error {
	for _, r := range fam.Files {
		f, err := t.open(r.Path)
		if err != nil {
			return err
		}
		if f.there {
			err = t.undoFile(f, r)
		} else if !r.Created {
			t.note("%s is gone: it stays so", r.Path)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", r.Path, err)
		}
		f.base, f.bare = f.now, f.stays
	}
	return nil
}

func (t *tree) undoFile(f *file, r record) error {
	switch is := sum(f.was); {
	case is == r.After && r.Created:
		f.now, f.stays = nil, false
		return nil
	case is == r.After:
		b, err := t.readState(path.Join(t.dir, r.Backup))
		if err != nil {
			return err
		}
		if sum(b) != r.Before {
			return fmt.Errorf("its copy %s is not what it was", path.Join(t.dir, r.Backup))
		}
		f.now = b
		return nil
	case is == r.Before && !r.Created: // a setup or an unset was killed
		return nil
	}
	if strings.HasSuffix(f.path, ".json") {
		var err error
		made := strings.Contains(r.Edits[0].New, mirrorsKey)
		if f.now, err = takeOutMirror(f.was, r.Edits[0].Mark, made); err != nil {
			return err
		}
	} else {
		var missing []Edit
		if f.now, missing = takeOut(f.was, r.Edits); len(missing) > 0 {
			return fmt.Errorf("dfdaemon's entry was changed by another hand: take out by hand what has %s, and run this again", missing[0].Mark)
		}
	}
	if r.Created && len(bytes.TrimSpace(f.now)) == 0 {
		f.now, f.stays = nil, false
	}
	t.note("%s was changed since by another hand: only dfdaemon's entry goes", f.path)
	return nil
}

// records are what is done to files now.
func (t *tree) records() (records []record, backups map[string][]byte) {
	backups = map[string][]byte{}
	for _, f := range t.order {
		edits := t.edits[f]
		if edits == nil {
			continue
		}
		r := record{Path: f.path, Created: !f.bare, After: sum(f.now), Edits: edits}
		if f.bare {
			r.Before = sum(f.base)
			r.Backup = r.Before[:12] + "-" + path.Base(f.path)
			backups[r.Backup] = f.base
		}
		records = append(records, r)
	}
	slices.SortFunc(records, func(a, b record) int { return strings.Compare(a.Path, b.Path) })
	return records, backups
}

// writeState writes the copies and then the state, or no state.
func (t *tree) writeState(s *state, backups map[string][]byte, stays bool) error {
	for _, name := range slices.Sorted(maps.Keys(backups)) {
		if err := t.write(&file{path: path.Join(t.dir, name), mode: 0o600, uid: -1}, backups[name], true); err != nil {
			return err
		}
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return t.write(&file{path: t.stateFile(), mode: 0o600, uid: -1}, append(b, '\n'), stays)
}

// names are the files of the state's directory.
func (s *state) names() map[string]bool {
	names := map[string]bool{path.Base(stateFile): len(s.Families) > 0}
	for _, fam := range s.Families {
		for _, r := range fam.Files {
			names[r.Backup] = true
		}
	}
	return names
}

// sweepState removes what the state does not name, and with nothing left its
// directory.
func (t *tree) sweepState(s *state) error {
	dir := filepath.Join(t.root, t.dir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	keep := s.names()
	for _, e := range entries {
		if !keep[e.Name()] {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	if len(s.Families) == 0 {
		err = errors.Join(err, os.Remove(dir))
	}
	return err
}
