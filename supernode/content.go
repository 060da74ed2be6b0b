package supernode

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"
	"go.uber.org/zap"

	"damselfly.dev/httprange"
	"damselfly.dev/pieces"
	"damselfly.dev/registryproxy"
	"damselfly.dev/supernode/api"
)

const (
	busyRetry = 100 * time.Millisecond
	// stepSize is how much a reader must take within stepTime; a host, which has
	// others to turn to, a hostStep in hostTime: one that stalls soon makes room.
	stepSize = 4 << 20
	stepTime = 2 * time.Minute
	hostStep = 512 << 10
	hostTime = 15 * time.Second
	// uploadsAtOnce for each lane are more than are ever assigned, and uploadsOfOne
	// what one host has that follows its assignments: what runs, and what lags. A host that
	// does not follow them takes the places of few others.
	uploadsAtOnce = 32
	uploadsOfOne  = 3
)

// serveContent gives holders of a ticket what is present of a task.
func (n *Supernode) serveContent(w http.ResponseWriter, r *http.Request, task string) {
	id, err := pieces.ParseTaskID(task)
	if err != nil {
		writeError(w, http.StatusBadRequest, api.CodeBadRequest, err.Error())
		return
	}
	who, sealed, err := n.guard.Of(r)
	var ticket api.Ticket
	if err == nil {
		ticket, err = n.keys.verify(r.Header.Get(api.TicketHeader), id, n.now())
	}
	if err == nil {
		err = ticket.Permits(who, sealed)
	}
	if err != nil {
		writeError(w, http.StatusUnauthorized, api.CodeUnauthorized, err.Error())
		return
	}
	if !n.uploads.Enter(ticket.Host) {
		w.Header().Set(api.RetryHeader, strconv.FormatInt(busyRetry.Milliseconds(), 10))
		writeError(w, http.StatusServiceUnavailable, api.CodeBusy, "all upload lanes are in use")
		return
	}
	defer n.uploads.Leave(ticket.Host)
	f := n.origin.find(id)
	c, err := n.store.Get(id)
	if err != nil {
		writeError(w, http.StatusNotFound, api.CodeNotFound, "there is no such task here")
		return
	}
	defer c.Release()
	l := &lease{Content: c, fetch: f}
	span, partial, err := httprange.Parse(r.Header.Get("Range"), c.Layout().Length)
	if err != nil {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", c.Layout().Length))
		writeError(w, http.StatusRequestedRangeNotSatisfiable, api.CodeRange, err.Error())
		return
	}
	if i := l.lacks(span); i >= 0 {
		n.region.lost(id, i)
		writeError(w, http.StatusNotFound, api.CodeNotFound, fmt.Sprintf("piece %d is not here", i))
		return
	}
	given := registryproxy.Selection{Size: c.Layout().Length}
	if partial {
		given.Ranges = []registryproxy.ByteRange{span}
	}
	given.WriteHeader(w)
	if r.Method == http.MethodHead {
		return
	}
	out := newSteady(w)
	out.size, out.time = hostStep, hostTime
	out.end = time.Now().Add(ticket.Rest(n.now()))
	defer out.done()
	sent, err := c.CopyRange(out, span.Offset, span.Length)
	n.metrics.sentBytes.Add(float64(sent))
	if err != nil {
		n.log.Debug("content not sent to its end", zap.String("task", task), zap.Error(err))
	}
}

// lacks returns a piece of the range that may not be given away, -1 for none.
func (l *lease) lacks(span registryproxy.ByteRange) int {
	layout := l.Layout()
	first, end := layout.Span(span.Offset, span.Length)
	for i := first; i < end; i++ {
		held := i == layout.Count()-1 && !l.Complete() && !l.sparse() && (l.fetch == nil || !l.whole())
		if held || !l.Has(i) {
			return i
		}
	}
	return -1
}

// steady is a writer whose reader must keep taking bytes. It passes files on to
// net/http in steps, so that they are sent with sendfile.
type steady struct {
	w       http.ResponseWriter
	control *http.ResponseController
	size    int64 // of a step,
	time    time.Duration
	end     time.Time // of all, zero for none
}

func newSteady(w http.ResponseWriter) *steady {
	return &steady{w: w, control: http.NewResponseController(w), size: stepSize, time: stepTime}
}

func (s *steady) Write(p []byte) (int, error) {
	s.extend()
	return s.w.Write(p)
}

// ReadFrom sends what r has.
func (s *steady) ReadFrom(r io.Reader) (int64, error) {
	file, ok := r.(*io.LimitedReader)
	if !ok {
		return io.Copy(struct{ io.Writer }{s}, r)
	}
	var w io.Writer = s.w
	if g, ok := s.w.(gin.ResponseWriter); ok {
		g.WriteHeaderNow()
		if u, ok := g.(interface{ Unwrap() http.ResponseWriter }); ok {
			w = u.Unwrap() // gin's own writer knows no sendfile
		}
	}
	var sent int64
	for file.N > 0 {
		s.extend()
		step := &io.LimitedReader{R: file.R, N: min(file.N, s.size)}
		n, err := io.Copy(w, step)
		sent += n
		file.N -= n
		if err != nil {
			return sent, err
		}
		if n == 0 {
			return sent, nil
		}
	}
	return sent, nil
}

// extend sets the time by which the next step must be taken. What cannot keep
// time, as in tests, has none.
func (s *steady) extend() {
	until := time.Now().Add(s.time)
	if !s.end.IsZero() {
		until = earlier(until, s.end)
	}
	_ = s.control.SetWriteDeadline(until)
}

// done lets the connection have its time for the next request.
func (s *steady) done() { _ = s.control.SetWriteDeadline(time.Time{}) }
