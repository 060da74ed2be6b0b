// Package api is the wire between hosts and a supernode: the session's
// messages and connection, tickets, and the paths and headers of the HTTP API.
package api

import (
	"crypto/ed25519"
	"time"

	"damselfly.dev/pieces"
)

// Version is the version of the session's messages. A supernode refuses a host
// of another version; fields may be added without a new one.
const Version = 4

// MaxLanes bounds the lanes of a host each way.
const MaxLanes = 256

// Up is one batch from a host to the supernode. Hello stands alone in the
// first; the others are acted on in the order of the fields.
type Up struct {
	Hello  *Hello   `cbor:"1,keyasint,omitempty"`
	Hold   []Hold   `cbor:"2,keyasint,omitempty"`
	Join   []Join   `cbor:"3,keyasint,omitempty"`
	Want   []Want   `cbor:"4,keyasint,omitempty"`
	Done   []Done   `cbor:"5,keyasint,omitempty"`
	Failed []Failed `cbor:"6,keyasint,omitempty"`
	Leave  []Leave  `cbor:"7,keyasint,omitempty"`
	// Soon are transfers that end soon, past half of their bytes: their lanes may have
	// their next one, and others may be sent to this host for their pieces, which it
	// lets wait until those are there. Done follows within DoneWithin, or Failed.
	Soon []uint64 `cbor:"8,keyasint,omitempty"`
}

// Down is one batch from the supernode to a host. Welcome stands alone in the
// first; the others are acted on in the order of the fields.
type Down struct {
	Welcome    *Welcome     `cbor:"1,keyasint,omitempty"`
	Task       []Task       `cbor:"2,keyasint,omitempty"`
	Refused    []Refused    `cbor:"3,keyasint,omitempty"`
	Digests    []Digests    `cbor:"4,keyasint,omitempty"`
	Assign     []Assign     `cbor:"5,keyasint,omitempty"`
	Cancel     []uint64     `cbor:"6,keyasint,omitempty"` // transfers to give up; no Failed is expected
	Invalidate []Invalidate `cbor:"7,keyasint,omitempty"`
	Progress   []Progress   `cbor:"8,keyasint,omitempty"`
	Verify     []Verify     `cbor:"9,keyasint,omitempty"`
	Asking     []uint64     `cbor:"10,keyasint,omitempty"` // Joins, by their Seq, that wait for the origin; said once a second
	Keys       [][]byte     `cbor:"11,keyasint,omitempty"` // those of the Welcome, anew
	// Drain says that the supernode is about to end: what the host has joined goes on
	// for a while, and Joins from here on are for another one.
	Drain bool `cbor:"12,keyasint,omitempty"`
}

// Hello introduces a host.
type Hello struct {
	Version int    `cbor:"1,keyasint"`
	Host    string `cbor:"2,keyasint"` // the host's own id, stable over restarts, at most 64 bytes
	// Addr is host:port where peers reach its pieces; with an empty host the
	// supernode puts the session's remote address. "" is a host that only takes.
	Addr string `cbor:"3,keyasint"`
	Up   int    `cbor:"4,keyasint"` // upload lanes
	Down int    `cbor:"5,keyasint"` // download lanes
	Zone string `cbor:"6,keyasint,omitempty"`
	Rack string `cbor:"7,keyasint,omitempty"`
}

// Welcome accepts a host.
type Welcome struct {
	Version int `cbor:"1,keyasint"`
	// Keys are the Ed25519 public keys with which tickets may be signed: the last one,
	// the present and the next, so that every host knows a key before the first ticket
	// of it. At most MaxKeys.
	Keys [][]byte `cbor:"2,keyasint"`
	// Now is the supernode's clock, in milliseconds since 1970: by it tickets end.
	Now int64 `cbor:"3,keyasint,omitempty"`
}

// MaxKeys bounds the keys of tickets that a host remembers of a supernode.
const MaxKeys = 16

// TicketKeys returns the keys in a Welcome or a Down that are some.
func TicketKeys(keys [][]byte) (good []ed25519.PublicKey) {
	for _, k := range keys[:min(len(keys), MaxKeys)] {
		if len(k) == ed25519.PublicKeySize {
			good = append(good, k)
		}
	}
	return good
}

