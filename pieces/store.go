package pieces

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Errors that callers branch on; they come wrapped with the task they are about.
var (
	ErrNotFound = errors.New("not in the store")
	ErrInUse    = errors.New("in use with another layout")
	ErrQuota    = errors.New("no room below the quota")
	ErrGone     = errors.New("removed from the store")
	ErrClosed   = errors.New("store is closed")
	ErrLocked   = errors.New("in use by another process")
	ErrMissing  = errors.New("not present")
	ErrConflict = errors.New("contradicts the known digest")
	ErrNoDigest = errors.New("digest is not known")
)

// Names in a store's directory. A task's directory is named by its id with '-'
// for ':'; every other name is left alone.
const (
	lockName    = "lock"      // held with flock while a process has the store open
	cleanName   = "clean"     // the last end was clean; lists the tasks in doubt all the same
	tempPrefix  = "tmp-"      // on its way in by rename, or on its way out
	contentName = "content"   // in a task's directory: the content's own bytes, sparse
	metaName    = "meta.json" // in a task's directory: its Meta
	recordName  = "pieces"    // in a task's directory: see record.go
)

// stampAfter is how far the last use on disk may lag behind the real one.
const stampAfter = time.Minute

// StoreConfig is what a store may be told.
type StoreConfig struct {
	// Quota is the most bytes of content kept, 0 for no bound. A task counts with
	// what has come of it, whatever its length is said to be.
	Quota int64
	// KeepFree is how many bytes of the file system are left free, at most half of
	// it: what is not in use is evicted for that, and nothing new begun; 0 for none.
	KeepFree int64
	// OnEvict, where set, is called with each task evicted to make room, and OnLost
	// with pieces that were there and are no longer, since they were found wrong or
	// dropped to make room: without locks held, by whoever found out or needed it.
	OnEvict func(TaskID)
	OnLost  func(TaskID, []int)

	before func(*op) error // of tests: called before each change on the disk, which an error prevents
	perm   func(int) []int // of tests: orders what is dropped of windows
}

// Store keeps the contents of tasks in one directory on disk. Its methods may be
// called by any number of goroutines.
type Store struct {
	root    *os.Root
	lock    *os.File
	cfg     StoreConfig
	temps   atomic.Int64  // makes temporary names unique
	buffers [25]sync.Pool // of *[]byte, by the exponent of their size
	hashes  sync.Pool     // of hash.Hash

	making sync.Mutex // held while room is made for a piece; taken before mu

	// mu guards what follows, and which task's files the names on disk are: they
	// change only while it is held. It is taken before a task's mu and after its disk.
	mu     sync.Mutex
	tasks  map[TaskID]*task
	used   int64 // bytes reserved
	coming int64 // of them being written
	counts Usage // what has happened
	lost   []loss
	closed bool
}

// Held is a task in the store.
type Held struct {
	Meta
	Have    Set // the caller's own; after an unclean end with pieces that are yet to be verified
	LastUse time.Time
}

// OpenStore opens the store in dir, which it makes when it is missing. Only one
// process can have it open: another gets ErrLocked. Tasks that are damaged are
// dropped; after an end without Close each piece is verified before its first use.
func OpenStore(dir string, cfg StoreConfig) (*Store, error) {
	if cfg.perm == nil {
		cfg.perm = rand.Perm
	}
	s := &Store{cfg: cfg, tasks: make(map[TaskID]*task)}
	err := s.open(dir)
	if err == nil {
		return s, nil
	}
	if s.lock != nil {
		_ = s.lock.Close()
	}
	if s.root != nil {
		_ = s.root.Close()
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("open store %s: %w: give it and all in it to uid %d (chown -R), or choose another directory",
			dir, err, os.Geteuid())
	}
	return nil, fmt.Errorf("open store %s: %w", dir, err)
}

func (s *Store) open(dir string) (err error) {
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if s.root, err = os.OpenRoot(dir); err != nil {
		return err
	}
	if s.lock, err = s.root.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if err = syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return ErrLocked
		}
		return fmt.Errorf("lock: %w", err)
	}
	trusted, err := s.takeMarker()
	if err != nil {
		return err
	}
	if err := s.load(trusted); err != nil {
		return err
	}
	s.mu.Lock()
	trash, _ := s.makeRoomLocked(0, false)
	s.mu.Unlock()
	s.discard(trash)
	return nil
}

// takeMarker removes the marker of a clean end, so that whatever ends this
// process from here on counts as unclean, and returns which tasks need no
// verifying.
func (s *Store) takeMarker() (trusted func(TaskID) bool, err error) {
	nobody := func(TaskID) bool { return false }
	b, err := s.readFile(cleanName)
	if errors.Is(err, fs.ErrNotExist) {
		return nobody, nil
	}
	var doubtful []TaskID
	if err == nil {
		err = json.Unmarshal(b, &doubtful)
	}
	if err := errors.Join(s.removeAll(cleanName), s.sync(".")); err != nil {
		return nil, err
	}
	if err != nil { // a marker that cannot be read says nothing
		return nobody, nil
	}
	return func(id TaskID) bool { return !slices.Contains(doubtful, id) }, nil
}

// load sweeps temporary names and reads every task, dropping those it cannot.
func (s *Store) load(trusted func(TaskID) bool) error {
	entries, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		id, isTask := dirTask(e.Name())
		if isTask {
			err := s.loadTask(id, trusted(id))
			if errors.Is(err, fs.ErrPermission) {
				return err
			}
			if err == nil {
				continue
			}
		}
		if isTask || strings.HasPrefix(e.Name(), tempPrefix) {
			if err := s.removeAll(e.Name()); errors.Is(err, fs.ErrPermission) {
				return err
			}
		}
	}
	return nil
}

