//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// turn is the abstract socket that the living lab holds: the kernel takes it
// back when its owner ends, however it ends.
const turn = "@damselfly-lab"

// retry is how often the lab looks again for what the kernel does in its own time.
const retry = 20 * time.Millisecond

// eventually calls done until it says true, returns an error, or ctx ends.
func eventually(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(retry)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// acquire waits until no other lab lives.
func acquire(ctx context.Context) (net.Listener, error) {
	var lock net.Listener
	waits := false
	err := eventually(ctx, func() (bool, error) {
		var err error
		lock, err = new(net.ListenConfig).Listen(ctx, "unix", turn)
		if errors.Is(err, syscall.EADDRINUSE) {
			if !waits {
				fmt.Fprintln(os.Stderr, "lab: another one is in use, waiting for its end")
			}
			waits = true
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		return nil, fmt.Errorf("wait for the lab before this one: %w", err)
	}
	return lock, nil
}

// sweep removes what labs of dead owners left.
func sweep(ctx context.Context, dir string, filesOnly bool) error {
	if !filesOnly {
		for _, id := range orphans("/run/netns") {
			if err := removeNamespaces(ctx, id); err != nil {
				return err
			}
		}
		for _, id := range orphans(groups()) {
			if err := removeGroups(id); err != nil {
				return err
			}
		}
	}
	for _, dir := range []string{dir, usualDir} {
		for _, id := range orphans(dir) {
			left, err := filepath.Glob(filepath.Join(dir, id+"-*"))
			if err != nil {
				return err
			}
			for _, path := range left {
				if err := os.RemoveAll(path); err != nil && !errors.Is(err, fs.ErrPermission) { // another user's
					return err
				}
			}
		}
	}
	return nil
}

// orphans returns the ids of labs that have an entry in dir and no living owner.
func orphans(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // no directory, nothing left in it
	}
	var ids []string
	for _, entry := range entries {
		rest, ok := strings.CutPrefix(entry.Name(), prefix)
		if !ok {
			continue
		}
		owner, _, _ := strings.Cut(rest, "-")
		pid, err := strconv.Atoi(owner)
		if err != nil || pid <= 0 || !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			continue
		}
		ids = append(ids, prefix+owner)
	}
	return ids
}

// removeNamespaces kills all that runs in the namespaces of a lab and deletes them.
func removeNamespaces(ctx context.Context, id string) error {
	names, err := filepath.Glob(namespacePath(id + "-*"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, path := range names {
		name := filepath.Base(path)
		err := eventually(ctx, func() (bool, error) { return killInside(ctx, name) })
		if err != nil {
			return fmt.Errorf("end what runs in %s: %w", name, err)
		}
		if err := ip(ctx, "", "netns delete "+name); err != nil {
			return err
		}
	}
	return nil
}

// killInside kills the processes of a namespace; true when there are none.
func killInside(ctx context.Context, namespace string) (bool, error) {
	out, err := exec.CommandContext(ctx, "ip", "netns", "pids", namespace).Output()
	if err != nil {
		return false, err
	}
	pids := strings.Fields(string(out))
	for _, field := range pids {
		pid, err := strconv.Atoi(field)
		if err != nil || pid <= 1 {
			return false, fmt.Errorf("unexpected process id %q", field)
		}
		if pid == os.Getpid() { // one of our threads is inside, and about to leave
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return false, err
		}
	}
	return len(pids) == 0, nil
}

// groups is where the unified control group hierarchy is mounted, or empty.
func groups() string {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1]
		}
	}
	return ""
}

// makeGroup makes a host's control group and returns its directory, or nothing
// where the machine gives none: then its processor time is not counted.
func makeGroup(id, host string) string {
	root := groups()
	if root == "" {
		return ""
	}
	group := filepath.Join(root, id, host)
	if err := os.MkdirAll(group, 0o755); err != nil {
		return ""
	}
	return group
}

// removeGroups removes the control groups of a lab. Processes killed a moment
// ago may still be leaving them.
func removeGroups(id string) error {
	root := groups()
	if root == "" {
		return nil
	}
	top := filepath.Join(root, id)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := eventually(ctx, func() (bool, error) {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() || path == top {
				return err
			}
			if err := syscall.Rmdir(path); err != nil {
				return err
			}
			return fs.SkipDir
		})
		if err == nil {
			err = syscall.Rmdir(top)
		}
		if errors.Is(err, syscall.EBUSY) {
			return false, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err == nil, err
	})
	if err != nil {
		return fmt.Errorf("remove the control groups: %w", err)
	}
	return nil
}
