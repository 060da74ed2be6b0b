//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const (
	wheels  = 4
	dialing = 64    // sessions opened at once
	perAddr = 20000 // sessions of one local address, which has ports for more
)

// swarm is the hosts.
type swarm struct {
	cfg    config
	origin *origin
	url    string
	wheels []*wheel
	hosts  []*host
	fail   context.CancelCauseFunc
	group  sync.WaitGroup

	pieceTime atomic.Int64 // how long a lane takes for a piece, in nanoseconds
	stats     atomic.Pointer[stats]
}

func newSwarm(c config, o *origin, url string) *swarm {
	s := &swarm{cfg: c, origin: o, url: url}
	s.stats.Store(&stats{})
	for i := range wheels {
		s.wheels = append(s.wheels, newWheel(uint64(i)))
	}
	return s
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

// connect opens all sessions.
func (s *swarm) connect(ctx context.Context) error {
	clients := make([]*http.Client, s.cfg.sessions/perAddr+1)
	for i := range clients {
		d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(i+1))}}
		clients[i] = &http.Client{Transport: &http.Transport{DialContext: d.DialContext}}
	}
	s.hosts = make([]*host, s.cfg.sessions)
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(dialing)
	for i := range s.hosts {
		group.Go(func() error {
			h := &host{swarm: s, wheel: s.wheels[i%wheels], task: i % len(s.origin.blobs), coming: map[uint64]*transfer{}}
			conn, err := hello(gctx, clients[i/perAddr], s.url, api.Hello{
				Version: api.Version, Host: fmt.Sprint("host-", i), Addr: fmt.Sprintf("10.%d.%d.%d:65002", i>>16, i>>8&255, i&255),
				Up: s.cfg.lanes, Down: s.cfg.lanes,
			})
			if err != nil {
				return fmt.Errorf("session %d: %w", i, err)
			}
			h.conn = conn
			s.hosts[i] = h
			s.keep(ctx, h)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return errors.Join(context.Cause(ctx), err) // a session that has broken ends the dialling of others
	}
	return nil
}

// keep follows a session to its end, which must not come before that of ctx.
func (s *swarm) keep(ctx context.Context, h *host) {
	s.group.Go(func() {
		if err := h.conn.KeepAlive(ctx); ctx.Err() == nil {
			s.fail(err)
		}
	})
	s.group.Go(func() {
		for {
			down, err := h.conn.Read(context.Background()) // close ends it
			if err == nil {
				err = h.follow(down)
			}
			if err != nil {
				if ctx.Err() == nil {
					s.fail(fmt.Errorf("a host's session ends: %w", err))
				}
				return
			}
		}
	})
}

// begin has all hosts join within the time to settle.
func (s *swarm) begin(ctx context.Context) {
	for i, h := range s.hosts {
		h.wheel.after(s.cfg.settle*time.Duration(i)/time.Duration(len(s.hosts)), due{h: h})
	}
	for _, w := range s.wheels {
		s.group.Go(func() {
			if err := w.run(ctx); ctx.Err() == nil {
				s.fail(err)
			}
		})
	}
}

// close ends all sessions. Their context has ended.
func (s *swarm) close() {
	for _, h := range s.hosts {
		if h != nil {
			h.conn.CloseNow()
		}
	}
	s.group.Wait()
}

// stalled returns how many hosts need pieces and were told of none for so long.
func (s *swarm) stalled(long time.Duration) (n int) {
	for _, h := range s.hosts {
		h.mu.Lock()
		if h.have.Len() < h.have.Cap() && time.Since(h.assigned) > long {
			n++
		}
		h.mu.Unlock()
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

// host is one host's session and what it does.
type host struct {
	swarm *swarm
	wheel *wheel
	conn  *api.Conn[api.Down, api.Up]

	mu       sync.Mutex // guards what follows
	task     int        // of the origin's
	num      int32      // the same, in this session; 0 until the join is answered
	seq      uint64
	joined   time.Time // when it asked to
	have     pieces.Set
	onTheWay int // pieces
	coming   map[uint64]*transfer
	assigned time.Time // when last
	out      api.Up
	asks     int         // lanes that may have their next with out
	asked    []time.Time // since when lanes may have their next
	freed    int         // lanes that have ended with nothing to go on with
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
	h.mu.Lock()
	defer h.mu.Unlock()
	tr := d.tr
	switch {
	case tr == nil:
		h.join()
	case tr.ended:
	case d.soon && tr.soon: // with another
	case d.soon:
		h.out.Soon = append(h.out.Soon, tr.id)
		h.ask(tr)
	default:
		h.out.Done = append(h.out.Done, api.Done{Transfer: tr.id, Piece: tr.piece})
		h.have.Add(tr.piece)
		tr.piece++
		tr.left--
		h.onTheWay--
		if tr.left > 0 {
			h.wheel.after(h.swarm.lasts(1), due{h: h, tr: tr})
			return
		}
		h.end(tr)
		if h.have.Full() {
			h.leave()
		}
	}
}

// lasts is how long a lane takes for n pieces.
func (s *swarm) lasts(n int) time.Duration {
	return time.Duration(n) * time.Duration(s.pieceTime.Load())
}

// run begins a transfer, whose end is told when a third of its time is left.
func (h *host) run(tr *transfer) {
	h.wheel.after(h.swarm.lasts(1), due{h: h, tr: tr})
	h.wheel.after(h.swarm.lasts(tr.left)*2/3, due{h: h, tr: tr, soon: true})
}

// ask notes that tr's lanes may have their next.
func (h *host) ask(tr *transfer) {
	if !tr.soon && h.needs() {
		h.asks++
	}
	tr.soon = true
}

// needs tells whether there is something to be told to get.
func (h *host) needs() bool { return h.have.Len()+h.onTheWay < h.have.Cap() }

func (h *host) end(tr *transfer) {
	tr.ended = true
	h.onTheWay -= tr.left
	delete(h.coming, tr.id)
	h.ask(tr)
	if len(h.coming) < h.swarm.cfg.lanes && h.needs() {
		h.freed++
	}
}

// join asks for the host's task. At the first time the host has some of it
// already, so that the crowd has no common beginning.
func (h *host) join() {
	l := h.swarm.origin.layout
	id := string(h.swarm.origin.blobs[h.task])
	h.have, h.joined, h.assigned = pieces.NewSet(l.Count()), time.Now(), time.Now()
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
}

// leave goes on to the next task. What the host has just got it still gives to
// others, what it got before that no longer.
func (h *host) leave() {
	n := len(h.swarm.origin.blobs)
	h.out.Leave = append(h.out.Leave, api.Leave{Task: string(h.swarm.origin.blobs[(h.task+n-1)%n])})
	h.task = (h.task + 1) % n
	h.asks, h.asked, h.freed, h.idle = 0, nil, 0, nil
	h.join()
}

// flush sends what the host has to say.
func (h *host) flush() error {
	h.mu.Lock()
	now := time.Now()
	up := h.out
	h.out = api.Up{}
	for range h.asks {
		h.asked = append(h.asked, now)
	}
	for range h.freed {
		h.idle = append(h.idle, now)
	}
	h.asks, h.freed = 0, 0
	h.mu.Unlock()
	if up.Done == nil && up.Soon == nil && up.Join == nil {
		return nil
	}
	return h.conn.Write(context.Background(), up)
}

// follow acts on what the supernode says.
func (h *host) follow(down api.Down) error {
	stats := h.swarm.stats.Load()
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range down.Task {
		if t.Seq == h.seq {
			h.num = t.Num
			stats.joins.add(now.Sub(h.joined))
		}
	}
	for _, a := range down.Assign {
		stats.assigned.Add(1)
		h.assigned = now
		tr := &transfer{id: a.Transfer, piece: a.First, left: a.Count}
		h.coming[tr.id] = tr
		h.onTheWay += tr.left
		h.run(tr)
		if len(h.asked) > 0 {
			stats.answers.add(now.Sub(h.asked[0]))
			h.asked = h.asked[1:]
		}
		if len(h.idle) > 0 {
			stats.idle.add(now.Sub(h.idle[0]))
			h.idle = h.idle[1:]
		}
	}
	for _, id := range down.Cancel {
		if tr := h.coming[id]; tr != nil {
			h.end(tr)
		}
	}
	if len(down.Refused) > 0 || len(down.Invalidate) > 0 {
		return errors.New("the supernode refuses a task that it has")
	}
	return nil
}