// Hold says which pieces of a task the host has, without wanting more; it
// replaces what the host said before, and may come for a task that the
// supernode does not know.
type Hold struct {
	Task   string        `cbor:"1,keyasint"`
	Layout pieces.Layout `cbor:"2,keyasint"`
	Have   []byte        `cbor:"3,keyasint"` // as pieces.ParseSet reads it
	// Digest is that of the first piece in Have, which shows that the host has it, or may: a
	// host that has not joined the task in this session is not believed without.
	Digest []byte `cbor:"4,keyasint,omitempty"`
}

// Join asks for a task, once per caller: the answer, by Seq, is a Task or a
// Refused. What the host already has goes ahead in a Hold.
type Join struct {
	Seq    uint64 `cbor:"1,keyasint"` // chosen by the host, not reused in a session
	Task   string `cbor:"2,keyasint"`
	Origin Origin `cbor:"3,keyasint"`
	Small  bool   `cbor:"4,keyasint,omitempty"` // the host takes small content with the answer
	// Lazy is a host that wants only what it asks for by Want, until a Join without
	// it or a Want for All. It changes nothing for one that has joined without it.
	Lazy bool `cbor:"5,keyasint,omitempty"`
	// Size is how long somebody has said that the content is, in bytes, 0 where
	// nobody has: what seems to be small is asked for without asking how long it is.
	Size int64 `cbor:"6,keyasint,omitempty"`
}

// Origin is where a task's bytes come from: a repository of a registry (the
// task's id is the blob's digest) or else a URL. It holds the caller's
// credentials: never log it, never write it down, and keep it in memory only
// until what was asked for has come.
type Origin struct {
	Registry   string              `cbor:"1,keyasint,omitempty"`
	Repository string              `cbor:"2,keyasint,omitempty"`
	URL        string              `cbor:"3,keyasint,omitempty"`
	Header     map[string][]string `cbor:"4,keyasint,omitempty"` // what the caller sent along for the origin
	Ignore     []string            `cbor:"5,keyasint,omitempty"` // parameters of the URL that the task's id leaves out, as pieces.SignedURLTaskID tells
}

// String says nothing of what an Origin holds, so that a stray %v leaks nothing.
func (o Origin) String() string { return "origin" }

// GoString is String, for %#v.
func (o Origin) GoString() string { return "origin" }

// Want asks for runs of pieces before any other of the task: readers wait at
// them. It replaces the host's earlier Want for the task, and with a Count of 0
// and no More ends it.
type Want struct {
	Task  int32 `cbor:"1,keyasint"`
	First int   `cbor:"2,keyasint"`
	Count int   `cbor:"3,keyasint"`
	More  []Run `cbor:"4,keyasint,omitempty"` // of other readers, at most MaxRuns
	All   bool  `cbor:"5,keyasint,omitempty"` // the host, which has joined as Lazy, wants the rest as well from now on
	Only  bool  `cbor:"6,keyasint,omitempty"` // the host, which has no room for all, wants only what it asks for from now on, as if it had joined as Lazy
}

// Run is Count pieces from First on.
type Run struct {
	First int `cbor:"1,keyasint"`
	Count int `cbor:"2,keyasint"`
}

// MaxRuns bounds the runs of a Want, and MaxWanted the pieces of all of them; what is
// beyond is not asked for.
const (
	MaxRuns   = 64
	MaxWanted = 4096
)

// Runs returns the runs asked for that lie within n pieces, as far as the bounds
// allow.
func (w Want) Runs(n int) []Run {
	var runs []Run
	left := MaxWanted
	for _, r := range append([]Run{{w.First, w.Count}}, w.More[:min(len(w.More), MaxRuns)]...) {
		if r.First < 0 || r.Count <= 0 || r.First >= n || r.Count > n-r.First || left == 0 {
			continue
		}
		r.Count = min(r.Count, left)
		left -= r.Count
		runs = append(runs, r)
	}
	return runs
}

// Done reports one verified piece of a transfer; the run's last piece ends it.
type Done struct {
	Transfer uint64 `cbor:"1,keyasint"`
	Piece    int    `cbor:"2,keyasint"`
	AgoMS    int64  `cbor:"3,keyasint,omitempty"` // when it came, in milliseconds before this was sent
}

// DoneWithin is how long a host may keep back the Done of a transfer after its Soon,
// so that it goes along with whatever is to be said next.
const DoneWithin = 500 * time.Millisecond

// Failure says why a transfer ended early.
type Failure int

