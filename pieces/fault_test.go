package pieces

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestFaults has the disk fail at each kind of change in turn: what is tried
// fails, or goes on without it, and then the store is as it was and takes the
// same again.
func TestFaults(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.EROFS, syscall.ENOSPC} {
		for kind := opMkdir; kind <= opSync; kind++ {
			var fault error
			count := 0
			s := open(t, t.TempDir(), StoreConfig{before: func(o *op) error {
				if o.kind == kind && fault != nil {
					count++
					return &fs.PathError{Op: "fault", Err: fault}
				}
				return nil
			}})
			b, m := blob(200, 3*MinPieceSize+7)
			m.Window = kind == opPunch // nothing else is ever punched
			fault = errno
			try := func() error {
				c, err := s.Create(m)
				if err != nil {
					return err
				}
				defer c.Release()
				for i := range m.Layout.Count() {
					if _, err := c.Make(i, bytes.NewReader(piece(m.Layout, b, i))); err != nil {
						return err
					}
				}
				return c.SetComplete()
			}
			err := try()
			if count > 0 && !errors.Is(err, errno) {
				t.Errorf("%v at op %d: error %v", errno, kind, err)
			}
			checkTruth(t, s, m, b)
			fault = nil
			if err := try(); err != nil {
				t.Errorf("%v at op %d: afterwards: %v", errno, kind, err)
			}
			if n := checkTruth(t, s, m, b); n != m.Layout.Count() {
				t.Errorf("%v at op %d: %d pieces afterwards", errno, kind, n)
			}
		}
	}
}

// TestUnreadable: a piece that the disk does not give back is there no more, and
// can be had again.
func TestUnreadable(t *testing.T) {
	var bad *op
	var lost []int
	s := open(t, t.TempDir(), StoreConfig{
		OnLost: func(_ TaskID, pieces []int) { lost = append(lost, pieces...) },
		before: func(o *op) error {
			if o.kind == opRead && bad != nil && o.off == bad.off {
				return syscall.EIO
			}
			return nil
		},
	})
	b, m := blob(201, 4*MinPieceSize)
	put(t, s, m, b)
	c := get(t, s, m.ID)
	bad = &op{off: 2 * MinPieceSize}
	c.doubt() // as after an EIO of sendfile
	var got bytes.Buffer
	_, err := c.CopyRange(&got, 0, m.Layout.Length)
	wantErr(t, err, ErrMissing)
	if !bytes.Equal(got.Bytes(), b[:2*MinPieceSize]) || c.Has(2) || !c.Has(3) || c.Complete() {
		t.Errorf("%d bytes", got.Len())
	}
	if u := s.Usage(); u.Rotten != 1 || !slices.Equal(lost, []int{2}) {
		t.Errorf("usage %+v, told of %v", u, lost)
	}
	bad = nil
	fill(t, c, b)
	if !c.Complete() || !bytes.Equal(read(t, c), b) {
		t.Error("it is not mended")
	}
}

// silently turns a bit of a file that keeps its times, as a disk does.
func silently(tb testing.TB, name string, off int64) {
	tb.Helper()
	info, err := os.Stat(name)
	if err != nil {
		tb.Fatal(err)
	}
	flip(tb, name, off)
	if err := os.Chtimes(name, info.ModTime(), info.ModTime()); err != nil {
		tb.Fatal(err)
	}
}

