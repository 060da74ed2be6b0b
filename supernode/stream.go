package supernode

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"damselfly.dev/pieces"
)

// The failures in a row after which an origin is given up, before its first
// byte and later.
const (
	triesBefore = 3
	triesAmid   = 6
	// refusalsAmid is how often an origin that refuses the rest of what it has
	// begun is asked again, of triesAmid.
	refusalsAmid = 2
)

// stream reads a content from its origin in order, and asks again from where it
// stopped when the origin breaks off.
type stream struct {
	*origin
	ctx     context.Context // of its requests
	fetch   *fetch
	src     source
	body    io.ReadCloser // nil when the origin is to be asked
	length  int64         // of the whole, -1 as long as it is not known
	off     int64         // of the next byte
	end     int64         // where what is asked for ends, 0 for with the whole
	version string
	counted bool
	began   bool
	fails   int // in a row
	tries   int
}

func (s *stream) close() {
	if s.body != nil {
		_ = s.body.Close()
		s.body = nil
	}
}

// restart forgets what is known of the content.
func (s *stream) restart() {
	s.close()
	s.off, s.length, s.began, s.fails = 0, -1, false, 0
}

// seek makes off the offset of the next byte, and end the end of what is asked for.
func (s *stream) seek(off, end int64) {
	if s.off != off || s.end != end {
		s.close()
		s.off, s.end = off, end
	}
}

// ask asks the origin from s.off on.
func (s *stream) ask() (*body, error) {
	if s.end > 0 {
		return s.src.part(s.ctx, s.off, s.end)
	}
	return s.src.open(s.ctx, s.off, s.length)
}

// open asks the origin from s.off on, again and again while that may help.
func (s *stream) open() (*body, error) {
	for {
		b, err := s.ask()
		if err == nil {
			if s.began && (b.version != s.version && (s.version != "" || s.end == 0) || b.length >= 0 && s.length >= 0 && b.length != s.length) {
				_ = b.Close()
				return nil, errChanged
			}
			if !s.began || s.length < 0 {
				s.length = b.length
			}
			s.body, s.version, s.counted, s.began = b.ReadCloser, b.version, b.counted, true
			return b, nil
		}
		if _, no := refused(err); no && s.began {
			if src := s.fetch.other(); src != nil {
				s.src = src
				continue
			}
			if s.fails < refusalsAmid { // it has said yes before
				err = passing{err}
			}
		}
		if err := s.failed(err); err != nil {
			return nil, err
		}
	}
}

// failed waits until the origin may be asked again, or returns why not.
func (s *stream) failed(err error) error {
	s.fails++
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	if !isPassing(err) || s.fails >= s.tries {
		return err
	}
	pause := 50 * time.Millisecond << s.fails // 0.1, 0.2, … 1.6 s
	t := time.NewTimer(pause/2 + rand.N(pause))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

// Read reads on, over as many answers as it takes.
func (s *stream) Read(p []byte) (int, error) {
	for {
		if s.length >= 0 && s.off >= s.length {
			return 0, io.EOF
		}
		if s.body == nil {
			if _, err := s.open(); err != nil {
				return 0, err
			}
		}
		n, err := s.body.Read(p)
		if n > 0 {
			s.off += int64(n)
			s.fails = 0
			if s.end == 0 {
				s.fetch.fetched.Store(s.off)
			} else {
				s.fetch.fetched.Add(int64(n))
			}
			if !s.counted {
				s.metrics.originBytes.Add(float64(n))
			}
			return n, nil // an error comes again
		}
		if errors.Is(err, io.EOF) {
			if s.length < 0 {
				return 0, io.EOF
			}
			err = passing{io.ErrUnexpectedEOF}
		}
		if err != nil {
			s.close()
			if err := s.failed(err); err != nil {
				return 0, fmt.Errorf("origin broke off at byte %d: %w", s.off, err)
			}
		}
	}
}

// spool reads content of unknown length into a file of its own, and goes on
// from there.
func (s *stream) spool() error {
	name := path.Join(spoolDir, strconv.FormatUint(rand.Uint64(), 16))
	f, err := s.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	_ = s.root.Remove(name) // it goes with the last use of f; else the next start removes it
	file := &spooled{File: f, all: &s.spooling}
	for err == nil {
		var n int64
		if n, err = s.room(file); err == nil {
			n, err = io.CopyN(f, s, n)
			file.add(n)
		}
	}
	if errors.Is(err, io.EOF) {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		_ = file.Close()
		return fmt.Errorf("spool: %w", err)
	}
	s.close()
	s.body, s.off, s.length, s.counted = file, 0, file.size, true
	return nil
}

const (
	spoolStep = 4 << 20
	maxSpool  = 32 << 30 // bytes of a content whose length nobody tells
)

// spooled is a file that counts among what all such hold.
type spooled struct {
	*os.File
	size int64
	all  *atomic.Int64
}

func (f *spooled) add(n int64) {
	f.size += n
	f.all.Add(n)
}

// Close gives the disk back what the file takes.
func (f *spooled) Close() error {
	f.all.Add(-f.size)
	f.size = 0
	return f.File.Close()
}

// room is how much more there may be now of a content without a length: the quota
// bounds it, and all of them take at most half of what the disk has free for the store.
func (o *origin) room(f *spooled) (int64, error) {
	limit := int64(maxSpool)
	if o.quota > 0 {
		limit = min(limit, o.quota)
	}
	var disk syscall.Statfs_t
	if err := syscall.Fstatfs(int(f.Fd()), &disk); err != nil {
		return 0, err
	}
	block := int64(disk.Bsize) //nolint:unconvert // other systems have other types
	free := int64(disk.Bavail)*block - min(o.keepFree, int64(disk.Blocks)*block/2)
	if all := o.spooling.Load() + spoolStep; f.size > limit || all > free {
		return 0, pieces.ErrQuota
	}
	return min(spoolStep, limit-f.size+1), nil // one more byte shows that it is too long
}
