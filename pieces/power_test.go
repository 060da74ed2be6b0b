package pieces

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

var (
	crashes   = flag.Int("crashes", 60, "random power cuts of TestPowerCut")
	crashSeed = flag.Uint64("crash-seed", 0, "the one workload to repeat; 0 for new ones")
)

// A journal is what a store does to its disk, in order, so that any state can be
// made of it that a power cut may leave: what was not synced is there, or is not,
// or is there in part.
type journal struct {
	tb    testing.TB
	dir   string
	root  *node
	files map[*os.File]*node
	steps []step
}

// node is a file, or a directory with what it holds as the running process sees it.
type node struct {
	entries map[string]*node // nil for a file
}

// step is one op: of entries of directories, or of a file's bytes, or a sync.
type step struct {
	op
	b        []byte
	node     *node // the file; or what is made, moved or removed
	dir, to  *node
	from, as string // names in these directories
}

func newJournal(tb testing.TB, dir string) *journal {
	tb.Helper()
	return &journal{tb: tb, dir: dir, root: &node{entries: map[string]*node{}}, files: map[*os.File]*node{}}
}

// find returns the directory that a name is in, and its last part.
func (j *journal) find(name string) (dir *node, base string) {
	dir = j.root
	if d := path.Dir(name); d != "." {
		if dir = j.root.entries[d]; dir == nil {
			return &node{entries: map[string]*node{}}, path.Base(name) // gone meanwhile
		}
	}
	return dir, path.Base(name)
}

// fileNode returns the node that an open file is of.
func (j *journal) fileNode(f *os.File) *node {
	n := j.files[f]
	if n == nil {
		name, err := filepath.Rel(j.dir, f.Name())
		if err != nil {
			j.tb.Fatal(err)
		}
		if n = j.root; name != "." {
			dir, base := j.find(name)
			n = dir.entries[base]
		}
		j.files[f] = n
	}
	return n
}

// before notes an op; it is a store's hook.
func (j *journal) before(o *op) error {
	s := step{op: *o, b: bytes.Clone(o.b)}
	switch o.kind {
	case opRead:
		return nil
	case opMkdir, opCreate:
		s.to, s.as = j.find(o.name)
		s.node = &node{}
		if o.kind == opMkdir {
			s.node.entries = map[string]*node{}
		}
		s.to.entries[s.as] = s.node
	case opRename:
		s.dir, s.from = j.find(o.name)
		s.to, s.as = j.find(o.to)
		s.node = s.dir.entries[s.from]
		if s.node == nil {
			return nil
		}
		delete(s.dir.entries, s.from)
		s.to.entries[s.as] = s.node
	case opRemove:
		s.dir, s.from = j.find(o.name)
		s.node = s.dir.entries[s.from]
		delete(s.dir.entries, s.from)
	default:
		if s.node = j.fileNode(o.file); s.node == nil {
			return nil
		}
	}
	j.steps = append(j.steps, s)
	return nil
}

// cut writes to dir what a power cut after n steps may leave, in the middle of
// the next one.
func (j *journal) cut(rnd *rand.Rand, n int, dir string) {
	j.tb.Helper()
	synced := make(map[*node]int) // the last sync of it
	for i, s := range j.steps[:n] {
		if s.kind == opSync {
			synced[s.node] = i
		}
	}
	durable := func(i int, n *node) bool { at, ok := synced[n]; return ok && at > i }
	kept := []float64{0, .3, .7, 1}[rnd.IntN(4)] // of what is not synced
	entries := map[*node]map[string]*node{}
	at := func(d *node) map[string]*node {
		if entries[d] == nil {
			entries[d] = map[string]*node{}
		}
		return entries[d]
	}
	bytesOf := map[*node][]byte{}
	for i, s := range j.steps[:min(n+1, len(j.steps))] {
		switch s.kind {
		case opSync:
		case opWrite, opTruncate, opPunch:
			part := s.n
			if !durable(i, s.node) && rnd.Float64() >= kept || i == n {
				part = rnd.Int64N(s.n + 1)
				if rnd.IntN(2) == 0 || s.kind == opTruncate {
					continue
				}
			}
			bytesOf[s.node] = s.apply(bytesOf[s.node], part)
		default:
			if i == n || !durable(i, s.to) && !durable(i, s.dir) && rnd.Float64() >= kept {
				continue
			}
			if s.dir != nil && at(s.dir)[s.from] == s.node {
				delete(at(s.dir), s.from)
			}
			if s.to != nil {
				at(s.to)[s.as] = s.node
			}
		}
	}
	j.write(j.root, dir, entries, bytesOf)
}

// apply makes the first n bytes of a change of b.
func (s *step) apply(b []byte, n int64) []byte {
	if s.kind == opTruncate {
		return append(b[:min(s.n, int64(len(b)))], make([]byte, max(0, s.n-int64(len(b))))...)
	}
	if more := s.off + n - int64(len(b)); more > 0 && s.kind == opWrite {
		b = append(b, make([]byte, more)...)
	}
	if s.kind == opPunch {
		clear(b[min(s.off, int64(len(b))):min(s.off+n, int64(len(b)))])
	} else {
		copy(b[s.off:], s.b[:n])
	}
	return b
}

func (j *journal) write(n *node, name string, entries map[*node]map[string]*node, bytesOf map[*node][]byte) {
	j.tb.Helper()
	if n.entries == nil {
		if err := os.WriteFile(name, bytesOf[n], 0o600); err != nil {
			j.tb.Fatal(err)
		}
		return
	}
	if err := os.MkdirAll(name, 0o700); err != nil {
		j.tb.Fatal(err)
	}
	for base, e := range entries[n] {
		j.write(e, filepath.Join(name, base), entries, bytesOf)
	}
}

