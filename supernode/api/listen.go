package api

import (
	"net"
	"net/http"
	"net/netip"
)

// OfThisHost tells whether a request comes from the machine that answers it.
func OfThisHost(r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || from.Addr().Unmap().IsLoopback() {
		return err == nil
	}
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return local != nil && from.Addr().Unmap() == local.AddrPort().Addr().Unmap()
}
