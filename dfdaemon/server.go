package dfdaemon

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"damselfly.dev/supernode/api"
)

// Of each listener.
const (
	maxConnections = 8192
	maxOfAddress   = 2048 // several hosts may be behind one; each that says nothing takes some 10 KiB
)

// silentLimit is how long who has connected may say nothing once the server is to end.
const silentLimit = 5 * time.Second

// server is a server and what it accepts on.
type server struct {
	http.Server
	ln      net.Listener
	setting string // that it can be handed over by, "" where it cannot
	tls     *tls.Config

	served chan struct{} // closed when nothing is accepted any more
	silent sync.WaitGroup
}

// newServer returns one that calls refused for each connection that is too many.
func newServer(ln net.Listener, refused func()) *server {
	s := &server{ln: ln, served: make(chan struct{})}
	(&api.Gate{All: maxConnections, Each: maxOfAddress}).Guard(&s.Server, refused)
	bounds := s.ConnState
	var silent sync.Map // the connections that have not said anything
	s.ConnState = func(c net.Conn, state http.ConnState) {
		if state == http.StateNew {
			silent.Store(c, nil)
			s.silent.Add(1)
		} else if _, was := silent.LoadAndDelete(c); was {
			s.silent.Done()
		}
		bounds(c, state)
	}
	return s
}

// serve answers until drain, or until it cannot accept.
func (s *server) serve() error {
	defer close(s.served)
	ln := s.ln
	if s.tls != nil {
		ln = tls.NewListener(ln, s.tls)
	}
	if err := s.Serve(ln); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// drain accepts nothing more, answers who is connected, and breaks off what runs when
// ctx ends. Shutdown alone would close a connection whose request has not been read.
func (s *server) drain(ctx context.Context) error {
	_ = s.ln.Close() // Serve says what is wrong with it
	<-s.served
	heard := make(chan struct{})
	go func() { s.silent.Wait(); close(heard) }() // ends with the connections
	limit := time.NewTimer(silentLimit)
	defer limit.Stop()
	select {
	case <-heard:
	case <-limit.C:
	case <-ctx.Done():
	}
	if s.Shutdown(ctx) != nil {
		return s.Close()
	}
	return nil
}
