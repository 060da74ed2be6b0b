//go:build linux

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"time"
)

// A Host is one machine of the lab.
type Host struct {
	lab       *Lab
	cfg       HostConfig
	index     int
	ip, local netip.Addr
	dir       string
	group     string // its control group's directory; empty where there is none
}

// Name is the host's name.
func (h *Host) Name() string { return h.cfg.Name }

// Zone is the zone the host stands in.
func (h *Host) Zone() string { return h.cfg.Zone }

// IP is the host's address on its link.
func (h *Host) IP() netip.Addr { return h.ip }

// Local is the address at which the host reaches itself.
func (h *Host) Local() netip.Addr { return h.local }

// Dir is the host's own directory on disk; Close removes it.
func (h *Host) Dir() string { return h.dir }

// Enter is what a person types before a command to run it on the host.
func (h *Host) Enter() string {
	if h.lab.cfg.Loopback {
		return ""
	}
	return "ip netns exec " + h.namespace()
}

// Inside runs f on a thread inside the host's network: sockets that f itself
// makes, and not goroutines it starts, are the host's.
func (h *Host) Inside(f func() error) error {
	if h.lab.cfg.Loopback {
		return f()
	}
	return inside(namespacePath(h.namespace()), f)
}

// inside runs f on a thread in the network namespace at path.
func inside(path string, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		leave, err := enter(path)
		if err != nil {
			runtime.UnlockOSThread()
			result <- err
			return
		}
		err = f()
		if back := leave(); back != nil {
			result <- errors.Join(err, back) // the thread stays locked and ends with the goroutine
			return
		}
		runtime.UnlockOSThread()
		result <- err
	}()
	return <-result
}

// Dial connects, over TCP, from the host to an address that is an IP and a port.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial from %s: %w", h.cfg.Name, err)
	}
	var dialer net.Dialer
	if h.lab.cfg.Loopback {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(h.ip, 0))
	}
	var conn net.Conn
	err := h.Inside(func() error {
		var err error
		conn, err = dialer.DialContext(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// Listen opens a listener on the host.
func (h *Host) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	var listener net.Listener
	err := h.Inside(func() error {
		var err error
		listener, err = new(net.ListenConfig).Listen(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, err
	}
	return listener, nil
}

// Counters are the bytes that have crossed a host's link, headers included.
type Counters struct {
	Sent, Received int64
}

// Counters reads the counters of the host's link; on loopback there are none.
func (h *Host) Counters() (Counters, error) {
	if h.lab.cfg.Loopback {
		return Counters{}, errors.New("hosts on loopback have no counters")
	}
	var c Counters
	err := inside(namespacePath(h.lab.switchName()), func() error {
		file, err := os.Open("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		defer file.Close()
		lines := bufio.NewScanner(file)
		for lines.Scan() {
			name, figures, _ := strings.Cut(strings.TrimSpace(lines.Text()), ":")
			if name != h.port() {
				continue
			}
			// What the switch's port receives the host has sent; transmitted bytes are the ninth figure.
			var skip int64
			_, err := fmt.Sscan(figures, &c.Sent, &skip, &skip, &skip, &skip, &skip, &skip, &skip, &c.Received)
			return err
		}
		return errors.Join(lines.Err(), errors.New("no such port"))
	})
	if err != nil {
		return Counters{}, fmt.Errorf("read the counters of %s: %w", h.cfg.Name, err)
	}
	return c, nil
}

// CPU is the processor time that all processes of the host have used, also the
// ended ones; false where the machine does not count it.
func (h *Host) CPU() (time.Duration, bool) {
	if h.group == "" {
		return 0, false
	}
	stat, err := os.ReadFile(h.group + "/cpu.stat")
	if err != nil {
		return 0, false
	}
	var microseconds int64
	if _, err := fmt.Sscanf(string(stat), "usage_usec %d", &microseconds); err != nil {
		return 0, false
	}
	return time.Duration(microseconds) * time.Microsecond, true
}
