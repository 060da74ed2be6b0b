package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/dfdaemon"
	"damselfly.dev/dfdaemon/setup"
)

// setupConfig is the settings of setup and, but for the first two, of unset.
type setupConfig struct {
	mirror     string
	registries []string
	root       string
	dryRun     bool
	undo       bool
	asked      []setup.Registry // of registries, by Validate
}

func setupCommand() cli.Command {
	c := &setupConfig{mirror: dfdaemon.Default().MirrorListen, root: "/"}
	return c.command("setup containerd|docker|crio|podman", "Have an engine pull through dfdaemon", `Writes dfdaemon into the engine's configuration: its own entry and no more, with
the registry itself still the fallback. What changes is listed, or with --dry-run
shown; files are kept as they were in /var/lib/damselfly/setup, and "dfdaemon unset"
undoes it to the byte. A second run changes nothing. No engine is restarted: the
output says where one has to be. Entries that contradict are an error, and nothing
is changed.

containerd pulls all registries through dfdaemon unless some are named. docker
knows mirrors for docker.io alone, unless containerd holds its images. podman and
CRI-O, which share their files, need names; without any they get docker.io,
ghcr.io, quay.io and registry.k8s.io.`)
}

func unsetCommand() cli.Command {
	c := &setupConfig{root: "/", undo: true}
	return c.command("unset containerd|docker|crio|podman", "Undo setup", `Files become what they were before setup, byte for byte. Where somebody has changed
them since, dfdaemon's own entry goes and all else stays.`)
}

func (c *setupConfig) command(use, short, long string) cli.Command {
	return cli.Command{
		Use: use, Short: short, Long: long, Args: oneEngine, Config: c, Level: zapcore.WarnLevel, Plain: true,
		Run: func(_ context.Context, _ *zap.Logger, args []string) error {
			return c.run(setup.Engine(args[0]), os.Stdout)
		},
	}
}

func oneEngine(_ *cobra.Command, args []string) error {
	if len(args) != 1 || !slices.Contains(setup.Engines, setup.Engine(args[0])) {
		return fmt.Errorf("want one engine: %v", setup.Engines)
	}
	return nil
}

// Flags binds the settings.
func (c *setupConfig) Flags(fs *pflag.FlagSet) {
	if !c.undo {
		fs.StringVar(&c.mirror, "mirror", c.mirror, "`host:port` of dfdaemon's mirror, as its --mirror-listen says")
		fs.StringSliceVar(&c.registries, "registry", c.registries,
			"`host` of a registry to pull through dfdaemon; may be repeated; for podman and crio one with a port is HOST:PORT=NAME, where dfdaemon has --registry NAME=URL")
	}
	fs.StringVar(&c.root, "root", c.root, "`directory` where the host's file system is")
	fs.BoolVar(&c.dryRun, "dry-run", c.dryRun, "show what would change, and change nothing")
}

// Validate tells what is wrong with the settings.
func (c *setupConfig) Validate() error {
	for _, s := range c.registries {
		r, err := setup.ParseRegistry(s)
		if err != nil {
			return err
		}
		c.asked = append(c.asked, r)
	}
	if c.root == "" {
		return errors.New("root is empty: name the directory where the host's file system is")
	}
	return nil
}

func (c *setupConfig) run(e setup.Engine, out io.Writer) error {
	var p *setup.Plan
	var err error
	if c.undo {
		p, err = setup.Unset(e, c.root)
	} else {
		cfg := setup.Config{Root: c.root, Mirror: c.mirror, Registries: c.asked}
		if err := cfg.Validate(e); err != nil {
			return cli.WithCode(cli.ExitUsage, err)
		}
		p, err = setup.Setup(e, cfg)
	}
	if err == nil && !c.dryRun {
		err = p.Apply()
	}
	if err != nil {
		return fmt.Errorf("nothing is changed: %w", err)
	}
	return c.tell(p, out)
}

// tell says what was done, or would be.
func (c *setupConfig) tell(p *setup.Plan, out io.Writer) error {
	text := ""
	changes := p.Changes()
	switch {
	case len(changes) == 0:
		text = "nothing to change\n"
	case c.dryRun:
		text = p.Diff()
	default:
		for _, change := range changes {
			text += fmt.Sprintf("%-6s %s\n", change.Action, change.Path)
		}
	}
	for _, note := range p.Notes {
		text += "note: " + note + "\n"
	}
	_, err := io.WriteString(out, text)
	return err
}
