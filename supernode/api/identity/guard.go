package identity

import (
	"net/http"

	"damselfly.dev/address"
)

// Guard judges who has come to a listener of a host or a supernode.
type Guard struct {
	Source       *Source // nil without TLS
	ClearPrivate bool    // the network is encrypted underneath
}

// Of returns who has sent a request, "" where no certificates are shown, and
// whether nobody else can listen. With TLS it is an error when that is nobody of
// the region.
func (g Guard) Of(r *http.Request) (who string, sealed bool, err error) {
	if g.Source != nil {
		who, err = Of(r.TLS)
		return who, err == nil, err
	}
	return "", g.Sealed(r), nil
}

// Sealed tells whether nobody else can listen.
func (g Guard) Sealed(r *http.Request) bool {
	return g.ClearPrivate || r.TLS != nil || address.IsLoopback(r.RemoteAddr)
}
