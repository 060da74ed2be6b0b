package pieces

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// TestGoodAndBadAtOnce: many send one piece at once, most of them wrong bytes.
// The wrong are told so, and nobody ever reads a byte of theirs.
func TestGoodAndBadAtOnce(t *testing.T) {
	b, m := blob(70, 2*MinPieceSize)
	c := create(t, open(t, t.TempDir(), StoreConfig{}), m)
	if err := c.SetDigests(0, digestsOf(m.Layout, b)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var senders, readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for ctx.Err() == nil {
				var buf bytes.Buffer
				if _, err := c.CopyRange(&buf, 0, MinPieceSize); err != nil && !errors.Is(err, ErrMissing) {
					t.Error(err)
				} else if err == nil && !bytes.Equal(buf.Bytes(), b[:MinPieceSize]) {
					t.Error("wrong bytes are given")
				}
			}
		})
	}
	for k := range 24 {
		senders.Go(func() {
			sent := bytes.Clone(b[:MinPieceSize])
			bad := k%4 != 0
			if bad {
				sent[k*1000] ^= 1
			}
			err := c.Receive(0, io.MultiReader(bytes.NewReader(sent[:k*5000]), bytes.NewReader(sent[k*5000:])))
			if _, ok := errors.AsType[*DigestError](err); err != nil && (!bad || !ok) {
				t.Errorf("sender of bad bytes %v: %v", bad, err)
			}
		})
	}
	senders.Wait()
	cancel()
	readers.Wait()
	if c.Has(1) || !c.Has(0) {
		t.Error("has what was not sent, or not what was")
	}
}

// TestMakersDisagree: of those who make one piece of different bytes at once all
// but one lot are refused, and the content is what the digest says.
func TestMakersDisagree(t *testing.T) {
	for round := range 20 {
		_, m := blob(71, MinPieceSize)
		c := create(t, open(t, t.TempDir(), StoreConfig{}), m)
		var wg sync.WaitGroup
		var made atomic.Int32
		for k := range 6 {
			wg.Go(func() {
				b, _ := blob(uint64(100+round*2+k%2), MinPieceSize)
				d, err := c.Make(0, bytes.NewReader(b))
				if _, ok := errors.AsType[*DigestError](err); err != nil && !ok {
					t.Error(err)
				}
				if err == nil {
					made.Add(1)
					if d != c.Digest(0) {
						t.Errorf("made %s, known %s", d, c.Digest(0))
					}
				}
			})
		}
		wg.Wait()
		if made.Load() == 0 || Sum(read(t, c)) != c.Digest(0) {
			t.Fatalf("%d made it; the content is not what its digest says", made.Load())
		}
	}
}

// TestManyWaiters: each piece wakes those who wait for it and nobody else, and
// whoever gives up is told why.
func TestManyWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, m := blob(72, 8*MinPieceSize)
		c := create(t, open(t, t.TempDir(), StoreConfig{}), m)
		const each = 500
		why := errors.New("gave up")
		ctx, cancel := context.WithCancelCause(t.Context())
		var woken [9]atomic.Int32
		var wg sync.WaitGroup
		for i := range 8 {
			for range each {
				wg.Go(func() {
					err := c.Wait(ctx, i)
					if err == nil {
						woken[i].Add(1)
					} else {
						wantErr(t, err, why)
						woken[8].Add(1)
					}
				})
			}
		}
		synctest.Wait()
		for _, i := range []int{3, 5} {
			if _, err := c.Make(i, bytes.NewReader(piece(m.Layout, b, i))); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if n := woken[i].Load(); n != each {
				t.Errorf("piece %d woke %d of %d", i, n, each)
			}
		}
		cancel(why)
		wg.Wait()
		if woken[3].Load()+woken[5].Load() != 2*each || woken[8].Load() != 6*each {
			t.Errorf("%d gave up", woken[8].Load())
		}
		if err := c.Wait(ctx, 3); err != nil {
			t.Errorf("waiting for what is there: %v", err)
		}
	})
}

