//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// A fault is one thing that goes wrong.
type fault struct {
	at     time.Duration // from the beginning
	what   kind
	host   int // -1 is the supernode
	lasts  time.Duration
	chance uint64 // what else there is to choose
}

type kind string

// What goes wrong.
const (
	killed    kind = "killed"        // with SIGKILL, and started again
	paused    kind = "paused"        // with SIGSTOP, then SIGCONT
	cut       kind = "cut off"       // its link is down
	restarted kind = "restarted"     // with SIGTERM
	replaced  kind = "replaced"      // by another one that takes over
	filled    kind = "filled up"     // its disk
	corrupted kind = "corrupted"     // bytes in its store
	truncated kind = "truncated"     // a file of its store
	removed   kind = "robbed"        // of a directory in its store
	settleFor      = 3 * time.Second // from a fault of one part to its next
)

var (
	ofHosts     = []kind{killed, killed, paused, cut, restarted, replaced, filled, corrupted, corrupted, truncated, removed}
	ofSupernode = []kind{killed, paused, cut, restarted}
)

func (f fault) String() string {
	who := "the supernode"
	if f.host >= 0 {
		who = fmt.Sprintf("host%d", f.host+1)
	}
	return fmt.Sprintf("%s is %s for %.1f s", who, f.what, f.lasts.Seconds())
}

// faults are what goes wrong in the soak: the seed says it, and nothing else.
func (r *region) faults() (faults []fault) {
	rng := rand.New(rand.NewPCG(r.cfg.seed, 1)) //nolint:gosec // it is to be replayed
	free := make([]time.Duration, len(r.hosts)+1)
	for at := time.Duration(0); ; {
		at += time.Duration(300+rng.IntN(r.size(4000, 2000))) * time.Millisecond
		f := fault{at: at, host: rng.IntN(len(r.hosts)+1) - 1, lasts: time.Duration(200+rng.IntN(r.size(8000, 4000))) * time.Millisecond, chance: rng.Uint64()}
		of := ofHosts
		if f.host < 0 {
			of = ofSupernode
		}
		f.what = of[rng.IntN(len(of))]
		if f.at+f.lasts > r.cfg.duration {
			return faults
		}
		if at < free[f.host+1] {
			continue
		}
		free[f.host+1] = at + f.lasts + settleFor
		faults = append(faults, f)
	}
}

// play makes the faults, each at its time, and returns when all have ended.
func (s *soaking) play(ctx context.Context, faults []fault) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	began := time.Now()
	errs := make(chan error, len(faults))
	for _, f := range faults {
		if err := wait(ctx, f.at-time.Since(began)); err != nil {
			return err
		}
		s.out.say("%v", f)
		wg.Go(func() {
			var err error
			if f.host < 0 {
				err = s.troubleSupernode(ctx, f)
			} else {
				err = s.hosts[f.host].trouble(ctx, s, f)
			}
			if err != nil {
				errs <- fmt.Errorf("%v: %w", f, err)
			}
		})
		select {
		case err := <-errs:
			return err
		default:
		}
	}
	wg.Wait()
	close(errs)
	return <-errs
}

func (s *soaking) troubleSupernode(ctx context.Context, f fault) error {
	s.centre.Lock()
	defer s.centre.Unlock()
	switch n := s.supernode; f.what {
	case killed:
		n.Process.Kill()
		return errors.Join(wait(ctx, f.lasts), n.Restart(ctx))
	case restarted:
		return errors.Join(n.Process.Stop(ctx), n.Restart(ctx))
	case paused:
		return errors.Join(n.Process.Pause(), wait(ctx, f.lasts), n.Process.Resume())
	default:
		return errors.Join(n.Host.Unplug(ctx), wait(ctx, f.lasts), n.Host.Plug(ctx))
	}
}

func (h *host) trouble(ctx context.Context, s *soaking, f fault) error {
	switch f.what {
	case replaced:
		code, err := h.takeOver(ctx)
		if err == nil && code != 0 {
			err = fmt.Errorf("the old one ended with %d", code)
		}
		return err
	case cut:
		s.cut(h, time.Now().Add(time.Hour))
		err := errors.Join(h.Unplug(ctx), wait(ctx, f.lasts), h.Plug(ctx))
		s.cut(h, time.Now())
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch d := h.daemon; f.what {
	case killed:
		d.Process.Kill()
		return errors.Join(wait(ctx, f.lasts), d.Restart(ctx))
	case restarted:
		return errors.Join(d.Process.Stop(ctx), d.Restart(ctx))
	case paused:
		return errors.Join(d.Process.Pause(), wait(ctx, f.lasts), d.Process.Resume())
	case filled:
		return errors.Join(h.fill(), wait(ctx, f.lasts), os.Remove(h.ballast()))
	}
	return h.damage(f)
}

// cut notes that the host's link is down from now on, or was until now.
func (s *soaking) cut(h *host, to time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.down[h.Name()]
	if c.to.Before(time.Now()) {
		c.from = time.Now()
	}
	c.to = to
	s.down[h.Name()] = c
}

func (h *host) ballast() string { return filepath.Join(h.disk, "ballast") }

// fill takes all that is free of the host's disk.
func (h *host) fill() error {
	f, err := os.Create(h.ballast())
	if err != nil {
		return err
	}
	defer f.Close()
	for b := make([]byte, mebi); err == nil; {
		_, err = f.Write(b)
	}
	return nil // it is that the disk is full
}

// damage does to the store's files what nobody should.
func (h *host) damage(f fault) error {
	rng := rand.New(rand.NewPCG(f.chance, 2)) //nolint:gosec // it is to be replayed
	contents, err := filepath.Glob(filepath.Join(h.disk, "*", "content"))
	if err != nil || len(contents) == 0 {
		return err
	}
	path := contents[rng.IntN(len(contents))]
	if f.what == removed {
		return ignoreGone(os.RemoveAll(filepath.Dir(path)))
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return ignoreGone(err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || info.Size() == 0 {
		return err
	}
	if f.what == truncated {
		return file.Truncate(rng.Int64N(info.Size()))
	}
	for range 1 + rng.IntN(20) {
		if _, err := file.WriteAt([]byte{byte(rng.Uint32())}, rng.Int64N(info.Size())); err != nil { //nolint:gosec // G115: any byte
			return err
		}
	}
	return nil
}

// ignoreGone is for what the store has just evicted.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
