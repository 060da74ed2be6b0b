package api

import (
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"damselfly.dev/address"
)

const (
	headerTime = 10 * time.Second // for a request's header
	idleTime   = 2 * time.Minute  // between requests
	bodyTime   = 10 * time.Second // for a request's body
	maxHeader  = 64 << 10         // bytes
	maxBody    = 64 << 10         // bytes
	// answerTime is how long an answer may take that is not told to take longer by
	// whoever writes it.
	answerTime = 2 * time.Minute
)

// Gate bounds how many there are of something that comes from others.
type Gate struct {
	All  int // in all
	Each int // of one who, 0 for no bound

	mu sync.Mutex // guards what follows
	n  int
	by map[string]int
}

// Enter tells whether one more of who may come, which then counts until Leave. Of
// "" there may be any number, but for All.
func (g *Gate) Enter(who string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n >= g.All || who != "" && g.Each > 0 && g.by[who] >= g.Each {
		return false
	}
	if g.by == nil {
		g.by = map[string]int{}
	}
	g.n++
	g.by[who]++
	return true
}

// Leave takes back an Enter that has said yes.
func (g *Gate) Leave(who string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.n--
	if g.by[who]--; g.by[who] == 0 {
		delete(g.by, who)
	}
}

// Len returns how many there are.
func (g *Gate) Len() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.n
}

// Neighbour is the address of a connection's other end, as a Gate takes it: "" for
// who is on this machine.
func Neighbour(remote string) string {
	from, _ := netip.ParseAddrPort(remote) // none of a socket of the host's own
	addr := from.Addr().Unmap()
	if !addr.IsValid() || addr.IsLoopback() {
		return ""
	}
	return addr.String()
}

// Guard bounds the connections of s, and what they may take before and between
// requests. For one that is too many refused is called.
func (g *Gate) Guard(s *http.Server, refused func()) {
	s.ReadHeaderTimeout, s.IdleTimeout, s.MaxHeaderBytes = headerTime, idleTime, maxHeader
	var in sync.Map // the connections that have entered
	s.ConnState = func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			if g.Enter(Neighbour(c.RemoteAddr().String())) {
				in.Store(c, nil)
				return
			}
			refused()
			_ = c.Close()
		case http.StateClosed, http.StateHijacked:
			if _, ok := in.LoadAndDelete(c); ok {
				g.Leave(Neighbour(c.RemoteAddr().String()))
			}
		case http.StateActive, http.StateIdle:
		}
	}
}

// Bounded has h answer within bounds: a request's body is small and comes in
// time, and its answer goes in time, unless h itself sets another deadline. An h
// that has read a body and takes its time clears the connection's read deadline.
func Bounded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		now := time.Now()
		_ = control.SetWriteDeadline(now.Add(answerTime)) // what cannot keep time, as in tests, has none
		if r.ContentLength != 0 {
			_ = control.SetReadDeadline(now.Add(bodyTime))
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		}
		h.ServeHTTP(w, r)
	})
}

// NamesThisHost tells whether the Host of a request is one by which programs of
// this machine ask it: an address, a name without a dot, or one of names. Any
// other is what a web page may have made lead here.
func NamesThisHost(r *http.Request, names ...string) bool {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	return !strings.Contains(host, ".") || strings.HasSuffix(host, ".localhost") || slices.Contains(names, host)
}

// OfThisHost tells whether a request comes from the machine that answers it.
func OfThisHost(r *http.Request) bool {
	if address.IsLoopback(r.RemoteAddr) {
		return true
	}
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return err == nil && local != nil && from.Addr().Unmap() == local.AddrPort().Addr().Unmap()
}
