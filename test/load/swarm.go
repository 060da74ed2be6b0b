//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const (
	loops   = 2
	dialing = 64    // sessions opened at once
	perAddr = 20000 // sessions of one local address, which has ports for more
)

// swarm is the hosts.
type swarm struct {
	cfg    config
	origin *origin
	url    string
	loops  []*loop
	fail   context.CancelCauseFunc
	group  sync.WaitGroup

	pieceTime atomic.Int64 // how long a lane takes for a piece, in nanoseconds
	stats     atomic.Pointer[stats]
}

func newSwarm(c config, o *origin, url string) (*swarm, error) {
	s := &swarm{cfg: c, origin: o, url: url}
	s.stats.Store(&stats{})
	for i := range loops {
		l, err := newLoop(s, uint64(i))
		if err != nil {
			return nil, err
		}
		s.loops = append(s.loops, l)
	}
	return s, nil
}

// setRate makes the hosts' links such that they take so many pieces a second. A
// lane has its next transfer when a third of the last one is left.
func (s *swarm) setRate(rate float64) {
	s.pieceTime.Store(int64(1.5 * float64(s.cfg.sessions*s.cfg.lanes) / rate * float64(time.Second)))
}

// hello opens a session.
func hello(ctx context.Context, client *http.Client, url string, h api.Hello) (*api.Conn[api.Down, api.Up], error) {
	conn, err := api.Dial(ctx, client, url)
	if err != nil {
		return nil, err
	}
	if err = conn.Write(ctx, api.Up{Hello: &h}); err == nil {
		_, err = conn.Read(ctx)
	}
	if err != nil {
		conn.CloseNow()
		return nil, err
	}
	return conn, nil
}

// socket opens a session and returns the socket that it goes on over: thousands
// cost least without a goroutine each.
func (s *swarm) socket(ctx context.Context, i int) (fd int, err error) {
	var tcp *net.TCPConn
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(i/perAddr+1))}}
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := d.DialContext(ctx, network, addr)
		if err == nil {
			tcp = conn.(*net.TCPConn)
		}
		return conn, err
	}}}
	conn, err := hello(ctx, client, s.url, api.Hello{
		Version: api.Version, Host: fmt.Sprint("host-", i), Addr: fmt.Sprintf("10.%d.%d.%d:65002", i>>16, i>>8&255, i&255),
		Up: s.cfg.lanes, Down: s.cfg.lanes,
	})
	if err != nil {
		return 0, err
	}
	defer conn.CloseNow() // the socket stays open
	raw, err := tcp.SyscallConn()
	if err == nil {
		var failed error
		err = raw.Control(func(old uintptr) { fd, failed = syscall.Dup(int(old)) })
		err = errors.Join(err, failed)
	}
	return fd, err
}

// connect opens all sessions. They are followed from then on, and must not end
// before ctx.
func (s *swarm) connect(ctx context.Context) error {
	for _, l := range s.loops {
		s.group.Go(func() {
			if err := l.run(ctx); ctx.Err() == nil {
				s.fail(err)
			}
		})
	}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(dialing)
	for i := range s.cfg.sessions {
		group.Go(func() error {
			fd, err := s.socket(gctx, i)
			if err != nil {
				return fmt.Errorf("session %d: %w", i, err)
			}
			l, h := s.loops[i%loops], &host{swarm: s, fd: fd, task: i % len(s.origin.blobs)}
			select {
			case l.calls <- func() { l.add(h) }:
				return nil
			case <-gctx.Done():
				syscall.Close(fd)
				return context.Cause(gctx)
			}
		})
	}
	if err := group.Wait(); err != nil {
		return errors.Join(context.Cause(ctx), err) // a session that has broken ends the dialling of others
	}
	return nil
}

// begin has all hosts join within the time to settle.
func (s *swarm) begin(ctx context.Context) {
	for _, l := range s.loops {
		join := func() {
			for i, h := range l.hosts {
				l.after(l.now, s.cfg.settle*time.Duration(i)/time.Duration(len(l.hosts)), due{h: h})
			}
		}
		select {
		case l.calls <- join:
		case <-ctx.Done():
		}
	}
}

// close ends all sessions. Their context has ended.
func (s *swarm) close() {
	s.group.Wait()
	for _, l := range s.loops {
		l.close()
	}
}

// stalled returns how many hosts need pieces and were told of none for as long
// as a phase lasts.
func (s *swarm) stalled() (n int64) {
	for _, l := range s.loops {
		n += l.stalled.Load()
	}
	return n
}

// flood opens so many sessions more that ask for pieces of nothing without end,
// as fast as they are read from.
func (s *swarm) flood(ctx context.Context, n int) error {
	up := api.Up{Want: make([]api.Want, 4096)}
	for i := range n {
		conn, err := hello(ctx, http.DefaultClient, s.url, api.Hello{Version: api.Version, Host: fmt.Sprint("flood-", i)})
		if err != nil {
			return err
		}
		s.group.Go(func() {
			defer conn.CloseNow()
			for conn.Write(ctx, up) == nil { // it may be thrown out
			}
		})
	}
	return nil
}

// host is one host's session and what it does. It is its loop's.
type host struct {
	swarm  *swarm
	loop   *loop
	number int32 // in the loop's hosts
	fd     int
	begun  []byte // of a frame that comes
	unsent []byte
	heard  time.Time // of the supernode, when last
	spoke  time.Time // this host, when last
	saying bool      // stands in loop.said

	task     int    // of the origin's
	seq      uint64 // of the last join
	joined   time.Time
	have     pieces.Set
	onTheWay int // pieces
	coming   []*transfer
	assigned time.Time // when last
	out      api.Up
	came     []time.Time // when the pieces of out.Done did
	timed    bool        // late will be called
	asked    []time.Time // since when lanes may have their next
	idle     []time.Time // since when lanes have nothing
}

