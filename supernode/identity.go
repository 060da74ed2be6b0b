package supernode

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/gin-gonic/gin"
	"go.uber.org/zap"

	"damselfly.dev/supernode/api"
	"damselfly.dev/supernode/api/identity"
)

var errExpired = errors.New("the host's certificate has expired: connect with the next one")

// openIdentity gets the supernode's certificate, when it is to have one.
func (n *Supernode) openIdentity() (err error) {
	switch {
	case n.cfg.CA != "":
		if n.ca, err = identity.OpenCA(n.cfg.CA); err == nil {
			n.guard.Source, err = n.ca.Source(n.cfg.names(), n.log)
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: make an authority there by `supernode ca`", err)
		}
	case n.cfg.TLS != "":
		n.guard.Source, err = identity.FromDir(n.cfg.TLS, n.log)
	case n.cfg.ClearPrivate:
		n.log.Warn("TLS is off and private images go to hosts in clear, as --clear-private says")
	default:
		n.log.Warn("TLS is off: private images are pulled past the region; see docs/security.md")
	}
	n.guard.ClearPrivate = n.cfg.ClearPrivate
	return err
}

// names are those under which clients may ask for the supernode.
func (c Config) names() []string {
	names := []string{"localhost", "127.0.0.1", "::1", c.Advertise}
	if host, _, _ := net.SplitHostPort(c.Listen); net.ParseIP(host) == nil || !net.ParseIP(host).IsUnspecified() {
		names = append(names, host)
	}
	if host, err := os.Hostname(); err == nil {
		names = append(names, host)
	}
	slices.Sort(names)
	return slices.DeleteFunc(slices.Compact(names), func(s string) bool { return s == "" })
}

// known lets nobody in who is not of the region, where TLS is on.
func (n *Supernode) known(c *gin.Context) {
	if _, _, err := n.guard.Of(c.Request); err != nil {
		writeError(c.Writer, http.StatusUnauthorized, api.CodeUnauthorized, err.Error()+": this is for hosts with a certificate of the region")
		c.Abort()
	}
}

// serveJoin gives a host with a join token a certificate.
func (n *Supernode) serveJoin(w http.ResponseWriter, r *http.Request) {
	var req identity.JoinRequest
	if err := json.NewDecoder(io.LimitReader(r.Body, identity.MaxJoin)).Decode(&req); err != nil {
		writeError(w, http.StatusBadRequest, api.CodeBadRequest, "the request to join is malformed")
		return
	}
	a, err := n.ca.Join(req, r.TLS.PeerCertificates)
	if no, ok := errors.AsType[*identity.Refused](err); ok {
		n.log.Warn("host may not join", zap.String("remote", r.RemoteAddr), zap.Error(no))
		writeError(w, http.StatusForbidden, api.CodeUnauthorized, no.Error())
		return
	}
	if err != nil {
		n.log.Error("hosts cannot join", zap.Error(err))
		writeError(w, http.StatusInternalServerError, api.CodeUnavailable, "the supernode cannot make a certificate now: see its log")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(a) // whoever went away needs no answer
}

// introduce notes who opens a session, and ends it when the certificate that
// says so no longer does.
func (s *session) introduce(r *http.Request) (stop func(), err error) {
	stop = func() {}
	if s.who, s.sealed, err = s.node.guard.Of(r); err == nil && s.who != "" {
		t := time.AfterFunc(time.Until(r.TLS.PeerCertificates[0].NotAfter), func() { s.end(errExpired) })
		stop = func() { t.Stop() }
	}
	return stop, err
}