// Dir returns the directory of the store. Its owner may keep small files of its
// own there, under names that are no task's and no temporary ones.
func (s *Store) Dir() string { return s.root.Name() }

// Close ends the use of the store: all that it has is made durable, so that the
// next OpenStore can trust it, and waiting readers get ErrClosed. Contents that
// are still pinned serve what they have open and take no more pieces.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	tasks := make([]*task, 0, len(s.tasks))
	for _, t := range s.tasks {
		t.end(ErrClosed)
		tasks = append(tasks, t)
		if t.made && t.lastUse.After(t.stamped) {
			_ = s.root.Chtimes(t.dir, t.lastUse, t.lastUse) // the order of eviction is not worth an error
		}
	}
	s.mu.Unlock()

	doubtful := []TaskID{}
	for _, t := range tasks {
		if !t.settleDown() {
			doubtful = append(doubtful, t.id)
		}
	}
	err := s.writeMarker(doubtful)
	return errors.Join(err, s.root.Close(), s.lock.Close())
}

func (s *Store) writeMarker(doubtful []TaskID) error {
	b, err := json.Marshal(doubtful)
	if err != nil {
		return err
	}
	temp, err := s.writeTemp(b)
	if err != nil {
		return fmt.Errorf("mark the clean end: %w", err)
	}
	if err := s.rename(temp, cleanName); err != nil {
		return fmt.Errorf("mark the clean end: %w", err)
	}
	return s.sync(".")
}

// Create returns the content of the task m.ID, pinned: the existing one with all
// its pieces where the layout is the same, else a new one without any, made from
// m.ID, m.Layout, m.MediaType, m.Public and m.Origins. One with another layout is replaced
// when nothing uses it; else the error is ErrInUse. Where the quota or the file
// system demands it, the least recently used tasks without pins are evicted, as
// pieces come; ErrQuota when that would not be enough: then m.Window may help, see
// window.go, whose room is made at once. ErrGone says that the task was removed meanwhile.
func (s *Store) Create(m Meta) (*Content, error) {
	m.Complete = false
	if err := m.validate(); err != nil {
		return nil, fmt.Errorf("create task: %w", err)
	}
	c, trash, err := s.create(m)
	s.discard(trash)
	if err != nil && errors.Is(err, ErrQuota) && s.shrink() {
		c, trash, err = s.create(m)
		s.discard(trash)
	}
	if err == nil {
		err = c.ready()
	}
	s.deliver()
	if err != nil {
		return nil, fmt.Errorf("create task %s: %w", m.ID, err)
	}
	return c, nil
}

// create finds the task for m or puts a new one into the map, pinned.
func (s *Store) create(m Meta) (c *Content, trash []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, ErrClosed
	}
	t := s.tasks[m.ID]
	if t != nil && t.layout == m.Layout {
		if err := s.wholeLocked(t, m.Window); err != nil {
			return nil, nil, err
		}
		return s.pinLocked(t), nil, nil
	}
	if t != nil {
		if t.pins > 0 {
			return nil, nil, ErrInUse
		}
		temp, err := s.dropLocked(t)
		if err != nil {
			return nil, nil, err
		}
		trash = append(trash, temp)
	}
	t = newTask(s, m)
	if !m.Window {
		_, err = s.shortLocked(m.Layout.Length+s.claimsLocked(m.Layout), false)
	} else {
		var more []string
		t.room, more, err = s.windowLocked(m.Layout, 0)
		trash = append(trash, more...)
	}
	if err != nil {
		return nil, trash, err
	}
	s.addLocked(t)
	return s.pinLocked(t), trash, nil
}

// Get returns the content of a task, pinned, or ErrNotFound.
func (s *Store) Get(id TaskID) (*Content, error) { return s.get(id, s.pinLocked) }

// Look is Get for who only looks: it is no use of the task, which goes as soon.
func (s *Store) Look(id TaskID) (*Content, error) { return s.get(id, s.lookLocked) }

func (s *Store) get(id TaskID, pinLocked func(*task) *Content) (*Content, error) {
	s.mu.Lock()
	t, err := s.findLocked(id)
	var c *Content
	if err == nil {
		c = pinLocked(t)
	}
	s.mu.Unlock()
	if err == nil {
		err = c.ready()
	}
	if errors.Is(err, ErrGone) { // meanwhile, or its record is damaged
		err = ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", clip(string(id)), err)
	}
	return c, nil
}

// Remove takes a task out of the store at once, also while it is in use: who
// waits for a piece of it gets ErrGone, who has it open keeps what is there.
func (s *Store) Remove(id TaskID) error {
	s.mu.Lock()
	t, err := s.findLocked(id)
	var temp string
	if err == nil {
		temp, err = s.dropLocked(t)
	}
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove task %s: %w", clip(string(id)), err)
	}
	s.discard([]string{temp})
	return nil
}

func (s *Store) findLocked(id TaskID) (*task, error) {
	if s.closed {
		return nil, ErrClosed
	}
	t := s.tasks[id]
	if t == nil {
		return nil, ErrNotFound
	}
	return t, nil
}

// Tasks returns all tasks, in the order of their ids.
func (s *Store) Tasks() []Held {
	s.mu.Lock()
	defer s.mu.Unlock()
	held := make([]Held, 0, len(s.tasks))
	for _, t := range s.tasks {
		if t.made {
			held = append(held, Held{Meta: t.Meta(), Have: t.Have(), LastUse: t.lastUse})
		}
	}
	slices.SortFunc(held, func(a, b Held) int { return cmp.Compare(a.ID, b.ID) })
	return held
}

func (s *Store) tempName() string {
	return tempPrefix + strconv.FormatInt(s.temps.Add(1), 10)
}
