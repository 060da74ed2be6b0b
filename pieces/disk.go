package pieces

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"path"
	"time"
)

// maxSmallFile bounds what is read whole from the disk, in bytes.
const maxSmallFile = 1 << 20

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

// writeTemp writes b to a new file with a temporary name, and to the disk.
func (s *Store) writeTemp(b []byte) (name string, err error) {
	name = s.tempName()
	f, err := s.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	if _, err = f.Write(b); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = s.root.Remove(name)
		return "", err
	}
	return name, nil
}

// sync makes files durable, and the names in directories.
func (s *Store) sync(names ...string) error {
	for _, name := range names {
		f, err := s.root.Open(name)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
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
