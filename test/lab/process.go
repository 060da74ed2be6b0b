//go:build linux

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
)

// A Process runs on a host, in a process group and mount namespace of its own.
type Process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended and err is set
	err  error
}

// spawn starts the lab's processes, all from one thread: the kernel kills them
// when the thread that started them ends, which this one does with the lab.
func (l *Lab) spawn() {
	runtime.LockOSThread()
	for start := range l.start {
		start()
	}
}

// Start starts cmd on the host. What it prints is appended to a log file named
// after name, unless cmd already says where to. It is killed when this process
// ends, whatever the reason.
func (h *Host) Start(name string, cmd *exec.Cmd) (*Process, error) {
	p := &Process{name: name, cmd: cmd, done: make(chan struct{}), log: filepath.Join(h.dir, name+".log")}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", name, h.cfg.Name, err)
	}
	defer log.Close() // the process has its own
	if cmd.Stdout == nil {
		cmd.Stdout = log
	}
	if cmd.Stderr == nil {
		cmd.Stderr = log
	}
	if cmd.Dir == "" {
		cmd.Dir = h.dir
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if h.group != "" {
		group, err := os.Open(h.group)
		if err != nil {
			return nil, fmt.Errorf("start %s on %s: %w", name, h.cfg.Name, err)
		}
		defer group.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(group.Fd()) //nolint:gosec // G115: a descriptor
	}
	h.lab.mu.Lock()
	defer h.lab.mu.Unlock()
	if h.lab.closed {
		return nil, fmt.Errorf("start %s on %s: the lab is closed", name, h.cfg.Name)
	}
	result := make(chan error)
	h.lab.start <- func() { result <- h.startHere(cmd) }
	if err := <-result; err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", name, h.cfg.Name, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	h.lab.procs = append(h.lab.procs, p)
	return p, nil
}

// startHere starts cmd from the calling thread, which must be the spawner's.
func (h *Host) startHere(cmd *exec.Cmd) error {
	if h.lab.cfg.Loopback {
		return cmd.Start()
	}
	cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	leave, err := enter(namespacePath(h.namespace()))
	if err != nil {
		return err
	}
	err = cmd.Start()
	if back := leave(); back != nil {
		panic("lab: cannot leave a host's network: " + back.Error()) // all later processes would start on the wrong host
	}
	return err
}

// Run starts cmd on the host and waits for its end; a ctx that ends kills it.
func (h *Host) Run(ctx context.Context, name string, cmd *exec.Cmd) error {
	p, err := h.Start(name, cmd)
	if err != nil {
		return err
	}
	if err := p.Wait(ctx); err != nil {
		p.Kill()
		return err
	}
	return nil
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Log is the path of the process's log file.
func (p *Process) Log() string { return p.log }

// PID is the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Wait returns when the process has ended, with an error if it did not exit
// with 0, or with ctx's.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return fmt.Errorf("wait for %s: %w", p.name, context.Cause(ctx))
	case <-p.done:
		if p.err != nil {
			return fmt.Errorf("%s: %w; it said: %s", p.name, p.err, p.LastWords())
		}
		return nil
	}
}

// LastWords is the end of the process's log.
func (p *Process) LastWords() []byte {
	const most = 800
	log, err := os.ReadFile(p.log)
	if err != nil {
		return nil
	}
	return bytes.TrimSpace(log[max(0, len(log)-most):])
}

// Kill kills the process and its group with SIGKILL and waits for its end.
func (p *Process) Kill() {
	select {
	case <-p.done: // its id may be another's by now
		return
	default:
	}
	if err := syscall.Kill(-p.PID(), syscall.SIGKILL); errors.Is(err, syscall.ESRCH) {
		return
	}
	<-p.done
}

// Stop asks the process to end and waits for it; a ctx that ends kills it.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		p.Kill()
		return fmt.Errorf("%s did not stop: %w", p.name, context.Cause(ctx))
	}
}

// ExitCode is what the process ended with, -1 where a signal ended it or it runs.
func (p *Process) ExitCode() int {
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	default:
		return -1
	}
}

// Pause halts the process where it is; Resume lets it go on.
func (p *Process) Pause() error { return p.signal(syscall.SIGSTOP) }

// Resume undoes Pause.
func (p *Process) Resume() error { return p.signal(syscall.SIGCONT) }

func (p *Process) signal(s os.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal %s: %w", p.name, err)
	}
	return nil
}
