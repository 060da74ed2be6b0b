package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/registryproxy"
)

// The files of an authority.
const (
	caCert = "ca.crt"
	caKey  = "ca.key"
)

func caCommand(out io.Writer) cli.Command {
	cfg := &caConfig{dir: "/etc/damselfly"}
	return cli.Command{
		Use:   "ca",
		Short: "Make a certificate authority for the forward proxy to open HTTPS with",
		Long: `It writes ` + caCert + ` and ` + caKey + ` to --dir, for --proxy-ca and --proxy-ca-key. Whoever
trusts the certificate trusts it for the hosts named here and for no others;
whoever has the key can pretend to be those hosts to them.`,
		Config: cfg,
		Run: func(context.Context, *zap.Logger, []string) error {
			return cfg.run(out)
		},
	}
}

type caConfig struct {
	dir   string
	hosts []string
}

// Flags binds the settings.
func (c *caConfig) Flags(fs *pflag.FlagSet) {
	fs.StringVar(&c.dir, "dir", c.dir, "`directory` for the two files")
	fs.StringSliceVar(&c.hosts, "host", c.hosts, "`host` that it may vouch for: exact, *.corp, or * for all; may be repeated")
}

// Validate tells what is wrong with the settings.
func (c *caConfig) Validate() error {
	if len(c.hosts) == 0 {
		return errors.New("--host: name the hosts whose HTTPS is to be opened, such as registry.corp or *.corp")
	}
	return registryproxy.Hosts(c.hosts).Validate()
}

func (c *caConfig) run(out io.Writer) error {
	cert, key, err := registryproxy.CreateAuthority(c.hosts)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.dir, 0o755); err != nil { //nolint:gosec // the certificate is for all to read
		return err
	}
	certFile, keyFile := filepath.Join(c.dir, caCert), filepath.Join(c.dir, caKey)
	if _, err := os.Lstat(certFile); err == nil {
		return fmt.Errorf("%s is there already: move it and its key away first, or use another --dir", certFile)
	}
	if err := writeNew(keyFile, key, 0o600); err != nil {
		return err
	}
	if err := writeNew(certFile, cert, 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s: have clients trust it\n%s: keep it secret\n", certFile, keyFile)
	return err
}

// writeNew writes a file that is not there yet.
func writeNew(path string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode) //nolint:gosec // the user names it
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%w: move it away first, or use another --dir", err)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}
