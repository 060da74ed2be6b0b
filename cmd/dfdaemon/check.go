package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"

	"github.com/distribution/reference"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/dfdaemon"
	"damselfly.dev/dfdaemon/check"
)

// Exit codes of check beside those of every command.
const (
	exitPast    = 3
	exitRefused = 4
)

const maxPassword = 64 << 10 // bytes

// checkConfig is the settings of check.
type checkConfig struct {
	check.Config
	password, json bool
}

func checkCommand() cli.Command {
	d := dfdaemon.Default()
	c := &checkConfig{Config: check.Config{Mirror: d.MirrorListen, Metrics: d.MetricsListen, Platform: "linux/" + runtime.GOARCH}}
	return cli.Command{
		Use: "check IMAGE", Short: "Ask dfdaemon for an image as an engine would", Args: cli.One("IMAGE, such as docker.io/library/alpine"), Config: c, Level: zapcore.WarnLevel, Plain: true,
		Long: `Asks the running dfdaemon for IMAGE's manifest, configuration and smallest layer,
verifies them, and tells step by step what came through the swarm and what did not
and why, by dfdaemon's metrics: what others pull at the same time counts too.

Exit codes of its own: 1 dfdaemon does not do it (an engine turns to the registry),
3 it works past the swarm, 4 the registry refuses.`,
		Run: func(ctx context.Context, _ *zap.Logger, args []string) error {
			return c.run(ctx, args[0], os.Stdin, os.Stdout)
		},
	}
}

// Flags binds the settings.
func (c *checkConfig) Flags(fs *pflag.FlagSet) {
	fs.StringVar(&c.Mirror, "mirror", c.Mirror, "`host:port` of dfdaemon's mirror, as its --mirror-listen says")
	fs.StringVar(&c.Metrics, "metrics", c.Metrics, "`host:port` of dfdaemon's metrics, as its --metrics-listen says")
	fs.StringVar(&c.Platform, "platform", c.Platform, "`os/arch` of an image for several")
	fs.StringVar(&c.Username, "username", c.Username, "`name` at the registry, where the image is private")
	fs.BoolVar(&c.password, "password-stdin", c.password, "read the password from the standard input")
	fs.BoolVar(&c.json, "json", c.json, "tell it as JSON")
}

// Validate tells what is wrong with the settings.
func (c *checkConfig) Validate() error {
	for name, addr := range map[string]string{"mirror": c.Mirror, "metrics": c.Metrics} {
		if host, _, err := net.SplitHostPort(addr); (err != nil || host == "") && (addr != "" || name == "mirror") {
			return fmt.Errorf("%s %q: want host:port", name, addr)
		}
	}
	if n := strings.Count(c.Platform, "/"); n < 1 || n > 2 {
		return fmt.Errorf("platform %q: want os/arch, such as linux/arm64", c.Platform)
	}
	if (c.Username != "") != c.password {
		return errors.New("--username and --password-stdin belong together")
	}
	return nil
}

func (c *checkConfig) run(ctx context.Context, name string, in io.Reader, out io.Writer) error {
	image, err := parseImage(name)
	if err != nil {
		return cli.WithCode(cli.ExitUsage, fmt.Errorf("image %.200q: %w", name, err))
	}
	if c.password {
		b, err := io.ReadAll(io.LimitReader(in, maxPassword)) //nolint:forbidigo // capped
		if err != nil {
			return fmt.Errorf("read the password: %w", err)
		}
		c.Password = strings.TrimRight(string(b), "\r\n")
	}
	report := check.Run(ctx, c.Config, image, func(s check.Step) {
		if !c.json {
			tell(out, s)
		}
	})
	if c.json {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		if err := e.Encode(report); err != nil {
			return err
		}
	}
	switch report.Outcome {
	case check.Past:
		return cli.WithCode(exitPast, errors.New("it works, past the swarm"))
	case check.Refused:
		return cli.WithCode(exitRefused, errors.New("the registry refuses"))
	case check.Failed:
		return errors.New("dfdaemon does not do it; an engine turns to the registry")
	}
	return nil
}

// sources are where bytes come from, for people.
var sources = []struct{ key, name string }{
	{"peer", "other hosts"}, {"supernode", "the supernode"}, {"store", "this host's own store"}, {"origin", "the registry"},
}

// tell writes a step for people; who does not listen misses it.
func tell(out io.Writer, s check.Step) {
	_, _ = fmt.Fprintf(out, "%-8s%s: %s (%d ms)\n", s.Outcome, s.Name, s.Says, s.Millis)
	for _, source := range sources {
		if n := s.Sources[source.key]; n > 0 {
			_, _ = fmt.Fprintf(out, "%8s%d bytes from %s\n", "", n, source.name)
		}
	}
	if s.Why != "" {
		_, _ = fmt.Fprintf(out, "%8s%s\n", "", s.Why)
	}
}

// parseImage reads an image's name as docker does.
func parseImage(s string) (check.Image, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return check.Image{}, err
	}
	image := check.Image{Registry: reference.Domain(named), Name: reference.Path(named), Reference: "latest"}
	if tagged, ok := named.(reference.Tagged); ok {
		image.Reference = tagged.Tag()
	}
	if digested, ok := named.(reference.Digested); ok {
		image.Reference = digested.Digest().String()
	}
	return image, nil
}
