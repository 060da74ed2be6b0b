//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"syscall"
	"time"

	"damselfly.dev/supernode/api"
	"damselfly.dev/test/programs"
)

// process is the supernode.
type process struct {
	*programs.Local
	url string
}

// start starts a supernode with an empty cache, and waits until it answers.
func start(ctx context.Context, bin, dir, registry string, flags []string) (*process, error) {
	addrs, err := programs.Free(1)
	if err != nil {
		return nil, err
	}
	url := "http://" + addrs[0]
	p, err := programs.StartLocal(ctx, dir, url+"/healthz", bin, append([]string{
		"--listen", addrs[0], "--data-dir", filepath.Join(dir, "data"),
		"--registry", registry, "--log-level", "warn",
	}, flags...)...)
	if err != nil {
		return nil, err
	}
	return &process{p, url}, nil
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
	return json.NewDecoder(resp.Body).Decode(to)
}

// ownCPU is the processor time that this process has taken, in seconds.
func ownCPU() float64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}
