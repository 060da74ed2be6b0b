package supernode

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"damselfly.dev/address"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/scheduler"
	"damselfly.dev/supernode/api"
)

const (
	helloTimeout = 5 * time.Second
	joinTimeout  = time.Minute // hosts turn elsewhere long before
	askingEvery  = time.Second // how often a host is told what it waits for
	smallTimeout = time.Second // for all of a small content, before the answer
	maxJoins     = 256         // joins of a session being answered
	// joinsPerSecond and joinsAtOnce bound what of the registries' and the region's
	// time one host can take: the many small layers of some images, and all it was at
	// after a reconnect.
	joinsPerSecond = 100
	joinsAtOnce    = 1000
	maxQueued      = 16 << 20         // bytes waiting for a slow reader, roughly
	maxUsed        = 4                // places in a queue that is used again
	frameSize      = api.MaxFrame / 2 // bounds one message
	batchSize      = 32 << 10         // where a frame is full: its first message is read when its last has come

	// itemsPerSecond and itemsAtOnce bound what a host may say: a piece of
	// 256 KiB each at 40 Gbit/s, and all it holds after a reconnect.
	itemsPerSecond = 20_000
	itemsAtOnce    = 200_000
)

var (
	errReplaced = errors.New("replaced by another session of this host")
	errSlow     = errors.New("too slow a reader")
	errStopping = errors.New("the supernode is shutting down")
	errDropped  = errors.New("the content was dropped meanwhile; ask again")
	errTooMany  = errors.New("too many joins at once")
	errFlood    = errors.New("more at once than a host may say")
)

// session is the connection with one host.
type session struct {
	node   *Supernode
	conn   *api.Conn[api.Up, api.Down]
	end    context.CancelCauseFunc
	name   string // the host's own id, with TLS behind who
	who    string // the name in its certificate; "" without TLS
	sealed bool   // nobody else can listen
	addr   string // where peers reach it, "" for nowhere
	far    bool   // in another zone than the supernode
	remote string
	since  time.Time
	joins  chan struct{} // a place for each join being answered

	// Owned by the region.
	id        scheduler.HostID
	holds     map[pieces.TaskID]*holding
	heldBytes int
	transfers map[scheduler.TransferID]transfer
	strays    int // reports of no transfer of its

	mu      sync.Mutex // guards what follows
	queue   []message
	queued  int  // bytes
	writing bool // by a goroutine of write
	stopped bool // nothing is written any more
	writes  sync.WaitGroup
}

// message is something to be told to a host, in its turn: the assignment, and
// what add puts into a batch, which is called by the goroutine that writes. One
// with neither shows that the supernode is there.
type message struct {
	size   int  // of its encoded form, roughly
	first  bool // not in one batch after an Invalidate, which would be acted on later
	assign api.Assign
	add    func(*api.Down)
}

// send queues m. It never waits: a host that does not read loses its session.
func (s *session) send(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return
	}
	s.queue = append(s.queue, m)
	if s.queued += m.size + 64; s.queued > maxQueued {
		s.end(errSlow)
	}
	if !s.writing {
		s.writing = true
		s.writes.Go(s.write)
	}
}

// take returns what is queued, of which used, which is empty, is the place for
// what comes then. Without anything there is no more writing.
func (s *session) take(used []message) []message {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.queue
	s.queue, s.queued = used, 0
	if s.writing = len(q) > 0; !s.writing && used == nil {
		s.queue = q
	}
	return q
}

// stop waits until nothing is written any more.
func (s *session) stop() {
	s.mu.Lock()
	s.stopped, s.queue = true, nil
	s.mu.Unlock()
	s.writes.Wait()
}

