package scheduler

import (
	"math/rand/v2"
	"time"
)

// HostID names a host. The caller chooses it and may use it again after HostDown.
type HostID int32

// TaskID names a task. The caller chooses it and may use it again after TaskRemove.
type TaskID int32

// Run is Count pieces from First on.
type Run struct{ First, Count int }

// TransferID names a transfer. The scheduler gives it and never gives it again.
type TransferID uint64

// Host is what the scheduler has to know of a host.
type Host struct {
	Up, Down   int    // lanes, 0 to MaxLanes; a host without up lanes only takes
	Zone, Rack string // "" is unknown and near to nothing; racks of one name in two zones are two
	Seed       bool   // the supernode itself: it never downloads
}

// MaxLanes bounds the lanes of a host each way; more count as so many.
const MaxLanes = 256

// Failure says why a transfer ended early.
type Failure int

// The failures of a transfer.
const (
	Busy      Failure = iota + 1 // the parent is full, and said when to come back
	Gone                         // no connection, a break, a stall, or the parent lacks the piece
	Corrupt                      // the bytes were wrong
	Cancelled                    // the host gave up for reasons of its own
)

// Kind is what a Decision demands.
type Kind int

// The kinds of decisions.
const (
	Assign Kind = iota + 1 // Host is to download the run from Parent
	Cancel                 // Host is to give up the transfer; no report is expected
)

// Decision is for Host to follow. It begins what it is assigned at once and
// side by side, whatever else it has under way. What it has already, by a
// transfer that was cancelled, it reports as Done at once. A Cancel may come for
// a transfer that has ended meanwhile.
type Decision struct {
	Kind         Kind
	Transfer     TransferID
	Task         TaskID
	Host, Parent HostID
	First, Count int  // the run of pieces
	Crosses      bool // into Host's zone, from a parent of another or of none
}

// Config is the policy's figures.
type Config struct {
	// Sample is how many random pieces are looked at for the rarest. More costs
	// time and gains little.
	Sample int
	// Run is how long a transfer should last at least, as long as that takes no
	// more than a fraction of the task's pieces. Shorter costs reports and
	// round trips, longer costs diversity.
	Run time.Duration
	// Lag is how many times longer than its like a transfer may take, and
	// LagFloor how much longer at least, until a second parent is sought.
	Lag      int
	LagFloor time.Duration
	// Report is how long after Soon the Done of a transfer may come.
	Report time.Duration
	// Accusers is how many hosts must report wrong bytes of a host to have it
	// banned, and also how many unconfirmed reports of its own make a host
	// unbelievable.
	Accusers int
	// CrossOnce is the zone rule: a host gets a piece from another zone only if
	// no host of its own that sends has it or has it on the way. A host without
	// a zone gets from anyone, and is of another zone to those that have one.
	CrossOnce bool
}

// DefaultConfig returns the figures the policy was measured with.
func DefaultConfig() Config {
	return Config{Sample: 8, Run: 20 * time.Millisecond, Lag: 4, LagFloor: 200 * time.Millisecond, Report: time.Second, Accusers: 2}
}

// Scheduler decides who sends which piece to whom. It is one goroutine's.
//
// Events come from hosts that may be wrong, late or hostile: one that names an
// unknown host, task or transfer, somebody else's transfer, or pieces out of
// range changes nothing. What was decided is told by Decisions alone.
type Scheduler struct {
	cfg   Config
	rnd   *rand.Rand
	begun bool
	epoch time.Time     // once begun
	now   time.Duration // since epoch; never goes back

	hosts     map[HostID]*host
	list      []*host          // the same, in any order
	links     map[string]*link // by zone, with the rule
	tasks     map[TaskID]*task
	order     []*task     // the same, in any order
	transfers []*transfer // by slot
	free      []*transfer // the slots no transfer is in

	work    []*host // whose lanes or needs have changed since the last match
	spare   []*host // work's other half
	resting []*host
	typical rate // the median of what hosts receive at
	sample  []candidate
	swept   int // the task at which Tick goes on

	decisions []Decision
}

// New returns a scheduler that draws from rnd, which is its own from then on.
func New(cfg Config, rnd *rand.Rand) *Scheduler {
	cfg.Sample = max(cfg.Sample, 1)
	return &Scheduler{
		cfg: cfg, rnd: rnd,
		hosts: map[HostID]*host{}, links: map[string]*link{}, tasks: map[TaskID]*task{},
		sample: make([]candidate, 0, cfg.Sample),
	}
}

// Decisions decides what follows from the events since the last call, and
// returns it in the order to be followed. Call it after every event, or after a
// batch of those that came together. The slice is valid until the next call on s.
func (s *Scheduler) Decisions() []Decision {
	s.match()
	d := s.decisions
	s.decisions = s.decisions[:0]
	return d
}

// Banned tells whether host is given nothing to send any more because of the
// wrong bytes it sent.
func (s *Scheduler) Banned(host HostID) bool {
	h := s.hosts[host]
	return h != nil && h.banned
}

// clock takes over the caller's time. It never goes back.
func (s *Scheduler) clock(now time.Time) {
	if !s.begun {
		s.begun, s.epoch = true, now
	}
	s.now = max(s.now, now.Sub(s.epoch))
}
