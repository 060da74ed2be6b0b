package pieces

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// blob returns n bytes that depend on seed, and the task they are the content of.
func blob(seed uint64, n int) ([]byte, Meta) {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b) // never fails
	return b, Meta{ID: TaskID(digest.FromBytes(b)), Layout: NewLayout(int64(n))}
}

// digestsOf is what a supernode tells of content b.
func digestsOf(l Layout, b []byte) []Digest {
	ds := make([]Digest, l.Count())
	for i := range ds {
		ds[i] = Sum(piece(l, b, i))
	}
	return ds
}

func piece(l Layout, b []byte, i int) []byte { return b[l.Offset(i):l.Offset(i+1)] }

func open(tb testing.TB, dir string, cfg StoreConfig) *Store {
	tb.Helper()
	s, err := OpenStore(dir, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return s
}

func create(tb testing.TB, s *Store, m Meta) *Content {
	tb.Helper()
	c, err := s.Create(m)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(c.Release)
	return c
}

func get(tb testing.TB, s *Store, id TaskID) *Content {
	tb.Helper()
	c, err := s.Get(id)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(c.Release)
	return c
}

// fill makes the pieces of b that c lacks.
func fill(tb testing.TB, c *Content, b []byte) {
	tb.Helper()
	for i := range c.Layout().Count() {
		if _, err := c.Make(i, bytes.NewReader(piece(c.Layout(), b, i))); err != nil {
			tb.Fatal(err)
		}
	}
}

// put puts b into the store, whole.
func put(tb testing.TB, s *Store, m Meta, b []byte) {
	tb.Helper()
	c, err := s.Create(m)
	if err != nil {
		tb.Fatal(err)
	}
	defer c.Release()
	fill(tb, c, b)
	if err := c.SetComplete(); err != nil {
		tb.Fatal(err)
	}
}

func read(tb testing.TB, c *Content) []byte {
	tb.Helper()
	b, err := io.ReadAll(c.NewReader(tb.Context(), 0, c.Layout().Length))
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func wantErr(tb testing.TB, got, want error) {
	tb.Helper()
	if !errors.Is(got, want) {
		tb.Fatalf("error %v, want %v", got, want)
	}
}

func TestContentComesBack(t *testing.T) {
	for _, n := range []int{0, 1, MinPieceSize, MinPieceSize + 1, 5*MinPieceSize - 7} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "new", "store")
			b, m := blob(1, n)
			m.MediaType, m.Public = "text/plain", []string{"docker.io/library/a"}
			s := open(t, dir, StoreConfig{})
			c := create(t, s, m)
			if c.Complete() {
				t.Error("complete before it is")
			}
			if err := c.SetDigests(0, digestsOf(m.Layout, b)); err != nil {
				t.Fatal(err)
			}
			for i := range m.Layout.Count() {
				if c.Has(i) {
					t.Errorf("has piece %d before it came", i)
				}
				r := bytes.NewReader(b[m.Layout.Offset(i):])
				if err := c.Receive(i, r); err != nil {
					t.Fatal(err)
				}
				if read := r.Size() - int64(r.Len()); read != m.Layout.Size(i) {
					t.Errorf("piece %d: read %d bytes, want %d", i, read, m.Layout.Size(i))
				}
			}
			if err := errors.Join(c.SetComplete(), c.AddPublic("docker.io/library/b"), c.AddPublic("docker.io/library/a")); err != nil {
				t.Fatal(err)
			}
			if err := c.AddPublic("quay.io/c"); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(filepath.Join(dir, taskDir(m.ID), contentName)); err != nil || !bytes.Equal(got, b) {
				t.Errorf("the content is not a plain file of its bytes: %v", err)
			}
			c.Release()
			c.Release()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}

			s = open(t, dir, StoreConfig{})
			c = get(t, s, m.ID)
			want := []string{"docker.io/library/a", "docker.io/library/b", "quay.io/c"}
			if got := c.Meta(); !got.Complete || got.MediaType != m.MediaType || !slices.Equal(got.Public, want) || got.Layout != m.Layout {
				t.Errorf("came back as %+v", got)
			}
			if have := c.Have(); !have.Full() || !c.Complete() {
				t.Error("came back without all its pieces")
			}
			if got := c.goodRun(0, MaxPieces); got != m.Layout.Count() {
				t.Errorf("after a clean end %d pieces are trusted, want all %d", got, m.Layout.Count())
			}
			if got := read(t, c); !bytes.Equal(got, b) {
				t.Error("came back with other bytes")
			}
		})
	}
}

