//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"damselfly.dev/supernode/api"
)

// loop is a share of the hosts, in one goroutine, that of run: in every slot it
// follows what has come for any of them, acts on what is due, and sends what
// there is to be said, host by host.
type loop struct {
	swarm *swarm
	*wheel
	epoll   int
	calls   chan func()  // to be called by run
	hosts   []*host      // by the number that epoll tells
	now     time.Time    // of this slot
	said    []*host      // those that have something to say
	in      []byte       // read into
	out     bytes.Buffer // a frame on its way out
	stalled atomic.Int64 // hosts that need pieces and were told of none for a phase's time
	ready   [1024]syscall.EpollEvent
}

func newLoop(s *swarm, seed uint64) (*loop, error) {
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make an epoll: %w", err)
	}
	return &loop{swarm: s, calls: make(chan func(), dialing), wheel: newWheel(seed), epoll: fd, in: make([]byte, 64<<10), now: time.Now()}, nil
}

// add takes in a host.
func (l *loop) add(h *host) {
	h.loop, h.number = l, int32(len(l.hosts))
	h.heard, h.spoke = l.now, l.now
	l.hosts = append(l.hosts, h)
	e := syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: h.number}
	if err := syscall.EpollCtl(l.epoll, syscall.EPOLL_CTL_ADD, h.fd, &e); err != nil {
		l.swarm.fail(fmt.Errorf("watch a connection: %w", err))
	}
}

func (l *loop) close() {
	for _, h := range l.hosts {
		syscall.Close(h.fd)
	}
	syscall.Close(l.epoll)
}

func (l *loop) run(ctx context.Context) error {
	tick := time.NewTicker(slot)
	defer tick.Stop()
	var work []due
	kept := time.Now()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case f := <-l.calls:
			f()
			continue
		case <-tick.C:
		}
		l.now = time.Now()
		if err := l.receive(); err != nil {
			return err
		}
		work = l.take(l.now, work[:0])
		for _, d := range work {
			d.h.due(d)
		}
		clear(work)
		if l.now.Sub(kept) > api.TickEvery {
			kept = l.now
			if err := l.keepAlive(); err != nil {
				return err
			}
		}
		for _, h := range l.said {
			if err := h.flush(); err != nil {
				return err
			}
		}
		l.said = l.said[:0]
	}
}

// receive follows what has come.
func (l *loop) receive() error {
	for {
		n, err := syscall.EpollWait(l.epoll, l.ready[:], 0)
		if err != nil && !errors.Is(err, syscall.EINTR) {
			return fmt.Errorf("wait for frames: %w", err)
		}
		for _, e := range l.ready[:max(n, 0)] {
			h := l.hosts[e.Fd]
			err := h.read()
			if err == nil && e.Events&syscall.EPOLLOUT != 0 {
				err = h.push(nil)
			}
			if err != nil {
				return fmt.Errorf("a host's session ends: %w", err)
			}
		}
		if n < len(l.ready) {
			return nil
		}
	}
}

// keepAlive has hosts that were quiet for long say that they are there, and
// counts those that stall.
func (l *loop) keepAlive() error {
	stalled := 0
	for _, h := range l.hosts {
		if l.now.Sub(h.heard) > api.StuckLimit {
			return fmt.Errorf("the supernode was silent for %v", l.now.Sub(h.heard))
		}
		if l.now.Sub(h.spoke) >= api.BeatEvery {
			h.says()
		}
		if h.have.Len() < h.have.Cap() && l.now.Sub(h.assigned) > l.swarm.cfg.duration {
			stalled++
		}
	}
	l.stalled.Store(int64(stalled))
	return nil
}

// says has h written once everything due in this slot has been acted on.
func (h *host) says() {
	if !h.saying {
		h.saying = true
		h.loop.said = append(h.loop.said, h)
	}
}

// try reads from or writes to a socket that makes nobody wait, so the Go
// scheduler need not hear of it: telling it takes a tenth of this process's time.
func try(call uintptr, fd int, b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, _, err := syscall.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b))) //nolint:gosec // as package syscall does
	if err != 0 {
		return 0, err
	}
	return int(n), nil
}

// read follows the frames that have come.
func (h *host) read() error {
	l := h.loop
	n, err := try(syscall.SYS_READ, h.fd, l.in)
	switch {
	case errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EINTR):
		return nil
	case err != nil:
		return err
	case n == 0:
		return errors.New("the supernode has closed it")
	}
	h.heard = l.now
	b := l.in[:n]
	if len(h.begun) > 0 {
		h.begun = append(h.begun, b...)
		b = h.begun
	}
	for {
		size, err := api.FrameSize(b)
		if err != nil {
			return err
		}
		if size == 0 || size > len(b) {
			break
		}
		var down api.Down
		if err := api.ParseFrame(b[:size], &down); err != nil {
			return err
		}
		if err := h.follow(&down); err != nil {
			return err
		}
		b = b[size:]
	}
	h.begun = append(h.begun[:0], b...)
	return nil
}

// write sends a batch.
func (h *host) write(up *api.Up) error {
	l := h.loop
	l.out.Reset()
	if err := api.AppendFrame(&l.out, up); err != nil {
		return err
	}
	h.spoke = l.now
	return h.push(l.out.Bytes())
}

// push sends b after what the connection would not take before.
func (h *host) push(b []byte) error {
	waited := len(h.unsent) > 0
	if waited {
		h.unsent = append(h.unsent, b...)
		b = h.unsent
	}
	n, err := try(syscall.SYS_WRITE, h.fd, b)
	if err != nil && !errors.Is(err, syscall.EAGAIN) && !errors.Is(err, syscall.EINTR) {
		return err
	}
	rest := b[n:]
	if waits := len(rest) > 0; waits != waited {
		e := syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: h.number}
		if waits {
			e.Events |= syscall.EPOLLOUT
		}
		if err := syscall.EpollCtl(h.loop.epoll, syscall.EPOLL_CTL_MOD, h.fd, &e); err != nil {
			return err
		}
	}
	h.unsent = append(h.unsent[:0], rest...)
	return nil
}