// TestRot: what has rotted is found by the scrub, by who is told to look, by the
// next reader some time later, and at once where the file was written to.
func TestRot(t *testing.T) {
	for name, find := range map[string]func(*testing.T, *Store, *Content){
		"scrub": func(t *testing.T, s *Store, _ *Content) {
			t.Helper()
			<-time.After(freshFor + time.Second)
			ctx, stop := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("enough"))
			defer stop()
			_ = s.Tend(ctx, 4*MinPieceSize)
			if u := s.Usage(); u.Scrubbed != 5*MinPieceSize {
				t.Errorf("%d bytes were looked at", u.Scrubbed)
			}
		},
		"recheck": func(t *testing.T, _ *Store, c *Content) {
			t.Helper()
			if !c.Recheck(2) || c.Recheck(3) || c.Recheck(99) {
				t.Error("the wrong pieces are right")
			}
		},
		"reader": func(t *testing.T, _ *Store, c *Content) {
			t.Helper()
			<-time.After(freshFor + time.Second)
			n, err := c.CopyRange(io.Discard, 0, 5*MinPieceSize)
			wantErr(t, err, ErrMissing)
			if n != 3*MinPieceSize {
				t.Errorf("%d bytes", n)
			}
		},
		"written to": func(t *testing.T, s *Store, c *Content) {
			t.Helper()
			file := filepath.Join(s.Dir(), c.dir, contentName)
			if err := os.Chtimes(file, time.Now(), time.Now()); err != nil {
				t.Fatal(err)
			}
			_, err := c.CopyRange(io.Discard, 3*MinPieceSize, MinPieceSize)
			wantErr(t, err, ErrMissing)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				var lost []int
				s := open(t, dir, StoreConfig{OnLost: func(_ TaskID, pieces []int) { lost = append(lost, pieces...) }})
				b, m := blob(202, 5*MinPieceSize)
				put(t, s, m, b)
				c := get(t, s, m.ID)
				silently(t, filepath.Join(dir, taskDir(m.ID), contentName), 3*MinPieceSize+99)
				find(t, s, c)
				if have := c.Have(); have.Len() != 4 || c.Has(3) || !slices.Equal(lost, []int{3}) || s.Usage().Rotten != 1 {
					t.Errorf("has %v, lost %v, usage %+v", have, lost, s.Usage())
				}
				checkRecovers(t, s, m, b)
			})
		})
	}
}

// TestScrubIsGentle: no faster than it may be, and no more than needs be.
func TestScrubIsGentle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, t.TempDir(), StoreConfig{})
		b, m := blob(203, 64*MinPieceSize)
		put(t, s, m, b)
		tend := func(d time.Duration) int64 {
			ctx, stop := context.WithTimeoutCause(t.Context(), d, errors.New("enough"))
			defer stop()
			before := s.Usage().Scrubbed
			_ = s.Tend(ctx, MinPieceSize)
			return s.Usage().Scrubbed - before
		}
		if n := tend(time.Minute); n != 0 {
			t.Errorf("%d bytes of what has just come", n)
		}
		<-time.After(freshFor)
		if n := tend(30 * time.Second); n < 15*MinPieceSize || n > 31*MinPieceSize {
			t.Errorf("%d pieces in 30 s at one a second", n/MinPieceSize)
		}
		if n := tend(10 * time.Minute); n > 50*MinPieceSize {
			t.Errorf("%d pieces more: some twice", n/MinPieceSize)
		}
	})
}

// onDisk runs the test again in a process whose mounts are its own, on a file
// system of so many MiB, whose directory it returns there; "" where that is done.
func onDisk(t *testing.T, size string) string {
	t.Helper()
	const inside = "PIECES_TEST_DISK"
	if dir := os.Getenv(inside); dir != "" {
		if err := errors.Join(syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""),
			syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root to mount a small disk")
		}
		t.Skip("SKIPPED: needs root to mount a small disk")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return ""
}

