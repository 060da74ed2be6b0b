package scheduler

import "time"

// A host is one HostUp to its HostDown.
type host struct {
	id         HostID
	index      int // in Scheduler.list
	up, down   int // configured lanes
	lent       int // upload lanes it is trusted with now, 1 to up
	taking     int // download lanes it is trusted with now, 1 to down
	zone, rack string
	link       *link // into its zone, with the rule
	seed       bool
	banned     bool
	gone       bool // HostDown has been: no decision is for it any more
	queued     bool // stands in Scheduler.work

	ups             []*transfer // what it sends
	downs           []*transfer // what it gets, in the order it was told
	out             int         // of ups, those that hold an upload lane
	in              int         // of downs, those that hold a download lane
	reopened        int         // of downs, those that others are to bring as well
	ending, leaving int         // of downs and ups, those whose last bytes are on their way
	thinOut, thinIn int         // of out and in, those that leave most of their lane free

	peers   map[TaskID]*peer
	wanting []*peer // those that lack pieces, served in turn
	turn    int
	offers  []*peer // those for whom somebody may wait for a lane of this host

	sendRate, recvRate rate
	lastSent, lastRecv time.Duration // when a piece last went out or came in
	sendRests          time.Duration // it is given nothing to send before this time
	recvRests          time.Duration // nor to receive before this
	resting            bool          // stands in Scheduler.resting
	streak             int           // failed downloads since the last piece came in
	misses             int           // failed uploads since the last piece went out, those that count twice
	blamers            []*host       // who reported them
	successes          int           // pieces sent since lent last changed

	shunned    []shun
	accused    []*host // by this host, of wrong bytes
	accusers   []*host
	distrusted bool // it has accused too many to be believed

	doubted bool // what it has, or is to get, are no copies until it has sent what it owes
	shown   int  // pieces it has sent since it was last doubted, or ever
	owes    int  // pieces to send until it is not doubted any more
	word    int  // what it may break of its Soons until they are not believed
	taken   int  // pieces that came to it since taking last changed
}

// How many transfers a host has at most for each of its lanes: one that runs and one
// that lags or leaves most of a lane free; and besides those that were about to end
// when last heard of.
const (
	most     = 2
	mostSoon = 4
)

// sends tells whether h has an upload lane free. A slow host has but one.
func (h *host) sends(now time.Duration, slow bool) bool {
	lanes := h.lent
	if slow {
		lanes = 1
	}
	return h.out-min(h.thinOut, h.up) < lanes && len(h.ups)-h.leaving < most*h.up && now >= h.sendRests && !h.banned
}

// receives is sends for downloads.
func (h *host) receives(now time.Duration, slow bool) bool {
	lanes := h.taking
	if slow {
		lanes = 1
	}
	return h.in-min(h.thinIn, h.taking) < lanes && len(h.downs)-h.ending < most*h.taking && h.ending < mostSoon*h.taking && now >= h.recvRests
}

// crowded tells whether h has a lane free and no place for a transfer on it, for
// those that are late: hosts that take and never end must not have all places.
func (h *host) crowded() bool {
	return len(h.ups)-h.leaving >= most*h.up && h.out-min(h.thinOut, h.up) < h.lent
}

// gets tells whether h gets something from parent now.
func (h *host) gets(parent *host) bool {
	for _, tr := range h.downs {
		if tr.parent.host == parent && !tr.soon {
			return true
		}
	}
	return false
}

// near is 2 for hosts of one rack, 1 for hosts of one zone, else 0. A rack is
// one only within its zone.
func near(a, b *host) int {
	switch {
	case a.zone != b.zone || a.zone == "":
		return 0
	case a.rack != b.rack || a.rack == "":
		return 1
	}
	return 2
}
