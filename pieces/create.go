package pieces

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
)

// Put keeps b as all of a content of one piece that has been found right as a
// whole: it is Make and SetComplete, but for that it does not wait for the disk.
// What is lost by that is had again as soon.
func (c *Content) Put(b []byte) error {
	if c.layout.Count() != 1 || int64(len(b)) != c.layout.Length {
		return fmt.Errorf("%d bytes are not all of %s, or not in one piece", len(b), c.id)
	}
	defer c.store.deliver()
	d := Sum(b)
	if err := c.claim(0, d); err != nil {
		return err
	}
	if done, err := c.keepOnly(b, d, true); err != nil {
		return c.pieceError(0, err)
	} else if done {
		return nil
	}
	if ok, err := c.verified(0); err != nil {
		return err
	} else if !ok {
		if err := c.keep(0, b, d); err != nil {
			return c.pieceError(0, err)
		}
	}
	if c.Complete() {
		return nil
	}
	return c.change(func(m *Meta) { m.Complete = true }, false)
}

// keepOnly keeps the only piece of a content of which there is nothing on the
// disk yet, all at once; it tells whether it has.
func (c *Content) keepOnly(b []byte, d Digest, complete bool) (bool, error) {
	if c.layout.Count() != 1 || c.isMade() {
		return false, nil
	}
	if !c.IsWindow() {
		if err := c.reserve(int64(len(b))); err != nil {
			return false, err
		}
		defer c.written(int64(len(b)))
	}
	c.disk.Lock()
	defer c.disk.Unlock()
	if c.isMade() {
		return false, nil
	}
	m := c.Meta()
	m.Complete = complete
	if err := c.create(m, b, d); err != nil {
		return false, err
	}
	c.arrived(0)
	if f, err := c.file(&c.content, contentName); err == nil {
		c.seen(f)
	}
	c.mu.Lock()
	c.dirty = true
	c.mu.Unlock()
	return true, nil
}

// create makes the task's directory, complete or not at all, with its only piece
// in it where that is given. c.disk is held.
func (c *Content) create(m Meta, only []byte, d Digest) error {
	s := c.store
	var f *os.File
	err := s.retried(c.layout.Size(0), func() (err error) {
		temp := s.tempName()
		if f, err = c.createIn(temp, m, only, d); err == nil {
			err = c.createAs(temp, m)
		}
		if err == nil {
			return nil
		}
		if f != nil {
			_ = f.Close()
		}
		_ = s.removeAll(temp) // swept by the next OpenStore at the latest
		return err
	})
	if err != nil {
		return cmp.Or(c.ended(), err)
	}
	c.files.Lock()
	defer c.files.Unlock()
	if c.released || c.content != nil {
		return f.Close()
	}
	c.content = f
	return nil
}

// createAs gives the directory that is made its name.
func (c *Content) createAs(temp string, m Meta) error {
	s := c.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := c.ended(); err != nil {
		return err
	}
	err := s.rename(temp, c.dir)
	if errors.Is(err, fs.ErrExist) { // the remains of one that could not be removed
		if err = s.removeAll(c.dir); err == nil {
			err = s.rename(temp, c.dir)
		}
	}
	if err != nil {
		return err
	}
	c.made = true
	c.mu.Lock()
	defer c.mu.Unlock()
	c.meta = m
	if c.digests == nil {
		c.digests = make([]Digest, c.layout.Count())
	}
	return nil
}

// createIn makes all that belongs into the directory, of which it returns the
// content, open.
func (c *Content) createIn(temp string, m Meta, only []byte, d Digest) (*os.File, error) {
	s := c.store
	if err := s.mkdir(temp); err != nil {
		return nil, err
	}
	f, err := s.createFile(path.Join(temp, contentName))
	if err != nil {
		return nil, err
	}
	var entry []byte
	if only != nil {
		err = s.writeAt(f, only, 0)
		entry = appendEntry(nil, entrySeed(c.id, c.layout), 0, false, d)
	} else {
		err = s.truncate(f, c.layout.Length)
	}
	if err == nil {
		err = s.writeNew(path.Join(temp, recordName), entry)
	}
	if err != nil {
		return f, err
	}
	c.recordEnd = int64(len(entry))
	// Not synced: a task that a power cut takes here had nothing worth keeping,
	// and whoever waits for its first byte should not wait for the disk.
	b, err := json.Marshal(m)
	if err == nil {
		err = s.writeNew(path.Join(temp, metaName), b)
	}
	return f, err
}

// writeNew writes b to a new file.
func (s *Store) writeNew(name string, b []byte) error {
	f, err := s.createFile(name)
	if err != nil {
		return err
	}
	if len(b) > 0 {
		err = s.writeAt(f, b, 0)
	}
	return errors.Join(err, f.Close())
}
