package dfget

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http/httptrace"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"damselfly.dev/address"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
)

const (
	helloTimeout = 5 * time.Second // for all that goes before the first batch
	minBackOff   = 100 * time.Millisecond
	maxBackOff   = 2 * time.Second

	frameSize = 256 << 10 // bytes that a batch is filled to, by estimate
	maxQueued = 1 << 16   // messages waiting to be written; more end the session
)

// session is one connection with a supernode, from the Welcome to its end.
type session struct {
	base   string
	near   bool // the region may be all on this machine: then parents may be
	sealed bool // nobody else can listen: what is private may be told
	conn   *api.Conn[api.Down, api.Up]
	life   context.Context // of Run: what is assigned may outlive the session

	mu *sync.Mutex // Peer.mu, which guards what follows

	over    bool
	drains  bool // nothing is to be joined any more
	seq     uint64
	joins   map[uint64]*Stream // what waits for an answer
	nums    map[int32]*task
	running map[uint64]*transfer // assigned and not ended
	queue   []message
	wake    chan struct{} // holds one token while the queue may hold something
	since   time.Time     // when the queue last began to fill
	timed   bool          // expire will be called
}

// message is one element of a batch. Its size is an estimate in bytes; after
// one that is last nothing may follow in the same batch. One that waits goes with
// the next that does not, or in api.DoneWithin.
type message struct {
	size  int
	last  bool
	waits bool
	add   func(*api.Up)
}

// leaveMessage is last: what follows it, such as a Join of the same task, would
// be acted on before it.
func leaveMessage(id pieces.TaskID) message {
	return message{size: 96, last: true, add: func(u *api.Up) { u.Leave = append(u.Leave, api.Leave{Task: string(id)}) }}
}

// holdMessage says what the store has of a task at the time it is written, so
// that it can never take back a piece reported before.
func holdMessage(store *pieces.Store, id pieces.TaskID) message {
	return message{size: pieces.MaxPieces / 8, add: func(u *api.Up) {
		c, err := store.Look(id)
		if err != nil {
			return
		}
		defer c.Release()
		have := c.Have()
		h := api.Hold{Task: string(id), Layout: c.Layout(), Have: have.Bytes()}
		for first := range have.All() {
			h.Digest = pieces.AppendDigests(nil, c.Digest(first))
			break
		}
		u.Hold = append(u.Hold, h)
	}}
}

// send queues a message; after the session's end nobody hears it. Peer.mu is held.
func (s *session) send(m message) {
	if s.over {
		return
	}
	if len(s.queue) == 0 {
		s.since = time.Now()
	}
	s.queue = append(s.queue, m)
	switch {
	case !m.waits:
		s.awake()
	case !s.timed:
		s.timed = true
		time.AfterFunc(api.DoneWithin, s.expire)
	}
}

// awake has the queue written.
func (s *session) awake() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// expire has what waits in the queue written when it has waited for long enough.
func (s *session) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if left := api.DoneWithin - time.Since(s.since); left > 0 && len(s.queue) > 0 && !s.over {
		time.AfterFunc(left, s.expire)
		return
	}
	s.timed = false
	s.awake()
}

// report is send for who does not hold Peer.mu.
func (p *Peer) report(s *session, m message) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.send(m)
}

// keepSession opens one session after another until ctx ends.
func (p *Peer) keepSession(ctx context.Context) error {
	pause := minBackOff
	warned := make(map[string]string)
	for len(p.cfg.Supernodes) > 0 {
		for _, base := range p.cfg.Supernodes {
			began := time.Now()
			stood, err := p.serve(ctx, base)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if why := root(err); (stood || warned[base] != why) && !errors.Is(err, identity.ErrNone) { // not again for every attempt
				p.log.Warn("no session with the supernode", zap.String("supernode", base), zap.Error(err))
				warned[base] = why
			}
			if time.Since(began) > maxBackOff {
				pause = minBackOff
			}
			if stood {
				break // the first one is preferred again
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause/2 + rand.N(pause/2)): //nolint:gosec // no secret: hosts should not come all at once
		}
		pause = min(2*pause, maxBackOff)
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// root is what err comes from: what is said around it has ports that change.
func root(err error) string {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err.Error()
		}
		err = inner
	}
}

// serve opens a session with one supernode and follows it to its end. It tells
// whether the session stood.
func (p *Peer) serve(ctx context.Context, base string) (stood bool, err error) {
	s, keys, err := p.dial(ctx, base)
	if err != nil {
		return false, err
	}
	p.tickets.learn(keys)
	s.life = ctx
	p.begin(s)
	p.log.Info("session stands", zap.String("supernode", base))
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return s.conn.KeepAlive(ctx, func() { p.report(s, message{add: func(*api.Up) {}}) })
	})
	group.Go(func() error { return p.write(ctx, s) })
	group.Go(func() error {
		for {
			down, err := s.conn.Read(context.Background())
			if err != nil {
				return err
			}
			p.follow(s, down) // what is assigned may outlive the session
		}
	})
	group.Go(func() error { // Read and Write end with the connection
		<-ctx.Done()
		s.conn.CloseNow()
		return context.Cause(ctx)
	})
	err = group.Wait()
	p.end(s)
	return true, err
}

