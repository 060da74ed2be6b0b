// Dfget brings a file, by pieces from other hosts where it can.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/dfget"
	"damselfly.dev/pieces"
	"damselfly.dev/supernode/api/identity"
)

// Exit codes beside those of every command.
const (
	exitMismatch = 3
	exitRefused  = 4
	exitOutput   = 5
)

// daemonSocket is where a host's dfdaemon listens.
const daemonSocket = "/run/damselfly/dfdaemon.sock"

// noSocket as --socket is to do without the host's dfdaemon.
const noSocket = "none"

func main() {
	cfg := defaults()
	cli.Command{
		Use:   "dfget -o FILE URL",
		Short: "Get a file, by pieces from other hosts where possible",
		Long: `The file comes through the dfdaemon of this host where there is one (--socket),
else from the region's swarm (--supernode), else from the URL itself; there it
also comes from whenever the others cannot give it. FILE appears when it is whole
and, with --digest, verified. A download that was killed goes on where it was.

Exit codes of its own: 3 the bytes do not have the digest, 4 the URL's server
refuses, 5 FILE cannot be written.`,
		Args:   cli.One("URL, and with -o a file to write"),
		Config: cfg,
		Level:  zapcore.WarnLevel,
		Plain:  true,
		Run:    cfg.run,
	}.Main()
}

type config struct {
	output     string
	socket     string
	supernodes []string
	digest     string
	headers    []string
	dataDir    string
	advertise  string
	zone, rack string
	// Of a peer of its own.
	tls, joinToken string
	clearPrivate   bool
	headerByKey    http.Header // of headers, by Validate
}

func defaults() *config {
	dir, err := os.UserCacheDir()
	if err != nil { // a service without a home
		dir = filepath.Join(os.TempDir(), fmt.Sprintf("cache-%d", os.Geteuid()))
	}
	return &config{dataDir: filepath.Join(dir, "damselfly", "dfget")}
}

// Flags binds the settings.
func (c *config) Flags(fs *pflag.FlagSet) {
	fs.StringVarP(&c.output, "output", "o", c.output, "`file` to write; one that exists is replaced in the end")
	fs.StringVar(&c.digest, "digest", c.digest, "what the bytes must have, such as sha256:…; also finds them in the swarm by it")
	fs.StringArrayVar(&c.headers, "header", c.headers, "`'K: V'` to send to the URL's server alone; may be repeated")
	fs.StringVar(&c.socket, "socket", c.socket, "`path` of the dfdaemon's socket, or none; empty: "+daemonSocket+", where it exists and no --supernode is given")
	fs.StringSliceVar(&c.supernodes, "supernode", c.supernodes, "`URL` of a supernode, to be a peer without a dfdaemon; may be repeated")
	fs.StringVar(&c.advertise, "advertise", c.advertise, "`address` at which other hosts reach this one while it downloads; empty: as the supernode sees it")
	fs.StringVar(&c.tls, "tls", c.tls, "`directory` with tls.crt, tls.key and ca.crt, for a peer without a dfdaemon where the region has TLS")
	fs.StringVar(&c.joinToken, "join-token", c.joinToken, "`file` with a token that supernode ca printed, in place of --tls")
	fs.BoolVar(&c.clearPrivate, "clear-private", c.clearPrivate, "send credentials to the region without TLS: where the network itself is encrypted")
	fs.StringVar(&c.dataDir, "data-dir", c.dataDir, "where a peer keeps pieces until it is done")
	fs.StringVar(&c.zone, "zone", c.zone, "where the host is: pieces come from the same zone where they can")
	fs.StringVar(&c.rack, "rack", c.rack, "where in the zone the host is")
}

// Validate tells what is wrong with the settings.
func (c *config) Validate() error {
	if c.output == "" {
		return errors.New("no output is given: name a file with -o")
	}
	if c.output == "-" {
		return errors.New("the output is a file, which the standard output is not: name one with -o, ./- for one of that name")
	}
	if (c.tls != "" || c.joinToken != "") && len(c.supernodes) == 0 {
		return errors.New("--tls and --join-token are for --supernode: through a dfdaemon its own certificate counts")
	}
	if c.socket != "" && c.socket != noSocket && len(c.supernodes) > 0 {
		return errors.New("--socket and --supernode exclude each other")
	}
	if err := (dfget.PeerConfig{Supernodes: c.supernodes}).Validate(); err != nil {
		return err
	}
	if c.digest != "" {
		if id, err := pieces.ParseTaskID(c.digest); err != nil || id.Content() == "" {
			return fmt.Errorf("digest %.100q: want sha256:, sha384: or sha512: and the digest in hex", c.digest)
		}
	}
	c.headerByKey = http.Header{}
	for _, h := range c.headers {
		k, v, ok := strings.Cut(h, ":")
		if !ok || strings.TrimSpace(k) == "" {
			return errors.New("header: want 'Name: value'") // without its text, which may be secret
		}
		c.headerByKey.Add(strings.TrimSpace(k), strings.TrimSpace(v))
	}
	return nil
}

func (c *config) run(ctx context.Context, log *zap.Logger, args []string) error {
	if _, err := dfget.URLRequest(args[0], c.digest, c.headerByKey); err != nil {
		return cli.WithCode(cli.ExitUsage, err)
	}
	socket := c.socket
	if _, err := os.Stat(daemonSocket); err == nil && socket == "" && len(c.supernodes) == 0 {
		socket = daemonSocket
	}
	if socket == noSocket {
		socket = ""
	}
	peer := dfget.PeerConfig{Supernodes: c.supernodes, Advertise: c.advertise, Zone: c.zone, Rack: c.rack, ClearPrivate: c.clearPrivate}
	if len(c.supernodes) > 0 {
		var err error
		if peer.Identity, err = identity.ForHost(c.tls, c.joinToken, filepath.Join(c.dataDir, "identity"), c.supernodes, log); err != nil {
			return cli.WithCode(cli.ExitUsage, err)
		}
	}
	show := &progress{w: os.Stderr, began: time.Now(), daemon: socket != "", terminal: term.IsTerminal(int(os.Stderr.Fd()))}
	d := dfget.Download{
		URL: args[0], Digest: c.digest, Header: c.headerByKey, Output: c.output, Socket: socket, DataDir: c.dataDir, Log: log,
		Peer:     peer,
		Progress: show.update,
	}
	err := d.Run(ctx)
	show.finish(c.output, err)
	if ctx.Err() != nil && err != nil {
		return errors.New("interrupted: nothing is left at " + c.output)
	}
	if _, is := errors.AsType[*dfget.MismatchError](err); is {
		return cli.WithCode(exitMismatch, err)
	}
	if _, is := errors.AsType[*dfget.RefusedError](err); is {
		return cli.WithCode(exitRefused, err)
	}
	if _, is := errors.AsType[*dfget.OutputError](err); is {
		return cli.WithCode(exitOutput, err)
	}
	return err
}
