package dfdaemon

import (
	"io"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// stalledAfter is how long a reader may take over one stretch of an answer
	// before its connection is cut.
	stalledAfter = 5 * time.Minute
	stretch      = 1 << 20 // bytes
)

// reply is an answer on its way. It goes past gin to the server's own writer,
// which alone sends files with sendfile, and bounds how long each stretch of it
// may take. One goroutine writes it.
type reply struct {
	http.ResponseWriter
	gin     gin.ResponseWriter
	control *http.ResponseController
	first   prometheus.Observer // of the seconds until the header, nil for none
	began   time.Time
	failed  error // of writing
}

func newReply(c *gin.Context) *reply {
	w := &reply{ResponseWriter: c.Writer, gin: c.Writer, began: time.Now()}
	if u, ok := c.Writer.(interface{ Unwrap() http.ResponseWriter }); ok {
		w.ResponseWriter = u.Unwrap()
	}
	w.control = http.NewResponseController(w.ResponseWriter)
	return w
}

// started tells whether the header is out.
func (w *reply) started() bool { return w.gin.Written() }

// WriteHeader sends the header.
func (w *reply) WriteHeader(status int) {
	if w.started() {
		return
	}
	if w.first != nil {
		w.first.Observe(time.Since(w.began).Seconds())
	}
	w.gin.WriteHeader(status)
	w.gin.WriteHeaderNow()
}

// Write sends p.
func (w *reply) Write(p []byte) (n int, err error) {
	w.WriteHeader(http.StatusOK)
	w.extend(stalledAfter)
	n, err = w.ResponseWriter.Write(p)
	if err != nil {
		w.failed = err
	}
	return n, err
}

// ReadFrom sends r, by sendfile where r is an *io.LimitedReader of a file.
func (w *reply) ReadFrom(r io.Reader) (n int64, err error) {
	w.WriteHeader(http.StatusOK)
	from, fast := w.ResponseWriter.(io.ReaderFrom)
	file, limited := r.(*io.LimitedReader)
	if !fast || !limited {
		return io.Copy(struct{ io.Writer }{w}, r)
	}
	for file.N > 0 && err == nil {
		w.extend(stalledAfter)
		part := &io.LimitedReader{R: file.R, N: min(file.N, stretch)}
		var sent int64
		sent, err = from.ReadFrom(part)
		n += sent
		file.N -= sent
		if sent == 0 {
			break
		}
	}
	if err != nil {
		w.failed = err
	}
	return n, err
}

// extend gives the reader time from now on, with 0 as much as it likes.
func (w *reply) extend(d time.Duration) {
	var t time.Time
	if d > 0 {
		t = time.Now().Add(d)
	}
	_ = w.control.SetWriteDeadline(t) // a recorder in a test has none
}
