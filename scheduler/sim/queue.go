package sim

import "container/heap"

// A line is messages that all take equally long: who comes first leaves first.
type line[T any] struct {
	items []T
	first int
}

func (l *line[T]) push(x T) { l.items = append(l.items, x) }
func (l *line[T]) len() int { return len(l.items) - l.first }
func (l *line[T]) head() *T { return &l.items[l.first] }

func (l *line[T]) pop() T {
	var zero T
	x := l.items[l.first]
	l.items[l.first] = zero
	l.first++
	if l.first >= 1024 && 2*l.first >= len(l.items) {
		rest := copy(l.items, l.items[l.first:])
		clear(l.items[rest:])
		l.items, l.first = l.items[:rest], 0
	}
	return x
}

// timers are what happens at set times, at equal ones in the order set.
type timers struct {
	list []timer
	made int
}

type timer struct {
	at    float64
	order int
	do    func()
}

func (t *timers) Len() int { return len(t.list) }
func (t *timers) Less(i, j int) bool {
	a, b := &t.list[i], &t.list[j]
	return a.at < b.at || a.at == b.at && a.order < b.order
}
func (t *timers) Swap(i, j int) { t.list[i], t.list[j] = t.list[j], t.list[i] }
func (t *timers) Push(x any)    { t.list = append(t.list, x.(timer)) }
func (t *timers) Pop() any {
	last := len(t.list) - 1
	x := t.list[last]
	t.list = t.list[:last]
	return x
}

func (t *timers) set(at float64, do func()) {
	t.made++
	heap.Push(t, timer{at, t.made, do})
}

// next takes out what happens first.
func (t *timers) next() func() { return heap.Pop(t).(timer).do }

// arrivals are the flows by when their piece will have come, as a heap with four
// children to a node.
type arrivals []*flow

func (a arrivals) less(f, g *flow) bool {
	return f.due < g.due || f.due == g.due && f.d.Transfer < g.d.Transfer
}

// fix puts f where it belongs, after due has changed or when it is new.
func (a *arrivals) fix(f *flow) {
	if f.place < 0 {
		f.place = len(*a)
		*a = append(*a, f)
	}
	if !a.up(f) {
		a.down(f)
	}
}

func (a *arrivals) remove(f *flow) {
	if f.place < 0 {
		return
	}
	last := len(*a) - 1
	moved := (*a)[last]
	(*a)[last] = nil
	*a = (*a)[:last]
	if moved != f {
		moved.place = f.place
		(*a)[moved.place] = moved
		a.fix(moved)
	}
	f.place = -1
}

func (a *arrivals) up(f *flow) bool {
	h, i := *a, f.place
	for i > 0 {
		parent := (i - 1) / 4
		if !h.less(f, h[parent]) {
			break
		}
		h[i], h[parent].place = h[parent], i
		i = parent
	}
	moved := i != f.place
	h[i], f.place = f, i
	return moved
}

func (a *arrivals) down(f *flow) {
	h, i := *a, f.place
	for {
		first := 4*i + 1
		if first >= len(h) {
			break
		}
		best := first
		for c := first + 1; c < min(first+4, len(h)); c++ {
			if h.less(h[c], h[best]) {
				best = c
			}
		}
		if !h.less(h[best], f) {
			break
		}
		h[i], h[best].place = h[best], i
		i = best
	}
	h[i], f.place = f, i
}
