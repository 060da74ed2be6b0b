//go:build linux

package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// gsoSize is the largest segment a sender hands to its link, in bytes:
	// small enough to share a slow link fairly, large enough to be cheap.
	gsoSize = 20000
	// burst is the bucket of the shapers, in bytes; it must hold a segment.
	burst = 64 << 10
	// upQueue is never full, in bytes, as a host's TCP does not drop at its own interface.
	upQueue = 16 << 20
	// downQueue is what a switch port holds, as parts of a second.
	downQueue = 50

	congestionControl = "cubic"
	allowedControls   = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
)

// ip runs ip commands inside the namespace, or outside of all where it is empty.
func ip(ctx context.Context, namespace string, lines ...string) error {
	return batch(ctx, "ip", namespace, lines)
}

// tc runs tc commands inside the namespace.
func tc(ctx context.Context, namespace string, lines ...string) error {
	return batch(ctx, "tc", namespace, lines)
}

func batch(ctx context.Context, tool, namespace string, lines []string) error {
	args := []string{"-batch", "-"}
	if namespace != "" {
		args = append([]string{"-n", namespace}, args...)
	}
	cmd := exec.CommandContext(ctx, tool, args...)
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w: %s", tool, lines, err, bytes.TrimSpace(out))
	}
	return nil
}

func (l *Lab) switchName() string { return l.id + "-switch" }

func (l *Lab) makeSwitch(ctx context.Context) error {
	if err := ip(ctx, "", "netns add "+l.switchName()); err != nil {
		return err
	}
	if err := prepareNamespace(l.switchName(), false); err != nil {
		return err
	}
	return ip(ctx, l.switchName(),
		fmt.Sprintf("link add switch mtu %d type bridge stp_state 0 forward_delay 0", l.cfg.MTU),
		"link set switch up")
}

// zone returns the bridge of a zone's hosts. The first call for a zone makes it,
// and the link that joins it to the switch.
func (l *Lab) zone(ctx context.Context, name string) (string, error) {
	if name == "" {
		return "switch", nil
	}
	i := slices.Index(l.zones, name)
	if i >= 0 {
		return fmt.Sprintf("zone%d", i), nil
	}
	i = len(l.zones)
	bridge, inside, outside := fmt.Sprintf("zone%d", i), fmt.Sprintf("out%d", i), fmt.Sprintf("in%d", i)
	err := ip(ctx, l.switchName(),
		fmt.Sprintf("link add %s mtu %d type bridge stp_state 0 forward_delay 0", bridge, l.cfg.MTU),
		fmt.Sprintf("link add %s mtu %d type veth peer name %s mtu %d", inside, l.cfg.MTU, outside, l.cfg.MTU),
		fmt.Sprintf("link set %s master %s gso_max_size %d up", inside, bridge, gsoSize),
		fmt.Sprintf("link set %s master switch gso_max_size %d up", outside, gsoSize),
		fmt.Sprintf("link set %s up", bridge))
	if err != nil {
		return "", err
	}
	l.zones = append(l.zones, name)
	if l.cfg.ZoneLink == 0 {
		return bridge, nil
	}
	return bridge, tc(ctx, l.switchName(),
		fmt.Sprintf("qdisc replace dev %s root %s", inside, switched(l.cfg.ZoneLink)),
		fmt.Sprintf("qdisc replace dev %s root %s", outside, switched(l.cfg.ZoneLink)))
}

// switched shapes what a switch sends into a link.
func switched(rate Rate) string {
	return fmt.Sprintf("tbf rate %dbit burst %d limit %d", rate, burst, burst+int64(rate)/8/downQueue)
}

// prepareNamespace sets what a new namespace shall not have from this machine.
func prepareNamespace(name string, ipv6 bool) error {
	disabled := "1"
	if ipv6 {
		disabled = "0"
	}
	for setting, value := range map[string]string{
		"ipv6/conf/default/disable_ipv6": disabled,
		"ipv6/conf/all/disable_ipv6":     disabled,
		// A switch does not filter, whatever other bridges of the machine do.
		"bridge/bridge-nf-call-iptables":  "0",
		"bridge/bridge-nf-call-ip6tables": "0",
		"bridge/bridge-nf-call-arptables": "0",
	} {
		err := writeInside(name, "/proc/sys/net/"+setting, value)
		if err != nil && !os.IsNotExist(err) { // what this kernel does not have needs no setting
			return err
		}
	}
	return nil
}

