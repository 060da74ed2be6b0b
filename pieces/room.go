package pieces

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"
)

// slackShare is what part of a bound an eviction frees beyond what is needed, as
// far as whole tasks fit into that: so that not every write evicts.
const slackShare = 32

// Usage is how full a store is, and what has become of its contents since it was
// opened.
type Usage struct {
	Reserved int64 // bytes, each task with what has come of it, a window with what it may have
	Quota    int64 // bytes, 0 for no bound
	Tasks    int

	Evicted  int   // tasks
	Dropped  int   // pieces of windows, to make room for others
	Full     int   // writes for which there was no room on the disk
	Scrubbed int64 // bytes verified in the background
	Rotten   int   // pieces that were found wrong or unreadable
}

// Usage tells how full the store is.
func (s *Store) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.counts
	u.Reserved, u.Quota, u.Tasks = s.used, s.cfg.Quota, len(s.tasks)
	return u
}

// count notes what has happened.
func (s *Store) count(add func(*Usage)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	add(&s.counts)
}

func (s *Store) resizeLocked(t *task, room int64) {
	s.used += room - t.room
	t.room = room
}

func (s *Store) addLocked(t *task) {
	s.tasks[t.id] = t
	s.used += t.room
}

// forgetLocked takes t out of the map; it stands for its id no more.
func (s *Store) forgetLocked(t *task) {
	delete(s.tasks, t.id)
	s.used -= t.room
	t.end(ErrGone)
}

