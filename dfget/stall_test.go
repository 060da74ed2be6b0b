package dfget

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"damselfly.dev/httprange"
	"damselfly.dev/supernode/api"
)

// The tests here are about time, which is virtual.

// parent is a handler that gives what is asked of a blob, through spoil.
func parent(b *blob, spoil func(w http.ResponseWriter, r *http.Request, body []byte)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		span, _, err := httprange.Parse(r.Header.Get("Range"), int64(len(b.bytes)))
		if err != nil {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		spoil(w, r, b.bytes[span.Offset:span.Offset+span.Length])
	}
}

// header writes that of a good answer.
func header(w http.ResponseWriter, r *http.Request, b *blob, n int) {
	span, _, _ := httprange.Parse(r.Header.Get("Range"), int64(len(b.bytes)))
	w.Header().Set("Content-Range", contentRange(span.Offset, int64(n), int64(len(b.bytes))))
	w.Header().Set("Content-Length", itoa(n))
	w.WriteHeader(http.StatusPartialContent)
}

func TestBadParents(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(b *blob) http.HandlerFunc
		why   api.Failure
	}{
		"corrupting": {func(b *blob) http.HandlerFunc {
			return parent(b, func(w http.ResponseWriter, r *http.Request, body []byte) {
				header(w, r, b, len(body))
				body = bytes.Clone(body)
				body[len(body)/2] ^= 1
				_, _ = w.Write(body)
			})
		}, api.Corrupt},
		"vanishing": {func(b *blob) http.HandlerFunc {
			return parent(b, func(w http.ResponseWriter, r *http.Request, body []byte) {
				header(w, r, b, len(body))
				_, _ = w.Write(body[:len(body)/2])
				panic(http.ErrAbortHandler)
			})
		}, api.Gone},
		"silent": {func(*blob) http.HandlerFunc {
			return func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
		}, api.Gone},
		"silent in the middle": {func(b *blob) http.HandlerFunc {
			return parent(b, func(w http.ResponseWriter, r *http.Request, body []byte) {
				header(w, r, b, len(body))
				_, _ = w.Write(body[:len(body)/2])
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
			})
		}, api.Gone},
		"another range": {func(b *blob) http.HandlerFunc {
			return parent(b, func(w http.ResponseWriter, _ *http.Request, body []byte) {
				w.Header().Set("Content-Range", contentRange(1, int64(len(body)), int64(len(b.bytes))))
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(body)
			})
		}, api.Gone},
		"all for a range": {func(b *blob) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(b.bytes) }
		}, api.Gone},
		"redirecting": {func(*blob) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "http://node/", http.StatusFound) }
		}, api.Gone},
		"without the piece": {func(*blob) http.HandlerFunc { return http.NotFound }, api.Gone},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBlob(1 << 20)
				net, n, h := bubble(t, PeerConfig{}, serving(b, "bad:80"), b)
				net.serve(t, "bad", c.spoil(b))
				up := &upstream{bytes: b.bytes}
				got, err := get(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
				require.NoError(t, err)
				require.Equal(t, b.bytes, got)
				require.Empty(t, up.opened(), "the supernode gives what the parent does not")
				pause(t, api.DoneWithin+time.Millisecond) // for the last to be told
				fails := heard(n, faileds)
				require.Len(t, fails, b.layout.Count())
				for _, f := range fails {
					require.Equal(t, c.why, f.Why)
				}
				require.Len(t, heard(n, dones), b.layout.Count())
				if c.why == api.Corrupt {
					require.Equal(t, b.layout.Count(), h.metric(t, "damselfly_verify_failures_total", ""))
				}
			})
		})
	}
}

func TestBusyParentSaysWhen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(1 << 10)
		net, n, h := bubble(t, PeerConfig{}, serving(b, "busy:80"), b)
		var asked atomic.Int32
		net.serve(t, "busy", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch asked.Add(1) {
			case 1:
				w.Header().Set(api.RetryHeader, "70")
				w.WriteHeader(http.StatusServiceUnavailable)
			case 2:
				w.Header().Set(api.RetryHeader, "-5")
				w.WriteHeader(http.StatusServiceUnavailable)
			case 3:
				w.Header().Set(api.RetryHeader, "99999999999")
				w.WriteHeader(http.StatusServiceUnavailable)
			default:
				content(b)(w, r)
			}
		}))
		got, err := get(t, h, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)
		var retries []int64
		for _, f := range heard(n, faileds) {
			require.Equal(t, api.Busy, f.Why)
			retries = append(retries, f.RetryMS)
		}
		require.Equal(t, []int64{70, defaultBusy.Milliseconds(), maxBusy.Milliseconds()}, retries)
	})
}

func TestSlowParentIsNotGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(56 << 10)
		net, n, h := bubble(t, PeerConfig{}, serving(b, "slow:80"), b)
		net.serve(t, "slow", parent(b, func(w http.ResponseWriter, r *http.Request, body []byte) {
			header(w, r, b, len(body))
			for len(body) > 0 {
				_, _ = w.Write(body[:8<<10])
				_ = http.NewResponseController(w).Flush()
				body = body[8<<10:]
				pause(t, time.Second)
			}
		}))
		began := time.Now()
		got, err := get(t, h, Request{b.id, registryOrigin(), &upstream{}}, 0, -1)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)
		require.InDelta(t, 6, time.Since(began).Seconds(), 1.1)
		require.Empty(t, heard(n, faileds))
	})
}

// How long Open takes to turn to the origin, by what the region does.
func TestOpenTurnsToTheOrigin(t *testing.T) {
	b := newBlob(1 << 20)
	for name, c := range map[string]struct {
		on    func(*fakeNode, api.Up)
		after time.Duration
		cause string
	}{
		"no answer": {nil, turnAfter, causeNoAnswer},
		"refused": {func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				n.send(api.Down{Refused: []api.Refused{{Seq: j.Seq, Status: 503, Reason: "no room"}}})
			}
		}, 0, causeRefused},
		"nothing moves": {func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				n.send(api.Down{Task: []api.Task{n.grant(j, b)}})
			}
		}, turnAfter, causeSilent},
		"it never gets there": {func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				n.send(api.Down{Task: []api.Task{n.grant(j, b)}})
				go func() {
					for i := range 40 {
						n.send(api.Down{Progress: []api.Progress{{Task: 1, Fetched: int64(i)}}})
						pause(n.t, 500*time.Millisecond)
					}
				}()
			}
		}, hopeLimit, causeLate},
		"a task cut otherwise": {func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				task := n.grant(j, b)
				task.Layout.PieceSize = 12345
				n.send(api.Down{Task: []api.Task{task}})
			}
		}, 0, causeRefused},
		"another task": {func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				task := n.grant(j, b)
				task.Task = string(newBlob(5).id)
				n.send(api.Down{Task: []api.Task{task}})
			}
		}, 0, causeRefused},
		"the session ends": {func(n *fakeNode, up api.Up) {
			if len(up.Join) > 0 {
				n.hang()
			}
		}, 0, causeNoSession},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, _, h := bubble(t, PeerConfig{}, c.on, nil)
				up := &upstream{bytes: b.bytes}
				began := time.Now()
				s := open(t, h, Request{b.id, registryOrigin(), up}, 12345, -1)
				require.InDelta(t, c.after.Seconds(), time.Since(began).Seconds(), 0.7)
				got, err := io.ReadAll(s)
				require.NoError(t, err)
				require.Equal(t, b.bytes[12345:], got)
				require.Equal(t, []int64{12345}, up.opened())
				require.Equal(t, 1, h.metric(t, "damselfly_fallbacks_total", c.cause))
				require.Equal(t, len(got), h.metric(t, "damselfly_received_bytes_total", sourceOrigin))
				require.Equal(t, Stats{Origin: int64(len(got))}, s.Stats())
			})
		})
	}
}

// No byte is out before its piece is verified: a region that has only wrong ones
// is a region that has none.
func TestNoByteOfACorruptPieceIsGiven(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(1 << 20)
		bad := *b
		bad.bytes = bytes.Repeat([]byte{7}, len(b.bytes))
		net, n, h := bubble(t, PeerConfig{}, serving(b, "bad:80"), nil)
		net.serve(t, "bad", content(&bad))
		n.routes.HandleFunc(api.ContentPath(b.id), content(&bad))
		up := &upstream{bytes: b.bytes}
		began := time.Now()
		s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
		require.InDelta(t, turnAfter.Seconds(), time.Since(began).Seconds(), 0.7)
		require.Equal(t, []int64{0}, up.opened())
		got, err := io.ReadAll(s)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)
		c, err := h.store.Get(b.id)
		require.NoError(t, err)
		defer c.Release()
		have := c.Have()
		require.Zero(t, have.Len())
	})
}

