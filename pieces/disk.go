package pieces

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

const (
	// maxSmallFile bounds what is read whole from the disk, in bytes.
	maxSmallFile = 1 << 20
	// maxPublic bounds the names of a Meta. Forgetting the oldest is safe: it
	// costs its next asker one question to the registry.
	maxPublic = 256
	// maxName bounds a public name and a media type, in bytes.
	maxName = 1024
)

// Meta says what a task is. It is kept as JSON.
type Meta struct {
	ID        TaskID   `json:"id"`
	Layout    Layout   `json:"layout"`
	MediaType string   `json:"mediaType,omitempty"` // of a manifest, else empty
	Public    []string `json:"public,omitempty"`    // "registry/repository" names under which anyone may read it
	Complete  bool     `json:"complete,omitempty"`  // every piece present and the whole content's digest verified
}

func (m Meta) validate() error {
	if _, err := ParseTaskID(string(m.ID)); err != nil {
		return err
	}
	if err := m.Layout.Validate(); err != nil {
		return err
	}
	if len(m.MediaType) > maxName || len(m.Public) > maxPublic ||
		slices.ContainsFunc(m.Public, func(s string) bool { return len(s) > maxName }) {
		return errors.New("media type or public names are too long")
	}
	return nil
}

func parseMeta(b []byte) (Meta, error) {
	var m Meta
	if err := json.Unmarshal(b, &m); err != nil {
		return Meta{}, err
	}
	return m, m.validate()
}

func taskDir(id TaskID) string { return strings.Replace(string(id), ":", "-", 1) }

// dirTask returns the task whose directory has that name, if any.
func dirTask(name string) (TaskID, bool) {
	id, err := ParseTaskID(strings.Replace(name, "-", ":", 1))
	return id, err == nil && taskDir(id) == name
}

// loadTask reads a task from its directory.
func (s *Store) loadTask(id TaskID, trusted bool) error {
	dir := taskDir(id)
	info, err := s.root.Stat(dir)
	if err != nil {
		return err
	}
	b, err := s.readFile(path.Join(dir, metaName))
	if err != nil {
		return err
	}
	m, err := parseMeta(b)
	if err != nil {
		return err
	}
	content, err := s.root.Lstat(path.Join(dir, contentName))
	if err != nil {
		return err
	}
	if m.ID != id || !content.Mode().IsRegular() || content.Size() != m.Layout.Length {
		return errors.New("parts of a task do not belong together")
	}
	t := newTask(s, m)
	rec, err := t.readRecord()
	if err != nil {
		return err
	}
	t.have, t.recordEnd, t.made = rec.have, rec.end, true
	if trusted {
		t.good = rec.have.Clone()
	}
	t.stamped = info.ModTime()
	t.lastUse = t.stamped
	if now := time.Now(); t.lastUse.After(now) {
		t.lastUse = now
	}
	s.mu.Lock()
	s.addLocked(t)
	s.mu.Unlock()
	if m.Complete && !rec.have.Full() {
		// Whatever comes to fill the gap, it is not what was verified as a whole.
		m.Complete = false
		if err := t.writeMeta(m, true); err != nil {
			s.mu.Lock()
			s.forgetLocked(t)
			s.mu.Unlock()
			return err
		}
	}
	return nil
}

func (t *task) readRecord() (record, error) {
	f, err := t.open(recordName, os.O_RDONLY)
	if err != nil {
		return record{}, err
	}
	defer func() { _ = f.Close() }()
	return readRecord(f, t.id, t.layout)
}

// loadDigests brings back the digests of the pieces that were ever present.
// t.disk is held. A record that no longer has them takes the task with it.
func (t *task) loadDigests() error {
	rec, err := t.readRecord()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	t.mu.Lock()
	whole := err == nil
	for i := range t.have.All() {
		whole = whole && rec.have.Has(i)
	}
	if whole {
		t.digests = rec.digests
	}
	t.mu.Unlock()
	if whole {
		return nil
	}
	_ = t.store.Remove(t.id)
	return fmt.Errorf("its record is damaged: %w", ErrGone)
}

