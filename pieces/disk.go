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
	t.room = t.held()
	if m.Window {
		t.room = max(t.room, Window(m.Layout))
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
	f, err := s.createFile(name)
	if err == nil {
		if err = s.writeAt(f, b, 0); err == nil {
			err = s.syncFile(f)
		}
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		_ = s.removeAll(name)
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
		if err := errors.Join(s.syncFile(f), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// op is one change on the disk, or one read to verify, before it is made.
type op struct {
	kind     opKind
	name, to string   // below the store's directory; of a write and such those of the file are not told
	file     *os.File // of a write, a truncate, a sync, a punch, a read
	off, n   int64
	b        []byte // of a write
}

type opKind int

const (
	opMkdir opKind = iota
	opCreate
	opRename
	opRemove
	opWrite
	opTruncate
	opPunch
	opSync // of a file or a directory
	opRead
)

// may asks whether an op is to be made.
func (s *Store) may(o op) error {
	if s.cfg.before == nil {
		return nil
	}
	return s.cfg.before(&o)
}

// All changes on the disk but times are made by what follows.

func (s *Store) mkdir(name string) error {
	if err := s.may(op{kind: opMkdir, name: name}); err != nil {
		return err
	}
	return s.root.Mkdir(name, 0o700)
}

func (s *Store) createFile(name string) (*os.File, error) {
	if err := s.may(op{kind: opCreate, name: name}); err != nil {
		return nil, err
	}
	return s.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

func (s *Store) rename(from, to string) error {
	if err := s.may(op{kind: opRename, name: from, to: to}); err != nil {
		return err
	}
	return s.root.Rename(from, to)
}

func (s *Store) removeAll(name string) error {
	if err := s.may(op{kind: opRemove, name: name}); err != nil {
		return err
	}
	return s.root.RemoveAll(name)
}

func (s *Store) writeAt(f *os.File, b []byte, off int64) error {
	if err := s.may(op{kind: opWrite, file: f, off: off, n: int64(len(b)), b: b}); err != nil {
		return err
	}
	_, err := f.WriteAt(b, off)
	return err
}

func (s *Store) truncate(f *os.File, n int64) error {
	if err := s.may(op{kind: opTruncate, file: f, n: n}); err != nil {
		return err
	}
	return f.Truncate(n)
}

func (s *Store) punch(f *os.File, off, n int64) error {
	if err := s.may(op{kind: opPunch, file: f, off: off, n: n}); err != nil {
		return err
	}
	return punch(f, off, n)
}

func (s *Store) syncFile(f *os.File) error {
	if err := s.may(op{kind: opSync, file: f}); err != nil {
		return err
	}
	return f.Sync()
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