// serveSession is the life of a session.
func (n *Supernode) serveSession(w http.ResponseWriter, r *http.Request) {
	if !n.sessions.Enter(api.Neighbour(r.RemoteAddr)) {
		n.metrics.refused.Inc()
		writeError(w, http.StatusServiceUnavailable, api.CodeTooManyHosts, "this supernode has as many hosts as it may, in all or from one address")
		return
	}
	defer n.sessions.Leave(api.Neighbour(r.RemoteAddr))
	if n.floods.bars(api.Neighbour(r.RemoteAddr), time.Now()) {
		n.metrics.refused.Inc()
		writeError(w, http.StatusServiceUnavailable, api.CodeTooManyHosts, "a session from this address has just ended for what it said: come back in some seconds")
		return
	}
	conn, err := api.Accept(w, r)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)
	defer context.AfterFunc(n.ctx, func() { cancel(context.Cause(n.ctx)) })() // the supernode's own end
	defer context.AfterFunc(ctx, func() { hangUp(conn, context.Cause(ctx)) })()
	s := &session{
		node: n, conn: conn, end: cancel, remote: r.RemoteAddr, since: time.Now(),
		joins:     make(chan struct{}, maxJoins),
		holds:     map[pieces.TaskID]*holding{},
		transfers: map[scheduler.TransferID]transfer{},
	}
	expiry, err := s.introduce(r)
	defer expiry()
	var hello *api.Hello
	if err == nil {
		hello, err = s.hello(ctx)
	}
	if err != nil {
		n.floods.after(s.remote, err)
		n.log.Info("session refused", zap.String("remote", s.remote), zap.Error(err))
		conn.Close(err.Error())
		return
	}
	n.log.Info("session begins", zap.String("host", s.name), zap.String("remote", s.remote))
	n.region.do(func() {
		n.region.hostUp(s, hello)
		keys := n.keys.wire()
		s.send(message{size: 192, add: func(b *api.Down) {
			b.Welcome = &api.Welcome{Version: api.Version, Keys: keys, Now: n.now().UnixMilli()}
		}})
	})
	var wg sync.WaitGroup
	cancel(s.read(ctx, &wg))
	n.region.do(func() { n.region.hostDown(s) })
	n.floods.after(s.remote, context.Cause(ctx))
	n.log.Info("session ends", zap.String("host", s.name), zap.Error(context.Cause(ctx)))
	wg.Wait()
	s.stop()
}

// hangUp closes the connection, which ends reading and writing, and says why
// where the host would wonder.
func hangUp(conn *api.Conn[api.Up, api.Down], why error) {
	if errors.Is(why, errReplaced) || errors.Is(why, errStopping) {
		conn.Close(why.Error())
	}
	conn.CloseNow()
}

// hello reads and checks how the host introduces itself.
func (s *session) hello(ctx context.Context) (*api.Hello, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	up, err := s.conn.Read(ctx)
	if err != nil {
		return nil, err
	}
	h := up.Hello
	switch {
	case h == nil:
		return nil, errors.New("the first frame has no hello")
	case h.Version != api.Version:
		return nil, fmt.Errorf("version %d of the session, want %d", h.Version, api.Version)
	case h.Host == "" || len(h.Host) > 64:
		return nil, errors.New("the host's id must have 1 to 64 bytes")
	case len(h.Zone) > 64 || len(h.Rack) > 64:
		return nil, errors.New("zone and rack must have at most 64 bytes")
	case h.Up < 0 || h.Up > api.MaxLanes || h.Down < 0 || h.Down > api.MaxLanes:
		return nil, fmt.Errorf("lanes must be 0 to %d", api.MaxLanes)
	}
	if s.addr, err = api.PeerAddr(h.Addr, s.remote); err != nil {
		return nil, err
	}
	if s.addr != "" {
		host, port, _ := net.SplitHostPort(s.addr)
		if p, err := strconv.ParseUint(port, 10, 16); err != nil || p == 0 || len(host) > 255 {
			return nil, errors.New("the advertised address is not host:port")
		}
		if !reachable(host, s.remote) {
			return nil, fmt.Errorf("the advertised address %s is none that other hosts reach: name one with --advertise", host)
		}
	}
	if s.name = h.Host; s.who != "" {
		s.name = s.who + " " + h.Host // hosts may share a certificate, and nobody takes another's session
	}
	return h, nil
}

// reachable tells whether an advertised name or address may be another machine's: no
// host is to be sent to what only it may ask.
func reachable(host, remote string) bool {
	if name := strings.ToLower(strings.TrimSuffix(host, ".")); name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return address.IsLoopback(remote)
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return true
	}
	return address.IsAHost(a, address.IsLoopback(remote))
}

