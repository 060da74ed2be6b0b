package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"damselfly.dev/cmd/internal/cli"
	"damselfly.dev/supernode"
)

// tokenConfig is the settings of supernode token.
type tokenConfig struct {
	role   string
	stdout io.Writer
}

// tokenCommand returns the command that makes a token.
func tokenCommand(stdout io.Writer) cli.Command {
	c := &tokenConfig{role: string(supernode.RoleRead), stdout: stdout}
	return cli.Command{
		Use:   "token NAME",
		Short: "Make a token for the API at /v1/",
		Long: `It prints the token, which is nowhere kept, and the line for the file that
supernode --tokens names, which holds its hash. The file is read again when it
changes: a line that is taken away takes the right away.`,
		Args:   cli.One("NAME, of who is to have the token"),
		Config: c,
		Level:  zapcore.WarnLevel,
		Plain:  true,
		Run:    c.run,
	}
}

// Flags binds the settings.
func (c *tokenConfig) Flags(fs *pflag.FlagSet) {
	fs.StringVar(&c.role, "role", c.role, "read to look at tasks and hosts, `admin` to change something")
}

// Validate tells what is wrong with the settings.
func (c *tokenConfig) Validate() error {
	_, err := supernode.ParseRole(c.role)
	return err
}

func (c *tokenConfig) run(_ context.Context, _ *zap.Logger, args []string) error {
	token, line, err := supernode.NewToken(args[0], supernode.Role(c.role))
	if err != nil {
		return cli.WithCode(cli.ExitUsage, err)
	}
	_, err = fmt.Fprintf(c.stdout, "token, shown once:  %s\nline for --tokens:  %s\n", token, line)
	return err
}