// workload is a store that is used at random, one thing after the other.
type workload struct {
	*journal
	rnd     *rand.Rand
	store   *Store
	metas   []Meta
	bytes   [][]byte
	durable map[TaskID]int // after so many steps it was said to be on the disk
	gone    map[TaskID]int // after so many it may be gone again
}

func newWorkload(tb testing.TB, seed uint64) *workload {
	tb.Helper()
	dir := filepath.Join(tb.TempDir(), "store")
	w := &workload{
		journal: newJournal(tb, dir), rnd: rand.New(rand.NewPCG(seed, 7)),
		durable: map[TaskID]int{}, gone: map[TaskID]int{},
	}
	for i, n := range []int{0, 20_000, LeastPieceSize, 3*LeastPieceSize - 5, 6 * LeastPieceSize, 12*LeastPieceSize + 9} {
		b, m := blob(seed<<4+uint64(i), n)
		m.Layout.PieceSize = LeastPieceSize
		w.metas, w.bytes = append(w.metas, m), append(w.bytes, b)
	}
	w.reopen()
	return w
}

func (w *workload) reopen() {
	w.tb.Helper()
	if w.store != nil {
		if err := w.store.Close(); err != nil {
			w.tb.Fatal(err)
		}
	}
	w.store = open(w.tb, w.dir, StoreConfig{Quota: 16 * LeastPieceSize, perm: w.rnd.Perm, before: func(o *op) error {
		if o.kind == opRename {
			if id, ok := dirTask(o.name); ok && strings.HasPrefix(o.to, tempPrefix) {
				w.gone[id] = len(w.steps)
				delete(w.durable, id)
			}
		}
		return w.before(o)
	}})
}

// act does one thing at random.
func (w *workload) act() {
	w.tb.Helper()
	k := w.rnd.IntN(len(w.metas))
	m, b := w.metas[k], w.bytes[k]
	switch w.rnd.IntN(10) {
	case 0:
		w.reopen()
		return
	case 1:
		_ = w.store.Remove(m.ID) // which may not be there
		return
	}
	m.Window = m.Layout.Count() > 8 && w.rnd.IntN(2) == 0
	c, err := w.store.Create(m)
	if err != nil {
		w.tb.Fatal(err) // nothing else is pinned
	}
	defer c.Release()
	if m.Window && m.Layout.Count() > 8 && !c.IsWindow() && w.rnd.IntN(2) == 0 {
		_ = c.Narrow()
	}
	if m.Layout.Count() == 1 && w.rnd.IntN(2) == 0 {
		if err := c.Put(b); err != nil {
			w.tb.Fatal(err)
		}
		return
	}
	part := w.rnd.Float64() * 1.5
	for _, i := range w.rnd.Perm(m.Layout.Count()) {
		if w.rnd.Float64() < part {
			if _, err := c.Make(i, bytes.NewReader(piece(m.Layout, b, i))); err != nil {
				w.tb.Fatal(err)
			}
		}
	}
	if c.IsWindow() {
		w.spoil(c)
		return
	}
	if err := c.SetComplete(); err == nil {
		w.durable[m.ID] = len(w.steps)
	} else if !errors.Is(err, ErrMissing) {
		w.tb.Fatal(err)
	}
	if err := c.AddPublic(fmt.Sprint("reg.test/", w.rnd.IntN(4))); err != nil {
		w.tb.Fatal(err)
	}
}

// spoil has a window drop pieces as it does for want of room.
func (w *workload) spoil(c *Content) {
	w.tb.Helper()
	f, err := c.file(&c.content, contentName)
	if err != nil {
		w.tb.Fatal(err)
	}
	w.gone[c.id] = len(w.steps)
	delete(w.durable, c.id)
	c.disk.Lock()
	defer c.disk.Unlock()
	c.give(f, int64(w.rnd.IntN(4))*LeastPieceSize)
}

// TestPowerCut cuts the power at random points of random workloads. Every store
// that is left opens, gives no wrong piece, and has what was said to be on the
// disk.
func TestPowerCut(t *testing.T) {
	const each = 20
	seed := *crashSeed
	rounds := 1
	if seed == 0 {
		seed, rounds = rand.Uint64N(1<<40), (*crashes+each-1)/each
	}
	kept := 0
	for round := range rounds {
		seed := seed + uint64(round)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Logf("again by: go test ./pieces -run TestPowerCut -crash-seed %d", seed)
			w := newWorkload(t, seed)
			for range each {
				for range 1 + w.rnd.IntN(3) {
					w.act()
				}
				kept += w.crash(t)
			}
		})
	}
	if kept == 0 {
		t.Error("nothing was ever kept")
	}
}

// crash cuts the power at some point so far and returns how many pieces are left.
func (w *workload) crash(t *testing.T) (kept int) {
	t.Helper()
	n := w.rnd.IntN(len(w.steps) + 1)
	if w.rnd.IntN(2) == 0 { // of late more is going on
		n = len(w.steps) - w.rnd.IntN(min(40, len(w.steps)))
	}
	dir := filepath.Join(t.TempDir(), "store")
	w.cut(w.rnd, n, dir)
	s, err := OpenStore(dir, StoreConfig{})
	if err != nil {
		t.Fatalf("after %d of %d steps: %v", n, len(w.steps), err)
	}
	for k, m := range w.metas {
		has := checkTruth(t, s, m, w.bytes[k])
		kept += has
		if at, ok := w.durable[m.ID]; ok && at <= n && has < m.Layout.Count() {
			t.Errorf("after %d of %d steps: %d of %d pieces are left of what was on the disk after %d",
				n, len(w.steps), has, m.Layout.Count(), at)
		}
	}
	k := w.rnd.IntN(len(w.metas))
	checkRecovers(t, s, w.metas[k], w.bytes[k])
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	return kept
}