// TestPublicIsBounded: names come once each, and the oldest make room.
func TestPublicIsBounded(t *testing.T) {
	_, m := blob(73, 1)
	c := create(t, open(t, t.TempDir(), StoreConfig{}), m)
	var names []string
	for i := range maxNames + 3 {
		names = append(names, "docker.io/library/"+string(rune('a'+i%26))+string(rune('a'+i/26)))
	}
	for range 2 {
		for _, name := range names[3:] {
			if err := c.AddPublic(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := c.Meta().Public; !slices.Equal(got, names[3:]) {
		t.Errorf("%d names", len(got))
	}
	if err := c.AddPublic(names[0]); err != nil {
		t.Fatal(err)
	}
	if got := c.Meta().Public; len(got) != maxNames || got[0] != names[4] || got[maxNames-1] != names[0] {
		t.Errorf("%d names, from %s to %s", len(got), got[0], got[len(got)-1])
	}
	if c.AddPublic(string(make([]byte, maxName+1))) == nil {
		t.Error("a name without bound is accepted")
	}
}

// TestEverythingAtOnce has all of the store's methods race under a tight quota.
// What is read is always right, and the quota always holds.
func TestEverythingAtOnce(t *testing.T) {
	type thing struct {
		b  []byte
		m  Meta
		ds []Digest
	}
	var things []thing
	for i := range 8 {
		b, m := blob(uint64(80+i), (1+i%3)*MinPieceSize-i)
		things = append(things, thing{b, m, digestsOf(m.Layout, b)})
	}
	const quota = 9 * MinPieceSize
	dir := t.TempDir()
	var evicted atomic.Int64
	s := open(t, dir, StoreConfig{Quota: quota, OnEvict: func(TaskID) { evicted.Add(1) }})

	allowed := func(err error, of ...error) bool {
		return err == nil || slices.ContainsFunc(of, func(e error) bool { return errors.Is(err, e) })
	}
	check := func(c *Content, th thing) {
		got, err := io.ReadAll(c.NewReader(t.Context(), 0, th.m.Layout.Length))
		if !allowed(err, ErrGone) || (err == nil && !bytes.Equal(got, th.b)) {
			t.Errorf("read %d bytes, %v", len(got), err)
		}
	}
	pull := func(th thing) {
		c, err := s.Create(th.m)
		if err != nil {
			if !allowed(err, ErrQuota, ErrGone) {
				t.Error(err)
			}
			return
		}
		defer c.Release()
		if err := c.SetDigests(0, th.ds); err != nil {
			t.Error(err)
		}
		for i := range th.m.Layout.Count() {
			if err := c.Receive(i, bytes.NewReader(piece(th.m.Layout, th.b, i))); !allowed(err, ErrGone, ErrQuota) {
				t.Error(err)
			} else if err != nil {
				return
			}
		}
		if err := c.SetComplete(); !allowed(err, ErrGone) {
			t.Error(err)
		}
		check(c, th)
	}
	serve := func(th thing) {
		c, err := s.Get(th.m.ID)
		if err != nil {
			if !allowed(err, ErrNotFound, ErrGone) {
				t.Error(err)
			}
			return
		}
		defer c.Release()
		if c.Complete() {
			check(c, th)
		}
	}
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(5, uint64(w)))
			for range 60 {
				th := things[rnd.IntN(len(things))]
				switch rnd.IntN(8) {
				case 0:
					if err := s.Remove(th.m.ID); !allowed(err, ErrNotFound) {
						t.Error(err)
					}
				case 1, 2, 3:
					serve(th)
				default:
					pull(th)
				}
				if u := s.Usage(); u.Reserved > quota || u.Reserved < 0 {
					t.Errorf("usage %+v", u)
				}
				s.Tasks()
			}
		})
	}
	wg.Wait()
	u := s.Usage()
	if int64(u.Evicted) != evicted.Load() || u.Evicted == 0 {
		t.Errorf("%d evicted, told of %d", u.Evicted, evicted.Load())
	}
	held := s.Tasks()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = open(t, dir, StoreConfig{Quota: quota})
	if again := s.Tasks(); len(again) != len(held) || s.Usage().Reserved != u.Reserved {
		t.Errorf("%d tasks after a restart, %d before", len(again), len(held))
	}
	for _, th := range things {
		n := checkTruth(t, s, th.m, th.b)
		if i := slices.IndexFunc(held, func(h Held) bool { return h.ID == th.m.ID }); i >= 0 && n != held[i].Have.Len() {
			t.Errorf("%d pieces after a restart, %d before", n, held[i].Have.Len())
		}
	}
}