func TestReceiveRefuses(t *testing.T) {
	b, m := blob(2, 3*MinPieceSize+100)
	s := open(t, t.TempDir(), StoreConfig{})
	c := create(t, s, m)
	ds := digestsOf(m.Layout, b)
	if err := c.SetDigests(1, ds[1:]); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("line is down")
	wrong := bytes.Clone(b)
	wrong[m.Layout.Offset(2)-1] ^= 1
	tests := []struct {
		name  string
		piece int
		from  io.Reader
		want  error
	}{
		{"no digest", 0, bytes.NewReader(b), ErrNoDigest},
		{"short", 1, bytes.NewReader(b[:MinPieceSize-1]), io.ErrUnexpectedEOF},
		{"empty", 3, bytes.NewReader(nil), io.ErrUnexpectedEOF},
		{"breaks off", 1, io.MultiReader(bytes.NewReader(b[:1000]), failingReader{broken}), broken},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			wantErr(t, c.Receive(tt.piece, tt.from), tt.want)
		})
	}
	err := c.Receive(1, bytes.NewReader(piece(m.Layout, wrong, 1)))
	if de, ok := errors.AsType[*DigestError](err); !ok || de.Piece != 1 || de.Task != m.ID {
		t.Errorf("wrong bytes: %v", err)
	}
	for _, i := range []int{-1, 4, 1 << 40} {
		if c.Receive(i, bytes.NewReader(b)) == nil || c.Has(i) || c.Wait(t.Context(), i) == nil || !c.Digest(i).IsZero() {
			t.Errorf("piece %d, which is none, is taken for one", i)
		}
	}
	if have := c.Have(); have.Len() != 0 {
		t.Errorf("%d pieces kept of what was refused", have.Len())
	}
	wantErr(t, c.SetComplete(), ErrMissing)
	for i := 1; i < 4; i++ {
		if err := c.Receive(i, bytes.NewReader(piece(m.Layout, b, i))); err != nil {
			t.Errorf("piece %d after wrong ones: %v", i, err)
		}
	}
	if err := c.Receive(1, failingReader{broken}); err != nil {
		t.Errorf("a present piece is read again: %v", err)
	}
}

type failingReader struct{ err error }

func (r failingReader) Read([]byte) (int, error) { return 0, r.err }

func TestSetDigests(t *testing.T) {
	b, m := blob(3, 4*MinPieceSize)
	c := create(t, open(t, t.TempDir(), StoreConfig{}), m)
	ds := digestsOf(m.Layout, b)
	if err := c.SetDigests(1, []Digest{ds[1], {}, ds[3]}); err != nil {
		t.Fatal(err)
	}
	if c.Digest(1) != ds[1] || !c.Digest(2).IsZero() || c.Digest(3) != ds[3] {
		t.Error("digests are not what was told")
	}
	wantErr(t, c.SetDigests(0, []Digest{ds[0], ds[0]}), ErrConflict)
	if !c.Digest(0).IsZero() {
		t.Error("a refused list left something behind")
	}
	for _, tt := range []struct{ first, n int }{{-1, 1}, {0, 5}, {4, 1}, {5, 0}, {1 << 40, 1}} {
		if c.SetDigests(tt.first, make([]Digest, tt.n)) == nil {
			t.Errorf("%d digests from %d on are accepted", tt.n, tt.first)
		}
	}
	if err := c.SetDigests(0, ds); err != nil {
		t.Error(err)
	}
}

func TestMakeAgain(t *testing.T) {
	b, m := blob(4, MinPieceSize)
	other, _ := blob(5, MinPieceSize)
	c := create(t, open(t, t.TempDir(), StoreConfig{}), m)
	d, err := c.Make(0, bytes.NewReader(b))
	if err != nil || d != Sum(b) || c.Digest(0) != d {
		t.Fatalf("made %s, %v", d, err)
	}
	if d, err := c.Make(0, bytes.NewReader(other)); err != nil || d != Sum(b) {
		t.Errorf("made again: %s, %v", d, err)
	}
	if !bytes.Equal(read(t, c), b) {
		t.Error("other bytes took the place of the first")
	}
}