// read acts on what the host sends, until it goes.
func (s *session) read(ctx context.Context, wg *sync.WaitGroup) error {
	limit := rate.NewLimiter(itemsPerSecond, itemsAtOnce)
	joinLimit := newJoinRate()
	for {
		up, err := s.conn.Read(context.Background()) // hangUp ends it
		if err != nil {
			return err
		}
		n := items(&up)
		if n > itemsAtOnce {
			return errFlood
		}
		if err := limit.WaitN(ctx, n); err != nil {
			return err
		}
		joins := up.Join
		s.node.region.post(event{session: s, up: &up})
		for _, j := range joins {
			ok, err := joinLimit.allows(time.Now())
			if err != nil {
				return err
			}
			if !ok {
				s.refuse(j.Seq, errTooMany)
				continue
			}
			select {
			case s.joins <- struct{}{}:
				wg.Go(func() {
					s.join(ctx, j)
					<-s.joins
				})
			default:
				s.refuse(j.Seq, errTooMany)
			}
		}
	}
}

// items is what a batch counts for: what it takes the region to act on it.
func items(up *api.Up) int {
	n := 1 + len(up.Join) + len(up.Done) + len(up.Soon) + len(up.Failed) + len(up.Leave)
	for _, w := range up.Want {
		n += 1 + len(w.More)
		for _, r := range w.Runs(pieces.MaxPieces) {
			n += r.Count / 4
		}
	}
	for _, h := range up.Hold {
		n += 1 + len(h.Have)/4
	}
	return n
}

// write sends what is queued in batches, until nothing is left.
func (s *session) write() {
	var used []message
	for {
		all := s.take(used)
		if len(all) == 0 {
			return
		}
		for q := all; len(q) > 0; {
			var b api.Down
			size := 0
			for len(q) > 0 && (size == 0 || size+q[0].size <= batchSize) && (!q[0].first || b.Invalidate == nil) {
				if q[0].assign.Transfer != 0 {
					b.Assign = append(b.Assign, q[0].assign)
				}
				if q[0].add != nil {
					q[0].add(&b)
				}
				size += q[0].size
				q[0] = message{}
				q = q[1:]
			}
			if err := s.conn.Write(context.Background(), b); err != nil { // hangUp ends it
				s.end(err)
				return // and nobody else writes
			}
		}
		used = nil
		if cap(all) <= maxUsed {
			used = all[:0]
		}
	}
}

// join brings a content for the host, and answers it.
func (s *session) join(ctx context.Context, j api.Join) {
	if s.node.draining.Load() {
		s.refuse(j.Seq, errStopping)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	id, src, err := s.node.sourceOf(j)
	if err != nil {
		s.refuse(j.Seq, err)
		return
	}
	waits, over := context.WithCancel(ctx)
	slow := time.AfterFunc(askingEvery, func() { s.asking(waits, j.Seq) })
	l, err := s.node.origin.bring(ctx, id, src, j)
	slow.Stop() // mostly it has not begun
	over()
	if err != nil {
		s.refuse(j.Seq, err)
		return
	}
	u, isURL := src.(*urlSource)
	if l.open = l.public || isURL && !u.own; !l.open && !s.sealed {
		l.Release()
		s.refuse(j.Seq, api.ErrClear)
		return
	}
	l.verify()
	var data []byte
	if j.Small {
		data = l.small(ctx)
	}
	r := s.node.region
	r.do(func() { r.grant(s, j, l, data) })
}

// asking says that a join waits for the origin, every second until ctx ends.
func (s *session) asking(ctx context.Context, seq uint64) {
	if ctx.Err() == nil {
		s.send(message{size: 16, add: func(b *api.Down) { b.Asking = append(b.Asking, seq) }})
		time.AfterFunc(askingEvery, func() { s.asking(ctx, seq) })
	}
}

// small returns all of a small content, for which it waits a little; nil when
// it is not small, or not there yet.
func (l *lease) small(ctx context.Context) []byte {
	n := l.Layout().Length
	if n == 0 || n > api.MaxInline || l.sparse() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, smallTimeout)
	defer cancel()
	var b bytes.Buffer
	b.Grow(int(n))
	if l.wait(ctx) != nil {
		return nil
	}
	if _, err := l.CopyRange(&b, 0, n); err != nil {
		return nil
	}
	return b.Bytes()
}

