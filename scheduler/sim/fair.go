package sim

import "slices"

// A link carries flows, each way of a cable being one.
type link struct {
	rate   float64 // bytes per second
	level  float64 // what a flow gets here at most
	flows  []*flow
	dirty  bool // stands in network.dirty
	change int  // flows that came or went since the level was found
}

const (
	// tolerance is the part by which a level may change without the other links
	// of its flows being looked at.
	tolerance = 0.01
	// farthest is how many links are looked at for one flow that comes or goes.
	farthest = 64
	// maxCrossed is how many links a flow crosses: the sender's, those of two
	// zones, and the receiver's.
	maxCrossed = 4
)

// attach puts f on its links, of which local then finds the shares.
func (f *flow) attach() {
	for i, l := range f.links[:f.crossed] {
		f.slot[i] = len(l.flows)
		l.flows = append(l.flows, f)
		l.change++
	}
}

func (f *flow) detach() {
	for i, l := range f.links[:f.crossed] {
		last := len(l.flows) - 1
		moved := l.flows[last]
		l.flows[f.slot[i]] = moved
		moved.slot[moved.at(l)] = f.slot[i]
		l.flows[last] = nil
		l.flows = l.flows[:last]
		l.change++
	}
}

// at returns the index of l among f's links.
func (f *flow) at(l *link) int {
	i := 0
	for f.links[i] != l {
		i++
	}
	return i
}

// share returns what f gets on its links.
func (f *flow) share() float64 { return f.without(nil) }

// without returns what f gets on its links other than l.
func (f *flow) without(l *link) float64 {
	least := unlimited
	for _, o := range f.links[:f.crossed] {
		if o != l {
			least = min(least, o.level)
		}
	}
	return least
}

const unlimited = 1e18

// local finds the new shares after f came or went: from its own links outwards,
// for as long as the levels change by more than the tolerance.
func (n *network) local(f *flow) {
	n.dirty = n.dirty[:0]
	for _, l := range f.links[:f.crossed] {
		// One among many changes little: every hundredth part does.
		if l.change*100 >= len(l.flows) {
			n.look(l)
		}
	}
	for i := 0; i < len(n.dirty) && i < farthest; i++ {
		l := n.dirty[i]
		l.dirty, l.change = false, 0
		was := l.level
		l.level = n.fill(l)
		if d := l.level - was; d <= tolerance*was && d >= -tolerance*was {
			continue
		}
		lower := min(was, l.level)
		for _, g := range l.flows {
			for _, o := range g.links[:g.crossed] {
				// Where it was and stays above the level nothing changes.
				if o != l && lower < o.level {
					n.look(o)
				}
			}
		}
	}
	for _, l := range n.dirty {
		l.dirty = false
		for _, g := range l.flows {
			n.setRate(g, g.share())
		}
	}
	if f.flowing && f.rate == 0 {
		n.setRate(f, f.share())
	}
}

func (n *network) look(l *link) {
	if !l.dirty {
		l.dirty = true
		n.dirty = append(n.dirty, l)
	}
}

// fill returns the level at which l is full, given what its flows may have
// elsewhere.
func (n *network) fill(l *link) float64 {
	if len(l.flows) == 0 {
		return l.rate
	}
	ends := n.ends[:0]
	for _, f := range l.flows {
		ends = append(ends, f.without(l))
	}
	n.ends = ends
	slices.Sort(ends)
	left := l.rate
	for i, end := range ends {
		if share := left / float64(len(ends)-i); end >= share {
			return share
		}
		left -= end
	}
	return ends[len(ends)-1] + left
}