func TestLayoutChanges(t *testing.T) {
	b, m := blob(6, 2*MinPieceSize)
	s := open(t, t.TempDir(), StoreConfig{Quota: 3 * MinPieceSize})
	c := create(t, s, m)
	fill(t, c, b)
	again := create(t, s, m)
	if have := again.Have(); !have.Full() {
		t.Error("the same layout does not find its pieces")
	}
	again.Release()
	other := m
	other.Layout.PieceSize *= 2
	_, err := s.Create(other)
	wantErr(t, err, ErrInUse)
	c.Release()
	c = create(t, s, other)
	if have := c.Have(); have.Len() != 0 || have.Cap() != 1 {
		t.Error("another layout finds pieces of the old one")
	}
	if u := s.Usage(); u.Reserved != 0 || u.Tasks != 1 || u.Evicted != 0 {
		t.Errorf("usage %+v", u)
	}
}

// TestWindowsLeaveRoom has a window take all that it may: what is small still has
// a place beside it, though nothing can be evicted.
func TestWindowsLeaveRoom(t *testing.T) {
	s := open(t, t.TempDir(), StoreConfig{Quota: 48 * MinPieceSize})
	b, m := blob(30, 64*MinPieceSize)
	m.Window = true
	fill(t, create(t, s, m), b)
	b, m = blob(31, 342)
	fill(t, create(t, s, m), b)
	if u := s.Usage(); u.Reserved > u.Quota || u.Reserved < u.Quota*3/4 {
		t.Errorf("%d of %d bytes taken", u.Reserved, u.Quota)
	}
}

// Two contents that do not both fit: the one that came first becomes whole.
func TestOneOfTwoBecomesWhole(t *testing.T) {
	s := open(t, t.TempDir(), StoreConfig{Quota: 200 * MinPieceSize})
	b, m := blob(40, 160*MinPieceSize)
	first := create(t, s, m)
	_, second := blob(41, 160*MinPieceSize)
	_, err := s.Create(second)
	wantErr(t, err, ErrQuota)
	fill(t, first, b)
	_, err = s.Create(second)
	wantErr(t, err, ErrQuota)
	first.Release()
	if _, err = s.Create(second); err != nil {
		t.Error(err)
	}
}

func TestEviction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		var evicted []TaskID
		cfg := StoreConfig{Quota: 4 * MinPieceSize}
		cfg.OnEvict = func(id TaskID) { evicted = append(evicted, id) }
		s := open(t, dir, cfg)
		ids := make([]TaskID, 5)
		for i := range ids {
			b, m := blob(uint64(10+i), MinPieceSize)
			ids[i] = m.ID
			if i < 4 {
				put(t, s, m, b)
			}
			<-time.After(2 * stampAfter) // of the bubble's clock
		}
		pinned := get(t, s, ids[1]) // and so are 2 and 3 less recently used than 0
		twice := get(t, s, ids[1])
		twice.Release()
		twice.Release()
		get(t, s, ids[0]).Release()
		<-time.After(time.Second)

		_, tooBig := blob(20, 5*MinPieceSize)
		_, err := s.Create(tooBig)
		wantErr(t, err, ErrQuota)
		_, pinnedOut := blob(21, 4*MinPieceSize)
		_, err = s.Create(pinnedOut)
		wantErr(t, err, ErrQuota)
		if len(evicted) != 0 {
			t.Fatalf("%d evicted for what could not fit", len(evicted))
		}

		b, m := blob(22, 2*MinPieceSize)
		put(t, s, m, b)
		if !slices.Equal(evicted, ids[2:4]) {
			t.Fatalf("evicted %v, want %v", evicted, ids[2:4])
		}
		_, err = s.Get(ids[2])
		wantErr(t, err, ErrNotFound)
		if !pinned.Has(0) {
			t.Error("the pinned one lost its piece")
		}
		<-time.After(time.Second)
		pinned.Release()
		u := s.Usage()
		if want := (Usage{Reserved: 4 * MinPieceSize, Quota: 4 * MinPieceSize, Tasks: 3, Evicted: 2}); u != want {
			t.Errorf("usage %+v, want %+v", u, want)
		}
		used := time.Now()
		get(t, s, m.ID).Release()
		<-time.After(time.Second)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}

		// A smaller quota at the next start: last uses have lasted.
		<-time.After(time.Hour)
		s = open(t, dir, StoreConfig{Quota: 3 * MinPieceSize})
		var left []TaskID
		for _, h := range s.Tasks() {
			left = append(left, h.ID)
			if h.ID == m.ID && !h.LastUse.Equal(used) {
				t.Errorf("last used %s after it was", h.LastUse.Sub(used))
			}
		}
		want := []TaskID{m.ID, ids[1]}
		slices.Sort(want)
		if !slices.Equal(left, want) {
			t.Errorf("left %v, want %v", left, want)
		}
	})
}

