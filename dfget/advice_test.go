package dfget

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api"
)

// Why there is no session is told again when it changes, and not with each attempt.
func TestReasonsOfNoSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, err := pieces.OpenStore(t.TempDir(), pieces.StoreConfig{})
		require.NoError(t, err)
		defer func() { require.NoError(t, store.Close()) }()
		core, logs := observer.New(zap.WarnLevel)
		cfg := PeerConfig{Supernodes: []string{"http://node:80"}}
		p, err := NewPeer(cfg, store, zap.New(core), prometheus.NewRegistry())
		require.NoError(t, err)
		var why atomic.Value
		why.Store("one")
		var tries atomic.Int64
		p.client.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
			return nil, fmt.Errorf("from port %d: %w", tries.Add(1), errors.New(why.Load().(string)))
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- p.Run(ctx) }()
		for i, next := range []string{"two", "one", "three"} {
			<-time.After(5 * time.Minute) // of the bubble's clock
			synctest.Wait()
			require.Greater(t, tries.Load(), int64(5*(i+1)))
			require.Len(t, logs.All(), i+1)
			why.Store(next)
		}
		cancel()
		require.ErrorIs(t, <-ended, context.Canceled)
	})
}

// Who has no certificate hears what a supernode with TLS wants.
func TestTLSIsAdvised(t *testing.T) {
	for base, advised := range map[string]bool{"https://node:80": true, "http://node:80": false} {
		p := &Peer{client: newClient()}
		p.client.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("remote error: tls: certificate required")
		}
		_, _, err := p.dial(t.Context(), base)
		require.ErrorContains(t, err, "certificate required")
		if advised {
			require.ErrorContains(t, err, "--join-token")
		} else {
			require.NotContains(t, err.Error(), "--join-token")
		}
	}
}

// Why the region does not serve a task is at hand where the origin is asked instead, and logged there.
func TestReasonOfARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBlob(100)
		_, _, h := bubble(t, PeerConfig{}, func(n *fakeNode, up api.Up) {
			for _, j := range up.Join {
				n.send(api.Down{Refused: []api.Refused{{Seq: j.Seq, Status: 503, Reason: "no room below the quota"}}})
			}
		}, b)
		s, err := h.Open(t.Context(), Request{b.id, registryOrigin(), &upstream{bytes: b.bytes}}, 0, -1)
		require.NoError(t, err)
		require.ErrorContains(t, s.refused, "no room below the quota")
		require.NoError(t, s.Close())
	})
}
