//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"damselfly.dev/supernode/api"
)

// process is the supernode.
type process struct {
	cmd *exec.Cmd
	url string
}

// start starts a supernode with an empty cache, and waits until it answers.
func start(ctx context.Context, bin, dir, registry string, flags []string) (*process, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := ln.Addr().String()
	ln.Close()
	f, err := os.Create(filepath.Join(dir, "supernode.log"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.CommandContext(ctx, bin, append([]string{
		"--listen", addr, "--data-dir", filepath.Join(dir, "data"),
		"--registry", registry, "--log-level", "warn",
	}, flags...)...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, url: "http://" + addr}
	if err := until(ctx, func() bool { return get(ctx, p.url+"/healthz", nil) == nil }); err != nil {
		p.stop()
		return nil, fmt.Errorf("the supernode does not answer: %w", err)
	}
	return p, nil
}

func (p *process) stop() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.cmd.Wait()
}

// fetch has the supernode bring all contents, for a host that takes nothing.
func fetch(ctx context.Context, super *process, o *origin) error {
	conn, err := hello(ctx, http.DefaultClient, super.url, api.Hello{Version: api.Version, Host: "fetch"})
	if err != nil {
		return err
	}
	defer conn.CloseNow()
	var up api.Up
	for i, b := range o.blobs {
		up.Join = append(up.Join, api.Join{
			Seq: uint64(i + 1), Task: string(b), Origin: api.Origin{Registry: registry, Repository: repository},
		})
	}
	if err := conn.Write(ctx, up); err != nil {
		return err
	}
	refused := make(chan string, 1)
	go func() { // until conn is closed
		for {
			down, err := conn.Read(ctx)
			if err != nil {
				return
			}
			for _, r := range down.Refused {
				select {
				case refused <- fmt.Sprint("the supernode refuses a task: ", r.Reason, r.Status):
				default:
				}
			}
		}
	}()
	err = until(ctx, func() bool {
		var tasks []struct{ Complete bool }
		if get(ctx, super.url+api.TasksPath, &tasks) != nil {
			return false
		}
		complete := 0
		for _, t := range tasks {
			if t.Complete {
				complete++
			}
		}
		return complete == len(o.blobs) || len(refused) > 0
	})
	if len(refused) > 0 {
		return errors.New(<-refused)
	}
	return err
}

// until waits for ready, a minute at most.
func until(ctx context.Context, ready func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for !ready() {
		if err := wait(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

func get(ctx context.Context, url string, to any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	if to == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(to)
}

// memory is what is resident now, and peak the most that ever was, in MiB.
func (p *process) memory() float64 { return p.status("VmRSS:") }
func (p *process) peak() float64   { return p.status("VmHWM:") }

func (p *process) status(key string) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key); ok {
			kib, _ := strconv.ParseFloat(strings.Fields(v)[0], 64)
			return kib / 1024
		}
	}
	return 0
}

// cpu is the processor time taken so far, in seconds.
func (p *process) cpu() float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	_, rest, _ := strings.Cut(string(b), ") ") // the name may hold spaces
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100 // USER_HZ
}

// ownCPU is cpu of this process.
func ownCPU() float64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}
