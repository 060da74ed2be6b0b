package sim

import (
	"time"

	"damselfly.dev/pieces"
	"damselfly.dev/scheduler"
)

// Rogue is what a hostile host does; "" is one that is not.
type Rogue string

// The rogues. The first four say that they have all pieces, the others want all.
const (
	Lies     Rogue = "lies"     // it refuses whoever asks
	Silent   Rogue = "silent"   // it never answers
	Drips    Rogue = "drips"    // it sends, but so slowly that nothing comes to an end
	Wrong    Rogue = "wrong"    // its bytes are wrong
	Takes    Rogue = "takes"    // it takes what it is sent, and never ends
	Promises Rogue = "promises" // it says that all ends soon, lets others wait for that, and never ends
	Breaks   Rogue = "breaks"   // it promises, and then says that it has failed
	Pretends Rogue = "pretends" // it says at once that it has what it is to get
	Blames   Rogue = "blames"   // it says of all parents that they are gone
	Slanders Rogue = "slanders" // it says of all parents that their bytes are wrong
	Seesaws  Rogue = "seesaws"  // it blames half of them, and pretends to have been served by the others
)

// Rogues are all of them.
var Rogues = []Rogue{Lies, Silent, Drips, Wrong, Takes, Promises, Breaks, Pretends, Blames, Slanders, Seesaws}

const (
	patience = 2.0 // seconds for which a host waits for a parent's next byte
	heldFor  = 1.5 // for which a parent lets a request wait for a piece
)

// intrude has x, which is hostile, join.
func (n *network) intrude(x *node) {
	n.lost(x)
	has := x.have
	switch x.Rogue {
	case Lies, Silent, Drips, Wrong:
		has = pieces.FullSet(n.Layout.Count())
	}
	if x.Rogue == Wrong {
		x.have = has
	}
	n.timers.set(x.Arrives.Seconds(), func() {
		n.report(func(now time.Time, n *network) { n.sched.Join(now, x.id, task, has) })
	})
}

// cheat is what a hostile host does with an assignment.
func (n *network) cheat(f *flow) {
	x, d := f.to, f.d
	switch x.Rogue {
	case Promises, Breaks:
		n.say(x, report{host: x.id, id: d.Transfer, piece: soon})
		if x.Rogue == Breaks {
			n.timers.set(n.now+n.Policy.Report.Seconds()*reportPart, func() { n.fail(f) })
		}
	case Pretends:
		n.pretend(f)
	case Blames:
		n.fail(f)
	case Slanders:
		n.failed(f, scheduler.Corrupt)
	case Seesaws:
		if d.Transfer%2 == 0 {
			n.fail(f)
			return
		}
		n.pretend(f)
	}
}

// pretend says that all of f has come.
func (n *network) pretend(f *flow) {
	for i := range f.d.Count {
		n.say(f.to, report{host: f.to.id, id: f.d.Transfer, piece: f.d.First + i})
	}
	n.stop(f)
}

// deceive is what a hostile host does with a request.
func (n *network) deceive(f *flow) {
	wait := 0.0
	switch f.from.Rogue {
	case Drips:
		return
	case Silent:
		wait = patience
	case Promises, Breaks:
		wait = heldFor
	}
	n.timers.set(n.now+wait, func() {
		if !f.stopped {
			n.fail(f)
		}
	})
}