// dial opens the connection and greets.
func (p *Peer) dial(ctx context.Context, base string) (*session, []ed25519.PublicKey, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	sealed, near := p.cfg.ClearPrivate || strings.HasPrefix(base, "https:"), false
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) {
		near = address.IsLoopback(c.Conn.RemoteAddr().String())
		sealed = sealed || near
	}})
	conn, err := api.Dial(ctx, p.client, base)
	if err != nil && strings.HasPrefix(base, "https:") && p.cfg.Identity == nil {
		err = fmt.Errorf("%w (a supernode at https:// wants a certificate: give --tls, or --join-token)", err)
	}
	if err != nil {
		return nil, nil, err
	}
	hello := api.Hello{
		Version: api.Version, Host: p.cfg.Host, Addr: p.cfg.Advertise,
		Up: p.cfg.UpLanes, Down: p.cfg.DownLanes, Zone: p.cfg.Zone, Rack: p.cfg.Rack,
	}
	var down api.Down
	if err = conn.Write(ctx, api.Up{Hello: &hello}); err == nil {
		down, err = conn.Read(ctx)
	}
	var keys []ed25519.PublicKey
	if down.Welcome != nil {
		keys = api.TicketKeys(down.Welcome.Keys)
		p.tickets.tells(down.Welcome.Now)
	}
	switch w := down.Welcome; {
	case err != nil:
	case w == nil || w.Version != api.Version:
		err = fmt.Errorf("the supernode at %s speaks another version: use the same one here and there", base)
	case len(keys) == 0:
		err = fmt.Errorf("the supernode at %s sent no key for tickets", base)
	default:
		return &session{
			base: base, sealed: sealed, near: near && (strings.HasPrefix(p.cfg.Advertise, ":") || p.cfg.Advertise == "" || address.IsLoopback(p.cfg.Advertise)),
			conn: conn, mu: &p.mu,
			joins: make(map[uint64]*Stream), nums: make(map[int32]*task), running: make(map[uint64]*transfer),
			wake: make(chan struct{}, 1),
		}, keys, nil
	}
	conn.CloseNow()
	return nil, nil, err
}

// begin makes s the session: the supernode is told what the store holds, and
// what streams still need is joined again.
func (p *Peer) begin(s *session) {
	held := p.store.Tasks()
	slices.SortFunc(held, func(a, b pieces.Held) int { return b.LastUse.Compare(a.LastUse) }) // past its bound the supernode takes no more
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, h := range held {
		m := holdMessage(p.store, h.ID)
		m.size = 160 + (h.Layout.Count()+7)/8
		s.send(m)
	}
	p.session = s
	close(p.up)
	p.metrics.session.Set(1)
	p.metrics.sealed.Set(0)
	if s.sealed {
		p.metrics.sealed.Set(1)
	}
	for _, t := range p.tasks {
		for st := range t.streams {
			if !t.complete {
				p.joinLocked(s, st)
			}
		}
	}
}

// end takes s away. What was asked of it has no answer; what it assigned goes on.
func (p *Peer) end(s *session) {
	p.mu.Lock()
	p.session, p.lost, p.up = nil, time.Now(), make(chan struct{})
	p.metrics.session.Set(0)
	s.over, s.queue = true, nil
	for seq := range s.joins {
		s.answerLocked(seq, answer{err: errNoSession})
	}
	var idle []*pieces.Content
	for _, t := range p.tasks {
		t.session = nil
		idle = append(idle, p.settleLocked(t))
	}
	p.mu.Unlock()
	release(idle...)
}

// write sends what is queued, as much as fits in one batch at a time.
func (p *Peer) write(ctx context.Context, s *session) error {
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.wake:
		}
		for {
			p.mu.Lock()
			n, over := s.batchLocked(), len(s.queue) > maxQueued
			batch := s.queue[:n]
			s.queue = s.queue[n:]
			p.mu.Unlock()
			if over {
				return errors.New("the supernode does not keep up")
			}
			if n == 0 {
				break
			}
			var up api.Up
			for _, m := range batch {
				m.add(&up)
			}
			if err := s.conn.Write(context.Background(), up); err != nil {
				return err
			}
		}
	}
}

// batchLocked returns how many messages go into the next batch.
func (s *session) batchLocked() int {
	size := 0
	for i, m := range s.queue {
		size += m.size
		if size > frameSize && i > 0 {
			return i
		}
		if m.last {
			return i + 1
		}
	}
	return len(s.queue)
}

// tells returns what of an origin the supernode is told: in clear nothing of who
// the caller is.
func (s *session) tells(o api.Origin) api.Origin {
	if s.hides(o) {
		o.Header = nil
	}
	return o
}

// hides tells whether that is less than the caller has said. Then a no of the
// origin is not meant for the caller.
func (s *session) hides(o api.Origin) bool {
	if s.sealed {
		return false
	}
	for k := range o.Header {
		if k != "Accept" && k != "User-Agent" {
			return true
		}
	}
	return len(o.Ignore) > 0 || strings.Contains(o.URL, "?") // it is signed, or may be
}

// joinLocked asks for st's task on its behalf.
func (p *Peer) joinLocked(s *session, st *Stream) {
	s.seq++
	seq, origin, id := s.seq, s.tells(st.origin), st.task.id
	s.joins[seq] = st
	st.task.asked++
	lazy := st.task.lazy && (st.lazy || st.task.session == s && st.task.content.IsWindow())
	if st.task.session != s || !lazy { // else it is known
		s.send(holdMessage(p.store, id))
	}
	s.send(message{size: 256 + headerSize(origin.Header) + len(origin.URL), add: func(u *api.Up) {
		u.Join = append(u.Join, api.Join{Seq: seq, Task: string(id), Origin: origin, Small: true, Lazy: lazy, Size: st.said})
	}})
}