// half grants b and assigns the first half of its pieces, from the node itself.
func half(b *blob) func(*fakeNode, api.Up) {
	return func(n *fakeNode, up api.Up) {
		for _, j := range up.Join {
			n.send(api.Down{Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{digestsOf(b)}})
			if j.Seq == 1 {
				pause(n.t, 50*time.Millisecond)
				n.send(api.Down{Assign: []api.Assign{{Transfer: 1, Task: 1, Count: b.layout.Count() / 2}}})
			}
		}
	}
}

func TestStreamGoesOnFromTheOrigin(t *testing.T) {
	b := newBlob(1<<20 + 5)
	middle := b.layout.Offset(b.layout.Count() / 2)
	for name, c := range map[string]struct {
		fail  func(t *testing.T, net *memNet, n *fakeNode, h *host)
		after time.Duration
		cause string
	}{
		"supernode killed":       {func(_ *testing.T, net *memNet, _ *fakeNode, _ *host) { net.kill("node") }, lostLimit, causeSessionLost},
		"supernode says nothing": {func(*testing.T, *memNet, *fakeNode, *host) {}, turnAfter, causeSilent},
		"peer ended":             {func(_ *testing.T, _ *memNet, _ *fakeNode, h *host) { h.end(h.session) }, lostLimit, causeSessionLost},
	} {
		for _, writer := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					net, n, h := bubble(t, PeerConfig{}, half(b), b)
					up := &upstream{bytes: b.bytes, breakAt: 100 << 10} // and it breaks off, too
					s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
					var got bytes.Buffer
					_, err := io.CopyN(struct{ io.Writer }{&got}, struct{ io.Reader }{s}, middle)
					require.NoError(t, err)
					synctest.Wait()
					began := time.Now()
					c.fail(t, net, n, h)
					if writer {
						_, err = s.WriteTo(&got)
					} else {
						_, err = io.Copy(&got, struct{ io.Reader }{s})
					}
					require.NoError(t, err)
					require.True(t, bytes.Equal(b.bytes, got.Bytes()))
					require.Equal(t, middle, up.opened()[0])
					require.Equal(t, 1, h.metric(t, "damselfly_fallbacks_total", c.cause))
					tries := time.Duration(len(up.opened())) * 2 * directBackOff
					require.InDelta(t, c.after.Seconds(), time.Since(began).Seconds(), 0.7+tries.Seconds())
				})
			})
		}
	}
}

// What the region has given and takes back may be wrong: the reader is not to take
// it, with the rest from the origin, for the whole.
func TestStreamBreaksOffWhereTheRegionWasWrong(t *testing.T) {
	b := newBlob(1<<20 + 5)
	middle := b.layout.Offset(b.layout.Count() / 2)
	wrong := digestsOf(b)
	wrong.Digests = bytes.Clone(wrong.Digests)
	wrong.Digests[0] ^= 1
	for name, say := range map[string]api.Down{
		"invalidated":        {Invalidate: []api.Invalidate{{Task: string(b.id), Reason: "wrong digest"}}},
		"digests contradict": {Digests: []api.Digests{wrong}},
	} {
		for _, direct := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					_, n, h := bubble(t, PeerConfig{}, half(b), b)
					up := &upstream{bytes: b.bytes}
					s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
					_, err := io.CopyN(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{s}, middle)
					require.NoError(t, err)
					synctest.Wait()
					if direct { // the supernode's word comes when the stream is the origin's
						_, err = s.Read(make([]byte, 1))
						require.NoError(t, err)
						require.Len(t, up.opened(), 1)
					}
					n.send(say)
					synctest.Wait()
					_, err = s.WriteTo(io.Discard)
					require.ErrorIs(t, err, errDropped)

					again := open(t, h, Request{b.id, registryOrigin(), up}, middle, -1)
					rest, err := io.ReadAll(again)
					require.NoError(t, err)
					require.Equal(t, b.bytes[middle:], rest)
				})
			})
		}
	}
}

