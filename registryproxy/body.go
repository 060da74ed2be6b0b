package registryproxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var errStalled = errors.New("the connection has stalled")

// watched is the body of an answer. A Read that gets no byte for as long as
// stall fails; time between reads does not count, so a slow reader is no stall.
// One goroutine reads at a time.
type watched struct {
	body   io.ReadCloser
	count  prometheus.Counter // of the bytes read, nil for none
	failed func(error) error  // makes an error of the body the caller's
	cancel context.CancelCauseFunc
	done   context.CancelFunc // called with Close, nil for none
	stall  time.Duration
	timer  *time.Timer // ends the request; runs only during a Read

	// resumable: the rest can be asked for, so that a body which comes too slowly
	// is given up. got bytes have come in waited, the time spent in Reads.
	resumable bool
	got       int
	waited    time.Duration
}

// slowBytes are the fewest that come in the time that makes a stall, lest
// another request be made for the rest: one connection of many may be caught
// somewhere. Where all are so slow that costs a request every now and then.
const slowBytes = 128 << 10

var errSlow = errors.New("the connection is too slow")

func watch(body io.ReadCloser, stall time.Duration, cancel context.CancelCauseFunc, failed func(error) error) *watched {
	t := time.AfterFunc(stall, func() { cancel(errStalled) })
	t.Stop()
	return &watched{body: body, failed: failed, cancel: cancel, stall: stall, timer: t}
}

// Read reads from the body.
func (w *watched) Read(p []byte) (int, error) {
	w.timer.Reset(w.stall)
	start := time.Now()
	n, err := w.body.Read(p)
	w.timer.Stop()
	if w.resumable && err == nil && w.tooSlow(n, time.Since(start)) {
		w.cancel(errSlow) // so that the next Read fails too
		err = errSlow
	}
	if w.count != nil {
		w.count.Add(float64(n))
	}
	if err != nil && err != io.EOF { //nolint:errorlint // the end is io.EOF itself, and a failure may wrap one
		err = w.failed(err)
	}
	return n, err
}

// tooSlow counts a Read, and tells a body that comes too slowly.
func (w *watched) tooSlow(n int, took time.Duration) bool {
	w.got += n
	w.waited += took
	slow := w.got < slowBytes
	if slow && w.waited < w.stall {
		return false
	}
	w.got, w.waited = 0, 0
	return slow
}

// Close ends the request.
func (w *watched) Close() error {
	err := w.body.Close()
	w.timer.Stop()
	w.cancel(nil)
	if w.done != nil {
		w.done()
	}
	return err
}

// small reads at most limit bytes of a body that ought to be short, for no
// longer than a stall may last in all. What was read is good also with an error.
func (w *watched) small(limit int64) ([]byte, error) {
	t := time.AfterFunc(w.stall, func() { w.cancel(errStalled) })
	defer t.Stop()
	return w.upTo(limit)
}

// upTo reads at most limit bytes. What was read is good also with an error.
func (w *watched) upTo(limit int64) ([]byte, error) {
	var b bytes.Buffer
	_, err := b.ReadFrom(io.LimitReader(w, limit))
	return b.Bytes(), err
}

// exact reads n bytes of body, no more, and takes an early end for an error.
type exact struct {
	io.ReadCloser
	n     int64
	short error
}

func (e *exact) Read(p []byte) (int, error) {
	if e.n == 0 {
		return 0, io.EOF
	}
	n, err := e.ReadCloser.Read(p[:min(int64(len(p)), e.n)])
	e.n -= int64(n)
	switch {
	case e.n == 0:
		err = nil // the next Read says io.EOF
	case err == io.EOF:
		err = e.short
	}
	return n, err
}