// TestClaims has contents begun that are said to be as large as the quota: nothing
// goes for that, only for what comes of them, and what nothing has come of is not kept.
func TestClaims(t *testing.T) {
	const quota = 64
	s := open(t, t.TempDir(), StoreConfig{Quota: quota * MinPieceSize})
	for i := range uint64(quota) {
		b, m := blob(100+i, MinPieceSize)
		put(t, s, m, b)
	}
	b, m := blob(90, quota*MinPieceSize)
	c := create(t, s, m)
	_, idle := blob(91, quota*MinPieceSize)
	create(t, s, idle).Release()
	if u := s.Usage(); u.Evicted != 0 || u.Tasks != quota+1 || u.Reserved != u.Quota {
		t.Fatalf("a claim alone leaves %+v", u)
	}
	other, om := blob(92, MinPieceSize)
	late := create(t, s, om)
	for i := range m.Layout.Count() {
		if _, err := c.Make(i, bytes.NewReader(piece(m.Layout, b, i))); err != nil {
			t.Fatal(err)
		}
		came := int(m.Layout.Offset(i+1) / MinPieceSize)
		if u := s.Usage(); u.Evicted < came || u.Evicted > came+quota/slackShare || u.Reserved > u.Quota {
			t.Fatalf("%+v when %d have come", u, came)
		}
	}
	_, err := late.Make(0, bytes.NewReader(other))
	wantErr(t, err, ErrQuota)
	c.Release()
	fill(t, late, other)
	if u := s.Usage(); u.Tasks != 1 || u.Reserved != MinPieceSize {
		t.Errorf("usage %+v", u)
	}
}

func TestRemove(t *testing.T) {
	b, m := blob(30, 2*MinPieceSize)
	s := open(t, t.TempDir(), StoreConfig{})
	c := create(t, s, m)
	if _, err := c.Make(0, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	early := get(t, s, m.ID).NewReader(t.Context(), 0, m.Layout.Length)
	waited := make(chan error)
	go func() { waited <- c.Wait(context.Background(), 1) }()
	if err := s.Remove(m.ID); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-waited, ErrGone)
	wantErr(t, s.Remove(m.ID), ErrNotFound)

	// Another life of the same task is none of the old content's business.
	next := create(t, s, m)
	if next.Has(0) {
		t.Error("removed pieces came back")
	}
	_, err := c.CopyRange(io.Discard, 0, 1)
	wantErr(t, err, ErrGone)
	wantErr(t, c.AddPublic("docker.io/x"), ErrGone)
	wantErr(t, c.Wait(t.Context(), 1), ErrGone)
	_, err = c.Make(1, bytes.NewReader(b[MinPieceSize:]))
	wantErr(t, err, ErrGone)
	got, err := io.ReadAll(early)
	wantErr(t, err, ErrGone)
	if !bytes.Equal(got, b[:MinPieceSize]) {
		t.Errorf("an open reader kept %d bytes of what it had", len(got))
	}
	c.Release()
	fill(t, next, b)
	if !bytes.Equal(read(t, next), b) {
		t.Error("the next life has other bytes")
	}
	if u := s.Usage(); u.Tasks != 1 || u.Reserved != m.Layout.Length {
		t.Errorf("usage %+v", u)
	}
}

// TestRemoveWhileMade: a task removed between its entry in the map and its
// directory leaves nothing on the disk.
func TestRemoveWhileMade(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, StoreConfig{})
	_, m := blob(33, 10)
	c, _, err := s.create(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(m.ID); err != nil {
		t.Fatal(err)
	}
	wantErr(t, c.ready(), ErrGone)
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || entries[0].Name() != lockName {
		t.Errorf("left: %v, %v", entries, err)
	}
	if u := s.Usage(); u != (Usage{}) {
		t.Errorf("usage %+v", u)
	}
}

// TestCreateFails: a directory that cannot be made leaves no task and no
// reservation, and the next Create works.
func TestCreateFails(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, StoreConfig{Quota: 2 * MinPieceSize})
	_, m := blob(34, 2*MinPieceSize)
	nextInTheWay(t, s, dir)
	_, err := s.Create(m)
	wantErr(t, err, os.ErrExist)
	if u := s.Usage(); u.Reserved != 0 || u.Tasks != 0 {
		t.Errorf("usage %+v", u)
	}
	// The remains of a removal that failed are no obstacle.
	if err := os.MkdirAll(filepath.Join(dir, taskDir(m.ID), "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	create(t, s, m)
}

// nextInTheWay makes the next temporary name one that is in use.
func nextInTheWay(tb testing.TB, s *Store, dir string) {
	tb.Helper()
	name := filepath.Join(dir, fmt.Sprintf("%s%d", tempPrefix, s.temps.Load()+1))
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		tb.Fatal(err)
	}
}