// The failures of a transfer.
const (
	Busy    Failure = iota + 1 // the parent is full; it says when to come back
	Gone                       // no connection, a break, a stall, or the parent lacks the piece
	Corrupt                    // the bytes did not have the piece's digest
	Local                      // the host itself could not go on (disk full, shutting down)
)

// Failed reports the end of a transfer whose remaining pieces did not arrive.
type Failed struct {
	Transfer uint64  `cbor:"1,keyasint"`
	Why      Failure `cbor:"2,keyasint"`
	RetryMS  int64   `cbor:"3,keyasint,omitempty"` // for Busy: when to come back, in milliseconds
}

// Leave says that the host neither has nor wants the task any more.
type Leave struct {
	Task string `cbor:"1,keyasint"`
}

// Task grants a Join, and (with Seq 0) renews the ticket of a task joined before, or
// with an empty one says that there is no more: the origin has refused all that the
// host has joined it for.
type Task struct {
	Seq    uint64        `cbor:"1,keyasint,omitempty"`
	Task   string        `cbor:"2,keyasint"`
	Num    int32         `cbor:"3,keyasint"` // stands for the task in this session's other messages
	Layout pieces.Layout `cbor:"4,keyasint"`
	Ticket string        `cbor:"5,keyasint"` // shown to parents; see Ticket
	Public bool          `cbor:"6,keyasint,omitempty"`
	// Data is all of the content, of one piece with that Digest, when it is small:
	// there is nothing to fetch, and no Ticket. The host says in a Hold that it has
	// it, or leaves. Only a Join that is Small is answered so.
	Digest []byte `cbor:"7,keyasint,omitempty"` // as pieces.ParseDigests reads it
	Data   []byte `cbor:"8,keyasint,omitempty"`
	// Sparse is content that comes by ranges: the digest of the last piece may come
	// before the whole has been found right, so the host verifies the whole itself
	// before it counts it as complete.
	Sparse bool `cbor:"9,keyasint,omitempty"`
}

// Refused is the answer to a Join that is not granted. A Status from 400 on
// with Final set is the origin's own no, to be relayed as it came; otherwise
// the region cannot serve the task and the host should ask the origin itself.
type Refused struct {
	Seq    uint64              `cbor:"1,keyasint"`
	Status int                 `cbor:"2,keyasint"`
	Header map[string][]string `cbor:"3,keyasint,omitempty"`
	Body   []byte              `cbor:"4,keyasint,omitempty"`
	Final  bool                `cbor:"5,keyasint,omitempty"`
	Reason string              `cbor:"6,keyasint,omitempty"` // for people
	Clear  bool                `cbor:"7,keyasint,omitempty"` // the task is private, and the session not encrypted
}

// Digests are the digests of the pieces from First on, as pieces.ParseDigests
// reads them. That of the last piece comes only when the whole content's own
// digest has been found right.
type Digests struct {
	Task    int32  `cbor:"1,keyasint"`
	First   int    `cbor:"2,keyasint"`
	Digests []byte `cbor:"3,keyasint"`
}

// Assign tells the host to get the run of Count pieces from First on from
// Parent. The pieces' digests have been sent before.
type Assign struct {
	Transfer uint64 `cbor:"1,keyasint"`
	Task     int32  `cbor:"2,keyasint"`
	First    int    `cbor:"3,keyasint"`
	Count    int    `cbor:"4,keyasint"`
	Parent   string `cbor:"5,keyasint,omitempty"` // host:port; "" is the supernode itself
	Data     []byte `cbor:"6,keyasint,omitempty"` // the run's bytes, when they are few: nothing to fetch
}

// Invalidate tells the host to drop what it has of a task: the content turned
// out wrong, or the supernode gave it up.
type Invalidate struct {
	Task   string `cbor:"1,keyasint"`
	Reason string `cbor:"2,keyasint"`
}

// Verify has the host look at pieces that it has sent, since who got them found
// the bytes wrong: what has rotted on its disk it says in a Hold.
type Verify struct {
	Task  string `cbor:"1,keyasint"`
	First int    `cbor:"2,keyasint"`
	Count int    `cbor:"3,keyasint"`
}

// Progress says, about once a second while it grows, how many bytes the
// supernode has from the origin: a host that waits knows that it is not in vain.
type Progress struct {
	Task    int32 `cbor:"1,keyasint"`
	Fetched int64 `cbor:"2,keyasint"`
}
