package supernode

import (
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// lazily joins h and asks for a run of pieces.
func (h *host) lazily(id string, first, count int) {
	h.t.Helper()
	h.mu.Lock()
	h.seq++
	seq := h.seq
	h.mu.Unlock()
	h.send(api.Up{Join: []api.Join{{Seq: seq, Task: id, Origin: from(""), Lazy: true}}})
	task, no := h.answer(seq)
	require.Nil(h.t, no)
	require.True(h.t, task.Sparse)
	h.send(api.Up{Want: []api.Want{{Task: task.Num, First: first, Count: count}}})
	h.await("what it wants", func() bool {
		k := h.byID[id]
		for i := range count {
			if k.have[first+i] == nil {
				return false
			}
		}
		return true
	})
}

// A fetch of what is asked for ends when nobody is there to ask, the next goes on
// from what it left, and one of all fills the gaps: no byte comes twice.
func TestSparseFetchEndsAndGoesOn(t *testing.T) {
	h := newHub(t)
	content := newBytes(1<<20 + 5)
	id := h.blob(t, content)
	r := start(t, h, t.TempDir(), nil)
	layout := pieces.NewRangedLayout(int64(len(content)))
	one := dial(t, r, "one")
	one.lazily(id, 3, 2)
	last := layout.Count() - 1
	one.lazily(id, last, 1)
	want := int(2*layout.PieceSize + layout.Size(last))
	require.Equal(t, want, r.metric("damselfly_origin_bytes_total"))
	require.Equal(t, want, r.metric("damselfly_unique_bytes_total"))

	one.send(api.Up{Leave: []api.Leave{{Task: id}}})
	f := r.origin.find(pieces.TaskID(id))
	require.True(t, f.idles())
	require.True(t, r.region.ask(t.Context(), func() { r.region.deactivate(r.region.tasks[pieces.TaskID(id)]) }))
	<-f.done
	require.ErrorIs(t, f.err(), errIdle)

	two := dial(t, r, "two")
	two.lazily(id, 4, 3)
	want += int(2 * layout.PieceSize)
	require.Equal(t, want, r.metric("damselfly_origin_bytes_total"))

	three := dial(t, r, "three")
	_, no := three.join(id, from(""))
	require.Nil(t, no)
	require.Equal(t, content, three.content(id))
	require.Equal(t, len(content), r.metric("damselfly_origin_bytes_total"))
	require.Eventually(t, func() bool { return r.metric("damselfly_unique_bytes_total") == len(content) }, wait, poll)
	require.Eventually(t, func() bool { c := r.origin.cached(pieces.TaskID(id)); defer releaseAll(c); return c != nil }, wait, poll)
}

// What is said to be small is asked for by one request; what is not small after
// all is measured then, and only what is wanted comes.
func TestSmallContentIsNotMeasured(t *testing.T) {
	h := newHub(t)
	small, large := newBytes(20_000), newBytes(8<<20)
	r := start(t, h, t.TempDir(), nil)
	one := dial(t, r, "one")
	for i, b := range [][]byte{small, large} {
		id := h.blob(t, b)
		one.send(api.Up{Join: []api.Join{{Seq: uint64(100 + i), Task: id, Origin: from(""), Small: true, Lazy: true, Size: 20_000}}})
		task, no := one.answer(uint64(100 + i))
		require.Nil(t, no)
		require.Equal(t, i == 1, task.Sparse)
		if i == 0 {
			require.Equal(t, small, task.Data)
			require.Zero(t, h.times("HEAD"))
			require.Equal(t, 1, h.times("GET /v2/"))
		}
	}
	require.Equal(t, 1, h.times("HEAD"))
	require.Equal(t, len(small), r.metric("damselfly_origin_bytes_total"))
}

func releaseAll(c *pieces.Content) {
	if c != nil {
		c.Release()
	}
}

// However many ask for what in whatever order, and take it back: each piece is
// claimed once, and all of them in the end.
func TestDemandClaimsOnce(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		l := pieces.Layout{Length: 500 * pieces.LeastPieceSize, PieceSize: pieces.LeastPieceSize}
		d := newDemand(nil)
		d.want(7) // before it is known how many there are
		d.begin(pieces.NewSet(l.Count()))
		var mu sync.Mutex
		claims := make([]int, l.Count())
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for {
					first, n, err := d.next(l)
					if err != nil {
						return
					}
					for i := first; i < first+n; i++ {
						mu.Lock()
						claims[i]++
						mu.Unlock()
						d.got(i)
					}
				}
			})
		}
		for range 300 {
			first := rnd.IntN(l.Count() - 20)
			for i := range 20 {
				d.want(first + i)
			}
			d.unwant(first+rnd.IntN(20), -1)
		}
		d.wantAll()
		require.NoError(t, d.untilWhole())
		for i := range l.Count() {
			mine, err := d.claim(i)
			require.NoError(t, err)
			if mine {
				mu.Lock()
				claims[i]++
				mu.Unlock()
				d.got(i)
			}
		}
		d.end(io.EOF)
		wg.Wait()
		for i, n := range claims {
			require.Equal(t, 1, n, i)
		}
	}
}

// An origin that gives no ranges is read in order, and who waits is told the end.
// What is wanted and no longer, again and again, is not kept.
func TestDemandKeepsNoMoreThanIsWanted(t *testing.T) {
	d := newDemand(nil)
	layout := pieces.NewRangedLayout(1 << 30)
	d.begin(pieces.NewSet(layout.Count()))
	d.want(5, 3)
	for range 3 * maxStale {
		d.want(100, 101)
		d.unwant(100, 101)
		d.want(7)
		d.unwant(7)
	}
	d.want(7)
	require.LessOrEqual(t, len(d.queue), 2*len(d.wanted)+maxStale+1)
	for _, want := range []int{5, 3, 7} {
		first, n, err := d.next(layout)
		require.NoError(t, err)
		require.Equal(t, []int{want, 1}, []int{first, n})
	}
	require.Empty(t, d.wanted)
}

func TestDemandWithoutRanges(t *testing.T) {
	l := pieces.Layout{Length: 10 * pieces.LeastPieceSize, PieceSize: pieces.LeastPieceSize}
	d := newDemand(nil)
	d.begin(pieces.NewSet(10))
	d.want(4, 5, 9)
	first, n, err := d.next(l)
	require.NoError(t, err)
	require.Equal(t, []int{4, 2}, []int{first, n})
	d.got(4)
	d.refused(first, n)
	_, _, err = d.next(l)
	require.ErrorIs(t, err, io.EOF)
	require.NoError(t, d.untilWhole())
	mine, err := d.claim(4)
	require.NoError(t, err)
	require.False(t, mine)
	mine, err = d.claim(5)
	require.NoError(t, err)
	require.True(t, mine)
	d.end(errIdle)
	_, ranges := d.gap(0, 10)
	require.False(t, ranges)
	mine, err = d.claim(6)
	require.NoError(t, err, "all is wanted: that nobody reads it does not end it")
	require.True(t, mine)
	broken := errors.New("broken")
	d.end(broken)
	_, err = d.claim(7)
	require.ErrorIs(t, err, broken)
}
