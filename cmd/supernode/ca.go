package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/supernode/api/identity"
)

func caCommand(out io.Writer) cli.Command {
	cfg := &caConfig{}
	return cli.Command{
		Use:   "ca DIR",
		Short: "Make a region's own authority, and tokens with which hosts join",
		Long: `Where DIR holds no authority one is made, for supernode --ca DIR; several
supernodes share it. A join token is printed: a secret for dfdaemon --join-token
FILE, of which DIR keeps a hash. Whoever has ca.key can pretend to be any host.`,
		Args:   cli.One("directory"),
		Config: cfg,
		Run: func(_ context.Context, log *zap.Logger, args []string) error {
			return cfg.run(out, log, args[0])
		},
	}
}

type caConfig struct {
	list    bool
	revoke  string
	expires time.Duration
}

// Flags binds the settings.
func (c *caConfig) Flags(fs *pflag.FlagSet) {
	fs.DurationVar(&c.expires, "expires", c.expires, "how long hosts may come with the new token; 0: until it is revoked")
	fs.BoolVar(&c.list, "list", c.list, "list the tokens instead, without their secrets")
	fs.StringVar(&c.revoke, "revoke", c.revoke, "take back the token with this `id` instead: its hosts are out within a day")
}

// Validate tells what is wrong with the settings.
func (c *caConfig) Validate() error {
	switch {
	case c.list && c.revoke != "":
		return errors.New("--list and --revoke exclude each other")
	case c.expires < 0:
		return errors.New("--expires cannot be negative")
	}
	return nil
}

func (c *caConfig) run(out io.Writer, log *zap.Logger, dir string) error {
	ca, err := identity.OpenCA(dir)
	if errors.Is(err, fs.ErrNotExist) && !c.list && c.revoke == "" {
		if ca, err = identity.CreateCA(dir); err == nil {
			where, _ := filepath.Abs(dir)
			log.Info("an authority is made", zap.String("directory", where))
		}
	}
	if err != nil {
		return err
	}
	switch {
	case c.list:
		return list(out, dir)
	case c.revoke != "":
		return ca.Revoke(c.revoke)
	}
	token, err := ca.AddToken(c.expires)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(out, token.Text())
	return err
}

func list(out io.Writer, dir string) error {
	tokens, err := identity.ReadTokens(dir)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, t := range tokens {
		until := "revoked"
		if !t.Expires.IsZero() {
			until = t.Expires.Format(time.RFC3339)
		}
		if _, err := fmt.Fprintf(w, "%s\tmade %s\tgood until %s\n", t.ID, t.Made.Format(time.RFC3339), until); err != nil {
			return err
		}
	}
	return w.Flush()
}