// transfer is one Assign to its end.
type transfer struct {
	id    uint64
	piece int // the next
	left  int
	soon  bool // the supernode was told of its end
	ended bool
}

// due acts on what is due: a piece has come, or a transfer ends soon.
func (h *host) due(d due) {
	tr := d.tr
	switch {
	case d.late:
		h.late()
	case tr == nil:
		h.join()
	case tr.ended:
	case d.soon:
		h.out.Soon = append(h.out.Soon, tr.id)
		h.says()
		h.ask(tr)
	default:
		h.out.Done = append(h.out.Done, api.Done{Transfer: tr.id, Piece: tr.piece})
		h.came = append(h.came, h.loop.now)
		if !tr.soon {
			h.says()
		} else if !h.timed {
			h.timed = true
			h.loop.after(h.loop.now, api.DoneWithin, due{h: h, late: true})
		}
		h.have.Add(tr.piece)
		tr.piece++
		tr.left--
		h.onTheWay--
		if tr.left > 0 {
			h.loop.after(h.loop.now, h.swarm.lasts(1), due{h: h, tr: tr})
			return
		}
		h.end(tr)
		if h.have.Full() {
			h.leave()
		}
	}
}

// late sends what has been kept back for long enough.
func (h *host) late() {
	h.timed = false
	if len(h.came) == 0 {
		return
	}
	if left := api.DoneWithin - h.loop.now.Sub(h.came[0]); left > 0 {
		h.timed = true
		h.loop.after(h.loop.now, left, due{h: h, late: true})
		return
	}
	h.says()
}

// lasts is how long a lane takes for n pieces.
func (s *swarm) lasts(n int) time.Duration {
	return time.Duration(n) * time.Duration(s.pieceTime.Load())
}

// run begins a transfer, whose end is told when a third of its time is left.
func (h *host) run(tr *transfer) {
	h.loop.after(h.loop.now, h.swarm.lasts(1), due{h: h, tr: tr})
	h.loop.after(h.loop.now, h.swarm.lasts(tr.left)*2/3, due{h: h, tr: tr, soon: true})
}

// ask notes that tr's lanes may have their next.
func (h *host) ask(tr *transfer) {
	if !tr.soon && h.needs() {
		h.asked = append(h.asked, h.loop.now)
	}
	tr.soon = true
}

// needs tells whether there is something to be told to get.
func (h *host) needs() bool { return h.have.Len()+h.onTheWay < h.have.Cap() }

func (h *host) end(tr *transfer) {
	tr.ended = true
	h.onTheWay -= tr.left
	h.coming = slices.DeleteFunc(h.coming, func(other *transfer) bool { return other == tr })
	h.ask(tr)
	if len(h.coming) < h.swarm.cfg.lanes && h.needs() {
		h.idle = append(h.idle, h.loop.now)
	}
}

// join asks for the host's task. At the first time the host has some of it
// already, so that the crowd has no common beginning.
func (h *host) join() {
	l := h.swarm.origin.layout
	id := string(h.swarm.origin.blobs[h.task])
	h.have, h.joined, h.assigned = pieces.NewSet(l.Count()), h.loop.now, h.loop.now
	if h.seq == 0 {
		share := rand.Float64()
		for i := range l.Count() - 1 {
			if rand.Float64() < share {
				h.have.Add(i)
			}
		}
		h.out.Hold = append(h.out.Hold, api.Hold{Task: id, Layout: l, Have: h.have.Bytes()})
	}
	h.seq++
	h.out.Join = append(h.out.Join, api.Join{
		Seq: h.seq, Task: id, Origin: api.Origin{Registry: registry, Repository: repository},
	})
	h.says()
}

// leave goes on to the next task. What the host has just got it still gives to
// others, what it got before that no longer.
func (h *host) leave() {
	n := len(h.swarm.origin.blobs)
	h.out.Leave = append(h.out.Leave, api.Leave{Task: string(h.swarm.origin.blobs[(h.task+n-1)%n])})
	h.task = (h.task + 1) % n
	h.asked, h.idle = nil, nil
	h.join()
}

// flush sends what the host has to say.
func (h *host) flush() error {
	h.saying = false
	for i, at := range h.came {
		h.out.Done[i].AgoMS = h.loop.now.Sub(at).Milliseconds()
	}
	err := h.write(&h.out)
	h.out, h.came = api.Up{Done: h.out.Done[:0], Soon: h.out.Soon[:0]}, h.came[:0]
	return err
}

// follow acts on what the supernode says.
func (h *host) follow(down *api.Down) error {
	stats := h.swarm.stats.Load()
	now := time.Now()
	for _, t := range down.Task {
		if t.Seq == h.seq {
			stats.joins.add(now.Sub(h.joined))
		}
	}
	for _, a := range down.Assign {
		stats.assigned.Add(1)
		h.assigned = now
		tr := &transfer{id: a.Transfer, piece: a.First, left: a.Count}
		h.coming = append(h.coming, tr)
		h.onTheWay += tr.left
		h.run(tr)
		if len(h.asked) > 0 {
			stats.answers.add(now.Sub(h.asked[0]))
			h.asked = slices.Delete(h.asked, 0, 1)
		}
		if len(h.idle) > 0 {
			stats.idle.add(now.Sub(h.idle[0]))
			h.idle = slices.Delete(h.idle, 0, 1)
		}
	}
	for _, id := range down.Cancel {
		for _, tr := range slices.Clone(h.coming) {
			if tr.id == id {
				h.end(tr)
			}
		}
	}
	if len(down.Refused) > 0 || len(down.Invalidate) > 0 {
		return errors.New("the supernode refuses a task that it has")
	}
	return nil
}
