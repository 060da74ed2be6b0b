// Dfdaemon is a host's agent: container engines pull through it, and it gets
// what they pull from the other hosts of the region.
package main

import (
	"context"
	"os"

	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/cmd/internal/upstream"
	"damselfly.dev/dfdaemon"
	"damselfly.dev/registryproxy"
)

func main() {
	cfg := config{dfdaemon.Default()}
	cli.Command{
		Use:   "dfdaemon",
		Short: "The agent on a host: a registry mirror for its container engines",
		Long: `Container engines pull through the mirror (--mirror-listen), which gets each blob
by pieces from other hosts and the region's supernode, and from the registry
itself whenever those cannot give it. It needs no supernode to start.`,
		Config: &cfg,
		Run: func(ctx context.Context, log *zap.Logger, _ []string) error {
			d, err := dfdaemon.New(cfg.Config, log, cli.Metrics())
			if err != nil {
				return err
			}
			return d.Run(ctx)
		},
		Commands: []cli.Command{setupCommand(), unsetCommand(), checkCommand(), caCommand(os.Stdout)},
	}.Main()
}

type config struct{ dfdaemon.Config }

// Flags binds the settings.
func (c *config) Flags(fs *pflag.FlagSet) {
	fs.StringSliceVar(&c.Supernodes, "supernode", c.Supernodes, "`URL` of a supernode of the region; may be repeated")
	fs.StringVar(&c.Advertise, "advertise", c.Advertise, "`host` or host:port at which other hosts reach --peer-listen; empty: as the supernode sees it")
	fs.StringVar(&c.DataDir, "data-dir", c.DataDir, "where content is kept; one process at a time uses it")
	fs.StringVar(&c.TLS, "tls", c.TLS, "`directory` with tls.crt, tls.key and ca.crt: all in the region goes over TLS, --supernode too")
	fs.StringVar(&c.JoinToken, "join-token", c.JoinToken, "`file` with the token that supernode ca printed: as --tls, with a certificate that the supernode gives")
	fs.BoolVar(&c.ClearPrivate, "clear-private", c.ClearPrivate, "get private images from the region without TLS: where the network itself is encrypted")
	fs.Var(cli.Size(&c.Quota), "quota", "most content kept, 0 for no bound; more saves repeated pulls")
	fs.Var(cli.Size(&c.KeepFree), "keep-free", "how much of the disk is left free, at most half of it")
	fs.Var(cli.Size(&c.ScrubRate), "scrub-rate", "how much of what is kept is looked at for rot, a second; 0 for none")
	fs.StringVar(&c.MirrorListen, "mirror-listen", c.MirrorListen, "`host:port` that engines pull from")
	fs.StringVar(&c.PeerListen, "peer-listen", c.PeerListen, "`host:port` where other hosts get pieces; empty: this one only takes")
	fs.StringVar(&c.MetricsListen, "metrics-listen", c.MetricsListen, "`host:port` of /metrics, /healthz and /readyz; empty: none")
	fs.StringVar(&c.Socket, "socket", c.Socket, "`path` of the control socket that dfget uses; empty: none")
	fs.StringVar(&c.SocketGroup, "socket-group", c.SocketGroup, "`group` that may use the control socket beside this user")
	fs.StringSliceVar(&c.SocketUsers, "socket-users", c.SocketUsers, "`users` who may use the control socket beside this one and root")
	fs.StringSliceVar(&c.MirrorHosts, "mirror-hosts", c.MirrorHosts, "`names` with a dot by which engines ask the mirror, beside this host's own")
	fs.DurationVar(&c.DrainTimeout, "drain-timeout", c.DrainTimeout, "how long running answers may take after SIGTERM")
	fs.StringVar(&c.Zone, "zone", c.Zone, "where the host is: pieces come from the same zone where they can")
	fs.StringVar(&c.Rack, "rack", c.Rack, "where in the zone the host is")
	fs.IntVar(&c.UpLanes, "up-lanes", c.UpLanes, "transfers to other hosts at once; keep it equal to --down-lanes")
	fs.IntVar(&c.DownLanes, "down-lanes", c.DownLanes, "transfers from other hosts at once")
	fs.StringVar(&c.RangeBackground, "range-background", c.RangeBackground,
		"when to get the rest of a blob after a range of it: `off`, first (at once), or how long after, such as 10m")
	fs.StringVar(&c.Proxy.Listen, "proxy-listen", c.Proxy.Listen, "`host:port` of a forward proxy for HTTP_PROXY and HTTPS_PROXY; empty: none")
	cli.ListVar(fs, "proxy-rules", "what the proxy does with which URL, as a list in YAML: see docs/operating.md",
		func(r []registryproxy.Rule) { c.Proxy.Rules = r })
	fs.IntSliceVar(&c.Proxy.Ports, "proxy-ports", c.Proxy.Ports, "ports that may be asked for through the proxy")
	fs.StringSliceVar((*[]string)(&c.Proxy.Intercept), "proxy-intercept", c.Proxy.Intercept,
		"`host`s whose HTTPS the proxy opens, exact or *.corp; they need --proxy-ca")
	fs.StringVar(&c.Proxy.CA, "proxy-ca", c.Proxy.CA, "`file` of the authority's certificate that dfdaemon ca made")
	fs.StringVar(&c.Proxy.CAKey, "proxy-ca-key", c.Proxy.CAKey, "`file` of its key")
	fs.StringVar(&c.Proxy.Users, "proxy-users", c.Proxy.Users, "`file` of who may use the proxy, as htpasswd -B writes it; empty: who reaches it")
	fs.StringVar(&c.URLs.Prefix, "url-prefix", c.URLs.Prefix, "`path` at --mirror-listen after which a whole URL is read through the swarm, as overlaybd asks; empty: none")
	fs.StringSliceVar(&c.URLs.Ignore, "url-ignore", c.URLs.Ignore, "`parameters` that sign such a URL and are left out of its name; the same on all hosts")
	upstream.Flags(fs, &c.Registries)
}
