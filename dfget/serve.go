package dfget

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"

	"damselfly.dev/httprange"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

const (
	maxTickets  = 4096    // remembered as good
	sendStep    = 1 << 20 // bytes that a child must take
	sendTimeout = 30 * time.Second
	maxHeld     = 1500 * time.Millisecond // that a request waits for a piece on its way, less than minPatience
)

// tickets knows which tickets are good: those signed with the keys of the
// present or the last supernode.
type tickets struct {
	mu            sync.Mutex // guards what follows
	now, previous []ed25519.PublicKey
	good          map[string]api.Ticket
	told, since   time.Time // what the supernode's clock said, and when; zero when it says nothing
}

// tells takes in what the supernode's clock says, in milliseconds since 1970.
func (t *tickets) tells(ms int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.told, t.since = time.UnixMilli(ms), time.Now()
	if ms == 0 {
		t.told = t.since // its own is the best there is
	}
}

// clock is the supernode's, so that the host's own may be wrong.
func (t *tickets) clock() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.clockLocked()
}

func (t *tickets) clockLocked() time.Time { return t.told.Add(time.Since(t.since)) }

// learn takes in the keys of a new session.
func (t *tickets) learn(keys []ed25519.PublicKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.ContainsFunc(keys, func(k ed25519.PublicKey) bool {
		return slices.ContainsFunc(t.now, func(old ed25519.PublicKey) bool { return k.Equal(old) })
	}) { // another supernode's
		t.previous, t.good = t.now, nil
	}
	t.now = keys
}

// check returns a ticket that is good for a task.
func (t *tickets) check(signed string, id pieces.TaskID) (api.Ticket, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.clockLocked()
	if k, ok := t.good[signed]; ok && k.Task == string(id) && now.Unix() < k.Expires {
		return k, nil
	}
	k, err := api.VerifyTicket(t.now, signed, id, now)
	if err != nil {
		k, err = api.VerifyTicket(t.previous, signed, id, now)
	}
	if err != nil {
		return k, err
	}
	if t.good == nil || len(t.good) >= maxTickets {
		t.good = make(map[string]api.Ticket)
	}
	t.good[signed] = k
	return k, nil
}

// Handler serves the pieces that are there to holders of a ticket: GET
// api.ContentPath with one Range. Its connections must have no write timeout.
func (p *Peer) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.TasksPath+"/{id}/content", func(w http.ResponseWriter, r *http.Request) {
		if no := p.content(w, r); no != nil {
			no.write(w)
		}
	})
	return mux
}

// refused is an answer in the API's error form.
type refused struct {
	status int
	api.Error
}

func (no *refused) write(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set(api.ErrorHeader, no.Code)
	w.WriteHeader(no.status)
	_ = json.NewEncoder(w).Encode(no.Error) // to a child that may be gone
}

func (p *Peer) content(w http.ResponseWriter, r *http.Request) *refused {
	id, err := pieces.ParseTaskID(r.PathValue("id"))
	if err != nil {
		return &refused{http.StatusBadRequest, api.Error{Code: api.CodeBadRequest, Message: err.Error()}}
	}
	ticket, err := p.admit(r, id)
	if err != nil {
		return &refused{http.StatusUnauthorized, api.Error{Code: api.CodeUnauthorized, Message: err.Error()}}
	}
	c, err := p.store.Get(id)
	if err != nil {
		return &refused{http.StatusNotFound, api.Error{Code: api.CodeNotFound, Message: "this host has nothing of the task"}}
	}
	defer c.Release()
	span, partial, err := httprange.Parse(r.Header.Get("Range"), c.Layout().Length)
	if err != nil {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", c.Layout().Length))
		return &refused{http.StatusRequestedRangeNotSatisfiable, api.Error{Code: api.CodeRange, Message: err.Error()}}
	}
	began := time.Now()
	if !p.holds(r.Context(), c, span.Offset, span.Length) {
		return &refused{http.StatusNotFound, api.Error{Code: api.CodeNotFound, Message: "this host lacks a piece of the range"}}
	}
	if ms := time.Since(began).Milliseconds(); ms > 0 {
		w.Header().Set(api.HeldHeader, strconv.FormatInt(ms, 10))
	}
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	default:
		w.Header().Set(api.RetryHeader, strconv.FormatInt(defaultBusy.Milliseconds(), 10))
		return &refused{http.StatusServiceUnavailable, api.Error{Code: api.CodeBusy, Message: "all upload lanes are taken: come back after " + api.RetryHeader}}
	}
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Length", strconv.FormatInt(span.Length, 10))
	status := http.StatusOK
	if partial {
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", span.Offset, span.Offset+span.Length-1, c.Layout().Length))
		status = http.StatusPartialContent
	}
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		p.sendRange(w, c, span, time.Now().Add(ticket.Rest(p.tickets.clock())))
	}
	return nil
}

// admit tells whether who sends r may have a task: it shows a ticket that is its
// own, and what not everybody may read goes to nobody in clear.
func (p *Peer) admit(r *http.Request, id pieces.TaskID) (api.Ticket, error) {
	who, sealed, err := p.guard.Of(r)
	if err != nil {
		return api.Ticket{}, err
	}
	t, err := p.tickets.check(r.Header.Get(api.TicketHeader), id)
	if err != nil {
		return t, fmt.Errorf("%w: join it at the supernode", err)
	}
	return t, t.Permits(who, sealed)
}

// holds tells whether all n bytes from off on are there and right, for which it
// waits while they are on their way. A piece that turns out not to be makes the
// supernode hear what there is.
func (p *Peer) holds(ctx context.Context, c *pieces.Content, off, n int64) bool {
	until := time.Now().Add(maxHeld)
	have := c.Have()
	first, end := c.Layout().Span(off, n)
	for i := first; i < end; i++ {
		if c.Has(i) || p.await(ctx, c, i, until) {
			continue
		}
		p.mu.Lock()
		if have.Has(i) && p.session != nil {
			p.session.send(holdMessage(p.store, c.ID()))
		}
		p.mu.Unlock()
		return false
	}
	return true
}

// await waits for piece i while it is on its way, and tells whether it is there.
func (p *Peer) await(ctx context.Context, c *pieces.Content, i int, until time.Time) bool {
	if p.comes(c.ID(), i) {
		ctx, cancel := context.WithDeadline(ctx, until)
		defer cancel()
		_ = c.Wait(ctx, i) // what matters is what there is then
	}
	return c.Has(i)
}

// comes tells whether a transfer is to bring piece i.
func (p *Peer) comes(id pieces.TaskID, i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session == nil {
		return false
	}
	for _, tr := range p.session.running {
		if tr.task.id == id && uint(i-tr.first) < uint(tr.count) {
			return true
		}
	}
	return false
}

// sendRange writes the range; a child that does not take it, by end at the latest, is
// cut off.
func (p *Peer) sendRange(w http.ResponseWriter, c *pieces.Content, span httprange.Range, end time.Time) {
	control := http.NewResponseController(w)
	defer func() { _ = control.SetWriteDeadline(time.Time{}) }() // where there is none, none was set
	for off, n := span.Offset, span.Length; n > 0; {
		until := time.Now().Add(sendTimeout)
		if end.Before(until) {
			until = end
		}
		_ = control.SetWriteDeadline(until)
		sent, err := c.CopyRange(w, off, min(n, sendStep))
		p.metrics.sent.Add(float64(sent))
		if err != nil {
			if ce := p.log.Check(zap.DebugLevel, "upload broke off"); ce != nil {
				ce.Write(zap.String("task", string(c.ID())), zap.Error(err))
			}
			return
		}
		off, n = off+sent, n-sent
	}
}
