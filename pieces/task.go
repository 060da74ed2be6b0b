package pieces

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"sync"
	"time"
)

// task is one task of a store; all its Contents share it.
type task struct {
	store  *Store
	id     TaskID
	layout Layout
	dir    string
	gone   chan struct{} // closed when the store has dropped t or is closed itself

	// Guarded by store.mu.
	pins    int
	room    int64      // bytes reserved: what is there and being written, of a window what it may have
	coming  int64      // of them being written, but of a window
	made    bool       // its directory exists; that of a single piece is made with the piece in it
	lastUse time.Time  // in memory
	stamped time.Time  // on disk
	spare   []*os.File // the content, open, for the next copy; none while it is not pinned

	// disk is held while the directory is made, the record or the metadata is
	// written, and a piece in doubt is verified. It is taken before the other two
	// and guards recordEnd.
	disk      sync.Mutex
	recordEnd int64

	// mu guards what follows.
	mu      sync.Mutex
	meta    Meta
	have    Set      // pieces recorded as present
	good    Set      // those of them that are verified
	fresh   Set      // those that were since freshFrom, and nobody else has written to the file
	near    Set      // those that are not dropped to make room, there or not
	digests []Digest // nil while t is not pinned, to save memory; a digest once known stays known
	waiters map[int]chan struct{}
	dirty   bool  // the content or the record is not synced
	suspect bool  // the record on disk may be wrong about what is there
	lent    bool  // connections may be reading the content's file, which stays as it is
	why     error // why gone is closed

	freshFrom time.Time
	stamp     stamp // of the content when it was last looked at, once it is all there
	readings  []reading
}

func newTask(s *Store, m Meta) *task {
	m.Public, m.Origins = slices.Clone(m.Public), slices.Clone(m.Origins)
	return &task{
		freshFrom: time.Now(), fresh: NewSet(m.Layout.Count()),
		store: s, id: m.ID, layout: m.Layout, dir: taskDir(m.ID),
		gone:    make(chan struct{}),
		lastUse: time.Now(),
		meta:    m,
		have:    NewSet(m.Layout.Count()),
		good:    NewSet(m.Layout.Count()),
	}
}

func (t *task) isMade() bool {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	return t.made
}

// end marks t as no longer in the store.
func (t *task) end(why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.why == nil {
		t.why = why
		close(t.gone)
	}
}

// ended returns why t is no longer in the store, nil when it is.
func (t *task) ended() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.why
}

// settleDown makes durable what t has, and tells whether its record can be
// trusted when it is next read. t has ended, so nothing is added meanwhile.
func (t *task) settleDown() bool {
	t.disk.Lock()
	defer t.disk.Unlock()
	t.mu.Lock()
	dirty, sure := t.dirty, !t.suspect && t.have.Len() == t.good.Len()
	t.mu.Unlock()
	return sure && (!dirty || t.sync() == nil)
}

// sync makes the content and its record durable.
func (t *task) sync() error {
	t.mu.Lock()
	t.dirty = false
	t.mu.Unlock()
	err := t.store.sync(path.Join(t.dir, contentName), path.Join(t.dir, recordName))
	if err != nil {
		// The kernel reports a failed write once; a later sync proves nothing.
		t.mu.Lock()
		t.dirty, t.suspect = true, true
		t.mu.Unlock()
	}
	return err
}

// Meta returns what the task is. Its Complete takes the record's word for the
// pieces that are yet to be verified.
func (t *task) Meta() Meta {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.meta
	m.Public, m.Origins = slices.Clone(m.Public), slices.Clone(m.Origins)
	m.Complete = m.Complete && t.have.Full()
	return m
}

// Have returns the pieces present, among them after an unclean end those that
// are yet to be verified: Has is the one to ask before use.
func (t *task) Have() Set {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.have.Clone()
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
	return ErrGone
}

// writeMeta replaces the task's metadata, on disk where there is something of it
// and then in memory. t.disk is held, or t is not yet known to anyone else.
func (t *task) writeMeta(m Meta, durable bool) error {
	s := t.store
	if !t.isMade() {
		t.mu.Lock()
		t.meta = m
		t.mu.Unlock()
		return nil
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var temp string
	err = s.retried(int64(len(b)), func() (err error) {
		temp, err = s.writeTemp(b)
		return err
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	if err = t.ended(); err == nil {
		err = s.rename(temp, path.Join(t.dir, metaName))
	}
	s.mu.Unlock()
	if err != nil {
		_ = s.removeAll(temp)
		return err
	}
	t.mu.Lock()
	t.meta = m
	t.mu.Unlock()
	if !durable {
		return nil
	}
	return s.sync(t.dir, ".")
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