// create makes the task's directory, complete or not at all. t.disk is held.
func (t *task) create() error {
	s := t.store
	temp := s.tempName()
	if err := t.createIn(temp); err != nil {
		_ = s.root.RemoveAll(temp) // swept by the next OpenStore at the latest
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err := t.ended()
	if err == nil {
		err = s.root.Rename(temp, t.dir)
		if errors.Is(err, fs.ErrExist) { // the remains of one that could not be removed
			if err = s.root.RemoveAll(t.dir); err == nil {
				err = s.root.Rename(temp, t.dir)
			}
		}
	}
	if err != nil {
		_ = s.root.RemoveAll(temp)
		return err
	}
	t.made = true
	t.mu.Lock()
	t.digests = make([]Digest, t.layout.Count())
	t.mu.Unlock()
	return nil
}

func (t *task) createIn(dir string) error {
	root := t.store.root
	if err := root.Mkdir(dir, 0o700); err != nil {
		return err
	}
	f, err := root.OpenFile(path.Join(dir, contentName), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(t.layout.Length), f.Close()); err != nil {
		return err
	}
	if err := root.WriteFile(path.Join(dir, recordName), nil, 0o600); err != nil {
		return err
	}
	// Not synced: a task that a power cut takes here had nothing worth keeping,
	// and whoever waits for its first byte should not wait for the disk.
	b, err := json.Marshal(t.Meta())
	if err != nil {
		return err
	}
	return root.WriteFile(path.Join(dir, metaName), b, 0o600)
}

// writeMeta replaces the task's metadata, on disk and then in memory. t.disk is
// held, or t is not yet known to anyone else.
func (t *task) writeMeta(m Meta, durable bool) error {
	s := t.store
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	temp, err := s.writeTemp(b, true)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if err = t.ended(); err == nil {
		err = s.root.Rename(temp, path.Join(t.dir, metaName))
	}
	s.mu.Unlock()
	if err != nil {
		_ = s.root.Remove(temp)
		return err
	}
	t.mu.Lock()
	t.meta = m
	t.mu.Unlock()
	if !durable {
		return nil
	}
	err = errors.Join(s.syncDir(t.dir), s.syncDir("."))
	if ended := t.ended(); ended != nil {
		return ended
	}
	return err
}

// open opens one of the task's files. Once t has ended the name may be that of
// another task's file, hence the look after opening.
func (t *task) open(name string, flag int) (*os.File, error) {
	f, err := t.store.root.OpenFile(path.Join(t.dir, name), flag, 0)
	if ended := t.ended(); ended != nil {
		if err == nil {
			_ = f.Close()
		}
		return nil, ended
	}
	return f, err
}

// readFile reads a small file whole.
func (s *Store) readFile(name string) ([]byte, error) {
	f, err := s.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxSmallFile {
		return nil, fmt.Errorf("%s is not a file of at most %d bytes", name, maxSmallFile)
	}
	b := make([]byte, info.Size())
	_, err = io.ReadFull(f, b)
	return b, err
}

// writeTemp writes b to a new file with a temporary name, synced if asked.
func (s *Store) writeTemp(b []byte, synced bool) (name string, err error) {
	name = s.tempName()
	f, err := s.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	_, err = f.Write(b)
	if err == nil && synced {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = s.root.Remove(name)
		return "", err
	}
	return name, nil
}

// syncDir makes the names in a directory durable.
func (s *Store) syncDir(name string) error {
	d, err := s.root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// buffer returns a buffer of n bytes, to be given back with free.
func (s *Store) buffer(n int64) *[]byte {
	exp := bits.Len64(uint64(max(n, 1) - 1))
	b, _ := s.buffers[exp].Get().(*[]byte)
	if b == nil {
		b = new(make([]byte, 1<<exp))
	}
	*b = (*b)[:n]
	return b
}

func (s *Store) free(b *[]byte) { s.buffers[bits.Len64(uint64(cap(*b)-1))].Put(b) }
