package supernode

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"go.uber.org/zap"

	"damselfly.dev/registryproxy"
)

const (
	maxNote    = 16 << 10 // bytes of a note
	tempPrefix = "tmp-"   // a file on its way in by rename
)

// note is what the supernode remembers of a name of which it may not be true for
// ever: a tag, a URL, a repository that anyone can read.
type note struct {
	Name    string    `json:"name"`
	Digest  string    `json:"digest,omitempty"`  // of a tag's manifest
	Version string    `json:"version,omitempty"` // of what a URL gave: its validators
	Own     bool      `json:"own,omitempty"`     // what a URL gave may be for who asked for it alone
	Checked time.Time `json:"checked"`           // when the origin last said so
}

// notes keeps a note per name as small files in one directory, so that a
// restart knows them. It holds nothing in memory.
type notes struct {
	root *os.Root
	dir  string
}

// openNotes makes the directory and forgets what is older than keep.
func openNotes(root *os.Root, dir string, keep time.Duration) (*notes, error) {
	n := &notes{root, dir}
	if err := root.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make directory of %s: %w", dir, err)
	}
	return n, n.sweep(time.Now().Add(-keep))
}

// sweep removes temporary files and what was not written since.
func (n *notes) sweep(since time.Time) error {
	entries, err := fs.ReadDir(n.root.FS(), n.dir)
	if err != nil {
		return fmt.Errorf("read directory of %s: %w", n.dir, err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || strings.HasPrefix(e.Name(), tempPrefix) || info.ModTime().Before(since) {
			_ = n.root.Remove(path.Join(n.dir, e.Name())) // the next sweep tries again
		}
	}
	return nil
}

func (n *notes) file(name string) string {
	sum := sha256.Sum256([]byte(name))
	return path.Join(n.dir, hex.EncodeToString(sum[:]))
}

// get returns the note of a name; false when there is none that can be read.
func (n *notes) get(name string) (note, bool) {
	b, err := readSmall(n.root, n.file(name), maxNote)
	var v note
	if err != nil || json.Unmarshal(b, &v) != nil || v.Name != name {
		return note{}, false
	}
	return v, true
}

// put replaces the note of v.Name.
func (n *notes) put(v note) error {
	b, err := json.Marshal(v)
	if err == nil && len(b) > maxNote {
		err = errors.New("it is too long")
	}
	if err == nil {
		err = writeSmall(n.root, n.file(v.Name), b, false)
	}
	if err != nil {
		return fmt.Errorf("keep a note in %s: %w", n.dir, err)
	}
	return nil
}

// drop forgets the note of a name.
func (n *notes) drop(name string) error {
	if err := n.root.Remove(n.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget a note in %s: %w", n.dir, err)
	}
	return nil
}

// ledger keeps a note of each repository that anyone can read.
type ledger struct {
	*notes
	log *zap.Logger
}

// IsPublic implements registryproxy.Ledger.
func (l ledger) IsPublic(repo registryproxy.Repository) bool {
	_, ok := l.get(repo.String())
	return ok
}

// SetPublic implements registryproxy.Ledger.
func (l ledger) SetPublic(repo registryproxy.Repository, public bool) {
	var err error
	if public {
		err = l.put(note{Name: repo.String(), Checked: time.Now()})
	} else {
		err = l.drop(repo.String())
	}
	if err != nil {
		l.log.Warn("who may read a repository is not kept", zap.Stringer("repository", repo), zap.Error(err))
	}
}

func readSmall(root *os.Root, name string, limit int64) ([]byte, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b := make([]byte, limit+1)
	n, err := io.ReadFull(f, b)
	if err == nil {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, limit)
	}
	if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:n], nil
}

// writeSmall makes a file appear with all its bytes, on the disk where it must
// last.
func writeSmall(root *os.Root, name string, b []byte, durable bool) error {
	temp := path.Join(path.Dir(name), tempPrefix+rand.Text())
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && durable {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = root.Rename(temp, name)
	}
	if err != nil {
		_ = root.Remove(temp)
	}
	return err
}
