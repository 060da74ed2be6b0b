package dfget

import (
	"context"
	"encoding/binary"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// resolving returns a resolver to which all names stand for one IPv4 address.
func resolving(to net.IP) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		here, there := net.Pipe() // which is no packets' connection: each message has its length before it
		go func() {
			defer func() { _ = there.Close() }()
			b := make([]byte, 514)
			for {
				if _, err := there.Read(b[:2]); err != nil {
					return
				}
				n, err := there.Read(b[2 : 2+binary.BigEndian.Uint16(b)])
				if err != nil {
					return
				}
				question := b[2+12 : 2+n]
				for end := 0; ; end += int(question[end]) + 1 {
					if question[end] == 0 {
						question = question[:end+5]
						break
					}
				}
				answer := append([]byte{b[2], b[3], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}, question...)
				if question[len(question)-3] == 1 { // type A
					answer[7] = 1
					answer = append(answer, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4)
					answer = append(answer, to.To4()...)
				}
				if _, err := there.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
					return
				}
			}
		}()
		return here, nil
	}}
}

// A parent's name is judged by what it stands for when it is connected to.
func TestNamesOfParents(t *testing.T) {
	for name, c := range map[string]struct {
		advertise string
		to        net.IP
		asked     bool
	}{
		"another machine's loopback": {"10.9.9.9:1", net.IPv4(127, 0, 0, 1), false},
		"all on one machine":         {"127.0.0.1:1", net.IPv4(127, 0, 0, 1), true},
		"nobody's":                   {"127.0.0.1:1", net.IPv4zero, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBlob(100)
			var asked atomic.Int64
			secret := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				content(b)(w, r)
			}))
			defer secret.Close()
			port := secret.URL[strings.LastIndex(secret.URL, ":"):]
			n := newFakeNode(t, serving(b, "evil.example"+port))
			centre := httptest.NewServer(n.routes)
			defer centre.Close()
			d := newDialer()
			d.Resolver = resolving(c.to)
			cfg := PeerConfig{Supernodes: []string{centre.URL}, Advertise: c.advertise, ClearPrivate: true}
			h := newHost(t, t.TempDir(), cfg, 0, d.DialContext)
			defer h.stop()
			up := &upstream{bytes: b.bytes}
			require.NoError(t, h.Ready(t.Context()))
			got, err := get(t, h, Request{b.id, registryOrigin(), up}, 0, -1)
			require.NoError(t, err)
			require.Equal(t, b.bytes, got)
			require.Equal(t, c.asked, asked.Load() > 0)
			require.Equal(t, c.asked, len(up.opened()) == 0)
		})
	}
}
