// Package address tells what may stand behind an address of the network.
package address

import (
	"net"
	"net/netip"
)

var wraps4 = [...]netip.Prefix{netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("2002::/16")} // NAT64 and 6to4

// Plain is the address that is meant by one which wraps it: an IPv4 address in
// one of IPv6, behind a NAT64 or by 6to4.
func Plain(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	b := a.As16()
	switch {
	case wraps4[0].Contains(a):
		return netip.AddrFrom4([4]byte(b[12:]))
	case wraps4[1].Contains(a):
		return netip.AddrFrom4([4]byte(b[2:6]))
	}
	return a
}

var secrets = map[netip.Addr]bool{
	netip.MustParseAddr("169.254.169.254"): true, netip.MustParseAddr("169.254.170.2"): true, netip.MustParseAddr("169.254.170.23"): true,
	netip.MustParseAddr("100.100.100.200"): true, netip.MustParseAddr("168.63.129.16"): true, netip.MustParseAddr("192.0.0.192"): true,
	netip.MustParseAddr("fd00:ec2::254"): true, netip.MustParseAddr("fd00:ec2::23"): true, netip.MustParseAddr("fd20:ce::254"): true,
}

// IsSecret tells whether a plain address is where a cloud tells a machine its own
// credentials.
func IsSecret(a netip.Addr) bool { return secrets[a] }

// IsAHost tells whether some machine of a region may have an address; with near,
// whether the asking one may.
func IsAHost(a netip.Addr, near bool) bool {
	a = Plain(a)
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLinkLocalUnicast() && !IsSecret(a) && (near || !a.IsLoopback())
}

// IsLoopback tells whether host:port is on the machine itself, by its address or as
// localhost.
func IsLoopback(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	a, _ := netip.ParseAddr(host)
	return err == nil && (host == "localhost" || a.Unmap().IsLoopback())
}