// A slow origin behind the supernode is no reason to ask the same origin again.
func TestProgressIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(1 << 20)
		_, n, h := bubble(t, PeerConfig{}, half(b), b)
		up := &upstream{bytes: b.bytes}
		s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
		go func() {
			at := b.layout.Offset(b.layout.Count() / 2)
			for i := range 60 {
				n.send(api.Down{Progress: []api.Progress{{Task: 1, Fetched: at + int64(i)}}})
				pause(t, time.Second)
			}
			n.send(api.Down{Assign: []api.Assign{{Transfer: 2, Task: 1, First: 2, Count: 2}}})
		}()
		began := time.Now()
		got, err := io.ReadAll(s)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)
		require.InDelta(t, 60, time.Since(began).Seconds(), 1)
		require.Empty(t, up.opened())
	})
}

// Others come, the reader's own does not.
func TestLatePieceIsNotWaitedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(8 << 20)
		_, n, h := bubble(t, PeerConfig{}, half(b), b)
		up := &upstream{bytes: b.bytes}
		s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
		_, err := io.CopyN(io.Discard, struct{ io.Reader }{s}, b.layout.Offset(16))
		require.NoError(t, err)
		go func() {
			for i := range 15 {
				pause(t, 2*time.Second)
				n.send(api.Down{Assign: []api.Assign{{Transfer: uint64(i + 2), Task: 1, First: 17 + i, Count: 1}}})
			}
		}()
		began := time.Now()
		got, err := io.ReadAll(s)
		require.NoError(t, err)
		require.Equal(t, b.bytes[b.layout.Offset(16):], got)
		require.Equal(t, []int64{b.layout.Offset(16)}, up.opened())
		require.InDelta(t, turnAfter.Seconds(), time.Since(began).Seconds(), 1)
		require.Equal(t, 1, h.metric(t, "damselfly_fallbacks_total", causeLate))
	})
}

// A reader that waits says for what, not too often, and not again for the same.
func TestWant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(8 << 20)
		_, n, h := bubble(t, PeerConfig{}, half(b), b)
		req := Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}
		s := open(t, h, req, 0, -1)
		synctest.Wait()
		require.Equal(t, []api.Want{{Task: 1, First: 0, Count: 1}}, heard(n, wants), "at once")
		_, err := io.ReadAll(s) // comes to piece 16 and waits 5 s
		require.NoError(t, err)
		require.Equal(t, []api.Want{{Task: 1, First: 0, Count: 1}, {Task: 1, First: 16, Count: 1}}, heard(n, wants))
		open(t, h, req, b.layout.Offset(20)+1, 5*b.layout.PieceSize)
		require.Equal(t, api.Want{Task: 1, First: 20, Count: 6}, heard(n, wants)[2])
		require.Len(t, heard(n, wants), 3)
	})
}

func TestSessionComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(1 << 20)
		net, n, h := bubble(t, PeerConfig{Zone: "z", Rack: "r", Advertise: ":1", UpLanes: 3, DownLanes: 2}, half(b), b)
		s := open(t, h, Request{b.id, registryOrigin("me"), &upstream{}}, 0, -1)
		synctest.Wait()
		n.hang()
		pause(t, maxBackOff)
		again := heard(n, holds)
		require.NotEmpty(t, again)
		require.Equal(t, []byte{0b11}, again[0].Have, "first of all it says what it has")
		js := heard(n, joins)
		require.Len(t, js, 2, "a stream is joined again")
		require.Equal(t, js[0].Origin, js[1].Origin)
		require.Equal(t, api.Hello{
			Version: api.Version, Host: h.cfg.Host, Addr: ":1", Up: 3, Down: 2, Zone: "z", Rack: "r",
		}, *heard(n, hellos)[0])
		n.send(api.Down{Assign: []api.Assign{{Transfer: 9, Task: 1, First: 2, Count: 2}}})
		got, err := io.ReadAll(s)
		require.NoError(t, err)
		require.Equal(t, b.bytes, got)

		net.kill("node")
		pause(t, 10*time.Second)
		_, ok := h.Supernode()
		require.False(t, ok)
		net.serve(t, "node", n.routes)
		pause(t, maxBackOff)
		base, ok := h.Supernode()
		require.True(t, ok)
		require.Equal(t, "http://node:80", base)
	})
}

func TestFrozenSupernodeIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		frozen := make(chan struct{})
		_, n, h := bubble(t, PeerConfig{}, func(*fakeNode, api.Up) { <-frozen }, nil)
		defer close(frozen)
		n.note(api.Up{})
		h.mu.Lock()
		h.session.send(leaveMessage(newBlob(1).id)) // the node stops reading with it
		h.mu.Unlock()
		began := time.Now()
		for {
			if _, ok := h.Supernode(); !ok {
				break
			}
			require.Less(t, time.Since(began), 2*api.SilenceLimit)
			pause(t, 10*time.Millisecond)
		}
	})
}

func TestOriginThatBreaksOff(t *testing.T) {
	b := newBlob(1 << 20)
	t.Run("is asked again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
			up := &upstream{bytes: b.bytes, breakAt: 100_000}
			got, err := get(t, h, Request{b.id, registryOrigin(), up}, 7, 1<<20-10)
			require.NoError(t, err)
			require.Equal(t, b.bytes[7:1<<20-3], got)
			require.Equal(t, []int64{7, 100_007, 200_007}, up.opened()[:3])
		})
	})
	t.Run("not for ever", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
			up := &upstream{bytes: b.bytes, breakAt: 1000}
			s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
			up.mu.Lock()
			up.err = errors.New("registry is down")
			up.mu.Unlock()
			got, err := io.ReadAll(s)
			require.ErrorContains(t, err, "registry is down")
			require.Equal(t, b.bytes[:1000], got)
			require.Len(t, up.opened(), directTries+1)
		})
	})
	t.Run("or refuses", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
			up := &upstream{bytes: b.bytes, breakAt: 1000}
			s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
			up.mu.Lock()
			up.err = &RefusedError{Status: 401}
			up.mu.Unlock()
			_, err := io.ReadAll(s)
			refused, ok := errors.AsType[*RefusedError](err)
			require.True(t, ok)
			require.Equal(t, 401, refused.Status)
			require.Len(t, up.opened(), 2+directRefusals)
		})
	})
	t.Run("or has something else", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := newHost(t, t.TempDir(), PeerConfig{}, 0, nil)
			up := &upstream{bytes: b.bytes, breakAt: 1000}
			s := open(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
			up.mu.Lock()
			up.bytes = b.bytes[:len(b.bytes)-1]
			up.mu.Unlock()
			_, err := io.ReadAll(s)
			require.ErrorContains(t, err, "1048575 bytes now")
		})
	})
}

// A transfer is told to end soon once, when its last bytes are on their way.
func TestSoonIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(1 << 20)
		goOn := make(chan struct{})
		net, n, h := bubble(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				n.send(api.Down{
					Task: []api.Task{n.grant(j, b)}, Digests: []api.Digests{digestsOf(b)},
					Assign: []api.Assign{{Transfer: 1, Task: 1, Count: 3, Parent: "parent:80"}},
				})
			}
		}, b)
		net.serve(t, "parent", parent(b, func(w http.ResponseWriter, r *http.Request, body []byte) {
			header(w, r, b, len(body))
			_, _ = w.Write(body[:len(body)/3])
			_ = http.NewResponseController(w).Flush()
			pause(t, time.Second)
			_, _ = w.Write(body[len(body)/3 : len(body)*19/20])
			_ = http.NewResponseController(w).Flush()
			<-goOn
			_, _ = w.Write(body[len(body)*19/20:])
		}))
		s := open(t, h, Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}, 0, 3*b.layout.PieceSize)
		pause(t, 500*time.Millisecond)
		require.Empty(t, heard(n, soons), "most is to come")
		pause(t, time.Second)
		synctest.Wait()
		require.Equal(t, []uint64{1}, heard(n, soons))
		require.Less(t, len(heard(n, dones)), 3, "before it ends")
		close(goOn)
		got, err := io.ReadAll(s)
		require.NoError(t, err)
		require.Equal(t, b.bytes[:3*b.layout.PieceSize], got)
		synctest.Wait()
		require.Less(t, len(heard(n, dones)), 3, "the last goes with what is to be said next")
		pause(t, api.DoneWithin+time.Millisecond)
		require.Len(t, heard(n, dones), 3, "or after a while")
		require.Equal(t, []uint64{1}, heard(n, soons), "once")
	})
}
