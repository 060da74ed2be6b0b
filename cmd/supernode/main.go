// Supernode is a region's centre: it asks registries once for all hosts of the
// region, and tells the hosts who gets which piece from whom.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/cmd/internal/upstream"
	"damselfly.dev/supernode"
)

func main() {
	cfg := config{supernode.Default()}
	cli.Command{
		Use:   "supernode",
		Short: "The centre of a region: asks registries once for all its hosts",
		Long: `The hosts' dfdaemons keep a session with it. It gets each blob from its registry
once, and decides which host gets which piece from whom. Its one listener has
the hosts' API, /metrics, /healthz, /readyz, and /v2/: a pull-through mirror for
hosts without a dfdaemon.`,
		Config:   &cfg,
		Run:      cfg.run,
		Commands: []cli.Command{simulateCommand(os.Stdout, os.Stderr), tokenCommand(os.Stdout), caCommand(os.Stdout)},
	}.Main()
}

type config struct{ supernode.Config }

// Flags binds the settings.
func (c *config) Flags(fs *pflag.FlagSet) {
	fs.StringVar(&c.Listen, "listen", c.Listen, "`host:port` to serve on")
	fs.StringVar(&c.Advertise, "advertise", c.Advertise, "`host` at which the region's hosts reach this one")
	fs.StringVar(&c.DataDir, "data-dir", c.DataDir, "where content is kept; one process at a time uses it")
	fs.StringVar(&c.TLS, "tls", c.TLS, "`directory` with tls.crt, tls.key and ca.crt: hosts show certificates of that authority")
	fs.StringVar(&c.CA, "ca", c.CA, "`directory` that supernode ca made: hosts come with its join tokens and get certificates")
	fs.BoolVar(&c.ClearPrivate, "clear-private", c.ClearPrivate, "give private images to hosts without TLS: where the network itself is encrypted")
	fs.Var(cli.Size(&c.Quota), "quota", "most content kept, 0 for no bound; more saves fetches from registries")
	fs.Var(cli.Size(&c.KeepFree), "keep-free", "how much of the disk is left free, at most half of it")
	fs.Var(cli.Size(&c.ScrubRate), "scrub-rate", "how much of what is kept is looked at for rot, a second; 0 for none")
	fs.StringVar(&c.Zone, "zone", c.Zone, "where it stands, as the hosts name theirs")
	fs.StringVar(&c.Rack, "rack", c.Rack, "where in the zone it stands")
	fs.BoolVar(&c.CrossOnce, "cross-once", c.CrossOnce,
		"bring each piece into a zone once, for it to spread there: for thin or paid links between zones")
	fs.IntVar(&c.UpLanes, "up-lanes", c.UpLanes, "transfers to hosts at once: more serve more hosts, each more slowly")
	fs.IntVar(&c.MaxHosts, "max-hosts", c.MaxHosts, "most hosts with a session; more take more memory")
	fs.IntVar(&c.AddressConnections, "address-connections", c.AddressConnections,
		"most connections from one address, and as many sessions, 0 for no bound: raise it where many hosts come from behind one")
	fs.DurationVar(&c.TagFreshness, "tag-freshness", c.TagFreshness,
		"how long a registry is not asked again what a tag means: longer saves requests, and shows changes later")
	fs.DurationVar(&c.StaleFor, "stale-for", c.StaleFor,
		"how long a tag is served as last known while its registry cannot be reached")
	fs.DurationVar(&c.DrainTimeout, "drain-timeout", c.DrainTimeout,
		"how long what hosts have begun may go on after SIGTERM; what is left then, they get from the registry")
	fs.StringVar(&c.Tokens, "tokens", c.Tokens, "`file` of who may use the API at /v1/, with a line of supernode token for each; empty: programs of this machine may look")
	fs.BoolVar(&c.ProtectMetrics, "protect-metrics", c.ProtectMetrics, "ask for a token at /metrics, too")
	upstream.Flags(fs, &c.Registries)
}

func (c *config) run(ctx context.Context, log *zap.Logger, _ []string) error {
	ln, err := net.Listen("tcp", c.Listen) //nolint:noctx // at once: the address is this host's
	if err != nil {
		return fmt.Errorf("%w: choose another address with --listen", err)
	}
	s, err := supernode.New(c.Config, log, cli.Metrics())
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	return s.Run(ctx, ln)
}
