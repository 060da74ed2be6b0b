//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"damselfly.dev/pieces"
	"damselfly.dev/test/lab"
	"damselfly.dev/test/programs"
)

const (
	rangeReaders = 16
	rangeReads   = 12
	rangeBytes   = 64 << 10
)

// ranges is readers on four hosts that take small ranges at random places of one
// blob, as lazy snapshotters do: straight from the registry, through the mirror
// when nobody has had any of it, and the same ones again.
func ranges(ctx context.Context, e *env) error {
	rate, size := 200*lab.Mbit, e.size(1<<30)
	r, err := build(ctx, e.bin, equal(4, rate))
	if err != nil {
		return err
	}
	defer r.close()
	var cold, warm, copies []float64
	for run := range e.runs {
		b, err := r.fresh(size)
		if err != nil {
			return err
		}
		places := make([][]int64, rangeReaders)
		touched := pieces.NewSet(pieces.NewRangedLayout(size).Count())
		for k := range places {
			for range rangeReads {
				off := rand.Int64N(size - rangeBytes) //nolint:gosec // no secret
				places[k] = append(places[k], off)
				first, end := pieces.NewRangedLayout(size).Span(off, rangeBytes)
				for i := first; i < end; i++ {
					touched.Add(i)
				}
			}
		}
		straight := func(int) string { return r.origin.URL() + programs.BlobPath(b.digest) }
		direct, err := r.readRanges(ctx, straight, places)
		if err != nil {
			return err
		}
		if err := r.origin.Forget(); err != nil {
			return err
		}
		through := func(i int) string { return r.mirrored(i, b) }
		first, err := r.readRanges(ctx, through, places)
		if err != nil {
			return err
		}
		sent, err := r.counts(ctx, b)
		if err != nil {
			return err
		}
		again, err := r.readRanges(ctx, through, places)
		if err != nil {
			return err
		}
		cold, warm = append(cold, median(first)/median(direct)), append(warm, median(again)/median(direct))
		copies = append(copies, sent[0]*float64(size)/float64(int64(touched.Len())*pieces.NewRangedLayout(size).PieceSize))
		e.say("  run %d: median direct %.2f ms, cold %.2f ms, warm %.2f ms; slowest %.1f, %.1f, %.1f ms; origin copies of what was touched %.3f", run+1,
			median(direct), median(first), median(again), most(direct), most(first), most(again), last(copies))
		if err := r.origin.Remove(b.digest); err != nil {
			return err
		}
	}
	name := fmt.Sprintf("%d readers of 64 KiB, 4 hosts @ %v, %d MiB: ", rangeReaders, rate, size>>20)
	e.atMost(name+"origin copies of what was touched", "", 1, copies...)
	e.atMost(name+"median latency cold over direct", "", 2, cold...)
	e.atMost(name+"median latency warm over direct", "", 1, warm...)
	return nil
}

func most(values []float64) (m float64) {
	for _, v := range values {
		m = max(m, v)
	}
	return m
}

// readRanges has a reader for each list of places, spread over the hosts, read
// them in turn over a connection that it keeps, and returns how long each took, in
// milliseconds.
func (r *region) readRanges(ctx context.Context, url func(host int) string, places [][]int64) ([]float64, error) {
	var mu sync.Mutex
	var took []float64
	g, ctx := errgroup.WithContext(ctx)
	for k, mine := range places {
		i := k % len(r.hosts)
		g.Go(func() error {
			t := &http.Transport{DialContext: r.hosts[i].Host.Dial, DisableCompression: true}
			defer t.CloseIdleConnections()
			for _, off := range mine {
				began := time.Now()
				if err := readRange(ctx, t, url(i), off); err != nil {
					return err
				}
				mu.Lock()
				took = append(took, float64(time.Since(began).Microseconds())/1000)
				mu.Unlock()
			}
			return nil
		})
	}
	err := g.Wait()
	return took, err
}

func readRange(ctx context.Context, t *http.Transport, url string, off int64) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+rangeBytes-1))
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && (n != rangeBytes || resp.StatusCode != http.StatusPartialContent) {
		err = errors.New("a range is answered with " + resp.Status)
	}
	return err
}