// TestPut: a content of one piece is kept at once, or not at all.
func TestPut(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, StoreConfig{})
	b, m := blob(35, 20_000)
	c := create(t, s, m)
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("before its piece it has %v, %v", entries, err)
	}
	if err := c.AddPublic("docker.io/x"); err != nil {
		t.Fatal(err)
	}
	nextInTheWay(t, s, dir)
	wantErr(t, c.Put(b), os.ErrExist)
	if c.Has(0) || c.Complete() {
		t.Error("it has what could not be written")
	}
	if err := c.Put(b[1:]); err == nil {
		t.Error("a part was taken for the whole")
	}
	if err := c.SetDigests(0, digestsOf(m.Layout, b)); err != nil {
		t.Fatal(err)
	}
	var bad *DigestError
	if err := c.Put(make([]byte, len(b))); !errors.As(err, &bad) {
		t.Errorf("wrong bytes: %v", err)
	}
	waited := make(chan error)
	go func() { waited <- c.Wait(t.Context(), 0) }()
	for range 2 { // the second time it has them
		if err := c.Put(b); err != nil {
			t.Fatal(err)
		}
	}
	wantErr(t, <-waited, nil)
	if m := c.Meta(); !m.Complete || len(m.Public) != 1 || !bytes.Equal(read(t, c), b) {
		t.Errorf("%+v", m)
	}
	// Damaged on the disk it is found out after a crash, and put again.
	shot := snapshot(t, dir)
	if checkTruth(t, open(t, shot, StoreConfig{}), m, b) != 1 {
		t.Error("lost")
	}
	shot = snapshot(t, dir)
	flip(t, filepath.Join(shot, taskDir(m.ID), contentName), 7)
	again := open(t, shot, StoreConfig{})
	if c = create(t, again, m); c.Has(0) || c.Complete() {
		t.Error("damage is believed")
	}
	if err := c.Put(b); err != nil || !c.Complete() || !bytes.Equal(read(t, c), b) {
		t.Errorf("put again: %v", err)
	}
	if _, m := blob(36, 2*MinPieceSize); create(t, s, m).Put(make([]byte, 2*MinPieceSize)) == nil {
		t.Error("more than one piece is put")
	}
}

func TestCloseEndsWaits(t *testing.T) {
	b, m := blob(31, MinPieceSize)
	s := open(t, t.TempDir(), StoreConfig{})
	c := create(t, s, m)
	waited := make(chan error)
	go func() { waited <- c.Wait(context.Background(), 0) }()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-waited, ErrClosed)
	_, err := c.Make(0, bytes.NewReader(b))
	wantErr(t, err, ErrClosed)
	_, err = s.Get(m.ID)
	wantErr(t, err, ErrClosed)
	_, err = s.Create(m)
	wantErr(t, err, ErrClosed)
	wantErr(t, s.Remove(m.ID), ErrClosed)
	if err := s.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
}

func TestSecondOpener(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, StoreConfig{})
	_, err := OpenStore(dir, StoreConfig{})
	wantErr(t, err, ErrLocked)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir, StoreConfig{})
}

func TestCreateRefuses(t *testing.T) {
	s := open(t, t.TempDir(), StoreConfig{})
	_, good := blob(32, 10)
	for name, edit := range map[string]func(*Meta){
		"path":     func(m *Meta) { m.ID = "sha256:../../etc" },
		"empty":    func(m *Meta) { m.ID = "" },
		"layout":   func(m *Meta) { m.Layout.PieceSize = 3 },
		"huge":     func(m *Meta) { m.Layout.PieceSize = 1 << 40 },
		"negative": func(m *Meta) { m.Layout.Length = -1 },
		"public":   func(m *Meta) { m.Public = []string{string(make([]byte, maxName+1))} },
	} {
		m := good
		edit(&m)
		if _, err := s.Create(m); err == nil {
			t.Errorf("%s: a task is made of it", name)
		}
	}
	if u := s.Usage(); u != (Usage{}) {
		t.Errorf("usage %+v", u)
	}
}