// sourceOf reads what a host asks to join.
func (n *Supernode) sourceOf(j api.Join) (pieces.TaskID, source, error) {
	id, err := pieces.ParseTaskID(j.Task)
	if err != nil {
		return "", nil, err
	}
	header := http.Header(j.Origin.Header)
	if len(header.Get("Authorization")) > maxURLHeader || len(j.Origin.Ignore) > maxIgnore {
		return "", nil, errors.New("the header for the origin, or the list of parameters to ignore, is too long")
	}
	if j.Origin.URL != "" {
		src, err := n.web.source(id, j.Origin)
		return id, src, err
	}
	if id.Content() == "" {
		return "", nil, errors.New("a blob's task is named by its digest")
	}
	return id, &registrySource{
		registries: n.registries,
		kind:       registryproxy.KindBlob,
		repo:       registryproxy.Repository{Registry: j.Origin.Registry, Name: j.Origin.Repository},
		digest:     j.Task,
		who:        registryproxy.Caller{Authorization: header.Get("Authorization")},
	}, nil
}

// refuse answers a join with the origin's own no, or else with what is wrong.
func (s *session) refuse(seq uint64, err error) {
	a := api.Refused{Seq: seq, Status: http.StatusBadGateway, Reason: err.Error()}
	a.Clear = errors.Is(err, api.ErrClear)
	size := 256 + len(a.Reason)
	if r, ok := refused(err); ok {
		a = api.Refused{Seq: seq, Status: r.Status, Header: r.Header, Body: r.Body, Final: true}
		size += len(r.Body)
		for k, vs := range r.Header {
			for _, v := range vs {
				size += len(k) + len(v) + 16
			}
		}
		if size > frameSize {
			a.Header, a.Body = nil, nil
			size = 256
		}
	}
	s.send(message{size: size, add: func(b *api.Down) { b.Refused = append(b.Refused, a) }})
}

// ticket is the word that the host may read a task until then.
func (s *session) ticket(id pieces.TaskID, open bool, until time.Time) string {
	t := api.Ticket{Task: string(id), Host: cmp.Or(s.who, s.name), Expires: until.Unix(), Public: open}
	signed, err := s.node.keys.sign(t)
	if err != nil {
		s.node.log.Error("ticket cannot be signed", zap.Error(err))
	}
	return signed
}

// inline returns n bytes from off on, nil when they cannot be read: the host
// then fetches them.
func (s *session) inline(c *pieces.Content, off, n int64) []byte {
	var b bytes.Buffer
	b.Grow(int(n))
	if _, err := c.CopyRange(&b, off, n); err != nil {
		return nil
	}
	s.node.metrics.sentBytes.Add(float64(n))
	return b.Bytes()
}

// message grants a join, or renews its ticket; the ticket is signed when it is sent.
func (m *member) message(t *task, seq uint64) message {
	task := api.Task{Seq: seq, Task: string(t.id), Num: int32(t.num), Layout: t.layout, Public: m.public, Sparse: t.sparse}
	s, open, until := m.session, m.open, m.until.Add(api.TicketGrace)
	if open {
		until = s.node.now().Add(api.TicketLife)
	}
	return message{size: 512, first: true, add: func(b *api.Down) {
		task.Ticket = s.ticket(t.id, open, until)
		b.Task = append(b.Task, task)
	}}
}

// gift grants a join with all of a small content.
func (m *member) gift(t *task, seq uint64, data []byte) message {
	task := api.Task{
		Seq: seq, Task: string(t.id), Num: int32(t.num), Layout: t.layout, Public: m.public,
		Digest: pieces.AppendDigests(nil, t.content.Digest(0)), Data: data,
	}
	m.node.metrics.sentBytes.Add(float64(len(data)))
	return message{size: 512 + len(data), first: true, add: func(b *api.Down) { b.Task = append(b.Task, task) }}
}

// sendDigests sends the digests of n pieces from first on.
func (s *session) sendDigests(t *task, first, n int) {
	ds := make([]byte, 0, n*pieces.DigestSize)
	for i := range n {
		ds = pieces.AppendDigests(ds, t.content.Digest(first+i))
	}
	num := int32(t.num)
	s.send(message{size: 24 + len(ds), add: func(b *api.Down) {
		if k := len(b.Digests) - 1; k >= 0 {
			last := &b.Digests[k]
			if last.Task == num && last.First+len(last.Digests)/pieces.DigestSize == first {
				last.Digests = append(last.Digests, ds...)
				return
			}
		}
		b.Digests = append(b.Digests, api.Digests{Task: num, First: first, Digests: ds})
	}})
}