// TestSmallDisk: where the disk is full what was used least recently goes, and
// what still does not fit leaves the store as it was.
func TestSmallDisk(t *testing.T) {
	dir := onDisk(t, "8m")
	if dir == "" {
		return
	}
	s := open(t, filepath.Join(dir, "store"), StoreConfig{})
	var metas []Meta
	var all [][]byte
	for i := range 12 {
		b, m := blob(uint64(210+i), 1<<20)
		put(t, s, m, b)
		metas, all = append(metas, m), append(all, b)
	}
	u := s.Usage()
	if u.Full == 0 || u.Evicted == 0 || u.Tasks < 4 {
		t.Errorf("usage %+v", u)
	}
	if n := checkTruth(t, s, metas[0], all[0]); n != 0 {
		t.Error("the oldest is still there")
	}
	if n := checkTruth(t, s, metas[11], all[11]); n != metas[11].Layout.Count() {
		t.Error("the newest is not")
	}
	b, m := blob(230, 12<<20)
	c := create(t, s, m)
	for i := range m.Layout.Count() {
		if _, err := c.Make(i, bytes.NewReader(piece(m.Layout, b, i))); err != nil {
			wantErr(t, err, syscall.ENOSPC)
			break
		}
	}
	if have := c.Have(); have.Full() || checkTruth(t, s, m, b) == 0 {
		t.Error("all of it is there, or nothing")
	}
	if err := c.Narrow(); err != nil { // so there is room for any piece
		t.Fatal(err)
	}
	for i := range m.Layout.Count() {
		if _, err := c.Make(i, bytes.NewReader(piece(m.Layout, b, i))); err != nil {
			t.Fatal(err)
		}
		if !c.Has(i) {
			t.Errorf("piece %d went at once", i)
		}
	}
	checkTruth(t, s, m, b)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, filepath.Join(dir, "store"), StoreConfig{})
	if n := checkTruth(t, s, m, b); n == 0 || n == m.Layout.Count() {
		t.Errorf("%d pieces of a window after a restart", n)
	}
}

// TestFreeSpaceIsKept: the store leaves the file system its share, also where
// somebody else fills it.
func TestFreeSpaceIsKept(t *testing.T) {
	dir := onDisk(t, "16m")
	if dir == "" {
		return
	}
	const keep = 4 << 20
	s := open(t, filepath.Join(dir, "store"), StoreConfig{KeepFree: keep})
	free := func() int64 {
		n, _, err := diskSpace(dir)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for i := range 20 {
		b, m := blob(uint64(240+i), 1<<20)
		put(t, s, m, b)
		if n := free(); n < keep-64<<10 { // but for records and such
			t.Fatalf("%d bytes are free after %d contents", n, i+1)
		}
	}
	_, m := blob(271, 10<<20)
	before := s.Usage().Tasks
	create(t, s, m).Release()
	if s.Usage().Tasks != before {
		t.Error("others went for what has not come")
	}
	_, m = blob(270, 14<<20)
	_, err := s.Create(m)
	wantErr(t, err, ErrQuota)
	if s.Usage().Tasks < 10 {
		t.Error("others went for what does not fit")
	}
	if err := os.WriteFile(filepath.Join(dir, "foreign"), make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s.evict(func() shortage { return s.missingLocked(0, false) }) // as Tend does
	if n := free(); n < keep {
		t.Errorf("%d bytes are free", n)
	}
}

// TestReadOnlyDisk: what is there is read, nothing is taken, and all is well when
// the disk is.
func TestReadOnlyDisk(t *testing.T) {
	dir := onDisk(t, "16m")
	if dir == "" {
		return
	}
	s := open(t, filepath.Join(dir, "store"), StoreConfig{})
	b, m := blob(280, 4*MinPieceSize)
	put(t, s, m, b)
	half, hm := blob(281, 4*MinPieceSize)
	c := create(t, s, hm)
	if _, err := c.Make(0, bytes.NewReader(half)); err != nil {
		t.Fatal(err)
	}
	// A file that is open for writing keeps a mount from becoming read-only.
	for _, f := range []**os.File{&c.content, &c.record} {
		if err := (*f).Close(); err != nil {
			t.Fatal(err)
		}
		*f = nil
	}
	if err := s.lock.Close(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(t, get(t, s, m.ID)), b) {
		t.Error("what is there is not read")
	}
	_, err := c.Make(1, bytes.NewReader(piece(hm.Layout, half, 1)))
	wantErr(t, err, syscall.EROFS)
	_, nm := blob(282, 4*MinPieceSize)
	_, err = s.Create(nm)
	wantErr(t, err, syscall.EROFS)
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	fill(t, c, half)
	if !bytes.Equal(read(t, c), half) {
		t.Error("wrong bytes afterwards")
	}
}