// dropLocked takes t out of the store and returns the name below which its files
// wait to be discarded, "" for none.
func (s *Store) dropLocked(t *task) (temp string, err error) {
	s.forgetLocked(t)
	if !t.made {
		return "", nil
	}
	temp = s.tempName()
	if err := s.rename(t.dir, temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return temp, nil
}

// shortage is how many bytes are to be had by eviction: from the quota, which
// counts what tasks have reserved, and from the file system, which counts what
// they have.
type shortage struct{ quota, disk int64 }

func (n shortage) any() bool { return n.quota > 0 || n.disk > 0 }

// less is n after the eviction of t.
func (n shortage) less(t *task) shortage { return shortage{n.quota - t.room, n.disk - t.held()} }

// missingLocked returns what is missing for n more bytes. With leave, as of windows, a
// share of each bound is left to what is small and has no other place.
func (s *Store) missingLocked(n int64, leave bool) shortage {
	var short shortage
	if s.cfg.Quota > 0 {
		short.quota = s.used + n - s.cfg.Quota
		if leave {
			short.quota += s.cfg.Quota / slackShare
		}
	}
	if s.cfg.KeepFree <= 0 {
		return short
	}
	free, keep, err := s.space()
	if err != nil {
		return short
	}
	short.disk = n + s.coming + keep - free
	if leave {
		short.disk += keep / slackShare
	}
	return short
}

// space returns how many bytes the file system has free, and of them how many
// are to stay so.
func (s *Store) space() (free, keep int64, err error) {
	free, total, err := diskSpace(s.root.Name())
	return free, min(s.cfg.KeepFree, total/2), err
}

// slack is how much more than short an eviction may free.
func (s *Store) slack(short shortage) shortage {
	if short.quota > 0 {
		short.quota += s.cfg.Quota / slackShare
	}
	if short.disk > 0 {
		short.disk += s.cfg.KeepFree / slackShare
	}
	return short
}

// shortLocked is missingLocked, and ErrQuota where no eviction would be enough.
func (s *Store) shortLocked(n int64, leave bool) (shortage, error) {
	short := s.missingLocked(n, leave)
	if !short.any() {
		return short, nil
	}
	all := short
	for _, t := range s.tasks {
		if t.pins == 0 {
			all = all.less(t)
		}
	}
	if all.any() {
		return short, fmt.Errorf("%w: %d bytes wanted, %d too many for the quota of %d, %d for the disk",
			ErrQuota, n, max(0, all.quota), s.cfg.Quota, max(0, all.disk))
	}
	return short, nil
}

// A length is somebody's claim. Nobody is evicted for it; but of two contents that do
// not both fit one should become whole, so a large one begins only beside what those in
// use are still to bring, as far as that is to be believed: this many bytes, and what
// has come so many times.
const (
	believed = 16 << 20
	earned   = 8
)

// claimsLocked returns how many bytes a content with layout l leaves to others, that
// have not come yet.
func (s *Store) claimsLocked(l Layout) (n int64) {
	if Window(l) == l.Length {
		return 0
	}
	for _, t := range s.tasks {
		if t.pins > 0 && !t.IsWindow() {
			n += max(0, min(t.layout.Length, believed+earned*t.held())-t.room)
		}
	}
	return n
}

// makeRoomLocked evicts until n more bytes fit, nobody when that cannot be.
func (s *Store) makeRoomLocked(n int64, leave bool) (trash []string, err error) {
	short, err := s.shortLocked(n, leave)
	if err != nil || !short.any() {
		return nil, err
	}
	return s.evictLocked(short)
}

// reserve makes room for n bytes of a content that is no window. They are being
// written until written says that they are there, or not. No lock is held.
func (c *Content) reserve(n int64) error {
	if c.takeRoom(n) {
		return nil
	}
	s := c.store
	s.making.Lock() // who comes next finds the disk as free as it then is
	defer s.making.Unlock()
	err := c.makeRoom(n)
	if errors.Is(err, ErrQuota) && s.shrink() {
		err = c.makeRoom(n)
	}
	return err
}

// takeRoom is reserve where room is free.
func (c *Content) takeRoom(n int64) bool {
	s := c.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.ended() != nil || s.missingLocked(n, c.leavesLocked(n)).any() {
		return false
	}
	c.takeLocked(n)
	return true
}

// makeRoom is reserve by eviction. s.making is held.
func (c *Content) makeRoom(n int64) error {
	s := c.store
	s.mu.Lock()
	err := c.ended()
	var trash []string
	if err == nil {
		trash, err = s.makeRoomLocked(n, c.leavesLocked(n))
	}
	if err == nil {
		c.takeLocked(n)
	}
	s.mu.Unlock()
	s.discard(trash)
	return err
}

// leavesLocked tells whether n more bytes leave what windows leave: of what is large,
// unless it takes nearly all by itself.
func (c *Content) leavesLocked(n int64) bool {
	quota := c.store.cfg.Quota
	return Window(c.layout) < c.layout.Length && (quota == 0 || c.room+n <= quota-quota/slackShare)
}

func (c *Content) takeLocked(n int64) {
	c.store.resizeLocked(c.task, c.room+n)
	c.store.coming += n
	c.coming += n
}

// written ends the writing of n bytes that reserve made room for: what is there of
// them counts, and no more.
func (c *Content) written(n int64) {
	s := c.store
	s.mu.Lock()
	defer s.mu.Unlock()
	s.coming -= n
	c.coming -= n
	if c.ended() == nil && !c.IsWindow() {
		s.resizeLocked(c.task, c.held()+c.coming)
	}
}

// evictLocked evicts the tasks without pins that were used least recently until
// nothing is short any more, or there are no more; and then what else fits into
// the slack.
func (s *Store) evictLocked(short shortage) (trash []string, err error) {
	var idle []*task
	for _, t := range s.tasks {
		if t.pins == 0 {
			idle = append(idle, t)
		}
	}
	slices.SortFunc(idle, func(a, b *task) int { return a.lastUse.Compare(b.lastUse) })
	low := s.slack(short)
	for _, t := range idle {
		if after := low.less(t); !short.any() && (after.quota < 0 || after.disk < 0) {
			break
		}
		short, low = short.less(t), low.less(t)
		temp, err := s.dropLocked(t)
		if err != nil {
			return trash, fmt.Errorf("evict %s: %w", t.id, err)
		}
		s.counts.Evicted++
		s.lost = append(s.lost, loss{id: t.id})
		trash = append(trash, temp)
	}
	return trash, nil
}

// evict makes room for what is short, and tells whether it could do anything.
func (s *Store) evict(short func() shortage) bool {
	s.mu.Lock()
	before := s.counts.Evicted
	var trash []string
	if n := short(); n.any() && !s.closed {
		trash, _ = s.evictLocked(n) // what could not be renamed is out of the map all the same
	}
	done := s.counts.Evicted > before
	s.mu.Unlock()
	s.discard(trash)
	return done
}

// loss is what the owner of the store is to be told: a task that was evicted, or
// pieces of it that are no longer there.
type loss struct {
	id     TaskID
	pieces []int // nil for the task
}

// deliver tells the owner of the store what was lost. No lock is held: it may
// well call the store.
func (s *Store) deliver() {
	for {
		s.mu.Lock()
		lost := s.lost
		s.lost = nil
		s.mu.Unlock()
		if len(lost) == 0 {
			return
		}
		for _, l := range lost {
			switch {
			case l.pieces == nil && s.cfg.OnEvict != nil:
				s.cfg.OnEvict(l.id)
			case l.pieces != nil && s.cfg.OnLost != nil:
				s.cfg.OnLost(l.id, l.pieces)
			}
		}
	}
}

func (s *Store) lose(id TaskID, pieces ...int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost = append(s.lost, loss{id, pieces})
}

// retried calls write, which needs n bytes on the disk, and where those are not
// there once more after an eviction. No lock but a task's disk is held.
func (s *Store) retried(n int64, write func() error) error {
	err := write()
	if !isFull(err) {
		return err
	}
	s.count(func(u *Usage) { u.Full++ })
	if s.evict(func() shortage { return shortage{disk: n} }) {
		err = write()
	}
	return err
}

// IsFull tells whether err says that there is no room: below the quota, or on the
// disk.
func IsFull(err error) bool { return errors.Is(err, ErrQuota) || isFull(err) }

// isFull tells whether the disk takes no more.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// discard removes what dropLocked left; what cannot be removed now is swept by
// the next OpenStore.
func (s *Store) discard(trash []string) {
	for _, temp := range trash {
		if temp != "" {
			_ = s.removeAll(temp)
		}
	}
}