// plug makes the host's namespace, its link, and its control group.
func (h *Host) plug(ctx context.Context) error {
	l, port := h.lab, h.port()
	bridge, err := l.zone(ctx, h.cfg.Zone)
	if err != nil {
		return err
	}
	err = ip(ctx, "", "netns add "+h.namespace(),
		fmt.Sprintf("link add %s mtu %d netns %s type veth peer name eth0 mtu %d netns %s",
			port, l.cfg.MTU, l.switchName(), l.cfg.MTU, h.namespace()))
	if err != nil {
		return err
	}
	if err := prepareNamespace(h.namespace(), l.cfg.IPv6); err != nil {
		return err
	}
	if err := setCongestionControl(h.namespace()); err != nil {
		return err
	}
	err = ip(ctx, l.switchName(), "link set "+port+" master "+bridge, fmt.Sprintf("link set %s gso_max_size %d up", port, gsoSize))
	if err != nil {
		return err
	}
	lines := []string{"link set lo up", fmt.Sprintf("link set eth0 gso_max_size %d up", gsoSize)}
	if l.cfg.IPv6 {
		lines = append(lines, "address del 127.0.0.1/8 dev lo", fmt.Sprintf("address add %s/64 dev eth0 nodad", h.ip))
	} else {
		lines = append(lines, fmt.Sprintf("address add %s/16 dev eth0", h.ip))
	}
	if err := ip(ctx, h.namespace(), lines...); err != nil {
		return err
	}
	h.group = makeGroup(l.id, h.cfg.Name)
	if h.cfg.Up == 0 && h.cfg.Down == 0 {
		return nil
	}
	return h.SetRate(ctx, h.cfg.Up, h.cfg.Down)
}

func (h *Host) namespace() string { return h.lab.id + "-" + h.cfg.Name }
func (h *Host) port() string      { return fmt.Sprintf("port%d", h.index) }

// SetRate changes the rates of the host's link.
func (h *Host) SetRate(ctx context.Context, up, down Rate) error {
	upload, download := "noqueue", "noqueue"
	if up > 0 {
		upload = fmt.Sprintf("tbf rate %dbit burst %d limit %d", up, burst, upQueue)
	}
	if down > 0 {
		download = switched(down)
	}
	if err := tc(ctx, h.namespace(), "qdisc replace dev eth0 root "+upload); err != nil {
		return err
	}
	return tc(ctx, h.lab.switchName(), "qdisc replace dev "+h.port()+" root "+download)
}

// Unplug takes the cable out of the host's link; Plug puts it back.
func (h *Host) Unplug(ctx context.Context) error {
	return ip(ctx, h.lab.switchName(), "link set "+h.port()+" down")
}

// Plug undoes Unplug.
func (h *Host) Plug(ctx context.Context) error {
	return ip(ctx, h.lab.switchName(), "link set "+h.port()+" up")
}

// setCongestionControl chooses the lab's congestion control in a namespace. A
// namespace may only have what the machine's list allows: the list is extended
// for the moment and put back.
func setCongestionControl(namespace string) error {
	old, err := os.ReadFile(allowedControls)
	if err != nil {
		return fmt.Errorf("read the allowed congestion controls: %w", err)
	}
	list := strings.Fields(string(old))
	if !slices.Contains(list, congestionControl) {
		longer := strings.Join(append(list, congestionControl), " ")
		if err := os.WriteFile(allowedControls, []byte(longer), 0); err != nil {
			return fmt.Errorf("allow congestion control %s: %w", congestionControl, err)
		}
		defer os.WriteFile(allowedControls, old, 0)
	}
	return writeInside(namespace, "/proc/sys/net/ipv4/tcp_congestion_control", congestionControl)
}

// writeInside writes a setting of a namespace.
func writeInside(namespace, setting, value string) error {
	return inside(namespacePath(namespace), func() error {
		return os.WriteFile(setting, []byte(value), 0)
	})
}

func namespacePath(name string) string { return filepath.Join("/run/netns", name) }

// enter moves the calling thread, which must be locked, into a network
// namespace; leave brings it back.
func enter(path string) (leave func() error, err error) {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open the thread's namespace: %w", err)
	}
	target, err := os.Open(path)
	if err != nil {
		own.Close()
		return nil, fmt.Errorf("open the namespace: %w", err)
	}
	defer target.Close()
	if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil { //nolint:gosec // G115: a descriptor
		own.Close()
		return nil, fmt.Errorf("enter the namespace: %w", err)
	}
	return func() error {
		defer own.Close()
		return unix.Setns(int(own.Fd()), unix.CLONE_NEWNET) //nolint:gosec // G115: a descriptor
	}, nil
}
