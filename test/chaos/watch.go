//go:build linux

package main

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"damselfly.dev/test/programs"
)

// How much more each process may have in the end than in the beginning, both times idle.
const (
	moreMemory           = 96 // MiB
	moreFiles            = 64
	moreGoroutines       = 64
	settleLimit          = 40 * time.Second
	idleLimit            = 150 * time.Second // an idle connection stays for two minutes
	overQuota      int64 = 5 * mebi          // a piece on its way, what directories take, and what has been cut off
)

// usage is what a process takes.
type usage struct {
	memory            float64 // MiB
	files, goroutines int
}

// watch looks at what all processes take.
type watch struct {
	*soaking
	first map[string]usage

	mu    sync.Mutex // guards what follows
	most  map[string]usage
	disk  int64 // the most that was used of one
	looks int
}

func (w *watch) judgeFrom(first map[string]usage) {
	w.first, w.most = first, map[string]usage{}
}

// sample looks at all processes; those that do not answer are left out.
func (w *watch) sample(ctx context.Context) map[string]usage {
	all := map[string]usage{}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	look := func(name string, pid int, goroutines func(context.Context) (int64, error)) {
		n, err := goroutines(ctx)
		files, errFiles := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if memory := programs.Memory(pid); err == nil && errFiles == nil && memory > 0 {
			all[name] = usage{memory, len(files), int(n)}
		}
	}
	for _, h := range w.hosts {
		if h.mu.TryLock() { // else something is being done to it
			look(h.Name(), h.daemon.Process.PID(), h.daemon.Goroutines)
			h.mu.Unlock()
		}
	}
	if w.centre.TryLock() {
		look("supernode", w.supernode.Process.PID(), w.supernode.Goroutines)
		w.centre.Unlock()
	}
	return all
}

// run looks every two seconds.
func (w *watch) run(ctx context.Context) {
	for wait(ctx, 2*time.Second) == nil {
		now := w.sample(ctx)
		w.mu.Lock()
		w.looks++
		for name, u := range now {
			m := w.most[name]
			w.most[name] = usage{max(m.memory, u.memory), max(m.files, u.files), max(m.goroutines, u.goroutines)}
		}
		for _, h := range w.hosts {
			w.disk = max(w.disk, h.used())
		}
		w.mu.Unlock()
	}
}

// used is how much of the host's disk its store takes, in bytes.
func (h *host) used() (n int64) {
	_ = filepath.WalkDir(h.disk, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == h.ballast() {
			return nil //nolint:nilerr // the store changes meanwhile
		}
		var s syscall.Stat_t
		if syscall.Lstat(path, &s) == nil && e.Type().IsRegular() {
			n += s.Blocks * 512
		}
		return nil
	})
	return n
}

// settle waits until the region is idle: until the numbers of goroutines and files stay.
func (w *watch) settle(ctx context.Context) error {
	var last map[string]usage
	same := 0
	limit := time.Now().Add(settleLimit)
	for same < 2 && time.Now().Before(limit) {
		if err := wait(ctx, time.Second); err != nil {
			return err
		}
		now := w.sample(ctx)
		equal := maps.EqualFunc(now, last, func(a, b usage) bool { return a.files == b.files && a.goroutines == b.goroutines })
		if same++; !equal {
			same = 0
		}
		last = now
	}
	return nil
}

// flat tells whether all processes take as much as in the beginning.
func (w *watch) flat(now map[string]usage) bool {
	held := len(now) == len(w.hosts)+1
	for name, z := range now {
		a := w.first[name]
		held = held && z.memory <= a.memory+moreMemory && z.files <= a.files+moreFiles && z.goroutines <= a.goroutines+moreGoroutines
	}
	return held
}

// last waits until all is flat, or for as long as idle connections stay, and returns
// what there is then.
func (w *watch) last(ctx context.Context) (now map[string]usage, err error) {
	for limit := time.Now().Add(idleLimit); ; {
		if err := w.settle(ctx); err != nil {
			return nil, err
		}
		if now = w.sample(ctx); w.flat(now) || time.Now().After(limit) {
			return now, nil
		}
	}
}

func (w *watch) report(last map[string]usage) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.out.say("host: memory in MiB, files, goroutines: idle before, the most, idle after")
	for _, name := range slices.Sorted(maps.Keys(last)) {
		a, most, z := w.first[name], w.most[name], last[name]
		w.out.say("%s: %.0f %d %d, %.0f %d %d, %.0f %d %d", name, a.memory, a.files, a.goroutines,
			most.memory, most.files, most.goroutines, z.memory, z.files, z.goroutines)
	}
	w.out.check(w.flat(last), "memory, files and goroutines of all %d processes are at the end as they were at the beginning (at most %d MiB, %d, %d more)",
		len(last), moreMemory, moreFiles, moreGoroutines)
	w.out.check(w.disk <= quota+overQuota && w.looks > 0, "the stores took at most %.1f MiB of their disks (quota %d MiB)", float64(w.disk)/mebi, quota/mebi)
}
